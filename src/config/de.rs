//! From a tree of YAML to types, with errors that name the place, the key, and the nearest key that is known.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, Expected, IntoDeserializer, Unexpected, Visitor};

use super::yaml::{Entry, Node, Place, Value};
use crate::error::Error;

/// What is wrong, and where once that is known: the innermost value or key that was being read.
#[derive(Debug)]
pub struct DeError {
    what: What,
    at: Option<(Place, String)>,
}

#[derive(Debug)]
enum What {
    Message(String),
    UnknownKey { key: String, known: &'static [&'static str] },
    UnknownChoice { choice: String, known: &'static [&'static str] },
    MissingKey(&'static str),
}

impl DeError {
    fn message(message: String) -> Self {
        DeError { what: What::Message(message), at: None }
    }

    /// The place and the dotted key, unless something inside has told a more exact one.
    fn at(mut self, place: &Place, path: &str) -> Self {
        self.at.get_or_insert_with(|| (place.clone(), path.to_string()));
        self
    }
}

impl From<DeError> for Error {
    fn from(e: DeError) -> Error {
        Error::config(e.to_string())
    }
}

impl fmt::Display for DeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = match &self.at {
            Some((place, path)) => {
                write!(f, "{place}: ")?;
                path.as_str()
            }
            None => "",
        };
        match &self.what {
            What::Message(message) if path.is_empty() => f.write_str(message),
            What::Message(message) => write!(f, "'{path}': {message}"),
            What::MissingKey(key) => write!(f, "the key '{}' is missing", join(path, key)),
            What::UnknownKey { key, known } => {
                write!(f, "unknown key '{}'; ", join(path, key))?;
                suggest(f, key, known)?;
                write!(f, "(known here: {})", known.join(", "))
            }
            What::UnknownChoice { choice, known } => {
                write!(f, "'{path}': unknown value '{choice}'; ")?;
                suggest(f, choice, known)?;
                write!(f, "(known: {})", known.join(", "))
            }
        }
    }
}

fn suggest(f: &mut fmt::Formatter<'_>, given: &str, known: &[&str]) -> fmt::Result {
    match nearest(given, known) {
        Some(near) => write!(f, "did you mean '{near}'? "),
        None => Ok(()),
    }
}

/// The known word with the smallest edit distance, where that is small enough to be a slip of the fingers.
fn nearest<'a>(given: &str, known: &[&'a str]) -> Option<&'a str> {
    let distance = |word: &&str| strsim::osa_distance(&given.to_lowercase(), word);
    let best = known.iter().min_by_key(|word| distance(word))?;
    let close = distance(best) <= (given.chars().count() / 3).max(1);
    (close || best.starts_with(given) || given.starts_with(best)).then_some(*best)
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_string() } else { format!("{path}.{key}") }
}

impl std::error::Error for DeError {}

impl de::Error for DeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        DeError::message(message.to_string())
    }

    fn invalid_type(found: Unexpected, expected: &dyn Expected) -> Self {
        DeError::message(format!("expected {expected}, found {found}"))
    }

    fn invalid_length(len: usize, expected: &dyn Expected) -> Self {
        DeError::message(format!("expected {expected}, found {len} entries"))
    }

    fn unknown_field(key: &str, known: &'static [&'static str]) -> Self {
        DeError { what: What::UnknownKey { key: key.to_string(), known }, at: None }
    }

    fn unknown_variant(choice: &str, known: &'static [&'static str]) -> Self {
        DeError { what: What::UnknownChoice { choice: choice.to_string(), known }, at: None }
    }

    fn missing_field(key: &'static str) -> Self {
        DeError { what: What::MissingKey(key), at: None }
    }
}

/// Reads a node and what is below it. `path` is its dotted key.
#[derive(Clone)]
pub struct NodeDeserializer<'a> {
    node: &'a Node,
    path: String,
}

impl<'a> NodeDeserializer<'a> {
    pub fn new(root: &'a Node) -> Self {
        NodeDeserializer { node: root, path: String::new() }
    }

    fn expected<T>(&self, what: &str) -> Result<T, DeError> {
        Err(DeError::message(format!("expected {what}, found {}", self.node.describe())))
    }

    fn place<T>(&self, result: Result<T, DeError>) -> Result<T, DeError> {
        result.map_err(|e| e.at(&self.node.place, &self.path))
    }

    fn integer(&self) -> Result<i128, DeError> {
        match self.node.value {
            Value::Int(n) => Ok(n),
            _ => self.expected("a whole number"),
        }
    }

    fn text(&self) -> Result<&'a str, DeError> {
        match &self.node.value {
            Value::Text(text) => Ok(text),
            Value::Bool(_) | Value::Int(_) | Value::Float(_) => Ok(&self.node.spelling),
            Value::List(items) => {
                let [Node { value: Value::Text(text), .. }] = items.as_slice() else {
                    return self.expected("text");
                };
                Err(DeError::message(format!(
                    "expected text, found a list: in YAML [{text}] is a list with {text} in it; write \"[{text}]\" in quotes"
                )))
            }
            _ => self.expected("text"),
        }
    }

    fn list<V: Visitor<'a>>(&self, items: &'a [Node], visitor: V) -> Result<V::Value, DeError> {
        let mut rest = Items { items, next: 0, path: &self.path };
        let value = visitor.visit_seq(&mut rest)?;
        match rest.next == items.len() {
            true => Ok(value),
            false => Err(DeError::message(format!("expected {} entries, found {}", rest.next, items.len()))),
        }
    }

    fn section<V: Visitor<'a>>(&self, entries: &'a [Entry], visitor: V) -> Result<V::Value, DeError> {
        visitor.visit_map(Entries { entries, next: 0, path: &self.path })
    }
}

