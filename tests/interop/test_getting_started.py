"""Every command of docs/getting-started.md, as it stands there; the training is cut short."""
import os
import pathlib
import shlex
import shutil
import subprocess

import pytest
from conftest import BIN, ROOT

MODEL = "smollm2-135m-instruct"
HOME = pathlib.Path(os.environ.get("CORRAL_HOME", pathlib.Path.home() / ".cache/corral"))


@pytest.mark.skipif(not (HOME / "models" / MODEL).is_dir(), reason=f"{MODEL} is not fetched")
def test_every_command_works(tmp_path):
    shutil.copytree(ROOT / "configs/data", tmp_path / "configs/data")
    text = (ROOT / "docs/getting-started.md").read_text()
    blocks = text.split("```")[1::2]
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("corral ")]
    assert len(commands) >= 7, commands
    env = dict(os.environ, PATH=f"{BIN}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="")
    for command in commands:
        words = shlex.split(command)
        if words[1] == "sft":
            words += ["train={steps: 2, batch_size: 4}", "valid.batches=1"]
        done = subprocess.run(words, cwd=tmp_path, env=env, input="Who are you?\n", capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert (tmp_path / "runs/sft/report.html").is_file()
