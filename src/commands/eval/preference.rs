//! Ranked completions: the share of pairs that a reward model puts in their order.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{Args, tell};
use crate::algorithms::interval::wilson;
use crate::algorithms::scorer;
use crate::checkpoint::agree;
use crate::commands::Global;
use crate::commands::inference;
use crate::commands::intake::Intake;
use crate::data::examples::Encoded;
use crate::data::odd::{OrOdd, Reason};
use crate::data::preferences;
use crate::data::readers::{self, Record};
use crate::error::{Error, Result};
use crate::files::AtomicFile;

/// A prompt's completions.
struct Ranked {
    line: Map<String, Value>,
    ranks: Vec<u32>,
}

pub(super) fn run(args: Args, global: &Global) -> Result<()> {
    let opened = args.model.open_any()?;
    let scoring = opened.scoring()?.ok_or_else(|| {
        Error::data(format!("{}: no reward model: it has an LM head", opened.dir().display()))
    })?;
    let chat = opened.chat(&args.template)?;
    let most = opened.shape().max_position_embeddings as usize;
    let read = |record: Record| {
        let example = preferences::read_and_encode(&record, &chat)?;
        match example.sequences.iter().map(|s| s.ids.len()).find(|n| *n > most) {
            None => Ok((example, record.fields)),
            Some(n) => Err(Error::data(format!(
                "{}: {n} tokens; the model has {most} positions (max_position_embeddings)",
                record.place
            )))
            .or_odd(Reason::TooLong),
        }
    };
    let (mut ranked, mut sequences) = (Vec::new(), Vec::<Encoded>::new());
    let mut intake = Intake::new(args.on_error);
    'files: for path in &args.input {
        for record in readers::records_or_errors(path, None, &Arc::default())? {
            if args.limit.is_some_and(|limit| ranked.len() == limit) {
                break 'files;
            }
            let Some((example, line)) = intake.take(record?, read)? else { continue };
            intake.note(path, &example.leftovers.unwritten);
            sequences.extend(example.sequences);
            ranked.push(Ranked { line, ranks: example.ranks });
        }
    }
    intake.check()?;
    if !ranked.iter().any(|r| r.ranks.iter().any(|rank| *rank != r.ranks[0])) {
        return Err(Error::data(format!(
            "the input has no two completions of different rank and at most {most} tokens: nothing can be compared; {}",
            intake.why_nothing()
        )));
    }
    let world = inference::join(global, &opened)?;
    intake.warn(&world);
    let mut model = opened.load(&world, args.ranks.mode)?;
    let scores = scorer::scores_of_all(&mut model, &world, scoring.score, &sequences)?;

    let (mut all, mut best, mut groups) =
        (Tally::default(), Tally::default(), BTreeMap::<String, Tally>::new());
    let (mut chosen, mut rejected, mut lines) = (0.0, 0.0, String::new());
    let mut rest = scores.as_slice();
    for Ranked { mut line, ranks } in ranked {
        let (mine, later) = rest.split_at(ranks.len());
        rest = later;
        let rewards: Vec<f64> = mine.iter().map(|score| scoring.reward(*score)).collect();
        for i in 0..ranks.len() {
            for j in (0..ranks.len()).filter(|j| ranks[i] < ranks[*j]) {
                all.count(rewards[i], rewards[j]);
                (chosen, rejected) = (chosen + rewards[i], rejected + rewards[j]);
                if ranks[i] > 0 {
                    continue;
                }
                best.count(rewards[i], rewards[j]);
                if let Some(key) = &args.by {
                    groups
                        .entry(group(&line, key, j, ranks.len()))
                        .or_default()
                        .count(rewards[i], rewards[j]);
                }
            }
        }
        line.insert("rewards".into(), json!(rewards));
        lines += &format!("{}\n", Value::Object(line));
    }
    let n = scores.len() as f64;
    let mean = scores.iter().map(|s| scoring.reward(*s)).sum::<f64>() / n;
    let variance = scores.iter().map(|s| (scoring.reward(*s) - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let pairs = all.pairs as f64;
    let mut result = all.to_json();
    let mut add = |key: &str, value: Value| result.insert(key.into(), value);
    add("task", json!("preference"));
    add("best", Value::Object(best.to_json()));
    add("margin", json!((chosen - rejected) / pairs));
    add("reward_chosen", json!(chosen / pairs));
    add("reward_rejected", json!(rejected / pairs));
    add("reward_mean", json!(mean));
    add("reward_std", json!(variance.sqrt()));
    add("too_long", json!(intake.too_long()));
    add("skipped_records", json!(intake.skipped()));
    if let Some(key) = &args.by {
        let groups: Map<String, Value> =
            groups.into_iter().map(|(value, tally)| (value, Value::Object(tally.to_json()))).collect();
        add(&format!("by_{key}"), Value::Object(groups));
    }
    let beside = || args.output.as_ref().map(|path| path.with_extension("answers.jsonl"));
    let path: Option<PathBuf> = args.answers.clone().or_else(beside);
    let write = || match &path {
        Some(path) => {
            let mut file = AtomicFile::create(path)?;
            file.put(lines.as_bytes())?;
            file.commit()
        }
        None => Ok(()),
    };
    agree(&world.group, if world.rank == 0 { write() } else { Ok(()) })?;
    tell(&args, &world, &Value::Object(result))
}

/// What a line says under `key` of its completion `worse`: an entry of a list of as many as there are completions, else
/// the value itself.
fn group(line: &Map<String, Value>, key: &str, worse: usize, completions: usize) -> String {
    let value = match line.get(key) {
        Some(Value::Array(list)) if list.len() == completions => &list[worse],
        Some(value) => value,
        None => &Value::Null,
    };
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

/// Pairs; equal rewards are not right.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    pairs: u64,
    right: u64,
    equal: u64,
}

impl Tally {
    fn count(&mut self, better: f64, worse: f64) {
        self.pairs += 1;
        self.right += u64::from(better > worse);
        self.equal += u64::from(better == worse);
    }

    fn to_json(self) -> Map<String, Value> {
        let fields = json!({
            "accuracy": (self.pairs > 0).then(|| self.right as f64 / self.pairs as f64),
            "accuracy_95": wilson(self.right, self.pairs),
            "pairs": self.pairs,
            "right": self.right,
            "equal": self.equal,
        });
        match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }
}
