//! Tokenizers: Hugging Face's `tokenizer.json`, SentencePiece's and tiktoken's `tokenizer.model`, those of GGUF files, and
//! byte-level BPE of our own. Whatever was read, what works is a `tokenizers` tokenizer, and what is written is a `tokenizer.json`.

mod companions;
mod convert;
mod files;
pub mod gguf;
mod pieces;
mod segments;
mod sentencepiece;
mod tiktoken;
mod train;

pub use files::{folder_has_tokenizer, is_tokenizer_file};
pub use train::{MIN_VOCAB_SIZE, train};

use crate::config::sections;
use crate::config::template_date::TemplateDate;
use crate::error::{Error, Result};
use crate::files::write_file;
use chrono::NaiveDate;
use companions::Companions;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use tokenizers::AddedToken;

/// A tokenizer with its special tokens. Encodes and decodes without state, from many threads at once. Clones are cheap.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// Names and contents of the files that `save` writes.
    files: Arc<files::Contents>,
    /// Where it was read from, for messages.
    place: String,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    /// `bos_token` and so on, as the tokenizer's files name them.
    named: Vec<(&'static str, String)>,
    chat_template: Option<ChatTemplate>,
    template_date: TemplateDate,
    adds_bos: bool,
    splits_at_lines: bool,
    hash: [u8; 32],
    /// `hash` before tokens were added.
    base_hash: [u8; 32],
    /// `inner` for text that goes on inside a text, once it was needed; none where it is the same.
    continuation: OnceLock<Option<Arc<tokenizers::Tokenizer>>>,
}

/// The source of a Jinja chat template, and where it was read from.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatTemplate {
    /// Jinja, as `apply_chat_template` renders it.
    pub source: String,
    /// The file that it was read from, for errors.
    pub place: String,
}

fn invalid(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::data(format!("{}: {what}", path.display()))
}

