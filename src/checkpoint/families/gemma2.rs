//! Gemma 2: norms before and after attention and MLP whose weights are stored less 1, scaled embeddings, GeGLU, softcaps of scores
//! and logits, and a sliding window in every other block.

use serde_json::{Map, Value, json};

use super::{Config, Description, Only, refused, same_place};
use crate::checkpoint::gguf::form::{GgufForm, OwnKeys, WINDOW};
use crate::checkpoint::gguf::keys::Keys;
use crate::checkpoint::hf_config::{COMMON, Defaults, common};
use crate::config::shape::{Activation, Family, Features, LayerType, Norms, Shape};
use crate::error::{Error, Result};
use crate::gguf::{MetadataArray, MetadataValue};

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
    gguf: &GgufForm {
        read: |keys, shape| {
            GGUF.read(keys, shape)?;
            shape.features.attention_softcap = Some(keys.positive(SOFTCAPS[0])?.unwrap_or(50.0));
            shape.features.logit_softcap = Some(keys.positive(SOFTCAPS[1])?.unwrap_or(30.0));
            Ok(())
        },
        write: |shape| {
            let mut own = GGUF.write(shape)?;
            let caps = [shape.features.attention_softcap, shape.features.logit_softcap];
            for (key, cap) in SOFTCAPS.into_iter().zip(caps) {
                let cap = cap.ok_or_else(|| format!("a Gemma2 without {key}"))?;
                own.push((key, MetadataValue::Float(cap)));
            }
            match shape.tie_word_embeddings {
                true => Ok(own),
                false => Err("a Gemma2 whose LM head is not its embedding".into()),
            }
        },
        left_out: |shape| GGUF.left_out(shape),
        ..GgufForm::plain("gemma2", Family::Gemma2)
    },
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
    let layer_types = match config.get("layer_types") {
        None => (0..layers).map(|layer| layer_type(slides(layer))).collect(),
        Some(types) => serde_json::from_value::<Vec<LayerType>>(types.clone())
            .map_err(|e| Error::data(format!("layer_types is {types}: {e}")))?,
    };
    Ok(Shape {
        tie_word_embeddings: config.flag("tie_word_embeddings", true)?,
        sliding_window: Some(config.some_integer("sliding_window")?.unwrap_or(4096)),
        features: features(
            shape.features,
            config.some_integer("query_pre_attn_scalar")?.unwrap_or(256),
            layer_types,
        ),
        ..shape
    })
}

fn layer_type(slides: bool) -> LayerType {
    if slides { LayerType::SlidingAttention } else { LayerType::FullAttention }
}

/// Adds what all Gemmas compute.
fn features(common: Features, query_pre_attn_scalar: i64, layer_types: Vec<LayerType>) -> Features {
    Features {
        activation: Activation::GeluTanh,
        norms: Norms::Both,
        norm_offset: true,
        scale_embeddings: true,
        query_pre_attn_scalar: Some(query_pre_attn_scalar),
        layer_types: Some(layer_types),
        ..common
    }
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

/// The GGUF files of a Gemma.
pub(super) struct InGguf {
    /// Each so-many-th block sees everything, unless the file says otherwise.
    pub period: i64,
    /// The blocks of the model whose scores llama.cpp scales by C / H instead of D.
    pub largest: i64,
}

const GGUF: InGguf = InGguf { period: 2, largest: 46 };

const SOFTCAPS: [&str; 2] = ["attn_logit_softcapping", "final_logit_softcapping"];
const PATTERN: &str = "attention.sliding_window_pattern";
/// 1 / sqrt(query_pre_attn_scalar). llama.cpp does not read it of a Gemma.
const SCALE: &str = "attention.scale";

impl InGguf {
    /// Takes the keys that Gemma 2 and 3 have.
    pub(super) fn read(&self, keys: &mut Keys, shape: &mut Shape) -> Result<()> {
        let slides = self.read_pattern(keys, shape.num_hidden_layers)?;
        let scalar = match keys.positive(SCALE)? {
            None => self.scalar(shape),
            Some(scale) => {
                let scalar = scale.powi(-2).round();
                if (scalar.sqrt().recip() / scale - 1.0).abs() > 1e-6 {
                    return Err(keys.refused(SCALE, scale, "1 / sqrt(n) of a whole number n"));
                }
                scalar as i64
            }
        };
        shape.sliding_window = Some(keys.integer(WINDOW)?.filter(|n| *n > 0).unwrap_or(4096));
        let layer_types = slides.into_iter().map(layer_type).collect();
        shape.features = features(std::mem::take(&mut shape.features), scalar, layer_types);
        Ok(())
    }

    /// Writes them.
    pub(super) fn write(&self, shape: &Shape) -> Result<OwnKeys, String> {
        let slides = |layer| shape.window(layer).is_some();
        let mut own: OwnKeys =
            shape.sliding_window.map(|n| (WINDOW, MetadataValue::Integer(n))).into_iter().collect();
        let layers = 0..shape.num_hidden_layers;
        if layers.clone().any(|layer| slides(layer) != self.slides(layer)) {
            own.push((PATTERN, MetadataValue::Array(MetadataArray::Bools(layers.map(slides).collect()))));
        }
        if self.left_out(shape).is_some() {
            own.push((SCALE, MetadataValue::Float(shape.attention_scale())));
        }
        Ok(own)
    }

    /// The scale of scores, where llama.cpp takes another.
    pub(super) fn left_out(&self, shape: &Shape) -> Option<String> {
        let (ours, theirs) = (shape.features.query_pre_attn_scalar?, self.scalar(shape));
        (ours != theirs).then(|| {
            format!(
                "llama.cpp ignores query_pre_attn_scalar {ours} and uses {theirs}, which fits the published models: its \
                 results differ from this model's"
            )
        })
    }

    /// `query_pre_attn_scalar` as llama.cpp has it.
    fn scalar(&self, shape: &Shape) -> i64 {
        match shape.num_hidden_layers == self.largest {
            true => shape.hidden_size / shape.num_attention_heads,
            false => shape.head_dim,
        }
    }

    fn slides(&self, layer: i64) -> bool {
        (layer + 1) % self.period != 0
    }

    /// Which blocks have the window: a list, or each so-many-th has not.
    fn read_pattern(&self, keys: &mut Keys, layers: i64) -> Result<Vec<bool>> {
        let list: Vec<bool> = match keys.value(PATTERN) {
            None => return Ok((0..layers).map(|layer| self.slides(layer)).collect()),
            // llama.cpp takes 0 for a window in all blocks.
            Some(MetadataValue::Integer(period)) if *period >= 0 => {
                (1..=layers).map(|n| *period == 0 || n % period != 0).collect()
            }
            Some(MetadataValue::Array(MetadataArray::Bools(list))) => list.clone(),
            Some(MetadataValue::Array(MetadataArray::Integers(list))) => {
                list.iter().map(|n| *n != 0).collect()
            }
            Some(other) => return Err(keys.refused(PATTERN, other, "a list of truth values, or a number,")),
        };
        match list.len() as i64 == layers {
            true => Ok(list),
            false => Err(Error::data(format!(
                "`{}` has {} values, of {layers} blocks",
                keys.key(PATTERN),
                list.len()
            ))),
        }
    }
}
