//! GGUF files, llama.cpp's format (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>): metadata, a table of
//! tensors, and the tensors' data. What the metadata means is up to those who read it: `checkpoint/gguf` the model,
//! `data/tokenizer/gguf.rs` the tokenizer.

mod dtype;
mod metadata;
mod write;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::content::unusable;
use crate::error::{Context, Error, Result};
use crate::files::{is_file, read_error};

pub use dtype::GgufDtype;
use metadata::Cursor;
pub use metadata::{Metadata, MetadataArray, MetadataValue};
pub use write::GgufWriter;

const MAGIC: &[u8; 4] = b"GGUF";
/// Version 1 had counts of 32 bits; 2 and 3 differ in nothing but that 3 may be big-endian.
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;
/// What tensors' data is aligned to, where the metadata does not say it.
const ALIGNMENT: u64 = 32;
/// ggml's own limit.
const MAX_DIMS: u32 = 4;

/// A tensor in the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Info {
    /// As ggml names it, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// How its elements are stored.
    pub dtype: GgufDtype,
    /// Slowest dimension first (the file has them the other way round).
    pub shape: Vec<i64>,
    /// Where its data begins in the file.
    at: u64,
}

impl Info {
    /// The number of elements.
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }
}

/// A GGUF file whose header was checked: every tensor lies within the file, one after the other.
pub struct Gguf {
    path: PathBuf,
    file: File,
    /// All keys of the header, with their values.
    pub metadata: Metadata,
    tensors: Vec<Info>,
}

impl Gguf {
    /// Opens a file and checks its header. No data of tensors is read.
    ///
    /// # Errors
    /// Of kind Data, with the file's name: a version or a tensor's type that is not built, and a file that is damaged.
    pub fn open(path: &Path) -> Result<Gguf> {
        let file = File::open(path).map_err(|e| read_error(path, &e))?;
        let size = file.metadata().map_err(|e| read_error(path, &e))?.len();
        let (metadata, tensors) =
            read_header(&file, size).map_err(|e| unusable(path, e.context(path.display())))?;
        Ok(Gguf { path: path.to_path_buf(), file, metadata, tensors })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// In the order of the table.
    pub fn tensors(&self) -> &[Info] {
        &self.tensors
    }

    /// Fills `to` with blocks `first..` of a tensor: as many as it has room for.
    pub fn read_blocks(&self, tensor: &Info, first: u64, to: &mut [u8]) -> Result<()> {
        let at = tensor.at + first * tensor.dtype.block_bytes() as u64;
        self.file.read_exact_at(to, at).map_err(|e| read_error(&self.path, &e))
    }
}

/// Whether a path has the ending of these files.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

/// The files of a model of which this one is named: itself, or all of `NAME-00001-of-0000N.gguf`.
///
/// # Errors
/// Of kind Data: a part that is not the first, or of which others are missing.
pub fn parts(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((stem, part, count)) = part_of(name) else { return Ok(vec![path.to_path_buf()]) };
    let named = |i: usize| path.with_file_name(part_name(stem, i, count));
    if part != 1 {
        let first = named(1);
        return Err(Error::data(format!(
            "{}: part {part} of {count}; name the first, {}",
            path.display(),
            first.display()
        )));
    }
    for i in 1..=count {
        if !is_file(&named(i))? {
            return Err(Error::data(format!(
                "{} is missing, a part of {}",
                named(i).display(),
                path.display()
            )));
        }
    }
    Ok((1..=count).map(named).collect())
}

/// The models in a folder: its GGUF files, and of those in parts the first.
pub fn models_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|e| read_error(folder, &e))?;
    let paths = entries.map(|entry| entry.map(|e| e.path()).map_err(|e| read_error(folder, &e)));
    let mut models = paths.collect::<Result<Vec<_>>>()?;
    let later = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        part_of(name).is_some_and(|(_, part, _)| part > 1)
    };
    models.retain(|path| is_gguf(path) && !later(path));
    models.sort();
    Ok(models)
}

/// The name of part `part` of `count`, counted from 1.
fn part_name(stem: &str, part: usize, count: usize) -> String {
    format!("{stem}-{part:05}-of-{count:05}.gguf")
}

/// The stem, the number and the count of a file that is named as a part.
fn part_of(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let number = |text: &str| (text.len() == 5).then(|| text.parse().ok()).flatten();
    let (part, count) = (number(part)?, number(count)?);
    (1 <= part && part <= count).then_some((stem, part, count))
}

