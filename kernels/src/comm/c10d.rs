//! The engine of libtorch: c10d's process groups, over Gloo and NCCL.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::time::Duration;

use super::engine::{Collective, Engine, Exchange, Poll, Poller, ReduceOp};
use super::nccl;
use super::store::{Store, millis};
use crate::abi::*;
use crate::error::{Error, Result, c_string, check, take_string};

/// What libtorch's flight recorder has recorded (JSON): nothing, unless the user has switched it on.
pub fn recorder_trace() -> Result<String> {
    let mut trace = std::ptr::null_mut();
    // SAFETY: the function fills `trace` or gives a message.
    check(unsafe { corral_recorder_trace(&mut trace) })?;
    Ok(take_string(trace))
}

/// A process group.
pub(super) struct ProcessGroup {
    raw: *mut BackendPtr,
    on_gpu: bool,
}

// SAFETY: c10d's process groups may be called from any thread; calls that begin work are serialised by the link.
unsafe impl Send for ProcessGroup {}
// SAFETY: as for Send.
unsafe impl Sync for ProcessGroup {}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if self.on_gpu {
            // Nothing to do about an error here: the group is gone either way.
            // SAFETY: `raw` is freed below.
            let _ = unsafe { nccl::shutdown(self.raw) };
        }
        // SAFETY: `raw` came from the C ABI and is freed once; works hold no reference to it that is used afterwards.
        unsafe { corral_backend_free(self.raw) }
    }
}

impl ProcessGroup {
    /// Over Gloo. A rank waits for the others as long as `timeout`.
    pub(super) fn gloo(
        store: &Store,
        rank: usize,
        size: usize,
        name: &str,
        timeout: Duration,
    ) -> Result<Self> {
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
                millis(timeout),
                interface.as_ref().map_or(std::ptr::null(), |i| i.as_ptr()),
                host.as_ptr(),
                &mut raw,
            )
        })
        .map_err(|e| {
            e.context(format!("gloo group {name:?} (set GLOO_SOCKET_IFNAME to choose the network)"))
        })?;
        Ok(ProcessGroup { raw, on_gpu: false })
    }

    /// Over NCCL, on the GPU `device`.
    pub(super) fn nccl(
        store: &Store,
        rank: usize,
        size: usize,
        name: &str,
        timeout: Duration,
        device: usize,
    ) -> Result<Self> {
        Ok(ProcessGroup { raw: nccl::connect(store, rank, size, name, timeout, device)?, on_gpu: true })
    }
}

fn number(op: ReduceOp) -> c_int {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Max => 1,
        ReduceOp::Min => 2,
        ReduceOp::Avg => 3,
    }
}

impl Engine for ProcessGroup {
    fn begin(&self, collective: &Collective) -> Result<Box<dyn Exchange>> {
        let (group, mut raw) = (self.raw, null_mut());
        let out = &mut raw;
        // SAFETY: the tensors live during the call, and c10d keeps references of its own while the collective runs.
        check(unsafe {
            match *collective {
                Collective::AllReduce { t, op } => corral_all_reduce(group, t.as_ptr(), number(op), out),
                Collective::AllGather { out: o, input } => {
                    corral_all_gather(group, o.as_ptr(), input.as_ptr(), out)
                }
                Collective::ReduceScatter { out: o, input, op } => {
                    corral_reduce_scatter(group, o.as_ptr(), input.as_ptr(), number(op), out)
                }
                Collective::Broadcast { t, root } => corral_broadcast(group, t.as_ptr(), root, out),
                Collective::AllToAll { out: o, input } => {
                    corral_all_to_all(group, o.as_ptr(), input.as_ptr(), out)
                }
                Collective::Send { t, to } => corral_send(group, t.as_ptr(), to as c_int, out),
                Collective::Receive { t, from } => corral_receive(group, t.as_ptr(), from as c_int, out),
            }
        })?;
        if raw.is_null() {
            return Err(Error::new("c10d gave no work"));
        }
        Ok(Box::new(C10dWork { raw, on_gpu: self.on_gpu }))
    }
}

/// c10d's work.
struct C10dWork {
    raw: *mut WorkPtr,
    on_gpu: bool,
}

// SAFETY: c10d's works may be waited for from any thread.
unsafe impl Send for C10dWork {}

impl Drop for C10dWork {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the C ABI and is freed once; c10d holds references of its own while it runs.
        unsafe { corral_work_free(self.raw) }
    }
}

impl Exchange for C10dWork {
    fn wait(&self, limit: Duration) -> Result<bool> {
        let mut done = 0;
        // SAFETY: `raw` is alive until drop.
        check(unsafe {
            match self.on_gpu {
                true => corral_work_sync(self.raw),
                false => corral_work_wait(self.raw, millis(limit), &mut done),
            }
        })?;
        Ok(self.on_gpu || done != 0)
    }

    fn is_done(&self) -> Result<bool> {
        let mut done = 0;
        // SAFETY: `raw` is alive until drop.
        check(unsafe { corral_work_poll(self.raw, &mut done) })?;
        Ok(done != 0)
    }

    fn poller(&self) -> Result<Option<Poller>> {
        if !self.on_gpu {
            return Ok(None);
        }
        // SAFETY: `raw` is alive until drop, and NCCL made it.
        let again = C10dWork { raw: unsafe { nccl::work_clone(self.raw) }?, on_gpu: true };
        Ok(Some(Box::new(move || match again.is_done() {
            Err(e) => Poll::Failed(e.message),
            Ok(true) => Poll::Done,
            Ok(false) => Poll::Pending,
        })))
    }
}
