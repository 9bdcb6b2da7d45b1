//! The first half of a block: causal attention with grouped queries and rotary positions. Every backward stands beside its
//! forward.
//!
//! Shapes: B rows, T positions, N = B * T tokens, C = hidden size, H query heads, K key-value heads, D head dimension.

use kernels::ops::{self, Heads};
use tch::Tensor;

use crate::error::Result;
use crate::model::linear::{Linear, LinearGrad};
use crate::model::llama::BlockContext;
use crate::model::shared_rows::GatheredRows;

/// o(attention(rope(qk_norm(qkv(x)))))
pub struct Attention<L> {
    /// [(H + 2K) * D, C]
    pub qkv: L,
    /// [C, H * D]
    pub o: L,
    /// Of each head's query and key, `[D]`; or of all of them, `[H D]` and `[K D]`.
    pub qk_norm: Option<[Tensor; 2]>,
}

/// Queries and keys before their norm, with its statistics: [N H, D] and [N K, D], or [N, H D] and [N, K D].
type QkNormSaved = [(Tensor, Tensor); 2];

/// What a forward keeps for its backward.
pub(super) struct AttentionSaved {
    qk: Option<QkNormSaved>,
    /// After rotation [N, (H + 2K) D]
    pub(super) qkv: Tensor,
    /// Before the output projection [N, H D], and the softmax's log-sum-exp [B, H, T]
    out: Tensor,
    lse: Tensor,
}

impl Attention<Linear> {
    /// Queries, keys and values (T [N, (H + 2K) D]) are normalised and rotated, in place. Returns what the norm's backward needs.
    fn place(&self, qkv: &Tensor, c: &BlockContext, i: usize) -> Result<Option<QkNormSaved>> {
        let qk = self.norm_heads(qkv, c)?;
        rotate(qkv, c, i, false)?;
        Ok(qk)
    }

    /// The forward of block `i` up to what its backward needs, for x: T [N, C].
    pub(super) fn begin(&self, x: GatheredRows, c: &BlockContext, i: usize) -> Result<AttentionSaved> {
        let qkv = x.product(self.qkv.takes_rows_apart(), |x| self.qkv.forward(x))?.1; // [N, (H + 2K) D]
        let qk = self.place(&qkv, c, i)?;
        let (out, lse) = match c.own(i) {
            None => ops::attention(&qkv, c.spans(i), c.heads)?, // [N, H D], [B, H, T]
            Some(own) => {
                let [q, kv] = queries_and_rest(&qkv, c.heads);
                ops::attention_of(&q, &c.sequence.gather(&kv)?, own, c.heads)?
            }
        };
        Ok(AttentionSaved { qk, qkv, out, lse })
    }

    /// The rest of the forward: the output, T [N, C], plus a residual; a tensor-parallel rank's part of the output.
    pub(super) fn finish(&self, saved: &AttentionSaved, residual: Option<&Tensor>) -> Result<Tensor> {
        self.o.forward_onto(&saved.out, residual)
    }

    /// The forward for tokens whose rows have read others before, for x: T [N, C]. `attend` takes the rotated queries, keys and
    /// values, T [N, (H + 2K) D], and returns what they see, T [N, H D]. Returns the output, T [N, C], plus a residual.
    pub(super) fn cached(
        &self,
        x: &Tensor,
        c: &BlockContext,
        i: usize,
        residual: Option<&Tensor>,
        attend: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let qkv = self.qkv.forward(x)?; // [N, (H + 2K) D]
        self.place(&qkv, c, i)?;
        self.o.forward_onto(&attend(&qkv)?, residual)
    }

