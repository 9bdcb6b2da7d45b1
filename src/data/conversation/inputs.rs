//! What a record gives to the chat template besides messages.

use serde_json::{Map, Value};

use crate::data::fields::Fields;
use crate::data::message::{shown, without_nulls};
use crate::error::Result;

/// What a record gives to the chat template besides messages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TemplateInputs {
    /// The functions that the assistant may call, as JSON schemas.
    pub tools: Option<Value>,
    /// Texts for retrieval-augmented generation.
    pub documents: Option<Value>,
    /// Further variables of the template, such as `enable_thinking`.
    pub kwargs: Map<String, Value>,
}

/// Variables of a template that no record may set.
const OURS: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

impl TemplateInputs {
    /// Reads `tools` (a list, or JSON text of one), `documents` (a list of objects) and `chat_template_kwargs` (an object, or
    /// JSON text of one).
    pub(super) fn read(fields: &Fields) -> Result<TemplateInputs> {
        let parsed = |key: &'static str| match fields.get(key) {
            Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
            Some(Value::String(text)) => serde_json::from_str(text)
                .map(Some)
                .map_err(|e| fields.bad(format!("`{key}` is text, but not JSON: {e}"))),
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
                    return Err(fields.bad(format!("`tools`: {} is not an object", shown(tool))));
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

    /// The record's keys of what is there.
    pub fn keys(&self) -> impl Iterator<Item = &'static str> {
        let given = [
            ("tools", self.tools.is_some()),
            ("documents", self.documents.is_some()),
            ("chat_template_kwargs", !self.kwargs.is_empty()),
        ];
        given.into_iter().filter_map(|(key, there)| there.then_some(key))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keys().next().is_none()
    }
}
