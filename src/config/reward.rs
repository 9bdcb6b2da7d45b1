//! The configuration of `corral reward`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::algorithm::{Algorithm, BuiltIn, built_in};
use super::common::{Common, configuration, conflict_of_inputs};
use super::conflict::Conflict;
use super::model::Model;
use super::numbers::{not_negative, some_not_negative};
use super::preferences::Data;
use super::sections::{Tokenizer, Valid};
use super::template_date::TemplateDate;
use super::trainable::{self, Freeze, Lora};

configuration! {
    /// `train.batch_size` and `train.micro_batch_size` count prompts, each with all of its completions.
    pub struct Reward {
        pub model: Model,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub tokenizer: Option<Tokenizer>,
        pub data: Data,
        #[serde(default)]
        pub reward: Settings,
        #[serde(default)]
        pub freeze: Freeze,
        /// Adapters; without them the model itself is trained. The head is trained in either case.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub lora: Option<Lora>,
        #[serde(default)]
        pub valid: Valid,
    }
}

/// The section `reward`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    pub loss: Loss,
    /// Default: that of the model, if it is a reward model; else `last`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<Score>,
    /// How much higher the better score must be (loss `pairs`).
    #[serde(deserialize_with = "not_negative")]
    pub margin: f64,
    /// Weight of the squared sum of the scores of each compared pair, which keeps scores around 0.
    #[serde(deserialize_with = "not_negative")]
    pub center: f64,
    /// Standard deviation of a new head's weights. Default: 1 / sqrt(hidden_size + 1).
    #[serde(deserialize_with = "some_not_negative", skip_serializing_if = "Option::is_none")]
    pub init_std: Option<f64>,
    pub normalize: Normalize,
}

/// What is learned from ranked completions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// Of every two that differ, the better has the higher score.
    #[default]
    Pairs,
    /// The best has the highest score.
    Best,
    /// The scores are in the order of the ranking.
    Order,
}

/// What of the tokens' values is the score of a completion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Score {
    /// The value of the last token: what transformers reads.
    #[default]
    Last,
    /// The sum over the completion's tokens.
    Sum,
    /// The mean over the completion's tokens.
    Mean,
}

/// On what the trained model's scores are measured, to be normalised to mean 0 and standard deviation 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Normalize {
    /// Completions that are scored, the first ones; 0: scores stay as they are.
    pub samples: u64,
    /// Files of conversations or of ranked completions. Default: the validation data, else the training data.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<PathBuf>,
    /// Of ranked completions.
    pub of: Which,
}

impl Default for Normalize {
    fn default() -> Self {
        Normalize { samples: 1000, data: Vec::new(), of: Which::All }
    }
}

/// Which of ranked completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Which {
    All,
    /// Those of the best rank.
    Best,
}

impl Algorithm for Reward {
    const SUBCOMMAND: &'static str = "reward";
    const DEFAULT: BuiltIn = built_in!("reward");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflict(&self, world_size: i64) -> Option<Conflict> {
        let reward = &self.reward;
        if reward.margin > 0.0 && reward.loss != Loss::Pairs {
            return Some(("reward.margin", "only the loss `pairs` has a margin".into()));
        }
        if reward.normalize.samples == 1 {
            return Some(("reward.normalize.samples", "one score has no standard deviation".into()));
        }
        if self.data.packing && self.lora.as_ref().is_some_and(|l| l.dropout > 0.0) {
            let why = "dropout falls on rows, and which completions share one depends on the micro-batch: set it to false";
            return Some(("data.packing", why.into()));
        }
        conflict_of_inputs(&self.model, self.tokenizer.as_ref(), &self.data.train)
            .or_else(|| self.data.conflict())
            .or_else(|| self.valid.conflict(&self.data.valid))
            .or_else(|| trainable::conflict(&self.freeze, self.lora.as_ref()))
            .or_else(|| self.common().conflict(world_size))
    }
}
