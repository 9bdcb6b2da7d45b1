//! The format `torch_dist`: whole tensors, in files of PyTorch's distributed checkpoints.
//!
//! `.metadata` is a pickle that says of every tensor its size and the rectangles that it was saved in, and of every rectangle the
//! part of a `.distcp` file that is its own file of `torch.save`. Layers that are alike lie in one tensor, one after the other, and
//! so do experts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::OpenFiles;
use super::args::Args;
use super::find::Rectangle;
use super::names::{CoreTensor, RankDivision, StageHolder};
use super::ranks::checkpoint_args;
use crate::checkpoint::pickle::{Foreign, MAX_DIMENSIONS, MAX_NAME, Pickle, PickleNode, TensorRef};
use crate::checkpoint::source::TensorFile;
use crate::checkpoint::torch_file::TorchReader;
use crate::error::{Error, Result};
use crate::files::{exists, read_error};

/// What says where tensors lie; its presence names the format.
pub(super) const METADATA: &str = ".metadata";

/// Which format a checkpoint is in.
pub(super) const FORMAT: &str = "metadata.json";

/// What else a checkpoint has.
pub(super) const COMMON: &str = "common.pt";

/// The object that newer Megatron saves instead of that file.
const COMMON_STATE: &str = "common_state/";

/// A file that is one tensor has it under this name.
const ONLY: &str = "tensor";

/// Whether a tensor is none of the model's: a state of the optimizer, of one of several (`chained_0.`), or of a module besides its
/// weights.
fn is_state(name: &str) -> bool {
    let of_several = name.strip_prefix("chained_").and_then(|rest| rest.split_once('.'));
    let inner =
        of_several.filter(|(i, _)| i.bytes().all(|b| b.is_ascii_digit())).map_or(name, |(_, rest)| rest);
    inner.starts_with("optimizer") || name.contains("._extra_state")
}

/// The tensors of a checkpoint, as its metadata says.
pub(super) struct SharedTensors(BTreeMap<String, SavedTensor>);

/// A tensor, and the rectangles that it was saved in.
struct SavedTensor {
    size: Vec<i64>,
    chunks: Vec<SavedChunk>,
}

struct SavedChunk {
    offsets: Vec<i64>,
    sizes: Vec<i64>,
    /// Index of the file that is this chunk.
    file: usize,
}

impl SharedTensors {
    /// Opens an iteration: its metadata, and the parts of files that are weights.
    pub fn open(iteration: &Path) -> Result<(SharedTensors, OpenFiles, Args)> {
        let path = iteration.join(METADATA);
        let bytes = std::fs::read(&path).map_err(|e| read_error(&path, &e))?;
        let metadata = Pickle::read(&bytes, Foreign::Kept)
            .map_err(|e| format!("{e}; the file is damaged: get it again"))
            .and_then(|pickle| SavedMetadata::read(pickle.top()))
            .map_err(|e| Error::data(format!("{}: {e}", path.display())))?;
        let args = common_args(iteration, metadata.common.as_ref())?;
        let (mut files, mut open) = (Vec::new(), HashMap::new());
        let mut tensors = BTreeMap::new();
        for (name, size, chunks) in metadata.tensors {
            let mut saved = SavedTensor { size, chunks: Vec::new() };
            for (offsets, sizes) in chunks {
                let key = (name.clone(), offsets.clone());
                let Some(place) = metadata.places.get(&key) else {
                    return Err(Error::data(format!(
                        "{}: it does not say where `{name}` at {offsets:?} lies",
                        path.display()
                    )));
                };
                saved.chunks.push(SavedChunk { offsets, sizes: sizes.clone(), file: files.len() });
                files.push(open_chunk(iteration, place, &name, &sizes, &mut open)?);
            }
            tensors.insert(name, saved);
        }
        Ok((SharedTensors(tensors), files, args))
    }

    /// For every tensor its name, its size, and offsets and file of its chunks.
    #[cfg(test)]
    pub fn chunks(&self) -> impl Iterator<Item = (&str, &[i64], impl Iterator<Item = (&[i64], usize)>)> {
        self.0.iter().map(|(name, saved)| {
            let chunks = saved.chunks.iter().map(|chunk| (chunk.offsets.as_slice(), chunk.file));
            (name.as_str(), saved.size.as_slice(), chunks)
        })
    }

