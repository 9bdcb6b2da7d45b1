//! `corral tokenizer`: train a tokenizer.

use crate::commands::intake::OnErrorArgs;
use crate::data::texts::Texts;
use crate::data::{readers, tokenizer};
use crate::error::{Error, Result};
use crate::telemetry::progress::with_bytes_bar;
use crate::warn;
use std::path::PathBuf;
use std::sync::Arc;

/// `corral tokenizer`
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Train a byte-level BPE tokenizer
    Train(TrainTokenizer),
}

#[derive(Debug, clap::Args)]
struct TrainTokenizer {
    /// Text, JSON, JSON lines (each also .gz or .zst) or Parquet
    #[arg(long, num_args = 1.., required = true, value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Tokens, with the 256 bytes and the special tokens `<s>`, `</s>` and `<pad>`
    #[arg(long, value_name = "N")]
    vocab_size: usize,
    /// Folder for tokenizer.json and tokenizer_config.json
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Key or column of the text
    #[arg(long, default_value = "text", value_name = "KEY")]
    text_key: String,
    #[command(flatten)]
    on_error: OnErrorArgs,
    /// One token per digit, which helps arithmetic
    #[arg(long, default_value_t = true, default_missing_value = "true", num_args = 0..=1,
        action = clap::ArgAction::Set, value_name = "BOOL")]
    split_digits: bool,
}

/// Trains a tokenizer, and writes it.
pub fn run(args: Args) -> Result<()> {
    let Command::Train(args) = args.command;
    // They would be read as part of the new tokenizer.
    let written = ["tokenizer.json", "tokenizer_config.json"];
    for entry in std::fs::read_dir(&args.output).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if tokenizer::is_tokenizer_file(&name) && !written.contains(&name.as_str()) {
            let folder = args.output.display();
            return Err(Error::config(format!(
                "{folder} holds {name} of another tokenizer; choose another folder"
            )));
        }
    }
    let bytes = Arc::default();
    let total = readers::total_bytes(&args.input);
    let mut texts = Texts::open(&args.input, &args.text_key, args.on_error.on_error, &bytes);
    let tokenizer = with_bytes_bar("reading", total, &bytes, || {
        tokenizer::train(texts.by_ref(), args.vocab_size, args.split_digits)
    })?;
    if texts.odd().total() > 0 {
        warn!("{}", texts.odd().skipped());
    }
    tokenizer.save(&args.output)?;
    let size = tokenizer.vocab_size();
    if size < args.vocab_size {
        warn!("the text supports a vocabulary of {size} tokens, not {}", args.vocab_size);
    }
    println!("{}: byte-level BPE, {size} tokens", args.output.display());
    Ok(())
}
