//! The configuration of `corral pretrain`.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Serialize};

use super::Loaded;
use super::numbers::{betas, count, not_negative, positive, ratio, some_count, some_positive};
use super::shape::{Llama3RopeScaling, Shape};
use crate::error::{Error, Result};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pretrain {
    /// Decides initial weights and the order of the data.
    #[serde(default = "one_u64")]
    pub seed: u64,
    /// The run's folder.
    pub output_dir: PathBuf,
    pub model: Model,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<Tokenizer>,
    pub data: Data,
    #[serde(default)]
    pub parallel: Parallel,
    #[serde(default)]
    pub precision: Precision,
    #[serde(default)]
    pub optim: Optim,
    #[serde(default)]
    pub schedule: Schedule,
    pub train: Train,
    #[serde(default)]
    pub checkpoint: Checkpoint,
    #[serde(default)]
    pub log: Log,
    #[serde(default)]
    pub valid: Valid,
}

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
#[serde(deny_unknown_fields, try_from = "InitKeys")]
pub struct Init {
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
}

/// [`Init`] as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InitKeys {
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
        let init = Init {
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
        };
        init.shape(1, 1).check().map_err(|e| e.message)?;
        Ok(init)
    }
}

impl Init {
    /// The whole shape; `vocab_size` (the tokenizer's) and `sequence_length` serve where the keys were left out.
    pub fn shape(&self, vocab_size: i64, sequence_length: i64) -> Shape {
        Shape {
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
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokenizer {
    /// A folder with a `tokenizer.json`. Without this section the model's folder is taken.
    pub path: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Token shards to train on; at least one.
    pub train: Vec<Source>,
    /// Token shards to validate on; with none there is no validation.
    #[serde(default)]
    pub valid: Vec<Source>,
    /// Tokens of one sample, T.
    #[serde(default = "sequence_length", deserialize_with = "count")]
    pub sequence_length: i64,
}

/// A source of data: a path, or `{path: ..., weight: ...}`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Source {
    pub path: PathBuf,
    /// Share of this source in the samples, relative to the others' weights; given for all sources of a list or for
    /// none. Without weights the sources are shuffled together, each as large as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Keys {
            path: PathBuf,
            #[serde(default, deserialize_with = "some_positive")]
            weight: Option<f64>,
        }
        struct SourceVisitor;
        impl<'de> Visitor<'de> for SourceVisitor {
            type Value = Source;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a path, or {path: PATH, weight: NUMBER}")
            }

            fn visit_str<E>(self, path: &str) -> Result<Source, E> {
                Ok(Source { path: path.into(), weight: None })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Source, A::Error> {
                let Keys { path, weight } = Keys::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Source { path, weight })
            }
        }
        d.deserialize_any(SourceVisitor)
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Parallel {
    pub mode: Mode,
    /// Ranks that share every matrix (tensor parallelism). Only 1 is built.
    #[serde(deserialize_with = "tensor")]
    pub tensor: i64,
    /// Seconds within which ranks must meet, and every collective must end.
    #[serde(deserialize_with = "positive")]
    pub timeout_s: f64,
}

impl Default for Parallel {
    fn default() -> Self {
        Parallel { mode: Mode::Full, tensor: 1, timeout_s: 600.0 }
    }
}

/// What is sharded over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase", try_from = "ModeName")]
pub enum Mode {
    /// Parameters, gradients and optimizer state (ZeRO-3).
    Full,
    /// Nothing: every rank holds all (DDP).
    Replicate,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum ModeName {
    Full,
    Grads,
    Optimizer,
    Replicate,
    Hybrid,
}

impl TryFrom<ModeName> for Mode {
    type Error = String;