impl Tokenizer {
    /// Loads the tokenizer of a folder, or the file that is named. Of a folder it is `tokenizer.json`, else
    /// `tokenizer.model` (SentencePiece BPE, or Llama 3's in tiktoken's format), else `qwen.tiktoken`; the last two are
    /// converted, as is that of a GGUF file. `bos_token`, `eos_token`, `pad_token` and `unk_token` come from `tokenizer_config.json`, else
    /// `special_tokens_map.json`; further ends of a text, and ids not named there, from `generation_config.json`, else
    /// `config.json`. In a folder of Meta's, which has none of these, they are SentencePiece's own, or Llama 3's.
    ///
    /// Whether BOS is put before a text is up to the post-processor of `tokenizer.json`, as in transformers; where the
    /// vocabulary was converted, to `add_bos_token` of `tokenizer_config.json`. Truncation and padding that
    /// `tokenizer.json` may carry are left out.
    ///
    /// # Errors
    /// Of kind Data: no tokenizer, with what was found in its place; files that are damaged or contradict each other.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let main = files::main_file(path.as_ref())?;
        let (files, fallback) = files::read(&main)?;
        Self::from_files(files, &main, &fallback)
    }

    /// From the contents of the files; `main` is where `tokenizer.json` lies, for messages, and `fallback` a
    /// `config.json`, whose ids count where no other file names any.
    fn from_files(mut files: files::Contents, main: &Path, fallback: &Value) -> Result<Self> {
        let content = |name: &str| files.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.as_slice());
        let parse = |name: &str| files::parse(content(name).unwrap_or(b"{}"), &main.with_file_name(name));
        let mut definition = files::parse(content("tokenizer.json").unwrap_or_default(), main)?;
        let mut inner = companions::load(content("tokenizer.json").unwrap_or_default(), main)?;
        companions::check_ids(&inner, &definition, main)?;
        let [config, map, added, generation] = [
            parse("tokenizer_config.json")?,
            parse("special_tokens_map.json")?,
            parse("added_tokens.json")?,
            parse("generation_config.json")?,
        ];
        let companions = Companions { main, config: &config, map: &map, added: &added };
        let merged = companions.merge(&inner, &mut definition)?.then(|| definition.to_string().into_bytes());
        if let Some(bytes) = &merged {
            inner = companions::load(bytes, main)?;
            companions::check_ids(&inner, &definition, main)?;
        }
        let mut named = Vec::new();
        let mut special = |name: &'static str| -> Result<Option<u32>> {
            let Some(text) = companions.named(name) else { return Ok(None) };
            let id = inner.token_to_id(text);
            if id.is_none() && name == "pad_token" {
                return Ok(None);
            }
            named.push((name, text.to_string()));
            id.map(Some).ok_or_else(|| {
                let what = "which is not in the vocabulary; correct tokenizer_config.json";
                invalid(main, format!("{name} is `{text}`, {what}"))
            })
        };
        let (configs, known) = ([&generation, fallback], vocab_size(&inner));
        let single = |name: &str| companions::single_id(main, configs, name, known);
        let bos = special("bos_token")?.map_or_else(|| single("bos_token_id"), |id| Ok(Some(id)))?;
        let pad = special("pad_token")?.map_or_else(|| single("pad_token_id"), |id| Ok(Some(id)))?;
        let mut eos: Vec<u32> = special("eos_token")?.into_iter().collect();
        let rows = fallback["vocab_size"].as_u64().map_or(known, |rows| known.max(rows as usize));
        for id in companions::ids(main, configs, "eos_token_id", rows)? {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        special("unk_token")?;
        for name in ["sep_token", "cls_token", "mask_token"] {
            let known = companions.named(name).filter(|text| inner.token_to_id(text).is_some());
            named.extend(known.map(|text| (name, text.to_string())));
        }

        let empty = inner.encode_fast("", true).map_err(|e| invalid(main, e))?;
        let adds_bos = bos.is_some() && empty.get_ids().first().copied() == bos;
        let adds_eos = eos.first().map(|eos| empty.get_ids().last() == Some(eos));
        companions.warn_of_unused([("add_bos_token", bos.map(|_| adds_bos)), ("add_eos_token", adds_eos)]);
        let chat_template = companions::chat_template(content("chat_template.jinja"), &config, main)?;
        if let Some(bytes) = merged {
            // The other formats do not know what was merged.
            files.retain(|(name, _)| !files::VOCABULARIES.contains(&name.as_str()));
            files.insert(0, ("tokenizer.json".into(), bytes));
        }
        let splits_at_lines = pieces::splits_at_lines(&inner, &definition);
        let hash = hash(definition);
        Ok(Tokenizer {
            vocab_size: vocab_size(&inner),
            inner: Arc::new(inner),
            files: Arc::new(files),
            place: main.display().to_string(),
            bos,
            eos,
            pad,
            named,
            chat_template,
            template_date: TemplateDate::default(),
            adds_bos,
            splits_at_lines,
            hash,
            base_hash: hash,
            continuation: OnceLock::new(),
        })
    }

    /// The largest token id plus one, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Where it was read from.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Refuses a tokenizer with ids that a model whose embedding has `rows` rows does not know.
    pub fn check_fits(&self, rows: i64) -> Result<()> {
        let vocab = self.vocab_size as i64;
        if vocab <= rows {
            return Ok(());
        }
        Err(Error::data(format!(
            "the tokenizer {} has {vocab} tokens, more than the model's vocab_size of {rows}; take the model's own \
             tokenizer (or name the new tokens in tokenizer.add_tokens)",
            self.place
        )))
    }

    /// The rows that the embedding of a model with `rows` rows needs for this tokenizer, as the configuration has it:
    /// further ones for added tokens, and up to a multiple of `pad_to_multiple_of`. Rows that are there already, such as
    /// those that a model was padded with, are taken first, as they are.
    ///
    /// # Errors
    /// Ids beyond the embedding that are not of the configuration's added tokens.
    pub fn rows(&self, rows: i64, section: Option<&sections::TokenizerSection>) -> Result<i64> {
        let Some(section) = section else { return self.check_fits(rows).map(|()| rows) };
        let added = |id: i64| {
            let token = u32::try_from(id).ok().and_then(|id| self.id_to_token(id));
            token.is_some_and(|token| {
                section.add_tokens.contains(&token) || section.pad_token.as_ref() == Some(&token)
            })
        };
        if !(rows..self.vocab_size as i64).all(added) {
            self.check_fits(rows)?;
        }
        let needed = rows.max(self.vocab_size as i64);
        Ok(section.pad_to_multiple_of.map_or(needed, |n| (needed + n - 1) / n * n))
    }

    /// Ids of `text`. `add_special`: with what the tokenizer's post-processor adds, such as BOS. Special tokens
    /// that are spelt out in `text` become their ids.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        ids_of(&self.inner, text, add_special)
    }

    /// Ids of a text that is to be continued: with what the post-processor adds, but never a second BOS where the text
    /// itself begins with one.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, true)?;
        self.one_bos(&mut ids);
        Ok(ids)
    }

    /// Takes away all of several BOS at the beginning but one.
    pub(super) fn one_bos(&self, ids: &mut Vec<u32>) {
        let several = ids.iter().take_while(|id| Some(**id) == self.bos).count();
        ids.drain(..several.saturating_sub(1));
    }

    /// The text of `ids`. `skip_special`: without special tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| Error::data(format!("cannot decode tokens: {e}")))
    }

    /// The same tokenizer for plain text: special tokens that are spelt out in a text stay text.
    pub fn plain(mut self) -> Self {
        let mut inner = self.inner.as_ref().clone();
        inner.set_encode_special_tokens(true);
        self.inner = Arc::new(inner);
        self.continuation = OnceLock::new();
        self
    }

    /// The same tokenizer with further special tokens, whose ids follow the last one. Tokens that it has are special
    /// from now on, and keep their ids.
    pub fn with_tokens(mut self, tokens: &[String]) -> Result<Self> {
        let mut inner = self.inner.as_ref().clone();
        let before = inner.get_added_tokens_decoder();
        let new = tokens.iter().filter(|text| {
            let same = |t: &&AddedToken| t.content == **text && t.special;
            before.values().find(same).is_none()
        });
        let new: Vec<AddedToken> = new.map(|text| AddedToken::from(text.as_str(), true)).collect();
        if new.is_empty() {
            return Ok(self);
        }
        let failed = |e: tokenizers::Error| Error::failed(format!("cannot add tokens: {e}"));
        inner.add_special_tokens(new).map_err(failed)?;
        let text = inner.to_string(true).map_err(failed)?;
        self.hash = hash(serde_json::from_str(&text).map_err(|e| Error::failed(e.to_string()))?);
        // The other formats do not know the tokens.
        let mut files = self.files.as_ref().clone();
        files.retain(|(name, _)| !files::VOCABULARIES.contains(&name.as_str()));
        files.insert(0, ("tokenizer.json".into(), text.into_bytes()));
        self.vocab_size = vocab_size(&inner);
        self.files = Arc::new(files);
        self.inner = Arc::new(inner);
        self.continuation = OnceLock::new();
        Ok(self)
    }

    /// The same tokenizer with another chat template, which `save` writes as `chat_template.jinja`.
    pub fn with_chat_template(mut self, template: ChatTemplate) -> Result<Self> {
        let mut files = self.files.as_ref().clone();
        files.retain(|(name, _)| !["chat_template.jinja", "chat_template.json"].contains(&name.as_str()));
        if let Some((name, bytes)) = files.iter_mut().find(|(name, _)| name == "tokenizer_config.json") {
            let mut config = files::parse(bytes, Path::new(name))?;
            if config.as_object_mut().and_then(|c| c.remove("chat_template")).is_some() {
                *bytes = format!("{config:#}\n").into_bytes();
            }
        }
        files.push(("chat_template.jinja".into(), template.source.clone().into_bytes()));
        self.files = Arc::new(files);
        self.chat_template = Some(template);
        Ok(self)
    }

    /// The same tokenizer with these ends of a text, which `save` writes into `generation_config.json`.
    pub(super) fn with_eos_ids(mut self, ids: &[u32]) -> Result<Self> {
        if self.eos == ids {
            return Ok(self);
        }
        let mut files = self.files.as_ref().clone();
        let name = "generation_config.json";
        let old = files.iter().position(|(n, _)| n == name).map(|i| files.remove(i).1);
        let mut config = files::parse(old.as_deref().unwrap_or(b"{}"), Path::new(name))?;
        config["eos_token_id"] = json!(ids);
        files.push((name.into(), format!("{config:#}\n").into_bytes()));
        self.files = Arc::new(files);
        self.eos = ids.to_vec();
        Ok(self)
    }

    /// The same tokenizer with this token for padding, a new one where it does not have it.
    pub fn with_pad_token(self, token: &str) -> Result<Self> {
        let mut tokenizer = match self.token_to_id(token) {
            Some(_) => self,
            None => self.with_tokens(&[token.to_string()])?,
        };
        let id = tokenizer.token_to_id(token);
        if tokenizer.pad == id {
            return Ok(tokenizer);
        }
        let mut contents = tokenizer.files.as_ref().clone();
        if !contents.iter().any(|(name, _)| name == "tokenizer_config.json") {
            contents.push(("tokenizer_config.json".into(), b"{}".to_vec()));
        }
        for (name, bytes) in &mut contents {
            let mut json = match name.as_str() {
                "tokenizer_config.json" | "special_tokens_map.json" | "generation_config.json" => {
                    files::parse(bytes, Path::new(name))?
                }
                _ => continue,
            };
            let (key, value) = match name.as_str() {
                "generation_config.json" => ("pad_token_id", json!(id)),
                _ => ("pad_token", json!(token)),
            };
            json[key] = value;
            *bytes = format!("{json:#}\n").into_bytes();
        }
        tokenizer.files = Arc::new(contents);
        tokenizer.pad = id;
        tokenizer.named.retain(|(name, _)| *name != "pad_token");
        tokenizer.named.push(("pad_token", token.to_string()));
        Ok(tokenizer)
    }

    /// Whether the token is a special one, or another that was added to the vocabulary.
    pub fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// The id of a token, by its text in the vocabulary; none for a text that is no token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of a token in the vocabulary, in which a blank may be `▁` or `Ġ`; none beyond the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token that begins a sequence, where there is one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// Whether `encode(_, true)` begins with BOS.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Tokens that end a sequence, the tokenizer's own `eos_token` first; empty where none is named.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The token that fills up rows, where there is one.
    pub fn pad_id(&self) -> Option<u32> {
        self.pad
    }

    /// `bos_token`, `eos_token`, `unk_token`, `pad_token` and so on by these names, where `tokenizer_config.json` or
    /// `special_tokens_map.json` has them: what a chat template may write.
    pub fn special_tokens(&self) -> &[(&'static str, String)] {
        &self.named
    }

    /// The Jinja chat template, of `chat_template.jinja`, else `tokenizer_config.json`.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The same tokenizer with this date for chat templates that ask for one.
    pub fn with_template_date(mut self, date: TemplateDate) -> Self {
        self.template_date = date;
        self
    }

    /// The date for chat templates that ask for one.
    pub fn template_date(&self) -> TemplateDate {
        self.template_date
    }

    /// The date that the chat template is told; none where it asks for none. What `strftime_now` tells is always the date;
    /// `date_string` is there only where the user gave one, as in transformers.
    pub fn told_date(&self) -> Option<NaiveDate> {
        let template = &self.chat_template.as_ref()?.source;
        let asks =
            template.contains("strftime_now") || self.template_date.given && template.contains("date_string");
        asks.then_some(self.template_date.date)
    }

    /// What tells apart the texts and tokens that conversations become: tokenizer, template, the tokens that it may write,
    /// and the date that it is told.
    pub fn text_fingerprint(&self) -> String {
        let template = self.chat_template.as_ref().map(|t| t.source.as_str());
        let date = self.told_date().map(|date| date.to_string());
        let parts = json!([hex(&self.hash), template, self.named, self.adds_bos, date]);
        hex(&Sha256::digest(parts.to_string().as_bytes()))
    }

    /// SHA-256 of `tokenizer.json` in canonical form (keys sorted, no white space, without truncation and
    /// padding), so that a file that was merely written anew keeps its hash.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// [`Tokenizer::hash`] without the tokens of [`Tokenizer::with_tokens`]: of data that were tokenized before.
    pub fn base_hash(&self) -> [u8; 32] {
        self.base_hash
    }

    /// Whether every token of `other` is here, under the same id.
    pub fn knows_tokens_of(&self, other: &Tokenizer) -> bool {
        self.base_hash == other.base_hash && self.hash == other.hash
            || (0..other.vocab_size as u32).all(|id| self.id_to_token(id) == other.id_to_token(id))
    }

    /// Names and contents of its files, `tokenizer.json` among them also where it was read from another format.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }

    /// Writes the tokenizer's files into `folder`.
    pub fn save(&self, folder: &Path) -> Result<()> {
        self.files().try_for_each(|(name, bytes)| write_file(&folder.join(name), bytes))
    }
}

fn ids_of(inner: &tokenizers::Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>> {
    let encoding = inner.encode_fast(text, add_special);
    encoding.map(|e| e.get_ids().to_vec()).map_err(|e| Error::data(format!("cannot tokenize: {e}")))
}

fn vocab_size(inner: &tokenizers::Tokenizer) -> usize {
    inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
}

/// SHA-256 of a `tokenizer.json` in canonical form.
fn hash(mut definition: Value) -> [u8; 32] {
    if let Some(definition) = definition.as_object_mut() {
        definition.remove("truncation");
        definition.remove("padding");
    }
    definition.sort_all_objects();
    Sha256::digest(definition.to_string().as_bytes()).into()
}

/// A hash as users see it.
pub fn hex(hash: &[u8]) -> String {
    hash.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
pub(crate) mod tests;
