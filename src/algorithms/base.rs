//! What a training run begins with: weights or a shape, and a tokenizer.

use crate::checkpoint::Weights;
use crate::config::pretrain::Model;
use crate::config::sections::{self, Train};
use crate::config::shape::Shape;
use crate::data::chat;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// A model that is to be trained: opened and checked, nothing of it read yet.
pub struct Base {
    pub tokenizer: Tokenizer,
    pub shape: Shape,
    /// Weights to start from, where the model is not new.
    pub weights: Option<Weights>,
}

impl Base {
    /// # Errors
    /// Files that are missing or damaged; a tokenizer that does not fit the model; `sequence_length` beyond the model's
    /// positions.
    pub fn open(
        model: &Model,
        tokenizer: Option<&sections::Tokenizer>,
        sequence_length: i64,
    ) -> Result<Base> {
        let weights = match model {
            Model::Path(path) => Some(Weights::open(path)?),
            Model::Preset(_) | Model::Init(_) => None,
        };
        let section = tokenizer;
        let tokenizer = chat::configured(section, weights.as_ref().map(Weights::dir))?;
        let mut shape = match (model, &weights) {
            (_, Some(weights)) => weights.shape().clone(),
            (Model::Init(init), _) => init.shape(tokenizer.vocab_size() as i64, sequence_length),
            (Model::Preset(name), _) => Shape::preset(name)
                .ok_or_else(|| Error::config(format!("model.preset: '{name}' is not known")))?,
            (Model::Path(path), None) => {
                return Err(Error::failed(format!("{} was not opened", path.display())));
            }
        };
        shape.check()?;
        shape.vocab_size = tokenizer.rows(shape.vocab_size, section)?;
        if sequence_length > shape.max_position_embeddings {
            return Err(Error::config(format!(
                "data.sequence_length: {sequence_length} is more than the model's max_position_embeddings, {}",
                shape.max_position_embeddings
            )));
        }
        Ok(Base { tokenizer, shape, weights })
    }
}

/// The updates of a run over `samples` an epoch, which has at least `warmup_steps` of them.
pub fn steps(train: &Train, samples: u64, warmup_steps: u64) -> Result<u64> {
    let steps = match (train.steps, train.epochs) {
        (Some(steps), _) => steps as u64,
        (None, epochs) => {
            let samples = samples * epochs.unwrap_or(1) as u64;
            match samples / train.batch_size as u64 {
                0 => {
                    return Err(Error::config(format!(
                        "'train.epochs': the data gives {samples} samples, fewer than the {} of train.batch_size",
                        train.batch_size
                    )));
                }
                steps => steps,
            }
        }
    };
    if warmup_steps > steps {
        return Err(Error::config(format!(
            "'schedule.warmup_steps': {warmup_steps} steps of warm-up are more than the {steps} steps of the run"
        )));
    }
    Ok(steps)
}
