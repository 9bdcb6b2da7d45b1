//! What keys there are: the description of a configuration, from which its documentation, the schema for editors and the
//! classes of its changes are made.

use std::fmt;

use serde_json::Value as Json;

/// What may stand at a key.
#[derive(Debug, Clone, PartialEq)]
pub enum KeyKind {
    Bool,
    /// A whole number.
    Whole,
    Number,
    Text,
    /// A file or folder.
    Path,
    /// Text of a form, such as `YYYY-MM-DD`.
    Form(&'static str),
    /// One of several words, each with what it means.
    Choice(Vec<(&'static str, String)>),
    /// A list, of a fixed length where one is given.
    List(Box<KeyKind>, Option<usize>),
    /// What may also be left out, or null.
    Optional(Box<KeyKind>),
    /// One of several kinds.
    OneOf(Vec<KeyKind>),
    Section(Section),
}

/// A section of keys.
#[derive(Debug, Clone, PartialEq)]
pub struct Section {
    pub about: String,
    pub keys: Vec<Key>,
}

/// A key of a section.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    pub name: &'static str,
    pub about: String,
    pub kind: KeyKind,
    /// What is taken where it is left out; `None`: it must be given.
    pub default: Option<Json>,
    pub limits: Limits,
    /// What a change does to a run that goes on; of a section: of all keys in it.
    pub class: Option<Class>,
}

/// The numbers that a key may have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    pub low: f64,
    /// `low` itself is not among them.
    pub above_low: bool,
    pub high: f64,
    /// `high` itself is not among them.
    pub below_high: bool,
}

impl Limits {
    pub const NONE: Limits =
        Limits { low: f64::NEG_INFINITY, above_low: false, high: f64::INFINITY, below_high: false };
    pub const POSITIVE: Limits = Limits { low: 0.0, above_low: true, ..Limits::NONE };
    pub const NOT_NEGATIVE: Limits = Limits { low: 0.0, ..Limits::NONE };
    pub const ABOVE_ONE: Limits = Limits { low: 1.0, above_low: true, ..Limits::NONE };
    pub const RATIO: Limits = Limits { low: 0.0, high: 1.0, ..Limits::NONE };
    /// Of a probability that is not 0.
    pub const SHARE: Limits = Limits { above_low: true, ..Limits::RATIO };
    pub const BELOW_ONE: Limits = Limits { below_high: true, ..Limits::RATIO };
    /// At most what fits products of two such numbers into 64 bits.
    pub const COUNT: Limits = Limits { low: 1.0, high: 2147483648.0, ..Limits::NONE };
    /// As [`Limits::COUNT`], and 0.
    pub const WHOLE: Limits = Limits { low: 0.0, ..Limits::COUNT };
    /// Seconds; at most 115 days.
    pub const SECONDS: Limits = Limits { high: 1e7, ..Limits::POSITIVE };

    pub fn hold(&self, x: f64) -> bool {
        let low = if self.above_low { x > self.low } else { x >= self.low };
        let high = if self.below_high { x < self.high } else { x <= self.high };
        low && high
    }
}

impl fmt::Display for Limits {
    /// After "a number": `of 0 to 1`, `above 0`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, high) = (self.low, self.high);
        match (low.is_finite(), high.is_finite(), self.above_low || self.below_high) {
            (true, true, false) => write!(f, "of {low} to {high}"),
            (true, true, true) => {
                let (above, below) = (
                    if self.above_low { "above" } else { "of at least" },
                    if self.below_high { "below" } else { "at most" },
                );
                write!(f, "{above} {low} and {below} {high}")
            }
            (true, false, _) => write!(f, "{} {low}", if self.above_low { "above" } else { "of at least" }),
            (false, true, _) => write!(f, "{} {high}", if self.below_high { "below" } else { "of at most" }),
            (false, false, _) => Ok(()),
        }
    }
}

