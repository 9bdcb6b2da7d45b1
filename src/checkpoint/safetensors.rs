//! Safetensors files: strict reading of parts of tensors, and streamed writing.
//!
//! Files are read with positioned reads instead of a memory map: a rank touches only what it asks for either way, pages
//! of the file do not count as memory of the process, and a file that is cut while in use is an error, not a SIGBUS.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use tch::{Kind, Tensor};

use super::source::{TensorFile, fill_chunks, for_chunks};
use crate::content::unusable;
use crate::error::{Context, Error, Result};
use crate::files::{AtomicFile, read_error};

/// The header of a sane file is far below this (the format's own limit).
const MAX_HEADER: u64 = 100_000_000;

/// A safetensors file whose header was checked: every tensor lies within the file, sizes fit shapes and dtypes, and the
/// tensors cover the file without gaps or overlaps.
pub struct SafetensorsReader {
    path: PathBuf,
    file: File,
    /// Where the tensors' data starts.
    data: u64,
    header: Metadata,
}

impl SafetensorsReader {
    /// Opens the file and checks its header.
    ///
    /// Errors (kind Data) name the file, and the tensor where there is one.
    pub fn open(path: &Path) -> Result<SafetensorsReader> {
        let file = File::open(path).map_err(|e| read_error(path, &e))?;
        let size = file.metadata().map_err(|e| read_error(path, &e))?.len();
        let damaged = |what: String| {
            let what = format!("{what}; the file is damaged or not a safetensors file: get it again");
            unusable(path, Error::data(format!("{}: {what}", path.display())))
        };
        let mut length = [0; 8];
        if size < 8 {
            return Err(damaged(format!("only {size} bytes")));
        }
        file.read_exact_at(&mut length, 0).map_err(|e| read_error(path, &e))?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER || length > size - 8 {
            return Err(damaged(format!("its header should have {length} bytes, the file has {size}")));
        }
        let mut text = vec![0; length as usize];
        file.read_exact_at(&mut text, 8).map_err(|e| read_error(path, &e))?;
        let header: Metadata =
            serde_json::from_slice(&text).map_err(|e| damaged(format!("header not usable: {e}")))?;
        let data = 8 + length;
        let end = data + header.data_len() as u64;
        if end != size {
            return Err(damaged(format!("it has {size} bytes, its header describes {end}")));
        }
        Ok(SafetensorsReader { path: path.to_path_buf(), file, data, header })
    }

    /// Name, dtype, shape and bytes of every tensor, of any dtype, in the order of the data.
    pub fn tensors(&self) -> Vec<(String, Dtype, Vec<usize>, u64)> {
        let names = self.header.offset_keys().into_iter();
        names
            .filter_map(|name| {
                let info = self.header.info(&name)?;
                let bytes = (info.data_offsets.1 - info.data_offsets.0) as u64;
                Some((name, info.dtype, info.shape.clone(), bytes))
            })
            .collect()
    }

    /// The text that the file carries beside its tensors.
    pub fn metadata(&self) -> HashMap<String, String> {
        self.header.metadata().clone().unwrap_or_default()
    }

    fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.header
            .info(name)
            .ok_or_else(|| Error::data(format!("{}: there is no tensor `{name}`", self.path.display())))
    }

    /// Fills `dst` (floating-point `[n]`, any device) with elements `first..first + n` of the flattened tensor, converted
    /// to `dst`'s dtype a few megabytes at a time.
    pub fn read(&self, name: &str, first: i64, dst: &Tensor) -> Result<()> {
        let (shape, kind) = self.info(name)?;
        let (len, numel) = (dst.numel() as i64, shape.iter().product::<i64>());
        if first < 0 || first + len > numel {
            return Err(Error::data(format!(
                "{}: tensor `{name}` has {numel} elements, wanted {first} to {}",
                self.path.display(),
                first + len
            )));
        }
        fill_chunks(dst, kind, |at, bytes| self.read_bytes(name, first + at, bytes))
            .with_context(|| format!("{}: tensor `{name}`", self.path.display()))
    }
}

