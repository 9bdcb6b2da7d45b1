//! Choices that the policy-gradient algorithms share.

use std::path::{Path, PathBuf};

use super::common::Common;
use super::conflict::Conflicts;
use super::models::{FrozenModel, Trained, conflicts_of_device, conflicts_of_dtype};
use super::prompts::PromptData;
use super::rewards::{RewardKind, RewardTerm};
use super::rollout::Generation;
use super::section::choice;
use super::sections::{TokenizerSection, TrainSection};
use super::trainable::{self, Lora};

choice! {
    /// How the losses of tokens become one number.
    pub enum Aggregation {
        /// The mean over all tokens.
        TokenMean = "token-mean",
        /// The mean over the tokens of each response, then over responses.
        SeqMeanTokenMean = "seq-mean-token-mean",
        /// The sum over the tokens of each response, then the mean over responses.
        SeqMeanTokenSum = "seq-mean-token-sum",
        /// The same divided by the maximum response length: no length is favoured.
        SeqMeanTokenSumNorm = "seq-mean-token-sum-norm",
    }
}

choice! {
    /// An estimator of KL(policy, reference) from a token of the policy, with `d = log policy - log reference`.
    pub enum KlEstimator {
        /// `d`: unbiased. As a loss its gradient is 0 in expectation.
        K1 = "k1",
        /// `d^2 / 2`: as a loss its gradient is that of the KL.
        K2 = "k2",
        /// `exp(-d) - 1 + d`: unbiased and never negative.
        K3 = "k3",
        /// The value of `k3` with the gradient of `k2`.
        K3Plus = "k3+",
    }
}

impl KlEstimator {
    /// Why `k1` is refused as a part of a loss.
    pub const NO_LOSS: &str = "in the loss the gradient of k1 is 0 in expectation, so that nothing would keep the policy near \
                               the reference: use k3 (unbiased value), k2 or k3+ (the gradient of the KL)";
}

choice! {
    /// The loss of a token of GRPO's responses, and its aggregation.
    pub enum LossType {
        /// The mean over the tokens of each response, then over responses (Shao et al. 2024).
        Grpo = "grpo",
        /// The mean over the update's tokens.
        Bnpo = "bnpo",
        /// The mean over the rollout's tokens (Yu et al. 2025).
        Dapo = "dapo",
        /// The sum over tokens, divided by the number of responses and the maximum response length (Liu et al. 2025).
        DrGrpo = "dr_grpo",
        /// Ratios as constant weights, clipped above at `epsilon_high` (MiniMax 2025).
        Cispo = "cispo",
        /// A sigmoid instead of clipping.
        Sapo = "sapo",
        /// The sum over the tokens of each response, then the mean over responses.
        Luspo = "luspo",
    }
}

choice! {
    /// Whether ratios are per token or per response (GSPO, Zheng et al. 2025).
    pub enum RatioLevel {
        /// One ratio per token.
        Token = "token",
        /// The exponential of the mean log-ratio of a response's tokens.
        Sequence = "sequence",
    }
}

/// Why the dropout of an actor's or a critic's adapters is refused; `what` it would change.
pub(super) fn no_dropout(lora: Option<&Lora>, what: &str) -> Option<String> {
    let dropout = lora.map(|lora| lora.dropout).filter(|dropout| *dropout > 0.0)?;
    Some(format!("must be 0, not {dropout}: dropout would change {what}"))
}

