//! What a chat template is given, as transformers' `apply_chat_template` gives it, and what of it a template reads.

use std::collections::BTreeSet;

use regex::Regex;
use serde_json::{Map, Value, json};

use super::jinja::Jinja;
use crate::data::conversation::{Conversation, Message, TemplateInputs};
use crate::error::{Error, Result};

/// Messages, and what else the template is given.
#[derive(Debug, Clone, Copy)]
pub struct Dialogue<'a> {
    /// In the order of the turns.
    pub messages: &'a [Message],
    /// None: tools and documents are none.
    pub inputs: Option<&'a TemplateInputs>,
}

impl<'a> From<&'a [Message]> for Dialogue<'a> {
    fn from(messages: &'a [Message]) -> Dialogue<'a> {
        Dialogue { messages, inputs: None }
    }
}

impl<'a> From<&'a Vec<Message>> for Dialogue<'a> {
    fn from(messages: &'a Vec<Message>) -> Dialogue<'a> {
        messages.as_slice().into()
    }
}

impl<'a, const N: usize> From<&'a [Message; N]> for Dialogue<'a> {
    fn from(messages: &'a [Message; N]) -> Dialogue<'a> {
        messages.as_slice().into()
    }
}

impl<'a> From<&'a Conversation> for Dialogue<'a> {
    fn from(conversation: &'a Conversation) -> Dialogue<'a> {
        Dialogue { messages: &conversation.messages, inputs: Some(&conversation.inputs) }
    }
}

impl<'a> Dialogue<'a> {
    /// The first `n` messages with the same inputs.
    pub fn first(self, n: usize) -> Dialogue<'a> {
        Dialogue { messages: &self.messages[..n], ..self }
    }

    /// The template's variables.
    ///
    /// # Errors
    /// A role that is not known.
    pub(super) fn variables(self, reads: &Reads) -> Result<Map<String, Value>> {
        let message = |m: &Message| m.for_template(|role| reads.names_role(role), reads.parts);
        let messages = self.messages.iter().map(message).collect::<Result<Value, String>>();
        let mut variables = Map::new();
        variables.insert("messages".into(), messages.map_err(Error::data)?);
        let given = |value: Option<&Value>| value.cloned().unwrap_or_default();
        variables.insert("tools".into(), given(self.inputs.and_then(|i| i.tools.as_ref())));
        variables.insert("documents".into(), given(self.inputs.and_then(|i| i.documents.as_ref())));
        variables.extend(self.inputs.iter().flat_map(|i| i.kwargs.clone()));
        Ok(variables)
    }
}

/// What a template reads of a message.
pub(super) struct Reads {
    source: String,
    /// The roles that it compares with.
    roles: BTreeSet<String>,
    /// Whether it takes a content that is a list of parts.
    pub parts: bool,
    /// Whether it writes keys that it does not name, such as those of a whole message as JSON.
    all: bool,
}

impl Reads {
    pub fn of(source: &str, template: &Jinja) -> Reads {
        const PROBE: &str = "corral probe";
        let rendered = |message: Value| {
            let variables = json!({"messages": [message], "tools": null, "documents": null});
            let Value::Object(variables) = variables else { return None };
            template.render(variables, false).ok().map(|rendered| rendered.text)
        };
        let parts = rendered(json!({"role": "user", "content": [{"type": "text", "text": PROBE}]}))
            .is_some_and(|text| {
                text.contains(PROBE) && !["'text'", "\"text\""].iter().any(|key| text.contains(key))
            });
        let all = rendered(json!({"role": "user", "content": "a", "corral_probe": PROBE}))
            .is_some_and(|text| text.contains(PROBE));
        Reads { source: source.into(), roles: roles(source), parts, all }
    }

    pub fn names_role(&self, role: &str) -> bool {
        self.roles.contains(role)
    }

    /// Whether it may read a key.
    fn names(&self, key: &str) -> bool {
        self.all
            || self.source.contains(key)
            || Message::names_of(key).iter().any(|key| self.source.contains(key))
    }
}

/// The roles that a template compares a message's role with.
fn roles(source: &str) -> BTreeSet<String> {
    let mut roles = BTreeSet::new();
    let Ok(compared) =
        Regex::new(r#"role\b['"\])]*\s*(?:==|!=|in\b|not\s+in\b)\s*([\[(][^\])]*[\])]|['"][^'"]*['"])"#)
    else {
        return roles;
    };
    let Ok(quoted) = Regex::new(r#"['"]([^'"]+)['"]"#) else { return roles };
    for with in compared.captures_iter(source) {
        roles.extend(quoted.captures_iter(&with[1]).map(|name| name[1].to_string()));
    }
    roles
}

/// What is said of each key of messages, and of each other input, without which the template writes the same.
pub(super) fn unwritten(
    conversation: &Conversation,
    reads: &Reads,
    rendered: impl Fn(Dialogue) -> [Option<String>; 2],
) -> Vec<String> {
    let keys: BTreeSet<&String> = conversation.messages.iter().flat_map(|m| m.others.keys()).collect();
    let TemplateInputs { tools, documents, kwargs } = &*conversation.inputs;
    if keys.is_empty() && tools.is_none() && documents.is_none() && kwargs.is_empty() {
        return Vec::new();
    }
    let written = rendered(conversation.into());
    let same = |key: &str, without: &dyn Fn(&mut Conversation)| {
        !reads.names(key) || {
            let mut other = conversation.clone();
            without(&mut other);
            rendered((&other).into()) == written
        }
    };
    let mut unwritten = Vec::new();
    for key in keys {
        let without = |c: &mut Conversation| {
            c.messages.iter_mut().for_each(|m| {
                m.others.shift_remove(key);
            });
        };
        if same(key, &without) {
            unwritten.push(format!("messages with the key '{key}', which the chat template does not write"));
        }
    }
    let empty = |v: &Option<Value>| v.as_ref().is_none_or(|v| v.as_array().is_some_and(Vec::is_empty));
    let says = |key: &str| format!("the key '{key}', which the chat template does not write");
    if !empty(tools) && same("tools", &|c| c.inputs.tools = None) {
        unwritten.push(says("tools"));
    }
    if !empty(documents) && same("documents", &|c| c.inputs.documents = None) {
        unwritten.push(says("documents"));
    }
    for key in kwargs.keys() {
        let without = |c: &mut Conversation| {
            c.inputs.kwargs.shift_remove(key);
        };
        if same(key, &without) {
            unwritten.push(says(&format!("chat_template_kwargs.{key}")));
        }
    }
    unwritten
}
