//! What a path to a model may be.

use std::path::{Path, PathBuf};

use kernels::comm::Group;

use super::gguf::GgufModel;
use super::hf::HfModel;
use super::megatron::MegatronModel;
use super::merge::Merge;
use super::meta::MetaModel;
use super::named::{ModelFolder, tokenizer_of};
use super::ours::{Ours, Scoring};
use super::peft::PeftAdapter;
use super::sharded::Checkpoint;
use super::source::TensorSource;
use super::tensor_hash::TensorHash;
use crate::config::reward::Score;
use crate::config::shape::{Head, Shape};
use crate::distributed::agree::agree;
use crate::distributed::sharded::Sharded;
use crate::env;
use crate::error::{Error, Result};
use crate::files::{exists, is_dir, read_error};
use crate::model::Trainable;
use crate::model::layout::layouts;

/// A model on disk, found by its path.
pub enum Weights {
    /// A folder in Hugging Face's format.
    Hf(HfModel),
    /// A folder in Meta's format.
    Meta(MetaModel),
    /// A folder in Megatron's format.
    Megatron(Box<MegatronModel>),
    /// A GGUF file.
    Gguf(GgufModel),
    /// An adapter, or a partly trained checkpoint, with its base.
    Adapted(Box<Adapted>),
    /// A checkpoint of ours that has all tensors.
    Checkpoint(Box<Checkpoint>),
}

/// An adapter, or what a run with `freeze` trained, and the model that it is for.
pub struct Adapted {
    /// What was trained.
    pub adapter: PeftAdapter,
    /// The model that it was trained on.
    pub base: Weights,
    /// The base's, but for the head, which may come with the adapter.
    shape: Shape,
}

impl Weights {
    /// Opens the model that `path` names (see [`ModelFolder::find`]). Reads headers only.
    pub fn open(path: &Path) -> Result<Weights> {
        Weights::open_for(path, None)
    }

    /// [`Weights::open`] for a tokenizer of so many tokens, which tells where a padded vocabulary of Megatron's ends.
    pub fn open_for(path: &Path, tokenizer: Option<usize>) -> Result<Weights> {
        let adapter = match ModelFolder::find(path)? {
            ModelFolder::Hf(dir) => return Ok(Weights::Hf(HfModel::load(&dir)?)),
            ModelFolder::Meta(dir) => return Ok(Weights::Meta(MetaModel::load(&dir)?)),
            ModelFolder::Megatron(dir) => {
                return Ok(Weights::Megatron(Box::new(MegatronModel::load(&dir, tokenizer)?)));
            }
            ModelFolder::Gguf(file) => return Ok(Weights::Gguf(GgufModel::load(&file)?)),
            ModelFolder::Adapter(dir) => PeftAdapter::open(&dir)?,
            ModelFolder::Checkpoint(dir) => {
                let checkpoint = Checkpoint::open(&dir)?;
                match PeftAdapter::of_checkpoint(&checkpoint)? {
                    Some(adapter) => adapter,
                    None => return Ok(Weights::Checkpoint(Box::new(checkpoint))),
                }
            }
        };
        let base = adapter.open_base()?;
        Weights::adapted(base, adapter)
    }

    /// The same model for a tokenizer of so many tokens: without the padding of a vocabulary of Megatron's.
    pub fn for_tokenizer(self, tokens: usize) -> Result<Weights> {
        match self {
            Weights::Megatron(model) if model.shape().vocab_size != tokens as i64 => {
                Ok(Weights::Megatron(Box::new(MegatronModel::load(model.dir(), Some(tokens))?)))
            }
            other => Ok(other),
        }
    }

    /// A model with an adapter, which must fit it.
    pub fn adapted(base: Weights, mut adapter: PeftAdapter) -> Result<Weights> {
        not_adapted(&base, &adapter)?;
        let shape = adapter.shape(base.shape());
        adapter.check(&shape)?;
        Ok(Weights::Adapted(Box::new(Adapted { adapter, base, shape })))
    }

    /// The adapters that the model has besides its own tensors, if any, and how its weights were kept in training.
    pub fn lora(&self) -> Option<&Trainable> {
        match self {
            Weights::Adapted(model) => Some(model.adapter.trainable()).filter(|t| t.lora.is_some()),
            Weights::Hf(_)
            | Weights::Meta(_)
            | Weights::Megatron(_)
            | Weights::Gguf(_)
            | Weights::Checkpoint(_) => None,
        }
    }

    /// Sizes of the model, and what its family computes differently.
    pub fn shape(&self) -> &Shape {
        match self {
            Weights::Hf(model) => model.shape(),
            Weights::Meta(model) => model.shape(),
            Weights::Megatron(model) => model.shape(),
            Weights::Gguf(model) => model.shape(),
            Weights::Adapted(model) => &model.shape,
            Weights::Checkpoint(checkpoint) => &checkpoint.meta().shape,
        }
    }

    /// How a scalar head's values become a reward, as the folder says; none for models with an LM head. What says nothing
    /// is transformers' sequence classification.
    pub fn scoring(&self) -> Result<Option<Scoring>> {
        if self.shape().head == Head::Lm {
            return Ok(None);
        }
        let said = match self {
            Weights::Checkpoint(checkpoint) => checkpoint.meta().scoring.clone(),
            Weights::Adapted(model) => match model.adapter.scoring() {
                Some(scoring) => Some(scoring.clone()),
                None => model.base.scoring()?,
            },
            Weights::Hf(_) | Weights::Meta(_) | Weights::Megatron(_) => Ours::read(self.dir())?.reward,
            Weights::Gguf(_) => None,
        };
        Ok(Some(said.unwrap_or(Scoring::raw(Score::Last))))
    }

