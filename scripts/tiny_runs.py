"""Runs of a few seconds of every algorithm on tiny data, and comparing them bit by bit (for same.py and kills.py)."""
import json
import os
import subprocess
import sys

STEPS = 10
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# What no two runs share, besides seconds and rates (`elapsed_s`, `tokens_per_s`); commits before November 2026 have no `epoch`.
OTHERS = {"peak_bytes", "failed_saves", "time", "epoch"}


def algorithms(data, start):
    """Subcommand and configuration by name; `start` is the folder of a model."""
    base = {
        "optim": {"lr": 1e-2, "weight_decay": 0.1},
        "train": {"steps": STEPS, "batch_size": 4},
        "checkpoint": {"every": 1},
        "tokenizer": {"path": f"{data}/tokens/tokenizer", "template": "{prompt}\n{completion}"},
    }
    pairs = {"train": [f"{data}/rankings.train.jsonl"], "sequence_length": 128, "cache": f"{data}/cache"}
    answers = {"train": [f"{data}/sft.train.jsonl"], "sequence_length": 128, "cache": f"{data}/cache"}
    own = {
        **base,
        "actor": {"path": start},
        "data": {"train": [f"{data}/prompts.train.jsonl"], "sequence_length": 128},
        "rewards": [{"kind": "format", "pattern": "[02468]"}],
        "generation": {"max_new_tokens": 8},
    }
    lora = {"rank": 4, "alpha": 8}
    tokens = {"train": [f"{data}/tokens/train"], "valid": [f"{data}/tokens/valid"], "sequence_length": 32}
    return {
        "pretrain": ("pretrain", {**base, "model": {"init": SHAPE}, "data": tokens, "valid": {"every": 3, "batches": 2}}),
        "sft": ("sft", {**base, "model": {"init": SHAPE}, "data": answers}),
        "lora": ("sft", {**base, "model": {"path": start}, "data": answers, "lora": lora}),
        "reward": ("reward", {**base, "model": {"path": start}, "data": pairs}),
        "dpo": ("dpo", {**base, "model": {"path": start}, "data": pairs, "optim": {"lr": 1e-3, "weight_decay": 0.1}}),
        "kto": ("kto", {**base, "model": {"path": start}, "data": pairs, "optim": {"lr": 1e-3, "weight_decay": 0.1}}),
        "online-dpo": ("online-dpo", own),
        "grpo": ("grpo", {**own, "grpo": {"group_size": 2}}),
        "ppo": ("ppo", {**own, "ppo": {"minibatch_size": 4}}),
    }


def only(runs, names):
    """Those of the runs that --only names, all where it is empty."""
    names = names.split(",") if names else list(runs)
    unknown = [name for name in names if name not in runs]
    if unknown:
        sys.exit(f"--only: no run {unknown[0]}; there are {', '.join(runs)}")
    return {name: runs[name] for name in names}


class Corral:
    """Binaries, and a folder to work in. One thread a rank, no GPU, none of a launcher's variables."""

    def __init__(self, binaries, folder):
        self.corral, self.launch = (os.path.abspath(f"{binaries}/{name}") for name in ("corral", "launch"))
        self.folder = folder
        self.env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", CORRAL_BIN=self.corral)
        for name in ("RANK", "WORLD_SIZE", "CORRAL_RESTART_COUNT"):
            self.env.pop(name, None)

    def start(self, words, ranks=1):
        log = open(f"{self.folder}/log", "w")
        launcher = [self.launch, "--nproc", str(ranks)] if ranks > 1 else []
        program = [*launcher, *words, "--device", "cpu", "-q"] if ranks > 1 else [self.corral, "--device", "cpu", "-q", *words]
        return subprocess.Popen(program, env=self.env, stdout=log, stderr=log)

    def run(self, words, ranks=1):
        code = self.start(words, ranks).wait()
        if code != 0:
            sys.exit(f"corral {' '.join(words)}: exit code {code}\n" + open(f"{self.folder}/log").read())

    def knows(self, subcommand):
        return subprocess.run([self.corral, subcommand, "--help"], env=self.env, capture_output=True).returncode == 0

    def words(self, subcommand, config, output):
        """Writes the configuration of a run into the folder `output`."""
        path = f"{output}.json"
        json.dump({**config, "output_dir": output}, open(path, "w"))
        return [subcommand, "--config", path]

    def prepare(self):
        """Makes data, a tokenizer, and a model to begin with; returns the folders of data and model."""
        data = f"{self.folder}/data"
        text = f"{data}/pretrain.train.jsonl"
        self.run(["data", "synth", "--count", "60", "--output", data])
        self.run(["tokenizer", "train", "--input", text, "--vocab-size", "300", "--output", f"{data}/bpe"])
        words = ["tokenize", "--input", text, "--tokenizer", f"{data}/bpe", "--output", f"{data}/tokens"]
        self.run([*words, "--valid-fraction", "0.1"])
        start = f"{self.folder}/start"
        _, sft = algorithms(data, start)["sft"]
        self.run(self.words("sft", {**sft, "checkpoint": {"every": 100}}, start))
        return data, f"{start}/model"


def files(folder):
    """Contents of the files of trained models, by path."""
    found = {}
    for part in ("model", "critic", "ema"):
        for at, _, names in os.walk(f"{folder}/{part}"):
            for name in names:
                path = os.path.join(at, name)
                found[os.path.relpath(path, folder)] = open(path, "rb").read()
    return found


def lines(path):
    if not os.path.exists(path):
        return []
    return [{k: v for k, v in json.loads(line).items() if k not in OTHERS and not k.endswith("_s")} for line in open(path)]


def differ(a, b):
    """What differs between two runs, in words."""
    (x, y), found = (files(a), files(b)), []
    found += [f"{path}: other bytes" for path in sorted(set(x) | set(y)) if x.get(path) != y.get(path)]
    for name in ("metrics.jsonl", "samples.jsonl"):
        x, y = lines(f"{a}/{name}"), lines(f"{b}/{name}")
        if x != y:
            at = next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), min(len(x), len(y)))
            found.append(f"{name}: {len(x)} and {len(y)} lines, the first other one is {at + 1}: {x[at:at + 1]} {y[at:at + 1]}")
    return found
