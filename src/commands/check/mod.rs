//! `corral check`: all that can be refused without a device.

mod examples;
mod mesh;

use std::path::Path;

use crate::algorithms::folder::examine;
use crate::algorithms::recipe::{Recipe, Shown};
use crate::algorithms::records;
use crate::algorithms::rl::policy::Samplers;
use crate::algorithms::run::{Resume, Start};
use crate::checkpoint;
use crate::commands::recipes::{NamedRecipe, RecipeArgs, with_maker};
use crate::commands::training::{ConfigArgs, check_models};
use crate::commands::{Global, plan, predict};
use crate::config::common::Common;
use crate::config::shape::Shape;
use crate::config::{Algorithm, Loaded};
use crate::distributed::mesh::ShardingPlan;
use crate::distributed::plan::{GroupPlan, Role};
use crate::error::{Context, Error, Result};
use crate::model::{Trainable, compute_kind};
use crate::plan::PlanTarget;
use crate::plan::rates::Rates;
use crate::warn;

/// `corral check`
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: NamedRecipe<CheckArgs>,
}

/// Arguments for every recipe.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Ranks that the run will have
    #[arg(long, value_name = "N", default_value_t = 1)]
    nproc: i64,
    /// Hosts that these ranks are on, in equal numbers
    #[arg(long, value_name = "N", default_value_t = 1)]
    nodes: i64,
    /// The training example, prompt or window of tokens to show, from 1
    #[arg(long, value_name = "N", default_value_t = 1)]
    example: usize,
}

impl RecipeArgs for CheckArgs {}

/// Checks the configuration of a recipe; prints it, resolved, and what would be trained on.
pub fn run(args: Args, global: &Global) -> Result<()> {
    args.what.recipe.check(args.what.args, global)
}

/// Loads and checks a configuration, opens what it names, refuses a folder that a run must not write, and shows what came of
/// it: the resolved configuration, what is trained, the disk, the memory of several models, the data, an example.
pub fn check<R: Recipe>(args: CheckArgs, global: &Global) -> Result<()> {
    if args.nproc < 1 {
        return Err(Error::config("--nproc must be at least 1"));
    }
    if args.nodes < 1 || args.nproc % args.nodes != 0 {
        return Err(Error::config("--nodes must divide --nproc, the ranks of all nodes"));
    }
    let loaded = args.config.load::<R>()?;
    loaded.validate(args.nproc)?;
    let c = &loaded.config;
    let target = plan::target(global, args.nproc)?;
    let start = Start { resume: Resume::Auto, overwrite: false };
    if c.names_preset() {
        examine(&loaded, &start, &[])?;
        println!("{}\n", loaded.resolved_yaml()?.trim_end());
        println!(
            "# a model's path is a preset, a shape without weights: neither models nor data were opened"
        );
        mesh::show(&c.common(), args.nproc, args.nodes).map_err(|e| loaded.locate(e))?;
        return memory(c, &target, None);
    }
    let rates = predict::rates(global, None)?;
    let inputs = c.open().map_err(|e| with_maker(loaded.locate(e)))?;
    examine(&loaded, &start, &[])?;
    if let Shown::Windows { train, valid, .. } = c.shown(&inputs) {
        train.sets().chain(valid.iter().flat_map(|v| v.sets())).try_for_each(|set| set.verify())?;
    }
    check_models(&loaded, &inputs)?;
    conclude(&loaded, &R::trained(&inputs))?;
    mesh::show(&c.common(), args.nproc, args.nodes).map_err(|e| loaded.locate(e))?;
    memory(c, &target, rates.as_ref())?;
    if R::MODEL == "model"
        && let Ok(plan) = c.plan(&target)
    {
        println!("# {}", predict::line(&predict::work(c, &inputs, &plan), rates.as_ref()));
    }
    println!("# data: {}", c.data_line(&inputs));
    match c.shown(&inputs) {
        Shown::Windows { train, tokenizer, .. } => examples::window(tokenizer, train, args.example),
        Shown::Examples { train, valid, chat, longest } => {
            records::warnings(train, valid, chat).iter().for_each(|warning| warn!("{warning}"));
            examples::show(chat, train, args.example, longest)
        }
        Shown::Prompts(Samplers { train, valid }) => {
            for (key, sampler) in [("data.train", Some(train)), ("data.valid", valid.as_ref())] {
                let warning = sampler.and_then(|s| records::skipped(key, &s.prompts.odd));
                warning.iter().for_each(|warning| warn!("{warning}"));
            }
            examples::prompt(&train.chat, &train.prompts, args.example)
        }
    }
}

