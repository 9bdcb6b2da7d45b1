//! The format `torch`: a file for each rank.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::OpenFiles;
use super::args::Args;
use super::find::Rectangle;
use super::grouped::StackedExperts;
use super::legacy;
use super::names::{CoreTensor, RankDivision, StageHolder};
use crate::checkpoint::pickle::PickleNode;
use crate::checkpoint::source::TensorFile;
use crate::checkpoint::torch_file::TorchReader;
use crate::error::{Context, Error, Result};
use crate::files::is_dir;

/// A rank's file.
pub(super) const FILE: &str = "model_optim_rng.pt";

/// The folder of a rank; stages are in its name where there are several.
pub(super) fn rank_folder(iteration: &Path, tensor: i64, stage: Option<i64>) -> PathBuf {
    iteration.join(match stage {
        None => format!("mp_rank_{tensor:02}"),
        Some(stage) => format!("mp_rank_{tensor:02}_{stage:03}"),
    })
}

/// Files of ranks, and how they divide a model.
pub(super) struct RankFiles {
    tensor: i64,
    pipeline: i64,
    /// A stage's parts of the model, by their keys: `model`, or with a virtual pipeline `model0`, `model1`, ...
    chunks: Vec<String>,
    /// For each layer its stage, its chunk and its number there.
    layers: Vec<(i64, usize, i64)>,
}

/// What a rank's file says besides its tensors.
struct RankFile {
    args: Args,
    chunks: Vec<String>,
    iteration: Option<i64>,
}

impl RankFiles {
    /// Opens the files of an iteration: stage by stage, and in a stage rank by rank.
    pub fn open(iteration: &Path) -> Result<(RankFiles, OpenFiles, Args)> {
        let alone = rank_folder(iteration, 0, None);
        let stages = !is_dir(&alone)?;
        let first = if stages { rank_folder(iteration, 0, Some(0)) } else { alone };
        refuse_expert_ranks(iteration, &first)?;
        let (opened, RankFile { args, chunks, iteration: saved_at }) = open(&first.join(FILE))?;
        let mut opened = Some(opened);
        let sizes = || -> Result<(i64, i64)> {
            let tensor = args.integer("tensor_model_parallel_size", None)?;
            let pipeline = args.integer("pipeline_model_parallel_size", None)?;
            match tensor >= 1 && pipeline >= 1 && (pipeline > 1) == stages {
                true => Ok((tensor, pipeline)),
                false => Err(Error::data(format!(
                    "its args say {tensor} x {pipeline} ranks (tensor x pipeline), which its folder's name does not fit"
                ))),
            }
        };
        args.divided_by_tensor_alone().context(first.join(FILE).display())?;
        let (tensor, pipeline) = sizes().context(first.join(FILE).display())?;
        let mut files: OpenFiles = Vec::new();
        for stage in 0..pipeline {
            for rank in 0..tensor {
                let path = rank_folder(iteration, rank, stages.then_some(stage)).join(FILE);
                let file = match opened.take() {
                    Some(first) => first,
                    None => {
                        let (file, said) = open(&path)?;
                        if chunks != said.chunks || saved_at != said.iteration {
                            return Err(Error::data(format!(
                                "{}: it is of another save than the first file: its iteration, or its parts of a pipeline, \
                                 differ",
                                path.display()
                            )));
                        }
                        file
                    }
                };
                files.push(StackedExperts::wrapped(file, &args).context(path.display())?);
            }
        }
        let mut ranks = RankFiles { tensor, pipeline, chunks, layers: Vec::new() };
        ranks.layers = ranks.number_layers(&files).context(iteration.display())?;
        Ok((ranks, files, args))
    }

