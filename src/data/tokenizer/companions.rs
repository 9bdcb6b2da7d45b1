//! What the files beside a `tokenizer.json` say of its tokens, taken as transformers 5 takes it (`TokenizersBackend`), and
//! the ids of `generation_config.json` and `config.json`.

use std::path::Path;

use serde_json::{Value, json};

use super::convert::{Added, FLAGS};
use super::{files, invalid};
use crate::error::Result;
use crate::warn;

/// The tokens that have names in every tokenizer, in the order in which transformers adds them.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Those without which texts are read or written otherwise.
const NEEDED: [&str; 3] = ["bos_token", "eos_token", "unk_token"];

/// The files that name tokens.
pub(super) struct Companions<'a> {
    /// Where `tokenizer.json` lies.
    pub main: &'a Path,
    /// `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`; `{}` where there is none.
    pub config: &'a Value,
    pub map: &'a Value,
    pub added: &'a Value,
}

/// The text of a token that is written as a text or as an object.
fn content(value: &Value) -> Option<&str> {
    value.as_str().or(value["content"].as_str())
}

impl Companions<'_> {
    /// Whether `tokenizer_config.json` has all added tokens: transformers then reads no older file.
    fn has_decoder(&self) -> bool {
        self.config["added_tokens_decoder"].is_object()
    }

    fn file(&self, name: &str) -> String {
        self.main.with_file_name(name).display().to_string()
    }

    /// What is said of a token that has a name, such as `eos_token`.
    pub fn named(&self, name: &str) -> Option<&str> {
        let from_map = !self.has_decoder() && content(&self.map[name]).is_some();
        content(if from_map { &self.map[name] } else { &self.config[name] })
    }

    /// Tells of a named token that the two files have otherwise.
    fn warn_of_difference(&self, name: &str) {
        let (config, map) = (content(&self.config[name]), content(&self.map[name]));
        if map.is_none() || map == config || config.is_none() && !self.has_decoder() {
            return;
        }
        let text = |token: Option<&str>| token.map_or("none".to_string(), |t| format!("`{t}`"));
        warn!(
            "{}: {name} is {}, and in tokenizer_config.json {}: {} is used, as in transformers",
            self.file("special_tokens_map.json"),
            text(map),
            text(config),
            text(self.named(name)),
        );
    }

    /// Tokens with names of their own (`image_token`), and those without (`additional_special_tokens`).
    fn others(&self) -> Vec<&Value> {
        let own = self.config.as_object().into_iter().flatten();
        let own = own.filter(|(key, value)| {
            key.ends_with("_token") && !NAMED.contains(&key.as_str()) && content(value).is_some()
        });
        let mut all: Vec<&Value> = own.map(|(_, value)| value).collect();
        let files = if self.has_decoder() { vec![self.config] } else { vec![self.config, self.map] };
        for file in files {
            let lists = ["extra_special_tokens", "additional_special_tokens"].map(|key| &file[key]);
            let list = lists.into_iter().find(|list| !matches!(list, Value::Null) && list != &&json!([]));
            match list {
                Some(Value::Array(list)) => all.extend(list),
                Some(Value::Object(map)) => all.extend(map.values()),
                _ => {}
            }
        }
        all.retain(|value| content(value).is_some_and(|text| !text.is_empty()));
        all
    }

    /// Brings the definition's added tokens to what the files beside it say; whether that changed anything.
    ///
    /// # Errors
    /// A token with two ids, or an id with two tokens.
    pub fn merge(&self, inner: &tokenizers::Tokenizer, definition: &mut Value) -> Result<bool> {
        let mut merged = MergedTokens::new(inner, definition);
        let folder = crate::files::parent(self.main);
        let older = Added::of_files(&json!({}), self.added, folder)?;
        self.agree(inner, &older, "added_tokens.json")?;
        let mut tokens = match self.has_decoder() {
            true => Added::of_files(self.config, &json!({}), folder)?,
            false => Added::of_files(self.config, self.added, folder)?,
        };
        tokens.sort_by_key(|token| token.id);
        if self.has_decoder() {
            self.agree(inner, &tokens, "tokenizer_config.json (added_tokens_decoder)")?;
        }
        for token in &tokens {
            merged.take(token, self.has_decoder());
        }
        for name in NAMED {
            self.warn_of_difference(name);
            let Some(text) = self.named(name) else { continue };
            if inner.token_to_id(text).is_some() || merged.has(text) {
                merged.make_special(text, &Value::Null);
            } else if !NEEDED.contains(&name) {
                let file = self.file("tokenizer_config.json");
                warn!(
                    "{file}: {name} is `{text}`, which is not in the vocabulary: it is ignored; Corral does not need it"
                );
            }
        }
        for value in self.others() {
            merged.make_special(content(value).unwrap_or_default(), value);
        }
        if self.has_decoder() {
            let left_out = |t: &&Added| inner.token_to_id(&t.content).is_none() && !merged.has(&t.content);
            let left_out: Vec<&str> = older.iter().filter(left_out).map(|t| t.content.as_str()).collect();
            if let Some(first) = left_out.first() {
                warn!(
                    "{}: {} tokens, such as `{first}`, are ignored: tokenizer_config.json has added_tokens_decoder, and then \
                     transformers does not read that file",
                    self.file("added_tokens.json"),
                    left_out.len()
                );
            }
        }
        if let Some(first) = merged.differences.first() {
            warn!(
                "{}: {} added tokens differ from tokenizer.json: {first}; added_tokens_decoder is used, as in transformers",
                self.file("tokenizer_config.json"),
                merged.differences.len()
            );
        }
        let (changed, mut list) = (merged.changed, merged.list);
        if changed {
            list.sort_by_key(|token| token["id"].as_u64());
            definition["added_tokens"] = Value::Array(list);
        }
        Ok(changed)
    }

    /// Refuses tokens of a file whose ids are not the vocabulary's.
    fn agree(&self, inner: &tokenizers::Tokenizer, tokens: &[Added], file: &str) -> Result<()> {
        for token in tokens {
            let what = match (inner.token_to_id(&token.content), inner.id_to_token(token.id)) {
                (Some(id), _) if id != token.id => {
                    format!("gives `{}` the id {}, but tokenizer.json the id {id}", token.content, token.id)
                }
                (None, Some(other)) => {
                    format!(
                        "gives the id {} to `{}`, but tokenizer.json to `{other}`",
                        token.id, token.content
                    )
                }
                _ => continue,
            };
            return Err(invalid(
                self.main,
                format!("{file} {what}; one of the two files belongs to another model"),
            ));
        }
        Ok(())
    }

    /// Tells of what `tokenizer_config.json` asks for and transformers does not do beside a `tokenizer.json`.
    pub fn warn_of_unused(&self, adds: [(&str, Option<bool>); 2]) {
        for (name, does) in adds {
            if let (Some(asked), Some(does)) = (self.config[name].as_bool(), does)
                && asked != does
            {
                warn!(
                    "{}: {name} is {asked} and does not count beside tokenizer.json, as in transformers: its \
                     post-processor {} one",
                    self.file("tokenizer_config.json"),
                    if does { "adds" } else { "does not add" }
                );
            }
        }
        if self.config["split_special_tokens"] == json!(true) {
            warn!(
                "{}: split_special_tokens is not used: special tokens in a text become their ids",
                self.file("tokenizer_config.json")
            );
        }
    }
}

