//! A last turn of the assistant that is to be continued, cut where transformers' `continue_final_message` cuts it.

use std::ops::Range;

use super::{Chat, Dialogue, Encoding};
use crate::data::conversation::Message;
use crate::error::{Error, Result};

/// What transformers puts behind a message to find its end in the rendered text.
const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

impl Chat {
    /// The ids of messages that a model is to go on with: a last turn of the assistant is continued, to others it answers.
    ///
    /// # Errors
    /// As [`Chat::prompt`]; the template does not write the last turn as it is.
    pub fn prompt_or_prefill<'a>(&self, dialogue: impl Into<Dialogue<'a>>) -> Result<Vec<u32>> {
        let dialogue = dialogue.into();
        if dialogue.messages.last().is_none_or(|m| m.role != "assistant") {
            return self.prompt(dialogue);
        }
        let (text, turns) = self.render_prefill(dialogue)?;
        Ok(self.encode_text(text, &turns)?.ids)
    }

    /// A prompt and its completion as one conversation. Turns: those of the completion. Where the prompt's last turn and the
    /// completion's first one are the assistant's, they are one turn, of which the prompt is the beginning.
    ///
    /// # Errors
    /// As [`Chat::encode`]; the template does not write the prompt's last turn as it is.
    pub fn answer<'a>(&self, prompt: impl Into<Dialogue<'a>>, completion: &[Message]) -> Result<Encoding> {
        let prompt = prompt.into();
        let is_assistant = |m: Option<&Message>| m.is_some_and(|m| m.role == "assistant");
        let before = prompt.messages.iter().filter(|m| m.role == "assistant").count();
        let mut messages = prompt.messages.to_vec();
        if !(is_assistant(prompt.messages.last()) && is_assistant(completion.first())) {
            messages.extend_from_slice(completion);
            let encoding = self.encode(Dialogue { messages: &messages, ..prompt }, false)?;
            return Ok(encoding.after_turns(before));
        }
        let begin = self.render_prefill(prompt)?.0;
        if let (Some(last), Some(first)) = (messages.last_mut(), completion.first()) {
            last.push_text(&first.text());
            last.supervised = first.supervised;
        }
        messages.extend_from_slice(&completion[1..]);
        let dialogue = Dialogue { messages: &messages, ..prompt };
        let (text, mut turns) = self.render_turns(dialogue, false)?;
        let uncounted = self.uncounted(dialogue, turns.len())?;
        let at = before - 1;
        let Some(turn) =
            turns.get(at).filter(|turn| text.starts_with(&begin) && turn.end >= begin.len()).cloned()
        else {
            return Err(self.not_as_it_is());
        };
        let cut = begin.len().max(turn.start);
        turns.splice(at..=at, [turn.start..cut, cut..turn.end]);
        // The prompt's part of the turn is one turn more.
        let uncounted = uncounted.into_iter().filter(|i| *i >= at).map(|i| i + 1).collect();
        let encoding = Encoding { uncounted, ..self.encode_text(text, &turns)? };
        Ok(encoding.after_turns(at + 1))
    }

    /// The text of messages up to where the last one ends, and the assistant's turns in it; of a template whose turns cannot be
    /// told, none.
    fn render_prefill(&self, dialogue: Dialogue) -> Result<(String, Vec<Range<usize>>)> {
        let mut marked = dialogue.messages.to_vec();
        let said = match marked.last_mut() {
            Some(last) => {
                let said = last.text().trim().to_string();
                last.push_text(TAG);
                said
            }
            None => String::new(),
        };
        let dialogue = Dialogue { messages: &marked, ..dialogue };
        let rendered = self.rendered(dialogue, false)?;
        let mut turns = match self.template.marks {
            true => rendered.marked,
            false => self.find_turns(dialogue, &rendered.text).unwrap_or_default(),
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
            "{}: the last message is the assistant's and cannot be continued: the template does not write it unchanged; end \
             with a user message, or choose another template",
            self.template.place
        ))
    }
}
