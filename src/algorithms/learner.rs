//! A model that is trained: its parameters on this rank, and their optimizer.

use std::path::Path;

use crate::algorithms::base::Base;
use crate::algorithms::step::{self, StepEntry, Sums, Update};
use crate::checkpoint::{
    AdapterExport, BaseMeta, Checkpoint, Export, ModelRecord, SavedPart, Scoring, TensorHash, export,
    export_adapter,
};
use crate::config::common::Common;
use crate::config::sections::Recompute;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::sharded::Sharded;
use crate::distributed::world::World;
use crate::error::Result;
use crate::model::cuts::cut_for;
use crate::model::{Llama, Trainable, compute_kind, float8_on};
use crate::optim::AdamW;
use crate::warn;

/// Bytes of tensors in one file of an exported model.
pub const MAX_SHARD_SIZE: u64 = 5_000_000_000;

/// All that a run trains, as its checkpoints hold it.
pub trait Learners {
    /// The parts of a checkpoint; the first has no name.
    fn parts(&self) -> Vec<SavedPart<'_>>;

    /// Sets the values that a new run begins with. Collective.
    fn begin(&mut self) -> Result<()>;

    /// Sets parameters and moments from a checkpoint; returns what it holds besides. Collective.
    fn restore(&mut self, from: &Checkpoint) -> Result<serde_json::Value>;

    /// Brings values that are offloaded to their device, to be replaced or exported.
    fn onload(&mut self) -> Result<()> {
        Ok(())
    }

    /// Sets the values to those of the best checkpoint, which are exported then. Collective.
    fn take(&mut self, best: &Checkpoint) -> Result<()>;

    /// Writes the trained model to `dir`, others of the run beside it. Collective.
    fn export(&self, dir: &Path, tokenizer: &Tokenizer, world: &World) -> Result<()>;
}

/// A model that is trained: its parameters on this rank, and their optimizer.
pub struct Learner<'a> {
    pub model: Llama,
    pub optimizer: AdamW,
    pub trainable: &'a Trainable,
    base: &'a Base,
    seed: u64,
    /// Where what is not trained comes from, which is in no checkpoint; none where all is trained.
    frozen: Option<BaseMeta>,
    /// The hash of what is not trained; none where all is trained.
    hash: Option<TensorHash>,
    /// The model that this one began as, for adapters to name.
    origin: String,
    /// The largest norm of a gradient: `optim.clip`.
    clip: f64,
    recompute: Recompute,
    /// Of a reward model: goes into checkpoints, and with the exported model.
    pub scoring: Option<Scoring>,
}

