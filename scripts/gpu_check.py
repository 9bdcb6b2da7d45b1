#!/usr/bin/env python3
"""Checks Corral on a GPU in stages, each with a time limit of its own, and prints a table.

    gpu_check.py                 correctness (A), then PyTorch next to Corral (B), each within a lease of some minutes
    gpu_check.py --part C        figures of other systems to be reached, row by row (TARGETS)
    gpu_check.py --stage NAME    one or more stages and what they need; --list names all
    gpu_check.py --device cpu    the commands of A and C on a CPU with a small model: proves paths and arguments
    gpu_check.py --pack          on a machine with the build: writes gpu-check.tar.gz, which can be carried alone
    gpu_check.py --prove         packs, unpacks in an empty folder, and runs those commands on the CPU there

The archive unpacks on a machine that has only a GPU and a Python with torch 2.11 (`LIBTORCH` names another libtorch). A stage that fails does
not stop the others. Runs go into ./runs-gpu-check; the folder OUT (default: gpu-check-out) gets at most six files: the table, one log, and the
measurements.
"""
import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
TESTS = ["ops", "quant", "parity", "parity_training", "generate"]
ARCHIVE = "gpu-check.tar.gz"
#: Of one H100: a key of the measurement and what it should reach; they are printed next to what was measured. Tokens a second of Qwen2.5 are
#: llm.q's, those of LoRA surogate's, the better one of what others publish (docs/gpu.md).
TARGETS = {
    "train-llama-1b": ("mfu", 0.5),
    "train-llama-1b-8": ("mfu", 0.5),
    "peers-llama-1b": ("ratio", 1.1),
    "qwen2.5-0.5b": ("tokens_per_s", 149e3),
    "qwen2.5-1.5b": ("tokens_per_s", 59e3),
    "qwen2.5-3b": ("tokens_per_s", 31e3),
    "qwen2.5-7b": ("tokens_per_s", 14e3),
    "qwen2.5-0.5b-float8": ("tokens_per_s", 164e3),
    "qwen2.5-1.5b-float8": ("tokens_per_s", 73e3),
    "qwen2.5-3b-float8": ("tokens_per_s", 40e3),
    "qwen2.5-7b-float8": ("tokens_per_s", 19e3),
    "lora-qwen3-0.6b": ("tokens_per_s", 53.9e3),
    "lora-qwen3-1.7b": ("tokens_per_s", 32.8e3),
    "lora-qwen3-4b": ("tokens_per_s", 15.9e3),
    "lora-qwen3-8b": ("tokens_per_s", 10.2e3),
    "qlora-qwen3-8b": ("tokens_per_s", 10e3),
    "decode-llama-1b-1": ("memory_share", 0.75),
    "decode-llama-1b-64": ("memory_share", 0.75),
    "decode-llama-2-7b-1": ("memory_share", 0.75),
    "decode-llama-2-7b-64": ("memory_share", 0.75),
    "checkpoint-stall": ("stall_bytes_per_s", 20e9),
}
#: What QLoRA's row may take of the GPU's memory.
QLORA_BYTES = 7.4 * 2**30
#: The largest relative difference of a float32 loss between a GPU, two ranks on it, and the CPU, over the first steps.
LOSSES_DIFFER = 1e-3


