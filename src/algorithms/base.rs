//! What a training run begins with: weights or a shape, and a tokenizer.

use std::path::Path;

use serde_json::json;

use crate::checkpoint::{ModelRecord, TensorHash, Weights, locate, locate_tokenizer};
use crate::config::Setting;
use crate::config::model::Model;
use crate::config::sections::{self, ScheduleSection, TrainSection};
use crate::config::shape::{Head, Shape};
use crate::config::template_date::TemplateDate;
use crate::config::trainable::{Freeze, Lora};
use crate::data::chat;
use crate::data::tokenizer::{Tokenizer, hex};
use crate::distributed::agreement::Facts;
use crate::distributed::plan::{GroupPlan, Role};
use crate::distributed::sharded::Sharded;
use crate::error::{Error, Result};
use crate::files::exists;
use crate::model::{Trainable, init};
use crate::{detail, warn};

/// Adds the fingerprints of training and validation data.
pub fn add_data(train: &str, valid: Option<&str>, facts: &mut Facts) {
    facts.add_contents("data.train", train);
    valid.iter().for_each(|valid| facts.add_contents("data.valid", valid));
}

/// A model that is to be trained: opened and checked, nothing of it read yet.
pub struct Base {
    pub tokenizer: Tokenizer,
    pub shape: Shape,
    /// Weights to start from, where the model is not new.
    pub weights: Option<Weights>,
    /// Standard deviation of a new scalar head's weights.
    score_std: f64,
}

impl Base {
    /// A model with an LM head.
    ///
    /// # Errors
    /// Files that are missing or damaged; a model with a scalar head; a tokenizer that does not fit the model;
    /// `sequence_length` beyond the model's positions.
    pub fn open(
        model: &Model,
        tokenizer: Option<&sections::TokenizerSection>,
        sequence_length: i64,
    ) -> Result<Base> {
        let base = Self::open_any(model, tokenizer, sequence_length)?;
        match base.shape.predicts() {
            Ok(_) => Ok(base),
            Err(e) => {
                Err(e.context(base.weights.as_ref().map_or(Path::new("model"), Weights::dir).display()))
            }
        }
    }

    /// With this date for its chat template.
    pub fn dated(mut self, date: TemplateDate) -> Base {
        self.tokenizer = self.tokenizer.with_template_date(date);
        match self.tokenizer.told_date() {
            Some(date) => detail!("the chat template uses the date {date} (data.template_date)"),
            None if date.given => warn!(
                "data.template_date {} is not used: the chat template asks for no date (strftime_now, date_string)",
                date.date
            ),
            None => {}
        }
        self
    }

    /// A model with a scalar head: its own, or a new one on the trunk of a model with an LM head, normal with standard
    /// deviation `std` (none: see [`init::score_std`]).
    pub fn open_scored(
        model: &Model,
        tokenizer: Option<&sections::TokenizerSection>,
        sequence_length: i64,
        std: Option<f64>,
    ) -> Result<Base> {
        let mut base = Self::open_any(model, tokenizer, sequence_length)?;
        base.shape = base.shape.scored();
        base.score_std = std.unwrap_or(base.score_std);
        Ok(base)
    }

    fn open_any(
        model: &Model,
        tokenizer: Option<&sections::TokenizerSection>,
        sequence_length: i64,
    ) -> Result<Base> {
        let weights = match model {
            Model::Path(path) => Some(Weights::open(path)?),
            Model::Preset(_) | Model::Init(_) => None,
        };
        let mut section = tokenizer.cloned();
        if let Some(path) = section.as_mut().and_then(|s| s.path.as_mut()) {
            *path = locate_tokenizer(path)?;
        }
        let section = section.as_ref();
        let beside = match &weights {
            Some(w) => Some(w.tokenizer_dir()?.unwrap_or_else(|| w.dir().to_path_buf())),
            None => None,
        };
        let tokenizer = chat::configured(section, beside.as_deref())?;
        let weights = weights.map(|w| w.for_tokenizer(tokenizer.vocab_size())).transpose()?;
        let mut shape = match (model, &weights) {
            (_, Some(weights)) => weights.shape().clone(),
            (Model::Init(init), _) => init.shape(tokenizer.vocab_size() as i64, sequence_length),
            (Model::Preset(name), _) => preset(name)?,
            (Model::Path(path), None) => {
                return Err(Error::failed(format!("{} was not opened", path.display())));
            }
        };
        shape.check()?;
        shape.vocab_size = tokenizer.rows(shape.vocab_size, section)?;
        check_length(sequence_length, &shape)?;
        let score_std = init::score_std(&shape);
        Ok(Base { tokenizer, shape, weights, score_std })
    }
}

