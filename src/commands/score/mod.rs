//! `corral score`: log-probabilities of texts, or rewards, a line in, a line out.

mod lines;
pub mod reward;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};

use crate::commands::Global;
use crate::commands::inference::{self, ModelArgs, RanksArgs, TemplateArgs};
use crate::commands::intake::{Intake, OnErrorArgs};
use crate::data::odd::{Odd, OrOdd, Reason};
use crate::data::readers::{self, Record};
use crate::distributed::agree::agree;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::files::AtomicFile;
use crate::model::{Llama, LmHead, ModelInput};
use crate::telemetry::progress::Bar;
use lines::LineReader;
pub use lines::Sequence;

/// Tokens, padding included, that one forward reads at most (one row may be longer).
const BATCH_TOKENS: usize = 8192;

/// `corral score`
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    ranks: RanksArgs,
    #[command(flatten)]
    template: TemplateArgs,
    /// Put texts of `prompt` and `completion` into the chat template, as messages always are; implied by --chat-template
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    on_error: OnErrorArgs,
    /// JSON lines: `input_ids`, else `prompt` and `completion`, else `text`, else any conversation that `corral sft` reads
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// The same lines with `token_ids`, `logprobs` (of every token but the first; with a prompt, of the completion's tokens;
    /// of a conversation, of the assistant's turns), `spans` (which of `token_ids` those are), `num_tokens` and
    /// `sum_logprob`, in nats; for a reward model with `token_ids`, `score` and `reward`, the normalised score. A line that is
    /// skipped has `error` instead
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Scores the texts on all ranks; rank 0 writes a line for each, in their order.
pub fn run(args: Args, global: &Global) -> Result<()> {
    let lines = readers::records_or_errors(&args.input, None, &Arc::default())?;
    let lines: Vec<Result<Record>> = lines.collect::<Result<_>>()?;
    let opened = args.model.open_any()?;
    if let Some(scoring) = opened.scoring()? {
        return reward::run(&args, lines, &opened, &scoring, global);
    }
    let reader = LineReader::new(&args, &lines, &opened)?;
    let (lines, sequences, intake) = read(&args, lines, |line| reader.read(line))?;
    let world = inference::join(global, &opened, args.ranks)?;
    intake.warn(&world);
    let mut model = opened.load(&world, args.ranks)?;
    let mut scored = score(&mut model, &world, &sequences)?.into_iter().zip(&sequences);
    let write = |line: &mut ScoreLine| {
        let Some((logprobs, sequence)) = scored.next() else { return Ok(()) };
        if logprobs.iter().any(|x| !x.is_finite()) {
            return Err(Error::failed(format!(
                "{}: a log-probability is not finite: the model is damaged",
                line.place
            )));
        }
        let spans: Vec<[usize; 2]> = sequence.scored.iter().map(|span| [span.start, span.end]).collect();
        line.fields.insert("token_ids".into(), json!(sequence.ids));
        line.fields.insert("sum_logprob".into(), json!(logprobs.iter().fold(0.0, |sum, x| sum + x)));
        line.fields.insert("num_tokens".into(), json!(logprobs.len()));
        line.fields.insert("spans".into(), json!(spans));
        line.fields.insert("logprobs".into(), json!(logprobs));
        Ok(())
    };
    agree(&world.group, if world.is_main() { write_lines(&args.output, lines, write) } else { Ok(()) })
}

/// A line of the input: its keys, and why it is not scored, if so.
struct ScoreLine {
    fields: Map<String, Value>,
    place: String,
    error: Option<String>,
}

