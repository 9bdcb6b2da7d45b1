//! The configuration of `corral ppo`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::algorithm::{Algorithm, BuiltIn, built_in};
use super::common::Common;
use super::conflict::Conflict;
use super::models::{Critic, Trained};
use super::numbers::{count, not_negative, positive, ratio, some_count, some_positive, some_ratio};
use super::policy::{Aggregation, KlEstimator, policy_configuration};
use super::rewards::{Reward, RewardKind};
use super::sections::Source;
use super::template_date::TemplateDate;
use super::trainable;

policy_configuration! {
    pub struct Ppo {
        /// What predicts returns. Default: the reward model's weights, without one the actor's with a new head.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub critic: Option<Critic>,
        #[serde(default)]
        pub ppo: Section,
        #[serde(default)]
        pub samples: Samples,
    }
}

/// The section `ppo`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Section {
    /// Passes over an iteration's responses, each in its own order.
    #[serde(deserialize_with = "count")]
    pub epochs: i64,
    /// Responses of one update, over all ranks.
    #[serde(deserialize_with = "count")]
    pub minibatch_size: i64,
    /// How far a ratio may go from 1.
    #[serde(deserialize_with = "positive")]
    pub clip: f64,
    /// How far upwards, where that differs.
    #[serde(deserialize_with = "some_positive", skip_serializing_if = "Option::is_none")]
    pub clip_high: Option<f64>,
    /// The largest loss of a negative advantage, in multiples of it; above 1.
    #[serde(deserialize_with = "some_positive", skip_serializing_if = "Option::is_none")]
    pub dual_clip: Option<f64>,
    /// How far a value may go from what it was; 0: any way.
    #[serde(deserialize_with = "not_negative")]
    pub clip_value: f64,
    #[serde(deserialize_with = "ratio")]
    pub gamma: f64,
    #[serde(deserialize_with = "ratio")]
    pub lambda: f64,
    pub whiten_advantages: bool,
    /// Rewards with the KL penalty are divided by their deviation.
    pub whiten_rewards: bool,
    /// How the losses of tokens become one.
    pub aggregation: Aggregation,
    /// Weight of the entropy, which is made larger.
    #[serde(deserialize_with = "not_negative")]
    pub entropy_coef: f64,
    /// Weight of the KL to the reference; of adaptive control its first.
    #[serde(deserialize_with = "not_negative")]
    pub kl_coef: f64,
    /// Default: `k1`, in the loss `k3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_estimator: Option<KlEstimator>,
    /// Whether the KL is a penalty on rewards or a part of the loss.
    pub kl_in: KlIn,
    /// Nats a response that the weight is controlled for; none: it stays.
    #[serde(deserialize_with = "some_positive", skip_serializing_if = "Option::is_none")]
    pub kl_target: Option<f64>,
    /// Responses over which the weight follows an error by its size.
    #[serde(deserialize_with = "positive")]
    pub kl_horizon: f64,
    /// An iteration's updates end where their mean approximate KL to the policy that generated is above this, nats a token.
    #[serde(deserialize_with = "some_positive", skip_serializing_if = "Option::is_none")]
    pub stop_kl: Option<f64>,
    /// Scores are cut off at plus and minus this, before the KL penalty.
    #[serde(deserialize_with = "some_positive", skip_serializing_if = "Option::is_none")]
    pub reward_clip: Option<f64>,
    /// What is taken from every score: a number, or `batch`, the mean of the iteration's.
    pub reward_baseline: Baseline,
    /// What becomes of responses that did not end.
    pub missing_eos: MissingEos,
    /// The number that `missing_eos` takes.
    #[serde(deserialize_with = "not_negative")]
    pub missing_eos_penalty: f64,
    /// Iterations in which only the critic is trained.
    pub value_warmup: u64,
    /// Decay of a moving average of the actor's weights, written to RUN_DIR/ema; none: there is none.
    #[serde(deserialize_with = "some_ratio", skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    /// Pretraining data beside the rollouts (Ouyang et al. 2022).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ptx: Option<Ptx>,
    /// Checks at the start that ratio and KL are what they must be.
    pub self_check: bool,
}

/// Text whose cross-entropy is added to the actor's loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ptx {
    /// Token shards, as for pretraining.
    pub data: Vec<Source>,
    /// Weight of the mean loss of a token.
    #[serde(deserialize_with = "positive")]
    pub coef: f64,
    #[serde(default = "super::common::sequence_length", deserialize_with = "count")]
    pub sequence_length: i64,
    /// Sequences of one update, over all ranks. Default: `ppo.minibatch_size`.
    #[serde(default, deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<i64>,
}

impl Default for Section {
    fn default() -> Self {
        Section {
            epochs: 4,
            minibatch_size: 8,
            clip: 0.2,
            clip_high: None,
            dual_clip: None,
            clip_value: 0.2,
            gamma: 1.0,
            lambda: 0.95,
            whiten_advantages: true,
            whiten_rewards: false,
            aggregation: Aggregation::TokenMean,
            entropy_coef: 0.0,
            kl_coef: 0.05,
            kl_estimator: None,
            kl_in: KlIn::Reward,
            kl_target: None,
            kl_horizon: 10_000.0,
            stop_kl: None,
            reward_clip: None,
            reward_baseline: Baseline::Number(0.0),
            missing_eos: MissingEos::Keep,
            missing_eos_penalty: 1.0,
            value_warmup: 0,
            ema: None,
            ptx: None,
            self_check: true,
        }
    }
}

