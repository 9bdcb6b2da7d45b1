//! Models, adapters and checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use super::tensors::{TensorLine, describe, dtype_name, list, parameters};
use super::{Depth, InspectReport, data, is_there, names};
use crate::checkpoint::manifest::{META, read_meta};
use crate::checkpoint::safetensors::SafetensorsReader;
use crate::checkpoint::{Checkpoint, MegatronModel, ModelRecord, Weights, locate, read_object};
use crate::data::tokenizer::{folder_has_tokenizer, gguf::has_tokenizer};
use crate::error::{Context, Result};
use crate::files::{crc32, look, parent};
use crate::gguf::{Gguf, parts};
use crate::model::layout::LM_HEAD;

/// Where a folder's weights may be, in the order in which they are looked for: a file, or an index of files.
const WEIGHTS: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// A folder in Hugging Face's or Meta's format.
pub fn model(dir: &Path, depth: Depth) -> Result<InspectReport> {
    let mut report = InspectReport::new("model", dir);
    let files = if is_there(&dir.join("params.json")) && !is_there(&dir.join("config.json")) {
        report.fact("format", "meta");
        let params = report.noted(read_object(&dir.join("params.json")));
        report.fact("params", params);
        names(dir)?.into_iter().filter(|n| n.starts_with("consolidated.") && n.ends_with(".pth")).collect()
    } else {
        report.fact("format", "hf");
        if is_there(&dir.join("config.json"))
            && let Some(config) = report.noted(read_object(&dir.join("config.json")))
        {
            report.fact("architecture", config.get("architectures").and_then(|a| a.get(0)).cloned());
            report.fact("model_type", config.get("model_type").cloned());
        }
        hf_files(&mut report, dir)?
    };
    // What the folder holds, whatever it should hold.
    let tensors = describe(&mut report, dir, &files);
    report.fact("parameters", parameters(tensors.iter().map(|t| (t.name.as_str(), t.numel()))));
    shape_of(&mut report, dir);
    tokenizer_beside(&mut report, dir);
    if depth.tensors {
        list(&mut report, &tensors);
    }
    Ok(report)
}

/// A folder in one of Megatron's formats.
pub fn megatron(dir: &Path, depth: Depth) -> InspectReport {
    let mut report = InspectReport::new("model", dir);
    report.fact("format", "megatron");
    let model = report.noted(MegatronModel::load(dir, None));
    if let Some(model) = &model {
        let [tensor, pipeline] = model.ranks();
        report.fact("ckpt_format", model.format());
        report.fact("iteration", model.iteration().file_name().map(|name| name.to_string_lossy()));
        report.fact("tensor_model_parallel_size", tensor);
        report.fact("pipeline_model_parallel_size", pipeline);
    }
    shape_of(&mut report, dir);
    tokenizer_beside(&mut report, dir);
    if let Some(model) = model.filter(|_| depth.tensors) {
        let views = model.source().views.iter();
        let mut lines: Vec<TensorLine> = views
            .map(|(name, view)| TensorLine {
                name: name.clone(),
                dtype: dtype_name(view.kind),
                shape: view.shape.iter().map(|d| *d as usize).collect(),
                bytes: view.numel() as u64 * view.kind.elt_size_in_bytes() as u64,
            })
            .collect();
        lines.sort_by(|a, b| a.name.cmp(&b.name));
        list(&mut report, &lines);
    }
    report
}

/// Notes the shape of a model, and its parameters by that.
fn shape_of(report: &mut InspectReport, path: &Path) {
    // What is missing, superfluous or of another shape; files that are damaged or missing are told already.
    if report.problems.is_empty()
        && let Some(weights) = report.noted(Weights::open(path))
    {
        report.fact("shape", json!(weights.shape()));
        if let Some(Some(scoring)) = report.noted(weights.scoring()) {
            report.fact("reward", json!(scoring));
        }
        let tied = weights.shape().tie_word_embeddings;
        if let Some(source) = report.noted(weights.into_source()) {
            // The model's own tensors: parts put together, and nothing twice.
            let mut names: Vec<&str> = source.names().map(String::as_str).collect();
            names.retain(|name| !(tied && *name == LM_HEAD));
            let numel = |name: &str| source.view(name).map_or(0, |view| view.numel() as u64);
            report.fact("parameters", parameters(names.into_iter().map(|name| (name, numel(name)))));
        }
    }
}

