//! Plans of trainings with several models: what each takes of its device while responses are sampled, scored and learned
//! from.

use std::collections::BTreeMap;
use std::path::Path;

use kernels::ops::accumulator;
use serde_json::json;
use tch::{Device, Kind};

use crate::algorithms::base::{shape_and_trainable, shape_to_ask};
use crate::algorithms::scorer::BATCH_TOKENS;
use crate::algorithms::training::compute_kind;
use crate::commands::check::size;
use crate::config::Algorithm;
use crate::config::grpo::Grpo;
use crate::config::model::Model as Origin;
use crate::config::models::{Frozen, Trained};
use crate::config::online_dpo::OnlineDpo;
use crate::config::policy::OwnResponses;
use crate::config::ppo::Ppo;
use crate::config::rollout::Gather;
use crate::config::shape::{Head, Shape};
use crate::distributed::mesh::ShardingPlan;
use crate::error::{Error, Result};
use crate::files::exists;
use crate::generate::engine::PREFILL_TOKENS;
use crate::model::memory::{Batch, Memory};

/// What is computed at once.
#[derive(Clone, Copy)]
struct Work {
    ranks: i64,
    /// Responses that a rank samples at once, where the configuration does not say.
    responses: i64,
    /// Sequences that a rank computes at once, and those of an update on it.
    micro_batch: i64,
    update: i64,
}

/// The models besides the actor that the sections which all share do not tell.
struct Others<'a> {
    critic: Option<&'a Trained>,
    /// Whether a reference is asked; where it is a model of its own that moves, it is a second actor.
    reference: bool,
    /// A moving average of the actor.
    average: bool,
}

/// The plan of `corral ppo`. `device`: what a run's models are on where their sections do not say.
pub fn ppo(c: &Ppo, ranks: i64, device: &str, as_json: bool) -> Result<()> {
    let work = Work {
        ranks,
        responses: c.train.batch_size / ranks,
        micro_batch: c.micro_batch_size(ranks),
        update: c.ppo.minibatch_size / ranks,
    };
    let critic = c.critic();
    let others = Others { critic: Some(&critic), reference: true, average: c.ppo.ema.is_some() };
    tell(Ppo::SUBCOMMAND, &c.sections_of_responses(), &others, work, device, as_json)
}

/// The plan of `corral grpo`.
pub fn grpo(c: &Grpo, ranks: i64, device: &str, as_json: bool) -> Result<()> {
    let work = Work {
        ranks,
        responses: c.num_responses() / ranks,
        micro_batch: c.micro_batch_size(ranks),
        update: c.minibatch_size() / ranks,
    };
    let others = Others { critic: None, reference: c.uses_reference(), average: false };
    tell(Grpo::SUBCOMMAND, &c.sections_of_responses(), &others, work, device, as_json)
}

/// The plan of `corral online-dpo`.
pub fn online_dpo(c: &OnlineDpo, ranks: i64, device: &str, as_json: bool) -> Result<()> {
    let rows = 2 * c.train.batch_size / ranks;
    let work = Work {
        ranks,
        responses: c.train.batch_size * c.dpo.group_size / ranks,
        micro_batch: c.train.micro_batch_size.map_or(rows, |prompts| 2 * prompts),
        update: rows,
    };
    let others = Others { critic: None, reference: true, average: false };
    tell(OnlineDpo::SUBCOMMAND, &c.sections_of_responses(), &others, work, device, as_json)
}

/// The paths that are no folders but names of presets, which have a shape and no weights.
pub fn presets<'a>(c: &OwnResponses<'a>, critic: Option<&'a Path>) -> Vec<&'a Path> {
    let frozen = [c.reward_model, c.reference].into_iter().flatten().map(|m| m.path.as_path());
    let all = std::iter::once(c.actor.path.as_path()).chain(critic).chain(frozen);
    all.filter(|path| matches!(origin(path), Origin::Preset(_))).collect()
}

const PHASES: [&str; 3] = ["sampling", "scoring", "learning"];

/// A model on one rank. Bytes.
struct Model {
    name: &'static str,
    parameters: i64,
    compute: Kind,
    device: String,
    offload: bool,
    /// What it has on its device where it is not offloaded, moments that are there included.
    resident: i64,
    /// Gathered values that stay there after its first forward.
    kept: i64,
    /// What it has there at most in each of [`PHASES`]; none where it does nothing.
    at_work: [Option<i64>; 3],
    /// Moments that are in host memory.
    host: i64,
}

