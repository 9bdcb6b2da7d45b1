//! The folder of a run that is about to begin: locked, checked against its configuration, searched for the checkpoint to go
//! on from. Nothing of an earlier start is removed before the first save of this one stands (see [`super::rollback`]).

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Serialize, de::DeserializeOwned};
use sha2::Digest;

use super::learner::Learners;
use super::lock::RunLock;
use super::profile::Profile;
use super::rollback::{self, CONFIG, MODELS};
use super::run::{Resume, Start};
use super::step::SkipGuard;
use super::training::{Cadence, Run, TrainingProgress, Window};
use crate::checkpoint::manifest::META;
use crate::checkpoint::sharded::{checkpoints_dir, list, step_name};
use crate::checkpoint::{self, Checkpoint, ModelRecord, RunInfo, Saver};
use crate::config::changes::{self, Change};
use crate::config::keys::Class;
use crate::config::{Algorithm, Loaded};
use crate::data::position::Positioned;
use crate::data::tokenizer::{Tokenizer, hex};
use crate::distributed::agree::agree;
use crate::distributed::world::World;
use crate::error::{Context, Error, Result};
use crate::signals::Signals;
use crate::telemetry::{RunLog, log_files};
use crate::{files, info, warn};

/// What a run that is about to begin finds in its folder.
pub struct Found {
    /// The checkpoint to go on from.
    pub from: Option<Checkpoint>,
    /// It is one of this folder.
    own: bool,
    /// What differs from the configuration of the run that the folder holds; nothing of it is refused.
    changes: Vec<Change>,
}

/// Checks the folder, and finds the checkpoint that the run goes on from. Changes nothing. `inputs` are the paths that the run
/// reads, which a replaced run must not hold.
///
/// # Errors
/// The folder holds another run, or what looks like one and is not ours to change (kind Config); a checkpoint that is
/// damaged or missing (kind Data).
pub fn examine<C: Algorithm>(loaded: &Loaded<C>, start: &Start, inputs: &[&Path]) -> Result<Found> {
    let dir = loaded.config.common().output_dir;
    let new_run = || Ok(Found { from: None, own: false, changes: Vec::new() });
    if start.resume == Resume::Never && start.overwrite {
        check_inputs(dir, inputs)?;
        return new_run();
    }
    let refuse = |what: &str| {
        Err(Error::config(format!(
            "{} {what}; choose another output_dir, or replace what is there with --resume never --overwrite",
            dir.display()
        )))
    };
    let config = rollback::config_path(dir)?;
    let has_checkpoint = !list(&checkpoints_dir(dir))?.is_empty();
    let has_model = files::holds_something(&dir.join("model"))?;
    // Without a configuration, what a run would write over belongs to somebody else.
    let configured = files::exists(&config)?;
    if !configured && (has_model || (files::is_dir(dir)? && !log_files(dir)?.is_empty())) {
        return refuse("holds metrics, a model or TensorBoard files, but no run's config.yaml");
    }
    if start.resume == Resume::Never && (has_checkpoint || has_model) {
        return refuse("already holds a run (--resume auto goes on with it)");
    }
    let from = match find_checkpoint(dir, &start.resume)? {
        // The same command once more: it goes on from what came after.
        Some(named) if has_checkpoint && begins_with(dir, &named)? => checkpoint::latest(dir)?,
        found => found,
    };
    let changes = match configured && (has_checkpoint || has_model) {
        true => changes(loaded, &config)?,
        // A start that never came to a checkpoint holds nothing.
        false => Vec::new(),
    };
    let refused: Vec<&Change> = changes.iter().filter(|change| change.is_refused()).collect();
    if !refused.is_empty() && !has_checkpoint {
        let what = "holds the model of a run with another configuration";
        return refuse(&format!("{what} ({})", changes::list(refused)));
    }
    if !refused.is_empty() {
        return Err(another_run(dir, &start.resume, &refused));
    }
    let own = from.as_ref().is_some_and(|from| is_within(from.dir(), &checkpoints_dir(dir)));
    Ok(Found { from, own, changes: if own { changes } else { Vec::new() } })
}

