//! Gradients of a step: written by the backward of each micro-batch, reduced into slices, summed over micro-batches.
//!
//! ```text
//! begin_step_gradients(n)
//!   n times:  grad(i), products are added, reduce(i)  for every group i;  end_micro_batch()
//! finish_step_gradients()
//! ```

use kernels::comm::{ReduceOp, Work};
use kernels::ops::{DelayedProducts, WeightGrad};
use tch::Tensor;

use super::Sharded;
use crate::distributed::plan::Piece;
use crate::error::{Error, Result};

/// Reductions that may be under way at once: one is sent while the next block computes.
const MAX_REDUCTIONS: usize = 1;

/// A reduction under way: its result is added to the group's slice when it is done.
pub(super) struct Reduction {
    group: usize,
    work: Work,
    /// The slice of the sum; none where the group's gradient is reduced in place.
    out: Option<Tensor>,
}

/// The gradient of the trainable parameters of a group, in one flat buffer, to which the backward adds.
pub struct FlatGrad {
    /// A `[numel + padding]`
    flat: Tensor,
    /// Whether a micro-batch was added before; if not, matrices are undefined, and vectors and padding are zero.
    begun: bool,
    /// Where products of matrices wait; none: they are taken at once.
    later: Option<DelayedProducts>,
}

impl FlatGrad {
    /// The buffer: A `[numel + padding]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// The gradient of a matrix, A `[O, I]`; none where it is frozen.
    pub fn matrix(&self, piece: &Piece) -> Option<WeightGrad> {
        let (sum, first) = (piece.of_trained(&self.flat)?, piece.first_trained()?);
        Some(match &self.later {
            Some(products) => WeightGrad::delayed(sum, products, first),
            None if self.begun => WeightGrad::begun(sum),
            None => WeightGrad::undefined(sum),
        })
    }

    /// The gradient of a vector, A `[O]`, which is zero at first; none where it is frozen.
    pub fn vector(&self, piece: &Piece) -> Option<Tensor> {
        debug_assert_eq!(piece.size.len(), 1, "only vectors begin at zero");
        piece.of_trained(&self.flat)
    }
}

impl Sharded {
    /// Begins the gradients of a step of so many micro-batches. Each ends with [`Sharded::end_micro_batch`], all of them with
    /// [`Sharded::finish_step_gradients`].
    pub fn begin_step_gradients(&mut self, micro_batches: usize) {
        (self.micro_batches, self.micro_batches_left) = (micro_batches, micro_batches);
        self.groups.iter_mut().for_each(|g| g.reduced = 0);
    }

    /// The gradient of group `i`, to which the backward of a micro-batch adds; none where nothing of the group is trained, and on
    /// other stages.
    pub fn grad(&mut self, i: usize) -> Option<FlatGrad> {
        self.grad_as(i, None)
    }

    /// [`Sharded::grad`], of which products of matrices wait in `later`, if it is given, until they are added to
    /// [`FlatGrad::flat`]. All micro-batches of a step must ask alike.
    pub fn grad_as(&mut self, i: usize, later: Option<&DelayedProducts>) -> Option<FlatGrad> {
        if !self.trains(i) || !self.is_here(i) {
            return None;
        }
        let size = self.sharding.shard.size();
        let g = &mut self.groups[i];
        let target = if size == 1 { &mut g.grad } else { &mut g.full_grad };
        if let Some(t) = target {
            return Some(FlatGrad { flat: t.shallow_clone(), begun: true, later: later.cloned() });
        }
        let numel = g.shard_len * size;
        let flat = Tensor::empty([numel], (g.master.kind(), self.device));
        // What waits is added, whichever comes first.
        let defined = if later.is_some() { 0 } else { g.layout.num_decayed };
        if numel > defined {
            let _ = flat.narrow(0, defined, numel - defined).zero_();
        }
        *target = Some(flat.shallow_clone());
        Some(FlatGrad { flat, begun: later.is_some(), later: later.cloned() })
    }

