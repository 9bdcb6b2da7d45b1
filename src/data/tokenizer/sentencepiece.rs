//! SentencePiece's `tokenizer.model` (BPE, as Llama 1 and 2 and Mistral have it) as the definition of a `tokenizers`
//! BPE, the way transformers' `LlamaConverter` makes it.
//!
//! SentencePiece joins the neighbours whose union is the piece of the highest score, the leftmost first. In a trained
//! model every piece has its own score, so a list of merges ordered by score does the same. The text is one word: no
//! pre-tokenizer cuts it, a space becomes `▁`, and `▁` is put before the text (`add_dummy_prefix`).

use super::convert::{Added, Converted, post_processor};
use prost::Message;
use serde_json::{Map, Value, json};
use std::collections::{HashMap, HashSet};

/// Types of a piece (`SentencePiece.Type` in sentencepiece_model.proto).
pub(super) const NORMAL: u64 = 1;
pub(super) const UNKNOWN: u64 = 2;
pub(super) const CONTROL: u64 = 3;
pub(super) const USER_DEFINED: u64 = 4;
pub(super) const UNUSED: u64 = 5;
pub(super) const BYTE: u64 = 6;

pub(super) struct VocabularyPiece<'a> {
    pub text: &'a str,
    pub score: f32,
    pub kind: u64,
}

/// What of `ModelProto` decides the ids, with the defaults of sentencepiece_model.proto.
pub(super) struct SentencePieceModel<'a> {
    pieces: Vec<VocabularyPiece<'a>>,
    model_type: u64,
    byte_fallback: bool,
    whitespace_as_suffix: bool,
    bos_piece: &'a str,
    eos_piece: &'a str,
    pad_piece: &'a str,
    normalizer: &'a str,
    has_character_map: bool,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

/// The definition that gives SentencePiece's ids. `config` is `tokenizer_config.json`: `add_bos_token` (true where it is
/// left out), `add_eos_token` (false), `add_prefix_space`, and `legacy: false`, with which `▁` is put before the text
/// only where it does not begin with a special token or a space.
pub(super) fn convert(
    bytes: &[u8],
    config: &Map<String, Value>,
    added: &[Added],
) -> Result<Converted, String> {
    let proto = ModelProto::decode(bytes)
        .map_err(|e| format!("not a SentencePiece model (no protobuf, or cut off): {e}"))?;
    let model = SentencePieceModel::of(&proto)?;
    model.check()?;
    define(&model, config, added)
}

