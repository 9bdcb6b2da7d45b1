//! Models in Megatron's formats: a folder with `latest_checkpointed_iteration.txt`, whose `iter_0000001` or `release` has a file for
//! each rank, `mp_rank_TT[_PPP]/model_optim_rng.pt` (the format `torch`), or whole tensors in the files of a distributed checkpoint
//! (`torch_dist`).
//!
//! [`names`] lists Megatron's tensors and the rows of the model's that they consist of; [`ranks`] and [`shared`] say where a format
//! has them. Rows of q, k and v lie by key-value group (its queries, its key, its value), those of gate and up one above the other.
//!
//! A file is a pickle of whatever Megatron had in hand; of classes that are foreign here only names and fields are read, and none of
//! their code runs.

mod args;
mod find;
mod grouped;
mod legacy;
mod names;
mod namespace;
mod ranks;
mod shared;
mod shared_write;
mod write;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::source::{TensorFile, TensorSource};
use crate::config::shape::{Head, Shape};
use crate::data::tokenizer::{Tokenizer, folder_has_tokenizer};
use crate::error::{Context, Error, Result};
use crate::files::{exists, identity, is_dir, read_error};
use crate::model::layout::{EMBEDDING, LM_HEAD};

use args::Args;
use find::Rectangle;
use names::{CoreTensor, POOLER_HEAD, StageHolder, VocabRows, core_tensors};
use ranks::{RankFiles, rank_folder};
use shared::{FORMAT, METADATA, SharedTensors};
pub use write::MegatronForm;
pub(super) use write::MegatronPlan;

/// The open files of a checkpoint.
type OpenFiles = Vec<Box<dyn TensorFile>>;

/// The file that names a folder's newest checkpoint.
const TRACKER: &str = "latest_checkpointed_iteration.txt";

/// The iteration of a model that is written: of the first, as Megatron's own converter says, since older readers refuse 0.
const WRITTEN_ITERATION: i64 = 1;

/// A model in Megatron's format, checked and ready to be read.
pub struct MegatronModel {
    dir: PathBuf,
    /// The iteration's folder.
    iteration: PathBuf,
    /// Whether it is in the format `torch_dist`.
    shared: bool,
    /// Ranks of tensor parallelism and stages that saved it.
    ranks: [i64; 2],
    shape: Shape,
    source: TensorSource,
}

