"""The exported model as transformers, safetensors and tokenizers see it."""
import json

import pytest
import torch
from conftest import ROOT, read_jsonl, run
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], f"{problem}: {info[problem]}"
    return model.eval()


@pytest.fixture(scope="module")
def model(made):
    return load(made / "run/model")


@pytest.fixture(scope="module")
def tokenizer(made):
    return AutoTokenizer.from_pretrained(made / "run/model")


@pytest.fixture(scope="module")
def texts(made):
    return [record["text"] for record in read_jsonl(made / "data/pretrain.valid.jsonl")[:40]]


@torch.no_grad()
def logprobs(model, ids):
    """Log-probability of every token but the first, [T - 1]."""
    ids = torch.tensor([ids])
    return model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def test_safetensors_metadata_and_dtype(made, model):
    config = json.loads((made / "run/model/config.json").read_text())
    stated = DTYPES[config.get("dtype") or config["torch_dtype"]]
    names = set()
    for path in sorted((made / "run/model").glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            assert f.metadata()["format"] == "pt"
            for name in f.keys():
                assert f.get_tensor(name).dtype == stated, name
                names.add(name)
    expected = set(model.state_dict())
    if model.config.tie_word_embeddings:
        expected.discard("lm_head.weight")
    assert names == expected


def test_same_token_ids_and_logprobs(made, model, tokenizer, texts, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run("corral", "score", "--model", made / "run/model", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    scored = read_jsonl(tmp_path / "out.jsonl")
    assert len(scored) == len(texts)
    for text, line in zip(texts, scored):
        assert line["token_ids"] == tokenizer(text).input_ids, text
        expected = logprobs(model, line["token_ids"])
        torch.testing.assert_close(torch.tensor(line["logprobs"], dtype=torch.float64), expected, atol=1e-4, rtol=1e-5)
        assert line["sum_logprob"] == pytest.approx(expected.sum().item(), abs=1e-3)


def test_same_loss_as_eval(made, model, tokenizer, texts, tmp_path):
    """One document that fits the model's context, so that no window is cut: the mean over its tokens."""
    text = texts[0]
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n")
    run("corral", "eval", "--model", made / "run/model", "--task", "perplexity", "--input", tmp_path / "one.jsonl",
        "--output", tmp_path / "eval.json")
    result = json.loads((tmp_path / "eval.json").read_text())
    ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]  # the end of the document is predicted, too
    assert result["num_tokens"] == len(ids) - 1
    assert result["num_bytes"] == len(text.encode())
    loss = -logprobs(model, ids).mean().item()
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)


def test_model_has_learnt(made, model, tokenizer, texts):
    """The weights are the trained ones: far better than uniform over the vocabulary."""
    losses = torch.cat([-logprobs(model, tokenizer(text).input_ids) for text in texts])
    assert losses.mean() < 0.8 * torch.tensor(float(len(tokenizer))).log()


FAMILY_CONFIG = """\
output_dir: {dir}/run
model: {{path: {golden}}}
data: {{train: ["{dir}/tokens/train"], sequence_length: 32}}
optim: {{lr: 1.0e-3}}
train: {{steps: 2, batch_size: 4}}
"""


@pytest.mark.parametrize("family", ["llama2", "llama3", "mistral", "mixtral", "qwen2", "qwen3"])
def test_every_family(made, family, tmp_path):
    """A golden model, trained for two steps so that biases, norms and routers are our own numbers, and exported."""
    golden = ROOT / "tests/golden/models" / family
    run("corral", "tokenize", "--input", made / "data/pretrain.valid.jsonl", "--tokenizer", golden, "--output", tmp_path / "tokens")
    (tmp_path / "config.yaml").write_text(FAMILY_CONFIG.format(dir=tmp_path, golden=golden))
    run("corral", "pretrain", "--config", tmp_path / "config.yaml")
    exported = load(tmp_path / "run/model")
    before = load(golden)
    assert type(exported) is type(before)
    for key in ("sliding_window", "layer_types", "num_local_experts", "rope_parameters", "tie_word_embeddings"):
        assert getattr(exported.config, key, None) == getattr(before.config, key, None), key

    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, exported.config.vocab_size, (4, 60), generator=generator).tolist()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    run("corral", "score", "--model", tmp_path / "run/model", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    for row, line in zip(rows, read_jsonl(tmp_path / "out.jsonl"), strict=True):
        expected = logprobs(exported, row)
        torch.testing.assert_close(torch.tensor(line["logprobs"], dtype=torch.float64), expected, atol=2e-4, rtol=1e-5)
        assert (expected - logprobs(before, row)).abs().max() > 0.01, "training changed the model"
