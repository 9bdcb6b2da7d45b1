//! What is in memory while a step goes on.

use std::collections::HashSet;

use super::parts::Parts;

/// What is there at a time, and what was there when it was the most.
pub(super) struct Walk {
    pub now: Parts,
    pub peak: Parts,
    /// Groups whose gathered values stay.
    pub kept: HashSet<usize>,
}

impl Walk {
    pub fn from(now: Parts) -> Walk {
        Walk { now, peak: now, kept: HashSet::new() }
    }

    pub fn take(&mut self, part: impl Fn(&mut Parts) -> &mut i64, bytes: i64) {
        *part(&mut self.now) += bytes;
        if self.now.total() > self.peak.total() {
            self.peak = self.now;
        }
    }

    pub fn give(&mut self, part: impl Fn(&mut Parts) -> &mut i64, bytes: i64) {
        *part(&mut self.now) -= bytes;
    }

    /// What is taken and given back at once.
    pub fn pass(&mut self, part: impl Fn(&mut Parts) -> &mut i64, bytes: i64) {
        self.take(&part, bytes);
        self.give(&part, bytes);
    }
}

pub(super) fn work(p: &mut Parts) -> &mut i64 {
    &mut p.work
}

pub(super) fn activations(p: &mut Parts) -> &mut i64 {
    &mut p.activations
}

pub(super) fn logits(p: &mut Parts) -> &mut i64 {
    &mut p.head
}
