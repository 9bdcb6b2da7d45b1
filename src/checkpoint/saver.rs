//! Saving in the background: complete or absent.
//!
//! Training stops only while the slices are copied to host memory. A thread of each rank writes its shard into a
//! temporary folder; collectives stay on the trainer's thread, which asks at step boundaries whether all ranks are done.
//! Then rank 0 writes `meta.json` and renames the folder.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Instant;

use kernels::comm::{Group, ReduceOp};
use serde_json::Value;
use tch::Tensor;

use super::hf::write_tokenizer;
use super::manifest::{BaseMeta, FileMeta, GroupMeta, META, Meta, shard_name};
use super::model_record::ModelRecord;
use super::ours::Scoring;
use super::safetensors::{SafetensorsWriter, TensorEntry};
use super::sharded::{checkpoints_dir, list, step_name};
use super::staging::Staging;
use crate::config::shape::Shape;
use crate::config::template_date::TemplateDate;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::agree::agree;
use crate::distributed::sharded::Sharded;
use crate::error::{Error, Result};
use crate::files::{self, beside, create_dir, write_file};
use crate::optim::AdamW;
use crate::warn;

/// What a run's checkpoints have in common.
pub struct RunInfo {
    /// Hash of the resolved configuration.
    pub config_hash: String,
    /// Whose files every checkpoint gets.
    pub tokenizer: Option<Tokenizer>,
}

impl RunInfo {
    fn template_date(&self) -> Option<TemplateDate> {
        let tokenizer = self.tokenizer.as_ref()?;
        tokenizer.told_date().map(|_| tokenizer.template_date())
    }
}

/// A model in a checkpoint.
pub struct SavedPart<'a> {
    /// Its folder in the checkpoint's; empty for the first part, which lies in the checkpoint's own.
    pub name: &'a str,
    /// Of the model.
    pub shape: &'a Shape,
    /// Where what is not trained comes from; none where all is trained.
    pub base: Option<&'a BaseMeta>,
    /// Of a reward model.
    pub scoring: Option<&'a Scoring>,
    /// The parameters, of which this rank writes its slices.
    pub params: &'a Sharded,
    /// None for a model that is not trained itself.
    pub optim: Option<&'a AdamW>,
}

/// A save that is complete.
#[derive(Debug, Clone, PartialEq)]
pub struct Saved {
    /// Updates before the checkpoint.
    pub step: u64,
    /// The checkpoint's folder.
    pub path: PathBuf,
    /// From the start of the copy to the rename, in seconds.
    pub elapsed_s: f64,
}

/// Saves a run's checkpoints. All ranks make the same calls in the same order.
pub struct Saver {
    dir: PathBuf,
    keep: usize,
    world: Group,
    run: RunInfo,
    models: Vec<ModelRecord>,
    pending: Option<Pending>,
    /// Where copies from a GPU lie while they are written.
    staging: Staging,
    failed_saves: u64,
    /// The best step, whose checkpoint stays once it is complete, and until then the one before, which is.
    next_best: Option<u64>,
    best: Option<u64>,
    first: Option<FirstSave>,
    logs: Vec<File>,
}

/// What rank 0 does when the first save stands.
struct FirstSave {
    /// The checkpoints that were there are another run's, and go.
    replaces: bool,
    then: Box<dyn FnOnce() -> Result<()> + Send>,
}

/// A save under way.
struct Pending {
    step: u64,
    parts: Vec<PendingPart>,
    job: SaveJob,
    started: Instant,
}

struct PendingPart {
    name: String,
    /// Complete but for `slices` and `files`.
    meta: Meta,
    /// This rank's file among those of all stages.
    rank: usize,
    size: usize,
    /// Start and length of this rank's slices; none where a replica writes them.
    slices: Option<Vec<(i64, i64)>>,
}

/// What a thread has written: the files of every part, its shard first.
type SaveResult = Vec<Vec<FileMeta>>;

enum SaveJob {
    Running(JoinHandle<Result<SaveResult>>),
    /// It failed before the start.
    Over(Result<SaveResult>),
}

/// How a save ended, the same on all ranks.
enum SaveOutcome {
    /// There was none under way.
    Nothing,
    Saved(Saved),
    /// Nothing is left of it.
    Failed {
        step: u64,
        error: Error,
    },
}

impl SaveOutcome {
    /// All ranks know the outcome; rank 0 tells it.
    fn warn_if_failed(self, world: &Group) -> Option<Saved> {
        match self {
            SaveOutcome::Nothing => None,
            SaveOutcome::Saved(saved) => Some(saved),
            SaveOutcome::Failed { step, error } => {
                if world.rank() == 0 {
                    warn!(
                        "the checkpoint of step {step} could not be saved, the run goes on without it: {error}"
                    );
                }
                None
            }
        }
    }
}

