//! Files of `torch.save`: zip archives (torch 1.6 and later) with a pickle that describes tensors and an entry for each
//! storage, neither compressed. Like safetensors they are read with positioned reads, and only where asked for.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tch::{Kind, Tensor};
use zip::result::ZipError;
use zip::write::{SimpleFileOptions, StreamWriter, ZipWriter};
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{self, Foreign, Pickle, PickleNode, Pickled, TensorRef};
use super::safetensors::TensorEntry;
use super::source::{TensorFile, for_chunks};
use crate::content::unusable;
use crate::error::{Error, Result};
use crate::files::{AtomicFile, read_error, write_error};

/// What files begin with that torch wrote before 1.6: the pickle of a magic number.
const OLD_MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// Data of storages begins at a multiple of this, so that `torch.load(mmap=True)` can map it.
const ALIGNMENT: u16 = 64;

/// Where a tensor's elements lie.
#[derive(PartialEq)]
struct StorageSpan {
    kind: Kind,
    /// Byte of the file that the first element begins at.
    start: u64,
    shape: Vec<i64>,
    stride: Vec<i64>,
}

/// A torch file whose tensors were checked: every element lies within its storage, every storage within the file.
pub struct TorchReader {
    path: PathBuf,
    file: Arc<File>,
    names: Vec<String>,
    places: HashMap<String, StorageSpan>,
}

/// First byte and length of a part of a file.
type ByteRange = (u64, u64);

fn refused(why: &str) -> String {
    format!("its pickle is refused: {why}")
}

/// A part of a file, read as a file of its own.
struct SubFile {
    file: Arc<File>,
    start: u64,
    len: u64,
    at: u64,
}

impl Read for SubFile {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let left = self.len.saturating_sub(self.at).min(to.len() as u64);
        if left == 0 {
            return Ok(0);
        }
        let n = self.file.read_at(&mut to[..left as usize], self.start + self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for SubFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

impl TorchReader {
    /// Opens the file, reads its pickle and checks what it says against the archive.
    ///
    /// Errors (kind Data) name the file: damaged or compressed archives, archives of older torch, pickles that hold or
    /// import anything but tensors and containers.
    pub fn open(path: &Path) -> Result<TorchReader> {
        let tensors =
            |pickle: &[u8]| pickle::state_dict(pickle).map(|tensors| (tensors, ())).map_err(|e| refused(&e));
        TorchReader::open_by(path, tensors).map(|(reader, ())| reader)
    }

    /// [`TorchReader::open`] of a file that holds other things, too: `find` names its tensors and tells what else is of use, or says
    /// what is wrong.
    pub fn open_with<T>(
        path: &Path,
        find: impl FnOnce(PickleNode) -> Result<(Vec<(String, TensorRef)>, T), String>,
    ) -> Result<(TorchReader, T)> {
        TorchReader::open_by(path, |pickle| {
            find(Pickle::read(pickle, Foreign::Kept).map_err(|e| refused(&e))?.top())
        })
    }

    fn open_by<T>(
        path: &Path,
        read_pickle: impl FnOnce(&[u8]) -> Result<(Vec<(String, TensorRef)>, T), String>,
    ) -> Result<(TorchReader, T)> {
        let file = File::open(path).map_err(|e| read_error(path, &e))?;
        let len = file.metadata().map_err(|e| read_error(path, &e))?.len();
        TorchReader::open_part(path, SubFile { file: Arc::new(file), start: 0, len, at: 0 }, read_pickle)
    }

    /// [`TorchReader::open_with`] of a part of the open file `path`: `len` bytes from `start` on are a file of their own.
    pub fn of_part<T>(
        path: &Path,
        file: Arc<File>,
        (start, len): ByteRange,
        find: impl FnOnce(PickleNode) -> Result<(Vec<(String, TensorRef)>, T), String>,
    ) -> Result<(TorchReader, T)> {
        let size = file.metadata().map_err(|e| read_error(path, &e))?.len();
        if start.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::data(format!(
                "{}: it has {size} bytes; {len} from byte {start} on belong to a tensor: get it again",
                path.display()
            )));
        }
        let part = SubFile { file, start, len, at: 0 };
        TorchReader::open_part(path, part, |pickle| {
            find(Pickle::read(pickle, Foreign::Kept).map_err(|e| refused(&e))?.top())
        })
    }

