//! Tokenized examples with the tokens that are supervised, kept in a cache so that a run, its restarts and its other
//! ranks tokenize once.
//!
//! A cache file, little-endian: the tokens of all examples one after the other (`u32`; the highest bit says that the
//! token is supervised), the end of each example (`u64`), a footer in JSON, the footer's length (`u64`), `CORRALEX`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use kernels::mmap::{Mmap, map_file};
use nix::fcntl::{Flock, FlockArg};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::readers::{self, Record};
use super::rng::Rng;
use super::tokenizer::hex;
use crate::config::sft::TooLong;
use crate::error::{Context, Error, Result};
use crate::files::{AtomicFile, create_dir, read_error};

const MAGIC: &[u8; 8] = b"CORRALEX";
/// Of the file format and of what is done to examples: part of every cache's key.
const VERSION: u32 = 1;
const SUPERVISED: u32 = 1 << 31;
/// Records that are read before they are tokenized together.
const CHUNK: usize = 4096;

/// An example's token ids, and for each whether the loss counts it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    pub ids: Vec<u32>,
    pub supervised: Vec<bool>,
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
    /// Most tokens of an example.
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
    pub tokens: u64,
    /// Tokens that the loss counts.
    pub supervised_tokens: u64,
    /// Examples that were cut.
    pub truncated: u64,
    /// Left out as too long.
    pub too_long: u64,
    /// Left out because nothing of them is supervised (after a cut).
    pub unsupervised: u64,
    /// Examples whose last token is a supervised end of sequence.
    pub ends_in_eos: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Counts) {
        for (a, b) in [
            (&mut self.records, other.records),
            (&mut self.examples, other.examples),
            (&mut self.tokens, other.tokens),
            (&mut self.supervised_tokens, other.supervised_tokens),
            (&mut self.truncated, other.truncated),
            (&mut self.too_long, other.too_long),
            (&mut self.unsupervised, other.unsupervised),
            (&mut self.ends_in_eos, other.ends_in_eos),
        ] {
            *a += b;
        }
    }

    /// Records that gave no example.
    pub fn dropped(&self) -> u64 {
        self.too_long + self.unsupervised
    }
}

#[derive(Serialize, Deserialize)]
struct Footer {
    key: String,
    counts: Counts,
    crc32: u32,
}

/// The examples of one file, memory-mapped from the cache.
#[derive(Debug)]
pub struct Examples {
    map: Mmap,
    counts: Counts,
    key: String,
    /// In bytes from the file's begin.
    ends_at: usize,
}

/// Turns records into examples, on all cores.
pub struct Tokenization<'a> {
    /// Also says that an example is unusable.
    pub encode: &'a (dyn Fn(&Record) -> Result<Encoded> + Sync),
    /// Tells tokenizer, template and whatever else `encode` depends on apart.
    pub key: String,
    pub eos: &'a [u32],
    pub options: Options,
    /// Where caches lie.
    pub cache: PathBuf,
}

