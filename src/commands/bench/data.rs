//! `corral bench data`: training a tokenizer, tokenizing, and reading the shards.

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use super::{Scratch, median};
use crate::checkpoint::locate_tokenizer;
use crate::config::sections::OnError;
use crate::data::loader::{Loader, WeightedSource, WindowOrder};
use crate::data::synth::{self, ProblemLevel};
use crate::data::texts::Texts;
use crate::data::tokenize::{self, TokenizeOptions};
use crate::data::tokenizer::{self, Tokenizer};
use crate::distributed::world::World;
use crate::error::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Text, JSON, JSON lines or Parquet [default: the built-in word problems]
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub input: Vec<PathBuf>,
    /// Key or column of the text
    #[arg(long, default_value = "text", value_name = "KEY")]
    pub text_key: String,
    /// Folder of a tokenizer [default: one is trained on the text, which is measured, too]
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Tokens of the tokenizer that is trained
    #[arg(long, default_value_t = 4096, value_name = "N")]
    pub vocab_size: usize,
    /// Tokens of a sample
    #[arg(long, default_value_t = 512)]
    pub sequence_length: usize,
    /// Samples of a batch
    #[arg(long, default_value_t = 32)]
    pub batch_size: usize,
    /// Times that each is measured
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Folder on the disk that is measured; nothing stays in it
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub dir: PathBuf,
}

/// Built-in problems: 4.4 MB of text.
const SYNTHETIC: u64 = 50_000;
/// Tokens that the loader reads in a run.
const LOADED_TOKENS: usize = 16 << 20;

pub fn run(args: &Args, world: &World) -> Result<()> {
    if world.world_size > 1 {
        return Err(Error::config("bench data runs on one rank"));
    }
    if args.runs == 0 || args.batch_size == 0 || args.sequence_length == 0 {
        return Err(Error::config("--runs, --batch-size and --sequence-length must be at least 1"));
    }
    let scratch = Scratch::create(&args.dir, std::process::id())?;
    let inputs = if args.input.is_empty() {
        let options =
            synth::SynthOptions { seed: 1, count: SYNTHETIC, level: ProblemLevel::Mix, wrong_answers: 0.0 };
        synth::write(&scratch.0, &options)?;
        vec![scratch.0.join("pretrain.train.jsonl")]
    } else {
        args.input.clone()
    };
    let mut text_bytes = 0;
    let texts = || Texts::open(&inputs, &args.text_key, OnError::Refuse, &Arc::default());
    for text in texts() {
        text_bytes += text?.len();
    }
    let mb = text_bytes as f64 / 1e6;
    let threads = rayon::current_num_threads();

    let tokenizer = match &args.tokenizer {
        Some(dir) => Tokenizer::load(locate_tokenizer(dir)?)?,
        None => {
            let (trained, train_s) =
                measured(args.runs, || tokenizer::train(texts(), args.vocab_size, true))?;
            println!(
                "{}",
                json!({
                    "bench": "data", "op": "tokenizer_train", "text_bytes": text_bytes,
                    "vocab_size": trained.vocab_size(), "runs": args.runs, "threads": threads,
                    "median_s": train_s, "mb_per_s": mb / train_s,
                })
            );
            trained
        }
    };

    let output = scratch.0.join("tokens");
    let options = TokenizeOptions {
        inputs: inputs.clone(),
        text_key: args.text_key.clone(),
        on_error: OnError::Refuse,
        valid_fraction: 0.0,
        max_shard_tokens: 1 << 28,
    };
    let (summary, tokenize_s) =
        measured(args.runs, || tokenize::tokenize(&options, &tokenizer, &output, &Arc::default()))?;
    let tokens: u64 = summary.train.iter().map(|h| h.num_tokens).sum();
    println!(
        "{}",
        json!({
            "bench": "data", "op": "tokenize", "text_bytes": text_bytes, "tokens": tokens,
            "vocab_size": tokenizer.vocab_size(), "runs": args.runs, "threads": threads,
            "median_s": tokenize_s, "mb_per_s": mb / tokenize_s, "tokens_per_s": tokens as f64 / tokenize_s,
        })
    );

    let sources = [WeightedSource { path: output.join("train"), weight: None }];
    let order = WindowOrder::Shuffled { seed: 1 };
    let open = || Loader::new(&sources, None, tokenizer.vocab_size(), args.sequence_length, order);
    let (loader, open_s) = measured(args.runs, open)?;
    let batches = (LOADED_TOKENS / (args.batch_size * args.sequence_length)).max(1);
    let mut next = 0;
    let (_, load_s) = measured(args.runs, || {
        for _ in 0..batches {
            black_box(loader.batch(next, args.batch_size)?);
            next += args.batch_size as u64;
        }
        Ok(())
    })?;
    let loaded = (batches * args.batch_size * args.sequence_length) as f64;
    println!(
        "{}",
        json!({
            "bench": "data", "op": "loader", "tokens": tokens, "sequence_length": args.sequence_length,
            "batch_size": args.batch_size, "batches": batches, "runs": args.runs,
            "open_s": open_s, "median_s": load_s, "tokens_per_s": loaded / load_s,
        })
    );
    Ok(())
}

/// The last result of `runs` calls, and the median of their seconds.
fn measured<T>(runs: usize, mut work: impl FnMut() -> Result<T>) -> Result<(T, f64)> {
    let mut timed = || {
        let begun = Instant::now();
        let result = work()?;
        Ok::<_, Error>((result, begun.elapsed().as_secs_f64()))
    };
    let (mut result, first_s) = timed()?;
    let mut seconds = vec![first_s];
    for _ in 1..runs {
        let (next, next_s) = timed()?;
        result = next;
        seconds.push(next_s);
    }
    Ok((result, median(&mut seconds)))
}
