//! Initial weights: normal with the shape's `initializer_range`, norms 1, as transformers does.
//!
//! Every number depends only on the seed, the tensor's name and its place in the tensor, so that any slice can be made
//! by itself and the weights do not depend on the world size.

use rayon::prelude::*;
use tch::{Kind, Tensor};

use crate::config::shape::Shape;
use crate::distributed::sharded::Sharded;
use crate::error::Result;

/// Fills the slices of this rank with initial weights.
pub fn init(params: &mut Sharded, shape: &Shape, seed: u64) -> Result<()> {
    params.fill(|spec, first, values| {
        let mut values = values.shallow_clone();
        if spec.shape.len() == 1 {
            let _ = values.fill_(1.0);
            return Ok(());
        }
        let key = spec.name.bytes().fold(mix(seed), |k, b| mix(k ^ u64::from(b)));
        let n = values.size()[0] as usize;
        let std = shape.initializer_range;
        let mut numbers = vec![0f32; n];
        const RUN: usize = 1 << 14;
        numbers.par_chunks_mut(RUN).enumerate().for_each(|(run, out)| {
            for (j, x) in out.iter_mut().enumerate() {
                *x = (normal(key, first as u64 + (run * RUN + j) as u64) * std) as f32;
            }
        });
        values.copy_(&Tensor::from_slice(&numbers).to_kind(Kind::Float));
        Ok(())
    })
}

/// SplitMix64's finalizer (Steele et al. 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The `i`-th standard normal number of a stream, by Box and Muller (1958): even and odd numbers share a pair.
fn normal(key: u64, i: u64) -> f64 {
    let bits = mix(key ^ mix(i / 2));
    let u = ((bits >> 32) as f64 + 0.5) / 4_294_967_296.0;
    let angle = std::f64::consts::TAU * ((bits & 0xffff_ffff) as f64 + 0.5) / 4_294_967_296.0;
    let radius = (-2.0 * u.ln()).sqrt();
    radius * if i % 2 == 0 { angle.cos() } else { angle.sin() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_standard_normal() {
        let n = 200_000;
        let x: Vec<f64> = (0..n).map(|i| normal(7, i)).collect();
        let moment = |p: i32| x.iter().map(|v| v.powi(p)).sum::<f64>() / n as f64;
        // Standard errors at this n: 0.0022, 0.0032, 0.022.
        assert!(moment(1).abs() < 0.01, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.015, "{}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.1, "{}", moment(4));
        let neighbours = x.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / n as f64;
        assert!(neighbours.abs() < 0.01, "{neighbours}");
    }
}
