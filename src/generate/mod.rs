//! Text from a model: sampler, batched engine over the KV cache, conversations.

pub mod engine;
pub mod rollout;
pub mod sampler;
pub mod session;
pub mod stop;

pub use engine::{Completion, Engine, Finish, Options, Request, generate};
pub use sampler::{Choice, Sampling};
pub use session::Session;
pub use stop::{Stop, TextStream, text};
