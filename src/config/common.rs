//! What the configurations of all algorithms have in common.

use std::path::{Path, PathBuf};

use super::conflict::Conflict;
use super::model::Model;
use super::parallel::Parallel;
use super::sections::{Checkpoint, Log, Optim, Precision, Schedule, Source, Tokenizer, Train, Valid};

/// The keys that every configuration has.
#[derive(Debug, Clone, Copy)]
pub struct Common<'a> {
    pub seed: u64,
    pub output_dir: &'a Path,
    pub parallel: &'a Parallel,
    pub precision: &'a Precision,
    pub optim: &'a Optim,
    pub schedule: &'a Schedule,
    pub train: &'a Train,
    pub checkpoint: &'a Checkpoint,
    pub log: &'a Log,
    pub valid: &'a Valid,
}

impl Common<'_> {
    /// What does not fit on `world_size` ranks, and why.
    pub fn conflict(&self, world_size: i64) -> Option<Conflict> {
        self.train
            .conflict(world_size)
            .or_else(|| self.schedule.conflict(self.train))
            .or_else(|| self.parallel.conflict(world_size))
    }
}

/// Defines the configuration of an algorithm: a struct with the given keys (`valid` among them) and those of [`Common`], and `fn common(&self)`.
macro_rules! configuration {
    ($(#[$doc:meta])* pub struct $name:ident {
        $($(#[$about:meta])* pub $key:ident: $type:ty,)*
    }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            /// Keys all that is random.
            #[serde(default = "crate::config::common::one")]
            pub seed: u64,
            /// The run's folder.
            pub output_dir: std::path::PathBuf,
            $($(#[$about])* pub $key: $type,)*
            #[serde(default)]
            pub parallel: crate::config::parallel::Parallel,
            #[serde(default)]
            pub precision: crate::config::sections::Precision,
            #[serde(default)]
            pub optim: crate::config::sections::Optim,
            #[serde(default)]
            pub schedule: crate::config::sections::Schedule,
            pub train: crate::config::sections::Train,
            #[serde(default)]
            pub checkpoint: crate::config::sections::Checkpoint,
            #[serde(default)]
            pub log: crate::config::sections::Log,
        }

        impl $name {
            fn sections(&self) -> crate::config::common::Common<'_> {
                crate::config::common::Common {
                    seed: self.seed,
                    output_dir: &self.output_dir,
                    parallel: &self.parallel,
                    precision: &self.precision,
                    optim: &self.optim,
                    schedule: &self.schedule,
                    train: &self.train,
                    checkpoint: &self.checkpoint,
                    log: &self.log,
                    valid: &self.valid,
                }
            }
        }
    };
}
pub(super) use configuration;

pub(super) fn one() -> u64 {
    1
}

pub(super) fn yes() -> bool {
    true
}

/// Tokens of a row where nothing is said.
pub(super) fn sequence_length() -> i64 {
    512
}

/// What does not fit between a model, its tokenizer and its training data, and why.
pub(super) fn conflict_of_inputs(
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    train: &[Source],
) -> Option<Conflict> {
    if train.is_empty() {
        return Some(("data.train", "there is no data to train on; name at least one path".into()));
    }
    let has_path = tokenizer.is_some_and(|t| t.path.is_some());
    if !has_path && !matches!(model, Model::Path(_)) {
        let why = "a new model needs a tokenizer: give tokenizer.path, a folder with a tokenizer";
        return Some(("tokenizer", why.into()));
    }
    tokenizer?.conflict()
}

/// The paths that a model, its tokenizer and data are read from.
pub fn paths<'a>(
    model: &'a Model,
    tokenizer: Option<&'a Tokenizer>,
    data: impl Iterator<Item = &'a Source>,
) -> Vec<&'a Path> {
    let model = match model {
        Model::Path(path) => Some(path),
        Model::Preset(_) | Model::Init(_) => None,
    };
    let tokenizer = tokenizer.and_then(|t| t.path.as_ref());
    data.map(|s| &s.path).chain(tokenizer).chain(model).map(PathBuf::as_path).collect()
}
