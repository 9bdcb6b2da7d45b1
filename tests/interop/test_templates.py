"""Chat templates and added tokens: what transformers and jinja2 make of them today is what the fixtures say, which the tests
in Rust hold our own against; and the golden models' templates, through our program."""
import importlib.util
import json
import shutil
import sys

import pytest
from conftest import ROOT, read_jsonl, run

FIXTURES = ROOT / "tests/fixtures"
MODELS = ROOT / "tests/golden/models"


@pytest.mark.parametrize("script, args, fixture", [
    ("make_jinja", [], "jinja.json"),
    ("make_chats", [], "chats.json"),
    ("make_tools", [MODELS], "tools.json"),
    ("make_added", [MODELS / "llama2"], "added.json"),
])
def test_fixtures_are_what_transformers_makes(tmp_path, script, args, fixture):
    spec = importlib.util.spec_from_file_location(script, FIXTURES / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(*args, tmp_path / fixture)
    made, kept = [json.loads((folder / fixture).read_text()) for folder in (tmp_path, FIXTURES)]
    assert made["cases"] == kept["cases"]