/// [`convert`] of a model that is read. Unused pieces are left out.
#[expect(clippy::too_many_lines, reason = "a tokenizer.json, written down")]
pub(super) fn define(
    model: &SentencePieceModel,
    config: &Map<String, Value>,
    added: &[Added],
) -> Result<Converted, String> {
    let mut vocab = Map::new();
    for (id, piece) in model.pieces.iter().enumerate().filter(|(_, piece)| piece.kind != UNUSED) {
        if vocab.insert(piece.text.to_string(), json!(id)).is_some() {
            return Err(format!("the piece `{}` appears twice", piece.text));
        }
    }
    let control = |name: &str| model.pieces.iter().find(|p| p.kind == CONTROL && p.text == name);
    let unknown =
        model.pieces.iter().find(|p| p.kind == UNKNOWN).ok_or("the piece for unknown text is missing")?;
    if model.byte_fallback
        && let Some(byte) = (0..=255).map(byte_piece).find(|name| !vocab.contains_key(name))
    {
        return Err(format!("byte fallback needs the piece {byte}, which is missing"));
    }

    let flag = |name: &str, default| config.get(name).and_then(Value::as_bool).unwrap_or(default);
    let prefix = model.add_dummy_prefix && flag("add_prefix_space", true);
    let metaspace = prefix && !flag("legacy", true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizer = match (metaspace, prefix) {
        (true, _) => Value::Null,
        (false, true) => {
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]})
        }
        (false, false) => replace,
    };
    // User-defined symbols are cut out of the text before anything is joined. Not as added tokens, after which a new
    // `▁` would be put.
    let mut symbols: Vec<&str> =
        model.pieces.iter().filter(|p| p.kind == USER_DEFINED).map(|p| p.text).collect();
    symbols.sort_by_key(|s| std::cmp::Reverse(s.len()));
    let mut steps = Vec::new();
    if metaspace {
        steps.push(
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false}),
        );
    }
    if !symbols.is_empty() {
        let pattern = symbols.iter().map(|s| escape(s)).collect::<Vec<_>>().join("|");
        steps.push(
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}),
        );
    }
    let pre_tokenizer = match steps.len() {
        0 => Value::Null,
        1 => steps.remove(0),
        _ => json!({"type": "Sequence", "pretokenizers": steps}),
    };
    let mut decoders = vec![json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "})];
    if model.byte_fallback {
        decoders.push(json!({"type": "ByteFallback"}));
    }
    decoders.push(json!({"type": "Fuse"}));
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }

    let mut added_tokens: Vec<Added> = model
        .pieces
        .iter()
        .enumerate()
        .filter(|(_, p)| p.kind == UNKNOWN || p.kind == CONTROL)
        .map(|(id, p)| Added::special(id as u32, p.text))
        .collect();
    for token in added {
        match model.pieces.get(token.id as usize) {
            Some(piece) if piece.text != token.content => {
                return Err(format!(
                    "the added token `{}` has the id {} of the piece `{}`",
                    token.content, token.id, piece.text
                ));
            }
            _ => {
                added_tokens.retain(|t| t.id != token.id);
                added_tokens.push(token.clone());
            }
        }
    }
    let tokens: Vec<_> = [("bos_token", model.bos_piece), ("eos_token", model.eos_piece)]
        .into_iter()
        .chain([("unk_token", unknown.text), ("pad_token", model.pad_piece)])
        .filter(|(name, text)| *name == "unk_token" || control(text).is_some())
        .map(|(name, text)| (name.to_string(), json!(text)))
        .collect();
    let mut special = Map::from_iter(tokens);
    super::convert::overlay(&mut special, config);
    let id = |name: &str| {
        let text = special.get(name).and_then(|t| t.as_str().or(t["content"].as_str()))?;
        let added = added_tokens.iter().find(|t| t.content == text).map(|t| t.id);
        Some((text, added.or(vocab.get(text).and_then(Value::as_u64).map(|id| id as u32))?))
    };
    let begin = id("bos_token").filter(|_| flag("add_bos_token", true));
    let end = id("eos_token").filter(|_| flag("add_eos_token", false));
    let post_processor = post_processor(begin, end);
    added_tokens.sort_by_key(|t| t.id);
    let definition = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens.iter().map(Added::definition).collect::<Vec<_>>(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown.text,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": model.byte_fallback,
            // A symbol that was cut out is its own token.
            "ignore_merges": !symbols.is_empty(),
            "merges": merges(&model.pieces),
            "vocab": vocab,
        },
    });
    Ok(Converted { definition, special, eos_ids: Vec::new() })
}

