//! The mesh: the axes along which the ranks of a run divide its work.
//!
//! Every rank has a place on each axis, and shares the axis's group with the ranks whose other places are equal to its own.

use kernels::comm::Group;

use crate::config::parallel::{Mode, Parallel, ShardSize, StageOrder};
pub use crate::distributed::axis::{Axis, Place};
use crate::distributed::pipeline::Pipeline;
use crate::error::{Error, Result};

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
    pub pipeline: Pipeline,
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
            pipeline: Pipeline::solo(),
        }
    }
}

/// The axes of a mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AxisName {
    /// See [`Mesh::tensor`].
    Tensor,
    /// See [`Mesh::context`].
    Context,
    /// See [`Mesh::data`].
    Data,
    /// See [`Mesh::shard`].
    Shard,
    /// See [`Mesh::replicate`].
    Replicate,
    /// See [`Mesh::pipeline`].
    Pipeline,
}

impl AxisName {
    /// As it is called in groups and tables.
    pub fn name(self) -> &'static str {
        match self {
            AxisName::Tensor => "tensor",
            AxisName::Context => "context",
            AxisName::Data => "data",
            AxisName::Shard => "shard",
            AxisName::Replicate => "replicate",
            AxisName::Pipeline => "pipeline",
        }
    }
}

/// The sizes of a mesh, by which every rank knows who shares what with whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshPlan {
    /// Stages.
    pub pipeline: i64,
    /// Ranks with different rows.
    pub data: i64,
    /// Ranks that share every sequence.
    pub context: i64,
    /// Ranks that share every matrix.
    pub tensor: i64,
    /// Ranks, of those on the data and context axes together, that one copy of the parameters lies over.
    pub shard: i64,
}

impl MeshPlan {
    /// Of a run on `ranks` ranks, of which each host has `ranks_of_host`; none: that is not known.
    ///
    /// # Errors
    /// Of kind Config, about `parallel.shard`: `mode: hybrid` where the number of ranks of a host counts and is not known, or
    /// does not divide the others.
    pub fn of(parallel: &Parallel, ranks: i64, ranks_of_host: Option<i64>) -> Result<MeshPlan> {
        let (tensor, data) = (parallel.tensor, parallel.data_ranks(ranks));
        let (context, pipeline) = (parallel.context, parallel.pipeline);
        let copies = data * context;
        let shard = match (parallel.mode, parallel.shard) {
            (Mode::Full | Mode::Grads | Mode::Optimizer, _) => copies,
            (Mode::Replicate, _) => 1,
            (Mode::Hybrid, ShardSize::Ranks(n)) => n,
            (Mode::Hybrid, ShardSize::Auto) if copies == 1 => 1,
            (Mode::Hybrid, ShardSize::Auto) => {
                let Some(of_host) = ranks_of_host else {
                    return Err(Error::key(
                        "parallel.shard",
                        "auto is the number of ranks per host, which is not known here and on which memory depends; set it, \
                         such as parallel.shard=8",
                    ));
                };
                // Of a host that has several stages those of one.
                let shard = (of_host / tensor).min(copies);
                if of_host % tensor != 0 || copies % shard != 0 {
                    return Err(Error::key(
                        "parallel.shard",
                        format!(
                            "auto is the ranks of a host divided by parallel.tensor, {of_host} / {tensor} here, which must divide the \
                             {copies} data and context ranks; set it"
                        ),
                    ));
                }
                shard
            }
        };
        Ok(MeshPlan { pipeline, data, context, tensor, shard })
    }

    /// All ranks.
    pub fn ranks(&self) -> i64 {
        self.pipeline * self.data * self.context * self.tensor
    }

    /// The ranks of an axis that has this rank on it, ascending.
    pub fn axis(&self, axis: AxisName, rank: i64) -> Vec<i64> {
        let copies = self.data * self.context;
        let (t, rest) = (rank % self.tensor, rank / self.tensor);
        let (copy, p) = (rest % copies, rest / copies);
        let (x, d) = (copy % self.context, copy / self.context);
        let of_copy = |copy: i64| (p * copies + copy) * self.tensor + t;
        let first = copy - copy % self.shard;
        match axis {
            AxisName::Tensor => (0..self.tensor).map(|i| rank - t + i).collect(),
            AxisName::Context => (0..self.context).map(|i| of_copy(d * self.context + i)).collect(),
            AxisName::Data => (0..self.data).map(|i| of_copy(i * self.context + x)).collect(),
            AxisName::Shard => (first..first + self.shard).map(of_copy).collect(),
            AxisName::Replicate => {
                (copy % self.shard..copies).step_by(self.shard as usize).map(of_copy).collect()
            }
            AxisName::Pipeline => (0..self.pipeline).map(|i| (i * copies + copy) * self.tensor + t).collect(),
        }
    }

