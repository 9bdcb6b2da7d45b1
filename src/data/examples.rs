//! Tokenized examples with the tokens that are supervised, kept in a cache so that a run, its restarts and its other
//! ranks tokenize once.
//!
//! A cache file, little-endian: the tokens of all sequences one after the other (`u32`; the highest bit says that the
//! token is supervised), the end of each sequence in tokens (`u64`), the end of each example in sequences (`u64`), the rank
//! of each sequence (`u32`), a footer in JSON, the footer's length (`u64`), `CORRALEX`.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use kernels::mmap::{Mmap, map_file};
use nix::fcntl::{Flock, FlockArg};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::arrow;
use super::readers::{self, Record};
use super::rng::Rng;
use super::tokenizer::hex;
use crate::config::sft::TooLong;
use crate::error::{Context, Error, Result};
use crate::files::{AtomicFile, create_dir, read_error};
use crate::telemetry::progress::with_bytes_bar;

const MAGIC: &[u8; 8] = b"CORRALEX";
/// Of the file format and of what is done to examples: part of every cache's key.
const VERSION: u32 = 3;
const SUPERVISED: u32 = 1 << 31;
/// Records that are read before they are tokenized together.
const CHUNK: usize = 4096;

/// A sequence's token ids, and for each whether the loss counts it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    pub ids: Vec<u32>,
    pub supervised: Vec<bool>,
}

impl Encoded {
    /// Without what a template writes after the last turn's end, such as ChatML's line break: a sampler ends at that token
    /// and never writes more, so that what scores a whole completion has to end there, too.
    pub fn to_the_last_turns_end(mut self) -> Encoded {
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
}

impl From<Encoded> for Example {
    fn from(sequence: Encoded) -> Example {
        Example { sequences: vec![sequence], ranks: vec![0] }
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
pub struct Options {
    /// Most tokens of a sequence.
    pub sequence_length: usize,
    pub too_long: TooLong,
    pub split: Option<Split>,
}

/// What became of the records of a source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
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

impl Counts {
    pub fn add(&mut self, other: &Counts) {
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

/// How many sequences have each number of tokens before any is cut or left out.
pub type Lengths = BTreeMap<usize, u64>;

#[derive(Serialize, Deserialize)]
struct Footer {
    key: String,
    counts: Counts,
    lengths: Lengths,
    crc32: u32,
}

/// The examples of one file, memory-mapped from the cache.
#[derive(Debug)]
pub struct Examples {
    map: Mmap,
    counts: Counts,
    lengths: Lengths,
    key: String,
}

/// Turns records into examples, on all cores.
pub struct Tokenization<'a> {
    /// The example of a record as it is, or why the record is unusable.
    pub encode: &'a (dyn Fn(&Record) -> Result<Example> + Sync),
    /// The example as it is kept; none where it is left out, which is then counted.
    pub fit: &'a (dyn Fn(Example, &mut Counts) -> Option<Example> + Sync),
    /// Tells tokenizer, template and whatever else `encode` and `fit` depend on, besides `options`, apart.
    pub key: String,
    pub eos: &'a [u32],
    pub options: Options,
    /// Where caches lie.
    pub cache: PathBuf,
}

impl Tokenization<'_> {
    /// The examples of a file: from the cache, else tokenized into it. Processes that ask at the same time wait for the
    /// first one.
    ///
    /// # Errors
    /// A record that cannot be read or rendered, with its place; a cache that cannot be written.
    pub fn open(&self, path: &Path) -> Result<Examples> {
        let key = self.cache_key(path)?;
        create_dir(&self.cache).context("data.cache")?;
        let cached = self.cache.join(format!("{key}.examples"));
        if let Some(examples) = Examples::open(&cached, &key)? {
            return Ok(examples);
        }
        let lock = self.cache.join(format!("{key}.lock"));
        let file = File::create(&lock).map_err(|e| crate::files::write_error(&lock, &e))?;
        let _lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, e)| Error::failed(format!("cannot lock {}: {e}", lock.display())))?;
        // Another process may have written it while this one waited.
        if let Some(examples) = Examples::open(&cached, &key)? {
            return Ok(examples);
        }
        let (what, read) = (format!("tokenizing {}", path.display()), Arc::default());
        with_bytes_bar(&what, readers::total_bytes(&[path.to_path_buf()]), &read, || {
            self.write(path, &cached, &key, &read)
        })?;
        Examples::open(&cached, &key)?.ok_or_else(|| {
            Error::failed(format!("{}: it was just written and is not there", cached.display()))
        })
    }

