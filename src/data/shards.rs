//! Token shards: folders of memory-mapped files of token ids.
//!
//! A folder holds `shard-00000.tokens`, `shard-00001.tokens` and so on. A file, little-endian, is a header of 128
//! bytes and the ids, `u16` where the vocabulary has at most 65,536 tokens, else `u32`:
//!
//! | bytes | content |
//! | --- | --- |
//! | 0..8 | `CORRALTK` |
//! | 8..12 | format version, 1 |
//! | 12..16 | bytes per token, 2 or 4 |
//! | 16..24 | vocabulary size |
//! | 24..32 | tokens |
//! | 32..40 | documents, each ended by EOS |
//! | 40..48 | bytes of the text that was tokenized (for bits per byte) |
//! | 48..80 | SHA-256 of the tokenizer (`Tokenizer::hash`) |
//! | 80..84 | CRC-32 of the ids |
//! | 84..88 | CRC-32 of bytes 0..84 |

use super::mapped::{Mapped, Stamp};
use super::tokenizer::hex;
use crate::error::{Context, Error, Result};
use crate::files::{exists, is_dir, read_error, write_error};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

const MAGIC: &[u8; 8] = b"CORRALTK";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 128;

/// What the header of a shard says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Token ids are below this; a token has 2 bytes up to 65,536, else 4.
    pub vocab_size: u64,
    /// Tokens of the shard, those that end documents included.
    pub num_tokens: u64,
    /// Documents of the shard.
    pub num_documents: u64,
    /// Bytes of UTF-8 text behind the tokens.
    pub text_bytes: u64,
    /// SHA-256 of the tokenizer, as `Tokenizer::hash` gives it.
    pub tokenizer: [u8; 32],
    /// CRC-32 of the tokens.
    pub crc: u32,
}

impl Header {
    /// Bytes per token.
    fn width(&self) -> usize {
        if self.vocab_size <= 1 << 16 { 2 } else { 4 }
    }

    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.width() as u32).to_le_bytes());
        for (i, n) in
            [self.vocab_size, self.num_tokens, self.num_documents, self.text_bytes].iter().enumerate()
        {
            bytes[16 + 8 * i..24 + 8 * i].copy_from_slice(&n.to_le_bytes());
        }
        bytes[48..80].copy_from_slice(&self.tokenizer);
        bytes[80..84].copy_from_slice(&self.crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..84]);
        bytes[84..88].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the header of a file of these bytes and checks it against the file's size.
    fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        if !bytes.starts_with(MAGIC) {
            return Err("not a token shard (it does not begin with CORRALTK)".to_string());
        }
        if bytes.len() < HEADER_BYTES {
            return Err(format!("truncated: {} bytes, the header alone takes {HEADER_BYTES}", bytes.len()));
        }
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if u32_at(8) != VERSION {
            return Err(format!(
                "its format has version {}, this program reads version {VERSION}",
                u32_at(8)
            ));
        }
        if u32_at(84) != crc32fast::hash(&bytes[..84]) {
            return Err("corrupt: the header's checksum is wrong".to_string());
        }
        let header = Header {
            vocab_size: u64_at(16),
            num_tokens: u64_at(24),
            num_documents: u64_at(32),
            text_bytes: u64_at(40),
            tokenizer: std::array::from_fn(|i| bytes[48 + i]),
            crc: u32_at(80),
        };
        let expected = HEADER_BYTES as u128 + header.num_tokens as u128 * header.width() as u128;
        if bytes.len() as u128 != expected {
            let what = if (bytes.len() as u128) < expected { "truncated" } else { "corrupt" };
            return Err(format!("{what}: {} bytes, its header says {expected}", bytes.len()));
        }
        Ok(header)
    }
}

/// One file, mapped.
struct Shard {
    path: PathBuf,
    header: Header,
    map: Mapped,
    /// The file as it was when it was opened, or when its contents were last checked.
    known: Mutex<Stamp>,
}

