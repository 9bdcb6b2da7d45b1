//! `corral inspect`: what a path holds, and whether it is complete.

mod data;
mod model;
mod run;
mod tensors;
mod trace;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::check::size;
use crate::checkpoint::manifest::META;
use crate::checkpoint::{is_megatron, locate};
use crate::data::tokenizer::folder_has_tokenizer;
use crate::error::{Error, Result};
use crate::files::{is_dir, read_error};
use crate::gguf::{is_gguf, models_in};
use crate::telemetry::console::grouped;

/// `corral inspect`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of a model (Hugging Face's, Meta's or Megatron's format), adapter, checkpoint, run, tokenizer or of token shards; a file of tensors (.safetensors, .gguf, .pth,
    /// .bin) or tokens; a name that `corral get` fetched, or a hub id that the local hub cache holds
    path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Also read the contents of checkpoints and token shards, and compare their checksums
    #[arg(long)]
    checksums: bool,
}

/// How closely to look.
#[derive(Debug, Clone, Copy)]
struct Depth {
    tensors: bool,
    checksums: bool,
}

/// Prints what is there. What is damaged or incomplete is printed too, and ends in an error of kind Data.
pub fn run(args: Args) -> Result<()> {
    let depth = Depth { tensors: args.tensors, checksums: args.checksums };
    let path = locate(&args.path)?;
    let report = inspect(&path, depth)?;
    if args.json {
        println!("{}", report.to_json());
    } else {
        print!("{}", report.to_text(0));
    }
    match report.problems().as_slice() {
        [] => Ok(()),
        [first, more @ ..] => {
            let more = if more.is_empty() { String::new() } else { format!("; and {} more", more.len()) };
            Err(Error::data(format!("{}: damaged or incomplete: {first}{more}", path.display())))
        }
    }
}

/// What a path holds.
struct InspectReport {
    kind: &'static str,
    path: PathBuf,
    /// In the order of the output. Keys in `snake_case`; those that end in `bytes` and `num_...` print for people.
    facts: Map<String, Value>,
    /// What is damaged or missing.
    problems: Vec<String>,
    /// What lies in it and is something by itself.
    parts: Vec<InspectReport>,
}

impl InspectReport {
    fn new(kind: &'static str, path: &Path) -> InspectReport {
        let path = path.to_path_buf();
        InspectReport { kind, path, facts: Map::new(), problems: Vec::new(), parts: Vec::new() }
    }

    fn fact(&mut self, key: &str, value: impl Into<Value>) {
        self.facts.insert(key.to_string(), value.into());
    }

    /// Notes an error's message, each of its lines after the first as a problem of its own.
    fn problem(&mut self, message: impl ToString) {
        let message = message.to_string();
        match message.split_once('\n') {
            None => self.problems.push(message),
            Some((_, rest)) => self.problems.extend(rest.lines().map(|l| l.trim().to_string())),
        }
    }

    /// The value, or none and its error as a problem.
    fn noted<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|e| self.problem(e)).ok()
    }

    /// Its own problems and those of its parts.
    fn problems(&self) -> Vec<&str> {
        let own = self.problems.iter().map(String::as_str);
        own.chain(self.parts.iter().flat_map(InspectReport::problems)).collect()
    }

    fn complete(&self) -> bool {
        self.problems().is_empty()
    }

    fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("path".into(), json!(self.path));
        object.insert("kind".into(), json!(self.kind));
        object.insert("complete".into(), json!(self.complete()));
        object.insert("problems".into(), json!(self.problems));
        object.extend(self.facts.clone());
        if !self.parts.is_empty() {
            object.insert("parts".into(), self.parts.iter().map(InspectReport::to_json).collect());
        }
        Value::Object(object)
    }

    fn to_text(&self, indent: usize) -> String {
        let state = if self.complete() { "complete" } else { "damaged or incomplete" };
        let mut text = format!("{:indent$}{}: {}, {state}\n", "", self.path.display(), self.kind);
        for (key, value) in &self.facts {
            render(&mut text, key, value, indent + 2);
        }
        for problem in &self.problems {
            text.push_str(&format!("{:1$}! {problem}\n", "", indent + 2));
        }
        for part in &self.parts {
            text.push_str(&part.to_text(indent + 2));
        }
        text
    }
}