impl Section {
    /// The estimator of the KL to the reference.
    pub fn kl_estimator(&self) -> KlEstimator {
        self.kl_estimator.unwrap_or(match self.kl_in {
            KlIn::Reward => KlEstimator::K1,
            KlIn::Loss => KlEstimator::K3,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KlIn {
    Reward,
    Loss,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Baseline {
    Number(f64),
    Of(Batch),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Batch {
    Batch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MissingEos {
    /// Their score stays.
    Keep,
    /// Their score is minus the penalty.
    Replace,
    /// The penalty is taken from their score.
    Subtract,
    /// They are left out of the losses.
    Mask,
}

/// What is written of the responses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Samples {
    /// Iterations between samples; 0: there are none.
    pub every: u64,
    /// How many responses of an iteration.
    #[serde(deserialize_with = "count")]
    pub count: i64,
    /// Every token of them, too, in trace.jsonl.
    pub trace: bool,
}

impl Default for Samples {
    fn default() -> Self {
        Samples { every: 10, count: 4, trace: false }
    }
}

impl Ppo {
    /// What responses are rewarded for: the reward model, where nothing else is said.
    pub fn rewards(&self) -> Vec<Reward> {
        match self.rewards.is_empty() {
            true => vec![Reward::new(RewardKind::Model)],
            false => self.rewards.clone(),
        }
    }

    /// The critic's section; where it names no path: the reward model's weights, else the actor's trunk.
    pub fn critic(&self) -> Trained {
        let path = self.reward_model.as_ref().map_or(&self.actor.path, |m| &m.path);
        self.critic.clone().unwrap_or_default().or_path(path)
    }

    /// The paths that are read.
    pub fn paths(&self) -> Vec<&Path> {
        let mut paths = self.sections_of_responses().paths();
        paths.extend(self.critic.iter().filter_map(|c| c.path.as_deref()));
        paths.extend(self.ppo.ptx.iter().flat_map(|p| &p.data).map(|s| s.path.as_path()));
        paths
    }

    /// Sequences that one rank computes at once.
    pub fn micro_batch_size(&self, world_size: i64) -> i64 {
        self.train.micro_batch_size.unwrap_or(self.ppo.minibatch_size / world_size)
    }
}

impl Algorithm for Ppo {
    const SUBCOMMAND: &'static str = "ppo";
    const DEFAULT: BuiltIn = built_in!("ppo");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflict(&self, world_size: i64) -> Option<Conflict> {
        let (ppo, batch) = (&self.ppo, self.train.batch_size);
        let micro = self.micro_batch_size(world_size);
        let unit = micro.max(1) * world_size;
        if ppo.minibatch_size % unit != 0 || micro < 1 {
            return Some((
                "ppo.minibatch_size",
                format!("{} is no multiple of train.micro_batch_size x ranks = {unit}", ppo.minibatch_size),
            ));
        }
        if batch % ppo.minibatch_size != 0 {
            return Some((
                "ppo.minibatch_size",
                format!("train.batch_size, {batch} prompts, is no multiple of {}", ppo.minibatch_size),
            ));
        }
        if ppo.dual_clip.is_some_and(|c| c <= 1.0) {
            return Some(("ppo.dual_clip", "above 1: at 1 every negative advantage would be cut off".into()));
        }
        if self.rewards.is_empty() && self.reward_model.is_none() {
            let why = "there is nothing to learn from: give reward_model, or rewards by rule such as [{kind: gsm8k}]";
            return Some(("rewards", why.into()));
        }
        if ppo.kl_target.is_some() && ppo.kl_coef == 0.0 {
            return Some(("ppo.kl_target", "a weight of 0 (kl_coef) stays 0, whatever its target".into()));
        }
        if ppo.kl_target.is_some() && ppo.kl_in == KlIn::Loss {
            return Some((
                "ppo.kl_target",
                "the weight is controlled where the KL is a penalty on rewards".into(),
            ));
        }
        if ppo.kl_in == KlIn::Loss && ppo.kl_coef > 0.0 && ppo.kl_estimator() == KlEstimator::K1 {
            return Some(("ppo.kl_estimator", KlEstimator::NO_LOSS.into()));
        }
        if let Some(ptx) = &ppo.ptx {
            let rows = ptx.batch_size.unwrap_or(ppo.minibatch_size);
            if ptx.data.is_empty() {
                return Some(("ppo.ptx.data", "name at least one folder of token shards".into()));
            }
            if rows % unit != 0 {
                return Some((
                    "ppo.ptx.batch_size",
                    format!("{rows} is no multiple of train.micro_batch_size x ranks = {unit}"),
                ));
            }
        }
        if let Some(critic) = &self.critic {
            if world_size > 1 && critic.device.as_ref().is_some_and(|d| d.starts_with("cuda:")) {
                let why = "cuda:N is for a world of one rank; with several, cuda is each rank's own";
                return Some(("critic.device", why.into()));
            }
            if let Some((key, why)) = trainable::conflict(&critic.freeze, critic.lora.as_ref()) {
                return Some(("critic", format!("{key}: {why}")));
            }
            if self.critic().drops_out() {
                let why = "0 is all that there is: values are compared with those before the updates, and dropout would \
                           change them";
                return Some(("critic.lora.dropout", why.into()));
            }
        }
        self.sections_of_responses().conflict(world_size).or_else(|| self.valid.conflict(&self.data.valid))
    }
}