    fn try_from(name: ModeName) -> Result<Self, String> {
        let missing = |name| Err(format!("the mode '{name}' is not built yet; choose full or replicate"));
        match name {
            ModeName::Full => Ok(Mode::Full),
            ModeName::Replicate => Ok(Mode::Replicate),
            ModeName::Grads => missing("grads"),
            ModeName::Optimizer => missing("optimizer"),
            ModeName::Hybrid => missing("hybrid"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Precision {
    pub compute: Compute,
}

impl Default for Precision {
    fn default() -> Self {
        Precision { compute: Compute::Float32 }
    }
}

/// The dtype of forward and backward; masters and moments are float32 (float64 for float64).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase", try_from = "ComputeName")]
pub enum Compute {
    Float32,
    Bfloat16,
    /// For tests.
    Float64,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum ComputeName {
    Float32,
    Bfloat16,
    Float64,
    Float8,
}

impl TryFrom<ComputeName> for Compute {
    type Error = &'static str;

    fn try_from(name: ComputeName) -> Result<Self, Self::Error> {
        match name {
            ComputeName::Float32 => Ok(Compute::Float32),
            ComputeName::Bfloat16 => Ok(Compute::Bfloat16),
            ComputeName::Float64 => Ok(Compute::Float64),
            ComputeName::Float8 => Err("float8 is not built yet; choose bfloat16 or float32"),
        }
    }
}

/// AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optim {
    /// Peak learning rate.
    #[serde(deserialize_with = "positive")]
    pub lr: f64,
    #[serde(deserialize_with = "betas")]
    pub betas: [f64; 2],
    #[serde(deserialize_with = "positive")]
    pub eps: f64,
    /// Decoupled decay, of matrices only.
    #[serde(deserialize_with = "not_negative")]
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0: no clipping.
    #[serde(deserialize_with = "not_negative")]
    pub clip: f64,
}

impl Default for Optim {
    fn default() -> Self {
        Optim { lr: 3e-4, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    pub kind: ScheduleKind,
    /// Steps over which the learning rate rises linearly from 0 to its peak.
    pub warmup_steps: u64,
    /// The learning rate at the end, as a share of its peak (cosine and linear).
    #[serde(deserialize_with = "ratio")]
    pub min_lr_ratio: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule { kind: ScheduleKind::Cosine, warmup_steps: 0, min_lr_ratio: 0.1 }
    }
}

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    Cosine,
    Linear,
    Constant,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Updates; either this or `epochs`.
    #[serde(default, deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    pub steps: Option<i64>,
    /// Passes over the training data; either this or `steps`.
    #[serde(default, deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    pub epochs: Option<i64>,
    /// Sequences of one step, over all ranks.
    #[serde(default = "batch_size", deserialize_with = "count")]
    pub batch_size: i64,
    /// Sequences that one rank computes at once. Default: its whole share of the batch.
    #[serde(default, deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<i64>,
    #[serde(default)]
    pub recompute: Recompute,
}

/// Which activations of a block are computed again in the backward instead of being kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Only the norms' outputs and SwiGLU's, which cost one pass over memory.
    #[default]
    None,
    /// Also the product of gate and up, the largest activation: 2F of the 2C + (2H + 2K) D + 2F numbers a token and block.
    Selective,
    /// The whole block, from its input.
    Full,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Steps between checkpoints; one is always written at the end.
    #[serde(deserialize_with = "count")]
    pub every: i64,
    /// Checkpoints that stay.
    #[serde(deserialize_with = "count")]
    pub keep: i64,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every: 100, keep: 3 }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Steps between lines of metrics.
    #[serde(deserialize_with = "count")]
    pub every: i64,
}

impl Default for Log {
    fn default() -> Self {
        Log { every: 1 }
    }
}

/// Validation on `data.valid`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Valid {
    /// Steps between validations.
    #[serde(deserialize_with = "count")]
    pub every: i64,
    /// Batches of `train.batch_size` sequences that a validation takes at most.
    #[serde(deserialize_with = "count")]
    pub batches: i64,
}

impl Default for Valid {
    fn default() -> Self {
        Valid { every: 100, batches: 20 }
    }
}

impl Pretrain {
    /// The folder of the tokenizer: the named one, else the model's. `None` is refused by [`Pretrain::validate`].
    pub fn tokenizer_path(&self) -> Option<&Path> {
        match (&self.tokenizer, &self.model) {
            (Some(tokenizer), _) => Some(&tokenizer.path),
            (None, Model::Path(path)) => Some(path),
            (None, _) => None,
        }
    }