/// A GGUF file, or the first of its parts.
pub fn gguf(path: &Path, depth: Depth) -> Result<InspectReport> {
    let mut report = InspectReport::new("model", path);
    report.fact("format", "gguf");
    let files = report.noted(parts(path)).unwrap_or_else(|| vec![path.to_path_buf()]);
    let first = report.noted(Gguf::open(path));
    if let Some(file) = &first {
        for (fact, key) in [("architecture", "general.architecture"), ("name", "general.name")] {
            report.fact(fact, file.metadata.text(key).ok().flatten());
        }
        let names = files.iter().filter_map(|f| Some(f.file_name()?.to_string_lossy().into_owned()));
        let tensors = describe(&mut report, parent(path), &names.collect::<Vec<_>>());
        report.fact("parameters", parameters(tensors.iter().map(|t| (t.name.as_str(), t.numel()))));
        shape_of(&mut report, path);
        if report.noted(has_tokenizer(&file.metadata)) == Some(true) {
            compare_tokenizer(&mut report, path);
        }
        if depth.tensors {
            list(&mut report, &tensors);
        }
    }
    Ok(report)
}

/// The files of a Hugging Face folder's weights that are there; those that its index misses are problems.
fn hf_files(report: &mut InspectReport, dir: &Path) -> Result<Vec<String>> {
    let all = names(dir)?;
    let Some(main) = WEIGHTS.into_iter().find(|name| is_there(&dir.join(name))) else {
        let weights = |n: &String| n.starts_with("model") && n.ends_with(".safetensors");
        return Ok(all.into_iter().filter(weights).collect());
    };
    if !main.ends_with(".json") {
        return Ok(vec![main.to_string()]);
    }
    let index = report.noted(read_object(&dir.join(main))).unwrap_or_default();
    let mut wanted: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, file) in index.get("weight_map").and_then(Value::as_object).into_iter().flatten() {
        *wanted.entry(file.as_str().unwrap_or_default()).or_default() += 1;
    }
    for (file, count) in wanted.iter().filter(|(file, _)| !all.iter().any(|n| n == *file)) {
        report.problem(format!(
            "{}: missing; the index places {count} tensors in it",
            dir.join(file).display()
        ));
    }
    Ok(all.into_iter().filter(|n| wanted.contains_key(n.as_str())).collect())
}

/// Adds the tokenizer that lies beside a model, and compares their vocabularies.
fn tokenizer_beside(report: &mut InspectReport, dir: &Path) {
    if report.noted(folder_has_tokenizer(dir)) == Some(true) {
        compare_tokenizer(report, dir);
    }
}

/// Adds a model's tokenizer, and compares their vocabularies.
fn compare_tokenizer(report: &mut InspectReport, path: &Path) {
    let tokenizer = data::tokenizer(path);
    let size = |value: Option<&Value>| value.and_then(Value::as_u64);
    let model = size(report.facts.get("shape").and_then(|s| s.get("vocab_size")));
    let (Some(ids), Some(rows)) = (size(tokenizer.facts.get("vocab_size")), model) else {
        report.parts.push(tokenizer);
        return;
    };
    if ids > rows {
        report.problem(format!("the tokenizer has {ids} tokens, the model {rows}"));
    }
    report.parts.push(tokenizer);
}

/// A checkpoint of a run.
pub fn checkpoint(dir: &Path, depth: Depth) -> Result<InspectReport> {
    let mut report = InspectReport::new("checkpoint", dir);
    let meta = report.noted(read_meta(dir));
    let mut files: Vec<String> =
        names(dir)?.into_iter().filter(|n| n.starts_with("shard-") && n.ends_with(".safetensors")).collect();
    if let Some(meta) = &meta {
        report.fact("step", meta.step);
        report.fact("optimizer_step", meta.optimizer_step);
        report.fact("world_size", meta.world_size);
        report.fact("state", meta.state.clone());
        report.fact("config_sha256", meta.config_hash.clone());
        if let Some(date) = meta.template_date {
            report.fact("template_date", json!(date));
        }
        report.fact("shape", json!(meta.shape));
        report.fact("models", json!(meta.models.iter().map(model_line).collect::<Vec<_>>()));
        if let Some(base) = &meta.base {
            report.fact("base", json!(base));
            report.noted(locate(Path::new(&base.path)).context("the model that it was trained from"));
        }
        let tensors = meta.groups.iter().flat_map(|g| &g.tensors);
        let numel = |shape: &[i64]| shape.iter().product::<i64>() as u64;
        report.fact("parameters", parameters(tensors.map(|t| (t.name.as_str(), numel(&t.shape)))));
        for file in &meta.files {
            let path = dir.join(&file.name);
            match look(&path).map(|found| found.map(|m| m.len())) {
                Err(e) => report.problem(e),
                Ok(None) => report.problem(format!("{}: missing", path.display())),
                Ok(Some(bytes)) if bytes != file.bytes => {
                    report.problem(format!("{}: {bytes} bytes, should be {}", path.display(), file.bytes));
                    files.retain(|n| *n != file.name);
                }
                Ok(Some(_)) if depth.checksums => match crc32(&path) {
                    Ok(found) if found == file.crc32 => {}
                    Ok(found) => report.problem(format!(
                        "{}: damaged: its checksum is {found:08x}, should be {:08x}",
                        path.display(),
                        file.crc32
                    )),
                    Err(e) => report.problem(e),
                },
                Ok(Some(_)) => {}
            }
        }
        for name in files.iter().filter(|n| !meta.files.iter().any(|f| f.name == **n)) {
            report.problems.push(format!("{}: {META} does not know this file", dir.join(name).display()));
        }
    }
    let tensors = describe(&mut report, dir, &files);
    if report.problems.is_empty() {
        report.noted(Checkpoint::open(dir));
    }
    tokenizer_beside(&mut report, dir);
    if depth.tensors {
        list(&mut report, &tensors);
    }
    Ok(report)
}