/// Every way to make a piece of two others: those of the highest score first, then the longer left part first.
fn merges(pieces: &[VocabularyPiece]) -> Vec<[String; 2]> {
    let normal: HashMap<&str, f32> =
        pieces.iter().filter(|p| p.kind == NORMAL).map(|p| (p.text, p.score)).collect();
    let lengths: HashSet<usize> = normal.keys().map(|text| text.len()).collect();
    let mut found = Vec::new();
    for piece in pieces.iter().filter(|p| p.kind == NORMAL) {
        let cuts = piece.text.char_indices().map(|(i, _)| i).skip(1);
        for (left_chars, cut) in cuts.enumerate() {
            if lengths.contains(&cut) && lengths.contains(&(piece.text.len() - cut)) {
                let (left, right) = piece.text.split_at(cut);
                if normal.contains_key(left) && normal.contains_key(right) {
                    found.push((piece.score, left_chars, left, right));
                }
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    found.into_iter().map(|(_, _, left, right)| [left.to_string(), right.to_string()]).collect()
}

pub(super) fn byte_piece(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// The text as a regular expression of Oniguruma's that matches just it.
fn escape(text: &str) -> String {
    let special = |c: char| c.is_ascii_punctuation();
    text.chars().flat_map(|c| special(c).then_some('\\').into_iter().chain([c])).collect()
}

impl Default for SentencePieceModel<'_> {
    fn default() -> Self {
        SentencePieceModel {
            pieces: Vec::new(),
            model_type: 1,
            byte_fallback: false,
            whitespace_as_suffix: false,
            bos_piece: "<s>",
            eos_piece: "</s>",
            pad_piece: "<pad>",
            normalizer: "",
            has_character_map: false,
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        }
    }
}

impl<'a> SentencePieceModel<'a> {
    /// A model that is not in SentencePiece's own format, with the names of BOS, EOS and PAD.
    pub(super) fn of_pieces(
        pieces: Vec<VocabularyPiece<'a>>,
        [bos_piece, eos_piece, pad_piece]: [&'a str; 3],
    ) -> Self {
        let byte_fallback = pieces.iter().any(|p| p.kind == BYTE);
        SentencePieceModel {
            pieces,
            byte_fallback,
            bos_piece,
            eos_piece,
            pad_piece,
            ..SentencePieceModel::default()
        }
    }

    fn of(proto: &'a ModelProto) -> Result<Self, String> {
        let defaults = SentencePieceModel::default();
        let trainer = proto.trainer_spec.as_ref();
        let normalizer = proto.normalizer_spec.as_ref();
        let text = |of: fn(&TrainerSpec) -> &Option<String>, default| {
            trainer.and_then(|t| of(t).as_deref()).unwrap_or(default)
        };
        let rule = |of: fn(&NormalizerSpec) -> Option<bool>| normalizer.and_then(of).unwrap_or(true);
        let pieces: Vec<VocabularyPiece> =
            proto.pieces.iter().map(VocabularyPiece::of).collect::<Result<_, _>>()?;
        if pieces.is_empty() {
            return Err("there are no pieces in it".into());
        }
        Ok(SentencePieceModel {
            pieces,
            model_type: trainer.and_then(|t| t.model_type).map_or(defaults.model_type, number),
            byte_fallback: trainer.is_some_and(|t| t.byte_fallback()),
            whitespace_as_suffix: trainer.is_some_and(|t| t.treat_whitespace_as_suffix()),
            bos_piece: text(|t| &t.bos_piece, defaults.bos_piece),
            eos_piece: text(|t| &t.eos_piece, defaults.eos_piece),
            pad_piece: text(|t| &t.pad_piece, defaults.pad_piece),
            normalizer: normalizer.map_or("", |n| n.name()),
            has_character_map: normalizer.is_some_and(|n| !n.precompiled_charsmap().is_empty()),
            add_dummy_prefix: rule(|n| n.add_dummy_prefix),
            remove_extra_whitespaces: rule(|n| n.remove_extra_whitespaces),
            escape_whitespaces: rule(|n| n.escape_whitespaces),
        })
    }

    /// Refuses what would give other ids than SentencePiece's.
    fn check(&self) -> Result<(), String> {
        let kind = match self.model_type {
            1 => Some("a Unigram model"),
            2 => None,
            3 => Some("a word model"),
            4 => Some("a character model"),
            _ => Some("a model of unknown type"),
        };
        if let Some(kind) = kind {
            return Err(format!(
                "{kind} of SentencePiece is not built, only BPE is; save it once as a fast tokenizer with transformers"
            ));
        }
        let refused = [
            (self.has_character_map, format!("its normalizer `{}` maps characters", self.normalizer)),
            (self.remove_extra_whitespaces, "it removes white space (remove_extra_whitespaces)".into()),
            (!self.escape_whitespaces, "it does not escape spaces (escape_whitespaces)".into()),
            (
                self.whitespace_as_suffix,
                "it has spaces at the ends of words (treat_whitespace_as_suffix)".into(),
            ),
            (self.pieces.iter().any(|p| p.kind == UNUSED), "it has unused pieces".into()),
        ];
        match refused.into_iter().find(|(there, _)| *there) {
            Some((_, what)) => {
                Err(format!("{what}, which is not built; save it once as a fast tokenizer with transformers"))
            }
            None => Ok(()),
        }
    }
}

impl<'a> VocabularyPiece<'a> {
    fn of(proto: &'a PieceProto) -> Result<Self, String> {
        let piece = VocabularyPiece {
            text: proto.piece(),
            score: proto.score(),
            kind: proto.kind.map_or(NORMAL, number),
        };
        if piece.text.is_empty() {
            return Err("a piece is empty".into());
        }
        if !piece.score.is_finite() {
            return Err(format!("the score of the piece `{}` is not finite", piece.text));
        }
        Ok(piece)
    }
}

/// The number of a kind; a negative one is none.
fn number(n: i32) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

/// The fields that decide the ids of sentencepiece_model.proto's `ModelProto`; others are skipped.
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct PieceProto {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    /// Its `type`.
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(string, optional, tag = "46")]
    bos_piece: Option<String>,
    #[prost(string, optional, tag = "47")]
    eos_piece: Option<String>,
    #[prost(string, optional, tag = "48")]
    pad_piece: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerSpec {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escape_whitespaces: Option<bool>,
}
