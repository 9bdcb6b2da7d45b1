//! The connection of a group's members: an engine, and what became of it.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tch::Device;

use super::c10d::ProcessGroup;
use super::diagnosis::Call;
use super::engine::{self, Backend, Engine, ReduceOp};
use super::watch::Watch;
use crate::error::{Error, Result};

/// What a group that communicates has; a group of one has none.
pub(crate) struct Link {
    pub(crate) backend: Backend,
    pub(super) engine: ManuallyDrop<Box<dyn Engine>>,
    /// Every collective must end within this.
    pub(crate) timeout: Duration,
    pub(crate) watch: Arc<Watch>,
    /// Number of the last collective; locked while one is issued, so that numbers follow the order of issue.
    pub(crate) issued: Mutex<u64>,
    /// Collectives not waited for yet.
    pub(crate) pending: AtomicI64,
    /// Set when a collective failed: all later ones fail likewise.
    pub(crate) failure: OnceLock<Error>,
}

impl Drop for Link {
    fn drop(&mut self) {
        // The engine's end waits for what is under way, which after an error here or there may never end: then it is left alone.
        if self.failure.get().is_some() || self.pending.load(Ordering::Acquire) > 0 {
            return;
        }
        // SAFETY: dropped here and nowhere else, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.engine) }
    }
}

impl Link {
    /// Connects all ranks of `call`, of which this process is number `rank`, over `backend`.
    pub(crate) fn connect(
        watch: &Arc<Watch>,
        backend: Backend,
        call: Call,
        rank: usize,
        timeout: Duration,
        device: Device,
    ) -> Result<Link> {
        let (name, size) = (call.group.clone(), call.ranks.len());
        // The engine's own limit lies behind ours, which can tell who is missing.
        let patience = timeout.saturating_add(Duration::from_secs(60));
        let engine: Box<dyn Engine> = match (backend, device) {
            (Backend::Gloo, _) => Box::new(ProcessGroup::gloo(watch.store(), rank, size, &name, patience)?),
            (Backend::Nccl, Device::Cuda(index)) => {
                // The watcher covers the set-up too: it would otherwise wait for a lost peer without limit.
                let done = watch.guard(call, timeout);
                let group = ProcessGroup::nccl(watch.store(), rank, size, &name, patience, index)?;
                drop(done);
                Box::new(group)
            }
            (Backend::Nccl, _) => return Err(Error::new("NCCL needs a CUDA device")),
            (Backend::Mpi, _) => {
                let ranks = call.ranks.clone();
                let done = watch.guard(call, timeout);
                let group = engine::mpi()?(&name, &ranks, rank)?;
                drop(done);
                group
            }
        };
        Ok(Link {
            backend,
            engine: ManuallyDrop::new(engine),
            timeout,
            watch: watch.clone(),
            issued: Mutex::new(0),
            pending: AtomicI64::new(0),
            failure: OnceLock::new(),
        })
    }

    /// What the engine is asked for: one that has no averages is asked for a sum, which is divided afterwards by
    /// [`Link::divisor`].
    pub(super) fn reduction(&self, op: ReduceOp) -> ReduceOp {
        if op == ReduceOp::Avg && !self.backend.averages() { ReduceOp::Sum } else { op }
    }

    pub(super) fn divisor(&self, op: ReduceOp, size: i64) -> Option<i64> {
        (op == ReduceOp::Avg && !self.backend.averages()).then_some(size)
    }

    /// Finds out which ranks are missing, tells the others, and makes the group fail from now on.
    pub(crate) fn fail(&self, call: &Call, cause: &str) -> Error {
        let error = self.watch.diagnose_failed(call).finish(cause);
        self.failure.get_or_init(|| error).clone()
    }
}
