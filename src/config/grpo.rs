//! The configuration of `corral grpo`.

use serde::{Deserialize, Serialize};

use super::algorithm::{Algorithm, BuiltIn, built_in};
use super::common::Common;
use super::conflict::Conflict;
use super::numbers::{count, not_negative, positive, some_count, some_positive};
use super::policy::{KlEstimator, Level, LossType, policy_configuration};
use super::rewards::{Reward, RewardKind};
use super::sft::Samples;
use super::template_date::TemplateDate;

policy_configuration! {
    /// Group-relative policy optimization; `train.batch_size` counts prompts an iteration, `train.steps` iterations.
    pub struct Grpo {
        #[serde(default)]
        pub grpo: Section,
        #[serde(default = "samples")]
        pub samples: Samples,
    }
}

/// The section `grpo`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Section {
    /// Responses to each prompt.
    #[serde(deserialize_with = "count")]
    pub group_size: i64,
    /// Short for `rewards` of these kinds, each with weight 1.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rewards: Vec<RewardKind>,
    pub advantages: Advantages,
    pub loss: LossType,
    /// Whether ratios of new to old probabilities are taken of tokens or of whole responses (GSPO).
    pub level: Level,
    /// How far a ratio may go below 1, and above it.
    #[serde(deserialize_with = "positive")]
    pub epsilon: f64,
    /// How far above, where that differs. `cispo`: the largest ratio itself; default 5.
    #[serde(deserialize_with = "some_positive", skip_serializing_if = "Option::is_none")]
    pub epsilon_high: Option<f64>,
    /// Of `sapo`: steepness of its sigmoid for positive advantages, and for others (Gao et al. 2025).
    #[serde(deserialize_with = "positive", skip_serializing_if = "is_default_pos")]
    pub sapo_temperature_pos: f64,
    #[serde(deserialize_with = "positive", skip_serializing_if = "is_default_neg")]
    pub sapo_temperature_neg: f64,
    /// The largest ratio whatever the advantage's sign (two-sided clipping); above 1 + epsilon_high.
    #[serde(deserialize_with = "some_positive", skip_serializing_if = "Option::is_none")]
    pub delta: Option<f64>,
    /// The weight of the KL to the reference, in the loss; of `reinforce++` in the reward.
    #[serde(deserialize_with = "not_negative")]
    pub beta: f64,
    /// Default: `k3`; of `reinforce++` it is always `k1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_estimator: Option<KlEstimator>,
    /// The KL to the reference is measured also where beta is 0, which takes a reference: a model in memory, and a forward
    /// of it.
    pub measure_kl: bool,
    /// Passes over an iteration's responses, each in its own order.
    #[serde(deserialize_with = "count")]
    pub epochs: i64,
    /// Responses of one update, over all ranks. Default: all of the iteration.
    #[serde(deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    pub minibatch_size: Option<i64>,
    /// What becomes of responses that did not end.
    pub truncated: Truncated,
    /// What `penalize` takes from their reward.
    #[serde(deserialize_with = "not_negative")]
    pub truncated_penalty: f64,
    /// How often further prompts are asked in the place of groups without variance, at most (Yu et al. 2025).
    pub resample: u64,
}

/// Defaults of `sapo_temperature_pos` and `_neg`.
const SAPO_TEMPERATURES: [f64; 2] = [1.0, 1.05];

fn is_default_pos(x: &f64) -> bool {
    *x == SAPO_TEMPERATURES[0]
}

fn is_default_neg(x: &f64) -> bool {
    *x == SAPO_TEMPERATURES[1]
}

impl Section {
    /// How far a ratio may go above 1; of `cispo` the largest ratio.
    pub fn epsilon_high(&self) -> f64 {
        let default = if self.loss == LossType::Cispo { 5.0 } else { self.epsilon };
        self.epsilon_high.unwrap_or(default)
    }

    pub fn sapo_temperatures(&self) -> [f64; 2] {
        [self.sapo_temperature_pos, self.sapo_temperature_neg]
    }
}

impl Default for Section {
    fn default() -> Self {
        Section {
            group_size: 8,
            rewards: Vec::new(),
            advantages: Advantages::Group,
            loss: LossType::Grpo,
            level: Level::Token,
            epsilon: 0.2,
            epsilon_high: None,
            sapo_temperature_pos: SAPO_TEMPERATURES[0],
            sapo_temperature_neg: SAPO_TEMPERATURES[1],
            delta: None,
            beta: 0.0,
            kl_estimator: None,
            measure_kl: true,
            epochs: 1,
            minibatch_size: None,
            truncated: Truncated::Keep,
            truncated_penalty: 1.0,
            resample: 0,
        }
    }
}

/// What a response's reward is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Advantages {
    /// Its group's mean, in deviations of the group (Shao et al. 2024).
    Group,
    /// Its group's mean, in deviations of the batch.
    Batch,
    /// Its group's mean (Liu et al. 2025).
    None,
    /// The mean of the others of its group (Ahmadian et al. 2024).
    Rloo,
    /// The batch's mean, in deviations of the batch; the KL is a penalty on the reward (Hu et al. 2025).
    #[serde(rename = "reinforce++")]
    Reinforce,
}

