//! Row operations as compositions of libtorch's: what the kernels must compute, and their oracle in the tests.

use tch::{Kind, Tensor};

use super::rows::RowOps;
use super::spans::Spans;
use crate::error::Result;
use crate::tensors::{AdamW, Gain, Heads, KeysValues, Rotation, accumulator};

/// libtorch's operations one after the other, on any device and in any dtype. They check little: shapes that do not fit end
/// in a panic with libtorch's message.
#[derive(Debug, Clone, Copy)]
pub struct Composed;

impl RowOps for Composed {
    fn rms_norm(&self, x: &Tensor, w: Gain, eps: f64) -> Result<(Tensor, Tensor)> {
        let xa = x.to_kind(accumulator(x.kind())); // [N, C]
        let rstd = (xa.square().mean_dim([-1i64].as_slice(), false, None) + eps).rsqrt(); // [N]
        Ok((self.rms_apply(x, w, &rstd)?, rstd))
    }

    fn rms_apply(&self, x: &Tensor, w: Gain, rstd: &Tensor) -> Result<Tensor> {
        let a = accumulator(x.kind());
        Ok((x.to_kind(a) * rstd.unsqueeze(-1) * (w.weight.to_kind(a) + w.offset)).to_kind(x.kind()))
    }

    // n = x r, y = g n, for r = (mean(x^2) + eps)^(-1/2) of each row and g = w + offset.
    // dw = sum over rows of dy * n.
    // dr/dx = -r^3 x / C, so dx = r g dy - r^3 x mean(g dy * x) = r (g dy - n mean(g dy * n)).
    fn rms_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: Gain,
        rstd: &Tensor,
        residual: Option<&Tensor>,
        dw: &Tensor,
    ) -> Result<Tensor> {
        let a = accumulator(x.kind());
        let (g, xa, k) = (dy.to_kind(a), x.to_kind(a), rstd.unsqueeze(-1)); // [N, C], [N, C], [N, 1]
        let normed = &xa * &k; // [N, C]
        let mut dw = dw.shallow_clone();
        let _ = dw.g_add_(&(&g * &normed).sum_dim_intlist([0i64].as_slice(), false, None));
        let gw = g * (w.weight.to_kind(a) + w.offset); // [N, C]
        let mean = (&gw * &normed).mean_dim([-1i64].as_slice(), true, None); // [N, 1]
        let mut dx = (gw - normed * mean) * k; // [N, C]
        if let Some(r) = residual {
            dx += r.to_kind(a);
        }
        Ok(dx.to_kind(x.kind()))
    }

    // (p, q) becomes (p cos - q sin, q cos + p sin): a rotation R, whose gradient R^T turns back.
    fn rope(&self, x: &Tensor, r: Rotation) -> Result<()> {
        let Rotation { positions, cos, sin, heads, head_dim, inverse } = r;
        let a = accumulator(x.kind());
        let rows = x.size()[0];
        let view = x.narrow(1, 0, heads * head_dim).view([rows, heads, 2, head_dim / 2]);
        let (mut first, mut second) = (view.select(2, 0), view.select(2, 1)); // [N, heads, D / 2]
        let (p, q) = (first.to_kind(a).copy(), second.to_kind(a).copy());
        let co = cos.index_select(0, positions).unsqueeze(1); // [N, 1, D / 2]
        let mut si = sin.index_select(0, positions).unsqueeze(1); // [N, 1, D / 2]
        if inverse {
            si = si.neg();
        }
        first.copy_(&(&p * &co - &q * &si));
        second.copy_(&(q * co + p * si));
        Ok(())
    }

    fn attention(&self, qkv: &Tensor, spans: &Spans, h: Heads) -> Result<(Tensor, Tensor)> {
        let (q, k, v) = split_heads(qkv, h); // [B, H, T, D]
        let s = scores(&q, &k, spans.start(), h); // [B, H, T, T]
        let lse = s.logsumexp([-1i64].as_slice(), false); // [B, H, T]
        let p = (s - lse.unsqueeze(-1)).exp(); // [B, H, T, T]
        Ok((merge_heads(&p.matmul(&v), qkv.kind()), lse))
    }

    // S = scale Q K^T where it is seen, P = exp(S - lse), O = P V.
    // dV = P^T dO, dP = dO V^T, dS = P * (dP - delta), since a row's sum of P * dP is delta = sum(dO * O).
    // dQ = scale dS K, dK = scale dS^T Q; keys and values add up over the queries' heads of their group.
    // With a cap S = c tanh(Z / c), so dZ = dS * (1 - (S / c)^2).
    fn attention_backward(
        &self,
        dout: &Tensor,
        qkv: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        spans: &Spans,
        h: Heads,
    ) -> Result<Tensor> {
        let (q, k, v) = split_heads(qkv, h); // [B, H, T, D]
        let time = q.size()[2];
        let rows =
            |t: &Tensor| t.to_kind(q.kind()).view([h.batch, time, h.heads, h.head_dim]).transpose(1, 2);
        let (g, o) = (rows(dout), rows(out)); // [B, H, T, D]
        let s = scores(&q, &k, spans.start(), h); // [B, H, T, T]
        let p = (&s - lse.unsqueeze(-1)).exp(); // [B, H, T, T]
        let delta = (&g * o).sum_dim_intlist([-1i64].as_slice(), true, None); // [B, H, T, 1]
        let mut ds = &p * (g.matmul(&v.transpose(-2, -1)) - delta) * h.scale; // [B, H, T, T]
        if let Some(c) = h.softcap {
            // Where nothing is seen the capped score is minus infinity, and p is 0.
            ds *= 1.0 - (s.clamp(-c, c) / c).square();
        }
        let group = |t: Tensor| {
            let size = [h.batch, h.kv_heads, h.heads / h.kv_heads, time, h.head_dim];
            t.view(size).sum_dim_intlist([2i64].as_slice(), false, None)
        };
        let dv = group(p.transpose(-2, -1).matmul(&g)); // [B, K, T, D]
        let dk = group(ds.transpose(-2, -1).matmul(&q)); // [B, K, T, D]
        let kind = qkv.kind();
        Ok(Tensor::cat(
            &[merge_heads(&ds.matmul(&k), kind), merge_heads(&dk, kind), merge_heads(&dv, kind)],
            1,
        ))
    }

    fn decode_attention(&self, qkv: &Tensor, cache: KeysValues, h: Heads) -> Result<Tensor> {
        let KeysValues { keys, values, slot, position, first, longest: _ } = cache;
        let (a, d, group) = (accumulator(qkv.kind()), h.head_dim, h.heads / h.kv_heads);
        let all = qkv.view([h.batch, h.heads + 2 * h.kv_heads, d]); // [B, H + 2K, D]
        for (cache, first) in [(keys, h.heads), (values, h.heads + h.kv_heads)] {
            let rows = all.narrow(1, first, h.kv_heads); // [B, K, D]
            let _ = cache.shallow_clone().index_put_(&[Some(slot), None, Some(position)], &rows, false);
        }
        let read = |cache: &Tensor| cache.index_select(0, slot).to_kind(a); // [B, K, capacity, D]
        let q = all.narrow(1, 0, h.heads).reshape([h.batch, h.kv_heads, group, d]).to_kind(a);
        let at = Tensor::arange(keys.size()[2], (Kind::Int64, qkv.device())).unsqueeze(0); // [1, capacity]
        let mut unseen = at.gt_tensor(&position.unsqueeze(1)); // [B, capacity]
        if let Some(first) = first {
            unseen = unseen.logical_or(&at.lt_tensor(&first.unsqueeze(1)));
        }
        let unseen = unseen.view([h.batch, 1, 1, -1]);
        let scores = h.cap(q.matmul(&read(keys).transpose(-2, -1)) * h.scale); // [B, K, group, capacity]
        let scores = scores.masked_fill(&unseen, f64::NEG_INFINITY);
        // What lies beyond a row's position was never written, and 0 * NaN is NaN.
        let seen = read(values).masked_fill(&unseen.transpose(-2, -1), 0.0);
        Ok(scores.softmax(-1, a).matmul(&seen).view([h.batch, h.heads * d]).to_kind(qkv.kind()))
    }

    fn swiglu(&self, gu: &Tensor) -> Result<Tensor> {
        let a = accumulator(gu.kind());
        let parts = gu.to_kind(a).chunk(2, 1); // [N, F] each
        Ok((parts[0].silu() * &parts[1]).to_kind(gu.kind()))
    }

    // a = silu(g) u, silu(g) = g s for s = sigmoid(g), ds/dg = s (1 - s).
    // dg = da u (s + g s (1 - s)), du = da silu(g).
    fn swiglu_backward(&self, gu: &Tensor, da: &Tensor) -> Result<()> {
        let a = accumulator(gu.kind());
        let f = gu.size()[1] / 2;
        let (g, u, d) = (gu.narrow(1, 0, f).to_kind(a), gu.narrow(1, f, f).to_kind(a), da.to_kind(a));
        let s = g.sigmoid(); // [N, F]
        let silu = &g * &s;
        let dg = &d * &u * (&s + &silu * (1.0 - &s));
        let du = d * &silu;
        da.shallow_clone().copy_(&(silu * u)); // from here on d, g and u may be overwritten: in float64 they are views
        gu.narrow(1, 0, f).copy_(&dg);
        gu.narrow(1, f, f).copy_(&du);
        Ok(())
    }

    // log p_y = z_y - log sum exp(z), so d log p_y / dz = onehot(y) - p.
    fn log_softmax(
        &self,
        logits: &Tensor,
        labels: &Tensor,
        coef: Option<&Tensor>,
        logp: &Tensor,
        entropy: Option<&Tensor>,
    ) -> Result<()> {
        let all = logits.log_softmax(-1, accumulator(logits.kind())); // [N, V]
        let valid = labels.ge(0); // [N]
        let index = labels.clamp_min(0).unsqueeze(-1); // [N, 1]
        logp.shallow_clone().copy_(&(all.gather(-1, &index, false).squeeze_dim(-1) * &valid));
        if let Some(e) = entropy {
            e.shallow_clone().copy_(&-(all.exp() * &all).sum_dim_intlist([-1i64].as_slice(), false, None));
        }
        if let Some(c) = coef {
            let c = (c * valid).unsqueeze(-1); // [N, 1]
            let mut d = all.exp() * -&c; // [N, V]
            let _ = d.scatter_add_(-1, &index, &c);
            logits.shallow_clone().copy_(&d);
        }
        Ok(())
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
        let (mut p, mut m, mut v) = (p.shallow_clone(), m.shallow_clone(), v.shallow_clone());
        let g = g * o.grad_scale;
        let _ = p.g_mul_scalar_(1.0 - o.lr * o.weight_decay);
        let _ = m.g_mul_scalar_(o.beta1).g_add_(&(&g * (1.0 - o.beta1)));
        let _ = v.g_mul_scalar_(o.beta2).g_add_(&(g.square() * (1.0 - o.beta2)));
        let [correction1, correction2] = o.corrections();
        let denominator = v.sqrt() / correction2.sqrt() + o.eps;
        let _ = p.g_sub_(&(&m / denominator * (o.lr / correction1)));
        if let Some(c) = copy {
            c.shallow_clone().copy_(&p);
        }
        Ok(())
    }

    fn sum_squares(&self, tensors: &[&Tensor]) -> Result<f64> {
        let one = |x: &&Tensor| x.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]); // host sync
        Ok(tensors.iter().map(one).sum())
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
        let h = mix64(&mix64(rows).bitwise_xor(key as i64)).unsqueeze(-1); // [N, 1]
        let (low, high) = (h.bitwise_and(0xffff_ffff), shifted(&h, 32));
        let columns = Tensor::arange(x.size()[1], (Kind::Int64, x.device())) + i64::from(first); // [C]
        // [N, C]
        let bits = mix32(&(mix32(&low.bitwise_xor_tensor(&columns)) + high).bitwise_and(0xffff_ffff));
        let a = accumulator(x.kind());
        Ok((x.to_kind(a) * scale * bits.ge(i64::from(threshold))).to_kind(x.kind()))
    }

    fn accumulate(&self, dst: &Tensor, src: &Tensor, add: bool) -> Result<()> {
        let mut dst = dst.shallow_clone();
        let src = src.view(dst.size().as_slice());
        if add {
            let _ = dst.g_add_(&src.to_kind(dst.kind()));
        } else {
            dst.copy_(&src);
        }
        Ok(())
    }

    // Row id of the embedding was copied to every token n of that id: its gradient is the sum of their dx[n].
    fn embedding_backward(&self, dx: &Tensor, ids: &Tensor, dw: &Tensor) -> Result<()> {
        let _ = dw.shallow_clone().index_add_(0, &ids.view([-1]), &dx.to_kind(dw.kind()));
        Ok(())
    }
}

