//! What carries the collectives of a group: libtorch's c10d with Gloo or NCCL, or MPI.

use std::time::Duration;

use tch::Tensor;

use super::watch::Poll;
use crate::error::Result;

/// What carries a group's collectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// libtorch's Gloo, over TCP: tensors in host memory.
    Gloo,
    /// NCCL: tensors on GPUs.
    Nccl,
    /// MPI, in a program built with the feature `mpi` and started by `mpirun` or `srun`: tensors in host memory.
    Mpi,
}

impl Backend {
    /// `gloo`, `nccl` or `mpi`.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Gloo => "gloo",
            Backend::Nccl => "nccl",
            Backend::Mpi => "mpi",
        }
    }

    /// Whether averages are its own: elsewhere a sum is divided afterwards.
    pub(super) fn averages(self) -> bool {
        self == Backend::Nccl
    }

    /// Whether it works on tensors in host memory.
    pub(super) fn is_on_host(self) -> bool {
        self != Backend::Nccl
    }
}

/// How all-reduce and reduce-scatter combine values. `Avg` is for floating-point tensors; Gloo and MPI sum in the tensor's dtype
/// and then divide (in bf16 the sum is rounded to bf16 before).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// The sum over ranks.
    Sum,
    /// The largest value.
    Max,
    /// The smallest value.
    Min,
    /// The mean over ranks.
    Avg,
}

/// A collective as an engine gets it: contiguous tensors where the engine works, whose sizes fit. See [`super::Group`]'s
/// methods. An engine keeps references to the tensors until it is done.
pub(super) enum Collective<'a> {
    AllReduce { t: &'a Tensor, op: ReduceOp },
    AllGather { out: &'a Tensor, input: &'a Tensor },
    ReduceScatter { out: &'a Tensor, input: &'a Tensor, op: ReduceOp },
    Broadcast { t: &'a Tensor, root: i64 },
    AllToAll { out: &'a Tensor, input: &'a Tensor },
    Send { t: &'a Tensor, to: i64 },
    Receive { t: &'a Tensor, from: i64 },
}

/// The connection of a group's ranks. Dropped only when nothing is under way.
pub(super) trait Engine: Send + Sync {
    /// Begins a collective. All ranks begin the same ones in the same order.
    fn begin(&self, collective: &Collective) -> Result<Box<dyn Exchange>>;
}

/// A look at a collective from another thread.
pub(super) type Poller = Box<dyn Fn() -> Poll + Send>;

/// A collective that an engine has begun.
pub(super) trait Exchange: Send {
    /// Waits, at most so long, and tells whether it is done. On a GPU the current stream waits, and this returns at once.
    fn wait(&self, limit: Duration) -> Result<bool>;

    /// Whether it is done.
    fn is_done(&self) -> Result<bool>;

    /// For those on a GPU, for whose end nobody waits on the host: how to look at it.
    fn poller(&self) -> Result<Option<Poller>> {
        Ok(None)
    }
}
