//! What a value of a configuration is: how it is read from a tree of YAML, written, and described.
//!
//! Everything that is wrong is noted with its place, and reading goes on: a user gets all problems of a file at once.

use std::path::PathBuf;

use serde_json::Value as Json;

use super::keys::{KeyKind, Limits};
use super::problems::Problems;
use super::yaml::{Node, YamlValue, join};

/// A type that keys of a configuration have.
pub trait Setting: Sized {
    /// What stands at `at`; `None` if it does not fit, which is then among the problems.
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self>;

    /// As a file has it; null where there is nothing to write.
    fn write(&self) -> Json;

    /// What may stand there.
    fn kind() -> KeyKind;
}

/// A place in the tree that is being read.
#[derive(Debug, Clone)]
pub struct At<'a> {
    pub node: &'a Node,
    /// Its dotted key; empty at the root.
    pub key: String,
    /// Of the numbers there.
    pub limits: Limits,
}

impl<'a> At<'a> {
    pub fn root(node: &'a Node) -> Self {
        At { node, key: String::new(), limits: Limits::NONE }
    }

    /// What stands at the key or index `name` below.
    pub fn below(&self, name: &str, node: &'a Node, limits: Limits) -> Self {
        At { node, key: join(&self.key, name), limits }
    }

    /// Notes a problem with what stands here.
    pub fn refuse<T>(&self, why: impl Into<String>, problems: &mut Problems) -> Option<T> {
        problems.of_value(&self.node.place, &self.key, &why.into());
        None
    }

    /// Notes that something else stands here.
    pub fn expected<T>(&self, what: &str, problems: &mut Problems) -> Option<T> {
        self.refuse(format!("expected {what}, found {}", self.node.describe()), problems)
    }

    /// A text; numbers and booleans as they are spelled.
    pub fn text(&self, problems: &mut Problems) -> Option<&'a str> {
        match &self.node.value {
            YamlValue::Text(text) => Some(text),
            YamlValue::Bool(_) | YamlValue::Int(_) | YamlValue::Float(_) => Some(&self.node.spelling),
            YamlValue::List(items) => match items.as_slice() {
                [Node { value: YamlValue::Text(text), .. }] => self.refuse(
                    format!("expected text, found a list: in YAML [{text}] is a list with {text} in it; write \"[{text}]\" in quotes"),
                    problems,
                ),
                _ => self.expected("text", problems),
            },
            _ => self.expected("text", problems),
        }
    }

    /// A list of settings; `None` if one of them does not fit.
    pub fn list<T: Setting>(&self, items: &'a [Node], problems: &mut Problems) -> Option<Vec<T>> {
        // All are read, so that all problems are found.
        let read =
            |(i, node): (usize, &'a Node)| T::read(&self.below(&i.to_string(), node, self.limits), problems);
        let items: Vec<Option<T>> = items.iter().enumerate().map(read).collect();
        items.into_iter().collect()
    }
}

impl Setting for bool {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        match at.node.value {
            YamlValue::Bool(b) => Some(b),
            _ => at.expected("true or false", problems),
        }
    }

    fn write(&self) -> Json {
        (*self).into()
    }

    fn kind() -> KeyKind {
        KeyKind::Bool
    }
}

macro_rules! whole_numbers {
    ($($type:ty),*) => {$(
        impl Setting for $type {
            fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
                let YamlValue::Int(n) = at.node.value else { return at.expected("a whole number", problems) };
                match <$type>::try_from(n) {
                    Ok(x) if at.limits.hold(n as f64) => Some(x),
                    _ if at.limits == Limits::NONE => {
                        at.expected(&format!("a whole number of {} to {}", <$type>::MIN, <$type>::MAX), problems)
                    }
                    _ => at.expected(&format!("a whole number {}", at.limits), problems),
                }
            }

            fn write(&self) -> Json {
                (*self).into()
            }

            fn kind() -> KeyKind {
                KeyKind::Whole
            }
        }
    )*};
}

whole_numbers!(i64, u64, usize);

impl Setting for f64 {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        let x = match at.node.value {
            YamlValue::Int(n) => n as f64,
            YamlValue::Float(x) if x.is_finite() => x,
            YamlValue::Float(_) => return at.expected("a finite number", problems),
            _ => return at.expected("a number", problems),
        };
        match at.limits.hold(x) {
            true => Some(x),
            false => at.expected(&format!("a number {}", at.limits), problems),
        }
    }

    fn write(&self) -> Json {
        (*self).into()
    }

    fn kind() -> KeyKind {
        KeyKind::Number
    }
}

impl Setting for String {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        at.text(problems).map(str::to_string)
    }

    fn write(&self) -> Json {
        self.as_str().into()
    }

    fn kind() -> KeyKind {
        KeyKind::Text
    }
}

impl Setting for PathBuf {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        at.text(problems).map(PathBuf::from)
    }

    /// Paths come from YAML, and so are UTF-8.
    fn write(&self) -> Json {
        self.display().to_string().into()
    }

    fn kind() -> KeyKind {
        KeyKind::Path
    }
}

impl<T: Setting> Setting for Option<T> {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        match at.node.value {
            YamlValue::Null => Some(None),
            _ => T::read(at, problems).map(Some),
        }
    }

    fn write(&self) -> Json {
        self.as_ref().map_or(Json::Null, T::write)
    }

    fn kind() -> KeyKind {
        KeyKind::Optional(Box::new(T::kind()))
    }
}

impl<T: Setting> Setting for Vec<T> {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        match &at.node.value {
            YamlValue::List(items) => at.list(items, problems),
            _ => at.expected("a list", problems),
        }
    }

    fn write(&self) -> Json {
        self.iter().map(T::write).collect()
    }

    fn kind() -> KeyKind {
        KeyKind::List(Box::new(T::kind()), None)
    }
}

impl<T: Setting, const N: usize> Setting for [T; N] {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        let YamlValue::List(items) = &at.node.value else {
            return at.expected(&format!("a list of {N}"), problems);
        };
        if items.len() != N {
            return at.refuse(format!("expected a list of {N}, found one of {}", items.len()), problems);
        }
        at.list(items, problems)?.try_into().ok()
    }

    fn write(&self) -> Json {
        self.iter().map(T::write).collect()
    }

    fn kind() -> KeyKind {
        KeyKind::List(Box::new(T::kind()), Some(N))
    }
}
