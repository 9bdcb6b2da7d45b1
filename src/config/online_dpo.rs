//! The configuration of `corral online-dpo`.

use serde::{Deserialize, Serialize};

use super::algorithm::{Algorithm, BuiltIn, built_in};
use super::common::Common;
use super::conflict::Conflict;
use super::dpo::{self, Loss, Pairs, ReferenceFrom};
use super::grpo::{Truncated, samples};
use super::numbers::{count, not_negative, positive, ratio};
use super::policy::policy_configuration;
use super::rewards::Reward;
use super::sft::Samples;
use super::template_date::TemplateDate;

policy_configuration! {
    /// DPO on the model's own responses; `train.batch_size` counts prompts an iteration, `train.steps` iterations.
    pub struct OnlineDpo {
        #[serde(default)]
        pub dpo: Section,
        #[serde(default = "samples")]
        pub samples: Samples,
    }
}

/// The section `dpo`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Section {
    pub loss: Loss,
    /// How strongly the reference holds.
    #[serde(deserialize_with = "positive")]
    pub beta: f64,
    /// As in `corral dpo`.
    #[serde(deserialize_with = "not_negative")]
    pub label_smoothing: f64,
    /// Responses to each prompt, of which the best and the worst are a pair.
    #[serde(deserialize_with = "count")]
    pub group_size: i64,
    /// What becomes of responses that did not end.
    pub truncated: Truncated,
    /// What `penalize` takes from their reward.
    #[serde(deserialize_with = "not_negative")]
    pub truncated_penalty: f64,
    /// A reference that follows the policy (Gorbatovski et al. 2024); none: it stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moving_reference: Option<MovingReference>,
}

/// How the reference follows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MovingReference {
    /// Iterations between its moves.
    #[serde(deserialize_with = "count")]
    pub every: i64,
    /// The share of the way to the policy; 1: it becomes the policy.
    #[serde(deserialize_with = "ratio")]
    pub rate: f64,
}

impl Default for Section {
    fn default() -> Self {
        Section {
            loss: Loss::Sigmoid,
            beta: 0.1,
            label_smoothing: 0.0,
            group_size: 2,
            truncated: Truncated::Keep,
            truncated_penalty: 1.0,
            moving_reference: None,
        }
    }
}

impl Section {
    /// The loss of a pair.
    pub fn of_pairs(&self) -> dpo::Section {
        dpo::Section {
            loss: self.loss,
            beta: self.beta,
            label_smoothing: self.label_smoothing,
            sft_weight: 0.0,
            pairs: Pairs::All,
            reference: ReferenceFrom::Online,
        }
    }
}

impl OnlineDpo {
    /// What responses are rewarded for.
    pub fn rewards(&self) -> Vec<Reward> {
        self.rewards.clone()
    }
}

impl Algorithm for OnlineDpo {
    const SUBCOMMAND: &'static str = "online-dpo";
    const DEFAULT: BuiltIn = built_in!("online_dpo");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflict(&self, world_size: i64) -> Option<Conflict> {
        if self.dpo.group_size < 2 {
            return Some(("dpo.group_size", "a pair takes 2 responses at least".into()));
        }
        if self.dpo.moving_reference.is_some() && self.reference.is_some() {
            let why =
                "the moving reference begins as the actor; leave out reference, or dpo.moving_reference";
            return Some(("reference", why.into()));
        }
        self.dpo
            .of_pairs()
            .conflict()
            .or_else(|| self.sections_of_responses().conflict(world_size))
            .or_else(|| self.valid.conflict(&self.data.valid))
            .or_else(|| self.samples.conflict())
    }
}
