//! CUDA, loaded when first asked for: libtorch's CUDA part and, against it, the embedded `libcorral_cuda.so`.
//!
//! [`load`] must come before anything else that may ask libtorch about CUDA (a random seed does): libtorch looks once.

use crate::abi::*;
use crate::error::{Error, Result, c_string, check, take_string};
use crate::store::{Store, millis};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

static SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libcorral_cuda.so"));
/// Why the shim is empty, if it is.
const NO_CUDA: &str = env!("CORRAL_NO_CUDA");

/// CUDA, loaded.
pub struct Cuda {
    api: Shim,
}

/// Loads libtorch's CUDA part. It needs no GPU: see [`Cuda::device_count`]. Errors name what is missing.
pub fn load() -> Result<&'static Cuda> {
    static CUDA: OnceLock<Result<Cuda>> = OnceLock::new();
    CUDA.get_or_init(open).as_ref().map_err(Clone::clone)
}

/// The folder that libtorch was loaded from.
pub(crate) fn libtorch_dir() -> Result<PathBuf> {
    let mut path = null_mut();
    // SAFETY: `path` is a malloc'ed string when there is no error.
    check(unsafe { corral_libtorch_path(&mut path) })?;
    let path = PathBuf::from(take_string(path));
    let path = path.canonicalize().unwrap_or(path);
    path.parent().map(Into::into).ok_or_else(|| Error::new(format!("{} lies in no folder", path.display())))
}

pub(crate) fn dlopen(path: &str, flags: c_int) -> Result<Library> {
    // SAFETY: libtorch's and NVIDIA's libraries run nothing at load that needs care.
    unsafe { Library::open(Some(path), flags) }.map_err(|e| Error::new(e.to_string()))
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
        return Err(Error::new(
            "CUDA was loaded too late: libtorch was asked for it before kernels::cuda::load",
        ));
    }
    Ok(Cuda { api })
}

/// Ends the process now, without destructors or exit handlers: those may wait for a GPU that never answers.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}

#[derive(Debug, Clone, PartialEq)]
pub struct DeviceInfo {
    pub name: String,
    pub uuid: [u8; 16],
    /// Compute capability: (9, 0) is sm_90.
    pub capability: (i32, i32),
    pub num_processors: i32,
    pub memory_bytes: i64,
}

