//! Saving in the background: complete or absent.
//!
//! Training stops only while the slices are copied to host memory. A thread of each rank writes its shard into a
//! temporary folder; collectives stay on the trainer's thread, which asks at step boundaries whether all ranks are done.
//! Then rank 0 writes `meta.json` and renames the folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Instant;

use kernels::c10d::{Group, ReduceOp};
use serde_json::Value;
use tch::{Device, Tensor};

use super::agree::agree;
use super::hf::write_tokenizer;
use super::safetensors::{Entry, Writer};
use super::sharded::{
    BaseMeta, FileMeta, GroupMeta, META, Meta, PARTS, checkpoints_dir, list, shard_name, step_name,
    tensor_name,
};
use crate::config::shape::Shape;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::sharded::Sharded;
use crate::error::{Error, Result};
use crate::files::{self, beside, create_dir, write_file};
use crate::optim::AdamW;
use crate::warn;

/// What a run's checkpoints have in common.
pub struct RunInfo {
    pub shape: Shape,
    /// Hash of the resolved configuration.
    pub config_hash: String,
    /// Where what is not trained comes from; none where all is trained.
    pub base: Option<BaseMeta>,
    /// Whose files every checkpoint gets.
    pub tokenizer: Option<Tokenizer>,
}

/// A save that is complete.
#[derive(Debug, Clone, PartialEq)]
pub struct Saved {
    pub step: u64,
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
    pending: Option<Pending>,
    failed_saves: u64,
    best: Option<u64>,
}

/// A save under way.
struct Pending {
    /// Complete but for `slices` and `files`.
    meta: Meta,
    /// This rank's place in the shard group.
    rank: usize,
    size: usize,
    /// Start and length of this rank's slices; none where a replica writes them.
    slices: Option<Vec<(i64, i64)>>,
    job: Job,
    started: Instant,
}

enum Job {
    Running(JoinHandle<Result<Vec<FileMeta>>>),
    /// Nothing to write, or it failed before the start.
    Over(Result<Vec<FileMeta>>),
}

/// How a save ended, the same on all ranks.
enum Outcome {
    /// There was none under way.
    Nothing,
    Saved(Saved),
    /// Nothing is left of it.
    Failed {
        step: u64,
        error: Error,
    },
}

impl Outcome {
    /// All ranks know the outcome; rank 0 tells it.
    fn warn_if_failed(self, world: &Group) -> Option<Saved> {
        match self {
            Outcome::Nothing => None,
            Outcome::Saved(saved) => Some(saved),
            Outcome::Failed { step, error } => {
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
            pending: None,
            failed_saves: 0,
            best: None,
        })
    }

    /// Saves that failed so far.
    pub fn failed_saves(&self) -> u64 {
        self.failed_saves
    }

    /// What is not trained comes from there.
    pub fn set_base(&mut self, base: BaseMeta) {
        self.run.base = Some(base);
    }

    /// The checkpoint of `step` stays besides the newest, until another is the best.
    pub fn keep_best(&mut self, step: u64) {
        self.best = Some(step);
    }

    /// Copies the state to host memory and starts writing it. A save that is still under way is waited for first; if
    /// that one fails, a warning says so. `state` is the trainer's own, equal on all ranks. Collective if a save is
    /// under way.
    pub fn begin(&mut self, step: u64, params: &Sharded, optim: &AdamW, state: Value) -> Result<()> {
        self.complete()?.warn_if_failed(&self.world);
        let started = Instant::now();
        let (rank, size) = (params.shard_group().rank() as usize, params.shard_group().size() as usize);
        let writes = params.replica_group().rank() == 0;
        let slices = (0..params.len()).map(|i| params.slice(i)).map(|s| (s.start, s.len)).collect();
        let job = if writes {
            let path = self.temp(step).join(shard_name(rank, size));
            let tokenizer = self.run.tokenizer.clone().filter(|_| self.world.rank() == 0);
            match host_copies(params, optim) {
                Ok(copies) => Job::Running(std::thread::spawn(move || write(&path, copies, tokenizer))),
                Err(e) => Job::Over(Err(e)),
            }
        } else {
            Job::Over(Ok(Vec::new()))
        };
        let meta = Meta {
            step,
            world_size: self.world.size(),
            optimizer_step: optim.step,
            shape: self.run.shape.clone(),
            config_hash: self.run.config_hash.clone(),
            groups: (0..params.len()).map(|i| GroupMeta::of(params.layout(i))).collect(),
            slices: Vec::new(),
            files: Vec::new(),
            base: self.run.base.clone(),
            state,
        };
        self.pending = Some(Pending { meta, rank, size, slices: writes.then_some(slices), job, started });
        Ok(())
    }