/// A path, or where there is nothing the shape of the preset of this name: for plans.
pub fn path_or_preset(path: &Path) -> Model {
    match path.to_str().filter(|name| matches!(exists(path), Ok(false)) && Shape::preset(name).is_some()) {
        Some(name) => Model::Preset(name.to_string()),
        None => Model::Path(path.to_path_buf()),
    }
}

/// As [`path_or_preset`]; a hub id that is not in the local cache is the preset of its shape, too: for plans.
pub fn planned_path(path: &Path) -> Model {
    let known = path.to_str().and_then(Shape::preset_of_hub_id);
    match known.filter(|_| locate(path).is_err()) {
        Some(name) => Model::Preset(name.to_string()),
        None => path_or_preset(path),
    }
}

/// The model; where its path stands for a shape and nothing else, the preset: for plans.
pub fn planned_model(model: &Model) -> Model {
    match model {
        Model::Path(path) => planned_path(path),
        other => other.clone(),
    }
}

/// What is trained of which shape, as a configuration says, with a head of this kind: for plans, which open no more than the
/// shape needs. A preset stands for the model of that shape that a run would be given.
///
/// # Errors
/// Those of [`Base::open`] and [`Base::trainable`].
pub fn shape_and_trainable(
    model: &Model,
    head: Head,
    tokenizer: Option<&sections::TokenizerSection>,
    sequence_length: i64,
    freeze: &Freeze,
    lora: Option<&Lora>,
) -> Result<(Shape, Trainable)> {
    let adds = tokenizer
        .is_some_and(|t| !t.add_tokens.is_empty() || t.pad_token.is_some() || t.pad_to_multiple_of.is_some());
    if let (Model::Preset(name), false) = (model, adds) {
        let shape = preset(name)?;
        check_length(sequence_length, &shape)?;
        let shape = if head == Head::Score { shape.scored() } else { shape };
        return Ok((shape, Trainable::with_head(head, freeze, lora)));
    }
    let base = match head {
        Head::Lm => Base::open(model, tokenizer, sequence_length)?,
        Head::Score => Base::open_scored(model, tokenizer, sequence_length, None)?,
    };
    let trainable = match base.weights {
        Some(_) => base.trainable(freeze, lora)?,
        None => Trainable::with_head(head, freeze, lora),
    };
    Ok((base.shape, trainable))
}

/// The shape of a model that is only asked, and how it is laid out; for plans, as [`shape_and_trainable`].
///
/// # Errors
/// Those of [`Base::open`].
pub fn shape_to_ask(
    model: &Model,
    tokenizer: Option<&sections::TokenizerSection>,
) -> Result<(Shape, Trainable)> {
    let (freeze, none) = (Freeze::default(), Trainable::default());
    match model {
        Model::Preset(_) => Ok((shape_and_trainable(model, Head::Lm, tokenizer, 1, &freeze, None)?.0, none)),
        _ => {
            let base = Base::open_any(model, tokenizer, 1)?;
            let trainable = base.weights.as_ref().and_then(|w| w.lora().cloned()).unwrap_or(none);
            Ok((base.shape, trainable))
        }
    }
}

fn preset(name: &str) -> Result<Shape> {
    Shape::preset(name).ok_or_else(|| Error::key("model.preset", format!("'{name}' is not known")))
}

fn check_length(sequence_length: i64, shape: &Shape) -> Result<()> {
    if sequence_length <= shape.max_position_embeddings {
        return Ok(());
    }
    Err(Error::key(
        "data.sequence_length",
        format!(
            "{sequence_length} is more than the model's max_position_embeddings, {}",
            shape.max_position_embeddings
        ),
    ))
}