    fn cache_key(&self, path: &Path) -> Result<String> {
        let files = if path.is_dir() { arrow::files(path)? } else { vec![path.to_path_buf()] };
        let mut hash = Sha256::new();
        for path in &files {
            let file = File::open(path).map_err(|e| read_error(path, &e))?;
            hash.update(&map_file(&file).map_err(|e| read_error(path, &e))?[..]);
        }
        // The name decides the format.
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        hash.update(format!("{VERSION} {name} {:?} {:?} {}", self.options, self.eos, self.key));
        Ok(hex(&hash.finalize()[..16]))
    }

    fn write(&self, path: &Path, cached: &Path, key: &str, read: &Arc<AtomicU64>) -> Result<()> {
        let mut file = AtomicFile::create(cached)?;
        let (mut counts, mut crc) = (Counts::default(), crc32fast::Hasher::new());
        let mut lengths = Lengths::new();
        let (mut ends, mut example_ends, mut ranks) = (Vec::new(), Vec::new(), Vec::new());
        let mut records = readers::records(path, None, read)?;
        let mut index = 0;
        loop {
            let mut chunk = Vec::with_capacity(CHUNK);
            for record in records.by_ref() {
                let record = record?;
                if self.options.split.as_ref().is_none_or(|s| s.holds(index)) {
                    chunk.push(record);
                }
                index += 1;
                if chunk.len() == CHUNK {
                    break;
                }
            }
            if chunk.is_empty() {
                break;
            }
            counts.records += chunk.len() as u64;
            let encode = |record: &Record| {
                let mut counts = Counts::default();
                let example = (self.encode)(record)?;
                let lengths: Vec<usize> = example.sequences.iter().map(|s| s.ids.len()).collect();
                let example = (self.fit)(example, &mut counts);
                example.iter().for_each(|e| counts.keep(e, self.eos));
                Ok((example, counts, lengths))
            };
            let encoded: Vec<_> = chunk.par_iter().map(encode).collect::<Result<_>>()?;
            for (example, its_counts, its_lengths) in encoded {
                counts.add(&its_counts);
                its_lengths.into_iter().for_each(|n| *lengths.entry(n).or_default() += 1);
                let Some(example) = example else { continue };
                let mut end = ends.last().copied().unwrap_or(0);
                for sequence in &example.sequences {
                    end += sequence.ids.len() as u64;
                    ends.push(end);
                    let bytes: Vec<u8> = words(sequence).flat_map(u32::to_le_bytes).collect();
                    crc.update(&bytes);
                    file.put(&bytes)?;
                }
                example_ends.push(ends.len() as u64);
                ranks.extend(example.ranks);
            }
        }
        let ends = ends.iter().chain(&example_ends).flat_map(|e| e.to_le_bytes());
        let bytes: Vec<u8> = ends.chain(ranks.iter().flat_map(|r| r.to_le_bytes())).collect();
        crc.update(&bytes);
        file.put(&bytes)?;
        let footer = Footer { key: key.to_string(), counts, lengths, crc32: crc.finalize() };
        let footer = serde_json::to_vec(&footer).map_err(|e| Error::failed(e.to_string()))?;
        file.put(&footer)?;
        file.put(&(footer.len() as u64).to_le_bytes())?;
        file.put(MAGIC)?;
        file.commit()
    }
}

/// A sequence as it is stored. The first token is predicted by nothing.
fn words(sequence: &Encoded) -> impl Iterator<Item = u32> {
    let supervised = sequence.supervised.iter().enumerate().map(|(i, s)| *s && i > 0);
    sequence.ids.iter().zip(supervised).map(|(id, s)| if s { id | SUPERVISED } else { *id })
}

/// A conversation of at most `options.sequence_length` tokens, if it is to be kept.
pub fn fit(conversation: Example, options: &Options, counts: &mut Counts) -> Option<Example> {
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

impl Examples {
    /// None where there is no such file, or it is of another key or damaged: then it is made again.
    fn open(path: &Path, key: &str) -> Result<Option<Examples>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(read_error(path, &e)),
        };
        let map = map_file(&file).map_err(|e| read_error(path, &e))?;
        let Some((footer, end)) = footer(&map) else { return Ok(None) };
        let c = &footer.counts;
        let whole = [(c.tokens, 4), (c.sequences, 12), (c.examples, 8)]
            .iter()
            .try_fold(0u64, |sum, (n, bytes)| sum.checked_add(n.checked_mul(*bytes)?));
        if footer.key != key || whole != Some(end as u64) || crc32fast::hash(&map[..end]) != footer.crc32 {
            return Ok(None);
        }
        Ok(Some(Examples { map, counts: footer.counts, lengths: footer.lengths, key: footer.key }))
    }

    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    pub fn lengths(&self) -> &Lengths {
        &self.lengths
    }

