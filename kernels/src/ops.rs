//! The operations of a Llama's forward and backward that libtorch has no fused form for.
//!
//! Shapes: N rows (tokens), C channels, F = intermediate size, V vocabulary, D head dimension. Activations and
//! weights are float32, bfloat16 or float64 (T); statistics, gradients of weights and log-probabilities are in the
//! accumulator type A: float64 for float64, else float32. On the CPU they run as one pass over memory
//! (`cpp/cpu_rows.cpp`); elsewhere as compositions of libtorch's operations ([`crate::composed`]), which are also
//! their oracles in the tests.

use std::ffi::{c_char, c_void};

use tch::{Device, Kind, Tensor};

use crate::composed;
use crate::error::{Result, check};

/// A tensor as the C++ side takes it (`at::Tensor*`).
type Raw = *mut c_void;

/// The C++ side may write to the data, not to the handle.
fn raw(t: &Tensor) -> Raw {
    t.as_ptr() as Raw
}

fn raw_opt(t: Option<&Tensor>) -> Raw {
    t.map_or(std::ptr::null_mut(), raw)
}

/// Takes over a tensor that the C++ side made with `new at::Tensor`.
fn own(t: Raw) -> Tensor {
    // SAFETY: `t` comes from `new at::Tensor` on the C++ side, which gives up its ownership.
    unsafe { Tensor::from_ptr(t.cast()) }
}

unsafe extern "C" {
    fn corral_set_float32_onednn(on: bool) -> *mut c_char;
    fn corral_rms_norm(x: Raw, w: Raw, eps: f64, y: *mut Raw, rstd: *mut Raw) -> *mut c_char;
    fn corral_rms_apply(x: Raw, w: Raw, rstd: Raw, y: *mut Raw) -> *mut c_char;
    fn corral_rms_backward(
        dy: Raw,
        x: Raw,
        w: Raw,
        rstd: Raw,
        residual: Raw,
        dw: Raw,
        dx: *mut Raw,
    ) -> *mut c_char;
    fn corral_rope(
        x: Raw,
        positions: Raw,
        cos: Raw,
        sin: Raw,
        heads: i64,
        d: i64,
        inverse: bool,
    ) -> *mut c_char;
    fn corral_attention(
        qkv: Raw,
        start: Raw,
        batch: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        scale: f64,
        out: *mut Raw,
        lse: *mut Raw,
    ) -> *mut c_char;
    fn corral_attention_backward(
        dout: Raw,
        qkv: Raw,
        out: Raw,
        lse: Raw,
        start: Raw,
        batch: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        scale: f64,
        dqkv: *mut Raw,
    ) -> *mut c_char;
    fn corral_decode_attention(
        qkv: Raw,
        keys: Raw,
        values: Raw,
        slot: Raw,
        position: Raw,
        heads: i64,
        scale: f64,
        out: *mut Raw,
    ) -> *mut c_char;
    fn corral_swiglu(gu: Raw, a: *mut Raw) -> *mut c_char;
    fn corral_swiglu_backward(gu: Raw, da: Raw) -> *mut c_char;
    fn corral_log_softmax(logits: Raw, labels: Raw, coef: Raw, logp: Raw, entropy: Raw) -> *mut c_char;
    fn corral_adamw(
        p: Raw,
        g: Raw,
        m: Raw,
        v: Raw,
        copy: Raw,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        decay: f64,
        correction1: f64,
        correction2: f64,
        grad_scale: f64,
    ) -> *mut c_char;
    fn corral_sum_squares(x: Raw, out: *mut f64) -> *mut c_char;
    fn corral_accumulate(dst: Raw, src: Raw, add: bool) -> *mut c_char;
    fn corral_embedding_backward(dx: Raw, ids: Raw, dw: Raw) -> *mut c_char;
}