impl Base {
    /// What of the model is trained, as the sections `freeze` and `lora` say; a scalar head in any case.
    ///
    /// # Errors
    /// Of kind Config: names that the model does not have; a model that is new, or that has an adapter, which only goes on
    /// as the same adapter.
    pub fn trainable(&self, freeze: &Freeze, lora: Option<&Lora>) -> Result<Trainable> {
        if self.shape.features.score_layers {
            return Err(Error::key(
                "model",
                "its scalar head is two layers (ChatLearn's pooler_head): such reward models score (corral score, corral eval, \
                 reward_model.path), and are not trained; take the model that it was made of",
            ));
        }
        let mut trainable = Trainable::with_head(self.shape.head, freeze, lora);
        let plans = trainable.plans(&self.shape)?;
        let partial = lora.is_some() || *freeze != Freeze::default();
        let Some(weights) = &self.weights else {
            return match partial {
                true => Err(Error::key(
                    "model",
                    "`lora` and `freeze` need a pretrained model: set model.path (this configuration makes a new one)",
                )),
                false => Ok(trainable),
            };
        };
        let new = self.shape.vocab_size - weights.shape().vocab_size;
        if let Some(lora) = lora.filter(|_| new > 0) {
            let saves = |name: &str| lora.modules_to_save.iter().any(|m| m == name);
            let head = self.shape.head == Head::Score || self.shape.tie_word_embeddings;
            if !saves("embed_tokens") || !head && !saves("lm_head") {
                return Err(Error::key(
                    "lora.modules_to_save",
                    format!(
                        "the tokenizer has {new} tokens that the model has no rows for, and an adapter \
                     holds full rows only for modules that it saves. Set lora.modules_to_save to [{}] to train and save them. \
                     Or name tokens that the tokenizer has: tokenizer.pad_token takes one that no text uses.",
                        if head { "embed_tokens" } else { "embed_tokens, lm_head" },
                    ),
                ));
            }
        }
        if let Some(there) = weights.lora() {
            let trained = |p: &GroupPlan| {
                let adapters = p.adapters.iter().map(|a| (a.target, a.rank, a.scale));
                (
                    adapters.collect::<Vec<_>>(),
                    p.roles.iter().map(|r| *r == Role::Trained).collect::<Vec<_>>(),
                )
            };
            let there = Trainable {
                layers: there.layers.clone(),
                ..Trainable::with_head(self.shape.head, &there.freeze, there.lora.as_ref())
            };
            let theirs = there.plans(&self.shape)?;
            if lora.is_none() || !plans.iter().map(trained).eq(theirs.iter().map(trained)) {
                let theirs = there.lora.write();
                return Err(Error::config(format!(
                    "model.path is a model with an adapter, {theirs}: to train it further, lora must match; to train \
                     something else, merge it first (corral merge)"
                )));
            }
            trainable.layers = there.layers.clone();
        }
        Ok(trainable)
    }

    /// How it is laid out where nothing of it is trained; what it may have learned as adapters acts.
    pub fn plans_to_ask(&self) -> Result<Vec<GroupPlan>> {
        let trainable = self.weights.as_ref().and_then(|w| w.lora().cloned()).unwrap_or_default();
        trainable.plans_for_inference(&self.shape)
    }

    /// Sets the parameters to what the run begins with. Returns the hash of those that are not trained. Collective.
    pub fn fill(&self, params: &mut Sharded, seed: u64) -> Result<TensorHash> {
        init::init_adapters(params, seed)?;
        if self.weights.is_none() {
            init::init(params, &self.shape, seed)?;
        }
        init::init_score(params, self.score_std, seed)?;
        self.weights.as_ref().map_or(Ok(TensorHash::default()), |weights| weights.fill(params))
    }

    /// What the model is, for checkpoints: `name` in the run, by the configuration's `key`; `hash` of what is not trained. None
    /// for a new model.
    pub fn record(&self, name: &str, key: &str, hash: Option<TensorHash>) -> Option<ModelRecord> {
        let dir = self.weights.as_ref()?.dir();
        let path = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf()).to_string_lossy().into_owned();
        let details = json!({"shape": self.shape});
        let hash = hash.map(|hash| hash.to_string());
        Some(ModelRecord { name: name.into(), key: key.into(), path, hash, details })
    }

    /// [`Base::record`] of a model that is only asked, with adapters that it may have.
    pub fn record_asked(&self, name: &str, key: &str, hash: TensorHash) -> Option<ModelRecord> {
        let mut record = self.record(name, key, Some(hash))?;
        if let Some(trainable) = self.weights.as_ref()?.lora() {
            record.details["adapter"] = trainable.lora.write();
        }
        Some(record)
    }

    /// What all ranks must have of it, under the name of its section.
    pub fn add_facts(&self, section: &str, facts: &mut Facts) -> Result<()> {
        if let Some(weights) = &self.weights {
            facts.add_contents(&format!("{section}.path"), &weights.identity()?);
        }
        let template = self.tokenizer.chat_template().map_or("", |t| t.source.as_str());
        let (hash, template) = (hex(&self.tokenizer.hash()[..8]), crc32fast::hash(template.as_bytes()));
        facts.add_contents(
            &format!("{section}'s tokenizer and chat template"),
            &format!("{hash} {template:08x}"),
        );
        Ok(())
    }

    /// Where the model lies, without an adapter that it may have; a hub id as it was given. For models that are not new.
    pub fn path(&self, model: &Model) -> Option<String> {
        let dir = match self.weights.as_ref()? {
            Weights::Adapted(model) if model.adapter.trainable().lora.is_some() => model.base.dir(),
            weights => match model {
                Model::Path(path) if matches!(exists(path), Ok(false)) => path,
                _ => weights.dir(),
            },
        };
        let absolute = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
        Some(absolute.to_string_lossy().into_owned())
    }
}

