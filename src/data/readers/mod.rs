//! Records from text, JSON, JSON lines and Parquet files, also `.gz` and `.zst`, and from folders of Arrow files, one at a time.

mod input;
mod json;
mod tables;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde_json::{Map, Value};

use crate::content;
use crate::data::arrow;
use crate::error::{Error, Result};
use crate::files::{is_dir, read_error};
use input::{BYTE_ORDER_MARK, Compression, Counted, Gzip, RecordFormat, RecordInput, format_of};
use json::{json, json_lines};
use tables::{arrow_rows, parquet_rows};

/// Where a record stands, for messages: `data.jsonl:12` or `data.parquet, row 12`, counted from 1.
#[derive(Debug, Clone)]
pub struct RecordPlace {
    path: Arc<Path>,
    unit: RecordUnit,
    number: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RecordUnit {
    File,
    Line,
    Record,
    Row,
}

impl RecordPlace {
    /// The place without the file's path: `:12` or `, row 12`.
    pub fn in_file(&self) -> String {
        match self.unit {
            RecordUnit::File => String::new(),
            RecordUnit::Line => format!(":{}", self.number),
            RecordUnit::Record => format!(", record {}", self.number),
            RecordUnit::Row => format!(", row {}", self.number),
        }
    }
}

impl fmt::Display for RecordPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.path.display(), self.in_file())
    }
}

/// A JSON object (a row of Parquet, a text file as `{"text": ...}`) and its place.
#[derive(Debug, Clone)]
pub struct Record {
    pub fields: Map<String, Value>,
    pub place: RecordPlace,
}

impl Record {
    /// The text under `key`. The error lists the keys that are there.
    pub fn text(&self, key: &str) -> Result<&str> {
        match self.fields.get(key) {
            Some(Value::String(text)) => Ok(text),
            Some(other) => {
                Err(Error::data(format!("{}: `{key}` is {}, not a text", self.place, kind_of(other))))
            }
            None => Err(missing_key(&self.place, key, self.fields.keys().map(String::as_str))),
        }
    }
}

fn missing_key<'a>(place: &dyn fmt::Display, key: &str, present: impl Iterator<Item = &'a str>) -> Error {
    let present = present.collect::<Vec<_>>().join(", ");
    let present = if present.is_empty() { "none".to_string() } else { present };
    Error::data(format!("{place}: no key `{key}`; keys here: {present}"))
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The records of a file, in order. The first error ends them.
pub type Records = Box<dyn Iterator<Item = Result<Record>> + Send>;

/// The records of a file, in order. The outer error ends them; after an inner one, of a single record, they go on.
pub type RecordsOrErrors = Box<dyn Iterator<Item = Result<Result<Record>>> + Send>;

/// Whether a file is one text, which has no keys.
pub fn is_text(path: &Path) -> bool {
    matches!(format_of(path), Ok((RecordFormat::Text, _)))
}

/// Opens a file of any known kind, a folder of such files, or one by `save_to_disk`. `columns`: those that are wanted of a table (all where `None`).
/// `bytes` grows with what was read of the file on disk.
pub fn records(path: &Path, columns: Option<&[&str]>, bytes: &Arc<AtomicU64>) -> Result<Records> {
    let records = records_or_errors(path, columns, bytes)?.map(Result::flatten);
    Ok(fused(records))
}

/// [`records`] that go on after a line that is no record. What cannot be read on after, such as a `.json` file that breaks off,
/// ends them in any case.
pub fn records_or_errors(
    path: &Path,
    columns: Option<&[&str]>,
    bytes: &Arc<AtomicU64>,
) -> Result<RecordsOrErrors> {
    let cannot = |e: io::Error| read_error(path, &e);
    match folder(path)? {
        None => {}
        Some(Folder::Arrow) => return arrow_rows(path, columns, bytes),
        Some(Folder::Files(files)) => return Ok(fused(all_records(files, columns, bytes))),
    }
    let (format, compression) = format_of(path)?;
    let file = File::open(path).map_err(cannot)?;
    let path: Arc<Path> = path.into();
    if format == RecordFormat::Parquet {
        return parquet_rows(path, file, columns, bytes);
    }
    let counted = BufReader::with_capacity(1 << 18, Counted { inner: file, bytes: bytes.clone() });
    let decoded: Box<dyn Read + Send> = match compression {
        Compression::None => Box::new(counted),
        Compression::Gzip => Box::new(Gzip::new(counted)),
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(counted).map_err(cannot)?;
            // As `zstd --long=31` writes them; the default takes at most 128 MiB.
            decoder.window_log_max(31).map_err(cannot)?;
            Box::new(decoder)
        }
    };
    let mut input = BufReader::with_capacity(1 << 18, decoded);
    let start = match input.fill_buf() {
        Ok(start) => start,
        Err(e) => return Err(content::unusable(&path, cannot(e))),
    };
    if let Some(what) = content::mistaken(start, format == RecordFormat::Text) {
        let inside = if compression == Compression::None { "is" } else { "contains" };
        return Err(Error::data(format!("{} {inside} {what}", path.display())));
    }
    if start.starts_with(BYTE_ORDER_MARK) {
        input.consume(BYTE_ORDER_MARK.len());
    }
    match format {
        RecordFormat::Text => Ok(Box::new(std::iter::once_with(move || whole_text(path, input).map(Ok)))),
        RecordFormat::JsonLines => Ok(fused(json_lines(path, input))),
        _ => json(path, input),
    }
}

