//! A run on this rank: where it stands, its metrics, checkpoints and end.

use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::Instant;

use kernels::comm::ReduceOp;
use kernels::ops;
use serde::{Deserialize, Serialize};

use crate::algorithms::base::RunLength;
use crate::algorithms::lock::RunLock;
use crate::algorithms::profile::Profile;
use crate::algorithms::step::{SkipGuard, Update};
use crate::checkpoint::{Best, Checkpoint, Metric, SavedPart, Saver, sharded};
use crate::config::changes::Change;
use crate::config::common::Common;
use crate::config::sections::{Compute, Valid};
use crate::distributed::agree::agree;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::signals::Signals;
use crate::telemetry::{LogCut, LogPlan, MetricsLine, RunLog};
use crate::{info, warn};

/// What a checkpoint holds besides parameters and moments; `D` is the position in the data.
#[derive(Debug, Serialize, Deserialize)]
pub struct TrainingProgress<D> {
    /// Updates so far.
    pub step: u64,
    pub data: D,
    #[serde(default)]
    best: Best,
    /// The run ended before its last step.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    ended: bool,
    /// The validation after the last step was due and is not done: a signal came within it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    owes_validation: bool,
    /// The last step whose line of metrics was written.
    #[serde(default)]
    pub(super) logged: u64,
    /// The start of the run that made the checkpoint.
    #[serde(default)]
    pub(super) start: String,
    /// The device and the number of threads that it was computed with.
    #[serde(default)]
    pub(super) machine: Option<(String, i32)>,
    /// The checkpoint of another folder that the run in this one went on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) begun_from: Option<PathBuf>,
    /// Tokens read so far, over all ranks.
    pub tokens: u64,
    pub skipped_steps: u64,
    pub elapsed_s: f64,
}

impl<D> TrainingProgress<D> {
    /// The start of a run.
    pub fn new(data: D) -> Self {
        TrainingProgress {
            step: 0,
            data,
            best: Best::default(),
            ended: false,
            owes_validation: false,
            logged: 0,
            start: String::new(),
            machine: None,
            begun_from: None,
            tokens: 0,
            skipped_steps: 0,
            elapsed_s: 0.0,
        }
    }

    /// The step of the best validation so far.
    pub(super) fn best_step(&self) -> Option<u64> {
        self.best.step()
    }

    /// What of the log a run that goes on at `step` cuts off.
    pub(super) fn cut(&self, step: u64) -> LogCut {
        LogCut { after: step, validation: self.owes_validation }
    }

    /// In the folder of another run it goes on without what belongs to the one that it came from.
    pub(super) fn move_to_another_folder(&mut self, from: &Path) {
        self.forget_best("its checkpoint stays in the folder that the run came from");
        self.ended = false;
        self.begun_from = from.canonicalize().ok();
    }

    /// The best validation so far, if there is one, is no measure for this run any more: what comes may be the best.
    pub(super) fn forget_best(&mut self, why: &str) {
        if let Some(best) = std::mem::take(&mut self.best).text() {
            warn!("the best validation so far ({best}) does not count from here on: {why}");
        }
    }

    /// Takes the changes of the configuration since the start before into account.
    pub(super) fn go_on(&mut self, changes: &[Change]) {
        let changed = |keys: &[&str]| changes.iter().any(|c| keys.iter().any(|key| c.key.starts_with(key)));
        if changed(&["data.valid", "valid.batches"]) {
            self.forget_best("the validation data has changed");
        }
        if changed(&["data.valid", "valid.", "train.steps", "train.epochs"]) {
            self.ended = false;
        }
    }
}

/// How long a run is, and when it logs and saves.
#[derive(Debug, Clone, Copy)]
pub struct Cadence {
    pub steps: u64,
    pub log_every: i64,
    pub checkpoint_every: i64,
    /// Steps of which a timeline is recorded.
    pub profile_steps: i64,
    /// The checkpoint of the best validation stays.
    pub keep_best: bool,
    /// Decides how losses are printed: in the precision that they were computed in.
    pub compute: Compute,
    /// See [`LogPlan::clip`].
    pub clip: f64,
    /// Tells the epoch of a step.
    pub length: RunLength,
}

/// A training run on this rank.
pub struct Run<'a, D> {
    pub progress: TrainingProgress<D>,
    pub(super) world: &'a World,
    pub(super) dir: PathBuf,
    pub(super) cadence: Cadence,
    pub(super) saver: Saver,
    pub(super) log: RunLog,
    pub(super) profile: Profile,
    pub(super) signals: Signals,
    /// Of the run's folder, on rank 0.
    pub(super) lock: Option<RunLock>,
    pub(super) guard: SkipGuard,
    pub(super) started: Instant,
    pub(super) elapsed_before: f64,
    pub(super) window: Window,
    /// The signal that a rank has received, 0 if none.
    pub(super) signal: f64,
    /// How the run's last save ended.
    pub(super) last_save: Result<()>,
}

/// What happened since the last line of metrics.
pub struct Window {
    started: Instant,
    tokens: u64,
    steps: u64,
    /// Products in 8-bit floats that this process had taken before.
    float8_products: u64,
}

