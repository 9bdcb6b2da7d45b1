#!/usr/bin/env python3
"""Seconds a step of `corral dpo`, `grpo` and `ppo` against TRL's, on a new llama-15m: a markdown table of medians.

The same model, texts, batch and settings for both, float32; every measurement is a process of its own, and rounds alternate.
dpo: 8 pairs of 64 + 64 tokens, a frozen copy as the reference, evaluated every step. grpo: 2 prompts x 8 responses, 64 + 64 tokens,
beta 0.04, loss dapo. ppo: 16 prompts, 64 + 64 tokens, actor, critic, reward model and reference of that size, 2 epochs of one
minibatch. The text is that of Python's own manual.
"""
import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
SHAPE = dict(hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6, vocab_size=4096,
             max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2)
STEPS, WARMUP = 5, 2
COMMON = """
model: {{path: {folder}/model}}
data: {{train: [{folder}/{data}], sequence_length: 128}}
optim: {{lr: 1.0e-5, weight_decay: 0.0, clip: 1.0}}
schedule: {{kind: constant}}
train: {{steps: {steps}, batch_size: {batch}}}
checkpoint: {{every: 1000}}
output_dir: {folder}/run
"""
RL = """
generation: {{max_new_tokens: 64, temperature: 1.0}}
samples: {{every: 0}}
"""
CONFIGS = {
    "dpo": ("pairs.jsonl", 8, COMMON + "dpo: {{beta: 0.1, reference: online}}\n"),
    "grpo": ("prompts.jsonl", 2, COMMON.replace("model:", "actor:", 1) + RL
             + "reference: {{path: {folder}/model}}\ngrpo: {{group_size: 8, beta: 0.04, loss: dapo}}\nrewards: [{{kind: length, most: 64}}]\n"),
    "ppo": ("prompts.jsonl", 16, COMMON.replace("model:", "actor:", 1) + RL
            + "critic: {{path: {folder}/reward}}\nreward_model: {{path: {folder}/reward}}\nreference: {{path: {folder}/model}}\n"
            "ppo: {{epochs: 2, minibatch_size: 16, kl_coef: 0.05}}\n"),
}


def make(folder):
    """Models, pairs and prompts of exactly 64 tokens a part."""
    from pydoc_data import topics

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    text = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([text], trainers.BpeTrainer(vocab_size=SHAPE["vocab_size"], special_tokens=["<s>", "</s>", "<pad>"],
                                                        initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = ("{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
                               "{% endfor %}")
    torch.manual_seed(1)
    config = LlamaConfig(rope_parameters=dict(rope_type="default", rope_theta=10000.0), **SHAPE)
    config.num_labels = 1
    for name, kind in [("model", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)]:
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    ids, draw = bpe.encode(text).ids, random.Random(1)

    def part(count):
        while True:
            start = draw.randrange(len(ids) - count)
            words = bpe.decode(ids[start:start + count])
            if words.startswith(" ") and words == words.rstrip() and bpe.encode(words).ids == ids[start:start + count]:
                return words

    def pair():
        while True:
            prompt, chosen, rejected = part(64), part(63), part(63)
            if all(len(bpe.encode(prompt + x).ids) == 127 for x in (chosen, rejected)):
                return dict(prompt=prompt, chosen=chosen, rejected=rejected)

    for name, row in [("pairs", pair), ("prompts", lambda: dict(prompt=part(64)))]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(96)))


def run(line, **kw):
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)
    if done.returncode != 0:
        sys.exit(f"failed with exit code {done.returncode}: {' '.join(map(str, line))}\n{done.stderr[-3000:]}")
    return done.stdout


def corral(binary, algorithm, folder):
    data, batch, config = CONFIGS[algorithm]
    (folder / "config.yaml").write_text(config.format(folder=folder, data=data, batch=batch, steps=STEPS + WARMUP))
    run([binary, "-q", algorithm, "--config", folder / "config.yaml", "--resume", "never", "--overwrite"])
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    parts = {key: [line[key] for line in lines[WARMUP:]] for key in ("rollout_s", "score_s", "update_s") if key in lines[0]}
    return dict(step_s=[line["step_s"] for line in lines[WARMUP:]], peak_bytes=lines[-1]["peak_bytes"], **parts)


def trl(python, algorithm, folder, ppo):
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
    if algorithm == "ppo":
        env["PYTHONPATH"] = ppo
    out = run([python, HERE / "peers_trl.py", algorithm, folder, "--steps", str(STEPS)], env=env)
    return json.loads([line for line in out.splitlines() if line.startswith('{"trl"')][-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithms", nargs="*", default=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--corral", help="the binary (default: target/release/corral)")
    parser.add_argument("--python", default=sys.executable, help="a Python with TRL")
    parser.add_argument("--ppo", required=True, help="folder of the packages of TRL 1.0.0, the last one with PPO")
    parser.add_argument("--out", default="runs/bench/trl.jsonl")
    args = parser.parse_args()
    binary = args.corral or str(pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target")) / "release/corral")
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    with tempfile.TemporaryDirectory() as folder, out.open("w") as raw:
        folder = pathlib.Path(folder)
        make(folder)
        for turn in range(args.rounds):
            for algorithm in args.algorithms:
                for name in ("trl", "corral"):
                    measured = trl(args.python, algorithm, folder, args.ppo) if name == "trl" else corral(binary, algorithm, folder)
                    results.setdefault((algorithm, name), []).append(measured)
                    raw.write(json.dumps(dict(measured, algorithm=algorithm, name=name, round=turn)) + "\n")
                    raw.flush()
                    print(f"round {turn + 1}: {algorithm} {name}: {statistics.median(measured['step_s']):.3f} s", file=sys.stderr)

    def median(key, name="step_s"):
        return statistics.median(statistics.median(r[name]) for r in results[key])

    print(f"{os.cpu_count()} cores, medians of {args.rounds} alternating rounds\n")
    print("| | TRL | s a step | Corral, s a step | TRL / Corral | peak memory, MB: TRL | Corral |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for algorithm in args.algorithms:
        t, c = (algorithm, "trl"), (algorithm, "corral")
        peaks = [statistics.median(r["peak_bytes"] for r in results[x]) / 1e6 for x in (t, c)]
        print(f"| {algorithm} | {results[t][0]['trl']} | {median(t):.3f} | {median(c):.3f} | {median(t) / median(c):.2f} "
              f"| {peaks[0]:,.0f} | {peaks[1]:,.0f} |")
    for algorithm in args.algorithms:
        parts = {k: median((algorithm, "corral"), k) for k in ("rollout_s", "score_s", "update_s") if k in results[algorithm, "corral"][0]}
        if parts:
            print(f"\n{algorithm}, Corral: " + ", ".join(f"{k[:-2]} {v:.3f} s" for k, v in parts.items()))


if __name__ == "__main__":
    main()