/// Whether the folder holds a run of just this configuration that has come to a checkpoint.
pub fn is_begun<C: Algorithm>(loaded: &Loaded<C>) -> Result<bool> {
    let dir = loaded.config.common().output_dir;
    let text = std::fs::read_to_string(dir.join(CONFIG)).unwrap_or_default();
    let same = changes::resolved(&text) == loaded.resolved_yaml()?;
    Ok(same && !rollback::can_be_undone(dir)? && !list(&checkpoints_dir(dir))?.is_empty())
}

/// Refuses to replace a run that holds what the new one reads.
fn check_inputs(dir: &Path, inputs: &[&Path]) -> Result<()> {
    let removed = || MODELS.map(|name| dir.join(name)).into_iter().chain([checkpoints_dir(dir)]);
    match inputs.iter().find(|path| removed().any(|removed| is_within(path, &removed))) {
        None => Ok(()),
        Some(path) => Err(Error::config(format!(
            "--overwrite would remove {}, which the run reads; choose another output_dir",
            path.display()
        ))),
    }
}

fn is_within(path: &Path, folder: &Path) -> bool {
    let absolute = |p: &Path| p.canonicalize().unwrap_or_else(|_| p.to_path_buf());
    absolute(path).starts_with(absolute(folder))
}

/// The checkpoint that the run goes on from, if any.
fn find_checkpoint(dir: &Path, resume: &Resume) -> Result<Option<Checkpoint>> {
    let path = match resume {
        Resume::Never => return Ok(None),
        Resume::Auto => return checkpoint::latest(dir),
        Resume::From(path) => path,
    };
    let told = |why: &str| Err(Error::data(format!("--resume {}: {why}", path.display())));
    if !files::is_dir(path)? {
        return told("there is no such folder; give a checkpoint, or a run's folder");
    }
    // A run's folder, or its folder of checkpoints.
    let newest = match files::exists(&path.join(META))? {
        true => return Checkpoint::open(path).map(Some),
        false if files::is_dir(&checkpoints_dir(path))? => checkpoint::latest(path)?,
        false => list(path)?.pop().map(|(_, newest)| Checkpoint::open(&newest)).transpose()?,
    };
    match newest {
        Some(newest) => Ok(Some(newest)),
        None => told("neither a checkpoint nor the folder of a run that has one"),
    }
}

/// Whether the run in this folder began from this checkpoint of another.
fn begins_with(dir: &Path, named: &Checkpoint) -> Result<bool> {
    // A checkpoint of this very run: the newest one may be damaged, which is why an older one is named.
    let own = checkpoints_dir(dir).canonicalize();
    if own.is_ok_and(|own| named.dir().canonicalize().is_ok_and(|named| named.starts_with(own))) {
        return Ok(false);
    }
    let Some(newest) = checkpoint::latest(dir)? else { return Ok(false) };
    let begun_from = newest.meta().state.get("begun_from").and_then(|path| path.as_str());
    Ok(begun_from.is_some_and(|path| named.dir().canonicalize().is_ok_and(|named| named == Path::new(path))))
}

/// What one may do where a folder holds another run.
const ADVICE: &str =
    "for a new run choose another output_dir, or replace the one there with --resume never --overwrite";

/// What differs between the configuration and the one of the run that the folder holds.
fn changes<C: Algorithm>(loaded: &Loaded<C>, config: &Path) -> Result<Vec<Change>> {
    let dir = loaded.config.common().output_dir.display();
    let text = std::fs::read_to_string(config).data_error(config.display())?;
    let source = config.display().to_string();
    if let Some(there) = changes::noted_stage(&text).filter(|there| *there != C::SUBCOMMAND) {
        return Err(Error::config(format!("{dir} holds a run of `corral {there}`; {ADVICE}")));
    }
    changes::between(&text, &source, &loaded.config).map_err(|e| {
        Error::config(format!("{dir} holds a run whose configuration cannot be read: {e}; {ADVICE}"))
    })
}

/// The folder holds a run whose mathematics differs in the `refused` keys.
fn another_run(dir: &Path, resume: &Resume, refused: &[&Change]) -> Error {
    let dir = dir.display();
    let from = match resume {
        Resume::From(path) => path.display().to_string(),
        _ => dir.to_string(),
    };
    let bound: Vec<&str> =
        refused.iter().filter(|c| c.class != Class::Mathematics).map(|c| c.key.as_str()).collect();
    let bound = match bound.is_empty() {
        true => String::new(),
        false => format!(" (with {} as there: a checkpoint is bound to it)", bound.join(", ")),
    };
    Error::config(format!(
        "{dir} holds a run with another configuration: {}. To go on from its newest checkpoint in another folder: --resume \
         {from} output_dir=NEW{bound}; {ADVICE}",
        changes::list(refused.iter().copied())
    ))
}

