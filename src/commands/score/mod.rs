//! `corral score`: log-probabilities of texts, or rewards, a line in, a line out.

pub mod reward;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::c10d::ReduceOp;
use serde_json::{Value, json};
use tch::{Device, Tensor};

use crate::checkpoint::agree;
use crate::commands::Global;
use crate::commands::inference::{self, ModelArgs, Opened, RanksArgs, TemplateArgs};
use crate::config::shape::Shape;
use crate::data::readers::{self, Record};
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::files::AtomicFile;
use crate::model::{Input, Llama, LmHead};

/// Tokens, padding included, that one forward reads at most (one row may be longer).
const BATCH_TOKENS: usize = 8192;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    ranks: RanksArgs,
    #[command(flatten)]
    template: TemplateArgs,
    /// JSON lines: `input_ids`, else `prompt` and `completion`, else `text`; for a reward model also other conversations
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// The same lines with `token_ids`, `logprobs` (of every token but the first; with a prompt, of the completion's
    /// tokens: those of the last of `token_ids`) and `sum_logprob`, in nats; of a reward model with `token_ids`, `score`
    /// and `reward`, the normalised score
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// A line's tokens; those from `first` on are scored.
struct Sequence {
    ids: Vec<i64>,
    first: usize,
}

pub fn run(args: Args, global: &Global) -> Result<()> {
    let lines: Vec<Record> = readers::records(&args.input, None, &Arc::default())?.collect::<Result<_>>()?;
    let opened = args.model.open_any()?;
    if let Some(scoring) = opened.scoring()? {
        return reward::run(&args, lines, &opened, &scoring, global);
    }
    if args.template.chat_template.is_some() {
        return Err(Error::config("--chat-template is for reward models: others score texts as they are"));
    }
    let sequences = lines.iter().map(|line| sequence(line, &opened)).collect::<Result<Vec<_>>>()?;
    let world = inference::join(global)?;
    let mut model = opened.load(&world, args.ranks.mode)?;
    let logprobs = score(&mut model, &world, &sequences)?;
    agree(
        &world.group,
        if world.rank == 0 { write(&args.output, lines, &sequences, logprobs) } else { Ok(()) },
    )
}

fn write(path: &Path, lines: Vec<Record>, sequences: &[Sequence], logprobs: Vec<Vec<f64>>) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    for ((mut line, sequence), logprobs) in lines.into_iter().zip(sequences).zip(logprobs) {
        if logprobs.iter().any(|x| !x.is_finite()) {
            return Err(Error::failed(format!(
                "{}: a log-probability is not finite: the model is damaged",
                line.place
            )));
        }
        line.fields.insert("token_ids".into(), json!(sequence.ids));
        line.fields.insert("sum_logprob".into(), json!(logprobs.iter().fold(0.0, |sum, x| sum + x)));
        line.fields.insert("logprobs".into(), json!(logprobs));
        file.put(format!("{}\n", Value::Object(line.fields)).as_bytes())?;
    }
    file.commit()
}

fn sequence(line: &Record, opened: &Opened) -> Result<Sequence> {
    let sequence = tokens(line, opened).map_err(|e| match e.message.contains(&line.place.to_string()) {
        true => e,
        false => e.context(&line.place),
    })?;
    check(line, &sequence.ids, opened.shape())?;
    Ok(sequence)
}

/// Refuses tokens that the model cannot read.
fn check(line: &Record, ids: &[i64], shape: &Shape) -> Result<()> {
    let (n, most) = (ids.len(), shape.max_position_embeddings);
    if n as i64 > most {
        return Err(Error::data(format!(
            "{}: {n} tokens; the model has {most} positions (max_position_embeddings): shorten the line",
            line.place
        )));
    }
    match ids.iter().find(|id| !(0..shape.vocab_size).contains(*id)) {
        None => Ok(()),
        Some(id) => Err(Error::data(format!(
            "{}: token id {id} is not in the model's vocabulary of {}",
            line.place, shape.vocab_size
        ))),
    }
}

/// A line's own token ids, if it has any.
fn input_ids(line: &Record) -> Result<Option<Vec<i64>>> {
    let Some(ids) = line.fields.get("input_ids") else { return Ok(None) };
    let ids = ids.as_array().and_then(|ids| ids.iter().map(Value::as_i64).collect::<Option<Vec<_>>>());
    ids.map(Some).ok_or_else(|| Error::data(format!("{}: input_ids is no list of token ids", line.place)))
}