/// Whether there is a folder of Megatron's.
pub(crate) fn is_megatron(path: &Path) -> Result<bool> {
    Ok(exists(&path.join(TRACKER))?
        || exists(&path.join(METADATA))? && exists(&path.join(FORMAT))?
        || is_dir(&rank_folder(path, 0, None))?
        || is_dir(&rank_folder(path, 0, Some(0)))?)
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

/// How a checkpoint keeps its tensors.
enum MegatronFormat {
    Ranks(RankFiles),
    Shared(SharedTensors),
}

impl MegatronFormat {
    fn open(iteration: &Path) -> Result<(MegatronFormat, OpenFiles, Args)> {
        if exists(&iteration.join(METADATA))? {
            let (shared, files, args) = SharedTensors::open(iteration)?;
            return Ok((MegatronFormat::Shared(shared), files, args));
        }
        if exists(&iteration.join(FORMAT))? {
            return Err(Error::data(format!(
                "{}: it is no checkpoint in the format torch_dist ({FORMAT}, but no {METADATA}); zarr and fsdp_dtensor are not \
                 read",
                iteration.display()
            )));
        }
        let (ranks, files, args) = RankFiles::open(iteration)?;
        Ok((MegatronFormat::Ranks(ranks), files, args))
    }

    fn rows(&self, files: &[Box<dyn TensorFile>], holder: StageHolder, name: &str) -> Option<i64> {
        match self {
            MegatronFormat::Ranks(ranks) => ranks.rows(files, holder, name),
            MegatronFormat::Shared(shared) => shared.rows(name),
        }
    }

    /// Rows of the embedding and of the output projection, which are its own again where there is none.
    fn padded_rows(&self, files: &[Box<dyn TensorFile>]) -> Result<VocabRows> {
        let name = "embedding.word_embeddings.weight";
        let embedding = self.rows(files, StageHolder::First, name);
        let embedding = embedding.ok_or_else(|| Error::data(format!("`{name}` is missing")))?;
        let head = self.rows(files, StageHolder::Last, "output_layer.weight").unwrap_or(embedding);
        Ok(VocabRows { embedding, head })
    }

    fn locate(&self, files: &[Box<dyn TensorFile>], tensor: &CoreTensor) -> Result<Option<Vec<Rectangle>>> {
        match self {
            MegatronFormat::Ranks(ranks) => ranks.locate(files, tensor),
            MegatronFormat::Shared(shared) => shared.locate(tensor),
        }
    }

    /// Tensors that are none of these.
    fn others(&self, files: &[Box<dyn TensorFile>], tensors: &[CoreTensor]) -> Vec<String> {
        match self {
            MegatronFormat::Ranks(ranks) => ranks.others(files, tensors),
            MegatronFormat::Shared(shared) => shared.others(tensors),
        }
    }
}

/// Refuses a shape with more parameters than the files have elements, before anything is made for each of its parts.
fn fits_files(shape: &Shape, files: &[Box<dyn TensorFile>]) -> Result<()> {
    // Of two bytes at least each; names that share them count once.
    let paths: BTreeSet<&Path> = files.iter().map(|file| file.path()).collect();
    let bytes = paths.iter().filter_map(|path| path.metadata().ok()).map(|file| file.len()).sum::<u64>();
    let elements = (bytes / 2) as i64;
    let heads = shape.num_attention_heads.saturating_add(shape.num_key_value_heads);
    let experts = shape.experts.as_ref().map_or(1, |experts| experts.num_local_experts);
    let of_layer = [shape.intermediate_size.saturating_mul(experts), heads.saturating_mul(shape.head_dim)];
    let of_layer = of_layer.iter().fold(0i64, |sum, rows| sum.saturating_add(*rows));
    let wanted = of_layer.saturating_mul(shape.hidden_size).saturating_mul(shape.num_hidden_layers);
    match wanted <= elements {
        true => Ok(()),
        false => Err(Error::data(format!(
            "its args say num_layers {}, hidden_size {}, ffn_hidden_size {}: such a model has more numbers than the files",
            shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
        ))),
    }
}

impl MegatronModel {
    /// Opens the newest iteration in `dir`, or the iteration `dir`. Reads and checks all headers. A padded vocabulary is cut to the
    /// size that its args state, else to that of the tokenizer, which is `tokenizer` tokens large, or lies in `dir`.
    ///
    /// # Errors
    /// Of kind Data: files that are missing or damaged, models that are not read here, and in one message all tensors that are missing,
    /// superfluous or of another shape.
    pub fn load(dir: &Path, tokenizer: Option<usize>) -> Result<MegatronModel> {
        let iteration = iteration(dir)?;
        let (format, files, args) = MegatronFormat::open(&iteration)?;
        let padded = format.padded_rows(&files).context(iteration.display())?;
        let tokenizer = match tokenizer {
            None if folder_has_tokenizer(dir)? => Some(Tokenizer::load(dir)?.vocab_size()),
            given => given,
        };
        let shape = || -> Result<Shape> {
            let mut shape = args.shape(args.vocab_size(padded, tokenizer)?)?;
            fits_files(&shape, &files)?;
            if format.rows(&files, StageHolder::Last, POOLER_HEAD[0]).is_some() {
                shape = shape.scored();
                shape.features.score_layers = true;
            }
            Ok(shape)
        };
        let shape = shape().context(iteration.display())?;
        // A tied embedding is on the last stage once more.
        let tied = shape.tie_word_embeddings
            && format.rows(&files, StageHolder::Last, "output_layer.weight").is_some();
        let stored = Shape { tie_word_embeddings: shape.tie_word_embeddings && !tied, ..shape.clone() };
        let tensors = core_tensors(&stored, padded);
        let mut others = format.others(&files, &tensors);
        // A reward model may have kept the output projection of the model that it was made of.
        others.retain(|name| !(shape.head == Head::Score && name.ends_with("output_layer.weight")));
        let mut source = TensorSource::default();
        source.files = files;
        let locate = |files: &[Box<dyn TensorFile>], tensor: &CoreTensor| format.locate(files, tensor);
        find::find(&mut source, &stored, &tensors, locate, others).context(iteration.display())?;
        if tied {
            if !source.equal(EMBEDDING, LM_HEAD).context(iteration.display())? {
                return Err(Error::data(format!(
                    "{}: output_layer.weight differs from the embedding, and untie_embeddings_and_output_weights is not set",
                    iteration.display()
                )));
            }
            source.views.remove(LM_HEAD);
        }
        let shared = matches!(format, MegatronFormat::Shared(_));
        let ranks = [
            args.integer("tensor_model_parallel_size", Some(1))?,
            args.integer("pipeline_model_parallel_size", Some(1))?,
        ];
        Ok(MegatronModel { dir: dir.to_path_buf(), iteration, shared, ranks, shape, source })
    }

    /// Tells models apart at little cost: see [`identity`].
    pub fn identity(&self) -> Result<String> {
        let mut found = identity(&self.iteration)?;
        let entries =
            std::fs::read_dir(&self.iteration).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
        let mut ranks: Vec<PathBuf> = entries
            .map_err(|e| read_error(&self.iteration, &e))?
            .into_iter()
            .map(|entry| entry.path())
            .collect();
        ranks.sort();
        for rank in ranks.iter().filter(|path| path.is_dir()) {
            found += &format!(" {}", identity(rank)?);
        }
        Ok(found)
    }

    /// The folder of the iteration that is read.
    pub fn iteration(&self) -> &Path {
        &self.iteration
    }

    /// Megatron's name of the format (`--ckpt-format`).
    pub fn format(&self) -> &'static str {
        if self.shared { "torch_dist" } else { "torch" }
    }

    /// Ranks of tensor parallelism and stages of the pipeline that saved it.
    pub fn ranks(&self) -> [i64; 2] {
        self.ranks
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

#[cfg(test)]
mod tests;
