//! Quantization as a trait, which the CPU's kernels, CUDA's, and libtorch's operations implement.

use tch::Tensor;

use super::types::{Moment, Quantized};
use crate::error::Result;
use crate::tensors::AdamW;

/// Values to codes and back. All tensors lie on one device; the results are written to tensors of the caller's.
///
/// Errors: what does not fit, or has no kernel, is refused.
pub trait QuantOps {
    /// Codes (uint8 `[n / 2]`, rounded up) and scales (float32 `[n / 64]`, rounded up) of x: float32 `[n]`, on CUDA bfloat16 as
    /// well.
    fn nf4_quantize(&self, x: &Tensor, packed: &Tensor, absmax: &Tensor) -> Result<()>;

    /// Codes (int8 `[n, c]`) and scales (float32 `[n]`) of x: float32 `[n, c]`, on CUDA bfloat16 as well.
    fn int8_quantize(&self, x: &Tensor, q: &Tensor, absmax: &Tensor) -> Result<()>;

    /// [`Quantized::dequantize_into`].
    fn dequantize(&self, w: &Quantized, out: &Tensor, row: i64, column: i64) -> Result<()>;

    /// [`adamw8`](super::moments::adamw8) with the first and the second of the moments.
    fn adamw8(
        &self,
        p: &Tensor,
        g: &Tensor,
        moments: [&Moment; 2],
        copy: Option<&Tensor>,
        decayed: i64,
        o: AdamW,
    ) -> Result<()>;
}