/// What a folder is read as.
enum Folder {
    /// A data set by `save_to_disk`.
    Arrow,
    /// The files in it, by their names.
    Files(Vec<PathBuf>),
}

/// What a path that is a folder is read as. One without files of a known kind is taken for a data set, whose reader says what
/// is missing.
fn folder(path: &Path) -> Result<Option<Folder>> {
    if !is_dir(path)? {
        return Ok(None);
    }
    if ["state.json", "dataset_dict.json"].iter().any(|name| path.join(name).exists()) {
        return Ok(Some(Folder::Arrow));
    }
    let entries = std::fs::read_dir(path).map_err(|e| read_error(path, &e))?;
    let mut files = Vec::new();
    for entry in entries {
        let file = entry.map_err(|e| read_error(path, &e))?.path();
        if file.is_file() && format_of(&file).is_ok() {
            files.push(file);
        }
    }
    files.sort();
    Ok(Some(if files.is_empty() { Folder::Arrow } else { Folder::Files(files) }))
}

/// The files that a path is read from: itself, or those of a folder.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    match folder(path)? {
        None => Ok(vec![path.to_path_buf()]),
        Some(Folder::Arrow) => arrow::files(path),
        Some(Folder::Files(files)) => Ok(files),
    }
}

/// The records of files, one file after the other; each is opened when it is reached.
fn all_records(
    files: Vec<PathBuf>,
    columns: Option<&[&str]>,
    bytes: &Arc<AtomicU64>,
) -> impl Iterator<Item = Result<Result<Record>>> + Send + 'static {
    let columns: Option<Vec<String>> =
        columns.map(|names| names.iter().map(|name| name.to_string()).collect());
    let bytes = bytes.clone();
    files.into_iter().flat_map(move |file| {
        let names: Option<Vec<&str>> =
            columns.as_ref().map(|names| names.iter().map(String::as_str).collect());
        records_or_errors(&file, names.as_deref(), &bytes)
            .unwrap_or_else(|e| Box::new(std::iter::once(Err(e))) as RecordsOrErrors)
    })
}

/// Ends after the first error, after which a reader's state means nothing.
fn fused<T: 'static>(
    records: impl Iterator<Item = Result<T>> + Send + 'static,
) -> Box<dyn Iterator<Item = Result<T>> + Send> {
    let mut failed = false;
    Box::new(records.take_while(move |record| !std::mem::replace(&mut failed, record.is_err())))
}

fn whole_text(path: Arc<Path>, mut input: RecordInput) -> Result<Record> {
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes).map_err(|e| Error::data(format!("cannot read {}: {e}", path.display())))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let line = e.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1;
        Error::data(format!(
            "{}:{line}: not UTF-8 text (byte {at} of the file); convert it, for instance with iconv",
            path.display()
        ))
    })?;
    let fields = Map::from_iter([("text".to_string(), Value::String(text))]);
    Ok(Record { fields, place: RecordPlace { path, unit: RecordUnit::File, number: 1 } })
}

/// Bytes on disk of all these files: the end of a progress bar.
pub fn total_bytes(paths: &[PathBuf]) -> u64 {
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |m| m.len());
    let of = |path: &PathBuf| match folder(path) {
        Ok(Some(Folder::Arrow)) => arrow::bytes(path),
        Ok(Some(Folder::Files(files))) => files.iter().map(size).sum(),
        _ => size(path),
    };
    paths.iter().map(of).sum()
}