    fn open_part<T>(
        path: &Path,
        part: SubFile,
        read_pickle: impl FnOnce(&[u8]) -> Result<(Vec<(String, TensorRef)>, T), String>,
    ) -> Result<(TorchReader, T)> {
        let file = part.file.clone();
        let damaged = |what: String| Error::data(format!("{}: {what}", path.display()));
        let mut magic = [0; OLD_MAGIC.len()];
        let len = file.read_at(&mut magic, part.start).map_err(|e| read_error(path, &e))?;
        if magic == OLD_MAGIC {
            return Err(damaged(
                "in the format of torch before version 1.6, which is not supported; load it with Python's torch.load and save \
                 it again"
                    .into(),
            ));
        }
        if !magic[..len].starts_with(b"PK") {
            let e = damaged("not a file of torch.save: it is not a zip archive; get it again".into());
            return Err(unusable(path, e));
        }
        let entries =
            entries(part).map_err(|e| damaged(format!("{e}; the file is damaged: get it again")))?;
        let mut pickles = entries.keys().filter_map(|name| name.strip_suffix("data.pkl"));
        let prefix = match (pickles.next(), pickles.next()) {
            (Some(prefix), None) if prefix.is_empty() || prefix.ends_with('/') => prefix,
            _ => {
                return Err(damaged(
                    "not a file of torch.save: the archive does not have one data.pkl".into(),
                ));
            }
        };
        let read = |(start, len): ByteRange| {
            let mut bytes = vec![0; len as usize];
            file.read_exact_at(&mut bytes, start).map_err(|e| read_error(path, &e)).map(|()| bytes)
        };
        if let Some(range) = entries.get(&format!("{prefix}byteorder"))
            && range.1 <= 16
            && read(*range)? != b"little"
        {
            return Err(damaged("its numbers are not little-endian".into()));
        }
        let pickle = read(entries[&format!("{prefix}data.pkl")])?;
        let (tensors, more) = read_pickle(&pickle).map_err(damaged)?;
        let (mut names, mut places) = (Vec::with_capacity(tensors.len()), HashMap::new());
        for (name, tensor) in tensors {
            let place = entries
                .get(&format!("{prefix}data/{}", tensor.storage))
                .ok_or_else(|| format!("there is no storage {}", tensor.storage))
                .and_then(|storage| StorageSpan::of(tensor, *storage))
                .map_err(|e| damaged(format!("tensor `{name}`: {e}; the file is damaged: get it again")))?;
            if places.insert(name.clone(), place).is_none() {
                names.push(name);
            }
        }
        Ok((TorchReader { path: path.to_path_buf(), file, names, places }, more))
    }

    /// Name, dtype and shape of every tensor, of any dtype, in the file's order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Kind, &[i64])> {
        self.names.iter().map(|name| {
            let place = &self.places[name];
            (name.as_str(), place.kind, place.shape.as_slice())
        })
    }

    fn place(&self, name: &str) -> Result<&StorageSpan> {
        self.places
            .get(name)
            .ok_or_else(|| Error::data(format!("{}: there is no tensor `{name}`", self.path.display())))
    }
}

/// The entries of the archive by name, after checking that they lie within the file, as they are, and apart.
fn entries(part: SubFile) -> Result<HashMap<String, ByteRange>, String> {
    let describe = |e: ZipError| e.to_string();
    let (first, size) = (part.start, part.len);
    let mut archive = ZipArchive::new(BufReader::new(part)).map_err(describe)?;
    if archive.has_overlapping_entries().map_err(describe)? {
        return Err("entries of the archive overlap".into());
    }
    let mut entries = HashMap::with_capacity(archive.len());
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(describe)?;
        let name = entry.name().map_err(describe)?.to_string();
        if entry.compression() != CompressionMethod::Stored || entry.size() != entry.compressed_size() {
            return Err(format!("entry `{name}` is compressed, which torch never does"));
        }
        if entry.encrypted() {
            return Err(format!("entry `{name}` is encrypted"));
        }
        let start = entry.data_start().ok_or_else(|| format!("entry `{name}` has no data"))?;
        if start.checked_add(entry.size()).is_none_or(|end| end > size) {
            return Err(format!("entry `{name}` ends beyond the end of the file"));
        }
        entries.insert(name, (first + start, entry.size()));
    }
    Ok(entries)
}

