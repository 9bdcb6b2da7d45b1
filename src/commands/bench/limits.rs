//! Rates of this machine, measured in the same process: matrix products and memory.

use std::time::Instant;

use kernels::cuda;
use kernels::ops::Float8;
use tch::{Device, Kind, Tensor};

use super::median;
use crate::config::shape::Shape;
use crate::error::Result;

/// Waits until a device has done all that it was given.
fn settle(device: Device) -> Result<()> {
    match device {
        Device::Cuda(index) => Ok(cuda::load()?.synchronize(index)?),
        _ => Ok(()),
    }
}

/// Median seconds of some repetitions, after one that is not measured.
fn seconds<T>(device: Device, repetitions: usize, work: impl Fn() -> Result<T>) -> Result<f64> {
    drop(work()?);
    settle(device)?;
    let mut times = Vec::with_capacity(repetitions);
    for _ in 0..repetitions {
        let begun = Instant::now();
        drop(work()?);
        settle(device)?;
        times.push(begun.elapsed().as_secs_f64());
    }
    Ok(median(&mut times))
}

/// The rate of the products of a step, forward shape of gate and up, in floating-point operations a second.
/// `float8`: in 8-bit floats, where a step would take it so.
pub fn matmul_flops_per_s(
    rows: i64,
    s: &Shape,
    kind: Kind,
    float8: Option<Float8>,
    device: Device,
) -> Result<f64> {
    let random = |rows| Tensor::randn([rows, s.hidden_size], (Kind::Float, device)).to_kind(kind);
    let (x, w) = (random(rows), random(2 * s.intermediate_size));
    let flops = 2.0 * rows as f64 * (s.hidden_size * 2 * s.intermediate_size) as f64;
    let product = || match float8.filter(|f| f.takes(&x, &w)) {
        Some(float8) => Ok(float8.linear(&x, &w)?),
        None => Ok(x.f_mm(&w.tr())?),
    };
    Ok(flops / seconds(device, 15, product)?)
}

/// The rate at which a large copy reads and writes memory, in bytes a second.
pub fn memory_bytes_per_s(device: Device) -> Result<f64> {
    // Far beyond caches.
    let bytes = if device == Device::Cpu { 256 << 20 } else { 2 << 30 };
    let from = Tensor::zeros([bytes], (Kind::Uint8, device));
    let to = from.zeros_like();
    Ok(2.0 * bytes as f64 / seconds(device, 7, || Ok(to.shallow_clone().f_copy_(&from)?))?)
}
