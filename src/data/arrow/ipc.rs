//! Arrow's IPC stream (<https://arrow.apache.org/docs/format/Columnar.html>, "Serialization and Interprocess Communication"), read
//! row by row as JSON values. Metadata is decoded by the crate `polars-arrow-format`; the columns are a few buffers each.

use std::collections::HashMap;
use std::fmt::Display;
use std::io::Read;
use std::ops::Range;
use std::sync::Arc;

use polars_arrow_format::ipc::planus::{self, ReadAsRoot};
use polars_arrow_format::ipc::{
    CompressionType, DateUnit, Endianness, FieldRef, IntRef, MessageHeaderRef, MessageRef, Precision,
    RecordBatchRef, SchemaRef, TimeUnit, TypeRef,
};
use serde_json::{Map, Value};

/// Why a stream cannot be read.
type IpcResult<T> = std::result::Result<T, String>;

/// Rows as JSON objects, of which the first error is the last.
pub type ArrowRows = Box<dyn Iterator<Item = IpcResult<Map<String, Value>>> + Send>;

/// Nesting and number of columns beyond which a schema is taken for damaged.
const MAX_DEPTH: usize = 32;
const MAX_COLUMNS: usize = 1 << 16;

fn corrupt(what: impl Display) -> String {
    format!("corrupt Arrow data: {what}")
}

fn damaged(e: planus::Error) -> String {
    corrupt(e)
}

/// How a column's values lie in its buffers.
#[derive(Debug, Clone, PartialEq)]
enum ColumnLayout {
    Null,
    Bool,
    Int {
        bytes: usize,
        signed: bool,
    },
    Float {
        bytes: usize,
    },
    /// Days or milliseconds since 1970, of 4 or 8 bytes.
    Date {
        bytes: usize,
    },
    /// A point in time as 64 bits, so many to a second; `zone`: it is one of UTC.
    Timestamp {
        per_second: i64,
        zone: bool,
    },
    /// Texts, or bytes that are taken for UTF-8; offsets of 4 or 8 bytes.
    Text {
        offset: usize,
    },
    List {
        offset: usize,
    },
    FixedList {
        size: usize,
    },
    Struct,
}

#[derive(Debug, Clone)]
struct Column {
    name: String,
    layout: ColumnLayout,
    children: Vec<Column>,
    /// The id of the dictionary that holds the values, and the layout of the indices into it.
    dictionary: Option<(i64, ColumnLayout)>,
}

impl Column {
    fn all(schema: SchemaRef<'_>) -> IpcResult<Vec<Column>> {
        if schema.endianness().map_err(damaged)? != Endianness::Little {
            return Err("big-endian Arrow data is not supported".into());
        }
        let mut count = 0;
        let fields = schema.fields().map_err(damaged)?;
        fields.into_iter().flatten().map(|f| Column::new(f.map_err(damaged)?, 0, &mut count)).collect()
    }

    fn new(field: FieldRef<'_>, depth: usize, count: &mut usize) -> IpcResult<Column> {
        *count += 1;
        if depth > MAX_DEPTH || *count > MAX_COLUMNS {
            return Err(corrupt("columns are nested too deeply"));
        }
        let name = field.name().map_err(damaged)?.unwrap_or_default().to_string();
        let kind = field.type_().map_err(damaged)?.ok_or_else(|| corrupt("a column without a type"))?;
        let layout = layout(&kind, &name)?;
        let children = field.children().map_err(damaged)?.into_iter().flatten();
        let children: Vec<Column> =
            children.map(|f| Column::new(f.map_err(damaged)?, depth + 1, count)).collect::<IpcResult<_>>()?;
        if matches!(layout, ColumnLayout::List { .. } | ColumnLayout::FixedList { .. }) && children.len() != 1
        {
            return Err(corrupt(format!("column `{name}` is a list of {} columns", children.len())));
        }
        let dictionary = match field.dictionary().map_err(damaged)? {
            None => None,
            Some(dictionary) => {
                let index = dictionary.index_type().map_err(damaged)?;
                let index = index.map_or(Ok(ColumnLayout::Int { bytes: 4, signed: true }), int)?;
                Some((dictionary.id().map_err(damaged)?, index))
            }
        };
        Ok(Column { name, layout, children, dictionary })
    }

