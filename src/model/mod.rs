//! The Llama family: layout of the parameters, forward and backward, the LM head, token by token over a KV cache.

pub(crate) mod attention;
mod block;
pub(crate) mod decode;
pub mod head;
pub(crate) mod init;
pub mod layout;
pub(crate) mod linear;
pub mod llama;
mod mixture;
pub(crate) mod mlp;
mod norm;
pub(crate) mod score;
pub mod trainable;

pub use decode::KvCache;
pub use head::LmHead;
pub use llama::{DropoutPlace, Llama, ModelInput};
pub use score::ScoreHead;
pub use trainable::Trainable;

pub use crate::config::sections::Recompute;

use tch::Kind;

use crate::config::sections::Compute;

/// libtorch's name of a dtype that the configuration names.
pub fn compute_kind(c: Compute) -> Kind {
    match c {
        Compute::Float32 => Kind::Float,
        Compute::Bfloat16 => Kind::BFloat16,
        Compute::Float64 => Kind::Double,
    }
}
