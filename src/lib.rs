//! Corral: a Llama trainer on libtorch.
//!
//! Dependencies point one way: [`commands`] -> [`report`] -> [`algorithms`] -> [`generate`], [`checkpoint`] -> [`optim`], [`model`] ->
//! [`distributed`], [`data`] -> `kernels`. [`config`] and [`telemetry`] know no algorithm; [`mod@error`],
//! [`files`], [`content`], [`gguf`], [`random`] and [`signals`] are everywhere.
//! `docs/architecture.md` says how it fits together and why.

pub mod algorithms;
pub mod checkpoint;
pub mod commands;
pub mod config;
mod content;
pub mod data;
pub mod distributed;
mod env;
pub mod error;
mod files;
pub mod generate;
pub mod gguf;
pub mod model;
pub mod optim;
pub mod plan;
mod random;
pub mod report;
mod rewards;
pub mod signals;
pub mod telemetry;

pub use error::{Context, Error, Result};
