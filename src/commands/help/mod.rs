//! `corral help`: subcommands, and the keys of configurations, for people and for editors.

mod catalog;
mod foreign;
mod markdown;
mod schema;

use std::path::PathBuf;

use crate::config::foreign::{KEYS, key_named};
use crate::config::keys::{Class, Key, KeyKind};
use crate::config::nearest;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::telemetry::console;
use catalog::{Catalog, KeyPlace, default_of, values_of};

/// `corral help`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A subcommand (`sft`, `bench step`), or a configuration key: its full name, its end, or another trainer's name
    /// (`optim.lr`, `lr`, `learning_rate`)
    #[arg(value_name = "SUBCOMMAND|KEY")]
    pub of: Vec<String>,
    /// A key, if a subcommand has the same name
    #[arg(long, conflicts_with_all = ["markdown", "schema"])]
    pub key: bool,
    /// All keys, in Markdown: docs/config.md
    #[arg(long, conflicts_with_all = ["of", "schema", "foreign"])]
    pub markdown: bool,
    /// The names that other trainers have for keys, in Markdown: docs/names.md
    #[arg(long, conflicts_with_all = ["of", "schema"])]
    pub foreign: bool,
    /// A man page of every command, into a folder
    #[arg(long, value_name = "DIR", conflicts_with_all = ["of", "schema", "markdown", "foreign"])]
    pub man: Option<PathBuf>,
    /// A JSON Schema of configurations, for editors: docs/corral.schema.json
    #[arg(long, conflicts_with = "of")]
    pub schema: bool,
}

/// `corral completions`
#[derive(Debug, clap::Args)]
pub struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

/// Prints the completions of the command line for a shell.
pub fn completions(args: &CompletionArgs, mut program: clap::Command) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut program, "corral", &mut text);
    console::write_out(&text).context("cannot write to stdout")
}

/// Prints the help of a subcommand (`program` is the whole command line), of a key, or a document of all keys.
pub fn run(args: &Args, mut program: clap::Command) -> Result<()> {
    if let Some(dir) = &args.man {
        files::create_dir(dir)?;
        return clap_mangen::generate_to(program, dir)
            .with_context(|| format!("cannot write man pages into {}", dir.display()));
    }
    let text = if args.markdown {
        markdown::document(&Catalog::new())
    } else if args.foreign {
        foreign::document()
    } else if args.schema {
        schema::document(&Catalog::new())?
    } else {
        match subcommand(&mut program, &args.of).filter(|_| !args.key) {
            Some(help) => help,
            None => help_of_key(&Catalog::new(), &args.of.join(" "))?,
        }
    };
    println!("{}", text.trim_end());
    Ok(())
}

/// The help of a subcommand, or of the program where none is named.
fn subcommand(program: &mut clap::Command, names: &[String]) -> Option<String> {
    program.build();
    let command = names.iter().try_fold(program, |command, name| command.find_subcommand_mut(name))?;
    Some(command.render_long_help().to_string())
}

/// The help of a key, by its dotted name, the end of it, or another trainer's name.
fn help_of_key(catalog: &Catalog, name: &str) -> Result<String> {
    let places = catalog.places();
    if let Some(foreign) = key_named(name) {
        let advice = foreign.advice(|_| true).unwrap_or_default();
        let mut text = match foreign.here.is_empty() {
            true => format!("{name} (of {}): there is no such key here: {advice}\n", foreign.programs),
            false => format!("{name} (of {}): here it is {advice}\n", foreign.programs),
        };
        for place in places.iter().filter(|place| foreign.here.contains(&place.name.as_str())) {
            text += &format!("\n{}", describe(place));
        }
        return Ok(text);
    }
    let exact: Vec<&KeyPlace> = places.iter().filter(|p| p.name == name).collect();
    let ends = |p: &&KeyPlace| p.name.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'));
    let found = if exact.is_empty() { places.iter().filter(ends).collect() } else { exact };
    if found.is_empty() {
        let names: Vec<&str> = places.iter().map(|p| p.name.as_str()).collect();
        let near = nearest(name, &names).map_or(String::new(), |near| format!("; did you mean '{near}'?"));
        return Err(Error::config(format!(
            "'{name}' is no subcommand and no key of a configuration{near} (all subcommands: corral help, all keys: corral help \
             --markdown)"
        )));
    }
    Ok(found.iter().map(|place| describe(place)).collect::<Vec<_>>().join("\n"))
}

fn describe(place: &KeyPlace) -> String {
    let KeyPlace { name, recipes, key, class } = place;
    let mut text = format!("{name} (of {})\n  {}\n", recipes.join(", "), key.about);
    match key.kind.section() {
        Some(section) => {
            if !matches!(&key.kind, KeyKind::Section(_)) {
                text += &format!("  Values:   {}\n", values_of(key));
            }
            text += "  It has these keys:\n";
            let width = section.keys.iter().map(|k| k.name.len()).max().unwrap_or(0);
            for key in &section.keys {
                text += &format!("    {:width$}  {}\n", key.name, key.about);
            }
        }
        None => {
            text += &format!("  Values:   {}\n  Default:  {}\n", values_of(key), default_of(key));
            text += &words_of(key);
            if let Some(class) = class {
                text += &format!("  A change: {}\n", effect(*class));
            }
        }
    }
    let elsewhere: Vec<String> = KEYS
        .iter()
        .filter(|foreign| foreign.here.contains(&name.as_str()))
        .map(|foreign| format!("{} ({})", foreign.name, foreign.programs))
        .collect();
    if !elsewhere.is_empty() {
        text += &format!("  Elsewhere: {}\n", elsewhere.join(", "));
    }
    text
}

/// The words of a choice, each with its meaning.
fn words_of(key: &Key) -> String {
    let Some(words) = key.kind.choice() else { return String::new() };
    words
        .iter()
        .filter(|(_, about)| !about.is_empty())
        .map(|(word, about)| format!("    {word}: {about}\n"))
        .collect()
}

/// What a change of a key does to a run that goes on in its folder.
fn effect(class: Class) -> &'static str {
    match class {
        Class::Mathematics => {
            "mathematics: refused in the same folder; another run can continue from a checkpoint with it"
        }
        Class::State => "state: refused; no checkpoint can continue with it",
        Class::Length => "length: accepted; the schedule is recomputed",
        Class::Output => "output: accepted; no bit of the training changes",
        Class::Execution => "execution: accepted; no bit of the training changes",
        Class::Rounding => "rounding: accepted; the same mathematics, rounded in another order",
        Class::Path => "path: another spelling of the same file is accepted, another file is refused",
        Class::Folder => "folder: the run's own",
    }
}
