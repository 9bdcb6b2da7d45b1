//! The mathematics of the algorithms: losses, advantages, KL, comparisons of ranked completions. Plain functions of small
//! tensors, which libtorch's autograd differentiates; no model, no data, no file.
//!
//! Those of policies take `[B, R]` (B responses of at most R tokens) and their masks (1 = a token of the response, in the dtype
//! of the values). Their losses are sums: every token has a weight ([`policy::Aggregation::weights`]) that is made of counts
//! over all ranks and micro-batches of the update, so that the same data gives the same update however it is divided.

pub(crate) mod advantages;
pub(crate) mod grpo;
pub(crate) mod kl;
pub(crate) mod policy;
pub mod preference;
pub mod ranking;
mod sums;
pub mod unpaired;

#[cfg(test)]
mod tests;

pub(crate) use advantages::{MaskedMoments, gae, token_rewards, whiten};
pub(crate) use kl::KlController;
pub(crate) use policy::{Clip, ClipCounts, PolicySums};
pub(crate) use sums::{read_scalars, sums_of};
