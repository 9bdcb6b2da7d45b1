//! Preferences as data: the section `data` of reward models, DPO and KTO.

use std::path::PathBuf;

use super::common::conflicts_of_validation;
use super::conflict::Conflicts;
use super::section::section;
use super::sections::{DataSource, OnError, TooLong};
use super::template_date::TemplateDate;
use super::trainable::Lora;

section! {
    /// Prompts with ranked completions, or with completions labelled good or bad: see the formats in docs/formats.md.
    pub struct PreferenceData {
        /// Files to train on; at least one.
        train: Vec<DataSource>;
        /// Files to validate on; with none there is no validation.
        valid: Vec<DataSource> = Vec::new() => Output;
        /// Maximum tokens of a prompt with one completion.
        sequence_length: i64 = 512, COUNT => State;
        /// Packs all completions of a micro-batch into one row, without attention between them; else one per row, padded to the
        /// longest.
        packing: bool = true => State;
        /// Treatment of completions that are longer than `sequence_length` with their prompt; `truncate` cuts off the beginning
        /// of the prompt.
        too_long: TooLong = TooLong::Truncate => State;
        /// Treatment of unusable records.
        on_error: OnError = OnError::Refuse => State;
        /// Relative sizes of the parts of the training files for the stages fine-tuning, preferences (reward model, DPO) and RL:
        /// this stage takes the second part. A record's part depends only on its number in its file. Empty: every stage takes
        /// all.
        split: Vec<f64> = Vec::new() => State;
        /// The date for chat templates that use one. Default: the day on which the run begins.
        template_date: TemplateDate = TemplateDate::default() => State;
        /// Where tokenized data is cached. Default: `corral` in the user's cache folder.
        cache: Option<PathBuf> = None => Execution;
    }
}

impl PreferenceData {
    /// Which part of `split` is this stage's.
    pub const PART: usize = 1;

    /// What does not fit; that there are sources is checked with the model.
    pub fn conflicts(&self, lora: Option<&Lora>, found: &mut Conflicts) {
        conflicts_of_split(&self.split, Self::PART, found);
        conflicts_of_validation(&self.valid, found);
        if self.packing && lora.is_some_and(|l| l.dropout > 0.0) {
            let why = "with data.packing dropout masks would depend on the micro-batch size: set data.packing to false, or \
                       lora.dropout to 0";
            found.add("lora.dropout", why);
        }
    }
}

/// Parts of which `part` is this stage's.
pub fn conflicts_of_split(split: &[f64], part: usize, found: &mut Conflicts) {
    let size = |s: &f64| s.is_finite() && *s >= 0.0;
    let is_valid = split.iter().all(size) && split.get(part).is_some_and(|s| *s > 0.0);
    if !split.is_empty() && !is_valid {
        let which = ["first", "second", "third"][part];
        found
            .add("data.split", format!("sizes must not be negative, and this stage's, the {which}, above 0"));
    }
}
