//! Ranks and what they share: the world, sharded parameters.

pub mod sharded;
pub mod world;