/// Defines the configuration of an algorithm that learns from its own responses: a struct with the given keys, those that all
/// such algorithms have and those of `configuration!`, and `fn sections_of_responses(&self)`, which takes the rewards of a
/// method `rewards`.
macro_rules! policy_configuration {
    ($(#[doc = $about:literal])* pub struct $name:ident { $($keys:tt)* }) => {
        $crate::config::common::configuration! {
            $(#[doc = $about])*
            pub struct $name {
                /// The policy.
                actor: $crate::config::models::Trained;
                /// The reference policy. Default: the actor's initial weights; with adapters, the actor without them.
                reference: Option<$crate::config::models::FrozenModel> = None;
                /// The reward model, for rewards of the kind `model`.
                reward_model: Option<$crate::config::models::FrozenModel> = None;
                /// The tokenizer of the actor, and of models without one.
                tokenizer: Option<$crate::config::sections::TokenizerSection> = None;
                /// Prompts.
                data: $crate::config::prompts::PromptData;
                /// The rewards of a response; their weighted sum is used.
                rewards: Vec<$crate::config::rewards::RewardTerm> = Vec::new();
                /// How responses are sampled.
                generation: $crate::config::rollout::Generation = Default::default();
                $($keys)*
                /// Validation on `data.valid`.
                valid: $crate::config::sections::Valid = Default::default();
            }
        }

        impl $name {
            /// The sections that all have that learn from their own responses.
            pub fn sections_of_responses(&self) -> $crate::config::policy::OwnResponses<'_> {
                $crate::config::policy::OwnResponses {
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
    pub reference: Option<&'a FrozenModel>,
    pub reward_model: Option<&'a FrozenModel>,
    pub tokenizer: Option<&'a TokenizerSection>,
    pub data: &'a PromptData,
    pub rewards: Vec<RewardTerm>,
    pub generation: &'a Generation,
}

impl<'a> OwnResponses<'a> {
    /// What does not fit.
    pub fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        self.conflicts_of_rewards(found);
        self.conflicts_but_rewards(world_size, found);
    }

    /// What does not fit among the rewards and the reward model.
    pub fn conflicts_of_rewards(&self, found: &mut Conflicts) {
        if self.rewards.is_empty() {
            found.add("rewards", "there is nothing to learn from: give rewards such as [{kind: gsm8k}]");
            return;
        }
        let uses_model = self.rewards.iter().any(|r| r.kind == RewardKind::Model);
        if self.reward_model.is_none() && uses_model {
            found.add("rewards", "the kind model needs reward_model: {path: DIR}");
        }
        if self.reward_model.is_some() && !uses_model {
            let why = "no reward of the kind model uses it; add {kind: model} to rewards, or leave it out";
            found.add("reward_model", why);
        }
        for (i, reward) in self.rewards.iter().enumerate() {
            found.within(&format!("rewards.{i}"), |found| reward.conflicts(found));
        }
    }

    /// What does not fit in the other sections.
    pub fn conflicts_but_rewards(&self, world_size: i64, found: &mut Conflicts) {
        let devices = [
            ("actor", self.actor.device.as_ref()),
            ("reference", self.reference.and_then(|m| m.device.as_ref())),
            ("reward_model", self.reward_model.and_then(|m| m.device.as_ref())),
        ];
        for (model, device) in devices {
            found.within(model, |found| conflicts_of_device(device, world_size, found));
        }
        let dtypes = [
            ("actor", self.actor.dtype),
            ("reference", self.reference.and_then(|m| m.dtype)),
            ("reward_model", self.reward_model.and_then(|m| m.dtype)),
        ];
        for (model, dtype) in dtypes {
            found.within(model, |found| conflicts_of_dtype(dtype, self.common.precision.compute, found));
        }
        found.within("actor", |found| {
            trainable::conflicts(
                &self.actor.freeze,
                self.actor.lora.as_ref(),
                self.common.precision.compute,
                found,
            )
        });
        let what = "the log-probabilities that ratios are computed from";
        if let Some(why) = no_dropout(self.actor.lora.as_ref(), what) {
            found.add("actor.lora.dropout", why);
        }
        // Micro-batches are of responses; prompts only need to be divided among the ranks.
        let train = TrainSection { micro_batch_size: None, ..self.common.train.clone() };
        self.data.conflicts(self.generation, found);
        self.generation.conflicts(found);
        Common { train: &train, ..self.common }.conflicts(world_size, found);
        if let Some(tokenizer) = self.tokenizer {
            tokenizer.conflicts(found);
        }
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