fn damaged(what: impl std::fmt::Display) -> Error {
    Error::data(format!("{what}; the file is damaged or incompletely downloaded: get it again"))
}

/// What lies before the tensors' data.
fn read_header(file: &File, size: u64) -> Result<(Metadata, Vec<Info>)> {
    let mut cursor = Cursor::new(file, size);
    if cursor.bytes(4).map_err(|_| damaged("not a GGUF file: too short"))? != MAGIC {
        return Err(damaged("not a GGUF file: it does not begin with `GGUF`"));
    }
    let version = cursor.u32()?;
    if VERSIONS.contains(&version.swap_bytes()) {
        return Err(Error::data(
            "a big-endian GGUF file, which is not built; convert it with llama.cpp's gguf_convert_endian.py",
        ));
    }
    if !VERSIONS.contains(&version) {
        return Err(Error::data(format!(
            "version {version} of GGUF is not known, only 2 and 3; convert the model again with a current llama.cpp"
        )));
    }
    let (num_tensors, num_keys) = (cursor.u64()?, cursor.u64()?);
    let metadata = Metadata::read(&mut cursor, num_keys)?;
    let alignment = match metadata.integer("general.alignment")? {
        None => ALIGNMENT,
        Some(n) if n > 0 && n <= 1 << 20 && (n as u64).is_power_of_two() => n as u64,
        Some(n) => return Err(Error::data(format!("general.alignment is {n}; it must be a power of 2"))),
    };
    // Name, number of dimensions, type and offset of each take 24 bytes at least.
    let mut tensors = Vec::with_capacity(cursor.count(num_tensors, 24, "tensors")?);
    let (mut names, mut end) = (BTreeSet::new(), 0u64);
    for _ in 0..num_tensors {
        let (info, bytes) = read_info(&mut cursor)?;
        if !names.insert(info.name.clone()) {
            return Err(Error::data(format!("the tensor `{}` appears twice", info.name)));
        }
        if info.at != end {
            return Err(damaged(format!(
                "the tensor `{}` begins at {}, but should begin at {end}",
                info.name, info.at
            )));
        }
        let padded = end.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(alignment));
        end = padded.ok_or_else(|| damaged(format!("the tensor `{}` is too large", info.name)))?;
        tensors.push(info);
    }
    let data = cursor.position().next_multiple_of(alignment);
    for info in &mut tensors {
        info.at += data;
    }
    // The last tensor's padding may be left out.
    let needed = tensors.last().map_or(0, |t| t.at + t.dtype.bytes(t.numel()));
    if needed > size {
        return Err(damaged(format!("it has {size} bytes, but its tensors end at {needed}")));
    }
    Ok((metadata, tensors))
}

/// A row of the table of tensors, with `at` counted from the beginning of the data, and the bytes that it takes.
fn read_info(cursor: &mut Cursor) -> Result<(Info, u64)> {
    let name = cursor.text()?;
    let read = |cursor: &mut Cursor| -> Result<(Info, u64)> {
        let num_dims = cursor.u32()?;
        if num_dims > MAX_DIMS {
            return Err(damaged(format!("{num_dims} dimensions, more than {MAX_DIMS}")));
        }
        let mut shape = Vec::with_capacity(num_dims as usize);
        let mut numel = 1i64;
        for _ in 0..num_dims {
            let dim = i64::try_from(cursor.u64()?).ok().filter(|d| *d >= 0);
            let product = dim.and_then(|d| Some((d, numel.checked_mul(d)?)));
            let (dim, product) = product.ok_or_else(|| damaged("its dimensions are too large"))?;
            (numel, shape) = (product, [vec![dim], shape].concat());
        }
        let dtype = GgufDtype::of_id(cursor.u32()?)?;
        let row = shape.last().copied().unwrap_or(1);
        if row % dtype.block_len() as i64 != 0 {
            return Err(damaged(format!(
                "rows of {row} elements are no blocks of {} of {dtype}",
                dtype.block_len()
            )));
        }
        let bytes = (numel as u64 / dtype.block_len() as u64).checked_mul(dtype.block_bytes() as u64);
        let bytes = bytes.ok_or_else(|| damaged("it is too large"))?;
        Ok((Info { name: name.clone(), dtype, shape, at: cursor.u64()? }, bytes))
    };
    read(cursor).with_context(|| format!("tensor `{name}`"))
}
