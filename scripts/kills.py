#!/usr/bin/env python3
"""Trains every algorithm on tiny data, kills it with SIGKILL at random moments, half of them inside a save, lets it resume, and
compares weights and metrics bit by bit with a run that was left alone.

    scripts/kills.py [--kills 100] [--seed 1] [--bin target/release] [--only pretrain,ppo] [--keep FOLDER]

Kills are divided over the algorithms. Needs Python 3.9 and the binaries of `make build`, no packages. Exit code 1 where a bit
differs.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

STEPS = 10
INIT = {"init": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}}
# What no two runs share, besides seconds and rates (`elapsed_s`, `tokens_per_s`).
OTHERS = {"peak_bytes", "failed_saves"}


def algorithms(data, start):
    """Subcommand and configuration by name."""
    base = {
        "optim": {"lr": 1e-2},
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
        "pretrain": ("pretrain", {**base, "model": INIT, "data": tokens, "valid": {"every": 3, "batches": 2}}),
        "sft": ("sft", {**base, "model": INIT, "data": answers}),
        "lora": ("sft", {**base, "model": {"path": start}, "data": answers, "lora": lora}),
        "reward": ("reward", {**base, "model": {"path": start}, "data": pairs}),
        "dpo": ("dpo", {**base, "model": {"path": start}, "data": pairs, "optim": {"lr": 1e-3}}),
        "online-dpo": ("online-dpo", own),
        "grpo": ("grpo", {**own, "grpo": {"group_size": 2}}),
        "ppo": ("ppo", {**own, "ppo": {"minibatch_size": 4}}),
    }


class Kills:
    def __init__(self, args, folder):
        self.args, self.folder, self.random, self.total = args, folder, random.Random(args.seed), 0
        self.corral = os.path.abspath(f"{args.bin}/corral")
        self.env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        for name in ("RANK", "WORLD_SIZE", "CORRAL_RESTART_COUNT"):
            self.env.pop(name, None)

    def start(self, words):
        log = open(f"{self.folder}/log", "w")
        return subprocess.Popen([self.corral, "--device", "cpu", "-q", *words], env=self.env, stdout=log, stderr=log)

    def run(self, words):
        code = self.start(words).wait()
        if code != 0:
            sys.exit(f"corral {' '.join(words)}: exit code {code}\n" + open(f"{self.folder}/log").read())

    def prepare(self):
        """Data, a tokenizer, and a model to begin with."""
        data = f"{self.folder}/data"
        text = f"{data}/pretrain.train.jsonl"
        self.run(["data", "synth", "--count", "60", "--output", data])
        self.run(["tokenizer", "train", "--input", text, "--vocab-size", "300", "--output", f"{data}/bpe"])
        words = ["tokenize", "--input", text, "--tokenizer", f"{data}/bpe", "--output", f"{data}/tokens"]
        self.run([*words, "--valid-fraction", "0.1"])
        start = f"{self.folder}/start"
        _, sft = algorithms(data, start)["sft"]
        self.run(self.words("sft", {**sft, "checkpoint": {"every": 100}}, start))
        return algorithms(data, f"{start}/model")

    def words(self, subcommand, config, output):
        path = f"{output}.json"
        json.dump({**config, "output_dir": output}, open(path, "w"))
        return [subcommand, "--config", path]

    def saving(self, output):
        """Whether a save is under way."""
        try:
            return any(name.startswith(".tmp-") for name in os.listdir(f"{output}/checkpoints"))
        except FileNotFoundError:
            return False

    def kill(self, words, output, seconds, in_save):
        """Starts the run, or goes on with it, and kills it. Whether it was killed, and inside a save; (False, False) where
        it came to its end before."""
        running = self.start(words)
        until = time.time() + self.random.uniform(0, seconds)
        while running.poll() is None:
            if self.saving(output) if in_save and time.time() >= until else not in_save and time.time() >= until:
                running.kill()
                break
            if not in_save:
                time.sleep(0.001)
        code = running.wait()
        if code == 0:
            return False, False
        if code != -9:
            sys.exit(f"corral {' '.join(words)}: exit code {code}\n" + open(f"{self.folder}/log").read())
        return True, self.saving(output)

    def algorithm(self, name, subcommand, config, count):
        """Kills, kills that met a save, and differences."""
        reference = f"{self.folder}/{name}"
        begun = time.time()
        self.run(self.words(subcommand, config, reference))
        seconds = time.time() - begun
        output = f"{self.folder}/{name}-killed"
        words = self.words(subcommand, config, output)
        kills = saves = 0
        differences = []
        while kills < count:
            shutil.rmtree(output, ignore_errors=True)
            for _ in range(self.random.randint(2, 6)):
                killed, saved = self.kill(words, output, seconds, in_save=self.total % 2 == 0)
                kills, saves, self.total = kills + killed, saves + saved, self.total + killed
                if not killed or kills == count:
                    break
            self.run(words)
            differences += differ(reference, output)
        return kills, saves, differences


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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bin", default="target/release")
    parser.add_argument("--only", default="")
    parser.add_argument("--keep")
    args = parser.parse_args()
    folder = os.path.abspath(args.keep) if args.keep else tempfile.mkdtemp()
    os.makedirs(folder, exist_ok=True)
    kills = Kills(args, folder)
    chosen = kills.prepare()
    if args.only:
        names = args.only.split(",")
        unknown = [name for name in names if name not in chosen]
        if unknown:
            sys.exit(f"--only: no algorithm {unknown[0]}; there are {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in names}
    all_kills = all_saves = bad = 0
    for i, (name, (subcommand, config)) in enumerate(chosen.items()):
        count = args.kills // len(chosen) + (i < args.kills % len(chosen))
        n, saves, differences = kills.algorithm(name, subcommand, config, count)
        print(f"{name}: {n} kills, {saves} of them inside a save, {len(differences)} differences", flush=True)
        for difference in differences:
            print(f"  {difference}")
        all_kills, all_saves, bad = all_kills + n, all_saves + saves, bad + len(differences)
    print(f"{all_kills} kills, {all_saves} of them inside a save, {bad} differences (seed {args.seed})")
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if bad else 0)


main()
