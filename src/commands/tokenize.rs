//! `corral tokenize`: text files into token shards.

use crate::checkpoint::locate_tokenizer;
use crate::commands::intake::OnErrorArgs;
use crate::data::readers;
use crate::data::shards::Header;
use crate::data::tokenize::{self, TokenizeOptions};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::telemetry::progress::with_bytes_bar;
use crate::warn;
use std::path::PathBuf;
use std::sync::Arc;

/// `corral tokenize`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Text, JSON, JSON lines (each also .gz or .zst) or Parquet
    #[arg(long, num_args = 1.., required = true, value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Folder with a tokenizer: tokenizer.json, tokenizer.model or qwen.tiktoken; a GGUF file; a name that `corral get` fetched
    #[arg(long, value_name = "DIR")]
    tokenizer: PathBuf,
    /// Folder for train/, valid/ and tokenizer/; an earlier result in it is replaced
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Key or column of the text
    #[arg(long, default_value = "text", value_name = "KEY")]
    text_key: String,
    #[command(flatten)]
    on_error: OnErrorArgs,
    /// Share of the documents kept for validation (of a single document, the end of its text)
    #[arg(long, default_value_t = 0.01, value_name = "X")]
    valid_fraction: f64,
    /// A shard is closed before it grows beyond this
    #[arg(long, default_value_t = 1 << 28, value_name = "N")]
    max_shard_tokens: u64,
}

/// Writes the shards, and prints how many tokens they have.
pub fn run(args: Args) -> Result<()> {
    if args.max_shard_tokens == 0 {
        return Err(Error::config("--max-shard-tokens 0: a shard must hold at least one token"));
    }
    let tokenizer = Tokenizer::load(locate_tokenizer(&args.tokenizer)?)?;
    let total = readers::total_bytes(&args.input);
    let options = TokenizeOptions {
        inputs: args.input,
        text_key: args.text_key,
        on_error: args.on_error.on_error,
        valid_fraction: args.valid_fraction,
        max_shard_tokens: args.max_shard_tokens,
    };
    let bytes = Arc::default();
    let summary = with_bytes_bar("tokenizing", total, &bytes, || {
        tokenize::tokenize(&options, &tokenizer, &args.output, &bytes)
    })?;
    for (name, headers) in [("train", &summary.train), ("valid", &summary.valid)] {
        if !headers.is_empty() {
            println!("{}: {}", args.output.join(name).display(), describe(headers));
        }
    }
    if summary.odd.total() > 0 {
        warn!("{}", summary.odd.skipped());
    }
    if summary.num_empty > 0 {
        warn!("{} documents without text were left out", summary.num_empty);
    }
    Ok(())
}

fn describe(headers: &[Header]) -> String {
    let sum = |f: fn(&Header) -> u64| headers.iter().map(f).sum::<u64>();
    let (documents, tokens, bytes) = (sum(|h| h.num_documents), sum(|h| h.num_tokens), sum(|h| h.text_bytes));
    let ratio = bytes as f64 / tokens.max(1) as f64;
    let shards = headers.len();
    format!(
        "{tokens} tokens, {documents} documents, {bytes} bytes of text ({ratio:.2} a token), {shards} shards"
    )
}
