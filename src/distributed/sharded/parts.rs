//! Gradients that several tensor-parallel ranks have parts of, and rectangles joined to whole tensors.

use std::ops::Range;

use kernels::comm::ReduceOp;
use tch::Tensor;

use super::Sharded;
use crate::distributed::cut::{Cut, Share};
use crate::distributed::float8_runs::{len, shared};
use crate::distributed::layout::TensorSpec;
use crate::error::Result;

/// How the parts of a gradient that tensor-parallel ranks have become the whole.
enum Summing {
    /// All ranks add.
    All,
    /// Ranks that hold copies of a rectangle add: this rank's is number `at` of `of`.
    Copies { at: i64, of: i64 },
}

impl Sharded {
    /// Sums the gradients of which every tensor-parallel rank has a part, in the slices of a step. Collective.
    pub(super) fn sum_over_tensor_ranks(&mut self) -> Result<()> {
        let tensor = &self.sharding.tensor;
        if tensor.size == 1 {
            return Ok(());
        }
        // All of them in one collective: a row for each rectangle, of which the others' are zero.
        let mut parts = Vec::new();
        for i in 0..self.groups.len() {
            let Some(grad) = self.slice_grad(i) else { continue };
            for (spec, range) in self.of_slice(i) {
                let values = grad.narrow(0, range.start, len(&range));
                match spec.share {
                    Share::Summed => parts.push((values, Summing::All)),
                    Share::Cut(cut) if cut.copies > 1 => {
                        let copies =
                            Summing::Copies { at: tensor.rank / cut.copies, of: tensor.size / cut.copies };
                        parts.push((values, copies));
                    }
                    Share::Whole | Share::Cut(_) => {}
                }
            }
        }
        if parts.is_empty() {
            return Ok(());
        }
        let rows = parts.iter().map(|(values, summing)| match summing {
            Summing::All => Ok(values.shallow_clone()),
            Summing::Copies { at, of } => {
                let n = values.numel() as i64;
                let all = Tensor::zeros([of * n], (values.kind(), values.device()));
                all.narrow(0, at * n, n).f_copy_(values)?;
                Ok(all)
            }
        });
        let sums = Tensor::f_cat(&rows.collect::<Result<Vec<_>>>()?, 0)?;
        tensor.group.all_reduce(&sums, ReduceOp::Sum)?.wait()?; // collective
        let mut first = 0;
        for (mut values, summing) in parts {
            let n = values.numel() as i64;
            let (at, of) = match summing {
                Summing::All => (0, 1),
                Summing::Copies { at, of } => (at, of),
            };
            values.f_copy_(&sums.narrow(0, first + at * n, n))?;
            first += of * n;
        }
        Ok(())
    }

    /// This rank's slices of the step's gradient that count in a sum over all ranks that hold different slices or rectangles:
    /// of what several tensor-parallel ranks have, or two stages, those of the first.
    pub fn counted_gradients(&self) -> Vec<Tensor> {
        let slices = (0..self.len()).filter(|i| self.owns(*i)).filter_map(|i| Some((i, self.slice_grad(i)?)));
        if self.sharding.tensor.size == 1 {
            return slices.map(|(_, grad)| grad).collect();
        }
        let of = |(i, grad): (usize, Tensor)| {
            let counted = self.of_slice(i).filter(|(spec, _)| self.counts(spec));
            counted.map(|(_, range)| grad.narrow(0, range.start, len(&range))).collect::<Vec<_>>()
        };
        slices.flat_map(of).collect()
    }

    /// Whether a tensor, or a rectangle of it, is counted on this rank where each is to be counted once.
    pub(super) fn counts(&self, spec: &TensorSpec) -> bool {
        let rank = self.sharding.tensor.rank;
        match spec.share {
            Share::Whole | Share::Summed => rank == 0,
            Share::Cut(cut) => rank % cut.copies == 0,
        }
    }

    /// The tensors of group `i` of which this rank's slice has something, with what it has in the slice.
    fn of_slice(&self, i: usize) -> impl Iterator<Item = (&TensorSpec, Range<i64>)> {
        let slice = self.groups[i].owned(self.sharding.shard.rank());
        self.groups[i].layout.specs.iter().filter_map(move |spec| {
            let range = shared(&(spec.offset..spec.offset + spec.numel()), &slice);
            (!range.is_empty()).then(|| (spec, range.start - slice.start..range.end - slice.start))
        })
    }

    /// A tensor of which this rank has `value`, as a whole. Collective over the tensor-parallel ranks.
    pub(super) fn join(&self, spec: &TensorSpec, value: Tensor) -> Result<Tensor> {
        match spec.share {
            Share::Cut(cut) => self.join_cut(&cut, &value),
            Share::Whole | Share::Summed => Ok(value),
        }
    }

    fn join_cut(&self, cut: &Cut, value: &Tensor) -> Result<Tensor> {
        let tensor = &self.sharding.tensor;
        let size = [&[tensor.size], value.size().as_slice()].concat();
        let all = Tensor::empty(size, (value.kind(), value.device()));
        tensor.group.all_gather(&all.view([-1]), &value.contiguous().view([-1]))?.wait()?; // collective
        let first_copies = (0..tensor.size).step_by(cut.copies as usize);
        let parts: Vec<Tensor> = first_copies.map(|rank| all.select(0, rank)).collect();
        Ok(Tensor::f_cat(&parts, cut.dim as i64)?.narrow(cut.dim as i64, 0, cut.whole))
    }
}
