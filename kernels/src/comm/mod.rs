//! Communication between ranks: they meet in a store, watch each other, and call collectives together.
//!
//! A [`Store`] is the key-value store that ranks meet in; a [`Group`] is a set of ranks that call the same collectives in
//! the same order; a [`Work`] is a collective under way. An engine carries them: libtorch's c10d (Gloo, NCCL), or MPI. Failures
//! are told by rank: see [`watch`].

mod c10d;
mod diagnosis;
pub mod engine;
mod group;
mod link;
mod nccl;
mod staging;
mod store;
pub mod watch;
mod work;

pub use c10d::recorder_trace;
pub use engine::{Backend, ReduceOp};
pub use group::Group;
pub use store::Store;
pub use work::Work;
