"""Megatron's formats: megatron-core itself loads what Corral writes, and torch.distributed.checkpoint reads it."""
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file

GOLDEN = ROOT / "tests/golden/megatron"
MODELS = sorted(path.name for path in GOLDEN.iterdir() if (path / "hf").is_dir())
FORMATS = ["megatron", "megatron-dist"]
# The model that has most kinds of tensors.
LARGEST = "mixtral" if "mixtral" in MODELS else MODELS[0]


def loader(*args):
    """Runs megatron-core; a failure shows what it said."""
    program = pathlib.Path(__file__).with_name("megatron_core.py")
    done = subprocess.run([sys.executable, program, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def convert(model, form, to, *args):
    run("corral", "convert", "--from", GOLDEN / model / "hf", "--to", to, "--format", form, *args)
    shutil.copy(GOLDEN / model / "golden.safetensors", to / "ids.safetensors")
    return to


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A folder of every model in every format, for two tensor-parallel ranks, with the logits of megatron-core's own model."""
    folder = tmp_path_factory.mktemp("megatron")
    made = [convert(model, form, folder / f"{model}-{form}", "--tensor", 2) for model in MODELS for form in FORMATS]
    loader(*made, "--tensor", 2)
    return folder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", FORMATS)
def test_megatron_core_loads_what_we_write(loaded, model, form):
    logits = load_file(loaded / f"{model}-{form}" / "logits.safetensors")["logits"]
    theirs = load_file(GOLDEN / model / "golden.safetensors")["logits"]
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-5)


def test_stages_padding_and_names_of_transformer_engine(tmp_path):
    more = ("--tensor", 2, "--pipeline", 2, "--make-vocab-size-divisible-by", 40, "--transformer-impl", "transformer_engine")
    folders = [convert(LARGEST, form, tmp_path / form, *more) for form in FORMATS]
    loader(*folders, "--tensor", 2, "--pipeline", 2)
    theirs = load_file(GOLDEN / LARGEST / "golden.safetensors")["logits"]
    rows = theirs.shape[-1]
    for folder in folders:
        logits = load_file(folder / "logits.safetensors")["logits"]
        assert logits.shape[-1] == -(-rows // 80) * 80
        torch.testing.assert_close(logits[..., :rows], theirs, rtol=0, atol=1e-5)


def test_whole_tensors_are_those_of_megatron_core(tmp_path):
    """Read by torch's distributed checkpoints alone, saved by other ranks."""
    ours = convert(LARGEST, "megatron-dist", tmp_path / "out", "--tensor", 2, "--pipeline", 2)
    loader(ours, "--dcp", tmp_path / "ours.safetensors")
    loader(GOLDEN / LARGEST / "torch_dist-tp1-pp1", "--dcp", tmp_path / "theirs.safetensors")
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