/// The dtype of statistics, gradients of weights and log-probabilities for a compute dtype.
pub fn accumulator(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// Sends float32 matrix products on the CPU to oneDNN (true) or MKL (false, libtorch's default).
pub fn set_float32_onednn(on: bool) -> Result<()> {
    // SAFETY: sets a flag of libtorch's global context.
    check(unsafe { corral_set_float32_onednn(on) })
}

/// y = x * rstd * w with rstd = 1 / sqrt(mean(x^2) + eps) per row (Zhang and Sennrich 2019, eq. 4), computed in A and
/// rounded once. x: T [N, C], w: T [C]. Returns y: T [N, C] and rstd: A [N].
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    if x.device() != Device::Cpu {
        return Ok(composed::rms_norm(x, w, eps));
    }
    let (mut y, mut rstd) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the C++ side checks devices, dtypes and contiguity; outputs are new tensors.
    check(unsafe { corral_rms_norm(raw(x), raw(w), eps, &mut y, &mut rstd) })?;
    Ok((own(y), own(rstd)))
}

/// [`rms_norm`] again with its saved `rstd`: what the backward needs of y, without keeping it.
pub fn rms_apply(x: &Tensor, w: &Tensor, rstd: &Tensor) -> Result<Tensor> {
    if x.device() != Device::Cpu {
        return Ok(composed::rms_apply(x, w, rstd));
    }
    let mut y = std::ptr::null_mut();
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
    if x.device() != Device::Cpu {
        return Ok(composed::rms_backward(dy, x, w, rstd, residual, dw));
    }
    let mut dx = std::ptr::null_mut();
    // SAFETY: as in rms_norm; dw is written in place, and nothing else holds it during the call.
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
    if x.device() != Device::Cpu {
        composed::rope(x, positions, cos, sin, heads, head_dim, inverse);
        return Ok(());
    }
    // SAFETY: the C++ side checks shapes and dtypes; positions are below the tables' length (the model grows them).
    check(unsafe { corral_rope(raw(x), raw(positions), raw(cos), raw(sin), heads, head_dim, inverse) })
}

/// What an attention works on: B rows, H query heads, K key-value heads, D numbers a head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    pub batch: i64,
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
}

impl Heads {
    /// The softmax's scale, 1 / sqrt(D).
    pub fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }
}

/// Causal attention with grouped queries, exact. `qkv`: T [B * T, (H + 2K) * D], query heads first, then key heads,
/// then value heads. Position i of a row sees the positions `start[i]` to i of that row (`start`: int64 [B * T]; none:
/// 0 to i), which says padding on the left, packed documents and sliding windows. Returns out: T [B * T, H * D] and
/// the logarithm of the softmax's denominators: A [B, H, T].
pub fn attention(qkv: &Tensor, start: Option<&Tensor>, h: Heads) -> Result<(Tensor, Tensor)> {
    if qkv.device() != Device::Cpu {
        return Ok(composed::attention(qkv, start, h));
    }
    let (mut out, mut lse) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the C++ side checks shapes and contiguity; outputs are new tensors.
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
    if qkv.device() != Device::Cpu {
        return Ok(composed::attention_backward(dout, qkv, out, lse, start, h));
    }
    let mut dqkv = std::ptr::null_mut();
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
/// own key and value are written to its slot at its position; then its queries see positions 0 to `position`.
/// Returns T [B, H * D].
pub fn decode_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    slot: &Tensor,
    position: &Tensor,
    h: Heads,
) -> Result<Tensor> {
    if qkv.device() != Device::Cpu {
        return Ok(composed::decode_attention(qkv, keys, values, slot, position, h));
    }
    let mut out = std::ptr::null_mut();
    // SAFETY: the C++ side checks shapes, dtypes, slots and positions; the caches are written in place, each slot by
    // one row; the output is a new tensor.
    check(unsafe {
        corral_decode_attention(
            raw(qkv),
            raw(keys),
            raw(values),
            raw(slot),
            raw(position),
            h.heads,
            h.scale(),
            &mut out,
        )
    })?;
    Ok(own(out))
}

