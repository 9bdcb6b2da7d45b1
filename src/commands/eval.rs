//! `corral eval`: measures a model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;
use rayon::prelude::*;
use serde_json::json;
use tch::Device;

use crate::commands::inference::{self, Inference, ModelArgs};
use crate::commands::score;
use crate::data::readers;
use crate::data::shards::TokenSet;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::files::write_file;

/// Tokens that one forward reads, or one window if that is longer.
const BATCH_TOKENS: usize = 8192;
/// Long texts are encoded in pieces of about this many bytes.
const PIECE_BYTES: usize = 64 << 10;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// What to measure
    #[arg(long, value_enum)]
    task: Task,
    /// Text, JSON, JSON lines (each also .gz or .zst), Parquet, or a folder of token shards
    #[arg(long, num_args = 1.., required = true, value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Where the result goes, besides stdout
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Tokens of a window [default: the model's positions, at most 1024]
    #[arg(long, value_name = "N")]
    sequence_length: Option<usize>,
    /// Key or column of the text
    #[arg(long, default_value = "text", value_name = "KEY")]
    text_key: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Task {
    /// Loss in nats a token, perplexity, and bits a byte of text
    Perplexity,
}

pub fn run(args: Args, device: Device) -> Result<()> {
    let Task::Perplexity = args.task;
    if args.sequence_length == Some(0) {
        return Err(Error::config("--sequence-length must be at least 1"));
    }
    let mut inference = args.model.load(device)?;
    let positions = inference.model.shape.max_position_embeddings as usize;
    let window = args.sequence_length.unwrap_or(positions.min(1024));
    if window > positions {
        return Err(Error::config(format!(
            "--sequence-length {window} is beyond the model's {positions} positions (max_position_embeddings)"
        )));
    }
    let mut total = Sums::default();
    for path in &args.input {
        let stream = Stream::open(path, &args.text_key, &inference)?;
        total.add(&measure(&mut inference, &stream, window)?);
    }
    if total.num_tokens == 0 || total.num_bytes == 0 {
        return Err(Error::data("the input has no two tokens of text: there is nothing to measure"));
    }
    let loss = total.loss / total.num_tokens as f64;
    if !loss.is_finite() {
        return Err(Error::failed(
            "the loss is not finite: the model's weights may be damaged, or have diverged",
        ));
    }
    let result = json!({
        "task": "perplexity",
        "loss": loss,
        "perplexity": loss.exp(),
        "bits_per_byte": total.loss / std::f64::consts::LN_2 / total.num_bytes as f64,
        "num_tokens": total.num_tokens,
        "num_bytes": total.num_bytes,
        "sequence_length": window,
    });
    if let Some(path) = &args.output {
        write_file(path, format!("{result:#}\n").as_bytes())?;
    }
    println!("{result}");
    Ok(())
}

#[derive(Debug, Default, Clone, Copy)]
struct Sums {
    /// Nats
    loss: f64,
    /// Tokens that were predicted
    num_tokens: u64,
    num_bytes: u64,
}

impl Sums {
    fn add(&mut self, other: &Sums) {
        self.loss += other.loss;
        self.num_tokens += other.num_tokens;
        self.num_bytes += other.num_bytes;
    }
}

/// The tokens of an input, one document after the other.
enum Stream {
    Text { ids: Vec<i64>, num_bytes: u64 },
    Shards(TokenSet),
}

impl Stream {
    fn open(path: &Path, text_key: &str, inference: &Inference) -> Result<Stream> {
        if path.is_dir() || path.extension().is_some_and(|e| e == "tokens") {
            let set = TokenSet::open(path)?;
            let hash = inference.tokenizer().ok().map(Tokenizer::hash);
            set.check(hash, inference.model.shape.vocab_size as usize)?;
            return Ok(Stream::Shards(set));
        }
        let tokenizer = inference.tokenizer()?;
        let (mut ids, mut num_bytes) = (Vec::new(), 0);
        for text in readers::texts(&[path.to_path_buf()], text_key, &Arc::default()) {
            let text = text?;
            num_bytes += text.len() as u64;
            document(tokenizer, &text, &mut ids)?;
        }
        Ok(Stream::Text { ids, num_bytes })
    }

    fn num_tokens(&self) -> u64 {
        match self {
            Stream::Text { ids, .. } => ids.len() as u64,
            Stream::Shards(set) => set.num_tokens(),
        }
    }

    fn num_bytes(&self) -> u64 {
        match self {
            Stream::Text { num_bytes, .. } => *num_bytes,
            Stream::Shards(set) => set.text_bytes(),
        }
    }

    fn read(&self, start: u64, end: u64) -> Result<Vec<i64>> {
        match self {
            Stream::Text { ids, .. } => Ok(ids[start as usize..end as usize].to_vec()),
            Stream::Shards(set) => {
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

/// The loss over a stream in windows of `window` predictions: a window begins with the last token of the one before
/// it, so that every token but the stream's first is predicted once, from the tokens before it in its window.
fn measure(inference: &mut Inference, stream: &Stream, window: usize) -> Result<Sums> {
    let predictions = stream.num_tokens().saturating_sub(1);
    let mut sums = Sums { loss: 0.0, num_tokens: predictions, num_bytes: stream.num_bytes() };
    let bar = inference::bar(predictions, "tokens");
    let rows = (BATCH_TOKENS / window).max(1);
    let mut at = 0;
    while at < predictions {
        // Whole windows together; what is left at the end is shorter.
        let left = (predictions - at) as usize;
        let (count, time) = if left < window { (1, left) } else { ((left / window).min(rows), window) };
        let n = count * time;
        let tokens = stream.read(at, at + n as u64 + 1)?;
        if let Some(id) = tokens.iter().find(|id| !(0..inference.model.shape.vocab_size).contains(*id)) {
            let vocab_size = inference.model.shape.vocab_size;
            return Err(Error::data(format!(
                "token id {id} is not in the model's vocabulary of {vocab_size}; is the tokenizer the model's?"
            )));
        }
        let logprobs = score::logprobs(&mut inference.model, &tokens[..n], &tokens[1..], time)?;
        sums.loss -= logprobs.iter().sum::<f64>();
        at += n as u64;
        bar.set_position(at);
    }
    bar.finish_and_clear();
    Ok(sums)
}