    /// The column whose values dictionary `id` holds.
    fn with_dictionary(columns: &[Column], id: i64) -> Option<&Column> {
        columns.iter().find_map(|column| match &column.dictionary {
            Some((its, _)) if *its == id => Some(column),
            _ => Column::with_dictionary(&column.children, id),
        })
    }
}

fn int(kind: IntRef<'_>) -> IpcResult<ColumnLayout> {
    let bits = kind.bit_width().map_err(damaged)?;
    match bits {
        8 | 16 | 32 | 64 => {
            Ok(ColumnLayout::Int { bytes: bits as usize / 8, signed: kind.is_signed().map_err(damaged)? })
        }
        _ => Err(corrupt(format!("integers of {bits} bits"))),
    }
}

fn layout(kind: &TypeRef<'_>, name: &str) -> IpcResult<ColumnLayout> {
    let other = |kind: &str| {
        Err(format!(
            "column `{name}` has the Arrow type {kind}, which is not supported: remove or cast the column"
        ))
    };
    Ok(match kind {
        TypeRef::Null(_) => ColumnLayout::Null,
        TypeRef::Bool(_) => ColumnLayout::Bool,
        TypeRef::Int(kind) => int(*kind)?,
        TypeRef::FloatingPoint(kind) => match kind.precision().map_err(damaged)? {
            Precision::Half => ColumnLayout::Float { bytes: 2 },
            Precision::Single => ColumnLayout::Float { bytes: 4 },
            Precision::Double => ColumnLayout::Float { bytes: 8 },
        },
        TypeRef::Utf8(_) | TypeRef::Binary(_) => ColumnLayout::Text { offset: 4 },
        TypeRef::LargeUtf8(_) | TypeRef::LargeBinary(_) => ColumnLayout::Text { offset: 8 },
        TypeRef::List(_) => ColumnLayout::List { offset: 4 },
        TypeRef::LargeList(_) => ColumnLayout::List { offset: 8 },
        TypeRef::FixedSizeList(kind) => {
            let size = kind.list_size().map_err(damaged)?;
            ColumnLayout::FixedList { size: size.try_into().map_err(|_| corrupt("a list of negative size"))? }
        }
        TypeRef::Struct(_) => ColumnLayout::Struct,
        TypeRef::Date(kind) => match kind.unit().map_err(damaged)? {
            DateUnit::Day => ColumnLayout::Date { bytes: 4 },
            DateUnit::Millisecond => ColumnLayout::Date { bytes: 8 },
        },
        TypeRef::Timestamp(kind) => ColumnLayout::Timestamp {
            per_second: per_second(kind.unit().map_err(damaged)?),
            zone: kind.timezone().map_err(damaged)?.is_some(),
        },
        TypeRef::Time(_) => return other("time"),
        TypeRef::Duration(_) => return other("duration"),
        TypeRef::Decimal(_) => return other("decimal"),
        TypeRef::Interval(_) => return other("interval"),
        TypeRef::Union(_) => return other("union"),
        TypeRef::FixedSizeBinary(_) => return other("fixed_size_binary"),
        TypeRef::Map(_) => return other("map"),
        TypeRef::RunEndEncoded(_) => return other("run_end_encoded"),
        TypeRef::BinaryView(_) => return other("binary_view"),
        TypeRef::Utf8View(_) => return other("string_view"),
        TypeRef::ListView(_) | TypeRef::LargeListView(_) => return other("list_view"),
    })
}

fn per_second(unit: TimeUnit) -> i64 {
    match unit {
        TimeUnit::Second => 1,
        TimeUnit::Millisecond => 1_000,
        TimeUnit::Microsecond => 1_000_000,
        TimeUnit::Nanosecond => 1_000_000_000,
    }
}