fn unusable(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::data(format!("{}: {what}; make it again with `corral tokenize`", path.display()))
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let map = Mapped::open(&path)?;
        let known = map.stamp().map_err(|e| read_error(&path, &e))?;
        let header = Header::from_bytes(&map)
            .map_err(|what| crate::content::unusable(&path, unusable(&path, what)))?;
        Ok(Shard { path, header, map, known: Mutex::new(known) })
    }

    /// Appends tokens `start..end` to `out`; a file that was written to since it was checked is checked again first.
    fn read(&self, start: usize, end: usize, out: &mut Vec<i64>) -> Result<()> {
        let now = self.map.stamp().map_err(|e| read_error(&self.path, &e))?;
        if now != *self.known() {
            self.verify().context("a token shard was modified while in use")?;
        }
        self.tokens(start, end, out)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Stamp> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tokens(&self, start: usize, end: usize, out: &mut Vec<i64>) -> Result<()> {
        let width = self.header.width();
        let bytes = &self.map[HEADER_BYTES + start * width..HEADER_BYTES + end * width];
        let first = out.len();
        match width {
            2 => out.extend(bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]) as i64)),
            _ => {
                out.extend(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as i64))
            }
        }
        match out[first..].iter().position(|&id| id >= self.header.vocab_size as i64) {
            None => Ok(()),
            Some(at) => {
                let what = format!(
                    "corrupt: token {} is {}, the vocabulary has {}",
                    start + at,
                    out[first + at],
                    self.header.vocab_size
                );
                Err(unusable(&self.path, what))
            }
        }
    }

    fn verify(&self) -> Result<()> {
        // What is written from here on is seen by the next one that reads.
        let now = self.map.stamp().map_err(|e| read_error(&self.path, &e))?;
        if now.bytes != self.map.len() as u64 {
            let what = format!("corrupt: {} bytes, there were {}", now.bytes, self.map.len());
            return Err(unusable(&self.path, what));
        }
        let crc = crc32fast::hash(&self.map[HEADER_BYTES..]);
        if crc != self.header.crc {
            let what = format!(
                "corrupt: the checksum of its tokens is {crc:08x}, its header says {:08x}",
                self.header.crc
            );
            return Err(unusable(&self.path, what));
        }
        let (mut tokens, n) = (Vec::new(), self.header.num_tokens as usize);
        for start in (0..n).step_by(1 << 16) {
            tokens.clear();
            self.tokens(start, n.min(start + (1 << 16)), &mut tokens)?;
        }
        *self.known() = now;
        Ok(())
    }
}

/// A folder of shards (or a single one) as one stream of tokens.
pub struct TokenSet {
    path: PathBuf,
    shards: Vec<Arc<Shard>>,
    /// What the check of large shards has found while others are read.
    damage: Arc<OnceLock<Error>>,
    /// Where each shard begins in the stream, and at the end the number of tokens.
    starts: Vec<u64>,
}

impl std::fmt::Debug for TokenSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenSet({}, {} tokens)", self.path.display(), self.num_tokens())
    }
}

impl TokenSet {
    /// Opens a folder that `corral tokenize` wrote (its `train` or `valid`) or one shard. Checks every header and
    /// every file's size, not the contents: see `verify`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let shards = shard_files(path)?
            .into_iter()
            .map(|path| Shard::open(path).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let first = shards[0].header;
        for shard in &shards {
            if (shard.header.tokenizer, shard.header.vocab_size) != (first.tokenizer, first.vocab_size) {
                return Err(unusable(
                    &shard.path,
                    format!("made with another tokenizer than {}", shards[0].path.display()),
                ));
            }
        }
        let mut starts = vec![0];
        for shard in &shards {
            starts.push(starts[starts.len() - 1] + shard.header.num_tokens);
        }
        Ok(TokenSet { path: path.to_path_buf(), shards, damage: Arc::default(), starts })
    }

    /// The path that was opened: a shard, or a folder of shards.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of files.
    pub fn num_shards(&self) -> usize {
        self.shards.len()
    }

    /// Tokens of all shards.
    pub fn num_tokens(&self) -> u64 {
        self.starts[self.shards.len()]
    }

    /// Documents of all shards.
    pub fn num_documents(&self) -> u64 {
        self.shards.iter().map(|s| s.header.num_documents).sum()
    }

