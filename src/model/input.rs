//! What a forward of a model reads, and of a stage what the stage before gives.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::model::mixture::Balance;

/// Token ids and what positions mean.
pub struct ModelInput {
    /// int64 [B, T]
    pub ids: Tensor,
    /// Rotary positions, int64 `[N]`; none: 0 to T - 1 in every row.
    pub positions: Option<Tensor>,
    /// Where in its row the segment of each position begins, int64 `[N]` on the CPU (see [`kernels::ops::Spans::new`]): no position sees what
    /// lies before; none: 0. A model's sliding window comes on top.
    pub start: Option<Tensor>,
    /// 1 = real, 0 = padding, int64 `[N]`; none: all are real. Only the statistics of experts ask for it.
    pub mask: Option<Tensor>,
    /// What a training's dropout draws from; none: nothing is left out.
    pub dropout: Option<DropoutPlace>,
}

/// What dropout draws from: equal in every run, whatever its ranks and micro-batches.
#[derive(Debug, Clone, Copy)]
pub struct DropoutPlace {
    /// The run's seed.
    pub seed: u64,
    /// The number of the update that the rows are for.
    pub step: u64,
    /// The number of the input's first row among all rows of the step.
    pub first_row: u64,
}

impl ModelInput {
    /// Rows without padding.
    pub fn new(ids: Tensor) -> ModelInput {
        ModelInput { ids, positions: None, start: None, mask: None, dropout: None }
    }

    /// Rows with padding, given by a mask (int64 [B, T], 1 = real): positions count the real tokens, and no token sees
    /// padding before it, which is a segment of its own. Padding after a row's tokens needs nothing: causal attention never looks
    /// there.
    pub fn with_mask(ids: Tensor, mask: &Tensor) -> ModelInput {
        let time = ids.size()[1];
        let positions = ((mask.cumsum(1, Kind::Int64) - 1i64) * mask).view([-1]);
        let first = mask.argmax(1, true);
        let at = Tensor::arange(time, (Kind::Int64, ids.device())).unsqueeze(0);
        let start = (&first * at.ge_tensor(&first)).contiguous().view([-1]);
        let mask = Some(mask.contiguous().view([-1]));
        ModelInput { ids, positions: Some(positions.contiguous()), start: Some(start), mask, dropout: None }
    }
}

/// Of tensors that are one, it.
pub(super) fn only(tensors: Vec<Tensor>) -> Result<Tensor> {
    tensors.into_iter().next().ok_or_else(|| Error::failed("a stage gives at least one tensor"))
}

/// The stream that the stage before gives, T [n, C]; with the load of experts in so many blocks `balance` goes on.
pub(super) fn continue_from(
    before: Vec<Tensor>,
    balance: Option<&mut Balance>,
    blocks: usize,
) -> Result<Tensor> {
    if let (Some(balance), Some(sums)) = (balance, before.get(1)) {
        balance.continue_from(sums, blocks);
    }
    only(before)
}