    /// Tells the data, its tokenizer and its options apart.
    pub fn key(&self) -> &str {
        &self.key
    }

    pub fn len(&self) -> usize {
        self.counts.examples as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn u64_at(&self, at: usize) -> usize {
        u64::from_le_bytes(std::array::from_fn(|b| self.map[at + b])) as usize
    }

    /// Where the numbers of each sequence's end begin, in bytes from the file's begin.
    fn ends_at(&self) -> usize {
        4 * self.counts.tokens as usize
    }

    /// Where the first `n` sequences end, in tokens.
    fn tokens_before(&self, n: usize) -> usize {
        if n == 0 { 0 } else { self.u64_at(self.ends_at() + 8 * (n - 1)) }
    }

    /// The sequences of example `i`, numbered through all examples.
    pub fn sequences(&self, i: usize) -> Range<usize> {
        let at = self.ends_at() + 8 * self.counts.sequences as usize;
        let before = |n: usize| if n == 0 { 0 } else { self.u64_at(at + 8 * (n - 1)) };
        before(i)..before(i + 1)
    }

    fn words(&self, sequences: Range<usize>) -> impl Iterator<Item = u32> {
        let bytes = &self.map[4 * self.tokens_before(sequences.start)..4 * self.tokens_before(sequences.end)];
        bytes.chunks_exact(4).map(|b| u32::from_le_bytes(std::array::from_fn(|i| b[i])))
    }

    /// Tokens of example `i`, of all its sequences.
    pub fn length(&self, i: usize) -> usize {
        let sequences = self.sequences(i);
        self.tokens_before(sequences.end) - self.tokens_before(sequences.start)
    }

    /// Example `i`.
    pub fn get(&self, i: usize) -> Example {
        let sequences = self.sequences(i);
        let ranks_at = self.ends_at() + 8 * (self.counts.sequences + self.counts.examples) as usize;
        let rank = |n: usize| u32::from_le_bytes(std::array::from_fn(|b| self.map[ranks_at + 4 * n + b]));
        let sequence = |n: usize| {
            let (ids, supervised) =
                self.words(n..n + 1).map(|w| (w & !SUPERVISED, w & SUPERVISED != 0)).unzip();
            Encoded { ids, supervised }
        };
        Example { ranks: sequences.clone().map(rank).collect(), sequences: sequences.map(sequence).collect() }
    }

    /// Supervised tokens of example `i`, of all its sequences.
    pub fn num_supervised(&self, i: usize) -> usize {
        self.words(self.sequences(i)).filter(|w| w & SUPERVISED != 0).count()
    }
}

/// The footer of a cache file, and where it begins.
fn footer(bytes: &[u8]) -> Option<(Footer, usize)> {
    let rest = bytes.strip_suffix(MAGIC)?;
    let (rest, length) = rest.split_last_chunk::<8>()?;
    let begin = rest.len().checked_sub(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    Some((serde_json::from_slice(&rest[begin..]).ok()?, begin))
}

/// Where caches lie by default: a folder of the user's cache folder.
pub fn default_cache() -> Result<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("XDG_CACHE_HOME")
        .or_else(|| Some(var("HOME")?.join(".cache")))
        .map(|dir| dir.join("corral"))
        .ok_or_else(|| {
            Error::config(
                "neither HOME nor XDG_CACHE_HOME is set: give data.cache, a folder for tokenized data",
            )
        })
}
