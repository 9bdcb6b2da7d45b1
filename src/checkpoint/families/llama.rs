//! Llama 1, 2 and 3, and all that its authors call so.

use serde_json::{Value, json};

use super::{Config, Description, Only, refused, same_place};
use crate::checkpoint::gguf::form::GgufForm;
use crate::checkpoint::hf_config::{COMMON, Defaults, common};
use crate::config::shape::{Family, Shape};
use crate::error::Result;

pub static LLAMA: Description = Description {
    architecture: "LlamaForCausalLM",
    model_type: "llama",
    keys: &[&COMMON, &["sliding_window"]],
    only: &[("attention_bias", Only::Bool(false)), ("mlp_bias", Only::Bool(false))],
    harmless: &["use_sliding_window", "max_window_layers"],
    read,
    write: |_, config| {
        config.insert("attention_bias".into(), json!(false));
        config.insert("mlp_bias".into(), json!(false));
    },
    place: same_place,
    gguf: &GgufForm { rotated_pairs: true, ..GgufForm::plain("llama", Family::Llama) },
};

fn read(config: &Config) -> Result<Shape> {
    // Converted Qwen2 models carry the key, with the window switched off.
    if let Some(window) = config.get("sliding_window")
        && config.flag("use_sliding_window", true)?
    {
        return Err(refused("sliding_window", window, &Value::Null.to_string()));
    }
    common(
        config,
        Defaults {
            family: Family::Llama,
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope_theta: 10000.0,
        },
    )
}
