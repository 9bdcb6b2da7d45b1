//! `corral plan`: what memory a training takes on each rank, without a device.

pub mod several;

use clap::Subcommand;
use kernels::ops::accumulator;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::algorithms::base::{shape_and_trainable, shape_to_ask};
use crate::algorithms::scorer;
use crate::algorithms::step::{MicroBatch, accumulate_gradients};
use crate::algorithms::training::compute_kind;
use crate::commands::Global;
use crate::commands::check::size;
use crate::commands::convert::parse_size;
use crate::commands::training::ConfigArgs;
use crate::config::common::Common;
use crate::config::dpo::{Dpo, ReferenceFrom};
use crate::config::grpo::Grpo;
use crate::config::model::Model as Origin;
use crate::config::online_dpo::OnlineDpo;
use crate::config::ppo::Ppo;
use crate::config::pretrain::Pretrain;
use crate::config::reward::Reward;
use crate::config::sections::Recompute;
use crate::config::sft::Sft;
use crate::config::shape::{Head, Shape};
use crate::config::trainable::Freeze;
use crate::config::{Algorithm, Loaded};
use crate::distributed::mesh::{Sharding, ShardingPlan};
use crate::distributed::plan::Plan;
use crate::distributed::sharded::Sharded;
use crate::distributed::world::DeviceChoice;
use crate::error::{Error, Result};
use crate::model::memory::{Batch, Memory, Parts};
use crate::model::{Input, Llama, init, layout};
use crate::optim::AdamW;
use crate::telemetry;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// A configuration of `corral pretrain`
    Pretrain(Options),
    /// A configuration of `corral sft`
    Sft(Options),
    /// A configuration of `corral reward`; the model's path may be the name of a preset
    Reward(OfPreferences),
    /// A configuration of `corral dpo`, with its reference; models' paths may be names of presets
    Dpo(OfPreferences),
    /// A configuration of `corral ppo`: every model on its device, while sampling, scoring and learning
    Ppo(Several),
    /// A configuration of `corral grpo`
    Grpo(Several),
    /// A configuration of `corral online-dpo`
    OnlineDpo(Several),
}

/// Of trainings with several models; a model's path may be the name of a preset, whose shape is taken.
#[derive(Debug, clap::Args)]
struct Several {
    #[command(flatten)]
    config: ConfigArgs,
    /// Ranks that the run will have
    #[arg(long, value_name = "N", default_value_t = 1)]
    nproc: i64,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Options {
    #[command(flatten)]
    config: ConfigArgs,
    /// Ranks that the run will have
    #[arg(long, value_name = "N", default_value_t = 1)]
    nproc: i64,
    /// Memory of the device of a rank, such as 24GiB: the largest micro-batch that fits is told
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    device_memory: Option<u64>,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Of trainings on ranked completions.
#[derive(Debug, clap::Args)]
struct OfPreferences {
    #[command(flatten)]
    options: Options,
    /// Completions of a prompt in the data, which is not opened
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(i64).range(2..))]
    completions: i64,
}

/// What the rows are that `train.batch_size` counts.
#[derive(Clone, Copy)]
struct Rows {
    /// Sequences of a row: the completions of a prompt.
    sequences: i64,
    length: i64,
    packed: bool,
    /// All sequences of a micro-batch are packed into one row.
    joined: bool,
}

impl Rows {
    fn of(length: i64, packed: bool) -> Rows {
        Rows { sequences: 1, length, packed, joined: false }
    }
}

/// A model that is only asked, beside the one that is trained.
struct Reference {
    memory: Memory,
    /// It stays; else it goes before the first step.
    online: bool,
}

