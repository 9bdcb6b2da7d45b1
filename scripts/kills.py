#!/usr/bin/env python3
"""Trains every algorithm on tiny data, kills it with SIGKILL at random moments, half of them inside a save, lets it resume, and
compares weights and metrics bit by bit with a run that was left alone.

    scripts/kills.py [--kills 100] [--seed 1] [--bin target/release] [--only pretrain,ppo] [--keep FOLDER]

Kills are divided over the algorithms. Needs Python 3.9 and the binaries of `make build`, no packages. Exit code 1 where a bit
differs.
"""
import argparse
import os
import random
import shutil
import sys
import tempfile
import time

from tiny_runs import Corral, algorithms, differ, only


class Kills(Corral):
    def __init__(self, args, folder):
        super().__init__(args.bin, folder)
        self.random, self.total = random.Random(args.seed), 0

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
    chosen = only(algorithms(*kills.prepare()), args.only)
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
