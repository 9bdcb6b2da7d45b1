//! What must hold before anything was learned. Where it does not, training and sampling disagree, and everything after
//! would be wrong without a sign of it.

use tch::Kind;

use crate::error::{Error, Result};
use crate::info;

/// How far from 1 the ratios of the first minibatch may be (mean over its tokens), and how far from 0 log-probabilities of
/// equal models (nats a token). Rows of the same number and width go through the same products; others are summed in
/// another order.
fn tolerance(compute: Kind, same_rows: bool) -> f64 {
    match (compute, same_rows) {
        (Kind::Double, _) => 1e-9,
        (Kind::Float, true) => 1e-5,
        (Kind::Float, false) => 1e-4,
        (_, true) => 1e-2,
        (_, false) => 5e-2,
    }
}

/// `distance`: the mean distance of the first minibatch's ratios from 1.
pub fn ratios_are_one(distance: f64, compute: Kind, same_rows: bool) -> Result<()> {
    let allowed = tolerance(compute, same_rows);
    if distance <= allowed {
        info!("self-check: ratios are 1 before the first update, mean distance {distance:.1e}");
        return Ok(());
    }
    Err(Error::failed(format!(
        "self-check: before the first update the ratios of new to old probabilities must be 1; they are {distance:.2e} away \
         (allowed in {compute:?}: {allowed:.0e}). The old log-probabilities were not computed as the training computes them; \
         ppo.self_check=false goes on all the same"
    )))
}

/// `distance`: the mean distance of the actor's log-probabilities from the reference's, which has the same weights.
pub fn kl_is_zero(distance: f64, compute: Kind) -> Result<()> {
    let allowed = tolerance(compute, true);
    if distance <= allowed {
        info!("self-check: actor and reference begin alike, mean distance {distance:.1e}");
        return Ok(());
    }
    Err(Error::failed(format!(
        "self-check: actor and reference begin with the same weights, but their log-probabilities differ by {distance:.2e} \
         nats a token (allowed in {compute:?}: {allowed:.0e}); ppo.self_check=false goes on all the same"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_far_away_ends_the_run() {
        for (compute, same_rows, allowed) in [
            (Kind::Double, true, 1e-9),
            (Kind::Float, true, 1e-5),
            (Kind::Float, false, 1e-4),
            (Kind::BFloat16, true, 1e-2),
            (Kind::BFloat16, false, 5e-2),
        ] {
            ratios_are_one(allowed * 0.9, compute, same_rows).unwrap();
            for distance in [allowed * 1.1, f64::NAN] {
                let e = ratios_are_one(distance, compute, same_rows).unwrap_err();
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
