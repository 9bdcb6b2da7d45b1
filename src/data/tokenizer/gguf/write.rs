//! A tokenizer as the metadata of a GGUF file.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::pre;
use crate::data::tokenizer::Tokenizer;
use crate::data::tokenizer::sentencepiece::{
    BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, byte_piece,
};
use crate::error::{Error, Result};
use crate::gguf::{Metadata, MetadataArray, MetadataValue};

/// What a GGUF file cannot say of a tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufLimit {
    /// A space is put before a text only where it does not begin with one, nor follows a special token (`legacy: false`).
    /// llama.cpp always puts one.
    SpaceBefore,
}

/// Adds the tokenizer's keys, and tells what gets lost; the model's embedding has `rows` rows, and llama.cpp wants a token for each.
///
/// # Errors
/// Of kind Data: a tokenizer that GGUF cannot express.
pub fn write(tokenizer: &Tokenizer, rows: i64, metadata: &mut Metadata) -> Result<Option<GgufLimit>> {
    let refused = |what: String| {
        Error::data(format!("{}: GGUF cannot express this tokenizer: {what}", tokenizer.place()))
    };
    let definition: Value = tokenizer
        .files()
        .find(|(name, _)| *name == "tokenizer.json")
        .and_then(|(_, bytes)| serde_json::from_slice(bytes).ok())
        .ok_or_else(|| refused("it has no definition".into()))?;
    let model = &definition["model"];
    if model["type"] != "BPE" {
        return Err(refused(format!("its model is {}, and only BPE is built", model["type"])));
    }
    let merges = merges(model).map_err(refused)?;
    let mut tokens = Tokens::new(&definition, rows).map_err(refused)?;
    let mut set = |key: &str, value: MetadataValue| metadata.set(format!("tokenizer.ggml.{key}"), value);
    let mut loss = None;
    match pre::steps(&definition["pre_tokenizer"]) {
        Some(steps) => {
            let nfc = match definition["normalizer"]["type"].as_str() {
                None => false,
                Some("NFC") => true,
                Some(other) => return Err(refused(format!("its normalizer is {other}"))),
            };
            let all = pre::all();
            let fits = |pre: &&pre::Pre| pre.steps == steps && pre.nfc == nfc;
            // Of those that fit, best one that also looks up whole words as this one does.
            let ignore = model["ignore_merges"] == true;
            let found = all.iter().filter(fits).max_by_key(|pre| pre.ignore_merges == ignore);
            let found = found.ok_or_else(|| refused("llama.cpp has no name for its pre-tokenizer".into()))?;
            set("model", MetadataValue::Text("gpt2".into()));
            set("pre", MetadataValue::Text(found.names[0].into()));
            let joined = merges.iter().map(|[left, right]| format!("{left} {right}")).collect();
            set("merges", MetadataValue::Array(MetadataArray::Texts(joined)));
        }
        None => {
            let prefix = spaces_as_pieces(&definition).map_err(refused)?;
            let first = &definition["pre_tokenizer"]["prepend_scheme"];
            loss = (prefix && first == "first").then_some(GgufLimit::SpaceBefore);
            set("model", MetadataValue::Text("llama".into()));
            set("add_space_prefix", MetadataValue::Bool(prefix));
            set("scores", MetadataValue::Array(MetadataArray::Floats(tokens.scores(&merges))));
            tokens.mark_bytes();
            if let Some(unknown) = model["unk_token"].as_str() {
                tokens.mark(unknown, UNKNOWN);
            }
        }
    }
    let (bos, eos) = (tokenizer.bos_id(), tokenizer.eos_ids());
    let unk = tokenizer.special_tokens().iter().find(|(name, _)| *name == "unk_token");
    let unk = unk.and_then(|(_, text)| tokenizer.token_to_id(text));
    let ids = [
        ("bos_token_id", bos),
        ("eos_token_id", eos.first().copied()),
        ("unknown_token_id", unk),
        ("padding_token_id", tokenizer.pad_id()),
    ];
    for (key, id) in ids {
        if let Some(id) = id {
            set(key, MetadataValue::Integer(id.into()));
        }
    }
    let text = tokenizer.encode("", true)?;
    set("add_bos_token", MetadataValue::Bool(bos.is_some() && text.first().copied() == bos));
    set("add_eos_token", MetadataValue::Bool(text.len() > 1 && text.last() == eos.first()));
    let types = tokens.types.iter().map(|t| *t as i64).collect();
    set("token_type", MetadataValue::Array(MetadataArray::Integers(types)));
    set("tokens", MetadataValue::Array(MetadataArray::Texts(tokens.texts)));
    if let Some(template) = tokenizer.chat_template() {
        metadata.set("tokenizer.chat_template", MetadataValue::Text(template.source.clone()));
    }
    Ok(loss)
}

