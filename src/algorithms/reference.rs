//! What a model is compared with while it is trained: a frozen model, or itself without its adapters.

use std::path::Path;

use crate::algorithms::base::{Base, planned_model, planned_path, shape_to_ask};
use crate::algorithms::rl::place::{Where, frozen};
use crate::checkpoint::ModelRecord;
use crate::config::common::Common;
use crate::config::model::Model;
use crate::config::models::of_model;
use crate::config::sections::TokenizerSection;
use crate::config::trainable::Lora;
use crate::distributed::mesh::ShardingPlan;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::model::{Llama, Trainable, compute_kind, float8};
use crate::plan::{Memory, PlanTarget};

/// The reference at work.
pub enum Reference {
    /// The trained model without its adapters.
    AdaptersOff,
    /// A model of its own.
    Frozen(Box<Llama>),
}

/// What a reference of its own takes of memory; none where the trained model stands for it without its adapters. `model` and
/// `other`: as the configuration names the trained model, and another reference.
///
/// # Errors
/// Of a model that cannot be opened.
pub fn planned(
    model: &Model,
    other: Option<&Path>,
    tokenizer: Option<&TokenizerSection>,
    lora: Option<&Lora>,
    c: &Common,
    target: &PlanTarget,
) -> Result<Option<Memory>> {
    let origin = other.map_or_else(|| planned_model(model), planned_path);
    let (shape, frozen) = shape_to_ask(&origin, tokenizer)?;
    if other.is_none() && lora.is_some() && frozen.lora.is_none() {
        return Ok(None);
    }
    let compute = compute_kind(c.precision.compute);
    let sharding = ShardingPlan::of(c.parallel, target.ranks)?;
    let plans = frozen.plans_for_inference(&shape)?;
    let float8 = float8(c.precision.compute, c.float8);
    let memory = Memory::new(&shape, &plans, compute, sharding, target.device)?;
    Ok(Some(memory.in_float8(float8)?))
}

impl Reference {
    /// Whether the trained model (`base`, of which `trainable` is trained) stands for its reference: it does where that is no
    /// `other` model. An adapter that the model came with belongs to the reference.
    pub fn is_adapters_off(base: &Base, trainable: &Trainable, other: Option<&Base>) -> bool {
        let adapted = base.weights.as_ref().is_some_and(|w| w.lora().is_some());
        other.is_none() && trainable.lora.is_some() && !adapted
    }

    /// Opens another reference than the model itself.
    ///
    /// # Errors
    /// Those of [`Base::open`]; another tokenizer than the model's.
    pub fn open_other(
        path: &Path,
        tokenizer: Option<&TokenizerSection>,
        sequence_length: i64,
        base: &Base,
    ) -> Result<Base> {
        let opened = Base::open(&Model::Path(path.to_path_buf()), tokenizer, sequence_length);
        let opened = opened.map_err(|e| of_model("reference", e))?;
        match opened.tokenizer.base_hash() == base.tokenizer.base_hash() {
            true => Ok(opened),
            false => Err(Error::key(
                "reference",
                format!(
                    "its tokenizer differs from the model's ({} and {} tokens); both models read the same token ids, so they \
                     need the same vocabulary",
                    opened.tokenizer.vocab_size(),
                    base.tokenizer.vocab_size()
                ),
            )),
        }
    }

    /// The reference of a model, and what it is, for checkpoints; nothing of its own where it is the trained model.
    /// Collective.
    pub fn open(
        base: &Base,
        trainable: &Trainable,
        other: Option<&Base>,
        c: &Common,
        world: &World,
    ) -> Result<(Reference, Option<ModelRecord>)> {
        if Self::is_adapters_off(base, trainable, other) {
            return Ok((Reference::AdaptersOff, None));
        }
        let key = if other.is_some() { "reference.path" } else { "model.path" };
        let base = other.unwrap_or(base);
        let (model, hash) = frozen(base, c, None, &Where::Run(world))?;
        Ok((Reference::Frozen(Box::new(model)), base.record_asked("reference", key, hash)))
    }

    /// Calls `f` with the reference; `model` is the trained one.
    pub fn with<T>(&mut self, model: &mut Llama, f: impl FnOnce(&mut Llama) -> Result<T>) -> Result<T> {
        match self {
            Reference::AdaptersOff => model.without_adapters(f),
            Reference::Frozen(reference) => f(reference),
        }
    }
}
