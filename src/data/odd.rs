//! Records that cannot be used: counted by reason, the first of them kept with their places.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::sections::OnError;
use crate::error::{Error, ErrorClass, Result};
use crate::telemetry::console::grouped;

/// Records that a message names.
const NAMED: usize = 10;
/// Characters of a record's message that are kept.
const MOST_CHARS: usize = 400;
/// Stands for the file's path in what is kept: the same file may be read from another folder.
const PATH: &str = "\u{1}";

/// Why a record cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The line is not JSON, or not an object.
    Unreadable,
    /// No known format, a key that is missing, a text that is no text.
    Format,
    /// The chat template refuses the messages, or they cannot be encoded.
    Template,
    /// More tokens than the model has positions: of inputs of `score` and `eval`, which cut nothing.
    TooLong,
}

impl Reason {
    /// Why records of training data cannot be used.
    pub const TRAINING: [Reason; 3] = [Reason::Unreadable, Reason::Format, Reason::Template];

    /// The counter in metrics.jsonl.
    pub fn key(self) -> &'static str {
        match self {
            Reason::Unreadable => "skipped_unreadable",
            Reason::Format => "skipped_format",
            Reason::Template => "skipped_template",
            Reason::TooLong => "too_long",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Reason::Unreadable => "unreadable",
            Reason::Format => "of no usable format",
            Reason::Template => "refused by the chat template",
            Reason::TooLong => "too long for the model",
        }
    }
}

/// Why a record cannot be used, and its error, which names its place.
#[derive(Debug)]
pub struct Odd {
    pub reason: Reason,
    pub error: Error,
}

/// Gives errors their reason.
pub trait OrOdd<T> {
    fn or_odd(self, reason: Reason) -> Result<T, Odd>;
}

impl<T> OrOdd<T> for Result<T> {
    fn or_odd(self, reason: Reason) -> Result<T, Odd> {
        self.map_err(|error| Odd { reason, error })
    }
}

/// The records of one or more files that cannot be used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OddRecords {
    /// Records that were read, the odd ones included.
    pub records: u64,
    counts: BTreeMap<Reason, u64>,
    /// Messages of the first ones.
    first: Vec<String>,
}

impl OddRecords {
    /// None yet, of so many records.
    pub fn of(records: u64) -> OddRecords {
        OddRecords { records, ..OddRecords::default() }
    }

    /// Counts an odd record.
    ///
    /// # Errors
    /// The error itself, where it is not the record's: of any other kind than Data.
    pub fn add(&mut self, odd: Odd) -> Result<()> {
        if odd.error.kind != ErrorClass::Data {
            return Err(odd.error);
        }
        *self.counts.entry(odd.reason).or_default() += 1;
        if self.first.len() < NAMED {
            let line = odd.error.message.split_whitespace().collect::<Vec<_>>().join(" ");
            let cut = line.char_indices().nth(MOST_CHARS).map(|(at, _)| at);
            self.first.push(cut.map_or(line.clone(), |at| format!("{}...", &line[..at])));
        }
        Ok(())
    }

    pub fn merge(&mut self, other: &OddRecords) {
        self.records += other.records;
        for (reason, count) in &other.counts {
            *self.counts.entry(*reason).or_default() += count;
        }
        let room = NAMED - self.first.len();
        self.first.extend(other.first.iter().take(room).cloned());
    }

    /// How many there are of all reasons.
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    pub fn count(&self, reason: Reason) -> u64 {
        self.counts.get(&reason).copied().unwrap_or(0)
    }

    /// Counts by reason, in words.
    pub fn reasons(&self) -> String {
        let parts: Vec<String> =
            self.counts.iter().map(|(reason, n)| format!("{} {}", grouped(*n), reason.words())).collect();
        parts.join(", ")
    }

    /// Message of the first one.
    pub fn example(&self) -> Option<&str> {
        self.first.first().map(String::as_str)
    }

    /// With a mark in the place of the file's path, for a cache.
    pub fn without_path(mut self, path: &Path) -> OddRecords {
        let path = path.display().to_string();
        self.first.iter_mut().for_each(|line| *line = line.replace(&path, PATH));
        self
    }