/// What a run has in memory.
struct Training {
    subcommand: &'static str,
    shape: Shape,
    memory: Memory,
    moments: i64,
    offload: bool,
    /// Host memory of a checkpoint while it is written; 0 where the only one is written after the last step.
    checkpoint: i64,
    recompute: Recompute,
    each: Rows,
    /// Rows of a micro-batch, and of a step on one rank.
    micro_batch: i64,
    rows: i64,
    reference: Option<Reference>,
    /// Tokens of a forward that scores, by which a reward model is normalised at the end.
    scored: i64,
    ranks: i64,
    compute: Kind,
    device: Device,
}

pub fn run(args: Args, global: &Global) -> Result<()> {
    let device = match DeviceChoice::of(global.device.as_deref())? {
        DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Cuda => Device::Cuda(0),
        DeviceChoice::CudaIndex(index) => Device::Cuda(index),
    };
    let name = match device {
        Device::Cpu => "cpu".to_string(),
        _ => global.device.clone().unwrap_or_else(|| "cuda".into()),
    };
    let (training, options) = match args.what {
        What::Ppo(o) => {
            let loaded = load::<Ppo>(&o.config, o.nproc)?;
            return several::ppo(&loaded.config, o.nproc, &name, o.json);
        }
        What::Grpo(o) => {
            let loaded = load::<Grpo>(&o.config, o.nproc)?;
            return several::grpo(&loaded.config, o.nproc, &name, o.json);
        }
        What::OnlineDpo(o) => {
            let loaded = load::<OnlineDpo>(&o.config, o.nproc)?;
            return several::online_dpo(&loaded.config, o.nproc, &name, o.json);
        }
        What::Pretrain(options) => {
            let loaded = load::<Pretrain>(&options.config, options.nproc)?;
            let c = &loaded.config;
            let tokenizer = c.tokenizer.as_ref();
            let length = c.data.sequence_length;
            let (shape, _) =
                shape_and_trainable(&c.model, Head::Lm, tokenizer, length, &Freeze::default(), None)?;
            let plans = layout::layouts(&shape).into_iter().map(Plan::from).collect();
            (
                Training::new(
                    Pretrain::SUBCOMMAND,
                    &c.common(),
                    shape,
                    plans,
                    Rows::of(length, false),
                    options.nproc,
                    device,
                )?,
                options,
            )
        }
        What::Sft(options) => {
            let loaded = load::<Sft>(&options.config, options.nproc)?;
            let c = &loaded.config;
            let (tokenizer, length) = (c.tokenizer.as_ref(), c.data.sequence_length);
            let (shape, trainable) =
                shape_and_trainable(&c.model, Head::Lm, tokenizer, length, &c.freeze, c.lora.as_ref())?;
            let plans = trainable.plans(&shape)?;
            let rows = Rows::of(length, c.data.packing);
            (Training::new(Sft::SUBCOMMAND, &c.common(), shape, plans, rows, options.nproc, device)?, options)
        }
        What::Reward(OfPreferences { options, completions }) => {
            let loaded = load::<Reward>(&options.config, options.nproc)?;
            let c = &loaded.config;
            let tokenizer = c.tokenizer.as_ref();
            let (model, length) = (origin(&c.model), c.data.sequence_length);
            let (shape, trainable) =
                shape_and_trainable(&model, Head::Score, tokenizer, length, &c.freeze, c.lora.as_ref())?;
            let (plans, packed) = (trainable.plans(&shape)?, c.data.packing);
            let rows = Rows { sequences: completions, length, packed, joined: packed };
            let mut training =
                Training::new(Reward::SUBCOMMAND, &c.common(), shape, plans, rows, options.nproc, device)?;
            training.scored = (c.reward.normalize.samples as i64 * length).min(scorer::BATCH_TOKENS as i64);
            (training, options)
        }
        What::Dpo(OfPreferences { options, completions }) => {
            let loaded = load::<Dpo>(&options.config, options.nproc)?;
            let c = &loaded.config;
            let tokenizer = c.tokenizer.as_ref();
            let (model, length) = (origin(&c.model), c.data.sequence_length);
            let (shape, trainable) =
                shape_and_trainable(&model, Head::Lm, tokenizer, length, &c.freeze, c.lora.as_ref())?;
            let (plans, packed) = (trainable.plans(&shape)?, c.data.packing);
            let rows = Rows { sequences: completions, length, packed, joined: packed };
            let mut training =
                Training::new(Dpo::SUBCOMMAND, &c.common(), shape, plans, rows, options.nproc, device)?;
            training.reference = reference(c, &model, options.nproc, device)?;
            (training, options)
        }
    };
    let process = if device == Device::Cpu { process_bytes(training.compute)? } else { 0 };
    training.tell(process, &options);
    Ok(())
}

