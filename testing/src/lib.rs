//! What the tests of all packages share. Nothing here depends on the crate `corral`, so that its unit tests can use it.
//!
//! - [`golden`]: reference values of other programs, and fixtures;
//! - [`tolerance`]: how far a value may be from its reference, one table;
//! - [`compare`]: distances of tensors and series;
//! - [`device`]: the device under test;
//! - [`emulator`]: CUDA's kernels on the CPU;
//! - [`ranks`]: ranks as threads, and as processes;
//! - [`folder`]: temporary folders;
//! - [`program`]: runs of `corral` and `launch`;
//! - [`run`]: trainings of a tiny model.

// Tests call this package and nothing else does: its names say what they do, a helper that fails ends its test, and it reads
// the tests' own variables.
#![allow(missing_docs, clippy::unwrap_used, clippy::disallowed_methods)]

pub mod compare;
pub mod device;
pub mod emulator;
pub mod folder;
pub mod golden;
pub mod hosts;
pub mod program;
pub mod ranks;
pub mod run;
pub mod tolerance;
