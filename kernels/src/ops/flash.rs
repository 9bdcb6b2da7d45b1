//! What libtorch computes on CUDA and tch does not offer: flash attention with its statistics, and products of bfloat16
//! with float32 results.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Kind, Tensor};

use super::spans::Spans;
use crate::abi::{corral_flash_attention, corral_flash_attention_backward, corral_grad_weight};
use crate::cuda::launch::capability;
use crate::cuda::takes_gpu_path;
use crate::error::{Result, check};
use crate::tensors::{Heads, own, raw, raw_opt};

static DETERMINISTIC: AtomicBool = AtomicBool::new(true);

/// Whether flash attention's backward gives the same bits for the same input (the default). It is faster where it need not: it
/// then adds up the queries' gradients in whatever order its blocks end.
pub fn set_deterministic(on: bool) {
    DETERMINISTIC.store(on, Ordering::Relaxed);
}

/// Whether flash attention takes this; it needs sm_80.
pub(super) fn fits(qkv: &Tensor, h: Heads) -> Result<bool> {
    Ok(takes_gpu_path(qkv.device())
        && matches!(qkv.kind(), Kind::BFloat16 | Kind::Half)
        && h.softcap.is_none()
        && h.head_dim % 8 == 0
        && h.head_dim <= 256
        && (qkv.data_ptr() as usize).is_multiple_of(16)
        && capability(qkv)?.0 >= 8)
}

/// The segments' tensor, the longest of them, and the window (0: none), as the C++ side takes them.
fn spans_of(spans: &Spans) -> (Option<&Tensor>, i64, i64) {
    let segments = spans.segments();
    (segments.map(|s| &s.cum_seq), segments.map_or(0, |s| s.longest), spans.window().unwrap_or(0))
}

pub(super) fn forward(qkv: &Tensor, spans: &Spans, h: Heads) -> Result<(Tensor, Tensor)> {
    let (mut out, mut lse) = (null_mut(), null_mut());
    let (cum_seq, longest, window) = spans_of(spans);
    // SAFETY: the C++ side checks shapes and contiguity; outputs are new tensors.
    check(unsafe {
        corral_flash_attention(
            raw(qkv),
            raw_opt(cum_seq),
            longest,
            window,
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

pub(super) fn backward(
    dout: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    spans: &Spans,
    h: Heads,
) -> Result<Tensor> {
    let mut dqkv = null_mut();
    let (cum_seq, longest, window) = spans_of(spans);
    // SAFETY: as in forward.
    check(unsafe {
        corral_flash_attention_backward(
            raw(dout),
            raw(qkv),
            raw(out),
            raw(lse),
            raw_opt(cum_seq),
            longest,
            window,
            h.batch,
            h.heads,
            h.kv_heads,
            h.head_dim,
            h.scale,
            DETERMINISTIC.load(Ordering::Relaxed),
            &mut dqkv,
        )
    })?;
    Ok(own(dqkv))
}

/// dw (float32 `[O, I]`) = or += dy^T x, for dy `[N, O]`, x `[N, I]` in bfloat16 or float16.
pub(super) fn grad_weight(dw: &Tensor, dy: &Tensor, x: &Tensor, add: bool) -> Result<()> {
    // SAFETY: libtorch checks shapes and dtypes; dw is the caller's to write.
    check(unsafe { corral_grad_weight(raw(dw), raw(dy), raw(x), add) })
}
