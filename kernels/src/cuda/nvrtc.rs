//! NVRTC: CUDA C++ to machine code at run time. Needs no GPU and no CUDA toolkit: the library comes with libtorch, and the
//! headers for bf16, fp16 and fp8 are embedded.

use super::library::{dlopen, libtorch_dir};
use crate::error::{Error, Result, c_string};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::OnceLock;

/// (name, text) of what our kernels share.
const COMMON: (&str, &str) = ("common.cuh", include_str!("../../cuda/common.cuh"));

/// (name, text) of what a kernel may include: `cuda_bf16.h`, `cuda_fp16.h`, `cuda_fp8.h` and what those need.
const HEADERS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/nvrtc_headers.rs"));

const NVRTC_SONAME: &str = "libnvrtc.so.13";

type Program = *mut c_void;

struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
}

fn load() -> Result<&'static Nvrtc> {
    static NVRTC: OnceLock<Result<Nvrtc>> = OnceLock::new();
    NVRTC.get_or_init(open).as_ref().map_err(Clone::clone)
}

fn open() -> Result<Nvrtc> {
    // Beside libtorch: as PyPI's wheels lie, as PyTorch's zip does; then wherever the system finds it.
    let lib = libtorch_dir()?;
    let mut places: Vec<PathBuf> = vec![lib.join("../../nvidia/cu13/lib"), lib];
    #[expect(clippy::disallowed_methods, reason = "where CUDA is, on a machine with its toolkit")]
    let cuda_home = std::env::var("CUDA_HOME").unwrap_or("/usr/local/cuda".into());
    places.push(Path::new(&cuda_home).join("lib64"));
    let place = places.into_iter().find(|p| p.join(NVRTC_SONAME).exists());
    if let Some(place) = &place {
        // NVRTC opens its builtins by name alone and would not find them there: they must be loaded before.
        let entries =
            std::fs::read_dir(place).map_err(|e| Error::new(format!("{}: {e}", place.display())))?;
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so.") {
                std::mem::forget(dlopen(&entry.path().to_string_lossy(), RTLD_NOW | RTLD_GLOBAL)?);
            }
        }
    }
    let path = place.map_or(NVRTC_SONAME.into(), |p| p.join(NVRTC_SONAME));
    let library = dlopen(&path.to_string_lossy(), RTLD_NOW | RTLD_GLOBAL).map_err(|e| {
        e.context("NVRTC, which compiles the CUDA kernels, is missing (it comes with libtorch for CUDA 13)")
    })?;
    // SAFETY: the signatures are those of nvrtc.h; the library stays loaded.
    let nvrtc = unsafe {
        Nvrtc {
            create: symbol(&library, "nvrtcCreateProgram")?,
            compile: symbol(&library, "nvrtcCompileProgram")?,
            log_size: symbol(&library, "nvrtcGetProgramLogSize")?,
            log: symbol(&library, "nvrtcGetProgramLog")?,
            cubin_size: symbol(&library, "nvrtcGetCUBINSize")?,
            cubin: symbol(&library, "nvrtcGetCUBIN")?,
            destroy: symbol(&library, "nvrtcDestroyProgram")?,
            error: symbol(&library, "nvrtcGetErrorString")?,
        }
    };
    std::mem::forget(library);
    Ok(nvrtc)
}

/// # Safety
/// `T` must be the function's type.
unsafe fn symbol<T: Copy>(library: &Library, name: &str) -> Result<T> {
    // SAFETY: the caller's promise.
    let found =
        unsafe { library.get::<T>(name.as_bytes()) }.map_err(|e| Error::new(format!("NVRTC: {e}")))?;
    Ok(*found)
}

/// Where compiled kernels are kept from process to process.
static CACHE: OnceLock<PathBuf> = OnceLock::new();

/// Keeps compiled kernels in a folder, from which later processes take them: compiling takes seconds. The first call counts.
pub fn keep_in(folder: PathBuf) {
    CACHE.get_or_init(|| folder);
}

/// [`compile`], or what the folder of [`keep_in`] holds of the same source, headers, options, architecture and compiler. A
/// folder that cannot be read or written changes nothing.
pub fn compiled(name: &str, source: &str, arch: &str, options: &[&str]) -> Result<Vec<u8>> {
    let Some(folder) = CACHE.get() else { return compile(name, source, arch, options) };
    let version = env!("CARGO_PKG_VERSION");
    let headers = HEADERS.iter().chain([&COMMON]).flat_map(|(name, text)| [*name, *text]);
    let parts =
        [version, NVRTC_SONAME, source, arch].into_iter().chain(options.iter().copied()).chain(headers);
    // FNV-1a, of each part with its length.
    let hash = parts.fold(0xcbf2_9ce4_8422_2325_u64, |h, part| {
        let bytes = (part.len() as u64).to_le_bytes().into_iter().chain(part.bytes());
        bytes.fold(h, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
    });
    let stem = name.trim_end_matches(".cu");
    let file = folder.join(format!("{stem}-{arch}-{hash:016x}.cubin"));
    if let Ok(cubin) = std::fs::read(&file)
        && cubin.starts_with(b"\x7fELF")
    {
        return Ok(cubin);
    }
    let cubin = compile(name, source, arch, options)?;
    // Renamed when it is complete: ranks begin together.
    let unfinished = folder.join(format!("{stem}-{hash:016x}.{}", std::process::id()));
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&unfinished, &cubin));
    if written.and_then(|()| std::fs::rename(&unfinished, &file)).is_err() {
        let _ = std::fs::remove_file(&unfinished);
    }
    Ok(cubin)
}

