//! The models of a run on own responses, as a plan sees them.

use std::path::Path;

use kernels::ops::accumulator;
use tch::{Device, Kind};

use crate::algorithms::base::{path_or_preset, planned_path, shape_and_trainable, shape_to_ask};
use crate::algorithms::scorer::BATCH_TOKENS;
use crate::config::model::Model as Origin;
use crate::config::models::{FrozenModel, Trained};
use crate::config::parallel::Parallel;
use crate::config::policy::OwnResponses;
use crate::config::rollout::Gather;
use crate::config::shape::{Head, Shape};
use crate::distributed::mesh::ShardingPlan;
use crate::error::{Error, Result};
use crate::generate::engine::PREFILL_TOKENS;
use crate::model::{compute_kind, float8};
use crate::optim::streamed_bytes;
use crate::plan::memory::{BatchShape, Memory};
use crate::plan::models::{ModelMemory, ModelsMemory};
use crate::plan::work::{StepWork, forward, forward_and_backward, update_bytes};
use crate::plan::{MemoryPlan, PlanTarget};

/// What is computed at once.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// Responses that a rank samples at once, where the configuration does not say.
    pub responses: i64,
    /// Sequences that a rank computes at once, and those of an update on it.
    pub micro_batch: i64,
    pub update: i64,
    /// Sequences of all updates of an iteration, over all ranks.
    pub learned: i64,
}

/// A critic, how ranks divide it, and what it computes at once.
#[derive(Debug, Clone, Copy)]
pub struct PlannedCritic<'a> {
    pub section: &'a Trained,
    pub parallel: &'a Parallel,
    pub work: Work,
}

/// The models besides the actor that the sections which all share do not tell.
#[derive(Debug)]
pub struct Others<'a> {
    pub critic: Option<PlannedCritic<'a>>,
    /// Whether there is a reference; where it is a model of its own that moves, it is a second actor.
    pub reference: bool,
    /// A moving average of the actor.
    pub average: bool,
}

/// The plan of a run with these sections.
///
/// # Errors
/// Of a model that cannot be opened.
pub fn plan(
    subcommand: &'static str,
    c: &OwnResponses,
    others: &Others,
    work: Work,
    target: &PlanTarget,
) -> Result<MemoryPlan> {
    let parallel = c.common.parallel;
    let mut models = vec![trained("actor", c, c.actor, parallel, work, target)?];
    if let Some(PlannedCritic { section, parallel, work }) = others.critic {
        models.push(trained("critic", c, section, parallel, work, target)?);
    }
    if let Some(model) = c.reward_model {
        models.push(frozen("reward_model", c, model, work, target)?);
    }
    match c.reference {
        Some(model) => models.push(frozen("reference", c, model, work, target)?),
        // The actor without its adapters takes nothing more.
        None if c.actor.lora.is_some() || !others.reference => {}
        None => {
            let like = FrozenModel {
                path: c.actor.path.clone(),
                device: c.actor.device.clone(),
                dtype: c.actor.dtype,
                offload: false,
            };
            models.push(frozen("reference", c, &like, work, target)?);
        }
    }
    if others.average {
        // Master values, which are never in a forward.
        let mut average = trained("average", c, c.actor, parallel, work, target)?;
        (average.at_work, average.offload, average.host) = ([None; 3], false, 0);
        (average.flops, average.update_bytes) = ([0.0; 2], 0.0);
        models.push(average);
    }
    let work = iteration(c, &models, others, work, target.ranks);
    Ok(MemoryPlan::Models(ModelsMemory { subcommand, ranks: target.ranks, models, work }))
}

