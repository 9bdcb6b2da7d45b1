//! Records from text, JSON, JSON lines and Parquet files, also `.gz` and `.zst`, and from folders of Arrow files, one at a time.

use crate::content;
use crate::data::arrow;
use crate::error::{Error, Result};
use crate::files::{is_dir, read_error};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row, reader::RowIter};
use parquet::schema::types::Type;
use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Where a record stands, for messages: `data.jsonl:12` or `data.parquet, row 12`, counted from 1.
#[derive(Debug, Clone)]
pub struct Place {
    path: Arc<Path>,
    unit: Unit,
    number: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    File,
    Line,
    Record,
    Row,
}

impl Place {
    /// The place without the file's path: `:12` or `, row 12`.
    pub fn in_file(&self) -> String {
        match self.unit {
            Unit::File => String::new(),
            Unit::Line => format!(":{}", self.number),
            Unit::Record => format!(", record {}", self.number),
            Unit::Row => format!(", row {}", self.number),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.path.display(), self.in_file())
    }
}

/// A JSON object (a row of Parquet, a text file as `{"text": ...}`) and its place.
#[derive(Debug, Clone)]
pub struct Record {
    pub fields: Map<String, Value>,
    pub place: Place,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    Json,
    JsonLines,
    Parquet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// Whether a file is one text.
pub fn is_text(path: &Path) -> bool {
    matches!(format_of(path), Ok((Format::Text, _)))
}

fn format_of(path: &Path) -> Result<(Format, Compression)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (stem, compression) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Compression::Gzip),
        Some((stem, "zst")) => (stem, Compression::Zstd),
        _ => (name.as_str(), Compression::None),
    };
    let format = match stem.rsplit_once('.').map(|(_, extension)| extension) {
        Some("txt" | "text" | "md") => Format::Text,
        Some("jsonl" | "ndjson") => Format::JsonLines,
        Some("json") => Format::Json,
        Some("parquet") if compression == Compression::None => Format::Parquet,
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
struct Counted<R> {
    inner: R,
    bytes: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.bytes.fetch_add(n as u64, Relaxed);
        Ok(n)
    }
}

/// The members of a gzip file, one after the other. Zeros after a member are padding, as tapes and block devices leave it.
struct Gzip<R: BufRead> {
    member: Option<flate2::bufread::GzDecoder<R>>,
}

impl<R: BufRead> Gzip<R> {
    fn new(input: R) -> Self {
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
                    let what =
                        "after the end of the gzip data stands something that is neither gzip nor padding";
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
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

type Input = BufReader<Box<dyn Read + Send>>;

/// Opens a file of any known kind, or a folder by `save_to_disk`. `columns`: those that are wanted of a table (all where `None`).
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
    if is_dir(path)? {
        return arrow_rows(path, columns, bytes);
    }
    let (format, compression) = format_of(path)?;
    let file = File::open(path).map_err(cannot)?;
    let path: Arc<Path> = path.into();
    if format == Format::Parquet {
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
    if let Some(what) = content::mistaken(start, format == Format::Text) {
        let inside = if compression == Compression::None { "is" } else { "contains" };
        return Err(Error::data(format!("{} {inside} {what}", path.display())));
    }
    if start.starts_with(BYTE_ORDER_MARK) {
        input.consume(BYTE_ORDER_MARK.len());
    }
    match format {
        Format::Text => Ok(Box::new(std::iter::once_with(move || whole_text(path, input).map(Ok)))),
        Format::JsonLines => Ok(fused(json_lines(path, input))),
        _ => json(path, input),
    }
}

/// Ends after the first error, after which a reader's state means nothing.
fn fused<T: 'static>(
    records: impl Iterator<Item = Result<T>> + Send + 'static,
) -> Box<dyn Iterator<Item = Result<T>> + Send> {
    let mut failed = false;
    Box::new(records.take_while(move |record| !std::mem::replace(&mut failed, record.is_err())))
}

fn whole_text(path: Arc<Path>, mut input: Input) -> Result<Record> {
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
    Ok(Record { fields, place: Place { path, unit: Unit::File, number: 1 } })
}

fn json_lines(path: Arc<Path>, mut input: Input) -> impl Iterator<Item = Result<Result<Record>>> + Send {
    let mut number = 0;
    let mut line = Vec::new();
    std::iter::from_fn(move || {
        loop {
            line.clear();
            number += 1;
            let place = Place { path: path.clone(), unit: Unit::Line, number };
            match input.read_until(b'\n', &mut line) {
                Err(e) => return Some(Err(Error::data(format!("cannot read {place}: {e}")))),
                Ok(0) => return None,
                Ok(_) if line.iter().all(u8::is_ascii_whitespace) => continue,
                Ok(_) => {}
            }
            if line.starts_with(BYTE_ORDER_MARK) {
                let what =
                    "a byte order mark (U+FEFF) inside the file, as joining files leaves it: remove it";
                return Some(Ok(Err(Error::data(format!("{place}: {what}")))));
            }
            let value = serde_json::from_slice(&line).map_err(|e| {
                let what = json_message(&e);
                // serde_json counts the line's end as the begin of another line.
                let column = if e.column() > 0 { e.column() } else { line.len() };
                Error::data(format!("{place}:{column}: not valid JSON: {what}"))
            });
            return Some(Ok(value.and_then(|value| object(value, place))));
        }
    })
}

fn object(value: Value, place: Place) -> Result<Record> {
    match value {
        Value::Object(fields) => Ok(Record { fields, place }),
        other => {
            Err(Error::data(format!("{place}: a record must be an object, this is {}", kind_of(&other))))
        }
    }
}

/// serde_json's message without its own "at line 1 column 7".
fn json_message(e: &serde_json::Error) -> String {
    let message = e.to_string();
    let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(what, _)| what);
    match message {
        "lone leading surrogate in hex escape" | "unexpected end of hex escape" => {
            let what =
                "half a surrogate pair (a \\ud800 to \\udfff that stands alone), which is no character";
            format!("{what}: the text was cut inside a character; remove it or write the text anew")
        }
        _ => message.to_string(),
    }
}