    /// Completes the save if all ranks have written; does not wait for the disk. A save that failed is a warning and
    /// counts as [`Saver::failed_saves`]: the run goes on. Collective if a save is under way.
    pub fn poll(&mut self) -> Result<Option<Saved>> {
        let Some(pending) = &self.pending else { return Ok(None) };
        let done = match &pending.job {
            Job::Running(thread) => thread.is_finished(),
            Job::Over(_) => true,
        };
        let all = self.world.combine(&[f64::from(u8::from(done))], ReduceOp::Min)?[0];
        if all < 1.0 { Ok(None) } else { Ok(self.complete()?.warn_if_failed(&self.world)) }
    }

    /// Waits for the save under way and completes it. Here a save that failed is an error, on all ranks: it may have
    /// been the run's last. Collective if a save is under way.
    pub fn finish(&mut self) -> Result<Option<Saved>> {
        match self.complete()? {
            Outcome::Nothing => Ok(None),
            Outcome::Saved(saved) => Ok(Some(saved)),
            Outcome::Failed { step, error } => {
                Err(error.context(format!("the checkpoint of step {step} could not be saved")))
            }
        }
    }

    /// Waits for the save under way and completes it. An error means that ranks were lost.
    fn complete(&mut self) -> Result<Outcome> {
        let Some(Pending { mut meta, rank, size, slices, job, started }) = self.pending.take() else {
            return Ok(Outcome::Nothing);
        };
        let step = meta.step;
        let mine = match job {
            Job::Over(result) => result,
            Job::Running(thread) => thread.join().unwrap_or_else(|_| {
                Err(Error::failed(format!("the thread that wrote the checkpoint of step {step} broke down")))
            }),
        };
        let files = match agree(&self.world, mine) {
            Ok(files) => files,
            Err(error) => return self.give_up(step, error),
        };
        // Numbers of every shard rank come together: size and checksum of its file, and its slices.
        let groups = meta.groups.len();
        let row = 2 + 2 * groups;
        let mut table = vec![0.0; size * row];
        if let (Some(slices), Some(file)) = (&slices, files.first()) {
            let mine = &mut table[rank * row..(rank + 1) * row];
            (mine[0], mine[1]) = (file.bytes as f64, f64::from(file.crc32));
            for (to, (start, len)) in mine[2..].chunks_exact_mut(2).zip(slices) {
                (to[0], to[1]) = (*start as f64, *len as f64);
            }
        }
        let table = self.world.combine(&table, ReduceOp::Sum)?;
        let committed = if self.world.rank() == 0 {
            for (r, row) in table.chunks_exact(row).enumerate() {
                let (bytes, crc32) = (row[0] as u64, row[1] as u32);
                meta.files.push(FileMeta { name: shard_name(r, size), bytes, crc32 });
                meta.slices.push(row[2..].chunks_exact(2).map(|s| (s[0] as i64, s[1] as i64)).collect());
            }
            meta.files.extend(files.into_iter().skip(1));
            self.commit(&meta)
        } else {
            Ok(())
        };
        if let Err(error) = agree(&self.world, committed) {
            return self.give_up(step, error);
        }
        if self.world.rank() == 0
            && let Err(e) = self.prune(step)
        {
            warn!("old checkpoints stay: {e}");
        }
        let path = self.dir.join(step_name(step));
        Ok(Outcome::Saved(Saved { step, path, elapsed_s: started.elapsed().as_secs_f64() }))
    }

