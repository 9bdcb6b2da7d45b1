//! Records of supervised fine-tuning and of preferences, in the formats that data sets come in, as conversations.

mod completions;
mod hh;
mod inputs;
mod prompt;
#[cfg(test)]
mod tests;

use std::ops::{Deref, DerefMut};

use serde_json::Value;

use super::fields::Fields;
pub use super::message::Message;
use super::message::{is_empty, shown};
use super::readers::Record;
use crate::error::{Error, Result};
pub(super) use completions::{common, split};
pub use inputs::TemplateInputs;
pub use prompt::PromptForm;

/// Messages, and what else a template reads of their record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversation {
    /// In the order of the turns.
    pub messages: Vec<Message>,
    /// What the template is given besides messages.
    pub inputs: Box<TemplateInputs>,
    /// What is said of each key of the record that was not read; see [`super::fields::Unused`].
    pub unused: Vec<String>,
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Conversation {
        Conversation { messages, ..Conversation::default() }
    }
}

impl Deref for Conversation {
    type Target = Vec<Message>;

    fn deref(&self) -> &Vec<Message> {
        &self.messages
    }
}

impl DerefMut for Conversation {
    fn deref_mut(&mut self) -> &mut Vec<Message> {
        &mut self.messages
    }
}

/// The formats by their keys, for messages.
const FORMATS: &str = "`messages` or `conversations`; `instruction` and `output`; `prompt` and `completion` (or \
                       `completions`, best first); `question` and `answer`; `chosen` (with or without `prompt`)";

/// The conversation of a record of any known format, which its keys tell.
///
/// # Errors
/// With the record's place: none of the formats, texts that are no texts, roles that are missing, keys that are not
/// supported.
pub fn conversation(record: &Record) -> Result<Conversation> {
    let (mut conversation, completion) = prompt_and_completion(record)?;
    conversation.messages.extend(completion);
    Ok(conversation)
}

/// What a record asks, and its completion; without one where the format does not tell them apart.
///
/// # Errors
/// As [`conversation`].
pub fn prompt_and_completion(record: &Record) -> Result<(Conversation, Vec<Message>)> {
    let fields = Fields::new(record)?;
    if fields.has("completion") {
        match record.fields.get("label") {
            Some(Value::Bool(false)) => {
                return Err(fields.bad(
                    "`label` is false: the completion is marked as a bad one, and cannot be learned (corral kto can)",
                ));
            }
            Some(Value::Bool(true)) => fields.mark("label"),
            _ => {}
        }
    }
    let (messages, completion) = formats(&fields)?;
    let conversation = with_columns(&fields, messages)?;
    Ok((Conversation { unused: fields.unused(), ..conversation }, completion))
}

/// What a record asks, its completion, and whether that was found good (`label`). Of a conversation the assistant's last turn is
/// the completion.
///
/// # Errors
/// As [`conversation`]; no `label`, nothing before the completion.
pub fn labelled(record: &Record) -> Result<(Conversation, Vec<Message>, bool)> {
    let fields = Fields::new(record)?;
    let good = match fields.get("label") {
        Some(Value::Bool(good)) => *good,
        Some(Value::Number(n)) if n.as_u64().is_some_and(|n| n < 2) => n.as_u64() == Some(1),
        Some(other) => return Err(fields.bad(format!("`label` must be true or false, and is {other}"))),
        None => return Err(fields.bad("`label` is missing: true for a good completion, false for a bad one")),
    };
    let (mut messages, mut completion) = formats(&fields)?;
    if completion.is_empty() {
        completion.extend(messages.pop_if(|m| m.role == "assistant"));
    }
    if messages.is_empty() || !completion.iter().any(|m| m.role == "assistant") {
        return Err(fields.bad("there must be a prompt, and a completion of the assistant after it"));
    }
    let conversation = with_columns(&fields, messages)?;
    Ok((Conversation { unused: fields.unused(), ..conversation }, completion, good))
}

