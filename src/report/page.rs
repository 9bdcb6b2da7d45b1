//! A page of curves: one HTML file that needs no network.

use serde_json::{Map, Value, json};

use super::run::RunRecord;
use crate::error::Result;

const PAGE: &str = include_str!("page.html");
/// <https://github.com/leeoniya/uPlot>, MIT licence (uplot/LICENSE).
const UPLOT_JS: &str = include_str!("uplot/uPlot.iife.min.js");
const UPLOT_CSS: &str = include_str!("uplot/uPlot.min.css");

/// Points of a curve at most, so that the page of a long run stays small.
const POINTS: usize = 2000;
/// Samples and traced tokens of a run at most: the last ones.
const SAMPLES: usize = 400;
const TOKENS: usize = 20_000;
/// Seconds between two looks at a run that goes on.
const RELOAD_S: u64 = 10;

/// The page of some runs. `follow`: it loads itself anew.
///
/// # Errors
/// Of kind Data: samples or traces of a run cannot be read.
pub fn page(runs: &[RunRecord], planned: Option<i64>, follow: bool) -> Result<String> {
    let names: Vec<String> = runs.iter().map(|run| run.dir.display().to_string()).collect();
    let data = runs.iter().map(|run| data(run, planned)).collect::<Result<Vec<Value>>>()?;
    // `</script>` in a sample would end the script.
    let data = Value::Array(data).to_string().replace('<', "\\u003c");
    let reload =
        if follow { format!("setTimeout(() => location.reload(), {RELOAD_S}000);") } else { String::new() };
    let title = escape(&names.join(", "));
    // Data last: what they hold is not looked into.
    let parts = [
        ("{{TITLE}}", title.as_str()),
        ("{{UPLOT_CSS}}", UPLOT_CSS),
        ("{{UPLOT_JS}}", UPLOT_JS),
        ("{{RELOAD}}", &reload),
    ];
    let page = parts.iter().fold(PAGE.to_string(), |page, (mark, text)| page.replace(mark, text));
    Ok(page.replacen("{{DATA}}", &data, 1))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// What the page's script reads of a run.
fn data(run: &RunRecord, planned: Option<i64>) -> Result<Value> {
    let (aim, _) = run.aim();
    let last_of = |mut lines: Vec<Map<String, Value>>, most: usize| {
        let skipped = lines.len().saturating_sub(most);
        lines.split_off(skipped)
    };
    Ok(json!({
        "name": run.dir.display().to_string(),
        "stage": run.stage,
        "state": run.state.name(),
        "step": run.step(),
        "steps": run.steps(),
        "aim": aim,
        "last": run.last("train", aim),
        "best": run.best().map(|(step, value)| json!([step, value])),
        "tokens_per_s": run.last("train", "tokens_per_s"),
        "peak_bytes": run.last("train", "peak_bytes"),
        "planned_bytes": planned,
        "skipped_steps": run.last("train", "skipped_steps"),
        "restarts": run.restarts(),
        "train": columns(run.of_kind("train")),
        "valid": columns(run.of_kind("valid")),
        "samples": last_of(run.samples()?, SAMPLES),
        "trace": last_of(run.trace()?, TOKENS),
        "config": flat(&run.config),
    }))
}

/// The numbers of lines, a list for each key, null where a line has none. Of many lines some are left out.
fn columns(lines: &[Map<String, Value>]) -> Map<String, Value> {
    let stride = lines.len().div_ceil(POINTS).max(1);
    let last = lines.len().saturating_sub(1);
    let taken: Vec<&Map<String, Value>> = lines
        .iter()
        .enumerate()
        .filter(|(i, _)| i % stride == 0 || *i == last)
        .map(|(_, line)| line)
        .collect();
    let mut keys: Vec<&String> = Vec::new();
    for line in &taken {
        let new =
            line.iter().filter(|(key, value)| value.is_number() && !keys.contains(key)).map(|(key, _)| key);
        let new: Vec<&String> = new.collect();
        keys.extend(new);
    }
    let column = |key: &str| {
        let values =
            taken.iter().map(|line| line.get(key).filter(|v| v.is_number()).cloned().unwrap_or(Value::Null));
        Value::Array(values.collect())
    };
    let mut columns: Map<String, Value> = keys.iter().map(|key| ((*key).clone(), column(key))).collect();
    columns.entry("step").or_insert_with(|| json!([]));
    columns
}

/// A configuration with dotted keys.
fn flat(config: &Value) -> Map<String, Value> {
    fn add(path: &str, value: &Value, into: &mut Map<String, Value>) {
        match value {
            Value::Object(entries) => {
                for (key, value) in entries {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    add(&path, value, into);
                }
            }
            other => {
                into.insert(path.to_string(), other.clone());
            }
        }
    }
    let mut keys = Map::new();
    add("", config, &mut keys);
    keys
}

#[cfg(test)]
mod tests {
    use testing::folder::TestFolder;

    use super::*;

    fn run(folder: &TestFolder, name: &str, lines: usize) -> RunRecord {
        let dir = folder.path(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("config.yaml"), "optim: {lr: 0.001}\ntrain: {steps: 10}\n").unwrap();
        let line =
            |i: usize| format!("{{\"kind\": \"train\", \"step\": {i}, \"loss\": {}}}\n", 1.0 / i as f64);
        let text: String = (1..=lines).map(line).collect();
        let valid = "{\"kind\": \"valid\", \"step\": 2, \"loss\": 0.6}\n{\"kind\": \"valid\", \"step\": 4, \"loss\": 0.7}\n{\"ki";
        std::fs::write(dir.join("metrics.jsonl"), format!("{text}{valid}")).unwrap();
        let sample = "{\"kind\": \"sample\", \"step\": 2, \"prompt\": \"</script><b>{{DATA}}\", \"response\": \"x\"}\n";
        std::fs::write(dir.join("samples.jsonl"), sample).unwrap();
        RunRecord::read(&dir).unwrap()
    }

    #[test]
    fn a_page_has_its_runs_and_is_whole() {
        let folder = TestFolder::new("report");
        let runs = [run(&folder, "a", 5), run(&folder, "b<i>", 9)];
        let page = page(&runs, Some(1), false).unwrap();
        assert!(
            !page.contains("{{TITLE}}") && !page.contains("{{RELOAD}}") && !page.contains("<b>"),
            "marks are left"
        );
        assert!(page.contains("b&lt;i&gt;"));
        assert!(!page.contains("http://") && page.matches("https://").count() == 1, "the page loads nothing");
        let begin = page.find("id=\"data\">").unwrap() + 10;
        let end = begin + page[begin..].find("</script>").unwrap();
        let data: Value = serde_json::from_str(&page[begin..end]).unwrap();
        assert_eq!(data[0]["train"]["loss"].as_array().unwrap().len(), 5);
        assert_eq!(data[1]["best"], json!([2, 0.6]));
        assert_eq!(data[0]["config"]["optim.lr"], json!(0.001));
        assert_eq!(data[0]["samples"][0]["prompt"], "</script><b>{{DATA}}");
    }

    #[test]
    fn restarts_are_where_a_new_file_of_events_was_begun() {
        let folder = TestFolder::new("report");
        let dir = folder.path("run");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("config.yaml"), "train: {steps: 10}\n").unwrap();
        let line = |(step, second): (u64, u64)| {
            format!(
                "{{\"kind\": \"train\", \"step\": {step}, \"time\": \"1970-01-01T00:00:{second}.500+00:00\"}}\n"
            )
        };
        let text: String = [(1, 10), (2, 11), (3, 30), (4, 31)].map(line).concat();
        std::fs::write(dir.join("metrics.jsonl"), text).unwrap();
        for second in [9, 29, 50] {
            std::fs::write(dir.join(format!("events.out.tfevents.{second}.host.1")), "").unwrap();
        }
        assert_eq!(RunRecord::read(&dir).unwrap().restarts(), [2]);
    }

    #[test]
    fn long_runs_are_thinned_and_keep_their_end() {
        let folder = TestFolder::new("report");
        let run = run(&folder, "long", 9_001);
        let columns = columns(run.of_kind("train"));
        let steps = columns["step"].as_array().unwrap();
        assert!(steps.len() <= POINTS + 1, "{}", steps.len());
        assert_eq!(steps.last().unwrap(), 9_001);
    }
}
