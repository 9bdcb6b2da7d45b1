"""Reward models: transformers' sequence classification gives the raw scores that ours gives, also with an adapter."""
import json

import pytest
import torch
from conftest import read_jsonl, run
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

CONFIG = """\
output_dir: {tmp}/run
model: {{path: {made}/run}}
tokenizer: {{path: {made}/tokenizer, template: "{{prompt}}\\n{{completion}}"}}
data: {{train: ["{made}/data/rankings.train.jsonl"], sequence_length: 128, cache: {tmp}/cache}}
optim: {{lr: 3.0e-3}}
train: {{steps: 6, batch_size: 8}}
"""


def trained(made, tmp_path, *words):
    (tmp_path / "reward.yaml").write_text(CONFIG.format(tmp=tmp_path, made=made))
    run("corral", "reward", "--config", tmp_path / "reward.yaml", *words)
    lines = read_jsonl(made / "data/rankings.valid.jsonl")[:8]
    pairs = [{"prompt": line["prompt"], "completion": text} for line in lines for text in line["completions"]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return scored(tmp_path / "run", tmp_path)


def scored(model, tmp_path):
    run("corral", "score", "--model", model, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    return read_jsonl(tmp_path / "out.jsonl")


@torch.no_grad()
def scores(model, lines, pad):
    """All lines as one batch, padded on the right with the pad token and without an attention mask of ours."""
    longest = max(len(line["token_ids"]) for line in lines)
    ids = torch.tensor([line["token_ids"] + [pad] * (longest - len(line["token_ids"])) for line in lines])
    mask = (ids != pad).long()
    return model(ids, attention_mask=mask).logits[:, 0].double()


def test_transformers_gives_the_same_scores(made, tmp_path):
    lines = trained(made, tmp_path)
    folder = tmp_path / "run/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    ours = torch.tensor([line["score"] for line in lines], dtype=torch.float64)
    assert ours.std() > 0.01, "scores differ"
    torch.testing.assert_close(scores(model, lines, tokenizer.pad_token_id), ours, atol=1e-4, rtol=1e-5)
    # And back: what transformers saves.
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    again = torch.tensor([line["reward"] for line in scored(tmp_path / "theirs", tmp_path)], dtype=torch.float64)
    torch.testing.assert_close(again, ours, atol=1e-5, rtol=1e-5)


def test_peft_loads_an_adapter_with_its_head(made, tmp_path):
    lines = trained(made, tmp_path, "lora={rank: 4, alpha: 8}")
    folder = tmp_path / "run/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(made / "run/model", num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, folder).eval()
    ours = torch.tensor([line["score"] for line in lines], dtype=torch.float64)
    torch.testing.assert_close(scores(model, lines, tokenizer.pad_token_id), ours, atol=1e-4, rtol=1e-5)
