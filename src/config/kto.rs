//! The configuration of `corral kto`.

use serde::{Deserialize, Serialize};

use super::algorithm::{Algorithm, BuiltIn, built_in};
use super::common::{Common, configuration, conflict_of_inputs};
use super::conflict::Conflict;
use super::dpo::Reference;
use super::model::Model;
use super::numbers::{not_negative, positive};
use super::preferences::Data;
use super::sections::{Tokenizer, Valid};
use super::template_date::TemplateDate;
use super::trainable::{self, Freeze, Lora};

configuration! {
    /// Kahneman-Tversky optimization; `train.batch_size` counts records.
    pub struct Kto {
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
        pub kto: Section,
        /// What the model is compared with. Default: the model as it is at the start.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub reference: Option<Reference>,
        #[serde(default)]
        pub valid: Valid,
    }
}

/// The loss of a completion that was found good or bad.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Section {
    pub loss: Loss,
    /// How strongly the reference holds.
    #[serde(deserialize_with = "positive")]
    pub beta: f64,
    /// The weight of good completions; where there are d good and u bad ones, weight times number should be alike.
    #[serde(deserialize_with = "not_negative")]
    pub desirable_weight: f64,
    /// The weight of bad completions.
    #[serde(deserialize_with = "not_negative")]
    pub undesirable_weight: f64,
}

impl Default for Section {
    fn default() -> Self {
        Section { loss: Loss::Kto, beta: 0.1, desirable_weight: 1.0, undesirable_weight: 1.0 }
    }
}

/// The loss of a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// KTO (Ethayarajh et al. 2024): rewards are compared with the KL to the reference.
    Kto,
    /// APO-zero of unpaired completions (D'Oosterlinck et al. 2024): rewards are compared with 0.
    ApoZeroUnpaired,
}

impl Algorithm for Kto {
    const SUBCOMMAND: &'static str = "kto";
    const DEFAULT: BuiltIn = built_in!("kto");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflict(&self, world_size: i64) -> Option<Conflict> {
        if !matches!(self.model, Model::Path(_)) {
            let why = "there must be a model whose completions are known: set model.path";
            return Some(("model", why.into()));
        }
        if self.data.packing && self.lora.as_ref().is_some_and(|l| l.dropout > 0.0) {
            let why = "with data.packing dropout masks would depend on the micro-batch size: set data.packing to false, or \
                       lora.dropout to 0";
            return Some(("lora.dropout", why.into()));
        }
        if self.kto.loss == Loss::Kto && self.train.batch_size < 2 {
            let why = "must be at least 2: the KL is estimated on prompts with the completion of another record of the step";
            return Some(("train.batch_size", why.into()));
        }
        if self.kto.desirable_weight == 0.0 && self.kto.undesirable_weight == 0.0 {
            let why = "one of kto.desirable_weight and kto.undesirable_weight must be above 0";
            return Some(("kto.desirable_weight", why.into()));
        }
        conflict_of_inputs(&self.model, self.tokenizer.as_ref(), &self.data.train)
            .or_else(|| self.data.conflict())
            .or_else(|| self.common().conflict(world_size))
            .or_else(|| self.valid.conflict(&self.data.valid))
            .or_else(|| trainable::conflict(&self.freeze, self.lora.as_ref()))
    }
}