/// Part of a device's name, and the peak of its dense matrix products in TFLOP/s: bfloat16 with float32 sums on tensor cores,
/// and float32 (not TF32), as NVIDIA's data sheets state them. The first that is found counts.
const PEAK_TFLOPS: &[(&str, f64, f64)] = &[
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("GH200", 989.0, 67.0),
    ("H200 NVL", 835.0, 60.0),
    ("H200", 989.0, 67.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100", 989.0, 67.0),
    ("H800 PCIe", 756.0, 51.0),
    ("H800", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("A10G", 70.0, 31.2),
    ("A10", 125.0, 31.2),
    ("RTX 6000 Ada", 364.0, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090 Ti", 80.0, 40.0),
    ("RTX 3090", 71.0, 35.6),
];

/// Peak FLOP/s of dense matrix products on a device of this name (see [`DeviceInfo::name`]); none where it is not known, as
/// for parts of a device (MIG) and the slower chips of laptops.
pub fn peak_flops(device_name: &str, kind: Kind) -> Option<f64> {
    let other = ["MIG", "Laptop", "Max-Q", "RTX 4090 D", "RTX 5090 D"];
    if other.iter().any(|o| device_name.contains(o)) {
        return None;
    }
    // Words, so that L40 is no L4 and A1000 no A100.
    let words = |s: &str| s.split([' ', '-']).map(str::to_owned).collect::<Vec<_>>();
    let name = words(device_name);
    let known = |part: &str| name.windows(words(part).len()).any(|w| w == words(part));
    let (_, bfloat16, float32) = PEAK_TFLOPS.iter().find(|(part, ..)| known(part))?;
    match kind {
        Kind::BFloat16 => Some(bfloat16 * 1e12),
        Kind::Float => Some(float32 * 1e12),
        _ => None,
    }
}

/// Of libtorch's caching allocator on one device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub allocated: i64,
    pub peak_allocated: i64,
    pub reserved: i64,
    pub peak_reserved: i64,
}

/// What a kernel is launched with. The types must be those of the kernel's parameters.
pub enum Arg<'a> {
    /// The address of the tensor's first element.
    Tensor(&'a Tensor),
    /// A null pointer, for tensors that are left out.
    Null,
    I32(i32),
    I64(i64),
    U64(u64),
    F32(f32),
}

// SAFETY (all calls of the shim below): it is loaded for the life of the process, checks device indices, catches C++
// exceptions, and writes to its out-parameters, which are valid, before it returns without error.
impl Cuda {
    /// How many devices can be used; an error with the driver's reason if none.
    pub fn device_count(&self) -> Result<usize> {
        let mut count = 0;
        check(unsafe { (self.api.corral_cuda_device_count)(&mut count) })?;
        Ok(count as usize)
    }

    pub fn device_info(&self, device: usize) -> Result<DeviceInfo> {
        let (mut name, mut uuid) = ([0 as c_char; 256], [0u8; 16]);
        let (mut major, mut minor, mut num_processors, mut memory_bytes) = (0, 0, 0, 0);
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
        check(unsafe { (self.api.corral_cuda_set_device)(device as c_int) })
    }

    /// Waits until all work of the device is done.
    pub fn synchronize(&self, device: usize) -> Result<()> {
        check(unsafe { (self.api.corral_cuda_synchronize)(device as c_int) })
    }

    pub fn memory(&self, device: usize) -> Result<Memory> {
        let mut m = [0i64; 4];
        check(unsafe { (self.api.corral_cuda_memory)(device as c_int, m.as_mut_ptr()) })?;
        Ok(Memory { allocated: m[0], peak_allocated: m[1], reserved: m[2], peak_reserved: m[3] })
    }

    /// This thread's current stream of `device`.
    pub fn current_stream(&self, device: usize) -> Result<Stream> {
        let mut s = Stream { id: 0, device: 0 };
        check(unsafe { (self.api.corral_cuda_stream_current)(device as c_int, &mut s) })?;
        Ok(s)
    }

    /// Loads a cubin or PTX for all devices.
    pub fn load_module(&'static self, image: &[u8]) -> Result<Module> {
        // PTX must end in a NUL; a cubin does not mind one.
        let mut image = image.to_vec();
        image.push(0);
        let mut raw = null_mut();
        check(unsafe { (self.api.corral_cuda_module_load)(image.as_ptr().cast(), &mut raw) })?;
        Ok(Module { cuda: self, raw, _image: image })
    }
}

fn on_cuda(t: &Tensor) -> Result<()> {
    match t.device() {
        Device::Cuda(_) => Ok(()),
        other => Err(Error::new(format!("a tensor on {other:?} where CUDA is needed"))),
    }
}

/// Compiled kernels, loaded.
pub struct Module {
    cuda: &'static Cuda,
    raw: *mut CUlib_st,
    /// The driver may read it again when the code is first used on another device.
    _image: Vec<u8>,
}

// SAFETY: CUDA's library and kernel handles may be used from any thread.
unsafe impl Send for Module {}
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // At the end of the process the driver may be gone already; the code goes with it.
        let _ = check(unsafe { (self.cuda.api.corral_cuda_module_unload)(self.raw) });
    }
}

impl Module {
    /// The kernel `name` (`extern "C"` in the source).
    pub fn kernel(&self, name: &str) -> Result<Kernel<'_>> {
        let c_name = c_string(name)?;
        let mut raw = null_mut();
        check(unsafe { (self.cuda.api.corral_cuda_kernel)(self.raw, c_name.as_ptr(), &mut raw) })
            .map_err(|e| e.context(format!("kernel {name}")))?;
        Ok(Kernel { module: self, raw })
    }
}