    /// Bytes of UTF-8 text behind the tokens.
    pub fn text_bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.header.text_bytes).sum()
    }

    /// Token ids are below this, in all shards.
    pub fn vocab_size(&self) -> u64 {
        self.shards[0].header.vocab_size
    }

    /// SHA-256 of the tokenizer, as `Tokenizer::hash` gives it.
    pub fn tokenizer_hash(&self) -> [u8; 32] {
        self.shards[0].header.tokenizer
    }

    /// The headers, in order.
    pub fn headers(&self) -> impl Iterator<Item = &Header> {
        self.shards.iter().map(|s| &s.header)
    }

    /// Refuses a tokenizer or a model that these tokens were not made for.
    pub fn check(&self, tokenizer_hash: Option<[u8; 32]>, vocab_size: usize) -> Result<()> {
        let (path, made_with) = (self.path.display(), self.tokenizer_hash());
        if let Some(other) = tokenizer_hash.filter(|hash| *hash != made_with) {
            return Err(Error::data(format!(
                "{path}: made with another tokenizer (SHA-256 {}...) than the one given ({}...); name the tokenizer \
                 folder that `corral tokenize` put beside it, or tokenize again",
                &hex(&made_with)[..12],
                &hex(&other)[..12]
            )));
        }
        if self.vocab_size() > vocab_size as u64 {
            return Err(Error::data(format!(
                "{path}: made with a vocabulary of {} tokens, the model has {vocab_size}",
                self.vocab_size()
            )));
        }
        Ok(())
    }

    /// Reads everything: checksums, and every id against the vocabulary.
    pub fn verify(&self) -> Result<()> {
        self.shards.iter().try_for_each(|shard| shard.verify())
    }

    /// As `verify`; but shards larger than `max_bytes` are checked once by a thread while others are read, which then fails.
    pub fn verify_by_size(&self, max_bytes: usize) -> Result<()> {
        let (small, large): (Vec<_>, Vec<_>) =
            self.shards.iter().cloned().partition(|shard| shard.map.len() <= max_bytes);
        small.iter().try_for_each(|shard| shard.verify())?;
        if large.is_empty() {
            return Ok(());
        }
        let damage = self.damage.clone();
        let check = move || {
            // The first is enough.
            let first = large.iter().find_map(|shard| shard.verify().err());
            first.into_iter().for_each(|e| drop(damage.set(e)));
        };
        let thread = std::thread::Builder::new().name("checksums".into()).spawn(check);
        thread.map(drop).context("cannot start the thread that checks token shards")
    }

    /// Appends tokens `start..end` of the stream to `out`. The error names a token beyond the vocabulary, or a
    /// range beyond the end.
    pub fn read(&self, start: u64, end: u64, out: &mut Vec<i64>) -> Result<()> {
        if end > self.num_tokens() {
            let what = format!("tokens {start}..{end} were asked for, there are {}", self.num_tokens());
            return Err(Error::failed(format!("{}: {what}", self.path.display())));
        }
        if let Some(damage) = self.damage.get() {
            return Err(damage.clone());
        }
        let mut at = start;
        let mut i = self.starts.partition_point(|s| *s <= start).saturating_sub(1);
        while at < end {
            let stop = end.min(self.starts[i + 1]);
            self.shards[i].read((at - self.starts[i]) as usize, (stop - self.starts[i]) as usize, out)?;
            (at, i) = (stop, i + 1);
        }
        Ok(())
    }
}