    /// Rows of a tensor that is in no layer; none where it is not there.
    pub fn rows(&self, name: &str) -> Option<i64> {
        self.0.get(name)?.size.first().copied()
    }

    /// The names that a tensor of a layer may have, with the indices that lead to it there: layers in one tensor or each in its own,
    /// and experts likewise.
    fn candidates(tensor: &CoreTensor, name: &str) -> Vec<(String, Vec<i64>)> {
        let StageHolder::Layer(layer) = tensor.holder else { return vec![(name.to_string(), vec![])] };
        let expert: Vec<i64> = tensor.expert.into_iter().collect();
        let mut found = vec![
            (format!("decoder.layers.{name}"), [vec![layer], expert.clone()].concat()),
            (format!("decoder.layers.{layer}.{name}"), expert),
        ];
        if let Some(expert) = tensor.expert {
            let name = name.replace("experts.experts.", &format!("experts.experts.{expert}."));
            found.push((format!("decoder.layers.{layer}.{name}"), vec![]));
        }
        found
    }

    /// The tensor of one of these names that there is, of their candidates.
    fn stored(&self, tensor: &CoreTensor, names: &[&str]) -> Option<(String, Vec<i64>)> {
        let candidates = names.iter().flat_map(|name| SharedTensors::candidates(tensor, name));
        candidates.into_iter().find(|(name, _)| self.0.contains_key(name))
    }

    /// The names of a whole tensor.
    fn names(tensor: &CoreTensor) -> [&str; 2] {
        [&tensor.shared, &tensor.engine]
    }

    /// Gate and up in tensors of their own.
    fn halves(tensor: &CoreTensor) -> [String; 2] {
        ["_w", "_v"].map(|half| format!("{}{half}", tensor.shared))
    }

    /// Where a tensor lies; none where it is not there.
    pub fn locate(&self, tensor: &CoreTensor) -> Result<Option<Vec<Rectangle>>> {
        if let Some((name, indices)) = self.stored(tensor, &SharedTensors::names(tensor)) {
            return self.rectangles(&name, &indices, &tensor.shape, 0).map(Some);
        }
        if tensor.division != RankDivision::HalvesByRows {
            return Ok(None);
        }
        let (mut found, mut half) = (Vec::new(), tensor.shape.clone());
        half[0] /= 2;
        for (i, name) in SharedTensors::halves(tensor).iter().enumerate() {
            let Some((name, indices)) = self.stored(tensor, &[name]) else { return Ok(None) };
            found.extend(self.rectangles(&name, &indices, &half, i as i64 * half[0])?);
        }
        Ok(Some(found))
    }

    /// The rectangles of a tensor below `indices` of a saved one; its rows begin at `row` of what they are put into.
    fn rectangles(&self, name: &str, indices: &[i64], shape: &[i64], row: i64) -> Result<Vec<Rectangle>> {
        let saved = &self.0[name];
        let (leading, size) = saved.size.split_at(indices.len().min(saved.size.len()));
        if size != shape || leading.iter().zip(indices).any(|(n, i)| i >= n) {
            let of: Vec<String> = indices.iter().map(i64::to_string).collect();
            return Err(Error::data(format!(
                "`{name}` is {:?}; at [{}] it should be {shape:?}",
                saved.size,
                of.join(", ")
            )));
        }
        let mut found = Vec::new();
        for chunk in &saved.chunks {
            let (leading, offsets) = chunk.offsets.split_at(indices.len());
            let (counts, sizes) = chunk.sizes.split_at(indices.len());
            let mut before = 0;
            let mut inside = true;
            for ((index, start), count) in indices.iter().zip(leading).zip(counts) {
                inside &= (*start..start + count).contains(index);
                before = before * count + (index - start);
            }
            if !inside {
                continue;
            }
            let (rows, cols) = (sizes[0], sizes.get(1).copied().unwrap_or(1));
            let (top, left) = (offsets[0] + row, offsets.get(1).copied().unwrap_or(0));
            found.push(Rectangle {
                file: chunk.file,
                tensor: ONLY.to_string(),
                first: before * rows * cols,
                stride: cols,
                rows: top..top + rows,
                cols: left..left + cols,
            });
        }
        Ok(found)
    }