    /// Chunk by chunk the stages have the next layers, as many as their files have.
    fn number_layers(&self, files: &[Box<dyn TensorFile>]) -> Result<Vec<(i64, usize, i64)>> {
        let mut layers = Vec::new();
        for (c, chunk) in self.chunks.iter().enumerate() {
            for stage in 0..self.pipeline {
                let numbers: BTreeSet<i64> =
                    files[self.file(stage, 0)].names().iter().filter_map(|name| layer(name, chunk)).collect();
                if numbers.iter().enumerate().any(|(i, number)| i as i64 != *number) {
                    return Err(Error::data(format!(
                        "stage {stage} has the layers {numbers:?}; a stage's are numbered from 0 on, without a gap"
                    )));
                }
                layers.extend(numbers.into_iter().map(|number| (stage, c, number)));
            }
        }
        Ok(layers)
    }

    fn file(&self, stage: i64, rank: i64) -> usize {
        (stage * self.tensor + rank) as usize
    }

    /// The stage that has a tensor, and what its names begin with there.
    fn place(&self, holder: StageHolder) -> Option<(i64, String)> {
        Some(match holder {
            StageHolder::First => (0, format!("{}.", self.chunks[0])),
            StageHolder::Last => (self.pipeline - 1, format!("{}.", self.chunks[self.chunks.len() - 1])),
            StageHolder::Layer(layer) => {
                let (stage, chunk, number) = self.layers.get(usize::try_from(layer).ok()?)?;
                (*stage, format!("{}.decoder.layers.{number}.", self.chunks[*chunk]))
            }
        })
    }

    /// The name that the files have for a tensor, of its two.
    fn stored(&self, files: &[Box<dyn TensorFile>], tensor: &CoreTensor) -> Option<(i64, String)> {
        let (stage, prefix) = self.place(tensor.holder)?;
        let first = &files[self.file(stage, 0)];
        let names = [&tensor.local, &tensor.engine].map(|name| format!("{prefix}{name}"));
        let name = names.into_iter().find(|name| first.info(name).is_ok())?;
        Some((stage, name))
    }

    /// Rows of a tensor of the first or last stage, over all ranks; none where it is not there.
    pub fn rows(&self, files: &[Box<dyn TensorFile>], holder: StageHolder, name: &str) -> Option<i64> {
        let (stage, prefix) = self.place(holder)?;
        let name = format!("{prefix}{name}");
        let rows = |rank: i64| files[self.file(stage, rank)].info(&name).ok()?.0.first().copied();
        (0..self.tensor).try_fold(0i64, |sum, rank| sum.checked_add(rows(rank)?))
    }

    /// Where a tensor lies; none where it is not there.
    pub fn locate(
        &self,
        files: &[Box<dyn TensorFile>],
        tensor: &CoreTensor,
    ) -> Result<Option<Vec<Rectangle>>> {
        let Some((stage, name)) = self.stored(files, tensor) else { return Ok(None) };
        let wanted = tensor.shape_of_rank(self.tensor).map_err(|e| Error::data(e.message))?;
        let ranks = if tensor.division == RankDivision::Copies { 1 } else { self.tensor };
        let mut found = Vec::new();
        for rank in 0..ranks {
            let file = self.file(stage, rank);
            let (shape, _) = files[file].info(&name)?;
            if shape != wanted {
                return Err(Error::data(format!(
                    "`{name}` of tensor rank {rank} is {shape:?} and should be {wanted:?}"
                )));
            }
            let (rows, cols) = (wanted[0], wanted.get(1).copied().unwrap_or(1));
            let part = |rows: std::ops::Range<i64>, cols: std::ops::Range<i64>, row: i64, stride: i64| {
                Rectangle { file, tensor: name.clone(), first: row * stride, stride, rows, cols }
            };
            match tensor.division {
                RankDivision::Copies => found.push(part(0..rows, 0..cols, 0, cols)),
                RankDivision::Rows => found.push(part(rank * rows..(rank + 1) * rows, 0..cols, 0, cols)),
                RankDivision::Columns => found.push(part(0..rows, rank * cols..(rank + 1) * cols, 0, cols)),
                RankDivision::HalvesByRows => {
                    let (half, of_half) = (tensor.shape[0] / 2, tensor.shape[0] / 2 / self.tensor);
                    for (i, start) in [0, half].into_iter().enumerate() {
                        let at = start + rank * of_half;
                        found.push(part(at..at + of_half, 0..cols, i as i64 * of_half, cols));
                    }
                }
            }
        }
        Ok(Some(found))
    }

