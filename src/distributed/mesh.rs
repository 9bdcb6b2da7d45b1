//! The mesh: the axes along which the ranks of a run divide its work.
//!
//! Every rank has a place on each axis, and shares the axis's group with the ranks whose other places are equal to its own.

use std::ops::Range;

use kernels::c10d::Group;

use crate::config::parallel::{Mode, Parallel, ShardSize};
use crate::error::{Error, Result};

/// An axis of the mesh, seen from one rank.
#[derive(Clone)]
pub struct Axis {
    /// This rank's place on the axis.
    pub rank: i64,
    /// Ranks on the axis.
    pub size: i64,
    /// These ranks, for collectives.
    pub group: Group,
}

impl Axis {
    /// The axis of the ranks of `group`.
    pub fn of(group: Group) -> Axis {
        Axis { rank: group.rank(), size: group.size(), group }
    }

    /// An axis of one rank.
    pub fn solo() -> Axis {
        Axis::of(Group::solo())
    }

    /// This rank's place on the axis.
    pub fn place(&self) -> Place {
        Place { rank: self.rank, size: self.size }
    }

    /// This rank's part of `n` things, which lie over the axis in order and in equal parts; where `n` does not divide, the last
    /// parts are smaller.
    pub fn share(&self, n: usize) -> Range<usize> {
        share(n, self.rank as usize, self.size as usize)
    }

    /// This rank's of `n` things that the ranks take in turn: for what differs in cost.
    pub fn turns(&self, n: usize) -> impl Iterator<Item = usize> + use<> {
        (self.rank as usize..n).step_by(self.size as usize)
    }
}

/// A place on an axis, without the axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// From 0.
    pub rank: i64,
    /// Places on the axis.
    pub size: i64,
}

/// The part of rank `rank` of `ranks`.
fn share(n: usize, rank: usize, ranks: usize) -> Range<usize> {
    let part = n.div_ceil(ranks);
    (rank * part).min(n)..((rank + 1) * part).min(n)
}

/// The axes of a run. Ranks are numbered with `tensor` fastest, then `context`, then `shard`, then `replicate`, then `pipeline`.
pub struct Mesh {
    /// Ranks that compute different rows of a batch.
    pub data: Axis,
    /// Ranks that one copy of the parameters, or of a tensor-parallel rank's part of them, lies over.
    pub shard: Axis,
    /// Ranks that hold equal parts of the parameters, and sum their gradients.
    pub replicate: Axis,
    /// Ranks that share every matrix.
    pub tensor: Axis,
    /// Ranks that share every sequence.
    pub context: Axis,
    /// Ranks that share the blocks.
    pub pipeline: Axis,
}

impl Mesh {
    /// Of one rank.
    pub fn solo() -> Mesh {
        let solo = Axis::solo;
        Mesh {
            data: solo(),
            shard: solo(),
            replicate: solo(),
            tensor: solo(),
            context: solo(),
            pipeline: solo(),
        }
    }
}

/// What a rank keeps whole, between its uses, of what it owns a slice of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: values are gathered for each use, gradients reduced in every micro-batch (ZeRO-3).
    Nothing,
    /// Values, until an update changes them (ZeRO-2).
    Values,
    /// Values, and gradients until the last micro-batch of a step (ZeRO-1).
    ValuesAndGradients,
}

impl Keep {
    /// What a rank of this `parallel.mode` keeps.
    pub fn of(mode: Mode) -> Keep {
        match mode {
            Mode::Full | Mode::Hybrid | Mode::Replicate => Keep::Nothing,
            Mode::Grads => Keep::Values,
            Mode::Optimizer => Keep::ValuesAndGradients,
        }
    }

    /// Whether gathered values stay until an update.
    pub fn values(self) -> bool {
        self != Keep::Nothing
    }

    /// Whether gradients of whole groups stay until the last micro-batch.
    pub fn gradients(self) -> bool {
        self == Keep::ValuesAndGradients
    }
}

/// [`Sharding`] without its groups, for planning.
#[derive(Debug, Clone, Copy)]
pub struct ShardingPlan {
    /// Ranks that slices lie over.
    pub ranks: i64,
    /// What a rank keeps whole.
    pub keep: Keep,
}

impl ShardingPlan {
    /// Of a run on `ranks` ranks.
    ///
    /// # Errors
    /// Of kind Config, about `parallel.shard`: `mode: hybrid` where the number of ranks of a host counts, which is not known.
    pub fn of(parallel: &Parallel, ranks: i64) -> Result<ShardingPlan> {
        let ranks = match (parallel.mode, parallel.shard) {
            (Mode::Full | Mode::Grads | Mode::Optimizer, _) => ranks,
            (Mode::Replicate, _) => 1,
            (Mode::Hybrid, ShardSize::Ranks(n)) => n,
            (Mode::Hybrid, ShardSize::Auto) if ranks == 1 => 1,
            (Mode::Hybrid, ShardSize::Auto) => {
                return Err(Error::key(
                    "parallel.shard",
                    "auto is the number of ranks per host, which is not known here and on which memory depends; set it, such \
                     as parallel.shard=8",
                ));
            }
        };
        Ok(ShardingPlan { ranks, keep: Keep::of(parallel.mode) })
    }

    /// One rank, which has everything.
    pub fn solo() -> ShardingPlan {
        ShardingPlan { ranks: 1, keep: Keep::Nothing }
    }
}

/// How the parameters of a model lie over ranks.
#[derive(Clone)]
pub struct Sharding {
    /// The ranks that slices lie over.
    pub shard: Group,
    /// The same ranks, for the reductions of gradients.
    pub reduce: Group,
    /// The ranks that hold equal slices.
    pub replicate: Group,
    /// The ranks that share every matrix: all the others are about what one of these holds.
    pub tensor: Axis,
    /// Ranks of `tensor` divide the rows of activations between attention and MLP.
    pub sequence: bool,
    /// What a rank keeps whole.
    pub keep: Keep,
}

impl Sharding {
    /// On one rank.
    pub fn solo() -> Sharding {
        Sharding::over(Group::solo())
    }

    /// In slices over all ranks of `group`.
    pub fn over(group: Group) -> Sharding {
        let (replicate, tensor) = (Group::solo(), Axis::solo());
        let (sequence, keep) = (false, Keep::Nothing);
        Sharding { shard: group.clone(), reduce: group, replicate, tensor, sequence, keep }
    }

    /// Whole on every rank of `group`.
    pub fn replicated(group: Group) -> Sharding {
        Sharding { replicate: group, ..Sharding::solo() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_taken_by_all() {
        let axis = |rank| Axis { rank, size: 3, group: Group::solo() };
        let turns: Vec<Vec<usize>> = (0..3).map(|rank| axis(rank).turns(5).collect()).collect();
        assert_eq!(turns, [vec![0, 3], vec![1, 4], vec![2]]);
    }

    #[test]
    fn shares_are_equal_and_in_order() {
        for (n, ranks) in [(12, 4), (12, 1), (0, 3), (1, 3), (7, 3), (10, 4), (3, 8)] {
            let parts: Vec<Range<usize>> = (0..ranks).map(|rank| share(n, rank, ranks)).collect();
            let all: Vec<usize> = parts.iter().cloned().flatten().collect();
            assert_eq!(all, (0..n).collect::<Vec<_>>(), "{n} over {ranks}");
            let most = n.div_ceil(ranks);
            assert!(parts.iter().all(|p| p.len() <= most), "{n} over {ranks}: {parts:?}");
            assert!(n % ranks != 0 || parts.iter().all(|p| p.len() == most), "{n} over {ranks}: {parts:?}");
        }
    }
}