impl StorageSpan {
    /// Checks that a tensor's elements lie within its storage, which takes `bytes` of the file from `start` on.
    fn of(tensor: TensorRef, (start, bytes): ByteRange) -> Result<StorageSpan, String> {
        let element = tensor.kind.elt_size_in_bytes() as i64;
        if tensor.storage_len.checked_mul(element) != i64::try_from(bytes).ok() {
            return Err(format!(
                "its storage should have {} elements and has {bytes} bytes",
                tensor.storage_len
            ));
        }
        if tensor.shape.len() != tensor.stride.len()
            || tensor.shape.iter().chain(&tensor.stride).any(|d| *d < 0)
        {
            return Err(format!("shape {:?} with strides {:?}", tensor.shape, tensor.stride));
        }
        let numel = tensor.shape.iter().try_fold(1i64, |n, d| n.checked_mul(*d));
        let last = tensor.shape.iter().zip(&tensor.stride).try_fold(tensor.offset, |last, (d, stride)| {
            last.checked_add((d - 1).max(0).checked_mul(*stride)?)
        });
        let fits = match (numel, last) {
            (Some(0), _) => true,
            // A view that repeats elements, as of `expand`, is larger than what it lies in.
            (Some(numel), Some(last)) => {
                tensor.offset >= 0 && last < tensor.storage_len && numel <= tensor.storage_len
            }
            _ => false,
        };
        if !fits {
            return Err(format!(
                "shape {:?}, strides {:?} and offset {} do not fit into its storage of {} elements",
                tensor.shape, tensor.stride, tensor.offset, tensor.storage_len
            ));
        }
        let start = if numel == Some(0) { start } else { start + (tensor.offset * element) as u64 };
        Ok(StorageSpan { kind: tensor.kind, start, shape: tensor.shape, stride: tensor.stride })
    }

    /// Elements that lie one after the other, from every multiple of this number on.
    fn run(&self) -> i64 {
        let mut run = 1;
        for (d, stride) in self.shape.iter().zip(&self.stride).rev() {
            if *d != 1 && *stride != run {
                break;
            }
            run = run.saturating_mul(*d);
        }
        run
    }

    /// The element of the storage, counted from the tensor's first, of element `i` of the flattened tensor.
    fn element(&self, mut i: i64) -> i64 {
        let mut element = 0;
        for (d, stride) in self.shape.iter().zip(&self.stride).rev() {
            element += i % d * stride;
            i /= d;
        }
        element
    }
}

impl TensorFile for TorchReader {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<String> {
        self.names.clone()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        let place = self.place(name)?;
        match place.kind {
            Kind::Double | Kind::Float | Kind::BFloat16 | Kind::Half => Ok((place.shape.clone(), place.kind)),
            other => Err(Error::data(format!(
                "{}: tensor `{name}` has dtype {other:?}; float64, float32, bfloat16 and float16 can be read",
                self.path.display(),
            ))),
        }
    }

    fn is_one_tensor(&self, a: &str, b: &str) -> bool {
        self.places.get(a).is_some_and(|a| self.places.get(b) == Some(a))
    }

    /// One read for every run of elements that lie together: a single one for all tensors but views of others, an
    /// element a time for a transposed one.
    fn read_bytes(&self, name: &str, first: i64, to: &mut [u8]) -> Result<()> {
        let place = self.place(name)?;
        let element = place.kind.elt_size_in_bytes();
        let (run, numel) = (place.run(), place.shape.iter().product::<i64>());
        let (mut at, end) = (first, first + (to.len() / element) as i64);
        if first < 0 || end > numel {
            return Err(Error::failed(format!("{}: `{name}` is shorter", self.path.display())));
        }
        let mut rest = to;
        while at < end {
            let n = (run - at % run).min(end - at);
            let (part, later) = rest.split_at_mut(n as usize * element);
            let start = place.start + (place.element(at) * element as i64) as u64;
            self.file.read_exact_at(part, start).map_err(|e| read_error(&self.path, &e))?;
            (at, rest) = (at + n, later);
        }
        Ok(())
    }
}