/// The pairs, whichever way they are written.
fn merges(model: &Value) -> Result<Vec<[String; 2]>, String> {
    let list = model["merges"].as_array().ok_or("it has no merges")?;
    let pair = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(a, b)| [a.to_string(), b.to_string()]),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(a), Value::String(b)] => Some([a.clone(), b.clone()]),
            _ => None,
        },
        _ => None,
    };
    list.iter().map(pair).collect::<Option<_>>().ok_or_else(|| "a merge is not a pair of tokens".into())
}

/// Whether a tokenizer in which `▁` stands for a space puts one before a text.
fn spaces_as_pieces(definition: &Value) -> Result<bool, String> {
    let (normalizer, pre) = (&definition["normalizer"], &definition["pre_tokenizer"]);
    let is_replace =
        |n: &Value| n["type"] == "Replace" && n["pattern"]["String"] == " " && n["content"] == "▁";
    let is_prepend = |n: &Value| n["type"] == "Prepend" && n["prepend"] == "▁";
    let one = |steps: &Value| steps.as_array().cloned().unwrap_or_default();
    match (normalizer["type"].as_str(), pre["type"].as_str()) {
        (Some("Sequence"), None) => match one(&normalizer["normalizers"]).as_slice() {
            [prepend, replace] if is_prepend(prepend) && is_replace(replace) => return Ok(true),
            _ => {}
        },
        (Some("Replace"), None) if is_replace(normalizer) => return Ok(false),
        // Gemma's cuts at spaces, of which the normalizer leaves none.
        (Some("Replace"), Some("Split")) if is_replace(normalizer) && pre["pattern"]["String"] == " " => {
            return Ok(false);
        }
        (None, Some("Metaspace")) if pre["replacement"] == "▁" && pre["split"] == false => {
            return Ok(pre["prepend_scheme"] != "never");
        }
        _ => {}
    }
    Err("it is neither byte-level nor SentencePiece's".into())
}

/// Tokens by id, with their types.
struct Tokens {
    texts: Vec<String>,
    types: Vec<u64>,
}

impl Tokens {
    fn new(definition: &Value, rows: i64) -> Result<Tokens, String> {
        let vocab = definition["model"]["vocab"].as_object().ok_or("it has no vocabulary")?;
        let n = usize::try_from(rows).map_err(|_| "no rows".to_string())?;
        let mut found: Vec<Option<(String, u64)>> = vec![None; n];
        let mut put =
            |id: Option<u64>, text: &str, kind: u64| match id.and_then(|id| found.get_mut(id as usize)) {
                Some(place) => {
                    *place = Some((text.to_string(), kind));
                    Ok(())
                }
                None => Err(format!("the token `{text}` has no id below the model's {rows} rows")),
            };
        for (text, id) in vocab {
            put(id.as_u64(), text, NORMAL)?;
        }
        for token in definition["added_tokens"].as_array().into_iter().flatten() {
            let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
            put(token["id"].as_u64(), token["content"].as_str().unwrap_or_default(), kind)?;
        }
        let all = found.into_iter().enumerate();
        let (texts, types) = all.map(|(id, token)| token.unwrap_or((format!("[PAD{id}]"), UNUSED))).unzip();
        Ok(Tokens { texts, types })
    }

    fn mark(&mut self, text: &str, kind: u64) {
        if let Some(id) = self.texts.iter().position(|t| t == text) {
            self.types[id] = kind;
        }
    }

    /// Gives the tokens that stand for single bytes their type.
    fn mark_bytes(&mut self) {
        let bytes: HashSet<String> = (0..=255).map(byte_piece).collect();
        for (text, kind) in self.texts.iter().zip(&mut self.types) {
            if *kind == NORMAL && bytes.contains(text) {
                *kind = BYTE;
            }
        }
    }

    /// Scores that order the merges as they are ordered: of what is joined earlier, the higher one.
    fn scores(&self, merges: &[[String; 2]]) -> Vec<f32> {
        let mut rank = HashMap::new();
        for (i, [left, right]) in merges.iter().enumerate() {
            rank.entry(format!("{left}{right}")).or_insert(i);
        }
        let of = |(text, kind): (&String, &u64)| match (kind, rank.get(text)) {
            (&NORMAL, Some(rank)) => -(*rank as f32),
            // Single characters are never joined from anything.
            (&NORMAL, None) => -(merges.len() as f32),
            _ => 0.0,
        };
        self.texts.iter().zip(&self.types).map(of).collect()
    }
}
