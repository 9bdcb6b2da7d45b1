//! Rewards per token, advantages and returns (Schulman et al. 2016), whitening over all ranks.

use kernels::comm::{Group, ReduceOp};
use tch::{Kind, Tensor};

use crate::error::Result;

/// What keeps whitening from dividing by 0.
const EPS: f64 = 1e-8;

/// Rewards [B, R]: `-kl_coef * kl` at every token, and the response's score besides at its last one. `kl`: [B, R]
/// (see [`KlEstimator`](super::kl::KlEstimator)); `scores`: `[B]`. A response without tokens has no rewards.
pub fn token_rewards(scores: &Tensor, kl: &Tensor, kl_coef: f64, mask: &Tensor) -> Tensor {
    let places = Tensor::arange(mask.size()[1], (Kind::Int64, mask.device()));
    // The last token, whatever holes are before it: place + 1 where there is a token, the largest of them.
    let last = ((places + 1i64) * mask.to_kind(Kind::Int64)).argmax(1, true);
    let at_last = mask.zeros_like().scatter_value(1, &last, 1.0) * mask;
    kl * (-kl_coef) * mask + at_last * scores.unsqueeze(1)
}

/// Generalized advantage estimation:
/// ```text
/// delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lambda A_{t+1};   returns = A + V
/// ```
/// over the tokens of each response, [B, R]; the value after the last one is `bootstrap`, `[B]` (0 where a response came
/// to its end). Places without a token are skipped, also in the middle of a response, and are 0 in both results.
pub fn gae(
    rewards: &Tensor,
    values: &Tensor,
    mask: &Tensor,
    bootstrap: Option<&Tensor>,
    gamma: f64,
    lambda: f64,
) -> (Tensor, Tensor) {
    let width = rewards.size()[1];
    let zeros = || rewards.select(1, 0).zeros_like();
    let mut next_value = bootstrap.map_or_else(zeros, Tensor::shallow_clone);
    let mut next = zeros();
    let mut advantages = Vec::with_capacity(width as usize);
    for t in (0..width).rev() {
        let at = |x: &Tensor| x.select(1, t);
        let here = at(mask).gt(0.0);
        let advantage = at(rewards) + &next_value * gamma - at(values) + &next * (gamma * lambda);
        next = advantage.where_self(&here, &next);
        next_value = at(values).where_self(&here, &next_value);
        advantages.push(next.shallow_clone());
    }
    advantages.reverse();
    let advantages = Tensor::stack(&advantages, 1) * mask;
    let returns = (&advantages + values) * mask;
    (advantages, returns)
}

/// Count, mean and variances of masked values over all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MaskedMoments {
    pub count: f64,
    /// 0 where there are no values.
    pub mean: f64,
    /// Divided by n - 1; 0 below two values.
    pub variance: f64,
    /// Divided by n.
    pub biased_variance: f64,
}

impl MaskedMoments {
    /// Of all ranks' values where `mask` is 1. Sums are taken in float64: first of the values, then of the squared
    /// distances from their mean. A collective call.
    pub fn of(values: &Tensor, mask: &Tensor, group: &Group) -> Result<MaskedMoments> {
        let (values, mask) = (values.to_kind(Kind::Double), mask.to_kind(Kind::Double));
        let sum = |t: &Tensor| t.sum(Kind::Double).double_value(&[]);
        let totals = group.combine(&[sum(&(&values * &mask)), sum(&mask)], ReduceOp::Sum)?;
        let count = totals[1];
        let mean = if count > 0.0 { totals[0] / count } else { 0.0 };
        let distance = (values - mean) * &mask;
        let squares = group.combine(&[sum(&(&distance * &distance))], ReduceOp::Sum)?[0];
        Ok(MaskedMoments {
            count,
            mean,
            variance: if count > 1.0 { squares / (count - 1.0) } else { 0.0 },
            biased_variance: if count > 0.0 { squares / count } else { 0.0 },
        })
    }

    /// `(x - mean) / sqrt(variance + 1e-8)`, 0 where there is no token; with `keep_mean` the mean is added back.
    pub fn whiten(&self, values: &Tensor, mask: &Tensor, keep_mean: bool) -> Tensor {
        let scaled = (values - self.mean) / (self.variance + EPS).sqrt();
        let shifted = if keep_mean { scaled + self.mean } else { scaled };
        shifted * mask
    }
}

/// Whitens values by their mean and (n - 1) variance over all ranks. A collective call.
pub fn whiten(values: &Tensor, mask: &Tensor, keep_mean: bool, group: &Group) -> Result<Tensor> {
    Ok(MaskedMoments::of(values, mask, group)?.whiten(values, mask, keep_mean))
}

/// The share of the returns' variance that the values explain: `1 - var(returns - values) / var(returns)` over all
/// ranks; NaN where the returns do not vary. A collective call.
pub fn explained_variance(values: &Tensor, returns: &Tensor, mask: &Tensor, group: &Group) -> Result<f64> {
    let rest = MaskedMoments::of(&(returns - values), mask, group)?.biased_variance;
    Ok(1.0 - rest / MaskedMoments::of(returns, mask, group)?.biased_variance)
}
