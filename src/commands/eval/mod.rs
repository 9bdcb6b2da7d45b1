//! `corral eval`: measures a model.

mod gsm8k;
mod perplexity;
mod preference;
mod supervised;

use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::Value;

use crate::commands::Global;
use crate::commands::inference::{ModelArgs, RanksArgs, TemplateArgs};
use crate::commands::intake::OnErrorArgs;
use crate::distributed::agree::agree;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::files::write_file;

/// `corral eval`
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    ranks: RanksArgs,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    on_error: OnErrorArgs,
    /// What to measure
    #[arg(long, value_enum)]
    task: Task,
    /// perplexity: text, or conversations as for `corral sft`, in text, JSON, JSON lines (each also .gz or .zst) or Parquet
    /// files, or a folder of token shards; gsm8k: lines with
    /// `question` (or another prompt) and `answer`; preference: ranked completions, as for `corral reward`
    #[arg(long, num_args = 1.., required = true, value_name = "FILE")]
    input: Vec<PathBuf>,
    /// File for the result, which is also printed
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// perplexity: tokens of a window [default: the model's positions, at most 1024]; for conversations the maximum tokens of
    /// one; longer ones are left out and counted [default: the model's positions]
    #[arg(long, value_name = "N")]
    sequence_length: Option<usize>,
    /// perplexity: key or column of the text [default: text; records without it are measured as conversations]
    #[arg(long, value_name = "KEY")]
    text_key: Option<String>,
    /// gsm8k, preference: number of questions or prompts, from the start of the input [default: all]
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// gsm8k: file for all answers, a line each; preference: for every line with its completions' `rewards` (for a language
    /// model, the values that it compares) [default: next to --output]
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// preference: a model with an LM head that --model's log-probabilities are compared with, as in DPO
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// gsm8k: maximum tokens of an answer
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_new_tokens: usize,
    /// gsm8k: answers generated at once
    #[arg(long, default_value_t = 64, value_name = "N")]
    batch_size: usize,
    /// gsm8k: 0 takes the most likely token, above it answers are drawn
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    temperature: f64,
    /// gsm8k: seed of the draws
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
    /// gsm8k: also the accuracy for each value of this key; preference: that of the best completion against each other one,
    /// by the other one's value (in a list of one entry per completion) or the prompt's value
    #[arg(long, value_name = "KEY")]
    by: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Task {
    /// Loss in nats a token, perplexity, and bits a byte of text; for conversations the loss of supervised tokens
    Perplexity,
    /// Share of pairs of ranked completions in which the model prefers the better one: by its reward; for a language model by
    /// the completion's log-probability or, with --reference, the increase of that
    Preference,
    /// Share of questions whose answer has the right number after its last `####`
    Gsm8k,
}

/// Measures on all ranks; rank 0 prints the result, and writes it with `--output`.
pub fn run(args: Args, global: &Global) -> Result<()> {
    if args.reference.is_some() && !matches!(args.task, Task::Preference) {
        return Err(Error::config("--reference is for --task preference"));
    }
    match args.task {
        Task::Perplexity => perplexity::run(args, global),
        Task::Preference => preference::run(args, global),
        Task::Gsm8k => gsm8k::run(args, global),
    }
}

/// Prints the result and writes it to --output (rank 0). Collective.
fn tell(args: &Args, world: &World, result: &Value) -> Result<()> {
    let tell = || {
        if let Some(path) = &args.output {
            write_file(path, format!("{result:#}\n").as_bytes())?;
        }
        println!("{result}");
        Ok(())
    };
    agree(&world.group, if world.is_main() { tell() } else { Ok(()) })
}

/// Writes the lines to --answers, else beside --output; nowhere without both (rank 0). Collective.
fn write_answers(args: &Args, world: &World, lines: &str) -> Result<()> {
    let beside = || args.output.as_ref().map(|path| path.with_extension("answers.jsonl"));
    let write = || match args.answers.clone().or_else(beside) {
        Some(path) => write_file(&path, lines.as_bytes()),
        None => Ok(()),
    };
    agree(&world.group, if world.is_main() { write() } else { Ok(()) })
}