class Check:
    def __init__(self, args, device_line):
        self.device_line = device_line
        self.device = args.device
        self.cpu = args.device == "cpu"
        self.bin = binaries()
        self.out = pathlib.Path(os.environ.get("OUT") or "gpu-check-out").resolve()
        self.work = pathlib.Path("runs-gpu-check").resolve()
        self.rows, self.substitutions, self.measured = [], [], []
        shutil.rmtree(self.work, ignore_errors=True)
        for folder in (self.out, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        self.log = open(self.out / "log.txt", "w")
        self.env = dict(os.environ, CORRAL_GOLDEN=os.environ.get("CORRAL_GOLDEN", str(ROOT / "tests/golden")),
                        CORRAL_TEST_DEVICE=self.device)
        torch = libtorch()
        if torch:
            paths = [torch + "/lib", os.environ.get("LD_LIBRARY_PATH", "")]
            self.env["LD_LIBRARY_PATH"] = ":".join(p for p in paths if p)

    # --- commands ---

    def run(self, words, limit):
        """Output of a command; raises Failed with its last lines."""
        words = [str(word) for word in words]
        self.log.write(f"\n$ {' '.join(words)}\n")
        self.log.flush()
        with tempfile.TemporaryFile("w+", errors="replace") as out:
            process = subprocess.Popen(words, cwd=self.work, env=self.env, stdout=out, stderr=subprocess.STDOUT,
                                       stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
                kill_session(process)
            out.seek(0)
            text = out.read()
        self.log.write(text)
        self.log.flush()
        if code is None:
            raise Failed(f"not done after {limit} s; last line: {last_line(text)}")
        if code != 0:
            raise Failed(f"exit code {code}: {reason(text)}")
        return text

    def corral(self, *words):
        return [self.bin / "corral", "--device", self.device, *words]

    def launch(self, ranks, backend, *words):
        if self.cpu:
            backend = "gloo"
        return [self.bin / "launch", "--nproc", ranks, "--backend", backend, *words]

    def recipe(self, stage, config, output, steps, *overrides):
        steps = 2 if self.cpu else steps
        return [stage, "--device", self.device, "--config", f"{ROOT}/configs/{config}.yaml", "--resume", "never", "--overwrite",
                f"output_dir={output}", "schedule.warmup_steps=0", f"train.steps={steps}", "log.report=false", *overrides]

    def substitute(self, what, by):
        if self.cpu:
            self.substitutions.append(f"{what}: {by}")
        return by if self.cpu else what

    def losses(self, run):
        lines = map(json.loads, open(self.work / run / "metrics.jsonl"))
        return [line["loss"] for line in lines if line["kind"] == "train"]

    # --- stages of A ---

    def test(self, name, limit):
        out = self.run([self.bin / name, "--test-threads", "1"], limit)
        return next((line for line in out.splitlines() if line.startswith("test result")), "no result")

    def data(self):
        corral = self.bin / "corral"
        self.run([corral, "data", "synth", "--output", "runs/data"], 60)
        self.run([corral, "tokenizer", "train", "--input", "runs/data/pretrain.train.jsonl", "--vocab-size", "400",
                  "--output", "runs/data/tokenizer"], 60)
        self.run([corral, "tokenize", "--input", "runs/data/pretrain.train.jsonl", "--tokenizer", "runs/data/tokenizer",
                  "--output", "runs/data/tokens"], 60)
        return "tokens are made"

    def pretrain(self):
        self.substitute("NCCL", "Gloo")
        words = self.recipe("pretrain", "pretrain/default", "runs/pretrain", 400, f"precision.compute={self.bf16()}")
        self.run(self.launch(1, "nccl", *words), 90)
        loss = self.losses("runs/pretrain")
        if not self.cpu and not loss[-1] < 0.6 * loss[0]:
            raise Failed(f"the loss went from {loss[0]:.3f} to {loss[-1]:.3f} only")
        return f"loss {loss[0]:.3f} to {loss[-1]:.3f} in {len(loss)} steps"

    def sharded(self):
        """One rank, two ranks that share the GPU over Gloo, and the CPU: the same losses."""
        for run, ranks, device in (("one", 1, self.device), ("two", 2, self.device), ("cpu", 1, "cpu")):
            words = self.recipe("pretrain", "pretrain/default", f"runs/{run}", 20)
            words[words.index("--device") + 1] = device
            self.run(self.launch(ranks, "gloo", *words), 90)
        one, two, cpu = (self.losses(f"runs/{run}") for run in ("one", "two", "cpu"))
        if not len(one) == len(two) == len(cpu):
            raise Failed(f"{len(one)}, {len(two)} and {len(cpu)} steps")
        # The first ten steps: later ones drift apart from roundings alone.
        apart = [max(abs(a - b) / b for a, b in list(zip(run, cpu))[:10]) for run in (one, two)]
        text = f"largest relative difference to the CPU's losses: 1 rank {apart[0]:.1e}, 2 ranks {apart[1]:.1e}"
        if not max(apart) < LOSSES_DIFFER:
            raise Failed(text)
        return text

    def bf16(self):
        return self.substitute("bfloat16", "float32")

    def train(self, stage, config, output, steps, *overrides):
        self.run([self.bin / "corral", *self.recipe(stage, config, output, steps, *overrides)], 90)
        lines = [json.loads(line) for line in open(self.work / output / "metrics.jsonl")]
        train = [line for line in lines if line["kind"] == "train"]
        key = "reward" if "reward" in train[-1] else "loss"
        if stage == "sft" and not self.cpu and not train[-1]["loss"] < train[0]["loss"]:
            raise Failed(f"the loss went from {train[0]['loss']:.3f} to {train[-1]['loss']:.3f}")
        return f"{key} {train[0][key]:.3f} to {train[-1][key]:.3f} in {len(train)} steps"

    def float8(self):
        out = self.train("pretrain", "pretrain/default", "runs/float8", 20, "precision.compute=float8", "float8.min_size=0")
        lines = [json.loads(line) for line in open(self.work / "runs/float8/metrics.jsonl")]
        products = [line["fp8_products"] for line in lines if line["kind"] == "train"][-1]
        if not products > 0:
            raise Failed("no product was taken in 8-bit floats")
        return f"{out}, {products} products a step in 8-bit floats"

    def resume(self):
        """A run that is killed after its first checkpoint goes on as if nothing had been."""
        steps = 40 if self.cpu else 400
        words = self.recipe("pretrain", "pretrain/default", "runs/whole", steps, "checkpoint.every=10", f"train.steps={steps}",
                            "train.batch_size=4")
        self.run([self.bin / "corral", *words], 90)
        words = [word.replace("runs/whole", "runs/killed") for word in words]
        killed = subprocess.Popen([str(word) for word in [self.bin / "corral", *words]], cwd=self.work, env=self.env,
                                  stdout=self.log, stderr=subprocess.STDOUT)
        first, deadline = self.work / "runs/killed/checkpoints", time.time() + 60
        while time.time() < deadline and killed.poll() is None:
            if first.is_dir() and any(path.name.startswith("step-") for path in first.iterdir()):
                break
            time.sleep(0.005)
        killed.kill()
        if killed.wait() != -signal.SIGKILL:
            raise Failed("the run ended before it could be killed")
        done = len(self.losses("runs/killed"))
        words = [word for word in words if word not in ("--resume", "never", "--overwrite")]
        out = self.run([self.bin / "corral", *words], 90)
        if done >= steps or "resumed from" not in out:
            raise Failed(f"killed after {done} of {steps} steps, and not resumed")
        whole, resumed = self.losses("runs/whole"), self.losses("runs/killed")
        if whole != resumed:
            at = next((i for i, (a, b) in enumerate(zip(whole, resumed)) if a != b), min(len(whole), len(resumed)))
            raise Failed(f"losses differ from step {at + 1} on: {whole[at:at + 1]} and {resumed[at:at + 1]}")
        return f"killed after {done} steps; {len(whole)} losses equal to the bit"

    def generate(self):
        out = self.run(self.corral("generate", "--model", "runs/pretrain/model", "--prompt", "2+3=", "--max-new-tokens", "16",
                                   "--temperature", "0.8"), 60)
        return last_line(out)[:60]

    def bench(self, *words, limit=120):
        out = self.run(self.corral("bench", *words), limit)
        result = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
        self.measured.append(result)
        self.values = result
        if result["bench"] == "generate":
            share = "" if result.get("memory_share") is None else f", {100 * result['memory_share']:.0f} % of the memory's rate"
            return f"{result['new_tokens_per_s']:,.0f} new tokens/s{share}"
        if result["bench"] == "checkpoint":
            return f"training stands still for {result['stall_s']:.2f} s, {result['stall_bytes_per_s'] / 1e9:.1f} GB/s"
        mfu = "" if result.get("mfu") is None else f", MFU {100 * result['mfu']:.1f} %"
        light = f", {100 * result['speed_of_light_share']:.0f} % of the speed of light"
        return f"{result['tokens_per_s']:,.0f} tokens/s{mfu}{light}, peak {result['peak_bytes'] / 1e9:.1f} GB"

    def bench_train(self, preset, batch):
        if self.cpu:
            preset, batch = self.substitute(preset, "llama-15m"), 2
        steps = ["--steps", "2", "--warmup", "1"] if self.cpu else ["--steps", "20", "--warmup", "5"]
        return self.bench("train", "--preset", preset, "--precision", self.bf16(), "--batch-size", batch, "--micro-batch-size", batch, *steps)

    def row(self, preset, *words, rows, micro, length, precision=None):
        """A row of part C: training of a published model's shape with random weights."""
        precision = precision or self.bf16()
        if self.cpu:
            preset, rows, micro, length = self.substitute(preset, "llama-15m"), 2, 1, 32
        steps = ["--steps", "2", "--warmup", "1"] if self.cpu else ["--steps", "10", "--warmup", "3"]
        return self.bench("train", "--preset", preset, "--precision", precision, "--batch-size", rows, "--micro-batch-size", micro,
                          "--sequence-length", length, *words, *steps, limit=150)

    def qlora(self):
        text = self.row("qwen3-8b", "--lora", "16", "--base", "nf4", "--recompute", "full", rows=2, micro=2, length=2048)
        if not self.cpu and not self.values["peak_bytes"] <= QLORA_BYTES:
            raise Failed(f"{text}: more than {QLORA_BYTES / 1e9:.1f} GB")
        return text

    def checkpoint(self):
        preset = self.substitute("llama-1b", "llama-15m")
        return self.bench("checkpoint", "--preset", preset, "--precision", self.bf16(), "--saves", "1" if self.cpu else "3", "--steps", "2",
                          limit=150)

    def grpo(self):
        """Eight prompts with eight samples each, of a model of Qwen3-0.6B's shape with random weights; all samples are as long as they may."""
        preset, new = self.substitute("qwen3-0.6b", "llama-15m"), 8 if self.cpu else 256
        vocabulary = 32000 if self.cpu else 151936
        words = self.recipe("pretrain", "pretrain/default", "runs/random", 1, f"model={{preset: {preset}}}",
                            f"tokenizer.pad_to_multiple_of={vocabulary}", 'tokenizer.template="{prompt}\\n{completion}"', f"precision.compute={self.bf16()}", "train.batch_size=1")
        self.run([self.bin / "corral", *words], 120)
        out = self.train("grpo", "grpo/default", "runs/grpo-random", 4, "actor.path=runs/random", "train.batch_size=8", "grpo.group_size=8",
                         f"data.sequence_length={new + 128}",
                         f"generation.max_new_tokens={new}", f"generation.min_new_tokens={new}", f"precision.compute={self.bf16()}")
        lines = [json.loads(line) for line in open(self.work / "runs/grpo-random/metrics.jsonl")]
        last = [line for line in lines if line["kind"] == "train"][-1]
        rollout, score, update = last["rollout_s"], last["score_s"], last["update_s"]
        self.measured.append({"bench": "grpo", "preset": preset, "rollout_s": rollout, "score_s": score, "update_s": update})
        return f"rollout {rollout:.2f} s, scores {score:.2f} s, update {update:.2f} s; {out}"

    def bench_generate(self, rows, preset="llama-1b"):
        preset = self.substitute(preset, "llama-15m")
        sizes = ["--prompt-tokens", "16", "--new-tokens", "8", "--runs", "1"] if self.cpu else \
            ["--prompt-tokens", "128", "--new-tokens", "256", "--runs", "2"]
        return self.bench("generate", "--preset", preset, "--precision", self.bf16(), "--batch-size", min(rows, 2) if self.cpu else rows, *sizes)

    # --- stages of B ---

    def peers(self, preset, batch):
        raw = self.out / f"peers-{preset}.jsonl"
        try:
            self.run([sys.executable, HERE / "bench.py", "--device", self.device, "--corral", self.bin / "corral", "--rounds", "1",
                      "--steps", "20", "--warmup", "5", "--presets", preset, "--batch", batch, "--out", raw], 240)
        finally:
            # What was measured before a limit counts, too.
            rows = [json.loads(line) for line in open(raw)] if raw.exists() else []
            raw.unlink(missing_ok=True)
            self.measured += rows
        best = max((r["tokens_per_s"] for r in rows if r["impl"] != "corral"), default=None)
        mine = max(r["tokens_per_s"] for r in rows if r["impl"] == "corral")
        if best is None:
            raise Failed(f"{mine:,.0f} tokens/s, and no peer ran")
        self.values = {"ratio": mine / best}
        return f"{mine:,.0f} tokens/s, {mine / best:.2f} of the fastest peer"

    def collectives(self):
        out = self.run(self.launch(1, "nccl", "bench", "collectives", "--device", self.device), 60)
        (self.out / "collectives.txt").write_text(out)
        return f"{len(out.splitlines())} lines"

    def stages(self):
        """Part, name, the stages that it needs, and what it does."""
        lora = "lora={rank: 8, alpha: 16}"
        model, sft = "model.path=runs/pretrain", "model.path=runs/sft"
        bf16 = lambda: f"precision.compute={self.bf16()}"
        # llm.q's rows have sequences of 1,024 tokens; of a 7B model moments in float32 do not fit on one GPU.
        qwen = {"0.5b": (16, 16), "1.5b": (16, 8), "3b": (16, 4), "7b": (8, 2)}
        moments = lambda size: ["--moments", "8bit", "--recompute", "full"] if size == "7b" else []
        return [
            *[("A", name, [], lambda name=name, limit=limit: self.test(name, limit))
              for name, limit in zip(TESTS, (90, 60, 120, 120, 120))],
            ("A", "data", [], self.data),
            ("A", "pretrain-nccl", ["data"], self.pretrain),
            ("A", "two-ranks", ["data"], self.sharded),
            ("A", "sft-packed", ["pretrain-nccl"], lambda: self.train("sft", "sft/default", "runs/sft", 60, model, bf16())),
            ("A", "sft-unpacked", ["pretrain-nccl"],
             lambda: self.train("sft", "sft/default", "runs/sft-rows", 20, model, bf16(), "data.packing=false")),
            ("A", "lora", ["pretrain-nccl"], lambda: self.train("sft", "sft/default", "runs/lora", 20, model, bf16(), lora)),
            ("A", "qlora", ["pretrain-nccl"],
             lambda: self.train("sft", "sft/default", "runs/qlora", 20, model, bf16(), lora.replace("}", ", base: nf4}"))),
            ("A", "reward", ["sft-packed"], lambda: self.train("reward", "reward/default", "runs/reward", 20, sft)),
            ("A", "dpo", ["sft-packed"], lambda: self.train("dpo", "dpo/default", "runs/dpo", 10, sft)),
            ("A", "grpo", ["sft-packed"], lambda: self.train("grpo", "grpo/default", "runs/grpo", 4, "actor.path=runs/sft")),
            ("A", "ppo", ["reward"], lambda: self.train(
                "ppo", "ppo/reward_model", "runs/ppo", 4, "actor.path=runs/sft", "reward_model.path=runs/reward")),
            ("A", "kill-and-resume", ["data"], self.resume),
            ("A", "generate-text", ["pretrain-nccl"], self.generate),
            ("A", "train-llama-1b", [], lambda: self.bench_train("llama-1b", 4)),
            ("A", "train-llama-110m", [], lambda: self.bench_train("llama-110m", 16)),
            ("A", "decode-llama-1b-64", [], lambda: self.bench_generate(64)),
            ("A", "decode-llama-1b-1", [], lambda: self.bench_generate(1)),
            ("A", "train-float8", ["data"], self.float8),
            ("B", "train-llama-1b-8", [], lambda: self.bench_train("llama-1b", 8)),
            ("B", "peers-llama-1b", [], lambda: self.peers("llama-1b", 4)),
            ("B", "peers-llama-110m", [], lambda: self.peers("llama-110m", 16)),
            ("B", "collectives", [], self.collectives),
            *[("C", f"qwen2.5-{size}", [], lambda size=size, batch=batch: self.row(
                f"qwen2.5-{size}", *moments(size), rows=batch[0], micro=batch[1], length=1024)) for size, batch in qwen.items()],
            *[("C", f"qwen2.5-{size}-float8", [], lambda size=size, batch=batch: self.row(
                f"qwen2.5-{size}", "--float8-min-size", "512", *moments(size), rows=batch[0], micro=batch[1], length=1024,
                precision="float8")) for size, batch in qwen.items()],
            *[("C", f"lora-qwen3-{size}", [], lambda size=size: self.row(
                f"qwen3-{size}", "--lora", "16", rows=8, micro=2, length=2048)) for size in ("0.6b", "1.7b", "4b", "8b")],
            ("C", "qlora-qwen3-8b", [], self.qlora),
            *[("C", f"decode-llama-2-7b-{rows}", [], lambda rows=rows: self.bench_generate(rows, "llama-2-7b")) for rows in (1, 64)],
            ("C", "checkpoint-stall", [], self.checkpoint),
            ("C", "grpo-qwen3-0.6b", ["data"], self.grpo),
        ]

    def stage(self, name, do):
        begun, self.values = time.time(), {}
        self.log.write(f"\n== {name}\n")
        try:
            passed, text = True, do()
        except Failed as e:
            passed, text = False, str(e)
        except Exception as e:  # a stage must not stop the others
            passed, text = False, f"{type(e).__name__}: {e}"
        key, target = TARGETS.get(name, (None, None))
        if key and not self.cpu:
            reached = self.values.get(key)
            unit = {"mfu": "MFU", "ratio": "of the fastest peer", "tokens_per_s": "tokens/s", "memory_share": "of the memory's rate",
                    "stall_bytes_per_s": "bytes/s"}[key]
            text += f" (target: {target:,.10g} {unit}" + (f", {reached / target:.2f} of it)" if reached else ")")
        row = (name, "ok" if passed else "FAILED", time.time() - begun, text)
        self.rows.append(row)
        print(f"{row[0]:<20} {row[1]:<7} {row[2]:6.1f} s  {row[3]}", flush=True)
        self.write()

    def write(self):
        """The table and the measurements so far: the machine may be taken away at any time."""
        lines = [f"# GPU check, {time.strftime('%Y-%m-%d')}, {self.device_line}", "", "| stage | result | seconds | |", "| --- | --- | ---: | --- |"]
        lines += [f"| {name} | {result} | {seconds:.1f} | {text.replace('|', '/')} |" for name, result, seconds, text in self.rows]
        if self.substitutions:
            lines += ["", "On a CPU: " + "; ".join(dict.fromkeys(self.substitutions)) + "; two steps in place of a stage's own."]
        (self.out / "table.md").write_text("\n".join(lines) + "\n")
        with open(self.out / "measured.jsonl", "w") as file:
            file.writelines(json.dumps(one) + "\n" for one in self.measured)
        self.log.flush()
        return lines

    def finish(self):
        lines = self.write()
        failed = [name for name, result, *_ in self.rows if result != "ok"]
        print(*lines[-1:] if self.substitutions else [], sep="\n")
        total = sum(row[2] for row in self.rows)
        print(f"{len(self.rows) - len(failed)} of {len(self.rows)} stages passed in {total:.0f} s; {self.out}/table.md, log.txt")
        if failed:
            print("failed:", ", ".join(failed))
        return 1 if failed else 0


def kill_session(process):
    """Kills a command and all that it has started: ranks are in process groups of their own, and in its session."""
    for entry in os.listdir("/proc"):
        try:
            # After the name in brackets: state, parent, group, session.
            session = int(open(f"/proc/{entry}/stat").read().rpartition(")")[2].split()[3]) if entry.isdigit() else None
            if session == process.pid:
                os.kill(int(entry), signal.SIGKILL)
        except (OSError, IndexError, ValueError):
            pass
    process.wait()


class Failed(Exception):
    """A stage's result is wrong."""


def last_line(text):
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")


def reason(text):
    """The line that says why a command failed."""
    lines = [line.strip() for line in text.splitlines()]
    for part in ("panicked at", "error:", "error (rank", "FAILED"):
        found = [i for i, line in enumerate(lines) if part in line]
        if found:
            return " ".join(lines[found[0]:found[0] + 2])[:300]
    return last_line(text)[:300]


def binaries():
    """The folder of the archive, else of the build."""
    packed = ROOT / "bin"
    return packed if packed.is_dir() else ROOT / "gpu-check" / "bin"


def libtorch():
    """The folder of libtorch; none where the binaries find it by themselves."""
    if os.environ.get("LIBTORCH"):
        return os.environ["LIBTORCH"]
    if (ROOT / ".libtorch/torch/lib/libtorch_cpu.so").exists():
        return str(ROOT / ".libtorch/torch")
    try:
        import torch
    except ImportError:
        sys.exit("no libtorch: neither .libtorch/, LIBTORCH, nor a torch in this Python")
    if not torch.__version__.startswith("2.11."):
        sys.exit(f"torch is {torch.__version__}, and the binaries need 2.11")
    return torch.__path__[0]


def device_line(device):
    if device == "cpu":
        return "on the CPU"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        sys.exit("no NVIDIA GPU here (nvidia-smi found none); --device cpu proves the commands without one")


def collect(target):
    """Builds, and gathers stripped binaries in gpu-check/bin."""
    folder = ROOT / "gpu-check" / "bin"
    shutil.rmtree(ROOT / "gpu-check", ignore_errors=True)
    folder.mkdir(parents=True)
    subprocess.run(["cargo", "build", "--release"], cwd=ROOT, check=True)
    words = ["cargo", "test", "--release", *[w for t in TESTS for w in ("--test", t)], "--no-run", "--message-format", "json"]
    out = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = {}
    for message in map(json.loads, out.splitlines()):
        if message["reason"] == "compiler-artifact" and message["executable"] and message["target"]["kind"] == ["test"]:
            found[message["target"]["name"]] = message["executable"]
    for source, name in [(target / "release" / name, name) for name in ("corral", "launch")] + [(found[t], t) for t in TESTS]:
        shutil.copy(source, folder / name)
        subprocess.run(["strip", folder / name], check=True)


def pack(target):
    collect(target)
    files = ["gpu-check/bin", "scripts/gpu_check.py", "scripts/bench.py", "scripts/peers.py", "configs", "tests/golden", "LICENSE"]
    with tarfile.open(ROOT / ARCHIVE, "w:gz", compresslevel=6) as archive:
        for name in files:
            archive.add(ROOT / name, arcname="bin" if name == "gpu-check/bin" else name)
    print(f"{ARCHIVE}: {(ROOT / ARCHIVE).stat().st_size / 1e6:.1f} MB; there: tar -xzf {ARCHIVE} && python3 scripts/gpu_check.py")


def prove(target):
    """The archive in an empty folder, as on a machine that has nothing else."""
    pack(target)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(ROOT / ARCHIVE) as archive:
            archive.extractall(folder, filter="data")
        env = dict(os.environ, OUT=str(ROOT / "gpu-check" / "out"))
        if (ROOT / ".libtorch/torch").exists():
            env.setdefault("LIBTORCH", str(ROOT / ".libtorch/torch"))
        return subprocess.run([sys.executable, "scripts/gpu_check.py", "--device", "cpu"], cwd=folder, env=env).returncode


def needed(stages, names):
    """The named stages and all that they need, in their order."""
    by_name = {name: needs for _, name, needs, _ in stages}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        sys.exit(f"no stage {', '.join(unknown)}; there are {', '.join(by_name)}")
    wanted, left = set(), list(names)
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += by_name[name]
    return [stage for stage in stages if stage[1] in wanted]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", action="store_true", help="write gpu-check.tar.gz")
    parser.add_argument("--prove", action="store_true", help="try the archive on this machine's CPU")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--stage", action="append", default=[], metavar="NAME", help="run this stage, and those that it needs")
    parser.add_argument("--part", choices=["A", "B", "C"], help="correctness, the peers, or rows of targets")
    parser.add_argument("--list", action="store_true", help="name the stages")
    args = parser.parse_args()
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    if args.pack:
        return pack(target)
    if args.prove:
        return prove(target)
    built_here = (ROOT / "Cargo.toml").exists()
    if not args.list and (built_here or not (binaries() / "corral").exists()):
        if not built_here or shutil.which("cargo") is None:
            sys.exit("no binaries and no cargo here: run `gpu_check.py --pack` where Corral is built, and bring gpu-check.tar.gz")
        collect(target)
    if args.list:
        for part, name, needs, _ in object.__new__(Check).stages():  # nothing is set up for a list
            print(part, name, f"(after {', '.join(needs)})" if needs else "")
        return 0
    line = device_line(args.device)
    check = Check(args, line)
    print(line, flush=True)
    stages = check.stages()
    # On a CPU the commands of C are tried, too: none of them needs other programs.
    parts = args.part or ("AC" if args.device == "cpu" else "AB")
    stages = [stage for stage in stages if stage[0] in parts]
    if args.stage:
        stages = needed(check.stages(), args.stage)
    for _, name, _, do in stages:
        check.stage(name, do)
    return check.finish()


if __name__ == "__main__":
    sys.exit(main())
