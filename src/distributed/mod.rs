//! Ranks and what they share: the world, sharded parameters.

pub mod environment;
pub mod exchange;
pub mod sharded;
pub mod world;
