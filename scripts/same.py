#!/usr/bin/env python3
"""Trains every algorithm on tiny data with two builds, and compares weights, metrics and samples bit by bit.

    scripts/same.py OLD NEW [--only pretrain-2,ppo-1] [--keep FOLDER]

OLD and NEW are folders with `corral` and `launch`. One thread a rank, on the CPU; the number in a name is that of its ranks. Needs
Python 3.9, no packages. Exit code 1 where a bit differs.
"""
import argparse
import os
import shutil
import sys
import tempfile

from tiny_runs import SHAPE, Corral, algorithms, differ, only


def runs(data, start):
    """Subcommand, configuration and number of ranks by name."""
    of = algorithms(data, start)

    def run(name, ranks, **changes):
        subcommand, config = of[name]
        return subcommand, {**config, **changes, "checkpoint": {"every": 5, "keep": 1}}, ranks

    low = {"precision": {"compute": "bfloat16"}}
    experts = {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "model_type": "mixtral"}
    over_nf4 = {"lora": {"rank": 4, "alpha": 8, "base": "nf4"}}
    return {
        "pretrain-1": run("pretrain", 1, **low),
        "pretrain-2": run("pretrain", 2),
        "replicate-2": run("pretrain", 2, parallel={"mode": "replicate"}),
        "mixtral-2": run("pretrain", 2, model={"init": experts}),
        "sft-2": run("sft", 2, **low),
        "nf4-1": run("lora", 1, **over_nf4),
        "reward-2": run("reward", 2),
        "dpo-1": run("dpo", 1),
        "kto-2": run("kto", 2),
        "online-dpo-1": run("online-dpo", 1),
        "grpo-2": run("grpo", 2),
        "ppo-1": run("ppo", 1, **low),
        "ppo-2": run("ppo", 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--only", default="")
    parser.add_argument("--keep", help="work here, and leave it")
    args = parser.parse_args()
    folder = os.path.abspath(args.keep) if args.keep else tempfile.mkdtemp()
    os.makedirs(folder, exist_ok=True)
    old, new = (Corral(binaries, folder) for binaries in (args.old, args.new))
    chosen = only(runs(*old.prepare()), args.only)
    bad = 0
    for name, (subcommand, config, ranks) in chosen.items():
        if not old.knows(subcommand):
            print(f"{name}: OLD has no {subcommand}", flush=True)
            continue
        outputs = []
        for build, corral in (("old", old), ("new", new)):
            outputs.append(f"{folder}/{name}-{build}")
            shutil.rmtree(outputs[-1], ignore_errors=True)
            corral.run(corral.words(subcommand, config, outputs[-1]), ranks)
        differences = differ(*outputs)
        print(f"{name}: {'the same' if not differences else 'different'}", flush=True)
        for difference in differences:
            print(f"  {difference}")
        bad += bool(differences)
    print(f"{len(chosen)} runs, {bad} of them different")
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if bad else 0)


main()
