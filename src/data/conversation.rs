//! Records of supervised fine-tuning and of preferences, in the formats that data sets come in, as conversations.

use serde_json::Value;

use super::readers::Record;
use crate::error::{Error, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else a chat template knows.
    pub role: String,
    pub content: String,
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// The formats by their keys, for messages.
const FORMATS: &str = "`messages` or `conversations`; `instruction` and `output`; `prompt` and `completion` (or \
                       `completions`, best first); `question` and `answer`; `chosen` (with or without `prompt`)";

/// The conversation of a record of any known format, which its keys tell.
///
/// # Errors
/// With the record's place: none of the formats, texts that are no texts, roles that are missing.
pub fn conversation(record: &Record) -> Result<Vec<Message>> {
    let has = |key: &str| record.fields.get(key).is_some_and(|v| !v.is_null());
    if let Some(key) = ["messages", "conversations"].into_iter().find(|key| has(key)) {
        return messages(record, key);
    }
    if has("instruction") {
        // Alpaca: the input, where there is one, follows the instruction.
        let mut prompt = record.text("instruction")?.to_string();
        if has("input") && !record.text("input")?.is_empty() {
            prompt = format!("{prompt}\n\n{}", record.text("input")?);
        }
        return Ok(exchange(prompt, record.text("output")?));
    }
    if has("prompt") && has("completion") {
        return Ok(joined(pair(record, "prompt", &record.fields["completion"], "completion")?));
    }
    if has("prompt") && has("completions") {
        let best = record.fields["completions"].as_array().and_then(|list| list.first());
        let best = best.ok_or_else(|| {
            Error::data(format!("{}: `completions` is no list with a completion", record.place))
        })?;
        return Ok(joined(pair(record, "prompt", best, "completions")?));
    }
    if has("question") && has("answer") {
        return Ok(exchange(record.text("question")?, record.text("answer")?));
    }
    if has("chosen") {
        if has("prompt") {
            return Ok(joined(pair(record, "prompt", &record.fields["chosen"], "chosen")?));
        }
        return match &record.fields["chosen"] {
            Value::Array(_) => messages(record, "chosen"),
            _ => hh_dialogue(record.text("chosen")?, record),
        };
    }
    let keys: Vec<&str> = record.fields.keys().map(String::as_str).collect();
    Err(Error::data(format!(
        "{}: no known format; known are {FORMATS}; keys here: {}",
        record.place,
        if keys.is_empty() { "none".into() } else { keys.join(", ") }
    )))
}

/// The turns of a record's `prompt` and of its `completion`, where it has both.
pub fn prompt_and_completion(record: &Record) -> Result<Option<(Vec<Message>, Vec<Message>)>> {
    let has = |key: &str| record.fields.get(key).is_some_and(|v| !v.is_null());
    match has("prompt") && has("completion") && !has("messages") && !has("conversations") {
        true => pair(record, "prompt", &record.fields["completion"], "completion").map(Some),
        false => Ok(None),
    }
}

/// A conversation's turns before its answer, and the answer: `prompt` and `completion`, or the last turn of another format.
///
/// # Errors
/// As [`conversation`]; nothing before the answer, or no answer of the assistant.
pub fn answered(record: &Record) -> Result<(Vec<Message>, Vec<Message>)> {
    let has = |key: &str| record.fields.get(key).is_some_and(|v| !v.is_null());
    let (prompt, completion) = if has("prompt") && has("completion") {
        pair(record, "prompt", &record.fields["completion"], "completion")?
    } else {
        let mut messages = conversation(record)?;
        let answer = messages.split_off(messages.len().saturating_sub(1));
        (messages, answer)
    };
    let bad = |what: &str| Err(Error::data(format!("{}: {what}", record.place)));
    match completion.iter().any(|m| m.role == "assistant") {
        false => bad("the conversation does not end with an answer of the assistant"),
        true if prompt.is_empty() => bad("there is nothing before the answer"),
        true => Ok((prompt, completion)),
    }
}

/// A prompt and its completion, each a text or a list of messages. Messages may begin with the prompt once more.
pub(super) fn pair(
    record: &Record,
    prompt: &str,
    completion: &Value,
    key: &str,
) -> Result<(Vec<Message>, Vec<Message>)> {
    let prompt = turns(&record.fields[prompt], "user", record, prompt)?;
    let mut completion = turns(completion, "assistant", record, key)?;
    if completion.starts_with(&prompt) {
        completion.drain(..prompt.len());
    }
    Ok((prompt, completion))
}

fn joined((mut prompt, completion): (Vec<Message>, Vec<Message>)) -> Vec<Message> {
    prompt.extend(completion);
    prompt
}

fn exchange(prompt: impl Into<String>, completion: impl Into<String>) -> Vec<Message> {
    vec![Message::new("user", prompt), Message::new("assistant", completion)]
}

/// What a model is asked: a record without its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    Text(String),
    /// Turns, of which the last is not the assistant's.
    Messages(Vec<Message>),
}

