//! Weights of linear layers in 4 or 8 bits, and products with them.
//!
//! - `Nf4` (Dettmers et al. 2023): blocks of 64 values of the flattened weight, each divided by its largest absolute value
//!   and rounded to the nearest of 16 values; two to a byte, the first in the high half.
//! - `Nf4Double`: the same, and the blocks' largest values in 8 bits themselves ("double quantization"): their mean is
//!   taken off, then blocks of 256 are coded by [`quantize_dynamic`]. 0.516 bytes a value.
//! - `Int8`: q = round_half_even(w / (absmax / 127)) by row. 1 byte a value and 4 a row.
//!
//! All bits are those of bitsandbytes 0.50.2 on the CPU. Values are computed in float32 and rounded to the dtype asked for.
//! What codes and decodes is the trait [`QuantOps`], implemented by [`Cpu`](crate::ops::Cpu) in C++ (`cpp/quant`), by
//! [`Gpu`](crate::ops::Gpu) in kernels compiled at run time, and else by [`Composed`](crate::ops::Composed) in libtorch's
//! operations, the oracle in the tests.

mod coding;
mod composed;
mod cpu;
mod dispatch;
mod dynamic;
mod gpu;
pub mod moments;
mod products;
mod quantizer;
mod types;

pub use coding::QuantOps;
pub use dynamic::{CODE_BLOCK, dequantize_dynamic, dynamic_map, quantize_dynamic};
pub use products::{backward_panel, forward_panel, linear, linear_backward};
pub use quantizer::Quantizer;
pub use types::{NF4, NF4_BLOCK, Quantized, Scales, Scheme};