    /// Names of weights that are none of the model's.
    pub fn others(&self, tensors: &[CoreTensor]) -> Vec<String> {
        let mut known = BTreeSet::new();
        for tensor in tensors {
            let halves = SharedTensors::halves(tensor);
            let halves = halves.iter().filter_map(|half| self.stored(tensor, &[half]));
            let whole = self.stored(tensor, &SharedTensors::names(tensor));
            known.extend(halves.chain(whole).map(|(name, _)| name));
        }
        self.0.keys().filter(|name| !known.contains(*name)).cloned().collect()
    }
}

/// The `args` of what ranks have in common: in a file of its own, or, as newer Megatron saves it, in the part `place` of another.
fn common_args(iteration: &Path, place: Option<&FileSpan>) -> Result<Args> {
    // An object that is saved as one of several is in a list.
    let args = |top: PickleNode| {
        let top = if top.is_dict() { top } else { top.items().next().unwrap_or(top) };
        Ok((Vec::new(), checkpoint_args(top)?))
    };
    let common = iteration.join(COMMON);
    if exists(&common)? {
        return Ok(TorchReader::open_with(&common, args)?.1);
    }
    let Some((name, range)) = place else {
        return Err(Error::data(format!(
            "{}: there is {METADATA} and no {COMMON}, which has the `args` of the model",
            iteration.display()
        )));
    };
    let path = iteration.join(name);
    let file = Arc::new(File::open(&path).map_err(|e| read_error(&path, &e))?);
    Ok(TorchReader::of_part(&path, file, *range, args)?.1)
}

/// Opens the part of a file that is a chunk.
fn open_chunk(
    iteration: &Path,
    (name, range): &FileSpan,
    tensor: &str,
    sizes: &[i64],
    open: &mut HashMap<String, Arc<File>>,
) -> Result<Box<dyn TensorFile>> {
    let path = iteration.join(name);
    let file = match open.get(name) {
        Some(file) => file.clone(),
        None => {
            let file = Arc::new(File::open(&path).map_err(|e| read_error(&path, &e))?);
            open.insert(name.clone(), file.clone());
            file
        }
    };
    let only = |top: PickleNode| match top.tensor() {
        Some(found) if found.shape == sizes => Ok((vec![(ONLY.into(), TensorRef::clone(found))], ())),
        Some(found) => Err(format!("a part of `{tensor}` is {:?} and should be {sizes:?}", found.shape)),
        None => Err(format!("a part of `{tensor}` is {}, not a tensor", top.describe())),
    };
    let (reader, ()) = TorchReader::of_part(&path, file, *range, only)?;
    Ok(Box::new(reader))
}

/// A tensor's name, its size, and offsets and sizes of its chunks.
type TensorOfChunks = (String, Vec<i64>, Vec<(Vec<i64>, Vec<i64>)>);

/// A file's name, and first byte and length of a part of it.
type FileSpan = (String, (u64, u64));

/// A tensor's name, and offsets of a chunk of it.
type ChunkKey = (String, Vec<i64>);

/// What `.metadata` says of tensors.
struct SavedMetadata {
    tensors: Vec<TensorOfChunks>,
    /// The file, first byte and length of a chunk, by the tensor's name and the chunk's offsets.
    places: HashMap<ChunkKey, FileSpan>,
    /// The same of what ranks have in common, where it is in no file of its own.
    common: Option<FileSpan>,
}

impl SavedMetadata {
    fn read(top: PickleNode) -> Result<SavedMetadata, String> {
        let field = |name: &str| top.state().and_then(|state| state.get(name));
        let (Some(described), Some(stored)) = (field("state_dict_metadata"), field("storage_data")) else {
            return Err(format!("it holds {}, no Metadata of a distributed checkpoint", top.describe()));
        };
        let mut tensors = Vec::new();
        // Every part has a place: there are no more of them.
        let mut left = stored.entries().count();
        for (name, value) in described.entries() {
            let name = named(name)?;
            let state = value.state();
            let Some(size) = state.and_then(|state| state.get("size")) else { continue };
            if is_state(name) {
                continue;
            }
            let chunks = state.and_then(|state| state.get("chunks"));
            let chunks = chunks.into_iter().flat_map(PickleNode::items).map(|chunk| {
                left = left.checked_sub(1).ok_or("there are more parts of tensors than places for them")?;
                let field = |name: &str| chunk.state().and_then(|state| state.get(name)).map(integers);
                match (field("offsets"), field("sizes")) {
                    (Some(offsets), Some(sizes)) => Ok((offsets?, sizes?)),
                    _ => Err(format!("a part of `{name}` is {}", chunk.describe())),
                }
            });
            let (size, chunks) = (integers(size)?, chunks.collect::<Result<Vec<_>, String>>()?);
            fits(&size, &chunks).map_err(|e| format!("`{name}`: {e}"))?;
            tensors.push((name.to_string(), size, chunks));
        }
        let (mut places, mut common) = (HashMap::new(), None);
        for (key, value) in stored.entries() {
            let offsets = key.state().and_then(|state| state.get("offset"));
            let name = named(key.state().and_then(|state| state.get("fqn")).unwrap_or(key))?;
            // Objects other than tensors have no offsets.
            let Some(offsets) = offsets.filter(|offsets| !offsets.is_none()) else {
                if name.starts_with(COMMON_STATE) {
                    common = Some(place(value)?);
                }
                continue;
            };
            places.insert((name.to_string(), integers(offsets)?), place(value)?);
        }
        Ok(SavedMetadata { tensors, places, common })
    }
}

