//! Until the first save of a start stands, what the start has replaced in the run's folder can be put back.
//!
//! A start that goes back in time, or replaces a run, cuts `metrics.jsonl`, samples and events, and writes another
//! `config.yaml`. Before that, links to the old files are kept in `RUN_DIR/.before-start`. The first save removes this folder,
//! and newer checkpoints with it; a start that finds it puts everything back, since the one before never came to a save.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::manifest::read_meta;
use crate::checkpoint::sharded::{checkpoints_dir, list};
use crate::error::{Context, Error, Result};
use crate::files::{self, AtomicFolder, beside, read_error, write_error};
use crate::telemetry::log_files;

/// The folder's name in the run's.
const KEPT: &str = ".before-start";
const STATE: &str = "start.json";
pub const CONFIG: &str = "config.yaml";

/// What a run that replaces another removes of it, besides the checkpoints.
pub const MODELS: [&str; 3] = ["model", "critic", "ema"];

/// What a start is about to replace.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct ReplacedRun {
    /// Tells this start from all others; its checkpoints carry it.
    start: String,
    /// The run is replaced: its checkpoints and models go as well.
    everything: bool,
    /// Names and sizes of the files that were there.
    files: Vec<(String, u64)>,
}

/// A name for this start of a run.
pub fn name_of_start() -> String {
    format!("{} {}", chrono::Utc::now().format("%Y-%m-%dT%H:%M:%S%.6fZ"), std::process::id())
}

/// The `config.yaml` of the run that the folder holds: where a start has replaced it and never came to a save, the old one.
pub fn config_path(dir: &Path) -> Result<PathBuf> {
    let kept = dir.join(KEPT).join(CONFIG);
    Ok(if files::exists(&kept)? { kept } else { dir.join(CONFIG) })
}

/// Whether a start has replaced files of the run and has not come to a save.
pub fn can_be_undone(dir: &Path) -> Result<bool> {
    Ok(read(&dir.join(KEPT))?.is_some_and(|kept| last_save(dir, &kept).is_ok_and(|save| save.is_none())))
}

/// The last save that the start has come to.
fn last_save(dir: &Path, kept: &ReplacedRun) -> Result<Option<u64>> {
    let checkpoints = list(&checkpoints_dir(dir))?;
    Ok(checkpoints.iter().rev().find(|(_, path)| is_of_start(path, kept)).map(|(step, _)| *step))
}

fn is_of_start(checkpoint: &Path, kept: &ReplacedRun) -> bool {
    read_meta(checkpoint).is_ok_and(|m| m.state.get("start").and_then(Value::as_str) == Some(&kept.start))
}

/// Keeps what `start` is about to replace in the run's folder.
pub fn keep(dir: &Path, start: &str, everything: bool) -> Result<()> {
    let mut names = log_files(dir)?;
    names.push(CONFIG.to_string());
    let folder = AtomicFolder::create(&dir.join(KEPT), |_| true)?;
    let mut files = Vec::new();
    for name in names {
        // A symbolic link is kept as what it points to; what is no file, such as a device, holds nothing.
        let Ok(path) = dir.join(&name).canonicalize() else { continue };
        let size = fs::metadata(&path).map_err(|e| read_error(&path, &e))?;
        if size.is_file() {
            link_or_copy(&path, &folder.temporary().join(&name))?;
            files.push((name, size.len()));
        }
    }
    let kept = ReplacedRun { start: start.to_string(), everything, files };
    let text = serde_json::to_string(&kept).map_err(|e| Error::failed(e.to_string()))?;
    files::write_file(&folder.temporary().join(STATE), text.as_bytes())?;
    folder.commit()
}

/// The first save of the start stands: what it replaced goes.
pub fn forget(dir: &Path) -> Result<()> {
    let path = dir.join(KEPT);
    let Some(kept) = read(&path)? else { return Ok(()) };
    if kept.everything {
        for old in MODELS.map(|name| dir.join(name)) {
            if files::exists(&old)? {
                files::remove_dir(&old)?;
            }
        }
    }
    files::remove_dir(&path)
}

/// Puts back what a start has replaced that never came to a save.
pub fn undo(dir: &Path) -> Result<()> {
    let path = dir.join(KEPT);
    // What a killed process left within the moves of these folders.
    files::recover(&path)?;
    for name in MODELS.iter().chain(&[KEPT]) {
        let trash = beside(&dir.join(name), ".trash-");
        if trash.exists() {
            fs::remove_dir_all(&trash).map_err(|e| write_error(&trash, &e))?;
        }
    }
    let Some(kept) = read(&path)? else { return Ok(()) };
    if let Some(last) = last_save(dir, &kept)? {
        // It did come to a save, and was killed before it had tidied up.
        for (step, path) in list(&checkpoints_dir(dir))? {
            if step > last || (kept.everything && !is_of_start(&path, &kept)) {
                files::remove_dir(&path)?;
            }
        }
        return forget(dir);
    }
    for name in log_files(dir)?.iter().filter(|name| !kept.files.iter().any(|(file, _)| file == *name)) {
        let new = dir.join(name);
        fs::remove_file(&new).context(format!("cannot remove {}", new.display()))?;
    }
    for (name, size) in &kept.files {
        let (old, here) = (path.join(name), dir.join(name));
        put_back(&old, &here, *size).map_err(|e| write_error(&here, &e))?;
    }
    files::sync_dir(dir)?;
    files::remove_dir(&path)
}

fn read(path: &Path) -> Result<Option<ReplacedRun>> {
    let state = path.join(STATE);
    match fs::read_to_string(&state) {
        Ok(text) => {
            let kept = serde_json::from_str(&text);
            kept.map(Some).map_err(|e| Error::data(format!("{}: {e}", state.display())))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(read_error(&state, &e)),
    }
}

/// `here` is again what was kept as `old`, of `size` bytes; may be done twice.
fn put_back(old: &Path, here: &Path, size: u64) -> io::Result<()> {
    let id = |m: fs::Metadata| (m.dev(), m.ino());
    if fs::metadata(here).ok().map(id) != fs::metadata(old).ok().map(id) {
        let temp = beside(here, ".tmp-");
        let _ = fs::remove_file(&temp);
        fs::hard_link(old, &temp).or_else(|_| fs::copy(old, &temp).map(drop))?;
        fs::rename(&temp, here)?;
    }
    // A file that was not replaced has grown.
    let file = File::options().write(true).open(here)?;
    if file.metadata()?.len() > size {
        file.set_len(size)?;
    }
    file.sync_all()
}

fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    let copied = || fs::copy(from, to).and_then(|_| File::open(to)?.sync_all());
    fs::hard_link(from, to).or_else(|_| copied()).map_err(|e| write_error(to, &e))
}
