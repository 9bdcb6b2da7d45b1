//! Texts of completions: what ends them, and what of them may be shown while more comes.

use crate::data::tokenizer::Tokenizer;
use crate::error::Result;

/// Texts that end a completion.
#[derive(Clone, Copy)]
pub struct Stop<'a> {
    /// The row ends where one of these texts appears.
    pub texts: &'a [String],
    /// Turns the row's tokens into text.
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
        let complete = self.texts.iter().any(|stop| text.contains(stop.as_str()));
        Ok(complete || at_special_token(self.tokenizer, tail, self.texts)?.is_some())
    }
}

/// Where the first stop text with a special token in it begins, which [`decode`] leaves out of a text: the number of tokens
/// before it, and what the next one says before the stop text.
fn at_special_token(tokenizer: &Tokenizer, ids: &[i64], stop: &[String]) -> Result<Option<(usize, String)>> {
    let special = |id: &i64| u32::try_from(*id).is_ok_and(|id| tokenizer.is_added(id));
    let mut first = None;
    for (i, id) in ids.iter().enumerate().filter(|(_, id)| special(id)) {
        let Some(token) = tokenizer.id_to_token(*id as u32) else { continue };
        for stop in stop.iter().filter(|stop| stop.contains(&token)) {
            // Every token of it but those of one character's bytes has a character at least.
            let near = i.saturating_sub(stop.len())..ids.len().min(i + stop.len() + 1);
            let has = |part: std::ops::Range<usize>| -> Result<bool> {
                Ok(decode_all(tokenizer, &ids[part])?.contains(stop.as_str()))
            };
            if !has(near.clone())? {
                continue;
            }
            // The first token with which it is there, and the last from which on it is.
            let (mut begin, mut end) = (near.start, i + 1);
            while !has(begin..end)? {
                end += 1;
            }
            while has(begin + 1..end)? {
                begin += 1;
            }
            let from_there = decode_all(tokenizer, &ids[begin..end])?;
            let before = from_there.split(stop.as_str()).next().unwrap_or_default().to_string();
            if first.as_ref().is_none_or(|(known, _)| begin < *known) {
                first = Some((begin, before));
            }
        }
    }
    Ok(first)
}

/// Tokens of a prompt that its completion's text is told from.
const PROMPT_TAIL: usize = 16;

/// The text of a completion, without special tokens and up to the first of the stop texts. It is what the tokens say
/// after their prompt, of which the last few are looked at: some tokenizers drop a space where a text begins.
pub fn text(tokenizer: &Tokenizer, prompt: &[i64], ids: &[i64], stop: &[String]) -> Result<String> {
    let prompt = &prompt[prompt.len().saturating_sub(PROMPT_TAIL)..];
    let (ids, rest) = match at_special_token(tokenizer, ids, stop)? {
        Some((end, rest)) => (&ids[..end], rest),
        None => (ids, String::new()),
    };
    let all = decode(tokenizer, &[prompt, ids].concat())?;
    let mut text = match all.strip_prefix(&decode(tokenizer, prompt)?) {
        Some(text) => text.to_string(),
        None => decode(tokenizer, ids)?,
    };
    text += &rest;
    if let Some(end) = stop.iter().filter_map(|s| text.find(s.as_str())).min() {
        text.truncate(end);
    }
    Ok(text)
}

fn decode(tokenizer: &Tokenizer, ids: &[i64]) -> Result<String> {
    let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
    tokenizer.decode(&ids, true)
}

/// With special tokens.
fn decode_all(tokenizer: &Tokenizer, ids: &[i64]) -> Result<String> {
    let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
    tokenizer.decode(&ids, false)
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
    /// The last tokens of the prompt, and all of the completion.
    prompt: Vec<i64>,
    ids: Vec<i64>,
}

/// Bytes, and so tokens, that a character has at most.
const CHAR: usize = 4;

impl<'a> TextStream<'a> {
    /// Text of the tokens that follow `prompt`, which ends before the first of the texts `stop`.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[i64], stop: &'a [String]) -> TextStream<'a> {
        let prompt = prompt[prompt.len().saturating_sub(PROMPT_TAIL)..].to_vec();
        let (text, ids, window) = (String::new(), Vec::new(), prompt.clone());
        TextStream { tokenizer, stop, known: window.len(), window, text, given: 0, prompt, ids }
    }

    /// Adds a token, which may be the `last`. Returns what is new of the text: whole characters, without what may yet
    /// turn out to begin a stop text; in the end all that is before one.
    pub fn push(&mut self, id: i64, last: bool) -> Result<&str> {
        self.window.push(id);
        self.ids.push(id);
        if last && at_special_token(self.tokenizer, &self.ids, self.stop)?.is_some() {
            self.text = text(self.tokenizer, &self.prompt, &self.ids, self.stop)?;
            let part = self.text.floor_char_boundary(self.given)..;
            self.given = self.text.len();
            return Ok(&self.text[part]);
        }
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

    /// A special token is in no text, and ends an answer all the same, alone or within a stop text.
    #[test]
    fn special_tokens_stop() {
        let tokenizer = small(290).with_tokens(&["<|end|>".into(), "<|other|>".into()]).unwrap();
        let ids = |text: &str| {
            tokenizer.encode(text, false).unwrap().into_iter().map(i64::from).collect::<Vec<_>>()
        };
        for (stop, answer, wanted) in [
            (vec!["<|end|>"], "dogs<|end|>", "dogs"),
            (vec!["<|end|>\n"], "dogs<|end|>\n", "dogs"),
            (vec!["s<|end|>"], "dogs<|end|>", "dog"),
            (vec!["none", "<|other|> <|end|>"], "a<|end|>b<|other|> <|end|>", "ab"),
            (vec!["</s>"], "dogs\n</s>", "dogs\n"),
            (vec!["<|end|><|end|>"], "a<|other|><|end|><|end|>", "a"),
        ] {
            let texts: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
            let stop = Stop { texts: &texts, tokenizer: &tokenizer };
            let all = ids(answer);
            let complete = |n: usize| stop.is_complete(&all[..n]).unwrap();
            assert!(complete(all.len()) && (1..all.len()).all(|n| !complete(n)), "{texts:?} {answer:?}");
            assert_eq!(stream(&tokenizer, "The fox: ", answer, &texts).1, wanted, "{texts:?}");
        }
        // Elsewhere it ends nothing.
        let texts = ["<|end|>x".to_string()];
        let stop = Stop { texts: &texts, tokenizer: &tokenizer };
        assert!(!stop.is_complete(&ids("a<|end|>y<|other|>x")).unwrap());
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