    /// Tensors of the files that are none of the model's.
    pub fn others(&self, files: &[Box<dyn TensorFile>], tensors: &[CoreTensor]) -> Vec<String> {
        let mut known: BTreeMap<i64, BTreeSet<String>> = BTreeMap::new();
        for (stage, name) in tensors.iter().filter_map(|tensor| self.stored(files, tensor)) {
            known.entry(stage).or_default().insert(name);
        }
        let mut others = Vec::new();
        for stage in 0..self.pipeline {
            let names = files[self.file(stage, 0)].names();
            let known = known.get(&stage);
            others.extend(names.into_iter().filter(|name| known.is_none_or(|known| !known.contains(name))));
        }
        others
    }
}

/// The number of the layer that a tensor of a chunk belongs to.
fn layer(name: &str, chunk: &str) -> Option<i64> {
    let name = name.strip_prefix(chunk)?.strip_prefix(".decoder.layers.")?;
    name.split_once('.')?.0.parse().ok()
}

/// Refuses folders of expert-parallel ranks, which have one more number in their names.
fn refuse_expert_ranks(iteration: &Path, first: &Path) -> Result<()> {
    if is_dir(first)? {
        return Ok(());
    }
    for stage in [None, Some(0)] {
        let mut name = rank_folder(iteration, 0, stage).into_os_string();
        name.push("_000");
        if is_dir(Path::new(&name))? {
            return Err(Error::data(format!(
                "{}: the experts are divided over ranks (expert_model_parallel_size above 1), which is read of the format \
                 torch_dist only; save the model in it, or with one rank of experts",
                iteration.display()
            )));
        }
    }
    Ok(())
}

/// Opens a rank's file: its tensors have the names `model.NAME`, or `model0.NAME` and so on, in Megatron's core.
fn open(path: &Path) -> Result<(TorchReader, RankFile)> {
    TorchReader::open_with(path, |top| {
        let args = checkpoint_args(top)?;
        let (mut tensors, mut chunks) = (Vec::new(), Vec::new());
        for (key, value) in top.entries() {
            let Some(name) = key.text().filter(|name| {
                name.strip_prefix("model").is_some_and(|number| number.bytes().all(|b| b.is_ascii_digit()))
            }) else {
                continue;
            };
            chunks.push(name.to_string());
            legacy::tensors(name, value, &mut tensors)?;
        }
        let iteration = top.get("iteration").and_then(PickleNode::integer);
        chunks.sort_by_key(|chunk| (chunk.len(), chunk.clone()));
        let numbered = (0..chunks.len()).map(|i| format!("model{i}"));
        match chunks.as_slice() {
            [] => Err("there is no `model`".into()),
            [only] if only == "model" => Ok((tensors, RankFile { args, chunks, iteration })),
            several if numbered.eq(several.iter().cloned()) => {
                Ok((tensors, RankFile { args, chunks, iteration }))
            }
            several => Err(format!("it has the models {several:?}, not `model`, or `model0` and so on")),
        }
    })
}

/// The arguments in a checkpoint's dictionary, whose version must be one that is read.
pub(super) fn checkpoint_args(top: PickleNode) -> Result<Args, String> {
    if !top.is_dict() {
        return Err(format!("holds {}, not a checkpoint of Megatron", top.describe()));
    }
    let version = top.get("checkpoint_version").and_then(PickleNode::number).unwrap_or(0.0);
    if version < 3.0 {
        return Err(format!(
            "checkpoint_version is {version}: before 3.0 rows of q, k and v lie otherwise; load and save it with a newer Megatron"
        ));
    }
    top.get("args").and_then(Args::read).ok_or_else(|| "there are no `args`".into())
}
