//! The sections that the configurations of all algorithms share.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::de::{Deserializer, MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Serialize};

use super::conflict::Conflict;
use super::numbers::{betas, count, not_negative, positive, ratio, some_count, some_positive};

/// What to do with records that cannot be used: unreadable lines, no known format, messages that the chat template refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// Count all, name the first ten, and end before anything is computed
    #[default]
    Refuse,
    /// Leave them out, and count them by reason
    Skip,
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

/// The tokenizer, and how conversations are rendered. Without this section it is the model's as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tokenizer {
    /// A folder with a tokenizer, or its file. Default: the model's folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// A chat template in place of the tokenizer's: the name of a built-in one, a file, or Jinja itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// A plain template in place of the tokenizer's, with `{prompt}` and `{completion}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Special tokens that the tokenizer gets; their embeddings are new rows, each the mean of the model's rows.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub add_tokens: Vec<String>,
    /// The token that pads, a new one where the tokenizer does not have it. Only files that others read need one: nothing
    /// here looks at it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_token: Option<String>,
    /// The embeddings get as many rows that their number is a multiple of this.
    #[serde(deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    pub pad_to_multiple_of: Option<i64>,
}

impl Tokenizer {
    /// What does not fit, and why.
    pub fn conflict(&self) -> Option<Conflict> {
        if self.chat_template.is_some() && self.template.is_some() {
            return Some(("tokenizer.template", "tokenizer.chat_template is given too; keep one".into()));
        }
        if self.pad_token.as_ref().is_some_and(String::is_empty) {
            return Some(("tokenizer.pad_token", "the token is empty".into()));
        }
        let bad = self
            .add_tokens
            .iter()
            .enumerate()
            .find(|(i, token)| token.is_empty() || self.add_tokens[..*i].contains(token));
        let what = |token: &str| {
            if token.is_empty() { "a token is empty".into() } else { format!("`{token}` is there twice") }
        };
        bad.map(|(_, token)| ("tokenizer.add_tokens", what(token)))
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
    /// What the moments are kept in.
    pub moments: MomentsIn,
    /// Moments lie in host memory and come to the GPU in parts when they are updated.
    pub offload: bool,
}

/// What AdamW's moments are kept in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MomentsIn {
    /// Float32 (float64 in float64 compute).
    #[default]
    #[serde(rename = "float32")]
    Float32,
    /// 8-bit codes, blocks of 256 with a scale each (Dettmers et al. 2022).
    #[serde(rename = "8bit")]
    EightBit,
}

impl Default for Optim {
    fn default() -> Self {
        Optim {
            lr: 3e-4,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
            moments: MomentsIn::Float32,
            offload: false,
        }
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

impl Schedule {
    /// What does not fit `train`, and why.
    pub fn conflict(&self, train: &Train) -> Option<Conflict> {
        let steps = train.steps.filter(|steps| self.warmup_steps > *steps as u64)?;
        let warmup = self.warmup_steps;
        let why = format!("{warmup} steps of warm-up are more than the {steps} of train.steps");
        Some(("schedule.warmup_steps", why))
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

impl Train {
    /// Sequences that one rank of `world_size` computes at once.
    pub fn micro_batch_size(&self, world_size: i64) -> i64 {
        self.micro_batch_size.unwrap_or(self.batch_size / world_size)
    }

    /// What does not fit on `world_size` ranks, and why.
    pub fn conflict(&self, world_size: i64) -> Option<Conflict> {
        match (self.steps, self.epochs) {
            (Some(_), Some(_)) => return Some(("train.epochs", "train.steps is given too; keep one".into())),
            (None, None) => return Some(("train.steps", "give train.steps or train.epochs".into())),
            _ => {}
        }
        let (batch, unit) = match self.micro_batch_size {
            Some(micro) => (self.batch_size, micro * world_size),
            None => (self.batch_size, world_size),
        };
        if batch % unit == 0 {
            return None;
        }
        let of = match self.micro_batch_size {
            Some(micro) => format!("train.micro_batch_size x ranks = {micro} x {world_size} = {unit}"),
            None => format!("the number of ranks, {world_size}"),
        };
        let (below, above) = (batch / unit * unit, (batch / unit + 1) * unit);
        let near = if below > 0 { format!("{below} or {above}") } else { above.to_string() };
        Some(("train.batch_size", format!("{batch} is no multiple of {of}; {near} would be")))
    }
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
    /// The checkpoint with the best validation stays besides the last `checkpoint.keep`, and is what the run exports.
    pub keep_best: bool,
    /// Validations in a row without a better one that end the run, which then keeps the best; 0: none do.
    pub patience: u64,
}

impl Default for Valid {
    fn default() -> Self {
        Valid { every: 100, batches: 20, keep_best: false, patience: 0 }
    }
}

impl Valid {
    /// Whether the best checkpoint is kept and exported: a run that waits for a better one ends with a worse.
    pub fn keeps_best(&self) -> bool {
        self.keep_best || self.patience > 0
    }

    /// What does not fit the validation data, and why.
    pub fn conflict(&self, data: &[Source]) -> Option<Conflict> {
        let asks = self.keep_best || self.patience > 0;
        let why = "keep_best and patience need validation data: give data.valid";
        (asks && data.is_empty()).then(|| ("valid", why.into()))
    }
}

fn batch_size() -> i64 {
    32
}

/// What to do with an example of more tokens than a row holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum TooLong {
    /// Cut its end off, and count it.
    #[default]
    Truncate,
    /// Leave it out, and count it.
    Drop,
}
