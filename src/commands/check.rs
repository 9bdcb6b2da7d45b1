//! `corral check`: all that can be refused without a device.

use std::path::Path;

use clap::Subcommand;

use crate::algorithms::pretrain::Inputs;
use crate::algorithms::run::{self, Resume};
use crate::algorithms::training::compute_kind;
use crate::checkpoint;
use crate::commands::training::ConfigArgs;
use crate::config::pretrain::Pretrain;
use crate::error::{Context, Error, Result};
use crate::model::layout;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Check a configuration of `corral pretrain`
    Pretrain {
        #[command(flatten)]
        config: ConfigArgs,
        /// Ranks that the run will have
        #[arg(long, value_name = "N", default_value_t = 1)]
        nproc: i64,
    },
}

pub fn run(args: Args) -> Result<()> {
    let What::Pretrain { config, nproc } = args.what;
    if nproc < 1 {
        return Err(Error::config("--nproc must be at least 1"));
    }
    let loaded = config.load::<Pretrain>()?;
    loaded.validate(nproc)?;
    let c = &loaded.config;
    let inputs = Inputs::open(c)?;
    run::check_folder(&c.output_dir, &loaded.resolved_yaml()?, &Resume::Auto, false, &[])?;
    for set in inputs.train.sets().chain(inputs.valid.iter().flat_map(|v| v.sets())) {
        set.verify()?;
    }
    let layouts = layout::layouts(&inputs.base.shape);
    let checkpoint = checkpoint::bytes_per_checkpoint(
        &layouts,
        kernels::ops::accumulator(compute_kind(c.precision.compute)),
        c.optim.moments,
    );
    // While one is written the old ones are still there; the exported model comes on top.
    let model = inputs.base.shape.num_parameters() as u64
        * compute_kind(c.precision.compute).elt_size_in_bytes() as u64;
    let needed = checkpoint * (c.checkpoint.keep as u64 + 1) + model;
    let there = bytes_in(&c.output_dir.join("checkpoints"));
    let free = free_where(&c.output_dir)?;
    if needed > free + there {
        return Err(Error::config(format!(
            "{}: {} checkpoints of {} and the model need {}, and {} are free; set checkpoint.keep lower or choose another \
             output_dir",
            c.output_dir.display(),
            c.checkpoint.keep + 1,
            size(checkpoint),
            size(needed),
            size(free)
        )));
    }
    println!("{}", loaded.resolved_yaml()?.trim_end());
    println!();
    println!("# model: {} parameters", inputs.base.shape.num_parameters());
    for l in &layouts {
        println!("#   {:<12} {:>14}", l.name, l.numel);
    }
    println!(
        "# data: {} tokens, {} samples of {} an epoch; {} steps are {:.2} epochs",
        inputs.train.num_tokens(),
        inputs.train.num_windows(),
        c.data.sequence_length,
        inputs.steps,
        inputs.steps as f64 * c.train.batch_size as f64 / inputs.train.num_windows() as f64
    );
    println!(
        "# disk: {} a checkpoint, {} with {} kept; {} free",
        size(checkpoint),
        size(needed),
        c.checkpoint.keep,
        size(free)
    );
    Ok(())
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
