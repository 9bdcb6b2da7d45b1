//! Rows of activations between tensor-parallel ranks. In attention, MLP and head every rank has all N rows and a part of the matrices.
//! Between these, each has all rows, too, or with sequence parallelism (Korthikanti et al. 2022) its n = N / T of them.

use kernels::comm::{ReduceOp, Work};
use kernels::ops;
use tch::{Kind, Tensor};

use crate::distributed::mesh::Axis;
use crate::error::Result;

/// The rows of a forward.
#[derive(Clone)]
pub(super) struct SharedRows {
    tensor: Axis,
    /// N, where ranks have different rows between the parts of a block; none: all have all.
    divided: Option<i64>,
}

/// A sum over ranks that is under way.
struct PendingSum {
    work: Work,
    /// A [rows of this rank, C]
    sum: Tensor,
    kind: Kind,
}

impl PendingSum {
    fn finish(self) -> Result<Tensor> {
        self.work.wait()?;
        Ok(self.sum.f_to_kind(self.kind)?)
    }
}

/// All rows, T [N, C], of which this rank's are here and the others' are on their way.
pub(super) struct GatheredRows {
    /// T [N, C], or with padding where it is under way
    all: Tensor,
    under_way: Option<UnderWay>,
}

struct UnderWay {
    work: Work,
    /// This rank's rows, T [n, C], the last of which may be padding.
    own: Tensor,
    /// The first of them, and the number of all.
    first: i64,
    rows: i64,
}

impl GatheredRows {
    /// Rows that are all here.
    pub fn here(all: Tensor) -> GatheredRows {
        GatheredRows { all, under_way: None }
    }

    /// All rows.
    pub fn finish(self) -> Result<Tensor> {
        let Some(UnderWay { work, rows, .. }) = self.under_way else { return Ok(self.all) };
        work.wait()?;
        Ok(self.all.f_narrow(0, 0, rows)?)
    }

    /// All rows, and what `product` makes of them, [N, O]. Where it may take rows `apart`, it takes this rank's own while the others'
    /// are on their way.
    pub fn product(
        self,
        apart: bool,
        product: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let Some(UnderWay { own, first, rows, .. }) = self.under_way.as_ref().filter(|_| apart) else {
            let all = self.finish()?;
            let made = product(&all)?;
            return Ok((all, made));
        };
        let rows = *rows;
        // A rank may have nothing but padding.
        let first = (*first).min(rows);
        let end = (first + own.size()[0]).min(rows);
        let mine = match end - first {
            0 => None,
            count => Some(product(&own.f_narrow(0, 0, count)?)?),
        };
        let all = self.finish()?;
        let mut made: Option<Tensor> = None;
        for (from, to, part) in [(first, end, mine), (0, first, None), (end, rows, None)] {
            if from == to {
                continue;
            }
            let part = part.map_or_else(|| product(&all.f_narrow(0, from, to - from)?), Ok)?;
            let whole = match made {
                Some(whole) => whole,
                None => Tensor::f_empty([rows, part.size()[1]], (part.kind(), part.device()))?,
            };
            whole.f_narrow(0, from, to - from)?.f_copy_(&part)?;
            made = Some(whole);
        }
        // Of no rows at all.
        let made = made.map_or_else(|| product(&all), Ok)?;
        Ok((all, made))
    }
}

impl SharedRows {
    /// All rows on every rank of `tensor`.
    pub fn whole(tensor: &Axis) -> SharedRows {
        SharedRows { tensor: tensor.clone(), divided: None }
    }

    /// `rows` rows, divided among the ranks of `tensor`.
    pub fn divided(tensor: &Axis, rows: i64) -> SharedRows {
        SharedRows { tensor: tensor.clone(), divided: (tensor.size > 1).then_some(rows) }
    }

    /// Whether there is one rank, which has everything.
    pub fn is_alone(&self) -> bool {
        self.tensor.size == 1
    }

    /// Rows that each rank has of `rows`.
    pub fn rows_here(&self, rows: i64) -> i64 {
        self.divided.map_or(rows, |rows| self.part(rows))
    }

    /// Rows of each rank where they are divided; the last ranks' may be padding.
    fn part(&self, rows: i64) -> i64 {
        (rows + self.tensor.size - 1) / self.tensor.size
    }

    /// With rows of zeros up to equal parts: [T n, C].
    fn padded(&self, t: Tensor, rows: i64) -> Result<Tensor> {
        match self.part(rows) * self.tensor.size - rows {
            0 => Ok(t),
            more => Ok(t.f_constant_pad_nd([0, 0, 0, more])?),
        }
    }

