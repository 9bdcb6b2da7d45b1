//! One turn of a conversation: its role, its content, and all else that a chat template may read.

use std::borrow::Cow;

use serde_json::{Map, Value};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// One of [`ROLES`], or what else a chat template knows.
    pub role: String,
    /// A text, or a list of text parts; none where the message has no content.
    pub content: Option<Value>,
    /// The other keys, in their order: `tool_calls`, `reasoning_content`, `name`, ...
    pub others: Map<String, Value>,
    /// Whether the loss counts the turn, if it is the assistant's.
    pub supervised: bool,
}

/// The roles, each with the names that formats have for it (in lower case). What the assistant and a tool say under
/// ShareGPT's `function_call` and `observation` are turns of theirs.
const ROLES: [(&str, &[&str]); 7] = [
    ("system", &["system"]),
    ("developer", &["developer"]),
    ("user", &["user", "human", "prompter"]),
    (
        "assistant",
        &["assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard", "ai", "function_call", "tool_call"],
    ),
    ("tool", &["tool", "observation", "tool_response", "function_response"]),
    ("ipython", &["ipython"]),
    ("function", &["function"]),
];

/// What takes the place of a role that a template does not name.
const IN_PLACE: [(&str, &str); 3] = [("developer", "system"), ("ipython", "tool"), ("function", "tool")];

/// The names that reasoning comes under. Templates read the first, and those of gpt-oss the second: a template is given both,
/// as by transformers.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Keys under which a turn without content says something all the same.
const SAYING: [&str; 5] = ["tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"];

/// Keys that would change what a message means, and that are not supported.
const REFUSED: [&str; 9] =
    ["image", "images", "image_url", "video", "videos", "audio", "audios", "file", "train_detail"];

/// Keys that say whether the loss counts a turn.
const SUPERVISION: [&str; 3] = ["weight", "train", "training"];

impl Message {
    /// A message of this role and text, which the loss counts.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        let content = Some(Value::String(content.into()));
        Message { role: role.into(), content, others: Map::new(), supervised: true }
    }

    /// Reads `{role, content}` or ShareGPT's `{from, value}`, or one of each. A null counts as absent, as transformers'
    /// `apply_chat_template` takes it.
    ///
    /// # Errors
    /// What is wrong, without its place.
    pub fn read(value: &Value) -> Result<Message, String> {
        let Value::Object(fields) = value else {
            return Err(format!("a message is {}, not an object with `role` and `content`", shown(value)));
        };
        let get = |key: &str| fields.get(key).filter(|v| !v.is_null());
        if let Some(key) = REFUSED.iter().find(|key| get(key).is_some_and(|v| !is_empty(v))) {
            return Err(format!("a message has `{key}`, which is not supported"));
        }
        let either = |a: &str, b: &str| match (get(a), get(b)) {
            (Some(x), Some(y)) if x != y => {
                Err(format!("a message has both `{a}` {} and `{b}` {}", shown(x), shown(y)))
            }
            (x, y) => Ok(x.or(y)),
        };
        let named = |a: &str, b: &str| match (get(a), get(b)) {
            (Some(Value::String(x)), Some(Value::String(y))) if canonical(x) == canonical(y) => Ok(get(a)),
            _ => either(a, b),
        };
        let role = match named("role", "from")? {
            Some(Value::String(role)) => canonical(role),
            Some(other) => return Err(format!("the role of a message is {}, not a text", shown(other))),
            None => return Err("a message has no `role` (or `from`)".into()),
        };
        let content = match either("content", "value")? {
            Some(text @ Value::String(_)) => Some(text.clone()),
            Some(Value::Array(parts)) => Some(parts.iter().map(text_part).collect::<Result<_, _>>()?),
            Some(other) => {
                return Err(format!("the `content` of a message is {}, not a text", shown(other)));
            }
            None => None,
        };
        if content.is_none() && !SAYING.iter().any(|key| get(key).is_some()) {
            return Err("a message has no text `content` (or `value`)".into());
        }
        let consumed = |key: &str| {
            ["role", "from", "content", "value"].contains(&key)
                || SUPERVISION.contains(&key)
                || REFUSED.contains(&key)
        };
        let others = fields.iter().filter(|(key, value)| !value.is_null() && !consumed(key));
        let others = others.map(|(key, value)| (key.clone(), without_nulls(value))).collect();
        let supervised = supervised(fields, &role)?;
        Ok(Message { role, content, others, supervised })
    }

    /// What the message says: its text, or its text parts one after the other.
    pub fn text(&self) -> Cow<'_, str> {
        match &self.content {
            Some(Value::String(text)) => text.as_str().into(),
            Some(Value::Array(parts)) => {
                parts.iter().filter_map(|part| part["text"].as_str()).collect::<String>().into()
            }
            _ => "".into(),
        }
    }

    /// The names under which a template may read a key of messages.
    pub fn names_of(key: &str) -> &[&str] {
        if REASONING.contains(&key) { &REASONING } else { &[] }
    }

    /// Adds to what the message says, which is then one text.
    pub fn push_text(&mut self, more: &str) {
        self.content = Some(format!("{}{more}", self.text()).into());
    }

    /// Whether two messages say the same; blanks at the end make no difference.
    pub fn says_the_same_as(&self, other: &Message) -> bool {
        self.role == other.role
            && self.text().trim_end() == other.text().trim_end()
            && self.others == other.others
    }

    /// What a template reads. `names_role`: whether the template names a role; `takes_parts`: whether it takes a content that
    /// is a list of parts, which is one text for others.
    ///
    /// # Errors
    /// A role that is not known, with the list.
    pub fn for_template(
        &self,
        names_role: impl Fn(&str) -> bool,
        takes_parts: bool,
    ) -> Result<Value, String> {
        let mut role = self.role.as_str();
        if !names_role(role) {
            if !ROLES.iter().any(|(known, _)| *known == role) {
                let known: Vec<&str> = ROLES.iter().flat_map(|(_, names)| names.iter().copied()).collect();
                return Err(format!(
                    "a message has the role `{role}`, which neither the chat template names nor any format; known are {}",
                    known.join(", ")
                ));
            }
            role = IN_PLACE.iter().find(|(own, _)| *own == role).map_or(role, |(_, place)| place);
        }
        let mut message = Map::new();
        let reasoning = REASONING.iter().find_map(|key| self.others.get(*key));
        if let Some(reasoning) = reasoning {
            message.insert("thinking".into(), reasoning.clone());
        }
        message.insert("role".into(), role.into());
        match &self.content {
            Some(Value::Array(_)) if !takes_parts => message.insert("content".into(), self.text().into()),
            Some(content) => message.insert("content".into(), content.clone()),
            None => None,
        };
        message.extend(self.others.clone());
        if let Some(reasoning) = reasoning {
            message.insert("reasoning_content".into(), reasoning.clone());
        }
        Ok(Value::Object(message))
    }
}

