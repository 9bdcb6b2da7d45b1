//! The one seam between file formats and the model: files that hold named tensors ([`TensorFile`]), and where in them
//! every tensor of the model lies ([`TensorSource`]). Whatever the format, a rank reads the elements of its slices and no
//! others, a few megabytes at a time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use kernels::comm::Group;
use tch::{Kind, Tensor};

use super::grow::grown;
use super::tensor_hash::TensorHash;
use crate::distributed::agree::{agree, agree_over};
use crate::distributed::plan::is_adapter;
use crate::distributed::sharded::{Sharded, TensorSpec};
use crate::error::{Context, Error, Result};
use crate::files::CHUNK;
use crate::model::layout::{EMBEDDING, SCORE};

/// An open file whose table of tensors was checked against its size.
pub trait TensorFile: Send + Sync {
    /// Where the file is, for errors.
    fn path(&self) -> &Path;

    /// Names, in the file's order.
    fn names(&self) -> Vec<String>;

    /// Shape and dtype of a tensor. An error (kind Data) if it is not there, or no floating-point tensor.
    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)>;

    /// Whether two names stand for the same bytes of the file.
    fn is_one_tensor(&self, _a: &str, _b: &str) -> bool {
        false
    }

    /// Fills `to` with elements `first..` of the flattened tensor, in the file's dtype.
    fn read_bytes(&self, name: &str, first: i64, to: &mut [u8]) -> Result<()>;
}

/// Fills `dst` (floating-point `[n]`, any device) with `kind` elements, which `read(at, bytes)` gives from element `at`
/// of `dst` on: a few megabytes at a time, converted to `dst`'s dtype.
pub(super) fn fill_chunks(
    dst: &Tensor,
    kind: Kind,
    mut read: impl FnMut(i64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let (element, len) = (kind.elt_size_in_bytes(), dst.numel() as i64);
    let step = (CHUNK / element) as i64;
    let mut buffer = vec![0; CHUNK.min(len as usize * element)];
    for at in (0..len).step_by(step as usize) {
        let n = step.min(len - at);
        let bytes = &mut buffer[..n as usize * element];
        read(at, bytes)?;
        let values = Tensor::f_from_data_size(bytes, &[n], kind)?;
        tch::no_grad(|| dst.f_narrow(0, at, n)?.f_copy_(&values))?;
    }
    Ok(())
}

/// Gives the bytes of `t` (any device and floating-point dtype) as `kind`, in the order of its elements, a few megabytes
/// at a time.
pub(super) fn for_chunks(t: &Tensor, kind: Kind, mut put: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let (element, numel) = (kind.elt_size_in_bytes(), t.numel() as i64);
    let step = (CHUNK / element) as i64;
    let mut buffer = vec![0; CHUNK.min(numel as usize * element)];
    let flat = t.f_detach()?.f_contiguous()?.f_view([-1])?;
    for at in (0..numel).step_by(step as usize) {
        let n = step.min(numel - at);
        let part = flat.f_narrow(0, at, n)?.f_to_kind(kind)?;
        let bytes = &mut buffer[..n as usize * element];
        part.f_copy_data_u8(bytes, n as usize)?;
        put(bytes)?;
    }
    Ok(())
}

/// How rows of a tensor of the model follow one another in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// As in the model.
    Same,
    /// q and k in Meta's files: a head's rotated pairs lie side by side, (0, 1), (2, 3), ..., while Hugging Face's lie
    /// half a head apart, (0, D / 2), (1, D / 2 + 1), ...
    MetaRotary {
        /// D, rows of a head.
        head_dim: i64,
    },
}

impl RowOrder {
    /// The file's row of row `r` of the model's tensor, both counted from the first row of a head.
    pub fn row(self, r: i64) -> i64 {
        match self {
            RowOrder::Same => r,
            RowOrder::MetaRotary { head_dim } => {
                let (head, row, half) = (r / head_dim, r % head_dim, head_dim / 2);
                head * head_dim + row % half * 2 + row / half
            }
        }
    }

