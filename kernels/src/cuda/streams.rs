//! Copies beside other work: streams of a device, pinned host memory without waste, and captured work.
//!
//! On the CPU, where tests run it, a copy is done at once and there is nothing to wait for.

use std::ffi::c_int;
use std::ptr::null_mut;

use tch::{Device, Kind, Tensor};

use super::shim::{Cuda, load};
use crate::abi::{GraphPtr, Stream};
use crate::error::{Error, Result, check};
use crate::tensors::{own, raw};

/// A stream of a GPU for copies that do not wait for, nor hold up, what the GPU computes; on a CPU nothing.
pub struct CopyStream(Option<(&'static Cuda, Stream)>);

impl CopyStream {
    /// A stream of its own.
    pub fn new(device: Device) -> Result<CopyStream> {
        let Device::Cuda(index) = device else { return Ok(CopyStream(None)) };
        let (cuda, mut stream) = (load()?, Stream { id: 0, device: 0 });
        // SAFETY: `stream` is written; the shim checks the device.
        check(unsafe { (cuda.api.corral_cuda_stream_new)(index as c_int, &mut stream) })?;
        Ok(CopyStream(Some((cuda, stream))))
    }

    /// The device that it is of.
    pub fn device(&self) -> Device {
        self.0.map_or(Device::Cpu, |(_, stream)| Device::Cuda(stream.device as usize))
    }

    fn current(cuda: &Cuda, stream: Stream) -> Result<Stream> {
        cuda.current_stream(stream.device as usize)
    }

    /// Copies from here on begin when all that the device was given so far is done.
    pub fn after_computing(&self) -> Result<()> {
        let Some((cuda, stream)) = self.0 else { return Ok(()) };
        // SAFETY: streams of libtorch's pool.
        check(unsafe { (cuda.api.corral_cuda_stream_wait)(stream, Self::current(cuda, stream)?) })
    }

    /// Copies from here on begin when those of `other` so far are done.
    pub fn after(&self, other: &CopyStream) -> Result<()> {
        let (Some((cuda, stream)), Some((_, other))) = (self.0, other.0) else { return Ok(()) };
        // SAFETY: streams of libtorch's pool.
        check(unsafe { (cuda.api.corral_cuda_stream_wait)(stream, other) })
    }

    /// What the device is given from here on begins when the copies so far are done.
    pub fn before_computing(&self) -> Result<()> {
        let Some((cuda, stream)) = self.0 else { return Ok(()) };
        // SAFETY: streams of libtorch's pool.
        check(unsafe { (cuda.api.corral_cuda_stream_wait)(Self::current(cuda, stream)?, stream) })
    }

    /// Queues a copy; host memory must be pinned (see [`Pinned`]). Both tensors must live until [`CopyStream::wait`], or, of the
    /// device's memory, until work that is queued after [`CopyStream::before_computing`].
    pub fn copy(&self, to: &Tensor, from: &Tensor) -> Result<()> {
        match self.0 {
            // SAFETY: live tensors and a stream of libtorch's pool.
            Some((cuda, stream)) => check(unsafe { (cuda.api.corral_cuda_copy)(raw(to), raw(from), stream) }),
            None => Ok(tch::no_grad(|| to.shallow_clone().f_copy_(from)).map(drop)?),
        }
    }

    /// The host waits for the copies so far.
    pub fn wait(&self) -> Result<()> {
        let Some((cuda, stream)) = self.0 else { return Ok(()) };
        // SAFETY: a stream of libtorch's pool.
        check(unsafe { (cuda.api.corral_cuda_stream_synchronize)(stream) })
    }
}

/// Host memory that a GPU reads and writes by itself, of exactly the size that is asked for, in which tensors take their
/// places one after the other.
pub struct Pinned {
    memory: Tensor,
    used: i64,
}

/// Tensors in [`Pinned`] memory begin at multiples of this.
const ALIGNMENT: i64 = 64;

impl Pinned {
    /// Memory for tensors of so many bytes each, on the host of `device`.
    pub fn for_sizes(bytes: impl IntoIterator<Item = i64>, device: Device) -> Result<Pinned> {
        let total = bytes.into_iter().map(padded).sum();
        let memory = match device {
            Device::Cuda(_) => {
                let mut memory = null_mut();
                // SAFETY: the result is a new tensor.
                check(unsafe { (load()?.api.corral_cuda_pinned)(total, &mut memory) })?;
                own(memory)
            }
            _ => Tensor::f_empty([total], (Kind::Uint8, Device::Cpu))?,
        };
        Ok(Pinned { memory, used: 0 })
    }

    /// Whether tensors of so many bytes each have room, once all places were given back.
    pub fn fits(&self, bytes: impl IntoIterator<Item = i64>) -> bool {
        bytes.into_iter().map(padded).sum::<i64>() <= self.bytes()
    }

    /// Bytes in all.
    pub fn bytes(&self) -> i64 {
        self.memory.numel() as i64
    }

    /// A place for a tensor, whose contents are undefined.
    ///
    /// # Errors
    /// More than was asked for.
    pub fn take(&mut self, size: &[i64], kind: Kind) -> Result<Tensor> {
        let bytes = size.iter().product::<i64>() * kind.elt_size_in_bytes() as i64;
        let first = self.used;
        self.used += padded(bytes);
        if self.used > self.bytes() {
            return Err(Error::new(format!("pinned memory: {} bytes of {}", self.used, self.bytes())));
        }
        Ok(self.memory.f_narrow(0, first, bytes)?.f_view_dtype(kind)?.f_view(size)?)
    }

    /// Gives all places back: what was taken must not be used any more.
    pub fn clear(&mut self) {
        self.used = 0;
    }
}

fn padded(bytes: i64) -> i64 {
    (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT
}

/// Gives memory that libtorch's allocator keeps for later back to the driver; on a CPU nothing.
pub fn empty_cache(device: Device) -> Result<()> {
    match device {
        // SAFETY: no arguments.
        Device::Cuda(_) => check(unsafe { (load()?.api.corral_cuda_empty_cache)() }),
        _ => Ok(()),
    }
}

/// Work of a GPU that was captured once and is queued again as a whole: its kernels, on the same memory.
pub struct Graph {
    cuda: &'static Cuda,
    raw: *mut GraphPtr,
}

impl Graph {
    /// Captures what `work` queues on `device`, a GPU, in this thread; it is not run. What it allocates stays the graph's.
    ///
    /// # Errors
    /// Those of `work`, and work that cannot be captured, such as waiting for the GPU.
    pub fn capture<T>(device: Device, work: impl FnOnce() -> Result<T>) -> Result<(Graph, T)> {
        let Device::Cuda(index) = device else {
            return Err(Error::new(format!("graphs are captured on a GPU, not on {device:?}")));
        };
        let (cuda, mut raw) = (load()?, null_mut());
        // SAFETY: `raw` is written where there is no error.
        check(unsafe { (cuda.api.corral_cuda_graph_begin)(index as c_int, &mut raw) })?;
        let graph = Graph { cuda, raw };
        let done = work();
        // SAFETY: the graph is being captured. It ends whatever `work` came to.
        let ended = check(unsafe { (cuda.api.corral_cuda_graph_end)(graph.raw) });
        let done = done?;
        ended?;
        Ok((graph, done))
    }

    /// Queues the work.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the graph is complete.
        check(unsafe { (self.cuda.api.corral_cuda_graph_replay)(self.raw) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by graph_begin, freed once.
        let _ = check(unsafe { (self.cuda.api.corral_cuda_graph_free)(self.raw) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_pinned_memory() {
        let mut pinned = Pinned::for_sizes([3, 8 * 5, 0, 4], Device::Cpu).unwrap();
        let bytes = pinned.take(&[3], Kind::Uint8).unwrap();
        let mut numbers = pinned.take(&[5], Kind::Double).unwrap();
        let none = pinned.take(&[0, 7], Kind::Float).unwrap();
        let mut last = pinned.take(&[2], Kind::BFloat16).unwrap();
        let _ = (numbers.fill_(2.5), last.fill_(-1.0), bytes.shallow_clone().fill_(7));
        assert_eq!(numbers.sum(Kind::Double).double_value(&[]), 12.5);
        assert_eq!((bytes.int64_value(&[2]), none.size(), last.double_value(&[1])), (7, vec![0, 7], -1.0));
        assert!(pinned.take(&[1], Kind::Uint8).is_err());
        pinned.clear();
        assert_eq!(pinned.take(&[3], Kind::Uint8).unwrap().int64_value(&[0]), 7);
    }
}
