//! The metrics, samples and state of a run's folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Map, Value};

use crate::algorithms::lock;
use crate::checkpoint::Best;
use crate::checkpoint::sharded::{Checkpoint, checkpoints_dir, list};
use crate::config::changes::noted_stage;
use crate::error::{Error, Result};
use crate::files::read_error;
use crate::telemetry::tensorboard::starts;

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// A process holds the folder.
    Running,
    /// The trained model is there.
    Done,
    /// Neither: it was stopped, or has failed. `--resume auto` goes on.
    Stopped,
}

impl RunState {
    /// The state in a word.
    pub fn name(self) -> &'static str {
        match self {
            RunState::Running => "running",
            RunState::Done => "done",
            RunState::Stopped => "stopped",
        }
    }
}

/// What the folder of a run holds.
#[derive(Debug)]
pub struct RunRecord {
    /// The folder.
    pub dir: PathBuf,
    /// The subcommand; empty where the configuration does not name it.
    pub stage: String,
    /// The resolved configuration.
    pub config: Value,
    /// The lines of metrics.jsonl by their kinds, in order.
    pub metrics: BTreeMap<String, Vec<Map<String, Value>>>,
    /// How far it is.
    pub state: RunState,
    /// When metrics.jsonl was written last.
    pub changed: Option<SystemTime>,
}

impl RunRecord {
    /// Reads the folder of a run. Lines that are no JSON object are left out: the last one may be half written.
    ///
    /// # Errors
    /// Of kind Data: the folder holds no run, or its files cannot be read.
    pub fn read(dir: &Path) -> Result<RunRecord> {
        let path = dir.join("config.yaml");
        let text = std::fs::read_to_string(&path).map_err(|e| match dir.is_dir() {
            true => {
                Error::data(format!("{}: not the folder of a run: {}", dir.display(), read_error(&path, &e)))
            }
            false => read_error(dir, &e),
        })?;
        let config: Value =
            serde_saphyr::from_str(&text).map_err(|e| Error::data(format!("{}: {e}", path.display())))?;
        let path = dir.join("metrics.jsonl");
        let mut metrics: BTreeMap<String, Vec<Map<String, Value>>> = BTreeMap::new();
        for mut line in lines(&path)? {
            let kind = line.remove("kind").and_then(|k| k.as_str().map(str::to_string)).unwrap_or_default();
            metrics.entry(kind).or_default().push(line);
        }
        let state = match (lock::holder(dir), dir.join("model").is_dir()) {
            (Some(_), _) => RunState::Running,
            (None, true) => RunState::Done,
            (None, false) => RunState::Stopped,
        };
        let changed = RunRecord::changed_at(dir);
        let stage = noted_stage(&text).unwrap_or_default().to_string();
        Ok(RunRecord { dir: dir.to_path_buf(), stage, config, metrics, state, changed })
    }

    /// When the metrics in a folder were written last.
    pub fn changed_at(dir: &Path) -> Option<SystemTime> {
        std::fs::metadata(dir.join("metrics.jsonl")).and_then(|m| m.modified()).ok()
    }

    /// Whether a folder holds a run.
    pub fn is_run(dir: &Path) -> bool {
        dir.join("config.yaml").is_file() && dir.join("metrics.jsonl").is_file()
    }

    /// The lines of a kind.
    pub fn of_kind(&self, kind: &str) -> &[Map<String, Value>] {
        self.metrics.get(kind).map_or(&[], Vec::as_slice)
    }

    /// Step and value of a key in the lines of a kind, where it is a number.
    pub fn series(&self, kind: &str, key: &str) -> Vec<(u64, f64)> {
        let point = |line: &Map<String, Value>| Some((line.get("step")?.as_u64()?, line.get(key)?.as_f64()?));
        self.of_kind(kind).iter().filter_map(point).collect()
    }