/// The role that a name stands for; a name that none has is a role by itself.
fn canonical(name: &str) -> String {
    let lower = name.trim().to_lowercase();
    let role = ROLES.iter().find(|(_, names)| names.contains(&lower.as_str()));
    role.map_or_else(|| name.trim().to_string(), |(role, _)| role.to_string())
}

/// Whether the loss is to count a turn: OpenAI's `weight` 0 or 1, `train` or `training`.
fn supervised(fields: &Map<String, Value>, role: &str) -> Result<bool, String> {
    let mut supervised = true;
    for key in SUPERVISION {
        let Some(value) = fields.get(key).filter(|v| !v.is_null()) else { continue };
        let yes = match value {
            Value::Bool(yes) => *yes,
            Value::Number(n) if n.as_f64() == Some(0.0) => false,
            Value::Number(n) if n.as_f64() == Some(1.0) => true,
            _ => {
                return Err(format!(
                    "a message has `{key}` {}; a turn is counted in the loss (1 or true) or not (0 or false)",
                    shown(value)
                ));
            }
        };
        if yes && key != "weight" && role != "assistant" {
            return Err(format!(
                "a message of role `{role}` has `{key}` true; only assistant turns can be selected (data.train_on_prompt \
                 includes all others)"
            ));
        }
        supervised &= yes;
    }
    Ok(supervised)
}

/// A part of a content: a text.
fn text_part(part: &Value) -> Result<Value, String> {
    let kind = part.get("type").and_then(Value::as_str);
    match kind {
        Some("text") if part.get("text").is_some_and(Value::is_string) => Ok(without_nulls(part)),
        _ => Err(format!(
            "a message has a part that is not text ({}): only text can be trained on",
            kind.map_or_else(|| shown(part), |kind| format!("type `{kind}`"))
        )),
    }
}

/// Without the keys whose value is null, at any depth: merged columns give all objects the same keys.
pub(super) fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(_, v)| !v.is_null());
            Value::Object(kept.map(|(key, v)| (key.clone(), without_nulls(v))).collect())
        }
        Value::Array(list) => list.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

/// Whether a value gives nothing.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.iter().all(is_empty),
        Value::Object(fields) => fields.values().all(is_empty),
        _ => false,
    }
}

/// A value for a message, cut where it is long.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}