/// A model that a run began with, without what its configuration says.
fn model_line(model: &ModelRecord) -> Value {
    json!({"name": model.name, "key": model.key, "path": model.path, "hash_of_frozen": model.hash})
}

/// An adapter in PEFT's format.
pub fn adapter(dir: &Path, depth: Depth) -> InspectReport {
    let mut report = InspectReport::new("adapter", dir);
    let config = report.noted(read_object(&dir.join("adapter_config.json"))).unwrap_or_default();
    for key in [
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "modules_to_save",
    ] {
        report.fact(key, config.get(key).cloned());
    }
    let weights = dir.join("adapter_model.safetensors");
    let name = "adapter_model.safetensors".to_string();
    let tensors = describe(&mut report, dir, &[name]);
    report.fact("parameters", parameters(tensors.iter().map(|t| (t.name.as_str(), t.numel()))));
    if SafetensorsReader::open(&weights).is_ok() && config.get("peft_type") == Some(&json!("LORA")) {
        for problem in incomplete_lora(&config, &tensors) {
            report.problem(format!("{}: {problem}", weights.display()));
        }
    }
    if depth.tensors {
        list(&mut report, &tensors);
    }
    report
}

/// What does not fit together in a LoRA: pairs, ranks, target modules.
fn incomplete_lora(config: &serde_json::Map<String, Value>, tensors: &[TensorLine]) -> Vec<String> {
    let mut problems = Vec::new();
    // By module: the shapes of A [r, in] and B [out, r].
    let mut pairs: BTreeMap<&str, [Option<&[usize]>; 2]> = BTreeMap::new();
    for tensor in tensors {
        for (i, part) in [".lora_A", ".lora_B"].into_iter().enumerate() {
            if let Some((module, _)) = tensor.name.split_once(part) {
                pairs.entry(module).or_default()[i] = Some(&tensor.shape);
            }
        }
    }
    let patterns = config.get("rank_pattern").and_then(Value::as_object).is_some_and(|p| !p.is_empty());
    let rank = config.get("r").and_then(Value::as_u64).filter(|_| !patterns);
    for (module, pair) in &pairs {
        match pair {
            [Some([a, _]), Some([_, b])] => {
                if a != b {
                    problems.push(format!("`{module}`: lora_A has rank {a}, lora_B {b}"));
                } else if let Some(rank) = rank.filter(|rank| *rank != *a as u64) {
                    problems.push(format!("`{module}` has rank {a}, adapter_config.json says {rank}"));
                }
            }
            [Some(_), Some(_)] => problems.push(format!("`{module}`: lora_A and lora_B must be matrices")),
            [None, _] => problems.push(format!("`{module}.lora_A.weight` is missing")),
            [_, None] => problems.push(format!("`{module}.lora_B.weight` is missing")),
        }
    }
    if pairs.is_empty() {
        problems.push("there are no lora_A and lora_B tensors in it".into());
    }
    // A regular expression instead of a list is left to PEFT.
    let modules = config.get("target_modules").and_then(Value::as_array);
    for module in modules.into_iter().flatten().filter_map(Value::as_str) {
        if !pairs.keys().any(|name| *name == module || name.ends_with(&format!(".{module}"))) {
            problems.push(format!("target module `{module}` has no tensors"));
        }
    }
    // Every layer has the same modules, unless the configuration picks layers or modules by pattern.
    let layer = |name: &str| -> Option<(u64, String)> {
        let (_, rest) = name.split_once(".layers.")?;
        let (number, module) = rest.split_once('.')?;
        Some((number.parse().ok()?, module.to_string()))
    };
    let found: BTreeSet<(u64, String)> = pairs.keys().filter_map(|name| layer(name)).collect();
    let layers: BTreeSet<u64> = found.iter().map(|(l, _)| *l).collect();
    let all: BTreeSet<&String> = found.iter().map(|(_, m)| m).collect();
    if modules.is_some() {
        for l in &layers {
            for module in all.iter().filter(|m| !found.contains(&(*l, m.to_string()))) {
                problems.push(format!("`{module}` of layer {l} is missing, other layers have it"));
            }
        }
    }
    problems
}