/// The work of an iteration, an upper bound: every response has the maximum length.
fn iteration(
    c: &OwnResponses,
    models: &[ModelMemory],
    others: &Others,
    work: Work,
    all_ranks: i64,
) -> StepWork {
    let (actor, ranks) = (&models[0], c.common.parallel.data_ranks(all_ranks));
    let (length, responses) = (c.data.sequence_length as f64, (work.responses * ranks) as f64);
    let new = c.generation.max_new_tokens.high.min(c.data.sequence_length as usize) as f64;
    let slots = c.generation.batch_size.unwrap_or(work.responses).min(work.responses).max(1);
    let forwards = ranks as f64 * (work.responses as f64 / slots as f64).ceil() * new;
    // Each forward reads the parameters, and the keys and values of its rows, which are half as many on average.
    let values = actor.parameters as f64 * actor.compute.elt_size_in_bytes() as f64;
    let caches = slots as f64 * length / 2.0 * actor.cache_bytes;
    let all = |of: fn(&ModelMemory) -> f64| models.iter().map(of).sum::<f64>();
    // A reference that is the actor without its adapters is no model of its own.
    let asked_twice = others.reference && !models.iter().any(|m| m.name == "reference");
    let asked = all(|m| m.flops[0]) + if asked_twice { actor.flops[0] } else { 0.0 };
    let updates = work.learned as f64 / (work.update * ranks).max(1) as f64;
    StepWork {
        tokens: work.learned as f64 * length,
        flops: responses * (length * (actor.flops[0] + asked))
            + work.learned as f64 * length * all(|m| m.flops[1]),
        read_bytes: forwards * (values + caches) + updates * all(|m| m.update_bytes),
        samples: true,
        hidden_size: actor.hidden_size,
        compute: c.actor.dtype.unwrap_or(c.common.precision.compute),
        steps: c.common.train.steps.map(|steps| steps as u64),
        ranks: all_ranks,
    }
}

/// Whether one of the models, `critic` among them, is the name of a preset: it has a shape and no weights.
pub fn names_preset(c: &OwnResponses, critic: Option<&Path>) -> bool {
    let frozen = [c.reward_model, c.reference].into_iter().flatten().map(|m| m.path.as_path());
    let mut all = std::iter::once(c.actor.path.as_path()).chain(critic).chain(frozen);
    all.any(|path| matches!(path_or_preset(path), Origin::Preset(_)))
}

fn on_device(text: &str) -> Device {
    if text == "cpu" { Device::Cpu } else { Device::Cuda(0) }
}

fn trained(
    name: &'static str,
    c: &OwnResponses,
    m: &Trained,
    parallel: &Parallel,
    work: Work,
    target: &PlanTarget,
) -> Result<ModelMemory> {
    let device = m.device.clone().unwrap_or_else(|| target.device_name.clone());
    let dtype = m.dtype.unwrap_or(c.common.precision.compute);
    let compute = compute_kind(dtype);
    let context = |e: Error| e.context(name);
    let length = c.data.sequence_length;
    let head = if name == "critic" { Head::Score } else { Head::Lm };
    let (shape, trainable) =
        shape_and_trainable(&planned_path(&m.path), head, c.tokenizer, length, &m.freeze, m.lora.as_ref())
            .map_err(context)?;
    let sharding = ShardingPlan::of(parallel, target.ranks)?;
    let plans = trainable.plans(&shape).map_err(context)?;
    let float8 = float8(dtype, c.common.float8);
    let memory = Memory::new(&shape, &plans, compute, sharding, on_device(&device))?;
    let memory = memory.in_float8(float8)?;
    let optim = m.optim.as_ref().unwrap_or(c.common.optim);
    let moments = if name == "average" { 0 } else { memory.moments(optim.moments) };
    let (there, host) =
        if optim.offload { (streamed_bytes(moments, optim.moments), moments) } else { (moments, 0) };
    let batch = BatchShape {
        rows: work.micro_batch,
        length,
        micro_batches: (work.update / work.micro_batch).max(1),
        recompute: c.common.train.recompute,
        packed: false,
    };
    let resident = memory.resident().total() + there;
    let scoring = memory.forward(&batch).total() + there;
    let learning = memory.step(&batch).total() + there;
    let sampling = (name == "actor").then(|| {
        let forward = memory.forward(&read_at_once(PREFILL_TOKENS, length));
        let prefill = forward.total() - memory.resident().total() - memory.kept();
        let held = memory.kept() > 0 || c.generation.gather != Gather::Blocks;
        let whole = if held { memory.gathered_bytes() } else { 0 };
        resident + whole + sampling(c, &shape, compute, work, prefill)
    });
    let at_work = [sampling, Some(scoring), Some(learning)];
    let (parameters, kept) = (shape.num_parameters(), memory.kept());
    let learning = forward_and_backward(&shape, &plans, length, c.common.train.recompute);
    Ok(ModelMemory {
        name,
        parameters,
        compute,
        device,
        offload: m.offload,
        resident,
        kept,
        at_work,
        host,
        flops: [forward(&shape, length), learning],
        update_bytes: update_bytes(&plans),
        hidden_size: shape.hidden_size,
        cache_bytes: cache_bytes(&shape, compute) as f64,
    })
}

