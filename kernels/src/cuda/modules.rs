//! Compiled kernels: loading them, finding one by name, launching it.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

use tch::{Device, Tensor};

use super::shim::Cuda;
use crate::abi::{CUkern_st, CUlib_st, Stream};
use crate::error::{Error, Result, c_string, check};

/// What a kernel is launched with. The types must be those of the kernel's parameters.
pub(crate) enum Arg<'a> {
    /// The address of the tensor's first element.
    Tensor(&'a Tensor),
    /// A null pointer, for tensors that are left out.
    Null,
    /// Also for `bool`, of which the first byte is read, and for `unsigned`.
    I32(i32),
    I64(i64),
    U64(u64),
    F32(f32),
}

impl Arg<'_> {
    /// The argument in eight bytes of its own: a kernel reads the first of those, as many as its parameter has. `address` says
    /// where the kernel finds a tensor.
    pub(super) fn bits(&self, address: impl FnOnce(&Tensor) -> u64) -> u64 {
        match *self {
            Arg::Tensor(t) => address(t),
            Arg::Null => 0,
            Arg::I32(v) => v as u32 as u64,
            Arg::I64(v) => v as u64,
            Arg::U64(v) => v,
            Arg::F32(v) => v.to_bits() as u64,
        }
    }
}

fn on_cuda(t: &Tensor) -> Result<()> {
    match t.device() {
        Device::Cuda(_) => Ok(()),
        other => Err(Error::new(format!("a tensor on {other:?} where CUDA is needed"))),
    }
}

/// Compiled kernels, loaded.
pub(crate) struct Module {
    cuda: &'static Cuda,
    raw: *mut CUlib_st,
    /// The driver may read it again when the code is first used on another device.
    _image: Vec<u8>,
}

// SAFETY: CUDA's library and kernel handles may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as for Send.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // At the end of the process the driver may be gone already; the code goes with it.
        // SAFETY: `raw` was loaded, is unloaded once, and no `Kernel` outlives this.
        let _ = check(unsafe { (self.cuda.api.corral_cuda_module_unload)(self.raw) });
    }
}

impl Module {
    /// Loads a cubin or PTX for all devices.
    pub(crate) fn load(cuda: &'static Cuda, image: &[u8]) -> Result<Module> {
        // PTX must end in a NUL; a cubin does not mind one.
        let mut image = image.to_vec();
        image.push(0);
        let mut raw = null_mut();
        // SAFETY: the image ends in a NUL and lives as long as the module; `raw` is written where there is no error.
        check(unsafe { (cuda.api.corral_cuda_module_load)(image.as_ptr().cast(), &mut raw) })?;
        Ok(Module { cuda, raw, _image: image })
    }

    /// The kernel `name` (`extern "C"` in the source).
    pub(crate) fn kernel(&self, name: &str) -> Result<Kernel<'_>> {
        let c_name = c_string(name)?;
        let mut raw = null_mut();
        // SAFETY: the module is loaded, the name outlives the call; `raw` is written where there is no error.
        check(unsafe { (self.cuda.api.corral_cuda_kernel)(self.raw, c_name.as_ptr(), &mut raw) })
            .map_err(|e| e.context(format!("kernel {name}")))?;
        Ok(Kernel { module: self, raw })
    }
}

/// A kernel of a module.
#[derive(Clone, Copy)]
pub(crate) struct Kernel<'a> {
    module: &'a Module,
    raw: *mut CUkern_st,
}

// SAFETY: as for `Module`.
unsafe impl Send for Kernel<'_> {}
// SAFETY: as for `Module`.
unsafe impl Sync for Kernel<'_> {}

impl Kernel<'_> {
    /// Allows up to `bytes` of dynamic shared memory on `device`: needed above 48 KiB.
    pub(crate) fn allow_shared(&self, device: usize, bytes: usize) -> Result<()> {
        // SAFETY: the kernel's module is loaded; the shim checks the device, CUDA the size.
        check(unsafe {
            (self.module.cuda.api.corral_cuda_kernel_shared)(self.raw, device as c_int, bytes as c_int)
        })
    }

    /// Puts the kernel on `stream`; does not wait. `shared_bytes`: dynamic shared memory.
    ///
    /// # Safety
    /// `args` must match the kernel's parameters in number, order and type; the kernel must stay within the tensors, and write
    /// only to such as the caller may write to. A tensor may be dropped once this has returned: its memory is taken again by
    /// later work of the same stream alone.
    pub(crate) unsafe fn launch(
        &self,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: usize,
        stream: Stream,
        args: &[Arg],
    ) -> Result<()> {
        for a in args {
            if let Arg::Tensor(t) = a {
                on_cuda(t)?;
            }
        }
        let mut values: Vec<u64> = args.iter().map(|a| a.bits(|t| t.data_ptr() as u64)).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| (v as *mut u64).cast()).collect();
        // SAFETY: a pointer to a value for each parameter, as the caller promises; they are read before the call returns.
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
