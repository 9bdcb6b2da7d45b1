//! `corral bench`: measurements as JSON lines, one object each.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Subcommand;
use kernels::comm::ReduceOp;
use kernels::trace;
use serde_json::json;
use tch::{Kind, Tensor};

use self::workload::{Workload, default_batch};
use crate::algorithms::step::{MicroBatch, accumulate_gradients, apply_gradients};
use crate::commands::Global;
use crate::config::parallel::Parallel;
use crate::config::sections::{Compute, Float8Section, Optim, Recompute};
use crate::config::shape::Shape;
use crate::config::trainable::{BaseFormat, Lora, Targets};
use crate::distributed::environment::RankEnvironment;
use crate::distributed::mesh::{Sharding, ShardingPlan};
use crate::distributed::sharded::Sharded;
use crate::distributed::world::World;
use crate::error::{Context, Error, Result};
use crate::model::cuts::cut_for;
use crate::model::{Llama, ModelInput, Trainable, compute_kind, float8_on, init, layout};
use crate::optim::AdamW;
use crate::plan::memory::{BatchShape, Memory};
use crate::plan::traffic::Traffic;
use crate::plan::work::{forward_and_backward, update_bytes};
use crate::{telemetry, warn};

mod checkpoint;
mod collectives;
mod data;
mod generate;
mod limits;
mod passes;
mod rates;
mod workload;

/// What is measured.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Training steps on random tokens; under `launch`, sharded
    Train(TrainArgs),
    /// New tokens a second, greedily, from random prompts; each prompt gets as many tokens
    Generate(GenerateArgs),
    /// Collectives of this world, by size
    Collectives(collectives::Args),
    /// The cost of saving for a training run, and how long a checkpoint takes to load; under `launch`, sharded
    Checkpoint(checkpoint::Args),
    /// Training a tokenizer, tokenizing, and reading the shards
    Data(data::Args),
    /// This machine, in half a minute: from this, `plan`, `recipes`, `check` and every run predict training times
    Rates,
}

/// A preset's shape.
pub fn shape(preset: &str) -> Result<Shape> {
    Shape::preset(preset).ok_or_else(|| {
        Error::config(format!("--preset '{preset}' is not known; there are {}", Shape::PRESETS.join(", ")))
    })
}

/// `corral bench train`
#[derive(Debug, clap::Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub(crate) workload: Workload,
    /// Steps that are measured
    #[arg(long, default_value_t = 12)]
    pub(crate) steps: usize,
    /// Warm-up steps
    #[arg(long, default_value_t = 3)]
    pub(crate) warmup: usize,
}

/// `corral bench generate`
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    /// A preset's shape with random weights, such as llama-110m or qwen2.5-1.5b (corral help model lists all)
    #[arg(long, default_value = "llama-15m")]
    pub(crate) preset: String,
    /// A model in place of a preset
    #[arg(long, value_name = "DIR", conflicts_with = "preset")]
    pub(crate) model: Option<PathBuf>,
    #[arg(long, value_enum, default_value = "float32")]
    pub(crate) precision: Compute,
    /// Prompts at once
    #[arg(long, default_value_t = 8)]
    pub(crate) batch_size: usize,
    /// Tokens of a prompt
    #[arg(long, default_value_t = 64)]
    pub(crate) prompt_tokens: usize,
    /// Tokens that are generated for each prompt
    #[arg(long, default_value_t = 192)]
    pub(crate) new_tokens: usize,
    /// Measured repetitions, after one that is not measured
    #[arg(long, default_value_t = 3)]
    pub(crate) runs: usize,
}

