//! YAML as a tree that remembers where every value came from, and overrides of it from the command line.

use std::fmt;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;
use serde_saphyr::options::NonFiniteFloatPolicy;

use crate::error::{Error, Result};

/// Where a value was written.
#[derive(Debug, Clone, PartialEq)]
pub enum ConfigPlace {
    /// Line and column of the file, from 1; columns count characters.
    File { source: Arc<str>, line: u64, column: u64 },
    /// The override `key=value`, as it was typed.
    Override(Arc<str>),
}

impl fmt::Display for ConfigPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigPlace::File { source, line, column } => write!(f, "{source}:{line}:{column}"),
            ConfigPlace::Override(text) => write!(f, "override '{text}'"),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum YamlValue {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Section(Vec<YamlEntry>),
}

#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub value: YamlValue,
    pub place: ConfigPlace,
    /// A number or boolean as it was spelled, so that it can also serve as text (`output_dir: 007`).
    pub spelling: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct YamlEntry {
    pub key: String,
    pub place: ConfigPlace,
    pub node: Node,
}

impl Node {
    /// Reads one YAML document; `place` tells the place of a line and column in it.
    fn parse(text: &str, place: &dyn Fn(u64, u64) -> ConfigPlace) -> Result<Node> {
        let options = serde_saphyr::options! {
            strict_booleans: true,
            with_snippet: false,
            non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        };
        match serde_saphyr::from_str_with_options::<Raw>(text, options) {
            Ok(raw) => Ok(raw.node(text, place)),
            Err(e) => {
                let at = e.location().map_or((1, 1), |l| (l.line().max(1), l.column().max(1)));
                let formatter: &dyn serde_saphyr::MessageFormatter = &serde_saphyr::UserMessageFormatter;
                let message = formatter.format_message(e.without_snippet());
                let message = match message.as_ref() {
                    text if text.starts_with("tabs disallowed") => {
                        "YAML is indented with spaces, not with tabs"
                    }
                    text => text,
                };
                Err(Error::config(format!("{}: {message}", place(at.0, at.1))))
            }
        }
    }

    pub fn parse_file(text: &str, source: &str) -> Result<Node> {
        let source: Arc<str> = source.into();
        Node::parse(text, &|line, column| ConfigPlace::File { source: source.clone(), line, column })
    }

    /// The value under a dotted key, if it is there.
    pub fn get(&self, key: &str) -> Option<&Node> {
        key.split('.').try_fold(self, |node, part| match &node.value {
            YamlValue::Section(entries) => entries.iter().find(|e| e.key == part).map(|e| &e.node),
            YamlValue::List(items) => part.parse::<usize>().ok().and_then(|i| items.get(i)),
            _ => None,
        })
    }

    /// What stands here, for messages.
    pub fn describe(&self) -> String {
        match &self.value {
            YamlValue::Null => "nothing".into(),
            YamlValue::Bool(_) | YamlValue::Int(_) | YamlValue::Float(_) => self.spelling.clone(),
            YamlValue::Text(text) => format!("the text '{text}'"),
            YamlValue::List(_) => "a list".into(),
            YamlValue::Section(_) => "a section".into(),
        }
    }

    /// Applies `optim.lr=3e-4`: the value is YAML; sections on the way are made where they are missing; a number
    /// indexes a list, and the index after the last appends.
    /// Gives the key `from` at the top the name `to`.
    ///
    /// # Errors
    /// Both are there.
    pub fn rename(&mut self, from: &str, to: &str) -> Result<()> {
        let YamlValue::Section(entries) = &mut self.value else { return Ok(()) };
        let Some(at) = entries.iter().position(|e| e.key == from).filter(|_| from != to) else {
            return Ok(());
        };
        if entries.iter().any(|e| e.key == to) {
            let place = &entries[at].place;
            return Err(Error::config(format!(
                "{place}: '{from}': '{to}' is given too, and is the same; keep one"
            )));
        }
        entries[at].key = to.to_string();
        Ok(())
    }

    /// Sets a dotted key that is not there to a number; sections around it are made. `place` is said of it.
    pub fn set_default(&mut self, key: &str, number: f64) {
        let place = self.place.clone();
        let (mut node, parts) = (self, key.split('.'));
        for part in parts {
            if node.value == YamlValue::Null {
                node.value = YamlValue::Section(vec![]);
            }
            let YamlValue::Section(entries) = &mut node.value else { return };
            let at = entries.iter().position(|e| e.key == part).unwrap_or_else(|| {
                let node = Node::null(place.clone());
                entries.push(YamlEntry { key: part.to_string(), place: place.clone(), node });
                entries.len() - 1
            });
            node = &mut entries[at].node;
        }
        node.value = YamlValue::Float(number);
    }

