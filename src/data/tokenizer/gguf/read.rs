//! The tokenizer of a GGUF file as the files of a Hugging Face folder.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::pre::{self, Pre};
use crate::data::tokenizer::convert::{Added, ByteLevel, Converted, overlay};
use crate::data::tokenizer::files::Contents;
use crate::data::tokenizer::invalid;
use crate::data::tokenizer::sentencepiece::{
    self, BYTE, CONTROL, NORMAL, SentencePieceModel, UNKNOWN, UNUSED, USER_DEFINED, VocabularyPiece,
};
use crate::error::{Error, Result};
use crate::gguf::{Gguf, Metadata};
use crate::warn;

/// Names of tokens that end an answer, whatever the metadata says, as llama.cpp takes them.
const ENDS: [&str; 8] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
];

/// What is read of the keys `tokenizer.ggml.*`.
struct Vocabulary<'a> {
    tokens: &'a [String],
    /// A type for each token, as SentencePiece has them.
    types: Vec<u64>,
    metadata: &'a Metadata,
}

/// Whether the file has a tokenizer.
pub fn has_tokenizer(metadata: &Metadata) -> Result<bool> {
    Ok(metadata.text("tokenizer.ggml.model")?.is_some_and(|model| model != "none" && model != "no_vocab"))
}

/// Names and contents of the files.
pub(in crate::data::tokenizer) fn read(path: &Path) -> Result<Contents> {
    let file = Gguf::open(path)?;
    let metadata = &file.metadata;
    let refused = |what: String| invalid(path, what);
    let vocabulary = Vocabulary::read(metadata).map_err(|e| e.context(path.display()))?;
    let flag = |key: &str, default: bool| -> Result<bool> {
        Ok(metadata.flag(&format!("tokenizer.ggml.{key}"))?.unwrap_or(default))
    };
    let mut config = Map::new();
    let mut set = |key: &str, value: Value| drop(config.insert(key.into(), value));
    let mut named = Map::new();
    for (name, key) in [
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ] {
        if let Some(token) = vocabulary.special(key)? {
            named.insert(name.into(), json!(token));
        }
    }
    let model = metadata.text("tokenizer.ggml.model")?;
    let converted = match model {
        Some("gpt2") => {
            let (pre, told) = pre_tokenizer(metadata.text("tokenizer.ggml.pre")?).map_err(refused)?;
            if let Some(told) = told {
                warn!("{}: {told}", path.display());
            }
            let add = [flag("add_bos_token", pre.add_bos)?, flag("add_eos_token", false)?];
            vocabulary.byte_level(&pre, &named, add)
        }
        Some("llama") => {
            set("add_bos_token", json!(flag("add_bos_token", true)?));
            set("add_eos_token", json!(flag("add_eos_token", false)?));
            set("add_prefix_space", json!(flag("add_space_prefix", true)?));
            vocabulary.sentencepiece(&named, &config)
        }
        Some(other) => Err(format!(
            "its tokenizer is of the kind \"{other}\", which is not built; gpt2 (byte-level BPE) and llama (SentencePiece) are"
        )),
        None => Err("it has no tokenizer (no key tokenizer.ggml.model)".into()),
    };
    let converted = converted.map_err(refused)?;
    let mut special = converted.special;
    overlay(&mut special, &named);
    let mut config = special;
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    if let Some(template) = template(metadata)? {
        config.insert("chat_template".into(), template);
    }
    let ends = vocabulary.ends()?;
    let text = |value: &Value| format!("{value:#}\n").into_bytes();
    Ok(vec![
        ("tokenizer.json".into(), converted.definition.to_string().into_bytes()),
        ("tokenizer_config.json".into(), text(&Value::Object(config))),
        ("generation_config.json".into(), text(&json!({"eos_token_id": ends}))),
    ])
}

/// The pre-tokenizer that is named, and what is to be told.
fn pre_tokenizer(name: Option<&str>) -> Result<(Pre, Option<String>), String> {
    let mut all = pre::all();
    let of = |all: &[Pre], name: &str| all.iter().position(|pre| pre.names.contains(&name));
    match name {
        None => {
            let default = of(&all, "default").expect("it is there");
            let told = "tokenizer.ggml.pre is missing: text is split by llama.cpp's default, which may differ from the model's \
                        training; convert the model again with a current llama.cpp";
            Ok((all.swap_remove(default), Some(told.into())))
        }
        Some(name) => match of(&all, name) {
            Some(i) => Ok((all.swap_remove(i), None)),
            None => {
                let known: Vec<&str> = all.iter().flat_map(|pre| pre.names).copied().collect();
                Err(format!("its pre-tokenizer \"{name}\" is not built; built are: {}", known.join(", ")))
            }
        },
    }
}