/// A `.json` file: one array of records, or records one after the other (which many call JSON too).
fn json(path: Arc<Path>, mut input: Input) -> Result<RecordsOrErrors> {
    let mut start = Vec::new();
    while start.last().is_none_or(u8::is_ascii_whitespace) {
        let mut byte = [0];
        match input.read(&mut byte) {
            Ok(0) => return Err(Error::data(format!("{} is empty", path.display()))),
            Ok(_) => start.push(byte[0]),
            Err(e) => return Err(Error::data(format!("cannot read {}: {e}", path.display()))),
        }
    }
    let array = start.ends_with(b"[");
    let input = io::Cursor::new(start).chain(input);
    // serde_json pushes the elements of an array, a reader pulls: a thread between them keeps memory small.
    let (sender, receiver) = sync_channel(256);
    std::thread::spawn(move || push_json(path, input, array, sender));
    Ok(Box::new(Pulled(receiver)))
}

struct Pulled(Receiver<Result<Result<Record>>>);

impl Iterator for Pulled {
    type Item = Result<Result<Record>>;
    fn next(&mut self) -> Option<Self::Item> {
        self.0.recv().ok()
    }
}

fn push_json(path: Arc<Path>, input: impl Read, array: bool, sender: SyncSender<Result<Result<Record>>>) {
    let mut elements = Elements { path: path.clone(), number: 0, sender: &sender, stopped: false };
    let parsed = if array {
        let mut parser = serde_json::Deserializer::from_reader(input);
        parser.deserialize_seq(&mut elements).and_then(|()| parser.end())
    } else {
        let mut values = serde_json::Deserializer::from_reader(input).into_iter::<Value>();
        values.try_for_each(|value| elements.push(value?))
    };
    if let Err(e) = parsed
        && !elements.stopped
    {
        let message = match e.is_io() {
            true => format!("cannot read {}: {e}", path.display()),
            false => format!(
                "{}:{}:{}: not valid JSON: {}",
                path.display(),
                e.line(),
                e.column(),
                json_message(&e)
            ),
        };
        // A receiver that is gone wants no message.
        let _ = sender.send(Err(Error::data(message)));
    }
}

/// Sends the elements of an array on as they are parsed.
struct Elements<'a> {
    path: Arc<Path>,
    number: u64,
    sender: &'a SyncSender<Result<Result<Record>>>,
    stopped: bool,
}

impl Elements<'_> {
    /// Fails where nobody reads on.
    fn push<E: serde::de::Error>(&mut self, value: Value) -> std::result::Result<(), E> {
        self.number += 1;
        let place = Place { path: self.path.clone(), unit: Unit::Record, number: self.number };
        self.stopped = self.sender.send(Ok(object(value, place))).is_err();
        if self.stopped { Err(E::custom("stopped")) } else { Ok(()) }
    }
}

