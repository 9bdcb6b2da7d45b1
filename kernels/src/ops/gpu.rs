//! Row operations on CUDA: launches of the kernels in `cuda/`, in float32 and bfloat16.

use tch::{Kind, Tensor};

use super::composed::Composed;
use super::flash;
use super::rows::RowOps;
use super::spans::Spans;
use crate::cuda::launch::{Launcher, adamw_numbers, blocks, matrix, need, opt, pack, threads, wide};
use crate::cuda::modules::Arg::{F32, I32, I64, Tensor as T, U64};
use crate::error::{Error, Result};
use crate::tensors::{AdamW, Gain, Heads, KeysValues, Rotation};

/// Columns beyond which rms_backward's shared memory, 4 bytes a column, might not fit.
const RMS_BACKWARD_COLUMNS: i64 = 24 << 10;
/// RUN of cuda/rows.cu.
const EMBEDDING_RUN: i64 = 128;
// Constants of cuda/decode.cu.
const DECODE_CHUNK: i64 = 128;
const DECODE_THREADS: i64 = 128;
const DECODE_TILE: i64 = 4;

/// CUDA's kernels, in float32 and bfloat16, and libtorch's flash attention. What has no kernel is composed.
#[derive(Debug, Clone, Copy)]
pub struct Gpu;

impl RowOps for Gpu {
    fn rms_norm(&self, x: &Tensor, gain: Gain, eps: f64) -> Result<(Tensor, Tensor)> {
        let Gain { weight: w, offset } = gain;
        let (rows, c) = matrix("rms_norm", x)?;
        need("rms_norm", &[("x", x, x.kind(), rows * c), ("w", w, x.kind(), c)])?;
        let (y, rstd) = (x.empty_like(), Tensor::empty([rows], (Kind::Float, x.device())));
        let args = [
            T(x),
            T(w),
            F32(offset as f32),
            F32(eps as f32),
            T(&y),
            T(&rstd),
            I32(c as i32),
            wide(c, pack(x), &[x, w, &y]),
        ];
        // SAFETY: block r reads row r of x and all of w, and writes row r of y and rstd[r]: checked above, or made
        // here.
        unsafe { Launcher::rows(x)?.launch("rms_norm", rows, threads(c, pack(x)), 0, &args) }?;
        Ok((y, rstd))
    }

    fn rms_apply(&self, x: &Tensor, gain: Gain, rstd: &Tensor) -> Result<Tensor> {
        let Gain { weight: w, offset } = gain;
        let (rows, c) = matrix("rms_apply", x)?;
        need(
            "rms_apply",
            &[("x", x, x.kind(), rows * c), ("w", w, x.kind(), c), ("rstd", rstd, Kind::Float, rows)],
        )?;
        let y = x.empty_like();
        let args =
            [T(x), T(w), F32(offset as f32), T(rstd), T(&y), I32(c as i32), wide(c, pack(x), &[x, w, &y])];
        // SAFETY: block r reads row r of x, rstd[r] and all of w, and writes row r of y: checked above, or made here.
        unsafe { Launcher::rows(x)?.launch("rms_apply", rows, threads(c, pack(x)), 0, &args) }?;
        Ok(y)
    }