/// What a change of a key does to a run that goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Changes the mathematics of the steps to come. Refused in the same folder; a checkpoint can go on with it in another.
    Mathematics,
    /// Changes which tensors are trained, or which data a position counts: a checkpoint cannot go on with it.
    State,
    /// The number of steps: the schedule is computed anew.
    Length,
    /// When something is logged, validated, sampled or saved, and how much of it. No bit of the training changes.
    Output,
    /// How the work is done: time-outs, caches, memory. No bit of the training changes.
    Execution,
    /// How the work is divided: the same mathematics, rounded in another order.
    Rounding,
    /// A file or folder: the same one under another spelling is no change, another one is a change of [`Class::State`].
    Path,
    /// The run's own folder.
    Folder,
}

impl KeyKind {
    /// The section that stands here, or in the items of a list here.
    pub fn section(&self) -> Option<&Section> {
        match self {
            KeyKind::Section(section) => Some(section),
            KeyKind::Optional(kind) | KeyKind::List(kind, _) => kind.section(),
            KeyKind::OneOf(kinds) => kinds.iter().find_map(KeyKind::section),
            _ => None,
        }
    }

    /// The words of a choice that stands here, or in the items of a list here, each with its meaning.
    pub fn choice(&self) -> Option<&[(&'static str, String)]> {
        match self {
            KeyKind::Choice(words) => Some(words),
            KeyKind::Optional(kind) | KeyKind::List(kind, _) => kind.choice(),
            KeyKind::OneOf(kinds) => kinds.iter().find_map(KeyKind::choice),
            _ => None,
        }
    }

    /// What a user writes there, in words.
    pub fn words(&self) -> String {
        match self {
            KeyKind::Bool => "true or false".into(),
            KeyKind::Whole => "whole number".into(),
            KeyKind::Number => "number".into(),
            KeyKind::Text => "text".into(),
            KeyKind::Path => "path".into(),
            KeyKind::Form(form) => (*form).into(),
            KeyKind::Choice(words) => {
                words.iter().map(|(word, _)| format!("`{word}`")).collect::<Vec<_>>().join(", ")
            }
            KeyKind::List(kind, None) => format!("list of: {}", kind.words()),
            KeyKind::List(kind, Some(n)) => format!("list of {n}: {}", kind.words()),
            KeyKind::Optional(kind) => kind.words(),
            KeyKind::OneOf(kinds) => kinds.iter().map(KeyKind::words).collect::<Vec<_>>().join(", or "),
            KeyKind::Section(section) => {
                let keys: Vec<&str> = section.keys.iter().map(|key| key.name).collect();
                format!("section `{{{}}}`", keys.join(", "))
            }
        }
    }
}

impl Section {
    pub fn key(&self, name: &str) -> Option<&Key> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// The key with a dotted name; indices of lists do not count.
    pub fn find(&self, dotted: &str) -> Option<&Key> {
        self.path(dotted)?.pop()
    }

    /// What a change of a dotted key does: the class of the outermost section around it that has one, else its own.
    pub fn class_of(&self, dotted: &str) -> Option<Class> {
        self.path(dotted)?.iter().find_map(|key| key.class)
    }

    /// The keys that a dotted name leads through.
    fn path(&self, dotted: &str) -> Option<Vec<&Key>> {
        let (mut section, mut path) = (Some(self), Vec::new());
        for name in dotted.split('.').filter(|part| part.parse::<usize>().is_err()) {
            let key = section?.key(name)?;
            section = key.kind.section();
            path.push(key);
        }
        Some(path)
    }

    /// All keys, each with its dotted name, sections before what is in them.
    pub fn all(&self) -> Vec<(String, &Key)> {
        let mut found = Vec::new();
        for key in &self.keys {
            found.push((key.name.to_string(), key));
            let below = key.kind.section().map(Section::all).unwrap_or_default();
            found.extend(below.into_iter().map(|(name, below)| (format!("{}.{name}", key.name), below)));
        }
        found
    }
}
