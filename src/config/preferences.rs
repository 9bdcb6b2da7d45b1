//! Preferences as data: the section `data` of reward models and DPO.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::common::{sequence_length, yes};
use super::conflict::Conflict;
use super::numbers::count;
use super::sections::TooLong;
use super::sections::{OnError, Source};
use super::template_date::TemplateDate;

/// Prompts with ranked completions: see the formats in docs/formats.md.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Files to train on; at least one.
    pub train: Vec<Source>,
    /// Files to validate on; with none there is no validation.
    #[serde(default)]
    pub valid: Vec<Source>,
    /// Most tokens of a prompt with one completion.
    #[serde(default = "sequence_length", deserialize_with = "count")]
    pub sequence_length: i64,
    /// All completions of a micro-batch in one row, which do not see each other; else one a row, padded to the longest.
    #[serde(default = "yes")]
    pub packing: bool,
    /// What to do with completions that with their prompt have more than `sequence_length` tokens; `truncate` cuts the
    /// beginning of the prompt off.
    #[serde(default)]
    pub too_long: TooLong,
    /// What to do with records that cannot be used.
    #[serde(default)]
    pub on_error: OnError,
    /// Relative sizes of the parts of the training files for the stages fine-tuning, preferences (reward model, DPO) and
    /// RL: this stage takes the second part. Empty: every stage takes all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub split: Vec<f64>,
    /// The date that the chat template is told, where it asks for one (`YYYY-MM-DD`). Default: today's when the run begins.
    #[serde(default, skip_serializing_if = "TemplateDate::is_default")]
    pub template_date: TemplateDate,
    /// Where tokenized data is kept. Default: `corral` in the user's cache folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
}

impl Data {
    /// Which part of `split` is this stage's.
    pub const PART: usize = 1;

    /// What does not fit, and why; that there are sources is checked with the model.
    pub fn conflict(&self) -> Option<Conflict> {
        split_conflict(&self.split, Self::PART)
    }
}

/// Parts of which `part` is this stage's.
pub fn split_conflict(split: &[f64], part: usize) -> Option<Conflict> {
    let size = |s: &f64| s.is_finite() && *s >= 0.0;
    if split.is_empty() || (split.iter().all(size) && split.get(part).is_some_and(|s| *s > 0.0)) {
        return None;
    }
    let which = ["first", "second", "third"][part];
    Some(("data.split", format!("sizes must not be negative, and this stage's, the {which}, above 0")))
}