/// The lines, what is scored of them, and what is not. `tokens` also tells what a line gives to the template
/// and the text lacks.
fn read<T: Send>(
    args: &Args,
    lines: Vec<Result<Record>>,
    tokens: impl Fn(&Record) -> Result<(T, Vec<String>), Odd> + Sync,
) -> Result<(Vec<ScoreLine>, Vec<T>, Intake)> {
    let tokens = |line: Result<Record>| {
        let fields = line.as_ref().map(|line| line.fields.clone()).unwrap_or_default();
        let place = line.as_ref().map(|line| line.place.to_string()).unwrap_or_default();
        (fields, place, line.or_odd(Reason::Unreadable).and_then(|line| tokens(&line)))
    };
    let tokens: Vec<_> = lines.into_par_iter().map(tokens).collect();
    let (mut intake, mut lines, mut all) = (Intake::of_lines(args.on_error), Vec::new(), Vec::new());
    for (fields, place, tokens) in tokens {
        let error = match intake.read(tokens)? {
            Ok((tokens, unwritten)) => {
                intake.note(&args.input, &unwritten);
                all.push(tokens);
                None
            }
            Err(error) => Some(error),
        };
        lines.push(ScoreLine { fields, place, error });
    }
    intake.check()?;
    if all.is_empty() && !lines.is_empty() {
        return Err(Error::data(format!(
            "{}: no line can be scored: {}",
            args.input.display(),
            intake.why_nothing()
        )));
    }
    Ok((lines, all, intake))
}

/// Writes every line with what `add` adds to it, or with `error`.
fn write_lines(
    path: &Path,
    lines: Vec<ScoreLine>,
    mut add: impl FnMut(&mut ScoreLine) -> Result<()>,
) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    for mut line in lines {
        match line.error.take() {
            Some(error) => drop(line.fields.insert("error".into(), json!(error))),
            None => add(&mut line)?,
        }
        file.put(format!("{}\n", Value::Object(line.fields)).as_bytes())?;
    }
    file.commit()
}

/// Log-probabilities of every sequence's scored tokens, on all ranks. Sequences of like lengths are read together; the
/// batches are the same whatever the number of ranks, which take them in turn.
pub fn score(model: &mut Llama, world: &World, sequences: &[Sequence]) -> Result<Vec<Vec<f64>>> {
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
    let num_scored = |s: &Sequence| s.scored.iter().map(ExactSizeIterator::len).sum::<usize>();
    let mut begins = vec![0];
    for sequence in sequences {
        begins.push(begins[begins.len() - 1] + num_scored(sequence));
    }
    let mut scores = vec![0.0; begins[sequences.len()]];
    let bar = Bar::new(sequences.len() as u64, "lines", false);
    for round in batches.chunks(world.mesh.data.size as usize) {
        match round.get(world.mesh.data.rank as usize) {
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
    drop(bar);
    let scores = world.sum_rows(&scores)?;
    Ok(begins.windows(2).map(|part| scores[part[0]..part[1]].to_vec()).collect())
}

fn score_batch(model: &mut Llama, sequences: &[Sequence], batch: &[usize]) -> Result<Vec<Vec<f64>>> {
    let time = sequences[batch[0]].ids.len() - 1;
    let (mut ids, mut labels) = (vec![0i64; batch.len() * time], vec![-100i64; batch.len() * time]);
    for (row, i) in batch.iter().enumerate() {
        let tokens = &sequences[*i].ids;
        let n = tokens.len() - 1;
        ids[row * time..][..n].copy_from_slice(&tokens[..n]);
        // A label is the token after the position.
        sequences[*i].places().for_each(|at| labels[row * time + at - 1] = tokens[at]);
    }
    let logprobs = logprobs(model, &ids, &labels, time)?;
    let scored = batch.iter().enumerate();
    Ok(scored
        .map(|(row, i)| sequences[*i].places().map(|at| logprobs[row * time + at - 1]).collect())
        .collect())
}

/// Log-probabilities of `labels` (0 where negative) after `ids`, both of rows of `time` tokens.
pub fn logprobs(model: &mut Llama, ids: &[i64], labels: &[i64], time: usize) -> Result<Vec<f64>> {
    let device = model.params.device();
    let ids = Tensor::from_slice(ids).view([-1, time as i64]);
    let hidden = model.hidden(&ModelInput::new(ids))?;
    let labels = Tensor::from_slice(labels).to_device(device);
    let logprobs = LmHead::logprobs(model, &hidden, &labels, 1.0, false)?.logprobs;
    Ok(Vec::<f64>::try_from(logprobs.to_device(Device::Cpu).to_kind(tch::Kind::Double))?)
}
