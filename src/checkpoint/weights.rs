//! What a path to a model may be.

use std::path::{Path, PathBuf};

use kernels::mmap::map_file;
use sha2::{Digest, Sha256};

use super::hf::HfModel;
use super::meta::{MetaModel, PARAMS};
use super::ours::{Ours, Scoring};
use super::peft::{self, PeftAdapter};
use super::sharded::{Checkpoint, META, checkpoints_dir, latest};
use super::source::Source;
use crate::config::reward::Score;
use crate::config::shape::{Head, Shape};
use crate::data::tokenizer::{folder_has_tokenizer, hex};
use crate::distributed::sharded::Sharded;
use crate::error::{Context, Error, Result};
use crate::files::{exists, is_dir, is_file, read_error};
use crate::model::Trainable;

/// A model on disk, found by its path.
pub enum Weights {
    Hf(HfModel),
    Meta(MetaModel),
    Adapted(Box<Adapted>),
    Checkpoint(Box<Checkpoint>),
}

/// An adapter, and the model that it is for.
pub struct Adapted {
    pub adapter: PeftAdapter,
    pub base: Weights,
    /// The base's, but for the head, which may come with the adapter.
    shape: Shape,
}

impl Weights {
    /// Opens a Hugging Face folder, a folder in Meta's format, a run's folder (its final model, else its newest
    /// checkpoint), a checkpoint, or a hub id that the local hub cache holds.
    /// Reads headers only.
    pub fn open(path: &Path) -> Result<Weights> {
        let found = match exists(path)? {
            true => path.to_path_buf(),
            false => in_hub_cache(path)?,
        };
        let path = found.as_path();
        if is_file(&path.join(META))? {
            return Ok(Weights::Checkpoint(Box::new(Checkpoint::open(path)?)));
        }
        for dir in [path.to_path_buf(), path.join("model")] {
            if is_file(&dir.join(peft::CONFIG))? {
                let adapter = PeftAdapter::open(&dir)?;
                let base = adapter.base()?;
                let base = Weights::open(&base)
                    .with_context(|| format!("the model of the adapter {}", dir.display()))?;
                return Weights::adapted(base, adapter);
            }
            if is_file(&dir.join("config.json"))? {
                return Ok(Weights::Hf(HfModel::load(&dir)?));
            }
        }
        if is_dir(&checkpoints_dir(path))?
            && let Some(checkpoint) = latest(path)?
        {
            return Ok(Weights::Checkpoint(Box::new(checkpoint)));
        }
        if is_file(&path.join(PARAMS))? {
            return Ok(Weights::Meta(MetaModel::load(path)?));
        }
        Err(Error::data(format!(
            "{}: no model: a Hugging Face folder has config.json, one in Meta's format {PARAMS}, a checkpoint {META}, and \
             a run's folder model/ or checkpoints/ with a complete checkpoint",
            path.display()
        )))
    }

    /// A model with an adapter, which must fit it.
    pub fn adapted(base: Weights, mut adapter: PeftAdapter) -> Result<Weights> {
        if base.lora().is_some() {
            return Err(Error::data(format!(
                "{} is an adapter for {}, which is itself a model with an adapter; merge that first (corral merge)",
                adapter.dir().display(),
                base.dir().display()
            )));
        }
        let shape = adapter.shape(base.shape());
        adapter.check(&shape)?;
        Ok(Weights::Adapted(Box::new(Adapted { adapter, base, shape })))
    }

    /// The adapters that the model has besides its own tensors, if any, and how its weights were kept in training.
    pub fn lora(&self) -> Option<&Trainable> {
        match self {
            Weights::Hf(_) | Weights::Meta(_) => None,
            Weights::Adapted(model) => Some(model.adapter.trainable()),
            Weights::Checkpoint(checkpoint) => {
                checkpoint.meta().base.as_ref().map(|b| &b.trainable).filter(|t| t.lora.is_some())
            }
        }
    }

    pub fn shape(&self) -> &Shape {
        match self {
            Weights::Hf(model) => model.shape(),
            Weights::Meta(model) => model.shape(),
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
            Weights::Adapted(model) => match Ours::read(model.adapter.dir())?.reward {
                Some(scoring) => Some(scoring),
                None => model.base.scoring()?,
            },
            Weights::Hf(_) | Weights::Meta(_) => Ours::read(self.dir())?.reward,
        };
        Ok(Some(said.unwrap_or(Scoring::raw(Score::Last))))
    }

