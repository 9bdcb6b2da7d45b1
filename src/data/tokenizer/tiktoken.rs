//! Vocabularies in tiktoken's format (Llama 3's `tokenizer.model`, Qwen's `qwen.tiktoken`: lines of a token in base64
//! and its rank) as the definition of a byte-level `tokenizers` BPE, the way transformers' `TikTokenConverter` makes it.
//!
//! tiktoken joins the neighbours whose union has the lowest rank, the leftmost first, and looks a whole pre-token up
//! before (`ignore_merges`).

use super::convert::{Added, ByteLevel, Converted, overlay};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use std::collections::{HashMap, HashSet};

/// What does not stand in the file: it is in the code that came with the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum TiktokenFamily {
    /// The tokenizer of Llama 3.1 (its names are those of Hugging Face's `tokenizer.json`).
    Llama3,
    /// Qwen, first generation.
    Qwen,
}

impl TiktokenFamily {
    /// How text is cut before anything is joined: up to three digits together, or each by itself.
    fn pattern(self) -> String {
        let digits = if self == TiktokenFamily::Llama3 { r"\p{N}{1,3}" } else { r"\p{N}" };
        format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    }

    /// The special tokens, whose ids follow those of the file.
    fn special_tokens(self) -> Vec<String> {
        match self {
            TiktokenFamily::Llama3 => {
                let named = [
                    "begin_of_text",
                    "end_of_text",
                    "reserved_special_token_0",
                    "reserved_special_token_1",
                    "finetune_right_pad_id",
                    "reserved_special_token_2",
                    "start_header_id",
                    "end_header_id",
                    "eom_id",
                    "eot_id",
                    "python_tag",
                ];
                let reserved = (3..=247).map(|i| format!("reserved_special_token_{i}"));
                named
                    .map(String::from)
                    .into_iter()
                    .chain(reserved)
                    .map(|name| format!("<|{name}|>"))
                    .collect()
            }
            TiktokenFamily::Qwen => {
                let named = ["endoftext", "im_start", "im_end"].map(String::from);
                let extra = (0..205).map(|i| format!("extra_{i}"));
                named.into_iter().chain(extra).map(|name| format!("<|{name}|>")).collect()
            }
        }
    }

