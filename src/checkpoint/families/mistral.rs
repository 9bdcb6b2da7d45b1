//! Mistral: a Llama with a sliding window (v0.1; later versions say null).

use serde_json::json;

use super::{Config, Description, Only, same_place};
use crate::checkpoint::gguf::form::GgufForm;
use crate::checkpoint::hf_config::{COMMON, Defaults, common};
use crate::config::shape::{Family, Shape};
use crate::error::Result;

pub static MISTRAL: Description = Description {
    architecture: "MistralForCausalLM",
    model_type: "mistral",
    keys: &[&COMMON, &["sliding_window"]],
    only: &[("attention_bias", Only::Bool(false)), ("mlp_bias", Only::Bool(false))],
    harmless: &[],
    read,
    write: |shape, config| {
        config.insert("sliding_window".into(), json!(shape.sliding_window));
    },
    place: same_place,
    gguf: &GgufForm { rotated_pairs: true, ..GgufForm::windowed("llama", Family::Mistral) },
};

fn read(config: &Config) -> Result<Shape> {
    let mut shape = common(
        config,
        Defaults {
            family: Family::Mistral,
            num_key_value_heads: Some(8),
            head_dim: None,
            max_position_embeddings: 131072,
            rms_norm_eps: 1e-6,
            rope_theta: 10000.0,
        },
    )?;
    let default = if config.is_null("sliding_window") { None } else { Some(4096) };
    shape.sliding_window = config.some_integer("sliding_window")?.or(default);
    Ok(shape)
}
