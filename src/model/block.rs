//! A block: attention and MLP, each added to the stream, with norms before them (Touvron et al. 2023), on what they give, or
//! both. The backward stands beside the forward.
//!
//! ```text
//! x2 = x  + after1(attention(before1(x)))
//! y  = x2 + after2(mlp(before2(x2)))
//! ```
//!
//! Attention and MLP take all N rows; the stream and its norms are of this rank's n, see [`super::shared_rows`].

use kernels::trace;
use tch::Tensor;

use crate::config::sections::Recompute;
use crate::error::Result;
use crate::model::layout::BlockParts;
use crate::model::linear::{KeptInner, Linear, LinearGrad};
use crate::model::llama::BlockContext;
use crate::model::norm::RmsNorm;
use crate::model::shared_rows::GatheredRows;
use crate::model::{attention, mlp};

/// What a norm on an output keeps: its input T [N, C], and the statistics A `[N]`.
type After = (Tensor, Tensor);

/// What a block's forward makes for its backward.
pub(super) struct BlockRest {
    /// Statistics of the norms before attention and MLP, A `[N]`
    before: [Option<Tensor>; 2],
    pub(super) attention: attention::AttentionSaved,
    /// After the attention's residual [N, C]
    x2: Tensor,
    pub(super) mlp: mlp::MlpSaved,
    /// Of the norms after attention and MLP; the second is there when the forward is done.
    after: [Option<After>; 2],
}

/// What a block's forward keeps for its backward; what is computed again is none.
pub(super) struct BlockSaved {
    /// The block's input [N, C]
    x: Tensor,
    pub(super) rest: Option<BlockRest>,
    /// The experts that the tokens went to, int64 [N, k]: kept under recomputation, too.
    experts: Option<Tensor>,
    /// What each adapter keeps.
    pub(super) inner: Vec<KeptInner>,
}

impl BlockSaved {
    /// Drops what is to be computed again.
    pub(super) fn new(
        x: &Tensor,
        mut rest: BlockRest,
        inner: Vec<KeptInner>,
        recompute: Recompute,
    ) -> BlockSaved {
        let experts = rest.mlp.routed().map(|r| r.experts.shallow_clone());
        let rest = match recompute {
            Recompute::None => Some(rest),
            Recompute::Selective => {
                rest.mlp.drop_gate_up();
                Some(rest)
            }
            Recompute::Full => {
                inner.iter().for_each(|kept| drop(kept.take()));
                None
            }
        };
        BlockSaved { x: x.shallow_clone(), rest, experts, inner }
    }
}

/// x normalised by a weight (x itself without one), and the statistics.
fn before(norm: RmsNorm, x: &Tensor, w: Option<&Tensor>) -> Result<(Tensor, Option<Tensor>)> {
    match w {
        None => Ok((x.shallow_clone(), None)),
        Some(w) => norm.forward(x, w).map(|(y, rstd)| (y, Some(rstd))),
    }
}

/// What [`before`] returned, made again from the statistics rather than kept.
fn again(norm: RmsNorm, x: &Tensor, w: Option<&Tensor>, rstd: &Option<Tensor>) -> Result<Tensor> {
    match (w, rstd) {
        (Some(w), Some(rstd)) => norm.again(x, w, rstd),
        _ => Ok(x.shallow_clone()),
    }
}

/// The backward of [`before`], whose output's gradient is dh: the gradient of x, to which the residual adds d; adds to the
/// weight's.
fn before_backward(
    norm: RmsNorm,
    dh: &Tensor,
    x: &Tensor,
    rstd: &Option<Tensor>,
    d: &Tensor,
    w: Option<&Tensor>,
    dw: Option<&Tensor>,
) -> Result<Tensor> {
    match (w, rstd, dw) {
        (Some(w), Some(rstd), Some(dw)) => norm.backward(dh, x, w, rstd, Some(d), dw),
        _ => Ok(d + dh),
    }
}

/// residual + the output, normalised where there is a weight. `output(residual)` gives the output, plus the residual if there is
/// one: without a norm both are one product. Of tensor-parallel ranks each gives a part of the output, [N, C], of all rows.
fn after(
    c: &BlockContext,
    residual: &Tensor,
    w: Option<&Tensor>,
    output: impl FnOnce(Option<&Tensor>) -> Result<Tensor>,
) -> Result<(Tensor, Option<After>)> {
    let Some(w) = w else { return Ok((c.rows.sum_onto(residual, output)?, None)) };
    let out = c.rows.sum(output(None)?)?; // [n, C]
    let (y, rstd) = c.norm.forward(&out, w)?; // [n, C], [n]
    Ok((residual + y, Some((out, rstd))))
}

/// The backward of [`after`]: given its gradient d, returns that of the output; adds to the weight's.
fn after_backward(
    norm: RmsNorm,
    d: &Tensor,
    saved: Option<After>,
    w: Option<&Tensor>,
    dw: Option<&Tensor>,
) -> Result<Tensor> {
    match (saved, w, dw) {
        (Some((out, rstd)), Some(w), Some(dw)) => norm.backward(d, &out, w, &rstd, None, dw),
        _ => Ok(d.shallow_clone()),
    }
}

