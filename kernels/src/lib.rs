//! What Corral needs below `tch`, behind safe types. The one package with `unsafe`, C++ and CUDA.

pub mod mmap;
