//! A last turn of the assistant that is to be continued, cut where transformers' `continue_final_message` cuts it.

use std::ops::Range;

use super::{Chat, Encoding};
use crate::data::conversation::Message;
use crate::error::{Error, Result};

/// What transformers puts behind a message to find its end in the rendered text.
const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

impl Chat {
    /// The ids of messages that a model is to go on with: a last turn of the assistant is continued, to others it answers.
    ///
    /// # Errors
    /// As [`Chat::prompt`]; the template does not write the last turn as it is.
    pub fn prompt_or_prefill(&self, messages: &[Message]) -> Result<Vec<u32>> {
        if messages.last().is_none_or(|m| m.role != "assistant") {
            return self.prompt(messages);
        }
        let (text, turns) = self.render_prefill(messages)?;
        Ok(self.encode_text(text, &turns)?.ids)
    }

    /// A prompt and its completion as one conversation. Turns: those of the completion. Where the prompt's last turn and the
    /// completion's first one are the assistant's, they are one turn, of which the prompt is the beginning.
    ///
    /// # Errors
    /// As [`Chat::encode`]; the template does not write the prompt's last turn as it is.
    pub fn answer(&self, prompt: &[Message], completion: &[Message]) -> Result<Encoding> {
        let is_assistant = |m: Option<&Message>| m.is_some_and(|m| m.role == "assistant");
        let before = prompt.iter().filter(|m| m.role == "assistant").count();
        let mut messages = prompt.to_vec();
        if !(is_assistant(prompt.last()) && is_assistant(completion.first())) {
            messages.extend_from_slice(completion);
            let mut encoding = self.encode(&messages, false)?;
            encoding.turns.drain(..before.min(encoding.turns.len()));
            return Ok(encoding);
        }
        let begin = self.render_prefill(prompt)?.0;
        if let (Some(last), Some(first)) = (messages.last_mut(), completion.first()) {
            last.content.push_str(&first.content);
        }
        messages.extend_from_slice(&completion[1..]);
        let (text, mut turns) = self.render_turns(&messages, false)?;
        let at = before - 1;
        let Some(turn) =
            turns.get(at).filter(|turn| text.starts_with(&begin) && turn.end >= begin.len()).cloned()
        else {
            return Err(self.not_as_it_is());
        };
        let cut = begin.len().max(turn.start);
        turns.splice(at..=at, [turn.start..cut, cut..turn.end]);
        let mut encoding = self.encode_text(text, &turns)?;
        encoding.turns.drain(..=at);
        Ok(encoding)
    }

    /// The text of messages up to where the last one ends, and the assistant's turns in it; of a template whose turns cannot be
    /// told, none.
    fn render_prefill(&self, messages: &[Message]) -> Result<(String, Vec<Range<usize>>)> {
        let mut marked = messages.to_vec();
        let said = match marked.last_mut() {
            Some(last) => {
                last.content.push_str(TAG);
                last.content[..last.content.len() - TAG.len()].trim().to_string()
            }
            None => String::new(),
        };
        let rendered = self.template.render(&marked, false)?;
        let mut turns = match self.template.marks {
            true => rendered.marked,
            false => self.find_turns(&marked, &rendered.text).unwrap_or_default(),
        };
        let mut text = rendered.text;
        let Some(at) = text.rfind(TAG.trim_end()).filter(|_| text.contains(&said)) else {
            return Err(self.not_as_it_is());
        };
        let keeps_blanks = text[at..].starts_with(TAG);
        text.truncate(at);
        if !keeps_blanks {
            text.truncate(text.trim_end().len());
        }
        turns.retain(|turn| turn.start <= text.len());
        turns.iter_mut().for_each(|turn| turn.end = turn.end.min(text.len()));
        Ok((text, turns))
    }

    fn not_as_it_is(&self) -> Error {
        Error::data(format!(
            "{}: the last message is the assistant's and cannot be continued: the template does not write it as it is; end \
             with a message of the user, or choose another template",
            self.template.place
        ))
    }
}
