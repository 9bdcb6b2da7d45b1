//! `trace.jsonl`: every token of some samples of a run that learns from its own responses.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::InspectReport;
use crate::error::Result;
use crate::files::read_error;

/// What is told of a token, in the order of columns.
const COLUMNS: [&str; 9] = [
    "token",
    "logprob_old",
    "logprob_new",
    "logprob_reference",
    "kl",
    "value",
    "reward",
    "advantage",
    "return",
];

/// How many tokens of which steps there are, and those of the last step's samples: `tokens` is a table.
pub fn trace(path: &Path) -> Result<InspectReport> {
    let mut report = InspectReport::new("trace", path);
    let file = File::open(path).map_err(|e| read_error(path, &e))?;
    let (mut steps, mut last, mut count) = (BTreeSet::new(), Vec::<Map<String, Value>>::new(), 0u64);
    for (i, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|e| read_error(path, &e))?;
        let Ok(token) = serde_json::from_str::<Map<String, Value>>(&line) else {
            report.problems.push(format!("{}:{}: no JSON object", path.display(), i + 1));
            continue;
        };
        let Some(step) = token.get("step").and_then(Value::as_u64) else {
            report.problems.push(format!("{}:{}: no `step`", path.display(), i + 1));
            continue;
        };
        if steps.insert(step) {
            last.clear();
        }
        last.push(token);
        count += 1;
    }
    report.fact("num_tokens", count);
    report.fact("steps", json!(steps));
    report.fact("columns", COLUMNS.join(" "));
    let row = |token: &Map<String, Value>| {
        let cell = |key: &&str| match token.get(*key) {
            Some(Value::String(text)) => format!("{text:?}"),
            Some(Value::Number(n)) => format!("{:.4}", n.as_f64().unwrap_or(f64::NAN)),
            _ => "none".into(),
        };
        let place = |key: &str| token.get(key).and_then(Value::as_u64).unwrap_or(0);
        let cells: Vec<String> = COLUMNS.iter().map(cell).collect();
        json!({"sample": place("sample"), "position": place("position"), "is": cells.join(" ")})
    };
    report.fact("tokens", last.iter().map(row).collect::<Vec<Value>>());
    Ok(report)
}
