//! Qwen2 and 2.5: bias on q, k and v; a sliding window from some block on, mostly switched off.

use serde_json::{Map, Value, json};

use super::{Config, Description, Only, refused, same_place};
use crate::checkpoint::gguf::form::GgufForm;
use crate::checkpoint::hf_config::{COMMON, Defaults, common};
use crate::config::shape::{Family, Shape};
use crate::error::{Error, Result};

pub static QWEN2: Description = Description {
    architecture: "Qwen2ForCausalLM",
    model_type: "qwen2",
    keys: &[&COMMON, &WINDOW],
    // Its bias is not asked for by the key.
    only: &[
        ("attention_bias", Only::Bool(false)),
        ("mlp_bias", Only::Bool(false)),
        ("qkv_bias", Only::Bool(true)),
        ("use_qkv_bias", Only::Bool(true)),
        ("add_qkv_bias", Only::Bool(true)),
    ],
    harmless: &[],
    read,
    write: write_window,
    place: same_place,
    gguf: &GGUF,
};

/// Its GGUF files, which are those of the first Qwen's models here, too.
pub(super) static GGUF: GgufForm = GgufForm::plain("qwen2", Family::Qwen2);

/// The keys of the sliding window.
pub(super) const WINDOW: [&str; 4] =
    ["sliding_window", "use_sliding_window", "max_window_layers", "layer_types"];

fn read(config: &Config) -> Result<Shape> {
    let shape = common(
        config,
        Defaults {
            family: Family::Qwen2,
            num_key_value_heads: Some(32),
            head_dim: None,
            max_position_embeddings: 32768,
            rms_norm_eps: 1e-6,
            rope_theta: 10000.0,
        },
    )?;
    read_window(config, shape)
}

/// Takes the sliding window, which Qwen3 has in the same keys: `layer_types` says which blocks have it, or, where that is
/// missing, `max_window_layers` how many do not.
pub(super) fn read_window(config: &Config, shape: Shape) -> Result<Shape> {
    let window = match config.flag("use_sliding_window", false)? {
        true if config.is_null("sliding_window") => None,
        true => Some(config.some_integer("sliding_window")?.unwrap_or(4096)),
        false => None,
    };
    let layers = shape.num_hidden_layers;
    let first = match config.get("layer_types") {
        Some(types) => first_window(types, layers)?,
        None => config.some_integer("max_window_layers")?.unwrap_or(28),
    };
    if first >= layers {
        return Ok(shape);
    }
    if window.is_none() && config.get("layer_types").is_some() {
        return Err(Error::data(
            "layer_types names sliding_attention, and use_sliding_window and sliding_window give no window",
        ));
    }
    let max_window_layers = if window.is_some() { first } else { 0 };
    Ok(Shape { sliding_window: window, max_window_layers, ..shape })
}

/// The first block with a window, of `layers`; only then may others follow.
fn first_window(types: &Value, layers: i64) -> Result<i64> {
    let known = ["full_attention", "sliding_attention"];
    let list = types.as_array().filter(|list| list.len() as i64 == layers);
    let list =
        list.ok_or_else(|| Error::data(format!("layer_types must be a list of {layers} names of types")))?;
    if let Some(other) = list.iter().find(|t| !known.iter().any(|k| *t == k)) {
        return Err(refused("layer_types", other, "full_attention and sliding_attention"));
    }
    let first = list.iter().position(|t| t == known[1]).unwrap_or(list.len());
    if list[first..].iter().any(|t| t == known[0]) {
        return Err(refused("layer_types", types, "full_attention before sliding_attention"));
    }
    Ok(first as i64)
}

pub(super) fn write_window(shape: &Shape, config: &mut Map<String, Value>) {
    let windowed = shape.sliding_window.is_some();
    let without = if windowed { shape.max_window_layers } else { shape.num_hidden_layers };
    config.insert("use_sliding_window".into(), json!(windowed));
    config.insert("sliding_window".into(), json!(shape.sliding_window));
    config.insert("max_window_layers".into(), json!(without));
}
