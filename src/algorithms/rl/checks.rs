//! What must hold before anything was learned. Where it does not, training and sampling disagree, and everything after
//! would be wrong without a sign of it.

use tch::Kind;

use crate::error::{Error, Result};
use crate::{info, warn};

/// How far from 1 the ratios of the first minibatch may be (mean over its tokens), and how far from 0 log-probabilities of
/// equal models (nats a token). Rows of the same number and width go through the same products; others are summed in
/// another order, and in 8-bit floats (`float8`) have other scales.
fn tolerance(compute: Kind, float8: bool, same_rows: bool) -> f64 {
    match (compute, same_rows) {
        (_, false) if float8 => 2e-1,
        (Kind::Double, _) => 1e-9,
        (Kind::Float, true) => 1e-5,
        (Kind::Float, false) => 1e-4,
        (_, true) => 1e-2,
        (_, false) => 5e-2,
    }
}

/// `distance`: the mean distance of the first minibatch's ratios from 1.
pub fn ratios_are_one(distance: f64, compute: Kind, float8: bool, same_rows: bool) -> Result<()> {
    let allowed = tolerance(compute, float8, same_rows);
    if distance <= allowed {
        info!("self-check: ratios are 1 before the first update, mean distance {distance:.1e}");
        return Ok(());
    }
    Err(Error::failed(format!(
        "self-check: before the first update the ratios of new to old probabilities must be 1; they are {distance:.2e} away \
         (allowed in {compute:?}: {allowed:.0e}). The old log-probabilities were not computed as the training computes them; \
         ppo.self_check=false continues anyway"
    )))
}

/// `distance`: the mean distance of the actor's log-probabilities from the reference's, which has the same weights.
pub fn kl_is_zero(distance: f64, compute: Kind) -> Result<()> {
    let allowed = tolerance(compute, false, true);
    if distance <= allowed {
        info!("self-check: actor and reference begin alike, mean distance {distance:.1e}");
        return Ok(());
    }
    Err(Error::failed(format!(
        "self-check: actor and reference begin with the same weights, but their log-probabilities differ by {distance:.2e} \
         nats a token (allowed in {compute:?}: {allowed:.0e}); ppo.self_check=false continues anyway"
    )))
}

/// Watches a critic that learns nothing: its values are wrong, and no gradient reaches what would correct them.
#[derive(Debug, Default)]
pub struct Stalled {
    steps: u64,
}

impl Stalled {
    /// # Errors
    /// At the second step in a row whose gradient was 0 although the value loss was not.
    pub fn check(&mut self, explained_variance: f64, value_loss: f64, grad_norm: f64) -> Result<()> {
        // Constant values explain nothing; NaN: the returns do not vary.
        let explains = explained_variance.abs() > 1e-6;
        self.steps = if value_loss > 0.0 && grad_norm == 0.0 && !explains { self.steps + 1 } else { 0 };
        if self.steps < 2 {
            return Ok(());
        }
        Err(Error::failed(format!(
            "critic: it has learned nothing in {} steps: value_loss is {value_loss}, its gradient is 0 and explained_variance \
             stays 0. No gradient reaches the parameters that are trained: check critic.path (are its weights 0?), \
             critic.freeze and critic.lora",
            self.steps
        )))
    }
}

/// Warns once a run of responses whose rewards are all equal.
#[derive(Debug, Default)]
pub struct EqualRewards {
    warned: bool,
}

impl EqualRewards {
    /// `rewards`: of the responses of a step (counted from 1) that could be scored.
    pub fn check(&mut self, rewards: &[f64], step: u64, rank: i64) {
        let Some((first, rest)) = rewards.split_first() else { return };
        if self.warned || rest.is_empty() || rest.iter().any(|r| r != first) {
            return;
        }
        self.warned = true;
        if rank == 0 {
            warn!(
                "step {step}: all {} rewards are {first}: nothing tells good responses from bad ones, and the policy cannot \
                 learn from them; check the rewards or the reward model (reported once)",
                rewards.len()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_critic_without_a_gradient_ends_the_run_at_the_second_step() {
        let mut stalled = Stalled::default();
        stalled.check(0.0, 0.3, 0.0).unwrap();
        let e = stalled.check(f64::NAN, 0.3, 0.0).unwrap_err();
        assert!(e.message.contains("value_loss is 0.3") && e.exit_code() == 1, "{e}");
        // Right values have no gradient; and one step of them begins the count anew.
        for (explained, loss, grad) in
            [(0.0, 0.0, 0.0), (f64::NAN, 0.0, 0.0), (0.0, 0.3, 1e-9), (0.5, 0.3, 0.0)]
        {
            let mut stalled = Stalled::default();
            for _ in 0..3 {
                stalled.check(explained, loss, grad).unwrap();
            }
            stalled.check(0.0, 0.3, 0.0).unwrap();
            stalled.check(explained, loss, grad).unwrap();
            stalled.check(0.0, 0.3, 0.0).unwrap();
        }
    }

    #[test]
    fn equal_rewards_are_told_once() {
        let warned = |all: &[&[f64]]| {
            let mut equal = EqualRewards::default();
            all.iter().for_each(|rewards| equal.check(rewards, 1, 1));
            equal.warned
        };
        assert!(warned(&[&[1.0, 2.0], &[0.0, 0.0]]));
        assert!(!warned(&[&[], &[1.0], &[1.0, 1.0, 2.0]]));
    }

    #[test]
    fn what_is_too_far_away_ends_the_run() {
        for (compute, float8, same_rows, allowed) in [
            (Kind::Double, false, true, 1e-9),
            (Kind::Float, false, true, 1e-5),
            (Kind::Float, false, false, 1e-4),
            (Kind::BFloat16, false, true, 1e-2),
            (Kind::BFloat16, false, false, 5e-2),
            (Kind::BFloat16, true, false, 2e-1),
        ] {
            ratios_are_one(allowed * 0.9, compute, float8, same_rows).unwrap();
            for distance in [allowed * 1.1, f64::NAN] {
                let e = ratios_are_one(distance, compute, float8, same_rows).unwrap_err();
                assert!(e.message.contains("must be 1") && e.exit_code() == 1, "{e}");
            }
        }
        kl_is_zero(0.0, Kind::Float).unwrap();
        for distance in [1e-4, f64::NAN] {
            let e = kl_is_zero(distance, Kind::Float).unwrap_err();
            assert!(e.message.contains("the same weights") && e.message.contains("ppo.self_check"), "{e}");
        }
    }
}
