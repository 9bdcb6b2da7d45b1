//! Llama: layout of its parameters, forward and backward, the LM head.

pub mod head;
pub mod init;
pub mod layout;
pub mod llama;

pub use head::LmHead;
pub use llama::{Input, Llama, Recompute, Tape};
