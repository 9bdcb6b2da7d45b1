//! Tokenizers: Hugging Face's `tokenizer.json` with what stands beside it, and byte-level BPE of our own.

use crate::error::{Error, Result};
use crate::files::write_file;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, models::TrainerWrapper};

/// What belongs to a tokenizer besides `tokenizer.json`, where it is there.
const COMPANIONS: [&str; 4] =
    ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"];

/// A tokenizer with its special tokens. Encodes and decodes without state, from many threads at once.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Names and contents of the files it was read from, copied by `save`.
    files: Vec<(String, Vec<u8>)>,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    chat_template: Option<String>,
    adds_bos: bool,
    splits_at_lines: bool,
    hash: [u8; 32],
}

fn invalid(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::data(format!("{}: {what}", path.display()))
}

impl Tokenizer {
    /// Loads a folder that holds `tokenizer.json`, or that file itself. `bos_token`, `eos_token` and `pad_token` come
    /// from `tokenizer_config.json`, else `special_tokens_map.json`; further ends of sequence, and ids not named
    /// there, from `generation_config.json`. Truncation and padding that `tokenizer.json` may carry are left out, as
    /// transformers does.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let main = if path.is_dir() { path.join("tokenizer.json") } else { path.to_path_buf() };
        if path.is_dir() && !main.exists() {
            let hint = match path.join("tokenizer.model").exists() {
                true => {
                    "; tokenizer.model (SentencePiece) is not read: save it once as a fast tokenizer with transformers"
                }
                false => "",
            };
            return Err(Error::data(format!(
                "{}: there is no tokenizer.json in this folder{hint}",
                path.display()
            )));
        }
        let read = |path: &Path| {
            std::fs::read(path).map_err(|e| Error::data(format!("cannot read {}: {e}", path.display())))
        };
        let mut files = vec![("tokenizer.json".to_string(), read(&main)?)];
        for name in COMPANIONS {
            let path = main.with_file_name(name);
            if path.exists() {
                files.push((name.to_string(), read(&path)?));
            }
        }
        Self::from_files(files, &main)
    }

    /// From the contents of the files; `main` is where `tokenizer.json` lies, for messages.
    fn from_files(files: Vec<(String, Vec<u8>)>, main: &Path) -> Result<Self> {
        let content = |name: &str| files.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.as_slice());
        let parse = |name: &str| -> Result<Value> {
            let bytes = content(name).unwrap_or(b"{}");
            serde_json::from_slice(bytes)
                .map_err(|e| invalid(&main.with_file_name(name), format!("not valid JSON: {e}")))
        };
        let mut definition = parse("tokenizer.json")?;
        let mut inner = tokenizers::Tokenizer::from_bytes(content("tokenizer.json").unwrap_or_default())
            .map_err(|e| invalid(main, format!("not a tokenizer: {e}")))?;
        inner.with_truncation(None).map_err(|e| invalid(main, e))?;
        inner.with_padding(None);

        let (config, map, generation) = (
            parse("tokenizer_config.json")?,
            parse("special_tokens_map.json")?,
            parse("generation_config.json")?,
        );
        let special = |name: &str| -> Result<Option<u32>> {
            let named = [&config[name], &map[name]].into_iter().find(|v| !v.is_null());
            let Some(text) = named.and_then(|v| v.as_str().or(v["content"].as_str())) else {
                return Ok(None);
            };
            inner.token_to_id(text).map(Some).ok_or_else(|| {
                invalid(
                    main,
                    format!(
                        "{name} is `{text}`, which is not in the vocabulary; correct tokenizer_config.json"
                    ),
                )
            })
        };
        let ids = |name: &str| -> Result<Vec<u32>> {
            let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
            match &generation[name] {
                Value::Null => Some(Vec::new()),
                Value::Array(list) => list.iter().map(id).collect(),
                single => id(single).map(|id| vec![id]),
            }
            .ok_or_else(|| {
                invalid(
                    &main.with_file_name("generation_config.json"),
                    format!("{name} is no token id, nor a list of them"),
                )
            })
        };
        let bos = special("bos_token")?.or(ids("bos_token_id")?.first().copied());
        let pad = special("pad_token")?.or(ids("pad_token_id")?.first().copied());
        let mut eos: Vec<u32> = special("eos_token")?.into_iter().collect();
        eos.extend(
            ids("eos_token_id")?
                .into_iter()
                .filter(|id| Some(*id) != eos.first().copied())
                .collect::<Vec<_>>(),
        );

        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        let empty = inner.encode_fast("", true).map_err(|e| invalid(main, e))?;
        let adds_bos = bos.is_some() && empty.get_ids().first().copied() == bos;
        let splits_at_lines = splits_at_lines(&definition);
        let template =
            content("chat_template.jinja").map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        let chat_template = template.or(config["chat_template"].as_str().map(str::to_string));
        if let Some(definition) = definition.as_object_mut() {
            definition.remove("truncation");
            definition.remove("padding");
        }
        definition.sort_all_objects();
        let hash = Sha256::digest(definition.to_string().as_bytes()).into();
        Ok(Tokenizer {
            inner,
            files,
            vocab_size,
            bos,
            eos,
            pad,
            chat_template,
            adds_bos,
            splits_at_lines,
            hash,
        })
    }

    /// The largest token id plus one, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Ids of `text`. `add_special`: with what the tokenizer's post-processor adds, such as BOS. Special tokens
    /// that are spelt out in `text` become their ids.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special);
        encoding.map(|e| e.get_ids().to_vec()).map_err(|e| Error::data(format!("cannot tokenize: {e}")))
    }

    /// The text of `ids`. `skip_special`: without special tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| Error::data(format!("cannot decode tokens: {e}")))
    }

    /// The same tokenizer for plain text: special tokens that are spelt out in a text stay text.
    pub fn plain(mut self) -> Self {
        self.inner.set_encode_special_tokens(true);
        self
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

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

    pub fn pad_id(&self) -> Option<u32> {
        self.pad
    }

    /// The Jinja chat template, of `chat_template.jinja`, else `tokenizer_config.json`.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// SHA-256 of `tokenizer.json` in canonical form (keys sorted, no white space, without truncation and
    /// padding), so that a file that was merely written anew keeps its hash.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// Copies the tokenizer's files into `folder`.
    pub fn save(&self, folder: &Path) -> Result<()> {
        self.files.iter().try_for_each(|(name, bytes)| write_file(&folder.join(name), bytes))
    }

    /// Cuts a long text into pieces of about `size` bytes that give, encoded one by one without special tokens, the
    /// same ids as the whole. Where this tokenizer allows no such cut, the text stays whole.
    pub fn pieces<'a>(&self, text: &'a str, size: usize) -> Vec<&'a str> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while self.splits_at_lines && rest.len() > size {
            // After a letter and before a line break no pre-tokenizer in use joins anything; after punctuation or
            // white space some do.
            let start = (size..).find(|&i| rest.is_char_boundary(i)).unwrap_or(rest.len());
            let cut = rest[start..].match_indices('\n').map(|(i, _)| start + i);
            let Some(cut) = cut.into_iter().find(|&i| rest[..i].ends_with(char::is_alphabetic)) else {
                break;
            };
            let (piece, tail) = rest.split_at(cut);
            pieces.push(piece);
            rest = tail;
        }
        pieces.push(rest);
        pieces
    }
}