    fn temp(&self, step: u64) -> PathBuf {
        beside(&self.dir.join(step_name(step)), ".tmp-")
    }

    /// Rank 0: everything is written, so the checkpoint may have its name.
    fn commit(&self, meta: &Meta) -> Result<()> {
        let temp = self.temp(meta.step);
        for file in &meta.files {
            let path = temp.join(&file.name);
            let bytes = fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
            if bytes != file.bytes {
                return Err(Error::failed(format!(
                    "{}: {} bytes were written, rank 0 sees {bytes}: checkpoints must lie on a file system that all \
                     nodes share",
                    path.display(),
                    file.bytes
                )));
            }
        }
        write_file(&temp.join(META), meta.to_text()?.as_bytes())?;
        files::replace_dir(&temp, &self.dir.join(step_name(meta.step)))?;
        // The first save has made the folder of checkpoints.
        files::sync_dir(files::parent(&self.dir))
    }

    /// Rank 0: leaves the newest and the best. What is newer than this step belongs to a history that was given up by resuming
    /// from an older checkpoint.
    fn prune(&self, step: u64) -> Result<()> {
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
    fn give_up(&mut self, step: u64, error: Error) -> Result<Outcome> {
        self.failed_saves += 1;
        let temp = self.temp(step);
        if self.world.rank() == 0 && temp.exists() {
            // The error that brought us here is what counts; the next start removes what cannot be removed now.
            let _ = fs::remove_dir_all(&temp);
        }
        // Nobody starts the next save while files are being removed.
        self.world.barrier()?;
        Ok(Outcome::Failed { step, error })
    }
}

/// Copies in host memory, by name in the file.
fn host_copies(params: &Sharded, optim: &AdamW) -> Result<Vec<(Entry, Tensor)>> {
    let mut copies = Vec::with_capacity(params.len() * PARTS.len());
    for i in 0..params.len() {
        let group = &params.layout(i).name;
        for (part, t) in PARTS.into_iter().zip([&params.master(i), &optim.exp_avg[i], &optim.exp_avg_sq[i]]) {
            let mut copy = Tensor::f_empty(t.size(), (t.kind(), Device::Cpu))?;
            tch::no_grad(|| copy.f_copy_(t))?;
            let entry = Entry { name: tensor_name(group, part), kind: t.kind(), shape: t.size() };
            copies.push((entry, copy));
        }
    }
    Ok(copies)
}

/// Writes a shard, and on rank 0 the tokenizer. Returns the files, the shard first.
fn write(path: &Path, copies: Vec<(Entry, Tensor)>, tokenizer: Option<Tokenizer>) -> Result<Vec<FileMeta>> {
    let dir = files::parent(path);
    create_dir(dir)?;
    let entries: Vec<Entry> = copies.iter().map(|(entry, _)| entry.clone()).collect();
    let mut writer = Writer::create(path, &entries)?;
    for (_, copy) in copies {
        writer.write(&copy)?;
    }
    let written = writer.finish()?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut files = vec![FileMeta { name, bytes: written.bytes, crc32: written.crc32 }];
    if let Some(tokenizer) = tokenizer {
        let written = write_tokenizer(&tokenizer, dir)?;
        files.extend(written.into_iter().map(|(name, bytes, crc32)| FileMeta { name, bytes, crc32 }));
    }
    Ok(files)
}

/// Removes the temporary folders of killed runs, and puts back a checkpoint that was being replaced.
fn remove_leftovers(dir: &Path) -> Result<()> {
    if !dir.is_dir() {
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
