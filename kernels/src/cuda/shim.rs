//! libtorch's CUDA part and, against it, the embedded `libcorral_cuda.so`: both are opened when CUDA is first asked for.

use std::ffi::{CStr, c_char, c_int};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::OnceLock;

use libloading::os::unix::{RTLD_GLOBAL, RTLD_LAZY, RTLD_LOCAL, RTLD_NOW};

use super::devices::{DeviceInfo, Memory};
use super::library::{dlopen, libtorch_dir};
use crate::abi::{Shim, Stream};
use crate::error::{Error, Result, check};

static SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libcorral_cuda.so"));
/// Why the shim is empty, if it is.
const NO_CUDA: &str = env!("CORRAL_NO_CUDA");

/// CUDA, loaded.
pub struct Cuda {
    pub(crate) api: Shim,
}

/// Loads libtorch's CUDA part. It needs no GPU: see [`Cuda::device_count`]. Errors name what is missing.
pub fn load() -> Result<&'static Cuda> {
    static CUDA: OnceLock<Result<Cuda>> = OnceLock::new();
    CUDA.get_or_init(open).as_ref().map_err(Clone::clone)
}

fn open() -> Result<Cuda> {
    if !NO_CUDA.is_empty() {
        return Err(Error::new(format!("this corral cannot use CUDA: {NO_CUDA}")));
    }
    let libtorch_cuda = libtorch_dir()?.join("libtorch_cuda.so");
    let no_cuda = |e: Error| e.context("this libtorch has no usable CUDA");
    let library = dlopen(&libtorch_cuda.to_string_lossy(), RTLD_LAZY | RTLD_GLOBAL).map_err(no_cuda)?;
    std::mem::forget(library); // stays for the life of the process

    // dlopen wants a file; this one is in memory, and gone with the process.
    // SAFETY: a valid name; the descriptor is ours.
    let fd = unsafe { libc::memfd_create(c"libcorral_cuda.so".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        let e = std::io::Error::last_os_error();
        return Err(Error::new(format!("no memory file for libcorral_cuda.so: {e}")));
    }
    // SAFETY: `fd` is open and owned by nobody else.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(SHIM).map_err(|e| Error::new(format!("libcorral_cuda.so: {e}")))?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let shim = dlopen(&path, RTLD_NOW | RTLD_LOCAL).map_err(no_cuda)?;
    // SAFETY: it is the shim that was built with this package, and is never closed.
    let api = unsafe { Shim::find(&shim) }.map_err(|e| Error::new(format!("libcorral_cuda.so: {e}")))?;
    std::mem::forget(shim);
    let mut known = 0;
    // SAFETY: `known` is written.
    check(unsafe { (api.corral_cuda_hooks)(&mut known) })?;
    if known == 0 {
        return Err(Error::new("CUDA was loaded too late: libtorch used it before kernels::cuda::load"));
    }
    Ok(Cuda { api })
}

// The shim is loaded for the life of the process, checks device indices, turns C++ exceptions into messages, and writes to its
// out-parameters before it returns without error.
impl Cuda {
    /// How many devices can be used; an error with the driver's reason if none.
    pub fn device_count(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: `count` is valid.
        check(unsafe { (self.api.corral_cuda_device_count)(&mut count) })?;
        Ok(count as usize)
    }

    /// Properties of `device`, an index among those that CUDA_VISIBLE_DEVICES leaves.
    pub fn device_info(&self, device: usize) -> Result<DeviceInfo> {
        let (mut name, mut uuid) = ([0 as c_char; 256], [0u8; 16]);
        let (mut major, mut minor, mut num_processors, mut memory_bytes) = (0, 0, 0, 0);
        // SAFETY: the arrays have the 256 and 16 bytes that the shim may write, and the numbers are valid.
        check(unsafe {
            (self.api.corral_cuda_device_info)(
                device as c_int,
                name.as_mut_ptr(),
                uuid.as_mut_ptr(),
                &mut major,
                &mut minor,
                &mut num_processors,
                &mut memory_bytes,
            )
        })?;
        // SAFETY: the shim ends the name with a NUL within the array.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok(DeviceInfo { name, uuid, capability: (major, minor), num_processors, memory_bytes })
    }

    /// The device that new work of this thread goes to.
    pub fn set_device(&self, device: usize) -> Result<()> {
        // SAFETY: the shim checks the index.
        check(unsafe { (self.api.corral_cuda_set_device)(device as c_int) })
    }

    /// Waits until all work of the device is done.
    pub fn synchronize(&self, device: usize) -> Result<()> {
        // SAFETY: the shim checks the index.
        check(unsafe { (self.api.corral_cuda_synchronize)(device as c_int) })
    }

    /// What libtorch's caching allocator holds on `device`, in bytes.
    pub fn memory(&self, device: usize) -> Result<Memory> {
        let mut m = [0i64; 4];
        // SAFETY: the shim writes four numbers.
        check(unsafe { (self.api.corral_cuda_memory)(device as c_int, m.as_mut_ptr()) })?;
        Ok(Memory { allocated: m[0], peak_allocated: m[1], reserved: m[2], peak_reserved: m[3] })
    }

    /// This thread's current stream of `device`.
    pub(crate) fn current_stream(&self, device: usize) -> Result<Stream> {
        let mut s = Stream { id: 0, device: 0 };
        // SAFETY: `s` is valid.
        check(unsafe { (self.api.corral_cuda_stream_current)(device as c_int, &mut s) })?;
        Ok(s)
    }
}
