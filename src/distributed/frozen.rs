//! Parameters that are not trained: no masters, no gradients, no moments. The tensors of a group lie one after the other
//! in one flat buffer of bytes, in the compute dtype or quantized, of which a rank owns a slice.

use kernels::comm::{Group, Work};
use kernels::ops::Float8Weight;
use kernels::quant::{Quantized, Quantizer, Scheme};
use tch::{Device, Kind, Tensor};

use crate::distributed::cut::Share;
use crate::distributed::layout::{TensorSpec, padded_slice};
use crate::error::Result;

/// How a tensor that is not trained is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// In the compute dtype.
    Dense,
    /// In int8 or nf4, with scales.
    Quantized(Scheme),
}

/// A tensor as it is used.
#[derive(Debug)]
pub enum FrozenValue {
    /// In the compute dtype, in the shape of the tensor.
    Dense(Tensor),
    /// Codes and scales, which products read without a dense copy.
    Quantized(Quantized),
    /// In 8-bit floats, for products that are taken in them.
    Float8(Float8Weight),
}

/// Every buffer begins at a multiple of this, so that its elements are aligned and none lies in two slices.
const ALIGNMENT: i64 = 64;

/// Values that are quantized at once: what exists of a weight in float32.
const PANEL: i64 = 4 << 20;

/// A part of a tensor's bytes: dtype, elements, first byte.
type BufferSpec = (Kind, i64, i64);

struct FrozenTensor {
    /// Its offset is the first byte.
    spec: TensorSpec,
    /// Of the whole tensor; see [`FrozenTensor::kept`].
    storage: Storage,
    buffers: Vec<BufferSpec>,
}

impl FrozenTensor {
    /// How it lies here: a part of a quantized weight may be stored otherwise than the whole.
    fn kept(&self) -> Storage {
        kept(&self.spec, self.storage)
    }

    /// Whether it is read as a whole, on every rank that has a part of it.
    fn is_read_whole(&self) -> bool {
        self.storage != Storage::Dense && matches!(self.spec.share, Share::Cut(_))
    }
}

fn kept(spec: &TensorSpec, storage: Storage) -> Storage {
    match (storage, spec.share) {
        (Storage::Quantized(scheme), Share::Cut(_)) => Storage::Quantized(Quantized::scheme_of_part(scheme)),
        _ => storage,
    }
}

/// The tensors of a group that are not trained.
pub struct Frozen {
    entries: Vec<FrozenTensor>,
    /// Bytes of every rank's slice, padding included.
    shard_len: i64,
    /// This rank's slice, uint8.
    local: Tensor,
    full: Option<Tensor>,
    gathering: Option<Work>,
    device: Device,
}

impl Frozen {
    /// Lays `tensors` one after the other into a slice of zeros for each of `ranks` ranks; `compute` is the dtype of
    /// dense ones.
    pub fn new(
        tensors: impl Iterator<Item = (TensorSpec, Storage)>,
        compute: Kind,
        ranks: i64,
        device: Device,
    ) -> Frozen {
        let (entries, bytes) = lay_out(tensors, compute);
        let shard_len = padded_slice(bytes, ranks);
        let local = Tensor::zeros([shard_len], (Kind::Uint8, device));
        Frozen { entries, shard_len, local, full: None, gathering: None, device }
    }

    /// Whether the group has no frozen tensors.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of this rank's slice.
    pub fn bytes(&self) -> i64 {
        self.shard_len
    }

    /// This rank's slice, uint8.
    pub fn local(&self) -> &Tensor {
        &self.local
    }

    /// The same bytes elsewhere.
    pub fn set_local(&mut self, local: Tensor) {
        self.local = local;
    }

    /// How tensor `index` is kept.
    pub fn storage(&self, index: usize) -> Storage {
        self.entries[index].storage
    }

    /// Whether tensor `index` follows the one before without a gap, both of them dense: together they are one.
    pub fn follows(&self, index: usize) -> bool {
        let (Some(a), b) = (index.checked_sub(1).map(|a| &self.entries[a]), &self.entries[index]) else {
            return false;
        };
        let dense = |e: &FrozenTensor| e.storage == Storage::Dense;
        let (kind, n, first) = a.buffers[0];
        dense(a) && dense(b) && first + n * kind.elt_size_in_bytes() as i64 == b.spec.offset
    }

