//! Qwen3: each head's query and key are normalised; no bias; the head's dimension is a key of its own.

use serde_json::json;

use super::qwen2::{WINDOW, read_window, write_window};
use super::{Config, Description, Only, same_place};
use crate::checkpoint::gguf::form::GgufForm;
use crate::checkpoint::hf_config::{COMMON, Defaults, common};
use crate::config::shape::{Family, Shape};
use crate::error::Result;

pub static QWEN3: Description = Description {
    architecture: "Qwen3ForCausalLM",
    model_type: "qwen3",
    keys: &[&COMMON, &WINDOW],
    only: &[("attention_bias", Only::Bool(false)), ("mlp_bias", Only::Bool(false))],
    harmless: &[],
    read,
    write: |shape, config| {
        config.insert("attention_bias".into(), json!(false));
        write_window(shape, config);
    },
    place: same_place,
    gguf: &GgufForm::plain("qwen3", Family::Qwen3),
};

fn read(config: &Config) -> Result<Shape> {
    let shape = common(
        config,
        Defaults {
            family: Family::Qwen3,
            num_key_value_heads: Some(32),
            head_dim: Some(128),
            max_position_embeddings: 32768,
            rms_norm_eps: 1e-6,
            rope_theta: 10000.0,
        },
    )?;
    read_window(config, shape)
}
