#!/usr/bin/env python3
"""Training speed and memory of `corral bench train` against PyTorch: a markdown table of medians.

Every measurement is a process of its own; a round runs each contestant once, so that what else the machine does falls on
all alike. The ratios are against the first row: transformers (hf-eager), fp32 on the CPU, bf16 on a GPU. Raw measurements:
OUT, one JSON object a line. A contestant that this machine's Python cannot run on the GPU is named under the table.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
CONTESTANTS = {  # the first is what the others are compared with
    "cpu": [("hf-eager", "fp32"), ("hf-eager", "bf16"), ("pytorch-plain-compile", "fp32-onednn"),
            ("pytorch-plain-compile", "bf16"), ("corral", "float32"), ("corral", "bfloat16")],
    "cuda": [("hf-eager", "bf16"), ("pytorch-plain", "bf16"), ("pytorch-plain-compile", "bf16"), ("corral", "bfloat16")],
}


def command(binary, preset, impl, precision, args):
    if impl == "corral":
        line = [binary, "bench", "train", "--preset", preset, "--precision", precision]
    else:
        line = [sys.executable, str(HERE / "peers.py"), "--preset", preset, "--impl", impl, "--precision", precision]
    if args.batch:
        line += ["--batch-size" if impl == "corral" else "--batch", str(args.batch)]
    return line + ["--device", args.device, "--steps", str(args.steps), "--warmup", str(args.warmup)]


def measure(line, may_fail):
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        if may_fail:
            return done.stderr.strip().rsplit("\n", 1)[-1][:300] or f"exit code {done.returncode}"
        sys.exit(f"failed with exit code {done.returncode}: {' '.join(line)}\n{done.stderr[-2000:]}")
    results = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    if len(results) != 1:
        sys.exit(f"expected one JSON object from: {' '.join(line)}\n{done.stdout[-2000:]}")
    return results[0]


def table(preset, rows, base):
    """rows: {(impl, precision): [measurement, ...]} -> lines of markdown."""

    def median(contestant, key):
        return statistics.median(r[key] for r in rows[contestant])

    yield f"| {preset}, ratios to {base[0]} {base[1]} | precision | tokens/s | range | ratio | peak memory, MB | ratio | start to first step, s |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for contestant in rows:
        speeds = [r["tokens_per_s"] for r in rows[contestant]]
        speed, peak = median(contestant, "tokens_per_s"), median(contestant, "peak_bytes")
        yield (f"| {contestant[0]} | {contestant[1]} | {speed:,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f} "
               f"| {speed / median(base, 'tokens_per_s'):.2f} | {peak / 1e6:,.0f} "
               f"| {peak / median(base, 'peak_bytes'):.2f} | {median(contestant, 'first_step_s'):.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["llama-15m", "llama-42m"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=CONTESTANTS, default="cpu")
    parser.add_argument("--batch", type=int, help="sequences a step (default: the preset's)")
    parser.add_argument("--only-eager", action="store_true", help="leave torch.compile out: each of its starts takes 30 s")
    parser.add_argument("--steps", type=int, default=10, help="timed steps in one measurement")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--corral", help="the binary (default: target/release/corral)")
    parser.add_argument("--out", default="runs/bench/train.jsonl")
    args = parser.parse_args()
    binary = args.corral or str(pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target")) / "release/corral")
    contestants = [c for c in CONTESTANTS[args.device] if not (args.only_eager and c[0].endswith("compile"))]
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    tables = []
    with out.open("w") as raw:
        for preset in args.presets:
            rows, missing = {c: [] for c in contestants}, []
            for turn in range(args.rounds):
                for c in list(rows):
                    result = measure(command(binary, preset, *c, args), args.device == "cuda" and c[0] != "corral")
                    if isinstance(result, str):
                        del rows[c]
                        missing.append(f"\nNot measured: {' '.join(c)}: {result}")
                        continue
                    rows[c].append(result)
                    raw.write(json.dumps(dict(result, impl=c[0], precision=c[1], round=turn)) + "\n")
                    raw.flush()
                    print(f"{preset} round {turn + 1} of {args.rounds}: {c[0]} {c[1]}: "
                          f"{result['tokens_per_s']:,.0f} tokens/s", file=sys.stderr)
            tables.append("\n".join([*table(preset, rows, next(iter(rows))), *missing]))
    gpu = ""
    if args.device == "cuda":
        name = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(name, stdout=subprocess.PIPE, text=True).stdout.split("\n")[0] + ", "
    print(f"{gpu}{os.cpu_count()} cores, median of {args.rounds} alternating rounds\n\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main()