/// What becomes of responses that did not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncated {
    /// They are as all others.
    Keep,
    /// They are left out of the loss; their rewards count in their group.
    Mask,
    /// Their reward is less by the penalty.
    Penalize,
}

pub(super) fn samples() -> Samples {
    Samples { every: 10, count: 4 }
}

impl Grpo {
    /// What responses are rewarded for.
    pub fn rewards(&self) -> Vec<Reward> {
        let short = self.grpo.rewards.iter().map(|kind| Reward::new(*kind));
        self.rewards.iter().cloned().chain(short).collect()
    }

    /// Responses of an iteration, over all ranks.
    pub fn num_responses(&self) -> i64 {
        self.train.batch_size * self.grpo.group_size
    }

    /// Responses of an update, over all ranks.
    pub fn minibatch_size(&self) -> i64 {
        self.grpo.minibatch_size.unwrap_or(self.num_responses())
    }

    /// Responses that one rank computes at once.
    pub fn micro_batch_size(&self, world_size: i64) -> i64 {
        self.train.micro_batch_size.unwrap_or(self.minibatch_size() / world_size)
    }

    /// Updates of an iteration.
    pub fn num_updates(&self) -> i64 {
        self.grpo.epochs * (self.num_responses() / self.minibatch_size()).max(1)
    }

    /// How the KL to the reference is estimated in the loss.
    pub fn kl_estimator(&self) -> KlEstimator {
        self.grpo.kl_estimator.unwrap_or(KlEstimator::K3)
    }

    /// Whether the reference is asked.
    pub fn uses_reference(&self) -> bool {
        self.grpo.beta > 0.0 || self.grpo.measure_kl
    }
}

impl Algorithm for Grpo {
    const SUBCOMMAND: &'static str = "grpo";
    const DEFAULT: BuiltIn = built_in!("grpo");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflict(&self, world_size: i64) -> Option<Conflict> {
        let grpo = &self.grpo;
        let (all, size, micro) =
            (self.num_responses(), self.minibatch_size(), self.micro_batch_size(world_size));
        if all % size != 0 {
            let why = format!(
                "the {all} responses of train.batch_size x grpo.group_size are no multiple of {size}"
            );
            return Some(("grpo.minibatch_size", why));
        }
        if micro < 1 || size % (micro * world_size) != 0 {
            let key =
                if grpo.minibatch_size.is_some() { "grpo.minibatch_size" } else { "train.micro_batch_size" };
            let why = format!(
                "the {size} responses of an update are no multiple of train.micro_batch_size x ranks = {micro} x \
                 {world_size}"
            );
            return Some((key, why));
        }
        if grpo.group_size == 1 && grpo.advantages != Advantages::Reinforce {
            let why = "a response alone has nothing to be compared with; 2 at least, or grpo.advantages=reinforce++";
            return Some(("grpo.group_size", why.into()));
        }
        if grpo.advantages == Advantages::Reinforce && grpo.kl_estimator.is_some_and(|e| e != KlEstimator::K1)
        {
            let why = "reinforce++ has the KL in the reward, as the sum of k1 over a response; leave it out";
            return Some(("grpo.kl_estimator", why.into()));
        }
        if grpo.group_size == 1 && grpo.resample > 0 {
            let why = "a group of one response never varies: others would be asked in the place of all, for nothing";
            return Some(("grpo.resample", why.into()));
        }
        if grpo.delta.is_some_and(|d| d <= 1.0 + grpo.epsilon_high.unwrap_or(grpo.epsilon)) {
            let why = "above 1 + epsilon_high (default: epsilon): below it nothing would be left to clip";
            return Some(("grpo.delta", why.into()));
        }
        let in_loss = grpo.beta > 0.0 && grpo.advantages != Advantages::Reinforce;
        if in_loss && grpo.kl_estimator == Some(KlEstimator::K1) {
            return Some(("grpo.kl_estimator", KlEstimator::NO_LOSS.into()));
        }
        if matches!(grpo.loss, LossType::Cispo | LossType::Sapo)
            && (grpo.delta.is_some() || grpo.level == Level::Sequence)
        {
            let why =
                "cispo and sapo have ratios of tokens and no delta: leave out grpo.level and grpo.delta";
            return Some(("grpo.loss", why.into()));
        }
        if grpo.loss == LossType::Sapo && grpo.epsilon_high.is_some() {
            return Some(("grpo.epsilon_high", "sapo clips nothing; leave it out".into()));
        }
        if grpo.loss != LossType::Sapo && grpo.sapo_temperatures() != SAPO_TEMPERATURES {
            let (pos, neg) = ("grpo.sapo_temperature_pos", "grpo.sapo_temperature_neg");
            let key = if is_default_pos(&grpo.sapo_temperature_pos) { neg } else { pos };
            return Some((key, "is a key of `loss: sapo`; leave it out, or set grpo.loss=sapo".into()));
        }
        if !grpo.measure_kl && grpo.beta == 0.0 && self.reference.is_some() {
            return Some(("reference", "nothing asks it: set grpo.beta, or leave it out".into()));
        }
        self.sections_of_responses()
            .conflict(world_size)
            .or_else(|| self.valid.conflict(&self.data.valid))
            .or_else(|| self.samples.conflict())
    }
}
