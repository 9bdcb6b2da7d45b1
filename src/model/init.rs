//! Initial weights: normal with the shape's `initializer_range`, norms such that they multiply by 1, biases 0, as transformers does; scalar heads are
//! set apart.
//!
//! Every number depends only on the seed, the tensor's name and its place in the tensor, so that any slice can be made
//! by itself and the weights do not depend on the world size.

use kernels::ops;
use tch::{Device, Kind, Tensor};

use crate::config::shape::Shape;
use crate::distributed::sharded::Sharded;
use crate::error::Result;
use crate::model::layout::SCORE;
use crate::random::hash;

/// The standard deviation of a new scalar head in a reward model: 1 / sqrt(C + 1) (Ziegler et al. 2019).
pub fn score_std(shape: &Shape) -> f64 {
    1.0 / (shape.hidden_size as f64 + 1.0).sqrt()
}

/// Fills this rank's slice of the scalar head, if the model has one: normal with standard deviation `std`; 0 for 0.
pub fn init_score(params: &mut Sharded, std: f64, seed: u64) -> Result<()> {
    params.fill_where(|spec| spec.name == SCORE, true, &mut |spec, first, values| {
        fill_normal(values, key_of(seed, &spec.name), first, std)
    })
}

/// Multiplies the scalar head's values by `gain`.
pub fn scale_score(params: &mut Sharded, gain: f64) -> Result<()> {
    params.fill_where(|spec| spec.name == SCORE, true, &mut |_, _, values| {
        let _ = values.shallow_clone().g_mul_scalar_(gain);
        Ok(())
    })
}

/// Fills `values` with elements `first..` of a tensor of normal numbers.
fn fill_normal(values: &Tensor, key: u64, first: i64, std: f64) -> Result<()> {
    let mut values = values.shallow_clone();
    let in_place = values.kind() == Kind::Float && values.device() == Device::Cpu;
    let numbers = match in_place {
        true => values.shallow_clone(),
        false => Tensor::empty(values.size(), (Kind::Float, Device::Cpu)),
    };
    ops::fill_normal(&numbers, key, first as u64, std)?;
    if !in_place {
        values.copy_(&numbers);
    }
    Ok(())
}

/// Fills the slices of this rank with initial weights.
pub fn init(params: &mut Sharded, shape: &Shape, seed: u64) -> Result<()> {
    params.fill(|spec, first, values| {
        if spec.shape.len() == 1 {
            let one = 1.0 - shape.norm_offset();
            let _ = values.shallow_clone().fill_(if spec.name.ends_with(".bias") { 0.0 } else { one });
            return Ok(());
        }
        fill_normal(values, key_of(seed, &spec.name), first, shape.initializer_range)
    })
}

/// Fills the slices of this rank's adapters as PEFT does: A uniform in +-1/sqrt(I) (Kaiming's with a = sqrt 5), B 0, so that
/// nothing changes at first.
pub fn init_adapters(params: &mut Sharded, seed: u64) -> Result<()> {
    params.fill_adapters(|spec, first, values| {
        if spec.name.ends_with("lora_B.weight") {
            let _ = values.shallow_clone().zero_();
            return Ok(());
        }
        let key = key_of(seed, &spec.name);
        let bound = 1.0 / (spec.shape[1] as f64).sqrt();
        let uniform = |i: u64| (hash(key ^ hash(i)) >> 11) as f64 / (1u64 << 53) as f64;
        let places = first as u64..first as u64 + values.numel() as u64;
        let numbers: Vec<f64> = places.map(|i| (2.0 * uniform(i) - 1.0) * bound).collect();
        values.shallow_clone().copy_(&Tensor::from_slice(&numbers));
        Ok(())
    })
}

fn key_of(seed: u64, name: &str) -> u64 {
    name.bytes().fold(hash(seed), |k, b| hash(k ^ u64::from(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers 2 i and 2 i + 1 of a stream of standard normal numbers (Box and Muller 1958).
    fn normal_pair(key: u64, i: u64) -> [f64; 2] {
        let bits = hash(key ^ hash(i));
        let u = ((bits >> 32) as f64 + 0.5) / 4_294_967_296.0;
        let angle = std::f64::consts::TAU * ((bits & 0xffff_ffff) as f64 + 0.5) / 4_294_967_296.0;
        let radius = (-2.0 * u.ln()).sqrt();
        let (sin, cos) = angle.sin_cos();
        [radius * cos, radius * sin]
    }

    fn numbers(key: u64, first: u64, n: i64) -> Vec<f64> {
        let out = Tensor::empty([n], (Kind::Float, Device::Cpu));
        ops::fill_normal(&out, key, first, 1.0).unwrap();
        Vec::<f64>::try_from(out.to_kind(Kind::Double)).unwrap()
    }

    /// Every number is the formula's, rounded to float32; the last bit may differ where it lies between two.
    #[test]
    fn numbers_are_those_of_the_formula() {
        let mut differ = 0;
        for (key, first) in [(7, 0), (7, 3), (u64::MAX, 1 << 40)] {
            for (i, x) in (first..).zip(numbers(key, first, 200_001)) {
                let exact = normal_pair(key, i / 2)[(i % 2) as usize];
                let error = (x - exact).abs();
                assert!(error <= exact.abs() * 6e-8 + 1e-14, "{i} of {key}: {x}, {exact}");
                differ += i32::from(x != f64::from(exact as f32));
            }
        }
        assert!(differ <= 3, "{differ}");
    }

    #[test]
    fn numbers_are_standard_normal() {
        let n = 200_000;
        let x = numbers(7, 0, n);
        let moment = |p: i32| x.iter().map(|v| v.powi(p)).sum::<f64>() / n as f64;
        // Standard errors at this n: 0.0022, 0.0032, 0.022.
        assert!(moment(1).abs() < 0.01, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.015, "{}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.1, "{}", moment(4));
        let neighbours = x.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / n as f64;
        assert!(neighbours.abs() < 0.01, "{neighbours}");
    }

    /// Slices of any place and length hold the same numbers as the whole.
    #[test]
    fn slices_agree() {
        use crate::distributed::mesh::Sharding;
        use crate::distributed::sharded::Layout;
        let shape = Shape::preset("llama-15m").unwrap();
        let fill = |layout: &Layout| {
            let layouts = vec![layout.clone()];
            let mut params = Sharded::new(layouts, Sharding::solo(), Kind::Float, tch::Device::Cpu);
            init(&mut params, &shape, 3).unwrap();
            params.master(0)
        };
        let whole = fill(&Layout::new("w", vec![("w".into(), vec![37, 1001])]));
        // The same tensor with others before it lies at an odd place of the flat buffer.
        let layout = Layout::new("w", vec![("v".into(), vec![1, 3]), ("w".into(), vec![37, 1001])]);
        assert!(fill(&layout).narrow(0, 3, 37 * 1001).equal(&whole));
        let std = whole.std(true).double_value(&[]);
        assert!((std / shape.initializer_range - 1.0).abs() < 0.02, "{std}");
    }
}
