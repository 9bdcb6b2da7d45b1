#!/usr/bin/env python3
"""Generate models/{gemma2,gemma3,gemma3_new,olmo2,phi3,phi3_long,phi3_short} in the form of make_golden.py's models.

    PYTHONPATH=tests/golden python make_families.py --seed 1 --out DIR

gemma2      window of 6 on even layers, attention and final softcaps, query_pre_attn_scalar unlike head_dim; keys as published
gemma3      pattern of 2 (sliding, full), two rope bases, linear scaling of 8 on full layers, q/k norm; keys as published
gemma3_new  (full, sliding) from layer_types, nested rope_parameters, no scaling; keys as transformers 5 writes them
olmo2       norms after the blocks only, q/k norm over the whole projection, grouped-query, theta 500000
phi3        fused qkv_proj and gate_up_proj, window of 6 on every layer, grouped-query
phi3_long   longrope, every length above original_max_position_embeddings; 12 of 16 dimensions rotate; tied
phi3_short  longrope, every length below it

Reference: eager attention. In float64 softmax, norms, rotary angles and the embedding scale are float64 too.
DIR/features.json: how far the logits move if a feature is switched off, as a share of their norm; the script checks > 1e-2.
Needs torch transformers tokenizers safetensors.
"""
import argparse
import copy
import json
import math
from pathlib import Path

import make_golden as g
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi3 import modeling_phi3

MODELING = [modeling_gemma2, modeling_gemma3, modeling_olmo2, modeling_phi3]
PROFILE = dict(vocab=280, T=20)
LONG = dict(long_factor=[1.1, 1.4, 2.0, 3.5, 6.0, 9.0], short_factor=[1.0, 1.05, 1.2, 1.5, 1.7, 2.2])


def configs(V):
    base = dict(attention_dropout=0.0, bos_token_id=V - 3, eos_token_id=V - 1, hidden_size=32, initializer_range=0.02,
                intermediate_size=56, max_position_embeddings=128, num_attention_heads=4, num_hidden_layers=2,
                num_key_value_heads=2, pad_token_id=0, rms_norm_eps=1e-6, torch_dtype="float32", transformers_version="4.51.0",
                use_cache=True, vocab_size=V)
    gemma = dict(base, attention_bias=False, head_dim=12, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=7,
                 sliding_window=6, tie_word_embeddings=True)
    c = {}
    c["gemma2"] = dict(gemma, architectures=["Gemma2ForCausalLM"], model_type="gemma2", hidden_act="gelu_pytorch_tanh",
                       attn_logit_softcapping=3.0, final_logit_softcapping=8.0, rope_theta=10000.0)
    gemma3 = dict(gemma, architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", attn_logit_softcapping=None,
                  final_logit_softcapping=None)
    c["gemma3"] = dict(gemma3, rope_theta=1000000.0, rope_local_base_freq=10000.0, rope_scaling=dict(factor=8.0, rope_type="linear"),
                       sliding_window_pattern=2)
    c["gemma3_new"] = dict(gemma3, dtype="float32", layer_types=["full_attention", "sliding_attention"], rope_parameters=dict(
        full_attention=dict(rope_type="default", rope_theta=200000.0), sliding_attention=dict(rope_type="default", rope_theta=500.0)))
    del c["gemma3_new"]["torch_dtype"]
    c["olmo2"] = dict(base, architectures=["Olmo2ForCausalLM"], model_type="olmo2", attention_bias=False, hidden_act="silu",
                      rope_scaling=None, rope_theta=500000.0, tie_word_embeddings=False)
    phi3 = dict(base, architectures=["Phi3ForCausalLM"], model_type="phi3", attention_bias=False, embd_pdrop=0.0, hidden_act="silu",
                original_max_position_embeddings=128, resid_pdrop=0.0, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0,
                sliding_window=6, tie_word_embeddings=False)
    c["phi3"] = phi3
    rope = dict(num_attention_heads=2, num_key_value_heads=1, partial_rotary_factor=0.75, rope_scaling=dict(LONG, type="longrope"),
                sliding_window=None, tie_word_embeddings=True)
    c["phi3_long"] = dict(phi3, **rope, original_max_position_embeddings=7, max_position_embeddings=48)
    c["phi3_short"] = dict(phi3, **rope, original_max_position_embeddings=64, max_position_embeddings=256)
    return c


