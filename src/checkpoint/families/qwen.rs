//! Qwen, the first generation (`modeling_qwen.py` of its repositories): Qwen2's mathematics under other names.
//!
//! Beyond `seq_length` its attention scales queries (`use_logn_attn`) and stretches the rotary base (`use_dynamic_ntk`);
//! neither does anything up to there, so that these are the positions that the model has here.

use super::{Config, Description, Only, refused};
use crate::config::shape::{Family, Head, Shape};
use crate::error::{Error, Result};

pub static QWEN: Description = Description {
    architecture: "QWenLMHeadModel",
    model_type: "qwen",
    keys: &[&[
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "kv_channels",
        "seq_length",
        "layer_norm_epsilon",
        "rotary_emb_base",
        "rope_theta",
        "tie_word_embeddings",
        "initializer_range",
        "use_dynamic_ntk",
        "use_logn_attn",
    ]],
    only: &[
        ("attn_dropout_prob", Only::Number(0.0)),
        ("emb_dropout_prob", Only::Number(0.0)),
        ("no_bias", Only::Bool(true)),
        ("rotary_pct", Only::Number(1.0)),
        ("scale_attn_weights", Only::Bool(true)),
        ("use_cache_quantization", Only::Bool(false)),
        ("rope_scaling", Only::Null),
        ("rope_parameters", Only::Null),
    ],
    harmless: &[
        "max_position_embeddings",
        "bf16",
        "fp16",
        "fp32",
        "onnx_safe",
        "padded_vocab_size",
        "params_dtype",
        "softmax_in_fp32",
        "tokenizer_type",
        "use_cache_kernel",
        "use_flash_attn",
    ],
    read,
    write: super::qwen2::write_window, // as Qwen2
    place,
    gguf: &super::qwen2::GGUF,
};

fn read(config: &Config) -> Result<Shape> {
    let hidden_size = config.integer("hidden_size")?;
    let heads = config.integer("num_attention_heads")?;
    let intermediate_size = config.integer("intermediate_size")?;
    if intermediate_size % 2 != 0 {
        return Err(Error::data(format!(
            "intermediate_size is {intermediate_size}; gate and up have half of it each, so it must be even"
        )));
    }
    let rope_theta = config.number("rotary_emb_base", 10000.0)?;
    if let Some(other) = config.get("rope_theta")
        && other.as_f64() != Some(rope_theta)
    {
        return Err(refused("rope_theta", other, "what rotary_emb_base says"));
    }
    for key in ["use_dynamic_ntk", "use_logn_attn"] {
        config.flag(key, true)?;
    }
    Ok(Shape {
        family: Family::Qwen2,
        head: Head::Lm,
        vocab_size: config.integer("vocab_size")?,
        hidden_size,
        intermediate_size: intermediate_size / 2,
        num_hidden_layers: config.integer("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim: config.some_integer("kv_channels")?.unwrap_or(128),
        max_position_embeddings: config.integer("seq_length")?,
        rms_norm_eps: config.number("layer_norm_epsilon", 1e-6)?,
        rope_theta,
        rope_scaling: None,
        tie_word_embeddings: config.flag("tie_word_embeddings", false)?,
        initializer_range: config.number("initializer_range", 0.02)?,
        sliding_window: None,
        max_window_layers: 0,
        experts: None,
        features: Family::Qwen2.features(),
    })
}

/// q, k and v lie in one tensor; the MLP's `w2` is the gate, `w1` is up.
fn place(name: &str, s: &Shape) -> (String, i64) {
    let whole = |name: &str| (name.to_string(), 0);
    match name {
        "model.embed_tokens.weight" => return whole("transformer.wte.weight"),
        "model.norm.weight" => return whole("transformer.ln_f.weight"),
        _ => {}
    }
    let Some((block, part)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
        return whole(name);
    };
    let rows = s.num_attention_heads * s.head_dim;
    let (part, row) = match part {
        "self_attn.q_proj.weight" => ("attn.c_attn.weight", 0),
        "self_attn.k_proj.weight" => ("attn.c_attn.weight", rows),
        "self_attn.v_proj.weight" => ("attn.c_attn.weight", 2 * rows),
        "self_attn.q_proj.bias" => ("attn.c_attn.bias", 0),
        "self_attn.k_proj.bias" => ("attn.c_attn.bias", rows),
        "self_attn.v_proj.bias" => ("attn.c_attn.bias", 2 * rows),
        "self_attn.o_proj.weight" => ("attn.c_proj.weight", 0),
        "mlp.gate_proj.weight" => ("mlp.w2.weight", 0),
        "mlp.up_proj.weight" => ("mlp.w1.weight", 0),
        "mlp.down_proj.weight" => ("mlp.c_proj.weight", 0),
        "input_layernorm.weight" => ("ln_1.weight", 0),
        "post_attention_layernorm.weight" => ("ln_2.weight", 0),
        _ => return whole(name),
    };
    (format!("transformer.h.{block}.{part}"), row)
}