    /// The folders that describe the model: its own, and of an adapter also its base's.
    pub fn dirs(&self) -> Vec<&Path> {
        match self {
            Weights::Adapted(model) => [vec![self.dir()], model.base.dirs()].concat(),
            _ => vec![self.dir()],
        }
    }

    /// The folder, or the GGUF file, that the weights come from.
    pub fn dir(&self) -> &Path {
        match self {
            Weights::Hf(model) => model.dir(),
            Weights::Meta(model) => model.dir(),
            Weights::Megatron(model) => model.dir(),
            Weights::Gguf(model) => model.path(),
            Weights::Adapted(model) => model.adapter.dir(),
            Weights::Checkpoint(checkpoint) => checkpoint.dir(),
        }
    }

    /// Tells models apart at little cost: see [`crate::files::identity`]; with the model that an adapter or a checkpoint is for.
    pub fn identity(&self) -> Result<String> {
        let own = match self {
            Weights::Megatron(model) => model.identity()?,
            _ => crate::files::identity(self.dir())?,
        };
        let Weights::Adapted(model) = self else { return Ok(own) };
        Ok(format!("{own} on {}", model.base.identity()?))
    }

    /// The folder with the model's tokenizer, if it has one.
    pub fn tokenizer_dir(&self) -> Result<Option<PathBuf>> {
        match (tokenizer_of(self.dir())?, self) {
            (None, Weights::Adapted(model)) => model.base.tokenizer_dir(),
            (own, _) => Ok(own),
        }
    }

    /// Fills the parameters, each rank its own slices; adapters, where the parameters have any, only from a model that has
    /// them too, and a scalar head only from a model that has one. Returns the hash of what is not trained, whatever the
    /// number of ranks. Collective over the ranks that hold them.
    pub fn fill(&self, params: &mut Sharded) -> Result<TensorHash> {
        match self {
            Weights::Hf(model) => model.source().fill(params),
            Weights::Meta(model) => model.source().fill(params),
            Weights::Megatron(model) => model.source().fill(params),
            Weights::Gguf(model) => model.source().fill(params),
            Weights::Adapted(model) => {
                let base = model.base.fill(params)?;
                Ok(base.plus(model.adapter.fill(params)?))
            }
            Weights::Checkpoint(checkpoint) => checkpoint.fill_weights(params),
        }
    }

    /// The hash that [`Weights::fill`] gives for a model of this shape where nothing is trained, by a pass over the tensors
    /// that the ranks of `group` divide. Collective.
    pub fn hash(&self, shape: &Shape, group: &Group) -> Result<TensorHash> {
        let layouts = layouts(shape);
        let names =
            layouts.iter().flat_map(|l| &l.specs).map(|spec| (spec.name.as_str(), spec.name.as_str()));
        match self {
            Weights::Hf(model) => model.source().hash(names, group),
            Weights::Meta(model) => model.source().hash(names, group),
            Weights::Megatron(model) => model.source().hash(names, group),
            Weights::Gguf(model) => model.source().hash(names, group),
            Weights::Adapted(model) => Ok(model.base.hash(shape, group)?.plus(model.adapter.hash(group)?)),
            Weights::Checkpoint(checkpoint) => agree(group, checkpoint.source())?.hash(names, group),
        }
    }

    /// The tensors, wherever they lie; adapters are merged as they are read.
    pub fn into_source(self) -> Result<TensorSource> {
        match self {
            Weights::Hf(model) => Ok(model.into_source()),
            Weights::Meta(model) => Ok(model.into_source()),
            Weights::Megatron(model) => Ok(model.into_source()),
            Weights::Gguf(model) => Ok(model.into_source()),
            Weights::Adapted(model) => Merge::new(model.base, model.adapter, None)?.source(),
            Weights::Checkpoint(checkpoint) => checkpoint.source(),
        }
    }
}

/// Refuses a base that is itself a model with an adapter.
pub(super) fn not_adapted(base: &Weights, adapter: &PeftAdapter) -> Result<()> {
    match base.lora() {
        None => Ok(()),
        Some(_) => Err(Error::data(format!(
            "{} is an adapter for {}, which is itself a model with an adapter; merge that first (corral merge)",
            adapter.dir().display(),
            base.dir().display()
        ))),
    }
}

/// The folder of a hub id (`owner/name`) in Hugging Face's local cache. Nothing is downloaded.
pub(super) fn in_hub_cache(path: &Path) -> Result<PathBuf> {
    let text = path.to_string_lossy();
    let part = |s: &str| !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let Some((owner, name)) = text
        .split_once('/')
        .filter(|(o, n)| part(o) && part(n) && !o.starts_with('.') && !n.starts_with('.'))
    else {
        return Err(Error::data(format!("{text}: there is no such folder")));
    };
    let cache = env::path("HF_HUB_CACHE")
        .or_else(|| Some(env::path("HF_HOME")?.join("hub")))
        .or_else(|| Some(env::path("HOME")?.join(".cache/huggingface/hub")))
        .unwrap_or_default();
    let repository = cache.join(format!("models--{owner}--{name}"));
    let main = repository.join("refs/main");
    let commit = match exists(&main)? {
        true => std::fs::read_to_string(&main).map_err(|e| read_error(&main, &e))?,
        false => String::new(),
    };
    let snapshot = repository.join("snapshots").join(commit.trim());
    if !commit.trim().is_empty() && is_dir(&snapshot)? {
        return Ok(snapshot);
    }
    Err(Error::data(format!(
        "{text}: there is no such folder, and no such model in the hub cache {}; if it is a hub id, download it with `hf \
         download {text}`",
        cache.display()
    )))
}
