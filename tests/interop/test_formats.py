"""Torch files and Meta's format, there and back: what torch.load reads of ours, and what we read of torch.save's."""
import json
import pathlib
import shutil

import pytest
import torch
from conftest import ROOT, read_jsonl, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

GOLDEN = ROOT / "tests/golden/models"
LAYER = {
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0), "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1), "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None), "post_attention_layernorm": ("ffn_norm", None),
}


def meta_to_hf_rows(w, heads):
    """`permute` of transformers' convert_llama_weights_to_hf.py."""
    rows, cols = w.shape
    return w.view(heads, rows // heads // 2, 2, cols).transpose(1, 2).reshape(rows, cols)


def join_parts(parts, config, embedding_dim):
    """The state dict under Hugging Face's names, as transformers' conversion makes it of Meta's parts."""
    def join(name, dim):
        return parts[0][name] if dim is None else torch.cat([part[name] for part in parts], dim)

    out = {"model.embed_tokens.weight": join("tok_embeddings.weight", embedding_dim), "model.norm.weight": join("norm.weight", None),
           "lm_head.weight": join("output.weight", 0)}
    for i in range(config["num_hidden_layers"]):
        for hf, (meta, dim) in LAYER.items():
            t = join(f"layers.{i}.{meta}.weight", dim)
            if meta == "attention.wq":
                t = meta_to_hf_rows(t, config["num_attention_heads"])
            elif meta == "attention.wk":
                t = meta_to_hf_rows(t, config["num_key_value_heads"])
            out[f"model.layers.{i}.{hf}.weight"] = t
    return out


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """The golden llama3 with the rotary constants that Meta's programs have for its size."""
    folder = tmp_path_factory.mktemp("llama3")
    shutil.copytree(GOLDEN / "llama3", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("golden*"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"].update(factor=32.0, original_max_position_embeddings=8192)
    config["max_position_embeddings"] = 131072
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name, parts, embedding_dim", [("llama2", 1, 1), ("llama2", 4, 1), ("llama3", 2, 0)])
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_load_reads_our_meta_files(request, tmp_path, name, parts, embedding_dim, mmap):
    model = GOLDEN / "llama2" if name == "llama2" else request.getfixturevalue("llama3")
    config = json.loads((model / "config.json").read_text())
    run("corral", "convert", "--from", model, "--to", tmp_path / "meta", "--format", "meta", "--model-parallel", parts)
    files = sorted((tmp_path / "meta").glob("consolidated.*.pth"))
    assert len(files) == parts
    loaded = [torch.load(file, weights_only=True, mmap=mmap) for file in files]
    original = load_file(model / "model.safetensors")
    joined = join_parts(loaded, config, embedding_dim)
    assert joined.keys() == original.keys()
    for key, t in original.items():
        assert joined[key].dtype == t.dtype and torch.equal(joined[key], t), key
    params = json.loads((tmp_path / "meta/params.json").read_text())
    assert (params["dim"], params["n_layers"], params["vocab_size"]) == (64, 2, 600)
    assert (params.get("use_scaled_rope"), params.get("n_kv_heads")) == ((True, 2) if name == "llama3" else (None, None))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_are_torchs(tmp_path, dtype):
    run("corral", "convert", "--from", GOLDEN / "llama2", "--to", tmp_path / "meta", "--format", "meta", "--dtype", dtype)
    run("corral", "convert", "--from", GOLDEN / "llama2", "--to", tmp_path / "hf", "--format", "hf", "--dtype", dtype)
    original = load_file(GOLDEN / "llama2/model.safetensors")
    meta = torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True)
    hf = load_file(tmp_path / "hf/model.safetensors")
    dtype = getattr(torch, dtype)
    assert torch.equal(meta["output.weight"], original["lm_head.weight"].to(dtype))
    for key, t in original.items():
        assert torch.equal(hf[key], t.to(dtype)), key


@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_pytorch_model_bin_gives_the_same_logits(tmp_path, max_shard_size):
    """Saved by torch, whole and in parts; what we score is what transformers computes."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama2", dtype=torch.float32).eval()
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(GOLDEN / "llama2/config.json", folder)
    state = model.state_dict()
    if max_shard_size == "5GB":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        half = len(state) // 2
        files = {f"pytorch_model-0000{i + 1}-of-00002.bin": names for i, names in enumerate([list(state)[:half], list(state)[half:]])}
        for file, names in files.items():
            torch.save({name: state[name] for name in names}, folder / file)
        index = {"weight_map": {name: file for file, names in files.items() for name in names}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.manual_seed(0)
    ids = torch.randint(600, (3, 40))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids))
    run("corral", "score", "--model", folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    with torch.no_grad():
        expected = model(ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    scored = torch.tensor([line["logprobs"] for line in read_jsonl(tmp_path / "out.jsonl")], dtype=torch.float64)
    torch.testing.assert_close(scored, expected, atol=1e-4, rtol=1e-5)


def test_transformers_loads_what_comes_of_meta(llama3, tmp_path):
    """hf -> meta -> hf, and its logits are those of the source, by transformers on both sides."""
    run("corral", "convert", "--from", llama3, "--to", tmp_path / "meta", "--format", "meta", "--model-parallel", 2)
    run("corral", "convert", "--from", tmp_path / "meta", "--to", tmp_path / "hf", "--format", "hf")
    ids = torch.arange(1, 50)[None]
    both = []
    for folder in (llama3, tmp_path / "hf"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        with torch.no_grad():
            both.append(model.eval()(ids).logits)
    assert torch.equal(*both)


def test_any_pickle_protocol_is_read(tmp_path):
    """Protocols 2 to 5 of what torch.save writes give the same model."""
    original = load_file(GOLDEN / "llama2/model.safetensors")
    for protocol in (2, 3, 4, 5):
        folder = tmp_path / str(protocol)
        folder.mkdir()
        shutil.copy(GOLDEN / "llama2/config.json", folder)
        torch.save(original, folder / "pytorch_model.bin", pickle_protocol=protocol)
        run("corral", "convert", "--from", folder, "--to", tmp_path / f"{protocol}-hf", "--format", "hf")
        read = load_file(tmp_path / f"{protocol}-hf/model.safetensors")
        assert all(torch.equal(read[key], t) for key, t in original.items()), protocol


def test_old_torch_files_and_compressed_ones_are_refused(tmp_path):
    import subprocess
    import zipfile

    from conftest import BIN

    original = load_file(GOLDEN / "llama2/model.safetensors")
    shutil.copy(GOLDEN / "llama2/config.json", tmp_path)
    path = tmp_path / "pytorch_model.bin"

    def refused():
        command = [BIN / "corral", "convert", "--from", tmp_path, "--to", tmp_path / "out", "--format", "hf"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode == 3 and not pathlib.Path(tmp_path / "out").exists(), done.stderr
        return done.stderr

    torch.save(original, path, _use_new_zipfile_serialization=False)
    assert "torch before version 1.6" in refused()
    torch.save(original, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    (tmp_path / "new").rename(path)
    assert "is compressed" in refused()
    torch.save({"model": original}, path)
    assert "`model` is a dictionary, not a tensor" in refused()
    torch.save({**original, "extra": torch.device("cpu")}, path)
    assert "it imports `torch.device`" in refused()


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_rotary_angles_are_rounded_as_in_transformers(tmp_path, name):
    """Far into a text the rounding of an angle in float32 is what differs most; both sides must round alike."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("golden*"))
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(config))
    ids = [i * 7919 % 600 for i in range(6000)]
    (tmp_path / "in.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n")
    run("corral", "score", "--model", folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    ours = torch.tensor(read_jsonl(tmp_path / "out.jsonl")[0]["logprobs"], dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)[torch.arange(5999), torch.tensor(ids[1:])]
    assert (ours - theirs).abs().max() <= 1e-4, (ours - theirs).abs().max()