/// The model; where a path is the name of a preset and nothing else, the preset.
fn origin(model: &Origin) -> Origin {
    match model {
        Origin::Path(path) => several::origin(path),
        other => other.clone(),
    }
}

/// The reference of a DPO as a model of its own, where it is one: not where the trained model answers for it, without its
/// adapters or before its first step.
fn reference(c: &Dpo, model: &Origin, nproc: i64, device: Device) -> Result<Option<Reference>> {
    let online = c.dpo.reference == ReferenceFrom::Online;
    let other = c.reference.as_ref().map(|r| several::origin(&r.path));
    let (shape, asked) = shape_to_ask(other.as_ref().unwrap_or(model), c.tokenizer.as_ref())?;
    let adapters_off = c.lora.is_some() && asked.lora.is_none();
    if other.is_none() && (adapters_off || !online) {
        return Ok(None);
    }
    let compute = compute_kind(c.precision.compute);
    let sharding = ShardingPlan::of(&c.parallel, nproc)?;
    let memory = Memory::new(&shape, &asked.plans_for_inference(&shape)?, compute, sharding, device)?;
    Ok(Some(Reference { memory, online }))
}

/// The configuration, of which all must fit but the tokenizer, which need not be there.
fn load<C: Algorithm>(config: &ConfigArgs, nproc: i64) -> Result<Loaded<C>> {
    if nproc < 1 {
        return Err(Error::config("--nproc must be at least 1"));
    }
    let loaded = config.load::<C>()?;
    let conflict = match loaded.config.conflict(nproc) {
        Some(("tokenizer", _)) => loaded.config.common().conflict(nproc),
        other => other,
    };
    if let Some((key, why)) = conflict {
        return Err(loaded.error(key, &why));
    }
    match ShardingPlan::of(loaded.config.common().parallel, nproc) {
        Err(e) => Err(loaded.error("parallel.shard", &e.message)),
        Ok(_) => Ok(loaded),
    }
}

impl Training {
    fn new(
        subcommand: &'static str,
        c: &Common,
        shape: Shape,
        plans: Vec<Plan>,
        each: Rows,
        ranks: i64,
        device: Device,
    ) -> Result<Training> {
        let compute = compute_kind(c.precision.compute);
        let memory = Memory::new(&shape, &plans, compute, ShardingPlan::of(c.parallel, ranks)?, device)?;
        let moments = memory.moments(c.optim.moments);
        let only_at_the_end = c.train.steps.is_some_and(|steps| steps <= c.checkpoint.every);
        Ok(Training {
            subcommand,
            moments,
            offload: c.optim.offload,
            checkpoint: if only_at_the_end { 0 } else { memory.masters() + moments },
            recompute: c.train.recompute,
            each,
            micro_batch: c.train.micro_batch_size(ranks),
            rows: c.train.batch_size / ranks,
            reference: None,
            scored: 0,
            memory,
            shape,
            ranks,
            compute,
            device,
        })
    }

    /// Of a step with micro-batches of `rows`.
    fn batch(&self, rows: i64) -> Batch {
        let Rows { sequences, length, packed, joined } = self.each;
        let all = rows * sequences;
        let (count, length) = if joined { (1, all * length) } else { (all, length) };
        let micro_batches = (self.rows + rows - 1) / rows;
        Batch { rows: count, length, micro_batches, recompute: self.recompute, packed }
    }

