//! Checkpoints of a training run: what lies in the folder `RUN_DIR/checkpoints/step-00000100`, and how it is read.
//!
//! ```text
//! shard-00000-of-00002.safetensors   slice 0 of every group: `GROUP.master`, `GROUP.exp_avg`, `GROUP.exp_avg_sq`; of moments
//!                                    in 8 bits, `.codes` and `.absmax` (one for each 256 codes)
//! shard-00001-of-00002.safetensors
//! meta.json                          layouts, slices, the trainer's state, size and CRC-32 of every file
//! tokenizer.json, ...                the tokenizer, so that the folder is a model of its own
//! ```
//! Tensors are found by name and element range, so that a checkpoint loads at any world size, bit by bit the same. The
//! folder is on a file system that all nodes share.
//!
//! Where tensor-parallel ranks have parts of tensors (`super::rectangles`), each of them has slices of its own, and so has each of the
//! stages of a pipeline: file `(stage * slices + slice) * T + t` is that of rank t of a stage.

use std::cell::RefCell;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use kernels::moments::Moment;
use kernels::quant::CODE_BLOCK;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::grow::stored;
use super::manifest::{GroupMeta, MASTER, META, Meta, TensorMeta, read_meta, shard_name, tensor_name};
use super::safetensors::SafetensorsReader;
use super::source::{RowOrder, TensorBlock, TensorFile, TensorSource, View};
use super::tensor_hash::TensorHash;
use crate::config::sections::MomentsIn;
use crate::distributed::agree::agree_over;
use crate::distributed::plan::is_adapter;
use crate::distributed::sharded::{Layout, Sharded, Slice, TensorSpec};
use crate::error::{Error, Result};
use crate::files::{crc32, is_dir, read_error};
use crate::model::layout::{LM_HEAD, SCORE};
use crate::optim::{AdamW, Moments};

/// Bytes of a checkpoint of these parameters, without headers and tokenizer: master values and two moments.
/// `master`: float32, or float64 in float64 compute.
pub fn bytes_per_checkpoint(layouts: &[Layout], master: Kind, moments: MomentsIn) -> u64 {
    let value = master.elt_size_in_bytes() as u64;
    let of = |n: u64| match moments {
        MomentsIn::Float32 => 3 * n * value,
        MomentsIn::EightBit => n * value + 2 * Moment::bytes(n as i64) as u64,
    };
    layouts.iter().map(|l| of(l.numel as u64)).sum()
}

/// The folder of a step's checkpoint.
pub fn step_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The folder of a run's checkpoints.
pub fn checkpoints_dir(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

/// The checkpoints in a folder by step, ascending.
pub fn list(checkpoints: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    if is_dir(checkpoints)? {
        for entry in fs::read_dir(checkpoints).map_err(|e| read_error(checkpoints, &e))? {
            let path = entry.map_err(|e| read_error(checkpoints, &e))?.path();
            if let Some(step) = step_of(&path) {
                found.push((step, path));
            }
        }
    }
    found.sort();
    Ok(found)
}

fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

/// The newest checkpoint of a run, none where there is none.
///
/// Folders get their name when they are complete. So a newest one that is damaged is an error (kind Data), which names
/// the file and an older checkpoint that could be used; never is an older one taken silently.
pub fn latest(run_dir: &Path) -> Result<Option<Checkpoint>> {
    list(&checkpoints_dir(run_dir))?.pop().map(|(_, path)| Checkpoint::open(&path)).transpose()
}

/// A complete checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    meta: Meta,
    /// Group and place of every tensor.
    places: HashMap<String, (usize, TensorMeta)>,
}

/// What a trainer goes on from.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerState {
    /// Updates before the checkpoint.
    pub step: u64,
    /// What was given to [`super::Saver::begin`].
    pub state: Value,
}