    pub fn apply_override(&mut self, text: &str) -> Result<()> {
        let place = ConfigPlace::Override(text.into());
        let fail = |message: String| Error::config(format!("{place}: {message}"));
        let Some((key, value)) = text.split_once('=') else {
            let is_file = text.ends_with(".yaml") || text.ends_with(".yml");
            return Err(fail(match is_file {
                true => format!("expected KEY=VALUE; a configuration is named with --config {text}"),
                false => "expected KEY=VALUE, such as optim.lr=3e-4".into(),
            }));
        };
        let parts: Vec<&str> = key.split('.').collect();
        if parts.iter().any(|part| part.is_empty() || part.contains(char::is_whitespace)) {
            return Err(fail(format!("'{key}' is not a key such as optim.lr")));
        }
        let value = match value {
            // Standard input, as other programs name it; YAML would read a list of nothing.
            "-" => Node { value: YamlValue::Text("-".into()), place: place.clone(), spelling: String::new() },
            _ => Node::parse(value, &|_, _| place.clone())?,
        };

        let mut node = self;
        for (depth, part) in parts.iter().enumerate() {
            let here = || parts[..depth].join(".");
            if node.value == YamlValue::Null {
                *node =
                    Node { value: YamlValue::Section(vec![]), place: place.clone(), spelling: String::new() };
            }
            let found = node.describe();
            node = match &mut node.value {
                YamlValue::Section(entries) => {
                    let index = entries.iter().position(|e| e.key == *part).unwrap_or_else(|| {
                        let node = Node::null(place.clone());
                        entries.push(YamlEntry { key: part.to_string(), place: place.clone(), node });
                        entries.len() - 1
                    });
                    &mut entries[index].node
                }
                YamlValue::List(items) => {
                    let index =
                        part.parse::<usize>().ok().filter(|i| *i <= items.len()).ok_or_else(|| {
                            fail(format!("'{}' is a list: expected an index of 0 to {}", here(), items.len()))
                        })?;
                    if index == items.len() {
                        items.push(Node::null(place.clone()));
                    }
                    &mut items[index]
                }
                _ => return Err(fail(format!("'{}' holds {found}, no keys", here()))),
            };
        }
        *node = value;
        Ok(())
    }

    fn null(place: ConfigPlace) -> Node {
        Node { value: YamlValue::Null, place, spelling: String::new() }
    }
}

/// The dotted key of `name` in the section `path`.
pub fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_string() } else { format!("{path}.{name}") }
}

/// A node as the parser gives it.
struct Raw(Spanned<RawValue>);

enum RawValue {
    Scalar(YamlValue),
    List(Vec<Raw>),
    Section(Vec<(Spanned<String>, Raw)>),
}

impl Raw {
    fn node(self, text: &str, place: &dyn Fn(u64, u64) -> ConfigPlace) -> Node {
        let at = |l: &serde_saphyr::Location| place(l.line().max(1), l.column().max(1));
        let Spanned { value, referenced, defined } = self.0;
        let value = match value {
            RawValue::Scalar(value) => value,
            RawValue::List(items) => {
                YamlValue::List(items.into_iter().map(|n| n.node(text, place)).collect())
            }
            RawValue::Section(entries) => YamlValue::Section(
                entries
                    .into_iter()
                    .map(|(key, node)| YamlEntry {
                        place: at(&key.referenced),
                        key: key.value,
                        node: node.node(text, place),
                    })
                    .collect(),
            ),
        };
        let span = defined.span();
        let spelled = |start: u64, len: u64| text.get(start as usize..(start + len) as usize);
        let spelling = match (&value, span.byte_offset(), span.byte_len()) {
            (YamlValue::Bool(_) | YamlValue::Int(_) | YamlValue::Float(_), Some(start), Some(len)) => {
                spelled(start, len).unwrap_or_default().trim().to_string()
            }
            _ => String::new(),
        };
        Node { value, place: at(&referenced), spelling }
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Spanned::deserialize(d).map(Raw)
    }
}

impl<'de> Deserialize<'de> for RawValue {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = RawValue;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(YamlValue::Null))
    }

    fn visit_none<E>(self) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(YamlValue::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<RawValue, D::Error> {
        d.deserialize_any(self)
    }

    fn visit_bool<E>(self, v: bool) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(YamlValue::Bool(v)))
    }

    fn visit_i64<E>(self, v: i64) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(YamlValue::Int(v.into())))
    }

    fn visit_u64<E>(self, v: u64) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(YamlValue::Int(v.into())))
    }

    fn visit_i128<E>(self, v: i128) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(YamlValue::Int(v)))
    }

    fn visit_f64<E>(self, v: f64) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(YamlValue::Float(v)))
    }

    fn visit_str<E>(self, v: &str) -> Result<RawValue, E> {
        Ok(RawValue::Scalar(YamlValue::Text(v.to_string())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<RawValue, A::Error> {
        let mut list = vec![];
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(RawValue::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawValue, A::Error> {
        let mut entries = vec![];
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(RawValue::Section(entries))
    }
}
