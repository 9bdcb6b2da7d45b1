//! Models and the state of a training run on disk: safetensors, Hugging Face folders, sharded checkpoints.

mod agree;
mod families;
mod grow;
pub mod hf;
mod hf_config;
pub mod safetensors;
mod saver;
pub mod sharded;
#[cfg(test)]
mod tests;
mod weights;

pub use crate::files::free_bytes;
pub use agree::{agree, agree_over};
pub use hf::{Export, HfModel, export};
pub use saver::{RunInfo, Saved, Saver};
pub use sharded::{Checkpoint, State, bytes_per_checkpoint, latest};
pub use weights::{Weights, in_hub_cache};
