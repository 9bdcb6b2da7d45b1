//! Where a model comes from: a path, a preset, or a new shape.

use std::path::PathBuf;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use super::numbers::{count, positive, some_count, some_not_negative};
use super::shape::{Experts, Family, Head, Llama3RopeScaling, Shape};

/// Where the model comes from: exactly one of these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "ModelKeys")]
pub enum Model {
    /// The folder of a model to go on from.
    Path(PathBuf),
    /// A new model with the shape of a preset (see [`Shape::PRESETS`]).
    Preset(String),
    /// A new model of this shape.
    Init(Init),
}

/// [`Model`] as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelKeys {
    path: Option<PathBuf>,
    #[serde(default, deserialize_with = "preset")]
    preset: Option<String>,
    init: Option<Init>,
}

impl TryFrom<ModelKeys> for Model {
    type Error = &'static str;

    fn try_from(keys: ModelKeys) -> Result<Self, Self::Error> {
        match keys {
            ModelKeys { path: Some(path), preset: None, init: None } => Ok(Model::Path(path)),
            ModelKeys { path: None, preset: Some(name), init: None } => Ok(Model::Preset(name)),
            ModelKeys { path: None, preset: None, init: Some(init) } => Ok(Model::Init(init)),
            ModelKeys { path: None, preset: None, init: None } => {
                Err("expected one of the keys path, preset and init, found none")
            }
            _ => Err("expected one of the keys path, preset and init, found several \
                      (on the command line, 'model={path: DIR}' replaces the section)"),
        }
    }
}

/// The shape of a new model under Hugging Face's names. Three numbers decide; the rest follows from them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "InitKeys")]
pub struct Init {
    /// Default: `llama`.
    #[serde(skip_serializing_if = "is_llama")]
    pub model_type: Family,
    /// Default: the tokenizer's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<i64>,
    pub hidden_size: i64,
    /// Default: 8/3 of `hidden_size`, rounded up to a multiple of 32.
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    /// Default: `num_attention_heads`.
    pub num_key_value_heads: i64,
    /// Default: `hidden_size / num_attention_heads`.
    pub head_dim: i64,
    /// Default: `data.sequence_length`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_position_embeddings: Option<i64>,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<Llama3RopeScaling>,
    pub tie_word_embeddings: bool,
    pub initializer_range: f64,
    /// Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<i64>,
    /// Of a mixtral. Default of the three: 8, 2, 0.02.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub experts: Option<Experts>,
}

/// [`Init`] as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InitKeys {
    #[serde(default)]
    model_type: Family,
    #[serde(default, deserialize_with = "some_count")]
    vocab_size: Option<i64>,
    #[serde(deserialize_with = "count")]
    hidden_size: i64,
    #[serde(default, deserialize_with = "some_count")]
    intermediate_size: Option<i64>,
    #[serde(deserialize_with = "count")]
    num_hidden_layers: i64,
    #[serde(deserialize_with = "count")]
    num_attention_heads: i64,
    #[serde(default, deserialize_with = "some_count")]
    num_key_value_heads: Option<i64>,
    #[serde(default, deserialize_with = "some_count")]
    head_dim: Option<i64>,
    #[serde(default, deserialize_with = "some_count")]
    max_position_embeddings: Option<i64>,
    #[serde(default = "rms_norm_eps", deserialize_with = "positive")]
    rms_norm_eps: f64,
    #[serde(default = "rope_theta", deserialize_with = "positive")]
    rope_theta: f64,
    #[serde(default)]
    rope_scaling: Option<Llama3RopeScaling>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default = "initializer_range", deserialize_with = "positive")]
    initializer_range: f64,
    #[serde(default, deserialize_with = "some_count")]
    sliding_window: Option<i64>,
    #[serde(default, deserialize_with = "some_count")]
    num_local_experts: Option<i64>,
    #[serde(default, deserialize_with = "some_count")]
    num_experts_per_tok: Option<i64>,
    #[serde(default, deserialize_with = "some_not_negative")]
    router_aux_loss_coef: Option<f64>,
}

