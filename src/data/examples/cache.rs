//! The examples of a file, kept in a cache so that a run, its restarts and its other ranks tokenize once.
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

use nix::fcntl::{Flock, FlockArg};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Encoded, Example, ExampleCounts, ExampleOptions};
use crate::data::fields::{Leftovers, Unused};
use crate::data::mapped::Mapped;
use crate::data::odd::{Odd, OddRecords, OrOdd, Reason};
use crate::data::readers::{self, Record};
use crate::data::tokenizer::hex;
use crate::error::{Context, Error, Result};
use crate::files::{self, AtomicFile, create_dir, read_through};
use crate::telemetry::console::grouped;
use crate::telemetry::progress::with_bytes_bar;

const MAGIC: &[u8; 8] = b"CORRALEX";
/// Of the file format and of what is done to examples: part of every cache's key.
const VERSION: u32 = 6;
const SUPERVISED: u32 = 1 << 31;
/// Records that are read before they are tokenized together.
const CHUNK: usize = 4096;

/// How many sequences have each number of tokens before any is cut or left out.
pub type Lengths = BTreeMap<usize, u64>;

#[derive(Serialize, Deserialize)]
struct Footer {
    key: String,
    counts: ExampleCounts,
    lengths: Lengths,
    odd: OddRecords,
    left_out: LeftOut,
    unused: Unused,
    crc32: u32,
}

/// Where the first record lies that was left out for each reason, of the counters in [`ExampleCounts`].
type LeftOut = BTreeMap<String, String>;

/// The examples of one file, memory-mapped from the cache.
#[derive(Debug)]
pub struct Examples {
    map: Mapped,
    /// The file of data.
    path: PathBuf,
    counts: ExampleCounts,
    lengths: Lengths,
    odd: OddRecords,
    left_out: LeftOut,
    unused: Unused,
    key: String,
}

/// Turns records into examples, on all cores.
pub struct Tokenization<'a> {
    /// The example of a record as it is, or why the record cannot be used.
    pub encode: &'a (dyn Fn(&Record) -> Result<Example, Odd> + Sync),
    /// The example as it is kept; none where it is left out, which is then counted.
    pub fit: &'a (dyn Fn(Example, &mut ExampleCounts) -> Option<Example> + Sync),
    /// Tells tokenizer, template and whatever else `encode` and `fit` depend on, besides `options`, apart.
    pub key: String,
    pub eos: &'a [u32],
    pub options: ExampleOptions,
    /// Where caches lie.
    pub cache: PathBuf,
}

impl Tokenization<'_> {
    /// The examples of a file: from the cache, else tokenized into it. Processes that ask at the same time wait for the
    /// first one. Records that cannot be used are left out; see [`Examples::odd`]. Keys of the records that nothing reads are
    /// told, wherever the examples come from.
    ///
    /// # Errors
    /// A file that cannot be read on; a cache that cannot be written.
    pub fn open(&self, path: &Path) -> Result<Examples> {
        let examples = self.cached(path)?;
        examples.unused.warn(path);
        Ok(examples)
    }

    fn cached(&self, path: &Path) -> Result<Examples> {
        let key = self.cache_key(path)?;
        create_dir(&self.cache).context("data.cache")?;
        let cached = self.cache.join(format!("{key}.examples"));
        if let Some(examples) = Examples::open(&cached, &key, path)? {
            return Ok(examples);
        }
        let lock = self.cache.join(format!("{key}.lock"));
        let file = File::create(&lock).map_err(|e| crate::files::write_error(&lock, &e))?;
        let _lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, e)| Error::failed(format!("cannot lock {}: {e}", lock.display())))?;
        // Another process may have written it while this one waited.
        if let Some(examples) = Examples::open(&cached, &key, path)? {
            return Ok(examples);
        }
        let (what, read) = (format!("tokenizing {}", path.display()), Arc::default());
        with_bytes_bar(&what, readers::total_bytes(&[path.to_path_buf()]), &read, || {
            self.write(path, &cached, &key, &read)
        })?;
        Examples::open(&cached, &key, path)?.ok_or_else(|| {
            Error::failed(format!("{}: is missing right after it was written", cached.display()))
        })
    }

    fn cache_key(&self, path: &Path) -> Result<String> {
        let files = readers::files(path)?;
        let mut hash = Sha256::new();
        for path in &files {
            read_through(path, |bytes| hash.update(bytes))?;
        }
        // The name decides the format.
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        hash.update(format!("{VERSION} {name} {:?} {:?} {}", self.options, self.eos, self.key));
        Ok(hex(&hash.finalize()[..16]))
    }

    fn write(&self, path: &Path, cached: &Path, key: &str, read: &Arc<AtomicU64>) -> Result<()> {
        let mut file = AtomicFile::create(cached)?;
        let (mut counts, mut crc) = (ExampleCounts::default(), crc32fast::Hasher::new());
        let (mut lengths, mut odd, mut left_out) = (Lengths::new(), OddRecords::default(), LeftOut::new());
        let mut unused = Unused::default();
        let (mut ends, mut example_ends, mut ranks) = (Vec::new(), Vec::new(), Vec::new());
        let mut records = readers::records_or_errors(path, None, read)?;
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
            odd.records += chunk.len() as u64;
            let tokenized: Vec<_> = chunk.into_par_iter().map(|record| self.tokenize(record)).collect();
            for tokenized in tokenized {
                let tokenized = match tokenized {
                    Ok(tokenized) => tokenized,
                    Err(one) => {
                        odd.add(one)?;
                        continue;
                    }
                };
                counts.add(&tokenized.counts);
                let Leftovers { unread, unwritten } = &tokenized.leftovers;
                unused.count(unread.iter().chain(unwritten));
                tokenized.lengths.into_iter().for_each(|n| *lengths.entry(n).or_default() += 1);
                let Some(example) = tokenized.example else {
                    for (reason, _) in tokenized.counts.left_out() {
                        left_out.entry(reason.into()).or_insert_with(|| tokenized.place.clone());
                    }
                    continue;
                };
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
        let odd = odd.without_path(path);
        let footer =
            Footer { key: key.to_string(), counts, lengths, odd, left_out, unused, crc32: crc.finalize() };
        let footer = serde_json::to_vec(&footer).map_err(|e| Error::failed(e.to_string()))?;
        file.put(&footer)?;
        file.put(&(footer.len() as u64).to_le_bytes())?;
        file.put(MAGIC)?;
        file.commit()
    }

    fn tokenize(&self, record: Result<Record>) -> Result<Tokenized, Odd> {
        let record = record.or_odd(Reason::Unreadable)?;
        let mut counts = ExampleCounts::default();
        let example = (self.encode)(&record)?;
        let lengths = example.sequences.iter().map(|s| s.ids.len()).collect();
        let leftovers = example.leftovers.clone();
        let example = (self.fit)(example, &mut counts);
        example.iter().for_each(|e| counts.keep(e, self.eos));
        Ok(Tokenized { example, counts, lengths, leftovers, place: record.place.in_file() })
    }
}

