//! What may change between two starts of a run in the same folder: every key has a class, and the difference of two
//! configurations is told key by key.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{self, Component, PathBuf};

use serde_json::Value;

use super::algorithm::{Algorithm, parse};
use super::keys::Class::{self, *};
use super::yaml::join;
use crate::error::{Error, Result};

/// A key whose value is another one.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    pub key: String,
    pub class: Class,
    there: Option<Value>,
    here: Option<Value>,
}

impl Change {
    /// The mathematics or the state of the run is another.
    pub fn is_refused(&self) -> bool {
        matches!(self.class, Mathematics | State | Path)
    }

    /// For a change that is taken.
    pub fn before_and_now(&self) -> String {
        format!("{}: before {}, now {}", self.key, show(&self.there), show(&self.here))
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: there {}, here {}", self.key, show(&self.there), show(&self.here))
    }
}

/// Several changes in a row.
pub fn list<'a>(changes: impl IntoIterator<Item = &'a Change>) -> String {
    changes.into_iter().map(Change::to_string).collect::<Vec<_>>().join("; ")
}

/// A value as one writes it in YAML: small and large numbers with an exponent.
pub fn show(value: &Option<Value>) -> String {
    match value {
        None | Some(Value::Null) => "not set".into(),
        Some(Value::Number(n)) => match n.as_f64() {
            Some(x) if n.is_f64() && x != 0.0 && !(1e-3..1e7).contains(&x.abs()) => format!("{x:e}"),
            _ => n.to_string(),
        },
        Some(Value::String(text)) if text.is_empty() || text.contains(char::is_control) => {
            format!("{text:?}")
        }
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(items)) => {
            let items: Vec<String> = items.iter().map(|item| show(&Some(item.clone()))).collect();
            format!("[{}]", items.join(", "))
        }
        Some(other) => other.to_string(),
    }
}

/// The first line of a run's `config.yaml`: the subcommand, and where relative paths begin.
const NOTE: [&str; 2] = ["# A run of `corral ", "`; relative paths are relative to "];

/// The resolved configuration of a subcommand, as it is written into a run's folder.
pub fn recorded(stage: &str, resolved: &str) -> String {
    match std::env::current_dir().map(|dir| dir.display().to_string()) {
        Ok(dir) if !dir.contains('\n') => format!("{}{stage}{}{dir}\n{resolved}", NOTE[0], NOTE[1]),
        _ => resolved.to_string(),
    }
}

/// The subcommand and the folder that the first line names, and the resolved configuration.
fn without_note(text: &str) -> (Option<(&str, &str)>, &str) {
    let noted = || {
        let (line, resolved) = text.split_once('\n')?;
        Some((line.strip_prefix(NOTE[0])?.split_once(NOTE[1])?, resolved))
    };
    noted().map_or((None, text), |(note, resolved)| (Some(note), resolved))
}

/// The resolved configuration, as it was before [`recorded`].
pub fn resolved(text: &str) -> &str {
    without_note(text).1
}

/// The subcommand that [`recorded`] has noted.
pub fn noted_stage(text: &str) -> Option<&str> {
    without_note(text).0.map(|(stage, _)| stage)
}

/// What differs between the configuration `text` that a run's folder holds (as [`recorded`] writes it) and `here`.
///
/// # Errors
/// The text is no configuration of this subcommand; the message says why.
pub fn between<T: Algorithm>(text: &str, source: &str, here: &T) -> Result<Vec<Change>> {
    let there = parse::<T>(text, source.to_string(), false, &[])?.config;
    let base = match without_note(text).0 {
        Some((_, base)) => PathBuf::from(base),
        None => std::env::current_dir().map_err(Error::from)?,
    };
    let (there, here) = (leaves(&there), leaves(here));
    let all = T::keys();
    let keys: BTreeSet<&String> = there.keys().chain(here.keys()).collect();
    let changes = keys.into_iter().filter_map(|key| {
        let (old, new) = (there.get(key), here.get(key));
        // A key that nobody has classified changes the mathematics until somebody says otherwise.
        let class = all.class_of(key).unwrap_or(Mathematics);
        let same = match (class, old, new) {
            (Folder, ..) => true,
            (Path, Some(Value::String(old)), Some(Value::String(new))) => same_path(&base, old, new),
            _ => old == new,
        };
        let change = || Change { key: key.clone(), class, there: old.cloned(), here: new.cloned() };
        (!same).then(change)
    });
    Ok(changes.collect())
}

/// Whether `there`, from the folder `base`, and `here`, from the current one, name the same file. What does not exist (a hub
/// id, the name of a template) is compared by its spelling.
fn same_path(base: &path::Path, there: &str, here: &str) -> bool {
    let from_base = base.join(there);
    match (from_base.canonicalize(), std::fs::canonicalize(here)) {
        (Ok(there), Ok(here)) => there == here,
        (Err(_), Err(_)) => {
            let absolute = path::absolute(here).unwrap_or_else(|_| here.into());
            there == here || cleaned(&from_base) == cleaned(&absolute)
        }
        _ => false,
    }
}

/// Without `.` and a slash at the end.
fn cleaned(path: &path::Path) -> PathBuf {
    path.components().filter(|part| *part != Component::CurDir).collect()
}

/// The values of a configuration by their dotted keys. A list of plain values is one value; what is not set is left out.
fn leaves<T: Algorithm>(config: &T) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    collect("", &config.write(), &mut found);
    found
}

fn collect(key: &str, value: &Value, found: &mut BTreeMap<String, Value>) {
    let below = |name: &str| join(key, name);
    match value {
        Value::Object(keys) => keys.iter().for_each(|(name, value)| collect(&below(name), value, found)),
        Value::Array(items) if items.iter().any(|item| item.is_object()) => {
            items.iter().enumerate().for_each(|(i, item)| collect(&below(&i.to_string()), item, found));
        }
        Value::Null => {}
        Value::Array(items) if items.is_empty() => {}
        other => {
            found.insert(key.to_string(), other.clone());
        }
    }
}

#[cfg(test)]
mod tests;
