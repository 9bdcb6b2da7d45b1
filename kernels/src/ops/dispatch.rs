//! Row operations, each on what its tensors lie on.

use std::ptr::null_mut;

use tch::{Device, Kind, Tensor};

use super::{composed, flash, gpu};
use crate::abi::*;
use crate::error::{Result, check};
use crate::tensors::{AdamW, Heads, own, raw, raw_opt};

/// What computes an operation.
enum Engine {
    Cpu,
    Gpu,
    Composed,
}

fn engine(x: &Tensor) -> Engine {
    match (x.device(), x.kind()) {
        (Device::Cpu, _) => Engine::Cpu,
        (Device::Cuda(_), Kind::Float | Kind::BFloat16) => Engine::Gpu,
        _ => Engine::Composed,
    }
}

/// Fills `out` (float32 `[n]`, CPU) with numbers `first..first + n` of the key's endless stream of normal numbers of mean
/// 0 and standard deviation `std` (Box and Muller 1958, of SplitMix64's bits): the same whatever `first` and `n` are.
pub fn fill_normal(out: &Tensor, key: u64, first: u64, std: f64) -> Result<()> {
    // SAFETY: a live tensor, whose dtype, device and layout the C++ side checks.
    check(unsafe { corral_fill_normal(raw(out), key, first, std) })
}

/// y = x * rstd * w with rstd = 1 / sqrt(mean(x^2) + eps) per row (Zhang and Sennrich 2019, eq. 4), computed in A and
/// rounded once. x: T [N, C], w: T [C]. Returns y: T [N, C] and rstd: A [N].
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    match engine(x) {
        Engine::Cpu => {}
        Engine::Gpu => return gpu::rms_norm(x, w, eps),
        Engine::Composed => return Ok(composed::rms_norm(x, w, eps)),
    }
    let (mut y, mut rstd) = (null_mut(), null_mut());
    // SAFETY: the C++ side checks device, contiguity, dtype and size of every tensor; outputs are new tensors.
    check(unsafe { corral_rms_norm(raw(x), raw(w), eps, &mut y, &mut rstd) })?;
    Ok((own(y), own(rstd)))
}

/// [`rms_norm`] again with its saved `rstd`: what the backward needs of y, without keeping it.
pub fn rms_apply(x: &Tensor, w: &Tensor, rstd: &Tensor) -> Result<Tensor> {
    match engine(x) {
        Engine::Cpu => {}
        Engine::Gpu => return gpu::rms_apply(x, w, rstd),
        Engine::Composed => return Ok(composed::rms_apply(x, w, rstd)),
    }
    let mut y = null_mut();
    // SAFETY: as in rms_norm.
    check(unsafe { corral_rms_apply(raw(x), raw(w), raw(rstd), &mut y) })?;
    Ok(own(y))
}

/// Gradient of [`rms_norm`]: returns dx + residual, adds to `dw` (A [C]).
pub fn rms_backward(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    rstd: &Tensor,
    residual: Option<&Tensor>,
    dw: &Tensor,
) -> Result<Tensor> {
    match engine(x) {
        Engine::Cpu => {}
        Engine::Gpu if w.numel() as i64 <= gpu::RMS_BACKWARD_COLUMNS => {
            return gpu::rms_backward(dy, x, w, rstd, residual, dw);
        }
        _ => return Ok(composed::rms_backward(dy, x, w, rstd, residual, dw)),
    }
    let mut dx = null_mut();
    // SAFETY: as in rms_norm; dw is written in place.
    check(unsafe {
        corral_rms_backward(raw(dy), raw(x), raw(w), raw(rstd), raw_opt(residual), raw(dw), &mut dx)
    })?;
    Ok(own(dx))
}

/// Rotary positions (Su et al. 2021) in Hugging Face's order of halves, in place, on the first `heads` heads of each
/// row of x: T [N, W], W >= heads * D. `positions`: int64 [N]; `cos`, `sin`: A [P, D/2]. `inverse` rotates back,
/// which is also the gradient.
pub fn rope(
    x: &Tensor,
    positions: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    heads: i64,
    head_dim: i64,
    inverse: bool,
) -> Result<()> {
    match engine(x) {
        Engine::Cpu => {}
        Engine::Gpu => return gpu::rope(x, positions, cos, sin, heads, head_dim, inverse),
        Engine::Composed => {
            composed::rope(x, positions, cos, sin, heads, head_dim, inverse);
            return Ok(());
        }
    }
    // SAFETY: as in rms_norm, and positions are checked against the tables' length; x is written in place.
    check(unsafe { corral_rope(raw(x), raw(positions), raw(cos), raw(sin), heads, head_dim, inverse) })
}

