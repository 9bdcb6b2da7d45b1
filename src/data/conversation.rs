//! Records of supervised fine-tuning and of preferences, in the formats that data sets come in, as conversations.

use std::ops::{Deref, DerefMut};

use serde_json::{Map, Value};

use super::fields::Fields;
pub use super::message::Message;
use super::message::{is_empty, shown, without_nulls};
use super::readers::Record;
use crate::error::{Error, Result};

/// What a record gives to the chat template besides messages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TemplateInputs {
    pub tools: Option<Value>,
    pub documents: Option<Value>,
    /// Further variables of the template, such as `enable_thinking`.
    pub kwargs: Map<String, Value>,
}

/// Variables of a template that no record may set.
const OURS: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

impl TemplateInputs {
    /// Reads `tools` (a list, or JSON text of one), `documents` (a list of objects) and `chat_template_kwargs` (an object, or
    /// JSON text of one).
    fn read(fields: &Fields) -> Result<TemplateInputs> {
        let parsed = |key: &'static str| match fields.get(key) {
            Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
            Some(Value::String(text)) => serde_json::from_str(text)
                .map(Some)
                .map_err(|e| fields.bad(format!("`{key}` is a text, but not JSON: {e}"))),
            other => Ok(other.map(without_nulls)),
        };
        let tools = match parsed("tools")? {
            Some(Value::Array(list)) => {
                let tools = list.into_iter().map(|tool| match &tool {
                    Value::String(text) => serde_json::from_str(text).unwrap_or(tool),
                    _ => tool,
                });
                let tools: Vec<Value> = tools.collect();
                if let Some(tool) = tools.iter().find(|tool| !tool.is_object()) {
                    return Err(fields.bad(format!("`tools`: {} is no object", shown(tool))));
                }
                Some(Value::Array(tools))
            }
            Some(other) => {
                return Err(fields.bad(format!("`tools` is {}, not a list of objects", shown(&other))));
            }
            None => None,
        };
        let objects = |v: &Value| v.as_array().is_some_and(|list| list.iter().all(Value::is_object));
        let documents = match fields.record.fields.get("documents") {
            Some(list) if objects(list) => fields.get("documents").map(without_nulls),
            _ => None,
        };
        let kwargs = match parsed("chat_template_kwargs")? {
            Some(Value::Object(kwargs)) => kwargs,
            Some(other) => {
                let what = format!("`chat_template_kwargs` is {}, not an object", shown(&other));
                return Err(fields.bad(what));
            }
            None => Map::new(),
        };
        match kwargs.keys().find(|key| OURS.contains(&key.as_str())) {
            Some(key) => Err(fields.bad(format!("`chat_template_kwargs` cannot set `{key}`"))),
            None => Ok(TemplateInputs { tools, documents, kwargs }),
        }
    }

    fn is_empty(&self) -> bool {
        self.tools.is_none() && self.documents.is_none() && self.kwargs.is_empty()
    }
}

/// Messages, and what else a template reads of their record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversation {
    pub messages: Vec<Message>,
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
    let (messages, completion) = formats(&fields)?;
    let conversation = with_columns(&fields, messages)?;
    Ok((Conversation { unused: fields.unused(), ..conversation }, completion))
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
    if key == "completion" && fields.record.fields.get("label") == Some(&Value::Bool(false)) {
        return Err(
            fields.bad("`label` is false: the completion is marked as a bad one, and cannot be learned")
        );
    }
    if key == "completion" && matches!(fields.record.fields.get("label"), Some(Value::Bool(_))) {
        fields.get("label");
    }
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

