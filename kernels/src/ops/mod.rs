//! The operations of a Llama's forward and backward that libtorch has no fused form for.
//!
//! Shapes: N rows (tokens), C channels, F = intermediate size, V vocabulary, D head dimension. Activations and
//! weights are float32, bfloat16 or float64 (T); statistics, gradients of weights and log-probabilities are in the
//! accumulator type A: float64 for float64, else float32. On the CPU they run as one pass over memory
//! (`cpp/ops/cpu_rows.cpp`), on CUDA as kernels compiled at run time ([`gpu`]), in float64 on CUDA as compositions of
//! libtorch's operations ([`composed`]), which are also the oracles in the tests. The same input gives the same
//! bits.

pub mod composed;
mod dispatch;
pub(crate) mod flash;
pub mod gpu;
mod products;

pub use crate::tensors::{AdamW, Heads, accumulator};
pub use dispatch::*;
pub use products::*;