impl Tokenization<'_> {
    /// The examples of a file: from the cache, else tokenized into it. Processes that ask at the same time wait for the
    /// first one. `read` grows with the bytes of `path` that were read.
    ///
    /// # Errors
    /// A record that cannot be read or rendered, with its place; a cache that cannot be written.
    pub fn open(&self, path: &Path, read: &Arc<AtomicU64>) -> Result<Examples> {
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
        self.write(path, &cached, &key, read)?;
        Examples::open(&cached, &key)?.ok_or_else(|| {
            Error::failed(format!("{}: it was just written and is not there", cached.display()))
        })
    }

    fn cache_key(&self, path: &Path) -> Result<String> {
        let mut hash = Sha256::new();
        let file = File::open(path).map_err(|e| read_error(path, &e))?;
        hash.update(&map_file(&file).map_err(|e| read_error(path, &e))?[..]);
        // The name decides the format.
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        hash.update(format!("{VERSION} {name} {:?} {:?} {}", self.options, self.eos, self.key));
        Ok(hex(&hash.finalize()[..16]))
    }

    fn write(&self, path: &Path, cached: &Path, key: &str, read: &Arc<AtomicU64>) -> Result<()> {
        let mut file = AtomicFile::create(cached)?;
        let (mut counts, mut ends, mut crc) = (Counts::default(), Vec::new(), crc32fast::Hasher::new());
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
            let encoded: Vec<Encoded> = chunk.par_iter().map(self.encode).collect::<Result<_>>()?;
            for example in encoded {
                let Some(words) = self.fit(example, &mut counts) else { continue };
                counts.examples += 1;
                counts.tokens += words.len() as u64;
                counts.supervised_tokens += words.iter().filter(|w| **w & SUPERVISED != 0).count() as u64;
                ends.push(counts.tokens);
                let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                crc.update(&bytes);
                file.put(&bytes)?;
            }
        }
        let bytes: Vec<u8> = ends.iter().flat_map(|e| e.to_le_bytes()).collect();
        crc.update(&bytes);
        file.put(&bytes)?;
        let footer = Footer { key: key.to_string(), counts, crc32: crc.finalize() };
        let footer = serde_json::to_vec(&footer).map_err(|e| Error::failed(e.to_string()))?;
        file.put(&footer)?;
        file.put(&(footer.len() as u64).to_le_bytes())?;
        file.put(MAGIC)?;
        file.commit()
    }

    /// The example as it is stored, if it is to be kept.
    fn fit(&self, mut example: Encoded, counts: &mut Counts) -> Option<Vec<u32>> {
        let most = self.options.sequence_length;
        let too_long = example.ids.len() > most;
        if too_long && self.options.too_long == TooLong::Drop {
            counts.too_long += 1;
            return None;
        }
        example.ids.truncate(most);
        example.supervised.truncate(most);
        // The first token is predicted by nothing.
        if !example.supervised.iter().skip(1).any(|s| *s) {
            counts.unsupervised += 1;
            return None;
        }
        counts.truncated += u64::from(too_long);
        let last = example.ids.last().zip(example.supervised.last());
        counts.ends_in_eos +=
            u64::from(last.is_some_and(|(id, supervised)| *supervised && self.eos.contains(id)));
        let word = |(i, (id, supervised)): (usize, (u32, bool))| {
            if supervised && i > 0 { id | SUPERVISED } else { id }
        };
        Some(example.ids.into_iter().zip(example.supervised).enumerate().map(word).collect())
    }
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
        let (tokens, examples) = (footer.counts.tokens as usize, footer.counts.examples as usize);
        let whole = tokens.checked_mul(4).zip(examples.checked_mul(8)).and_then(|(a, b)| a.checked_add(b));
        if footer.key != key || whole != Some(end) || crc32fast::hash(&map[..end]) != footer.crc32 {
            return Ok(None);
        }
        Ok(Some(Examples { ends_at: tokens * 4, map, counts: footer.counts, key: footer.key }))
    }

    pub fn counts(&self) -> &Counts {
        &self.counts
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

    /// Where example `i` ends, in tokens.
    fn end(&self, i: usize) -> usize {
        let at = self.ends_at + 8 * i;
        u64::from_le_bytes(std::array::from_fn(|b| self.map[at + b])) as usize
    }

    fn words(&self, i: usize) -> impl Iterator<Item = u32> {
        let begin = if i == 0 { 0 } else { self.end(i - 1) };
        let bytes = &self.map[4 * begin..4 * self.end(i)];
        bytes.chunks_exact(4).map(|b| u32::from_le_bytes(std::array::from_fn(|i| b[i])))
    }

    /// Tokens of example `i`.
    pub fn length(&self, i: usize) -> usize {
        self.end(i) - if i == 0 { 0 } else { self.end(i - 1) }
    }

    /// Example `i`.
    pub fn get(&self, i: usize) -> Encoded {
        let (ids, supervised) = self.words(i).map(|w| (w & !SUPERVISED, w & SUPERVISED != 0)).unzip();
        Encoded { ids, supervised }
    }

    /// Supervised tokens of example `i`.
    pub fn num_supervised(&self, i: usize) -> usize {
        self.words(i).filter(|w| w & SUPERVISED != 0).count()
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
