//! Where a run goes on from, as the command line says.

use std::path::PathBuf;

use crate::error::Result;

/// `--resume`: from where a run goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// From the newest checkpoint of the run's folder, if there is one.
    Auto,
    /// From this checkpoint, or the newest one of this run's folder.
    From(PathBuf),
    /// Not at all: a new run.
    Never,
}

/// How a run is to begin, as the command line says.
#[derive(Debug, Clone)]
pub struct Start {
    pub resume: Resume,
    /// With [`Resume::Never`]: replace the run that the folder holds.
    pub overwrite: bool,
}

impl Start {
    /// How a run that a signal stops goes on.
    pub fn goes_on(&self) -> &'static str {
        match (&self.resume, self.overwrite) {
            (Resume::Auto, _) => "the same command goes on from its checkpoint",
            (Resume::From(_), _) => "the same command without --resume goes on from its checkpoint",
            (_, false) => "the same command without --resume never goes on from its checkpoint",
            (_, true) => "the same command without --resume never --overwrite goes on from its checkpoint",
        }
    }
}

impl std::str::FromStr for Resume {
    type Err = std::convert::Infallible;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(match s {
            "auto" => Resume::Auto,
            "never" => Resume::Never,
            path => Resume::From(path.into()),
        })
    }
}