/// The folder of a run that is about to begin, held by this process group.
pub struct RunFolder<'a> {
    world: &'a World,
    dir: PathBuf,
    /// The subcommand.
    stage: &'static str,
    resolved: String,
    /// The run that the folder holds is replaced.
    replaces: bool,
    /// On rank 0.
    lock: Option<RunLock>,
    saver: Saver,
    signals: Signals,
    found: Found,
}

impl<'a> RunFolder<'a> {
    /// Takes the folder, and refuses one that holds another run. `inputs` are the paths that the run reads; `tokenizer` goes
    /// into its checkpoints. Collective.
    pub fn open<C: Algorithm>(
        loaded: &Loaded<C>,
        start: &Start,
        inputs: &[&Path],
        tokenizer: &Tokenizer,
        world: &'a World,
    ) -> Result<Self> {
        let (c, resolved) = (loaded.config.common(), loaded.resolved_yaml()?);
        let dir = c.output_dir;
        let take = || {
            let lock = RunLock::take(dir)?;
            rollback::undo(dir)?;
            Ok(Some(lock))
        };
        let lock = agree(&world.group, if world.is_main() { take() } else { Ok(None) })?;
        let info = RunInfo {
            config_hash: hex(&sha2::Sha256::digest(resolved.as_bytes())),
            tokenizer: Some(tokenizer.clone()),
        };
        let saver = Saver::new(dir, c.checkpoint.keep as usize, info, &world.group)?;
        let found = agree(&world.group, examine(loaded, start, inputs))?;
        let replaces = start.resume == Resume::Never && start.overwrite;
        let signals = Signals::watch(start.goes_on())?;
        let (dir, stage) = (dir.to_path_buf(), C::SUBCOMMAND);
        Ok(RunFolder { world, dir, stage, resolved, replaces, lock, saver, signals, found })
    }

