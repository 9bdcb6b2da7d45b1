//! Ranks that meet in a store, watch each other, and communicate.

pub mod c10d;
mod diagnosis;
mod link;
mod nccl;
mod staging;
mod store;
pub mod watch;
mod work;
