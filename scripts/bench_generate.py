#!/usr/bin/env python3
"""New tokens a second of Corral, transformers and llama.cpp with one model, in float32, at batch 1 and 8: a table.

    bench_generate.py [--model NAME] [--corral BINARY] [--rounds 3] [--prompt 64] [--new 64] [--work FOLDER]

Greedy, prompts of random tokens, no end of sequence; the time counts the prompts. Rounds alternate, each measurement is a process of its
own; prints medians. llama.cpp takes a float32 GGUF file, float32 in its cache too, and is left out where llama_cpp is not installed.
"""
import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time


def folder(args):
    return args.work / args.model.strip("/").replace("/", "_").replace(".", "_")


def prompts(args, vocabulary):
    draw = random.Random(3)
    return [[draw.randrange(3, vocabulary) for _ in range(args.prompt)] for _ in range(args.batch)]


def transformers(args):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(folder(args), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts(args, model.config.vocab_size))
    mask = torch.ones_like(ids)

    def run():
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=args.new, pad_token_id=0)
        assert out.shape[1] == args.prompt + args.new

    return run


def llama_cpp(args):
    import ctypes

    import llama_cpp
    import numpy

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(str(folder(args).with_suffix(".gguf")).encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = args.batch * (args.prompt + args.new)
    options.n_batch = options.n_ubatch = max(args.batch * args.prompt, 8)
    options.n_seq_max = args.batch
    options.n_threads = options.n_threads_batch = args.threads
    options.type_k = options.type_v = 0  # float32
    context = llama_cpp.llama_init_from_model(model, options)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    texts = prompts(args, vocabulary)
    batch = llama_cpp.llama_batch_init(args.batch * args.prompt, 0, 1)

    def decode(tokens):
        """Decodes tuples of token, position, sequence, and whether its logits are wanted; returns the greedy next tokens."""
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        assert llama_cpp.llama_decode(context, batch) == 0
        best = []
        for i, (_, _, _, wanted) in enumerate(tokens):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(context, i)
                best.append(int(numpy.ctypeslib.as_array(logits, (vocabulary,)).argmax()))
        return best

    def run():
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        last = len(texts[0]) - 1
        next_ids = decode([(token, at, row, at == last) for row, text in enumerate(texts) for at, token in enumerate(text)])
        for at in range(args.prompt, args.prompt + args.new - 1):
            next_ids = decode([(token, at, row, True) for row, token in enumerate(next_ids)])

    run.silent = silent  # called for as long as the process lives
    return run


def peer(args):
    run = {"transformers": transformers, "llama.cpp": llama_cpp}[args.peer](args)
    run()
    begun = time.perf_counter()
    run()
    print(json.dumps(args.batch * args.new / (time.perf_counter() - begun)), flush=True)
    os._exit(0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--corral", default="target/release/corral")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/bench-generate"))
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args)
    args.work.mkdir(parents=True, exist_ok=True)
    for to, form in ((folder(args), ["hf"]), (folder(args).with_suffix(".gguf"), ["gguf", "--dtype", "float32"])):
        if not to.exists():
            subprocess.run([args.corral, "-q", "convert", "--from", args.model, "--to", to, "--format", *form], check=True)
    peers = ["transformers", "llama.cpp"]
    if subprocess.run([sys.executable, "-c", "import llama_cpp"], capture_output=True).returncode:
        print("llama.cpp is left out: this Python has no llama_cpp", file=sys.stderr)
        peers.pop()
    print("batch program tokens/s ratio")
    for batch in (1, 8):
        rates = {name: [] for name in ["corral", *peers]}
        for _ in range(args.rounds):
            ours = [args.corral, "bench", "generate", "--model", folder(args), "--batch-size", batch, "--prompt-tokens", args.prompt,
                    "--new-tokens", args.new, "--runs", 1, "--threads", args.threads]
            out = subprocess.run(list(map(str, ours)), check=True, capture_output=True, text=True).stdout
            rates["corral"].append(json.loads(out)["new_tokens_per_s"])
            for name in peers:
                theirs = [sys.executable, __file__, "--peer", name, "--batch", batch, "--prompt", args.prompt, "--new", args.new,
                          "--threads", args.threads, "--work", args.work, "--model", args.model]
                out = subprocess.run(list(map(str, theirs)), check=True, capture_output=True, text=True).stdout
                rates[name].append(json.loads(out.splitlines()[-1]))
        ours = statistics.median(rates["corral"])
        for name, values in rates.items():
            print(batch, name, f"{statistics.median(values):.1f} {ours / statistics.median(values):.2f}", flush=True)


if __name__ == "__main__":
    main()
