//! Models in GGUF files.

mod file;
pub(super) mod form;
pub(super) mod keys;
mod names;
mod quants;
mod shape;
#[cfg(test)]
mod tests;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use tch::Kind;

use self::file::{GgufReader, LessOne};
use self::names::{GgufSlice, ROPE_FREQS};
use super::source::{RowOrder, TensorBlock, TensorFile, TensorSource, View};
use super::unfit::Unfit;
use crate::config::shape::Shape;
use crate::error::{Context, Error, Result};
use crate::gguf::{Gguf, parts};
use crate::model::layout::layouts;
use crate::telemetry::console::warn_once;

pub(super) use write::Plan;

/// A model in a GGUF file or its parts, checked and ready to be read.
pub struct GgufModel {
    path: PathBuf,
    shape: Shape,
    source: TensorSource,
}

impl GgufModel {
    /// Opens the file, or the first of its parts. Reads and checks all headers; of the tensors only the table of rotary
    /// factors.
    ///
    /// # Errors
    /// Of kind Data: a version, architecture, option or type of a tensor that is not built, parts that are missing, a
    /// damaged file, and in one message all tensors that are missing, superfluous or of another shape.
    pub fn load(path: &Path) -> Result<GgufModel> {
        let paths = parts(path)?;
        let files = paths.iter().map(|path| Gguf::open(path)).collect::<Result<Vec<_>>>()?;
        for (i, file) in files.iter().enumerate() {
            check_part(file, i, files.len()).with_context(|| file.path().display().to_string())?;
        }
        let metadata = files[0].metadata.clone();
        let files: Vec<_> =
            files.into_iter().map(|file| Box::new(GgufReader(file)) as Box<dyn TensorFile>).collect();
        let mut source = TensorSource::of_files(files);
        let read = shape::read(&metadata, &source).context(path.display())?;
        source = find_tensors(source, &read.shape).context(path.display())?;
        for warning in read.warnings {
            warn_once(&format!("{}: {warning}", path.display()));
        }
        Ok(GgufModel { path: path.to_path_buf(), shape: read.shape, source })
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors, under the model's names and in its order.
    pub fn source(&self) -> &TensorSource {
        &self.source
    }

    pub fn into_source(self) -> TensorSource {
        self.source
    }
}

/// Whether a file says of itself that it is part `i` (from 0) of `count`.
fn check_part(file: &Gguf, i: usize, count: usize) -> Result<()> {
    let said = file.metadata.integer("split.count")?.unwrap_or(1).max(1);
    let no = file.metadata.integer("split.no")?.unwrap_or(0);
    if (no, said) == (i as i64, count as i64) {
        return Ok(());
    }
    Err(Error::data(match count {
        1 => format!(
            "it is part {} of {said}: all of them must lie together under their names, NAME-00001-of-{said:05}.gguf and \
             so on, and the first be named",
            no.saturating_add(1)
        ),
        _ => format!(
            "by its name it is part {} of {count}, by split.no and split.count {} of {said}",
            i + 1,
            no.saturating_add(1)
        ),
    }))
}

/// Finds every tensor of the model in the files.
fn find_tensors(files: TensorSource, shape: &Shape) -> Result<TensorSource> {
    let found: BTreeSet<String> = files.names().cloned().collect();
    let one_by_one = found.contains("blk.0.ffn_gate.0.weight");
    let mut wanted: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    let mut places = Vec::new();
    for spec in layouts(shape).into_iter().flat_map(|l| l.specs) {
        let place = names::place(&spec.name, shape, one_by_one)
            .ok_or_else(|| Error::failed(format!("GGUF has no place for `{}`", spec.name)))?;
        match (place.expert, wanted.get_mut(&place.tensor)) {
            // One of several that lie one after the other.
            (None, Some(joined)) => joined[0] = joined[0].max(place.row + spec.shape[0]),
            (None, None) => drop(wanted.insert(place.tensor.clone(), spec.shape.clone())),
            (Some(_), _) => {
                let experts = shape.experts.as_ref().map_or(1, |e| e.num_local_experts);
                wanted.insert(place.tensor.clone(), [&[experts], spec.shape.as_slice()].concat());
            }
        }
        places.push((spec, place));
    }
    let mut unfit = Unfit::of(&wanted, &files)?;
    let family = shape.family;
    let extra = found.iter().filter(|name| !wanted.contains_key(*name) && *name != ROPE_FREQS);
    unfit.extra.extend(extra.map(|name| format!("`{name}` belongs to no {family:?}")));
    unfit.into_result("the tensors do not fit its metadata")?;
    let views = places
        .into_iter()
        .map(|(spec, place)| Ok((spec.name.clone(), view(&files, spec.shape, place, shape)?)));
    let mut source = TensorSource::default();
    source.views = views.collect::<Result<_>>()?;
    source.files = files.files;
    if shape.features.norm_offset {
        source.files = source.files.into_iter().map(|file| Box::new(LessOne(file)) as _).collect();
    }
    Ok(source)
}

/// A tensor of this shape in the files.
fn view(files: &TensorSource, shape: Vec<i64>, place: GgufSlice, model: &Shape) -> Result<View> {
    let whole = files.view(&place.tensor)?;
    let (rows, width) = (shape[0], shape[1..].iter().product::<i64>());
    let order = match place.rotary {
        true => RowOrder::MetaRotary { head_dim: model.head_dim },
        false => RowOrder::Same,
    };
    let block = TensorBlock {
        file: whole.blocks[0].file,
        tensor: place.tensor,
        rows: 0..rows,
        cols: 0..width,
        first: (place.expert.unwrap_or(0) * rows + place.row) * width,
        stride: width,
        order,
    };
    let kind = if place.plus_one { Kind::Float } else { whole.kind };
    Ok(View { shape, kind, width, blocks: vec![block] })
}