impl Prompt {
    /// Reads `prompt` (a text or messages) or, where there is none, any format of [`conversation`], whose answer is
    /// left out.
    pub fn read(record: &Record) -> Result<Prompt> {
        let has = |key: &str| record.fields.get(key).is_some_and(|v| !v.is_null());
        let mut messages = match record.fields.get("prompt").filter(|v| !v.is_null()) {
            Some(Value::String(text)) => return Ok(Prompt::Text(text.clone())),
            Some(Value::Array(_)) => messages(record, "prompt")?,
            Some(_) => return record.text("prompt").map(|text| Prompt::Text(text.into())),
            None => conversation(record)?,
        };
        if messages.last().is_some_and(|m| m.role == "assistant") {
            messages.pop();
        }
        if let [Message { content, .. }] = messages.as_slice()
            && ["instruction", "question"].into_iter().any(has)
        {
            return Ok(Prompt::Text(content.clone()));
        }
        if messages.is_empty() {
            return Err(Error::data(format!("{}: there is nothing before the answer", record.place)));
        }
        Ok(Prompt::Messages(messages))
    }

    /// [`Prompt::read`] of what a model is to go on with: a last turn of the assistant under `prompt`, `messages` or
    /// `conversations` stays, as the beginning of the answer.
    pub fn read_with_prefill(record: &Record) -> Result<Prompt> {
        let list = |key: &&&str| record.fields.get(**key).is_some_and(Value::is_array);
        let text = record.fields.get("prompt").is_some_and(|v| !v.is_null() && !v.is_array());
        match ["prompt", "messages", "conversations"].iter().find(list).filter(|_| !text) {
            Some(key) => messages(record, key).map(Prompt::Messages),
            None => Prompt::read(record),
        }
    }

    /// The turns; a text is one of the user's.
    pub fn into_messages(self) -> Vec<Message> {
        match self {
            Prompt::Text(text) => vec![Message::new("user", text)],
            Prompt::Messages(messages) => messages,
        }
    }
}

/// A text as one turn of `role`, or a list of messages.
fn turns(value: &Value, role: &str, record: &Record, key: &str) -> Result<Vec<Message>> {
    match value {
        Value::String(text) => Ok(vec![Message::new(role, text)]),
        Value::Array(list) => list.iter().map(|m| message(m, record, key)).collect(),
        _ => Err(Error::data(format!("{}: `{key}` is neither a text nor a list of messages", record.place))),
    }
}

/// The messages under `key`; at least one.
pub(super) fn messages(record: &Record, key: &str) -> Result<Vec<Message>> {
    let list = record.fields[key].as_array();
    let list =
        list.ok_or_else(|| Error::data(format!("{}: `{key}` is no list of messages", record.place)))?;
    if list.is_empty() {
        return Err(Error::data(format!("{}: `{key}` is empty", record.place)));
    }
    list.iter().map(|m| message(m, record, key)).collect()
}

/// `{role, content}`, or ShareGPT's `{from, value}` with its names of roles. A content may be a list of text parts.
fn message(value: &Value, record: &Record, key: &str) -> Result<Message> {
    let bad = |what: &str| Error::data(format!("{}: `{key}`: {what}", record.place));
    let role = value.get("role").or(value.get("from")).and_then(Value::as_str);
    let role = role.ok_or_else(|| bad("a message has no `role` (or `from`)"))?;
    let role = match (value.get("role"), role) {
        (None, "human") => "user",
        (None, "gpt" | "bot" | "chatgpt") => "assistant",
        _ => role,
    };
    let content = match value.get("content").or(value.get("value")) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| match part.get("type").and_then(Value::as_str) {
                Some("text") => part.get("text").and_then(Value::as_str).map(str::to_string),
                _ => None,
            };
            let texts: Option<String> = parts.iter().map(text).collect();
            texts.ok_or_else(|| bad("a message has a part that is no text: only texts can be trained on"))?
        }
        _ => return Err(bad("a message has no text `content` (or `value`)")),
    };
    Ok(Message::new(role, content))
}

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
        conversation(&record(line))
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
            (
                r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                    {"role": "assistant", "content": "b"}]}"#,
                &ab,
            ),
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
        let user = Prompt::Messages(chat(&[("user", "a")]));
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
