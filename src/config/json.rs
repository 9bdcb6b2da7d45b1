//! Sections of a configuration in files of ours, such as a checkpoint's `meta.json`: for `#[serde(with = "crate::config::json")]`.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value as Json;

use super::problems::Problems;
use super::setting::{At, Setting};
use super::yaml::Node;
use crate::error::{Error, Result};

pub fn serialize<T: Setting, S: Serializer>(value: &T, s: S) -> std::result::Result<S::Ok, S::Error> {
    value.write().serialize(s)
}

pub fn deserialize<'de, T: Setting, D: Deserializer<'de>>(d: D) -> std::result::Result<T, D::Error> {
    of_text(&Json::deserialize(d)?.to_string()).map_err(D::Error::custom)
}

/// A setting of a text in YAML, of which JSON is a part.
pub fn of_text<T: Setting>(text: &str) -> Result<T> {
    let node = Node::parse_file(text, "text")?;
    let mut problems = Problems::default();
    let read = T::read(&At::root(&node), &mut problems);
    match (problems.into_error(), read) {
        (None, Some(value)) => Ok(value),
        (e, _) => Err(e.unwrap_or_else(|| Error::config("cannot be read"))),
    }
}