/// Whether the tokenizer works on each line by itself: byte-level, nothing put before the text, and a
/// normalizer, if any, that looks at single characters.
fn splits_at_lines(definition: &Value) -> bool {
    let pre_tokenizer = definition["pre_tokenizer"].to_string();
    pre_tokenizer.contains("\"ByteLevel\"")
        && !pre_tokenizer.contains("\"Metaspace\"")
        && !pre_tokenizer.contains("\"add_prefix_space\":true")
        && matches!(definition["normalizer"]["type"].as_str(), None | Some("NFC"))
}

/// A hash as users see it.
pub fn hex(hash: &[u8]) -> String {
    hash.iter().map(|b| format!("{b:02x}")).collect()
}

const SPECIAL: [&str; 3] = ["<s>", "</s>", "<pad>"];

/// The smallest vocabulary of byte-level BPE: 256 bytes and the special tokens.
pub const MIN_VOCAB_SIZE: usize = 256 + SPECIAL.len();

/// Trains byte-level BPE on all cores. Tokens 0, 1, 2 are `<s>` (put before every text), `</s>` and `<pad>`; then the
/// 256 bytes; then the merges. `split_digits`: every digit is a token of its own. The vocabulary is smaller than
/// `vocab_size` where the texts support no more merges. Equal texts give equal tokenizers.
pub fn train(
    texts: impl Iterator<Item = Result<String>> + Send,
    vocab_size: usize,
    split_digits: bool,
) -> Result<Tokenizer> {
    if vocab_size < MIN_VOCAB_SIZE {
        return Err(Error::config(format!(
            "a vocabulary of {vocab_size} is too small for byte-level BPE: the 256 bytes and {} take {MIN_VOCAB_SIZE}",
            SPECIAL.join(", ")
        )));
    }
    let failed = |e: tokenizers::Error| Error::failed(format!("cannot train the tokenizer: {e}"));
    let byte_level = ByteLevel::new(false, true, true);
    let mut inner = tokenizers::Tokenizer::new(BPE::default());
    if split_digits {
        let steps = vec![Digits::new(true).into(), byte_level.into()];
        inner.with_pre_tokenizer(Some(Sequence::new(steps)));
    } else {
        inner.with_pre_tokenizer(Some(byte_level));
    }
    inner.with_decoder(Some(ByteLevel::default()));
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL.map(|t| AddedToken::from(t, true)).to_vec())
        .build()
        .into();
    let mut error = None;
    let mut num_texts = 0u64;
    // Chunks of 64 KiB, cut at line breaks, let one long text keep all cores busy too; a cut may part a line break
    // from the white space after it, which changes nothing but a count or two.
    let chunks = texts
        .map_while(|text| text.map_err(|e| error = Some(e)).ok())
        .inspect(|text| num_texts += !text.is_empty() as u64)
        .flat_map(|text| {
            let mut chunks = vec![String::new()];
            for line in text.split_inclusive('\n') {
                match chunks.last_mut() {
                    Some(chunk) if chunk.len() < 1 << 16 => chunk.push_str(line),
                    _ => chunks.push(line.to_string()),
                }
            }
            chunks
        });
    tokenizers::parallelism::set_parallelism(true);
    inner.train(&mut trainer, chunks).map_err(failed)?;
    if let Some(e) = error {
        return Err(e);
    }
    if num_texts == 0 {
        return Err(Error::data("there is no text to train the tokenizer on"));
    }
    let template = TemplateProcessing::builder()
        .try_single("<s> $A")
        .and_then(|b| b.try_pair("<s> $A <s>:1 $B:1"))
        .map_err(|e| Error::failed(format!("cannot make the tokenizer's template: {e}")))?
        .special_tokens(vec![(SPECIAL[0], 0)])
        .build()
        .map_err(|e| Error::failed(format!("cannot make the tokenizer's template: {e}")))?;
    inner.with_post_processor(Some(template));
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[2],
        "clean_up_tokenization_spaces": false,
    });
    let files = vec![
        ("tokenizer.json".to_string(), inner.to_string(true).map_err(failed)?.into_bytes()),
        ("tokenizer_config.json".to_string(), format!("{config:#}\n").into_bytes()),
    ];
    Tokenizer::from_files(files, &PathBuf::from("tokenizer.json"))
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::files::TestFolder;

    const TEXT: &str =
        "The quick brown fox jumps over 13 lazy dogs.\n\nThe dogs sleep, the fox doesn't.\n  It's 2026!\n";

    pub fn small(vocab_size: usize) -> Tokenizer {
        train((0..50).map(|_| Ok(TEXT.to_string())), vocab_size, true).unwrap()
    }

    #[test]
    fn a_trained_tokenizer_decodes_what_it_encodes() {
        let t = small(290);
        assert_eq!((t.vocab_size(), t.bos_id(), t.eos_ids(), t.pad_id()), (290, Some(0), &[1][..], Some(2)));
        for text in [TEXT, "", " ", "naïve 中文 🦀\u{0}\r\n\t", "1234567890 -3.5e10"] {
            let ids = t.encode(text, false).unwrap();
            assert_eq!(t.decode(&ids, true).unwrap(), text);
            let with_bos = t.encode(text, true).unwrap();
            assert_eq!((with_bos[0], &with_bos[1..]), (0, &ids[..]));
            assert_eq!(t.decode(&with_bos, true).unwrap(), text);
        }
        assert!(t.encode(TEXT, false).unwrap().len() < TEXT.len() * 2 / 3);
        assert_eq!(t.encode("4711", false).unwrap().len(), 4);
        assert!(t.adds_bos());
    }

    #[test]
    fn digits_may_be_merged_on_demand() {
        let texts = || (0..50).map(|_| Ok("in 2026 and 2026".to_string()));
        assert_eq!(train(texts(), 280, true).unwrap().encode("2026", false).unwrap().len(), 4);
        assert!(train(texts(), 280, false).unwrap().encode("2026", false).unwrap().len() < 4);
    }

    #[test]
    fn training_repeats_and_stops_where_the_text_ends() {
        assert_eq!(small(300).hash(), small(300).hash());
        assert_ne!(small(300).hash(), small(299).hash());
        let t = small(100_000);
        assert!((300..1000).contains(&t.vocab_size()), "{}", t.vocab_size());
        assert_eq!(train([Ok(String::new())].into_iter(), 300, true).err().unwrap().exit_code(), 3);
        let e = train([Ok(String::new())].into_iter(), 258, true).err().unwrap();
        assert!(e.exit_code() == 2 && e.message.contains("259"), "{e}");
        let texts = [Ok("a".to_string()), Err(Error::data("line 7 is wrong")), Ok("b".to_string())];
        assert_eq!(train(texts.into_iter(), 300, true).err().unwrap().message, "line 7 is wrong");
    }

    #[test]
    fn special_tokens_in_plain_text_stay_text() {
        let t = small(290);
        assert_eq!(t.encode("</s>", false).unwrap(), [1]);
        let plain = t.clone().plain();
        let ids = plain.encode("a</s>", false).unwrap();
        assert!(!ids.contains(&1));
        assert_eq!(plain.decode(&ids, true).unwrap(), "a</s>");
    }

    #[test]
    fn pieces_give_the_ids_of_the_whole() {
        let t = small(320);
        let text = format!("{}word\n\n  indented\nüber\n中文\n12\n", TEXT.replace('.', "")).repeat(40);
        let whole = t.encode(&text, false).unwrap();
        for size in [1, 10, 100, 1000] {
            let pieces = t.pieces(&text, size);
            assert!(pieces.len() > text.len() / (size + 120), "{} pieces of {size}", pieces.len());
            assert_eq!(pieces.concat(), text);
            let ids: Vec<u32> = pieces.iter().flat_map(|p| t.encode(p, false).unwrap()).collect();
            assert!(ids == whole, "size {size}");
        }
        assert_eq!(t.pieces("no break", 2), ["no break"]);
    }

    #[test]
    fn save_and_load_keep_everything() {
        let folder = TestFolder::new("tokenizer");
        let t = small(290);
        t.save(&folder.0).unwrap();
        let again = Tokenizer::load(&folder.0).unwrap();
        assert_eq!((again.hash(), again.vocab_size(), again.eos_ids()), (t.hash(), 290, &[1][..]));
        assert_eq!(again.encode(TEXT, true).unwrap(), t.encode(TEXT, true).unwrap());

        // Written anew with padding, truncation and other white space: the same tokenizer.
        let path = folder.0.join("tokenizer.json");
        let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        value["truncation"] =
            json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        std::fs::write(&path, value.to_string()).unwrap();
        let again = Tokenizer::load(&path).unwrap();
        assert_eq!(again.hash(), t.hash());
        assert_eq!(again.encode(TEXT, true).unwrap(), t.encode(TEXT, true).unwrap());
    }

    #[test]
    fn special_tokens_come_from_all_their_files() {
        let folder = TestFolder::new("tokenizer-special");
        small(290).save(&folder.0).unwrap();
        folder.file("tokenizer_config.json", r#"{"eos_token": {"content": "</s>"}, "chat_template": "x"}"#);
        folder.file("special_tokens_map.json", r#"{"eos_token": "<s>", "pad_token": "<pad>"}"#);
        folder.file("generation_config.json", r#"{"eos_token_id": [7, 1, 9], "bos_token_id": 0}"#);
        let t = Tokenizer::load(&folder.0).unwrap();
        assert_eq!((t.bos_id(), t.eos_ids(), t.pad_id()), (Some(0), &[1, 7, 9][..], Some(2)));
        assert_eq!(t.chat_template(), Some("x"));
        folder.file("chat_template.jinja", "y");
        assert_eq!(Tokenizer::load(&folder.0).unwrap().chat_template(), Some("y"));
    }

    #[test]
    fn bad_tokenizers_are_refused_with_the_reason() {
        let folder = TestFolder::new("tokenizer-bad");
        let error = || {
            let e = Tokenizer::load(&folder.0).err().unwrap();
            assert_eq!(e.exit_code(), 3);
            e.message
        };
        assert!(error().contains("no tokenizer.json"));
        folder.file("tokenizer.json", "{");
        assert!(error().contains("not valid JSON"));
        folder.file("tokenizer.json", "{}");
        assert!(error().contains("not a tokenizer"));
        small(290).save(&folder.0).unwrap();
        folder.file("tokenizer_config.json", r#"{"eos_token": "<eos>"}"#);
        assert!(error().contains("eos_token is `<eos>`, which is not in the vocabulary"));
        folder.file("tokenizer_config.json", "{}");
        folder.file("generation_config.json", r#"{"eos_token_id": "</s>"}"#);
        assert!(error().contains("eos_token_id is no token id"));
    }
}