fn frozen(
    name: &'static str,
    c: &OwnResponses,
    m: &FrozenModel,
    work: Work,
    target: &PlanTarget,
) -> Result<ModelMemory> {
    let device = m.device.clone().unwrap_or_else(|| target.device_name.clone());
    let dtype = m.dtype.unwrap_or(c.common.precision.compute);
    let compute = compute_kind(dtype);
    // A reward model reads its own tokens.
    let own_tokens = name == "reward_model";
    let tokenizer = c.tokenizer.filter(|_| !own_tokens);
    let (mut shape, plans) = shape_to_ask(&planned_path(&m.path), tokenizer).map_err(|e| e.context(name))?;
    if own_tokens {
        shape = shape.scored();
    }
    let alone =
        m.device.is_some() && on_device(&device) != on_device(c.actor.device.as_deref().unwrap_or(&device));
    let sharding =
        if alone { ShardingPlan::solo() } else { ShardingPlan::of(c.common.parallel, target.ranks)? };
    let plans = plans.plans_for_inference(&shape)?;
    let float8 = float8(dtype, c.common.float8);
    let memory = Memory::new(&shape, &plans, compute, sharding, on_device(&device))?;
    let memory = memory.in_float8(float8)?;
    let batch = match own_tokens {
        true => read_at_once(BATCH_TOKENS, c.data.sequence_length),
        false => BatchShape { rows: work.micro_batch, ..read_at_once(0, c.data.sequence_length) },
    };
    let resident = memory.resident().total();
    let at_work = [None, Some(memory.forward(&batch).total()), None];
    let (parameters, kept) = (shape.num_parameters(), memory.kept());
    Ok(ModelMemory {
        name,
        parameters,
        compute,
        device,
        offload: m.offload,
        resident,
        kept,
        at_work,
        host: 0,
        flops: [forward(&shape, c.data.sequence_length), 0.0],
        update_bytes: 0.0,
        hidden_size: shape.hidden_size,
        cache_bytes: 0.0,
    })
}

/// Sequences of `length` that are read at once where `tokens` bound them.
fn read_at_once(tokens: usize, length: i64) -> BatchShape {
    let rows = (tokens as i64 / length).max(1);
    BatchShape { rows, length, micro_batches: 1, recompute: Default::default(), packed: false }
}

/// Keys and values of a token.
fn cache_bytes(s: &Shape, compute: Kind) -> i64 {
    2 * s.num_hidden_layers * s.num_key_value_heads * s.head_dim * compute.elt_size_in_bytes() as i64
}

/// What sampling takes besides the actor's values: the keys and values of all responses in work, and the logits of a step or what
/// the reading of prompts takes (`prefill`), if that is more.
fn sampling(c: &OwnResponses, s: &Shape, compute: Kind, work: Work, prefill: i64) -> i64 {
    let bytes = compute.elt_size_in_bytes() as i64;
    let slots = c.generation.batch_size.unwrap_or(work.responses).min(work.responses);
    // A tensor-parallel rank has its heads', at least one.
    let heads = s.num_key_value_heads;
    let own = (heads / c.common.parallel.tensor).max(1);
    let cache = slots * c.data.sequence_length * cache_bytes(s, compute) * own / heads;
    let logits = slots * s.vocab_size * (bytes + accumulator(compute).elt_size_in_bytes() as i64);
    cache + logits.max(prefill)
}
