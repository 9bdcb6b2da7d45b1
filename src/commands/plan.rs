//! `corral plan`: what memory a training takes on each rank, and how long it takes, without a device.

mod search;
mod table;

use kernels::host;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::algorithms::recipe::Recipe;
use crate::algorithms::step::{MicroBatch, accumulate_gradients};
use crate::commands::Global;
use crate::commands::check::size;
use crate::commands::convert::parse_size;
use crate::commands::predict;
use crate::commands::recipes::{NamedRecipe, RecipeArgs};
use crate::commands::training::ConfigArgs;
use crate::config::Conflicts;
use crate::config::sections::Recompute;
use crate::config::shape::Shape;
use crate::config::{Algorithm, Loaded};
use crate::distributed::mesh::{MeshPlan, Sharding, ShardingPlan};
use crate::distributed::plan::GroupPlan;
use crate::distributed::sharded::Sharded;
use crate::distributed::world::DeviceChoice;
use crate::error::{Error, Result};
use crate::model::{Llama, ModelInput, init, layout};
use crate::optim::AdamW;
use crate::plan::links::Links;
use crate::plan::memory::{BatchShape, Memory};
use crate::plan::rates::Rates;
use crate::plan::{MemoryPlan, PlanTarget, TrainingMemory};
use crate::telemetry;
use table::{Fit, models_json, models_table, training_json, training_table};

/// `corral plan`
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: NamedRecipe<PlanArgs>,
}

/// Arguments for every recipe. A model's path may be the name of a preset, whose shape is taken.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Ranks that the run will have
    #[arg(long, value_name = "N", default_value_t = 1)]
    nproc: i64,
    /// Memory of the device of a rank, such as 24GiB: the largest micro-batch that fits, or the cheapest changes that make it fit
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    device_memory: Option<u64>,
    /// The GPU that the run will have, such as H100: the time is predicted from the peak in its data sheet
    #[arg(long, value_name = "NAME")]
    gpu: Option<String>,
    /// Completions per prompt in the data, which is not opened
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(i64).range(2..))]
    completions: i64,
    /// Hosts that the ranks are on, in equal numbers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..))]
    nodes: i64,
    /// Ranks of a host, in place of --nproc
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..), conflicts_with = "nproc")]
    gpus: Option<i64>,
    /// GB/s that a rank sends to ranks of its host [default: 300]
    #[arg(long, value_name = "GB/S", value_parser = speed, conflicts_with = "json")]
    link: Option<f64>,
    /// GB/s that a rank sends to ranks of other hosts [default: 25]
    #[arg(long, value_name = "GB/S", value_parser = speed, conflicts_with = "json")]
    network: Option<f64>,
    /// Lists the meshes on which the run fits, the fastest as predicted first; needs --device-memory
    #[arg(long, requires = "device_memory", conflicts_with = "json")]
    search: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl PlanArgs {
    fn ranks(&self) -> i64 {
        self.gpus.map_or(self.nproc, |gpus| gpus * self.nodes)
    }

    fn links(&self) -> Links {
        let of_node = (self.ranks() / self.nodes).max(1);
        Links {
            of_node,
            inside: self.link.unwrap_or(300.0) * 1e9,
            across: self.network.unwrap_or(25.0) * 1e9,
        }
    }
}

/// A number above 0.
fn speed(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(speed) if speed > 0.0 => Ok(speed),
        _ => Err(Error::config(format!("{text}: it must be a number of GB/s above 0"))),
    }
}

impl RecipeArgs for PlanArgs {
    const OF_SOME: &'static [&'static str] = &["completions"];
}

/// Prints what a training takes of memory, part by part.
pub fn run(args: Args, global: &Global) -> Result<()> {
    args.what.recipe.plan(args.what.args, global)
}