/// gelu(g) * u with gelu's tanh form (Hendrycks and Gimpel 2016) for gu: T `[N, 2F]` = (g | u), computed in A and rounded once.
/// Returns T `[N, F]`.
pub fn geglu(gu: &Tensor) -> Result<Tensor> {
    let parts = gu.to_kind(accumulator(gu.kind())).chunk(2, 1); // [N, F] each
    Ok((parts[0].f_gelu("tanh")? * &parts[1]).to_kind(gu.kind()))
}

/// Gradient of [`geglu`], in place: `gu` becomes d gu, `da` becomes gelu(g) * u. dg = da u gelu'(g),
/// du = da gelu(g).
pub fn geglu_backward(gu: &Tensor, da: &Tensor) -> Result<()> {
    let a = accumulator(gu.kind());
    let f = gu.size()[1] / 2;
    let (g, u, d) = (gu.narrow(1, 0, f).to_kind(a), gu.narrow(1, f, f).to_kind(a), da.to_kind(a));
    let gelu = g.f_gelu("tanh")?; // [N, F]
    let dg = g.f_gelu_backward(&(&d * &u), "tanh")?;
    let du = d * &gelu;
    da.shallow_clone().copy_(&(gelu * u)); // from here on d, g and u may be overwritten: they may be views
    gu.narrow(1, 0, f).copy_(&dg);
    gu.narrow(1, f, f).copy_(&du);
    Ok(())
}

