//! How far the policy is from the reference: estimators per token (Schulman 2020, "Approximating KL divergence") and the
//! control of their weight (Ziegler et al. 2019).

use serde::{Deserialize, Serialize};
use tch::Tensor;

pub use crate::config::policy::KlEstimator;

/// The largest absolute value of an estimate, and of its slope: a token that the reference finds impossible must not outweigh the rest.
const MOST: f64 = 10.0;
/// The largest absolute exponent.
const MOST_EXPONENT: f64 = 20.0;

impl KlEstimator {
    /// Nats per token, [B, R], within ±10. So is its derivative by `logprobs`, which does not end where the value does: what
    /// is far from the reference must be drawn back all the same.
    pub fn estimate(self, logprobs: &Tensor, reference: &Tensor) -> Tensor {
        let d = logprobs.detach() - reference;
        let odds = (-&d).clamp(-MOST_EXPONENT, MOST_EXPONENT).exp();
        let (k2, k3) = (|| &d * &d * 0.5, || &odds - 1.0 + &d);
        let (value, slope) = match self {
            KlEstimator::K1 => (d.shallow_clone(), d.ones_like()),
            KlEstimator::K2 => (k2(), d.shallow_clone()),
            KlEstimator::K3 => (k3(), 1.0 - &odds),
            KlEstimator::K3Plus => (k3(), d.shallow_clone()),
        };
        let [value, slope] = [value, slope].map(|t| t.clamp(-MOST, MOST));
        value + slope * (logprobs - logprobs.detach())
    }
}

/// The weight of the KL penalty.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KlController {
    Fixed {
        coef: f64,
    },
    /// Follows a target in nats a response: `coef *= 1 + clip(kl / target - 1, ±0.2) * responses / horizon`.
    Adaptive {
        coef: f64,
        target: f64,
        horizon: f64,
    },
}

impl KlController {
    pub fn coef(&self) -> f64 {
        match self {
            KlController::Fixed { coef } | KlController::Adaptive { coef, .. } => *coef,
        }
    }

    /// Takes note of an iteration of `responses` with a mean `kl` in nats a response (the sum over its tokens).
    pub fn update(&mut self, kl: f64, responses: f64) {
        if let KlController::Adaptive { coef, target, horizon } = self {
            let error = (kl / *target - 1.0).clamp(-0.2, 0.2);
            *coef *= 1.0 + error * responses / *horizon;
        }
    }
}
