//! Models in Megatron's `torch` format, with the names of its core: a folder with `latest_checkpointed_iteration.txt`, and in its
//! `iter_0000001` or `release` a file for each rank, `mp_rank_TT[_PPP]/model_optim_rng.pt`.
//!
//! A file is a pickle of whatever Megatron had in hand; of classes that are foreign here only names and fields are read, and none of
//! their code runs. Rows of q, k and v lie by key-value group (its queries, its key, its value), those of gate and up one above the other
//! on every rank; o and down are cut by columns.

mod args;
mod find;

use std::path::{Path, PathBuf};

use super::pickle::{PickleNode, TensorRef};
use super::source::TensorSource;
use super::torch_file::TorchReader;
use crate::config::shape::Shape;
use crate::error::{Context, Error, Result};
use crate::files::{exists, is_dir, read_error};

use args::Args;

/// What names the newest checkpoint of a folder.
const TRACKER: &str = "latest_checkpointed_iteration.txt";

/// A rank's file.
const FILE: &str = "model_optim_rng.pt";

/// A model in Megatron's format, checked and ready to be read.
pub struct MegatronModel {
    dir: PathBuf,
    shape: Shape,
    source: TensorSource,
}

/// What a rank's file says besides its tensors.
struct RankFile {
    args: Args,
    /// `model`, or with a virtual pipeline `model0`, `model1`, ...
    chunks: Vec<String>,
}

/// Whether there is a folder of Megatron's.
pub(super) fn is_megatron(path: &Path) -> Result<bool> {
    Ok(exists(&path.join(TRACKER))?
        || is_dir(&rank_folder(path, 0, None))?
        || is_dir(&rank_folder(path, 0, Some(0)))?)
}

fn rank_folder(iteration: &Path, tensor: i64, stage: Option<i64>) -> PathBuf {
    iteration.join(match stage {
        None => format!("mp_rank_{tensor:02}"),
        Some(stage) => format!("mp_rank_{tensor:02}_{stage:03}"),
    })
}

/// The folder of the newest iteration.
fn iteration(dir: &Path) -> Result<PathBuf> {
    let tracker = dir.join(TRACKER);
    if !exists(&tracker)? {
        return Ok(dir.to_path_buf());
    }
    let text = std::fs::read_to_string(&tracker).map_err(|e| read_error(&tracker, &e))?;
    let name = match (text.trim(), text.trim().parse::<u64>()) {
        ("release", _) => "release".to_string(),
        (_, Ok(iteration)) => format!("iter_{iteration:07}"),
        (other, _) => {
            return Err(Error::data(format!(
                "{}: it is '{other:.40}'; it must be a number or the word release",
                tracker.display()
            )));
        }
    };
    match is_dir(&dir.join(&name))? {
        true => Ok(dir.join(name)),
        false => Err(Error::data(format!("{}: it names {name}, which is not there", tracker.display()))),
    }
}

impl MegatronModel {
    /// Opens the newest iteration in `dir`, or the iteration `dir`. Reads and checks all headers.
    ///
    /// # Errors
    /// Of kind Data: files that are missing or damaged, models that are not read here, and in one message all tensors that are missing,
    /// superfluous or of another shape.
    pub fn load(dir: &Path) -> Result<MegatronModel> {
        let iteration = iteration(dir)?;
        if exists(&iteration.join(".metadata"))? {
            let why =
                "the format torch_dist is not read; convert it to the format torch with Megatron's tools";
            return Err(Error::data(format!("{}: {why}", iteration.display())));
        }
        let alone = rank_folder(&iteration, 0, None);
        let stages = !is_dir(&alone)?;
        let first = if stages { rank_folder(&iteration, 0, Some(0)) } else { alone };
        let (_, RankFile { args, .. }) = open(&first.join(FILE))?;
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
        let (tensor, pipeline) = sizes().context(first.join(FILE).display())?;
        let mut source = TensorSource::default();
        let mut chunks = Vec::new();
        for stage in 0..pipeline {
            for rank in 0..tensor {
                let path = rank_folder(&iteration, rank, stages.then_some(stage)).join(FILE);
                let (file, said) = open(&path)?;
                if chunks.is_empty() {
                    chunks = said.chunks;
                } else if chunks != said.chunks {
                    return Err(Error::data(format!(
                        "{}: it has other parts of a pipeline than the first file",
                        path.display()
                    )));
                }
                source.files.push(Box::new(file));
            }
        }
        let place = find::Places { tensor, pipeline, chunks };
        let shape = args.shape(place.vocab_size(&source.files)?).context(first.join(FILE).display())?;
        place.find(&mut source, &shape).context(iteration.display())?;
        Ok(MegatronModel { dir: dir.to_path_buf(), shape, source })
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tensors, under the model's names and in its order.
    pub fn source(&self) -> &TensorSource {
        &self.source
    }

    pub fn into_source(self) -> TensorSource {
        self.source
    }
}

/// Opens a rank's file: its tensors have the names `model.NAME`, or `model0.NAME` and so on.
fn open(path: &Path) -> Result<(TorchReader, RankFile)> {
    TorchReader::open_with(path, |top| {
        if !top.is_dict() {
            return Err(format!("holds {}, not a checkpoint of Megatron", top.describe()));
        }
        let version = top.get("checkpoint_version").and_then(PickleNode::number).unwrap_or(0.0);
        if version < 3.0 {
            return Err(format!(
                "checkpoint_version is {version}: before 3.0 rows of q, k and v lie otherwise; load and save it with a newer Megatron"
            ));
        }
        let args = top.get("args").and_then(Args::read).ok_or("there are no `args`")?;
        let (mut tensors, mut chunks) = (Vec::new(), Vec::new());
        for (key, value) in top.entries() {
            let Some(name) = key.text().filter(|name| {
                name.strip_prefix("model").is_some_and(|number| number.bytes().all(|b| b.is_ascii_digit()))
            }) else {
                continue;
            };
            if value.get("language_model").is_some() {
                return Err("it has Megatron's legacy names (`language_model`), which are not read".into());
            }
            chunks.push(name.to_string());
            for (key, value) in value.entries() {
                // Others, such as `_extra_state`, are no tensors.
                if let (Some(key), Some(tensor)) = (key.text(), value.tensor()) {
                    tensors.push((format!("{name}.{key}"), TensorRef::clone(tensor)));
                }
            }
        }
        match chunks.is_empty() {
            true => Err("there is no `model`".into()),
            false => Ok((tensors, RankFile { args, chunks })),
        }
    })
}

#[cfg(test)]
mod tests;