/// Loads a configuration, and shows its plan.
pub fn plan<R: Recipe>(args: PlanArgs, global: &Global) -> Result<()> {
    let mut global = global.clone();
    if args.gpu.is_some() {
        let device = global.device.get_or_insert_with(|| "cuda".into());
        if device == "cpu" {
            return Err(Error::config("--gpu plans for a GPU: leave out --device cpu"));
        }
    }
    if args.ranks() % args.nodes != 0 {
        return Err(Error::config(format!("--nodes {} must divide the {} ranks", args.nodes, args.ranks())));
    }
    let target = PlanTarget { completions: args.completions, ..target(&global, args.ranks())? };
    let rates = predict::rates(&global, args.gpu.as_deref())?;
    if let (true, Some(memory)) = (args.search, args.device_memory) {
        args.config.announce(&args.config.read::<R>()?);
        return search::search::<R>(&args, &target, rates.as_ref(), args.links(), memory);
    }
    let loaded = load::<R>(&args.config, args.ranks())?;
    args.config.announce(&loaded);
    let plan = loaded.config.plan(&target).map_err(|e| loaded.locate(e))?;
    if let (MemoryPlan::Models(_), true) = (&plan, args.link.or(args.network).is_some()) {
        return Err(Error::config("--link and --network are for runs of one model: leave them out"));
    }
    show(&plan, args.device_memory, rates.as_ref(), args.json)?;
    if let (MemoryPlan::Training(training), false, 2..) = (&plan, args.json, args.ranks()) {
        let links = args.links();
        let mesh = MeshPlan::of(loaded.config.common().parallel, args.ranks(), Some(links.of_node))?;
        let sending = links.sending(
            &training.traffic(training.micro_batch),
            &mesh,
            training.micro_batches(training.micro_batch),
        );
        println!("# {}", predict::sending_line(&sending, &links, &plan.work(), rates.as_ref()));
    }
    match args.device_memory {
        Some(bytes) if !args.json && plan.bytes() > bytes as i64 => advise::<R>(&args, &target, bytes as i64),
        _ => Ok(()),
    }
}

/// A change that saves memory.
struct Saving {
    /// Overrides of the configuration.
    overrides: &'static [&'static str],
    /// In addition to what the command line says.
    ranks: i64,
    /// What it costs.
    cost: &'static str,
}

const fn saving(overrides: &'static [&'static str], ranks: i64, cost: &'static str) -> Saving {
    Saving { overrides, ranks, cost }
}

const MICRO: &str = "train.micro_batch_size=1";
const FULL: &str = "train.recompute=full";

/// The cheapest first.
const SAVINGS: [Saving; 10] = [
    saving(&[MICRO], 1, "no work; smaller products may be slower"),
    saving(&[MICRO, "train.recompute=selective"], 1, "a few percent more work"),
    saving(&[MICRO, FULL], 1, "a third more work: the forward twice"),
    saving(&[MICRO, FULL, "optim.moments=8bit"], 1, "moments of 8 bits"),
    saving(
        &[MICRO, FULL, "optim.moments=8bit", "optim.offload=true"],
        1,
        "moments go to the host and back every step",
    ),
    saving(&[MICRO, FULL, "lora={rank: 16}"], 1, "adapters are trained, not the model"),
    saving(&[MICRO, FULL, "lora={rank: 16, base: nf4}"], 1, "adapters over weights of 4 bits"),
    saving(&[MICRO, FULL], 2, "twice the ranks"),
    saving(&[MICRO, FULL], 4, "four times the ranks"),
    saving(&[MICRO, FULL], 8, "eight times the ranks"),
];

/// Prints the cheapest changes that make a run fit, each with what it then takes and what it costs.
fn advise<R: Recipe>(args: &PlanArgs, target: &PlanTarget, bytes: i64) -> Result<()> {
    let mut fitting = Vec::new();
    for Saving { overrides, ranks, cost } in &SAVINGS {
        let nproc = args.ranks() * ranks;
        let mut config = args.config.clone();
        // Adapters of policies are their own section's.
        let own =
            |text: &&str| text.replace("lora=", if R::MODEL == "model" { "lora=" } else { "actor.lora=" });
        config.overrides.extend(overrides.iter().map(own));
        // A change that the stage does not have, or that does not fit the others, is none.
        let Ok(loaded) = load::<R>(&config, nproc) else { continue };
        let Ok(plan) = loaded.config.plan(&PlanTarget { ranks: nproc, ..target.clone() }) else { continue };
        if plan.bytes() <= bytes {
            let of_ranks = if *ranks > 1 { format!(" --nproc {nproc}") } else { String::new() };
            let words: Vec<String> = overrides.iter().map(own).map(|text| shell_quoted(&text)).collect();
            fitting.push(format!("#   {}{of_ranks}: {}; {cost}", words.join(" "), size(plan.bytes() as u64)));
        }
        if fitting.len() == 3 {
            break;
        }
    }
    match fitting.is_empty() {
        true => println!("# no change makes it fit on up to eight times the ranks; use a smaller model"),
        false => println!(
            "# it does not fit; the cheapest changes that make it fit (without the process itself):\n{}",
            fitting.join("\n")
        ),
    }
    Ok(())
}

