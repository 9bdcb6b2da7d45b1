//! The connection of a group's members: libtorch's process group over Gloo or NCCL, and what became of it.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tch::Device;

use super::diagnosis::Call;
use super::nccl;
use super::store::{Store, millis};
use super::watch::Watch;
use crate::abi::{BackendPtr, corral_backend_free, corral_gloo};
use crate::error::{Error, Result, c_string, check};

/// What carries a group's collectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// libtorch's Gloo, over TCP: tensors in host memory.
    Gloo,
    /// NCCL: tensors on GPUs.
    Nccl,
}

impl Backend {
    /// `gloo` or `nccl`.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Gloo => "gloo",
            Backend::Nccl => "nccl",
        }
    }
}

/// How all-reduce and reduce-scatter combine values. `Avg` is for floating-point tensors; Gloo sums in the tensor's dtype
/// and then divides (in bf16 the sum is rounded to bf16 before).
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

/// What a group that communicates has; a group of one has none.
pub(crate) struct Link {
    pub(crate) backend: Backend,
    pub(crate) raw: *mut BackendPtr,
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

// SAFETY: c10d's process groups may be called from any thread; calls that issue work are serialised by `issued`.
unsafe impl Send for Link {}
// SAFETY: as for Send.
unsafe impl Sync for Link {}

impl Drop for Link {
    fn drop(&mut self) {
        // The backend's destructor waits for what is under way, which after an error here or there may never end: then it
        // is left alone.
        if self.failure.get().is_some() || self.pending.load(Ordering::Acquire) > 0 {
            return;
        }
        if self.backend == Backend::Nccl {
            // Nothing to do about an error here: the group is gone either way.
            // SAFETY: `raw` is freed below.
            let _ = unsafe { nccl::shutdown(self.raw) };
        }
        // SAFETY: `raw` came from the C ABI and is freed once; works hold no reference to it that is used afterwards.
        unsafe { corral_backend_free(self.raw) }
    }
}

impl Link {
    /// Connects all `ranks`, of which this process is number `rank`, over `backend`.
    pub(crate) fn connect(
        watch: &Arc<Watch>,
        backend: Backend,
        call: Call,
        rank: usize,
        timeout: Duration,
        device: Device,
    ) -> Result<Link> {
        let (name, size) = (call.group.clone(), call.ranks.len());
        let raw = match (backend, device) {
            (Backend::Gloo, _) => gloo(watch.store(), rank, size, &name, timeout)?,
            (Backend::Nccl, Device::Cuda(index)) => {
                // The watcher covers the set-up too: it would otherwise wait for a lost peer without limit.
                let done = watch.guard(call, timeout);
                let raw = nccl::connect(watch.store(), rank, size, &name, backend_timeout(timeout), index)?;
                drop(done);
                raw
            }
            (Backend::Nccl, _) => return Err(Error::new("NCCL needs a CUDA device")),
        };
        Ok(Link {
            backend,
            raw,
            timeout,
            watch: watch.clone(),
            issued: Mutex::new(0),
            pending: AtomicI64::new(0),
            failure: OnceLock::new(),
        })
    }

    pub(crate) fn reduce_op(&self, op: ReduceOp) -> c_int {
        match op {
            ReduceOp::Avg if self.backend == Backend::Gloo => 0,
            ReduceOp::Sum => 0,
            ReduceOp::Max => 1,
            ReduceOp::Min => 2,
            ReduceOp::Avg => 3,
        }
    }

    /// Gloo has no average: the sum is divided afterwards.
    pub(crate) fn divisor(&self, op: ReduceOp, size: i64) -> Option<i64> {
        (op == ReduceOp::Avg && self.backend == Backend::Gloo).then_some(size)
    }

    /// Finds out which ranks are missing, tells the others, and makes the group fail from now on.
    pub(crate) fn fail(&self, call: &Call, cause: &str) -> Error {
        let error = self.watch.diagnose_failed(call).finish(cause);
        self.failure.get_or_init(|| error).clone()
    }
}

/// The backend's own limit lies behind ours, which can tell who is missing.
fn backend_timeout(timeout: Duration) -> Duration {
    timeout.saturating_add(Duration::from_secs(60))
}

fn gloo(store: &Store, rank: usize, size: usize, name: &str, timeout: Duration) -> Result<*mut BackendPtr> {
    #[expect(
        clippy::disallowed_methods,
        reason = "the variable with which PyTorch's users choose the network"
    )]
    let interface = std::env::var("GLOO_SOCKET_IFNAME").ok().filter(|s| !s.is_empty());
    let interface =
        interface.as_deref().map(|i| i.split(',').next().unwrap_or(i)).map(c_string).transpose()?;
    let host = c_string(&store.local_address()?.to_string())?;
    let name = c_string(name)?;
    let mut raw = null_mut();
    // SAFETY: strings outlive the call; a null interface means "none".
    check(unsafe {
        corral_gloo(
            store.raw(),
            rank as c_int,
            size as c_int,
            name.as_ptr(),
            millis(backend_timeout(timeout)),
            interface.as_ref().map_or(std::ptr::null(), |i| i.as_ptr()),
            host.as_ptr(),
            &mut raw,
        )
    })
    .map_err(|e| e.context(format!("gloo group {name:?} (set GLOO_SOCKET_IFNAME to choose the network)")))?;
    Ok(raw)
}