/// Runs one measurement on all ranks; rank 0 prints a JSON object for each result.
pub fn run(command: Command, global: &Global) -> Result<()> {
    let ranks = RankEnvironment::from_env()?.map_or(1, |place| place.world_size);
    let parallel = match &command {
        Command::Train(args) => args.workload.parallel(ranks)?,
        Command::Checkpoint(args) => args.workload.parallel(ranks)?,
        _ => Parallel::default(),
    };
    let world =
        World::from_global(global.backend.as_deref(), global.device.as_deref(), &parallel, &global.facts())?;
    match command {
        Command::Train(args) => train(&args, &world),
        Command::Generate(args) => generate::run(&args, &world),
        Command::Collectives(args) => collectives::run(&args, &world),
        Command::Checkpoint(args) => checkpoint::run(&args, &world),
        Command::Data(args) => data::run(&args, &world),
        Command::Rates => rates::run(&world),
    }
}

/// Sequences a step of a rank, and at once; tokens of a sequence.
struct BatchSize {
    rows: i64,
    micro: i64,
    length: i64,
}

/// A model with the weights of an untrained one.
fn random_model(shape: &Shape, sharding: Sharding, kind: Kind, world: &World) -> Result<Llama> {
    let mut params = Sharded::new(layout::layouts(shape), sharding, kind, world.device);
    fill(&mut params, shape)?;
    Ok(Llama::new(shape.clone(), params))
}

/// Initial weights: on a CPU those of a training; on a GPU its own random numbers, since the host's are slow for large models.
fn fill(params: &mut Sharded, shape: &Shape) -> Result<()> {
    if params.device() == tch::Device::Cpu {
        return init::init(params, shape, 0);
    }
    params.fill(|spec, _, values| {
        let mut values = values.shallow_clone();
        let _ = match spec.shape.len() {
            1 => values.f_fill_(1.0)?,
            _ => values.f_normal_(0.0, shape.initializer_range)?,
        };
        Ok(())
    })
}

/// A model in training on random tokens.
struct BenchTraining {
    shape: Shape,
    model: Llama,
    optimizer: AdamW,
    recompute: Recompute,
    /// Sequences a step of this rank, and at once; tokens of a sequence.
    rows: i64,
    micro: i64,
    length: i64,
    /// Tokens a step over all ranks.
    count: f64,
    /// Of forward and backward; what is recomputed does not count.
    flops_per_token: f64,
    /// What the update of all parameters reads and writes.
    update_bytes: f64,
    /// What a rank sends in a step, as it is planned.
    planned_bytes: Traffic,
}

impl BenchTraining {
    fn new(args: &Workload, world: &World) -> Result<BenchTraining> {
        let shape = shape(&args.preset)?;
        let (batch, length) = default_batch(&args.preset);
        let (batch, length) = (args.batch_size.unwrap_or(batch), args.sequence_length.unwrap_or(length));
        let rows = batch / world.mesh.data.size;
        let micro = args.micro_batch_size.unwrap_or(rows);
        if rows < 1 || batch % world.mesh.data.size != 0 || micro < 1 || rows % micro != 0 {
            return Err(Error::config(format!(
                "--batch-size {batch} does not divide into {} ranks and micro-batches of {micro}",
                world.mesh.data.size
            )));
        }
        if !(1..=shape.max_position_embeddings).contains(&length) {
            let most = shape.max_position_embeddings;
            return Err(Error::config(format!("--sequence-length must be from 1 to {most}")));
        }
        if args.context > 1 && length % (2 * args.context) != 0 {
            let unit = 2 * args.context;
            return Err(Error::config(format!(
                "--sequence-length {length} is not a multiple of {unit}: see --context"
            )));
        }
        if args.float8_min_size.is_some() && args.precision != Compute::Float8 {
            return Err(Error::config("--float8-min-size needs --precision float8"));
        }
        if args.base != BaseFormat::None && args.precision == Compute::Float8 {
            return Err(Error::config(
                "--base: products with quantized weights are in bfloat16, not in float8",
            ));
        }
        let size = BatchSize { rows, micro, length };
        let lora = |rank| Lora {
            rank,
            alpha: None,
            dropout: 0.0,
            targets: Targets::AllLinear,
            rslora: false,
            modules_to_save: Vec::new(),
            base: args.base,
        };
        let trainable = Trainable { lora: args.lora.map(lora), ..Trainable::default() };
        let optim = Optim { moments: args.moments, ..Optim::default() };
        let (compute, recompute) = (args.precision, args.recompute);
        let mut training = BenchTraining::of(shape, &trainable, &optim, compute, recompute, size, world)?;
        let defaults = Float8Section::default();
        let float8 =
            Float8Section { min_size: args.float8_min_size.unwrap_or(defaults.min_size), ..defaults };
        training.model.set_float8(float8_on(args.precision, &float8, world.device)?)?;
        Ok(training)
    }