/// Causal attention with grouped queries, exact. `qkv`: T [B * T, (H + 2K) * D], query heads first, then key heads,
/// then value heads. Position i of a row sees the positions `start[i]` to i of that row (`start`: int64 [B * T]; none:
/// 0 to i), which says padding on the left, packed documents and sliding windows. Returns out: T [B * T, H * D] and
/// the logarithm of the softmax's denominators: A [B, H, T].
///
/// On CUDA, flash attention takes what it can: bfloat16 or float16 without `start`, D a multiple of 8 and at most 256. The
/// rest is composed, with the [B, H, T, T] scores in memory.
pub fn attention(qkv: &Tensor, start: Option<&Tensor>, h: Heads) -> Result<(Tensor, Tensor)> {
    match engine(qkv) {
        Engine::Cpu => {}
        _ if flash::fits(qkv, start, h)? => return flash::forward(qkv, h),
        _ => return Ok(composed::attention(qkv, start, h)),
    }
    let (mut out, mut lse) = (null_mut(), null_mut());
    // SAFETY: as in rms_norm; the kernel clamps `start` to the row.
    check(unsafe {
        corral_attention(
            raw(qkv),
            raw_opt(start),
            h.batch,
            h.heads,
            h.kv_heads,
            h.head_dim,
            h.scale(),
            &mut out,
            &mut lse,
        )
    })?;
    Ok((own(out), own(lse)))
}

/// Gradient of [`attention`] with respect to `qkv`.
pub fn attention_backward(
    dout: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    start: Option<&Tensor>,
    h: Heads,
) -> Result<Tensor> {
    match engine(qkv) {
        Engine::Cpu => {}
        _ if flash::fits(qkv, start, h)? => return flash::backward(dout, qkv, out, lse, h),
        _ => return Ok(composed::attention_backward(dout, qkv, out, lse, start, h)),
    }
    let mut dqkv = null_mut();
    // SAFETY: as in attention.
    check(unsafe {
        corral_attention_backward(
            raw(dout),
            raw(qkv),
            raw(out),
            raw(lse),
            raw_opt(start),
            h.batch,
            h.heads,
            h.kv_heads,
            h.head_dim,
            h.scale(),
            &mut dqkv,
        )
    })?;
    Ok(own(dqkv))
}

/// Attention of one more token a row over cached keys and values. `qkv`: T [B, (H + 2K) * D], rotated, in the order of
/// [`attention`]; `keys`, `values`: T [slots, K, capacity, D]; `slot`, `position`: int64 [B], no slot twice. The row's
/// own key and value are written to its slot at its position; then its queries see positions `first` (int64 [B]; none: 0)
/// to `position`. Returns T [B, H * D].
pub fn decode_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    slot: &Tensor,
    position: &Tensor,
    first: Option<&Tensor>,
    h: Heads,
) -> Result<Tensor> {
    if qkv.device() != Device::Cpu {
        return Ok(composed::decode_attention(qkv, keys, values, slot, position, first, h));
    }
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
            h.scale(),
            &mut out,
        )
    })?;
    Ok(own(out))
}

/// silu(g) * u (Shazeer 2020) for gu: T [N, 2F] = (g | u). Returns T [N, F].
pub fn swiglu(gu: &Tensor) -> Result<Tensor> {
    match engine(gu) {
        Engine::Cpu => {}
        Engine::Gpu => return gpu::swiglu(gu),
        Engine::Composed => return Ok(composed::swiglu(gu)),
    }
    let mut a = null_mut();
    // SAFETY: as in rms_norm.
    check(unsafe { corral_swiglu(raw(gu), &mut a) })?;
    Ok(own(a))
}

/// Gradient of [`swiglu`], in place: `gu` becomes d gu, `da` becomes silu(g) * u (the input of the down projection,
/// which its weight's gradient needs).
pub fn swiglu_backward(gu: &Tensor, da: &Tensor) -> Result<()> {
    match engine(gu) {
        Engine::Cpu => {}
        Engine::Gpu => return gpu::swiglu_backward(gu, da),
        Engine::Composed => {
            composed::swiglu_backward(gu, da);
            return Ok(());
        }
    }
    // SAFETY: as in rms_norm; both are written in place.
    check(unsafe { corral_swiglu_backward(raw(gu), raw(da)) })
}

