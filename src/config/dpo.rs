//! The configuration of `corral dpo`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::algorithm::{Algorithm, BuiltIn, built_in};
use super::common::{Common, configuration, conflict_of_inputs};
use super::conflict::Conflict;
use super::model::Model;
use super::numbers::{not_negative, positive};
use super::preferences::Data;
use super::sections::{Tokenizer, Valid};
use super::template_date::TemplateDate;
use super::trainable::{self, Freeze, Lora};

configuration! {
    /// Direct preference optimization; `train.batch_size` counts prompts.
    pub struct Dpo {
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
        pub dpo: Section,
        /// What the model is compared with. Default: the model as it is at the start.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub reference: Option<Reference>,
        #[serde(default)]
        pub valid: Valid,
    }
}

/// The loss of a pair of completions (see [`Loss`]), and which pairs there are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Section {
    pub loss: Loss,
    /// How strongly the reference holds.
    #[serde(deserialize_with = "positive")]
    pub beta: f64,
    /// The probability that a pair is the wrong way round (`sigmoid`, `robust`), or the other's share (`exo_pair`).
    #[serde(deserialize_with = "not_negative")]
    pub label_smoothing: f64,
    /// The weight of the cross-entropy of the best completions' tokens, besides.
    #[serde(deserialize_with = "not_negative")]
    pub sft_weight: f64,
    pub pairs: Pairs,
    /// How the reference's log-probabilities are had.
    pub reference: ReferenceFrom,
}

impl Default for Section {
    fn default() -> Self {
        Section {
            loss: Loss::Sigmoid,
            beta: 0.1,
            label_smoothing: 0.0,
            sft_weight: 0.0,
            pairs: Pairs::All,
            reference: ReferenceFrom::Cached,
        }
    }
}

/// The loss of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// DPO (Rafailov et al. 2023); with `label_smoothing` cDPO (Mitchell 2023).
    Sigmoid,
    /// DPO of means over tokens.
    SigmoidNorm,
    /// IPO (Azar et al. 2023), of means over tokens, as its authors have it.
    Ipo,
    /// IPO of sums over tokens.
    IpoSum,
    /// SLiC (Zhao et al. 2023).
    Hinge,
    /// Without bias where `label_smoothing` of the pairs are the wrong way round (Chowdhury et al. 2024).
    Robust,
    /// APO-zero (D'Oosterlinck et al. 2024).
    ApoZero,
    /// EXO (Ji et al. 2024).
    ExoPair,
    /// NCA (Chen et al. 2024).
    NcaPair,
    /// BCO (Jung et al. 2024), without its shift, as TRL has it.
    BcoPair,
    /// SPPO (Wu et al. 2024).
    SppoHard,
}

/// Which completions of a prompt are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pairs {
    /// Each with every worse one; a prompt's loss is the mean.
    All,
    /// The best with every worse one.
    Best,
}

/// How the reference's log-probabilities are had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReferenceFrom {
    /// Computed once before the training, and kept in `data.cache`.
    Cached,
    /// Computed in every step: by the model without its adapters, else by a frozen copy of it.
    Online,
}

/// A model that is only read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reference {
    pub path: PathBuf,
}

impl Section {
    /// What does not fit, and why.
    pub fn conflict(&self) -> Option<Conflict> {
        const KEY: &str = "dpo.label_smoothing";
        let smoothing = self.label_smoothing;
        match self.loss {
            Loss::Sigmoid | Loss::Robust if smoothing >= 0.5 => {
                Some((KEY, "below 0.5: at most half of the pairs may be the wrong way round".into()))
            }
            Loss::ExoPair if !(smoothing > 0.0 && smoothing < 0.5) => {
                Some((KEY, "exo_pair needs a number above 0 and below 0.5".into()))
            }
            Loss::Sigmoid | Loss::Robust | Loss::ExoPair => None,
            _ if smoothing > 0.0 => {
                Some((KEY, "only sigmoid, robust and exo_pair have it; leave it out".into()))
            }
            _ => None,
        }
    }
}

impl Algorithm for Dpo {
    const SUBCOMMAND: &'static str = "dpo";
    const DEFAULT: BuiltIn = built_in!("dpo");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflict(&self, world_size: i64) -> Option<Conflict> {
        if !matches!(self.model, Model::Path(_)) {
            return Some((
                "model",
                "there must be a model whose completions are known: give model.path".into(),
            ));
        }
        if self.data.packing && self.lora.as_ref().is_some_and(|l| l.dropout > 0.0) {
            let why = "in a packed row what dropout leaves out would depend on the micro-batch; set data.packing to \
                       false, or lora.dropout to 0";
            return Some(("lora.dropout", why.into()));
        }
        conflict_of_inputs(&self.model, self.tokenizer.as_ref(), &self.data.train)
            .or_else(|| self.data.conflict())
            .or_else(|| self.dpo.conflict())
            .or_else(|| self.common().conflict(world_size))
            .or_else(|| self.valid.conflict(&self.data.valid))
            .or_else(|| trainable::conflict(&self.freeze, self.lora.as_ref()))
    }
}
