//! Ranked completions: the share of pairs that a model puts in their order.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{Args, tell, write_answers};
use crate::algorithms::interval::wilson;
use crate::algorithms::scorer;
use crate::commands::Global;
use crate::commands::inference::{self, OpenedModel};
use crate::commands::intake::Intake;
use crate::commands::score::{self, Sequence};
use crate::data::examples::Encoded;
use crate::data::odd::{OrOdd, Reason};
use crate::data::preferences;
use crate::data::readers::{self, Record};
use crate::distributed::world::World;
use crate::error::{Error, Result};

/// A prompt's completions.
struct RankedRecord {
    line: Map<String, Value>,
    ranks: Vec<u32>,
}

pub(super) fn run(args: Args, global: &Global) -> Result<()> {
    let opened = args.model.open_any()?;
    let scoring = opened.scoring()?;
    let reference = match (&args.reference, &scoring) {
        (None, _) => None,
        (Some(_), Some(_)) => {
            return Err(Error::config(format!(
                "--reference is for language models, and {} is a reward model: leave it out",
                opened.dir().display()
            )));
        }
        (Some(path), None) => Some(open_reference(path, &args, &opened)?),
    };
    let models = [("--model", Some(&opened)), ("--reference", reference.as_ref())];
    let models: Vec<(&str, &OpenedModel)> = models.into_iter().filter_map(|(o, m)| Some((o, m?))).collect();
    let mut intake = Intake::new(args.on_error);
    let (ranked, sequences) = read(&args, &models, &mut intake)?;
    let world = inference::join_with(global, &models, args.ranks)?;
    intake.warn(&world);
    let rewards: Vec<f64> = match &scoring {
        Some(scoring) => {
            let mut model = opened.load(&world, args.ranks)?;
            let scores = scorer::scores_of_all(&mut model, &world, scoring.score, &sequences)?;
            scores.into_iter().map(|score| scoring.reward(score)).collect()
        }
        None => log_probabilities(&models, &args, &world, &sequences)?,
    };
    let compared = match (&scoring, &reference) {
        (Some(_), _) => "rewards",
        (None, None) => "logprobs",
        (None, Some(_)) => "logratios",
    };
    let (mut result, lines) = tally(ranked, &rewards, args.by.as_deref());
    result.insert("task".into(), json!("preference"));
    result.insert("compared".into(), json!(compared));
    result.insert("too_long".into(), json!(intake.too_long()));
    result.insert("skipped_records".into(), json!(intake.skipped()));
    write_answers(&args, &world, &lines)?;
    tell(&args, &world, &Value::Object(result))
}

/// Opens the reference, which must read the same tokens.
fn open_reference(path: &Path, args: &Args, opened: &OpenedModel) -> Result<OpenedModel> {
    let reference = args.model.open_beside(path).map_err(|e| e.context("--reference"))?;
    if !opened.tokenizer()?.knows_tokens_of(reference.tokenizer()?) {
        return Err(Error::data(format!(
            "{} and {} have different tokenizers: their log-probabilities cannot be compared",
            opened.dir().display(),
            reference.dir().display()
        )));
    }
    Ok(reference)
}

/// The prompts of the input, and the sequences of their completions, one prompt's after the other's.
fn read(
    args: &Args,
    models: &[(&str, &OpenedModel)],
    intake: &mut Intake,
) -> Result<(Vec<RankedRecord>, Vec<Encoded>)> {
    let chat = models[0].1.chat(&args.template)?;
    let read = |record: Record| {
        let example = preferences::read_and_encode(&record, &chat)?;
        let (place, line) = (record.place, record.fields);
        match example.sequences.iter().find_map(|sequence| unfit(sequence, models)) {
            None => Ok((example, line)),
            Some((reason, why)) => Err(Error::data(format!("{place}: {why}"))).or_odd(reason),
        }
    };
    let (mut ranked, mut sequences) = (Vec::new(), Vec::new());
    'files: for path in &args.input {
        for record in readers::records_or_errors(path, None, &Arc::default())? {
            if args.limit.is_some_and(|limit| ranked.len() == limit) {
                break 'files;
            }
            let Some((example, line)) = intake.take(record?, read)? else { continue };
            intake.note(path, &example.leftovers.unwritten);
            sequences.extend(example.sequences);
            ranked.push(RankedRecord { line, ranks: example.ranks });
        }
    }
    intake.check()?;
    if !ranked.iter().any(|r| r.ranks.iter().any(|rank| *rank != r.ranks[0])) {
        return Err(Error::data(format!(
            "the input has no two completions of different rank that fit: nothing can be compared; {}",
            intake.why_nothing()
        )));
    }
    Ok((ranked, sequences))
}

