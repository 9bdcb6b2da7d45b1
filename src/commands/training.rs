//! What the subcommands that train share: arguments, and the way from them to a world of ranks.

use std::path::PathBuf;
use std::time::SystemTime;

use chrono::{Datelike, NaiveDate};
use kernels::comm::ReduceOp;

use crate::algorithms::folder::{examine, is_begun};
use crate::algorithms::lock::RunLock;
use crate::algorithms::recipe::Recipe;
use crate::algorithms::run::{Resume, Start};
use crate::checkpoint::Checkpoint;
use crate::commands::Global;
use crate::commands::init::{self, InitArgs};
use crate::commands::plan::target;
use crate::commands::predict;
use crate::commands::recipes::{RecipeArgs, with_maker};
use crate::commands::report::REPORT;
use crate::config::changes::show;
use crate::config::common::Common;
use crate::config::parallel::Parallel;
use crate::config::shape::Shape;
use crate::config::{self, Algorithm, Loaded};
use crate::distributed::agree::agree;
use crate::distributed::environment::RankEnvironment;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::files;
use crate::model::cuts::check_mesh;
use crate::plan::work::StepWork;
use crate::report::page::page;
use crate::report::run::RunRecord;
use crate::report::summary;
use crate::{info, warn};

/// The arguments of every recipe's subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Without --config: the model to train, with the configuration that corral init would write
    #[arg(long, value_name = "DIR|ID", conflicts_with = "config", requires = "data")]
    pub(crate) model: Option<String>,
    /// With --model: training data; may be given several times
    #[arg(long, value_name = "FILE", requires = "model")]
    pub(crate) data: Vec<PathBuf>,
    /// Where to resume from: auto (the newest checkpoint of the run's folder), a checkpoint or another run's folder, or never
    #[arg(long, default_value = "auto", value_name = "auto|DIR|never")]
    pub(crate) resume: Resume,
    /// With --resume never: replace the run that the folder holds
    #[arg(long)]
    pub(crate) overwrite: bool,
}

impl RecipeArgs for Args {}

/// A configuration and what overrides it.
#[derive(Debug, Clone, clap::Args)]
pub struct ConfigArgs {
    /// A file, or the name of a recipe (see corral recipes) [default: default]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Overrides, such as optim.lr=3e-4
    #[arg(value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
}

impl ConfigArgs {
    /// Loads the file, or what is compiled in, and applies the overrides; tells what is compiled in.
    pub fn load<C: Algorithm>(&self) -> Result<Loaded<C>> {
        let loaded = self.read()?;
        self.announce(&loaded);
        Ok(loaded)
    }

    /// [`ConfigArgs::load`], which tells nothing.
    pub fn read<C: Algorithm>(&self) -> Result<Loaded<C>> {
        config::load::<C>(self.config.as_deref(), &self.overrides)
    }

    /// Tells which recipe is used where no file is, and the stage's own defaults.
    pub fn announce<C: Algorithm>(&self, loaded: &Loaded<C>) {
        if loaded.compiled_in {
            match self.config {
                None => info!("no --config given: using the built-in recipe {}", loaded.source),
                Some(_) => info!("using the built-in recipe {}", loaded.source),
            }
        }
        let defaults: Vec<String> = loaded
            .defaults
            .iter()
            .map(|(key, value)| format!("{key} {}", show(&Some((*value).into()))))
            .collect();
        if !defaults.is_empty() {
            info!("defaults of {}: {}", C::SUBCOMMAND, defaults.join(", "));
        }
    }
}