impl TensorFile for SafetensorsReader {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        let info = self.tensor(name)?;
        let kind = float_kind(info.dtype).ok_or_else(|| {
            Error::data(format!(
                "{}: tensor `{name}` has dtype {:?}; F64, F32, BF16 and F16 can be read",
                self.path.display(),
                info.dtype
            ))
        })?;
        Ok((info.shape.iter().map(|&d| d as i64).collect(), kind))
    }

    fn read_bytes(&self, name: &str, first: i64, to: &mut [u8]) -> Result<()> {
        let info = self.tensor(name)?;
        let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        let at = start + first as u64 * info.dtype.bitsize() as u64 / 8;
        if at + to.len() as u64 > end {
            return Err(Error::failed(format!("{}: `{name}` is shorter", self.path.display())));
        }
        self.file.read_exact_at(to, self.data + at).map_err(|e| read_error(&self.path, &e))
    }
}

/// A tensor that a file will hold.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorEntry {
    /// The name under which readers find it.
    pub name: String,
    /// The dtype in the file.
    pub kind: Kind,
    /// From the outermost dimension; elements lie in row-major order.
    pub shape: Vec<i64>,
}

impl TensorEntry {
    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64 * self.kind.elt_size_in_bytes() as u64
    }

    /// Refuses a tensor with another number of elements.
    pub(super) fn check(&self, t: &Tensor, path: &Path) -> Result<()> {
        match t.numel() as i64 == self.shape.iter().product::<i64>() {
            true => Ok(()),
            false => {
                let (path, size) = (path.display(), t.size());
                Err(Error::failed(format!(
                    "{path}: `{}` should be {:?}, not {size:?}",
                    self.name, self.shape
                )))
            }
        }
    }
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the whole file.
    pub bytes: u64,
    /// CRC-32 of the whole file.
    pub crc32: u32,
}

/// Writes a safetensors file tensor by tensor, under a temporary name until it is complete and on the disk.
pub struct SafetensorsWriter {
    path: PathBuf,
    out: AtomicFile,
    missing: VecDeque<TensorEntry>,
    crc: crc32fast::Hasher,
    bytes: u64,
}

impl SafetensorsWriter {
    /// Starts a file that will hold `entries`, which must follow in this order. Its metadata says `format: pt`, which
    /// transformers asks for.
    pub fn create(path: &Path, entries: &[TensorEntry]) -> Result<SafetensorsWriter> {
        let mut end = 0;
        let mut infos = Vec::with_capacity(entries.len());
        for entry in entries {
            let dtype = match entry.kind {
                Kind::Double => Dtype::F64,
                Kind::Float => Dtype::F32,
                Kind::BFloat16 => Dtype::BF16,
                Kind::Half => Dtype::F16,
                Kind::Uint8 => Dtype::U8,
                other => return Err(Error::failed(format!("`{}`: cannot write {other:?}", entry.name))),
            };
            let start = end;
            end += entry.bytes() as usize;
            let shape = entry.shape.iter().map(|&d| d as usize).collect();
            infos.push((entry.name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) }));
        }
        let describe = |e: &dyn std::fmt::Display| Error::failed(format!("{}: {e}", path.display()));
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let header = Metadata::new(Some(metadata), infos).map_err(|e| describe(&e))?;
        let mut header = serde_json::to_vec(&header).map_err(|e| describe(&e))?;
        header.resize(header.len().next_multiple_of(8), b' ');

        let mut writer = SafetensorsWriter {
            path: path.to_path_buf(),
            out: AtomicFile::create(path)?,
            missing: entries.iter().cloned().collect(),
            crc: crc32fast::Hasher::new(),
            bytes: 0,
        };
        writer.put(&(header.len() as u64).to_le_bytes())?;
        writer.put(&header)?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.put(bytes)?;
        self.crc.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Writes the next tensor (any device and floating-point dtype; its shape, or flat), converted to the dtype that
    /// was said.
    pub fn write(&mut self, t: &Tensor) -> Result<()> {
        let Some(entry) = self.missing.pop_front() else {
            return Err(Error::failed(format!("{}: more tensors than announced", self.path.display())));
        };
        entry.check(t, &self.path)?;
        for_chunks(t, entry.kind, |bytes| self.put(bytes))
    }

    /// Brings the file to the disk and gives it its name.
    pub fn finish(self) -> Result<Written> {
        if let Some(entry) = self.missing.front() {
            return Err(Error::failed(format!("{}: `{}` was not written", self.path.display(), entry.name)));
        }
        self.out.commit()?;
        Ok(Written { bytes: self.bytes, crc32: self.crc.finalize() })
    }
}

fn float_kind(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        _ => return None,
    })
}