# ------------------------------------------------------------------------------------------------ float64
def eager_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, **kwargs):
    """transformers' eager attention with the softmax in float32 or, for float64 inputs, in float64."""
    groups = module.num_key_value_groups
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    dtype = torch.promote_types(torch.float32, query.dtype)
    weights = F.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def rope_f64(cfg, layer_type=None, length=10**9):
    """Inverse frequencies of the rotated pairs and the factor on cos and sin."""
    rp = cfg.rope_parameters if layer_type is None else cfg.rope_parameters[layer_type]
    head_dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    dim = int(head_dim * rp.get("partial_rotary_factor", 1.0))
    inv = float(rp["rope_theta"]) ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if rp["rope_type"] == "linear":
        return inv / rp["factor"], 1.0
    if rp["rope_type"] == "longrope":
        original = cfg.original_max_position_embeddings
        factors = rp["long_factor" if length > original else "short_factor"]
        ratio = cfg.max_position_embeddings / original
        return inv / g.f64(factors), math.sqrt(1 + math.log(ratio) / math.log(original))
    assert rp["rope_type"] == "default"
    return inv, 1.0


def main_rope(cfg):
    return rope_f64(cfg, "full_attention" if cfg.model_type == "gemma3_text" else None)[0]


def to_f64(model):
    m = copy.deepcopy(model).double()
    for mod in m.modules():
        name = type(mod).__name__
        if name.endswith("RMSNorm"):
            def forward(x, mod=mod, gemma=name.startswith("Gemma")):
                eps = mod.eps if gemma else mod.variance_epsilon
                return (mod.weight + float(gemma)) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
            mod.forward = forward
        elif name.endswith("RotaryEmbedding"):
            def forward(x, position_ids, layer_type=None, mod=mod):
                inv, factor = rope_f64(mod.config, layer_type, int(position_ids.max()) + 1)
                angles = position_ids[..., None].double() * inv
                angles = torch.cat((angles, angles), -1)
                return angles.cos() * factor, angles.sin() * factor
            mod.forward = forward
        elif name.endswith("ScaledWordEmbedding"):
            mod.embed_scale = torch.tensor(math.sqrt(m.config.hidden_size), dtype=torch.float64)
    return m


def init_weights(model, seed):
    gen = torch.Generator().manual_seed(seed)
    gemma = type(model).__name__.startswith("Gemma")
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            r = torch.randn(p.shape, generator=gen)
            if gemma and name == "model.norm.weight":
                p.copy_(3 + 0.3 * r)  # the embedding is small, for what it is multiplied with, and it is the head too
            elif "norm" in name:
                p.copy_(0.3 * r if gemma else 1 + 0.3 * r)
            elif "embed_tokens" in name:
                p.copy_((0.12 if gemma else 0.5) * r)
            elif "lm_head" in name:
                p.copy_(0.35 * r)
            else:
                p.copy_(r * (0.9 if "qkv_proj" in name else 1.3) / math.sqrt(p.shape[-1]))  # longrope makes scores larger


class Eager:
    """AutoModelForCausalLM with eager attention."""
    from_config = staticmethod(lambda cfg, attn_implementation=None, **kw: AutoModelForCausalLM.from_config(cfg, attn_implementation="eager", **kw))
    from_pretrained = staticmethod(lambda d, attn_implementation=None, **kw: AutoModelForCausalLM.from_pretrained(d, attn_implementation="eager", **kw))


# ------------------------------------------------------------------------- each feature must move the logits
def build(cfgd, weights):
    kind = {k: v for k, v in cfgd.items() if k not in ("architectures", "model_type")}
    model = Eager.from_config(AutoConfig.for_model(cfgd["model_type"], **copy.deepcopy(kind))).float().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return to_f64(model)


