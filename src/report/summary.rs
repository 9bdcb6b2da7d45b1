//! What a run says at its end.

use std::path::Path;

use super::curve;
use super::run::RunRecord;
use crate::telemetry::progress::duration;

/// Characters of the curve.
const COLUMNS: usize = 60;
const ROWS: usize = 4;

/// The text at the end of a run: time, speed, memory (`planned`: bytes of the device by the plan, without the process itself),
/// the curve of its metric, and the next command.
pub fn at_end(run: &RunRecord, planned: Option<i64>) -> String {
    let mut text = String::new();
    let (key, _) = run.aim();
    // The first steps of a new model would take the whole height.
    let mut series = run.series("train", key);
    let series = series.split_off(series.len() / 20);
    if let Some(drawn) = curve::draw(&series, COLUMNS, ROWS) {
        text += &format!("{key} of steps {} to {}\n{drawn}\n", series[0].0, run.step());
    }
    let mut facts = vec![format!("{} steps", run.step())];
    facts.extend(run.last("train", "elapsed_s").map(|s| format!("in {}", duration(s))));
    let mut line = facts.join(" ");
    if let (Some(tokens), Some(seconds)) = (run.last("train", "tokens"), run.last("train", "elapsed_s"))
        && seconds > 0.0
    {
        line += &format!(", {:.0} tokens/s", tokens / seconds);
    }
    let size = |bytes: f64| match bytes < 1e9 {
        true => format!("{:.0} MB", bytes / 1e6),
        false => format!("{:.2} GB", bytes / 1e9),
    };
    if let Some(peak) = run.last("train", "peak_bytes") {
        line += &format!("; peak memory {}", size(peak));
        if let Some(planned) = planned.filter(|bytes| *bytes > 0) {
            line += &format!(" (planned {}, plus the process)", size(planned as f64));
        }
    }
    text += &format!("{line}\n");
    if let Some(sample) = last_sample(run) {
        text += &format!("a sample: {sample}\n");
    }
    text + &next_commands(run).join("\n")
}

/// The commands that make sense next, with what each does.
fn next_commands(run: &RunRecord) -> Vec<String> {
    let dir = run.dir.display();
    let mut next = Vec::new();
    let mut add = |what: &str, command: String| next.push(format!("{what:<10} {command}"));
    match run.stage.as_str() {
        "pretrain" => add("try it:", format!("corral generate --model {dir} --prompt \"...\"")),
        "reward" => {
            add("try it:", format!("corral score --model {dir} --input FILE.jsonl --output scores.jsonl"))
        }
        _ => add("try it:", format!("corral chat --model {dir}")),
    }
    let valid =
        run.config.pointer("/data/valid/0").map(|v| v["path"].as_str().or(v.as_str()).unwrap_or("FILE"));
    if let Some(valid) = valid {
        let (task, more) = match run.stage.as_str() {
            "reward" | "dpo" | "kto" => ("preference", ""),
            _ => ("perplexity", ""),
        };
        if !["ppo", "grpo", "online-dpo"].contains(&run.stage.as_str()) {
            add("measure:", format!("corral eval --task {task} --model {dir} --input {valid}{more}"));
        }
    }
    if run.has_adapters() {
        add("merge:", format!("corral merge --adapter {dir} --output {dir}-merged"));
    }
    add("look:", format!("corral report {dir}"));
    next
}

/// The last sample, on one line.
fn last_sample(run: &RunRecord) -> Option<String> {
    let samples = run.samples().ok()?;
    let last = samples.last()?;
    let short = |key: &str, most: usize, end: bool| {
        let text = last.get(key)?.as_str()?.split_whitespace().collect::<Vec<_>>().join(" ");
        let (count, skipped) = (text.chars().count(), text.chars().count().saturating_sub(most));
        Some(match (count > most, end) {
            (false, _) => text,
            (true, true) => format!("...{}", text.chars().skip(skipped).collect::<String>()),
            (true, false) => format!("{}...", text.chars().take(most).collect::<String>()),
        })
    };
    Some(format!("{} -> {}", short("prompt", 60, true)?, short("response", 120, false)?))
}

/// One line of `corral runs`: folder, stage, state, step, last and best value, age.
pub fn row(run: &RunRecord, below: &Path) -> [String; 7] {
    let (key, _) = run.aim();
    let number = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.4}"));
    let steps = run.steps().map_or(String::new(), |steps| format!("/{steps}"));
    let age = run.changed.and_then(|at| at.elapsed().ok());
    [
        run.dir.strip_prefix(below).unwrap_or(&run.dir).display().to_string(),
        run.stage.clone(),
        run.state.name().into(),
        format!("{}{steps}", run.step()),
        format!("{key} {}", number(run.last("train", key))),
        run.best().map_or("-".into(), |(step, best)| format!("{best:.4} at {step}")),
        age.map_or("-".into(), |age| duration(age.as_secs_f64())),
    ]
}
