#!/usr/bin/env python3
"""Generate models/qwen3 in the same form as make_golden.py makes the other models.

    python make_qwen3.py --seed 1 --out DIR

Qwen3ForCausalLM: q and k are normalised per head, head_dim differs from H/heads, tied embeddings; the second of two
layers has a sliding window of 6 (use_sliding_window, max_window_layers 1). Needs torch transformers tokenizers safetensors.
"""
import argparse
from pathlib import Path

import make_golden as g

PROFILE = dict(vocab=280, T=20)


def config(V):
    return dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False, attention_dropout=0.0,
                bos_token_id=V - 3, eos_token_id=V - 1, head_dim=12, hidden_act="silu", hidden_size=32,
                initializer_range=0.02, intermediate_size=56, max_position_embeddings=128, max_window_layers=1,
                num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-6, rope_scaling=None,
                rope_theta=1000000.0, sliding_window=6, tie_word_embeddings=True, torch_dtype="float32",
                transformers_version="4.51.0", use_cache=True, use_sliding_window=True, vocab_size=V + 8)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, required=True)
    ap.add_argument("--out", required=True)
    a = ap.parse_args()
    V = PROFILE["vocab"]
    g.TOKENIZER_KIND["qwen3"] = "qwen2"
    kinds = dict(qwen2=g.wrap_tokenizer(g.make_bytelevel_tokenizer(V, a.seed, "qwen2"), "qwen2"))
    g.run_variant("qwen3", config(V), PROFILE, a.seed, Path(a.out), kinds)
    for p in (Path(a.out) / "models/qwen3").glob("*.safetensors"):
        p.chmod(0o644)


if __name__ == "__main__":
    main()
