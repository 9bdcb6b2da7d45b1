//! Choices that the policy-gradient algorithms share.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::common::Common;
use super::conflict::Conflict;
use super::models::{Frozen, Trained};
use super::prompts::Data;
use super::rewards::{Reward, RewardKind};
use super::rollout::Generation;
use super::sections::{Tokenizer, Train};
use super::trainable;

/// How the losses of tokens become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// The mean over all tokens.
    #[default]
    TokenMean,
    /// The mean over responses of each one's mean over its tokens.
    SeqMeanTokenMean,
    /// The mean over responses of each one's sum.
    SeqMeanTokenSum,
    /// The same divided by the longest response that may be: no length is favoured.
    SeqMeanTokenSumNorm,
}

/// An estimator of KL(policy, reference) from a token of the policy, with `d = log policy - log reference`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum KlEstimator {
    /// `d`: unbiased. As a loss its gradient is 0 in expectation.
    #[default]
    K1,
    /// `d^2 / 2`: as a loss its gradient is that of the KL.
    K2,
    /// `exp(-d) - 1 + d`: unbiased and never negative.
    K3,
    /// The value of `k3` with the gradient of `k2`.
    #[serde(rename = "k3+")]
    K3Plus,
}

impl KlEstimator {
    /// Why `k1` is refused as a part of a loss.
    pub const NO_LOSS: &str = "in the loss the gradient of k1 is 0 in expectation, so that nothing would hold the policy near \
                               the reference: take k3 (unbiased value), k2 or k3+ (the gradient of the KL)";
}

/// How the losses of the tokens of GRPO's responses are made, and become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// The mean over answers of each one's mean over its tokens (Shao et al. 2024).
    #[default]
    Grpo,
    /// The mean over the update's tokens.
    Bnpo,
    /// The mean over the rollout's tokens (Yu et al. 2025).
    Dapo,
    /// The sum over tokens, divided by answers and longest answer (Liu et al. 2025).
    DrGrpo,
    /// Ratios as constant weights, cut off above at `epsilon_high` (MiniMax 2025).
    Cispo,
    /// A sigmoid in the place of the clipping.
    Sapo,
    /// The mean over answers of each one's sum.
    Luspo,
}

/// Whether ratios are taken of tokens or of whole answers (GSPO, Zheng et al. 2025).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    #[default]
    Token,
    /// The exponential of the mean log-ratio of an answer's tokens.
    Sequence,
}

/// Why adapters have no dropout here.
pub(super) const NO_DROPOUT: &str = "0 is all that there is: log-probabilities of responses are compared with those of the \
                                     model that wrote them, and dropout would change them";

