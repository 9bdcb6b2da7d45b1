//! Prompts as data: the section `data` of ppo, grpo and online-dpo.

use std::path::PathBuf;

use super::conflict::Conflicts;
use super::preferences::conflicts_of_split;
use super::rollout::Generation;
use super::section::section;
use super::sections::{DataSource, OnError};
use super::template_date::TemplateDate;

section! {
    /// Prompts: see the formats in docs/formats.md.
    pub struct PromptData {
        /// Files of prompts, at least one: `prompt`, `messages`, or any format of conversations, whose completion is ignored.
        train: Vec<DataSource>;
        /// Files to validate on; with none there is no validation.
        valid: Vec<DataSource> = Vec::new() => Output;
        /// Maximum tokens of a prompt with its response: prompts that leave no room for `generation.max_new_tokens` are dropped
        /// and counted.
        sequence_length: i64 = 512, COUNT => State;
        /// Examples with their answers, put before every prompt.
        few_shot: Option<FewShot> = None;
        /// Treatment of unusable records.
        on_error: OnError = OnError::Refuse => State;
        /// Relative sizes of the parts of the training files for the stages fine-tuning, preferences (reward model, DPO) and RL:
        /// this stage takes the third part. A record's part depends only on its number in its file. Empty: every stage takes all.
        split: Vec<f64> = Vec::new() => State;
        /// The date for chat templates that use one. Default: the day on which the run begins.
        template_date: TemplateDate = TemplateDate::default() => State;
    }
}

section! {
    /// The first records of a file, as turns of the conversation.
    pub struct FewShot {
        /// A file of conversations.
        path: PathBuf => Path;
        /// How many records.
        count: i64, COUNT => State;
    }
}

impl PromptData {
    /// Which part of `split` is this stage's.
    pub const PART: usize = 2;

    /// What does not fit.
    pub fn conflicts(&self, generation: &Generation, found: &mut Conflicts) {
        if self.train.is_empty() {
            found.add("data.train", "there are no prompts; name at least one path");
        }
        if generation.max_new_tokens.high as i64 >= self.sequence_length {
            let (new, all) = (generation.max_new_tokens.high, self.sequence_length);
            let why =
                format!("{all} tokens leave no room for a prompt beside {new} of generation.max_new_tokens");
            found.add("data.sequence_length", why);
        }
        conflicts_of_split(&self.split, Self::PART, found);
    }
}