    /// The inverse of [`OddRecords::without_path`].
    pub fn with_path(mut self, path: &Path) -> OddRecords {
        let path = path.display().to_string();
        self.first.iter_mut().for_each(|line| *line = line.replace(PATH, &path));
        self
    }

    /// All of them in one message: counted by reason, the first ten named; `remedy` is what to do besides mending them.
    pub fn message(&self, remedy: &str) -> String {
        let (total, records) = (self.total(), grouped(self.records));
        if let (1, [only]) = (total, self.first.as_slice()) {
            return format!("{only} (1 of {records} records; fix it, or {remedy})");
        }
        let head = format!("{} of {records} records cannot be used: {}", grouped(total), self.reasons());
        format!("{}\nfix them, or {remedy}", self.listed(head))
    }

    /// What is told of them where they are skipped.
    pub fn skipped(&self) -> String {
        let (total, records) = (grouped(self.total()), grouped(self.records));
        self.listed(format!("{total} of {records} records are skipped: {}", self.reasons()))
    }

    /// The first ones, a line each, below `message`.
    fn listed(&self, mut message: String) -> String {
        for line in &self.first {
            message += &format!("\n  {line}");
        }
        match self.total().saturating_sub(self.first.len() as u64) {
            0 => message,
            unnamed => format!("{message}\n  and {} more", grouped(unnamed)),
        }
    }

    /// Refuses data with odd records, where `data.on_error` says so.
    pub fn check(&self, on_error: OnError) -> Result<()> {
        self.refuse(on_error, "set data.on_error: skip")
    }

    /// Refuses odd records, where `on_error` says so; `skip`: what makes it skip.
    pub fn refuse(&self, on_error: OnError, skip: &str) -> Result<()> {
        match on_error {
            OnError::Refuse if self.total() > 0 => {
                Err(Error::data(self.message(&format!("{skip} to leave out and count such records"))))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn odd(n: usize) -> OddRecords {
        let mut all = OddRecords::of(2000);
        for i in 0..n {
            let reason = if i % 2 == 0 { Reason::Template } else { Reason::Unreadable };
            let error = Error::data(format!("dir/a.jsonl:{i}: bad\n  in two lines"));
            all.add(Odd { reason, error }).unwrap();
        }
        all
    }

    #[test]
    fn one_message_counts_all_and_names_the_first_ten() {
        let message = odd(12).check(OnError::Refuse).unwrap_err();
        assert_eq!(message.exit_code(), 3);
        let lines: Vec<&str> = message.message.lines().collect();
        assert_eq!(
            lines[0],
            "12 of 2,000 records cannot be used: 6 unreadable, 6 refused by the chat template"
        );
        assert_eq!(
            (lines[1], lines[10]),
            ("  dir/a.jsonl:0: bad in two lines", "  dir/a.jsonl:9: bad in two lines")
        );
        assert_eq!(lines[11], "  and 2 more");
        assert!(lines[12].contains("data.on_error: skip"), "{message}");
        let one = odd(1).check(OnError::Refuse).unwrap_err().message;
        assert!(one.starts_with("dir/a.jsonl:0: bad in two lines (1 of 2,000 records;"), "{one}");
        assert!(odd(3).check(OnError::Skip).is_ok() && odd(0).check(OnError::Refuse).is_ok());
    }

    #[test]
    fn files_add_up_and_a_moved_file_is_named_where_it_is() {
        let mut all = odd(7);
        all.merge(&odd(5));
        assert_eq!((all.total(), all.records, all.first.len()), (12, 4000, 10));
        assert_eq!((all.count(Reason::Template), all.count(Reason::Format)), (7, 0));
        let moved = odd(1).without_path(Path::new("dir/a.jsonl")).with_path(Path::new("x/a.jsonl"));
        assert_eq!(moved.example(), Some("x/a.jsonl:0: bad in two lines"));
    }

    #[test]
    fn other_errors_are_not_a_records() {
        let odd = Odd { reason: Reason::Format, error: Error::failed("no memory") };
        assert_eq!(OddRecords::default().add(odd).unwrap_err().exit_code(), 1);
    }
}