/// silu(g) * u (Shazeer 2020) for gu: T [N, 2F] = (g | u). Returns T [N, F].
pub fn swiglu(gu: &Tensor) -> Result<Tensor> {
    if gu.device() != Device::Cpu {
        return Ok(composed::swiglu(gu));
    }
    let mut a = std::ptr::null_mut();
    // SAFETY: as in rms_norm.
    check(unsafe { corral_swiglu(raw(gu), &mut a) })?;
    Ok(own(a))
}

/// Gradient of [`swiglu`], in place: `gu` becomes d gu, `da` becomes silu(g) * u (the input of the down projection,
/// which its weight's gradient needs).
pub fn swiglu_backward(gu: &Tensor, da: &Tensor) -> Result<()> {
    if gu.device() != Device::Cpu {
        composed::swiglu_backward(gu, da);
        return Ok(());
    }
    // SAFETY: both are written in place; the caller gives them up for it.
    check(unsafe { corral_swiglu_backward(raw(gu), raw(da)) })
}

/// Log-probabilities of labels. `logits`: T [N, V]; `labels`: int64 [N], negative = left out (log-probability 0).
/// Writes `logp`: A [N] and, where given, `entropy`: A [N] in nats. With `coef`: A [N], `logits` becomes
/// coef * (onehot - softmax), the gradient of sum(coef * logp).
pub fn log_softmax(
    logits: &Tensor,
    labels: &Tensor,
    coef: Option<&Tensor>,
    logp: &Tensor,
    entropy: Option<&Tensor>,
) -> Result<()> {
    if logits.device() != Device::Cpu {
        composed::log_softmax(logits, labels, coef, logp, entropy);
        return Ok(());
    }
    // SAFETY: shapes and label ranges are checked; logits, logp and entropy are written in place.
    check(unsafe { corral_log_softmax(raw(logits), raw(labels), raw_opt(coef), raw(logp), raw_opt(entropy)) })
}

/// One AdamW step (Loshchilov and Hutter 2019, algorithm 2; PyTorch's order of operations).
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Number of this update, from 1: for the bias corrections.
    pub step: i64,
    /// The gradient is multiplied by this first (clipping).
    pub grad_scale: f64,
}

/// Updates p, m, v (A [n], in place) with the gradient g (A [n]); `copy` (bfloat16 [n]) receives the new values.
pub fn adamw(p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor, copy: Option<&Tensor>, o: AdamW) -> Result<()> {
    if p.device() != Device::Cpu {
        composed::adamw(p, g, m, v, copy, o);
        return Ok(());
    }
    let correction = |beta: f64| 1.0 - beta.powi(o.step as i32);
    // SAFETY: the C++ side checks contiguity; p, m, v and copy are written in place.
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
            correction(o.beta1),
            correction(o.beta2),
            o.grad_scale,
        )
    })
}

/// Sum of squares of x (A), accumulated in float64, in an order that does not depend on the number of threads.
pub fn sum_squares(x: &Tensor) -> Result<f64> {
    if x.device() != Device::Cpu {
        return Ok(composed::sum_squares(x));
    }
    let mut out = 0.0;
    // SAFETY: reads x, writes one number.
    check(unsafe { corral_sum_squares(raw(x), &mut out) })?;
    Ok(out)
}

/// dst (A) += src (T), or = if not `add`.
pub fn accumulate(dst: &Tensor, src: &Tensor, add: bool) -> Result<()> {
    if dst.device() != Device::Cpu {
        composed::accumulate(dst, src, add);
        return Ok(());
    }
    // SAFETY: sizes and dtypes are checked; dst is written in place.
    check(unsafe { corral_accumulate(raw(dst), raw(src), add) })
}

/// Gradient of an embedding: dw[ids[n], :] += dx[n, :]. `dx`: T [N, C], `ids`: int64 [N], `dw`: A [V, C].
pub fn embedding_backward(dx: &Tensor, ids: &Tensor, dw: &Tensor) -> Result<()> {
    if dx.device() != Device::Cpu {
        composed::embedding_backward(dx, ids, dw);
        return Ok(());
    }
    // SAFETY: ids are checked against dw's rows; dw is written in place.
    check(unsafe { corral_embedding_backward(raw(dx), raw(ids), raw(dw)) })
}
