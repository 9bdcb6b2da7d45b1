//! What Corral needs below `tch`, behind safe types. The one package with `unsafe`, C++ and CUDA.

pub mod composed;
mod ffi;
pub mod host;
pub mod ops;

pub use ffi::{Error, Result};
