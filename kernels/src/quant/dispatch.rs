//! Quantization, on what its tensors lie on.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::dynamic::{Table, on};
use super::types::{Moment, Quantized, Scales, Scheme};
use super::{composed, gpu};
use crate::abi::*;
use crate::error::{Error, Result, check};
use crate::tensors::{AdamW, raw, raw_opt};

impl Quantized {
    /// Some rows and columns of the weight in float32, bfloat16 or float64: T `[rows, columns]`.
    pub fn dequantize(&self, rows: Range<i64>, columns: Range<i64>, kind: Kind) -> Result<Tensor> {
        let size = [(rows.end - rows.start).max(0), (columns.end - columns.start).max(0)];
        let out = Tensor::empty(size, (kind, self.device()));
        self.dequantize_into(&out, rows.start, columns.start)?;
        Ok(out)
    }

    /// Writes the weight's values from `row` and `column` on to `out`: T `[rows, columns]`.
    pub fn dequantize_into(&self, out: &Tensor, row: i64, column: i64) -> Result<()> {
        match (out.device(), out.kind()) {
            (Device::Cpu, _) => {}
            (Device::Cuda(_), Kind::Float | Kind::BFloat16) => {
                return gpu::dequantize(self, out, row, column);
            }
            _ => return composed::dequantize_into(self, out, row, column),
        }
        let [height, width] = self.shape;
        let map = on(Device::Cpu, Table::Signed);
        let (codes, absmax, offset) = match &self.scales {
            Scales::Absmax(absmax) => (None, absmax, None),
            Scales::Double { codes, absmax, offset } => (Some(codes), absmax, Some(offset)),
        };
        // SAFETY: the C++ side checks device, contiguity, dtype and size of every tensor; out is written in place.
        check(unsafe {
            if self.scheme == Scheme::Int8 {
                corral_int8_dequantize(raw(&self.data), raw(absmax), height, width, row, column, raw(out))
            } else {
                let map = codes.map(|_| &map);
                corral_nf4_dequantize(
                    raw(&self.data),
                    raw(absmax),
                    raw_opt(codes),
                    raw_opt(map),
                    raw_opt(offset),
                    height,
                    width,
                    row,
                    column,
                    raw(out),
                )
            }
        })
    }
}

pub(crate) fn nf4_quantize(x: &Tensor, packed: &Tensor, absmax: &Tensor) -> Result<()> {
    match x.device() {
        // SAFETY: as in dequantize_into.
        Device::Cpu => check(unsafe { corral_nf4_quantize(raw(x), raw(packed), raw(absmax)) }),
        Device::Cuda(_) => gpu::nf4_quantize(x, packed, absmax),
        _ => composed::nf4_quantize(x, packed, absmax),
    }
}

pub(crate) fn int8_quantize(x: &Tensor, q: &Tensor, absmax: &Tensor) -> Result<()> {
    match x.device() {
        // SAFETY: as in dequantize_into.
        Device::Cpu => check(unsafe { corral_int8_quantize(raw(x), raw(q), raw(absmax)) }),
        Device::Cuda(_) => gpu::int8_quantize(x, q, absmax),
        _ => composed::int8_quantize(x, q, absmax),
    }
}

/// Updates p (A `[n]`), m and v in place with the gradient g (A `[n]`); `copy` (bfloat16 `[n]`) receives the new values.
/// Weight decay works on the first `decayed` values.
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
    match (p.device(), p.kind()) {
        (Device::Cpu, _) => {}
        (Device::Cuda(_), Kind::Float) => return gpu::adamw8(p, g, m, v, copy, decayed, o),
        _ => return composed::adamw8(p, g, m, v, copy, decayed, o),
    }
    let [correction1, correction2] = o.corrections();
    // SAFETY: the C++ side checks device, contiguity, dtype and size of every tensor; p, m, v and copy are written in place.
    check(unsafe {
        corral_adamw8(
            raw(p),
            raw(g),
            raw(&m.codes),
            raw(&m.absmax),
            raw(&on(Device::Cpu, Table::Signed)),
            raw(&on(Device::Cpu, Table::SignedMidpoints)),
            raw(&v.codes),
            raw(&v.absmax),
            raw(&on(Device::Cpu, Table::Unsigned)),
            raw(&on(Device::Cpu, Table::UnsignedMidpoints)),
            raw_opt(copy),
            decayed,
            o.lr,
            o.beta1,
            o.beta2,
            o.eps,
            o.weight_decay,
            correction1,
            correction2,
            o.grad_scale,
        )
    })
}