    /// The gradient of the one matrix of a group that has only one (the embedding, the head); none where it is frozen.
    pub fn single_grad(&mut self, i: usize) -> Option<WeightGrad> {
        let piece = &self.pieces(i, 0..1)[0];
        self.grad(i)?.matrix(piece)
    }

    /// Says that the gradient of group `i` is complete for a micro-batch, once for each. Slices are reduced at once, so that no
    /// rank keeps a whole gradient, unless gradients are kept; those, and replicas, wait for the step's last micro-batch.
    pub fn reduce(&mut self, i: usize) -> Result<()> {
        self.groups[i].reduced += 1;
        let last = match self.micro_batches.checked_sub(self.groups[i].reduced) {
            None => return Err(Error::failed("gradients are reduced outside of a step")),
            Some(left) => left == 0,
        };
        if self.sharding.keep.gradients() && !last {
            return Ok(());
        }
        while self.reductions.len() >= MAX_REDUCTIONS {
            self.finish_oldest_reduction()?;
        }
        let g = &mut self.groups[i];
        if let Some(full_grad) = g.full_grad.take() {
            let out = Tensor::empty([g.shard_len], (full_grad.kind(), self.device));
            // collective, overlaps the backward of the groups below
            let work = self.sharding.reduce.reduce_scatter(&out, &full_grad, ReduceOp::Sum)?;
            self.reductions.push(Reduction { group: i, work, out: Some(out) });
        }
        if last && self.sharding.replicate.size() > 1 {
            while self.reductions.iter().any(|r| r.group == i) {
                self.finish_oldest_reduction()?;
            }
            if let Some(grad) = &self.groups[i].grad {
                // collective, overlaps the backward of the groups below
                let work = self.sharding.replicate.all_reduce(grad, ReduceOp::Sum)?;
                self.reductions.push(Reduction { group: i, work, out: None });
            }
        }
        Ok(())
    }

    fn finish_oldest_reduction(&mut self) -> Result<()> {
        let Reduction { group, work, out } = self.reductions.remove(0);
        work.wait()?; // of the host on a CPU, of the stream on a GPU
        if let Some(out) = out {
            let g = &mut self.groups[group];
            match &mut g.grad {
                Some(grad) => {
                    let _ = grad.g_add_(&out);
                }
                None => g.grad = Some(out),
            }
        }
        Ok(())
    }

    /// Says that all groups' gradients of a micro-batch are complete.
    pub fn end_micro_batch(&mut self) -> Result<()> {
        let left = self.micro_batches_left.checked_sub(1);
        self.micro_batches_left =
            left.ok_or_else(|| Error::failed("a step has more micro-batches than it began with"))?;
        Ok(())
    }

    /// Waits for all reductions, and sums what tensor-parallel ranks, and stages, have parts of: the slices then hold the step's
    /// gradient. Collective.
    ///
    /// # Errors
    /// Micro-batches of the step are missing.
    pub fn finish_step_gradients(&mut self) -> Result<()> {
        if self.micro_batches_left > 0 {
            return Err(Error::failed(format!(
                "a step ends without {} of its micro-batches",
                self.micro_batches_left
            )));
        }
        while !self.reductions.is_empty() {
            self.finish_oldest_reduction()?;
        }
        self.micro_batches = 0;
        self.sum_over_tensor_ranks()?;
        self.sum_over_stages()
    }

    /// Sums the gradients of groups that two stages have.
    fn sum_over_stages(&mut self) -> Result<()> {
        let Some(ends) = self.sharding.pipeline.ends() else { return Ok(()) };
        let shared = (0..self.len()).filter(|i| self.groups[*i].plan.stage.also.is_some());
        shared.filter_map(|i| self.slice_grad(i)).try_for_each(|grad| {
            Ok(ends.all_reduce(&grad, ReduceOp::Sum)?.wait()?) // collective
        })
    }

    /// Forgets the step's gradients.
    pub fn clear_gradients(&mut self) {
        for g in &mut self.groups {
            g.grad = None;
            g.full_grad = None;
        }
    }
}