def features(name, cfgd, weights):
    """What to switch off: label -> (keys of the configuration, weights, change of the model)."""
    norms = {k: v for k, v in weights.items() if "norm" in k}
    off = {f"{kind} all neutral": ({}, {k: torch.full_like(v, 0.0 if "gemma" in name else 1.0) for k, v in norms.items() if kind in k}, None)
           for kind in sorted({k.split(".")[-2] for k in norms})}

    def skip(kind):
        def change(m):
            for n, mod in m.named_modules():
                if n.split(".")[-1] == kind:
                    mod.forward = lambda x: x
        return change

    off.update({f"{kind} left out": ({}, {}, skip(kind)) for kind in sorted({k.split(".")[-2] for k in norms})})
    if "gemma" in name:
        def no_scale(m):
            m.model.embed_tokens.embed_scale = torch.tensor(1.0, dtype=torch.float64)
        off["embedding scale"] = ({}, {}, no_scale)
        off["w instead of 1 + w"] = ({}, {k: v - 1 for k, v in norms.items()}, None)
        off["query_pre_attn_scalar = head_dim"] = (dict(query_pre_attn_scalar=cfgd["head_dim"]), {}, None)
        off["gelu_pytorch_tanh -> silu"] = (dict(hidden_activation="silu"), {}, None)
        off["gelu_pytorch_tanh -> gelu (erf)"] = (dict(hidden_activation="gelu"), {}, None)
        off["window on no layer"] = (dict(layer_types=["full_attention"] * 2), {}, None)
        off["window on all layers"] = (dict(layer_types=["sliding_attention"] * 2), {}, None)
        swapped = ["sliding_attention", "full_attention"] if name == "gemma3_new" else ["full_attention", "sliding_attention"]
        off["layer types swapped"] = (dict(layer_types=swapped), {}, None)
        off["window one longer"] = (dict(sliding_window=7), {}, None)
    if name == "gemma2":
        off["attn_logit_softcapping"] = (dict(attn_logit_softcapping=None), {}, None)
        off["final_logit_softcapping"] = (dict(final_logit_softcapping=None), {}, None)
    if name == "gemma3":
        off["one rope base: the global one"] = (dict(rope_local_base_freq=1000000.0), {}, None)
        off["one rope base: the local one"] = (dict(rope_theta=10000.0), {}, None)
        off["rope scaling"] = (dict(rope_scaling=None), {}, None)
        off["rope scaling on all layers"] = (dict(rope_parameters={k: dict(rope_type="linear", factor=8.0, rope_theta=t) for k, t in
                                             (("full_attention", 1e6), ("sliding_attention", 1e4))}, rope_scaling=None), {}, None)
    if name == "gemma3_new":
        rope = cfgd["rope_parameters"]
        off["rope bases swapped"] = (dict(rope_parameters=dict(full_attention=rope["sliding_attention"], sliding_attention=rope["full_attention"])), {}, None)
    if name == "olmo2":
        def per_head(m):
            for layer in m.model.layers:
                for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                    def forward(x, w=norm.weight, eps=norm.variance_epsilon):
                        y = x.unflatten(-1, (-1, 8))
                        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2) * w
                    norm.forward = forward
        off["q/k norm per head"] = ({}, {}, per_head)

        def pre_norm(m):
            for layer in m.model.layers:
                def forward(x, layer=layer, **kw):
                    x = x + layer.self_attn(hidden_states=layer.post_attention_layernorm(x), **kw)[0]
                    return x + layer.mlp(layer.post_feedforward_layernorm(x))
                layer.forward = forward
        off["norms before the blocks"] = ({}, {}, pre_norm)
        off["rope_theta 10000"] = (dict(rope_theta=10000.0), {}, None)
    if name.startswith("phi3"):
        kv = {k: v for k, v in weights.items() if "qkv_proj" in k}
        q = cfgd["hidden_size"]
        off["k and v swapped in qkv_proj"] = ({}, {k: torch.cat([v[:q], *reversed(v[q:].chunk(2))]) for k, v in kv.items()}, None)
        off["gate and up swapped"] = ({}, {k: torch.cat([*reversed(v.chunk(2))]) for k, v in weights.items() if "gate_up" in k}, None)
    if name == "phi3":
        off["sliding_window"] = (dict(sliding_window=None), {}, None)
        off["window one longer"] = (dict(sliding_window=7), {}, None)
    if name in ("phi3_long", "phi3_short"):
        swapped = dict(type="longrope", long_factor=LONG["short_factor"], short_factor=LONG["long_factor"])
        off["long and short factors swapped"] = (dict(rope_scaling=swapped), {}, None)
        off["no factors"] = (dict(rope_scaling=dict(type="longrope", long_factor=[1.0] * 6, short_factor=[1.0] * 6)), {}, None)
        whole = {k: v + [v[-1]] * 2 for k, v in LONG.items()}
        off["partial_rotary_factor 1"] = (dict(partial_rotary_factor=1.0, rope_scaling=dict(whole, type="longrope")), {}, None)

        def no_factor(m):
            inner = m.model.rotary_emb.forward
            scale = rope_f64(m.config)[1]
            m.model.rotary_emb.forward = lambda x, position_ids: tuple(t / scale for t in inner(x, position_ids))
        off["attention factor"] = ({}, {}, no_factor)
    return off


