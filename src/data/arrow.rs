//! Data sets that Hugging Face's datasets wrote by `save_to_disk`: a folder of Arrow files (IPC streams) and `state.json`, which
//! names them.

mod ipc;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::files::{exists, read_error};

/// The part of `state.json` that is read.
#[derive(Deserialize)]
struct DatasetState {
    #[serde(rename = "_data_files")]
    files: Vec<FilePart>,
    /// Where a selection or an order of the rows stands beside them.
    #[serde(rename = "_indices_data_files", default)]
    indices: Option<Vec<FilePart>>,
}

#[derive(Deserialize)]
struct FilePart {
    filename: String,
}

/// Whether a folder is a data set by `save_to_disk`.
pub fn is_data_set(dir: &Path) -> Result<bool> {
    Ok(exists(&dir.join("state.json"))? || exists(&dir.join("dataset_dict.json"))?)
}

/// The Arrow files of a folder, in their order.
///
/// # Errors
/// Of kind Data: a folder of several splits, which are named; one that is no data set; a damaged `state.json`.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let wrong = |path: &Path, what: &dyn std::fmt::Display| {
        Error::data(format!("cannot read {}: {what}", path.display()))
    };
    let splits = dir.join("dataset_dict.json");
    if exists(&splits)? {
        let text = std::fs::read(&splits).map_err(|e| read_error(&splits, &e))?;
        let names: Value = serde_json::from_slice(&text).map_err(|e| wrong(&splits, &e))?;
        let names: Vec<&str> =
            names["splits"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let message =
            format!("{} holds the splits {}; name the folder of one", dir.display(), names.join(", "));
        return Err(Error::data(message));
    }
    let path = dir.join("state.json");
    if !exists(&path)? {
        let what = "is a folder, but not a data set written by `save_to_disk` of Hugging Face's datasets (there is no \
                    state.json); name the files in it";
        return Err(Error::data(format!("{} {what}", dir.display())));
    }
    let text = std::fs::read(&path).map_err(|e| read_error(&path, &e))?;
    let state: DatasetState = serde_json::from_slice(&text).map_err(|e| wrong(&path, &e))?;
    if state.indices.is_some_and(|parts| !parts.is_empty()) {
        let what = "its rows are selected or ordered by a file of indices; call flatten_indices() before save_to_disk";
        return Err(Error::data(format!("{}: {what}", dir.display())));
    }
    match state.files.iter().find(|part| Path::new(&part.filename).components().count() != 1) {
        Some(part) => {
            Err(wrong(&path, &format!("`{}` is not the name of a file in its folder", part.filename)))
        }
        None => Ok(state.files.iter().map(|part| dir.join(&part.filename)).collect()),
    }
}

/// The names of the columns of a file (an IPC stream), and its rows.
pub fn rows(file: impl Read + Send + 'static) -> std::result::Result<(Vec<String>, ipc::ArrowRows), String> {
    ipc::rows(BufReader::with_capacity(1 << 18, file))
}

/// All bytes of a data set on disk.
pub fn bytes(dir: &Path) -> u64 {
    let files = files(dir).unwrap_or_default();
    files.iter().filter_map(|path| File::open(path).ok()?.metadata().ok()).map(|m| m.len()).sum()
}
