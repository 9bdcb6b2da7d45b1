//! What the subcommands that train share: arguments, and the way from them to a world of ranks.

use std::path::PathBuf;

use chrono::{Datelike, NaiveDate};
use kernels::c10d::ReduceOp;

use crate::algorithms::folder::{examine, is_begun};
use crate::algorithms::lock::RunLock;
use crate::algorithms::recipe::Recipe;
use crate::algorithms::run::{Resume, Start};
use crate::checkpoint::Checkpoint;
use crate::commands::Global;
use crate::commands::recipes::RecipeArgs;
use crate::config::{self, Algorithm, Loaded};
use crate::distributed::agree::agree;
use crate::distributed::environment::RankEnvironment;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::info;

/// The arguments of every recipe's subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Where to go on from: auto (the newest checkpoint of the run's folder), a checkpoint or another run's folder, or never
    #[arg(long, default_value = "auto", value_name = "auto|DIR|never")]
    pub(crate) resume: Resume,
    /// With --resume never: replace the run that the folder holds
    #[arg(long)]
    pub(crate) overwrite: bool,
}

impl RecipeArgs for Args {}

/// A configuration and what overrides it.
#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// The recipe [default: configs/SUBCOMMAND/default.yaml, compiled in]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Overrides, such as optim.lr=3e-4
    #[arg(value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
}

impl ConfigArgs {
    /// Loads the file, or what is compiled in, and applies the overrides.
    pub fn load<C: Algorithm>(&self) -> Result<Loaded<C>> {
        let loaded = config::load::<C>(self.config.as_deref(), &self.overrides)?;
        if loaded.compiled_in {
            info!("no --config given: taking the built-in recipe {}", loaded.source);
        }
        Ok(loaded)
    }
}

/// Loads and checks the configuration, opens what it names, joins the world, trains.
pub fn run<R: Recipe>(args: Args, global: &Global) -> Result<()> {
    if args.overwrite && args.resume != Resume::Never {
        return Err(Error::config("--overwrite goes with --resume never"));
    }
    let mut loaded = args.config.load::<R>()?;
    let place = RankEnvironment::from_env()?;
    loaded.validate(place.as_ref().map_or(1, |p| p.world_size))?;
    // A world that was started again goes on with the run that its first attempt began, whatever its command said at
    // first; unless it did not come to that.
    let again = place.is_some_and(|p| p.attempt > 0) && is_begun(&loaded)?;
    let resume = if again { Resume::Auto } else { args.resume };
    let start = Start { resume, overwrite: args.overwrite };
    // Here, before data is read and tokenized, and again once the folder is this run's.
    let dir = loaded.config.common().output_dir;
    RunLock::check_free(dir)?;
    let found = examine(&loaded, &start, &[])?;
    keep_date(&mut loaded.config, found.from.as_ref());
    let inputs = loaded.config.open().map_err(|e| loaded.locate(e))?;
    let mut facts = global.facts();
    facts.add_configuration(&loaded.config.write());
    R::add_facts(&inputs, &mut facts)?;
    let world = World::from_global(global.device.as_deref(), loaded.config.common().parallel, &facts)?;
    info!("{}", world.choice);
    let inputs = with_first_ranks_date(&mut loaded.config, inputs, &world)?;
    R::train(&loaded, inputs, &world, &start).map_err(|e| loaded.locate(e))
}

/// A resumed run's template goes on being told its date, unless the configuration gives one.
fn keep_date<C: Algorithm>(config: &mut C, from: Option<&Checkpoint>) {
    let there = from.and_then(|from| from.meta().template_date);
    if let (Some(date), Some(there)) = (config.template_date().filter(|date| !date.given), there) {
        date.date = there.date;
    }
}

/// Ranks that began on two sides of midnight: the date of rank 0 counts, and others read their data again. Collective.
fn with_first_ranks_date<R: Recipe>(config: &mut R, inputs: R::Inputs, world: &World) -> Result<R::Inputs> {
    let Some(date) = config.template_date() else { return Ok(inputs) };
    let mine = f64::from(date.date.num_days_from_ce());
    let told = if world.is_main() { mine } else { 0.0 };
    let first = world.group.combine(&[told], ReduceOp::Sum)?[0];
    match NaiveDate::from_num_days_from_ce_opt(first as i32).filter(|_| first != mine) {
        None => agree(&world.group, Ok(inputs)),
        Some(first) => {
            date.date = first;
            agree(&world.group, config.open())
        }
    }
}
