//! AdamW on flat shards, the norm of the gradient, learning-rate schedules, moving averages.

pub mod adamw;
pub mod average;
pub mod schedule;

pub use adamw::{AdamW, Hyper, Moments};
pub use average::Average;
pub use schedule::Schedule;

pub use crate::config::sections::ScheduleKind;
