//! The models of an algorithm that has several: each has its own place.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::sections::{Compute, Optim};
use super::trainable::{Freeze, Lora};

/// A model that is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trained {
    /// Hugging Face folder, run folder, checkpoint of a run, adapter, or Meta folder.
    pub path: PathBuf,
    /// `cpu`, `cuda` (the local rank's GPU) or `cuda:N`. Default: that of the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The dtype of forward and backward. Default: `precision.compute`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Compute>,
    /// Its values are on the device only while it works, else in host memory.
    #[serde(default)]
    pub offload: bool,
    #[serde(default)]
    pub freeze: Freeze,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// Default: the section `optim`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optim: Option<Optim>,
}

impl Trained {
    /// Whether its adapters ask for dropout, which no algorithm with such models has.
    pub fn drops_out(&self) -> bool {
        self.lora.as_ref().is_some_and(|l| l.dropout > 0.0)
    }
}

/// A critic: [`Trained`], but for its path, which may be another section's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Critic {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Compute>,
    pub offload: bool,
    pub freeze: Freeze,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optim: Option<Optim>,
}

impl Critic {
    /// The model at the critic's own path, else at `path`.
    pub fn or_path(self, path: &Path) -> Trained {
        let Critic { path: own, device, dtype, offload, freeze, lora, optim } = self;
        let path = own.unwrap_or_else(|| path.to_path_buf());
        Trained { path, device, dtype, offload, freeze, lora, optim }
    }
}

/// A model that is only asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Frozen {
    /// Hugging Face folder, run folder, checkpoint of a run, adapter, or Meta folder.
    pub path: PathBuf,
    /// `cpu`, `cuda` (the local rank's GPU) or `cuda:N`. Default: that of the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The dtype of its forward. Default: `precision.compute`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Compute>,
    /// Its values are on the device only while it works, else in host memory.
    #[serde(default)]
    pub offload: bool,
}
