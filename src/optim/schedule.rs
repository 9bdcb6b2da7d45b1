//! Learning-rate schedules, as transformers' `get_scheduler` defines them.

use crate::config::common::Common;
use crate::config::sections::ScheduleKind as Kind;

/// The learning rate as a function of the update's number.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// How the rate falls after the warm-up.
    pub kind: Kind,
    /// The highest rate.
    pub lr: f64,
    /// Updates over which the rate rises from 0.
    pub warmup_steps: u64,
    /// Updates of the run, warm-up included.
    pub total_steps: u64,
    /// The rate ends at `lr * min_lr_ratio`.
    pub min_lr_ratio: f64,
}

impl Schedule {
    /// As a configuration says, over `total_steps` updates.
    pub fn new(c: &Common, total_steps: u64) -> Schedule {
        Schedule {
            kind: c.schedule.kind,
            lr: c.optim.lr,
            warmup_steps: c.schedule.warmup(total_steps),
            total_steps,
            min_lr_ratio: c.schedule.min_lr_ratio,
        }
    }

    /// The rate of the update number `step`, from 0. With a warm-up the first rate is 0, as in transformers; beyond
    /// `total_steps` it stays at its end.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.lr * (step as f64 / self.warmup_steps as f64);
        }
        let rest = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / rest as f64).min(1.0);
        let factor = match self.kind {
            Kind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Kind::Linear => 1.0 - progress,
            Kind::Constant => return self.lr,
        };
        self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * factor)
    }
}
