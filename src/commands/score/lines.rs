//! What a line of `score`'s input gives to score.

use std::ops::Range;

use serde_json::Value;

use super::Args;
use crate::commands::inference::{self, OpenedModel};
use crate::config::shape::Shape;
use crate::data::chat::Chat;
use crate::data::examples::Encoded;
use crate::data::odd::{Odd, OrOdd, Reason};
use crate::data::readers::Record;
use crate::data::supervised;
use crate::error::{Error, Result};
use crate::warn;

/// A line's tokens, and which of them are scored; never the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// The line's token ids.
    pub ids: Vec<i64>,
    /// Ranges of `ids`, in order.
    pub scored: Vec<Range<usize>>,
}

impl Sequence {
    /// Scores the tokens from `first` on.
    fn from(ids: Vec<i64>, first: usize) -> Sequence {
        let scored = (first < ids.len()).then_some(first..ids.len()).into_iter().collect();
        Sequence { ids, scored }
    }

    /// Scores the supervised tokens.
    pub fn supervised(encoded: &Encoded) -> Sequence {
        let mut scored: Vec<Range<usize>> = Vec::new();
        for (i, _) in encoded.supervised.iter().enumerate().skip(1).filter(|(_, s)| **s) {
            match scored.last_mut() {
                Some(last) if last.end == i => last.end += 1,
                _ => scored.push(i..i + 1),
            }
        }
        Sequence { ids: encoded.ids.iter().map(|id| i64::from(*id)).collect(), scored }
    }

    /// The numbers of the scored tokens.
    pub fn places(&self) -> impl Iterator<Item = usize> {
        self.scored.iter().cloned().flatten()
    }
}

/// How lines are read for a model with an LM head.
pub struct LineReader<'a> {
    opened: &'a OpenedModel,
    /// Texts of `prompt` and `completion` go into the chat template.
    chats: bool,
    chat: Option<Chat>,
}

impl<'a> LineReader<'a> {
    /// The chat template is looked for where a line needs it.
    pub fn new(args: &Args, lines: &[Result<Record>], opened: &'a OpenedModel) -> Result<LineReader<'a>> {
        let chats = args.chat || args.template.chat_template.is_some();
        let needed = lines.iter().flatten().any(|line| kind(line, chats) == LineKind::Conversation);
        let chat = needed.then(|| opened.chat(&args.template)).transpose()?;
        if let (None, Some(date)) = (&chat, args.template.template_date) {
            warn!("--template-date {} is not used: no line is a conversation", date.date);
        }
        Ok(LineReader { opened, chats, chat })
    }

    /// A line's tokens, and what it gives to the template and the text lacks.
    pub fn read(&self, line: &Record) -> Result<(Sequence, Vec<String>), Odd> {
        let mut unwritten = Vec::new();
        let sequence = match (kind(line, self.chats), &self.chat) {
            (LineKind::Conversation, Some(chat)) => {
                let example = supervised::example(line, chat, false)?;
                unwritten = example.leftovers.unwritten;
                Sequence::supervised(&example.sequences[0])
            }
            (LineKind::Conversation, None) => {
                return Err(Error::failed("a conversation needs a template")).or_odd(Reason::Format);
            }
            _ => self.plain(line).map_err(|e| placed(e, line)).or_odd(Reason::Format)?,
        };
        check(line, &sequence.ids, self.opened.shape())?;
        Ok((sequence, unwritten))
    }

    /// Token ids, or texts that are scored as they are.
    fn plain(&self, line: &Record) -> Result<Sequence> {
        if let Some(ids) = input_ids(line)? {
            return Ok(Sequence::from(ids, 1));
        }
        let tokenizer = self.opened.tokenizer()?;
        if !line.fields.contains_key("prompt") && !line.fields.contains_key("completion") {
            if !line.fields.contains_key("text") {
                let keys: Vec<&str> = line.fields.keys().map(String::as_str).collect();
                return Err(Error::data(format!(
                    "needs `input_ids`, `prompt` and `completion`, or `text`, or a conversation as `corral sft` reads it; \
                     keys here: {}",
                    if keys.is_empty() { "none".into() } else { keys.join(", ") }
                )));
            }
            return Ok(Sequence::from(inference::encode(tokenizer, line.text("text")?, true)?, 1));
        }
        let (prompt, completion) = (line.text("prompt")?, line.text("completion")?);
        let mut ids = inference::encode(tokenizer, prompt, true)?;
        let first = ids.len();
        if first == 0 {
            return Err(Error::data(
                "the prompt is empty, and the tokenizer adds nothing to it: the first token cannot be scored; use `text`",
            ));
        }
        // The completion's tokens are what follows the prompt's in the whole text. Where the tokenizer joins them over
        // the boundary, it is taken by itself.
        let whole = inference::encode(tokenizer, &format!("{prompt}{completion}"), true)?;
        match whole.strip_prefix(ids.as_slice()) {
            Some(rest) => ids.extend(rest),
            None => ids.extend(inference::encode(tokenizer, completion, false)?),
        }
        Ok(Sequence::from(ids, first))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LineKind {
    Plain,
    Conversation,
}

/// Whether a line is scored as it is: `input_ids`, texts under `prompt` and `completion` (without `chats`), `text`.
fn kind(line: &Record, chats: bool) -> LineKind {
    let text = |key: &str| line.fields.get(key).is_none_or(|v| !v.is_array());
    let has = |key: &str| line.fields.get(key).is_some_and(|v| !v.is_null());
    let paired = has("prompt") || has("completion");
    let other = ["messages", "conversations", "chosen", "completions"].into_iter().any(has);
    let known = paired || other || has("instruction") || has("question");
    let plain = has("input_ids")
        || paired && !chats && !other && text("prompt") && text("completion")
        || !paired && has("text");
    if known && !plain { LineKind::Conversation } else { LineKind::Plain }
}

/// The error with the line's place, unless it names that already.
fn placed(e: Error, line: &Record) -> Error {
    match e.message.contains(&line.place.to_string()) {
        true => e,
        false => e.context(&line.place),
    }
}

/// Refuses tokens that the model cannot read.
pub fn check(line: &Record, ids: &[i64], shape: &Shape) -> Result<(), Odd> {
    let (n, most) = (ids.len(), shape.max_position_embeddings);
    if n as i64 > most {
        return Err(Error::data(format!(
            "{}: {n} tokens; the model has {most} positions (max_position_embeddings): shorten the line",
            line.place
        )))
        .or_odd(Reason::TooLong);
    }
    match ids.iter().find(|id| !(0..shape.vocab_size).contains(*id)) {
        None => Ok(()),
        Some(id) => Err(Error::data(format!(
            "{}: token id {id} is not in the model's vocabulary of {}",
            line.place, shape.vocab_size
        )))
        .or_odd(Reason::Format),
    }
}

/// A line's own token ids, if it has any.
pub fn input_ids(line: &Record) -> Result<Option<Vec<i64>>> {
    let Some(ids) = line.fields.get("input_ids") else { return Ok(None) };
    let ids = ids.as_array().and_then(|ids| ids.iter().map(Value::as_i64).collect::<Option<Vec<_>>>());
    ids.map(Some).ok_or_else(|| Error::data(format!("{}: input_ids is no list of token ids", line.place)))
}
