#!/usr/bin/env python3
"""The training step that Corral is measured against, in PyTorch: one JSON line on standard output.

    peers.py --preset llama-42m --impl hf-eager|pytorch-plain|pytorch-plain-compile --precision fp32|fp32-onednn|bf16
             [--device cpu|cuda] [--batch N]

A step: forward, mean cross-entropy over full logits, backward, clip to norm 1, AdamW (fused), loss read back.
hf-eager is transformers' LlamaForCausalLM; pytorch-plain a module with fused qkv and gate/up products, F.rms_norm and
scaled_dot_product_attention. fp32 is PyTorch as installed; fp32-onednn sends the float32 products to oneDNN; bf16 is
autocast over float32 weights. `peak_bytes` is the process's on the CPU, the allocator's on a GPU. `first_step_s` counts from the start of the process to the end of the first step.
"""
import argparse
import contextlib
import json
import os
import resource
import statistics
import time

# batch and seq: sequences a step and their length, 2048 tokens a step for all; `corral bench train` has the same presets.
# llama-1b has the shape of Llama-3.2-1B (positions without its scaling, which costs nothing).
PRESETS = {
    "llama-15m": dict(dim=288, layers=6, heads=6, inter=768, vocab=4096, seq=256, batch=8, warmup=3, steps=12),
    "llama-42m": dict(dim=512, layers=8, heads=8, inter=1376, vocab=8192, seq=512, batch=4, warmup=2, steps=8),
    "llama-110m": dict(dim=768, layers=12, heads=12, inter=2048, vocab=32000, seq=1024, batch=2, warmup=1, steps=4),
    "llama-1b": dict(dim=2048, layers=16, heads=32, kv_heads=8, inter=8192, vocab=128256, seq=2048, batch=1, tied=True,
                     warmup=3, steps=8),
}
EPS, THETA = 1e-5, 10000.0


def since_process_start():
    """Seconds since this process was started, in steps of 10 ms."""
    ticks = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def hf_model(p):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=p["dim"], num_hidden_layers=p["layers"], num_attention_heads=p["heads"],
        num_key_value_heads=p.get("kv_heads", p["heads"]), intermediate_size=p["inter"], vocab_size=p["vocab"],
        max_position_embeddings=p["seq"], rms_norm_eps=EPS, tie_word_embeddings=p.get("tied", False), use_cache=False,
        rope_parameters=dict(rope_type="default", rope_theta=THETA), attn_implementation="sdpa")
    model = LlamaForCausalLM(config)
    return model, lambda ids: model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss  # transformers shifts the labels


def plain_model(p, compiled):
    import torch
    import torch.nn.functional as F
    from torch import nn

    dim, heads, head_dim = p["dim"], p["heads"], p["dim"] // p["heads"]
    kv_heads = p.get("kv_heads", heads)

    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(dim))

        def forward(self, x):
            return F.rms_norm(x, (dim,), self.weight, EPS)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = RMSNorm(), RMSNorm()
            self.qkv, self.out = nn.Linear(dim, (heads + 2 * kv_heads) * head_dim, bias=False), nn.Linear(dim, dim, bias=False)
            self.gate_up = nn.Linear(dim, 2 * p["inter"], bias=False)
            self.down = nn.Linear(p["inter"], dim, bias=False)

        def forward(self, x, cos, sin):
            B, T, _ = x.shape
            qkv = self.qkv(self.norm1(x)).view(B, T, heads + 2 * kv_heads, head_dim).transpose(1, 2)
            q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)

            def rotate(t):
                a, b = t.chunk(2, -1)
                return t * cos + torch.cat((-b, a), -1) * sin

            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=kv_heads < heads)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, dim))
            gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(p["vocab"], dim)
            self.blocks = nn.ModuleList(Block() for _ in range(p["layers"]))
            self.norm, self.head = RMSNorm(), nn.Linear(dim, p["vocab"], bias=False)
            inv_freq = THETA ** -(torch.arange(0, head_dim, 2).float() / head_dim)
            if p.get("tied"):
                self.head.weight = self.embed.weight
            angles = torch.outer(torch.arange(p["seq"]).float(), inv_freq).repeat(1, 2)
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())
            for weight in self.parameters():
                if weight.dim() > 1:
                    nn.init.normal_(weight, std=0.02)

        def forward(self, ids, labels):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())

    model = Llama()
    run = torch.compile(model) if compiled else model
    return model, lambda ids: run(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--impl", choices=["hf-eager", "pytorch-plain", "pytorch-plain-compile"], required=True)
    parser.add_argument("--precision", choices=["fp32", "fp32-onednn", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="sequences a step (default: the preset's)")
    parser.add_argument("--steps", type=int, help="timed steps (default: the preset's)")
    parser.add_argument("--warmup", type=int, help="steps before them (default: the preset's)")
    args = parser.parse_args()
    p = dict(PRESETS[args.preset])
    p["batch"] = args.batch or p["batch"]
    if args.device == "cuda" and args.precision == "fp32-onednn":
        parser.error("fp32-onednn is for the CPU")
    steps, warmup = args.steps or p["steps"], p["warmup"] if args.warmup is None else args.warmup

    import torch

    torch.manual_seed(0)
    if args.precision == "fp32-onednn":
        torch.set_float32_matmul_precision("medium")
    model, loss_of = hf_model(p) if args.impl == "hf-eager" else plain_model(p, args.impl.endswith("compile"))
    model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    half = args.precision == "bf16"
    generator = torch.Generator().manual_seed(1)
    times = []
    for i in range(warmup + steps):
        ids = torch.randint(3, p["vocab"], (p["batch"], p["seq"] + 1), generator=generator).to(args.device)
        started = time.perf_counter()
        with torch.autocast(args.device, dtype=torch.bfloat16) if half else contextlib.nullcontext():
            loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()  # waits for a GPU
        times.append(time.perf_counter() - started)
        if i == 0:
            first_step_s = since_process_start()
    step_s = statistics.median(times[warmup:])
    if args.device == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dict(
        preset=args.preset, impl=args.impl, precision=args.precision, device=args.device, tokens_per_s=p["batch"] * p["seq"] / step_s,
        step_s=step_s, first_step_s=first_step_s, loss=loss, threads=torch.get_num_threads(),
        num_parameters=sum(w.numel() for w in model.parameters()),
        peak_bytes=peak_bytes)))


if __name__ == "__main__":
    main()
