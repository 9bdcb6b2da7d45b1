//! The configuration of `corral sft`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::algorithm::{Algorithm, BuiltIn, built_in};
use super::common::{Common, configuration, conflict_of_inputs, sequence_length, yes};
use super::conflict::Conflict;
use super::model::Model;
use super::numbers::{count, not_negative, positive};
use super::preferences::split_conflict;
use super::sections::{OnError, Source, Tokenizer, TooLong, Valid};
use super::template_date::TemplateDate;
use super::trainable::{self, Freeze, Lora};

configuration! {
    pub struct Sft {
        pub model: Model,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub tokenizer: Option<Tokenizer>,
        pub data: Data,
        #[serde(default)]
        pub freeze: Freeze,
        /// Adapters; without them the model itself is trained.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub lora: Option<Lora>,
        #[serde(default)]
        pub valid: Valid,
        #[serde(default)]
        pub samples: Samples,
        #[serde(default)]
        pub generation: Generation,
    }
}

/// Conversations to train on: see the formats in docs/formats.md.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Files to train on; at least one.
    pub train: Vec<Source>,
    /// Files to validate on; with none there is no validation.
    #[serde(default)]
    pub valid: Vec<Source>,
    /// Most tokens of a row, T.
    #[serde(default = "sequence_length", deserialize_with = "count")]
    pub sequence_length: i64,
    /// Several examples in a row, which do not see each other; else one example a row, padded to the longest.
    #[serde(default = "yes")]
    pub packing: bool,
    /// Whether the loss also counts what is not the assistant's.
    #[serde(default)]
    pub train_on_prompt: bool,
    /// What to do with examples of more than `sequence_length` tokens.
    #[serde(default)]
    pub too_long: TooLong,
    /// What to do with records that cannot be used.
    #[serde(default)]
    pub on_error: OnError,
    /// Relative sizes of the parts of the training files for the stages fine-tuning, reward model and RL: this stage
    /// takes the first part. Empty: every stage takes all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub split: Vec<f64>,
    /// The date that the chat template is told, where it asks for one (`YYYY-MM-DD`). Default: today's when the run begins.
    #[serde(default, skip_serializing_if = "TemplateDate::is_default")]
    pub template_date: TemplateDate,
    /// Where tokenized data is kept. Default: `corral` in the user's cache folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
}

/// Answers to the first prompts of the validation data, into samples.jsonl and TensorBoard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Samples {
    /// Steps between samples; 0: there are none.
    pub every: i64,
    /// How many prompts.
    #[serde(deserialize_with = "count")]
    pub count: i64,
}

impl Samples {
    /// What does not fit, and why.
    pub fn conflict(&self) -> Option<Conflict> {
        let why = "expected a number of steps, or 0 for no samples";
        (self.every < 0).then(|| ("samples.every", why.into()))
    }
}

impl Default for Samples {
    fn default() -> Self {
        Samples { every: 0, count: 4 }
    }
}

/// How texts are generated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Generation {
    #[serde(deserialize_with = "count")]
    pub max_new_tokens: i64,
    /// 0: always the most probable token.
    #[serde(deserialize_with = "not_negative")]
    pub temperature: f64,
    /// The most probable tokens that are drawn from; 0: all.
    pub top_k: usize,
    /// The least share of the probability that the most probable tokens drawn from have.
    #[serde(deserialize_with = "positive")]
    pub top_p: f64,
}

impl Default for Generation {
    fn default() -> Self {
        Generation { max_new_tokens: 256, temperature: 1.0, top_k: 0, top_p: 1.0 }
    }
}

impl Algorithm for Sft {
    const SUBCOMMAND: &'static str = "sft";
    const DEFAULT: BuiltIn = built_in!("sft");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflict(&self, world_size: i64) -> Option<Conflict> {
        if let Some(conflict) = split_conflict(&self.data.split, 0) {
            return Some(conflict);
        }
        if self.data.valid.is_empty() && self.samples.every > 0 {
            return Some(("samples", "the prompts are the validation data's: give data.valid".into()));
        }
        if self.generation.top_p > 1.0 {
            return Some(("generation.top_p", "at most 1".into()));
        }
        if let Some(conflict) = self.samples.conflict() {
            return Some(conflict);
        }
        conflict_of_inputs(&self.model, self.tokenizer.as_ref(), &self.data.train)
            .or_else(|| self.common().conflict(world_size))
            .or_else(|| self.valid.conflict(&self.data.valid))
            .or_else(|| trainable::conflict(&self.freeze, self.lora.as_ref()))
    }
}
