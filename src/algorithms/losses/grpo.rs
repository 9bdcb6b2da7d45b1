//! Group-relative policy optimization (Shao et al. 2024) and its relatives: advantages of the answers to one prompt, and
//! losses per token.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::kl::KlEstimator;
use super::policy::{Aggregation, ClipCounts, lengths, log_ratio};
use super::sums::sums_of;
pub use crate::config::policy::{LossType, RatioLevel};

/// What the distance of a reward from its group's mean is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum ScaleRewards {
    /// The deviation within the group.
    #[default]
    Group,
    /// The deviation of all rewards of the batch.
    Batch,
    /// Nothing (Dr. GRPO, Liu et al. 2025).
    None,
}

/// Advantages of the answers of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupAdvantages {
    /// One an answer.
    pub advantages: Vec<f64>,
    /// Groups whose rewards are all equal: they teach nothing.
    pub without_variance: u64,
    /// The mean of the groups' deviations.
    pub reward_std: f64,
}

/// Keeps advantages finite where all rewards of a group are equal.
const EPS: f64 = 1e-4;

/// Mean and sample deviation (n - 1) of the numbers that are there.
fn mean_and_std(rewards: &[f64]) -> (f64, f64) {
    let there: Vec<f64> = rewards.iter().copied().filter(|r| !r.is_nan()).collect();
    let n = there.len() as f64;
    let mean = there.iter().sum::<f64>() / n.max(1.0);
    let squares: f64 = there.iter().map(|r| (r - mean).powi(2)).sum();
    (mean, if n > 1.0 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}

/// `(reward - mean of its group) / (deviation + 1e-4)`. `rewards`: those of all ranks, the answers to a prompt one after
/// the other; an answer that could not be scored is NaN: it is left out of mean and deviation, and its advantage is 0.
/// Groups of one keep their reward as it is (mean 0, deviation 1), since there is nothing to compare.
pub fn group_advantages(rewards: &[f64], group_size: usize, scale: ScaleRewards) -> GroupAdvantages {
    let all = mean_and_std(rewards).1;
    let (mut advantages, mut without_variance, mut deviations) = (Vec::new(), 0, 0.0);
    for group in rewards.chunks(group_size) {
        let (mean, std) = if group_size == 1 { (0.0, 1.0) } else { mean_and_std(group) };
        let flat = !varies(group);
        without_variance += u64::from(flat);
        deviations += mean_and_std(group).1;
        let divisor = match scale {
            ScaleRewards::Group if group_size == 1 => 1.0,
            ScaleRewards::Group => std + EPS,
            ScaleRewards::Batch => all + EPS,
            ScaleRewards::None => 1.0,
        };
        // Exactly 0 where all are equal: what rounding leaves of the mean an optimizer could make a step of.
        let none = |r: &f64| r.is_nan() || (flat && group_size > 1);
        advantages.extend(group.iter().map(|r| if none(r) { 0.0 } else { (r - mean) / divisor }));
    }
    let groups = rewards.len().div_ceil(group_size).max(1) as f64;
    GroupAdvantages { advantages, without_variance, reward_std: deviations / groups }
}

/// Whether the rewards of a group differ, of those that are there.
pub fn varies(group: &[f64]) -> bool {
    let mut there = group.iter().filter(|r| !r.is_nan());
    let first = there.next();
    there.any(|r| Some(r) != first)
}

/// REINFORCE with leave-one-out baselines (Ahmadian et al. 2024): a reward minus the mean of the others of its group. In
/// groups that have fewer than two scored answers there is nothing to compare with: 0.
pub fn rloo(rewards: &[f64], group_size: usize) -> Vec<f64> {
    let mut advantages = Vec::with_capacity(rewards.len());
    for group in rewards.chunks(group_size) {
        let n = group.iter().filter(|r| !r.is_nan()).count() as f64;
        let sum: f64 = group.iter().filter(|r| !r.is_nan()).sum();
        let flat = !varies(group);
        let advantage = |r: &f64| match r.is_nan() || flat {
            true => 0.0,
            false => r - (sum - r) / (n - 1.0),
        };
        advantages.extend(group.iter().map(advantage));
    }
    advantages
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GrpoLoss {
    pub loss: LossType,
    pub level: RatioLevel,
    pub epsilon_low: f64,
    pub epsilon_high: f64,
    /// The largest ratio, whatever the sign of the advantage (two-sided clipping).
    pub delta: Option<f64>,
    /// The weight of the KL to the reference.
    pub beta: f64,
    pub kl: KlEstimator,
    /// Steepness of SAPO's sigmoid for positive and for other advantages.
    pub temperatures: [f64; 2],
}

impl GrpoLoss {
    /// Ratios of new to old probabilities, [B, R]; [B, 1] where they are taken of answers.
    pub fn ratio(&self, logprobs: &Tensor, old: &Tensor, mask: &Tensor) -> Tensor {
        let log_ratio = log_ratio(logprobs, old);
        match self.level {
            RatioLevel::Token => log_ratio,
            RatioLevel::Sequence => {
                (log_ratio * mask).sum_dim_intlist([1i64].as_slice(), true, mask.kind()) / lengths(mask)
            }
        }
        .exp()
    }

    /// The loss of each token, [B, R]. `advantages`: `[B]`; `reference` is needed where `beta` is not 0.
    pub fn per_token(
        &self,
        logprobs: &Tensor,
        old: &Tensor,
        reference: Option<&Tensor>,
        advantages: &Tensor,
        mask: &Tensor,
    ) -> Tensor {
        let ratio = self.ratio(logprobs, old, mask);
        let a = &advantages.unsqueeze(1);
        let loss = match self.loss {
            LossType::Cispo => -ratio.clamp_max(self.epsilon_high).detach() * a * logprobs,
            LossType::Sapo => {
                let [positive, other] = self.temperatures;
                let tau = a.full_like(other).where_self(&a.le(0.0), &a.full_like(positive));
                (&tau * (ratio - 1.0)).sigmoid() * (a * -4.0) / tau
            }
            _ => {
                let clipped = ratio.clamp(1.0 - self.epsilon_low, 1.0 + self.epsilon_high);
                let free = self.delta.map_or_else(|| ratio.shallow_clone(), |delta| ratio.clamp_max(delta));
                -(free * a).minimum(&(clipped * a))
            }
        };
        let loss = loss * mask.ones_like();
        match reference {
            Some(reference) if self.beta != 0.0 => loss + self.kl.estimate(logprobs, reference) * self.beta,
            _ => loss,
        }
    }

    /// The weights of tokens, [B, R], for `counts` of the update (`dapo` and `cispo`: of the rollout, divided by its
    /// updates); `longest`: the tokens that an answer may have at most.
    pub fn weights(&self, mask: &Tensor, counts: &ClipCounts, longest: i64) -> Tensor {
        let aggregation = match self.loss {
            LossType::Grpo | LossType::Sapo => Aggregation::SeqMeanTokenMean,
            LossType::Bnpo | LossType::Dapo | LossType::Cispo => Aggregation::TokenMean,
            LossType::DrGrpo => Aggregation::SeqMeanTokenSumNorm,
            LossType::Luspo => Aggregation::SeqMeanTokenSum,
        };
        aggregation.weights(mask, counts, longest)
    }

    /// Tokens that are clipped: (below, for a negative advantage; above, for a positive one). `cispo`: those whose weight is
    /// cut off above, whatever their advantage; `sapo`: none.
    pub fn clipped(&self, logprobs: &Tensor, old: &Tensor, advantages: &Tensor, mask: &Tensor) -> (f64, f64) {
        let ratio = self.ratio(&logprobs.detach(), old, mask);
        let a = advantages.unsqueeze(1);
        let there = |t: Tensor| t.to_kind(mask.kind()) * mask;
        match self.loss {
            LossType::Sapo => (0.0, 0.0),
            LossType::Cispo => {
                let [high] = sums_of([there(ratio.gt(self.epsilon_high))]);
                (0.0, high)
            }
            _ => {
                let low = ratio.lt(1.0 - self.epsilon_low).logical_and(&a.lt(0.0));
                let high = ratio.gt(1.0 + self.epsilon_high).logical_and(&a.gt(0.0));
                let [low, high] = sums_of([there(low), there(high)]);
                (low, high)
            }
        }
    }
}
