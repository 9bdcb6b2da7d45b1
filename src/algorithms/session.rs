//! What every training loop does besides its steps: begin or resume, validate, save, end.
//!
//! ```text
//! let mut folder = RunFolder::open(...)          the run's folder, locked and checked; the checkpoint to go on from
//! let mut learner = Learner::new(...)            a model on this rank, and its optimizer
//! folder.record(...)                             the models, which must be those that the run began with
//! let progress = folder.restore_or_begin(...)    parameters, moments and position from the checkpoint, or new
//! let mut session = Session::start(...)          until the first save, what it replaces can be put back
//! session.catch_up(validation)?;                 a signal ended the run before within a validation
//! while !session.run.done() {
//!     ...                                        the algorithm's step
//!     if let Some(record) = session.run.stepped(tokens, &update, lr)?.record { session.run.log(...) }
//!     session.end_step(validation)?;             validates and saves where it is due; ends the run where a signal asked
//! }
//! session.take_best()?;                          where the best model is kept
//! session.finish(...)                            exports it
//! ```

use serde::Serialize;

use crate::algorithms::base::RunLength;
use crate::algorithms::folder::RunFolder;
use crate::algorithms::learner::Learners;
use crate::algorithms::training::{Cadence, Run, TrainingProgress};
use crate::config::common::Common;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::world::World;
use crate::error::Result;

/// A training run on this rank, and the models that it trains. `D` is the position in the data.
pub struct Session<'a, M, D> {
    pub models: M,
    pub run: Run<'a, D>,
    pub world: &'a World,
}

impl<'a, M: Learners, D: Serialize> Session<'a, M, D> {
    /// Starts the clock of a run: from here on the folder holds this run. Collective.
    pub fn start(
        folder: RunFolder<'a>,
        progress: TrainingProgress<D>,
        models: M,
        c: &Common,
        length: &RunLength,
    ) -> Result<Self> {
        let world = folder.world();
        let run = folder.start(progress, Cadence::new(c, *length))?;
        Ok(Session { models, run, world })
    }

    /// Does the validation that a signal has kept from being done after the last step, if there is one. `validate` is that of
    /// [`Session::end_step`]. Collective.
    pub fn catch_up(&mut self, validate: impl FnOnce(&mut Self) -> Result<bool>) -> Result<()> {
        if self.run.owes_validation() { self.end_step(validate) } else { Ok(()) }
    }

    /// Ends a step: validates, and saves where it is due. `validate` tells whether the checkpoint is the best so far, which is
    /// to be saved; it looks itself whether a validation is due. Collective.
    ///
    /// # Errors
    /// A signal asked for the end of the run, whose checkpoint is then written.
    pub fn end_step(&mut self, validate: impl FnOnce(&mut Self) -> Result<bool>) -> Result<()> {
        let best = validate(self)?;
        self.run.save(&self.models.parts(), best)
    }

    /// Where the run keeps its best checkpoint: sets the models to what they were then. Collective.
    pub fn take_best(&mut self) -> Result<()> {
        let models = &mut self.models;
        models.onload()?;
        self.run.take_best(|best| models.take(best))
    }

    /// Writes the trained models, `RUN/model` among them. Collective.
    pub fn finish(self, tokenizer: &Tokenizer) -> Result<()> {
        let Session { models, run, world } = self;
        run.finish(|dir| models.export(dir, tokenizer, world))
    }
}
