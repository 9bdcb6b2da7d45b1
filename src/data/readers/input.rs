//! Files as streams of bytes: what kind they are by name, decompressed, and counted for progress bars.

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::error::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RecordFormat {
    Text,
    Json,
    JsonLines,
    Parquet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

pub(super) fn format_of(path: &Path) -> Result<(RecordFormat, Compression)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (stem, compression) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Compression::Gzip),
        Some((stem, "zst")) => (stem, Compression::Zstd),
        _ => (name.as_str(), Compression::None),
    };
    let format = match stem.rsplit_once('.').map(|(_, extension)| extension) {
        Some("txt" | "text" | "md") => RecordFormat::Text,
        Some("jsonl" | "ndjson") => RecordFormat::JsonLines,
        Some("json") => RecordFormat::Json,
        Some("parquet") if compression == Compression::None => RecordFormat::Parquet,
        _ if ["-", "/dev/stdin"].contains(&path.to_string_lossy().as_ref()) => {
            return Err(Error::data(
                "standard input is not read here: write it to a file first, such as in.jsonl",
            ));
        }
        _ => {
            return Err(Error::data(format!(
                "{}: unknown kind of file; known are .txt, .text, .md, .json, .jsonl, .ndjson (each also with .gz \
                 or .zst) and .parquet",
                path.display()
            )));
        }
    };
    Ok((format, compression))
}

/// Counts the bytes read from disk, for progress bars.
pub(super) struct Counted<R> {
    pub inner: R,
    pub bytes: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.bytes.fetch_add(n as u64, Relaxed);
        Ok(n)
    }
}

/// The members of a gzip file, one after the other. Zeros after a member are padding, as tapes and block devices leave it.
pub(super) struct Gzip<R: BufRead> {
    member: Option<flate2::bufread::GzDecoder<R>>,
}

impl<R: BufRead> Gzip<R> {
    pub fn new(input: R) -> Self {
        Gzip { member: Some(flate2::bufread::GzDecoder::new(input)) }
    }
}

impl<R: BufRead> Read for Gzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let Some(member) = &mut self.member else { return Ok(0) };
            let n = member.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            let Some(mut input) = self.member.take().map(flate2::bufread::GzDecoder::into_inner) else {
                return Ok(0);
            };
            loop {
                let bytes = input.fill_buf()?;
                let zeros = bytes.iter().take_while(|b| **b == 0).count();
                let (all, end) = (zeros == bytes.len(), bytes.is_empty());
                input.consume(zeros);
                if end {
                    return Ok(0);
                }
                if !all && input.fill_buf()?.first() != Some(&0x1f) {
                    let what = "the gzip data is followed by bytes that are neither gzip nor padding";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, what));
                }
                if !all {
                    break;
                }
            }
            self.member = Some(flate2::bufread::GzDecoder::new(input));
        }
    }
}

/// U+FEFF in UTF-8.
pub(super) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

pub(super) type RecordInput = BufReader<Box<dyn Read + Send>>;