/// How long a run is.
#[derive(Debug, Clone, Copy)]
pub struct RunLength {
    /// Updates.
    pub steps: u64,
    /// Rows of all steps, of which the last may have fewer than the others.
    rows: u64,
    /// Rows of a step.
    batch: u64,
    /// Rows of an epoch.
    items: u64,
}

/// What becomes of the rows that are left when an epoch's last step is not full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastStep {
    /// A step of their own, unless `train.drop_last` says otherwise.
    Kept,
    /// They are left out: the algorithm divides a step's responses further.
    Dropped,
}

impl RunLength {
    /// Of a run over `items` rows an epoch.
    ///
    /// # Errors
    /// Of kind Config: there is no step, or the warm-up is longer than the run.
    pub fn new(
        train: &TrainSection,
        items: u64,
        schedule: &ScheduleSection,
        last: LastStep,
    ) -> Result<RunLength> {
        let batch = train.batch_size as u64;
        let length = match (train.steps, train.epochs) {
            (Some(steps), _) => RunLength { steps: steps as u64, rows: steps as u64 * batch, batch, items },
            (None, epochs) => {
                let rows = (items as f64 * epochs.unwrap_or(1.0)).round() as u64;
                let dropped = train.drop_last || last == LastStep::Dropped;
                let steps = if dropped { rows / batch } else { rows.div_ceil(batch) };
                RunLength { steps, rows: rows.min(steps * batch), batch, items }
            }
        };
        if length.steps == 0 {
            return Err(Error::key(
                "train.epochs",
                format!("the data gives {items} samples, fewer than the {batch} of train.batch_size"),
            ));
        }
        let warmup_steps = schedule.warmup(length.steps);
        if warmup_steps > length.steps {
            return Err(Error::key(
                "schedule.warmup_steps",
                format!(
                    "{warmup_steps} steps of warm-up are more than the {} steps of the run",
                    length.steps
                ),
            ));
        }
        Ok(length)
    }

    /// The rows of the step that begins at row `next` of the run.
    pub fn rows_at(&self, next: u64) -> u64 {
        match self.rows.saturating_sub(next).min(self.batch) {
            // A run that goes on behind its end, since its batches were larger before.
            0 => self.batch,
            rows => rows,
        }
    }

    /// Epochs that are done after `steps`.
    pub fn epochs(&self, steps: u64) -> f64 {
        (steps * self.batch).min(self.rows) as f64 / self.items.max(1) as f64
    }

    /// Rows of all steps.
    pub fn rows(&self) -> u64 {
        self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn length(train: &str, items: u64) -> Result<RunLength> {
        let train: TrainSection = crate::config::json::of_text(train).unwrap();
        RunLength::new(&train, items, &ScheduleSection::default(), LastStep::Kept)
    }

    #[test]
    fn the_last_step_has_the_rows_that_are_left() {
        let all = length("{epochs: 2, batch_size: 8}", 11).unwrap();
        assert_eq!((all.steps, all.rows_at(0), all.rows_at(16), all.rows()), (3, 8, 6, 22));
        assert_eq!((all.epochs(1), all.epochs(3)), (8.0 / 11.0, 2.0));
        let part = length("{epochs: 0.5, batch_size: 2}", 11).unwrap();
        assert_eq!((part.steps, part.rows_at(4)), (3, 2));
        let dropped = length("{epochs: 2, batch_size: 8, drop_last: true}", 11).unwrap();
        assert_eq!((dropped.steps, dropped.rows_at(8)), (2, 8));
        let steps = length("{steps: 5, batch_size: 8}", 11).unwrap();
        assert_eq!((steps.steps, steps.rows_at(32)), (5, 8));
        assert_eq!(length("{epochs: 1, batch_size: 16}", 11).unwrap().rows_at(0), 11);
        assert!(length("{epochs: 1, batch_size: 16, drop_last: true}", 11).is_err());
    }
}