/// The name of a tensor.
fn named(node: PickleNode<'_>) -> Result<&str, String> {
    let name = node.text().filter(|name| name.len() <= MAX_NAME);
    name.ok_or_else(|| format!("{} stands where a name should", node.describe()))
}

/// The numbers of a `torch.Size`, or of a tuple or list.
fn integers(node: PickleNode) -> Result<Vec<i64>, String> {
    let inner = match node.foreign_name() {
        Some(("torch", "Size")) => node.args().next(),
        _ => Some(node),
    };
    let integer = |item: PickleNode| match item.integer() {
        Some(i) if (0..1 << 48).contains(&i) => Ok(i),
        _ => Err(format!("{} stands where a size should", item.describe())),
    };
    let items = inner.into_iter().flat_map(PickleNode::items).take(MAX_DIMENSIONS + 1);
    match items.map(integer).collect::<Result<Vec<_>, String>>()? {
        sizes if sizes.len() > MAX_DIMENSIONS => Err("a tensor has too many dimensions".into()),
        sizes => Ok(sizes),
    }
}

/// Refuses chunks that lie beyond their tensor.
fn fits(size: &[i64], chunks: &[(Vec<i64>, Vec<i64>)]) -> Result<(), String> {
    let numel = |sizes: &[i64]| sizes.iter().try_fold(1i64, |n, d| n.checked_mul(*d));
    let inside = |(offsets, sizes): &(Vec<i64>, Vec<i64>)| {
        offsets.len() == size.len()
            && sizes.len() == size.len()
            && size.iter().zip(offsets).zip(sizes).all(|((n, first), len)| first + len <= *n)
    };
    match numel(size).is_none() || !chunks.iter().all(inside) {
        true => Err(format!("its parts do not fit its size {size:?}; the file is damaged: get it again")),
        false => Ok(()),
    }
}

/// The file, first byte and length of a chunk.
fn place(value: PickleNode) -> Result<FileSpan, String> {
    let field = |name: &str| value.state().and_then(|state| state.get(name));
    let number = |name: &str| field(name).and_then(PickleNode::integer).and_then(|i| u64::try_from(i).ok());
    let (path, start, len) = (field("relative_path"), number("offset"), number("length"));
    let (Some(path), Some(start), Some(len)) = (path.and_then(PickleNode::text), start, len) else {
        return Err(format!("{} stands where the place of a tensor should", value.describe()));
    };
    if path.contains('/') || path.contains('\0') || path == ".." {
        return Err(format!("a tensor lies in the file {path:?}, outside of the folder"));
    }
    if field("transform_descriptors").is_some_and(|transforms| !transforms.is_none()) {
        return Err("its tensors are compressed or otherwise transformed, which is not read".into());
    }
    Ok((path.to_string(), (start, len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_no_weights() {
        for name in [
            "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight",
            "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16).bucket_idx_0",
            "chained_0.optimizer.state.exp_avg.decoder.layers.mlp.router.weight",
            "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2",
        ] {
            assert!(is_state(name), "{name}");
        }
        for name in [
            "decoder.layers.mlp.linear_fc1.weight",
            "embedding.word_embeddings.weight",
            "chained_x.optimizer",
        ] {
            assert!(!is_state(name), "{name}");
        }
    }
}
