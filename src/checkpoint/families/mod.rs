//! The families by `config.json`: each has a file here, which says what its configuration and its tensors' names have
//! of their own. What they have in common is in [`super::hf_config`].

mod gemma2;
mod gemma3;
mod llama;
mod mistral;
mod mixtral;
mod olmo2;
mod phi3;
mod qwen;
mod qwen2;
mod qwen3;

use serde_json::{Map, Value};

use crate::checkpoint::gguf::form::GgufForm;
use crate::config::shape::{Family, Head, Shape};
use crate::error::{Error, Result};

/// What one family's folders have of their own.
#[derive(Debug)]
pub struct Description {
    /// `architectures`, of a model with an LM head, and `model_type` of `config.json`.
    pub architecture: &'static str,
    pub model_type: &'static str,
    /// Keys that `read` looks at.
    pub keys: &'static [&'static [&'static str]],
    /// Values of further keys that change the mathematics: what else they say is refused.
    pub only: &'static [(&'static str, Only)],
    /// Further keys that say nothing about the mathematics.
    pub harmless: &'static [&'static str],
    /// The shape that a `config.json` describes.
    pub read: fn(&Config) -> Result<Shape>,
    /// Adds the family's own keys to a `config.json` that has the common ones.
    pub write: fn(&Shape, &mut Map<String, Value>),
    /// Where a tensor of the model lies in the family's files, by the model's name of it: the name there, and the row
    /// that it begins with. Tensors that share a name lie one after the other, and are all that is in there.
    pub place: fn(&str, &Shape) -> (String, i64),
    /// Its GGUF files.
    pub gguf: &'static GgufForm,
}

impl Description {
    /// `architectures` of a model with this head; none where transformers has no such class.
    pub fn architecture(&self, head: Head) -> Option<String> {
        match head {
            Head::Lm => Some(self.architecture.to_string()),
            Head::Score => {
                Some(format!("{}ForSequenceClassification", self.architecture.strip_suffix("ForCausalLM")?))
            }
        }
    }
}

/// The one value that can be computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Only {
    Bool(bool),
    Number(f64),
    Null,
    /// Null, false, 0, or nothing in it.
    Off,
}

impl Only {
    /// Whether a key says this.
    pub fn is(self, value: &Value) -> bool {
        match self {
            Only::Bool(only) => value.as_bool() == Some(only),
            Only::Number(only) => value.as_f64() == Some(only),
            Only::Null => value.is_null(),
            Only::Off => match value {
                Value::Null | Value::Bool(false) => true,
                Value::Number(n) => n.as_f64() == Some(0.0),
                Value::Array(list) => list.is_empty(),
                Value::Object(object) => object.is_empty(),
                _ => false,
            },
        }
    }
}

impl std::fmt::Display for Only {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Only::Bool(only) => only.fmt(f),
            Only::Number(only) => write!(f, "{only:?}"),
            Only::Null | Only::Off => f.write_str("null"),
        }
    }
}

/// All that can be read.
pub static FAMILIES: [&Description; 10] = [
    &llama::LLAMA,
    &mistral::MISTRAL,
    &mixtral::MIXTRAL,
    &qwen::QWEN,
    &qwen2::QWEN2,
    &qwen3::QWEN3,
    &gemma2::GEMMA2,
    &gemma3::GEMMA3,
    &olmo2::OLMO2,
    &phi3::PHI3,
];

/// The family of a model, as which it is written.
pub fn of(family: Family) -> &'static Description {
    match family {
        Family::Llama => &llama::LLAMA,
        Family::Mistral => &mistral::MISTRAL,
        Family::Mixtral => &mixtral::MIXTRAL,
        Family::Qwen2 => &qwen2::QWEN2,
        Family::Qwen3 => &qwen3::QWEN3,
        Family::Gemma2 => &gemma2::GEMMA2,
        Family::Gemma3 => &gemma3::GEMMA3,
        Family::Olmo2 => &olmo2::OLMO2,
        Family::Phi3 => &phi3::PHI3,
    }
}

/// The family that a `config.json` names, and the head: by its one architecture, or where that is missing by
/// `model_type`.
pub fn named(config: &Map<String, Value>) -> Result<(&'static Description, Head)> {
    let known = || {
        let names = FAMILIES.map(|f| f.architecture).join(", ");
        format!(
            "{names}; and with a scalar head (one label) ...ForSequenceClassification in place of ...ForCausalLM"
        )
    };
    match config.get("architectures") {
        Some(Value::Array(list)) if list.len() == 1 => {
            let pairs = FAMILIES.iter().flat_map(|f| [(*f, Head::Lm), (*f, Head::Score)]);
            let mut named =
                pairs.filter(|(f, head)| f.architecture(*head).is_some_and(|name| list[0] == *name));
            named.next().ok_or_else(|| {
                Error::data(format!("architecture {} is not known; known are: {}", list[0], known()))
            })
        }
        None | Some(Value::Null) => {
            let model_type = config.get("model_type").unwrap_or(&Value::Null);
            let family = FAMILIES.iter().find(|f| *model_type == f.model_type).copied().ok_or_else(|| {
                Error::data(format!(
                    "architectures is missing, and model_type is {model_type}; known architectures are: {}",
                    known()
                ))
            })?;
            Ok((family, Head::Lm))
        }
        Some(other) => {
            Err(Error::data(format!("architectures is {other}; it must name one of: {}", known())))
        }
    }
}

/// Tensors under the names that the model has for them.
fn same_place(name: &str, _: &Shape) -> (String, i64) {
    (name.to_string(), 0)
}

/// A `config.json`, read key by key. Null counts as missing unless stated otherwise.
pub struct Config<'a>(pub &'a Map<String, Value>);

impl Config<'_> {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// Null, as opposed to missing.
    pub fn is_null(&self, key: &str) -> bool {
        self.0.get(key).is_some_and(Value::is_null)
    }

    pub fn integer(&self, key: &str) -> Result<i64> {
        self.some_integer(key)?.ok_or_else(|| Error::data(format!("{key} is missing")))
    }

    pub fn some_integer(&self, key: &str) -> Result<Option<i64>> {
        let integer =
            |v: &Value| v.as_i64().ok_or_else(|| Error::data(format!("{key} is {v}; it must be an integer")));
        self.get(key).map(integer).transpose()
    }

    pub fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            Some(v) => v.as_f64().ok_or_else(|| Error::data(format!("{key} is {v}; it must be a number"))),
            None => Ok(default),
        }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            Some(v) => {
                v.as_bool().ok_or_else(|| Error::data(format!("{key} is {v}; it must be true or false")))
            }
            None => Ok(default),
        }
    }
}

pub fn refused(key: &str, value: &Value, supported: &str) -> Error {
    Error::data(format!("{key} is {value}; that is not built: only {supported} can be computed"))
}
