//! Phi-3: a Llama, with q, k and v in one tensor, and gate and up in one.
//!
//! Longer contexts by `longrope`, and heads that are rotated in part (Phi-4-mini), are refused by name.

use serde_json::json;

use super::{Config, Description, Only};
use crate::checkpoint::gguf::form::{GgufForm, check_head_dim};
use crate::checkpoint::hf_config::{COMMON, Defaults, common};
use crate::config::shape::{Family, Shape};
use crate::error::Result;

pub static PHI3: Description = Description {
    architecture: "Phi3ForCausalLM",
    model_type: "phi3",
    keys: &[&COMMON, &["sliding_window"]],
    only: &[("mlp_bias", Only::Bool(false))],
    // Published configurations have the first although no projection has a bias; the other is for longrope alone.
    harmless: &["attention_bias", "original_max_position_embeddings"],
    read,
    write: |shape, config| {
        config.insert("attention_bias".into(), json!(false));
        config.insert("sliding_window".into(), json!(shape.sliding_window));
    },
    place,
    gguf: &GgufForm {
        write: |shape| {
            check_head_dim(shape)?;
            (GgufForm::windowed("phi3", Family::Phi3).write)(shape)
        },
        ..GgufForm::windowed("phi3", Family::Phi3)
    },
};

fn read(config: &Config) -> Result<Shape> {
    let mut shape = common(
        config,
        Defaults {
            family: Family::Phi3,
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-5,
            rope_theta: 10000.0,
        },
    )?;
    shape.sliding_window = config.some_integer("sliding_window")?;
    Ok(shape)
}

fn place(name: &str, s: &Shape) -> (String, i64) {
    let (q, kv) = (s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim);
    let joined = [
        ("self_attn.q_proj.weight", "self_attn.qkv_proj.weight", 0),
        ("self_attn.k_proj.weight", "self_attn.qkv_proj.weight", q),
        ("self_attn.v_proj.weight", "self_attn.qkv_proj.weight", q + kv),
        ("mlp.gate_proj.weight", "mlp.gate_up_proj.weight", 0),
        ("mlp.up_proj.weight", "mlp.gate_up_proj.weight", s.intermediate_size),
    ];
    for (part, there, row) in joined {
        if let Some(block) = name.strip_suffix(part) {
            return (format!("{block}{there}"), row);
        }
    }
    (name.to_string(), 0)
}