def check_features(name, cfgd, folder):
    weights, t = load_file(str(folder / "model.safetensors")), load_file(str(folder / "golden.safetensors"))
    mask = t["attention_mask"].bool()

    def logits(keys, changed, change):
        m = build({**cfgd, **keys}, {**weights, **changed})
        if change:
            change(m)
        with torch.no_grad():
            return m(input_ids=t["input_ids"], attention_mask=t["attention_mask"], position_ids=t["position_ids"], use_cache=False).logits[mask]

    exact = load_file(str(folder / "golden_f64.safetensors"))["logits"][mask]
    again = logits({}, {}, None)
    assert (again - exact).abs().max() < 1e-11, float((again - exact).abs().max())
    moved = {label: float((logits(*what) - exact).norm() / exact.norm()) for label, what in features(name, cfgd, weights).items()}
    low = {k: v for k, v in moved.items() if v < 1e-2 and "erf" not in k}
    assert not low, (name, low)
    return moved


def check_patch(folder):
    """eager_attention gives transformers' own numbers in float32; and how far bfloat16 is from float64."""
    t, t64 = (load_file(str(folder / f)) for f in ("golden.safetensors", "golden_f64.safetensors"))
    ids, mask, pos, labels = (t[k] for k in ("input_ids", "attention_mask", "position_ids", "labels"))
    ours = [m.eager_attention_forward for m in MODELING]
    for m, f in zip(MODELING, ORIGINAL):
        m.eager_attention_forward = f
    own = Eager.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids, attention_mask=mask, position_ids=pos, use_cache=False).logits
    half = Eager.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for m, f in zip(MODELING, ours):
        m.eager_attention_forward = f
    assert torch.equal(own[mask.bool()], t["logits"][mask.bool()])
    out = half(input_ids=ids, attention_mask=mask, position_ids=pos, use_cache=False).logits.float()
    loss = F.cross_entropy(out[:, :-1].reshape(-1, out.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)
    loss.backward()
    worst = max((float((p.grad.double() - t64["grad." + n]).norm() / t64["grad." + n].norm()), n) for n, p in half.named_parameters())
    return dict(loss=abs(float(loss.detach()) / float(t64["loss"]) - 1), worst_gradient=worst)


ORIGINAL = [m.eager_attention_forward for m in MODELING]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, required=True)
    ap.add_argument("--out", required=True)
    a = ap.parse_args()
    out, V = Path(a.out), PROFILE["vocab"]
    for m in MODELING:
        m.eager_attention_forward = eager_attention
    g.AutoModelForCausalLM, g.to_f64, g.init_weights, g.inv_freq_f64 = Eager, to_f64, init_weights, main_rope
    kinds = dict(qwen2=g.wrap_tokenizer(g.make_bytelevel_tokenizer(V, a.seed, "qwen2"), "qwen2"))
    moved, half = {}, {}
    for i, (name, cfgd) in enumerate(configs(V).items()):
        g.TOKENIZER_KIND[name] = "qwen2"
        folder = out / "models" / name
        g.run_variant(name, cfgd, PROFILE, a.seed + 11 * i, out, kinds)
        cfg = AutoConfig.from_pretrained(folder)
        extra = {}
        if name.startswith("gemma3"):
            extra["rope_inv_freq_local"] = rope_f64(cfg, "sliding_attention")[0]
        if name in ("phi3_long", "phi3_short"):
            inv, factor = rope_f64(cfg, length=PROFILE["T"])
            extra.update(rope_inv_freq=inv, rope_attention_factor=g.f64(factor))
        for file, dtype in (("golden.safetensors", torch.float32), ("golden_f64.safetensors", torch.float64)):
            g.st_save(folder / file, {**load_file(str(folder / file)), **{k: v.to(dtype) for k, v in extra.items()}})
        for p in folder.glob("*.safetensors"):
            p.chmod(0o644)
        size = sum(p.stat().st_size for p in folder.iterdir())
        assert size < 1_000_000, (name, size)
        moved[name], half[name] = check_features(name, cfgd, folder), check_patch(folder)
        print(name, size, "bytes; bfloat16:", half[name])
    g.dump(out / "features.json", dict(moved=moved, bfloat16=half))


if __name__ == "__main__":
    main()