    /// Given the output's gradient dy (T [N, C]), adds to the gradients but for those of q, k and v. Returns the projections'
    /// gradient, T [N, (H + 2K) D]: the output's gradient of `self.qkv`.
    ///
    /// ```text
    /// y = out Wo^T            dout  = dy Wo,      dWo += dy^T out
    /// out = attention(r)      dr    = attention's gradient, see kernels/src/ops/composed.rs
    /// r = R norm(qkv)         dqkv  = norm'(R^T dr), for a rotation R, of queries and keys alone
    /// qkv = x Wqkv^T          dWqkv += dqkv^T x,  dx = dqkv Wqkv
    /// ```
    pub(super) fn backward(
        &self,
        dy: GatheredRows,
        saved: AttentionSaved,
        grad: &Attention<LinearGrad>,
        c: &BlockContext,
        i: usize,
    ) -> Result<Tensor> {
        let (dy, dout) = dy.product(self.o.takes_rows_apart(), |dy| self.o.backward_input(dy))?; // [N, C], [N, H D]
        self.o.backward_weight(&dy, &saved.out, &grad.o)?;
        drop(dy);
        let AttentionSaved { qk, qkv, out, lse } = saved;
        let dqkv = match c.own(i) {
            None => ops::attention_backward(&dout, &qkv, &out, &lse, c.spans(i), c.heads)?, // [N, (H + 2K) D]
            Some(own) => {
                let [q, kv] = queries_and_rest(&qkv, c.heads);
                let kv = c.sequence.gather(&kv)?; // once more, rather than kept
                let (dq, dkv) = ops::attention_of_backward(&dout, &q, &kv, [&out, &lse], own, c.heads)?;
                Tensor::f_cat(&[dq, c.sequence.sum(&dkv)?.f_to_kind(qkv.kind())?], 1)?
            }
        };
        drop(dout);
        rotate(&dqkv, c, i, true)?; // R^T rotates back
        self.norm_heads_backward(grad, &dqkv, qk, c)?;
        Ok(dqkv)
    }

    /// Normalises queries and keys in place, where the model does, in pieces of their weights' sizes. Returns what they were,
    /// and the statistics.
    fn norm_heads(&self, qkv: &Tensor, c: &BlockContext) -> Result<Option<QkNormSaved>> {
        let Some(norms) = &self.qk_norm else { return Ok(None) };
        let [q, k] = queries_and_keys(qkv, c.heads);
        let apply = |mut x: Tensor, norm: &Tensor| -> Result<(Tensor, Tensor)> {
            let before = x.reshape([-1, norm.numel() as i64]).contiguous(); // [N H, D], or [N, H D]; of keys K for H
            let (y, rstd) = c.norm.forward(&before, norm)?; // the same, [N H] or [N]
            x.copy_(&y.view_as(&x));
            Ok((before, rstd))
        };
        Ok(Some([apply(q, &norms[0])?, apply(k, &norms[1])?]))
    }

    /// The backward of `norm_heads`, in place: that of the norm on each query and key.
    fn norm_heads_backward(
        &self,
        grad: &Attention<LinearGrad>,
        dqkv: &Tensor,
        saved: Option<QkNormSaved>,
        c: &BlockContext,
    ) -> Result<()> {
        let (Some(norms), Some(dnorms), Some(saved)) = (&self.qk_norm, &grad.qk_norm, saved) else {
            return Ok(());
        };
        for (i, mut dx) in queries_and_keys(dqkv, c.heads).into_iter().enumerate() {
            let (before, rstd) = &saved[i];
            let dy = dx.reshape(before.size()).contiguous(); // [N H, D], or [N, H D]; of keys K for H
            let d = c.norm.backward(&dy, before, &norms[i], rstd, None, &dnorms[i])?;
            dx.copy_(&d.view_as(&dx));
        }
        Ok(())
    }
}

/// Rotates queries and keys of block `i` in place.
fn rotate(qkv: &Tensor, c: &BlockContext, i: usize, inverse: bool) -> Result<()> {
    let heads = c.heads.heads + c.heads.kv_heads;
    let (cos, sin) = c.rope(i);
    Ok(ops::rope(qkv, &c.positions, cos, sin, heads, c.heads.head_dim, inverse)?)
}

/// The columns of qkv (T [N, (H + 2K) D]) that hold the queries, and those that hold the keys.
fn queries_and_keys(qkv: &Tensor, h: Heads) -> [Tensor; 2] {
    let (q, k) = (h.heads * h.head_dim, h.kv_heads * h.head_dim);
    [qkv.narrow(1, 0, q), qkv.narrow(1, q, k)] // [N, H D], [N, K D]
}

/// The queries, T [N, H D], and the keys and values, T [N, 2K D], of projections.
fn queries_and_rest(qkv: &Tensor, h: Heads) -> [Tensor; 2] {
    let (q, rest) = (h.heads * h.head_dim, 2 * h.kv_heads * h.head_dim);
    [qkv.narrow(1, 0, q).contiguous(), qkv.narrow(1, q, rest).contiguous()]
}
