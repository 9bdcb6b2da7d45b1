//! The models of an algorithm that has several: each has its own place.

use std::path::{Path, PathBuf};

use super::conflict::Conflicts;
use super::section::section;
use super::sections::{Compute, Optim};
use super::setting::Setting;
use super::trainable::{Freeze, Lora};
use super::yaml::join;
use crate::error::{Error, ErrorClass};

section! {
    /// A model that is trained.
    pub struct Trained {
        /// Hugging Face folder, run folder, checkpoint of a run, adapter, or folder in Meta's or Megatron's format.
        path: PathBuf => Path;
        /// `cpu`, `cuda` (the local rank's GPU) or `cuda:N`. Default: the command's device.
        device: Option<String> = None => Rounding;
        /// The dtype of forward and backward. Default: `precision.compute`.
        dtype: Option<Compute> = None => Mathematics;
        /// Its weights are on the device only while it computes, otherwise in host memory.
        offload: bool = false => Execution;
        /// Parameters that are not trained.
        freeze: Freeze = Freeze::default();
        /// Adapters; without them the model itself is trained.
        lora: Option<Lora> = None;
        /// Default: the section `optim`.
        optim: Option<Optim> = None;
    }
}

section! {
    /// A model that predicts returns: as the other trained models, but its path may come from another section.
    pub struct Critic {
        /// The initial weights. Default: the reward model's, or without one the actor's with a new head.
        path: Option<PathBuf> = None => Path;
        /// `cpu`, `cuda` (the local rank's GPU) or `cuda:N`. Default: the command's device.
        device: Option<String> = None => Rounding;
        /// The dtype of forward and backward. Default: `precision.compute`.
        dtype: Option<Compute> = None => Mathematics;
        /// Its weights are on the device only while it computes, otherwise in host memory.
        offload: bool = false => Execution;
        /// Ranks that share every matrix of it, where it is smaller or larger than the actor. Default: `parallel.tensor`.
        tensor: Option<i64> = None, COUNT => Rounding;
        /// Parameters that are not trained.
        freeze: Freeze = Freeze::default();
        /// Adapters; without them the model itself is trained.
        lora: Option<Lora> = None;
        /// Default: the section `optim`.
        optim: Option<Optim> = None;
    }
}

impl Critic {
    /// The model at the critic's own path, else at `path`.
    pub fn or_path(self, path: &Path) -> Trained {
        let Critic { path: own, device, dtype, offload, freeze, lora, optim, tensor: _ } = self;
        let path = own.unwrap_or_else(|| path.to_path_buf());
        Trained { path, device, dtype, offload, freeze, lora, optim }
    }
}

section! {
    /// A frozen model, for inference only.
    pub struct FrozenModel {
        /// Hugging Face folder, run folder, checkpoint of a run, adapter, or folder in Meta's or Megatron's format.
        path: PathBuf => Path;
        /// `cpu`, `cuda` (the local rank's GPU) or `cuda:N`. Default: the command's device.
        device: Option<String> = None => Rounding;
        /// The dtype of its forward. Default: `precision.compute`.
        dtype: Option<Compute> = None => Mathematics;
        /// Its weights are on the device only while it computes, otherwise in host memory.
        offload: bool = false => Execution;
    }
}

/// An error about the model of a section: its key is one of the section's or another section's; without a key it is about the
/// section (of a configuration), or says the section's name before the message.
pub fn of_model(section: &str, e: Error) -> Error {
    match &e.key {
        Some(key) if Trained::kind().section().is_some_and(|keys| keys.find(key).is_some()) => {
            Error { key: Some(join(section, key)), ..e }
        }
        Some(_) => e,
        None if e.kind == ErrorClass::Config => Error { key: Some(section.into()), ..e },
        None => e.context(section),
    }
}

/// 8-bit floats are chosen for all models together; the key is `dtype`.
pub(super) fn conflicts_of_dtype(dtype: Option<Compute>, compute: Compute, found: &mut Conflicts) {
    if dtype == Some(Compute::Float8) && compute != Compute::Float8 {
        found.add(
            "dtype",
            "float8 is chosen with precision.compute: float8; models may then have dtype: bfloat16",
        );
    }
}

/// A device with a number of its own, where there are several ranks; the key is `device`.
pub(super) fn conflicts_of_device(device: Option<&String>, world_size: i64, found: &mut Conflicts) {
    if world_size > 1 && device.is_some_and(|d| d.starts_with("cuda:")) {
        found.add("device", "cuda:N is for a world of one rank; with several, cuda is each rank's own");
    }
}
