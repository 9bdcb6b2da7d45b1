//! Engines carry the collectives of a group: libtorch's c10d, over Gloo or NCCL, and one over MPI.

use std::sync::OnceLock;
use std::time::Duration;

use tch::Tensor;

use crate::error::{Error, Result};

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

/// A collective as an engine gets it: contiguous tensors where the engine works, whose sizes fit. An engine keeps references to the tensors until it is done.
#[allow(missing_docs)] // the fields are the arguments of those methods
pub enum Collective<'a> {
    /// [`super::Group::all_reduce`]
    AllReduce { t: &'a Tensor, op: ReduceOp },
    /// [`super::Group::all_gather`]
    AllGather { out: &'a Tensor, input: &'a Tensor },
    /// [`super::Group::reduce_scatter`]
    ReduceScatter { out: &'a Tensor, input: &'a Tensor, op: ReduceOp },
    /// [`super::Group::broadcast`]
    Broadcast { t: &'a Tensor, root: i64 },
    /// [`super::Group::all_to_all`]
    AllToAll { out: &'a Tensor, input: &'a Tensor },
    /// [`super::Group::send`]
    Send { t: &'a Tensor, to: i64 },
    /// [`super::Group::receive`]
    Receive { t: &'a Tensor, from: i64 },
}

/// The connection of a group's ranks. Dropped only when nothing is under way.
pub trait Engine: Send + Sync {
    /// Begins a collective. All ranks begin the same ones in the same order.
    fn begin(&self, collective: &Collective) -> Result<Box<dyn Exchange>>;
}

/// The state of a collective on a device, as the watching thread sees it.
pub enum Poll {
    /// Under way.
    Pending,
    /// Ended well.
    Done,
    /// Ended with this error.
    Failed(String),
}

/// A look at a collective from another thread.
pub type Poller = Box<dyn Fn() -> Poll + Send>;

/// A collective that an engine has begun.
pub trait Exchange: Send {
    /// Waits, at most so long, and tells whether it is done. On a GPU the current stream waits, and this returns at once.
    fn wait(&self, limit: Duration) -> Result<bool>;

    /// Whether it is done.
    fn is_done(&self) -> Result<bool>;

    /// For those on a GPU, for whose end nobody waits on the host: how to look at it.
    fn poller(&self) -> Result<Option<Poller>> {
        Ok(None)
    }
}

/// Connects the world ranks `ranks`, of which this process is the one at the given place, as the group of this name. Others may be lost
/// meanwhile: the watching thread ends this process then.
pub type Connect = fn(name: &str, ranks: &[i64], rank: usize) -> Result<Box<dyn Engine>>;

static MPI: OnceLock<Connect> = OnceLock::new();

/// Sets how groups are connected over MPI: this package has no MPI of its own, which takes one to build.
pub fn set_mpi(connect: Connect) {
    let _ = MPI.set(connect);
}

pub(super) fn mpi() -> Result<Connect> {
    MPI.get().copied().ok_or_else(|| Error::new("this program was built without MPI"))
}
