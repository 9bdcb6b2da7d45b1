//! Quantization on the CPU, in C++ (`cpp/quant`).

use tch::{Device, Tensor};

use super::coding::QuantOps;
use super::dynamic::{Table, on};
use super::types::{Moment, Quantized, Scales, Scheme};
use crate::abi::*;
use crate::error::{Result, check};
use crate::ops::Cpu;
use crate::tensors::{AdamW, raw, raw_opt};

impl QuantOps for Cpu {
    fn nf4_quantize(&self, x: &Tensor, packed: &Tensor, absmax: &Tensor) -> Result<()> {
        // SAFETY: the C++ side checks device, contiguity, dtype and size of every tensor; packed and absmax are written in place.
        check(unsafe { corral_nf4_quantize(raw(x), raw(packed), raw(absmax)) })
    }

    fn int8_quantize(&self, x: &Tensor, q: &Tensor, absmax: &Tensor) -> Result<()> {
        // SAFETY: as in nf4_quantize; q and absmax are written in place.
        check(unsafe { corral_int8_quantize(raw(x), raw(q), raw(absmax)) })
    }

    fn dequantize(&self, w: &Quantized, out: &Tensor, row: i64, column: i64) -> Result<()> {
        let [height, width] = w.shape();
        let map = on(Device::Cpu, Table::Signed);
        let (codes, absmax, offset) = match w.scales() {
            Scales::Absmax(absmax) => (None, absmax, None),
            Scales::Double { codes, absmax, offset } => (Some(codes), absmax, Some(offset)),
        };
        // SAFETY: the C++ side checks device, contiguity, dtype and size of every tensor; out is written in place.
        check(unsafe {
            if w.scheme() == Scheme::Int8 {
                corral_int8_dequantize(raw(w.data()), raw(absmax), height, width, row, column, raw(out))
            } else {
                let map = codes.map(|_| &map);
                corral_nf4_dequantize(
                    raw(w.data()),
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

    fn adamw8(
        &self,
        p: &Tensor,
        g: &Tensor,
        [m, v]: [&Moment; 2],
        copy: Option<&Tensor>,
        decayed: i64,
        o: AdamW,
    ) -> Result<()> {
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
}
