//! Text from a model: sampler, batched engine over the KV cache, conversations.

mod device;
pub(crate) mod engine;
mod request;
pub mod rollout;
pub mod sampler;
pub(crate) mod session;
pub(crate) mod stop;

pub use engine::{Engine, generate};
pub use request::{Completion, EngineOptions, Finish, Request};
pub use sampler::Sampling;
pub use session::CachedSession;
pub(crate) use stop::TextStream;
pub use stop::{Stop, text};
