//! Texts of completions: what ends them, and what of them may be shown while more comes.

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

/// Tokens of a prompt that its completion's text is told from.
const PROMPT_TAIL: usize = 16;

/// The text of a completion, without special tokens and up to the first of the stop texts. It is what the tokens say
/// after their prompt, of which the last few are looked at: some tokenizers drop a space where a text begins.
pub fn text(tokenizer: &Tokenizer, prompt: &[i64], ids: &[i64], stop: &[String]) -> Result<String> {
    let prompt = &prompt[prompt.len().saturating_sub(PROMPT_TAIL)..];
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

/// The text of a completion as it grows, token by token, of which only what cannot change any more is given out.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    stop: &'a [String],
    /// The last tokens: those before `known`, whose text is in `text`, for the sake of what follows them.
    window: Vec<i64>,
    known: usize,
    text: String,
    given: usize,
}

/// Bytes, and so tokens, that a character has at most.
const CHAR: usize = 4;

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[i64], stop: &'a [String]) -> TextStream<'a> {
        let window = prompt[prompt.len().saturating_sub(PROMPT_TAIL)..].to_vec();
        TextStream { tokenizer, stop, known: window.len(), window, text: String::new(), given: 0 }
    }

    /// Adds a token, which may be the `last`. Returns what is new of the text: whole characters, without what may yet
    /// turn out to begin a stop text; in the end all that is before one.
    pub fn push(&mut self, id: i64, last: bool) -> Result<&str> {
        self.window.push(id);
        let all = decode(self.tokenizer, &self.window)?;
        let whole = !all.ends_with(char::REPLACEMENT_CHARACTER) || self.window.len() - self.known >= CHAR;
        if whole || last {
            match all.strip_prefix(&decode(self.tokenizer, &self.window[..self.known])?) {
                Some(new) => self.text += new,
                None => self.text += &decode(self.tokenizer, &self.window[self.known..])?,
            }
            self.window.drain(..self.known);
            self.known = self.window.len();
        }
        let end = match last {
            true => {
                self.stop.iter().filter_map(|s| self.text.find(s.as_str())).min().unwrap_or(self.text.len())
            }
            false => {
                let held_back = self.stop.iter().map(|s| s.len() - 1).max().unwrap_or(0);
                self.text.floor_char_boundary(self.text.len().saturating_sub(held_back))
            }
        };
        let part = self.given.min(end)..end;
        self.given = part.end;
        Ok(&self.text[part])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::tests::small;

    /// What is given out token by token, and the whole of it.
    fn stream(
        tokenizer: &Tokenizer,
        prompt: &str,
        completion: &str,
        stop: &[String],
    ) -> (Vec<String>, String) {
        let ids =
            |text| tokenizer.encode(text, false).unwrap().into_iter().map(i64::from).collect::<Vec<_>>();
        let (prompt, ids) = (ids(prompt), ids(completion));
        let mut stream = TextStream::new(tokenizer, &prompt, stop);
        let parts: Vec<String> = ids
            .iter()
            .enumerate()
            .map(|(i, id)| stream.push(*id, i + 1 == ids.len()).unwrap().to_string())
            .collect();
        assert_eq!(parts.concat(), text(tokenizer, &prompt, &ids, stop).unwrap());
        let whole = parts.concat();
        (parts, whole)
    }

    #[test]
    fn characters_come_whole() {
        // A byte a token, but for what the training text has.
        let tokenizer = small(290);
        let completion = "naïve 中文 🦀🦀 dogs";
        let (parts, whole) = stream(&tokenizer, "The fox: ", completion, &[]);
        assert_eq!(whole, completion);
        assert!(parts.iter().any(String::is_empty) && parts.iter().any(|p| p == "🦀"), "{parts:?}");
    }

    #[test]
    fn bytes_that_are_no_text_do_not_hold_it_up() {
        let tokenizer = small(290);
        let byte = i64::from(tokenizer.encode("🦀", false).unwrap()[0]);
        let mut stream = TextStream::new(&tokenizer, &[], &[]);
        let parts: Vec<String> = (0..9).map(|i| stream.push(byte, i == 8).unwrap().to_string()).collect();
        assert_eq!(parts[..3].concat(), "", "it may be the beginning of a character");
        assert!(!parts[3].is_empty() && !parts[7].is_empty());
        assert_eq!(parts.concat(), "\u{fffd}".repeat(9));
    }

    #[test]
    fn stop_texts_are_never_shown() {
        let tokenizer = small(290);
        let stop = ["END".to_string(), "STOP!".to_string()];
        let (parts, whole) = stream(&tokenizer, "a", "bcéSTOP and gEND", &stop);
        assert_eq!(whole, "bcéSTOP and g");
        assert!(parts.len() > 8 && parts.iter().filter(|p| !p.is_empty()).count() > 5, "{parts:?}");
    }
}
