//! AdamW on flat shards, the norm of the gradient, learning-rate schedules.

pub mod adamw;
pub mod schedule;

pub use adamw::{AdamW, Hyper};
pub use schedule::Schedule;

pub use crate::config::sections::ScheduleKind;