impl Saver {
    /// For checkpoints under `run_dir` (on a file system that all ranks share), of which the `keep` newest stay (at
    /// least 1). Removes what killed runs have left; look for the newest checkpoint after this. Collective.
    pub fn new(run_dir: &Path, keep: usize, run: RunInfo, world: &Group) -> Result<Saver> {
        let dir = checkpoints_dir(run_dir);
        agree(world, if world.rank() == 0 { remove_leftovers(&dir) } else { Ok(()) })?;
        Ok(Saver {
            dir,
            keep: keep.max(1),
            world: world.clone(),
            run,
            models: Vec::new(),
            pending: None,
            failed_saves: 0,
            staging: Staging::default(),
            next_best: None,
            best: None,
            first: None,
            logs: Vec::new(),
        })
    }

    /// Calls `then` on rank 0 when the first save stands, and what it has replaced is removed: checkpoints of later steps, with
    /// `replaces` all others.
    pub fn once_saved(&mut self, replaces: bool, then: Box<dyn FnOnce() -> Result<()> + Send>) {
        self.first = Some(FirstSave { replaces, then });
    }

    /// Notes a model that the run began with, for all checkpoints.
    pub fn add_model(&mut self, model: ModelRecord) {
        self.models.push(model);
    }

    /// Saves that failed so far.
    pub fn failed_saves(&self) -> u64 {
        self.failed_saves
    }

    /// The end of a run at `step`: one that had nothing left to do has saved nothing, and has given nothing up unless there are
    /// checkpoints of later steps.
    pub fn end(&mut self, step: u64) {
        let newer = || list(&self.dir).is_ok_and(|list| list.last().is_some_and(|(last, _)| *last > step));
        if self.world.rank() == 0
            && self.first.is_some()
            && !newer()
            && let Some(Err(e)) = self.first.take().map(|first| (first.then)())
        {
            warn!("{e}");
        }
    }

    /// Files that are brought to the disk before the checkpoint that is begun next gets its name.
    pub fn sync_with_next(&mut self, logs: Vec<File>) {
        self.logs = logs;
    }

    /// The checkpoint of `step` stays besides the newest, until that of another best one is complete.
    pub fn keep_best(&mut self, step: u64) {
        self.next_best = Some(step);
    }

    /// Copies the state to host memory and starts writing it. A save that is still under way is waited for first; if
    /// that one fails, a warning says so. `state` is the trainer's own, equal on all ranks. Collective if a save is
    /// under way.
    pub fn begin(&mut self, step: u64, models: &[SavedPart], state: Value) -> Result<()> {
        self.complete()?.warn_if_failed(&self.world);
        let started = Instant::now();
        let names: Vec<String> = models.iter().skip(1).map(|m| m.name.to_string()).collect();
        let mut parts = Vec::new();
        self.staging.begin(models)?;
        let mut jobs = Ok(Vec::new());
        for (i, model) in models.iter().enumerate() {
            let params = model.params;
            // As `Meta::slices` has them.
            let (shard, tensor) = (params.shard_group(), &params.sharding().tensor);
            let stage = &params.sharding().pipeline.axis;
            let rank = ((stage.rank * shard.size() + shard.rank()) * tensor.size + tensor.rank) as usize;
            let size = (stage.size * shard.size() * tensor.size) as usize;
            let writes = params.replica_group().rank() == 0;
            let slices =
                (0..params.len()).map(|i| params.written_slice(i)).map(|s| (s.start, s.len)).collect();
            let meta = Meta {
                step,
                world_size: self.world.size(),
                optimizer_step: model.optim.map_or(0, |o| o.step),
                shape: model.shape.clone(),
                config_hash: self.run.config_hash.clone(),
                groups: (0..params.len()).map(|i| GroupMeta::of(params.layout(i))).collect(),
                tensor: tensor.size as usize,
                slices: Vec::new(),
                files: Vec::new(),
                base: model.base.cloned(),
                scoring: model.scoring.cloned(),
                models: if i == 0 { self.models.clone() } else { Vec::new() },
                parts: if i == 0 { names.clone() } else { Vec::new() },
                template_date: self.run.template_date(),
                state: if i == 0 { state.clone() } else { Value::Null },
            };
            let name = model.name.to_string();
            let tokenizer = self.run.tokenizer.clone().filter(|_| self.world.rank() == 0 && i == 0);
            let path = self.temp(step).join(&name).join(shard_name(rank, size));
            jobs = jobs.and_then(|mut jobs: Vec<Option<ToWrite>>| {
                jobs.push(match writes {
                    true => {
                        let copies = self.staging.copies(params, model.optim)?;
                        Some(ToWrite { path, copies, tokenizer })
                    }
                    false => None,
                });
                Ok(jobs)
            });
            parts.push(PendingPart { name, meta, rank, size, slices: writes.then_some(slices) });
        }
        // Also where a copy failed: others are under way.
        let waited = self.staging.wait();
        let jobs = jobs.and_then(|jobs| waited.map(|()| jobs));
        let logs = std::mem::take(&mut self.logs);
        let job = match jobs {
            Ok(jobs) => {
                let write = move || {
                    // What is no file, such as a device, cannot be brought to the disk; a line that is lost is counted.
                    logs.iter().for_each(|log| drop(log.sync_all()));
                    jobs.into_iter().map(|job| job.map_or(Ok(Vec::new()), ToWrite::write)).collect()
                };
                let thread = std::thread::Builder::new().name("saver".into()).spawn(write);
                thread.map_or_else(|e| SaveJob::Over(Err(e.into())), SaveJob::Running)
            }
            Err(e) => SaveJob::Over(Err(e)),
        };
        self.pending = Some(Pending { step, parts, job, started });
        Ok(())
    }