fn formats(fields: &Fields) -> Result<(Vec<Message>, Vec<Message>)> {
    let has = |key: &str| fields.has(key);
    if let Some(key) = ["messages", "conversations"].into_iter().find(|key| has(key)) {
        let turns = messages(fields, key)?;
        let answered = turns.last().is_some_and(|m| m.role == "assistant");
        return match has("chosen") && !answered {
            true => paired(fields, turns, "chosen"),
            false => Ok((turns, Vec::new())),
        };
    }
    let completion = ["completion", "completions", "chosen", "output", "answer"].into_iter().find(|key| {
        has(key)
            && match *key {
                "output" => has("instruction"),
                "answer" => has("question"),
                "chosen" => true,
                _ => has("prompt"),
            }
    });
    if has("instruction") && completion.is_none_or(|key| key != "chosen") {
        let prompt = instruction(fields)?;
        return Ok((prompt, vec![Message::new("assistant", fields.text("output")?)]));
    }
    match completion {
        Some("answer") => {
            let prompt = vec![Message::new("user", fields.text("question")?)];
            Ok((prompt, vec![Message::new("assistant", fields.text("answer")?)]))
        }
        Some(key) => match prompt(fields)? {
            Some(turns) => paired(fields, turns, key),
            None => Ok((dialogue(fields, key)?, Vec::new())),
        },
        None => {
            let keys: Vec<&str> = fields.record.fields.keys().map(String::as_str).collect();
            let keys = if keys.is_empty() { "none".into() } else { keys.join(", ") };
            Err(fields.bad(format!("no known format; known are {FORMATS}; keys here: {keys}")))
        }
    }
}

/// The prompt with the completion under `key`, of a list of them the first.
fn paired(fields: &Fields, prompt: Vec<Message>, key: &'static str) -> Result<(Vec<Message>, Vec<Message>)> {
    let value = fields.get(key).unwrap_or(&Value::Null);
    let best = match (key, value.as_array()) {
        ("completions", Some(list)) if !list.is_empty() => &list[0],
        ("completions", _) => return Err(fields.bad("`completions` is no list with a completion")),
        _ => value,
    };
    let (prompt, mut completions) = split(fields, prompt, &[(key, best)])?;
    Ok((prompt, completions.remove(0)))
}

/// The prompt of a record with completions: `prompt`, a conversation without its answer, an instruction or a question.
pub(super) fn prompt(fields: &Fields) -> Result<Option<Vec<Message>>> {
    if fields.has("prompt") {
        let value = fields.get("prompt").unwrap_or(&Value::Null);
        let mut prompt = turns(value, "user", fields, "prompt")?;
        // HH's prompts end with the beginning of the answer.
        prompt.pop_if(|m| m.role == "assistant" && m.text().is_empty() && value.is_string());
        return Ok(Some(prompt));
    }
    if let Some(key) = ["messages", "conversations"].into_iter().find(|key| fields.has(key)) {
        let listed = fields.record.fields[key].as_array().and_then(|list| list.last());
        let answered = listed.and_then(|m| Message::read(m).ok()).is_some_and(|m| m.role == "assistant");
        return if answered { Ok(None) } else { messages(fields, key).map(Some) };
    }
    if fields.has("instruction") {
        return instruction(fields).map(Some);
    }
    match fields.has("question") {
        true => Ok(Some(vec![Message::new("user", fields.text("question")?)])),
        false => Ok(None),
    }
}

/// Alpaca: the input, where there is one, follows the instruction.
fn instruction(fields: &Fields) -> Result<Vec<Message>> {
    let instruction = fields.text("instruction")?;
    let input = if fields.has("input") { fields.text("input")? } else { "" };
    let prompt = match input {
        "" => instruction.to_string(),
        input => format!("{instruction}\n\n{input}"),
    };
    Ok(vec![Message::new("user", prompt)])
}

/// The messages with the columns that stand beside any format: `system`, `history`, and what the template reads.
pub(super) fn with_columns(fields: &Fields, mut messages: Vec<Message>) -> Result<Conversation> {
    let earlier = history(fields)?;
    let first = usize::from(messages.first().is_some_and(|m| m.role == "system"));
    messages.splice(first..first, earlier);
    for key in ["system", "system_prompt"].into_iter().filter(|key| fields.has(key)) {
        let system = Message::new("system", fields.text(key)?);
        match messages.first().filter(|m| m.role == "system") {
            _ if system.text().is_empty() => {}
            Some(first) if first.says_the_same_as(&system) => {}
            Some(first) => {
                let (a, b) = (shown(&system.text().into()), shown(&first.text().into()));
                return Err(fields.bad(format!("`{key}` is {a}, and the first message is another one, {b}")));
            }
            None => messages.insert(0, system),
        }
    }
    let inputs = Box::new(TemplateInputs::read(fields)?);
    Ok(Conversation { messages, inputs, unused: Vec::new() })
}