/// `chat_template` of a `tokenizer_config.json`: a text, or a list where there are several.
fn template(metadata: &Metadata) -> Result<Option<Value>> {
    const KEY: &str = "tokenizer.chat_template";
    let default = metadata.text(KEY)?;
    let mut all: Vec<Value> =
        default.into_iter().map(|t| json!({"name": "default", "template": t})).collect();
    for key in metadata.keys() {
        if let Some(name) = key.strip_prefix(KEY).and_then(|rest| rest.strip_prefix('.')) {
            all.push(json!({"name": name, "template": metadata.text(key)?}));
        }
    }
    Ok(match (default, all.len()) {
        (_, 0) => None,
        (Some(only), 1) => Some(json!(only)),
        _ => Some(Value::Array(all)),
    })
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self> {
        let tokens = metadata.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
        if tokens.is_empty() {
            return Err(Error::data("it has no tokenizer (no key tokenizer.ggml.tokens)"));
        }
        let types = match metadata.integers("tokenizer.ggml.token_type")? {
            None => vec![NORMAL; tokens.len()],
            Some(types) => types.iter().map(|t| u64::try_from(*t).unwrap_or(0)).collect(),
        };
        if types.len() != tokens.len() {
            return Err(Error::data(format!(
                "`tokenizer.ggml.token_type` has {} values for {} tokens",
                types.len(),
                tokens.len()
            )));
        }
        if let Some((i, kind)) = types.iter().enumerate().find(|(_, kind)| !(NORMAL..=BYTE).contains(*kind)) {
            return Err(Error::data(format!(
                "`tokenizer.ggml.token_type`: the type {kind} of token {i} is not known"
            )));
        }
        Ok(Vocabulary { tokens, types, metadata })
    }

    /// The token that a key names by its id.
    fn special(&self, key: &str) -> Result<Option<&'a str>> {
        let key = format!("tokenizer.ggml.{key}");
        let Some(id) = self.metadata.integer(&key)? else { return Ok(None) };
        match usize::try_from(id).ok().and_then(|id| self.tokens.get(id)) {
            Some(token) => Ok(Some(token)),
            None => Err(Error::data(format!("`{key}` is {id}, but there are {} tokens", self.tokens.len()))),
        }
    }

    /// Ids that end a text or an answer.
    fn ends(&self) -> Result<Vec<usize>> {
        let mut ends = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            let key = format!("tokenizer.ggml.{key}");
            ends.extend(self.metadata.integer(&key)?.and_then(|id| usize::try_from(id).ok()));
        }
        let tokens = self.tokens.iter().zip(&self.types).enumerate();
        ends.extend(
            tokens.filter(|(_, (t, kind))| **kind == CONTROL && ENDS.contains(&t.as_str())).map(|(id, _)| id),
        );
        let mut seen = std::collections::BTreeSet::new();
        ends.retain(|id| *id < self.tokens.len() && seen.insert(*id));
        Ok(ends)
    }

    /// The tokens that are cut out of a text before anything else.
    fn added(&self) -> Vec<Added> {
        let tokens = self.tokens.iter().zip(&self.types).enumerate();
        tokens
            .filter(|(_, (_, kind))| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind))
            .map(|(id, (text, kind))| match *kind {
                USER_DEFINED => Added { id: id as u32, content: text.clone(), flags: [false; 5] },
                _ => Added::special(id as u32, text),
            })
            .collect()
    }

    fn byte_level(&self, pre: &Pre, named: &Map<String, Value>, add: [bool; 2]) -> Result<Converted, String> {
        let mut vocab = Map::new();
        for (id, (token, kind)) in self.tokens.iter().zip(&self.types).enumerate() {
            if *kind != UNUSED && vocab.insert(token.clone(), json!(id)).is_some() {
                return Err(format!("the token `{token}` appears twice"));
            }
        }
        let list = self.metadata.texts("tokenizer.ggml.merges").map_err(|e| e.message)?;
        let list = list.ok_or("the key tokenizer.ggml.merges is missing")?;
        let mut merges = Vec::with_capacity(list.len());
        for merge in list {
            // A space may be the first part, or stand for itself.
            let cut = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(i, _)| i);
            let parts = cut.map(|cut| (&merge[..cut], &merge[cut + 1..]));
            let (left, right) =
                parts.ok_or_else(|| format!("the merge `{merge}` is not a pair of tokens"))?;
            for token in [left, right, &format!("{left}{right}")] {
                if !vocab.contains_key(token) {
                    return Err(format!("the merge `{merge}` needs the token `{token}`, which is missing"));
                }
            }
            merges.push([left.to_string(), right.to_string()]);
        }
        let added = self.added();
        let token = |name: &str| {
            let text = named.get(name)?.as_str()?;
            Some((text, vocab.get(text)?.as_u64()? as u32))
        };
        let [begin, end] =
            [("bos_token", add[0]), ("eos_token", add[1])].map(|(name, add)| token(name).filter(|_| add));
        let definition = ByteLevel {
            added: &added,
            normalizer: if pre.nfc { json!({"type": "NFC"}) } else { Value::Null },
            pre_tokenizer: pre.definition(),
            begin,
            end,
            ignore_merges: pre.ignore_merges,
            vocab,
            merges,
        };
        let definition = definition.definition();
        Ok(Converted { definition, special: Map::new(), eos_ids: Vec::new() })
    }

    fn sentencepiece(
        &self,
        named: &Map<String, Value>,
        config: &Map<String, Value>,
    ) -> Result<Converted, String> {
        let scores = self.metadata.floats("tokenizer.ggml.scores").map_err(|e| e.message)?;
        let scores = scores.ok_or("the key tokenizer.ggml.scores is missing")?;
        if scores.len() != self.tokens.len() || scores.iter().any(|score| !score.is_finite()) {
            return Err(format!(
                "`tokenizer.ggml.scores` is not a number for each of {} tokens",
                self.tokens.len()
            ));
        }
        let pieces = self.tokens.iter().zip(&self.types).zip(scores);
        let name =
            |key: &str, default: &'static str| named.get(key).and_then(Value::as_str).unwrap_or(default);
        let pieces = pieces.map(|((text, kind), score)| VocabularyPiece { text, score: *score, kind: *kind });
        let names = [name("bos_token", "<s>"), name("eos_token", "</s>"), name("pad_token", "<pad>")];
        let model = SentencePieceModel::of_pieces(pieces.collect(), names);
        let mut with_names = config.clone();
        with_names.extend(named.clone());
        sentencepiece::define(&model, &with_names, &[])
    }
}
