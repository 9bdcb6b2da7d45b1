//! Where a run stands in its data, to be saved with a checkpoint.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A position in data that are read in an order of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The index of what comes next: a sample, a row, a prompt.
    pub next: u64,
    /// Of the data that it belongs to.
    pub fingerprint: String,
}

/// Data that a run goes through, and can go on with where it stopped.
pub trait Positioned {
    /// What a checkpoint holds of it.
    type Position;

    /// The position before the first step.
    fn begin(&self) -> Self::Position;

    /// Refuses a position that was saved with other data.
    fn check(&self, position: &Self::Position) -> Result<()>;
}

/// What is read by index, in an order that depends on the data, their weights and a seed.
pub trait Indexed {
    /// What one of them is called, and what decides about their order, in words.
    const ITEM: &'static str;
    const DECIDES: &'static str;

    /// Tells data, order and options apart, wherever the files lie.
    fn fingerprint(&self) -> &str;

    /// The position before item `next`.
    fn at(&self, next: u64) -> Position {
        Position { next, fingerprint: self.fingerprint().to_string() }
    }
}

impl<T: Indexed> Positioned for T {
    type Position = Position;

    fn begin(&self) -> Position {
        self.at(0)
    }

    fn check(&self, position: &Position) -> Result<()> {
        if position.fingerprint == self.fingerprint() {
            return Ok(());
        }
        Err(Error::config(format!(
            "the checkpoint stands at {} {} of other data ({}, here {}): {} have changed; restore them, or start a new run \
             from the model",
            T::ITEM,
            position.next,
            position.fingerprint,
            self.fingerprint(),
            T::DECIDES,
        )))
    }
}
