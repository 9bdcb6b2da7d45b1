//! A block: attention and MLP, each added to the stream, with norms before them (Touvron et al. 2023), on what they give, or
//! both. The backward stands beside the forward.
//!
//! ```text
//! x2 = x  + after1(attention(before1(x)))
//! y  = x2 + after2(mlp(before2(x2)))
//! ```

use tch::Tensor;

use crate::config::sections::Recompute;
use crate::error::Result;
use crate::model::layout::BlockParts;
use crate::model::linear::{KeptInner, Linear, LinearGrad};
use crate::model::llama::BlockContext;
use crate::model::norm::RmsNorm;
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

/// Where a block's backward stands before the gradient of its input, which not every caller needs.
pub(super) struct BeforeInput {
    /// The gradient of the projections, T [N, (H + 2K) D]
    dqkv: Tensor,
    /// The gradient of the stream after the attention, T [N, C]
    dx2: Tensor,
    /// The block's input, T [N, C], and its statistics, A `[N]`
    x: Tensor,
    rstd1: Option<Tensor>,
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
/// one: without a norm both are one product.
fn after(
    norm: RmsNorm,
    residual: &Tensor,
    w: Option<&Tensor>,
    output: impl FnOnce(Option<&Tensor>) -> Result<Tensor>,
) -> Result<(Tensor, Option<After>)> {
    let Some(w) = w else { return Ok((output(Some(residual))?, None)) };
    let out = output(None)?; // [N, C]
    let (y, rstd) = norm.forward(&out, w)?; // [N, C], [N]
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
    /// Block `i`'s forward up to what its backward needs, for x: T [N, C]. `experts`: where the tokens went in an earlier
    /// forward of it.
    fn begin(&self, x: &Tensor, c: &BlockContext, i: usize, experts: Option<Tensor>) -> Result<BlockRest> {
        let (h1, rstd1) = before(c.norm, x, self.before(0))?; // [N, C], [N]
        let attention = self.attention.begin(&h1, c, i)?;
        drop(h1);
        let output = |residual: Option<&Tensor>| self.attention.finish(&attention, residual);
        let (x2, after1) = after(c.norm, x, self.after(0), output)?; // [N, C]
        let (h2, rstd2) = before(c.norm, &x2, self.before(1))?; // [N, C], [N]
        let mlp = self.mlp.begin(&h2, experts)?;
        Ok(BlockRest { before: [rstd1, rstd2], attention, x2, mlp, after: [after1, None] })
    }

    /// The rest of the forward: the block's output, T [N, C].
    fn finish(&self, rest: &mut BlockRest, c: &BlockContext) -> Result<Tensor> {
        let output = |residual: Option<&Tensor>| self.mlp.finish(&rest.mlp, residual);
        let (y, after2) = after(c.norm, &rest.x2, self.after(1), output)?; // [N, C]
        rest.after[1] = after2;
        Ok(y)
    }

    /// Block `i`'s output [N, C], and what its backward needs.
    pub(super) fn forward(&self, x: &Tensor, c: &BlockContext, i: usize) -> Result<(Tensor, BlockRest)> {
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
        let x2 = after(c.norm, x, self.after(0), output)?.0; // [N, C]
        let h2 = before(c.norm, &x2, self.before(1))?.0; // [N, C]
        let mlp = self.mlp.begin(&h2, None)?;
        Ok(after(c.norm, &x2, self.after(1), |residual| self.mlp.finish(&mlp, residual))?.0)
    }

    /// Given the output's gradient dy (T [N, C]) of block `i`, adds to `grad` all but the gradient of the first norm.
    /// [`BlockParts::backward_input`] adds that one and gives the input's gradient. `balance`: the gradient of the router's
    /// probabilities, A [N, E], that does not come from `dy`.
    ///
    /// Each residual passes its gradient on; f' is the product with f's transposed Jacobian:
    ///
    /// ```text
    /// dx2 = dy  + before2'(mlp'(after2'(dy)))
    /// dx  = dx2 + before1'(attention'(after1'(dx2)))
    /// ```
    pub(super) fn backward(
        &self,
        grad: &BlockParts<LinearGrad>,
        dy: Tensor,
        saved: BlockSaved,
        c: &BlockContext,
        i: usize,
        balance: Option<&Tensor>,
    ) -> Result<BeforeInput> {
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
        let dm = after_backward(c.norm, &dy, after2, self.after(1), grad.after(1))?; // [N, C]
        let h2 = again(c.norm, &x2, self.before(1), &rstd2)?; // [N, C]
        let dh2 = self.mlp.backward(&dm, h2, mlp, &grad.mlp, balance)?; // [N, C]
        drop(dm);
        let dx2 = before_backward(c.norm, &dh2, &x2, &rstd2, &dy, self.before(1), grad.before(1))?; // [N, C]
        drop((dh2, dy, x2));
        let da = after_backward(c.norm, &dx2, after1, self.after(0), grad.after(0))?; // [N, C]
        let h1 = || again(c.norm, &x, self.before(0), &rstd1); // [N, C]
        let dqkv = self.attention.backward(&da, h1, attention, &grad.attention, c, i)?; // [N, (H + 2K) D]
        Ok(BeforeInput { dqkv, dx2, x, rstd1 })
    }

    /// The input's gradient, T [N, C]; adds to that of the first norm.
    pub(super) fn backward_input(
        &self,
        grad: &BlockParts<LinearGrad>,
        before: BeforeInput,
        c: &BlockContext,
    ) -> Result<Tensor> {
        let BeforeInput { dqkv, dx2, x, rstd1 } = before;
        let dh1 = self.attention.backward_input(&dqkv)?; // [N, C]
        drop(dqkv);
        before_backward(c.norm, &dh1, &x, &rstd1, &dx2, self.before(0), grad.before(0)) // [N, C]
    }
}