    pub fn world(&self) -> &'a World {
        self.world
    }

    /// The checkpoint that the run goes on from, if there is one.
    pub fn from(&self) -> Option<&Checkpoint> {
        self.found.from.as_ref()
    }

    /// Notes models for the run's checkpoints.
    ///
    /// # Errors
    /// Of kind Data: the checkpoint to go on from was made with another. Nothing was changed then.
    pub fn record(&mut self, models: impl IntoIterator<Item = ModelRecord>) -> Result<()> {
        for model in models {
            let earlier = self
                .from()
                .and_then(|from| Some((from.meta().models.iter().find(|m| m.name == model.name)?, from)));
            agree(
                &self.world.group,
                earlier.map_or(Ok(()), |(earlier, from)| model.check(earlier, from.dir())),
            )?;
            self.saver.add_model(model);
        }
        Ok(())
    }

    /// Sets the models, and the position in `data`, to what the checkpoint holds; without one to go on from, to what a new run
    /// begins with. Collective.
    pub fn restore_or_begin<T: Positioned<Position: DeserializeOwned>>(
        &self,
        models: &mut impl Learners,
        data: &T,
    ) -> Result<TrainingProgress<T::Position>> {
        let Some(from) = &self.found.from else {
            models.begin()?;
            return Ok(TrainingProgress::new(data.begin()));
        };
        let progress: TrainingProgress<T::Position> = serde_json::from_value(models.restore(from)?)
            .map_err(|e| Error::data(format!("{}: its state cannot be read: {e}", from.dir().display())))?;
        info!("resumed from {}", from.dir().display());
        data.check(&progress.data)?;
        Ok(progress)
    }

    /// Writes the configuration, opens the log and starts the clock of a run of `cadence.steps`: from here on the folder holds
    /// this run. Collective.
    pub fn start<D: Serialize>(
        self,
        mut progress: TrainingProgress<D>,
        cadence: Cadence,
    ) -> Result<Run<'a, D>> {
        let RunFolder { world, dir, stage, resolved, replaces, lock, mut saver, signals, found } = self;
        let resumed_at = found.from.as_ref().map(|_| progress.step);
        if progress.step > cadence.steps {
            let (step, steps) = (progress.step, cadence.steps);
            return Err(Error::config(format!(
                "the checkpoint stands at step {step}, beyond the {steps} of this configuration: raise train.steps or \
                 train.epochs, or go on from an older checkpoint with --resume"
            )));
        }
        let here = machine(world);
        found.tell(&cadence, progress.machine.as_ref().unwrap_or(&here), world);
        progress.machine = Some(here);
        match &found.from {
            Some(from) if !found.own => progress.move_to_another_folder(from.dir()),
            _ => progress.go_on(&found.changes),
        }
        let best = progress.best_step().map(|step| checkpoints_dir(&dir).join(step_name(step)));
        if let Some(best) = best.filter(|best| cadence.keep_best && matches!(files::is_dir(best), Ok(false)))
        {
            progress.forget_best(&format!("{} is not there", best.display()));
        }
        progress.start = rollback::name_of_start();
        let open = || -> Result<RunLog> {
            if world.is_main() {
                files::create_dir(&dir).context(format!("cannot make the folder {}", dir.display()))?;
                if files::exists(&dir.join(CONFIG))? || !log_files(&dir)?.is_empty() || replaces {
                    rollback::keep(&dir, &progress.start, replaces)?;
                }
                files::write_file(&dir.join(CONFIG), changes::recorded(stage, &resolved).as_bytes())?;
            }
            RunLog::create(&dir, world.rank, resumed_at.map(|step| progress.cut(step)), cadence.log_plan())
        };
        let log = agree(&world.group, open())?;
        if let Some(last) = log.last_step().filter(|last| found.own && *last < progress.logged) {
            warn!(
                "metrics.jsonl ends at step {last}, and the checkpoint is of step {}: the lines between are missing",
                progress.step
            );
        }
        if let Some(step) = progress.best_step().filter(|_| cadence.keep_best) {
            saver.keep_best(step);
        }
        let folder = dir.clone();
        saver.once_saved(replaces, Box::new(move || rollback::forget(&folder)));
        let (skipped, elapsed_before, now) = (progress.skipped_steps, progress.elapsed_s, Instant::now());
        let profile = Profile::new(cadence.profile_steps, &dir, &world.group);
        Ok(Run {
            progress,
            world,
            dir,
            profile,
            cadence,
            saver,
            log,
            signals,
            lock,
            guard: SkipGuard::new(skipped),
            started: now,
            elapsed_before,
            window: Window::begin(),
            signal: 0.0,
            last_save: Ok(()),
        })
    }
}

/// What decides in which order numbers are added: the kind of device, and the threads on it.
fn machine(world: &World) -> (String, i32) {
    match world.device {
        tch::Device::Cpu => ("cpu".into(), tch::get_num_threads()),
        _ => ("cuda".into(), 0),
    }
}

impl Found {
    /// Says what has changed since the run's last start.
    fn tell(&self, cadence: &Cadence, before: &(String, i32), world: &World) {
        let of = |class: &[Class]| -> Vec<String> {
            self.changes.iter().filter(|c| class.contains(&c.class)).map(Change::before_and_now).collect()
        };
        let changed = of(&[Class::Output, Class::Execution]);
        if !changed.is_empty() {
            info!("changed: {}", changed.join("; "));
        }
        let mut rounds = of(&[Class::Rounding]);
        let ranks = self.from.as_ref().map(|from| from.meta().world_size).filter(|n| *n != world.world_size);
        rounds.extend(
            ranks.filter(|_| self.own).map(|n| format!("ranks: before {n}, now {}", world.world_size)),
        );
        let here = machine(world);
        if before.0 != here.0 {
            rounds.push(format!("device: before {}, now {}", before.0, here.0));
        } else if before.1 != here.1 {
            rounds.push(format!("threads: before {}, now {}", before.1, here.1));
        }
        if !rounds.is_empty() {
            info!(
                "changed: {}: from here on results are equal up to rounding, not to the bit",
                rounds.join("; ")
            );
        }
        let length = of(&[Class::Length]);
        if !length.is_empty() {
            info!("changed: {}: the schedule is now one over {} steps", length.join("; "), cadence.steps);
        }
    }
}