fn tokens(line: &Record, opened: &Opened) -> Result<Sequence> {
    if let Some(ids) = input_ids(line)? {
        return Ok(Sequence { ids, first: 1 });
    }
    let tokenizer = opened.tokenizer()?;
    if !line.fields.contains_key("prompt") && !line.fields.contains_key("completion") {
        if !line.fields.contains_key("text") {
            let keys: Vec<&str> = line.fields.keys().map(String::as_str).collect();
            return Err(Error::data(format!(
                "{}: needs `input_ids`, `prompt` and `completion`, or `text`; keys here: {}",
                line.place,
                if keys.is_empty() { "none".into() } else { keys.join(", ") }
            )));
        }
        return Ok(Sequence { ids: inference::encode(tokenizer, line.text("text")?, true)?, first: 1 });
    }
    let (prompt, completion) = (line.text("prompt")?, line.text("completion")?);
    let mut ids = inference::encode(tokenizer, prompt, true)?;
    let first = ids.len();
    if first == 0 {
        return Err(Error::data(format!(
            "{}: the prompt is empty, and the tokenizer adds nothing to it: the first token cannot be scored; use `text`",
            line.place
        )));
    }
    // The completion's tokens are what follows the prompt's in the whole text. Where the tokenizer joins them over
    // the boundary, it is taken by itself.
    let whole = inference::encode(tokenizer, &format!("{prompt}{completion}"), true)?;
    match whole.strip_prefix(ids.as_slice()) {
        Some(rest) => ids.extend(rest),
        None => ids.extend(inference::encode(tokenizer, completion, false)?),
    }
    Ok(Sequence { ids, first })
}

/// Log-probabilities of every sequence's scored tokens, on all ranks. Sequences of like lengths are read together; the
/// batches are the same whatever the number of ranks, which take them in turn.
fn score(model: &mut Llama, world: &World, sequences: &[Sequence]) -> Result<Vec<Vec<f64>>> {
    let mut order: Vec<usize> = (0..sequences.len()).filter(|i| sequences[*i].ids.len() > 1).collect();
    order.sort_by_key(|i| std::cmp::Reverse(sequences[*i].ids.len()));
    let mut batches = Vec::new();
    let mut rest = order.as_slice();
    while let Some(longest) = rest.first() {
        let (batch, later) =
            rest.split_at((BATCH_TOKENS / (sequences[*longest].ids.len() - 1)).clamp(1, rest.len()));
        batches.push(batch);
        rest = later;
    }
    // All log-probabilities one after the other; a rank knows those of its batches, the others are 0.
    let num_scored = |s: &Sequence| s.ids.len() - s.first.min(s.ids.len());
    let mut begins = vec![0];
    for sequence in sequences {
        begins.push(begins[begins.len() - 1] + num_scored(sequence));
    }
    let mut scores = vec![0.0; begins[sequences.len()]];
    let bar = inference::bar(sequences.len() as u64, "lines");
    for round in batches.chunks(world.world_size as usize) {
        match round.get(world.rank as usize) {
            Some(batch) => {
                for (i, logprobs) in batch.iter().zip(score_batch(model, sequences, batch)?) {
                    scores[begins[*i]..begins[i + 1]].copy_from_slice(&logprobs);
                }
            }
            None if model.params.gathers() => drop(logprobs(model, &[0], &[-100], 1)?),
            None => {}
        }
        bar.inc(round.iter().map(|batch| batch.len() as u64).sum());
    }
    bar.finish_and_clear();
    let scores = world.group.combine(&scores, ReduceOp::Sum)?;
    Ok(begins.windows(2).map(|part| scores[part[0]..part[1]].to_vec()).collect())
}

fn score_batch(model: &mut Llama, sequences: &[Sequence], batch: &[usize]) -> Result<Vec<Vec<f64>>> {
    let time = sequences[batch[0]].ids.len() - 1;
    let (mut ids, mut labels) = (vec![0i64; batch.len() * time], vec![-100i64; batch.len() * time]);
    for (row, i) in batch.iter().enumerate() {
        let Sequence { ids: tokens, first } = &sequences[*i];
        let n = tokens.len() - 1;
        ids[row * time..][..n].copy_from_slice(&tokens[..n]);
        // A label is the token after the position.
        labels[row * time + first - 1..row * time + n].copy_from_slice(&tokens[*first..]);
    }
    let logprobs = logprobs(model, &ids, &labels, time)?;
    let scored = batch.iter().enumerate().map(|(row, i)| {
        let Sequence { ids, first } = &sequences[*i];
        logprobs[row * time + first - 1..row * time + ids.len() - 1].to_vec()
    });
    Ok(scored.collect())
}

/// Log-probabilities of `labels` (0 where negative) after `ids`, both of rows of `time` tokens.
pub fn logprobs(model: &mut Llama, ids: &[i64], labels: &[i64], time: usize) -> Result<Vec<f64>> {
    let device = model.params.device();
    let ids = Tensor::from_slice(ids).view([-1, time as i64]);
    let hidden = model.hidden(&Input::new(ids))?;
    let labels = Tensor::from_slice(labels).to_device(device);
    let logprobs = LmHead::logprobs(model, &hidden, &labels, 1.0, false)?.logprobs;
    Ok(Vec::<f64>::try_from(logprobs.to_device(Device::Cpu).to_kind(tch::Kind::Double))?)
}
