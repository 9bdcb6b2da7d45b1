//! `corral recipes`: the configurations that are built in.

use std::path::PathBuf;

use serde_json::{Value as Json, json};

use crate::commands::Global;
use crate::commands::check::size;
use crate::commands::plan::target;
use crate::commands::predict;
use crate::commands::recipes::{AnyRecipe, RECIPES};
use crate::config::algorithm::BuiltInConfig;
use crate::config::nearest;
use crate::error::{Context, Error, Result};
use crate::plan::MemoryPlan;
use crate::telemetry::console;
use crate::telemetry::progress::duration;

/// `corral recipes`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A recipe to show, such as sft/smollm2-persona; without it all are listed
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Copy the recipe into a new file
    #[arg(long, value_name = "FILE", requires = "name")]
    write: Option<PathBuf>,
    /// One JSON object a recipe
    #[arg(long, conflicts_with_all = ["name", "write"])]
    json: bool,
}

/// Lists all recipes, or shows or copies one.
pub fn run(args: &Args, global: &Global) -> Result<()> {
    match (&args.name, &args.write) {
        (None, _) => list(args.json, global),
        (Some(name), None) => print(find(name)?.1.text),
        (Some(name), Some(file)) => copy(find(name)?, file),
    }
}

type ListedRecipe = (&'static dyn AnyRecipe, &'static BuiltInConfig);

fn all() -> impl Iterator<Item = ListedRecipe> {
    RECIPES.iter().flat_map(|recipe| recipe.built_in().iter().map(move |built_in| (*recipe, built_in)))
}

fn name_of((recipe, built_in): &ListedRecipe) -> String {
    format!("{}/{}", recipe.name(), built_in.name)
}

/// A recipe by its whole name, or by its end where only one has it.
fn find(name: &str) -> Result<ListedRecipe> {
    if let Some(found) = all().find(|found| name_of(found) == name || found.1.file == name) {
        return Ok(found);
    }
    let ends: Vec<ListedRecipe> = all().filter(|found| found.1.name == name).collect();
    match ends.as_slice() {
        [found] => Ok(*found),
        [] => {
            let names: Vec<String> = all().map(|found| name_of(&found)).collect();
            let known: Vec<&str> = names.iter().map(String::as_str).collect();
            let near = nearest(name, &known).map_or(String::new(), |near| format!("; did you mean {near}?"));
            Err(Error::config(format!("there is no recipe '{name}'{near} (corral recipes lists all)")))
        }
        several => {
            let names: Vec<String> = several.iter().map(name_of).collect();
            Err(Error::config(format!("'{name}' matches several recipes: {}", names.join(", "))))
        }
    }
}

fn print(text: &str) -> Result<()> {
    console::write_out(text.as_bytes()).context("cannot write to stdout")
}

fn copy((recipe, built_in): ListedRecipe, file: &PathBuf) -> Result<()> {
    if file.exists() {
        return Err(Error::config(format!("{} exists already", file.display())));
    }
    std::fs::write(file, built_in.text).with_context(|| format!("cannot write {}", file.display()))?;
    let name = recipe.name();
    print(&format!("{0} is written; look at it with: corral check {name} --config {0}\n", file.display()))
}

fn list(as_json: bool, global: &Global) -> Result<()> {
    let mut rows = vec![["recipe", "model", "method", "memory", "time", "about"].map(str::to_string)];
    let rates = predict::rates(global, None)?;
    for found in all() {
        let (recipe, built_in) = found;
        let config = &built_in.text;
        let ranks = ranks(config);
        let (resolved, plan) = recipe.describe(built_in, &target(global, ranks)?)?;
        let bytes = plan.as_ref().map(MemoryPlan::bytes);
        let time = plan.as_ref().zip(rates.as_ref()).and_then(|(plan, rates)| plan.work().predict(rates));
        let (model, method, about) = (model(&resolved), method(&resolved), about(config));
        if as_json {
            let line = json!({"recipe": name_of(&found), "file": built_in.file, "model": model, "method": method,
                              "ranks": ranks, "bytes": bytes, "predicted_step_s": time.map(|p| p.step_s),
                              "predicted_s": time.and_then(|p| p.total_s), "about": about});
            print(&format!("{line}\n"))?;
            continue;
        }
        let memory = bytes.map_or("-".into(), |bytes| size(bytes.max(0) as u64));
        let time = time.map_or("-".into(), |p| match p.total_s {
            Some(total_s) => duration(total_s),
            None => format!("{} s/step", predict::short(p.step_s)),
        });
        rows.push([name_of(&found), model, method, memory, time, about]);
    }
    if as_json {
        return Ok(());
    }
    let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2), width(3), width(4)];
    for [recipe, model, method, memory, time, about] in &rows {
        let [a, b, c, d, e] = widths;
        print(&format!("{recipe:a$}  {model:b$}  {method:c$}  {memory:>d$}  {time:>e$}  {about}\n"))?;
    }
    print(
        "\nmemory: of a rank, by corral plan, without the process; -: the model is not here\n\
         time: predicted for full rows and all ranks on this machine; -: corral bench rates was not run, or the \
         model is not here\n\
         run one: corral sft --config smollm2-persona; show it: corral recipes sft/smollm2-persona; copy it: --write FILE\n",
    )
}

/// The ranks of the command in a recipe's header.
pub fn ranks(text: &str) -> i64 {
    let number = |option: &str| {
        let behind = text.split(option).nth(1).and_then(|rest| rest.split_whitespace().next());
        behind.and_then(|n| n.parse().ok()).unwrap_or(1)
    };
    number("--nproc ") * number("--nnodes ")
}

/// The model that is trained: a path, a preset, or the size of a new one.
fn model(config: &Json) -> String {
    let section = if config["model"].is_object() { &config["model"] } else { &config["actor"] };
    let text = |key: &str| section[key].as_str().map(str::to_string);
    let new =
        || format!("new, {} x {}", section["init"]["num_hidden_layers"], section["init"]["hidden_size"]);
    text("path").or_else(|| text("preset")).unwrap_or_else(new)
}

/// Full, or adapters over what.
fn method(config: &Json) -> String {
    let lora = if config["lora"].is_object() { &config["lora"] } else { &config["actor"]["lora"] };
    match (lora.is_object(), lora["base"].as_str()) {
        (false, _) => "full".into(),
        (true, Some(base)) if base != "none" => format!("LoRA over {base}"),
        (true, _) => "LoRA".into(),
    }
}

/// The first sentence of the recipe's header.
fn about(text: &str) -> String {
    let lines = text.lines().map_while(|line| line.strip_prefix("# "));
    let header = lines.collect::<Vec<_>>().join(" ");
    let end = [": ", ". "].iter().filter_map(|mark| header.find(mark)).min().unwrap_or(header.len());
    header[..end].trim_end_matches(['.', ':']).to_string()
}
