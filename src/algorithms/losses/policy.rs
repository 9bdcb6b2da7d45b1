//! PPO's losses (Schulman et al. 2017) per token, and how tokens are weighed against one another.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::sums::sums_of;
pub use crate::config::policy::Aggregation;
use crate::distributed::world::World;
use crate::error::Result;

/// The largest absolute logarithm of a ratio of probabilities: its exponential stays finite.
const MOST_LOG_RATIO: f64 = 20.0;

/// Responses and tokens that count in an update, over all its ranks and micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ClipCounts {
    pub sequences: f64,
    pub tokens: f64,
}

impl ClipCounts {
    /// Of this rank's rows, by their mask; rows without tokens count as sequences.
    pub fn of(mask: &Tensor) -> ClipCounts {
        ClipCounts { sequences: mask.size()[0] as f64, tokens: mask.sum(Kind::Double).double_value(&[]) }
    }
}

impl Aggregation {
    /// The weight of each token, [B, R]: the loss is the sum of weighted losses over all micro-batches and ranks.
    /// `longest`: the tokens that a response may have at most.
    pub fn weights(self, mask: &Tensor, counts: &ClipCounts, longest: i64) -> Tensor {
        let sequences = counts.sequences.max(1.0);
        match self {
            Aggregation::TokenMean => mask / counts.tokens.max(1.0),
            Aggregation::SeqMeanTokenMean => mask / (lengths(mask) * sequences),
            Aggregation::SeqMeanTokenSum => mask / sequences,
            Aggregation::SeqMeanTokenSumNorm => mask / (sequences * longest as f64),
        }
    }
}

/// Tokens of each row, at least 1: [B, 1].
pub(super) fn lengths(mask: &Tensor) -> Tensor {
    mask.sum_dim_intlist([1i64].as_slice(), true, mask.kind()).clamp_min(1.0)
}

/// The logarithm of the ratio of new to old probabilities, [B, R], within ±20.
pub fn log_ratio(logprobs: &Tensor, old: &Tensor) -> Tensor {
    (logprobs - old).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
}

/// How far a ratio may move the policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clip {
    /// Ratios below `1 - low` and above `1 + high` have no gradient where the update would go on in that direction.
    pub low: f64,
    pub high: f64,
    /// Where the advantage is negative the loss is at most `-dual * advantage` (Ye et al. 2020); above 1.
    pub dual: Option<f64>,
}

/// The clipped policy loss of each token, [B, R]:
/// `max(-A ratio, -A clip(ratio, 1 - low, 1 + high))`.
pub fn policy_loss(logprobs: &Tensor, old: &Tensor, advantages: &Tensor, clip: &Clip) -> Tensor {
    let ratio = log_ratio(logprobs, old).exp();
    let free = -advantages * &ratio;
    let clipped = -advantages * ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
    let loss = free.maximum(&clipped);
    match clip.dual {
        None => loss,
        Some(dual) => loss.minimum(&(advantages * -dual)).where_self(&advantages.lt(0.0), &loss),
    }
}

/// The loss of each token's value, [B, R]: `max((V - R)^2, (clip(V, V_old ± clip) - R)^2) / 2`; without `clip` the first
/// alone.
pub fn value_loss(values: &Tensor, old: &Tensor, returns: &Tensor, clip: Option<f64>) -> Tensor {
    let square = |v: &Tensor| (v - returns).square();
    let free = square(values);
    let loss = match clip {
        None => free,
        Some(clip) => free.maximum(&square(&values.maximum(&(old - clip)).minimum(&(old + clip)))),
    };
    loss * 0.5
}

/// Sums over tokens that tell how an update went.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct PolicySums {
    pub tokens: f64,
    /// Tokens whose loss was clipped.
    pub clipped: f64,
    /// Half the squares of log-ratios.
    pub approx_kl: f64,
    /// Ratios of new to old probabilities.
    pub ratio: f64,
    /// Distances of ratios from 1.
    pub ratio_distance: f64,
    /// Entropies, in nats.
    pub entropy: f64,
}

impl PolicySums {
    /// Adds the tokens of a micro-batch. `entropies`: [B, R].
    pub fn add(
        &mut self,
        logprobs: &Tensor,
        old: &Tensor,
        advantages: &Tensor,
        entropies: Option<&Tensor>,
        clip: &Clip,
        mask: &Tensor,
    ) {
        let mask = mask.to_kind(Kind::Double);
        let log_ratio = log_ratio(&logprobs.detach(), old).to_kind(Kind::Double);
        let ratio = log_ratio.exp();
        let free = -advantages * &ratio;
        let clipped = -advantages * ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
        let entropy = entropies.map_or_else(|| mask.zeros_like(), |e| e.detach().to_kind(Kind::Double));
        let [tokens, clipped, approx_kl, ratio_sum, distance, entropy] = sums_of(
            [
                mask.ones_like(),
                clipped.gt_tensor(&free).to_kind(Kind::Double),
                &log_ratio * &log_ratio * 0.5,
                ratio.shallow_clone(),
                (&ratio - 1.0).abs(),
                entropy,
            ]
            .map(|t| t * &mask),
        );
        self.tokens += tokens;
        self.clipped += clipped;
        self.approx_kl += approx_kl;
        self.ratio += ratio_sum;
        self.ratio_distance += distance;
        self.entropy += entropy;
    }

    /// Over all ranks. A collective call.
    pub fn over_ranks(self, world: &World) -> Result<PolicySums> {
        let sums = world.sum_rows(&self.numbers())?;
        Ok(Self::from([0, 1, 2, 3, 4, 5].map(|i: usize| sums[i])))
    }

    /// Those of another part of the tokens besides.
    pub fn plus(self, other: &PolicySums) -> PolicySums {
        let (a, b) = (self.numbers(), other.numbers());
        Self::from([0, 1, 2, 3, 4, 5].map(|i: usize| a[i] + b[i]))
    }

    fn numbers(&self) -> [f64; 6] {
        [self.tokens, self.clipped, self.approx_kl, self.ratio, self.ratio_distance, self.entropy]
    }

    fn from(numbers: [f64; 6]) -> PolicySums {
        let [tokens, clipped, approx_kl, ratio, ratio_distance, entropy] = numbers;
        PolicySums { tokens, clipped, approx_kl, ratio, ratio_distance, entropy }
    }

    /// The share of tokens whose loss was clipped.
    pub fn clip_fraction(&self) -> f64 {
        self.clipped / self.tokens
    }

    /// Mean of half the squared log-ratios, in nats: the KL from the policy that generated.
    pub fn approx_kl(&self) -> f64 {
        self.approx_kl / self.tokens
    }

    pub fn ratio_mean(&self) -> f64 {
        self.ratio / self.tokens
    }
}
