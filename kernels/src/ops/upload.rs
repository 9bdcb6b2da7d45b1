//! Copies to a device that the host does not wait for.

use std::ptr::null_mut;

use tch::{Device, Tensor};

use crate::abi::corral_pin;
use crate::error::{Result, check};
use crate::tensors::{own, raw};

/// A copy in pinned host memory, from and to which a GPU copies without the host. Needs CUDA.
fn pin(t: &Tensor) -> Result<Tensor> {
    let mut pinned = null_mut();
    // SAFETY: a live tensor; the result is a new one.
    check(unsafe { corral_pin(raw(t), &mut pinned) })?;
    Ok(own(pinned))
}

/// t on a device, for work that is queued there afterwards: the host does not wait for the copy.
pub fn upload(t: &Tensor, device: Device) -> Result<Tensor> {
    if t.device() == device || !matches!(device, Device::Cuda(_)) || t.device() != Device::Cpu {
        return Ok(t.f_to_device(device)?);
    }
    // The pinned memory is not used again before the copy is over: libtorch's allocator waits for it.
    Ok(pin(t)?.f_to_device_(device, t.kind(), true, false)?)
}