    /// Completes the save if all ranks have written; does not wait for the disk. A save that failed is a warning and
    /// counts as [`Saver::failed_saves`]: the run goes on. Collective if a save is under way.
    pub fn poll(&mut self) -> Result<Option<Saved>> {
        let Some(pending) = &self.pending else { return Ok(None) };
        let done = match &pending.job {
            SaveJob::Running(thread) => thread.is_finished(),
            SaveJob::Over(_) => true,
        };
        let all = self.world.combine(&[f64::from(u8::from(done))], ReduceOp::Min)?[0];
        if all < 1.0 { Ok(None) } else { Ok(self.complete()?.warn_if_failed(&self.world)) }
    }

    /// Waits for the save under way and completes it. Here a save that failed is an error, on all ranks: it may have
    /// been the run's last. Collective if a save is under way.
    pub fn finish(&mut self) -> Result<Option<Saved>> {
        match self.complete()? {
            SaveOutcome::Nothing => Ok(None),
            SaveOutcome::Saved(saved) => Ok(Some(saved)),
            SaveOutcome::Failed { step, error } => {
                Err(error.context(format!("the checkpoint of step {step} could not be saved")))
            }
        }
    }

    /// Waits for the save under way and completes it. An error means that ranks were lost.
    fn complete(&mut self) -> Result<SaveOutcome> {
        let Some(Pending { step, mut parts, job, started }) = self.pending.take() else {
            return Ok(SaveOutcome::Nothing);
        };
        let mine = match job {
            SaveJob::Over(result) => result,
            SaveJob::Running(thread) => thread.join().unwrap_or_else(|_| {
                Err(Error::failed(format!("the thread that wrote the checkpoint of step {step} panicked")))
            }),
        };
        let files = match agree(&self.world, mine) {
            Ok(files) => files,
            Err(error) => return self.give_up(step, error),
        };
        // Numbers of every shard rank come together: size and checksum of its file, and its slices.
        let row = |part: &PendingPart| 2 + 2 * part.meta.groups.len();
        let mut table = Vec::new();
        for (part, files) in parts.iter().zip(&files) {
            let (first, row) = (table.len(), row(part));
            table.resize(first + part.size * row, 0.0);
            if let (Some(slices), Some(file)) = (&part.slices, files.first()) {
                let mine = &mut table[first + part.rank * row..][..row];
                (mine[0], mine[1]) = (file.bytes as f64, f64::from(file.crc32));
                for (to, (start, len)) in mine[2..].chunks_exact_mut(2).zip(slices) {
                    (to[0], to[1]) = (*start as f64, *len as f64);
                }
            }
        }
        let table = self.world.combine(&table, ReduceOp::Sum)?;
        let committed = if self.world.rank() == 0 {
            let mut rest = table.as_slice();
            for (part, files) in parts.iter_mut().zip(files) {
                let row = row(part);
                let (rows, after) = rest.split_at(part.size * row);
                rest = after;
                for (r, row) in rows.chunks_exact(row).enumerate() {
                    let (name, bytes, crc32) = (shard_name(r, part.size), row[0] as u64, row[1] as u32);
                    part.meta.files.push(FileMeta { name, bytes, crc32 });
                    let slices = row[2..].chunks_exact(2).map(|s| (s[0] as i64, s[1] as i64));
                    part.meta.slices.push(slices.collect());
                }
                part.meta.files.extend(files.into_iter().skip(1));
            }
            self.commit(step, &parts)
        } else {
            Ok(())
        };
        if let Err(error) = agree(&self.world, committed) {
            return self.give_up(step, error);
        }
        if self.world.rank() == 0
            && let Err(e) = self.tidy_up(step)
        {
            warn!("old checkpoints were not removed: {e}");
        }
        let path = self.dir.join(step_name(step));
        Ok(SaveOutcome::Saved(Saved { step, path, elapsed_s: started.elapsed().as_secs_f64() }))
    }