    fn names(self) -> Map<String, Value> {
        let names = match self {
            TiktokenFamily::Llama3 => json!({
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>",
                "pad_token": "<|finetune_right_pad_id|>",
            }),
            TiktokenFamily::Qwen => json!({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
        };
        names.as_object().cloned().unwrap_or_default()
    }
}

/// Whether this is such a file and not SentencePiece's: its first line is base64 and a number.
pub(super) fn is_tiktoken(bytes: &[u8]) -> bool {
    let line = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
    parse_line(line).is_some()
}

fn parse_line(line: &[u8]) -> Option<(Vec<u8>, usize)> {
    let line = std::str::from_utf8(line).ok()?;
    let (token, rank) = line.trim_end_matches('\r').split_once(' ')?;
    Some((STANDARD.decode(token).ok().filter(|token| !token.is_empty())?, rank.parse().ok()?))
}

/// The definition that gives tiktoken's ids. `config` is `tokenizer_config.json`; `generation` tells whether a Qwen is a
/// chat model (`chat_format`), which ends its turns with `<|im_end|>`.
pub(super) fn convert(
    bytes: &[u8],
    family: TiktokenFamily,
    config: &Map<String, Value>,
    generation: &Value,
    added: &[Added],
) -> Result<Converted, String> {
    let ranks = read_ranks(bytes)?;
    let n = ranks.len();
    let byte_level = byte_characters();
    let name = |token: &[u8]| token.iter().map(|b| byte_level[*b as usize]).collect::<String>();
    let by_rank: HashMap<&[u8], usize> = ranks.iter().enumerate().map(|(i, t)| (t.as_slice(), i)).collect();
    if let Some(byte) = (0..=255u8).find(|b| !by_rank.contains_key([*b].as_slice())) {
        return Err(format!("the byte 0x{byte:02X} has no token of its own"));
    }
    let lengths: HashSet<usize> = ranks.iter().map(Vec::len).collect();
    let mut merges = Vec::new();
    for token in &ranks {
        let cuts =
            (1..token.len()).filter(|cut| lengths.contains(cut) && lengths.contains(&(token.len() - cut)));
        let mut ways: Vec<_> = cuts
            .filter_map(|cut| {
                let (left, right) = token.split_at(cut);
                Some(((*by_rank.get(left)?, *by_rank.get(right)?), [name(left), name(right)]))
            })
            .collect();
        ways.sort();
        merges.extend(ways.into_iter().map(|(_, way)| way));
    }

    let mut added_tokens = added.to_vec();
    if added.iter().all(|t| (t.id as usize) < n) {
        let named = family.special_tokens().into_iter().enumerate();
        added_tokens.extend(named.map(|(i, token)| Added::special((n + i) as u32, &token)));
    }
    added_tokens.sort_by_key(|t| t.id);
    let mut special = family.names();
    overlay(&mut special, config);
    let id_of = |text: &str| added_tokens.iter().find(|t| t.content == text).map(|t| t.id);
    let token = |name: &str| {
        let text = special.get(name).and_then(|t| t.as_str().or(t["content"].as_str()))?;
        Some((text, id_of(text)?))
    };
    let flag = |name: &str, default| config.get(name).and_then(Value::as_bool).unwrap_or(default);
    let begin = token("bos_token").filter(|_| flag("add_bos_token", family == TiktokenFamily::Llama3));
    let end = token("eos_token").filter(|_| flag("add_eos_token", false));
    // Meta's models stop at the end of a text, of a message and of a turn.
    let ends: &[&str] = match family {
        TiktokenFamily::Llama3 => &["<|eom_id|>", "<|eot_id|>"],
        TiktokenFamily::Qwen if generation["chat_format"] == "chatml" => &["<|im_end|>"],
        TiktokenFamily::Qwen => &[],
    };
    let eos_ids =
        token("eos_token").map(|(_, id)| id).into_iter().chain(ends.iter().filter_map(|t| id_of(t)));
    let eos_ids = eos_ids.collect();
    let vocab: Map<String, Value> = ranks.iter().enumerate().map(|(i, t)| (name(t), json!(i))).collect();
    let normalizer = if family == TiktokenFamily::Qwen { json!({"type": "NFC"}) } else { Value::Null };
    let definition = ByteLevel {
        added: &added_tokens,
        normalizer,
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": family.pattern()}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]}),
        begin,
        end,
        ignore_merges: true,
        vocab,
        merges,
    };
    let definition = definition.definition();
    Ok(Converted { definition, special, eos_ids })
}

/// The tokens by rank: every rank from 0 on, once.
fn read_ranks(bytes: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let lines = bytes.split(|b| *b == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    let mut found = Vec::new();
    for (i, line) in lines {
        let (token, rank) =
            parse_line(line).ok_or_else(|| format!("line {}: not a token in base64 and its rank", i + 1))?;
        found.push((rank, token, i + 1));
    }
    found.sort();
    if let Some((want, (rank, _, line))) = found.iter().enumerate().find(|(i, (rank, ..))| i != rank) {
        let what =
            if *rank < want { "appears twice".into() } else { format!("follows, but {want} is missing") };
        return Err(format!("line {line}: the rank {rank} {what}"));
    }
    let mut seen = HashSet::new();
    if let Some((_, _, line)) = found.iter().find(|(_, token, _)| !seen.insert(token)) {
        return Err(format!("line {line}: the token appears twice"));
    }
    Ok(found.into_iter().map(|(_, token, _)| token).collect())
}

/// The printable character that stands for each byte in a byte-level vocabulary: itself where it is printable, else
/// one from U+0100 on, as GPT-2's `bytes_to_unicode` has them.
fn byte_characters() -> [char; 256] {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut others = (0x100..).filter_map(char::from_u32);
    std::array::from_fn(|b| {
        let b = b as u8;
        if printable(b) { char::from(b) } else { others.next().unwrap_or_default() }
    })
}
