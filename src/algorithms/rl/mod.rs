//! The mathematics of policy gradients: plain functions of small tensors `[B, R]` (B responses of at most R tokens) and
//! their masks (1 = a token of the response, in the dtype of the values), which libtorch's autograd can differentiate.
//!
//! Losses are sums: every token has a weight ([`Aggregation::weights`]) that is made of counts over all ranks and
//! micro-batches of the update, so that the same data gives the same update however it is divided.

pub mod advantages;
pub mod checks;
pub mod experience;
pub mod grpo;
pub mod kl;
pub mod losses;
pub mod place;
pub mod policy;
pub mod reward_model;
pub mod sampling;

#[cfg(test)]
mod tests;

pub use advantages::{Moments, gae, token_rewards, whiten};
pub use kl::{KlController, KlEstimator};
pub use losses::{Aggregation, Clip, Counts, PolicySums};