/// `history`: earlier turns, as pairs of what the user and the assistant said, or as messages.
fn history(fields: &Fields) -> Result<Vec<Message>> {
    let Some(value) = fields.get("history") else { return Ok(Vec::new()) };
    let bad = |what: &Value| {
        let what = shown(what);
        fields.bad(format!("`history`: {what} is neither a pair of texts nor a message"))
    };
    let mut turns = Vec::new();
    for turn in value.as_array().ok_or_else(|| bad(value))? {
        match turn.as_array().map(Vec::as_slice) {
            Some([Value::String(user), Value::String(assistant)]) => {
                turns.extend([Message::new("user", user), Message::new("assistant", assistant)]);
            }
            Some(_) => return Err(bad(turn)),
            None if turn.is_object() => turns.push(message(turn, fields, "history")?),
            None => return Err(bad(turn)),
        }
    }
    Ok(turns)
}

/// A conversation's turns before its answer, and the answer: `prompt` and `completion`, or the last turn of another format.
///
/// # Errors
/// As [`conversation`]; nothing before the answer, or no answer of the assistant.
pub fn answered(record: &Record) -> Result<(Conversation, Vec<Message>)> {
    let (mut prompt, mut completion) = prompt_and_completion(record)?;
    if completion.is_empty() {
        let before = prompt.len().saturating_sub(1);
        completion = prompt.split_off(before);
    }
    let bad = |what: &str| Err(Error::data(format!("{}: {what}", record.place)));
    match completion.iter().any(|m| m.role == "assistant") {
        false => bad("the conversation does not end with an answer of the assistant"),
        true if prompt.is_empty() => bad("there is nothing before the answer"),
        true => Ok((prompt, completion)),
    }
}

/// A text as one turn of `role` (a dialogue of HH as its turns), a message, or a list of messages.
fn turns(value: &Value, role: &str, fields: &Fields, key: &str) -> Result<Vec<Message>> {
    match value {
        Value::String(text) if text.starts_with(hh::HUMAN) => Ok(hh::dialogue(text).unwrap_or_default()),
        Value::String(text) => Ok(vec![Message::new(role, text)]),
        Value::Array(list) => list.iter().map(|m| message(m, fields, key)).collect(),
        Value::Object(_) => Ok(vec![message(value, fields, key)?]),
        _ => Err(fields.bad(format!("`{key}` is neither a text nor a list of messages"))),
    }
}

/// A whole dialogue under `key`: messages, or a text of Anthropic's HH.
pub(super) fn dialogue(fields: &Fields, key: &'static str) -> Result<Vec<Message>> {
    match fields.get(key) {
        Some(Value::Array(_)) => messages(fields, key),
        Some(Value::Object(_)) => {
            Err(fields.bad(format!("`{key}` is one message: there is nothing before it")))
        }
        _ => hh::dialogue(fields.text(key)?).ok_or_else(|| {
            fields.bad("a dialogue must begin with a turn such as `\\n\\nHuman:` (or give `prompt` as well)")
        }),
    }
}

/// The messages under `key`; at least one.
fn messages(fields: &Fields, key: &'static str) -> Result<Vec<Message>> {
    let list = fields.get(key).and_then(Value::as_array);
    let list = list.ok_or_else(|| fields.bad(format!("`{key}` is no list of messages")))?;
    match list.iter().all(is_empty) {
        true => Err(fields.bad(format!("`{key}` is empty"))),
        false => list.iter().map(|m| message(m, fields, key)).collect(),
    }
}

fn message(value: &Value, fields: &Fields, key: &str) -> Result<Message> {
    Message::read(value).map_err(|what| fields.bad(format!("`{key}`: {what}")))
}