/// The models that a run has, and their plan, as a table or (`as_json`) as one JSON object.
fn tell(
    subcommand: &str,
    c: &OwnResponses,
    others: &Others,
    work: Work,
    device: &str,
    as_json: bool,
) -> Result<()> {
    let mut models = vec![trained("actor", c, c.actor, work, device)?];
    if let Some(critic) = others.critic {
        models.push(trained("critic", c, critic, work, device)?);
    }
    if let Some(model) = c.reward_model {
        models.push(asked("reward_model", c, model, work, device)?);
    }
    match c.reference {
        Some(model) => models.push(asked("reference", c, model, work, device)?),
        // The actor without its adapters takes nothing more.
        None if c.actor.lora.is_some() || !others.reference => {}
        None => {
            let like = Frozen {
                path: c.actor.path.clone(),
                device: c.actor.device.clone(),
                dtype: c.actor.dtype,
                offload: false,
            };
            models.push(asked("reference", c, &like, work, device)?);
        }
    }
    if others.average {
        // Master values, which are never asked.
        let mut average = trained("average", c, c.actor, work, device)?;
        (average.at_work, average.offload, average.host) = ([None; 3], false, 0);
        models.push(average);
    }
    let mut devices: BTreeMap<&str, Vec<&Model>> = BTreeMap::new();
    models.iter().for_each(|m| devices.entry(&m.device).or_default().push(m));
    let host: i64 = models
        .iter()
        .filter(|m| m.device != "cpu")
        .map(|m| m.host + if m.offload { m.resident } else { 0 })
        .sum();
    if as_json {
        let of = |m: &Model| {
            json!({"name": m.name, "parameters": m.parameters, "device": m.device, "offload": m.offload,
                   "resident_bytes": m.resident, "phase_bytes": m.at_work})
        };
        let peaks: BTreeMap<&str, [i64; 3]> = devices.iter().map(|(d, on)| (*d, peaks(on))).collect();
        let models: Vec<_> = models.iter().map(of).collect();
        println!(
            "{}",
            json!({"subcommand": subcommand, "ranks": work.ranks, "phases": PHASES, "models": models,
                   "device_bytes": peaks, "host_bytes": host})
        );
        return Ok(());
    }
    println!("# {subcommand}: {} rank(s); of each, at most", work.ranks);
    println!(
        "{:<14} {:>12} {:>9} {:>12} {:>12} {:>12} {:>12}",
        "", "parameters", "dtype", "stays", PHASES[0], PHASES[1], PHASES[2]
    );
    let bytes = |b: i64| size(b.max(0) as u64);
    for (device, on) in &devices {
        println!("{device}");
        for m in on {
            let stays = if m.offload { "offloaded".into() } else { bytes(m.resident) };
            let at_work = m.at_work.map(|b| b.map_or("-".into(), bytes));
            println!(
                "  {:<12} {:>11.1}M {:>9} {stays:>12} {:>12} {:>12} {:>12}",
                m.name,
                m.parameters as f64 / 1e6,
                format!("{:?}", m.compute).to_lowercase(),
                at_work[0],
                at_work[1],
                at_work[2]
            );
        }
        let [a, b, c] = peaks(on).map(bytes);
        println!("  {:<48} {a:>12} {b:>12} {c:>12}", "together");
    }
    if host > 0 {
        println!("host memory of what is offloaded: {}", bytes(host));
    }
    println!("# besides: what the process and its libraries take, and what the allocator cannot use");
    Ok(())
}

/// What a device has at most in each phase: what stays on it, and what its models, one after the other, take besides.
fn peaks(on: &[&Model]) -> [i64; 3] {
    let stays = |m: &&Model| if m.offload { 0 } else { m.resident + m.kept };
    let all: i64 = on.iter().map(stays).sum();
    std::array::from_fn(|phase| {
        let besides = on.iter().filter_map(|m| Some(m.at_work[phase]? - stays(m))).max();
        all + besides.unwrap_or(0).max(0)
    })
}

/// A path, or where there is nothing the shape of the preset of this name.
pub fn origin(path: &Path) -> Origin {
    match path.to_str().filter(|name| matches!(exists(path), Ok(false)) && Shape::preset(name).is_some()) {
        Some(name) => Origin::Preset(name.to_string()),
        None => Origin::Path(path.to_path_buf()),
    }
}

