//! Writing of GGUF files.

use std::path::Path;

use super::metadata::{Metadata, MetadataArray, MetadataValue};
use super::{ALIGNMENT, GgufDtype, MAGIC};
use crate::error::{Error, Result};
use crate::files::AtomicFile;

const VERSION: u32 = 3;

/// A file under construction.
pub struct GgufWriter {
    out: AtomicFile,
    /// Bytes of each tensor, in their order.
    tensors: std::vec::IntoIter<(String, u64)>,
}

impl GgufWriter {
    /// Writes the header of a file with these tensors (name, dtype and shape, slowest dimension first), whose data follows
    /// in the same order.
    pub fn create<'a>(
        path: &Path,
        metadata: &Metadata,
        tensors: impl Iterator<Item = (&'a str, GgufDtype, &'a [i64])> + Clone,
    ) -> Result<GgufWriter> {
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.clone().count() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata.iter() {
            text(&mut header, key);
            put(&mut header, value);
        }
        let (mut at, mut sizes) = (0u64, Vec::new());
        for (name, dtype, shape) in tensors {
            text(&mut header, name);
            header.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| header.extend((*d as u64).to_le_bytes()));
            header.extend(dtype.id().to_le_bytes());
            header.extend(at.to_le_bytes());
            let bytes = dtype.bytes(shape.iter().product());
            sizes.push((name.to_string(), bytes));
            at += bytes.next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        let mut out = AtomicFile::create(path)?;
        out.put(&header)?;
        Ok(GgufWriter { out, tensors: sizes.into_iter() })
    }

    /// Writes the data of the next tensor, which `put` gives in parts.
    pub fn tensor(
        &mut self,
        put: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let (name, bytes) =
            self.tensors.next().ok_or_else(|| Error::failed("more tensors than announced"))?;
        let mut written = 0;
        put(&mut |part| {
            written += part.len() as u64;
            self.out.put(part)
        })?;
        if written != bytes {
            return Err(Error::failed(format!(
                "tensor `{name}`: {written} bytes written, {bytes} announced"
            )));
        }
        let padding = bytes.next_multiple_of(ALIGNMENT) - bytes;
        self.out.put(&[0; ALIGNMENT as usize][..padding as usize])
    }

    /// The whole file, which has its name once it is committed.
    pub fn finish(mut self) -> Result<AtomicFile> {
        match self.tensors.next() {
            None => Ok(self.out),
            Some((name, _)) => Err(Error::failed(format!("tensor `{name}` was not written"))),
        }
    }
}

fn text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

/// Integers as uint32 where they fit, as llama.cpp expects them, else as int64; numbers as float32.
fn put(to: &mut Vec<u8>, value: &MetadataValue) {
    let kind = |to: &mut Vec<u8>, id: u32| to.extend(id.to_le_bytes());
    match value {
        MetadataValue::Integer(n) => match u32::try_from(*n) {
            Ok(n) => {
                kind(to, 4);
                to.extend(n.to_le_bytes());
            }
            Err(_) => {
                kind(to, 11);
                to.extend(n.to_le_bytes());
            }
        },
        MetadataValue::Float(x) => {
            kind(to, 6);
            to.extend((*x as f32).to_le_bytes());
        }
        MetadataValue::Bool(b) => {
            kind(to, 7);
            to.push((*b).into());
        }
        MetadataValue::Text(value) => {
            kind(to, 8);
            text(to, value);
        }
        MetadataValue::Array(array) => {
            kind(to, 9);
            let begin = |to: &mut Vec<u8>, id: u32, n: usize| {
                kind(to, id);
                to.extend((n as u64).to_le_bytes());
            };
            match array {
                MetadataArray::Integers(list) => {
                    begin(to, 5, list.len());
                    list.iter().for_each(|n| to.extend((*n as i32).to_le_bytes()));
                }
                MetadataArray::Floats(list) => {
                    begin(to, 6, list.len());
                    list.iter().for_each(|x| to.extend(x.to_le_bytes()));
                }
                MetadataArray::Bools(list) => {
                    begin(to, 7, list.len());
                    to.extend(list.iter().map(|b| u8::from(*b)));
                }
                MetadataArray::Texts(list) => {
                    begin(to, 8, list.len());
                    list.iter().for_each(|t| text(to, t));
                }
                // Never made here: what is in them is not kept.
                MetadataArray::Arrays(_) => begin(to, 9, 0),
            }
        }
    }
}