impl Window {
    /// Begins now.
    pub fn begin() -> Window {
        Window { started: Instant::now(), tokens: 0, steps: 0, float8_products: ops::float8_products() }
    }
}

/// Tells once that 8-bit floats were asked for and not used.
static NO_FLOAT8: Once = Once::new();

/// What follows from a step.
pub struct Stepped {
    /// A line of metrics is due; the keys that every training step has.
    pub record: Option<MetricsLine>,
    /// Tokens a second of the window, over all ranks.
    pub tokens_per_s: f64,
}

impl Cadence {
    /// Of a run of that length.
    pub fn new(c: &Common, length: RunLength) -> Cadence {
        Cadence {
            steps: length.steps,
            clip: c.optim.clip,
            length,
            log_every: c.log.every,
            checkpoint_every: c.checkpoint.every,
            profile_steps: c.profile.steps,
            keep_best: c.valid.keeps_best(),
            compute: c.precision.compute,
        }
    }

    pub(super) fn log_plan(&self) -> LogPlan {
        LogPlan { steps: self.steps, every: self.log_every as u64, clip: self.clip }
    }
}

impl<D: Serialize> Run<'_, D> {
    /// All steps were done, or the run ended early.
    pub fn done(&self) -> bool {
        self.progress.ended || self.progress.step >= self.cadence.steps
    }

    /// Whether something that is done every `every` steps, and after the last one, is due; 0: never.
    pub fn due(&self, every: i64) -> bool {
        every > 0 && (self.progress.step.is_multiple_of(every as u64) || self.done())
    }

    /// Counts an update on `tokens` tokens of all ranks. The record that is due has the keys of every training step;
    /// the algorithm adds its own and logs it. Collective.
    ///
    /// # Errors
    /// The third skipped step in a row, after the save under way is complete: it may hold what was last finite.
    pub fn stepped(&mut self, tokens: u64, update: &Update, lr: f64) -> Result<Stepped> {
        let progress = &mut self.progress;
        progress.step += 1;
        progress.tokens += tokens;
        progress.elapsed_s = self.elapsed_before + self.started.elapsed().as_secs_f64();
        self.window.tokens += tokens;
        self.window.steps += 1;
        let fatal = self.guard.note(progress.step, update);
        progress.skipped_steps = self.guard.skipped_steps;

        // Ranks decide together: a signal that reached one of them stops all, and so does a folder that is gone.
        let lost = self.check_folder().is_err();
        let mine = [self.signals.received(), self.world.peak_bytes()? as f64, f64::from(u8::from(lost))];
        let most = self.world.group.combine(&mine, ReduceOp::Max)?;
        self.signal = most[0];
        if most[2] > 0.0 {
            agree(&self.world.group, self.check_folder())?;
        }
        let seconds = self.window.started.elapsed().as_secs_f64();
        let tokens_per_s = self.window.tokens as f64 / seconds;
        let due = self.due(self.cadence.log_every) || update.skipped || fatal.is_err();
        let record = due.then(|| {
            let record = self
                .with_loss(MetricsLine::new("train", self.progress.step), update.loss)
                .float("lr", lr)
                .float("grad_norm", update.grad_norm)
                .float("epoch", self.cadence.length.epochs(self.progress.step))
                .count("tokens", self.progress.tokens)
                .float("tokens_per_s", tokens_per_s)
                .float("step_s", seconds / self.window.steps as f64)
                .float("elapsed_s", self.progress.elapsed_s)
                .count("peak_bytes", most[1] as u64)
                .count("skipped_steps", self.guard.skipped_steps);
            let record = match self.cadence.compute {
                Compute::Float8 => {
                    let products = ops::float8_products() - self.window.float8_products;
                    if products == 0 {
                        NO_FLOAT8.call_once(|| {
                            warn!(
                                "precision.compute is float8, but no product was taken in 8-bit floats: each has a side below \
                                 float8.min_size, or one that is no multiple of 16"
                            );
                        });
                    }
                    record.count("fp8_products", products)
                }
                _ => record,
            };
            match self.saver.failed_saves() {
                0 => record,
                n => record.count("failed_saves", n),
            }
        });
        if let Err(e) = fatal {
            record.iter().for_each(|r| self.log.log(r));
            self.saver.finish()?;
            return Err(e);
        }
        if record.is_some() {
            self.progress.logged = self.progress.step;
            self.restart_window();
        }
        if self.profile.stepped()? {
            self.restart_window();
        }
        Ok(Stepped { record, tokens_per_s })
    }

    /// Whether the folder is still this run's (rank 0).
    fn check_folder(&self) -> Result<()> {
        self.lock.as_ref().map_or(Ok(()), RunLock::check)
    }

    /// Whether a signal asks for the end of the run, also while it validates. Collective.
    pub fn interrupted(&mut self) -> Result<bool> {
        let mine = self.signals.received().max(self.signal);
        self.signal = self.world.group.combine(&[mine], ReduceOp::Max)?[0];
        Ok(self.signal > 0.0)
    }

    /// A signal came within the validation: the run that goes on does it anew. There is no best one to save.
    pub fn owe_validation(&mut self) -> Result<bool> {
        self.progress.owes_validation = true;
        Ok(false)
    }

    /// Whether the validation after the last step is still to be done; asked before the first step.
    pub fn owes_validation(&mut self) -> bool {
        std::mem::take(&mut self.progress.owes_validation)
    }

    /// Adds a loss, in the precision that it was computed in.
    pub fn with_loss(&self, record: MetricsLine, loss: f64) -> MetricsLine {
        match self.cadence.compute {
            Compute::Float64 => record.float("loss", loss),
            Compute::Float32 | Compute::Bfloat16 | Compute::Float8 => record.float32("loss", loss as f32),
        }
    }

    /// Writes a line of metrics (rank 0).
    pub fn log(&mut self, record: &MetricsLine) {
        self.log.log(record);
    }

    /// A generated sample: a line of samples.jsonl, and a text for TensorBoard under `tag` (rank 0).
    pub fn log_sample(&mut self, record: &MetricsLine, tag: &str, text: &str) {
        self.log.log_sample(record, tag, text);
    }

    /// A token of a sample: a line of trace.jsonl (rank 0).
    pub fn log_trace(&mut self, record: &MetricsLine) {
        self.log.log_trace(record);
    }

    /// Speeds count from here: what was done since the last step (validation, samples) is no training.
    pub fn restart_window(&mut self) {
        self.window = Window::begin();
    }

    /// Notes a validation. Returns whether its checkpoint is to be saved; ends the run where too many in a row were not
    /// better.
    pub fn note_validation(&mut self, metric: Metric, value: f64, valid: &Valid) -> bool {
        let (step, best) = (self.progress.step, &mut self.progress.best);
        best.keep(valid.keeps_best());
        let is_best = best.note(step, metric, value);
        self.log.report_validation(is_best);
        if is_best {
            if best.kept() {
                self.saver.keep_best(step);
            }
            return best.kept();
        }
        if valid.patience > 0 && best.worse() >= valid.patience {
            let worse = best.worse();
            match best.step() {
                Some(at) => {
                    info!("the validation was best at step {at}, {worse} validations ago: the run ends here");
                }
                None => info!("none of {worse} validations gave a finite value: the run ends here"),
            }
            // Told to the checkpoint, so that a restart does not go on.
            self.progress.ended = true;
        }
        false
    }

    /// Completes a save that is written, and begins one where it is due (or `now`). Collective.
    ///
    /// # Errors
    /// A signal asked for the end of the run, whose checkpoint is then written.
    pub fn save(&mut self, models: &[SavedPart], now: bool) -> Result<()> {
        self.saver.poll()?;
        let step = self.progress.step;
        if now || self.due(self.cadence.checkpoint_every) || self.signal > 0.0 {
            let state = serde_json::to_value(&self.progress).map_err(|e| Error::failed(e.to_string()))?;
            self.saver.sync_with_next(self.log.files());
            self.saver.begin(step, models, state)?;
            self.log.report_on_terminal(|| format!("checkpoint step {step}"));
        }
        if self.signal > 0.0 && (!self.done() || self.progress.owes_validation) {
            self.profile.end()?;
            self.saver.finish()?;
            return Err(self.signals.stopped(self.signal, step));
        }
        Ok(())
    }

    /// Where the run keeps its best checkpoint, and that is not of this step: sets the models by `load` to what they were then.
    /// Waits for the last save. Collective.
    pub fn take_best(&mut self, load: impl FnOnce(&Checkpoint) -> Result<()>) -> Result<()> {
        self.last_save = self.saver.finish().map(drop);
        let Some(step) = self.progress.best.step().filter(|_| self.cadence.keep_best) else { return Ok(()) };
        if step == self.progress.step {
            return Ok(());
        }
        let path = sharded::checkpoints_dir(&self.dir).join(sharded::step_name(step));
        // Ranks decide together, whatever each sees of the file system.
        let there = f64::from(u8::from(path.is_dir()));
        if self.world.group.combine(&[there], ReduceOp::Min)?[0] < 1.0 {
            if self.world.is_main() {
                warn!("{}, the best checkpoint, is missing: the last model is exported", path.display());
            }
            return Ok(());
        }
        load(&agree(&self.world.group, Checkpoint::open(&path))?)?;
        Ok(())
    }

    /// Waits for the last save, and writes the trained model by `export` to `RUN_DIR/model`: also where the last
    /// checkpoint could not be written, since it needs less room. Collective.
    pub fn finish(mut self, export: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        agree(&self.world.group, self.check_folder())?;
        self.profile.end()?;
        let saved = self.saver.finish();
        let dir = self.dir.join("model");
        let exported = export(&dir);
        std::mem::replace(&mut self.last_save, Ok(())).and(saved)?;
        exported?;
        agree(&self.world.group, self.check_folder())?;
        self.saver.end(self.progress.step);
        drop(self.log);
        info!("the trained model is in {}", dir.display());
        Ok(())
    }
}
