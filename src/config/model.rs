//! Where a model comes from: a path, a preset, or a new shape.

use std::path::PathBuf;

use serde_json::Value as Json;

use super::keys::KeyKind;
use super::problems::Problems;
use super::section::section;
use super::setting::{At, Setting};
use super::shape::{Experts, Family, Head, Llama3RopeScaling, Shape};

/// Where the model comes from: exactly one of these.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "a configuration has one or two of them")]
pub enum Model {
    /// The folder of a model to go on from.
    Path(PathBuf),
    /// A new model with the shape of a preset (see [`Shape::PRESETS`]).
    Preset(String),
    /// A new model of this shape.
    Init(Init),
}

section! {
    /// Where the model comes from: exactly one of these.
    pub struct ModelKeys {
        /// Weights to start from: Hugging Face folder, folder in Meta's or Megatron's format, GGUF file, a name that `corral get` fetched, run
        /// folder (its `model/`, else best or newest checkpoint), checkpoint, adapter, or a hub id that the local Hugging Face
        /// cache holds (nothing is downloaded).
        path: Option<PathBuf> = None => Path;
        /// A new model with the shape of a preset.
        preset: Option<Preset> = None => State;
        /// A new model of this shape, under Hugging Face's names.
        init: Option<Init> = None;
    }
}

/// The name of one of [`Shape::PRESETS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preset(String);

impl Setting for Preset {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        let name = at.text(problems)?;
        if Shape::preset(name).is_none() {
            problems.unknown_choice(&at.node.place, &at.key, name, &Shape::PRESETS);
            return None;
        }
        Some(Preset(name.into()))
    }

    fn write(&self) -> Json {
        self.0.as_str().into()
    }

    fn kind() -> KeyKind {
        KeyKind::Choice(Shape::PRESETS.iter().map(|name| (*name, String::new())).collect())
    }
}

impl Setting for Model {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        match ModelKeys::read(at, problems)? {
            ModelKeys { path: Some(path), preset: None, init: None } => Some(Model::Path(path)),
            ModelKeys { path: None, preset: Some(Preset(name)), init: None } => Some(Model::Preset(name)),
            ModelKeys { path: None, preset: None, init: Some(init) } => Some(Model::Init(init)),
            // A key that is there and wrong has been told.
            ModelKeys { path: None, preset: None, init: None } if problems.has_below(&at.key) => None,
            ModelKeys { path: None, preset: None, init: None } => {
                at.refuse("expected one of the keys path, preset and init, found none", problems)
            }
            _ => at.refuse(
                "expected one of the keys path, preset and init, found several \
                 (on the command line, 'model={path: DIR}' replaces the section)",
                problems,
            ),
        }
    }

    fn write(&self) -> Json {
        let mut keys = ModelKeys::default();
        match self {
            Model::Path(path) => keys.path = Some(path.clone()),
            Model::Preset(name) => keys.preset = Some(Preset(name.clone())),
            Model::Init(init) => keys.init = Some(init.clone()),
        }
        keys.write()
    }

    fn kind() -> KeyKind {
        ModelKeys::kind()
    }
}

