"""GGUF files of ours as the `gguf` package, transformers and llama.cpp read them, and the numbers that all of them give."""
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, read_jsonl, run
from gguf import GGUFReader, dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GOLDEN = ROOT / "tests/golden/models"
TEXTS = ["Once upon a time there was a fox", "x = [1, 22, 333]\n\n\tdone", "naïve café — 你好 🙂"]


# What GGUF, or llama.cpp, does not say of golden models.
CHANGED = {
    "qwen3": dict(use_sliding_window=False, sliding_window=None, layer_types=["full_attention"] * 2),
    "gemma2": dict(query_pre_attn_scalar=12),
    "gemma3": dict(query_pre_attn_scalar=12),
    "gemma3_new": dict(query_pre_attn_scalar=12),
    # A model that is named phi3, as its folder is, must have Phi-3's own tokens there.
    "phi3": {},
}


def golden(name, folder):
    """A golden model, without what GGUF or llama.cpp cannot express."""
    if name not in CHANGED:
        return GOLDEN / name
    copy = folder / "changed"
    shutil.copytree(GOLDEN / name, copy, ignore=shutil.ignore_patterns("golden*"))
    config = json.loads((copy / "config.json").read_text())
    config.update(CHANGED[name])
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", ["llama2", "llama3", "tied", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_transformers_reads_ours(tmp_path, name, dtype):
    """Equal tensors, and with them equal logits; equal ids. (Heads of a Qwen 3 are always 128 wide there.)"""
    if name == "llama3":
        pytest.skip("transformers leaves rope_freqs.weight out")
    model = golden(name, tmp_path)
    run("corral", "convert", "--from", model, "--to", tmp_path / "model.gguf", "--format", "gguf", "--dtype", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    state = theirs.state_dict()
    for key, t in load_file(model / "model.safetensors").items():
        rounded = t.to(getattr(torch, dtype)).float() if t.ndim > 1 else t
        assert torch.equal(state[key], rounded), key
        ours.state_dict()[key].copy_(rounded)
    ids = list(range(3, 40))
    assert torch.equal(logits(theirs, ids), logits(ours, ids))
    before = AutoTokenizer.from_pretrained(model)
    run("corral", "convert", "--from", tmp_path / "model.gguf", "--to", tmp_path / "back", "--format", "hf")
    after = AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"], text
    assert after.chat_template == before.chat_template


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q4_1"])
def test_blocks_are_the_packages(tmp_path, dtype):
    run("corral", "convert", "--from", GOLDEN / "llama2", "--to", tmp_path / "model.gguf", "--format", "gguf", "--dtype", dtype)
    original = load_file(GOLDEN / "llama2/model.safetensors")
    names = {"blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight", "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
             "token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight", "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight"}
    found = {}
    for tensor in GGUFReader(tmp_path / "model.gguf").tensors:
        if tensor.name in names:
            found[tensor.name] = tensor.tensor_type.name
            t = original[names[tensor.name]].numpy()
            assert np.array_equal(tensor.data, quantize(t, tensor.tensor_type)), tensor.name
            assert list(tensor.shape) == list(t.shape)[::-1]
    upper = dtype.upper()
    assert found == {"blk.0.attn_v.weight": upper, "blk.1.ffn_down.weight": upper, "token_embd.weight": "Q8_0", "output.weight": "Q8_0",
                     "blk.0.attn_norm.weight": "F32"}


def test_experts_are_stacked(tmp_path):
    run("corral", "convert", "--from", GOLDEN / "mixtral", "--to", tmp_path, "--format", "gguf")
    original = load_file(GOLDEN / "mixtral/model.safetensors")
    tensors = {t.name: t for t in GGUFReader(tmp_path / "model.gguf").tensors}
    for matrix, theirs in [("gate", "w1"), ("down", "w2"), ("up", "w3")]:
        stacked = torch.stack([original[f"model.layers.1.block_sparse_moe.experts.{e}.{theirs}.weight"] for e in range(4)])
        tensor = tensors[f"blk.1.ffn_{matrix}_exps.weight"]
        assert np.array_equal(dequantize(tensor.data, tensor.tensor_type), stacked.numpy())


def test_a_merged_adapter_becomes_a_file(tmp_path, made):
    """LoRA trained here, merged and written in one step."""
    (tmp_path / "sft.yaml").write_text(f"""\
output_dir: {tmp_path}/sft
model: {{path: {made}/run}}
tokenizer: {{path: {made}/tokenizer, template: "{{prompt}}\\n{{completion}}"}}
data: {{train: ["{made}/data/sft.train.jsonl"], sequence_length: 128, cache: {tmp_path}/cache}}
lora: {{rank: 4, alpha: 8}}
optim: {{lr: 1.0e-2}}
train: {{steps: 3, batch_size: 4}}
""")
    run("corral", "sft", "--config", tmp_path / "sft.yaml")
    run("corral", "convert", "--from", tmp_path / "sft", "--to", tmp_path / "merged.gguf", "--format", "gguf")
    run("corral", "merge", "--adapter", tmp_path / "sft", "--output", tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", dtype=torch.float32).state_dict()
    for key, t in load_file(tmp_path / "merged/model.safetensors").items():
        assert torch.equal(theirs[key], t), key


def real():
    """The fetched real model, and whether it is there."""
    home = pathlib.Path(os.environ.get("CORRAL_HOME") or pathlib.Path.home() / ".cache/corral")
    return home / "models/smollm2-135m-instruct"


needs_real = pytest.mark.skipif(not real().exists(), reason="smollm2-135m-instruct is not fetched: corral get smollm2-135m-instruct")


@needs_real
def test_log_probabilities_are_transformers(tmp_path):
    """2,000 tokens of text, from a GGUF file."""
    file = tmp_path / "model.gguf"
    run("corral", "convert", "--from", real(), "--to", file, "--format", "gguf")
    tokenizer = AutoTokenizer.from_pretrained(real())
    text = "".join((ROOT / name).read_text() for name in ["README.md", "docs/operations.md"])
    ids = tokenizer(text)["input_ids"][:2001]
    (tmp_path / "in.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n")
    out = run("corral", "score", "--model", file, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    ours = torch.tensor(read_jsonl(tmp_path / "out.jsonl")[0]["logprobs"], dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(real(), dtype=torch.float32).eval()
    theirs = torch.log_softmax(logits(model, ids).double(), -1)[torch.arange(2000), torch.tensor(ids[1:])]
    off = (ours - theirs).abs().max().item()
    print(f"largest difference of 2,000 log-probabilities: {off:.2e}")
    assert ours.shape == theirs.shape and off <= 2e-4, out


def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in .interop: INTEROP=full make interop")


def their_greedy(llm, ids, n):
    out = []
    llm.reset()
    for token in llm.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        out.append(token)
        if len(out) == n:
            return out


# llama.cpp leaves their window out.
WITHIN_WINDOW = {"mistral": 7, "phi3": 6}
LLAMA_CPP = ["llama2", "llama3", "tied", "mistral", "qwen2", "qwen3", "mixtral", "gemma2", "gemma3", "gemma3_new", "olmo2", "phi3"]


def as_ggml_does(model):
    """ggml on a CPU takes GELU from a table of float16 numbers (GGML_GELU_FP16)."""
    for layer in model.model.layers:
        if "gelu" in model.config.to_dict().get("hidden_activation", ""):
            gelu = layer.mlp.act_fn.forward
            layer.mlp.act_fn.forward = lambda x, gelu=gelu: torch.where(x.abs() < 10, gelu(x.half().float()).half().float(), gelu(x))
    return model


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_llama_cpp_computes_what_transformers_does(tmp_path, name):
    """Logits, greedy tokens and ids of ours in llama.cpp."""
    llama = llama_cpp()
    model = golden(name, tmp_path)
    run("corral", "convert", "--from", model, "--to", tmp_path / "model.gguf", "--format", "gguf")
    llm = llama.Llama(str(tmp_path / "model.gguf"), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0)
    reference = as_ggml_does(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval())
    rows = reference.config.vocab_size
    ids = [3 + i * 7 % (rows - 10) for i in range(WITHIN_WINDOW.get(name, 100))]
    llm.eval(ids)
    theirs = torch.tensor(np.array(llm.scores[: len(ids)]))
    ours = logits(reference, ids)
    off = (ours - theirs).abs().amax(-1)
    print(f"{name}: largest difference of a token's logits: median {off.median():.1e}, largest {off.max():.1e}")
    # A number between two of the table may go to either.
    assert off.median() <= 5e-5 and off.max() <= (5e-3 if name.startswith("gemma") else 1e-4)
    if name not in WITHIN_WINDOW:
        greedy = list(ids[:20])
        for _ in range(16):
            greedy.append(int(logits(reference, greedy)[-1].argmax()))
        assert their_greedy(llm, ids[:20], 16) == greedy[20:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    for text in TEXTS:
        assert llm.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text


@needs_real
@pytest.mark.parametrize("dtype", ["float32", "q8_0", "q4_1"])
def test_llama_cpp_answers_as_we_do(tmp_path, made, dtype):
    """Ids of texts; of float32, greedy tokens; of blocks, log-probabilities, which llama.cpp computes in 8 bits."""
    llama = llama_cpp()
    file = tmp_path / "model.gguf"
    run("corral", "convert", "--from", real(), "--to", file, "--format", "gguf", "--dtype", dtype)
    f32 = 0  # GGML_TYPE_F32
    llm = llama.Llama(str(file), n_ctx=1024, logits_all=True, verbose=False, type_k=f32, type_v=f32)
    tokenizer = AutoTokenizer.from_pretrained(real())
    for text in TEXTS + ["It's 12:34 o'clock,  isn't it?\r\n"]:
        assert llm.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text)["input_ids"], text
    if dtype == "float32":
        for question in ["What is the capital of France?", "Name three colours.", "Write one line about the sea."]:
            (tmp_path / "in.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n")
            run("corral", "generate", "--model", file, "--chat", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl",
                "--temperature", 0, "--max-new-tokens", 32, "--overwrite")
            ours = read_jsonl(tmp_path / "out.jsonl")[0]
            ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]
            theirs = their_greedy(llm, ids, 32)
            ends = [i for i, token in enumerate(theirs) if token in (0, 2)]
            answer = tokenizer.decode(theirs[: ends[0]] if ends else theirs)
            print(question, "->", answer)
            assert ours["completion"] == answer, ours
        return
    problems = read_jsonl(made / "data/sft.train.jsonl")
    text = "\n".join(problem["question"] + "\n" + problem["answer"] for problem in problems[:40])
    ids = tokenizer(text)["input_ids"][:501]
    run("corral", "convert", "--from", file, "--to", tmp_path / "hf", "--format", "hf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours = torch.log_softmax(logits(read, ids).double(), -1)
    llm.reset()
    llm.eval(ids)
    theirs = torch.log_softmax(torch.tensor(np.array(llm.scores[: len(ids)])).double(), -1)
    at = torch.arange(500), torch.tensor(ids[1:])
    off = (ours[at] - theirs[at]).abs().mean().item()
    print(f"{dtype}: mean absolute difference of 500 log-probabilities {off:.4f}")
    assert off <= 0.05
