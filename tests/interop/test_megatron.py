"""Megatron's formats: megatron-core itself loads what Corral writes, and torch.distributed.checkpoint reads it."""
import pathlib
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file

GOLDEN = ROOT / "tests/golden/megatron"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if (path / "hf").is_dir())
LOADER = pathlib.Path(__file__).with_name("megatron_core.py")


def loader(*args):
    """Runs megatron-core; a failure shows what it said."""
    done = subprocess.run([sys.executable, LOADER, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def logits_of(folder, model, tensor, pipeline=1):
    """What megatron-core's own model computes from a folder, for the ids that come with a golden model, and what it should."""
    golden = load_file(GOLDEN / model / "golden.safetensors")
    out = folder / "logits.safetensors"
    ids = GOLDEN / model / "golden.safetensors"
    loader(folder, "--tensor", tensor, "--pipeline", pipeline, "--ids", ids, "--out", out)
    return load_file(out)["logits"], golden["logits"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", ["megatron", "megatron-dist"])
def test_megatron_core_loads_what_we_write(tmp_path, model, form):
    run("corral", "convert", "--from", GOLDEN / model / "hf", "--to", tmp_path / "out", "--format", form, "--tensor", 2)
    ours, theirs = logits_of(tmp_path / "out", model, 2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["megatron", "megatron-dist"])
def test_stages_padding_and_names_of_transformer_engine(tmp_path, form):
    model = "mixtral" if "mixtral" in MODELS else MODELS[0]
    run("corral", "convert", "--from", GOLDEN / model / "hf", "--to", tmp_path / "out", "--format", form, "--tensor", 2,
        "--pipeline", 2, "--make-vocab-size-divisible-by", 40, "--transformer-impl", "transformer_engine")
    ours, theirs = logits_of(tmp_path / "out", model, 2, 2)
    rows = theirs.shape[-1]
    assert ours.shape[-1] == -(-rows // 80) * 80
    torch.testing.assert_close(ours[..., :rows], theirs, rtol=0, atol=1e-5)


def test_whole_tensors_are_those_of_megatron_core(tmp_path):
    """Read by torch's distributed checkpoints alone, saved by other ranks."""
    model = "mixtral" if "mixtral" in MODELS else MODELS[0]
    run("corral", "convert", "--from", GOLDEN / model / "hf", "--to", tmp_path / "out", "--format", "megatron-dist", "--tensor", 2,
        "--pipeline", 2)
    loader(tmp_path / "out", "--dcp", tmp_path / "ours.safetensors")
    loader(GOLDEN / model / "torch_dist-tp1-pp1", "--dcp", tmp_path / "theirs.safetensors")
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
