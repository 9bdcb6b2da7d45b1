//! `corral data`: built-in data.

use crate::data::synth::{self, ProblemLevel, SynthOptions};
use crate::error::{Error, Result};
use std::path::PathBuf;

/// `corral data`
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Write the built-in arithmetic word problems, for all stages of training
    Synth(Synth),
}

#[derive(Debug, clap::Args)]
struct Synth {
    /// Folder for {pretrain,sft,rankings,prompts}.{train,valid}.jsonl
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Equal seeds give equal files
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Records in every training file; a validation file has a twentieth, at most 2000
    #[arg(long, default_value_t = 50_000, value_name = "N")]
    count: u64,
    /// 1: one step; 2: two steps; 3: products and larger numbers; mix: 0.5, 0.3, 0.2 of them
    #[arg(long, default_value = "mix", value_parser = ["1", "2", "3", "mix"])]
    level: String,
    /// Share of the answers of sft.train.jsonl that are wrong, for a model that reinforcement learning can correct
    #[arg(long, default_value_t = 0.0, value_name = "X")]
    wrong_answers: f64,
}

/// Writes the files, and prints how many records they have.
pub fn run(args: Args) -> Result<()> {
    let Command::Synth(args) = args.command;
    if args.count == 0 {
        return Err(Error::config("--count 0: there must be at least one record"));
    }
    let level = match args.level.as_str() {
        "1" => ProblemLevel::One,
        "2" => ProblemLevel::Two,
        "3" => ProblemLevel::Three,
        _ => ProblemLevel::Mix,
    };
    if !(0.0..=1.0).contains(&args.wrong_answers) {
        return Err(Error::config(format!(
            "--wrong-answers {}: expected a share of 0 to 1",
            args.wrong_answers
        )));
    }
    let Synth { seed, count, wrong_answers, .. } = args;
    synth::write(&args.output, &SynthOptions { seed, count, level, wrong_answers })?;
    let (train, valid, output) = (args.count, synth::num_valid(args.count), args.output.display());
    println!(
        "{output}: pretrain, sft, rankings and prompts, {train} records to train and {valid} to validate each"
    );
    Ok(())
}
