//! Choices that the policy-gradient algorithms share.

use serde::{Deserialize, Serialize};

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