/// Why one of the models cannot judge the sequence.
fn unfit(sequence: &Encoded, models: &[(&str, &OpenedModel)]) -> Option<(Reason, String)> {
    let n = sequence.ids.len();
    models.iter().find_map(|(option, model)| {
        let (shape, dir) = (model.shape(), model.dir().display());
        let unknown = sequence.ids.iter().find(|id| i64::from(**id) >= shape.vocab_size);
        if n as i64 > shape.max_position_embeddings {
            let most = shape.max_position_embeddings;
            let why = format!("{n} tokens; {option} {dir} has {most} positions (max_position_embeddings)");
            Some((Reason::TooLong, why))
        } else if let Some(id) = unknown {
            Some((Reason::Format, format!("token id {id} is not in the vocabulary of {option} {dir}")))
        } else if shape.predicts().is_ok() && !sequence.supervised.iter().skip(1).any(|s| *s) {
            Some((
                Reason::Format,
                "a completion has no token that counts: there is nothing to compare".into(),
            ))
        } else {
            None
        }
    })
}

/// What the rewards say of the pairs: the result, and the lines with their completions' rewards.
fn tally(ranked: Vec<RankedRecord>, rewards: &[f64], by: Option<&str>) -> (Map<String, Value>, String) {
    let (mut all, mut best, mut groups) =
        (PreferenceTally::default(), PreferenceTally::default(), BTreeMap::<String, PreferenceTally>::new());
    let (mut chosen, mut rejected, mut lines) = (0.0, 0.0, String::new());
    let mut rest = rewards;
    for RankedRecord { mut line, ranks } in ranked {
        let (mine, later) = rest.split_at(ranks.len());
        rest = later;
        for i in 0..ranks.len() {
            for j in (0..ranks.len()).filter(|j| ranks[i] < ranks[*j]) {
                all.count(mine[i], mine[j]);
                (chosen, rejected) = (chosen + mine[i], rejected + mine[j]);
                if ranks[i] > 0 {
                    continue;
                }
                best.count(mine[i], mine[j]);
                if let Some(key) = by {
                    groups.entry(group(&line, key, j, ranks.len())).or_default().count(mine[i], mine[j]);
                }
            }
        }
        line.insert("rewards".into(), json!(mine));
        lines += &format!("{}\n", Value::Object(line));
    }
    let n = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / n;
    let variance = rewards.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let pairs = all.pairs as f64;
    let mut result = all.to_json();
    let mut add = |key: &str, value: Value| result.insert(key.into(), value);
    add("best", Value::Object(best.to_json()));
    add("margin", json!((chosen - rejected) / pairs));
    add("reward_chosen", json!(chosen / pairs));
    add("reward_rejected", json!(rejected / pairs));
    add("reward_mean", json!(mean));
    add("reward_std", json!(variance.sqrt()));
    if let Some(key) = by {
        let groups: Map<String, Value> =
            groups.into_iter().map(|(value, tally)| (value, Value::Object(tally.to_json()))).collect();
        add(&format!("by_{key}"), Value::Object(groups));
    }
    (result, lines)
}

/// Sums of the log-probabilities of the completions' tokens by the first model, less those by the second, if there is one.
/// Collective.
fn log_probabilities(
    models: &[(&str, &OpenedModel)],
    args: &Args,
    world: &World,
    sequences: &[Encoded],
) -> Result<Vec<f64>> {
    let sequences: Vec<Sequence> = sequences.iter().map(Sequence::supervised).collect();
    let mut sums = vec![0.0; sequences.len()];
    for ((_, opened), sign) in models.iter().zip([1.0, -1.0]) {
        let mut model = opened.load(world, args.ranks)?;
        for (sum, logprobs) in sums.iter_mut().zip(score::score(&mut model, world, &sequences)?) {
            *sum += sign * logprobs.iter().sum::<f64>();
        }
    }
    match sums.iter().all(|x| x.is_finite()) {
        true => Ok(sums),
        false => Err(Error::failed(
            "a log-probability is not finite: a model's weights may be damaged, or have diverged",
        )),
    }
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
struct PreferenceTally {
    pairs: u64,
    right: u64,
    equal: u64,
}

impl PreferenceTally {
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
