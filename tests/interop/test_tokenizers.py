"""The tokenizers that we make of SentencePiece's and tiktoken's vocabularies, as transformers reads them."""
import json
import shutil

import pytest
from conftest import ROOT, run
from transformers import AutoTokenizer

FIXTURES = ROOT / "tests/fixtures/tokenizers"


@pytest.mark.parametrize("name, file", [("llama", "tokenizer.model"), ("no_prefix", "tokenizer.model"),
                                        ("symbols", "tokenizer.model"), ("llama3", "tokenizer.model"),
                                        ("qwen", "qwen.tiktoken")])
def test_converted_vocabularies(tmp_path, name, file):
    (tmp_path / "model").mkdir()
    source = "qwen.tiktoken" if name == "qwen" else f"{name}.model"
    shutil.copy(FIXTURES / source, tmp_path / "model" / file)
    (tmp_path / "text.txt").write_text("some text\n" * 9)
    run("corral", "tokenize", "--input", tmp_path / "text.txt", "--tokenizer", tmp_path / "model", "--output", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    expected = json.loads((FIXTURES / f"{name}.json").read_text())
    assert len(expected["cases"]) > 300
    for text, ids in expected["cases"]:
        assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == ids, text
    begins = [] if name == "qwen" else [tokenizer.bos_token_id]
    assert tokenizer.encode("a") == begins + tokenizer.encode("a", add_special_tokens=False)
