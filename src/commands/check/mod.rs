//! `corral check`: all that can be refused without a device.

mod examples;

use std::path::Path;

use clap::Subcommand;

use crate::algorithms::folder::examine;
use crate::algorithms::rl::policy::Samplers;
use crate::algorithms::run::{Resume, Start};
use crate::algorithms::training::compute_kind;
use crate::algorithms::{dpo, grpo, online_dpo, ppo, pretrain, records, reward, sft};
use crate::checkpoint;
use crate::commands::Global;
use crate::commands::plan::several;
use crate::commands::training::ConfigArgs;
use crate::config::common::Common;
use crate::config::grpo::Grpo;
use crate::config::online_dpo::OnlineDpo;
use crate::config::ppo::Ppo;
use crate::config::shape::Shape;
use crate::config::{Algorithm, Loaded};
use crate::data::chat::Chat;
use crate::data::rows::RowLoader;
use crate::distributed::mesh::ShardingPlan;
use crate::distributed::plan::{Plan, Role};
use crate::error::{Context, Error, Result};
use crate::model::Trainable;
use crate::warn;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Check a configuration of `corral pretrain`
    Pretrain(Checked),
    /// Check a configuration of `corral reward`; shows an example as the model will see it
    Reward(WithExample),
    /// Check a configuration of `corral dpo`; shows an example as the model will see it
    Dpo(WithExample),
    /// Check a configuration of `corral ppo`; shows a prompt as the model will get it
    Ppo(WithExample),
    /// Check a configuration of `corral grpo`; shows a prompt as the model will get it
    Grpo(WithExample),
    /// Check a configuration of `corral online-dpo`; shows a prompt as the model will get it
    OnlineDpo(WithExample),
    /// Check a configuration of `corral sft`; shows an example as the model will see it
    Sft(WithExample),
}

#[derive(Debug, clap::Args)]
struct WithExample {
    #[command(flatten)]
    checked: Checked,
    /// The training example or prompt to show, from 1
    #[arg(long, value_name = "N", default_value_t = 1)]
    example: usize,
}

#[derive(Debug, clap::Args)]
struct Checked {
    #[command(flatten)]
    config: ConfigArgs,
    /// Ranks that the run will have
    #[arg(long, value_name = "N", default_value_t = 1)]
    nproc: i64,
}

pub fn run(args: Args, global: &Global) -> Result<()> {
    let device = global.device.as_deref().unwrap_or("cpu");
    match args.what {
        What::Pretrain(checked) => checked.check(pretrain::Inputs::open, |loaded, inputs| {
            let c = &loaded.config;
            for set in inputs.train.sets().chain(inputs.valid.iter().flat_map(|v| v.sets())) {
                set.verify()?;
            }
            conclude(loaded, &[("model", &inputs.base.shape, &Trainable::default())])?;
            println!(
                "# data: {} tokens, {} samples of {} an epoch; {} steps are {:.2} epochs",
                inputs.train.num_tokens(),
                inputs.train.num_windows(),
                c.data.sequence_length,
                inputs.steps,
                inputs.steps as f64 * c.train.batch_size as f64 / inputs.train.num_windows() as f64
            );
            Ok(())
        }),
        What::Reward(WithExample { checked, example }) => {
            checked.check(reward::Inputs::open, |loaded, inputs| {
                let c = &loaded.config;
                conclude(loaded, &[("model", &inputs.base.shape, &inputs.trainable)])?;
                ranked(&c.common(), &inputs.train, inputs.steps);
                warn_of(&inputs.train, inputs.valid.as_ref(), &inputs.chat);
                examples::show(&inputs.chat, &inputs.train, example, c.data.sequence_length)
            })
        }
        What::Dpo(WithExample { checked, example }) => checked.check(dpo::Inputs::open, |loaded, inputs| {
            let c = &loaded.config;
            conclude(loaded, &[("model", &inputs.base.shape, &inputs.trainable)])?;
            ranked(&c.common(), &inputs.train, inputs.steps);
            warn_of(&inputs.train, inputs.valid.as_ref(), &inputs.chat);
            examples::show(&inputs.chat, &inputs.train, example, c.data.sequence_length)
        }),
        What::Ppo(WithExample { checked, example }) => {
            let there =
                |c: &Ppo| several::presets(&c.sections_of_responses(), Some(&c.critic().path)).is_empty();
            let shown = |i: &ppo::Inputs| prompts(i.samplers(), example);
            checked.check_several(
                there,
                ppo::Inputs::open,
                |i| i.trained().to_vec(),
                shown,
                several::ppo,
                device,
            )
        }
        What::Grpo(WithExample { checked, example }) => {
            let there = |c: &Grpo| several::presets(&c.sections_of_responses(), None).is_empty();
            let shown = |i: &grpo::Inputs| prompts(i.samplers(), example);
            checked.check_several(
                there,
                grpo::Inputs::open,
                |i| i.trained().to_vec(),
                shown,
                several::grpo,
                device,
            )
        }
        What::OnlineDpo(WithExample { checked, example }) => {
            let there = |c: &OnlineDpo| several::presets(&c.sections_of_responses(), None).is_empty();
            let shown = |i: &online_dpo::Inputs| prompts(i.samplers(), example);
            checked.check_several(
                there,
                online_dpo::Inputs::open,
                |i| i.trained().to_vec(),
                shown,
                several::online_dpo,
                device,
            )
        }
        What::Sft(WithExample { checked, example }) => checked.check(sft::Inputs::open, |loaded, inputs| {
            let c = &loaded.config;
            conclude(loaded, &[("model", &inputs.base.shape, &inputs.trainable)])?;
            let rows = inputs.train.num_rows();
            println!(
                "# rows: {rows} of {} tokens, {:.1} % padding; {} steps are {:.2} epochs",
                c.data.sequence_length,
                100.0 * inputs.train.padding(),
                inputs.steps,
                inputs.steps as f64 * c.train.batch_size as f64 / rows as f64
            );
            warn_of(&inputs.train, inputs.valid.as_ref(), &inputs.chat);
            examples::show(&inputs.chat, &inputs.train, example, c.data.sequence_length)
        }),
    }
}