    fn temp(&self, step: u64) -> PathBuf {
        beside(&self.dir.join(step_name(step)), ".tmp-")
    }

    /// Rank 0: everything is written, so the checkpoint may have its name.
    fn commit(&self, step: u64, parts: &[PendingPart]) -> Result<()> {
        let temp = self.temp(step);
        for part in parts {
            let dir = temp.join(&part.name);
            for file in &part.meta.files {
                let path = dir.join(&file.name);
                let bytes = fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
                if bytes != file.bytes {
                    return Err(Error::failed(format!(
                        "{}: {} bytes were written, rank 0 sees {bytes}: checkpoints must lie on a file system that \
                         all nodes share",
                        path.display(),
                        file.bytes
                    )));
                }
            }
            write_file(&dir.join(META), part.meta.to_text()?.as_bytes())?;
        }
        files::replace_dir(&temp, &self.dir.join(step_name(step)))?;
        // The first save has made the folder of checkpoints.
        files::sync_dir(files::parent(&self.dir))
    }

    /// Rank 0: removes what a save that stands makes superfluous.
    fn tidy_up(&mut self, step: u64) -> Result<()> {
        if self.first.as_ref().is_some_and(|first| first.replaces) {
            for (_, path) in list(&self.dir)?.into_iter().filter(|(s, _)| *s != step) {
                files::remove_dir(&path)?;
            }
        }
        self.prune(step)?;
        self.first.take().map_or(Ok(()), |first| (first.then)())
    }

    /// Rank 0: leaves the newest and the best. What is newer than this step belongs to a history that was given up by resuming
    /// from an older checkpoint.
    fn prune(&mut self, step: u64) -> Result<()> {
        let complete = |step: &u64| self.dir.join(step_name(*step)).is_dir();
        self.best = self.next_best.filter(complete).or(self.best);
        let mut kept = 0;
        for (s, path) in list(&self.dir)?.into_iter().rev() {
            if s <= step && kept < self.keep {
                kept += 1;
            } else if s > step || self.best != Some(s) {
                files::remove_dir(&path)?;
            }
        }
        Ok(())
    }

    /// Removes what was written of a save that failed.
    fn give_up(&mut self, step: u64, error: Error) -> Result<SaveOutcome> {
        self.failed_saves += 1;
        let temp = self.temp(step);
        if self.world.rank() == 0 && temp.exists() {
            // The error that brought us here is what counts; the next start removes what cannot be removed now.
            let _ = fs::remove_dir_all(&temp);
        }
        // Nobody starts the next save while files are being removed.
        self.world.barrier()?;
        Ok(SaveOutcome::Failed { step, error })
    }
}

/// This rank's shard of a part, and on rank 0 the tokenizer.
struct ToWrite {
    path: PathBuf,
    copies: Vec<(TensorEntry, Tensor)>,
    tokenizer: Option<Tokenizer>,
}

impl ToWrite {
    /// Returns the files, the shard first.
    fn write(self) -> Result<Vec<FileMeta>> {
        let dir = files::parent(&self.path);
        create_dir(dir)?;
        let entries: Vec<TensorEntry> = self.copies.iter().map(|(entry, _)| entry.clone()).collect();
        let mut writer = SafetensorsWriter::create(&self.path, &entries)?;
        for (_, copy) in self.copies {
            writer.write(&copy)?;
        }
        let written = writer.finish()?;
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut files = vec![FileMeta { name, bytes: written.bytes, crc32: written.crc32 }];
        if let Some(tokenizer) = self.tokenizer {
            let written = write_tokenizer(&tokenizer, dir)?;
            files.extend(written.into_iter().map(|(name, bytes, crc32)| FileMeta { name, bytes, crc32 }));
        }
        Ok(files)
    }
}

/// Removes the temporary folders of killed runs, and puts back a checkpoint that was being replaced.
fn remove_leftovers(dir: &Path) -> Result<()> {
    if !files::is_dir(dir)? {
        return Ok(());
    }
    for entry in fs::read_dir(dir).map_err(|e| files::read_error(dir, &e))? {
        let path = entry.map_err(|e| files::read_error(dir, &e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(step) = name.strip_prefix(".old-").or(name.strip_prefix(".tmp-")) {
            files::recover(&dir.join(step))?;
        } else if name.starts_with(".trash-") {
            fs::remove_dir_all(&path).map_err(|e| files::write_error(&path, &e))?;
        }
    }
    Ok(())
}