#[derive(Clone, Copy)]
pub struct Kernel<'a> {
    module: &'a Module,
    raw: *mut CUkern_st,
}

// SAFETY: as for `Module`.
unsafe impl Send for Kernel<'_> {}
unsafe impl Sync for Kernel<'_> {}

impl Kernel<'_> {
    /// Allows up to `bytes` of dynamic shared memory on `device`: needed above 48 KiB.
    pub fn allow_shared(&self, device: usize, bytes: usize) -> Result<()> {
        check(unsafe {
            (self.module.cuda.api.corral_cuda_kernel_shared)(self.raw, device as c_int, bytes as c_int)
        })
    }

    /// Puts the kernel on `stream`; does not wait. `shared_bytes`: dynamic shared memory.
    ///
    /// # Safety
    /// `args` must match the kernel's parameters in number, order and type, and the kernel must stay within the tensors.
    pub unsafe fn launch(
        &self,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: usize,
        stream: Stream,
        args: &[Arg],
    ) -> Result<()> {
        // Every value in eight bytes of its own; a kernel reads the first bytes of those, as many as its parameter has.
        let mut values = args
            .iter()
            .map(|a| {
                Ok(match *a {
                    Arg::Tensor(t) => {
                        on_cuda(t)?;
                        t.data_ptr() as u64
                    }
                    Arg::Null => 0,
                    Arg::I32(v) => v as u32 as u64,
                    Arg::I64(v) => v as u64,
                    Arg::U64(v) => v,
                    Arg::F32(v) => v.to_bits() as u64,
                })
            })
            .collect::<Result<Vec<u64>>>()?;
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| (v as *mut u64).cast()).collect();
        check(unsafe {
            (self.module.cuda.api.corral_cuda_launch)(
                self.raw,
                grid.as_ptr(),
                block.as_ptr(),
                shared_bytes,
                stream,
                pointers.as_mut_ptr(),
            )
        })
    }
}

/// An NCCL process group on `device`, connected.
pub(crate) fn nccl(
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

pub(crate) fn nccl_work_clone(work: *const WorkPtr) -> Result<*mut WorkPtr> {
    let mut raw = null_mut();
    check(unsafe { (load()?.api.corral_nccl_work_clone)(work, &mut raw) })?;
    Ok(raw)
}

pub(crate) fn nccl_shutdown(backend: *const BackendPtr) -> Result<()> {
    check(unsafe { (load()?.api.corral_nccl_shutdown)(backend) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_of_known_devices_only() {
        let bf16 = |name| peak_flops(name, Kind::BFloat16);
        assert_eq!(bf16("NVIDIA H100 80GB HBM3"), Some(989e12));
        assert_eq!(bf16("NVIDIA H100 PCIe"), Some(756e12));
        assert_eq!(bf16("NVIDIA H200"), Some(989e12));
        assert_eq!(bf16("NVIDIA GB200"), Some(2500e12));
        assert_eq!(bf16("NVIDIA A100-SXM4-80GB"), Some(312e12));
        assert_eq!(bf16("NVIDIA A100-PCIE-40GB"), Some(312e12));
        assert_eq!(bf16("NVIDIA L40"), Some(181e12));
        assert_eq!(bf16("NVIDIA L4"), Some(121e12));
        assert_eq!(bf16("NVIDIA GeForce RTX 3090"), Some(71e12));
        assert_eq!(peak_flops("NVIDIA H200", Kind::Float), Some(67e12));
        for name in [
            "NVIDIA RTX A1000",
            "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "",
        ] {
            assert_eq!(bf16(name), None, "{name}");
        }
        assert_eq!(peak_flops("NVIDIA H200", Kind::Double), None);
    }
}