/// What became of a record.
struct Tokenized {
    /// None: it is left out.
    example: Option<Example>,
    /// Of this record.
    counts: ExampleCounts,
    /// Of its sequences before any was cut.
    lengths: Vec<usize>,
    /// What is said of each of its keys that nothing reads.
    leftovers: Leftovers,
    /// Its place, without the file's path.
    place: String,
}

/// A sequence as it is stored. The first token is predicted by nothing.
fn words(sequence: &Encoded) -> impl Iterator<Item = u32> {
    let supervised = sequence.supervised.iter().enumerate().map(|(i, s)| *s && i > 0);
    sequence.ids.iter().zip(supervised).map(|(id, s)| if s { id | SUPERVISED } else { *id })
}

impl Examples {
    /// None where there is no such file, or it is of another key or damaged: then it is made again.
    fn open(cached: &Path, key: &str, path: &Path) -> Result<Option<Examples>> {
        if !files::exists(cached)? {
            return Ok(None);
        }
        let map = Mapped::open(cached)?;
        let Some((footer, end)) = footer(&map) else { return Ok(None) };
        let c = &footer.counts;
        let whole = [(c.tokens, 4), (c.sequences, 12), (c.examples, 8)]
            .iter()
            .try_fold(0u64, |sum, (n, bytes)| sum.checked_add(n.checked_mul(*bytes)?));
        if footer.key != key || whole != Some(end as u64) || crc32fast::hash(&map[..end]) != footer.crc32 {
            return Ok(None);
        }
        let Footer { key, counts, lengths, odd, left_out, unused, .. } = footer;
        let odd = odd.with_path(path);
        Ok(Some(Examples { map, path: path.to_path_buf(), counts, lengths, odd, left_out, unused, key }))
    }

    /// The file of data.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The records that cannot be used.
    pub fn odd(&self) -> &OddRecords {
        &self.odd
    }

    /// Why records gave no example, in words, with a place for each reason.
    pub fn reasons(&self) -> String {
        let reason = |(key, count): (&str, u64)| {
            let first = self
                .left_out
                .get(key)
                .map_or(String::new(), |at| format!(" (the first: {}{at})", self.path.display()));
            format!("{} {}{first}", grouped(count), ExampleCounts::words(key))
        };
        let mut reasons: Vec<String> = self.counts.left_out().map(reason).collect();
        if self.odd.total() > 0 {
            let first = self.odd.example().map_or(String::new(), |line| format!(" (the first: {line})"));
            reasons.push(format!("{}{first}", self.odd.reasons()));
        }
        reasons.join(", ")
    }

    pub fn counts(&self) -> &ExampleCounts {
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
        Example {
            ranks: sequences.clone().map(rank).collect(),
            sequences: sequences.map(sequence).collect(),
            leftovers: Leftovers::default(),
        }
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
