//! A run's folder.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::model::checkpoint;
use super::{Depth, InspectReport, inspect, is_there, names};
use crate::algorithms::lock;
use crate::checkpoint::Best;
use crate::checkpoint::sharded::{checkpoints_dir, list};
use crate::error::{Error, Result};
use crate::files::read_error;

/// Configuration, last metrics, checkpoints, and the final models. A run is complete when its model is there.
pub fn run(dir: &Path, depth: Depth) -> Result<InspectReport> {
    let mut report = InspectReport::new("run", dir);
    let path = dir.join("config.yaml");
    let config = report.noted(config(&path)).unwrap_or_default();
    if let Some(holder) = lock::holder(dir) {
        report.fact("held_by", holder);
    }
    let steps = config.pointer("/train/steps").and_then(Value::as_u64);
    report.fact("config", config);

    let path = dir.join("metrics.jsonl");
    let (last, problems) = last_metrics(&path);
    let step = last.get("train").and_then(|r| r.get("step")).and_then(Value::as_u64);
    report.fact("last_metrics", last);
    report.problems.extend(problems);
    let events =
        names(dir)?.into_iter().filter(|n| n.starts_with("events.out.tfevents.")).collect::<Vec<_>>();
    report.fact("tensorboard", events);

    let checkpoints = checkpoints_dir(dir);
    let (mut lines, mut best) = (Vec::new(), None);
    for (step, path) in list(&checkpoints)? {
        let part = checkpoint(&path, depth)?;
        lines.push(json!({"step": step, "bytes": part.facts.get("bytes"), "complete": part.complete()}));
        report.problems.extend(part.problems().into_iter().map(str::to_string));
        best = part.facts.get("state").and_then(Best::of_state);
    }
    if let Some(best) = best {
        // As the newest checkpoint notes it.
        for line in lines.iter_mut().filter(|line| line["step"].as_u64() == best.step()) {
            line["best"] = json!(true);
        }
        report.fact("best", best.to_json());
    }
    report.fact("checkpoints", lines);
    if is_there(&checkpoints) {
        // Of a save under way, or of a process that was killed; the next start clears them.
        let unfinished: Vec<_> = names(&checkpoints)?.into_iter().filter(|n| n.starts_with('.')).collect();
        report.fact("unfinished_saves", unfinished);
    }

    for name in ["model", "critic"] {
        let path = dir.join(name);
        if is_there(&path) {
            match inspect(&path, depth) {
                Ok(part) => report.parts.push(part),
                Err(e) => report.problem(e),
            }
        } else if name == "model" {
            let at = match (step, steps) {
                (Some(step), Some(steps)) => format!("the run stands at step {step} of {steps}"),
                (Some(step), None) => format!("the run stands at step {step}"),
                (None, _) => "the run has made no step".into(),
            };
            report.problem(format!("{}: missing: {at}", path.display()));
        }
    }
    Ok(report)
}

fn config(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|e| read_error(path, &e))?;
    serde_saphyr::from_str(&text).map_err(|e| Error::data(format!("{}: {e}", path.display())))
}

/// The last line of every kind, and what is wrong with the file.
fn last_metrics(path: &Path) -> (Map<String, Value>, Vec<String>) {
    let (mut last, mut problems) = (Map::new(), Vec::new());
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) => return (last, vec![read_error(path, &e).to_string()]),
    };
    for (i, line) in BufReader::new(file).lines().enumerate() {
        let record = line.map_err(|e| e.to_string()).and_then(|l| {
            serde_json::from_str::<Map<String, Value>>(&l).map_err(|e| format!("no JSON object: {e}"))
        });
        match record {
            Ok(mut record) => {
                let kind =
                    record.remove("kind").and_then(|k| k.as_str().map(str::to_string)).unwrap_or_default();
                last.insert(kind, json!(record));
            }
            Err(e) => problems.push(format!("{}:{}: {e}", path.display(), i + 1)),
        }
    }
    (last, problems)
}
