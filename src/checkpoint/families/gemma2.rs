//! Gemma 2: norms before and after attention and MLP whose weights are stored less 1, scaled embeddings, GeGLU, softcaps of scores
//! and logits, and a sliding window in every other block.

use serde_json::{Map, Value, json};

use super::{Config, Description, Only, refused, same_place};
use crate::checkpoint::hf_config::{COMMON, Defaults, common};
use crate::config::shape::{Activation, Family, Features, LayerType, Norms, Shape};
use crate::error::{Error, Result};

pub static GEMMA2: Description = Description {
    architecture: "Gemma2ForCausalLM",
    model_type: "gemma2",
    keys: &[&COMMON, &KEYS, &["attn_logit_softcapping"]],
    only: &[("attention_bias", Only::Bool(false)), ("use_bidirectional_attention", Only::Off)],
    // transformers reads hidden_activation alone.
    harmless: &["hidden_act", "cache_implementation"],
    read,
    write: |shape, config| {
        write(shape, config);
        config.insert("attn_logit_softcapping".into(), json!(shape.features.attention_softcap));
    },
    place: same_place,
};

/// Keys that Gemma 2 and 3 have besides the common ones.
pub(super) const KEYS: [&str; 5] = [
    "hidden_activation",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "final_logit_softcapping",
];

fn read(config: &Config) -> Result<Shape> {
    let every_other = |layer: i64| layer % 2 == 0;
    let mut shape = read_gemma(config, Family::Gemma2, (8192, 10000.0), every_other)?;
    shape.features.attention_softcap = softcap(config, "attn_logit_softcapping", 50.0)?;
    shape.features.logit_softcap = softcap(config, "final_logit_softcapping", 30.0)?;
    Ok(shape)
}

/// A cap that is `default` where the key is missing, and none where it is null.
fn softcap(config: &Config, key: &str, default: f64) -> Result<Option<f64>> {
    if config.is_null(key) { Ok(None) } else { config.number(key, default).map(Some) }
}

/// What Gemma 2 and 3 share. `slides`: which blocks have the window where `layer_types` does not say it.
pub(super) fn read_gemma(
    config: &Config,
    family: Family,
    (max_position_embeddings, rope_theta): (i64, f64),
    slides: impl Fn(i64) -> bool,
) -> Result<Shape> {
    let activation = config.get("hidden_activation").cloned().unwrap_or(json!("gelu_pytorch_tanh"));
    if activation != "gelu_pytorch_tanh" {
        return Err(refused("hidden_activation", &activation, "\"gelu_pytorch_tanh\""));
    }
    let shape = common(
        config,
        Defaults {
            family,
            num_key_value_heads: Some(4),
            head_dim: Some(256),
            max_position_embeddings,
            rms_norm_eps: 1e-6,
            rope_theta,
        },
    )?;
    let layers = shape.num_hidden_layers;
    let by_number =
        |layer| if slides(layer) { LayerType::SlidingAttention } else { LayerType::FullAttention };
    let layer_types = match config.get("layer_types") {
        None => (0..layers).map(by_number).collect(),
        Some(types) => serde_json::from_value::<Vec<LayerType>>(types.clone())
            .map_err(|e| Error::data(format!("layer_types is {types}: {e}")))?,
    };
    Ok(Shape {
        tie_word_embeddings: config.flag("tie_word_embeddings", true)?,
        sliding_window: Some(config.some_integer("sliding_window")?.unwrap_or(4096)),
        features: Features {
            activation: Activation::GeluTanh,
            norms: Norms::Both,
            norm_offset: true,
            scale_embeddings: true,
            query_pre_attn_scalar: Some(config.some_integer("query_pre_attn_scalar")?.unwrap_or(256)),
            layer_types: Some(layer_types),
            ..shape.features
        },
        ..shape
    })
}

pub(super) fn write(shape: &Shape, config: &mut Map<String, Value>) {
    let f = &shape.features;
    config.insert("attention_bias".into(), json!(false));
    config.insert("hidden_activation".into(), json!("gelu_pytorch_tanh"));
    config.insert("query_pre_attn_scalar".into(), json!(f.query_pre_attn_scalar));
    config.insert("sliding_window".into(), json!(shape.sliding_window));
    config.insert("layer_types".into(), json!(f.layer_types));
    config.insert("final_logit_softcapping".into(), json!(f.logit_softcap));
}