    /// Rows of whole heads of the model [H D, C], as the file has them.
    pub fn of_file(self, t: &Tensor) -> Result<Tensor> {
        let rows = t.size()[0];
        let mut from = vec![0; rows as usize];
        (0..rows).for_each(|row| from[self.row(row) as usize] = row);
        Ok(t.f_index_select(0, &Tensor::from_slice(&from))?)
    }
}

/// A rectangle of a tensor of the model, and where its elements lie in a tensor of a file.
#[derive(Debug, Clone)]
pub struct TensorBlock {
    /// Index of the file in the source.
    pub file: usize,
    /// The tensor's name in the file.
    pub tensor: String,
    /// Its rows in the model's tensor.
    pub rows: Range<i64>,
    /// Its columns there, counted in elements of a row of `width`.
    pub cols: Range<i64>,
    /// The element of the flattened tensor in the file that the rectangle begins with.
    pub first: i64,
    /// Elements from one row to the next in the file.
    pub stride: i64,
    /// How its rows follow one another in the file.
    pub order: RowOrder,
}

/// A tensor of the model, put together from rectangles that cover it.
#[derive(Debug, Clone)]
pub struct View {
    /// From the outermost dimension, as the model has it.
    pub shape: Vec<i64>,
    /// Its dtype in the files.
    pub kind: Kind,
    /// Elements of a row. Rows are not bound to the shape: what is cut by elements is one row.
    pub width: i64,
    /// They cover the tensor without overlap.
    pub blocks: Vec<TensorBlock>,
}

impl View {
    /// A whole tensor of a file.
    pub fn whole(file: usize, tensor: &str, shape: Vec<i64>, kind: Kind) -> View {
        let numel = shape.iter().product();
        let block = TensorBlock {
            file,
            tensor: tensor.to_string(),
            rows: 0..1,
            cols: 0..numel,
            first: 0,
            stride: numel,
            order: RowOrder::Same,
        };
        View { shape, kind, width: numel, blocks: vec![block] }
    }

    /// The number of elements.
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Calls `f(block, from, to, n)` for runs that cover elements `first..first + len`: elements `from..from + n` of the
    /// block's tensor are elements `to..to + n` of the range.
    fn runs(
        &self,
        first: i64,
        len: i64,
        mut f: impl FnMut(&TensorBlock, i64, i64, i64) -> Result<()>,
    ) -> Result<()> {
        let (mut at, end) = (first, first + len);
        while at < end {
            let (row, col) = (at / self.width, at % self.width);
            let block = self.blocks.iter().find(|b| b.rows.contains(&row) && b.cols.contains(&col));
            let block = block.ok_or_else(|| Error::failed(format!("no file holds element {at}")))?;
            let whole_rows =
                block.order == RowOrder::Same && block.cols == (0..self.width) && block.stride == self.width;
            let left = if whole_rows { block.rows.end * self.width - at } else { block.cols.end - col };
            let n = left.min(end - at);
            let from = block.first
                + block.order.row(row - block.rows.start) * block.stride
                + (col - block.cols.start);
            f(block, from, at - first, n)?;
            at += n;
        }
        Ok(())
    }
}

/// The tensors of a model under the model's names, in whatever files they lie.
#[derive(Default)]
pub struct TensorSource {
    /// Open files; blocks name them by index.
    pub files: Vec<Box<dyn TensorFile>>,
    /// By the name of the model's tensor.
    pub views: HashMap<String, View>,
    /// Tensors that no model consists of, such as tables of integers, with what to tell when one is asked for.
    unusable: HashMap<String, Error>,
    /// Tensors of the files that are none of the model's.
    pub left_out: Vec<String>,
}

impl TensorSource {
    /// All tensors of files under their own names.
    pub fn of_files(files: Vec<Box<dyn TensorFile>>) -> TensorSource {
        let mut source = TensorSource { files, ..TensorSource::default() };
        for i in 0..source.files.len() {
            for name in source.files[i].names() {
                source.take_from(i, &name);
            }
        }
        source
    }

