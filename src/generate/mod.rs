//! Text from a model: sampler, batched engine over the KV cache.

pub mod engine;
pub mod sampler;

pub use engine::{Completion, Finish, Generation, Options, Progress, Stop, generate};
pub use sampler::{Choice, Sampling};