/// The list of added tokens while other files are merged into it.
struct MergedTokens<'a> {
    inner: &'a tokenizers::Tokenizer,
    list: Vec<Value>,
    next_id: u32,
    changed: bool,
    /// Flags that two files have otherwise, in words.
    differences: Vec<String>,
}

impl<'a> MergedTokens<'a> {
    fn new(inner: &'a tokenizers::Tokenizer, definition: &Value) -> MergedTokens<'a> {
        let list = definition["added_tokens"].as_array().cloned().unwrap_or_default();
        let next_id = super::vocab_size(inner) as u32;
        MergedTokens { inner, list, next_id, changed: false, differences: Vec::new() }
    }

    fn place(&self, text: &str) -> Option<usize> {
        self.list.iter().position(|token| token["content"] == text)
    }

    fn has(&self, text: &str) -> bool {
        self.place(text).is_some()
    }

    fn push(&mut self, token: &Added) {
        self.list.push(token.definition());
        self.next_id = self.next_id.max(token.id + 1);
        self.changed = true;
    }

    /// Takes a token of another file, which `counts` where the two differ in flags.
    fn take(&mut self, token: &Added, counts: bool) {
        let Some(i) = self.place(&token.content) else { return self.push(token) };
        if !counts {
            return;
        }
        for (name, flag) in FLAGS.into_iter().zip(token.flags) {
            let old = self.list[i][name].as_bool().unwrap_or(false);
            // A token that was special once stays special.
            if old == flag || name == "special" && old {
                continue;
            }
            self.differences.push(format!("`{}` with {name} {flag} instead of {old}", token.content));
            self.list[i][name] = json!(flag);
            self.changed = true;
        }
    }

    /// Makes a token an added, special one, new where the vocabulary does not have it; `value` may say its other flags.
    fn make_special(&mut self, text: &str, value: &Value) {
        match self.place(text) {
            Some(i) if self.list[i]["special"] == json!(true) => {}
            Some(i) => {
                self.list[i]["special"] = json!(true);
                self.changed = true;
            }
            None => {
                let id = self.inner.token_to_id(text).unwrap_or(self.next_id);
                let flag = |name: &str| value[name].as_bool().unwrap_or(false);
                let flags = FLAGS.map(|name| name == "special" || flag(name));
                self.push(&Added { id, content: text.into(), flags });
            }
        }
    }
}

/// Token ids that `generation_config.json`, else `config.json`, has under a key. What is no token's id (-1, or not
/// below `known`) is left out with a warning: none is needed to read or write texts.
///
/// # Errors
/// Something else than numbers.
pub(super) fn ids(
    main: &Path,
    [generation, fallback]: [&Value; 2],
    name: &str,
    known: usize,
) -> Result<Vec<u32>> {
    let (file, value) = match &generation[name] {
        Value::Null => ("config.json", &fallback[name]),
        value => ("generation_config.json", value),
    };
    let path = main.with_file_name(file);
    let list = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) => list.as_slice(),
        single => std::slice::from_ref(single),
    };
    let mut ids = Vec::new();
    for id in list.iter().filter(|id| !id.is_null()) {
        let Some(number) = id.as_i64() else {
            return Err(invalid(&path, format!("{name} is no token id, nor a list of them: {value}")));
        };
        match u32::try_from(number).ok().filter(|id| (*id as usize) < known) {
            Some(id) => ids.push(id),
            None => {
                warn!("{}: {name} {number} is not a token of the tokenizer and is ignored", path.display())
            }
        }
    }
    Ok(ids)
}

