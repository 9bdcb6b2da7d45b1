//! Rows of tables as records: folders of Arrow files, Parquet files.

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row, reader::RowIter};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::input::Counted;
use super::{Record, RecordPlace, RecordUnit, RecordsOrErrors, fused, missing_key};
use crate::content;
use crate::data::arrow;
use crate::error::{Error, Result};
use crate::files::read_error;

/// The rows of all files of a data set, numbered through.
pub(super) fn arrow_rows(
    dir: &Path,
    columns: Option<&[&str]>,
    bytes: &Arc<AtomicU64>,
) -> Result<RecordsOrErrors> {
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
        let place = RecordPlace { path: path.clone(), unit: RecordUnit::Row, number };
        Ok(Ok(Record { fields: row?, place }))
    })))
}

/// The rows of a Parquet file.
pub(super) fn parquet_rows(
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
        let place = RecordPlace { path: path.clone(), unit: RecordUnit::Row, number };
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
