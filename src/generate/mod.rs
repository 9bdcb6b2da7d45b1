//! Text from a model: sampler, batched engine over the KV cache, conversations.

pub(crate) mod engine;
pub mod rollout;
pub mod sampler;
pub(crate) mod session;
pub(crate) mod stop;

pub use engine::{Completion, Engine, EngineOptions, Finish, Request, generate};
pub use sampler::Sampling;
pub use session::CachedSession;
pub(crate) use stop::TextStream;
pub use stop::{Stop, text};