fn shell_quoted(text: &str) -> String {
    if text.contains(' ') { format!("'{text}'") } else { text.into() }
}

/// What a plan is made for: `ranks` on the device that the command line names.
pub fn target(global: &Global, ranks: i64) -> Result<PlanTarget> {
    let device = match DeviceChoice::of(global.device.as_deref())? {
        DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Cuda => Device::Cuda(0),
        DeviceChoice::CudaIndex(index) => Device::Cuda(index),
    };
    let device_name = match device {
        Device::Cpu => "cpu".to_string(),
        _ => global.device.clone().unwrap_or_else(|| "cuda".into()),
    };
    Ok(PlanTarget { ranks, device, device_name, completions: 2 })
}

/// Prints a plan, as a table or (`as_json`) as one JSON object.
pub fn show(
    plan: &MemoryPlan,
    device_memory: Option<u64>,
    rates: Option<&Rates>,
    as_json: bool,
) -> Result<()> {
    let work = plan.work();
    let predicted = rates.and_then(|rates| work.predict(rates));
    let time = json!({"step_flops": work.flops, "predicted_step_s": predicted.map(|p| p.step_s),
                      "predicted_tokens_per_s": predicted.map(|p| p.tokens_per_s),
                      "predicted_s": predicted.and_then(|p| p.total_s)});
    match plan {
        MemoryPlan::Training(training) => {
            let on_cpu = training.device == Device::Cpu;
            let process = if on_cpu { process_bytes(training.compute)? + copied_bytes(training) } else { 0 };
            let fit = device_memory.map(|bytes| Fit::new(training, bytes, process));
            if as_json {
                training_json(training, process, fit, time);
            } else {
                training_table(training, process, fit);
            }
        }
        MemoryPlan::Models(models) if as_json => models_json(models, time),
        MemoryPlan::Models(models) => {
            models_table(models);
            if let Some(bytes) = device_memory {
                let (most, of) = (plan.bytes().max(0) as u64, size(bytes));
                let fits = if most <= bytes { "fits" } else { "does not fit" };
                println!("# {of} a device: {fits}; the largest use of a device is {}", size(most));
            }
        }
    }
    if !as_json {
        println!("# {}", predict::line(&work, rates));
    }
    Ok(())
}

/// The configuration, of which all must fit but the tokenizer, which need not be there.
fn load<C: Algorithm>(config: &ConfigArgs, nproc: i64) -> Result<Loaded<C>> {
    if nproc < 1 {
        return Err(Error::config("--nproc must be at least 1"));
    }
    let loaded = config.read::<C>()?;
    let mut found = Conflicts::default();
    loaded.config.conflicts(nproc, &mut found);
    found.forget("tokenizer");
    loaded.refuse(&found)?;
    match ShardingPlan::of(loaded.config.common().parallel, nproc) {
        Err(e) => Err(loaded.locate(e)),
        Ok(_) => Ok(loaded),
    }
}

/// What products in bfloat16 take by the processor's own instructions: they copy their operands, and what these copies leave between
/// the tensors grows with the model (measured on 2 to 8 layers: 4 to 9 % of a step's memory).
fn copied_bytes(training: &TrainingMemory) -> i64 {
    match training.compute == Kind::BFloat16 && host::has_native_bfloat16() {
        true => training.peak(training.micro_batch, 0) / 10,
        false => 0,
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
    let plans: Vec<GroupPlan> = layout::layouts(&shape).into_iter().map(GroupPlan::from).collect();
    let batch =
        BatchShape { rows: 4, length: 256, micro_batches: 1, recompute: Recompute::None, packed: false };
    let memory = Memory::new(&shape, &plans, compute, ShardingPlan::solo(), Device::Cpu)?;
    let tensors = memory.step(&batch).total() + memory.moments(Default::default());

    let mut params = Sharded::new(plans, Sharding::solo(), compute, Device::Cpu);
    init::init(&mut params, &shape, 0)?;
    let mut model = Llama::new(shape, params);
    let mut optimizer = AdamW::configured(&model.params, &Default::default())?;
    let ids = Tensor::arange(1024, (Kind::Int64, Device::Cpu)).view([batch.rows, batch.length]);
    let micro_batch = MicroBatch { labels: ids.view([-1]), input: ModelInput::new(ids) };
    accumulate_gradients(&mut model, &[micro_batch], 1024.0, batch.recompute)?;
    optimizer.update(&mut model.params, 1e-3, 1.0)?;
    Ok(telemetry::peak_bytes() as i64 - tensors)
}
