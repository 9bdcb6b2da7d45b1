//! Models and the state of a training run on disk: safetensors, torch and GGUF files, folders of Hugging Face's and Meta's
//! format, sharded checkpoints.

mod best;
pub mod convert;
mod families;
pub mod fetched;
mod gguf;
mod grow;
pub mod hf;
mod hf_config;
mod keys;
pub mod merge;
mod meta;
mod model_record;
mod named;
mod ours;
pub mod peft;
mod pickle;
mod rope;
pub mod safetensors;
mod saver;
pub mod sharded;
pub mod source;
mod tensor_hash;
#[cfg(test)]
mod tests;
pub mod torch_file;
mod unfit;
mod weights;

pub use crate::files::free_bytes;
pub use best::{Best, Metric};
pub use gguf::GgufModel;
pub use hf::{Export, HfModel, export};
pub use hf_config::read_object;
pub use meta::MetaModel;
pub use model_record::ModelRecord;
pub use named::{locate, locate_tokenizer};
pub use ours::{Measured, Ours, Scoring};
pub use peft::{AdapterExport, PeftAdapter, export_adapter};
pub use saver::{Part, RunInfo, Saved, Saver};
pub use sharded::{BaseMeta, Checkpoint, State, bytes_per_checkpoint, latest};
pub use source::Source;
pub use tensor_hash::TensorHash;
pub use weights::{Adapted, Weights};
