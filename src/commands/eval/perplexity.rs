//! Loss in nats a token, perplexity, and bits a byte of text.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::json;

use super::{Args, supervised};
use crate::commands::Global;
use crate::commands::inference::{self, OpenedModel};
use crate::commands::intake::Intake;
use crate::commands::score;
use crate::data::arrow;
use crate::data::odd::{OrOdd, Reason};
use crate::data::readers::{self, Record};
use crate::data::shards::TokenSet;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::files::is_dir;
use crate::model::Llama;
use crate::telemetry::progress::Bar;

/// Tokens that one forward reads, or one window if that is longer.
const BATCH_TOKENS: usize = 8192;
/// Long texts are encoded in pieces of about this many bytes.
const PIECE_BYTES: usize = 64 << 10;

pub(super) fn run(args: Args, global: &Global) -> Result<()> {
    if args.sequence_length == Some(0) {
        return Err(Error::config("--sequence-length must be at least 1"));
    }
    let opened = args.model.open()?;
    let positions = opened.shape().max_position_embeddings as usize;
    let window = args.sequence_length.unwrap_or(positions.min(1024));
    if window > positions {
        return Err(Error::config(format!(
            "--sequence-length {window} is beyond the model's {positions} positions (max_position_embeddings)"
        )));
    }
    let kinds: Vec<bool> =
        args.input.iter().map(|path| holds_conversations(path, &args)).collect::<Result<_>>()?;
    match kinds.iter().position(|kind| *kind != kinds[0]) {
        None if kinds[0] => {
            return supervised::run(&args, &opened, args.sequence_length.unwrap_or(positions), global);
        }
        None => {}
        Some(other) => {
            let (first, other) = (args.input[0].display(), args.input[other].display());
            return Err(Error::config(format!(
                "--input: one of {first} and {other} holds texts and the other one conversations, whose tokens count \
                 differently; measure them separately"
            )));
        }
    }
    let mut intake = Intake::new(args.on_error);
    let text_key = args.text_key.as_deref().unwrap_or(TEXT);
    let open = |path: &PathBuf| TokenStream::open(path, text_key, &opened, &mut intake);
    let streams: Vec<TokenStream> = args.input.iter().map(open).collect::<Result<_>>()?;
    intake.check()?;
    let num_tokens: u64 = streams.iter().map(TokenStream::predictions).sum();
    let num_bytes: u64 = streams.iter().map(TokenStream::num_bytes).sum();
    if num_tokens == 0 || num_bytes == 0 {
        return Err(Error::data("the input has fewer than two tokens of text: there is nothing to measure"));
    }
    let world = inference::join(global, &opened, args.ranks)?;
    intake.warn(&world);
    let mut model = opened.load(&world, args.ranks)?;
    let sum = measure(&mut model, &world, &streams, window)?;
    let loss = sum / num_tokens as f64;
    if !loss.is_finite() {
        return Err(Error::failed(
            "the loss is not finite: the model's weights may be damaged, or have diverged",
        ));
    }
    let result = json!({
        "task": "perplexity",
        "loss": loss,
        "perplexity": loss.exp(),
        "bits_per_byte": sum / std::f64::consts::LN_2 / num_bytes as f64,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "counted": "all tokens",
        "skipped_records": intake.skipped(),
        "sequence_length": window,
    });
    super::tell(&args, &world, &result)
}

/// The key of a text where none is given.
const TEXT: &str = "text";

fn is_token_shards(path: &Path) -> Result<bool> {
    match is_dir(path)? {
        true => Ok(!arrow::is_data_set(path)?),
        false => Ok(path.extension().is_some_and(|e| e == "tokens")),
    }
}

/// Whether a file's first record is a conversation, and no text.
fn holds_conversations(path: &Path, args: &Args) -> Result<bool> {
    if args.text_key.is_some() || is_token_shards(path)? {
        return Ok(false);
    }
    for record in readers::records_or_errors(path, None, &Arc::default())? {
        let Ok(record) = record? else { continue };
        let has = |key: &str| record.fields.get(key).is_some_and(|v| !v.is_null());
        let known = ["messages", "conversations", "instruction", "prompt", "question", "chosen"];
        return Ok(!has(TEXT) && known.into_iter().any(has));
    }
    Ok(false)
}

/// The tokens of an input, one document after the other.
enum TokenStream {
    Text { ids: Vec<i64>, num_bytes: u64 },
    Shards(TokenSet),
}

impl TokenStream {
    fn open(path: &Path, text_key: &str, opened: &OpenedModel, intake: &mut Intake) -> Result<TokenStream> {
        if is_token_shards(path)? {
            let set = TokenSet::open(path)?;
            let hash = opened.tokenizer().ok().map(Tokenizer::hash);
            set.check(hash, opened.shape().vocab_size as usize)?;
            return Ok(TokenStream::Shards(set));
        }
        let tokenizer = opened.tokenizer()?;
        let (mut ids, mut num_bytes) = (Vec::new(), 0);
        // A text file has no keys.
        let key = if readers::is_text(path) { TEXT } else { text_key };
        let text = |record: Record| {
            let advise =
                |e: Error| Error { message: format!("{e}; name the right one with --text-key"), ..e };
            record.text(key).map(str::to_string).map_err(advise).or_odd(Reason::Format)
        };
        for record in readers::records_or_errors(path, None, &Arc::default())? {
            let Some(text) = intake.take(record?, text)? else { continue };
            num_bytes += text.len() as u64;
            document(tokenizer, &text, &mut ids)?;
        }
        Ok(TokenStream::Text { ids, num_bytes })
    }