    /// This rank's rows of t: T [N, C], which all ranks have.
    pub fn own(&self, t: Tensor) -> Result<Tensor> {
        let Some(rows) = self.divided else { return Ok(t) };
        let part = self.part(rows);
        Ok(self.padded(t, rows)?.f_narrow(0, self.tensor.rank * part, part)?)
    }

    /// All rows, T [N, C], of this rank's. Collective where they are divided.
    pub fn gather(&self, own: Tensor) -> Result<Tensor> {
        self.begin_gather(own)?.finish()
    }

    /// [`SharedRows::gather`], on its way.
    pub fn begin_gather(&self, own: Tensor) -> Result<GatheredRows> {
        let Some(rows) = self.divided else { return Ok(GatheredRows::here(own)) };
        let (own, part) = (own.contiguous(), self.part(rows));
        let all = Tensor::f_empty([part * self.tensor.size, own.size()[1]], (own.kind(), own.device()))?;
        let work = self.tensor.group.all_gather(&all, &own)?; // collective
        let first = part * self.tensor.rank;
        Ok(GatheredRows { all, under_way: Some(UnderWay { work, own, first, rows }) })
    }

    /// This rank's rows of the sum of all ranks' `part`, T [N, C], taken in A. Collective.
    pub fn sum(&self, part: Tensor) -> Result<Tensor> {
        if self.is_alone() { Ok(part) } else { self.begin_sum(part)?.finish() }
    }

    fn begin_sum(&self, part: Tensor) -> Result<PendingSum> {
        let (kind, group) = (part.kind(), &self.tensor.group);
        let part = part.f_to_kind(ops::accumulator(kind))?;
        let Some(rows) = self.divided else {
            let work = group.all_reduce(&part, ReduceOp::Sum)?; // collective
            return Ok(PendingSum { work, sum: part, kind });
        };
        let part = self.padded(part, rows)?.contiguous();
        let sum = Tensor::f_empty([self.part(rows), part.size()[1]], (part.kind(), part.device()))?;
        let work = group.reduce_scatter(&sum, &part, ReduceOp::Sum)?; // collective
        Ok(PendingSum { work, sum, kind })
    }

    /// [`SharedRows::sum`] of what `part` gives; meanwhile `during` is computed. On one rank `during` comes first.
    pub fn sum_during(
        &self,
        part: impl FnOnce() -> Result<Tensor>,
        during: impl FnOnce() -> Result<()>,
    ) -> Result<Tensor> {
        if self.is_alone() {
            during()?;
            return part();
        }
        let pending = self.begin_sum(part()?)?;
        during()?;
        pending.finish()
    }

    /// The sum of what `output` gives, plus the residual, T of this rank's rows: one rank gives it to `output`, to add it in its
    /// product. Collective.
    pub fn sum_onto(
        &self,
        residual: &Tensor,
        output: impl FnOnce(Option<&Tensor>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        match self.is_alone() {
            true => output(Some(residual)),
            false => Ok(self.sum(output(None)?)?.f_add_(residual)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;
    use testing::ranks::on_ranks;

    use super::*;

    /// What is divided comes back, and sums are those of all ranks, also where the rows do not divide.
    #[test]
    fn rows_go_and_come() {
        for (rows, ranks) in [(8, 2), (7, 2), (5, 4), (2, 4)] {
            on_ranks(ranks, |group| {
                let axis = Axis::of(group);
                let all = Tensor::arange(rows * 3, (Kind::Float, Device::Cpu)).view([rows, 3]);
                let part = &all * (axis.rank + 1);
                let factor = ranks * (ranks + 1) / 2;
                for shared in [SharedRows::whole(&axis), SharedRows::divided(&axis, rows)] {
                    let own = shared.own(all.shallow_clone()).unwrap();
                    assert_eq!(shared.gather(own.shallow_clone()).unwrap(), all);
                    let w = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([3, 2]);
                    for apart in [false, true] {
                        let gathering = shared.begin_gather(own.shallow_clone()).unwrap();
                        let (rows, product) = gathering.product(apart, |x| Ok(x.mm(&w))).unwrap();
                        assert_eq!((rows, product), (all.shallow_clone(), all.mm(&w)));
                    }
                    let sum = shared.sum(part.copy()).unwrap();
                    assert_eq!(shared.gather(sum).unwrap(), &all * factor);
                    let with = shared.sum_onto(&own, |_| Ok(part.copy())).unwrap();
                    assert_eq!(shared.gather(with).unwrap(), &all * (factor + 1));
                    let during = shared.sum_during(|| Ok(part.copy()), || Ok(())).unwrap();
                    assert_eq!(shared.gather(during).unwrap(), &all * factor);
                }
            });
        }
    }
}
