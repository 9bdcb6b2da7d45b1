//! Row operations, each on what its tensors lie on.

use tch::{Device, Kind, Tensor};

use super::composed::Composed;
use super::cpu::Cpu;
use super::gpu::Gpu;
use super::rows::RowOps;
use super::spans::Spans;
use crate::abi::corral_fill_normal;
use crate::cuda::takes_gpu_path;
use crate::error::{Result, check};
use crate::tensors::{AdamW, Gain, Heads, KeysValues, Rotation, raw};

/// The implementation for a tensor's device and dtype.
fn row_ops(x: &Tensor) -> &'static dyn RowOps {
    match (takes_gpu_path(x.device()), x.kind()) {
        (true, Kind::Float | Kind::BFloat16) => &Gpu,
        (false, _) if x.device() == Device::Cpu => &Cpu,
        _ => &Composed,
    }
}

/// The same for attention: flash attention takes float16 as well, and looks at the dtype itself.
fn attention_ops(qkv: &Tensor, h: Heads) -> &'static dyn RowOps {
    match takes_gpu_path(qkv.device()) {
        true => &Gpu,
        _ if h.softcap.is_some() => &Composed,
        _ => row_ops(qkv),
    }
}

/// Fills `out` (float32 `[n]`, CPU) with numbers `first..first + n` of the key's endless stream of normal numbers of mean
/// 0 and standard deviation `std` (Box and Muller 1958, of SplitMix64's bits): the same whatever `first` and `n` are.
pub fn fill_normal(out: &Tensor, key: u64, first: u64, std: f64) -> Result<()> {
    // SAFETY: a live tensor, whose dtype, device and layout the C++ side checks.
    check(unsafe { corral_fill_normal(raw(out), key, first, std) })
}

/// y = x * rstd * (w + offset) with rstd = 1 / sqrt(mean(x^2) + eps) per row (Zhang and Sennrich 2019, eq. 4), computed in A
/// and rounded once. x: T `[N, C]`, w: T `[C]`. Returns y: T `[N, C]` and rstd: A `[N]`.
pub fn rms_norm(x: &Tensor, w: Gain, eps: f64) -> Result<(Tensor, Tensor)> {
    row_ops(x).rms_norm(x, w, eps)
}

/// [`rms_norm`] again with its saved `rstd`: what the backward needs of y, without keeping it.
pub fn rms_apply(x: &Tensor, w: Gain, rstd: &Tensor) -> Result<Tensor> {
    row_ops(x).rms_apply(x, w, rstd)
}

/// Gradient of [`rms_norm`]: returns dx + residual, adds to `dw` (A `[C]`).
pub fn rms_backward(
    dy: &Tensor,
    x: &Tensor,
    w: Gain,
    rstd: &Tensor,
    residual: Option<&Tensor>,
    dw: &Tensor,
) -> Result<Tensor> {
    row_ops(x).rms_backward(dy, x, w, rstd, residual, dw)
}

/// Rotary positions (Su et al. 2021) in Hugging Face's order of halves, in place, on the first `heads` heads of each
/// row of x: T `[N, W]`, W >= heads * D. `positions`: int64 `[N]`; `cos`, `sin`: A `[P, D/2]`. `inverse` rotates back,
/// which is also the gradient.
///
/// A position beyond the tables is an error on the CPU; on CUDA, which is not waited for, nothing checks it, and the kernel
/// reads outside them: the caller must.
pub fn rope(
    x: &Tensor,
    positions: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    heads: i64,
    head_dim: i64,
    inverse: bool,
) -> Result<()> {
    row_ops(x).rope(x, Rotation { positions, cos, sin, heads, head_dim, inverse })
}

/// Causal attention with grouped queries, exact. `qkv`: T `[B * T, (H + 2K) * D]`, query heads first, then key heads,
/// then value heads. `spans` says what a position sees: padding on the left, packed documents and sliding windows. Returns out:
/// T `[B * T, H * D]` and the logarithm of the softmax's denominators: A `[B, H, T]`.
///
/// On CUDA, flash attention takes what it can: bfloat16 or float16, D a multiple of 8 and at most 256. The rest is composed,
/// with the `[B, H, T, T]` scores in memory; so is, on every device, attention with a `softcap`.
pub fn attention(qkv: &Tensor, spans: &Spans, h: Heads) -> Result<(Tensor, Tensor)> {
    attention_ops(qkv, h).attention(qkv, spans, h)
}

