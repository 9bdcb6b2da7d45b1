"""One tiny pretraining on two ranks, made by the real binaries, whose files the tests here read with other tools."""
import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"

CONFIG = """\
output_dir: {dir}/run
model: {{init: {{hidden_size: 64, intermediate_size: 160, num_hidden_layers: 2, num_attention_heads: 4,
                 num_key_value_heads: 2, max_position_embeddings: 256}}}}
tokenizer: {{path: {dir}/tokenizer}}
data: {{train: ["{dir}/tokens/train"], valid: ["{dir}/tokens/valid"], sequence_length: 64}}
precision: {{compute: float32}}
optim: {{lr: 3.0e-3}}
schedule: {{kind: cosine, warmup_steps: 4}}
train: {{steps: 24, batch_size: 16, micro_batch_size: 4}}
valid: {{every: 12, batches: 2}}
log: {{every: 1}}
"""


def run(program, *args):
    """Runs one of our binaries; a failure shows what it said."""
    done = subprocess.run([str(BIN / program), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{program} {' '.join(map(str, args))}: exit code {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


def read_jsonl(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with data/, tokenizer/, tokens/ and run/ (the run's folder)."""
    folder = tmp_path_factory.mktemp("made")
    run("corral", "data", "synth", "--output", folder / "data", "--seed", 1, "--count", 2000)
    run("corral", "tokenizer", "train", "--input", folder / "data/pretrain.train.jsonl", "--vocab-size", 300,
        "--output", folder / "tokenizer")
    run("corral", "tokenize", "--input", folder / "data/pretrain.train.jsonl", "--tokenizer", folder / "tokenizer",
        "--output", folder / "tokens")
    (folder / "config.yaml").write_text(CONFIG.format(dir=folder))
    run("launch", "--nproc", 2, "pretrain", "--config", folder / "config.yaml")
    return folder
