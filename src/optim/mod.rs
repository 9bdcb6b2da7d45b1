//! AdamW on flat shards, the norm of the gradient, learning-rate schedules, moving averages.

pub(crate) mod adamw;
pub(crate) mod average;
pub(crate) mod schedule;

pub use adamw::{AdamW, Hyper};
pub(crate) use adamw::{Moments, streamed_bytes};
pub(crate) use average::Average;
pub use schedule::Schedule;

pub use crate::config::sections::ScheduleKind;
