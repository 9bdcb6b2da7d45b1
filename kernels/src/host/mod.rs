//! Settings of this process: threads, where float32 products go, the allocator.

pub mod counting;
pub mod mmap;
pub mod process;

use tch::{Kind, Tensor};

use crate::abi::corral_allocate_by_malloc;
use crate::error::{Result, check};
use crate::ops;

/// How glibc's allocator treats freed memory, and that tensors come from there such that a freed one makes room for the next
/// of its size.
///
/// One rank alone keeps it in the heap: activations are allocated and freed in the same pattern each step, and fresh pages
/// cost more to map than a product to compute. Ranks that share parameters give buffers of 4 MiB and more back at once:
/// what is gathered and reduced between buffers that live long would otherwise scatter over the heap, which then hides
/// what sharding saves.
pub fn tune_allocator(alone: bool) -> Result<()> {
    // SAFETY: mallopt only sets parameters of glibc's allocator.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, if alone { 1 << 30 } else { 4 << 20 });
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        // Threads that hold memory for each other (communication, saving) would otherwise keep heaps of their own.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
    // SAFETY: tensors that are there already keep the allocator that they came from.
    check(unsafe { corral_allocate_by_malloc() })
}

/// Whether this processor has instructions for products in bfloat16.
pub fn has_native_bfloat16() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    ["avx512_bf16", "amx_bf16"].iter().any(|flag| flags.contains(flag))
}

/// From now on what this thread computes with libtorch it computes alone.
pub fn use_one_thread_here() {
    unsafe extern "C" {
        fn omp_set_num_threads(n: std::ffi::c_int);
    }
    // libtorch's own choice for a thread comes with its first look at it, and would come later.
    tch::get_num_threads();
    // SAFETY: it only sets a number for this thread.
    unsafe { omp_set_num_threads(1) };
}

/// Columns of the terminal that stderr is, if it is one and says so.
pub fn terminal_columns() -> Option<u16> {
    // SAFETY: plain data, which the call fills where it succeeds.
    let size = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        (libc::ioctl(libc::STDERR_FILENO, libc::TIOCGWINSZ, &mut size) == 0).then_some(size)
    };
    size.map(|size| size.ws_col).filter(|columns| *columns > 0)
}

/// Which library multiplies float32 matrices on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float32Products {
    /// oneDNN.
    OneDnn,
    /// MKL, libtorch's default.
    Mkl,
}

/// Chooses by processor, so that the choice is the same in every run on a machine: oneDNN on processors that are
/// not Intel's, where MKL takes slower paths. There oneDNN's "medium" precision must still be true float32
/// (elsewhere it may round operands to bfloat16), which one product checks; if it is not, MKL stays.
pub fn choose_float32_products() -> Result<Float32Products> {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let intel = info.lines().any(|l| l.starts_with("vendor_id") && l.contains("GenuineIntel"));
    if !intel {
        ops::set_float32_onednn(true)?;
        // Exact in float32 (products of 12-bit integers, sums below 2^24), not in bfloat16.
        let a =
            Tensor::arange(64 * 64, (Kind::Float, tch::Device::Cpu)).remainder(61.0).view([64, 64]) + 2000.0;
        let b = Tensor::arange(64 * 64, (Kind::Float, tch::Device::Cpu)).remainder(3.0).view([64, 64]);
        let exact = a.to_kind(Kind::Double).matmul(&b.to_kind(Kind::Double));
        if a.matmul(&b).to_kind(Kind::Double).equal(&exact) {
            return Ok(Float32Products::OneDnn);
        }
        ops::set_float32_onednn(false)?;
    }
    Ok(Float32Products::Mkl)
}
