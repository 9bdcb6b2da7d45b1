//! Corral: a Llama trainer on libtorch. Modules in dependency order; each uses only those above it.

pub mod algorithms;
pub mod checkpoint;
pub mod commands;
pub mod config;
pub mod data;
pub mod distributed;
pub mod error;
pub mod generate;
pub mod model;
pub mod optim;
pub mod telemetry;

pub use error::{Context, Error, Result};