impl BlockParts<Linear> {
    /// Block `i`'s forward up to what its backward needs, for x: T [n, C]. `experts`: where the tokens went in an earlier
    /// forward of it.
    fn begin(&self, x: &Tensor, c: &BlockContext, i: usize, experts: Option<Tensor>) -> Result<BlockRest> {
        let (h1, rstd1) = before(c.norm, x, self.before(0))?; // [n, C], [n]
        let attention = self.attention.begin(c.rows.begin_gather(h1)?, c, i)?;
        let output = |residual: Option<&Tensor>| self.attention.finish(&attention, residual);
        let (x2, after1) = after(c, x, self.after(0), output)?; // [n, C]
        let (h2, rstd2) = before(c.norm, &x2, self.before(1))?; // [n, C], [n]
        let mlp = self.mlp.begin(c.rows.begin_gather(h2)?, experts)?;
        Ok(BlockRest { before: [rstd1, rstd2], attention, x2, mlp, after: [after1, None] })
    }

    /// The rest of the forward: the block's output, T [n, C].
    fn finish(&self, rest: &mut BlockRest, c: &BlockContext) -> Result<Tensor> {
        let output = |residual: Option<&Tensor>| self.mlp.finish(&rest.mlp, residual);
        let (y, after2) = after(c, &rest.x2, self.after(1), output)?; // [n, C]
        rest.after[1] = after2;
        Ok(y)
    }

    /// Block `i`'s output [n, C], and what its backward needs.
    pub(super) fn forward(&self, x: &Tensor, c: &BlockContext, i: usize) -> Result<(Tensor, BlockRest)> {
        let _span = trace::computing(|| format!("block {i}: forward"));
        let mut rest = self.begin(x, c, i, None)?;
        let y = self.finish(&mut rest, c)?;
        Ok((y, rest))
    }

    /// Block `i`'s output [N, C] for tokens whose rows have read others before; `attend`: see
    /// [`attention::Attention::cached`].
    pub(super) fn cached(
        &self,
        x: &Tensor,
        c: &BlockContext,
        i: usize,
        attend: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let h1 = before(c.norm, x, self.before(0))?.0; // [N, C]
        let output = |residual: Option<&Tensor>| self.attention.cached(&h1, c, i, residual, attend);
        let x2 = after(c, x, self.after(0), output)?.0; // [N, C]
        let h2 = before(c.norm, &x2, self.before(1))?.0; // [N, C]
        let mlp = self.mlp.begin(GatheredRows::here(h2), None)?;
        Ok(after(c, &x2, self.after(1), |residual| self.mlp.finish(&mlp, residual))?.0)
    }

    /// Given the output's gradient dy (T [n, C]) of block `i`, adds to `grad` and returns the input's gradient, T [n, C]; if that
    /// is not `needed`, nothing, and the first norm has no gradient either, which is a by-product. `balance`: the gradient of the
    /// router's probabilities, A [N, E], that does not come from `dy`.
    ///
    /// Each residual passes its gradient on; f' is the product with f's transposed Jacobian:
    ///
    /// ```text
    /// dx2 = dy  + before2'(mlp'(after2'(dy)))
    /// dx  = dx2 + before1'(attention'(after1'(dx2)))
    /// ```
    #[expect(clippy::too_many_arguments, reason = "the block, its gradients, and where it stands")]
    pub(super) fn backward(
        &self,
        grad: &BlockParts<LinearGrad>,
        dy: Tensor,
        saved: BlockSaved,
        c: &BlockContext,
        i: usize,
        balance: Option<&Tensor>,
        needed: bool,
    ) -> Result<Option<Tensor>> {
        let _span = trace::computing(|| format!("block {i}: backward"));
        let x = saved.x;
        let rest = match saved.rest {
            Some(rest) => rest,
            None => {
                let mut rest = self.begin(&x, c, i, saved.experts)?;
                if self.after(1).is_some() {
                    let _ = self.finish(&mut rest, c)?;
                }
                rest
            }
        };
        let BlockRest { before: [rstd1, rstd2], attention, x2, mlp, after: [after1, after2] } = rest;
        let dm = after_backward(c.norm, &dy, after2, self.after(1), grad.after(1))?; // [n, C]
        // In the order in which they are needed.
        let dm = c.rows.begin_gather(dm)?; // [N, C]
        let h2 = c.rows.begin_gather(again(c.norm, &x2, self.before(1), &rstd2)?)?; // [N, C]
        let dh2 = self.mlp.backward(dm, h2, mlp, &grad.mlp, balance, &c.rows)?; // [n, C]
        let dx2 = before_backward(c.norm, &dh2, &x2, &rstd2, &dy, self.before(1), grad.before(1))?; // [n, C]
        drop((dh2, dy, x2));
        let da = after_backward(c.norm, &dx2, after1, self.after(0), grad.after(0))?; // [n, C]
        let da = c.rows.begin_gather(da)?; // [N, C]
        let dqkv = self.attention.backward(da, attention, &grad.attention, c, i)?; // [N, (H + 2K) D]
        let qkv = &self.attention.qkv;
        // Before the sum of dh1, which would be waited for with it.
        let h1 = c.rows.begin_gather(again(c.norm, &x, self.before(0), &rstd1)?)?; // [N, C]
        let of_weights = || qkv.backward_weight(&dqkv, &h1.finish()?, &grad.attention.qkv);
        if !needed {
            of_weights()?;
            return Ok(None);
        }
        let dh1 = c.rows.sum_during(|| qkv.backward_input(&dqkv), of_weights)?; // [n, C]
        drop(dqkv);
        before_backward(c.norm, &dh1, &x, &rstd1, &dx2, self.before(0), grad.before(0)).map(Some)
    }
}
