//! Ranks: which one this is, how it talks to the others.

pub mod environment;
pub mod world;

pub use kernels::c10d::{Group, ReduceOp, Work};
pub use world::{BackendChoice, DeviceChoice, World};