impl<'de> Visitor<'de> for &mut Elements<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an array of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> std::result::Result<(), A::Error> {
        while let Some(value) = elements.next_element::<Value>()? {
            self.push(value)?;
        }
        Ok(())
    }
}

/// The rows of all files of a data set, numbered through.
fn arrow_rows(dir: &Path, columns: Option<&[&str]>, bytes: &Arc<AtomicU64>) -> Result<RecordsOrErrors> {
    let path: Arc<Path> = dir.into();
    let mut parts = Vec::new();
    for file in arrow::files(dir)? {
        let wrong = |what: &dyn fmt::Display| Error::data(format!("cannot read {}: {what}", file.display()));
        let inner = File::open(&file).map_err(|e| read_error(&file, &e))?;
        let (names, rows) = arrow::rows(Counted { inner, bytes: bytes.clone() })
            .map_err(|e| content::unusable(&file, wrong(&e)))?;
        let missing = columns.into_iter().flatten().find(|wanted| !names.iter().any(|name| name == *wanted));
        if let Some(missing) = missing {
            return Err(missing_key(&dir.display(), missing, names.iter().map(String::as_str)));
        }
        let file: Arc<Path> = file.into();
        parts.push(rows.map(move |row| {
            row.map_err(|what| Error::data(format!("cannot read {}: {what}", file.display())))
        }));
    }
    Ok(fused(parts.into_iter().flatten().zip(1u64..).map(move |(row, number)| {
        let place = Place { path: path.clone(), unit: Unit::Row, number };
        Ok(Ok(Record { fields: row?, place }))
    })))
}

fn parquet_rows(
    path: Arc<Path>,
    file: File,
    columns: Option<&[&str]>,
    bytes: &Arc<AtomicU64>,
) -> Result<RecordsOrErrors> {
    let wrong =
        |e: parquet::errors::ParquetError| Error::data(format!("cannot read {}: {e}", path.display()));
    let size = file.metadata().map_or(0, |m| m.len());
    let reader = SerializedFileReader::new(file).map_err(|e| content::unusable(&path, wrong(e)))?;
    let metadata = reader.metadata().file_metadata();
    let num_rows = metadata.num_rows().max(1) as u128;
    let root = metadata.schema();
    for column in reader.metadata().row_groups().iter().flat_map(|group| group.columns()) {
        let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
        let length = column.compressed_size();
        if start < 0 || length < 0 || start.checked_add(length).is_none_or(|end| end as u64 > size) {
            let what = "corrupt: a column lies outside of the file";
            return Err(Error::data(format!("cannot read {}: {what}", path.display())));
        }
    }
    let projection = match columns {
        None => None,
        Some(wanted) => {
            let present = || root.get_fields().iter().map(|f| f.name());
            if let Some(missing) = wanted.iter().find(|w| !present().any(|p| p == **w)) {
                return Err(missing_key(&path.display(), missing, present()));
            }
            let fields = root.get_fields().iter().filter(|f| wanted.contains(&f.name())).cloned().collect();
            Some(Type::group_type_builder(root.name()).with_fields(fields).build().map_err(wrong)?)
        }
    };
    let mut rows = RowIter::from_file_into(Box::new(reader)).project(projection).map_err(wrong)?;
    // The crate panics at some corruptions of a page.
    let next_row = move || {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| rows.next()));
        caught.unwrap_or_else(|_| Some(Err(parquet::errors::ParquetError::General("corrupt".to_string()))))
    };
    let bytes = bytes.clone();
    Ok(fused(std::iter::from_fn(next_row).zip(1u64..).map(move |(row, number)| {
        let place = Place { path: path.clone(), unit: Unit::Row, number };
        let read = |rows: u64| (size as u128 * rows as u128 / num_rows) as u64;
        bytes.fetch_add(read(number) - read(number - 1), Relaxed);
        let row = row.map_err(|e| Error::data(format!("cannot read {place}: {e}")))?;
        let fields = row_fields(row).map_err(|what| Error::data(format!("{place}: {what}")));
        Ok(fields.map(|fields| Record { fields, place }))
    })))
}

fn row_fields(row: Row) -> std::result::Result<Map<String, Value>, String> {
    row.into_columns()
        .into_iter()
        .map(|(name, field)| Ok((name.clone(), json_value(&name, field)?)))
        .collect()
}

