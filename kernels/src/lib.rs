//! What Corral needs below `tch`, behind safe types. The one package with `unsafe`, C++ and CUDA.
//!
//! A module uses those above it in this list:
//! - [`error`], `abi` (the C ABI of `cpp/`), `tensors`
//! - [`cuda`]: devices, kernels compiled at run time
//! - [`ops`]: operations of a Llama, on the CPU, on CUDA, and composed of libtorch's
//! - [`quant`], [`moments`]: weights and AdamW's moments in 4 and 8 bits
//! - [`host`], [`counting`], [`mmap`], [`process`]: settings of this process, memory, files, programs
//! - [`comm`], [`watch`]: communication between ranks, and who is missing

#![allow(unsafe_code)] // the one package that has any
#![warn(missing_docs)]

mod abi;
pub mod comm;
pub mod cuda;
pub mod error;
pub mod host;
pub mod ops;
pub mod quant;
mod tensors;
pub mod trace;

pub use comm::watch;
pub use error::{Error, Result};
pub use host::{counting, mmap, process};
pub use quant::moments;
