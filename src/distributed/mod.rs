//! Ranks and what they share: the world, sharded parameters.

pub mod agree;
pub mod agreement;
pub mod environment;
pub mod exchange;
pub mod frozen;
pub mod layout;
pub mod mesh;
pub mod plan;
pub mod sharded;
pub mod world;
