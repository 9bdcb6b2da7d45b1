//! The configuration of `corral grpo`.

use super::algorithm::{Algorithm, BuiltInConfig, built_in};
use super::common::Common;
use super::conflict::Conflicts;
use super::policy::{KlEstimator, LossType, RatioLevel, policy_configuration};
use super::rewards::{RewardKind, RewardTerm};
use super::section::{choice, section};
use super::sft::PromptSamples;
use super::template_date::TemplateDate;

policy_configuration! {
    /// Group-relative policy optimization; `train.batch_size` counts prompts per iteration, `train.steps` counts iterations.
    pub struct Grpo {
        /// The loss and its groups.
        grpo: GrpoSection = GrpoSection::default();
        /// Responses that are written to samples.jsonl and TensorBoard.
        samples: PromptSamples = samples();
    }
}

section! {
    /// The loss and its groups.
    pub struct GrpoSection {
        /// Responses to each prompt.
        group_size: i64 = 8, COUNT => Mathematics;
        /// Short for `rewards` of these kinds, each with weight 1.
        rewards: Vec<RewardKind> = Vec::new() => Mathematics;
        /// The baseline of a response's reward.
        advantages: Advantages = Advantages::Group => Mathematics;
        /// The loss of a token, and its aggregation.
        loss: LossType = LossType::Grpo => Mathematics;
        /// Whether ratios of new to old probabilities are per token or per response (GSPO).
        level: RatioLevel = RatioLevel::Token => Mathematics;
        /// Clip range of the ratio, below and above 1.
        epsilon: f64 = 0.2, POSITIVE => Mathematics;
        /// Clip range above 1, if different. `cispo`: the largest ratio itself; default 5.
        epsilon_high: Option<f64> = None, POSITIVE => Mathematics;
        /// `sapo`: steepness of its sigmoid for positive advantages (Gao et al. 2025).
        sapo_temperature_pos: f64 = SAPO_TEMPERATURES[0], POSITIVE => Mathematics;
        /// `sapo`: the same for other advantages.
        sapo_temperature_neg: f64 = SAPO_TEMPERATURES[1], POSITIVE => Mathematics;
        /// The largest ratio whatever the advantage's sign (two-sided clipping); above 1 + epsilon_high.
        delta: Option<f64> = None, POSITIVE => Mathematics;
        /// The weight of the KL to the reference, in the loss; for `reinforce++`, in the reward.
        beta: f64 = 0.0, NOT_NEGATIVE => Mathematics;
        /// The KL estimator. Default: `k3`; for `reinforce++` always `k1`.
        kl_estimator: Option<KlEstimator> = None => Mathematics;
        /// Measures the KL to the reference even if beta is 0, which costs a reference model in memory and its forward.
        measure_kl: bool = true => Output;
        /// Passes over an iteration's responses, each in a new order.
        epochs: i64 = 1, COUNT => Mathematics;
        /// Responses per update, over all ranks. Default: all of the iteration.
        minibatch_size: Option<i64> = None, COUNT => Mathematics;
        /// Treatment of truncated responses (without a stop token).
        truncated: Truncated = Truncated::Keep => Mathematics;
        /// The penalty that `truncated: penalize` subtracts from the reward.
        truncated_penalty: f64 = 1.0, NOT_NEGATIVE => Mathematics;
        /// How often, at most, groups without variance are replaced by those of new prompts (Yu et al. 2025).
        resample: u64 = 0 => Mathematics;
    }
}

/// Defaults of `sapo_temperature_pos` and `_neg`.
const SAPO_TEMPERATURES: [f64; 2] = [1.0, 1.05];

impl GrpoSection {
    /// How far a ratio may go above 1; of `cispo` the largest ratio.
    pub fn epsilon_high(&self) -> f64 {
        let default = if self.loss == LossType::Cispo { 5.0 } else { self.epsilon };
        self.epsilon_high.unwrap_or(default)
    }

    pub fn sapo_temperatures(&self) -> [f64; 2] {
        [self.sapo_temperature_pos, self.sapo_temperature_neg]
    }
}

choice! {
    /// The baseline of a response's reward.
    pub enum Advantages {
        /// The group's mean; the difference is divided by the group's standard deviation (Shao et al. 2024).
        Group = "group",
        /// The group's mean; the difference is divided by the batch's standard deviation.
        Batch = "batch",
        /// The group's mean (Liu et al. 2025).
        None = "none",
        /// The mean of the group's other responses (Ahmadian et al. 2024).
        Rloo = "rloo",
        /// The batch's mean; the difference is divided by the batch's standard deviation, and the KL is a penalty on the reward
        /// (Hu et al. 2025).
        Reinforce = "reinforce++",
    }
}