/// Writes a torch file tensor by tensor, under a temporary name until it is complete and on the disk. Python reads it with
/// `torch.load(weights_only=True)`, also with `mmap=True`.
pub struct TorchWriter<W: Write = AtomicFile> {
    path: PathBuf,
    zip: ZipWriter<StreamWriter<W>>,
    /// The folder in the archive: the file's name, as torch has it.
    prefix: String,
    missing: VecDeque<TensorEntry>,
    written: usize,
    crc: crc32fast::Hasher,
}

impl TorchWriter {
    /// Starts a file with a dictionary of `entries`, whose values must follow in this order.
    pub fn create(path: &Path, entries: &[TensorEntry]) -> Result<TorchWriter> {
        let tensor = |e: &TensorEntry| Pickled::Tensor { kind: e.kind, shape: e.shape.clone() };
        let state_dict = Pickled::dict(entries.iter().map(|e| (e.name.as_str(), tensor(e))));
        TorchWriter::create_with(path, &state_dict, entries)
    }

    /// Starts a file with any value, whose tensors are `entries` in this order.
    pub fn create_with(path: &Path, value: &Pickled, entries: &[TensorEntry]) -> Result<TorchWriter> {
        let prefix = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        TorchWriter::begin(path, &prefix, AtomicFile::create(path)?, value, entries)
    }

    /// Brings the file to the disk and gives it its name.
    pub fn finish(self) -> Result<()> {
        self.end()?.commit()
    }
}

impl<W: Write> TorchWriter<W> {
    /// Starts the bytes of a file in `out`, which belongs to the file `path`; `prefix`: the folder in the archive.
    pub fn begin(
        path: &Path,
        prefix: &str,
        out: W,
        value: &Pickled,
        entries: &[TensorEntry],
    ) -> Result<TorchWriter<W>> {
        let pickle = value.write().map_err(|e| Error::failed(format!("{}: {e}", path.display())))?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&pickle);
        let mut writer = TorchWriter {
            path: path.to_path_buf(),
            zip: ZipWriter::new_stream(out),
            prefix: prefix.to_string(),
            missing: entries.iter().cloned().collect(),
            written: 0,
            crc,
        };
        writer.entry("data.pkl", &pickle)?;
        writer.entry("byteorder", b"little")?;
        Ok(writer)
    }

    fn start(&mut self, name: &str, bytes: u64) -> Result<()> {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .with_alignment(ALIGNMENT)
            .large_file(bytes > u64::from(u32::MAX));
        let name = format!("{}/{name}", self.prefix);
        self.zip.start_file(name, options).map_err(|e| cannot_write(&self.path, e))
    }

    fn entry(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.start(name, bytes.len() as u64)?;
        self.zip.write_all(bytes).map_err(|e| write_error(&self.path, &e))
    }

    /// Writes the next tensor (any device and floating-point dtype; its shape, or flat), converted to the dtype that
    /// was said.
    pub fn write(&mut self, t: &Tensor) -> Result<()> {
        let Some(entry) = self.missing.pop_front() else {
            return Err(Error::failed(format!("{}: more tensors than announced", self.path.display())));
        };
        entry.check(t, &self.path)?;
        self.start(&format!("data/{}", self.written), entry.bytes())?;
        self.written += 1;
        for_chunks(t, entry.kind, |bytes| {
            self.crc.update(bytes);
            self.zip.write_all(bytes).map_err(|e| write_error(&self.path, &e))
        })
    }

    /// Ends the archive.
    pub fn end(mut self) -> Result<W> {
        if let Some(entry) = self.missing.front() {
            return Err(Error::failed(format!("{}: `{}` was not written", self.path.display(), entry.name)));
        }
        self.entry("version", b"3\n")?;
        // torch's own is a hash of names and contents, 40 digits long; so is this one.
        let id = format!("{:020}{:020}", self.written, self.crc.clone().finalize());
        self.entry(".data/serialization_id", id.as_bytes())?;
        let out = self.zip.finish().map_err(|e| cannot_write(&self.path, e))?;
        Ok(out.into_inner())
    }
}

fn cannot_write(path: &Path, e: ZipError) -> Error {
    match e {
        ZipError::Io(e) => write_error(path, &e),
        other => Error::failed(format!("cannot write {}: {other}", path.display())),
    }
}