impl Checked {
    /// Loads and checks the configuration, and opens what it names.
    fn check<C: Algorithm, I>(
        self,
        open: impl FnOnce(&C) -> Result<I>,
        show: impl FnOnce(&Loaded<C>, &I) -> Result<()>,
    ) -> Result<()> {
        check_loaded(&self.load::<C>()?, open, show)
    }

    /// The configuration, read once: it may come from a pipe.
    fn load<C: Algorithm>(&self) -> Result<Loaded<C>> {
        if self.nproc < 1 {
            return Err(Error::config("--nproc must be at least 1"));
        }
        let loaded = self.config.load::<C>()?;
        loaded.validate(self.nproc)?;
        Ok(loaded)
    }

    /// Of a training with several models: also tells their memory. Where the path of one is the name of a preset, which has
    /// no weights, nothing is opened.
    fn check_several<C: Algorithm, I>(
        self,
        there: impl FnOnce(&C) -> bool,
        open: impl FnOnce(&C) -> Result<I>,
        trained: impl for<'a> Fn(&'a I) -> Vec<(&'a str, &'a Shape, &'a Trainable)>,
        shown: impl Fn(&I) -> Result<()>,
        plan: impl FnOnce(&C, i64, &str, bool) -> Result<()>,
        device: &str,
    ) -> Result<()> {
        let (nproc, loaded) = (self.nproc, self.load::<C>()?);
        let plan = |c: &C| match ShardingPlan::of(c.common().parallel, nproc) {
            Err(e) => {
                println!("# memory: parallel.shard: {}", e.message);
                Ok(())
            }
            Ok(_) => plan(c, nproc, device, false),
        };
        if there(&loaded.config) {
            return check_loaded(&loaded, open, |loaded, inputs| {
                conclude(loaded, &trained(inputs))?;
                plan(&loaded.config)?;
                shown(inputs)
            });
        }
        check_loaded(
            &loaded,
            |_| Ok(()),
            |loaded, ()| {
                println!("{}\n", loaded.resolved_yaml()?.trim_end());
                println!(
                    "# a model's path is a preset, a shape without weights: neither models nor data were opened"
                );
                plan(&loaded.config)
            },
        )
    }
}

/// Opens what a configuration names, refuses a folder that it must not write, and shows what came of it.
fn check_loaded<C: Algorithm, I>(
    loaded: &Loaded<C>,
    open: impl FnOnce(&C) -> Result<I>,
    show: impl FnOnce(&Loaded<C>, &I) -> Result<()>,
) -> Result<()> {
    let inputs = open(&loaded.config)?;
    examine(loaded, &Start { resume: Resume::Auto, overwrite: false }, &[])?;
    show(loaded, &inputs)
}

/// Warns of what a run would warn of.
fn warn_of(train: &RowLoader, valid: Option<&RowLoader>, chat: &Chat) {
    records::warnings(train, valid, chat).iter().for_each(|warning| warn!("{warning}"));
}

/// Shows a prompt of a run's training data, and warns of records that are skipped.
fn prompts(samplers: &Samplers, number: usize) -> Result<()> {
    let Samplers { train, valid } = samplers;
    for (key, sampler) in [("data.train", Some(train)), ("data.valid", valid.as_ref())] {
        sampler
            .and_then(|s| records::skipped(key, &s.prompts.odd))
            .iter()
            .for_each(|warning| warn!("{warning}"));
    }
    examples::prompt(&train.chat, &train.prompts, number)
}

/// Tells of ranked completions.
fn ranked(c: &Common, data: &RowLoader, steps: u64) {
    let counts = data.counts();
    println!(
        "# data: {} prompts with {} completions, {} tokens; {} were cut, {}; {} completions are another's copy; {steps} steps are {:.2} epochs",
        counts.examples,
        counts.sequences,
        counts.tokens,
        counts.truncated,
        counts.dropped_and_why(),
        counts.duplicates,
        steps as f64 * c.train.batch_size as f64 / data.num_rows() as f64
    );
}

/// Refuses a disk that is too small, and prints the resolved configuration and what of the models is trained.
fn conclude<C: Algorithm>(loaded: &Loaded<C>, models: &[(&str, &Shape, &Trainable)]) -> Result<()> {
    let c = loaded.config.common();
    let compute = compute_kind(c.precision.compute);
    let (mut checkpoint, mut exported) = (0, 0);
    let mut lines = Vec::new();
    for (name, shape, trainable) in models {
        let plans = trainable.plans(shape)?;
        let trained: Vec<_> = plans.iter().map(Plan::trained).collect();
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
