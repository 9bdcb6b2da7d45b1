//! Rotary positions (Su et al. 2021): the tables of cos and sin that queries and keys are rotated by.

use kernels::ops;
use tch::{Device, Kind, Tensor};

use crate::config::shape::Shape;
use crate::model::llama::Llama;

/// cos and sin of rotary positions: A [P, D / 2] each.
pub(crate) type RopeTables = (Tensor, Tensor);

impl Llama {
    /// Rotary tables for positions below `length`, of blocks without and with a window. Angles are computed in float32, also
    /// where the model computes in bfloat16, as transformers and Meta's programs do: at position 2,000 their rounding moves
    /// log-probabilities by 2e-4, and models have learned with it. In float64 they are exact.
    pub(crate) fn rope_tables(&mut self, length: i64) -> [RopeTables; 2] {
        let copies = |tables: &[RopeTables; 2]| {
            tables.each_ref().map(|(cos, sin)| (cos.shallow_clone(), sin.shallow_clone()))
        };
        if let Some(tables) = self.rope.as_ref().filter(|tables| tables[0].0.size()[0] >= length) {
            return copies(tables);
        }
        let length = (length as u64).next_power_of_two() as i64;
        let all = self.tables_of(&self.shape, length);
        let of_windows = match self.shape.of_windows() {
            Some(shape) => self.tables_of(&shape, length),
            None => (all.0.shallow_clone(), all.1.shallow_clone()),
        };
        copies(self.rope.insert([all, of_windows]))
    }

    fn tables_of(&self, shape: &Shape, length: i64) -> RopeTables {
        let (kind, device) = (ops::accumulator(self.params.compute()), self.params.device());
        let inverse = match kind {
            Kind::Double => Tensor::from_slice(&inverse_frequencies(shape)),
            _ => rounded_inverse_frequencies(shape),
        };
        let angles = Tensor::arange(length, (inverse.kind(), Device::Cpu)).outer(&inverse); // [length, D / 2]
        let table = |t: Tensor| t.to_kind(kind).to_device(device);
        (table(angles.cos()), table(angles.sin()))
    }
}

/// Inverse frequencies of the rotary positions, float64 [D / 2]; with llama3 scaling, wavelengths longer than the
/// original context are stretched by `factor`, with a smooth passage (transformers `modeling_rope_utils.py`).
pub fn inverse_frequencies(s: &Shape) -> Vec<f64> {
    let d = s.head_dim as f64;
    let plain = (0..s.head_dim / 2).map(|i| s.rope_theta.powf(-2.0 * i as f64 / d));
    let linear = s.features.rope_linear_factor.unwrap_or(1.0);
    let plain = plain.map(|f| f / linear);
    let Some(r) = &s.rope_scaling else {
        return plain.collect();
    };
    let original = r.original_max_position_embeddings as f64;
    plain
        .map(|f| {
            let wavelength = std::f64::consts::TAU / f;
            if wavelength < original / r.high_freq_factor {
                f
            } else if wavelength > original / r.low_freq_factor {
                f / r.factor
            } else {
                let smooth =
                    (original / wavelength - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor);
                (1.0 - smooth) * f / r.factor + smooth * f
            }
        })
        .collect()
}

/// [`inverse_frequencies`] computed in float32, step by step as transformers does, so that they are rounded alike.
fn rounded_inverse_frequencies(s: &Shape) -> Tensor {
    let exponents =
        Tensor::arange_start_step(0, s.head_dim, 2, (Kind::Int64, Device::Cpu)).to_kind(Kind::Float);
    let plain = Tensor::pow_scalar(s.rope_theta, &(exponents / s.head_dim as f64)).reciprocal();
    let plain = match s.features.rope_linear_factor {
        Some(factor) => plain / factor,
        None => plain,
    };
    let Some(r) = &s.rope_scaling else { return plain };
    let original = r.original_max_position_embeddings as f64;
    let wavelength = plain.reciprocal() * std::f64::consts::TAU;
    let (longest, shortest) = (original / r.low_freq_factor, original / r.high_freq_factor);
    let slow = (&plain / r.factor).where_self(&wavelength.gt(longest), &plain);
    let smooth: Tensor =
        (wavelength.reciprocal() * original - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor);
    let between: Tensor = (1.0 - &smooth) * &slow / r.factor + &smooth * &slow;
    let is_between = wavelength.ge(shortest).logical_and(&wavelength.le(longest));
    between.where_self(&is_between, &slow)
}