    /// Of any shape.
    fn of(
        shape: Shape,
        trainable: &Trainable,
        optim: &Optim,
        compute: Compute,
        recompute: Recompute,
        size: BatchSize,
        world: &World,
    ) -> Result<BenchTraining> {
        let BatchSize { rows, micro, length } = size;
        let plans = trainable.plans(&shape)?;
        let flops_per_token = forward_and_backward(&shape, &plans, length, Recompute::None);
        let update_bytes = update_bytes(&plans);
        let sharding = world.sharding();
        let (mesh, kind) = (&world.mesh, compute_kind(compute));
        let over = ShardingPlan {
            ranks: mesh.shard.size,
            replicas: mesh.replicate.size,
            keep: sharding.keep,
            tensor: mesh.tensor.size,
            sequence: sharding.sequence,
            context: mesh.context.size,
            stage: mesh.pipeline.axis.place(),
            blocks: mesh.pipeline.blocks.clone(),
            order: mesh.pipeline.order,
        };
        let batch = BatchShape { rows: micro, length, micro_batches: rows / micro, recompute, packed: false };
        let planned_bytes = Memory::new(&shape, &plans, kind, over, world.device)?.traffic(&batch);
        let plans = cut_for(plans, &shape, &sharding)
            .map_err(|e| Error::config(format!("--tensor or --pipeline: {}", e.message)))?;
        let mut params = Sharded::new(plans, sharding, kind, world.device);
        fill(&mut params, &shape)?;
        init::init_adapters(&mut params, 0)?;
        let model = Llama::new(shape.clone(), params);
        let optimizer = AdamW::configured(&model.params, optim)?;
        // Ranks that share matrices or sequences have the same rows.
        tch::manual_seed(1 + world.mesh.data.rank);
        let count = (rows * world.mesh.data.size * length) as f64;
        Ok(BenchTraining {
            shape,
            model,
            optimizer,
            recompute,
            rows,
            micro,
            length,
            count,
            flops_per_token,
            update_bytes,
            planned_bytes,
        })
    }

    /// Seconds of a step, and its loss.
    fn step(&mut self, world: &World) -> Result<(f64, f64)> {
        let random = |_| {
            let size = [self.micro, self.length + 1];
            let tokens = Tensor::randint_low(3, self.shape.vocab_size, size, (Kind::Int64, tch::Device::Cpu));
            MicroBatch {
                input: ModelInput::new(tokens.narrow(1, 0, self.length).contiguous()),
                labels: tokens.narrow(1, 1, self.length).contiguous().view([-1]),
            }
        };
        let batches: Vec<MicroBatch> = (0..self.rows / self.micro).map(random).collect();
        let begun = Instant::now();
        let sums = accumulate_gradients(&mut self.model, &batches, self.count, self.recompute)?;
        let (model, optimizer) = (&mut self.model, &mut self.optimizer);
        let update = apply_gradients(model, optimizer, world, sums, 3e-4, 1.0)?;
        world.synchronize()?;
        if update.skipped {
            return Err(Error::failed("a step was not finite: there is nothing to measure"));
        }
        Ok((begun.elapsed().as_secs_f64(), update.loss))
    }
}