    fn rms_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        gain: Gain,
        rstd: &Tensor,
        residual: Option<&Tensor>,
        dw: &Tensor,
    ) -> Result<Tensor> {
        let Gain { weight: w, offset } = gain;
        if w.numel() as i64 > RMS_BACKWARD_COLUMNS {
            return Composed.rms_backward(dy, x, gain, rstd, residual, dw);
        }
        let (rows, c) = matrix("rms_backward", x)?;
        let kind = x.kind();
        let residual_or_x = residual.unwrap_or(x);
        need(
            "rms_backward",
            &[
                ("x", x, kind, rows * c),
                ("dy", dy, kind, rows * c),
                ("w", w, kind, c),
                ("rstd", rstd, Kind::Float, rows),
                ("residual", residual_or_x, kind, rows * c),
                ("dw", dw, Kind::Float, c),
            ],
        )?;
        // The sum over rows has the same parts on every device, and so the same bits.
        let parts = rows.min(512);
        let dx = x.empty_like();
        let partial = Tensor::empty([parts, c], (Kind::Float, x.device()));
        let args = [
            T(dy),
            T(x),
            T(w),
            F32(offset as f32),
            T(rstd),
            opt(residual),
            T(&dx),
            T(&partial),
            I64(rows),
            I32(c as i32),
            wide(c, pack(x), &[dy, x, w, residual_or_x, &dx]),
        ];
        let kernels = Launcher::rows(x)?;
        // SAFETY: dy, x, residual and dx are [rows, c], rstd is [rows], partial [parts, c] with a row a block, and each
        // block has c floats of shared memory.
        unsafe { kernels.launch("rms_backward", parts, threads(c, pack(x)), 4 * c as usize, &args) }?;
        let args = [T(&partial), T(dw), I32(parts as i32), I32(c as i32)];
        // SAFETY: it reads partial [parts, c] and adds to dw [c]; threads beyond column c write nothing.
        unsafe { kernels.launch("add_columns", (c + 31) / 32, [32, 8], 0, &args) }?;
        Ok(dx)
    }

    fn rope(&self, x: &Tensor, r: Rotation) -> Result<()> {
        let Rotation { positions, cos, sin, heads, head_dim, inverse } = r;
        let (rows, width) = matrix("rope", x)?;
        let half = head_dim / 2;
        let table = cos.numel() as i64;
        need(
            "rope",
            &[
                ("x", x, x.kind(), rows * width),
                ("positions", positions, Kind::Int64, rows),
                ("cos", cos, Kind::Float, table),
                ("sin", sin, Kind::Float, table),
            ],
        )?;
        if heads * head_dim > width || head_dim % 2 != 0 || table % half.max(1) != 0 {
            return Err(Error::new(format!("rope: {heads} heads of {head_dim} do not fit {:?}", x.size())));
        }
        let pack = pack(x);
        let together = if width % pack == 0 { half } else { width }; // rows and halves must both be whole packs
        let args = [
            T(x),
            T(positions),
            T(cos),
            T(sin),
            I32(width as i32),
            I32(heads as i32),
            I32(half as i32),
            F32(if inverse { -1.0 } else { 1.0 }),
            wide(together, pack, &[x, cos, sin]),
        ];
        let block = threads(heads * ((half + pack - 1) / pack) * pack, pack);
        // SAFETY: block r rotates the first heads * head_dim columns of row r, which are not more than its width.
        // Positions are the caller's promise: comparing them with the tables' length would wait for the GPU.
        unsafe { Launcher::rows(x)?.launch("rope", rows, block, 0, &args) }
    }

    fn attention(&self, qkv: &Tensor, spans: &Spans, h: Heads) -> Result<(Tensor, Tensor)> {
        check_attention(qkv, spans, h, None)?;
        match flash::fits(qkv, h)? {
            true => flash::forward(qkv, spans, h),
            false => Composed.attention(qkv, spans, h),
        }
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
        check_attention(qkv, spans, h, Some([dout, out, lse]))?;
        match flash::fits(qkv, h)? {
            true => flash::backward(dout, qkv, out, lse, spans, h),
            false => Composed.attention_backward(dout, qkv, out, lse, spans, h),
        }
    }

    fn decode_attention(&self, qkv: &Tensor, cache: KeysValues, h: Heads) -> Result<Tensor> {
        let KeysValues { keys, values, slot, position, first, longest } = cache;
        let (kind, device, d) = (qkv.kind(), qkv.device(), h.head_dim);
        let pack = pack(qkv);
        if !matches!(kind, Kind::Float | Kind::BFloat16) || (d + pack - 1) / pack > DECODE_THREADS {
            return Composed.decode_attention(qkv, cache, h);
        }
        let &[slots, kv_heads, capacity, _] = &keys.size()[..] else {
            return Err(Error::new(format!("decode_attention: keys of {:?}", keys.size())));
        };
        if kv_heads != h.kv_heads || kv_heads < 1 || h.heads % kv_heads != 0 || h.batch < 1 {
            return Err(Error::new(format!(
                "decode_attention: {h:?} and keys of {:?} do not fit",
                keys.size()
            )));
        }
        let cached = slots * kv_heads * capacity * d;
        need(
            "decode_attention",
            &[
                ("qkv", qkv, kind, h.batch * (h.heads + 2 * kv_heads) * d),
                ("keys", keys, kind, cached),
                ("values", values, kind, cached),
                ("slot", slot, Kind::Int64, h.batch),
                ("position", position, Kind::Int64, h.batch),
                ("first", first.unwrap_or(position), Kind::Int64, h.batch),
            ],
        )?;
        let chunks = (longest.clamp(1, capacity) + DECODE_CHUNK - 1) / DECODE_CHUNK;
        let group = h.heads / kv_heads;
        let out = Tensor::empty([h.batch, h.heads * d], (kind, device));
        let float = |last| Tensor::empty([h.batch, h.heads, chunks, last], (Kind::Float, device));
        let (partial, statistics) = (float(d), float(2));
        let kernels = Launcher::decode(qkv)?;
        let args = [
            T(qkv),
            T(keys),
            T(values),
            T(slot),
            T(position),
            opt(first),
            T(&partial),
            T(&statistics),
            I64(slots),
            I64(capacity),
            I32(h.heads as i32),
            I32(kv_heads as i32),
            I32(d as i32),
            I32(chunks as i32),
            F32(h.scale as f32),
            F32(h.softcap.unwrap_or(0.0) as f32),
            wide(d, pack, &[qkv, keys, values]),
        ];
        let shared = 4 * (group * (d + DECODE_CHUNK) + DECODE_THREADS * DECODE_TILE * pack);
        let block = [DECODE_THREADS as u32, 1];
        // SAFETY: a block reads one row of qkv and writes one chunk of partial and statistics; slots and positions are compared
        // with the caches' sizes, of which it reads and writes what lies in the row's slot.
        unsafe {
            kernels.launch("decode_attention", h.batch * kv_heads * chunks, block, shared as usize, &args)
        }?;
        let args = [
            T(&partial),
            T(&statistics),
            T(slot),
            T(position),
            opt(first),
            T(&out),
            I64(slots),
            I64(capacity),
            I32(h.heads as i32),
            I32(d as i32),
            I32(chunks as i32),
        ];
        // SAFETY: a block reads the chunks of one row and head, as many as there are, and writes its d elements of out.
        unsafe { kernels.launch("decode_combine", h.batch * h.heads, threads(d, 1), 0, &args) }?;
        Ok(out)
    }

    fn swiglu(&self, gu: &Tensor) -> Result<Tensor> {
        let (rows, f) = matrix("swiglu", gu).map(|(rows, c)| (rows, c / 2))?;
        need("swiglu", &[("gu", gu, gu.kind(), rows * 2 * f)])?;
        let a = Tensor::empty([rows, f], (gu.kind(), gu.device()));
        let args = [T(gu), T(&a), I32(f as i32), wide(f, pack(gu), &[gu, &a])];
        // SAFETY: block r reads row r of gu [rows, 2f] and writes row r of a [rows, f]: checked above, or made here.
        unsafe { Launcher::rows(gu)?.launch("swiglu", rows, threads(f, pack(gu)), 0, &args) }?;
        Ok(a)
    }

    fn swiglu_backward(&self, gu: &Tensor, da: &Tensor) -> Result<()> {
        let (rows, f) = matrix("swiglu_backward", gu).map(|(rows, c)| (rows, c / 2))?;
        need("swiglu_backward", &[("gu", gu, gu.kind(), rows * 2 * f), ("da", da, gu.kind(), rows * f)])?;
        let args = [T(gu), T(da), I32(f as i32), wide(f, pack(gu), &[gu, da])];
        // SAFETY: block r reads and writes row r of gu [rows, 2f] and of da [rows, f].
        unsafe { Launcher::rows(gu)?.launch("swiglu_backward", rows, threads(f, pack(gu)), 0, &args) }
    }

    fn log_softmax(
        &self,
        logits: &Tensor,
        labels: &Tensor,
        coef: Option<&Tensor>,
        logp: &Tensor,
        entropy: Option<&Tensor>,
    ) -> Result<()> {
        let (rows, v) = matrix("log_softmax", logits)?;
        need(
            "log_softmax",
            &[
                ("logits", logits, logits.kind(), rows * v),
                ("labels", labels, Kind::Int64, rows),
                ("logp", logp, Kind::Float, rows),
                ("coef", coef.unwrap_or(logp), Kind::Float, rows),
                ("entropy", entropy.unwrap_or(logp), Kind::Float, rows),
            ],
        )?;
        let args = [
            T(logits),
            T(labels),
            opt(coef),
            T(logp),
            opt(entropy),
            I32(v as i32),
            wide(v, pack(logits), &[logits]),
        ];
        // SAFETY: block r reads and writes row r of logits and element r of the others; it compares the label with v.
        unsafe { Launcher::rows(logits)?.launch("log_softmax", rows, [1024, 1], 0, &args) }
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
        let n = p.numel() as i64;
        let float = |name, t| (name, t, Kind::Float, n);
        need("adamw", &[float("p", p), float("g", g), float("m", m), float("v", v)])?;
        if let Some(c) = copy {
            need("adamw", &[float("p", p), ("copy", c, Kind::BFloat16, n)])?;
        }
        let [decay, beta1, rest1, beta2, rest2, eps, rate, root2, scale] = adamw_numbers(o);
        let args = [
            T(p),
            T(g),
            T(m),
            T(v),
            opt(copy),
            I64(n),
            decay,
            beta1,
            rest1,
            beta2,
            rest2,
            eps,
            rate,
            root2,
            scale,
            wide(0, 4, &[p, g, m, v, copy.unwrap_or(p)]),
        ];
        // SAFETY: all tensors have n elements, and threads beyond them return.
        unsafe { Launcher::optim(p)?.launch("adamw", blocks(n, 4), [256, 1], 0, &args) }
    }

    /// The sum over all tensors; the host waits once.
    fn sum_squares(&self, tensors: &[&Tensor]) -> Result<f64> {
        let Some(first) = tensors.first() else { return Ok(0.0) };
        // As many parts on every device, so that the sum has the same bits.
        let parts = |t: &Tensor| blocks(t.numel() as i64, 4).min(1024);
        let total: i64 = tensors.iter().map(|t| parts(t)).sum();
        let double = (Kind::Double, first.device());
        let (partial, out) = (Tensor::zeros([total], double), Tensor::zeros([1], double));
        let kernels = Launcher::optim(first)?;
        let mut slot = 0;
        for t in tensors {
            let n = t.numel() as i64;
            need(
                "sum_squares",
                &[("x", first, Kind::Float, first.numel() as i64), ("x", t, Kind::Float, n)],
            )?;
            let args = [T(t), T(&partial.narrow(0, slot, parts(t))), I64(n), wide(0, 4, &[t])];
            // SAFETY: it reads n elements of t; block b writes element b of its part of partial.
            unsafe { kernels.launch("sum_squares", parts(t), [256, 1], 0, &args) }?;
            slot += parts(t);
        }
        // SAFETY: it reads all of partial and writes the one element of out.
        unsafe { kernels.launch("add_doubles", 1, [256, 1], 0, &[T(&partial), T(&out), I32(total as i32)]) }?;
        Ok(out.f_double_value(&[0])?)
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
        let (n, c) = matrix("dropout", x)?;
        need("dropout", &[("x", x, x.kind(), n * c), ("rows", rows, Kind::Int64, n)])?;
        let y = x.empty_like();
        let args = [
            T(x),
            T(rows),
            T(&y),
            U64(key),
            I32(threshold as i32),
            F32(scale as f32),
            I32(first as i32),
            I32(c as i32),
            wide(c, pack(x), &[x, &y]),
        ];
        // SAFETY: block r reads row r of x and rows[r], and writes row r of y: checked above, or made here.
        unsafe { Launcher::rows(x)?.launch("dropout", n, threads(c, pack(x)), 0, &args) }?;
        Ok(y)
    }

    fn accumulate(&self, dst: &Tensor, src: &Tensor, add: bool) -> Result<()> {
        let n = src.numel() as i64;
        need("accumulate", &[("src", src, src.kind(), n), ("dst", dst, Kind::Float, n)])?;
        let args = [T(dst), T(src), I64(n), I32(add as i32), wide(0, pack(src), &[dst, src])];
        // SAFETY: both tensors have n elements, and threads beyond them return.
        unsafe { Launcher::rows(src)?.launch("accumulate", blocks(n, pack(src)), [256, 1], 0, &args) }
    }

    fn embedding_backward(&self, dx: &Tensor, ids: &Tensor, dw: &Tensor) -> Result<()> {
        let (v, c) = matrix("embedding_backward", dw)?;
        let n = ids.numel() as i64;
        need(
            "embedding_backward",
            &[("dx", dx, dx.kind(), n * c), ("ids", ids, Kind::Int64, n), ("dw", dw, Kind::Float, v * c)],
        )?;
        let (sorted, order) = ids.view([-1]).f_sort_stable(true, 0, false)?;
        // Ids that occur often are the work of several blocks.
        let runs = 2 * ((n + EMBEDDING_RUN - 1) / EMBEDDING_RUN);
        let partial = Tensor::empty([runs, c], (Kind::Float, dx.device()));
        let args = [
            T(dx),
            T(&sorted),
            T(&order),
            T(dw),
            T(&partial),
            I64(n),
            I64(v),
            I32(c as i32),
            wide(c, pack(dx), &[dx, dw, &partial]),
        ];
        let kernels = Launcher::rows(dx)?;
        // SAFETY: sorted and order, which is a permutation of 0..n, have n elements, dx is [n, c]; ids are compared
        // with the v rows of dw, and each row of dw and partial, of which there are two for every EMBEDDING_RUN tokens, is
        // written by one block.
        unsafe { kernels.launch("embedding_backward", n, threads(c, pack(dx)), 0, &args) }?;
        let args = [T(&sorted), T(&partial), T(dw), I64(n), I64(v), I32(c as i32)];
        // SAFETY: as before; a block reads the rows of partial of one id, and writes the id's row of dw.
        unsafe { kernels.launch("add_runs", n, threads(c, 1), 0, &args) }
    }
}

/// Flash attention and compositions check little themselves. `backward`: dout, out and lse.
fn check_attention(qkv: &Tensor, spans: &Spans, h: Heads, backward: Option<[&Tensor; 3]>) -> Result<()> {
    let tokens = qkv.size()[0];
    if h.batch < 1 || h.kv_heads < 1 || h.heads % h.kv_heads != 0 || tokens % h.batch != 0 {
        return Err(Error::new(format!("attention: {h:?} and qkv of {:?} do not fit", qkv.size())));
    }
    let (kind, out) = (qkv.kind(), tokens * h.heads * h.head_dim);
    let mut all = vec![("qkv", qkv, kind, tokens * (h.heads + 2 * h.kv_heads) * h.head_dim)];
    all.extend(spans.start().map(|start| ("start", start, Kind::Int64, tokens)));
    if let Some([dout, o, lse]) = backward {
        all.extend([("dout", dout, kind, out), ("out", o, kind, out)]);
        if lse.numel() as i64 != h.heads * tokens {
            return Err(Error::new(format!("attention: lse of {:?} for {tokens} tokens", lse.size())));
        }
    }
    need("attention", &all)
}
