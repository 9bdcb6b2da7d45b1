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
    /// Where the result goes, besides stdout
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// perplexity: tokens of a window [default: the model's positions, at most 1024]; of conversations the most tokens of one,
    /// longer ones being left out and counted [default: the model's positions]
    #[arg(long, value_name = "N")]
    sequence_length: Option<usize>,
    /// perplexity: key or column of the text [default: text; of records without it the conversation is measured]
    #[arg(long, value_name = "KEY")]
    text_key: Option<String>,
    /// gsm8k, preference: questions that are asked, or prompts, the first of the input [default: all]
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// gsm8k: where every answer goes, a line each; preference: every line with its completions' `rewards`, those of a
    /// language model being what it compares [default: beside --output]
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// preference: a model with an LM head that --model's log-probabilities are compared with, as DPO does it
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// gsm8k: tokens an answer may have
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_new_tokens: usize,
    /// gsm8k: answers in work at once
    #[arg(long, default_value_t = 64, value_name = "N")]
    batch_size: usize,
    /// gsm8k: 0 takes the most likely token, above it answers are drawn
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    temperature: f64,
    /// gsm8k: of the draws
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
    /// gsm8k: also the accuracy for each value of this key; preference: of the best completion against each other one, by
    /// what the key says of that (in a list of one entry a completion) or of the prompt
    #[arg(long, value_name = "KEY")]
    by: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Task {
    /// Loss in nats a token, perplexity, and bits a byte of text; of conversations the loss of supervised tokens
    Perplexity,
    /// Share of pairs of ranked completions of which a model prefers the better one: by its reward; a language model by the
    /// completion's log-probability, or, with --reference, by how much that has grown
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
