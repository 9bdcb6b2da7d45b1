//! What a path to a model may be.

use std::path::{Path, PathBuf};

use super::hf::HfModel;
use super::sharded::{Checkpoint, META, checkpoints_dir, latest};
use crate::config::shape::Shape;
use crate::distributed::sharded::Sharded;
use crate::error::{Error, Result};

/// A model on disk, found by its path.
pub enum Weights {
    Hf(HfModel),
    Checkpoint(Checkpoint),
}

impl Weights {
    /// Opens a Hugging Face folder, a run's folder (its final model, else its newest checkpoint), or a checkpoint.
    /// Reads headers only.
    pub fn open(path: &Path) -> Result<Weights> {
        if path.join(META).is_file() {
            return Ok(Weights::Checkpoint(Checkpoint::open(path)?));
        }
        for dir in [path.to_path_buf(), path.join("model")] {
            if dir.join("config.json").is_file() {
                return Ok(Weights::Hf(HfModel::load(&dir)?));
            }
        }
        if checkpoints_dir(path).is_dir()
            && let Some(checkpoint) = latest(path)?
        {
            return Ok(Weights::Checkpoint(checkpoint));
        }
        if path.join("params.json").is_file() {
            return Err(Error::config(format!(
                "{}: models in Meta's format cannot be read yet; take the Hugging Face version of the model",
                path.display()
            )));
        }
        if !path.is_dir() {
            return Err(Error::data(format!("{}: there is no such folder", path.display())));
        }
        Err(Error::data(format!(
            "{}: no model: a Hugging Face folder has config.json, a checkpoint has {META}, and a run's folder has \
             model/ or checkpoints/ with a complete checkpoint",
            path.display()
        )))
    }

    pub fn shape(&self) -> &Shape {
        match self {
            Weights::Hf(model) => model.shape(),
            Weights::Checkpoint(checkpoint) => &checkpoint.meta().shape,
        }
    }

    /// The folder that the weights come from.
    pub fn dir(&self) -> &Path {
        match self {
            Weights::Hf(model) => model.dir(),
            Weights::Checkpoint(checkpoint) => checkpoint.dir(),
        }
    }

    /// The folder with the model's tokenizer, if it has one.
    pub fn tokenizer_dir(&self) -> Option<PathBuf> {
        let dir = self.dir();
        dir.join("tokenizer.json").is_file().then(|| dir.to_path_buf())
    }

    /// Fills the parameters, each rank its own slices. Collective over the ranks that hold them.
    pub fn fill(&self, params: &mut Sharded) -> Result<()> {
        match self {
            Weights::Hf(model) => model.fill(params),
            Weights::Checkpoint(checkpoint) => checkpoint.fill_weights(params),
        }
    }
}