    /// Moments that are on the device.
    fn moments_there(&self) -> i64 {
        if self.offload { 0 } else { self.moments }
    }

    fn step(&self, rows: i64) -> Parts {
        let batch = self.batch(rows);
        let mut parts = self.memory.step(&batch);
        parts.moments = self.moments_there();
        if self.shape.head == Head::Score {
            // Which of all values are a sequence's score, of every micro-batch.
            let accumulator = accumulator(self.compute).elt_size_in_bytes() as i64;
            let values = batch.rows * batch.length;
            parts.head += batch.micro_batches * rows * self.each.sequences * values * accumulator;
        }
        parts
    }

    /// What stays of a reference.
    fn stays(&self) -> i64 {
        self.reference
            .as_ref()
            .filter(|r| r.online)
            .map_or(0, |r| r.memory.resident().total() + r.memory.kept())
    }

    /// What the forwards besides the steps take, with all that is there then: a reference is asked, or scores are normalised.
    fn asking(&self, rows: i64) -> i64 {
        let reference = self.reference.as_ref().map(|r| {
            let learner = self.memory.resident().total() + self.memory.kept() + self.moments_there();
            learner + r.memory.forward(&self.batch(rows)).total()
        });
        let scores = (self.scored > 0).then(|| {
            let batch = Batch { rows: 1, length: self.scored, packed: true, ..self.batch(rows) };
            self.memory.forward(&batch).total() + self.moments_there()
        });
        reference.max(scores).unwrap_or(0)
    }

    /// What the device must have for micro-batches of `rows`.
    fn peak(&self, rows: i64, process: i64) -> i64 {
        let on_host = if self.device == Device::Cpu { self.checkpoint } else { 0 };
        (self.step(rows).total() + self.stays()).max(self.asking(rows)) + process + on_host
    }