section! {
    /// The shape of a new model under Hugging Face's names. Three numbers are required; the rest have defaults.
    pub struct Init {
        /// The family of the model.
        model_type: Family = Family::Llama => State;
        /// Default: the tokenizer's.
        vocab_size: Option<i64> = None, COUNT => State;
        /// C, the size of a hidden state.
        hidden_size: i64, COUNT => State;
        /// F, rows of gate and up (of one expert in a mixture). Default: 8/3 of `hidden_size`, rounded up to a multiple of 32.
        intermediate_size: Option<i64> = None, COUNT => State;
        /// Blocks.
        num_hidden_layers: i64, COUNT => State;
        /// H, query heads.
        num_attention_heads: i64, COUNT => State;
        /// K, key and value heads. Default: `num_attention_heads`.
        num_key_value_heads: Option<i64> = None, COUNT => State;
        /// D, the size of a head. Default: `hidden_size / num_attention_heads`.
        head_dim: Option<i64> = None, COUNT => State;
        /// Maximum tokens of a sequence. Default: `data.sequence_length`.
        max_position_embeddings: Option<i64> = None, COUNT => State;
        /// Added to the mean square in a norm.
        rms_norm_eps: f64 = 1e-5, POSITIVE => State;
        /// Base of the rotary embedding.
        rope_theta: f64 = 10000.0, POSITIVE => State;
        /// Rope scaling of type `llama3` (Llama 3.1 and later).
        rope_scaling: Option<Llama3RopeScaling> = None;
        /// Ties the head's weight to the embedding.
        tie_word_embeddings: bool = false => State;
        /// Standard deviation of the initial weights.
        initializer_range: f64 = 0.02, POSITIVE => State;
        /// Positions that a token attends to, its own included; none: all before it.
        sliding_window: Option<i64> = None, COUNT => State;
        /// mixtral: the number of experts. Default: 8.
        num_local_experts: Option<i64> = None, COUNT => State;
        /// mixtral: the number of experts per token. Default: 2.
        num_experts_per_tok: Option<i64> = None, COUNT => State;
        /// mixtral: weight of the load-balancing loss in pretraining. Default: 0.02.
        router_aux_loss_coef: Option<f64> = None, NOT_NEGATIVE => Mathematics;
    }
    check Init::complete
}

impl Init {
    /// Fills in what follows from other keys, and refuses a shape that cannot be.
    fn complete(&mut self) -> Result<(), String> {
        let (c, heads) = (self.hidden_size, self.num_attention_heads);
        if self.head_dim.is_none() && c % heads != 0 {
            return Err(format!(
                "hidden_size ({c}) is not a multiple of num_attention_heads ({heads}): change one, or give head_dim"
            ));
        }
        if let Family::Gemma2 | Family::Gemma3 = self.model_type {
            return Err(
                "model_type: a new Gemma is not built; a pretrained one can be trained (model.path)".into()
            );
        }
        self.head_dim.get_or_insert(c / heads);
        self.num_key_value_heads.get_or_insert(heads);
        self.intermediate_size.get_or_insert((c * 8 + 95) / 96 * 32);
        if self.model_type == Family::Mixtral {
            self.num_local_experts.get_or_insert(8);
            self.num_experts_per_tok.get_or_insert(2);
            self.router_aux_loss_coef.get_or_insert(0.02);
        } else if self.num_local_experts.or(self.num_experts_per_tok).is_some()
            || self.router_aux_loss_coef.is_some()
        {
            return Err("num_local_experts, num_experts_per_tok and router_aux_loss_coef are keys of model_type: mixtral".into());
        }
        self.shape(1, 1).check().map_err(|e| e.message)
    }

    fn experts(&self) -> Option<Experts> {
        Some(Experts {
            num_local_experts: self.num_local_experts?,
            num_experts_per_tok: self.num_experts_per_tok?,
            router_aux_loss_coef: self.router_aux_loss_coef?,
        })
    }

    /// The whole shape; `vocab_size` (the tokenizer's) and `sequence_length` serve where the keys were left out.
    pub fn shape(&self, vocab_size: i64, sequence_length: i64) -> Shape {
        Shape {
            family: self.model_type,
            head: Head::Lm,
            vocab_size: self.vocab_size.unwrap_or(vocab_size),
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size.unwrap_or_default(),
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or_default(),
            head_dim: self.head_dim.unwrap_or_default(),
            max_position_embeddings: self.max_position_embeddings.unwrap_or(sequence_length),
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: self.rope_theta,
            rope_scaling: self.rope_scaling.clone(),
            tie_word_embeddings: self.tie_word_embeddings,
            initializer_range: self.initializer_range,
            sliding_window: self.sliding_window,
            max_window_layers: 0,
            experts: self.experts(),
            features: self.model_type.features(),
        }
    }
}