impl<'a> Learner<'a> {
    /// The model that `base` opened, at `origin` (none for a new one), of which `trainable` says what is trained. Values come
    /// with [`Learners::begin`] or [`Learners::restore`]. Collective.
    pub fn new(
        base: &'a Base,
        origin: Option<String>,
        trainable: &'a Trainable,
        c: &Common,
        world: &World,
    ) -> Result<Learner<'a>> {
        let compute = compute_kind(c.precision.compute);
        let sharding = world.sharding();
        let (stages, micro_batches) =
            (sharding.pipeline.axis.size, c.train.micro_batches(world.mesh.data.size));
        if world.is_main() && micro_batches < stages {
            warn!(
                "{micro_batches} micro-batch(es) of a step go through {stages} stages, most of which wait: set \
                 train.micro_batch_size, for at least {stages}"
            );
        }
        let plans = cut_for(trainable.plans(&base.shape)?, &base.shape, &sharding)?;
        let params = Sharded::new(plans, sharding, compute, world.device);
        let mut model = Llama::new(base.shape.clone(), params);
        model.set_float8(float8_on(c.precision.compute, c.float8, world.device)?)?;
        let origin = origin.unwrap_or_default();
        // Of all stages, so that ranks decide alike.
        let frozen = model.params.num_frozen() > 0;
        let frozen = frozen.then(|| BaseMeta { path: origin.clone(), trainable: trainable.clone() });
        let hash = frozen.as_ref().map(|_| base.fill(&mut model.params, c.seed)).transpose()?;
        let optimizer = AdamW::configured(&model.params, c.optim)?;
        let (seed, clip, recompute) = (c.seed, c.optim.clip, c.train.recompute);
        let scoring = None;
        Ok(Learner {
            model,
            optimizer,
            trainable,
            base,
            seed,
            frozen,
            hash,
            origin,
            clip,
            recompute,
            scoring,
        })
    }

    /// What the model is, for [`crate::algorithms::folder::RunFolder::record`]: `name` in the run, whose path is the
    /// configuration's `NAME.path`.
    pub fn record(&self, name: &str) -> Option<ModelRecord> {
        self.base.record(name, &format!("{name}.path"), self.hash)
    }

    /// As a part of a checkpoint; the run's first has no name.
    pub fn part<'b>(&'b self, name: &'b str) -> SavedPart<'b> {
        let (shape, params) = (&self.model.shape, &self.model.params);
        let (base, scoring) = (self.frozen.as_ref(), self.scoring.as_ref());
        SavedPart { name, shape, base, scoring, params, optim: Some(&self.optimizer) }
    }

    /// Forward and backward of this rank's entries: leaves the gradients in the parameters' slices, and returns each entry's
    /// loss. Collective.
    pub fn accumulate(&mut self, entries: &mut [StepEntry]) -> Result<Vec<f64>> {
        Ok(step::accumulate(&mut self.model, entries, self.recompute)?.0)
    }

    /// The update from the gradients that are there; `loss` is this rank's part of the step's. Collective.
    pub fn apply(&mut self, loss: Sums, lr: f64, world: &World) -> Result<Update> {
        step::apply_gradients(&mut self.model, &mut self.optimizer, world, loss, lr, self.clip)
    }

    /// Forward, backward and update of a step of which these entries are this rank's. Collective.
    pub fn update(&mut self, entries: &mut [StepEntry], lr: f64, world: &World) -> Result<Update> {
        let losses = self.accumulate(entries)?;
        self.apply(Sums { loss: losses.iter().sum(), aux_loss: None }, lr, world)
    }

    /// [`Learners::export`] of other values of the same parameters. Collective.
    pub fn export_as(
        &self,
        params: &Sharded,
        dir: &Path,
        tokenizer: &Tokenizer,
        world: &World,
    ) -> Result<()> {
        let (shape, tokenizer) = (&self.model.shape, Some(tokenizer));
        let scoring = self.scoring.as_ref();
        if self.trainable.lora.is_some() {
            let how =
                AdapterExport { trainable: self.trainable, shape, base: &self.origin, tokenizer, scoring };
            return export_adapter(dir, params, &how, &world.group);
        }
        let how = Export { dtype: params.compute(), max_shard_size: MAX_SHARD_SIZE, tokenizer, scoring };
        export(dir, shape, params, &how, &world.group)
    }
}

impl Learners for Learner<'_> {
    fn parts(&self) -> Vec<SavedPart<'_>> {
        vec![self.part("")]
    }

    fn begin(&mut self) -> Result<()> {
        match self.frozen {
            Some(_) => Ok(()), // by `new`
            None => self.base.fill(&mut self.model.params, self.seed).map(drop),
        }
    }

    fn restore(&mut self, from: &Checkpoint) -> Result<serde_json::Value> {
        Ok(from.load(&mut self.model.params, &mut self.optimizer)?.state)
    }

    fn take(&mut self, best: &Checkpoint) -> Result<()> {
        best.load_values(&mut self.model.params)
    }

    /// In Hugging Face's format, adapters in PEFT's.
    fn export(&self, dir: &Path, tokenizer: &Tokenizer, world: &World) -> Result<()> {
        self.export_as(&self.model.params, dir, tokenizer, world)
    }
}