    /// Starts gathering, if that is needed.
    pub fn prefetch(&mut self, shard: &Group) -> Result<()> {
        if self.full.is_some() || self.is_empty() {
            return Ok(());
        }
        if shard.size() == 1 {
            self.full = Some(self.local.shallow_clone());
            return Ok(());
        }
        let full = Tensor::empty([self.shard_len * shard.size()], (Kind::Uint8, self.device));
        self.gathering = Some(shard.all_gather(&full, &self.local)?); // collective, overlaps what follows
        self.full = Some(full);
        Ok(())
    }

    /// All bytes; none where there are no tensors. Held until [`Frozen::release`].
    pub fn full(&mut self, shard: &Group) -> Result<Option<Tensor>> {
        self.prefetch(shard)?;
        if let Some(work) = self.gathering.take() {
            work.wait()?;
        }
        Ok(self.full.as_ref().map(Tensor::shallow_clone))
    }

    /// All bytes, to be dropped by the caller.
    pub fn gather(&self, shard: &Group) -> Result<Option<Tensor>> {
        if self.is_empty() || shard.size() == 1 {
            return Ok((!self.is_empty()).then(|| self.local.shallow_clone()));
        }
        let full = Tensor::empty([self.shard_len * shard.size()], (Kind::Uint8, self.device));
        shard.all_gather(&full, &self.local)?.wait()?; // collective
        Ok(Some(full))
    }

    /// Drops the gathered bytes; this rank's slice stays.
    pub fn release(&mut self) {
        self.gathering = None;
        self.full = None;
    }

    /// Tensor `index` as a view of all bytes; with those that follow it, `size` is that of them all.
    pub fn value(&self, index: usize, size: &[i64], full: &Tensor) -> Result<FrozenValue> {
        let entry = &self.entries[index];
        let view = |&(kind, n, first): &BufferSpec| {
            let bytes = full.f_narrow(0, first, n * kind.elt_size_in_bytes() as i64)?;
            if kind == Kind::Uint8 { Ok(bytes) } else { bytes.f_view_dtype(kind) }
        };
        Ok(match (entry.kept(), entry.spec.shape[..].try_into()) {
            (Storage::Quantized(scheme), Ok(shape)) => {
                let buffers = entry.buffers.iter().map(view).collect::<Result<_, _>>()?;
                FrozenValue::Quantized(Quantized::from_buffers(scheme, shape, buffers)?)
            }
            _ => {
                let (kind, _, first) = entry.buffers[0];
                FrozenValue::Dense(view(&(kind, size.iter().product(), first))?.f_view(size)?)
            }
        })
    }

    /// The tensors of which a hash of all ranks' reads in [`Frozen::fill`] is to count those of this rank: of a dense one every
    /// rank reads its own part, a quantized one is read whole by each that has some of it.
    /// With it, whether tensor-parallel ranks read it as a whole, each for its part.
    pub fn counted(&self, rank: i64) -> impl Iterator<Item = (&TensorSpec, bool)> {
        let slice = rank * self.shard_len..(rank + 1) * self.shard_len;
        let counts = move |e: &&FrozenTensor| e.storage == Storage::Dense || slice.contains(&e.spec.offset);
        self.entries.iter().filter(counts).map(|e| (&e.spec, e.is_read_whole()))
    }