    /// All groups of an axis, each once, by their first ranks.
    pub fn groups(&self, axis: AxisName) -> Vec<Vec<i64>> {
        (0..self.ranks())
            .map(|rank| self.axis(axis, rank))
            .enumerate()
            .filter(|(rank, g)| g[0] == *rank as i64)
            .map(|(_, g)| g)
            .collect()
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

/// [`Sharding`] without its groups, for planning: of the first tensor-parallel rank, which has no padding, of one stage.
#[derive(Debug, Clone)]
pub struct ShardingPlan {
    /// Ranks that slices lie over.
    pub ranks: i64,
    /// What a rank keeps whole.
    pub keep: Keep,
    /// Ranks that share every matrix.
    pub tensor: i64,
    /// Whether these divide the rows between attention and MLP.
    pub sequence: bool,
    /// Ranks that share every sequence.
    pub context: i64,
    /// Ranks that hold equal slices.
    pub replicas: i64,
    /// Which stage of a pipeline.
    pub stage: Place,
    /// Blocks of each stage; none: divided evenly.
    pub blocks: Option<Vec<i64>>,
    /// In which order stages compute micro-batches.
    pub order: StageOrder,
}

impl ShardingPlan {
    /// Of a run on `ranks` ranks, the first stage.
    ///
    /// # Errors
    /// Of kind Config, about `parallel.shard`: `mode: hybrid` where the number of ranks of a host counts, which is not known.
    pub fn of(parallel: &Parallel, ranks: i64) -> Result<ShardingPlan> {
        let mesh = MeshPlan::of(parallel, ranks, None)?;
        let (ranks, context) = (mesh.shard, mesh.context);
        let replicas = mesh.data * mesh.context / mesh.shard;
        let (keep, tensor, sequence) = (Keep::of(parallel.mode), parallel.tensor, parallel.sequence);
        let (stage, blocks) = (Place { rank: 0, size: mesh.pipeline }, parallel.stages.clone());
        let order = parallel.schedule;
        Ok(ShardingPlan { ranks, keep, tensor, sequence, context, replicas, stage, blocks, order })
    }

    /// The same of each stage, in order.
    pub fn stages(&self) -> impl Iterator<Item = ShardingPlan> {
        let stage = |rank| ShardingPlan { stage: Place { rank, ..self.stage }, ..self.clone() };
        (0..self.stage.size).map(stage)
    }

    /// One rank, which has everything.
    pub fn solo() -> ShardingPlan {
        let stage = Place { rank: 0, size: 1 };
        let (keep, sequence, blocks, order) = (Keep::Nothing, false, None, StageOrder::default());
        ShardingPlan { ranks: 1, keep, tensor: 1, sequence, context: 1, replicas: 1, stage, blocks, order }
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
    /// The ranks that share every sequence; slices lie over them, too.
    pub context: Axis,
    /// The ranks that share the blocks: all the others are about what one of these holds.
    pub pipeline: Pipeline,
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
        let (sequence, context, pipeline, keep) = (false, Axis::solo(), Pipeline::solo(), Keep::Nothing);
        Sharding { shard: group.clone(), reduce: group, replicate, tensor, sequence, context, pipeline, keep }
    }

    /// Whole on every rank of `group`.
    pub fn replicated(group: Group) -> Sharding {
        Sharding { replicate: group, ..Sharding::solo() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Groups of an axis are all ranks, each once; tensor-parallel ranks are neighbours, then those of a context.
    #[test]
    fn axes_divide_the_ranks() {
        let all = [
            AxisName::Tensor,
            AxisName::Context,
            AxisName::Data,
            AxisName::Shard,
            AxisName::Replicate,
            AxisName::Pipeline,
        ];
        for (pipeline, data, context, tensor, shard) in
            [(1, 4, 1, 2, 4), (1, 4, 1, 2, 2), (2, 2, 2, 2, 4), (2, 2, 2, 1, 1), (3, 2, 1, 2, 2)]
        {
            let mesh = MeshPlan { pipeline, data, context, tensor, shard };
            for axis in all {
                let groups = mesh.groups(axis);
                let mut ranks: Vec<i64> = groups.iter().flatten().copied().collect();
                ranks.sort_unstable();
                assert_eq!(ranks, (0..mesh.ranks()).collect::<Vec<_>>(), "{axis:?} of {mesh:?}");
                for group in &groups {
                    assert!(
                        group.iter().all(|rank| mesh.axis(axis, *rank) == *group),
                        "{axis:?} of {mesh:?}"
                    );
                }
            }
        }
        let mesh = MeshPlan { pipeline: 2, data: 2, context: 2, tensor: 2, shard: 4 };
        assert_eq!(mesh.axis(AxisName::Tensor, 5), [4, 5]);
        assert_eq!(mesh.axis(AxisName::Context, 5), [5, 7]);
        assert_eq!(mesh.axis(AxisName::Data, 5), [1, 5]);
        assert_eq!(mesh.axis(AxisName::Shard, 5), [1, 3, 5, 7]);
        assert_eq!(mesh.axis(AxisName::Pipeline, 5), [5, 13]);
    }
}