macro_rules! integers {
    ($($method:ident, $visit:ident, $type:ty;)*) => {$(
        fn $method<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, DeError> {
            let result = self.integer().and_then(|n| match <$type>::try_from(n) {
                Ok(n) => visitor.$visit(n),
                Err(_) => Err(DeError::message(format!(
                    "expected a whole number of {} to {}, found {n}", <$type>::MIN, <$type>::MAX
                ))),
            });
            self.place(result)
        }
    )*};
}

impl<'a> Deserializer<'a> for NodeDeserializer<'a> {
    type Error = DeError;

    fn deserialize_any<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, DeError> {
        let result = match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(b) => visitor.visit_bool(*b),
            Value::Int(n) => match i64::try_from(*n) {
                Ok(n) => visitor.visit_i64(n),
                Err(_) => visitor.visit_i128(*n),
            },
            Value::Float(x) => visitor.visit_f64(*x),
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::List(items) => self.list(items, visitor),
            Value::Section(entries) => self.section(entries, visitor),
        };
        self.place(result)
    }

    fn deserialize_bool<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, DeError> {
        let result = match self.node.value {
            Value::Bool(b) => visitor.visit_bool(b),
            _ => self.expected("true or false"),
        };
        self.place(result)
    }

    integers! {
        deserialize_i32, visit_i32, i32;
        deserialize_i64, visit_i64, i64;
        deserialize_u32, visit_u32, u32;
        deserialize_u64, visit_u64, u64;
    }

    fn deserialize_f64<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, DeError> {
        let result = match self.node.value {
            Value::Int(n) => visitor.visit_f64(n as f64),
            Value::Float(x) if x.is_finite() => visitor.visit_f64(x),
            Value::Float(_) => self.expected("a finite number"),
            _ => self.expected("a number"),
        };
        self.place(result)
    }

    fn deserialize_str<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.place(self.text().and_then(|text| visitor.visit_borrowed_str(text)))
    }

    fn deserialize_string<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, DeError> {
        match self.node.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_seq<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, DeError> {
        let result = match &self.node.value {
            Value::List(items) => self.list(items, visitor),
            _ => self.expected("a list"),
        };
        self.place(result)
    }

    fn deserialize_tuple<V: Visitor<'a>>(self, len: usize, visitor: V) -> Result<V::Value, DeError> {
        let result = match &self.node.value {
            Value::List(items) if items.len() == len => self.list(items, visitor),
            Value::List(items) => {
                Err(DeError::message(format!("expected a list of {len}, found one of {}", items.len())))
            }
            _ => self.expected(&format!("a list of {len}")),
        };
        self.place(result)
    }

    /// A section whose keys are all left out (`optim:` and nothing below) is an empty one.
    fn deserialize_map<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, DeError> {
        let result = match &self.node.value {
            Value::Section(entries) => self.section(entries, visitor),
            Value::Null => self.section(&[], visitor),
            _ => self.expected("a section of keys"),
        };
        self.place(result)
    }

    fn deserialize_struct<V: Visitor<'a>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        self.deserialize_map(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'a>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        visitor.visit_newtype_struct(self)
    }

    /// A word, such as `cosine`; enums hold nothing else.
    fn deserialize_enum<V: Visitor<'a>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        let result = match &self.node.value {
            Value::Text(word) => {
                let word: StrDeserializer<DeError> = word.as_str().into_deserializer();
                visitor.visit_enum(word)
            }
            _ => self.expected(&format!("one of {}", variants.join(", "))),
        };
        self.place(result)
    }

    serde::forward_to_deserialize_any! {
        <W: Visitor<'a>>
        i8 i16 i128 u8 u16 u128 f32 char bytes byte_buf unit unit_struct tuple_struct identifier ignored_any
    }
}

struct Items<'a, 'p> {
    items: &'a [Node],
    next: usize,
    path: &'p str,
}

impl<'a> de::SeqAccess<'a> for &mut Items<'a, '_> {
    type Error = DeError;

    fn next_element_seed<T: DeserializeSeed<'a>>(&mut self, seed: T) -> Result<Option<T::Value>, DeError> {
        let Some(node) = self.items.get(self.next) else { return Ok(None) };
        let path = join(self.path, &self.next.to_string());
        self.next += 1;
        let value = seed.deserialize(NodeDeserializer { node, path: path.clone() });
        value.map(Some).map_err(|e| e.at(&node.place, &path))
    }
}

struct Entries<'a, 'p> {
    entries: &'a [Entry],
    next: usize,
    path: &'p str,
}

impl<'a> de::MapAccess<'a> for Entries<'a, '_> {
    type Error = DeError;

    fn next_key_seed<K: DeserializeSeed<'a>>(&mut self, seed: K) -> Result<Option<K::Value>, DeError> {
        let Some(entry) = self.entries.get(self.next) else { return Ok(None) };
        let key: StrDeserializer<DeError> = entry.key.as_str().into_deserializer();
        seed.deserialize(key).map(Some).map_err(|e| e.at(&entry.place, self.path))
    }

    fn next_value_seed<V: DeserializeSeed<'a>>(&mut self, seed: V) -> Result<V::Value, DeError> {
        let entry = &self.entries[self.next];
        let path = join(self.path, &entry.key);
        self.next += 1;
        let value = seed.deserialize(NodeDeserializer { node: &entry.node, path: path.clone() });
        value.map_err(|e| e.at(&entry.node.place, &path))
    }
}
