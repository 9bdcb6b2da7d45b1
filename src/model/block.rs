//! A block: norm, attention, norm, MLP, each pair added to the stream (Touvron et al. 2023). The backward stands beside the
//! forward.
//!
//! ```text
//! x2 = x  + attention(norm1(x))
//! y  = x2 + mlp(norm2(x2))
//! ```

use kernels::ops;
use tch::Tensor;

use crate::config::sections::Recompute;
use crate::error::Result;
use crate::model::layout::Block;
use crate::model::linear::{Linear, LinearGrad};
use crate::model::llama::Context;
use crate::model::{attention, mlp};

/// What a block's forward makes for its backward.
pub(super) struct Rest {
    /// The first norm's statistics, A `[N]`
    rstd1: Tensor,
    pub(super) attention: attention::Saved,
    /// After the attention's residual [N, C]
    x2: Tensor,
    rstd2: Tensor,
    pub(super) mlp: mlp::Saved,
}

/// What a block's forward keeps for its backward; what is computed again is none.
pub(super) struct Saved {
    /// The block's input [N, C]
    x: Tensor,
    pub(super) rest: Option<Rest>,
    /// The experts that the tokens went to, int64 [N, k]: kept under recomputation, too.
    experts: Option<Tensor>,
}

impl Saved {
    /// Drops what is to be computed again.
    pub(super) fn new(x: &Tensor, mut rest: Rest, recompute: Recompute) -> Saved {
        let experts = rest.mlp.routed().map(|r| r.experts.shallow_clone());
        let rest = match recompute {
            Recompute::None => Some(rest),
            Recompute::Selective => {
                rest.mlp.drop_gate_up();
                Some(rest)
            }
            Recompute::Full => None,
        };
        Saved { x: x.shallow_clone(), rest, experts }
    }
}

impl Block<Linear> {
    /// Block `i`'s forward up to what its backward needs, for x: T [N, C]. `experts`: where the tokens went in an earlier
    /// forward of it.
    fn begin(&self, x: &Tensor, c: &Context, i: usize, experts: Option<Tensor>) -> Result<Rest> {
        let (h1, rstd1) = ops::rms_norm(x, &self.norm1, c.eps)?; // [N, C], [N]
        let attention = self.attention.begin(&h1, c, i)?;
        drop(h1);
        let x2 = self.attention.finish(&attention, x)?; // [N, C]
        let (h2, rstd2) = ops::rms_norm(&x2, &self.norm2, c.eps)?; // [N, C], [N]
        let mlp = self.mlp.begin(&h2, experts)?;
        Ok(Rest { rstd1, attention, x2, rstd2, mlp })
    }

    /// Block `i`'s output [N, C], and what its backward needs.
    pub(super) fn forward(&self, x: &Tensor, c: &Context, i: usize) -> Result<(Tensor, Rest)> {
        let rest = self.begin(x, c, i, None)?;
        let y = self.mlp.finish(&rest.mlp, &rest.x2)?;
        Ok((y, rest))
    }

    /// The output [N, C] for tokens whose rows have read others before; `attend`: see [`attention::Attention::cached`].
    pub(super) fn cached(
        &self,
        x: &Tensor,
        c: &Context,
        attend: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let h1 = ops::rms_norm(x, &self.norm1, c.eps)?.0;
        let x2 = self.attention.cached(&h1, c, x, attend)?;
        let h2 = ops::rms_norm(&x2, &self.norm2, c.eps)?.0;
        self.mlp.finish(&self.mlp.begin(&h2, None)?, &x2)
    }

    /// Given the output's gradient dy (T [N, C]), returns the gradient of block `i`'s input, none where it is not `wanted`; adds
    /// to `grad` (or sets its matrices, where `fresh`). `balance`: the gradient of its router's probabilities, A [N, E], that
    /// does not come from `dy`.
    #[allow(clippy::too_many_arguments)] // Its weights, gradients, what was saved, and where it stands.
    pub(super) fn backward(
        &self,
        grad: &Block<LinearGrad>,
        fresh: bool,
        dy: Tensor,
        saved: Saved,
        c: &Context,
        i: usize,
        balance: Option<&Tensor>,
        wanted: bool,
    ) -> Result<Option<Tensor>> {
        let x = saved.x;
        let Rest { rstd1, attention, x2, rstd2, mlp } = match saved.rest {
            Some(rest) => rest,
            None => self.begin(&x, c, i, saved.experts)?,
        };
        // The norms' outputs are made again from their statistics rather than kept.
        let h2 = ops::rms_apply(&x2, &self.norm2, &rstd2)?; // [N, C]
        let dh2 = self.mlp.backward(&dy, h2, mlp, &grad.mlp, fresh, balance)?; // [N, C]
        let dx2 = ops::rms_backward(&dh2, &x2, &self.norm2, &rstd2, Some(&dy), &grad.norm2)?; // [N, C]
        drop((dh2, dy, x2));
        let h1 = || Ok(ops::rms_apply(&x, &self.norm1, &rstd1)?);
        let dh1 = self.attention.backward(&dx2, h1, attention, &grad.attention, fresh, c, i, wanted)?;
        let Some(dh1) = dh1 else { return Ok(None) };
        Ok(Some(ops::rms_backward(&dh1, &x, &self.norm1, &rstd1, Some(&dx2), &grad.norm1)?))
    }
}