    /// Takes a tensor, under its own name, from this file.
    pub fn take_from(&mut self, file: usize, name: &str) {
        match self.files[file].info(name) {
            Ok((shape, kind)) => {
                self.unusable.remove(name);
                self.views.insert(name.to_string(), View::whole(file, name, shape, kind));
            }
            Err(e) => {
                self.views.remove(name);
                self.unusable.insert(name.to_string(), e);
            }
        }
    }

    /// The same files under other names: each tensor (name and shape) is rows of one that is whole now, from a row on.
    pub fn regroup(
        self,
        tensors: impl Iterator<Item = (String, Vec<i64>, String, i64)>,
    ) -> Result<TensorSource> {
        let mut views = HashMap::new();
        for (name, shape, tensor, row) in tensors {
            let view = self.view(&tensor)?;
            let TensorBlock { file, .. } = view.blocks[0];
            let mut part = View::whole(file, &tensor, shape, view.kind);
            part.blocks[0].first = row * part.shape[1..].iter().product::<i64>();
            views.insert(name, part);
        }
        Ok(TensorSource { files: self.files, views, unusable: HashMap::new(), left_out: self.left_out })
    }

    /// The same tensors, but for those that `over` has too: they are its.
    pub fn overlaid(mut self, over: TensorSource) -> TensorSource {
        let before = self.files.len();
        self.files.extend(over.files);
        self.left_out.extend(over.left_out);
        for (name, mut view) in over.views {
            view.blocks.iter_mut().for_each(|b| b.file += before);
            self.unusable.remove(&name);
            self.views.insert(name, view);
        }
        self
    }