/// Defines the configuration of an algorithm that learns from its own responses: a struct with the given keys, those that all
/// such algorithms have and those of `configuration!`, and `fn sections_of_responses(&self)`, which takes the rewards of a
/// method `rewards`.
macro_rules! policy_configuration {
    ($(#[$doc:meta])* pub struct $name:ident {
        $($(#[$about:meta])* pub $key:ident: $type:ty,)*
    }) => {
        crate::config::common::configuration! {
            $(#[$doc])*
            pub struct $name {
                /// The policy.
                pub actor: crate::config::models::Trained,
                /// What the policy is compared with. Default: the actor as it was, with adapters: the actor without them.
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub reference: Option<crate::config::models::Frozen>,
                /// What scores responses, where a reward is of the kind `model`.
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub reward_model: Option<crate::config::models::Frozen>,
                /// Of the actor, and of what has none.
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub tokenizer: Option<crate::config::sections::Tokenizer>,
                pub data: crate::config::prompts::Data,
                #[serde(default, skip_serializing_if = "Vec::is_empty")]
                pub rewards: Vec<crate::config::rewards::Reward>,
                #[serde(default)]
                pub generation: crate::config::rollout::Generation,
                $($(#[$about])* pub $key: $type,)*
                #[serde(default)]
                pub valid: crate::config::sections::Valid,
            }
        }

        impl $name {
            /// The sections that all have that learn from their own responses.
            pub fn sections_of_responses(&self) -> crate::config::policy::OwnResponses<'_> {
                crate::config::policy::OwnResponses {
                    common: self.sections(),
                    actor: &self.actor,
                    reference: self.reference.as_ref(),
                    reward_model: self.reward_model.as_ref(),
                    tokenizer: self.tokenizer.as_ref(),
                    data: &self.data,
                    rewards: self.rewards(),
                    generation: &self.generation,
                }
            }
        }
    };
}
pub(super) use policy_configuration;

/// The sections of an algorithm that learns from its own responses, without a critic; `train.batch_size` counts prompts.
#[derive(Debug, Clone)]
pub struct OwnResponses<'a> {
    pub common: Common<'a>,
    pub actor: &'a Trained,
    pub reference: Option<&'a Frozen>,
    pub reward_model: Option<&'a Frozen>,
    pub tokenizer: Option<&'a Tokenizer>,
    pub data: &'a Data,
    pub rewards: Vec<Reward>,
    pub generation: &'a Generation,
}

impl<'a> OwnResponses<'a> {
    /// What does not fit, and why.
    pub fn conflict(&self, world_size: i64) -> Option<Conflict> {
        if self.rewards.is_empty() {
            let why = "there is nothing to learn from: give rewards such as [{kind: gsm8k}]";
            return Some(("rewards", why.into()));
        }
        let uses_model = self.rewards.iter().any(|r| r.kind == RewardKind::Model);
        match (self.reward_model, uses_model) {
            (None, true) => {
                return Some(("rewards", "the kind model needs reward_model: {path: DIR}".into()));
            }
            (Some(_), false) => {
                let why =
                    "no reward of the kind model asks it; add {kind: model} to rewards, or leave it out";
                return Some(("reward_model", why.into()));
            }
            _ => {}
        }
        if let Some(why) = self.rewards.iter().find_map(Reward::conflict) {
            return Some(("rewards", why));
        }
        let places = [
            ("actor.device", self.actor.device.as_ref()),
            ("reference.device", self.reference.and_then(|m| m.device.as_ref())),
            ("reward_model.device", self.reward_model.and_then(|m| m.device.as_ref())),
        ];
        let numbered = |d: &Option<&String>| world_size > 1 && d.is_some_and(|d| d.starts_with("cuda:"));
        if let Some((key, _)) = places.iter().find(|(_, device)| numbered(device)) {
            let why = "cuda:N is for a world of one rank; with several, cuda is each rank's own";
            return Some((*key, why.into()));
        }
        if let Some((key, why)) = trainable::conflict(&self.actor.freeze, self.actor.lora.as_ref()) {
            return Some(("actor", format!("{key}: {why}")));
        }
        if self.actor.drops_out() {
            return Some(("actor.lora.dropout", NO_DROPOUT.into()));
        }
        // Micro-batches are of responses; prompts only need to be divided among the ranks.
        let train = Train { micro_batch_size: None, ..self.common.train.clone() };
        self.data
            .conflict(self.generation)
            .or_else(|| self.generation.conflict())
            .or_else(|| Common { train: &train, ..self.common }.conflict(world_size))
            .or_else(|| self.tokenizer?.conflict())
    }

    /// The paths that are read.
    pub fn paths(&self) -> Vec<&'a Path> {
        let models = [
            Some(&self.actor.path),
            self.reference.map(|m| &m.path),
            self.reward_model.map(|m| &m.path),
            self.tokenizer.and_then(|t| t.path.as_ref()),
            self.data.few_shot.as_ref().map(|f| &f.path),
        ];
        let sources = self.data.train.iter().chain(&self.data.valid).map(|s| &s.path);
        sources.chain(models.into_iter().flatten()).map(PathBuf::as_path).collect()
    }
}