fn json_value(name: &str, field: Field) -> std::result::Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(x) => x.into(),
        Field::Byte(x) => x.into(),
        Field::Short(x) => x.into(),
        Field::Int(x) => x.into(),
        Field::Long(x) => x.into(),
        Field::UByte(x) => x.into(),
        Field::UShort(x) => x.into(),
        Field::UInt(x) => x.into(),
        Field::ULong(x) => x.into(),
        Field::Float(x) => x.into(),
        Field::Double(x) => x.into(),
        Field::Str(text) => text.into(),
        // Older writers leave out that their bytes are text.
        Field::Bytes(bytes) => {
            let text = std::str::from_utf8(bytes.data());
            text.map_err(|_| format!("column `{name}` holds bytes that are not UTF-8 text"))?.into()
        }
        Field::Group(row) => Value::Object(row_fields(row)?),
        Field::ListInternal(list) => {
            let elements = list.elements().iter().map(|f| json_value(name, f.clone()));
            Value::Array(elements.collect::<std::result::Result<_, _>>()?)
        }
        other => other.to_string().into(),
    })
}

/// Whether a file is a text file, which has no keys.
pub fn is_plain_text(path: &Path) -> bool {
    matches!(format_of(path), Ok((Format::Text, _)))
}

/// Bytes on disk of all these files: the end of a progress bar.
pub fn total_bytes(paths: &[PathBuf]) -> u64 {
    let of = |path: &PathBuf| match path.is_dir() {
        true => arrow::bytes(path),
        false => std::fs::metadata(path).map_or(0, |m| m.len()),
    };
    paths.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::sections::OnError;
    use crate::data::texts::Texts;
    use std::io::Write;
    use testing::folder::TestFolder;

    fn read(path: &Path) -> Result<Vec<Record>> {
        records(path, None, &Arc::default())?.collect()
    }

    fn read_texts(paths: &[PathBuf], key: &str) -> Result<Vec<String>> {
        Texts::open(paths, key, OnError::Refuse, &Arc::default()).collect()
    }

    fn error(path: &Path) -> String {
        let e = read(path).expect_err("must be refused");
        assert_eq!(e.exit_code(), 3);
        e.message.replace(&path.display().to_string(), "FILE")
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn parquet_file(path: &Path, column: &str, texts: &[&str], rows_per_group: usize) {
        compressed_parquet_file(
            path,
            column,
            texts,
            rows_per_group,
            parquet::basic::Compression::UNCOMPRESSED,
        );
    }

    fn compressed_parquet_file(
        path: &Path,
        column: &str,
        texts: &[&str],
        rows_per_group: usize,
        compression: parquet::basic::Compression,
    ) {
        use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
        let schema = format!("message m {{ REQUIRED INT32 id; REQUIRED BYTE_ARRAY {column} (UTF8); }}");
        let schema = Arc::new(parquet::schema::parser::parse_message_type(&schema).unwrap());
        let file = File::create(path).unwrap();
        let properties = parquet::file::properties::WriterProperties::builder();
        let properties = Arc::new(properties.set_compression(compression).build());
        let mut writer = parquet::file::writer::SerializedFileWriter::new(file, schema, properties).unwrap();
        for group in texts.chunks(rows_per_group) {
            let mut row_group = writer.next_row_group().unwrap();
            let ids: Vec<i32> = (0..group.len() as i32).collect();
            let mut column = row_group.next_column().unwrap().unwrap();
            column.typed::<Int32Type>().write_batch(&ids, None, None).unwrap();
            column.close().unwrap();
            let values: Vec<ByteArray> = group.iter().map(|t| ByteArray::from(*t)).collect();
            let mut column = row_group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
            column.close().unwrap();
            row_group.close().unwrap();
        }
        writer.close().unwrap();
    }

    const LINES: &str = "{\"text\": \"a\"}\n\n{\"text\": \"b\\nc\", \"n\": 2}\n{\"text\": \"d\"}";
    const TEXTS: [&str; 3] = ["a", "b\nc", "d"];

    #[test]
    fn every_kind_of_file_gives_the_same_texts() {
        let folder = TestFolder::new("readers");
        let array = format!("  [{}]\n", LINES.replace("\n\n", ",").replace("}\n{", "},{"));
        let plain =
            [("a.jsonl", LINES.as_bytes()), ("b.json", array.as_bytes()), ("c.json", LINES.as_bytes())];
        let mut paths = Vec::new();
        for (name, content) in plain {
            paths.push(folder.file(name, content));
            paths.push(folder.file(&format!("{name}.gz"), gzip(content)));
            paths.push(folder.file(&format!("{name}.zst"), zstd::encode_all(content, 3).unwrap()));
        }
        use parquet::basic::Compression as Codec;
        let codecs = [
            Codec::UNCOMPRESSED,
            Codec::SNAPPY,
            Codec::GZIP(Default::default()),
            Codec::ZSTD(Default::default()),
            Codec::BROTLI(Default::default()),
            Codec::LZ4,
            Codec::LZ4_RAW,
        ];
        for (i, codec) in codecs.into_iter().enumerate() {
            let path = folder.0.join(format!("d{i}.parquet"));
            compressed_parquet_file(&path, "text", &TEXTS, 2, codec);
            paths.push(path);
        }
        // A frame that says that it needs a window of 1 GiB, as `zstd --long=30` writes it: magic, descriptor, window, one block.
        let block = (((LINES.len() as u32) << 3) | 1).to_le_bytes();
        let frame = [b"\x28\xb5\x2f\xfd\0\xa0", &block[..3], LINES.as_bytes()].concat();
        paths.push(folder.file("w.jsonl.zst", frame));
        // Padding after a member and between members.
        let (first, second) = LINES.split_at(LINES.find("\n\n").unwrap() + 2);
        let members =
            [gzip(first.as_bytes()), vec![0; 300], gzip(second.as_bytes()), vec![0; 70_000]].concat();
        paths.push(folder.file("p.jsonl.gz", members));
        for path in &paths {
            assert_eq!(read_texts(std::slice::from_ref(path), "text").unwrap(), TEXTS, "{}", path.display());
        }
        assert_eq!(read_texts(&paths, "text").unwrap().len(), 3 * paths.len());
        let text = folder.file("e.txt.gz", gzip("\u{feff}whole\nfile\n".as_bytes()));
        assert_eq!(read_texts(&[text], "whatever").unwrap(), ["whole\nfile\n"]);
    }

    #[test]
    fn bytes_read_reach_the_size_of_the_files() {
        let folder = TestFolder::new("reader-bytes");
        let parquet = folder.0.join("p.parquet");
        parquet_file(&parquet, "text", &TEXTS, 1);
        let paths =
            [folder.file("a.jsonl", LINES), folder.file("b.jsonl.gz", gzip(LINES.as_bytes())), parquet];
        let bytes = Arc::default();
        Texts::open(&paths, "text", OnError::Refuse, &bytes).for_each(|t| drop(t.unwrap()));
        assert_eq!(bytes.load(Relaxed), total_bytes(&paths));
    }

    #[test]
    fn errors_name_the_place_and_what_is_wrong() {
        let folder = TestFolder::new("reader-errors");
        let file = |name: &str, content: &[u8]| folder.file(name, content);
        assert_eq!(
            error(&file("a.jsonl", b"{\"text\": 1}\n\n{\"text\": }\n")),
            "FILE:3:10: not valid JSON: expected value"
        );
        assert_eq!(error(&file("b.jsonl", b"[1]\n")), "FILE:1: a record must be an object, this is a list");
        assert_eq!(
            error(&file("c.json", b"[{},\n {\"a\": 1},\n7]")),
            "FILE, record 3: a record must be an object, this is a number"
        );
        assert_eq!(error(&file("d.json", b"[{},\n {\"a\" 1}]")), "FILE:2:7: not valid JSON: expected `:`");
        assert_eq!(error(&file("e.json", b"[{}] x")), "FILE:1:6: not valid JSON: trailing characters");
        assert_eq!(
            error(&file("f.json", b"{\"a\": 1}\n{\"a\":")),
            "FILE:2:5: not valid JSON: EOF while parsing a value"
        );
        assert_eq!(error(&file("g.json", b" \n")), "FILE is empty");
        assert!(
            error(&file("h.txt", b"a\nb\xff")).starts_with("FILE:2: not UTF-8 text (byte 3 of the file)")
        );
        assert!(error(&file("i.csv", b"")).starts_with("FILE: unknown kind of file; known are .txt"));
        assert!(error(&file("j.parquet", b"PAR1")).starts_with("cannot read FILE: "));
        assert!(error(&folder.0.join("missing.jsonl")).starts_with("cannot read FILE: No such file"));
        assert!(error(&folder.0).starts_with("FILE is a folder, and no data set"));
        folder.file("state.json", r#"{"_data_files": [{"filename": "a.arrow"}]}"#);
        assert!(error(&folder.0).contains("a.arrow: No such file"));
        folder.file("a.arrow", b"no Arrow at all");
        assert!(error(&folder.0).starts_with("cannot read FILE/a.arrow: "));
        folder.file("state.json", r#"{"_data_files": [{"filename": "../a.arrow"}]}"#);
        assert!(error(&folder.0).contains("`../a.arrow` is not the name of a file"));
        folder.file("dataset_dict.json", r#"{"splits": ["train", "test"]}"#);
        assert_eq!(error(&folder.0), "FILE holds the splits train, test; name the folder of one");
        let whole = gzip(format!("{LINES}\n").repeat(1000).as_bytes());
        assert!(error(&file("k.jsonl.gz", &whole[..whole.len() / 2])).starts_with("cannot read FILE:"));
        assert!(error(&file("l.jsonl.zst", b"no zstd at all")).starts_with("cannot read FILE:"));

        let missing = |path: PathBuf| {
            let e = read_texts(std::slice::from_ref(&path), "text").expect_err("must be refused");
            let message = e.message.replace(&path.display().to_string(), "FILE");
            // Of records; what is wrong with the whole file has no such end.
            message.split(" (1 of").next().unwrap_or_default().to_string()
        };
        assert_eq!(
            missing(file("m.jsonl", b"{\"text\": \"a\"}\n{\"question\": \"\", \"answer\": \"\"}\n")),
            "FILE:2: no key `text`; keys here: question, answer; name the right one with --text-key"
        );
        assert_eq!(missing(file("n.jsonl", b"{\"text\": null}")), "FILE:1: `text` is null, not a text");
        let path = folder.0.join("o.parquet");
        parquet_file(&path, "body", &TEXTS, 3);
        assert_eq!(
            missing(path),
            "FILE: no key `text`; keys here: id, body; name the right one with --text-key"
        );
    }

    #[test]
    fn records_go_on_after_one_that_is_none() {
        let folder = TestFolder::new("reader-goes-on");
        let read = |name: &str, content: &[u8]| -> Result<Vec<bool>> {
            let path = folder.file(name, content);
            records_or_errors(&path, None, &Arc::default())?.map(|r| r.map(|r| r.is_ok())).collect()
        };
        assert_eq!(
            read("a.jsonl", b"{}\n{oops\n[1]\n{\"a\": \"\xff\"}\n{}\n").unwrap(),
            [true, false, false, false, true]
        );
        assert_eq!(read("a.json", b"[{}, 3, {}]").unwrap(), [true, false, true]);
        // Where a file breaks off, nothing can follow.
        assert!(read("b.json", b"[{}, {\"a\"").is_err());
    }

    /// tests/fixtures/arrow: written by datasets 5.2.0, see make_arrow.py there.
    #[test]
    fn what_save_to_disk_wrote() {
        let dir = testing::golden::fixture("arrow");
        let rows = read(&dir).unwrap();
        let expected = std::fs::read_to_string(dir.join("expected.jsonl")).unwrap();
        let expected: Vec<Map<String, Value>> =
            expected.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.iter().map(|r| r.fields.clone()).collect::<Vec<_>>(), expected);
        assert_eq!(rows.len(), 5);
        assert!(rows[4].place.to_string().ends_with("arrow, row 5"));
        let bytes = Arc::default();
        assert_eq!(records(&dir, Some(&["text"]), &bytes).unwrap().count(), 5);
        assert_eq!(bytes.load(Relaxed), total_bytes(std::slice::from_ref(&dir)));
        // The fourth text is null.
        let null = read_texts(std::slice::from_ref(&dir), "text").unwrap_err().message;
        assert!(null.contains("arrow, row 4: `text` is null, not a text (1 of 5 records; "), "{null}");
        let missing = read_texts(&[dir], "body").unwrap_err().message;
        assert!(missing.contains("no key `body`; keys here: text, messages, score"), "{missing}");
    }

    #[test]
    fn a_corrupt_parquet_file_is_an_error_and_no_panic() {
        let folder = TestFolder::new("reader-parquet");
        let path = folder.0.join("a.parquet");
        let texts: Vec<String> = (0..200).map(|i| format!("text number {i}")).collect();
        parquet_file(&path, "text", &texts.iter().map(String::as_str).collect::<Vec<_>>(), 64);
        let whole = std::fs::read(&path).unwrap();
        let mut refused = 0;
        for at in (4..whole.len()).step_by(7) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            refused += read(&folder.file("b.parquet", bytes)).is_err() as usize;
        }
        assert!(refused > 20, "{refused} corruptions were noticed");
    }
}
