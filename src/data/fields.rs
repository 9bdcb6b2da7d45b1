//! The keys of a record: those that are read, those that nothing reads, and those that cannot be used.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use super::message::is_empty;
use super::readers::Record;
use crate::error::{Error, Result};
use crate::telemetry::console::{grouped, is_first_rank};
use crate::warn;

/// Keys that would change what a record means, and that are not supported.
const REFUSED: [&str; 6] = ["image", "images", "video", "videos", "audio", "audios"];

/// A record, of which it is known what was read. A null counts as absent.
pub struct Fields<'a> {
    pub record: &'a Record,
    read: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Fields<'a> {
    /// # Errors
    /// A key whose meaning is not supported has a value.
    pub fn new(record: &'a Record) -> Result<Fields<'a>> {
        let fields = Fields { record, read: RefCell::default() };
        match REFUSED.iter().find(|key| record.fields.get(**key).is_some_and(|v| !is_empty(v))) {
            Some(key) => Err(fields.bad(format!("the key `{key}` is not supported: only texts can be read"))),
            None => Ok(fields),
        }
    }

    /// Whether the key is there, which is not reading it.
    pub fn has(&self, key: &str) -> bool {
        self.record.fields.get(key).is_some_and(|v| !v.is_null())
    }

    /// Counts a key as read.
    pub fn mark(&self, key: &'static str) {
        self.read.borrow_mut().insert(key);
    }

    /// The value of a key, which is read with it.
    pub fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.mark(key);
        self.record.fields.get(key).filter(|v| !v.is_null())
    }

    /// The text of a key, which is read with it.
    pub fn text(&self, key: &'static str) -> Result<&'a str> {
        self.mark(key);
        self.record.text(key)
    }

    /// An error with the record's place.
    pub fn bad(&self, what: impl std::fmt::Display) -> Error {
        Error::data(format!("{}: {what}", self.record.place))
    }

    /// The keys with a value that were not read, as [`Unused`] counts them.
    pub fn unused(&self) -> Vec<String> {
        let read = self.read.borrow();
        let unread =
            self.record.fields.iter().filter(|(key, v)| !read.contains(key.as_str()) && !is_empty(v));
        unread.map(|(key, _)| unused(key)).collect()
    }
}

/// What a record has and nothing uses, in words, as [`Unused`] counts it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Keys that nothing reads.
    pub unread: Vec<String>,
    /// What the chat template is given, and what leaves no trace in its text.
    pub unwritten: Vec<String>,
}

/// What is said of a record's key that nothing reads.
pub fn unused(key: &str) -> String {
    format!("the key '{key}', which is not used")
}

/// How many records have keys that nothing reads, by what is said of each: `the key 'source', which is not used`.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Unused(BTreeMap<String, u64>);

impl Unused {
    /// Counts what is unused of a record.
    pub fn count<'a>(&mut self, unused: impl IntoIterator<Item = &'a String>) {
        unused.into_iter().for_each(|what| *self.0.entry(what.clone()).or_default() += 1);
    }

    /// One line for each key, such as `12,000 records have the key 'source', which is not used`.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(what, n)| match n {
            1 => format!("1 record has {what}"),
            n => format!("{} records have {what}", grouped(*n)),
        })
    }

    /// Warns of each key of a file, on rank 0.
    pub fn warn(&self, path: &Path) {
        if is_first_rank() {
            self.lines().for_each(|line| warn!("{}: {line}", path.display()));
        }
    }
}