/// Gradient of [`attention`] with respect to `qkv`.
pub fn attention_backward(
    dout: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    spans: &Spans,
    h: Heads,
) -> Result<Tensor> {
    attention_ops(qkv, h).attention_backward(dout, qkv, out, lse, spans, h)
}

/// Attention of one more token a row over cached keys and values. `qkv`: T `[B, (H + 2K) * D]`, rotated, in the order of
/// [`attention`]; no slot of `cache` twice. The row's own key and value are written to its slot at its position; then its
/// queries see what the cache says. Returns T `[B, H * D]`.
///
/// A slot or position that is not in the cache is an error on the CPU; on CUDA, which is not waited for, its row is NaN.
pub fn decode_attention(qkv: &Tensor, cache: KeysValues, h: Heads) -> Result<Tensor> {
    attention_ops(qkv, h).decode_attention(qkv, cache, h)
}

/// silu(g) * u (Shazeer 2020) for gu: T `[N, 2F]` = (g | u). Returns T `[N, F]`.
pub fn swiglu(gu: &Tensor) -> Result<Tensor> {
    row_ops(gu).swiglu(gu)
}

/// Gradient of [`swiglu`], in place: `gu` becomes d gu, `da` becomes silu(g) * u (the input of the down projection,
/// which its weight's gradient needs).
pub fn swiglu_backward(gu: &Tensor, da: &Tensor) -> Result<()> {
    row_ops(gu).swiglu_backward(gu, da)
}

/// Log-probabilities of labels. `logits`: T `[N, V]`; `labels`: int64 `[N]`, negative = left out (log-probability 0).
/// Writes `logp`: A `[N]` and, where given, `entropy`: A `[N]` in nats. With `coef`: A `[N]`, `logits` becomes
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
    row_ops(logits).log_softmax(logits, labels, coef, logp, entropy)
}

/// Updates p, m, v (A `[n]`, in place) with the gradient g (A `[n]`); `copy` (bfloat16 `[n]`) receives the new values.
pub fn adamw(p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor, copy: Option<&Tensor>, o: AdamW) -> Result<()> {
    row_ops(p).adamw(p, g, m, v, copy, o)
}

/// Sum of squares of x (A), accumulated in float64, in an order that does not depend on the number of threads.
pub fn sum_squares(x: &Tensor) -> Result<f64> {
    row_ops(x).sum_squares(&[x])
}

/// [`sum_squares`] of several tensors together, in their order; a GPU is waited for once.
pub fn sum_squares_of_all(tensors: &[Tensor]) -> Result<f64> {
    let all: Vec<&Tensor> = tensors.iter().collect();
    all.first().map_or(Ok(0.0), |first| row_ops(first).sum_squares(&all))
}

/// Dropout (Srivastava et al. 2014) whose mask is a function of what it is for: element i of row n is 0 with probability
/// `p`, else x / (1 - p), decided by a hash of (`key`, `rows[n]`, `first` + i). x: T `[N, C]`, `rows`: int64 `[N]`, p in [0, 1). Of
/// the output's gradient it gives the input's. `first`: where these columns begin in wider rows.
pub fn dropout(x: &Tensor, rows: &Tensor, key: u64, p: f64, first: u32) -> Result<Tensor> {
    let (threshold, scale) = ((p * 2f64.powi(32)) as u32, 1.0 / (1.0 - p));
    row_ops(x).dropout(x, rows, key, threshold, scale, first)
}

/// dst (A) += src (T), or = if not `add`.
pub fn accumulate(dst: &Tensor, src: &Tensor, add: bool) -> Result<()> {
    row_ops(src).accumulate(dst, src, add)
}

/// Gradient of an embedding: `dw[ids[n], :] += dx[n, :]`. `dx`: T `[N, C]`, `ids`: int64 `[N]`, `dw`: A `[V, C]`.
///
/// Ids that are not in the vocabulary are an error on the CPU; CUDA kernels leave them out (the forward has failed before).
pub fn embedding_backward(dx: &Tensor, ids: &Tensor, dw: &Tensor) -> Result<()> {
    row_ops(dx).embedding_backward(dx, ids, dw)
}