impl Checkpoint {
    /// Opens a checkpoint's folder; checks that all files are there in their size. Contents are checked when they are
    /// loaded.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        Self::open_alone(dir).map_err(|e| with_advice(dir, e))
    }

    fn open_alone(dir: &Path) -> Result<Checkpoint> {
        let meta = read_meta(dir)?;
        for file in &meta.files {
            let path = dir.join(&file.name);
            let bytes = fs::metadata(&path).map_err(|e| read_error(&path, &e))?.len();
            if bytes != file.bytes {
                return Err(Error::data(format!(
                    "{}: {bytes} bytes, should be {}",
                    path.display(),
                    file.bytes
                )));
            }
        }
        for part in &meta.parts {
            Self::open_alone(&dir.join(part))?;
        }
        let mut places = HashMap::new();
        for (g, group) in meta.groups.iter().enumerate() {
            places.extend(group.tensors.iter().map(|t| (t.name.clone(), (g, t.clone()))));
        }
        Ok(Checkpoint { dir: dir.to_path_buf(), meta, places })
    }

    /// The checkpoint's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `meta.json` says.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// A further model of the run, such as a critic.
    pub fn part(&self, name: &str) -> Result<Checkpoint> {
        match self.meta.parts.iter().any(|part| part == name) {
            true => Self::open_alone(&self.dir.join(name)).map_err(|e| with_advice(&self.dir, e)),
            false => Err(Error::data(format!("{}: the checkpoint has no {name}", self.dir.display()))),
        }
    }

    /// Sets parameters, moments and the optimizer's counter; returns the rest of the state. All ranks that hold the
    /// parameters call this, at any world size, and fail together. Each reads only the files that hold its slices,
    /// after checking their checksums.
    pub fn load(&self, params: &mut Sharded, optim: &mut AdamW) -> Result<TrainerState> {
        let mine = self.read(params, optim).map_err(|e| with_advice(&self.dir, e));
        agree_over(params, mine)?;
        optim.step = self.meta.optimizer_step;
        Ok(TrainerState { step: self.meta.step, state: self.meta.state.clone() })
    }

    /// Sets the parameters only: to start another run, or to use the model. Their vocabulary may be larger than the
    /// checkpoint's (see [`super::grow`]). Of a checkpoint that holds the whole model. Returns the hash of what is not trained.
    pub fn fill_weights(&self, params: &mut Sharded) -> Result<TensorHash> {
        let all = (0..params.len()).flat_map(|i| params.plan(i).tensors()).filter(|s| !is_adapter(&s.name));
        let all = all.map(|spec| spec.whole());
        let checked = self.check_tensors(all, self.meta.shape.vocab_size).and_then(|()| self.source());
        agree_over(params, checked.map_err(|e| with_advice(&self.dir, e)))?.fill(params)
    }

    /// Sets what is trained, and nothing else: the values of another step of the run that these parameters are of.
    pub fn load_values(&self, params: &mut Sharded) -> Result<()> {
        let shards = Shards { checkpoint: self, open: RefCell::default() };
        let trained = (0..params.len()).flat_map(|i| params.layout(i).specs.iter().map(TensorSpec::whole));
        let mine = self.check_tensors(trained, i64::MAX).and_then(|()| {
            params.fill_trained(|spec, first, values| shards.read(MASTER, spec, first, values))
        });
        agree_over(params, mine.map_err(|e| with_advice(&self.dir, e)))
    }

    /// The parameters (master values) as tensors of the model. The contents of a file are checked when something of it is
    /// read first.
    pub fn source(&self) -> Result<TensorSource> {
        let shards = (0..self.meta.slices.len()).map(|rank| CheckedShard::open(self, rank));
        let shards = shards.collect::<Result<Vec<_>>>().map_err(|e| with_advice(&self.dir, e))?;
        let mut source = TensorSource::default();
        for (name, (group, place)) in &self.places {
            let tensor = tensor_name(&self.meta.groups[*group].name, MASTER);
            // One that has something of it.
            let writer = self.meta.slices.iter().position(|slices| slices[*group].1 > 0).unwrap_or(0);
            let (kind, divided) = (shards[writer].info(&tensor)?.1, place.divided());
            let mut blocks = Vec::new();
            for rank in divided.tensor_ranks() {
                for piece in self.pieces(*group, rank, place.offset, divided.rectangle_numel()) {
                    let places = divided.places(rank, piece.to..piece.to + piece.len);
                    blocks.extend(places.into_iter().map(|(rows, cols, at, stride)| TensorBlock {
                        file: piece.rank,
                        tensor: tensor.clone(),
                        rows,
                        cols,
                        first: piece.from + at - piece.to,
                        stride,
                        order: RowOrder::Same,
                    }));
                }
            }
            let (shape, width) = (place.shape.clone(), divided.width());
            source.views.insert(name.clone(), View { shape, kind, width, blocks });
        }
        source.files = shards.into_iter().map(|s| Box::new(s) as Box<dyn TensorFile>).collect();
        Ok(source)
    }

    fn read(&self, params: &mut Sharded, optim: &AdamW) -> Result<()> {
        let shards = Shards { checkpoint: self, open: RefCell::default() };
        let trained = (0..params.len()).flat_map(|i| params.layout(i).specs.iter().map(TensorSpec::whole));
        // A run that goes on must be as it was.
        self.check_tensors(trained, i64::MAX)?;
        params.fill_trained(|spec, first, values| shards.read(MASTER, spec, first, values))?;
        for i in 0..params.len() {
            let slice = params.slice(i);
            if let Moments::EightBit { .. } = &optim.moments[i] {
                self.read_codes(&shards, params, i, &optim.moments[i])?;
                continue;
            }
            for (part, moments) in optim.moments[i].tensors() {
                for spec in &params.layout(i).specs {
                    if let Some((first, len)) = overlap(slice, spec) {
                        let values = moments.f_narrow(0, first - slice.start, len)?;
                        let mut read = |whole: &TensorSpec, first, values: &Tensor| {
                            shards.read(part, whole, first, values)
                        };
                        spec.fill(first - spec.offset, &values, &mut read)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Moments in 8 bits: their blocks are those of the group as a whole, whose tensors must lie as they did.
    fn read_codes(&self, shards: &Shards, params: &Sharded, i: usize, moments: &Moments) -> Result<()> {
        let now = GroupMeta::of(params.layout(i));
        let Some((group, _)) = self.meta.groups.iter().enumerate().find(|(_, g)| **g == now) else {
            return Err(Error::data(format!(
                "{}: the tensors of group `{}` have another layout there, and 8-bit moments cannot be rearranged",
                self.dir.display(),
                now.name
            )));
        };
        let slice = params.slice(i);
        let tensor_rank = params.sharding().tensor.rank as usize % self.meta.tensor;
        let blocks =
            |s: Slice| Slice { start: s.start / CODE_BLOCK, len: (s.len + CODE_BLOCK - 1) / CODE_BLOCK };
        for (part, t) in moments.tensors() {
            let whole = |s: Slice| if t.kind() == Kind::Uint8 { s } else { blocks(s) };
            let (mine, theirs) = (whole(slice), self.slices(group, tensor_rank).map(whole));
            for piece in pieces(theirs, mine.start, mine.len) {
                shards.read_bytes(
                    piece.rank * self.meta.tensor + tensor_rank,
                    &tensor_name(&now.name, part),
                    piece.from,
                    &t.narrow(0, piece.to, piece.len),
                )?;
            }
        }
        Ok(())
    }

    /// Refuses tensors that are others than the checkpoint's, but for rows beyond a vocabulary of `rows`.
    fn check_tensors(&self, specs: impl Iterator<Item = TensorSpec>, rows: i64) -> Result<()> {
        let weights_only = rows != i64::MAX;
        let mut missing: BTreeSet<&String> = self.places.keys().collect();
        let mut wrong = Vec::new();
        for spec in specs {
            missing.remove(&spec.name);
            // A new head on the trunk of a model with another.
            if spec.name == SCORE && weights_only && !self.places.contains_key(SCORE) {
                missing.retain(|name| *name != LM_HEAD);
                continue;
            }
            match self.places.get(&spec.name) {
                None => wrong.push(format!("`{}` is not in the checkpoint", spec.name)),
                Some((_, TensorMeta { shape, .. }))
                    if *shape != stored(&spec, rows).unwrap_or_else(|| spec.clone()).shape =>
                {
                    wrong.push(format!(
                        "`{}` is {shape:?} in the checkpoint, {:?} in the model",
                        spec.name, spec.shape
                    ))
                }
                _ => {}
            }
        }
        let mut extra: Vec<String> =
            missing.iter().map(|name| format!("`{name}` is not in the model")).collect();
        let all = wrong.len() + extra.len();
        if all == 0 {
            return Ok(());
        }
        // Some of both sides.
        [&mut wrong, &mut extra].into_iter().for_each(|lines| lines.truncate(4));
        wrong.append(&mut extra);
        let more =
            if all > wrong.len() { format!("; and {} more", all - wrong.len()) } else { String::new() };
        Err(Error::data(format!("{}: another model: {}{more}", self.dir.display(), wrong.join("; "))))
    }

    fn open_shard(&self, rank: usize) -> Result<SafetensorsReader> {
        let (path, crc32) = self.shard(rank)?;
        check_contents(&path, crc32)?;
        SafetensorsReader::open(&path)
    }

    /// The path of a shard, and the checksum that it should have.
    fn shard(&self, rank: usize) -> Result<(PathBuf, u32)> {
        let name = shard_name(rank, self.meta.slices.len());
        let path = self.dir.join(&name);
        match self.meta.files.iter().find(|f| f.name == name) {
            Some(file) => Ok((path, file.crc32)),
            None => Err(Error::data(format!("{}: {META} does not know this file", path.display()))),
        }
    }

    /// A tensor-parallel rank's slices of a group.
    fn slices(&self, group: usize, tensor_rank: usize) -> impl Iterator<Item = Slice> {
        let slices = self.meta.slices.iter().skip(tensor_rank).step_by(self.meta.tensor);
        slices.map(move |file| Slice { start: file[group].0, len: file[group].1 })
    }

    /// Where elements `first..first + len` of a tensor-parallel rank's group lie; ranks are those of files.
    fn pieces(&self, group: usize, tensor_rank: usize, first: i64, len: i64) -> Vec<TensorPiece> {
        let mut pieces = pieces(self.slices(group, tensor_rank), first, len);
        pieces.iter_mut().for_each(|piece| piece.rank = piece.rank * self.meta.tensor + tensor_rank);
        pieces
    }
}

fn check_contents(path: &Path, expected: u32) -> Result<()> {
    match crc32(path)? {
        found if found == expected => Ok(()),
        found => Err(Error::data(format!(
            "{}: damaged: its checksum is {found:08x}, should be {expected:08x}",
            path.display()
        ))),
    }
}

/// A shard whose contents are checked when something of it is read first.
struct CheckedShard {
    reader: SafetensorsReader,
    /// Of the checkpoint.
    dir: PathBuf,
    crc32: u32,
    checked: OnceLock<Result<()>>,
}

impl CheckedShard {
    fn open(checkpoint: &Checkpoint, rank: usize) -> Result<CheckedShard> {
        let (path, crc32) = checkpoint.shard(rank)?;
        let (reader, dir) = (SafetensorsReader::open(&path)?, checkpoint.dir.clone());
        Ok(CheckedShard { reader, dir, crc32, checked: OnceLock::new() })
    }
}

impl TensorFile for CheckedShard {
    fn path(&self) -> &Path {
        self.reader.path()
    }

    fn names(&self) -> Vec<String> {
        self.reader.names()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        self.reader.info(name)
    }

    fn read_bytes(&self, name: &str, first: i64, to: &mut [u8]) -> Result<()> {
        let check = || check_contents(self.path(), self.crc32).map_err(|e| with_advice(&self.dir, e));
        self.checked.get_or_init(check).clone()?;
        self.reader.read_bytes(name, first, to)
    }
}

/// The shards of a checkpoint; each is opened, and its contents checked, when something of it is asked for.
struct Shards<'a> {
    checkpoint: &'a Checkpoint,
    open: RefCell<BTreeMap<usize, SafetensorsReader>>,
}

impl Shards<'_> {
    /// Fills `values` with elements `first..` of a tensor.
    fn read(&self, part: &str, spec: &TensorSpec, first: i64, values: &Tensor) -> Result<()> {
        let (group, place) = &self.checkpoint.places[&spec.name];
        let name = tensor_name(&self.checkpoint.meta.groups[*group].name, part);
        for run in place.divided().runs(first..first + values.numel() as i64) {
            for piece in self.checkpoint.pieces(*group, run.tensor_rank, place.offset + run.from, run.len) {
                let values = values.f_narrow(0, run.to + piece.to, piece.len)?;
                self.with(piece.rank, |shard| shard.read(&name, piece.from, &values))?;
            }
        }
        Ok(())
    }

    /// Fills `values` with elements `from..` of a tensor of a shard, which has their dtype.
    fn read_bytes(&self, rank: usize, name: &str, from: i64, values: &Tensor) -> Result<()> {
        let (n, element) = (values.numel(), values.kind().elt_size_in_bytes());
        let mut bytes = vec![0; n * element];
        self.with(rank, |shard| match shard.names().iter().any(|there| there == name) {
            true => shard.read_bytes(name, from, &mut bytes),
            false => Err(Error::data(format!(
                "{}: there is no `{name}`: the run had moments in float32",
                shard.path().display()
            ))),
        })?;
        values.shallow_clone().f_copy_(&Tensor::f_from_data_size(&bytes, &[n as i64], values.kind())?)?;
        Ok(())
    }

    fn with(&self, rank: usize, f: impl FnOnce(&SafetensorsReader) -> Result<()>) -> Result<()> {
        let mut open = self.open.borrow_mut();
        if let Entry::Vacant(place) = open.entry(rank) {
            place.insert(self.checkpoint.open_shard(rank)?);
        }
        f(&open[&rank])
    }
}

/// The elements of a group's flat buffer that a slice and a tensor share: first and count.
fn overlap(slice: Slice, spec: &TensorSpec) -> Option<(i64, i64)> {
    let first = slice.start.max(spec.offset);
    let end = (slice.start + slice.len).min(spec.offset + spec.numel());
    (first < end).then_some((first, end - first))
}

/// A run of elements that lies in one rank's slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorPiece {
    /// Which rank's slice.
    pub rank: usize,
    /// First element within the slice.
    pub from: i64,
    /// First element within the range that was asked for.
    pub to: i64,
    /// Elements.
    pub len: i64,
}

/// Where elements `first..first + len` of a group lie, by the slices of its ranks.
pub fn pieces(slices: impl Iterator<Item = Slice>, first: i64, len: i64) -> Vec<TensorPiece> {
    slices
        .enumerate()
        .filter_map(|(rank, slice)| {
            let start = first.max(slice.start);
            let end = (first + len).min(slice.start + slice.len);
            (start < end).then_some(TensorPiece {
                rank,
                from: start - slice.start,
                to: start - first,
                len: end - start,
            })
        })
        .collect()
}

/// Adds to an error what to do about a checkpoint that cannot be used.
fn with_advice(dir: &Path, e: Error) -> Error {
    // A part lies in the folder of its checkpoint.
    let dir = dir.parent().filter(|parent| step_of(parent).is_some()).unwrap_or(dir);
    let step = step_of(dir);
    let siblings = dir.parent().and_then(|p| list(p).ok()).unwrap_or_default();
    let older = siblings
        .into_iter()
        .rev()
        .find(|(s, path)| step.is_some_and(|step| *s < step) && Checkpoint::open_alone(path).is_ok());
    let advice = match older {
        Some((_, path)) => {
            format!("an older checkpoint is complete: to resume from it, pass --resume {}", path.display())
        }
        None => "no older checkpoint is complete".to_string(),
    };
    Error { message: format!("{}; {advice}", e.message), ..e }
}
