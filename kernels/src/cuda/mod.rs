//! CUDA, loaded when first asked for, and kernels that are compiled at run time.
//!
//! [`load`] must come before anything else that may ask libtorch about CUDA (a random seed does): libtorch looks once.

mod devices;
pub(crate) mod launch;
mod library;
pub(crate) mod modules;
pub mod nvrtc;
mod shim;
pub mod sources;

pub use devices::{DeviceInfo, Memory, peak_flops};
pub use shim::{Cuda, load};