/// A prompt and completions of it, of which each may repeat the prompt, whole or its last turn, or begin with a system turn
/// that the prompt lacks: the common part, once, and what follows it. A completion begins with a turn of the assistant.
///
/// # Errors
/// With both: prompts that differ.
pub(super) fn split(
    fields: &Fields,
    prompt: Vec<Message>,
    completions: &[(&'static str, &Value)],
) -> Result<(Vec<Message>, Vec<Vec<Message>>)> {
    let mut prompts: Vec<Vec<Message>> = Vec::new();
    let mut answers = Vec::new();
    for (key, value) in completions {
        let said = turns(value, "assistant", fields, key)?;
        if !said.iter().any(|m| m.role == "assistant") {
            return Err(fields.bad(format!("`{key}`: an answer has no turn of the assistant")));
        }
        let (own, answer) = divided(&prompt, said).map_err(|theirs| {
            let shown = |turns: &[Message]| {
                let turns: Vec<String> = turns.iter().map(|m| format!("{}: {}", m.role, m.text())).collect();
                shown(&turns.join("; ").into())
            };
            let (ours, theirs) = (shown(&prompt), shown(&theirs));
            fields.bad(format!("the prompts differ: the record's is {ours}, that of `{key}` {theirs}"))
        })?;
        prompts.push(own);
        answers.push(answer);
    }
    let longest = prompts.iter().max_by_key(|p| p.len()).cloned().unwrap_or_default();
    for (own, answer) in prompts.iter().zip(&mut answers) {
        // What follows the prompt in all of them is told by the longest one; the others must say the same.
        if own.len() != longest.len() || !own.iter().zip(&longest).all(|(a, b)| a.says_the_same_as(b)) {
            let whole: Vec<Message> = own.iter().chain(answer.iter()).cloned().collect();
            let (_, rest) = divided(&longest, whole)
                .ok()
                .filter(|(own, _)| own.len() == longest.len())
                .ok_or_else(|| fields.bad("the prompts of the completions differ"))?;
            *answer = rest;
        }
    }
    common(fields, longest, answers)
}

/// Takes what all answers begin with into the prompt; at least one turn of each stays.
pub(super) fn common(
    fields: &Fields,
    mut prompt: Vec<Message>,
    mut answers: Vec<Vec<Message>>,
) -> Result<(Vec<Message>, Vec<Vec<Message>>)> {
    if answers.len() > 1 {
        let most = answers.iter().map(Vec::len).min().unwrap_or(1).saturating_sub(1);
        let same = |i: &usize| answers.iter().all(|a| a[*i].says_the_same_as(&answers[0][*i]));
        let n = (0..most).take_while(same).count();
        let mut shared = Vec::new();
        for answer in &mut answers {
            shared = answer.drain(..n).collect();
        }
        prompt.extend(shared);
    }
    for answer in &mut answers {
        // A tool's result may come first where the answers have it in common; a user's turn is a prompt that differs.
        if let Some(first) = answer.first().filter(|m| m.role != "assistant") {
            let (role, text) = (&first.role, shown(&first.text().into()));
            return Err(fields.bad(format!(
                "the prompts differ: a completion begins with a turn of role `{role}`, {text}, which not all have"
            )));
        }
    }
    Ok((prompt, answers))
}

/// Divides what is said into its prompt, which has to be `prompt`, and the answer.
///
/// # Errors
/// What is said before the answer, where that is another prompt.
fn divided(prompt: &[Message], said: Vec<Message>) -> Result<(Vec<Message>, Vec<Message>), Vec<Message>> {
    let bare = |turns: &[Message]| usize::from(turns.first().is_some_and(|m| m.role == "system"));
    let same = |a: &[Message], b: &[Message]| {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.says_the_same_as(b))
    };
    let (ours, theirs) = (&prompt[bare(prompt)..], &said[bare(&said)..]);
    let systems =
        (bare(prompt) > 0).then(|| &prompt[0]).into_iter().chain((bare(&said) > 0).then(|| &said[0]));
    let systems: Vec<&Message> = systems.collect();
    let system = systems.first().map(|m| (*m).clone());
    let agree = systems.iter().all(|m| m.says_the_same_as(systems[0]));
    let whole = |n: usize| {
        (system.iter().cloned().chain(theirs[..n].iter().cloned()).collect(), theirs[n..].to_vec())
    };
    let n = ours.len();
    if agree && n > 0 && theirs.len() > n && same(&theirs[..n], ours) {
        return Ok(whole(n));
    }
    let first = theirs.first().map(|m| m.role.as_str());
    if systems.len() == bare(prompt) && matches!(first, Some("assistant" | "tool" | "ipython" | "function")) {
        return Ok((prompt.to_vec(), said));
    }
    // The prompt may be the last turn before the answer.
    let last = theirs.iter().rposition(|m| m.role == "assistant").unwrap_or(0);
    let answers = |n: &usize| theirs[*n].role == "assistant";
    let ends = (n.max(1)..=last).rev().filter(answers).find(|end| same(&theirs[end - n..*end], ours));
    match ends.filter(|_| agree && n > 0) {
        Some(end) => Ok(whole(end)),
        None => {
            let first = said.iter().position(|m| m.role == "assistant").unwrap_or(said.len());
            Err(said[..first].to_vec())
        }
    }
}

/// What a model is asked: a record without its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    Text(String),
    /// Turns, of which the last is not the assistant's.
    Messages(Conversation),
}

