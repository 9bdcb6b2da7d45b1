//! Plans of trainings with several models: what each takes of its device while responses are sampled, scored and learned
//! from.

use std::collections::BTreeMap;
use std::path::Path;

use kernels::ops::accumulator;
use serde_json::json;
use tch::{Device, Kind};

use crate::algorithms::base::{shape_and_trainable, shape_to_ask};
use crate::algorithms::training::compute_kind;
use crate::commands::check::size;
use crate::config::models::{Frozen, Trained};
use crate::config::policy::OwnResponses;
use crate::config::pretrain::Model as Origin;
use crate::config::rollout::Gather;
use crate::config::shape::{Head, Shape};
use crate::distributed::sharded::shard_ranks;
use crate::error::{Error, Result};
use crate::model::memory::{Batch, Memory};

/// What is computed at once.
#[derive(Clone, Copy)]
pub struct Work {
    pub ranks: i64,
    /// Responses that a rank samples at once, where the configuration does not say.
    pub responses: i64,
    /// Sequences that a rank computes at once, and those of an update on it.
    pub micro_batch: i64,
    pub update: i64,
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
    /// What it has there at most in each of [`PHASES`]; none where it does nothing.
    at_work: [Option<i64>; 3],
    /// Moments that are in host memory.
    host: i64,
}

/// The models that a run has, and their plan, as a table or (`as_json`) as one JSON object.
pub fn tell(
    subcommand: &str,
    c: &OwnResponses,
    critic: Option<&Trained>,
    work: Work,
    device: &str,
    as_json: bool,
) -> Result<()> {
    let mut models = vec![trained("actor", c, c.actor, work, device)?];
    if let Some(critic) = critic {
        models.push(trained("critic", c, critic, work, device)?);
    }
    if let Some(model) = c.reward_model {
        models.push(asked("reward_model", c, model, work, device)?);
    }
    match c.reference {
        Some(model) => models.push(asked("reference", c, model, work, device)?),
        // The actor without its adapters takes nothing more.
        None if c.actor.lora.is_some() => {}
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
    let stays = |m: &&Model| if m.offload { 0 } else { m.resident };
    let all: i64 = on.iter().map(stays).sum();
    std::array::from_fn(|phase| {
        let besides = on.iter().filter_map(|m| Some(m.at_work[phase]? - stays(m))).max();
        all + besides.unwrap_or(0)
    })
}

/// A path, or where there is nothing the shape of the preset of this name.
pub fn origin(path: &Path) -> Origin {
    match path.to_str().filter(|name| !path.exists() && Shape::preset(name).is_some()) {
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
    let ranks = shard_ranks(c.common.parallel.mode, work.ranks);
    let plans = trainable.plans(&shape).map_err(context)?;
    let memory = Memory::new(&shape, &plans, compute, ranks, on_device(&device))?;
    let optim = m.optim.as_ref().unwrap_or(c.common.optim);
    let moments = memory.moments(optim.moments);
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
    let sampling = (name == "actor").then(|| resident + sampling(c, &shape, compute, ranks, work));
    let at_work = [sampling, Some(scoring), Some(learning)];
    let parameters = shape.num_parameters();
    Ok(Model { name, parameters, compute, device, offload: m.offload, resident, at_work, host })
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
    let ranks = if alone { 1 } else { shard_ranks(c.common.parallel.mode, work.ranks) };
    let plans = plans.plans_for_inference(&shape)?;
    let memory = Memory::new(&shape, &plans, compute, ranks, on_device(&device))?;
    let batch = Batch {
        rows: work.micro_batch,
        length: c.data.sequence_length,
        micro_batches: 1,
        recompute: c.common.train.recompute,
        packed: false,
    };
    let resident = memory.resident().total();
    let at_work = [None, Some(memory.forward(&batch).total()), None];
    let parameters = shape.num_parameters();
    Ok(Model { name, parameters, compute, device, offload: m.offload, resident, at_work, host: 0 })
}

/// What sampling takes besides the actor's slices: the keys and values of all responses in work, all parameters where they
/// are gathered for it, and the logits of a step.
fn sampling(c: &OwnResponses, s: &Shape, compute: Kind, ranks: i64, work: Work) -> i64 {
    let bytes = compute.elt_size_in_bytes() as i64;
    let slots = c.generation.batch_size.unwrap_or(work.responses).min(work.responses);
    let cache =
        2 * slots * c.data.sequence_length * s.num_hidden_layers * s.num_key_value_heads * s.head_dim * bytes;
    let whole =
        if ranks > 1 && c.generation.gather != Gather::Blocks { s.num_parameters() * bytes } else { 0 };
    let logits = slots * s.vocab_size * (bytes + accumulator(compute).elt_size_in_bytes() as i64);
    cache + whole + logits
}