    /// The folder that the weights come from.
    pub fn dir(&self) -> &Path {
        match self {
            Weights::Hf(model) => model.dir(),
            Weights::Meta(model) => model.dir(),
            Weights::Adapted(model) => model.adapter.dir(),
            Weights::Checkpoint(checkpoint) => checkpoint.dir(),
        }
    }

    /// Tells models apart by the contents of all files of their folders, wherever these lie.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        let read = |e: std::io::Error| read_error(self.dir(), &e);
        let entries = std::fs::read_dir(self.dir()).map_err(read)?.collect::<std::io::Result<Vec<_>>>();
        let mut paths: Vec<PathBuf> = entries.map_err(read)?.into_iter().map(|e| e.path()).collect();
        paths.sort();
        for path in paths {
            if !is_file(&path)? {
                continue;
            }
            let file = std::fs::File::open(&path).map_err(|e| read_error(&path, &e))?;
            let bytes = map_file(&file).map_err(|e| read_error(&path, &e))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            hash.update(format!("{name} {} ", bytes.len()));
            hash.update(&bytes[..]);
        }
        match self {
            Weights::Adapted(model) => hash.update(model.base.fingerprint()?),
            Weights::Checkpoint(checkpoint) => {
                if let Some(base) = &checkpoint.meta().base {
                    hash.update(Weights::open(Path::new(&base.path))?.fingerprint()?);
                }
            }
            Weights::Hf(_) | Weights::Meta(_) => {}
        }
        Ok(hex(&hash.finalize()[..16]))
    }

    /// The folder with the model's tokenizer, if it has one.
    pub fn tokenizer_dir(&self) -> Result<Option<PathBuf>> {
        let dir = self.dir();
        match self {
            _ if folder_has_tokenizer(dir)? => Ok(Some(dir.to_path_buf())),
            Weights::Adapted(model) => model.base.tokenizer_dir(),
            _ => Ok(None),
        }
    }

    /// Fills the parameters, each rank its own slices; adapters, where the parameters have any, only from a model that has
    /// them too, and a scalar head only from a model that has one. Collective over the ranks that hold them.
    pub fn fill(&self, params: &mut Sharded) -> Result<()> {
        match self {
            Weights::Hf(model) => model.source().fill(params),
            Weights::Meta(model) => model.source().fill(params),
            Weights::Adapted(model) => {
                model.base.fill(params)?;
                model.adapter.fill(params)
            }
            Weights::Checkpoint(checkpoint) => checkpoint.fill_weights(params),
        }
    }

    /// The tensors, wherever they lie. Of a checkpoint, its files' contents are checked first.
    pub fn into_source(self) -> Result<Source> {
        match self {
            Weights::Hf(model) => Ok(model.into_source()),
            Weights::Meta(model) => Ok(model.into_source()),
            Weights::Adapted(model) => Err(with_adapter(model.adapter.dir(), model.base.dir())),
            Weights::Checkpoint(checkpoint) => match &checkpoint.meta().base {
                None => checkpoint.source(),
                Some(base) if base.trainable.lora.is_some() => {
                    Err(with_adapter(checkpoint.dir(), Path::new(&base.path)))
                }
                // What was not trained is the base's.
                Some(base) => {
                    Ok(Weights::open(Path::new(&base.path))?.into_source()?.overlaid(checkpoint.source()?))
                }
            },
        }
    }
}

fn with_adapter(adapter: &Path, base: &Path) -> Error {
    Error::config(format!(
        "{} is an adapter for {} and no model by itself: merge them first (corral merge)",
        adapter.display(),
        base.display()
    ))
}

/// The folder of a hub id (`owner/name`) in Hugging Face's local cache. Nothing is downloaded.
pub fn in_hub_cache(path: &Path) -> Result<PathBuf> {
    let text = path.to_string_lossy();
    let part = |s: &str| !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let Some((owner, name)) = text
        .split_once('/')
        .filter(|(o, n)| part(o) && part(n) && !o.starts_with('.') && !n.starts_with('.'))
    else {
        return Err(Error::data(format!("{text}: there is no such folder")));
    };
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = var("HF_HUB_CACHE")
        .or_else(|| Some(var("HF_HOME")?.join("hub")))
        .or_else(|| Some(var("HOME")?.join(".cache/huggingface/hub")))
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