impl Prompt {
    /// Reads `prompt` (a text or messages) or, where there is none, any format of [`conversation`], whose answer is
    /// left out.
    pub fn read(record: &Record) -> Result<Prompt> {
        Prompt::of(&Fields::new(record)?)
    }

    /// [`Prompt::read`] of a record whose keys are watched.
    pub fn of(fields: &Fields) -> Result<Prompt> {
        let listed = match fields.get("prompt") {
            Some(Value::Array(_)) => Some(messages(fields, "prompt")?),
            Some(_) => Some(vec![Message::new("user", fields.text("prompt")?)]),
            None => None,
        };
        let text = fields.get("prompt").is_some_and(Value::is_string)
            || ["instruction", "question"].into_iter().any(|key| fields.has(key));
        let messages = match listed {
            Some(messages) => messages,
            None => {
                let (mut messages, completion) = formats(fields)?;
                messages.extend(completion);
                messages
            }
        };
        let mut asked = with_columns(fields, messages)?;
        asked.pop_if(|m| m.role == "assistant");
        match asked.messages.as_slice() {
            [] => Err(fields.bad("there is nothing before the answer")),
            [message] if text && message.role == "user" && asked.inputs.is_empty() => {
                Ok(Prompt::Text(message.text().into_owned()))
            }
            _ => Ok(Prompt::Messages(asked)),
        }
    }

    /// [`Prompt::read`] of what a model is to go on with: a last turn of the assistant under `prompt`, `messages` or
    /// `conversations` stays, as the beginning of the answer.
    pub fn read_with_prefill(record: &Record) -> Result<Prompt> {
        let fields = Fields::new(record)?;
        let listed = |key: &&'static str| record.fields.get(*key).is_some_and(Value::is_array);
        let text = record.fields.get("prompt").is_some_and(|v| !v.is_null() && !v.is_array());
        match ["prompt", "messages", "conversations"].into_iter().find(listed).filter(|_| !text) {
            Some(key) => with_columns(&fields, messages(&fields, key)?).map(Prompt::Messages),
            None => Prompt::of(&fields),
        }
    }

    /// The turns; a text is one of the user's.
    pub fn into_messages(self) -> Conversation {
        match self {
            Prompt::Text(text) => vec![Message::new("user", text)].into(),
            Prompt::Messages(conversation) => conversation,
        }
    }
}