    /// The most rows of a micro-batch whose peak is within `bytes`; 0: not even one.
    fn largest(&self, bytes: i64, process: i64) -> i64 {
        let fits = |rows: i64| self.peak(rows, process) <= bytes;
        let (mut low, mut high) = (0, 1);
        while high <= 1 << 20 && fits(high) {
            (low, high) = (high, 2 * high);
        }
        while high - low > 1 {
            let middle = (low + high) / 2;
            if fits(middle) {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    }

    fn tell(&self, process: i64, options: &Options) {
        let parts = self.step(self.micro_batch);
        let peak = self.peak(self.micro_batch, process);
        let (stays, asking) = (self.stays(), self.asking(self.micro_batch));
        let step = parts.total() + stays + process;
        let fit = options.device_memory.map(|bytes| {
            let largest = self.largest(bytes as i64, process);
            let divides = (1..=largest.min(self.rows)).rev().find(|n| self.rows % n == 0);
            (bytes, largest, divides)
        });
        let host = self.checkpoint + if self.offload { self.moments } else { 0 };
        if options.json {
            let mut out = json!({
                "subcommand": self.subcommand,
                "parameters": self.shape.num_parameters(),
                "device": if self.device == Device::Cpu { "cpu" } else { "cuda" },
                "ranks": self.ranks,
                "micro_batch_size": self.micro_batch,
                "sequence_length": self.each.length,
                "parts": parts,
                "process_bytes": process,
                "step_bytes": step,
                "checkpoint_bytes": self.checkpoint,
                "peak_bytes": peak,
            });
            if self.each.sequences > 1 {
                out["completions"] = json!(self.each.sequences);
                out["reference_bytes"] = json!(stays);
                out["asking_bytes"] = json!(if asking > 0 { asking + process } else { 0 });
            }
            if self.device != Device::Cpu {
                out["host_bytes"] = json!(host);
            }
            if let Some((bytes, largest, divides)) = fit {
                out["device_memory"] = json!(bytes);
                out["largest_micro_batch_size"] = json!(largest);
                out["largest_of_batch"] = divides.map_or(Value::Null, Value::from);
            }
            println!("{out}");
            return;
        }
        let completions = match self.each.sequences {
            1 => String::new(),
            n => format!(" prompts x {n} completions"),
        };
        println!(
            "# {:.2}M parameters, {:?} compute, {}; {} rank(s); micro-batches of {}{completions} x {} tokens",
            self.shape.num_parameters() as f64 / 1e6,
            self.compute,
            if self.device == Device::Cpu { "cpu" } else { "cuda" },
            self.ranks,
            self.micro_batch,
            self.each.length,
        );
        let line = |what: &str, bytes: i64| println!("{what:<28} {:>12}", size(bytes.max(0) as u64));
        let named = parts.named();
        named.iter().filter(|(_, bytes)| *bytes > 0).for_each(|(what, bytes)| line(what, *bytes));
        if process > 0 {
            line("the process without a model", process);
        }
        if stays > 0 {
            line("the reference", stays);
        }
        line("a step of a rank, at most", step);
        if asking > 0 {
            line("forwards besides the steps", asking + process);
        }
        match self.device {
            Device::Cpu if self.checkpoint > 0 => {
                line("a checkpoint being written", self.checkpoint);
                line("together", peak);
            }
            Device::Cpu => {}
            _ => {
                println!("# besides: what CUDA and its libraries take, and what the allocator cannot use");
                if self.offload {
                    line("moments in host memory", self.moments);
                }
                if self.checkpoint > 0 {
                    line("a checkpoint, host memory", self.checkpoint);
                }
            }
        }
        if let Some((bytes, largest, divides)) = fit {
            match divides {
                None => println!(
                    "# {}: not even a micro_batch_size of 1 fits, which takes {}",
                    size(bytes),
                    size(self.peak(1, process) as u64)
                ),
                Some(n) if largest >= self.rows => {
                    println!(
                        "# {}: a micro_batch_size of {largest} fits; the {} rows of a rank need {n}",
                        size(bytes),
                        self.rows
                    );
                }
                Some(n) => println!(
                    "# {}: a micro_batch_size of {largest} fits; of those that divide the {} rows of a rank {n}",
                    size(bytes),
                    self.rows
                ),
            }
        }
    }
}

/// What a training process takes besides its tensors: measured here, in a step of a model of some 80 MB, tensors included,
/// which brings in the libraries' code and what products take besides.
fn process_bytes(compute: Kind) -> Result<i64> {
    let shape = Shape {
        hidden_size: 256,
        intermediate_size: 768,
        num_hidden_layers: 1,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 64,
        ..Shape::preset("llama-15m").ok_or_else(|| Error::failed("a preset is missing"))?
    };
    let plans: Vec<Plan> = layout::layouts(&shape).into_iter().map(Plan::from).collect();
    let batch = Batch { rows: 4, length: 256, micro_batches: 1, recompute: Recompute::None, packed: false };
    let memory = Memory::new(&shape, &plans, compute, ShardingPlan::solo(), Device::Cpu)?;
    let tensors = memory.step(&batch).total() + memory.moments(Default::default());

    let mut params = Sharded::new(plans, Sharding::solo(), compute, Device::Cpu);
    init::init(&mut params, &shape, 0)?;
    let mut model = Llama::new(shape, params);
    let mut optimizer = AdamW::configured(&model.params, &Default::default())?;
    let ids = Tensor::arange(1024, (Kind::Int64, Device::Cpu)).view([batch.rows, batch.length]);
    let micro_batch = MicroBatch { labels: ids.view([-1]), input: Input::new(ids) };
    accumulate_gradients(&mut model, &[micro_batch], 1024.0, batch.recompute)?;
    optimizer.update(&mut model.params, 1e-3, 1.0)?;
    Ok(telemetry::peak_bytes() as i64 - tensors)
}
