//! Mixtral: a Mistral with a mixture of experts in each block.

use serde_json::json;

use super::{Config, Description, Only, same_place};
use crate::checkpoint::gguf::form::GgufForm;
use crate::checkpoint::hf_config::{COMMON, Defaults, common};
use crate::config::shape::{Experts, Family, Shape};
use crate::error::Result;

pub static MIXTRAL: Description = Description {
    architecture: "MixtralForCausalLM",
    model_type: "mixtral",
    keys: &[&COMMON, &["sliding_window", "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"]],
    only: &[
        ("attention_bias", Only::Bool(false)),
        ("mlp_bias", Only::Bool(false)),
        ("router_jitter_noise", Only::Number(0.0)),
    ],
    harmless: &["output_router_logits"],
    read,
    write: |shape, config| {
        config.insert("sliding_window".into(), json!(shape.sliding_window));
        if let Some(e) = &shape.experts {
            config.insert("num_local_experts".into(), json!(e.num_local_experts));
            config.insert("num_experts_per_tok".into(), json!(e.num_experts_per_tok));
            config.insert("router_aux_loss_coef".into(), json!(e.router_aux_loss_coef));
            config.insert("output_router_logits".into(), json!(false));
        }
    },
    place: same_place,
    gguf: &GgufForm { rotated_pairs: true, ..GgufForm::windowed("llama", Family::Mixtral) },
};

fn read(config: &Config) -> Result<Shape> {
    let mut shape = common(
        config,
        Defaults {
            family: Family::Mixtral,
            num_key_value_heads: Some(8),
            head_dim: None,
            max_position_embeddings: 131072,
            rms_norm_eps: 1e-5,
            rope_theta: 1e6,
        },
    )?;
    shape.sliding_window = config.some_integer("sliding_window")?;
    shape.experts = Some(Experts {
        num_local_experts: config.some_integer("num_local_experts")?.unwrap_or(8),
        num_experts_per_tok: config.some_integer("num_experts_per_tok")?.unwrap_or(2),
        router_aux_loss_coef: config.number("router_aux_loss_coef", 0.001)?,
    });
    Ok(shape)
}
