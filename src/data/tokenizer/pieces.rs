//! Long texts in pieces that are encoded one by one.

use serde_json::Value;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::Tokenizer;

/// Bytes around a cut that the pre-tokenizer is tried on.
const WINDOW: usize = 200;

impl Tokenizer {
    /// Cuts a long text into pieces of about `size` bytes that give, encoded one by one without special tokens, the
    /// same ids as the whole. Where this tokenizer allows no such cut, the text stays whole.
    pub fn pieces<'a>(&self, text: &'a str, size: usize) -> Vec<&'a str> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while self.splits_at_lines && rest.len() > size {
            let start = rest.ceil_char_boundary(size);
            let breaks = rest[start..].match_indices('\n').map(|(i, _)| start + i);
            let mut cuts = breaks.map(|i| i - usize::from(rest[..i].ends_with('\r')));
            // After a letter and before a line break hardly any pre-tokenizer joins anything; after punctuation, marks or
            // white space many do.
            let Some(cut) =
                cuts.find(|i| rest[..*i].ends_with(char::is_alphabetic) && self.ends_at(rest, *i))
            else {
                break;
            };
            let (piece, tail) = rest.split_at(cut);
            pieces.push(piece);
            rest = tail;
        }
        pieces.push(rest);
        pieces
    }

    /// Whether the pre-tokenizer ends a word at this place. What a letter is, is up to its patterns: to Unicode, the vowel
    /// signs of Hindi, Thai or Arabic are marks.
    fn ends_at(&self, text: &str, place: usize) -> bool {
        let begin = text.floor_char_boundary(place.saturating_sub(WINDOW));
        let end = text.ceil_char_boundary((place + WINDOW).min(text.len()));
        let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() else { return false };
        let mut window = PreTokenizedString::from(&text[begin..end]);
        if pre_tokenizer.pre_tokenize(&mut window).is_err() {
            return false;
        }
        let words = window.get_splits(OffsetReferential::Original, OffsetType::Byte);
        words.iter().any(|(_, range, _)| range.1 == place - begin)
            && words.iter().all(|(_, range, _)| range.0 >= place - begin || range.1 <= place - begin)
    }
}

/// Whether the tokenizer works on each line by itself: byte-level, nothing put before the text, a normalizer, if any, that
/// looks at single characters, and no added token that takes a line break with it.
pub(super) fn splits_at_lines(inner: &tokenizers::Tokenizer, definition: &Value) -> bool {
    let pre_tokenizer = definition["pre_tokenizer"].to_string();
    let added = inner.get_added_tokens_decoder();
    pre_tokenizer.contains("\"ByteLevel\"")
        && !pre_tokenizer.contains("\"Metaspace\"")
        && !pre_tokenizer.contains("\"add_prefix_space\":true")
        && matches!(definition["normalizer"]["type"].as_str(), None | Some("NFC"))
        && added.values().all(|token| !token.rstrip && !token.content.contains(['\n', '\r']))
        && definition["model"]["dropout"].as_f64().is_none_or(|dropout| dropout == 0.0)
}