/// The shards of a folder in order; at least one.
fn shard_files(path: &Path) -> Result<Vec<PathBuf>> {
    let cannot = |e: std::io::Error| read_error(path, &e);
    if !is_dir(path)? {
        if path.extension().is_some_and(|e| e == "tokens") || !exists(path)? {
            std::fs::metadata(path).map_err(cannot)?;
            return Ok(vec![path.to_path_buf()]);
        }
        return Err(Error::data(format!(
            "{0} is not tokenized; run `corral tokenize --input {0} --tokenizer DIR --output DIR` and name DIR/train \
             here",
            path.display()
        )));
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(cannot)? {
        let name = entry.map_err(cannot)?.file_name().to_string_lossy().into_owned();
        if name.starts_with("shard-") && name.ends_with(".tokens") {
            names.push(name);
        }
    }
    names.sort();
    if names.is_empty() {
        let hint = match is_dir(&path.join("train"))? {
            true => format!("; did you mean {}?", path.join("train").display()),
            false => "; `corral tokenize` writes them".to_string(),
        };
        return Err(Error::data(format!(
            "{}: there are no token shards (shard-*.tokens) in it{hint}",
            path.display()
        )));
    }
    for (i, name) in names.iter().enumerate() {
        if *name != shard_name(i) {
            return Err(Error::data(format!(
                "{}: {} is missing, {name} is there",
                path.display(),
                shard_name(i)
            )));
        }
    }
    Ok(names.iter().map(|name| path.join(name)).collect())
}

fn shard_name(i: usize) -> String {
    format!("shard-{i:05}.tokens")
}

/// Writes documents into the shards of one folder; the folder is meant to get its name when all is written.
pub struct ShardWriter {
    folder: PathBuf,
    max_tokens: u64,
    vocab_size: u64,
    tokenizer: [u8; 32],
    current: Option<OpenShard>,
    finished: Vec<Header>,
}

struct OpenShard {
    path: PathBuf,
    file: BufWriter<File>,
    header: Header,
    crc: crc32fast::Hasher,
}

impl ShardWriter {
    /// A shard is closed before the document that would take it over `max_tokens`.
    pub fn new(folder: &Path, vocab_size: usize, tokenizer: [u8; 32], max_tokens: u64) -> Result<Self> {
        std::fs::create_dir_all(folder)
            .map_err(|e| Error::failed(format!("cannot write {}: {e}", folder.display())))?;
        let (folder, vocab_size) = (folder.to_path_buf(), vocab_size as u64);
        Ok(ShardWriter { folder, max_tokens, vocab_size, tokenizer, current: None, finished: Vec::new() })
    }

    /// Adds a document of `text_bytes` bytes of text, in parts, its EOS among the tokens.
    pub fn push(&mut self, parts: &[&[u32]], text_bytes: usize) -> Result<()> {
        let num_tokens: u64 = parts.iter().map(|p| p.len() as u64).sum();
        if self.current.as_ref().is_some_and(|c| c.header.num_tokens + num_tokens > self.max_tokens) {
            self.close()?;
        }
        let mut shard = match self.current.take() {
            Some(shard) => shard,
            None => self.open()?,
        };
        let cannot = |e: std::io::Error| Error::failed(format!("cannot write {}: {e}", shard.path.display()));
        for part in parts {
            if let Some(id) = part.iter().find(|id| **id as u64 >= self.vocab_size) {
                return Err(Error::failed(format!(
                    "token {id} is beyond the vocabulary of {}",
                    self.vocab_size
                )));
            }
            let bytes: Vec<u8> = match shard.header.width() {
                2 => part.iter().flat_map(|id| (*id as u16).to_le_bytes()).collect(),
                _ => part.iter().flat_map(|id| id.to_le_bytes()).collect(),
            };
            shard.crc.update(&bytes);
            shard.file.write_all(&bytes).map_err(cannot)?;
        }
        shard.header.num_tokens += num_tokens;
        shard.header.num_documents += 1;
        shard.header.text_bytes += text_bytes as u64;
        self.current = Some(shard);
        Ok(())
    }

    fn open(&self) -> Result<OpenShard> {
        let path = self.folder.join(shard_name(self.finished.len()));
        let cannot = |e| write_error(&path, &e);
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(cannot)?);
        file.write_all(&[0; HEADER_BYTES]).map_err(cannot)?;
        let (vocab_size, tokenizer) = (self.vocab_size, self.tokenizer);
        let header = Header { vocab_size, num_tokens: 0, num_documents: 0, text_bytes: 0, tokenizer, crc: 0 };
        Ok(OpenShard { path, file, header, crc: crc32fast::Hasher::new() })
    }

    fn close(&mut self) -> Result<()> {
        let Some(mut shard) = self.current.take() else { return Ok(()) };
        shard.header.crc = shard.crc.finalize();
        let finish = |file: &mut BufWriter<File>| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&shard.header.to_bytes())?;
            file.flush()?;
            file.get_ref().sync_all()
        };
        finish(&mut shard.file).map_err(|e| write_error(&shard.path, &e))?;
        self.finished.push(shard.header);
        Ok(())
    }

    /// Documents so far.
    pub fn num_documents(&self) -> u64 {
        self.finished.iter().chain(self.current.iter().map(|c| &c.header)).map(|h| h.num_documents).sum()
    }

    /// Syncs the last shard; the headers of all.
    pub fn finish(mut self) -> Result<Vec<Header>> {
        self.close()?;
        if let Ok(folder) = File::open(&self.folder) {
            folder
                .sync_all()
                .map_err(|e| Error::failed(format!("cannot write {}: {e}", self.folder.display())))?;
        }
        Ok(self.finished)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use testing::folder::TestFolder;

    /// Writes `tokens` as documents of `length` tokens.
    pub fn write(
        folder: &Path,
        tokens: &[u32],
        length: usize,
        vocab_size: usize,
        max_tokens: u64,
    ) -> Vec<Header> {
        let mut writer = ShardWriter::new(folder, vocab_size, [7; 32], max_tokens).unwrap();
        for document in tokens.chunks(length) {
            let (a, b) = document.split_at(document.len() / 2);
            writer.push(&[a, b], 2 * document.len()).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn what_is_written_is_read_in_both_widths_and_across_shards() {
        let folder = TestFolder::new("shards");
        for vocab_size in [1000, 65_536, 65_537] {
            let path = folder.0.join(vocab_size.to_string());
            let tokens: Vec<u32> = (0..1000).map(|i| (i * 7919) % vocab_size as u32).collect();
            let headers = write(&path, &tokens, 30, vocab_size, 100);
            // 34 documents of 30 tokens, the last of 10: three to a shard, and the last fits in, too.
            assert_eq!(headers.len(), 11);
            assert!(headers.iter().all(|h| h.num_tokens <= 100));
            let set = TokenSet::open(&path).unwrap();
            set.verify().unwrap();
            assert_eq!((set.num_tokens(), set.num_documents(), set.text_bytes()), (1000, 34, 2000));
            let width =
                std::fs::metadata(path.join("shard-00000.tokens")).unwrap().len() as usize - HEADER_BYTES;
            assert_eq!(width, 90 * if vocab_size > 65_536 { 4 } else { 2 });
            for (start, end) in [(0, 1000), (0, 0), (89, 91), (90, 90), (5, 500), (999, 1000), (1000, 1000)] {
                let mut out = vec![-1];
                set.read(start, end, &mut out).unwrap();
                let expected: Vec<i64> =
                    tokens[start as usize..end as usize].iter().map(|t| *t as i64).collect();
                assert_eq!((out[0], &out[1..]), (-1, &expected[..]));
            }
            assert!(set.read(999, 1001, &mut Vec::new()).is_err());
        }
    }

    #[test]
    fn damaged_shards_are_refused_with_the_reason() {
        let folder = TestFolder::new("shards-bad");
        let path = folder.0.join("shard-00000.tokens");
        write(&folder.0, &(0..100).collect::<Vec<_>>(), 10, 100, 1000);
        let whole = std::fs::read(&path).unwrap();
        let error = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let e = TokenSet::open(&folder.0).and_then(|set| set.verify()).expect_err("must be refused");
            assert!(e.exit_code() == 3 && e.message.contains("shard-00000.tokens"), "{e}");
            e.message
        };
        assert!(error(&whole[..whole.len() - 3]).contains("truncated: 325 bytes, its header says 328"));
        assert!(error(&whole[..50]).contains("truncated: 50 bytes, the header alone takes 128"));
        assert!(error(b"").contains("not a token shard"));
        assert!(error(b"{\"text\": 1}").contains("not a token shard"));
        let changed = |at: usize, to: u8| {
            let mut bytes = whole.clone();
            bytes[at] = to;
            bytes
        };
        assert!(error(&changed(8, 2)).contains("version 2, this program reads version 1"));
        assert!(error(&changed(25, 1)).contains("header's checksum is wrong"));
        assert!(error(&changed(HEADER_BYTES + 5, 99)).contains("checksum of its tokens"));
        assert!(error(&[&whole[..], &[0]].concat()).contains("corrupt: 329 bytes"));
        // A token beyond the vocabulary is found by whoever reads it, with no checksum computed.
        std::fs::write(&path, changed(HEADER_BYTES + 20, 100)).unwrap();
        let e = TokenSet::open(&folder.0).unwrap().read(8, 12, &mut Vec::new()).err().unwrap();
        assert!(e.message.contains("token 10 is 100, the vocabulary has 100"), "{e}");
        std::fs::write(&path, &whole).unwrap();
        TokenSet::open(&path).unwrap().verify().unwrap();
    }

    /// While it is open: overwritten with ids that are valid, shortened, written again as it was.
    #[test]
    fn a_shard_that_is_written_to_while_it_is_read_is_refused() {
        let folder = TestFolder::new("shards-changed");
        let path = folder.0.join("shard-00000.tokens");
        write(&folder.0, &(0..100).collect::<Vec<_>>(), 10, 100, 1000);
        let whole = std::fs::read(&path).unwrap();
        let set = TokenSet::open(&folder.0).unwrap();
        set.verify().unwrap();
        let read = || set.read(50, 60, &mut Vec::new());
        read().unwrap();
        let mut other = whole.clone();
        other[HEADER_BYTES + 2 * 50] = 7;
        std::fs::write(&path, &other).unwrap();
        let e = read().unwrap_err();
        assert!(e.exit_code() == 3 && e.message.contains("shard-00000.tokens: corrupt: the checksum"), "{e}");
        std::fs::write(&path, &whole).unwrap();
        read().unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(200).unwrap();
        let e = read().unwrap_err();
        assert!(e.exit_code() == 3 && e.message.contains("200 bytes, there were 328"), "{e}");
    }

    #[test]
    fn large_shards_are_checked_while_others_are_read() {
        let folder = TestFolder::new("shards-large");
        let path = folder.0.join("shard-00001.tokens");
        write(&folder.0, &(0..100).collect::<Vec<_>>(), 10, 100, 50);
        let mut other = std::fs::read(&path).unwrap();
        other[HEADER_BYTES] = 7;
        std::fs::write(&path, &other).unwrap();
        let set = TokenSet::open(&folder.0).unwrap();
        set.verify_by_size(100).unwrap();
        let begun = std::time::Instant::now();
        let e = loop {
            match set.read(0, 10, &mut Vec::new()) {
                Err(e) => break e,
                Ok(()) => assert!(begun.elapsed().as_secs() < 20, "nothing was found"),
            }
        };
        assert!(e.message.contains("shard-00001.tokens: corrupt: the checksum"), "{e}");
    }

    #[test]
    fn other_tokenizers_models_and_folders_are_refused() {
        let folder = TestFolder::new("shards-other");
        let train = folder.0.join("train");
        write(&train, &(0..100).collect::<Vec<_>>(), 10, 100, 40);
        let set = TokenSet::open(&train).unwrap();
        set.check(Some([7; 32]), 100).unwrap();
        set.check(None, 128).unwrap();
        let message = |r: Result<()>| r.err().unwrap().message;
        assert!(
            message(set.check(Some([8; 32]), 100))
                .contains("(SHA-256 070707070707...) than the one given (080808")
        );
        assert!(message(set.check(None, 99)).contains("vocabulary of 100 tokens, the model has 99"));
        let open = |path: &Path| message(TokenSet::open(path).map(drop));
        assert!(open(&folder.0).contains("did you mean"));
        let text = folder.file("a.txt", "text");
        assert!(open(&text).contains("is not tokenized; run `corral tokenize --input"));
        assert!(open(&folder.0.join("nowhere")).contains("No such file"));
        std::fs::remove_file(train.join("shard-00001.tokens")).unwrap();
        assert!(open(&train).contains("shard-00001.tokens is missing, shard-00002.tokens is there"));
    }
}
