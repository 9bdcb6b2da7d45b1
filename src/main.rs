//! The command line: parses, sets the process up, calls a command, and turns its error into a message and an exit code.

use std::panic::PanicHookInfo;
use std::process::exit;

use clap::{Parser, Subcommand};
use corral::algorithms::{pretrain, sft};
use corral::commands::{self, Global};
use corral::error::first_line;
use corral::{Result, telemetry};

/// Trains Llama models: pretraining on sharded parameters and what belongs around it.
#[derive(Parser)]
#[command(name = "corral", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train tokenizers
    Tokenizer(commands::tokenizer::Args),
    /// Turn text into token shards
    Tokenize(commands::tokenize::Args),
    /// Make the built-in data
    Data(commands::data::Args),
    /// Train a model to predict the next token
    Pretrain(commands::training::Args),
    /// Train a model on the answers of conversations
    Sft(commands::training::Args),
    /// Continue prompts
    Generate(commands::generate::Args),
    /// Log-probabilities of texts
    Score(commands::score::Args),
    /// Measure a model
    Eval(commands::eval::Args),
    /// Say what a path holds (model, adapter, checkpoint, run, token shards, tokenizer) and whether it is complete
    Inspect(commands::inspect::Args),
    /// Refuse what can be refused without a device, and show the resolved configuration
    Check(commands::check::Args),
    /// Measure speed; one JSON object a measurement
    #[command(subcommand)]
    Bench(commands::bench::Command),
}

fn main() {
    std::panic::set_hook(Box::new(tell_panic));
    let cli = Cli::parse();
    telemetry::console::init(cli.global.console());
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(cli)));
    // Exits at once: what threads are left need not be waited for.
    match result {
        Ok(Ok(())) => exit(0),
        Ok(Err(e)) => {
            if !matches!(e.kind, corral::error::Kind::Stopped(_)) {
                corral::error!("{e}");
            }
            exit(e.exit_code())
        }
        Err(_) => exit(1), // told by the hook
    }
}

fn run(cli: Cli) -> Result<()> {
    let global = &cli.global;
    global.set_up()?;
    match cli.command {
        Command::Tokenizer(args) => commands::tokenizer::run(args),
        Command::Tokenize(args) => commands::tokenize::run(args),
        Command::Data(args) => commands::data::run(args),
        Command::Pretrain(args) => {
            commands::training::run(args, global, pretrain::Inputs::open, pretrain::pretrain)
        }
        Command::Sft(args) => commands::training::run(args, global, sft::Inputs::open, sft::sft),
        Command::Generate(args) => commands::generate::run(args, global.single_device()?),
        Command::Score(args) => commands::score::run(args, global.single_device()?),
        Command::Eval(args) => commands::eval::run(args, global.single_device()?),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Check(args) => commands::check::run(args),
        Command::Bench(command) => commands::bench::run(command, global),
    }
}

/// libtorch's errors reach us as panics of tch's infallible calls (out of memory, say): one line without a backtrace.
fn tell_panic(info: &PanicHookInfo) {
    let payload = info.payload();
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("unknown panic");
    // `called Result::unwrap() on an Err value: Torch("message\nException raised from ...")`, as Debug prints it.
    let text = match text.split_once("Torch(\"") {
        Some((_, message)) => format!("libtorch: {}", message.split("\\n").next().unwrap_or(message)),
        None => {
            let place = info.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
            format!("internal error: {}{place}; please report this", first_line(text))
        }
    };
    corral::error!("{text}");
}