fn train(args: &TrainArgs, world: &World) -> Result<()> {
    if args.steps == 0 {
        return Err(Error::config("--steps must be at least 1"));
    }
    let workload = &args.workload;
    let mut training = BenchTraining::new(workload, world)?;
    let (mut seconds, mut first_step_s, mut loss) = (Vec::new(), 0.0, 0.0);
    let mut before = BTreeMap::new();
    for step in 0..args.warmup + args.steps {
        if step == args.warmup {
            before = world.sent_bytes();
            if workload.pipeline > 1 {
                trace::start();
            }
        }
        let (step_s, step_loss) = training.step(world)?;
        if step == 0 {
            first_step_s = telemetry::since_process_start_s();
        }
        if step >= args.warmup {
            seconds.push(step_s);
        }
        loss = step_loss;
    }
    let micro_batches = (training.rows / training.micro) as usize;
    let bubble = passes::report(&trace::stop(), args.steps, micro_batches, world)?;
    let sent: BTreeMap<&str, u64> = world
        .sent_bytes()
        .into_iter()
        .map(|(axis, bytes)| (axis, (bytes - before[axis]) / args.steps as u64))
        .collect();
    let peak = world.group.combine(&[world.peak_bytes()? as f64], ReduceOp::Max)?[0];
    if !world.is_main() {
        return Ok(());
    }
    let BenchTraining {
        shape,
        model,
        rows,
        micro,
        length,
        count,
        flops_per_token,
        update_bytes,
        planned_bytes,
        ..
    } = training;
    let float8 = model.float8();
    drop(model);
    let kind = compute_kind(workload.precision);
    let step_s = median(&mut seconds);
    let tokens_per_s = count / step_s;
    let matmul = limits::matmul_flops_per_s(micro * length, &shape, kind, float8, world.device)?;
    let memory = limits::memory_bytes_per_s(world.device)?;
    let flops_per_s = flops_per_token * tokens_per_s / world.world_size as f64;
    let share = flops_per_s / matmul;
    // What products and the update's memory take at their measured rates: a step can be no faster.
    let ranks = world.world_size as f64;
    let least_s = flops_per_token * count / ranks / matmul + update_bytes / ranks / memory;
    let mfu = world.peak_flops(kind)?.map(|peak| flops_per_s / peak);
    println!(
        "{}",
        json!({
            "bench": "train", "preset": workload.preset, "params": shape.num_parameters(),
            "precision": workload.precision, "world_size": world.world_size,
            "mode": workload.mode, "tensor": workload.tensor, "context": workload.context,
            "pipeline": workload.pipeline, "schedule": workload.schedule,
            "recompute": workload.recompute,
            "batch_size": rows * world.mesh.data.size, "micro_batch_size": micro, "sequence_length": length,
            "steps": args.steps,
            "tokens_per_s": tokens_per_s, "step_s": step_s,
            "first_step_s": first_step_s, "peak_bytes": peak as u64, "last_loss": loss,
            "lora": workload.lora, "base": workload.base, "moments": workload.moments,
            "sent_bytes": sent, "planned_bytes": planned_bytes, "bubble": bubble,
            "matmul_gflops": matmul / 1e9, "matmul_share": share, "mfu": mfu,
            "memory_gb_per_s": memory / 1e9, "speed_of_light_share": least_s / step_s,
            "threads": tch::get_num_threads(), "device": format!("{:?}", world.device),
        })
    );
    Ok(())
}

fn median(x: &mut [f64]) -> f64 {
    x.sort_by(f64::total_cmp);
    let middle = x.len() / 2;
    if x.len() % 2 == 1 { x[middle] } else { (x[middle - 1] + x[middle]) / 2.0 }
}

/// A folder for what a measurement writes, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    /// `parent/bench-ID`.
    fn create(parent: &Path, id: u32) -> Result<Scratch> {
        let path = parent.join(format!("bench-{id}"));
        fs::create_dir_all(parent)
            .and_then(|()| fs::create_dir(&path))
            .context(format!("cannot make the folder {}", path.display()))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            warn!("{} could not be removed: {e}", self.0.display());
        }
    }
}
