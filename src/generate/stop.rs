//! Texts of completions: stop texts, and what of a text may be shown while more of it comes.

use crate::data::tokenizer::Tokenizer;
use crate::error::Result;

/// Texts that end a completion.
#[derive(Clone, Copy)]
pub struct Stop<'a> {
    pub texts: &'a [String],
    pub tokenizer: &'a Tokenizer,
}

impl std::fmt::Debug for Stop<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.texts).finish()
    }
}

impl Stop<'_> {
    /// Whether the newest token completes a stop text. A text ends in the newest token, and every other token of it
    /// has a byte at least, so only so many tokens are decoded; a few more, since decoders treat the first ones apart.
    pub fn is_complete(&self, ids: &[i64]) -> Result<bool> {
        let longest = self.texts.iter().map(String::len).max().unwrap_or(0);
        let tail = &ids[ids.len().saturating_sub(longest + 8)..];
        let text = decode(self.tokenizer, tail)?;
        Ok(self.texts.iter().any(|stop| text.contains(stop.as_str())))
    }
}

/// The text of a completion, without special tokens and up to the first of the stop texts. It is what the tokens say
/// after their prompt, of which the last few are looked at: some tokenizers drop a space where a text begins.
pub fn text(tokenizer: &Tokenizer, prompt: &[i64], ids: &[i64], stop: &[String]) -> Result<String> {
    let prompt = &prompt[prompt.len().saturating_sub(16)..];
    let all = decode(tokenizer, &[prompt, ids].concat())?;
    let mut text = match all.strip_prefix(&decode(tokenizer, prompt)?) {
        Some(text) => text.to_string(),
        None => decode(tokenizer, ids)?,
    };
    if let Some(end) = stop.iter().filter_map(|s| text.find(s.as_str())).min() {
        text.truncate(end);
    }
    Ok(text)
}

fn decode(tokenizer: &Tokenizer, ids: &[i64]) -> Result<String> {
    let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
    tokenizer.decode(&ids, true)
}

/// How much of a text that still grows may be shown.
#[derive(Debug, Default)]
pub struct Settled {
    shown: usize,
    /// Bytes that may yet turn out to begin a stop text.
    held_back: usize,
}

impl Settled {
    pub fn new(stop: &[String]) -> Settled {
        Settled { shown: 0, held_back: stop.iter().map(|s| s.len() - 1).max().unwrap_or(0) }
    }

    /// What is new of `text` and will not change: without characters that are not complete yet, and what may begin a stop
    /// text, unless the text is `finished`.
    pub fn new_part<'t>(&mut self, text: &'t str, finished: bool) -> &'t str {
        let complete = text.trim_end_matches(char::REPLACEMENT_CHARACTER).len();
        let settled = text.floor_char_boundary(complete.saturating_sub(self.held_back));
        let end = if finished { text.len() } else { settled };
        let part = text.get(self.shown..end).unwrap_or_default();
        self.shown += part.len();
        part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_settled_is_shown() {
        let mut settled = Settled::new(&["END".to_string()]);
        let mut shown = String::new();
        let mut show = |text: &str, finished| {
            let part = settled.new_part(text, finished).to_string();
            shown += &part;
            part
        };
        assert_eq!(show("ab", false), "");
        assert_eq!(show("abc\u{fffd}", false), "a");
        assert_eq!(show("abcé", false), "bc", "é may be followed by one byte of a stop text at most");
        assert_eq!(show("abcéEN", false), "é");
        assert_eq!(show("abcé", true), "", "the stop text came and was cut off");
        assert_eq!(shown, "abcé");
        assert_eq!(Settled::default().new_part("x\u{fffd}", true), "x\u{fffd}");
    }
}