/// The only id of a token that there is one of: the first of a list, with a warning.
pub(super) fn single_id(main: &Path, configs: [&Value; 2], name: &str, known: usize) -> Result<Option<u32>> {
    let ids = ids(main, configs, name, known)?;
    if let [first, _, ..] = ids[..] {
        warn!("{}: {name} is the list {ids:?}, of which {first} is used", main.display());
    }
    Ok(ids.first().copied())
}

/// Refuses added tokens that `tokenizers` gave other ids than the file says: it numbers those that are not in the
/// vocabulary one after the other.
pub(super) fn check_ids(inner: &tokenizers::Tokenizer, definition: &Value, main: &Path) -> Result<()> {
    for token in definition["added_tokens"].as_array().into_iter().flatten() {
        let (Some(content), Some(id)) = (token["content"].as_str(), token["id"].as_u64()) else { continue };
        let got = inner.token_to_id(content).map(u64::from);
        if got != Some(id) {
            let got = got.map_or("none".to_string(), |id| id.to_string());
            let what = format!("the added token `{content}` should have the id {id}, but gets {got}");
            return Err(invalid(main, what));
        }
    }
    Ok(())
}

/// A `tokenizers` tokenizer of a definition.
pub(super) fn load(bytes: &[u8], main: &Path) -> Result<tokenizers::Tokenizer> {
    let bad = |e: tokenizers::Error| invalid(main, format!("not a tokenizer: {e}"));
    // `parse` is compiled with `tokenizers`; `from_bytes` would be compiled here.
    let text = std::str::from_utf8(bytes).map_err(|e| bad(e.into()))?;
    let mut inner: tokenizers::Tokenizer = text.parse().map_err(bad)?;
    inner.with_truncation(None).map_err(|e| invalid(main, e))?;
    inner.with_padding(None);
    Ok(inner)
}

/// The chat template of the files: `chat_template.jinja`, else what `tokenizer_config.json` has.
pub(super) fn chat_template(
    jinja: Option<&[u8]>,
    config: &Value,
    main: &Path,
) -> Result<Option<super::ChatTemplate>> {
    if let Some(bytes) = jinja {
        let path = main.with_file_name("chat_template.jinja");
        let source = String::from_utf8(bytes.to_vec()).map_err(|_| invalid(&path, "not UTF-8 text"))?;
        return Ok(Some(super::ChatTemplate { source, place: path.display().to_string() }));
    }
    let path = main.with_file_name("tokenizer_config.json");
    let source = files::template_of(&config["chat_template"]).map_err(|e| invalid(&path, e))?;
    let place = format!("{}: chat_template", path.display());
    Ok(source.map(|source| super::ChatTemplate { source, place }))
}