/// Bytes of a message's body.
#[derive(Debug, Clone)]
struct BufferSpan {
    body: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl BufferSpan {
    fn bytes(&self) -> &[u8] {
        &self.body[self.range.clone()]
    }

    /// The `N` bytes of element `i`.
    fn get<const N: usize>(&self, i: usize) -> IpcResult<[u8; N]> {
        let bytes = i.checked_mul(N).and_then(|at| self.bytes().get(at..)?.first_chunk::<N>().copied());
        bytes.ok_or_else(|| corrupt("a value lies outside of its column"))
    }

    fn bit(&self, i: usize) -> IpcResult<bool> {
        Ok(self.get::<1>(i / 8)?[0] >> (i % 8) & 1 == 1)
    }

    fn int(&self, i: usize, bytes: usize) -> IpcResult<i64> {
        Ok(match bytes {
            1 => i8::from_le_bytes(self.get(i)?).into(),
            2 => i16::from_le_bytes(self.get(i)?).into(),
            4 => i32::from_le_bytes(self.get(i)?).into(),
            _ => i64::from_le_bytes(self.get(i)?),
        })
    }

    fn unsigned(&self, i: usize, bytes: usize) -> IpcResult<u64> {
        Ok(match bytes {
            1 => u8::from_le_bytes(self.get(i)?).into(),
            2 => u16::from_le_bytes(self.get(i)?).into(),
            4 => u32::from_le_bytes(self.get(i)?).into(),
            _ => u64::from_le_bytes(self.get(i)?),
        })
    }

    /// Where element `i` of a column with offsets lies.
    fn span(&self, i: usize, offset: usize) -> IpcResult<Range<usize>> {
        let at = |i| self.int(i, offset).and_then(|n| usize::try_from(n).map_err(corrupt));
        let (begin, end) = (at(i)?, at(i + 1)?);
        if begin > end { Err(corrupt("an element ends before it begins")) } else { Ok(begin..end) }
    }
}

/// A column of a batch.
#[derive(Debug)]
struct ColumnArray {
    name: String,
    layout: ColumnLayout,
    length: usize,
    /// A bit for each value that is there; none where all are.
    validity: Option<BufferSpan>,
    buffers: Vec<BufferSpan>,
    children: Vec<ColumnArray>,
    dictionary: Option<Dictionary>,
}

/// The values of a dictionary: its first batch, and those that were added to it.
type Dictionary = Vec<Arc<ColumnArray>>;

impl ColumnArray {
    fn value(&self, i: usize) -> IpcResult<Value> {
        if i >= self.length {
            return Err(corrupt("a column is shorter than its batch"));
        }
        if self.validity.as_ref().map_or(Ok(true), |bits| bits.bit(i)).map(|valid| !valid)? {
            return Ok(Value::Null);
        }
        if let Some(dictionary) = &self.dictionary {
            return self.look_up(i, dictionary);
        }
        let values = &self.buffers;
        Ok(match self.layout {
            ColumnLayout::Null => Value::Null,
            ColumnLayout::Bool => values[0].bit(i)?.into(),
            ColumnLayout::Int { bytes, signed: true } => values[0].int(i, bytes)?.into(),
            ColumnLayout::Int { bytes, signed: false } => values[0].unsigned(i, bytes)?.into(),
            ColumnLayout::Float { bytes: 2 } => half::f16::from_le_bytes(values[0].get(i)?).to_f32().into(),
            ColumnLayout::Float { bytes: 4 } => f32::from_le_bytes(values[0].get(i)?).into(),
            ColumnLayout::Float { .. } => f64::from_le_bytes(values[0].get(i)?).into(),
            ColumnLayout::Date { bytes } => {
                let n = values[0].int(i, bytes)?;
                let seconds = if bytes == 4 { n.checked_mul(86_400) } else { Some(n.div_euclid(1_000)) };
                time(seconds, 0, "%Y-%m-%d")?
            }
            ColumnLayout::Timestamp { per_second, zone } => {
                let n = values[0].int(i, 8)?;
                let nanoseconds = n.rem_euclid(per_second) * (1_000_000_000 / per_second);
                let format = if zone { "%Y-%m-%dT%H:%M:%S%.fZ" } else { "%Y-%m-%dT%H:%M:%S%.f" };
                time(Some(n.div_euclid(per_second)), nanoseconds as u32, format)?
            }
            ColumnLayout::Text { offset } => {
                let bytes = values[1].bytes().get(values[0].span(i, offset)?);
                let bytes = bytes.ok_or_else(|| corrupt("a text lies outside of its column"))?;
                let text = std::str::from_utf8(bytes);
                text.map_err(|_| format!("column `{}` holds bytes that are not UTF-8 text", self.name))?
                    .into()
            }
            ColumnLayout::List { offset } => {
                let span = values[0].span(i, offset)?;
                if span.end > self.children[0].length {
                    return Err(corrupt("a list lies outside of its column"));
                }
                Value::Array(span.map(|n| self.children[0].value(n)).collect::<IpcResult<_>>()?)
            }
            ColumnLayout::FixedList { size } => {
                let begin = i.checked_mul(size).filter(|n| n + size <= self.children[0].length);
                let begin = begin.ok_or_else(|| corrupt("a list lies outside of its column"))?;
                Value::Array(
                    (begin..begin + size).map(|n| self.children[0].value(n)).collect::<IpcResult<_>>()?,
                )
            }
            ColumnLayout::Struct => Value::Object(row(&self.children, i)?),
        })
    }

