//! Ranks and what they share: the world, sharded parameters.

pub(crate) mod agree;
pub(crate) mod agreement;
mod axis;
pub mod cut;
pub mod environment;
pub(crate) mod exchange;
mod float8_runs;
pub mod frozen;
pub(crate) mod layout;
pub mod mesh;
pub mod pipeline;
pub mod plan;
pub mod schedule;
pub mod sharded;
pub mod world;