    /// Sets the values of the tensors that are `wanted`: `f(spec, first, values)` fills `values` (in any float dtype, `[n]`) with elements `first..first + n`
    /// of the flattened tensor `spec`. What is quantized is asked for by rows in float32, whole even where only a part of
    /// it lies in this rank's slice; of it some megabytes exist at a time.
    pub fn fill(
        &mut self,
        rank: i64,
        wanted: impl Fn(&TensorSpec) -> bool,
        mut f: impl FnMut(&TensorSpec, i64, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let start = rank * self.shard_len;
        // The bytes of a buffer that lie in the slice: first byte there, bytes before them in the buffer, count.
        let overlap = |&(kind, n, first): &BufferSpec| {
            let end = first + n * kind.elt_size_in_bytes() as i64;
            let (a, b) = (first.max(start), end.min(start + self.shard_len));
            (a < b).then_some((a - start, a - first, b - a))
        };
        for entry in self.entries.iter().filter(|e| wanted(&e.spec)) {
            let parts: Vec<_> = entry.buffers.iter().map(overlap).collect();
            if parts.iter().all(Option::is_none) {
                continue;
            }
            match (entry.storage, entry.spec.shape[..].try_into()) {
                (Storage::Quantized(scheme), Ok::<[i64; 2], _>(shape)) => {
                    // The scales of a part are those that its values have in the whole.
                    let whole = entry.spec.whole();
                    let whole_shape = [whole.shape[0], whole.shape[1]];
                    let mut weight = quantize(scheme, whole_shape, self.device, |row, values| {
                        f(&whole, row * whole_shape[1], values)
                    })?;
                    if let Share::Cut(cut) = entry.spec.share {
                        let own = cut.first..cut.first + shape[cut.dim];
                        weight = match cut.dim {
                            0 => weight.part(own, 0..shape[1])?,
                            _ => weight.part(0..shape[0], own)?,
                        };
                    }
                    for (part, buffer) in parts.iter().zip(weight.buffers()) {
                        let Some((to, from, n)) = *part else { continue };
                        let bytes = buffer.f_view_dtype(Kind::Uint8)?.f_narrow(0, from, n)?;
                        self.local.narrow(0, to, n).f_copy_(&bytes)?;
                    }
                }
                _ => {
                    let (kind, _, _) = entry.buffers[0];
                    if let Some((to, from, n)) = parts[0] {
                        let values = self.local.narrow(0, to, n).f_view_dtype(kind)?;
                        f(&entry.spec, from / kind.elt_size_in_bytes() as i64, &values)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The tensors' places one after the other, and the bytes of all.
fn lay_out(tensors: impl Iterator<Item = (TensorSpec, Storage)>, compute: Kind) -> (Vec<FrozenTensor>, i64) {
    let mut end = 0;
    let entries = tensors.map(|(mut spec, storage)| {
        spec.offset = end;
        let parts = match (kept(&spec, storage), spec.shape[..].try_into()) {
            (Storage::Quantized(scheme), Ok(shape)) => scheme.buffers(shape),
            _ => vec![(compute, spec.numel())],
        };
        let mut place = |(kind, n): (Kind, i64)| {
            let first = end;
            end += n * kind.elt_size_in_bytes() as i64;
            end = (end + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
            (kind, n, first)
        };
        let buffers = parts.into_iter().map(&mut place).collect();
        FrozenTensor { spec, storage, buffers }
    });
    (entries.collect(), end)
}

/// Bytes of one rank's slice of tensors that are not trained.
pub(super) fn slice_bytes(
    tensors: impl Iterator<Item = (TensorSpec, Storage)>,
    compute: Kind,
    ranks: i64,
) -> i64 {
    padded_slice(lay_out(tensors, compute).1, ranks)
}

/// Quantizes a weight whose rows from `row` on `read(row, values)` gives, some at a time.
pub fn quantize(
    scheme: Scheme,
    shape: [i64; 2],
    device: Device,
    mut read: impl FnMut(i64, &Tensor) -> Result<()>,
) -> Result<Quantized> {
    let mut quantizer = Quantizer::new(scheme, shape, device);
    let step = quantizer.panel_rows(PANEL).min(shape[0]);
    let panel = Tensor::empty([step * shape[1]], (Kind::Float, device));
    let mut row = 0;
    while row < shape[0] {
        let n = step.min(shape[0] - row);
        let values = panel.narrow(0, 0, n * shape[1]);
        read(row, &values)?;
        quantizer.push(&values.view([n, shape[1]]))?;
        row += n;
    }
    Ok(quantizer.finish()?)
}
