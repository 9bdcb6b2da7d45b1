//! Which file of a folder is the tokenizer, and what belongs to it.

use super::convert::Added;
use super::{gguf, invalid, sentencepiece, tiktoken};
use crate::content::unusable;
use crate::error::Result;
use crate::files::{is_dir, is_file, read_error};
use crate::gguf::is_gguf;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Names and contents of files.
pub(super) type Contents = Vec<(String, Vec<u8>)>;

/// The files that are read, the first that is there.
const MAIN: [&str; 3] = ["tokenizer.json", "tokenizer.model", "qwen.tiktoken"];

/// Vocabularies in all formats that a folder may hold one in.
pub(super) const VOCABULARIES: [&str; 6] =
    ["tokenizer.json", "tokenizer.model", "qwen.tiktoken", "added_tokens.json", "vocab.json", "merges.txt"];

/// What belongs to a tokenizer besides.
const COMPANIONS: [&str; 5] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Whether a folder has a tokenizer that [`super::Tokenizer::load`] reads.
pub fn folder_has_tokenizer(folder: &Path) -> Result<bool> {
    Ok(first_file(folder, &MAIN)?.is_some())
}

/// The first of these files that a folder has.
fn first_file(folder: &Path, names: &[&'static str]) -> Result<Option<&'static str>> {
    for name in names {
        if is_file(&folder.join(name))? {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Whether a file of this name in a model's folder belongs to its tokenizer.
pub fn is_tokenizer_file(name: &str) -> bool {
    VOCABULARIES.contains(&name) || COMPANIONS.contains(&name)
}

/// The one place that decides which file is loaded.
pub(super) fn main_file(path: &Path) -> Result<PathBuf> {
    if !is_dir(path)? {
        return Ok(path.to_path_buf());
    }
    if let Some(name) = first_file(path, &MAIN)? {
        return Ok(path.join(name));
    }
    let found =
        ["vocab.json", "merges.txt", "tekken.json", "tokenizer.model.v3", "spiece.model", "vocab.txt"];
    let found: Vec<&str> = found.into_iter().filter(|name| path.join(name).is_file()).collect();
    let outside = path.parent().map(|folder| folder.join("tokenizer.model")).filter(|file| file.is_file());
    let hint = match outside {
        _ if !found.is_empty() => {
            format!("; {} cannot be read: save the tokenizer once with transformers", found.join(" and "))
        }
        // Meta's downloads of Llama 1 and 2 have one tokenizer beside the folders of the models.
        Some(file) if path.join("params.json").is_file() => {
            format!("; {} exists: copy it into the folder, or name it in tokenizer.path", file.display())
        }
        _ => String::new(),
    };
    Err(invalid(path, format!("there is no {}, {} or {} in this folder{hint}", MAIN[0], MAIN[1], MAIN[2])))
}

pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|e| unusable(path, invalid(path, format!("not valid JSON: {e}"))))
}

/// Names and contents of a tokenizer's files, with a `tokenizer.json` in any case; and the `config.json` beside them.
///
/// # Errors
/// Of kind Data: also a file of a checkpoint of ours that is not as it was saved.
pub(super) fn read(main: &Path) -> Result<(Contents, Value)> {
    if is_gguf(main) {
        // What lies beside it belongs to other models.
        return Ok((gguf::read(main)?, json!({})));
    }
    let sums = checksums(main);
    let read = |path: &Path| {
        let bytes = std::fs::read(path).map_err(|e| read_error(path, &e))?;
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        match sums.get(name) {
            Some(sum) if *sum != crc32fast::hash(&bytes) => {
                Err(invalid(path, "corrupt: its checksum is not the one that meta.json has"))
            }
            _ => Ok(bytes),
        }
    };
    let bytes = read(main)?;
    let mut files = Vec::new();
    for name in VOCABULARIES.iter().skip(1).chain(&COMPANIONS) {
        let path = main.with_file_name(name);
        if is_file(&path)? {
            files.push((name.to_string(), read(&path)?));
        }
    }
    let path = main.with_file_name("config.json");
    let model = if is_file(&path)? { parse(&read(&path)?, &path)? } else { json!({}) };
    let family = match main.extension().and_then(|e| e.to_str()) {
        Some("json") => {
            files.insert(0, ("tokenizer.json".into(), bytes));
            return Ok((files, model));
        }
        Some("tiktoken") => Some(tiktoken::TiktokenFamily::Qwen),
        _ if tiktoken::is_tiktoken(&bytes) => Some(tiktoken::TiktokenFamily::Llama3),
        _ => None,
    };

    let companion = |name: &str| {
        let file = files.iter().find(|(n, _)| n == name);
        file.map_or(Ok(json!({})), |(_, bytes)| parse(bytes, &main.with_file_name(name)))
    };
    let mut config = companion("tokenizer_config.json")?;
    let mut generation = companion("generation_config.json")?;
    let added = Added::of_files(&config, &companion("added_tokens.json")?, crate::files::parent(main))?;
    let fields = object(&mut config, &main.with_file_name("tokenizer_config.json"))?;
    let converted = match family {
        Some(family) => tiktoken::convert(&bytes, family, fields, &generation, &added),
        None => sentencepiece::convert(&bytes, fields, &added),
    };
    let converted = converted.map_err(|e| invalid(main, e))?;
    // What the new tokenizer.json says itself, or what asks for another class than the one that reads it.
    for key in
        ["add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "added_tokens_decoder", "auto_map"]
            .into_iter()
            .chain(["sp_model_kwargs", "vocab_file"])
    {
        fields.remove(key);
    }
    fields.extend(converted.special);
    fields.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    fields.entry("clean_up_tokenization_spaces").or_insert(json!(false));
    if !converted.eos_ids.is_empty() {
        let all = object(&mut generation, &main.with_file_name("generation_config.json"))?;
        let ids = all.entry("eos_token_id").or_insert(json!([]));
        let mut list = ids.as_array().cloned().unwrap_or(vec![ids.clone()]);
        let more = converted.eos_ids.iter().map(|id| json!(id)).filter(|id| !list.contains(id));
        let more: Vec<Value> = more.collect();
        list.extend(more);
        *ids = Value::Array(list);
    }
    let text = |value: &Value| format!("{value:#}\n").into_bytes();
    files.retain(|(name, _)| !["tokenizer_config.json", "added_tokens.json"].contains(&name.as_str()));
    files.insert(0, ("tokenizer.json".into(), converted.definition.to_string().into_bytes()));
    files.push(("tokenizer_config.json".into(), text(&config)));
    if generation.as_object().is_some_and(|g| !g.is_empty()) {
        files.retain(|(name, _)| name != "generation_config.json");
        files.push(("generation_config.json".into(), text(&generation)));
    }
    Ok((files, model))
}

/// The checksums that a checkpoint of ours keeps of the files beside `main`; none in other folders. (The checkpoint itself is
/// read by those who load it, and refused there where its `meta.json` is damaged.)
fn checksums(main: &Path) -> HashMap<String, u32> {
    let text = std::fs::read(main.with_file_name("meta.json")).unwrap_or_default();
    let meta: Value = serde_json::from_slice(&text).unwrap_or_default();
    if meta["format"] != "corral checkpoint" {
        return HashMap::new();
    }
    let sum = |file: &Value| {
        let crc32 = u32::try_from(file["crc32"].as_u64()?).ok()?;
        Some((file["name"].as_str()?.to_string(), crc32))
    };
    meta["checkpoint"]["files"].as_array().into_iter().flatten().filter_map(sum).collect()
}

fn object<'a>(value: &'a mut Value, path: &Path) -> Result<&'a mut Map<String, Value>> {
    value.as_object_mut().ok_or_else(|| invalid(path, "not a JSON object"))
}

/// The template of a `chat_template` key: a text, or a list of named ones, of which `default` counts.
pub(super) fn template_of(value: &Value) -> Result<Option<String>, String> {
    let Some(list) = value.as_array() else {
        return Ok(value.as_str().map(str::to_string));
    };
    let named = |name: &str| list.iter().find(|t| t["name"] == name);
    match named("default").and_then(|t| t["template"].as_str()) {
        Some(template) => Ok(Some(template.to_string())),
        None => {
            let names: Vec<&str> = list.iter().filter_map(|t| t["name"].as_str()).collect();
            Err(format!("chat_template has no template `default`, only {}", names.join(", ")))
        }
    }
}