    /// Sequences that one rank of `world_size` computes at once.
    pub fn micro_batch_size(&self, world_size: i64) -> i64 {
        self.train.micro_batch_size.unwrap_or(self.train.batch_size / world_size)
    }

    /// Refuses combinations that cannot run on `world_size` (at least 1) ranks; touches no file and no device.
    /// [`Loaded::validate`] also tells where the value was written.
    pub fn validate(&self, world_size: i64) -> Result<()> {
        self.conflict(world_size)
            .map_or(Ok(()), |(key, message)| Err(Error::config(format!("'{key}': {message}"))))
    }

    /// The first key that does not fit the others, and why.
    fn conflict(&self, world_size: i64) -> Option<(&'static str, String)> {
        let (train, length) = (&self.train, self.data.sequence_length);
        if self.data.train.is_empty() {
            return Some(("data.train", "there is no data to train on; name at least one path".into()));
        }
        if self.tokenizer_path().is_none() {
            let why = "a new model needs a tokenizer: give tokenizer.path, a folder with a tokenizer.json";
            return Some(("tokenizer", why.into()));
        }
        match (train.steps, train.epochs) {
            (Some(_), Some(_)) => return Some(("train.epochs", "train.steps is given too; keep one".into())),
            (None, None) => return Some(("train.steps", "give train.steps or train.epochs".into())),
            _ => {}
        }
        if let Some(steps) = train.steps.filter(|steps| self.schedule.warmup_steps > *steps as u64) {
            let warmup = self.schedule.warmup_steps;
            let why = format!("{warmup} steps of warm-up are more than the {steps} of train.steps");
            return Some(("schedule.warmup_steps", why));
        }
        if self.parallel.timeout_s > 1e7 {
            return Some(("parallel.timeout_s", "at most 10000000 seconds, which are 115 days".into()));
        }
        let positions = match &self.model {
            Model::Init(init) => init.max_position_embeddings,
            Model::Preset(name) => Shape::preset(name).map(|shape| shape.max_position_embeddings),
            Model::Path(_) => None,
        };
        if let Some(positions) = positions.filter(|positions| length > *positions) {
            let why = format!("{length} tokens do not fit the model's max_position_embeddings, {positions}");
            return Some(("data.sequence_length", why));
        }
        let (batch, unit) = match train.micro_batch_size {
            Some(micro) => (train.batch_size, micro * world_size),
            None => (train.batch_size, world_size),
        };
        if batch % unit != 0 {
            let of = match train.micro_batch_size {
                Some(micro) => format!("train.micro_batch_size x ranks = {micro} x {world_size} = {unit}"),
                None => format!("the number of ranks, {world_size}"),
            };
            let (below, above) = (batch / unit * unit, (batch / unit + 1) * unit);
            let near = if below > 0 { format!("{below} or {above}") } else { above.to_string() };
            return Some(("train.batch_size", format!("{batch} is no multiple of {of}; {near} would be")));
        }
        None
    }
}

impl Loaded<Pretrain> {
    /// [`Pretrain::validate`], with the place of the value that does not fit.
    pub fn validate(&self, world_size: i64) -> Result<()> {
        self.config.conflict(world_size).map_or(Ok(()), |(key, message)| Err(self.error(key, &message)))
    }
}

fn one_u64() -> u64 {
    1
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

fn sequence_length() -> i64 {
    512
}

fn batch_size() -> i64 {
    32
}

fn tensor<'de, D: Deserializer<'de>>(d: D) -> Result<i64, D::Error> {
    match count(d)? {
        1 => Ok(1),
        n => Err(D::Error::custom(format!("tensor parallelism over {n} ranks is not built yet; only 1 is"))),
    }
}

fn preset<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    let name = Option::<String>::deserialize(d)?;
    match name.as_deref().filter(|name| Shape::preset(name).is_none()) {
        None => Ok(name),
        Some(unknown) => Err(D::Error::unknown_variant(unknown, &Shape::PRESETS)),
    }
}
