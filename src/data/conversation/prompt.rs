//! What a model is asked: a record without its answer.

use serde_json::Value;

use super::{Conversation, Message, formats, hh, instruction, messages, turns, with_columns};
use crate::data::fields::Fields;
use crate::data::readers::Record;
use crate::error::Result;

/// What a response continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptForm {
    /// A text, which no chat template goes around.
    Text(String),
    /// A conversation, which the chat template renders.
    Messages(Conversation),
}

impl PromptForm {
    /// Reads `prompt` (a text or messages) or, where there is none, any format of [`super::conversation`], whose answer is left
    /// out. An instruction or a question needs none.
    pub fn read(record: &Record) -> Result<PromptForm> {
        PromptForm::of(&Fields::new(record)?, false)
    }

    /// [`PromptForm::read`] of what a model is to go on with: a last turn of the assistant under `prompt`, `messages` or
    /// `conversations` stays, as the beginning of the answer.
    pub fn read_with_prefill(record: &Record) -> Result<PromptForm> {
        PromptForm::of(&Fields::new(record)?, true)
    }

    /// Reads a record whose keys are watched; `prefill`: [`PromptForm::read_with_prefill`].
    pub fn of(fields: &Fields, prefill: bool) -> Result<PromptForm> {
        let listed = || ["messages", "conversations"].into_iter().find(|key| fields.has(key));
        let (mut said, text) = if fields.has("prompt") {
            match fields.get("prompt") {
                Some(Value::Array(_)) => (messages(fields, "prompt")?, None),
                Some(message @ Value::Object(_)) => (turns(message, "user", fields, "prompt")?, None),
                _ => {
                    let text = fields.text("prompt")?;
                    (hh::prompt_turns(text), Some(text.to_string()))
                }
            }
        } else if let Some(key) = listed() {
            (messages(fields, key)?, None)
        } else if fields.has("instruction") {
            let asked = instruction(fields)?;
            let text = asked[0].text().into_owned();
            (asked, Some(text))
        } else if fields.has("question") {
            let text = fields.text("question")?;
            (vec![Message::new("user", text)], Some(text.to_string()))
        } else {
            let (prompt, completion) = formats(fields)?;
            ([prompt, completion].concat(), None)
        };
        let kept = prefill && (fields.has("prompt") || listed().is_some());
        said.pop_if(|m| m.role == "assistant" && !kept);
        if said.is_empty() {
            return Err(fields.bad("there is nothing before the answer"));
        }
        let turns = said.len();
        let asked = with_columns(fields, said)?;
        match text.filter(|_| asked.len() == turns && asked.inputs.is_empty()) {
            Some(text) => Ok(PromptForm::Text(text)),
            None => Ok(PromptForm::Messages(asked)),
        }
    }

    /// The turns; a text is one of the user's, or a dialogue of HH's.
    pub fn into_messages(self) -> Conversation {
        match self {
            PromptForm::Text(text) => hh::prompt_turns(&text).into(),
            PromptForm::Messages(conversation) => conversation,
        }
    }

    /// [`PromptForm::into_messages`] without the answer that a dialogue of HH's may end with.
    pub fn without_answer(self) -> Conversation {
        let is_text = matches!(self, PromptForm::Text(_));
        let mut asked = self.into_messages();
        asked.pop_if(|m| is_text && m.role == "assistant");
        asked
    }
}
