//! Sequences that context-parallel ranks share: of X ranks, rank x has chunks x and 2X - 1 - x of the 2X equal chunks of every row,
//! so that all have the same number of pairs of a query and a key before it. Keys and values of whole rows are gathered for the
//! attention; everything else is computed token by token.

use kernels::comm::ReduceOp;
use tch::Tensor;

use crate::distributed::mesh::Axis;
use crate::error::{Error, Result};

/// The rows of a forward.
#[derive(Clone)]
pub(super) struct SharedSequence {
    context: Axis,
    batch: i64,
    /// Tokens of a whole row.
    time: i64,
}

impl SharedSequence {
    /// Rows [B, T] over the ranks of `context`.
    ///
    /// # Errors
    /// Rows that are not 2X equal chunks.
    pub fn new(context: &Axis, [batch, time]: [i64; 2]) -> Result<SharedSequence> {
        if context.size > 1 && time % (2 * context.size) != 0 {
            return Err(Error::failed(format!(
                "rows of {time} tokens cannot be shared by {} ranks: their length must be a multiple of {}",
                context.size,
                2 * context.size
            )));
        }
        Ok(SharedSequence { context: context.clone(), batch, time })
    }

    /// Whether there is one rank, which has all tokens.
    pub fn is_alone(&self) -> bool {
        self.context.size == 1
    }

    /// This rank's tokens.
    pub fn tokens(&self) -> i64 {
        self.batch * self.time / self.context.size
    }

    fn chunks(&self) -> [i64; 2] {
        [self.context.rank, 2 * self.context.size - 1 - self.context.rank]
    }

    fn chunk(&self) -> i64 {
        self.time / (2 * self.context.size)
    }

    /// The positions in a row of this rank's tokens.
    pub fn at(&self) -> Vec<i64> {
        if self.is_alone() {
            return (0..self.time).collect();
        }
        let chunk = self.chunk();
        self.chunks().into_iter().flat_map(|c| c * chunk..(c + 1) * chunk).collect()
    }

    /// This rank's of all tokens, `[B * T]`: `[B * T / X]`.
    pub fn own(&self, all: &Tensor) -> Tensor {
        if self.is_alone() {
            return all.shallow_clone();
        }
        let chunks = all.view([self.batch, 2 * self.context.size, self.chunk()]);
        Tensor::stack(&self.chunks().map(|c| chunks.select(1, c)), 1).view([-1])
    }

    /// All tokens' rows, [B * T, W], of each rank's own, [B * T / X, W]. Collective.
    pub fn gather(&self, own: &Tensor) -> Result<Tensor> {
        let (ranks, width) = (self.context.size, own.size()[1]);
        let all = Tensor::f_empty([ranks * own.size()[0], width], (own.kind(), own.device()))?;
        self.context.group.all_gather(&all, &own.contiguous())?.wait()?; // collective
        let all = all.view([ranks, self.batch, 2, self.chunk(), width]);
        // Rank x's first chunk is the row's x-th, its second one the x-th from the end.
        let halves = [all.select(2, 0), all.select(2, 1).flip([0i64].as_slice())];
        let chunks = Tensor::f_cat(&halves, 0)?; // [2X, B, chunk, W]
        Ok(chunks.transpose(0, 1).reshape([self.batch * self.time, width]))
    }

    /// The sums over ranks of this rank's tokens' rows, [B * T / X, W], of `all`, [B * T, W]. Collective.
    pub fn sum(&self, all: &Tensor) -> Result<Tensor> {
        let (ranks, width) = (self.context.size, all.size()[1]);
        let chunks = all.view([self.batch, 2 * ranks, self.chunk(), width]).transpose(0, 1); // [2X, B, chunk, W]
        let halves = [chunks.narrow(0, 0, ranks), chunks.narrow(0, ranks, ranks).flip([0i64].as_slice())];
        let by_rank = Tensor::f_stack(&halves, 2)?.contiguous(); // [X, B, 2, chunk, W]
        let own = Tensor::f_empty([self.tokens(), width], (all.kind(), all.device()))?;
        self.context.group.reduce_scatter(&own, &by_rank, ReduceOp::Sum)?.wait()?; // collective
        Ok(own)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};
    use testing::ranks::on_ranks;

    use super::*;

    #[test]
    fn tokens_go_and_come() {
        for (ranks, batch, time) in [(2, 3, 8), (4, 1, 8), (2, 2, 12)] {
            on_ranks(ranks, |group| {
                let shared = SharedSequence::new(&Axis::of(group), [batch, time]).unwrap();
                let all = Tensor::arange(batch * time, (Kind::Int64, Device::Cpu));
                let own = shared.own(&all);
                let places: Vec<i64> =
                    (0..batch).flat_map(|b| shared.at().into_iter().map(move |at| b * time + at)).collect();
                assert_eq!(Vec::<i64>::try_from(&own).unwrap(), places);
                let own = own.to_kind(Kind::Float).unsqueeze(1);
                let gathered = shared.gather(&own).unwrap();
                assert_eq!(gathered.view([-1]).to_kind(Kind::Int64), all);
                assert_eq!(shared.sum(&gathered).unwrap(), own * ranks);
            });
        }
        assert!(SharedSequence::new(&Axis::solo(), [1, 7]).is_ok());
    }
}
