//! What a user names a model by, and the folder that it stands for.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::best::checkpoint_of_run;
use super::fetched::fetched;
use super::manifest::META;
use super::megatron::is_megatron;
use super::meta::PARAMS;
use super::peft;
use super::sharded::checkpoints_dir;
use super::weights::in_hub_cache;
use crate::data::tokenizer::{folder_has_tokenizer, gguf::has_tokenizer};
use crate::error::{Error, Result};
use crate::files::{exists, is_dir, is_file, parent};
use crate::gguf::{Gguf, is_gguf, models_in};
use crate::info;

/// A folder or file that holds a model, by its format.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelFolder {
    Hf(PathBuf),
    Meta(PathBuf),
    Megatron(PathBuf),
    /// A file.
    Gguf(PathBuf),
    /// In PEFT's format.
    Adapter(PathBuf),
    /// Of a run, or of one of its further models.
    Checkpoint(PathBuf),
}

impl ModelFolder {
    /// Finds the model that `path` names: a Hugging Face folder, a GGUF file or a folder with one, an adapter in PEFT's format, a folder
    /// in Meta's or Megatron's format, a checkpoint, a name that `corral get` fetched, a hub id that the local hub cache holds, or a
    /// run's folder: its `model/`, else its best checkpoint where the run keeps that, else its newest, which is told in one line.
    ///
    /// # Errors
    /// Of kind Data: there is no such folder, or no model or several in it; the newest checkpoint is damaged.
    pub fn find(path: &Path) -> Result<ModelFolder> {
        let found = locate(path)?;
        let path = found.as_path();
        if is_gguf(path) && is_file(path)? {
            return Ok(ModelFolder::Gguf(found));
        }
        if is_file(&path.join(META))? {
            return Ok(ModelFolder::Checkpoint(found));
        }
        // Before others: a config.json may lie there for the sake of the tokenizer.
        if is_megatron(path)? {
            return Ok(ModelFolder::Megatron(found));
        }
        for dir in [path.to_path_buf(), path.join("model")] {
            if is_file(&dir.join(peft::CONFIG))? {
                return Ok(ModelFolder::Adapter(dir));
            }
            if is_file(&dir.join("config.json"))? {
                return Ok(ModelFolder::Hf(dir));
            }
        }
        if is_dir(&checkpoints_dir(path))?
            && let Some((checkpoint, what)) = checkpoint_of_run(path)?
        {
            tell_once(format!("{} has no model/ yet: taking its {what}", path.display()));
            return Ok(ModelFolder::Checkpoint(checkpoint));
        }
        if is_file(&path.join(PARAMS))? {
            return Ok(ModelFolder::Meta(found));
        }
        let models = if is_dir(path)? { models_in(path)? } else { Vec::new() };
        if let [only] = models.as_slice() {
            return Ok(ModelFolder::Gguf(only.clone()));
        }
        if !models.is_empty() {
            let names =
                models.iter().filter_map(|m| Some(m.file_name()?.to_string_lossy())).collect::<Vec<_>>();
            return Err(Error::data(format!(
                "{}: several GGUF models ({}): name one",
                path.display(),
                names.join(", ")
            )));
        }
        Err(Error::data(format!(
            "{}: no model: a Hugging Face folder has config.json, an adapter {}, a folder in Meta's format {PARAMS}, one in Megatron's latest_checkpointed_iteration.txt, a GGUF \
             model is a file (.gguf), a checkpoint has {META}, and a run's folder model/ or checkpoints/ with a complete checkpoint",
            path.display(),
            peft::CONFIG
        )))
    }
}

/// The path itself where something is there, else the folder of the model that `corral get` fetched under this name, else
/// that of a hub id in the local hub cache.
///
/// # Errors
/// Of kind Data: there is none of these.
pub fn locate(path: &Path) -> Result<PathBuf> {
    match exists(path)? {
        true => Ok(path.to_path_buf()),
        false => fetched(path)?.map_or_else(|| in_hub_cache(path), Ok),
    }
}

/// [`locate`] for a tokenizer, which the hub cache may lack: what is nowhere stays as it is, for its reader to tell.
///
/// # Errors
/// Of kind Data: it is the name of a model that is not fetched.
pub fn locate_tokenizer(path: &Path) -> Result<PathBuf> {
    match exists(path)? {
        true => Ok(path.to_path_buf()),
        false => Ok(fetched(path)?.or_else(|| in_hub_cache(path).ok()).unwrap_or_else(|| path.to_path_buf())),
    }
}

/// The folder with the tokenizer of the model in `dir`, if it has one; a further model of a checkpoint has the checkpoint's. A
/// GGUF file holds its own.
pub fn tokenizer_of(dir: &Path) -> Result<Option<PathBuf>> {
    if is_gguf(dir) && is_file(dir)? {
        return Ok(has_tokenizer(&Gguf::open(dir)?.metadata)?.then(|| dir.to_path_buf()));
    }
    if folder_has_tokenizer(dir)? {
        return Ok(Some(dir.to_path_buf()));
    }
    let above = parent(dir);
    let part = is_file(&dir.join(META))? && is_file(&above.join(META))?;
    Ok((part && folder_has_tokenizer(above)?).then(|| above.to_path_buf()))
}

/// Tells a line once, however often a model is opened.
fn tell_once(line: String) {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if TOLD.lock().unwrap_or_else(PoisonError::into_inner).insert(line.clone()) {
        info!("{line}");
    }
}
