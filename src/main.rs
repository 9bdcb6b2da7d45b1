//! The command line: parses, sets the process up, calls a command, and turns its error into a message and an exit code.

use std::panic::PanicHookInfo;
use std::process::exit;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use corral::commands::recipes::NamedRecipe;
use corral::commands::{self, Global};
use corral::distributed::environment::RankEnvironment;
use corral::distributed::world;
use corral::error::{ErrorClass, first_line};
use corral::{Result, signals, telemetry};

/// Trains Llama models on sharded parameters, from pretraining to reinforcement learning.
#[derive(Parser)]
#[command(name = "corral", version, max_term_width = 100, disable_help_subcommand = true)]
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
    #[command(flatten)]
    Train(NamedRecipe<commands::training::Args>),
    /// Continue prompts
    Generate(commands::generate::Args),
    /// Chat with a model
    Chat(commands::chat::Args),
    /// Log-probabilities of texts
    Score(commands::score::Args),
    /// Measure a model
    Eval(commands::eval::Args),
    /// Show what a path holds (model, adapter, checkpoint, run, token shards, tokenizer) and whether it is complete
    Inspect(commands::inspect::Args),
    /// Fetch a small real model by its name
    Get(commands::get::Args),
    /// Write a model in another format, and check it
    Convert(commands::convert::Args),
    /// Merge an adapter into its model
    Merge(commands::merge::Args),
    /// Write a configuration that fits a model, data and this machine
    Init(commands::init::Args),
    /// Validate the configuration, data and paths without a device, and show the resolved configuration
    Check(commands::check::Args),
    /// Estimate the memory of a training run, without a device
    Plan(commands::plan::Args),
    /// Draw the curves of runs: one HTML page
    Report(commands::report::Args),
    /// List the runs below a folder: state, last and best value, age
    Runs(commands::report::RunsArgs),
    /// List the built-in recipes, or show one
    Recipes(commands::library::Args),
    /// Explain a subcommand, or a configuration key
    Help(commands::help::Args),
    /// Completions of the command line, for a shell
    Completions(commands::help::CompletionArgs),
    /// Measure speed; one JSON object a measurement
    #[command(subcommand)]
    Bench(commands::bench::Command),
}

fn main() {
    std::panic::set_hook(Box::new(tell_panic));
    let parsed = Cli::command().try_get_matches().and_then(|matches| {
        let mut cli = Cli::from_arg_matches(&matches)?;
        cli.global.note(&Cli::command(), &matches);
        Ok(cli)
    });
    let cli = parsed.unwrap_or_else(|e| {
        let_rank_0_tell(true);
        let words: Vec<String> = std::env::args().skip(1).collect();
        if let Some(advice) = commands::slips::advice(&e, &words, &Cli::command()) {
            corral::error!("{advice}");
            exit(2)
        }
        e.exit()
    });
    telemetry::console::init(cli.global.console());
    kernels::watch::set_error_reporter(|error| corral::error!("{error}"));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| execute(cli)));
    // Exits at once: what threads are left need not be waited for.
    match result {
        Ok(Ok(())) => {
            world::leave();
            exit(0)
        }
        Ok(Err(e)) => {
            if matches!(e.kind, ErrorClass::Stopped(_)) {
                world::leave();
            } else {
                let_rank_0_tell(matches!(e.kind, ErrorClass::Config | ErrorClass::Data));
                corral::error!("{e}");
            }
            exit(e.exit_code())
        }
        Err(_) => exit(1), // told by the hook
    }
}

/// What goes wrong before the ranks have met, and later what is wrong with the configuration or the data, goes wrong on all of
/// them, or they all know of it: rank 0 tells it, and its launcher ends the others while they wait here. What goes wrong on
/// another rank alone is told a little later; on each host its first rank is the first to tell.
fn let_rank_0_tell(known_to_all: bool) {
    let Some(place) = RankEnvironment::from_env().ok().flatten() else { return };
    if place.rank > 0 && (known_to_all || !world::have_met()) {
        for _ in 0..20 + 2 * place.local_rank {
            std::thread::sleep(Duration::from_millis(100));
            if signals::is_asked_to_end() {
                exit(143)
            }
        }
    }
}

fn execute(cli: Cli) -> Result<()> {
    let global = &cli.global;
    global.set_up()?;
    match cli.command {
        Command::Tokenizer(args) => commands::tokenizer::run(args),
        Command::Tokenize(args) => commands::tokenize::run(args),
        Command::Data(args) => commands::data::run(args),
        Command::Train(named) => named.recipe.train(named.args, global),
        Command::Generate(args) => commands::generate::run(args, global),
        Command::Chat(args) => commands::chat::run(args, global),
        Command::Score(args) => commands::score::run(args, global),
        Command::Eval(args) => commands::eval::run(args, global),
        Command::Convert(args) => commands::convert::run(args, global.single_device()?),
        Command::Get(args) => commands::get::run(args, global.single_device()?),
        Command::Merge(args) => commands::merge::run(args, global.single_device()?),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Init(args) => commands::init::run(args, global),
        Command::Check(args) => commands::check::run(args, global),
        Command::Plan(args) => commands::plan::run(args, global),
        Command::Report(args) => commands::report::report(&args),
        Command::Runs(args) => commands::report::runs(&args),
        Command::Recipes(args) => commands::library::run(&args, global),
        Command::Help(args) => commands::help::run(&args, Cli::command()),
        Command::Completions(args) => commands::help::completions(&args, Cli::command()),
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
        None if text.contains("failed to spawn thread") => {
            "cannot start a thread: raise the process limit (ulimit -u, or pids.max of the container), or use fewer --threads"
                .to_string()
        }
        // What `println!` does where nobody reads any more.
        None if text.starts_with("failed printing to stdout") => {
            format!("cannot write to stdout: {}", text.rsplit(": ").next().unwrap_or(text))
        }
        None => {
            let place = info.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
            format!("internal error: {}{place}; please report this", first_line(text))
        }
    };
    corral::error!("{text}");
}