/// Appends lines `key: value`; what is absent is left out.
fn render(text: &mut String, key: &str, value: &Value, indent: usize) {
    let label = key.replace('_', " ");
    match value {
        Value::Null => {}
        Value::Array(values) if values.is_empty() => {}
        Value::Object(object)
            if object.values().any(|v| v.is_object() || v.is_array()) || object.len() > 8 =>
        {
            text.push_str(&format!("{:indent$}{label}:\n", ""));
            object.iter().for_each(|(key, value)| render(text, key, value, indent + 2));
        }
        Value::Array(values) if values.iter().any(Value::is_object) => {
            text.push_str(&format!("{:indent$}{label}:\n", ""));
            for value in values {
                text.push_str(&format!("{:1$}{2}\n", "", indent + 2, inline(key, value)));
            }
        }
        value => text.push_str(&format!("{:indent$}{label}: {}\n", "", inline(key, value))),
    }
}

/// A value on one line.
fn inline(key: &str, value: &Value) -> String {
    match value {
        Value::Object(object) => object
            .iter()
            .filter(|(_, v)| !v.is_null())
            .map(|(k, v)| match k.as_str() {
                "name" | "dtype" | "shape" | "bytes" => inline(k, v),
                "total" => inline("num_", v),
                _ if key == "parameters" => format!("{k} {}", inline("num_", v)),
                _ => match k.strip_prefix("num_") {
                    Some(what) => format!("{} {what}", inline(k, v)),
                    None => format!("{} {}", k.replace('_', " "), inline(k, v)),
                },
            })
            .collect::<Vec<_>>()
            .join(", "),
        Value::Array(values) => {
            let values = values.iter().map(|v| inline(key, v)).collect::<Vec<_>>().join(", ");
            if key == "shape" { format!("[{values}]") } else { values }
        }
        Value::String(text) => text.clone(),
        Value::Number(n) => match n.as_u64() {
            Some(n) if key.ends_with("bytes") => size(n),
            Some(n) if key.starts_with("num_") || key == "vocab_size" => grouped(n),
            _ => n.to_string(),
        },
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        Value::Null => "none".into(),
    }
}

fn inspect(path: &Path, depth: Depth) -> Result<InspectReport> {
    let has = |name: &str| is_there(&path.join(name));
    if !is_dir(path)? {
        fs::File::open(path).map_err(|e| read_error(path, &e))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        return match name.as_ref() {
            "tokenizer.json" | "tokenizer.model" | "qwen.tiktoken" => Ok(data::tokenizer(path)),
            name if name.ends_with(".safetensors") || tensors::is_torch_file(path) => Ok(tensors::file(path)),
            _ if is_gguf(path) => model::gguf(path, depth),
            "trace.jsonl" => trace::trace(path),
            name if name.ends_with(".tokens") => Ok(data::tokens(path, depth)),
            _ => Err(unknown(path)),
        };
    }
    let names = names(path)?;
    let any = |start: &str, end: &str| names.iter().any(|n| n.starts_with(start) && n.ends_with(end));
    Ok(match () {
        () if has(META) || any("shard-", ".safetensors") => model::checkpoint(path, depth)?,
        () if is_megatron(path)? => model::megatron(path, depth),
        () if has("adapter_config.json") || has("adapter_model.safetensors") => model::adapter(path, depth),
        () if has("config.yaml") || has("checkpoints") || has("metrics.jsonl") => run::run(path, depth)?,
        () if has("config.json")
            || has("params.json")
            || any("model", ".safetensors")
            || any("pytorch_model", ".bin") =>
        {
            model::model(path, depth)?
        }
        () if any("shard-", ".tokens") => data::tokens(path, depth),
        () if has("train") || has("valid") => data::dataset(path, depth)?,
        () if folder_has_tokenizer(path)? => data::tokenizer(path),
        () if let [only] = models_in(path)?.as_slice() => model::gguf(only, depth)?,
        () => return Err(unknown(path)),
    })
}

fn unknown(path: &Path) -> Error {
    Error::data(format!(
        "{}: not recognized; a model has config.json, params.json or latest_checkpointed_iteration.txt, an adapter \
         adapter_config.json, a checkpoint {}, a run config.yaml, a tokenizer tokenizer.json, token shards shard-*.tokens, and single files end in \
         .safetensors, .gguf, .pth, .bin or .tokens, or are a trace.jsonl",
        path.display(),
        META
    ))
}

/// Whether a folder lists this, a link that leads nowhere included: reading that tells what is wrong with it.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// The names in a folder, sorted.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.map_err(|e| read_error(dir, &e))?;
    let mut names: Vec<String> =
        entries.iter().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}
