//! Distances, in float64 on the CPU whatever the dtypes and devices of the tensors.

use tch::Tensor;

use crate::device::exact;

/// Keeps a relative distance from zeros finite.
const NOTHING: f64 = 1e-300;

/// The largest absolute difference.
pub fn largest(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (exact(a) - exact(b)).abs().max().double_value(&[])
}

/// The distance of a from b relative to b, in 2-norms.
pub fn relative(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (exact(a), exact(b));
    (&a - &b).norm().double_value(&[]) / b.norm().double_value(&[]).max(NOTHING)
}

/// The largest difference, relative to the largest value of b, or to `size` where that is larger: where values cancel,
/// what counts is the size of what cancelled.
pub fn largest_at(a: &Tensor, b: &Tensor, size: f64) -> f64 {
    largest(a, b) / exact(b).abs().max().double_value(&[]).max(size)
}

/// The largest absolute difference of two series of equal length.
pub fn largest_of(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// The largest relative difference of two series of equal length.
pub fn largest_relative(a: &[f64], b: &[f64]) -> f64 {
    largest_relative_at(a, b, NOTHING)
}

/// The largest difference of two series of equal length, each relative to the second's value or to `size` where that is larger.
pub fn largest_relative_at(a: &[f64], b: &[f64], size: f64) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / b.abs().max(size)).fold(0.0, f64::max)
}

/// The distance of a from b relative to b.
pub fn relative_number(a: f64, b: f64) -> f64 {
    largest_relative(&[a], &[b])
}
