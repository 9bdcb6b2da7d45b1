//! Where in Megatron's files every tensor of the model lies.

use std::collections::HashMap;
use std::ops::Range;

use super::names::{CoreTensor, RowRun};
use crate::checkpoint::source::{RowOrder, TensorBlock, TensorFile, TensorSource, View};
use crate::checkpoint::unfit::Unfit;
use crate::config::shape::Shape;
use crate::error::{Error, Result};
use crate::model::layout::layouts;

/// A rectangle of a tensor of Megatron's, and where its elements lie in a tensor of a file.
#[derive(Debug, Clone)]
pub(super) struct Rectangle {
    /// Index of the file.
    pub file: usize,
    /// The tensor's name in the file.
    pub tensor: String,
    /// The element there that the rectangle begins with.
    pub first: i64,
    /// Elements from one row to the next there.
    pub stride: i64,
    pub rows: Range<i64>,
    pub cols: Range<i64>,
}

impl Rectangle {
    /// The part of it that is rows of a tensor of the model.
    fn block(&self, at: i64, run: &RowRun) -> Option<TensorBlock> {
        let rows = self.rows.start.max(at)..self.rows.end.min(at + run.rows);
        (!rows.is_empty()).then(|| TensorBlock {
            file: self.file,
            tensor: self.tensor.clone(),
            rows: rows.start - at + run.first..rows.end - at + run.first,
            cols: self.cols.clone(),
            first: self.first + (rows.start - self.rows.start) * self.stride,
            stride: self.stride,
            order: RowOrder::Same,
        })
    }
}

/// Finds every tensor of the model. `locate` gives the rectangles that cover a tensor of Megatron's, or none where it is missing;
/// `others` are tensors of the files that are none of the model's.
pub(super) fn find(
    source: &mut TensorSource,
    shape: &Shape,
    tensors: &[CoreTensor],
    locate: impl Fn(&[Box<dyn TensorFile>], &CoreTensor) -> Result<Option<Vec<Rectangle>>>,
    others: Vec<String>,
) -> Result<()> {
    let mut unfit = Unfit::default();
    let mut blocks: HashMap<String, Vec<TensorBlock>> = HashMap::new();
    for tensor in tensors {
        let rectangles = match locate(&source.files, tensor) {
            Ok(Some(rectangles)) => rectangles,
            Ok(None) => {
                unfit.missing.push(format!("{} is missing", described(tensor)));
                continue;
            }
            Err(e) => {
                unfit.wrong.push(e.message);
                continue;
            }
        };
        let mut at = 0;
        for run in &tensor.runs {
            let parts = rectangles.iter().filter_map(|rectangle| rectangle.block(at, run));
            blocks.entry(run.tensor.clone()).or_default().extend(parts);
            at += run.rows;
        }
    }
    unfit.extra = others.into_iter().map(|name| format!("`{name}` belongs to no such model")).collect();
    unfit.into_result("the tensors do not fit its args")?;
    for spec in layouts(shape).into_iter().flat_map(|layout| layout.specs) {
        let blocks = blocks.remove(&spec.name).unwrap_or_default();
        let view = view(&source.files, &spec.name, spec.shape, blocks)?;
        source.views.insert(spec.name, view);
    }
    Ok(())
}

/// A tensor's name for error messages.
fn described(tensor: &CoreTensor) -> String {
    use super::names::StageHolder;
    match tensor.holder {
        StageHolder::Layer(layer) => format!("`{}` of layer {layer}", tensor.local),
        StageHolder::First | StageHolder::Last => format!("`{}`", tensor.local),
    }
}

/// A tensor of the model, of blocks that cover it.
fn view(
    files: &[Box<dyn TensorFile>],
    name: &str,
    shape: Vec<i64>,
    blocks: Vec<TensorBlock>,
) -> Result<View> {
    let area =
        |block: &TensorBlock| (block.rows.end - block.rows.start) * (block.cols.end - block.cols.start);
    let kind = blocks.first().map(|block| files[block.file].info(&block.tensor)).transpose()?;
    let covered = blocks.iter().map(area).sum::<i64>() == shape.iter().product::<i64>();
    let Some((_, kind)) = kind.filter(|_| covered) else {
        return Err(Error::data(format!("`{name}` is not wholly in the files")));
    };
    for block in &blocks {
        let (_, other) = files[block.file].info(&block.tensor)?;
        if other != kind {
            let (tensor, path) = (&block.tensor, files[block.file].path().display());
            return Err(Error::data(format!("{path}: `{tensor}` is {other:?}, another part of it {kind:?}")));
        }
    }
    let width = shape.get(1).copied().unwrap_or(1);
    Ok(View { shape, kind, width, blocks })
}
