//! What Corral needs below `tch`, behind safe types. The one package with `unsafe`, C++ and CUDA.

mod abi;
pub mod c10d;
pub mod composed;
pub mod composed_quant;
pub mod counting;
pub mod cuda;
pub mod error;
pub mod gpu;
pub mod gpu_quant;
pub mod host;
pub mod mmap;
pub mod moments;
pub mod nvrtc;
pub mod ops;
pub mod process;
pub mod quant;
mod store;
pub mod watch;

pub use error::{Error, Result};
