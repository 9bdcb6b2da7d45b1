//! Prompts as data: the section `data` of ppo, grpo and online-dpo.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::common::sequence_length;
use super::conflict::Conflict;
use super::numbers::count;
use super::rollout::Generation;
use super::sections::{OnError, Source};
use super::template_date::TemplateDate;

/// Prompts: see the formats in docs/formats.md.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Files to take prompts from; at least one.
    pub train: Vec<Source>,
    /// Files to validate on; with none there is no validation.
    #[serde(default)]
    pub valid: Vec<Source>,
    /// Most tokens of a prompt with its response: prompts that leave no room for `generation.max_new_tokens` are left out
    /// and counted.
    #[serde(default = "sequence_length", deserialize_with = "count")]
    pub sequence_length: i64,
    /// Examples with their answers that stand before every prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub few_shot: Option<FewShot>,
    /// What to do with records that cannot be used.
    #[serde(default)]
    pub on_error: OnError,
    /// Relative sizes of the parts of the training files for the stages fine-tuning, preferences (reward model, DPO) and
    /// RL: this stage takes the third part. Empty: every stage takes all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub split: Vec<f64>,
    /// The date that the chat template is told, where it asks for one (`YYYY-MM-DD`). Default: today's when the run begins.
    #[serde(default, skip_serializing_if = "TemplateDate::is_default")]
    pub template_date: TemplateDate,
}

/// The first records of a file, as turns of the conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FewShot {
    pub path: PathBuf,
    #[serde(deserialize_with = "count")]
    pub count: i64,
}

impl Data {
    /// Which part of `split` is this stage's.
    pub const PART: usize = 2;

    /// What does not fit, and why.
    pub fn conflict(&self, generation: &Generation) -> Option<Conflict> {
        if self.train.is_empty() {
            return Some(("data.train", "there are no prompts; name at least one path".into()));
        }
        if generation.max_new_tokens.high as i64 >= self.sequence_length {
            let (new, all) = (generation.max_new_tokens.high, self.sequence_length);
            return Some((
                "data.sequence_length",
                format!("{all} tokens leave no room for a prompt beside {new} of generation.max_new_tokens"),
            ));
        }
        let size = |s: &f64| s.is_finite() && *s >= 0.0;
        let fits = self.split.iter().all(size) && self.split.get(Self::PART).is_some_and(|s| *s > 0.0);
        (!self.split.is_empty() && !fits).then(|| {
            ("data.split", "sizes must not be negative, and this stage's, the third, above 0".into())
        })
    }
}