/// Queries, keys, values as A `[B, H, T, D]`, keys and values repeated for their groups.
fn split_heads(qkv: &Tensor, h: Heads) -> (Tensor, Tensor, Tensor) {
    let time = qkv.size()[0] / h.batch;
    let x = qkv
        .to_kind(accumulator(qkv.kind()))
        .view([h.batch, time, h.heads + 2 * h.kv_heads, h.head_dim])
        .transpose(1, 2); // [B, H + 2K, T, D]
    let repeat = |t: Tensor| t.repeat_interleave_self_int(h.heads / h.kv_heads, 1, None);
    (
        x.narrow(1, 0, h.heads),
        repeat(x.narrow(1, h.heads, h.kv_heads)),
        repeat(x.narrow(1, h.heads + h.kv_heads, h.kv_heads)),
    )
}

/// Scores `[B, H, T, T]`, minus infinity where a position does not see another.
fn scores(q: &Tensor, k: &Tensor, start: Option<&Tensor>, h: Heads) -> Tensor {
    let time = q.size()[2];
    let at = Tensor::arange(time, (Kind::Int64, q.device())); // [T]
    let mut unseen = at.unsqueeze(0).gt_tensor(&at.unsqueeze(1)).view([1, 1, time, time]);
    if let Some(start) = start {
        // [B, 1, T, 1], against [1, 1, 1, T]
        let first = start.view([h.batch, 1, time, 1]).clamp_min(0).minimum(&at.view([1, 1, time, 1]));
        unseen = unseen.logical_or(&at.view([1, 1, 1, time]).lt_tensor(&first));
    }
    h.cap(q.matmul(&k.transpose(-2, -1)) * h.scale).masked_fill(&unseen, f64::NEG_INFINITY)
}