    fn look_up(&self, i: usize, dictionary: &Dictionary) -> IpcResult<Value> {
        let ColumnLayout::Int { bytes, .. } = self.layout else {
            return Err(corrupt("an index that is not an integer"));
        };
        let mut index = usize::try_from(self.buffers[0].unsigned(i, bytes)?).map_err(corrupt)?;
        for part in dictionary {
            match index.checked_sub(part.length) {
                None => return part.value(index),
                Some(rest) => index = rest,
            }
        }
        Err(corrupt("an index beyond its dictionary"))
    }
}

fn time(seconds: Option<i64>, nanoseconds: u32, format: &str) -> IpcResult<Value> {
    let time = seconds.and_then(|seconds| chrono::DateTime::from_timestamp(seconds, nanoseconds));
    Ok(time.ok_or_else(|| corrupt("an invalid time"))?.format(format).to_string().into())
}

fn row(columns: &[ColumnArray], i: usize) -> IpcResult<Map<String, Value>> {
    columns.iter().map(|column| Ok((column.name.clone(), column.value(i)?))).collect()
}

/// Takes the columns of a batch out of its lists of nodes and buffers, which follow the schema depth first.
struct BatchColumns<'a> {
    lengths: Box<dyn Iterator<Item = i64> + 'a>,
    buffers: Box<dyn Iterator<Item = (i64, i64)> + 'a>,
    codec: Option<CompressionType>,
    body: Arc<Vec<u8>>,
    dictionaries: &'a HashMap<i64, Dictionary>,
}

impl<'a> BatchColumns<'a> {
    fn new(
        batch: RecordBatchRef<'a>,
        body: Vec<u8>,
        dictionaries: &'a HashMap<i64, Dictionary>,
    ) -> IpcResult<Self> {
        let nodes = batch.nodes().map_err(damaged)?;
        let buffers = batch.buffers().map_err(damaged)?;
        let codec = batch.compression().map_err(damaged)?;
        Ok(BatchColumns {
            lengths: Box::new(nodes.into_iter().flatten().map(|node| node.length())),
            buffers: Box::new(buffers.into_iter().flatten().map(|b| (b.offset(), b.length()))),
            codec: codec.map(|c| c.codec().map_err(damaged)).transpose()?,
            body: Arc::new(body),
            dictionaries,
        })
    }

    /// A number of elements, which a damaged file cannot make larger than what its bytes may hold: at least a bit each, but
    /// for columns of nulls, of which a batch has few.
    fn length(&self, length: i64) -> IpcResult<usize> {
        let most = self.body.len().saturating_mul(if self.codec.is_some() { 1 << 16 } else { 8 }) + (1 << 16);
        usize::try_from(length)
            .ok()
            .filter(|n| *n <= most)
            .ok_or_else(|| corrupt("a batch of impossible size"))
    }

    fn buffer(&mut self) -> IpcResult<BufferSpan> {
        let outside = || corrupt("a buffer lies outside of its batch");
        let (offset, length) = self.buffers.next().ok_or_else(|| corrupt("a buffer is missing"))?;
        let begin = usize::try_from(offset).map_err(|_| outside())?;
        let end = usize::try_from(length).ok().and_then(|n| begin.checked_add(n)).ok_or_else(outside)?;
        let bytes = self.body.get(begin..end).ok_or_else(outside)?;
        let Some((codec, (size, data))) = self.codec.zip(bytes.split_first_chunk::<8>()) else {
            return Ok(BufferSpan { body: self.body.clone(), range: begin..end });
        };
        let size = i64::from_le_bytes(*size);
        if size == -1 {
            return Ok(BufferSpan { body: self.body.clone(), range: begin + 8..end });
        }
        let size = u64::try_from(size).map_err(corrupt)?;
        let mut body = Vec::new();
        let read = match codec {
            CompressionType::Lz4Frame => {
                lz4_flex::frame::FrameDecoder::new(data).take(size).read_to_end(&mut body)
            }
            CompressionType::Zstd => {
                zstd::Decoder::with_buffer(data).and_then(|d| d.take(size).read_to_end(&mut body))
            }
        };
        match read.map_err(corrupt)? as u64 == size {
            true => Ok(BufferSpan { range: 0..body.len(), body: Arc::new(body) }),
            false => Err(corrupt("a compressed buffer is shorter than announced")),
        }
    }