/// Log-probabilities of labels. `logits`: T [N, V]; `labels`: int64 [N], negative = left out (log-probability 0).
/// Writes `logp`: A [N] and, where given, `entropy`: A [N] in nats. With `coef`: A [N], `logits` becomes
/// coef * (onehot - softmax), the gradient of sum(coef * logp).
///
/// A label that is not in the vocabulary is an error on the CPU; on CUDA, which is not waited for, its log-probability is NaN.
pub fn log_softmax(
    logits: &Tensor,
    labels: &Tensor,
    coef: Option<&Tensor>,
    logp: &Tensor,
    entropy: Option<&Tensor>,
) -> Result<()> {
    match engine(logits) {
        Engine::Cpu => {}
        Engine::Gpu => return gpu::log_softmax(logits, labels, coef, logp, entropy),
        Engine::Composed => {
            composed::log_softmax(logits, labels, coef, logp, entropy);
            return Ok(());
        }
    }
    // SAFETY: as in rms_norm, and labels are checked against V; logits, logp and entropy are written in place.
    check(unsafe { corral_log_softmax(raw(logits), raw(labels), raw_opt(coef), raw(logp), raw_opt(entropy)) })
}

/// Updates p, m, v (A [n], in place) with the gradient g (A [n]); `copy` (bfloat16 [n]) receives the new values.
pub fn adamw(p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor, copy: Option<&Tensor>, o: AdamW) -> Result<()> {
    match engine(p) {
        Engine::Cpu => {}
        Engine::Gpu => return gpu::adamw(p, g, m, v, copy, o),
        Engine::Composed => {
            composed::adamw(p, g, m, v, copy, o);
            return Ok(());
        }
    }
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

/// Sum of squares of x (A), accumulated in float64, in an order that does not depend on the number of threads.
pub fn sum_squares(x: &Tensor) -> Result<f64> {
    match engine(x) {
        Engine::Cpu => {}
        Engine::Gpu => return gpu::sum_squares(&[x]),
        Engine::Composed => return Ok(composed::sum_squares(x)),
    }
    let mut out = 0.0;
    // SAFETY: as in rms_norm; writes one number.
    check(unsafe { corral_sum_squares(raw(x), &mut out) })?;
    Ok(out)
}

/// [`sum_squares`] of several tensors together, in their order; a GPU is waited for once.
pub fn sum_squares_of_all(tensors: &[Tensor]) -> Result<f64> {
    match tensors.first().map(engine) {
        Some(Engine::Gpu) => gpu::sum_squares(&tensors.iter().collect::<Vec<_>>()),
        _ => tensors.iter().map(sum_squares).sum(),
    }
}

/// Dropout (Srivastava et al. 2014) whose mask is a function of what it is for: element i of row n is 0 with probability
/// `p`, else x / (1 - p), decided by a hash of (`key`, `rows[n]`, i). x: T [N, C], `rows`: int64 `[N]`, p in [0, 1). Of the
/// output's gradient it gives the input's.
pub fn dropout(x: &Tensor, rows: &Tensor, key: u64, p: f64) -> Result<Tensor> {
    let (threshold, scale) = ((p * 2f64.powi(32)) as u32, 1.0 / (1.0 - p));
    match engine(x) {
        Engine::Cpu => {}
        Engine::Gpu => return gpu::dropout(x, rows, key, threshold, scale),
        Engine::Composed => return Ok(composed::dropout(x, rows, key, threshold, scale)),
    }
    let mut y = null_mut();
    // SAFETY: as in rms_norm.
    check(unsafe { corral_dropout(raw(x), raw(rows), key, threshold, scale, &mut y) })?;
    Ok(own(y))
}

/// dst (A) += src (T), or = if not `add`.
pub fn accumulate(dst: &Tensor, src: &Tensor, add: bool) -> Result<()> {
    match engine(src) {
        Engine::Cpu => {}
        Engine::Gpu => return gpu::accumulate(dst, src, add),
        Engine::Composed => {
            composed::accumulate(dst, src, add);
            return Ok(());
        }
    }
    // SAFETY: as in rms_norm; dst is written in place.
    check(unsafe { corral_accumulate(raw(dst), raw(src), add) })
}

/// Gradient of an embedding: dw[ids[n], :] += dx[n, :]. `dx`: T [N, C], `ids`: int64 [N], `dw`: A [V, C].
///
/// Ids that are not in the vocabulary are an error on the CPU; CUDA kernels leave them out (the forward has failed before).
pub fn embedding_backward(dx: &Tensor, ids: &Tensor, dw: &Tensor) -> Result<()> {
    match engine(dx) {
        Engine::Cpu => {}
        Engine::Gpu => return gpu::embedding_backward(dx, ids, dw),
        Engine::Composed => {
            composed::embedding_backward(dx, ids, dw);
            return Ok(());
        }
    }
    // SAFETY: as in rms_norm, and ids are checked against dw's rows; dw is written in place.
    check(unsafe { corral_embedding_backward(raw(dx), raw(ids), raw(dw)) })
}
