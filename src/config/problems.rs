//! What is wrong with a configuration: every problem with its place, and the nearest key or word that is known.

use super::foreign;
use super::yaml::{ConfigPlace, join};
use crate::error::Error;

/// The problems of one configuration.
#[derive(Debug, Default)]
pub struct Problems {
    found: Vec<Problem>,
    /// The dotted keys that the configuration may have, for advice.
    keys: Vec<String>,
    /// Those that are meant by unknown ones.
    meant: Vec<String>,
}

#[derive(Debug)]
struct Problem {
    place: ConfigPlace,
    key: String,
    message: String,
    /// The key is not there.
    missing: bool,
}

impl Problems {
    /// Of a configuration that may have these dotted keys.
    pub fn of(keys: Vec<String>) -> Problems {
        Problems { found: Vec::new(), keys, meant: Vec::new() }
    }

    fn add(&mut self, place: &ConfigPlace, key: String, message: String) {
        self.found.push(Problem { place: place.clone(), key, message, missing: false });
    }

    /// The value of `key` does not fit.
    pub fn of_value(&mut self, place: &ConfigPlace, key: &str, why: &str) {
        let message = if key.is_empty() { why.to_string() } else { format!("'{key}': {why}") };
        self.add(place, key.to_string(), message);
    }

    /// There is no key `name` in the section `path`.
    pub fn unknown_key(&mut self, place: &ConfigPlace, path: &str, name: &str, known: &[&str]) {
        let key = join(path, name);
        let message = match self.elsewhere(name, known) {
            // YAML reads `{rank:8}` as a key without a value.
            _ if name.contains(':') => {
                let (before, after) = name.split_once(':').unwrap_or_default();
                self.meant.push(join(path, before));
                format!("unknown key '{key}'; YAML needs a space after a colon: `{before}: {after}`")
            }
            Some(here) => format!("unknown key '{key}'; {here}"),
            None => {
                format!(
                    "unknown key '{key}'; {}(known here: {})",
                    did_you_mean(name, known),
                    known.join(", ")
                )
            }
        };
        self.add(place, key, message);
    }

    /// The keys that were meant by a name that is another program's, or that of another section.
    fn elsewhere(&mut self, name: &str, known: &[&str]) -> Option<String> {
        let has = |key: &str| self.keys.iter().any(|k| k == key);
        if let Some(foreign) = foreign::key_named(name) {
            self.meant.extend(foreign.here.iter().map(|key| key.to_string()));
            return match foreign.here.is_empty() {
                true => Some(format!("there is no such key: {}", foreign.note)),
                false => Some(format!("here it is {}", foreign.advice(has)?)),
            };
        }
        if nearest(name, known).is_some() {
            return None;
        }
        let depth = |key: &&String| key.matches('.').count();
        let named: Vec<&String> = self.keys.iter().filter(|key| last(key) == name).collect();
        let least = named.iter().map(depth).min()?;
        let meant: Vec<String> =
            named.iter().filter(|key| depth(key) == least).map(|key| format!("`{key}`")).collect();
        Some(format!("it is a key of another section: {}", meant.join(" or ")))
    }

    /// A word is none of those that `key` may have.
    pub fn unknown_choice(&mut self, place: &ConfigPlace, key: &str, word: &str, known: &[&str]) {
        let meant = match foreign::value_named(key, word) {
            Some(here) if known.contains(&here) => format!("here it is '{here}' "),
            _ => did_you_mean(word, known),
        };
        let why = format!("unknown value '{word}'; {meant}(known: {})", known.join(", "));
        self.of_value(place, key, &why);
    }

    /// The section `path` at `place` lacks the key `name`.
    pub fn missing_key(&mut self, place: &ConfigPlace, path: &str, name: &str) {
        let key = join(path, name);
        let message = format!("the key '{key}' is missing");
        self.found.push(Problem { place: place.clone(), key, message, missing: true });
    }

    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Whether one of them is about a key below `path`.
    pub fn has_below(&self, path: &str) -> bool {
        self.found.iter().any(|p| p.key.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
    }

    /// Whether what is said of `key` may follow from one of these problems: it is about the same key, one around or below it, or
    /// speaks of it.
    pub fn may_cause(&self, key: &str, why: &str) -> bool {
        let within =
            |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        self.found
            .iter()
            .filter(|p| !p.key.is_empty())
            .any(|p| within(key, &p.key) || within(&p.key, key) || why.contains(last(&p.key)))
    }

    /// One error, with a line for each problem, in the order of the file.
    pub fn into_error(mut self) -> Option<Error> {
        let line_and_column = |p: &Problem| match p.place {
            ConfigPlace::File { line, column, .. } => (line, column),
            ConfigPlace::Override(_) => (u64::MAX, u64::MAX),
        };
        // A key that is there under a wrong name is missing for no other reason.
        self.found.retain(|p| !p.missing || !self.meant.contains(&p.key));
        self.found.sort_by_key(line_and_column);
        let lines: Vec<String> = self.found.iter().map(|p| format!("{}: {}", p.place, p.message)).collect();
        (!lines.is_empty()).then(|| Error::config(lines.join("\n")))
    }
}

/// The last part of a dotted key.
fn last(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

fn did_you_mean(given: &str, known: &[&str]) -> String {
    nearest(given, known).map_or(String::new(), |near| format!("did you mean '{near}'? "))
}

/// The known word with the smallest edit distance, where that is small enough to be a slip of the fingers.
pub fn nearest<'a>(given: &str, known: &[&'a str]) -> Option<&'a str> {
    let distance = |word: &&str| strsim::osa_distance(&given.to_lowercase(), word);
    let best = known.iter().min_by_key(|word| distance(word))?;
    let close = distance(best) <= (given.chars().count() / 3).max(1);
    (close || best.starts_with(given) || given.starts_with(best)).then_some(*best)
}