    fn num_tokens(&self) -> u64 {
        match self {
            TokenStream::Text { ids, .. } => ids.len() as u64,
            TokenStream::Shards(set) => set.num_tokens(),
        }
    }

    /// Every token but the first is predicted.
    fn predictions(&self) -> u64 {
        self.num_tokens().saturating_sub(1)
    }

    fn num_bytes(&self) -> u64 {
        match self {
            TokenStream::Text { num_bytes, .. } => *num_bytes,
            TokenStream::Shards(set) => set.text_bytes(),
        }
    }

    fn read(&self, start: u64, end: u64) -> Result<Vec<i64>> {
        match self {
            TokenStream::Text { ids, .. } => Ok(ids[start as usize..end as usize].to_vec()),
            TokenStream::Shards(set) => {
                let mut ids = Vec::with_capacity((end - start) as usize);
                set.read(start, end, &mut ids)?;
                Ok(ids)
            }
        }
    }
}

/// Adds a document's tokens as `corral tokenize` writes them: BOS where the tokenizer puts it, the text, EOS.
fn document(tokenizer: &Tokenizer, text: &str, ids: &mut Vec<i64>) -> Result<()> {
    let pieces: Vec<Vec<i64>> = tokenizer
        .pieces(text, PIECE_BYTES)
        .into_par_iter()
        .map(|piece| inference::encode(tokenizer, piece, false))
        .collect::<Result<_>>()?;
    ids.extend(tokenizer.bos_id().filter(|_| tokenizer.adds_bos()).map(i64::from));
    ids.extend(pieces.into_iter().flatten());
    ids.extend(tokenizer.eos_ids().first().copied().map(i64::from));
    Ok(())
}

/// Windows of a stream that are read together.
struct WindowBatch<'a> {
    stream: &'a TokenStream,
    /// The first of their tokens.
    at: u64,
    count: usize,
    /// Predictions of a window.
    time: usize,
}

impl WindowBatch<'_> {
    /// The sum of the losses, in nats.
    fn loss(&self, model: &mut Llama) -> Result<f64> {
        let n = self.count * self.time;
        let tokens = self.stream.read(self.at, self.at + n as u64 + 1)?;
        let vocab_size = model.shape.vocab_size;
        if let Some(id) = tokens.iter().find(|id| !(0..vocab_size).contains(*id)) {
            return Err(Error::data(format!(
                "token id {id} is not in the model's vocabulary of {vocab_size}; is the tokenizer the model's?"
            )));
        }
        let logprobs = score::logprobs(model, &tokens[..n], &tokens[1..], self.time)?;
        Ok(-logprobs.iter().sum::<f64>())
    }
}

/// The stream in windows of `window` predictions: a window begins with the last token of the one before it, so that every
/// token but the stream's first is predicted once, from the tokens before it in its window.
fn batches(stream: &TokenStream, window: usize) -> Vec<WindowBatch<'_>> {
    let rows = (BATCH_TOKENS / window).max(1);
    let (mut at, mut batches) = (0, Vec::new());
    while at < stream.predictions() {
        // Whole windows together; what is left at the end is shorter.
        let left = (stream.predictions() - at) as usize;
        let (count, time) = if left < window { (1, left) } else { ((left / window).min(rows), window) };
        batches.push(WindowBatch { stream, at, count, time });
        at += (count * time) as u64;
    }
    batches
}

/// The sum of the losses over all streams, in nats. Ranks take the batches in turn; the sum is in the batches' order, the
/// same whatever the number of ranks.
fn measure(model: &mut Llama, world: &World, streams: &[TokenStream], window: usize) -> Result<f64> {
    let batches: Vec<WindowBatch> = streams.iter().flat_map(|stream| batches(stream, window)).collect();
    let mut losses = vec![0.0; batches.len()];
    let bar = Bar::new(streams.iter().map(TokenStream::predictions).sum(), "tokens", false);
    let (rank, ranks) = (world.mesh.data.rank as usize, world.mesh.data.size as usize);
    for first in (0..batches.len()).step_by(ranks) {
        match batches.get(first + rank) {
            Some(batch) => losses[first + rank] = batch.loss(model)?,
            None if model.params.gathers() => drop(score::logprobs(model, &[0], &[-100], 1)?),
            None => {}
        }
        let round = &batches[first..batches.len().min(first + ranks)];
        bar.inc(round.iter().map(|b| (b.count * b.time) as u64).sum());
    }
    drop(bar);
    Ok(world.sum_rows(&losses)?.iter().sum())
}
