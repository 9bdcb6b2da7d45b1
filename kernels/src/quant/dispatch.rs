//! Quantization, on what its tensors lie on.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::coding::QuantOps;
use super::types::{Moment, Quantized};
use crate::cuda::takes_gpu_path;
use crate::error::{Error, Result};
use crate::ops::{Composed, Cpu, Gpu};
use crate::tensors::AdamW;

impl Quantized {
    /// Some rows and columns of the weight in float32, bfloat16 or float64: T `[rows, columns]`. An error where they do
    /// not lie in the weight.
    pub fn dequantize(&self, rows: Range<i64>, columns: Range<i64>, kind: Kind) -> Result<Tensor> {
        let size = [(rows.end - rows.start).max(0), (columns.end - columns.start).max(0)];
        let out = Tensor::empty(size, (kind, self.device()));
        self.dequantize_into(&out, rows.start, columns.start)?;
        Ok(out)
    }

    /// Writes the weight's values from `row` and `column` on to `out`: T `[rows, columns]`, which must lie in the weight.
    pub fn dequantize_into(&self, out: &Tensor, row: i64, column: i64) -> Result<()> {
        quant_ops(out.device(), matches!(out.kind(), Kind::Float | Kind::BFloat16))
            .dequantize(self, out, row, column)
    }
}

/// The implementation for a device; `kernels`: CUDA has kernels for the dtype.
fn quant_ops(device: Device, kernels: bool) -> &'static dyn QuantOps {
    match takes_gpu_path(device) {
        true if kernels => &Gpu,
        false if device == Device::Cpu => &Cpu,
        _ => &Composed,
    }
}

/// Codes and scales of x, as [`QuantOps::nf4_quantize`]; the caller has chosen a dtype that its device's kernels read.
pub(crate) fn nf4_quantize(x: &Tensor, packed: &Tensor, absmax: &Tensor) -> Result<()> {
    quant_ops(x.device(), true).nf4_quantize(x, packed, absmax)
}

/// Codes and scales of x, as [`QuantOps::int8_quantize`]; as for [`nf4_quantize`].
pub(crate) fn int8_quantize(x: &Tensor, q: &Tensor, absmax: &Tensor) -> Result<()> {
    quant_ops(x.device(), true).int8_quantize(x, q, absmax)
}

/// Updates p (A `[n]`), m and v in place with the gradient g (A `[n]`); `copy` (bfloat16 `[n]`) receives the new values.
/// Weight decay works on the first `decayed` values. A tensor that does not fit is an error, and so are more decayed values
/// than there are.
pub fn adamw8(
    p: &Tensor,
    g: &Tensor,
    m: &Moment,
    v: &Moment,
    copy: Option<&Tensor>,
    decayed: i64,
    o: AdamW,
) -> Result<()> {
    if !(0..=p.numel() as i64).contains(&decayed) {
        return Err(Error::new(format!("adamw8: {decayed} of {} values cannot decay", p.numel())));
    }
    quant_ops(p.device(), p.kind() == Kind::Float).adamw8(p, g, [m, v], copy, decayed, o)
}