    fn array(&mut self, column: &Column) -> IpcResult<ColumnArray> {
        let length = self.lengths.next().ok_or_else(|| corrupt("a column is missing"))?;
        let length = self.length(length)?;
        let dictionary = column.dictionary.as_ref().map(|(id, _)| self.dictionaries.get(id).cloned());
        let dictionary = match dictionary {
            Some(None) => return Err(corrupt("a dictionary is missing")),
            Some(dictionary) => dictionary,
            None => None,
        };
        let layout = match &column.dictionary {
            Some((_, index)) => index.clone(),
            None => column.layout.clone(),
        };
        let validity = match layout {
            ColumnLayout::Null => None,
            _ => Some(self.buffer()?).filter(|b| !b.range.is_empty()),
        };
        let buffers = match layout {
            ColumnLayout::Null | ColumnLayout::Struct | ColumnLayout::FixedList { .. } => 0,
            ColumnLayout::Text { .. } => 2,
            _ => 1,
        };
        let buffers = (0..buffers).map(|_| self.buffer()).collect::<IpcResult<_>>()?;
        // A dictionary's children are in its own batches.
        let children: &[Column] = if dictionary.is_some() { &[] } else { &column.children };
        let children = children.iter().map(|child| self.array(child)).collect::<IpcResult<_>>()?;
        Ok(ColumnArray { name: column.name.clone(), layout, length, validity, buffers, children, dictionary })
    }
}

