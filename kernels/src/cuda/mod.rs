//! CUDA, loaded when first asked for, and kernels that are compiled at run time.
//!
//! [`load`] must come before anything else that may ask libtorch about CUDA (a random seed does): libtorch looks once.

mod devices;
pub mod emulator;
pub(crate) mod launch;
mod library;
pub(crate) mod modules;
pub mod nvrtc;
mod shim;
pub mod sources;
mod streams;

pub use devices::{DeviceInfo, Memory, peak_flops};
pub use library::libtorch_dir;
pub use shim::{Cuda, load};
pub use streams::{CopyStream, Graph, Pinned, empty_cache};

/// Whether a device's tensors take the GPU's path: CUDA's do, and the CPU's in tests with the [`emulator`].
pub(crate) fn takes_gpu_path(device: tch::Device) -> bool {
    matches!(device, tch::Device::Cuda(_)) || (device == tch::Device::Cpu && emulator::is_installed())
}
