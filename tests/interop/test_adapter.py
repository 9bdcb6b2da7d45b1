"""Adapters: ours in PEFT, PEFT's in ours, and a merged model in transformers."""
import json

import pytest
import torch
from conftest import ROOT, read_jsonl, run
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ROWS = [[1, 5, 9, 20, 33, 47, 88, 120, 7, 3], [250, 17, 17, 64, 2, 199]]

ADAPTERS = {
    "all": "lora={rank: 4, alpha: 8, dropout: 0.1}",
    "some": "lora={rank: 4, alpha: 8, rslora: true, targets: attention, modules_to_save: [embed_tokens, lm_head]}",
    # Two new tokens, whose rows the adapter holds.
    "grown": "lora={rank: 4, alpha: 8, modules_to_save: [embed_tokens, lm_head]}",
    "upper": "lora={rank: 2, alpha: 8, targets: [q_proj, mlp.down_proj]}",
}


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logprobs(model):
    """Of every token of ROWS but the first of each."""
    return [
        model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        for ids in ROWS
    ]


def scored(model, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in ROWS))
    run("corral", "score", "--model", model, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    return [torch.tensor(line["logprobs"], dtype=torch.float64) for line in read_jsonl(tmp_path / "out.jsonl")]


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_and_transformers_load_ours(made, name, tmp_path):
    (tmp_path / "sft.yaml").write_text(f"""\
output_dir: {tmp_path}/run
model: {{path: {made}/run}}
tokenizer: {{path: {made}/tokenizer, template: "{{prompt}}\\n{{completion}}"}}
data: {{train: ["{made}/data/sft.train.jsonl"], sequence_length: 128, cache: {tmp_path}/cache}}
optim: {{lr: 1.0e-2}}
train: {{steps: 6, batch_size: 8}}
""")
    words = {"upper": ["freeze.blocks=1"], "grown": ["tokenizer.add_tokens=['<|x|>', '<|y|>']"]}.get(name, [])
    run("corral", "sft", "--config", tmp_path / "sft.yaml", ADAPTERS[name], *words)
    ours = scored(tmp_path / "run", tmp_path)
    base = load(made / "run/model")
    assert max((a - b).abs().max() for a, b in zip(ours, logprobs(base))) > 1e-3, "the adapter does something"
    if name == "grown":
        # As PEFT's documentation has it: the model gets its rows before the adapter.
        rows = base.get_input_embeddings().num_embeddings
        base.resize_token_embeddings(rows + 2)
    theirs = PeftModel.from_pretrained(base, tmp_path / "run/model").eval()
    close(ours, logprobs(theirs))

    run("corral", "merge", "--model", made / "run/model", "--adapter", tmp_path / "run/model", "--output", tmp_path / "merged")
    close(ours, logprobs(load(tmp_path / "merged")))


@pytest.mark.parametrize("options", [
    dict(r=4, lora_alpha=16, target_modules="all-linear"),
    dict(r=8, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]),
    dict(r=2, lora_alpha=2, target_modules=["v_proj"], layers_to_transform=[1]),
], ids=["all", "some", "one"])
def test_ours_loads_pefts(made, options, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(load(made / "run/model"), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    close(scored(tmp_path / "adapter", tmp_path), logprobs(model))


@pytest.mark.parametrize("lora", ["{rank: 4, alpha: 8}", "{rank: 2, alpha: 8, rslora: true, targets: [q_proj, v_proj, up_proj]}"], ids=["all", "some"])
def test_joined_layers(made, lora, tmp_path):
    """A Phi-3's qkv_proj and gate_up_proj: ours in PEFT, merged in transformers, and PEFT's own in ours."""
    base = ROOT / "tests/golden/models/phi3"
    (tmp_path / "sft.yaml").write_text(f"""\
output_dir: {tmp_path}/run
model: {{path: {base}}}
tokenizer: {{path: {base}, template: "{{prompt}}\\n{{completion}}"}}
data: {{train: ["{made}/data/sft.train.jsonl"], sequence_length: 96, cache: {tmp_path}/cache}}
optim: {{lr: 1.0e-2}}
train: {{steps: 6, batch_size: 8}}
""")
    run("corral", "sft", "--config", tmp_path / "sft.yaml", f"lora={lora}")
    ours = scored(tmp_path / "run", tmp_path)
    assert max((a - b).abs().max() for a, b in zip(ours, logprobs(load(base)))) > 1e-3, "the adapter does something"
    close(ours, logprobs(PeftModel.from_pretrained(load(base), tmp_path / "run/model").eval()))
    run("corral", "merge", "--adapter", tmp_path / "run/model", "--output", tmp_path / "merged")
    close(ours, logprobs(load(tmp_path / "merged")))

    torch.manual_seed(0)
    targets = ["qkv_proj", "gate_up_proj", "down_proj"]
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=targets)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    close(scored(tmp_path / "adapter", tmp_path), logprobs(model))