/// `[B, heads, T, D]` as `[B T, heads D]`.
fn merge_heads(x: &Tensor, kind: Kind) -> Tensor {
    let size = x.size();
    x.transpose(1, 2).reshape([size[0] * size[2], size[1] * size[3]]).to_kind(kind)
}

/// Bits of an integer moved to the right, zeros filled in.
fn shifted(x: &Tensor, by: i64) -> Tensor {
    x.bitwise_right_shift_tensor_scalar(by).bitwise_and((1i64 << (64 - by)) - 1)
}

/// SplitMix64's finalizer, in wrapping int64.
fn mix64(x: &Tensor) -> Tensor {
    let x = x + 0x9e37_79b9_7f4a_7c15u64 as i64;
    let x = x.bitwise_xor_tensor(&shifted(&x, 30)) * 0xbf58_476d_1ce4_e5b9u64 as i64;
    let x = x.bitwise_xor_tensor(&shifted(&x, 27)) * 0x94d0_49bb_1331_11ebu64 as i64;
    x.bitwise_xor_tensor(&shifted(&x, 31))
}

/// lowbias32 of hash-prospector, on 32 bits in int64.
fn mix32(x: &Tensor) -> Tensor {
    let low = |x: Tensor| x.bitwise_and(0xffff_ffff);
    let x = low(x.bitwise_xor_tensor(&shifted(x, 16)) * 0x7feb_352d);
    let x = low(x.bitwise_xor_tensor(&shifted(&x, 15)) * 0x846c_a68bi64);
    x.bitwise_xor_tensor(&shifted(&x, 16))
}
