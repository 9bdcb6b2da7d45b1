//! Tokenized examples with the tokens that are supervised.

mod cache;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::fields::Leftovers;
use crate::config::sections::TooLong;
use crate::env;
use crate::error::{Error, Result};
use crate::random::Rng;

pub use cache::{Examples, Lengths, Tokenization};

/// A sequence's token ids, and for each whether the loss counts it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    pub ids: Vec<u32>,
    pub supervised: Vec<bool>,
}

impl Encoded {
    /// Without what a template writes after the last turn's end, such as ChatML's line break: a sampler ends at that token
    /// and never writes more, so that what scores a whole completion has to end there, too.
    pub fn cut_after_the_last_turn(mut self) -> Encoded {
        if let Some(last) = self.supervised.iter().rposition(|s| *s) {
            self.ids.truncate(last + 1);
            self.supervised.truncate(last + 1);
        }
        self
    }
}

/// What is trained on together: a conversation, or a prompt with each of its ranked completions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Example {
    pub sequences: Vec<Encoded>,
    /// Of each sequence: 0 is the best, equal ranks are equally good. A conversation alone has 0.
    pub ranks: Vec<u32>,
    /// A cache keeps only how many records have each.
    pub leftovers: Leftovers,
}

impl From<Encoded> for Example {
    fn from(sequence: Encoded) -> Example {
        Example { sequences: vec![sequence], ranks: vec![0], leftovers: Leftovers::default() }
    }
}

/// One of several parts of a data set, one for each stage of training.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// Relative sizes.
    pub parts: Vec<f64>,
    /// Which of them.
    pub part: usize,
}

impl Split {
    /// Whether record `index` of a file belongs to the part. It depends on the index and the parts alone, so that the
    /// stages of a pipeline get parts that do not overlap, whatever their seeds.
    pub fn holds(&self, index: u64) -> bool {
        let total: f64 = self.parts.iter().sum();
        let mut at = Rng::new(0, "data.split", index).uniform() * total;
        // Rounding must not leave a record in no part.
        let part = self.parts.iter().position(|size| {
            at -= size;
            at < 0.0
        });
        part.unwrap_or(self.parts.len() - 1) == self.part
    }
}

/// How records become examples.
#[derive(Debug, Clone, PartialEq)]
pub struct ExampleOptions {
    /// Most tokens of a sequence.
    pub sequence_length: usize,
    pub too_long: TooLong,
    pub split: Option<Split>,
}

/// What became of the records of a source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExampleCounts {
    /// Records of the part that was asked for.
    pub records: u64,
    pub examples: u64,
    /// Of all examples: one each of conversations, several of preferences.
    pub sequences: u64,
    pub tokens: u64,
    /// Tokens that the loss counts.
    pub supervised_tokens: u64,
    /// Examples that were cut.
    pub truncated: u64,
    /// Left out as too long.
    pub too_long: u64,
    /// Left out because nothing of them is supervised (after a cut).
    pub unsupervised: u64,
    /// Completions left out because their tokens are those of another one of the same prompt.
    pub duplicates: u64,
    /// Examples left out because no two completions of different rank are left of them.
    pub indistinct: u64,
    /// Sequences whose last supervised token is an end of sequence.
    pub ends_in_eos: u64,
}

impl ExampleCounts {
    pub fn add(&mut self, other: &ExampleCounts) {
        for (a, b) in [
            (&mut self.records, other.records),
            (&mut self.examples, other.examples),
            (&mut self.sequences, other.sequences),
            (&mut self.tokens, other.tokens),
            (&mut self.supervised_tokens, other.supervised_tokens),
            (&mut self.truncated, other.truncated),
            (&mut self.too_long, other.too_long),
            (&mut self.unsupervised, other.unsupervised),
            (&mut self.duplicates, other.duplicates),
            (&mut self.indistinct, other.indistinct),
            (&mut self.ends_in_eos, other.ends_in_eos),
        ] {
            *a += b;
        }
    }

    /// Records that gave no example.
    pub fn dropped(&self) -> u64 {
        self.too_long + self.unsupervised + self.indistinct
    }

    /// How many records gave no example for each reason that occurs.
    pub fn left_out(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let all = [
            ("too_long", self.too_long),
            ("unsupervised", self.unsupervised),
            ("indistinct", self.indistinct),
        ];
        all.into_iter().filter(|(_, count)| *count > 0)
    }

    /// What a reason of [`ExampleCounts::left_out`] means.
    pub fn words(reason: &str) -> &'static str {
        match reason {
            "too_long" => "too long",
            "unsupervised" => "with nothing supervised",
            _ => "without two completions that differ in tokens and rank",
        }
    }

    /// The number of records that gave no example, and why: `12 left out (10 too long, 2 with nothing supervised)`.
    pub fn dropped_and_why(&self) -> String {
        let why: Vec<String> =
            self.left_out().map(|(reason, n)| format!("{n} {}", ExampleCounts::words(reason))).collect();
        match why.is_empty() {
            true => "0 left out".into(),
            false => format!("{} left out ({})", self.dropped(), why.join(", ")),
        }
    }

    /// Counts an example that is kept.
    fn keep(&mut self, example: &Example, eos: &[u32]) {
        self.examples += 1;
        self.sequences += example.sequences.len() as u64;
        for sequence in &example.sequences {
            self.tokens += sequence.ids.len() as u64;
            self.supervised_tokens += sequence.supervised.iter().skip(1).filter(|s| **s).count() as u64;
            // Templates may write a line break after it.
            let last = sequence.supervised.iter().rposition(|s| *s);
            self.ends_in_eos += u64::from(last.is_some_and(|i| eos.contains(&sequence.ids[i])));
        }
    }
}

/// A conversation of at most `options.sequence_length` tokens, if it is to be kept.
pub fn fit(conversation: Example, options: &ExampleOptions, counts: &mut ExampleCounts) -> Option<Example> {
    let (most, mut sequence) = (options.sequence_length, conversation.sequences.into_iter().next()?);
    let too_long = sequence.ids.len() > most;
    if too_long && options.too_long == TooLong::Drop {
        counts.too_long += 1;
        return None;
    }
    sequence.ids.truncate(most);
    sequence.supervised.truncate(most);
    if !sequence.supervised.iter().skip(1).any(|s| *s) {
        counts.unsupervised += 1;
        return None;
    }
    counts.truncated += u64::from(too_long);
    Some(sequence.into())
}

/// Where caches lie by default: a folder of the user's cache folder.
pub fn default_cache() -> Result<PathBuf> {
    env::path("XDG_CACHE_HOME")
        .or_else(|| Some(env::path("HOME")?.join(".cache")))
        .map(|dir| dir.join("corral"))
        .ok_or_else(|| {
            Error::config(
                "neither HOME nor XDG_CACHE_HOME is set: give data.cache, a folder for tokenized data",
            )
        })
}
