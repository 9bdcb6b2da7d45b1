//! The operations of a Llama's forward and backward that libtorch has no fused form for.
//!
//! Shapes: N rows (tokens), C channels, F = intermediate size, V vocabulary, D head dimension. Activations and
//! weights are float32, bfloat16 or float64 (T); statistics, gradients of weights and log-probabilities are in the
//! accumulator type A: float64 for float64, else float32. The same input gives the same bits.
//!
//! Row operations are the trait [`RowOps`], of which a function here takes the implementation for its tensors: on the CPU
//! [`Cpu`], one pass over memory in C++ (`cpp/ops`); on CUDA [`Gpu`], kernels compiled at run time; in float64 on CUDA
//! [`Composed`], libtorch's operations, which are also the oracle in the tests.
//!
//! Errors: on the CPU and in CUDA's kernels a tensor of another device, dtype, size or layout than described is refused, with
//! what was expected and what was found.

mod composed;
mod cpu;
mod dispatch;
mod flash;
mod float8;
mod gpu;
mod grouped;
mod products;
mod rows;
mod sample;
mod shared_sequence;
mod spans;
mod upload;

pub use crate::tensors::{AdamW, Gain, Heads, KeysValues, Rotation, accumulator};
pub use composed::{Composed, geglu, geglu_backward};
pub use cpu::Cpu;
pub use dispatch::*;
pub use flash::set_deterministic;
pub use float8::{
    Float8, Float8Weight, Granularity, float8_capability, float8_factors, float8_products, to_float8,
};
pub use gpu::Gpu;
pub use grouped::{GroupedWeights, add_grouped_products};
pub use products::*;
pub use rows::RowOps;
pub use sample::{SampleOptions, SampleRows, sample, samples};
pub use shared_sequence::{OwnPositions, attention_of, attention_of_backward};
pub use spans::Spans;
pub use upload::upload;
