//! The configuration of `corral reward`.

use serde::{Deserialize, Serialize};

/// What is learned from ranked completions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// Of every two that differ, the better has the higher score.
    #[default]
    Pairs,
    /// The best has the highest score.
    Best,
    /// The scores are in the order of the ranking.
    Order,
}

/// What of the tokens' values is the score of a completion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Score {
    /// The value of the last token: what transformers reads.
    #[default]
    Last,
    /// The sum over the completion's tokens.
    Sum,
    /// The mean over the completion's tokens.
    Mean,
}