/// A text as one turn of `role` (a dialogue of HH as its turns), a message, or a list of messages.
fn turns(value: &Value, role: &str, fields: &Fields, key: &str) -> Result<Vec<Message>> {
    match value {
        Value::String(text) if text.starts_with(HUMAN) => hh_dialogue(text, fields.record),
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
        _ => hh_dialogue(fields.text(key)?, fields.record),
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

/// How a dialogue of HH begins.
const HUMAN: &str = "\n\nHuman:";

/// A dialogue of Anthropic's HH data: turns that begin with `\n\nHuman:` and `\n\nAssistant:`.
pub fn hh_dialogue(text: &str, record: &Record) -> Result<Vec<Message>> {
    const TURNS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];
    let mut messages: Vec<Message> = Vec::new();
    let mut rest = text;
    let next = |text: &str| TURNS.iter().filter_map(|t| Some((text.find(t.0)?, *t))).min();
    if next(rest).is_none_or(|(at, _)| at != 0) {
        return Err(Error::data(format!(
            "{}: a dialogue must begin with a turn such as `\\n\\nHuman:` (or give `prompt` as well)",
            record.place
        )));
    }
    while let Some((at, (mark, role))) = next(rest) {
        debug_assert_eq!(at, 0);
        let after = &rest[mark.len()..];
        let end = next(after).map_or(after.len(), |(at, _)| at);
        messages.push(Message::new(role, after[..end].trim()));
        rest = &after[end..];
    }
    Ok(messages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::readers::records;
    use crate::files::TestFolder;

    fn record(line: &str) -> Record {
        static FILES: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = FILES.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let folder = TestFolder::new(&format!("conversation-{number}"));
        let path = folder.0.join("data.jsonl");
        std::fs::write(&path, line).unwrap();
        records(&path, None, &std::sync::Arc::default()).unwrap().next().unwrap().unwrap()
    }

    fn read(line: &str) -> Result<Vec<Message>> {
        conversation(&record(line)).map(|conversation| conversation.messages)
    }

    fn pair(prompt: &str, completion: &str) -> Vec<Message> {
        chat(&[("user", prompt), ("assistant", completion)])
    }

    fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
        turns.iter().map(|(role, text)| Message::new(*role, *text)).collect()
    }

    #[test]
    fn every_format_is_known_by_its_keys() {
        let ab = chat(&[("user", "a"), ("assistant", "b")]);
        let cases = [
            (
                r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
                &ab,
            ),
            (r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#, &ab),
            (r#"{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}"#, &ab),
            (
                r#"{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}"#,
                &ab,
            ),
            (r#"{"prompt": "a", "completion": "b"}"#, &pair("a", "b")),
            (r#"{"prompt": "a", "completions": ["b", "c"], "num_correct": 1}"#, &pair("a", "b")),
            (r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#, &pair("a", "b")),
            (r#"{"question": "a", "answer": "b"}"#, &pair("a", "b")),
            (r#"{"instruction": "a", "input": "", "output": "b"}"#, &pair("a", "b")),
            (r#"{"instruction": "a", "input": "x", "output": "b"}"#, &pair("a\n\nx", "b")),
        ];
        for (line, wanted) in cases {
            assert_eq!(&read(&line.replace('\n', " ")).unwrap(), wanted, "{line}");
        }
        let parts = r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": null},
                        {"type": "text", "text": "b"}]}]}"#;
        let parts = read(&parts.replace('\n', " ")).unwrap();
        assert_eq!(parts[0].text(), "ab");
        let content = serde_json::json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        assert_eq!(parts[0].content, Some(content));
    }

    #[test]
    fn a_dialogue_of_many_turns() {
        let text = r#"{"chosen": "\n\nHuman: a\nb\n\nc\n\nAssistant: d\n\nHuman: e\n\nAssistant:"}"#;
        let turns = chat(&[("user", "a\nb\n\nc"), ("assistant", "d"), ("user", "e"), ("assistant", "")]);
        assert_eq!(read(text).unwrap(), turns);
    }

    #[test]
    fn a_prompt_is_a_record_without_its_answer() {
        let text = |t: &str| Prompt::Text(t.into());
        let user = Prompt::Messages(chat(&[("user", "a")]).into());
        let cases = [
            (r#"{"prompt": "a", "completion": "b"}"#, text("a")),
            (r#"{"question": "a", "answer": "b"}"#, text("a")),
            (r#"{"prompt": [{"role": "user", "content": "a"}]}"#, user.clone()),
            (r#"{"messages": [{"role": "user", "content": "a"}]}"#, user.clone()),
            (r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#, user),
        ];
        for (line, wanted) in cases {
            assert_eq!(Prompt::read(&record(line)).unwrap(), wanted, "{line}");
        }
        for (line, wanted) in [
            (r#"{"messages": [{"role": "assistant", "content": "a"}]}"#, "nothing before the answer"),
            (r#"{"prompt": 3}"#, "`prompt` is a number"),
            (r#"{"x": 3}"#, "no known format"),
        ] {
            let e = Prompt::read(&record(line)).unwrap_err();
            assert!(e.message.contains(wanted) && e.message.contains("data.jsonl:1"), "{line}: {e}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_told_with_its_place() {
        let cases = [
            (r#"{"a": 1}"#, "data.jsonl:1: no known format"),
            (r#"{"messages": []}"#, "`messages` is empty"),
            (r#"{"messages": "x"}"#, "no list of messages"),
            (r#"{"messages": [{"content": "x"}]}"#, "no `role`"),
            (r#"{"messages": [{"role": "user"}]}"#, "no text `content`"),
            (r#"{"messages": [{"role": "user", "content": [{"type": "image"}]}]}"#, "no text"),
            (r#"{"prompt": "a", "completion": 3}"#, "neither a text nor a list"),
            (r#"{"prompt": "a", "completions": []}"#, "no list with a completion"),
            (r#"{"question": "a", "answer": 3}"#, "`answer` is a number"),
            (r#"{"chosen": "Human: a"}"#, "must begin with a turn"),
            (r#"{"instruction": "a"}"#, "no key `output`"),
        ];
        for (line, wanted) in cases {
            let e = read(line).unwrap_err();
            assert!(e.message.contains(wanted) && e.message.contains("data.jsonl:1"), "{line}: {e}");
            assert_eq!(e.exit_code(), 3);
        }
    }
}