/// Compiles `source` (called `name` in messages) for `arch`, such as `sm_90`; `options` as nvcc's, such as `-DN=4`.
/// Returns a cubin. The error carries the compiler's log.
pub fn compile(name: &str, source: &str, arch: &str, options: &[&str]) -> Result<Vec<u8>> {
    let nvrtc = load()?;
    let strings =
        |items: &mut dyn Iterator<Item = &str>| items.map(c_string).collect::<Result<Vec<CString>>>();
    let pointers = |items: &[CString]| items.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
    let (c_name, c_source, c_arch) =
        (c_string(name)?, c_string(source)?, format!("--gpu-architecture={arch}"));
    let header_names = strings(&mut HEADERS.iter().chain([&COMMON]).map(|h| h.0))?;
    let header_texts = strings(&mut HEADERS.iter().chain([&COMMON]).map(|h| h.1))?;
    let options = strings(&mut [c_arch.as_str(), "--std=c++17"].into_iter().chain(options.iter().copied()))?;
    let (header_names_p, header_texts_p) = (pointers(&header_names), pointers(&header_texts));

    let ok = |code: c_int, what: &str| -> Result<()> {
        // SAFETY: NVRTC returns a static string.
        let text = || unsafe { CStr::from_ptr((nvrtc.error)(code)) }.to_string_lossy().into_owned();
        if code == 0 { Ok(()) } else { Err(Error::new(format!("{name} for {arch}: {what}: {}", text()))) }
    };
    struct Destroy(&'static Nvrtc, Program);
    impl Drop for Destroy {
        fn drop(&mut self) {
            // SAFETY: made by nvrtcCreateProgram, destroyed once.
            unsafe { (self.0.destroy)(&mut self.1) };
        }
    }

    // SAFETY: strings and arrays outlive the calls; buffers are as long as NVRTC says.
    unsafe {
        let mut program = null_mut();
        let code = (nvrtc.create)(
            &mut program,
            c_source.as_ptr(),
            c_name.as_ptr(),
            header_names.len() as c_int,
            header_texts_p.as_ptr(),
            header_names_p.as_ptr(),
        );
        ok(code, "NVRTC")?;
        let program = Destroy(nvrtc, program);
        let code = (nvrtc.compile)(program.1, options.len() as c_int, pointers(&options).as_ptr());
        if code != 0 {
            let mut size = 0;
            ok((nvrtc.log_size)(program.1, &mut size), "log")?;
            let mut log = vec![0u8; size.max(1)];
            ok((nvrtc.log)(program.1, log.as_mut_ptr().cast()), "log")?;
            let log = String::from_utf8_lossy(&log);
            return ok(code, log.trim_end_matches('\0').trim()).map(|()| Vec::new());
        }
        let mut size = 0;
        ok((nvrtc.cubin_size)(program.1, &mut size), "cubin")?;
        let mut cubin = vec![0u8; size];
        ok((nvrtc.cubin)(program.1, cubin.as_mut_ptr().cast()), "cubin")?;
        Ok(cubin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOUBLE: &str = r#"
        #include <cuda_bf16.h>
        #include <cuda_fp16.h>
        #include <cuda_fp8.h>
        extern "C" __global__ void twice(__nv_bfloat16* x, long n) {
            long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
            if (i < n) x[i] = __float2bfloat16(FACTOR * __bfloat162float(x[i]));
        }
    "#;

    #[test]
    fn compiles_for_every_architecture_without_a_gpu() {
        for arch in ["sm_80", "sm_90", "sm_100"] {
            let cubin = compile("twice.cu", DOUBLE, arch, &["-DFACTOR=2.f"]).unwrap();
            assert_eq!(&cubin[..4], b"\x7fELF", "{arch}");
            assert!(cubin.windows(5).any(|w| w == b"twice"), "{arch}: the kernel's name is in the cubin");
        }
    }

    #[test]
    fn compiled_kernels_are_kept() {
        let folder = std::env::temp_dir().join(format!("corral-nvrtc-{}", std::process::id()));
        keep_in(folder.clone());
        let get = |options: &[&str]| compiled("twice.cu", DOUBLE, "sm_90", options).unwrap();
        let files = || {
            let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|f| f.unwrap().path()).collect();
            files.sort();
            files
        };
        let first = get(&["-DFACTOR=2.f"]);
        let [file] = &files()[..] else { panic!("{:?}", files()) };
        assert_eq!(first, get(&["-DFACTOR=2.f"]));
        // It is what is read.
        std::fs::write(file, b"\x7fELF and so on").unwrap();
        assert_eq!(get(&["-DFACTOR=2.f"]), b"\x7fELF and so on");
        // What is no machine code is made again; other options are another file.
        std::fs::write(file, b"half").unwrap();
        assert_eq!(first, get(&["-DFACTOR=2.f"]));
        assert_ne!(first, get(&["-DFACTOR=3.f"]));
        assert_eq!(files().len(), 2);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn errors_carry_name_line_and_log() {
        let e = compile("twice.cu", DOUBLE, "sm_90", &[]).unwrap_err().message;
        assert!(e.contains("twice.cu(") && e.contains("FACTOR") && e.contains("sm_90"), "{e}");
    }
}