/// Loads and checks the configuration, opens what it names, joins the world, trains.
pub fn run<R: Recipe>(args: Args, global: &Global) -> Result<()> {
    if args.overwrite && args.resume != Resume::Never {
        return Err(Error::config("--overwrite goes with --resume never"));
    }
    let mut loaded = match &args.model {
        None => args.config.load::<R>()?,
        Some(model) => made::<R>(model, &args, global)?,
    };
    let place = RankEnvironment::from_env()?;
    loaded.validate(place.as_ref().map_or(1, |p| p.world_size))?;
    // A world that was started again goes on with the run that its first attempt began, whatever its command said at
    // first; unless it did not come to that.
    let again = place.as_ref().is_some_and(|p| p.attempt > 0) && is_begun(&loaded)?;
    let resume = if again { Resume::Auto } else { args.resume };
    let start = Start { resume, overwrite: args.overwrite };
    // Here, before data is read and tokenized, and again once the folder is this run's.
    let dir = loaded.config.common().output_dir;
    RunLock::check_free(dir)?;
    let before = RunRecord::changed_at(dir);
    let found = examine(&loaded, &start, &[])?;
    keep_date(&mut loaded.config, found.from.as_ref());
    let inputs = loaded.config.open().map_err(|e| with_maker(loaded.locate(e)))?;
    check_models(&loaded, &inputs)?;
    let mut facts = global.facts();
    facts.add_configuration(&loaded.config.write());
    R::add_facts(&inputs, &mut facts)?;
    let world = World::from_global(
        global.backend.as_deref(),
        global.device.as_deref(),
        loaded.config.common().parallel,
        &facts,
    )?;
    info!("{}", world.choice);
    let inputs = with_first_ranks_date(&mut loaded.config, inputs, &world)?;
    let planned = match world.is_main() {
        true => target(global, world.world_size).and_then(|target| loaded.config.plan(&target)).ok(),
        false => None,
    };
    let one_host = place.as_ref().is_none_or(|place| place.local_world_size == place.world_size);
    if let Some(plan) = planned.as_ref().filter(|_| one_host) {
        let done = found.from.as_ref().map_or(0, |from| from.meta().step);
        let work = predict::work(&loaded.config, &inputs, plan);
        report_time(work.with_steps(R::steps(&inputs).saturating_sub(done)), global);
    }
    kernels::ops::set_deterministic(loaded.config.common().train.deterministic);
    R::train(&loaded, inputs, &world, &start).map_err(|e| loaded.locate(e))?;
    if world.is_main() {
        summarize(&loaded.config.common(), planned.map(|plan| plan.bytes()), before);
    }
    Ok(())
}

/// Refuses models that `parallel` cannot divide.
pub fn check_models<R: Recipe>(loaded: &Loaded<R>, inputs: &R::Inputs) -> Result<()> {
    let common = loaded.config.common().parallel;
    let check = |name: &str, plans, shape: &Shape, parallel: &Parallel| {
        check_mesh(plans, shape, parallel).map_err(|e| match &e.key {
            Some(key) if key == "parallel.tensor" && parallel.tensor != common.tensor => {
                loaded.error(&format!("{name}.tensor"), &e.message)
            }
            Some(key) => loaded.error(key, &format!("{name}: {}", e.message)),
            None => e.context(name),
        })
    };
    for (name, shape, trainable) in R::trained(inputs) {
        check(name, trainable.plans(shape)?, shape, &loaded.config.parallel_of(name))?;
    }
    for (name, base) in loaded.config.frozen_models(inputs) {
        check(name, base.plans_to_ask()?, &base.shape, common)?;
    }
    Ok(())
}

/// Reports how long the remaining steps will take, where the rates of this machine are known.
fn report_time(work: StepWork, global: &Global) {
    if let Ok(Some(rates)) = predict::rates(global, None)
        && work.steps != Some(0)
        && work.predict(&rates).is_some()
    {
        info!("{}", predict::line(&work, Some(&rates)));
    }
}

/// Says what a run came to, and draws its page, unless its metrics are still those of `before`: then it was over. What cannot
/// be written does not make the run a failure.
fn summarize(c: &Common, planned: Option<i64>, before: Option<SystemTime>) {
    let run = match RunRecord::read(c.output_dir) {
        Ok(run) => run,
        Err(e) => return warn!("no summary: {e}"),
    };
    let best = run.best_and_last();
    let is_new = run.changed != before;
    if is_new {
        info!("{}", summary::at_end(&run, planned));
    }
    if is_new && c.log.report {
        let path = c.output_dir.join(REPORT);
        match page(&[run], planned, false).and_then(|page| files::write_file(&path, page.as_bytes())) {
            Ok(()) => info!("curves:    {}", path.display()),
            Err(e) => warn!("no {REPORT}: {e}"),
        }
    }
    if let Some(best) = best {
        info!("{best}");
    }
}

/// The configuration that `corral init` would write, with the overrides.
fn made<R: Recipe>(model: &str, args: &Args, global: &Global) -> Result<Loaded<R>> {
    let init = InitArgs {
        model: model.into(),
        data: args.data.clone(),
        valid: Vec::new(),
        reward_model: None,
        device_memory: None,
        output: None,
    };
    let text = init::text::<R>(&init, global)?;
    info!("no --config given: using the one that corral init {} writes:\n{}", R::SUBCOMMAND, text.trim_end());
    config::load_text::<R>(&text, &args.config.overrides)
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
