//! Row operations on the CPU: one pass over memory each, in C++ (`cpp/ops`).

use std::ptr::null_mut;

use tch::Tensor;

use super::rows::RowOps;
use super::spans::Spans;
use crate::abi::*;
use crate::error::{Result, check};
use crate::tensors::{AdamW, Gain, Heads, KeysValues, Rotation, own, raw, raw_opt};

/// The kernels of the CPU, in float32, bfloat16 and float64. Every tensor's device, dtype, size and contiguity is checked.
#[derive(Debug, Clone, Copy)]
pub struct Cpu;

impl RowOps for Cpu {
    fn rms_norm(&self, x: &Tensor, w: Gain, eps: f64) -> Result<(Tensor, Tensor)> {
        let (mut y, mut rstd) = (null_mut(), null_mut());
        // SAFETY: the C++ side checks device, contiguity, dtype and size of every tensor; outputs are new tensors.
        check(unsafe { corral_rms_norm(raw(x), raw(w.weight), w.offset, eps, &mut y, &mut rstd) })?;
        Ok((own(y), own(rstd)))
    }

    fn rms_apply(&self, x: &Tensor, w: Gain, rstd: &Tensor) -> Result<Tensor> {
        let mut y = null_mut();
        // SAFETY: as in rms_norm.
        check(unsafe { corral_rms_apply(raw(x), raw(w.weight), w.offset, raw(rstd), &mut y) })?;
        Ok(own(y))
    }

    fn rms_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: Gain,
        rstd: &Tensor,
        residual: Option<&Tensor>,
        dw: &Tensor,
    ) -> Result<Tensor> {
        let mut dx = null_mut();
        // SAFETY: as in rms_norm; dw is written in place.
        check(unsafe {
            corral_rms_backward(
                raw(dy),
                raw(x),
                raw(w.weight),
                w.offset,
                raw(rstd),
                raw_opt(residual),
                raw(dw),
                &mut dx,
            )
        })?;
        Ok(own(dx))
    }

    fn rope(&self, x: &Tensor, r: Rotation) -> Result<()> {
        let Rotation { positions, cos, sin, heads, head_dim, inverse } = r;
        // SAFETY: as in rms_norm, and positions are checked against the tables' length; x is written in place.
        check(unsafe { corral_rope(raw(x), raw(positions), raw(cos), raw(sin), heads, head_dim, inverse) })
    }

    fn attention(&self, qkv: &Tensor, spans: &Spans, h: Heads) -> Result<(Tensor, Tensor)> {
        let (mut out, mut lse) = (null_mut(), null_mut());
        // SAFETY: as in rms_norm; the kernel clamps starts to the row.
        check(unsafe {
            corral_attention(
                raw(qkv),
                raw_opt(spans.start()),
                h.batch,
                h.heads,
                h.kv_heads,
                h.head_dim,
                h.scale,
                &mut out,
                &mut lse,
            )
        })?;
        Ok((own(out), own(lse)))
    }

    fn attention_backward(
        &self,
        dout: &Tensor,
        qkv: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        spans: &Spans,
        h: Heads,
    ) -> Result<Tensor> {
        let mut dqkv = null_mut();
        // SAFETY: as in attention.
        check(unsafe {
            corral_attention_backward(
                raw(dout),
                raw(qkv),
                raw(out),
                raw(lse),
                raw_opt(spans.start()),
                h.batch,
                h.heads,
                h.kv_heads,
                h.head_dim,
                h.scale,
                &mut dqkv,
            )
        })?;
        Ok(own(dqkv))
    }

    fn decode_attention(&self, qkv: &Tensor, cache: KeysValues, h: Heads) -> Result<Tensor> {
        let KeysValues { keys, values, slot, position, first, longest: _ } = cache;
        let mut out = null_mut();
        // SAFETY: as in rms_norm, and slots and positions are checked against the caches, which are written in place, each
        // slot by one row.
        check(unsafe {
            corral_decode_attention(
                raw(qkv),
                raw(keys),
                raw(values),
                raw(slot),
                raw(position),
                raw_opt(first),
                h.heads,
                h.scale,
                &mut out,
            )
        })?;
        Ok(own(out))
    }

    fn swiglu(&self, gu: &Tensor) -> Result<Tensor> {
        let mut a = null_mut();
        // SAFETY: as in rms_norm.
        check(unsafe { corral_swiglu(raw(gu), &mut a) })?;
        Ok(own(a))
    }

    fn swiglu_backward(&self, gu: &Tensor, da: &Tensor) -> Result<()> {
        // SAFETY: as in rms_norm; both are written in place.
        check(unsafe { corral_swiglu_backward(raw(gu), raw(da)) })
    }

    fn log_softmax(
        &self,
        logits: &Tensor,
        labels: &Tensor,
        coef: Option<&Tensor>,
        logp: &Tensor,
        entropy: Option<&Tensor>,
    ) -> Result<()> {
        // SAFETY: as in rms_norm, and labels are checked against V; logits, logp and entropy are written in place.
        check(unsafe {
            corral_log_softmax(raw(logits), raw(labels), raw_opt(coef), raw(logp), raw_opt(entropy))
        })
    }

    fn adamw(
        &self,
        p: &Tensor,
        g: &Tensor,
        m: &Tensor,
        v: &Tensor,
        copy: Option<&Tensor>,
        o: AdamW,
    ) -> Result<()> {
        let [correction1, correction2] = o.corrections();
        // SAFETY: as in rms_norm; p, m, v and copy are written in place.
        check(unsafe {
            corral_adamw(
                raw(p),
                raw(g),
                raw(m),
                raw(v),
                raw_opt(copy),
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

    fn sum_squares(&self, tensors: &[&Tensor]) -> Result<f64> {
        let one = |x: &&Tensor| {
            let mut out = 0.0;
            // SAFETY: as in rms_norm; writes one number.
            check(unsafe { corral_sum_squares(raw(x), &mut out) })?;
            Ok(out)
        };
        tensors.iter().map(one).sum()
    }

    fn dropout(
        &self,
        x: &Tensor,
        rows: &Tensor,
        key: u64,
        threshold: u32,
        scale: f64,
        first: u32,
    ) -> Result<Tensor> {
        let mut y = null_mut();
        // SAFETY: as in rms_norm.
        check(unsafe { corral_dropout(raw(x), raw(rows), key, threshold, scale, first, &mut y) })?;
        Ok(own(y))
    }

    fn accumulate(&self, dst: &Tensor, src: &Tensor, add: bool) -> Result<()> {
        // SAFETY: as in rms_norm; dst is written in place.
        check(unsafe { corral_accumulate(raw(dst), raw(src), add) })
    }

    fn embedding_backward(&self, dx: &Tensor, ids: &Tensor, dw: &Tensor) -> Result<()> {
        // SAFETY: as in rms_norm, and ids are checked against dw's rows; dw is written in place.
        check(unsafe { corral_embedding_backward(raw(dx), raw(ids), raw(dw)) })
    }
}