    /// The last value of a key in the lines of a kind.
    pub fn last(&self, kind: &str, key: &str) -> Option<f64> {
        self.of_kind(kind).iter().rev().find_map(|line| line.get(key)?.as_f64())
    }

    /// The steps after which the run was started again: each start has a file of TensorBoard's, and each step its time.
    pub fn restarts(&self) -> Vec<u64> {
        let timed = |line: &Map<String, Value>| {
            let time = chrono::DateTime::parse_from_rfc3339(line.get("time")?.as_str()?).ok()?;
            Some((time.timestamp(), line.get("step")?.as_u64()?))
        };
        let steps: Vec<(i64, u64)> = self.of_kind("train").iter().filter_map(timed).collect();
        // Before a start there must be a step, and after it another one.
        let after = |start: i64| {
            let next = steps.iter().position(|(time, _)| *time >= start).filter(|next| *next > 0)?;
            Some(steps[next - 1].1)
        };
        let mut restarts: Vec<u64> = starts(&self.dir).into_iter().skip(1).filter_map(after).collect();
        restarts.dedup();
        restarts
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.of_kind("train").last().and_then(|line| line.get("step")?.as_u64()).unwrap_or(0)
    }

    /// Steps of the whole run, where the configuration counts steps.
    pub fn steps(&self) -> Option<u64> {
        self.config.pointer("/train/steps").and_then(Value::as_u64)
    }

    /// The metric that the stage is about, and whether more of it is better: the reward of responses, else the loss.
    pub fn aim(&self) -> (&'static str, bool) {
        match self.of_kind("train").last().is_some_and(|line| line.contains_key("response_tokens")) {
            true => ("reward", true),
            false => ("loss", false),
        }
    }

    /// Step and value of the best validation.
    pub fn best(&self) -> Option<(u64, f64)> {
        let (key, more) = self.aim();
        let better = |a: &f64, b: &f64| if more { a.total_cmp(b) } else { b.total_cmp(a) };
        self.series("valid", key).into_iter().max_by(|(_, a), (_, b)| better(a, b))
    }

    /// The best validation and the last one, and which of them is exported, as the newest checkpoint notes them; none without
    /// a validation or a checkpoint.
    pub fn best_and_last(&self) -> Option<String> {
        let checkpoints = list(&checkpoints_dir(&self.dir)).ok()?;
        let (newest, path) = checkpoints.last()?;
        let best = Best::of_checkpoint(&Checkpoint::open(path).ok()?)?;
        // A best checkpoint that was taken away was forgotten.
        let there =
            best.step().is_some_and(|step| step == *newest || checkpoints.iter().any(|(s, _)| *s == step));
        if best.kept() && !there {
            return None;
        }
        let [of_best, of_last] = if best.kept() { [" (exported)", ""] } else { ["", " (exported)"] };
        Some(format!("best: {}{of_best}; last: {}{of_last}", best.text()?, best.last_text()))
    }

    /// The lines of samples.jsonl; none where there is no such file.
    ///
    /// # Errors
    /// Of kind Data: the file cannot be read.
    pub fn samples(&self) -> Result<Vec<Map<String, Value>>> {
        lines(&self.dir.join("samples.jsonl"))
    }

    /// The lines of trace.jsonl; none where there is no such file.
    ///
    /// # Errors
    /// Of kind Data: the file cannot be read.
    pub fn trace(&self) -> Result<Vec<Map<String, Value>>> {
        lines(&self.dir.join("trace.jsonl"))
    }

    /// Whether the run trains adapters.
    pub fn has_adapters(&self) -> bool {
        self.config["lora"].is_object() || self.config["actor"]["lora"].is_object()
    }
}

/// The JSON objects of a file, a line each; none where it is missing or no regular file.
fn lines(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(read_error(path, &e)),
    };
    let mut found = Vec::new();
    // A pipe or a device has no end.
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        return Ok(found);
    }
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|e| read_error(path, &e))?;
        found.extend(serde_json::from_str::<Map<String, Value>>(&line));
    }
    Ok(found)
}