/// The next `size` bytes, or as many as there are.
fn at_most(input: &mut impl Read, size: u64) -> IpcResult<Vec<u8>> {
    let mut bytes = Vec::new();
    input.by_ref().take(size).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// A stream of messages.
struct MessageStream<R> {
    input: R,
    columns: Vec<Column>,
    dictionaries: HashMap<i64, Dictionary>,
}

impl<R: Read> MessageStream<R> {
    /// The metadata and the body of the next message; none at the end.
    fn message(&mut self) -> IpcResult<Option<(Vec<u8>, Vec<u8>)>> {
        let Some(mut size) = self.word()? else { return Ok(None) };
        // Since version 0.15 of Arrow a mark precedes the size.
        if size == u32::MAX {
            let Some(after) = self.word()? else { return Ok(None) };
            size = after;
        }
        if size == 0 {
            return Ok(None);
        }
        let metadata = self.take(u64::from(size))?;
        let length = MessageRef::read_as_root(&metadata).and_then(|m| m.body_length()).map_err(damaged)?;
        let body = self.take(u64::try_from(length).map_err(corrupt)?)?;
        Ok(Some((metadata, body)))
    }

    /// None at the end of the stream.
    fn word(&mut self) -> IpcResult<Option<u32>> {
        let bytes = self.at_most(4)?;
        match bytes.as_slice() {
            [] => Ok(None),
            [a, b, c, d] => Ok(Some(u32::from_le_bytes([*a, *b, *c, *d]))),
            _ => Err("the file is cut off".into()),
        }
    }

    fn at_most(&mut self, size: u64) -> IpcResult<Vec<u8>> {
        at_most(&mut self.input, size)
    }

    fn take(&mut self, size: u64) -> IpcResult<Vec<u8>> {
        let bytes = self.at_most(size)?;
        if bytes.len() as u64 == size { Ok(bytes) } else { Err("the file is cut off".into()) }
    }

    /// The next batch's columns and its number of rows.
    fn batch(&mut self) -> IpcResult<Option<(Vec<ColumnArray>, usize)>> {
        while let Some((metadata, body)) = self.message()? {
            let message = MessageRef::read_as_root(&metadata).map_err(damaged)?;
            match message.header().map_err(damaged)? {
                Some(MessageHeaderRef::RecordBatch(batch)) => {
                    let rows = batch.length().map_err(damaged)?;
                    let mut parts = BatchColumns::new(batch, body, &self.dictionaries)?;
                    let rows = parts.length(rows)?;
                    let columns = self.columns.iter().map(|c| parts.array(c)).collect::<IpcResult<_>>()?;
                    return Ok(Some((columns, rows)));
                }
                Some(MessageHeaderRef::DictionaryBatch(batch)) => {
                    let id = batch.id().map_err(damaged)?;
                    let column = Column::with_dictionary(&self.columns, id)
                        .ok_or_else(|| corrupt("a dictionary without a column"))?;
                    let column = Column { dictionary: None, ..column.clone() };
                    let data = batch.data().map_err(damaged)?;
                    let data = data.ok_or_else(|| corrupt("a dictionary without values"))?;
                    let array = BatchColumns::new(data, body, &self.dictionaries)?.array(&column)?;
                    let dictionary = self.dictionaries.entry(id).or_default();
                    if !batch.is_delta().map_err(damaged)? {
                        dictionary.clear();
                    }
                    dictionary.push(Arc::new(array));
                }
                _ => return Err(corrupt("a message that is not a batch")),
            }
        }
        Ok(None)
    }
}

/// The names of the columns of a stream (or of a file in Arrow's file format, which holds one), and its rows.
pub fn rows(mut input: impl Read + Send + 'static) -> IpcResult<(Vec<String>, ArrowRows)> {
    // The file format puts its name, padded to 8 bytes, before the stream.
    let mut start = at_most(&mut input, 8)?;
    if start.starts_with(b"ARROW1") {
        start.clear();
    }
    let input = std::io::Cursor::new(start).chain(input);
    let mut stream = MessageStream { input, columns: Vec::new(), dictionaries: HashMap::new() };
    let (metadata, _) = stream.message()?.ok_or("the file is empty")?;
    let message = MessageRef::read_as_root(&metadata).map_err(damaged)?;
    let Some(MessageHeaderRef::Schema(schema)) = message.header().map_err(damaged)? else {
        return Err(corrupt("it does not begin with a schema"));
    };
    stream.columns = Column::all(schema)?;
    let names = stream.columns.iter().map(|c| c.name.clone()).collect();
    let batches = std::iter::from_fn(move || stream.batch().transpose());
    let rows = batches.flat_map(|batch| -> ArrowRows {
        match batch {
            Ok((columns, rows)) => Box::new((0..rows).map(move |i| row(&columns, i))),
            Err(e) => Box::new(std::iter::once(Err(e))),
        }
    });
    Ok((names, Box::new(rows)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn fixture(name: &str) -> PathBuf {
        testing::golden::fixture("arrow").join(name)
    }

    fn read(bytes: Vec<u8>) -> IpcResult<Vec<Map<String, Value>>> {
        rows(std::io::Cursor::new(bytes))?.1.collect()
    }

    /// Written by pyarrow (make_types.py): streams without and with compression, and Arrow's file format.
    #[test]
    fn every_type_that_is_read() {
        let expected = std::fs::read_to_string(fixture("types.jsonl")).unwrap();
        let expected: Vec<Map<String, Value>> =
            expected.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for name in ["types.arrow", "types_lz4.arrow", "types_zstd.arrow", "types_file.arrow"] {
            let rows = read(std::fs::read(fixture(name)).unwrap()).unwrap();
            for (row, expected) in rows.iter().zip(&expected) {
                assert_eq!(row, expected, "{name}");
            }
            assert_eq!(rows.len(), 7, "{name}");
        }
    }

    /// Every byte of the metadata and of the columns, changed: rows or an error, no panic.
    #[test]
    fn a_damaged_file_is_an_error_and_no_panic() {
        for name in ["types.arrow", "types_zstd.arrow"] {
            let whole = std::fs::read(fixture(name)).unwrap();
            let mut refused = 0;
            for at in 0..whole.len() {
                for change in [0x01, 0x80, 0xff] {
                    let mut bytes = whole.clone();
                    bytes[at] ^= change;
                    refused += usize::from(read(bytes).is_err());
                }
            }
            assert!(refused > 100, "{name}: {refused} of {} were noticed", 3 * whole.len());
            for end in (1..whole.len() - 8).step_by(97) {
                if let Ok(rows) = read(whole[..end].to_vec()) {
                    assert!(rows.len() < 7, "{name} cut at {end}");
                }
            }
        }
    }
}
