//! What the conversions to a `tokenizers` definition share.

use super::invalid;
use crate::error::Result;
use serde_json::{Map, Value, json};
use std::path::Path;

/// A vocabulary turned into the contents of a `tokenizer.json`.
pub(super) struct Converted {
    pub definition: Value,
    /// `bos_token`, `eos_token`, `unk_token` and `pad_token` for `tokenizer_config.json`, where there are such.
    pub special: Map<String, Value>,
    /// Tokens that end a text, where the format tells more than `eos_token`.
    pub eos_ids: Vec<u32>,
}

/// A token beside the vocabulary, as `added_tokens` of a `tokenizer.json` has them.
#[derive(Debug, Clone)]
pub(super) struct Added {
    pub id: u32,
    pub content: String,
    /// `single_word`, `lstrip`, `rstrip`, `normalized`, `special`.
    pub flags: [bool; 5],
}

pub(super) const FLAGS: [&str; 5] = ["single_word", "lstrip", "rstrip", "normalized", "special"];

impl Added {
    pub fn special(id: u32, content: &str) -> Added {
        Added { id, content: content.into(), flags: [false, false, false, false, true] }
    }

    pub fn definition(&self) -> Value {
        let mut map =
            Map::from_iter([("id".into(), json!(self.id)), ("content".into(), json!(self.content))]);
        map.extend(FLAGS.into_iter().zip(self.flags).map(|(name, flag)| (name.into(), json!(flag))));
        Value::Object(map)
    }

    /// The tokens that `tokenizer_config.json` (`added_tokens_decoder`) and, of older models, `added_tokens.json` add.
    pub fn of_files(config: &Value, older: &Value, folder: &Path) -> Result<Vec<Added>> {
        let mut tokens = Vec::new();
        let error = |file: &str, what: String| invalid(&folder.join(file), what);
        for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
            let parsed = id.parse().ok().zip(token["content"].as_str().filter(|content| !content.is_empty()));
            let (id, content) = parsed.ok_or_else(|| {
                error("tokenizer_config.json", format!("added_tokens_decoder: `{id}` is not a token"))
            })?;
            let special = token["special"].as_bool().unwrap_or(false);
            let flag = |name| token[name].as_bool().unwrap_or(name == "normalized" && !special);
            let flags = FLAGS.map(flag);
            tokens.push(Added { id, content: content.into(), flags });
        }
        for (content, id) in older.as_object().into_iter().flatten() {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|_| !content.is_empty());
            let id = id.ok_or_else(|| error("added_tokens.json", format!("`{content}` has no id")))?;
            if tokens.iter().all(|t| t.content != *content) {
                let special = is_special(config, content);
                tokens.push(Added {
                    id,
                    content: content.clone(),
                    flags: [false, false, false, !special, special],
                });
            }
        }
        Ok(tokens)
    }
}

/// Whether `tokenizer_config.json` names the token as a special one.
fn is_special(config: &Value, content: &str) -> bool {
    let text = |v: &Value| v.as_str().or(v["content"].as_str()) == Some(content);
    let named = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
    let extra = config["additional_special_tokens"].as_array();
    named.iter().any(|name| text(&config[name])) || extra.into_iter().flatten().any(text)
}

/// Takes the special tokens that `tokenizer_config.json` names; null takes one away.
pub(super) fn overlay(special: &mut Map<String, Value>, config: &Map<String, Value>) {
    for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        match config.get(name) {
            Some(Value::Null) => drop(special.remove(name)),
            Some(token) => drop(special.insert(name.into(), token.clone())),
            None => {}
        }
    }
}

/// Puts these tokens (text, id) before and after every text; null where there are none.
pub(super) fn post_processor(begin: Option<(&str, u32)>, end: Option<(&str, u32)>) -> Value {
    if begin.is_none() && end.is_none() {
        return Value::Null;
    }
    let piece = |token: Option<(&str, u32)>, type_id: u32| {
        token.map(|(text, _)| json!({"SpecialToken": {"id": text, "type_id": type_id}}))
    };
    let sequence = |name: &str, type_id: u32| {
        let text = json!({"Sequence": {"id": name, "type_id": type_id}});
        piece(begin, type_id).into_iter().chain([text]).chain(piece(end, type_id)).collect::<Vec<_>>()
    };
    let tokens = begin.into_iter().chain(end);
    let special: Map<String, Value> = tokens
        .map(|(text, id)| (text.to_string(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let pair = [sequence("A", 0), sequence("B", 1)].concat();
    json!({
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": pair,
        "special_tokens": special,
    })
}

/// What byte-level BPEs differ in.
pub(super) struct ByteLevel<'a> {
    pub added: &'a [Added],
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    /// Put before and after every text.
    pub begin: Option<(&'a str, u32)>,
    pub end: Option<(&'a str, u32)>,
    /// A word that is a token is taken as it is.
    pub ignore_merges: bool,
    pub vocab: Map<String, Value>,
    pub merges: Vec<[String; 2]>,
}

impl ByteLevel<'_> {
    /// The contents of a `tokenizer.json`.
    pub fn definition(self) -> Value {
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
        let post_processor = match post_processor(self.begin, self.end) {
            Value::Null => byte_level,
            template => json!({"type": "Sequence", "processors": [byte_level, template]}),
        };
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added.iter().map(Added::definition).collect::<Vec<_>>(),
            "normalizer": self.normalizer,
            "pre_tokenizer": self.pre_tokenizer,
            "post_processor": post_processor,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": self.ignore_merges,
                "vocab": self.vocab,
                "merges": self.merges,
            },
        })
    }
}
