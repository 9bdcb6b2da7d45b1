"""`corral report` in a real browser: the curves are there, and nothing fails."""
import json
import re
import shutil
import subprocess

import pytest
from conftest import run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def run_folder(path, factor):
    path.mkdir()
    (path / "config.yaml").write_text("# A run of `corral sft`; relative paths are relative to /\noptim: {lr: %g}\ntrain: {steps: 20}\n" % factor)
    lines = [dict(kind="train", step=i, loss=factor / i, lr=1e-3, tokens=100 * i, elapsed_s=0.5 * i, skipped_steps=0) for i in range(1, 21)]
    lines += [dict(kind="valid", step=i, loss=1.1 * factor / i) for i in (10, 20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = dict(kind="sample", step=10, prompt="<b>&amp; who?</b>", response="</script>me", reward=0.5)
    (path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return path


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_the_page_draws_its_curves(tmp_path):
    runs = [run_folder(tmp_path / name, factor) for name, factor in (("first", 1.0), ("second", 2.0))]
    page = tmp_path / "report.html"
    run("corral", "report", *runs, "--output", page)
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    seen = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert seen.returncode == 0, seen.stderr
    assert "CONSOLE" not in seen.stderr, seen.stderr
    charts = re.findall(r'data-metric="([a-z_]+)"', seen.stdout)
    assert charts[:2] == ["loss", "lr"], charts
    assert seen.stdout.count("<canvas") == len(charts)
    # Two runs with a curve of their own and of the validation, and the best of each.
    assert "second valid" in seen.stdout and "first best" in seen.stdout
    assert "&lt;/script&gt;me" in seen.stdout, "the sample"
    assert "class=\"differs\"" in seen.stdout, "what differs between the configurations"
