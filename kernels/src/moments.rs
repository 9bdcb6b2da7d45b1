//! AdamW with its moments in 8 bits (Dettmers et al. 2022): blocks of 256 values, each divided by its block's largest
//! absolute value and rounded to the nearest code of bitsandbytes' dynamic map, signed for the first moment, unsigned for
//! the second. An update dequantizes a block, computes in float32, and quantizes it again.
//!
//! As bitsandbytes' kernels do it, but for what is rounded to 0: a second moment that is positive keeps the smallest
//! positive code. With 0 the step of its parameter would be the first moment divided by eps.

use tch::{Device, Kind, Tensor};

use crate::abi::corral_adamw8;
use crate::composed_quant::{self as composed, Table, on};
use crate::error::{Error, Result, check};
use crate::gpu_quant as gpu;
use crate::ops::{AdamW, raw, raw_opt};
use crate::quant::{CODE_BLOCK, blocks};

/// A moment of n values.
#[derive(Debug)]
pub struct Moment {
    /// uint8 `[n]`
    pub codes: Tensor,
    /// float32 `[n / 256]`, rounded up.
    pub absmax: Tensor,
}

impl Moment {
    /// Bytes of a moment of n values.
    pub fn bytes(n: i64) -> i64 {
        n + 4 * blocks(n, CODE_BLOCK)
    }

    pub fn zeros(n: i64, device: Device) -> Moment {
        Moment {
            codes: Tensor::zeros([n], (Kind::Uint8, device)),
            absmax: Tensor::zeros([blocks(n, CODE_BLOCK)], (Kind::Float, device)),
        }
    }

    /// The values, float32 `[n]`; `signed` for a first moment.
    pub fn values(&self, signed: bool) -> Tensor {
        composed::dequantize_blocks(&self.codes, &self.absmax, signed)
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
    let correction = |beta: f64| 1.0 - beta.powi(o.step as i32);
    let table = |t| on(Device::Cpu, t);
    // SAFETY: the C++ side checks device, contiguity, dtype and size of every tensor; p, m, v and copy are written in place.
    check(unsafe {
        corral_adamw8(
            raw(p),
            raw(g),
            raw(&m.codes),
            raw(&m.absmax),
            raw(&table(Table::Signed)),
            raw(&table(Table::SignedMidpoints)),
            raw(&v.codes),
            raw(&v.absmax),
            raw(&table(Table::Unsigned)),
            raw(&table(Table::UnsignedMidpoints)),
            raw_opt(copy),
            decayed,
            o.lr,
            o.beta1,
            o.beta2,
            o.eps,
            o.weight_decay,
            correction(o.beta1),
            correction(o.beta2),
            o.grad_scale,
        )
    })
}
