//! Models and the state of a training run on disk: safetensors, torch and GGUF files, folders of Hugging Face's, Meta's and
//! Megatron's formats, sharded checkpoints.

mod best;
pub mod convert;
mod families;
pub(crate) mod fetched;
mod gguf;
mod grow;
pub(crate) mod hf;
mod hf_config;
mod keys;
pub(crate) mod manifest;
mod megatron;
pub mod merge;
mod meta;
mod model_record;
mod named;
mod ours;
pub(crate) mod peft;
mod pickle;
mod rectangles;
mod rope;
pub mod safetensors;
mod saver;
pub mod sharded;
pub mod source;
mod staging;
mod tensor_hash;
#[cfg(test)]
mod tests;
pub mod torch_file;
mod unfit;
mod weights;

pub(crate) use crate::files::free_bytes;
pub(crate) use best::{Best, Metric};
pub(crate) use hf::{Export, export};
pub(crate) use hf_config::read_object;
pub(crate) use manifest::BaseMeta;
pub use megatron::MegatronForm;
pub(crate) use megatron::{MegatronModel, is_megatron};
pub(crate) use model_record::ModelRecord;
pub(crate) use named::{locate, locate_tokenizer};
pub(crate) use ours::{Measured, Scoring};
pub use peft::PeftAdapter;
pub(crate) use peft::{AdapterExport, export_adapter};
pub(crate) use saver::{RunInfo, SavedPart, Saver};
pub(crate) use sharded::{Checkpoint, bytes_per_checkpoint, latest};
pub use source::TensorSource;
pub(crate) use tensor_hash::TensorHash;
pub use weights::Weights;