impl TryFrom<InitKeys> for Init {
    type Error = String;

    fn try_from(keys: InitKeys) -> Result<Self, String> {
        let (c, heads) = (keys.hidden_size, keys.num_attention_heads);
        if keys.head_dim.is_none() && c % heads != 0 {
            return Err(format!(
                "hidden_size ({c}) is no multiple of num_attention_heads ({heads}): change one, or give head_dim"
            ));
        }
        if let Some(rope) = &keys.rope_scaling {
            let numbers = [rope.factor, rope.low_freq_factor, rope.high_freq_factor - rope.low_freq_factor];
            if numbers.iter().any(|x| *x <= 0.0) || rope.original_max_position_embeddings < 1 {
                return Err("rope_scaling: the numbers must be above 0, and high_freq_factor above \
                            low_freq_factor"
                    .into());
            }
        }
        if let Family::Gemma2 | Family::Gemma3 = keys.model_type {
            return Err(
                "model_type: a new Gemma is not built; one that is there can be trained (model.path)".into(),
            );
        }
        let experts = (keys.num_local_experts, keys.num_experts_per_tok, keys.router_aux_loss_coef);
        let experts = match (keys.model_type, experts) {
            (Family::Mixtral, (number, per_token, coef)) => Some(Experts {
                num_local_experts: number.unwrap_or(8),
                num_experts_per_tok: per_token.unwrap_or(2),
                router_aux_loss_coef: coef.unwrap_or(0.02),
            }),
            (_, (None, None, None)) => None,
            _ => {
                return Err("num_local_experts, num_experts_per_tok and router_aux_loss_coef are keys of \
                             model_type: mixtral"
                    .into());
            }
        };
        let init = Init {
            model_type: keys.model_type,
            vocab_size: keys.vocab_size,
            hidden_size: c,
            intermediate_size: keys.intermediate_size.unwrap_or((c * 8 + 95) / 96 * 32),
            num_hidden_layers: keys.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: keys.num_key_value_heads.unwrap_or(heads),
            head_dim: keys.head_dim.unwrap_or(c / heads),
            max_position_embeddings: keys.max_position_embeddings,
            rms_norm_eps: keys.rms_norm_eps,
            rope_theta: keys.rope_theta,
            rope_scaling: keys.rope_scaling,
            tie_word_embeddings: keys.tie_word_embeddings,
            initializer_range: keys.initializer_range,
            sliding_window: keys.sliding_window,
            experts,
        };
        init.shape(1, 1).check().map_err(|e| e.message)?;
        Ok(init)
    }
}

impl Init {
    /// The whole shape; `vocab_size` (the tokenizer's) and `sequence_length` serve where the keys were left out.
    pub fn shape(&self, vocab_size: i64, sequence_length: i64) -> Shape {
        Shape {
            family: self.model_type,
            head: Head::Lm,
            vocab_size: self.vocab_size.unwrap_or(vocab_size),
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            max_position_embeddings: self.max_position_embeddings.unwrap_or(sequence_length),
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: self.rope_theta,
            rope_scaling: self.rope_scaling.clone(),
            tie_word_embeddings: self.tie_word_embeddings,
            initializer_range: self.initializer_range,
            sliding_window: self.sliding_window,
            max_window_layers: 0,
            experts: self.experts.clone(),
            features: self.model_type.features(),
        }
    }
}

fn is_llama(family: &Family) -> bool {
    *family == Family::Llama
}

fn rms_norm_eps() -> f64 {
    1e-5
}

fn rope_theta() -> f64 {
    10000.0
}

fn initializer_range() -> f64 {
    0.02
}

fn preset<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    let name = Option::<String>::deserialize(d)?;
    match name.as_deref().filter(|name| Shape::preset(name).is_none()) {
        None => Ok(name),
        Some(unknown) => Err(D::Error::unknown_variant(unknown, &Shape::PRESETS)),
    }
}