    /// The names of all tensors, usable or not.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.views.keys().chain(self.unusable.keys())
    }

    /// Where a tensor lies. An error (kind Data) if it is not there, or no floating-point tensor.
    pub fn view(&self, name: &str) -> Result<&View> {
        self.views.get(name).ok_or_else(|| match self.unusable.get(name) {
            Some(e) => e.clone(),
            None => Error::data(format!("there is no tensor `{name}`")),
        })
    }

    /// Fills `dst` (floating-point `[n]`, any device) with elements `first..first + n` of the flattened tensor.
    pub fn read(&self, name: &str, first: i64, dst: &Tensor) -> Result<()> {
        self.read_and(name, first, dst, |_, _| {})
    }

    /// [`TensorSource::read`], which also gives what was read to `see(first, bytes)`: bytes `first..` of the flattened tensor.
    pub fn read_and(
        &self,
        name: &str,
        first: i64,
        dst: &Tensor,
        mut see: impl FnMut(u64, &[u8]),
    ) -> Result<()> {
        let view = self.view(name)?;
        let (len, numel) = (dst.numel() as i64, view.numel());
        if first < 0 || first + len > numel {
            return Err(Error::data(format!(
                "tensor `{name}` has {numel} elements, wanted {first} to {}",
                first + len
            )));
        }
        let element = view.kind.elt_size_in_bytes();
        fill_chunks(dst, view.kind, |at, bytes| {
            self.read_bytes(view, first + at, bytes)?;
            see((first + at) as u64 * element as u64, bytes);
            Ok(())
        })
        .with_context(|| format!("tensor `{name}`"))
    }

    /// Fills `bytes` with elements `first..` of a flattened tensor, in the files' dtype.
    fn read_bytes(&self, view: &View, first: i64, bytes: &mut [u8]) -> Result<()> {
        let element = view.kind.elt_size_in_bytes();
        view.runs(first, (bytes.len() / element) as i64, |block, from, to, n| {
            let part = &mut bytes[to as usize * element..(to + n) as usize * element];
            self.files[block.file].read_bytes(&block.tensor, from, part)
        })
    }

    /// The hash of tensors, by their names here and in the hash, as far as they are here. The ranks of `group` read them
    /// together. Collective.
    pub fn hash<'a>(
        &self,
        names: impl Iterator<Item = (&'a str, &'a str)>,
        group: &Group,
    ) -> Result<TensorHash> {
        let mut buffer = vec![0; CHUNK];
        let (mut hash, mut turn) = (TensorHash::default(), 0);
        let read = || -> Result<()> {
            for (name, view) in names.filter_map(|(here, name)| Some((name, self.views.get(here)?))) {
                let element = view.kind.elt_size_in_bytes();
                let step = (CHUNK / element) as i64;
                for first in (0..view.numel()).step_by(step as usize) {
                    turn += 1;
                    if turn % group.size() != group.rank() {
                        continue;
                    }
                    let bytes = &mut buffer[..step.min(view.numel() - first) as usize * element];
                    self.read_bytes(view, first, bytes).with_context(|| format!("tensor `{name}`"))?;
                    hash.add(name, first as u64 * element as u64, bytes);
                }
            }
            Ok(())
        };
        let read = read();
        agree(group, read)?;
        hash.over(group)
    }

    /// A whole tensor, in the dtype that it has in the files.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let view = self.view(name)?;
        let t = Tensor::f_empty([view.numel()], (view.kind, tch::Device::Cpu))?;
        self.read(name, 0, &t)?;
        Ok(t.f_view(view.shape.as_slice())?)
    }

    /// Whether two tensors are the same, byte for byte; stops at the first difference.
    pub fn equal(&self, a: &str, b: &str) -> Result<bool> {
        let (x, y) = (self.view(a)?, self.view(b)?);
        if x.shape != y.shape || x.kind != y.kind {
            return Ok(false);
        }
        // A file that has one storage for both.
        if let ([x], [y]) = (&x.blocks[..], &y.blocks[..])
            && x.file == y.file
            && self.files[x.file].is_one_tensor(&x.tensor, &y.tensor)
        {
            return Ok(true);
        }
        let bits = match x.kind.elt_size_in_bytes() {
            2 => Kind::Int16,
            4 => Kind::Int,
            _ => Kind::Int64,
        };
        let step = (CHUNK / x.kind.elt_size_in_bytes()) as i64;
        for first in (0..x.numel()).step_by(step as usize) {
            let part = |name: &str| -> Result<Tensor> {
                let t = Tensor::f_empty([step.min(x.numel() - first)], (x.kind, tch::Device::Cpu))?;
                self.read(name, first, &t)?;
                Ok(t.f_view_dtype(bits)?)
            };
            if !part(a)?.f_equal(&part(b)?)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Fills the parameters, whose vocabulary may be larger than the model's (see [`super::grow`]); every rank reads its
    /// own slices only. A scalar head that is not there stays as it is. All ranks that hold them call this, and fail
    /// together. Returns the hash of what is not trained.
    pub fn fill(&self, params: &mut Sharded) -> Result<TensorHash> {
        let wanted = |spec: &TensorSpec| {
            !is_adapter(&spec.name) && (spec.name != SCORE || self.views.contains_key(SCORE))
        };
        let rows = agree_over(params, self.view(EMBEDDING).map(|view| view.shape[0]))?;
        self.fill_where(params, rows, wanted, |name| name.to_string())
    }

    /// Fills the tensors that are `wanted`, each from the one that `named` gives; this is a model with a vocabulary of `rows`.
    /// Returns the hash of those that are not trained. Collective over the ranks that hold the parameters.
    pub fn fill_where(
        &self,
        params: &mut Sharded,
        rows: i64,
        wanted: impl Fn(&TensorSpec) -> bool,
        named: impl Fn(&str) -> String,
    ) -> Result<TensorHash> {
        let (counted, hash) = (params.counted(), RefCell::new(TensorHash::default()));
        let read = |spec: &TensorSpec, first, values: &Tensor| {
            let counts = counted.contains(&spec.name);
            self.read_and(&named(&spec.name), first, values, |at, bytes| {
                if counts {
                    hash.borrow_mut().add(&spec.name, at, bytes);
                }
            })
        };
        let peek = |spec: &TensorSpec, first, values: &Tensor| self.read(&named(&spec.name), first, values);
        let mine = params.fill_where(wanted, true, &mut grown(rows, read, peek));
        agree_over(params, mine)?;
        let (mine, sharding) = (hash.into_inner(), params.sharding());
        mine.over(&sharding.shard)?.over(&sharding.tensor.group)?.over(&sharding.pipeline.axis.group)
    }
}
