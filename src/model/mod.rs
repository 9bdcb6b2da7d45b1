//! The Llama family: layout of the parameters, forward and backward, the LM head, token by token over a KV cache.

pub mod decode;
pub mod head;
pub mod init;
pub mod layout;
pub mod linear;
pub mod llama;
pub mod memory;
mod mixture;
mod mlp;
pub mod score;
pub mod trainable;

pub use decode::KvCache;
pub use head::LmHead;
pub use linear::{Linear, LinearGrad};
pub use llama::{DropoutPlace, Input, Llama, Tape};
pub use memory::Memory;
pub use score::ScoreHead;
pub use trainable::Trainable;

pub use crate::config::sections::Recompute;
