//! What the configurations of all algorithms have in common.

use std::path::{Path, PathBuf};

use super::conflict::Conflicts;
use super::model::Model;
use super::parallel::Parallel;
use super::sections::{
    CheckpointSection, Compute, DataSource, Float8Section, Log, MomentsIn, Optim, Precision, ProfileSection,
    ScheduleSection, TokenizerSection, TrainSection, Valid,
};

/// The keys that every configuration has.
#[derive(Debug, Clone, Copy)]
pub struct Common<'a> {
    pub seed: u64,
    pub output_dir: &'a Path,
    pub parallel: &'a Parallel,
    pub precision: &'a Precision,
    pub float8: &'a Float8Section,
    pub optim: &'a Optim,
    pub schedule: &'a ScheduleSection,
    pub train: &'a TrainSection,
    pub checkpoint: &'a CheckpointSection,
    pub log: &'a Log,
    pub profile: &'a ProfileSection,
    pub valid: &'a Valid,
}

impl Common<'_> {
    /// What does not fit on `world_size` ranks.
    pub fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        self.train.conflicts(self.parallel.data_ranks(world_size), found);
        self.schedule.conflicts(self.train, found);
        self.parallel.conflicts(world_size, found);
        if self.parallel.tensor > 1 && self.optim.moments == MomentsIn::EightBit {
            let why = "blocks of moments in 8 bits would hold different values on ranks that share a matrix; set it to float32, or \
                       parallel.tensor to 1";
            found.add("optim.moments", why);
        }
        if self.precision.compute != Compute::Float8 && *self.float8 != Float8Section::default() {
            found.add(
                "float8",
                "is a section of `precision.compute: float8`; leave it out, or set precision.compute=float8",
            );
        }
    }
}

/// Defines the configuration of an algorithm: a section with the given keys (`valid` among them) and those of [`Common`], and
/// `fn sections(&self)`.
macro_rules! configuration {
    ($(#[doc = $about:literal])* pub struct $name:ident { $($keys:tt)* }) => {
        $crate::config::section::section! {
            $(#[doc = $about])*
            pub struct $name {
                /// Random seed of the whole run.
                seed: u64 = 1 => State;
                /// The run's folder.
                output_dir: std::path::PathBuf => Folder;
                $($keys)*
                /// How the work is divided among the ranks.
                parallel: $crate::config::parallel::Parallel = Default::default();
                /// Numeric precision.
                precision: $crate::config::sections::Precision = Default::default();
                /// Products in 8-bit floats, with `precision.compute: float8`.
                float8: $crate::config::sections::Float8Section = Default::default();
                /// The optimizer, AdamW.
                optim: $crate::config::sections::Optim = Default::default();
                /// The learning-rate schedule.
                schedule: $crate::config::sections::ScheduleSection = Default::default();
                /// Training length and batch sizes.
                train: $crate::config::sections::TrainSection;
                /// When checkpoints are written.
                checkpoint: $crate::config::sections::CheckpointSection = Default::default();
                /// When metrics are written.
                log: $crate::config::sections::Log = Default::default();
                /// A timeline of some steps.
                profile: $crate::config::sections::ProfileSection = Default::default();
            }
        }

        impl $name {
            fn sections(&self) -> $crate::config::common::Common<'_> {
                $crate::config::common::Common {
                    seed: self.seed,
                    output_dir: &self.output_dir,
                    parallel: &self.parallel,
                    precision: &self.precision,
                    float8: &self.float8,
                    optim: &self.optim,
                    schedule: &self.schedule,
                    train: &self.train,
                    checkpoint: &self.checkpoint,
                    log: &self.log,
                    profile: &self.profile,
                    valid: &self.valid,
                }
            }
        }
    };
}
pub(super) use configuration;

/// What does not fit between a model, its tokenizer and its training data.
pub(super) fn conflicts_of_inputs(
    model: &Model,
    tokenizer: Option<&TokenizerSection>,
    train: &[DataSource],
    found: &mut Conflicts,
) {
    if train.is_empty() {
        found.add("data.train", "there is no data to train on; name at least one path");
    }
    let has_path = tokenizer.is_some_and(|t| t.path.is_some());
    if !has_path && !matches!(model, Model::Path(_)) {
        found.add(
            "tokenizer",
            "a new model needs a tokenizer: give tokenizer.path, a folder with a tokenizer",
        );
    }
    if let Some(tokenizer) = tokenizer {
        tokenizer.conflicts(found);
    }
}

/// Weights of validation data, which is read once as a whole.
pub(super) fn conflicts_of_validation(sources: &[DataSource], found: &mut Conflicts) {
    if let Some(i) = sources.iter().position(|s| s.weight.is_some()) {
        found.add(
            format!("data.valid.{i}.weight"),
            "validation data is read once as a whole; leave its weights out",
        );
    }
}

/// [`conflicts_of_inputs`] of an algorithm that goes on from a model whose completions are known.
pub(super) fn conflicts_of_pretrained(
    model: &Model,
    tokenizer: Option<&TokenizerSection>,
    train: &[DataSource],
    found: &mut Conflicts,
) {
    match model {
        Model::Path(_) => conflicts_of_inputs(model, tokenizer, train, found),
        _ => found.add("model", "a model whose completions are known is needed: give model.path"),
    }
}

/// The paths that a model, its tokenizer and data are read from.
pub fn paths<'a>(
    model: &'a Model,
    tokenizer: Option<&'a TokenizerSection>,
    data: impl Iterator<Item = &'a DataSource>,
) -> Vec<&'a Path> {
    let model = match model {
        Model::Path(path) => Some(path),
        Model::Preset(_) | Model::Init(_) => None,
    };
    let tokenizer = tokenizer.and_then(|t| t.path.as_ref());
    data.map(|s| &s.path).chain(tokenizer).chain(model).map(PathBuf::as_path).collect()
}