fn on_device(text: &str) -> Device {
    if text == "cpu" { Device::Cpu } else { Device::Cuda(0) }
}

fn trained(name: &'static str, c: &OwnResponses, m: &Trained, work: Work, device: &str) -> Result<Model> {
    let device = m.device.clone().unwrap_or_else(|| device.to_string());
    let compute = compute_kind(m.dtype.unwrap_or(c.common.precision.compute));
    let context = |e: Error| e.context(name);
    let length = c.data.sequence_length;
    let head = if name == "critic" { Head::Score } else { Head::Lm };
    let (shape, trainable) =
        shape_and_trainable(&origin(&m.path), head, c.tokenizer, length, &m.freeze, m.lora.as_ref())
            .map_err(context)?;
    let sharding = ShardingPlan::of(c.common.parallel, work.ranks)?;
    let plans = trainable.plans(&shape).map_err(context)?;
    let memory = Memory::new(&shape, &plans, compute, sharding, on_device(&device))?;
    let optim = m.optim.as_ref().unwrap_or(c.common.optim);
    let moments = if name == "average" { 0 } else { memory.moments(optim.moments) };
    let (there, host) = if optim.offload { (0, moments) } else { (moments, 0) };
    let batch = Batch {
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
        let whole = match memory.kept() {
            0 if sharding.ranks > 1 && c.generation.gather != Gather::Blocks => {
                shape.num_parameters() * compute.elt_size_in_bytes() as i64
            }
            kept => kept,
        };
        resident + whole + sampling(c, &shape, compute, work, prefill)
    });
    let at_work = [sampling, Some(scoring), Some(learning)];
    let (parameters, kept) = (shape.num_parameters(), memory.kept());
    Ok(Model { name, parameters, compute, device, offload: m.offload, resident, kept, at_work, host })
}

fn asked(name: &'static str, c: &OwnResponses, m: &Frozen, work: Work, device: &str) -> Result<Model> {
    let device = m.device.clone().unwrap_or_else(|| device.to_string());
    let compute = compute_kind(m.dtype.unwrap_or(c.common.precision.compute));
    // A reward model reads its own tokens.
    let own_tokens = name == "reward_model";
    let tokenizer = c.tokenizer.filter(|_| !own_tokens);
    let (mut shape, plans) = shape_to_ask(&origin(&m.path), tokenizer).map_err(|e| e.context(name))?;
    if own_tokens {
        shape = shape.scored();
    }
    let alone =
        m.device.is_some() && on_device(&device) != on_device(c.actor.device.as_deref().unwrap_or(&device));
    let sharding =
        if alone { ShardingPlan::solo() } else { ShardingPlan::of(c.common.parallel, work.ranks)? };
    let plans = plans.plans_for_inference(&shape)?;
    let memory = Memory::new(&shape, &plans, compute, sharding, on_device(&device))?;
    let batch = match own_tokens {
        true => read_at_once(BATCH_TOKENS, c.data.sequence_length),
        false => Batch { rows: work.micro_batch, ..read_at_once(0, c.data.sequence_length) },
    };
    let resident = memory.resident().total();
    let at_work = [None, Some(memory.forward(&batch).total()), None];
    let (parameters, kept) = (shape.num_parameters(), memory.kept());
    Ok(Model { name, parameters, compute, device, offload: m.offload, resident, kept, at_work, host: 0 })
}

/// Sequences of `length` that are read at once where `tokens` bound them.
fn read_at_once(tokens: usize, length: i64) -> Batch {
    let rows = (tokens as i64 / length).max(1);
    Batch { rows, length, micro_batches: 1, recompute: Default::default(), packed: false }
}

/// What sampling takes besides the actor's values: the keys and values of all responses in work, and the logits of a step or what
/// the reading of prompts takes (`prefill`), if that is more.
fn sampling(c: &OwnResponses, s: &Shape, compute: Kind, work: Work, prefill: i64) -> i64 {
    let bytes = compute.elt_size_in_bytes() as i64;
    let slots = c.generation.batch_size.unwrap_or(work.responses).min(work.responses);
    let cache =
        2 * slots * c.data.sequence_length * s.num_hidden_layers * s.num_key_value_heads * s.head_dim * bytes;
    let logits = slots * s.vocab_size * (bytes + accumulator(compute).elt_size_in_bytes() as i64);
    cache + logits.max(prefill)
}
