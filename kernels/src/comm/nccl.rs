//! NCCL's part of a group, which lies behind CUDA's symbols.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::time::Duration;

use super::store::{Store, millis};
use crate::abi::{BackendPtr, WorkPtr};
use crate::cuda::load;
use crate::error::{Result, c_string, check};

/// An NCCL process group on `device`, connected.
pub(crate) fn connect(
    store: &Store,
    rank: usize,
    size: usize,
    name: &str,
    timeout: Duration,
    device: usize,
) -> Result<*mut BackendPtr> {
    let cuda = load()?;
    let c_name = c_string(name)?;
    let mut raw = null_mut();
    // SAFETY: store and name outlive the call; `raw` is written where there is no error.
    check(unsafe {
        (cuda.api.corral_nccl)(
            store.raw(),
            rank as c_int,
            size as c_int,
            c_name.as_ptr(),
            millis(timeout),
            device as c_int,
            &mut raw,
        )
    })
    .map_err(|e| e.context(format!("NCCL group {name:?} on cuda:{device}")))?;
    Ok(raw)
}

/// A second reference to a collective under way, for watching.
///
/// # Safety
/// `work` must be alive.
pub(crate) unsafe fn work_clone(work: *const WorkPtr) -> Result<*mut WorkPtr> {
    let mut raw = null_mut();
    // SAFETY: the caller's work is alive, and its class is checked; `raw` is written where there is no error.
    check(unsafe { (load()?.api.corral_nccl_work_clone)(work, &mut raw) })?;
    Ok(raw)
}

/// Closes the communicators of `backend`: needed before its last reference goes.
///
/// # Safety
/// `backend` must be alive.
pub(crate) unsafe fn shutdown(backend: *const BackendPtr) -> Result<()> {
    // SAFETY: the caller's process group is alive.
    check(unsafe { (load()?.api.corral_nccl_shutdown)(backend) })
}