/// Shows the memory of a run of several models.
fn memory<R: Recipe>(c: &R, target: &PlanTarget, rates: Option<&Rates>) -> Result<()> {
    if R::MODEL == "model" {
        // One model: `corral plan` has more to tell than fits here.
        return Ok(());
    }
    match ShardingPlan::of(c.common().parallel, target.ranks) {
        Err(e) => println!("# memory: parallel.shard: {}", e.message),
        Ok(_) => plan::show(&c.plan(target)?, None, rates, false)?,
    }
    Ok(())
}

/// Refuses a disk that is too small, and prints the resolved configuration and what of the models is trained.
fn conclude<C: Algorithm>(loaded: &Loaded<C>, models: &[(&str, &Shape, &Trainable)]) -> Result<()> {
    let c = loaded.config.common();
    let compute = compute_kind(c.precision.compute);
    let (mut checkpoint, mut exported) = (0, 0);
    let mut lines = Vec::new();
    for (name, shape, trainable) in models {
        let plans = trainable.plans(shape)?;
        let trained: Vec<_> = plans.iter().map(GroupPlan::trained).collect();
        checkpoint +=
            checkpoint::bytes_per_checkpoint(&trained, kernels::ops::accumulator(compute), c.optim.moments);
        let numel: u64 = trained.iter().map(|l| l.numel as u64).sum();
        let whole = trainable.lora.is_none();
        let written = if whole { shape.num_parameters() as u64 } else { numel };
        exported += written * compute.elt_size_in_bytes() as u64;
        lines.push(format!("# {name}: {} parameters, {numel} of them trained", shape.num_parameters()));
        for (plan, trained) in plans.iter().zip(&trained) {
            let frozen = plan.roles.iter().any(|role| *role != Role::Trained);
            let note = if frozen { " trained, the rest frozen" } else { "" };
            lines.push(format!("#   {:<12} {:>14}{note}", trained.name, trained.numel));
        }
    }
    // While one is written the old ones are still there; the exported models come on top.
    let needed = checkpoint * (c.checkpoint.keep as u64 + 1) + exported;
    let free = room(&c, needed)?;
    println!("{}\n", loaded.resolved_yaml()?.trim_end());
    lines.iter().for_each(|line| println!("{line}"));
    println!(
        "# disk: {} a checkpoint, {} with {} kept; {} free",
        size(checkpoint),
        size(needed),
        c.checkpoint.keep,
        size(free)
    );
    Ok(())
}

/// The bytes that are free for a run's folder, which must hold `needed`.
fn room(c: &Common, needed: u64) -> Result<u64> {
    let there = bytes_in(&c.output_dir.join("checkpoints"));
    let free = free_where(c.output_dir)?;
    if needed <= free + there {
        return Ok(free);
    }
    Err(Error::config(format!(
        "{}: {} checkpoints and the model need {}, and {} are free; set checkpoint.keep lower or choose another output_dir",
        c.output_dir.display(),
        c.checkpoint.keep + 1,
        size(needed),
        size(free)
    )))
}

/// Bytes free where `path` is or will be.
fn free_where(path: &Path) -> Result<u64> {
    let absolute = std::path::absolute(path).context(path.display())?;
    checkpoint::free_bytes(absolute.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/")))
}

/// Bytes of the files in a folder and below; 0 if there is none.
fn bytes_in(path: &Path) -> u64 {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .map(|e| match e.metadata() {
            Ok(m) if m.is_dir() => bytes_in(&e.path()),
            Ok(m) => m.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut x, mut unit) = (bytes as f64, 0);
    while x >= 1024.0 && unit + 1 < units.len() {
        x /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{x:.1} {}", units[unit]) }
}