choice! {
    /// Treatment of truncated responses (without a stop token).
    pub enum Truncated {
        /// They are treated like all others.
        Keep = "keep",
        /// They are left out of the loss; their rewards count in their group.
        Mask = "mask",
        /// The penalty is subtracted from their reward.
        Penalize = "penalize",
    }
}

pub(super) fn samples() -> PromptSamples {
    PromptSamples { every: 10, count: 4 }
}

impl Grpo {
    /// What responses are rewarded for.
    pub fn rewards(&self) -> Vec<RewardTerm> {
        let short = self.grpo.rewards.iter().map(|kind| RewardTerm::new(*kind));
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
    const MODEL: &'static str = "actor";
    const BUILT_IN: &'static [BuiltInConfig] =
        built_in!("grpo": "default", "gsm8k", "qwen2.5-0.5b-gsm8k", "qwen2.5-1.5b-gsm8k", "smollm2-sums");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        self.conflicts_of_sizes(self.parallel.data_ranks(world_size), found);
        self.grpo.conflicts(found);
        if !self.uses_reference() && self.reference.is_some() {
            found.add("reference", "nothing uses it: set grpo.beta, or leave it out");
        }
        self.sections_of_responses().conflicts(world_size, found);
        self.valid.conflicts(&self.data.valid, found);
    }
}

impl Grpo {
    /// What does not fit among responses, updates and micro-batches.
    fn conflicts_of_sizes(&self, ranks: i64, found: &mut Conflicts) {
        let (all, size, micro) = (self.num_responses(), self.minibatch_size(), self.micro_batch_size(ranks));
        if all % size != 0 {
            let why = format!(
                "the {all} responses of train.batch_size x grpo.group_size are not a multiple of {size}"
            );
            found.add("grpo.minibatch_size", why);
        }
        if micro < 1 || size % (micro * ranks) != 0 {
            let given = self.grpo.minibatch_size.is_some();
            let key = if given { "grpo.minibatch_size" } else { "train.micro_batch_size" };
            let why = format!(
                "the {size} responses of an update are not a multiple of train.micro_batch_size x ranks = {micro} x \
                 {ranks}"
            );
            found.add(key, why);
        }
    }
}

impl GrpoSection {
    /// What does not fit among the keys of the section.
    fn conflicts(&self, found: &mut Conflicts) {
        let reinforce = self.advantages == Advantages::Reinforce;
        if self.group_size == 1 && !reinforce {
            let why = "must be at least 2, not 1: a response is compared with others of its group (grpo.advantages: reinforce++ needs no group)";
            found.add("grpo.group_size", why);
        }
        if reinforce && self.kl_estimator.is_some_and(|e| e != KlEstimator::K1) {
            let why = "reinforce++ has the KL in the reward, as the sum of k1 over a response; leave it out";
            found.add("grpo.kl_estimator", why);
        }
        if self.group_size == 1 && self.resample > 0 {
            let why = "must be 0 when grpo.group_size is 1: a single response has no variance, so every group would be resampled";
            found.add("grpo.resample", why);
        }
        if self.delta.is_some_and(|d| d <= 1.0 + self.epsilon_high.unwrap_or(self.epsilon)) {
            let why = "above 1 + epsilon_high (default: epsilon): below it nothing would be left to clip";
            found.add("grpo.delta", why);
        }
        if self.beta > 0.0 && !reinforce && self.kl_estimator == Some(KlEstimator::K1) {
            found.add("grpo.kl_estimator", KlEstimator::NO_LOSS);
        }
        let clips_nothing = matches!(self.loss, LossType::Cispo | LossType::Sapo);
        if clips_nothing && (self.delta.is_some() || self.level == RatioLevel::Sequence) {
            let why =
                "cispo and sapo have ratios of tokens and no delta: leave out grpo.level and grpo.delta";
            found.add("grpo.loss", why);
        }
        if self.loss == LossType::Sapo && self.epsilon_high.is_some() {
            found.add("grpo.epsilon_high", "sapo clips nothing; leave it out");
        }
        let temperatures = ["grpo.sapo_temperature_pos", "grpo.sapo_temperature_neg"];
        for ((key, value), default) in
            temperatures.into_iter().zip(self.sapo_temperatures()).zip(SAPO_TEMPERATURES)
        {
            if self.loss != LossType::Sapo && value != default {
                found.add(key, "is a key of `loss: sapo`; leave it out, or set grpo.loss=sapo");
            }
        }
    }
}
