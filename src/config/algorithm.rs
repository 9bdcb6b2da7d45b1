//! What the configurations of all algorithms are, and how they are read: files, overrides, places of values.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::common::Common;
use super::conflict::Conflict;
use super::de;
use super::template_date::TemplateDate;
use super::yaml::Node;
use crate::error::{Error, Result};
use crate::files::broken_link;

/// The configuration of an algorithm.
pub trait Algorithm: Serialize + DeserializeOwned {
    /// The subcommand that runs it.
    const SUBCOMMAND: &'static str;

    /// What is taken where no file is named.
    const DEFAULT: BuiltIn;

    fn common(&self) -> Common<'_>;

    /// The first key that does not fit the others on `world_size` (at least 1) ranks, and why; touches no file and no
    /// device.
    fn conflict(&self, world_size: i64) -> Option<Conflict>;

    /// The date that its chat template is told; none where no template is used.
    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        None
    }
}

/// A configuration, and where each of its values came from.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    pub config: T,
    /// The file, as it was named; for a compiled-in recipe its path in the source tree.
    pub source: String,
    /// No file was named and the recipe that is compiled in was taken: the user should be told.
    pub compiled_in: bool,
    tree: Node,
}

/// A configuration that is compiled in.
#[derive(Debug, Clone, Copy)]
pub struct BuiltIn {
    /// Its path in the source tree.
    pub file: &'static str,
    pub text: &'static str,
}

/// The [`BuiltIn`] of a folder of `configs/`: its `default.yaml`.
macro_rules! built_in {
    ($folder:literal) => {
        $crate::config::algorithm::BuiltIn {
            file: concat!("configs/", $folder, "/default.yaml"),
            text: include_str!(concat!("../../configs/", $folder, "/default.yaml")),
        }
    };
}
pub(super) use built_in;

/// Reads `file` (or the recipe that is compiled in), applies the overrides (`optim.lr=3e-4`, in order, values in YAML) and turns
/// the result into `T`.
///
/// # Errors
/// All of kind `Config`: an unreadable file, broken YAML, a duplicate or unknown key, a wrong type, a value out of
/// range, each with its place.
pub fn load<T: Algorithm>(file: Option<&Path>, overrides: &[String]) -> Result<Loaded<T>> {
    let Some(file) = file else {
        return parse(T::DEFAULT.text, T::DEFAULT.file.to_string(), true, overrides);
    };
    let source = file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|e| {
        let why = broken_link(file).unwrap_or(format!("{e}; see --config"));
        let e = format!("{source}: cannot read the configuration: {why}");
        crate::content::unusable(file, Error::config(e))
    })?;
    parse(&text, source, false, overrides)
}

pub(super) fn parse<T: DeserializeOwned>(
    text: &str,
    source: String,
    compiled_in: bool,
    overrides: &[String],
) -> Result<Loaded<T>> {
    let mut tree = Node::parse_file(text, &source)?;
    for text in overrides {
        tree.apply_override(text)?;
    }
    let config = T::deserialize(de::NodeDeserializer::new(&tree))?;
    Ok(Loaded { config, source, compiled_in, tree })
}

impl<T> Loaded<T> {
    /// An error about the value of a dotted key, which tells where it was written: in the file, by an override, or (a
    /// default) nowhere.
    pub fn error(&self, key: &str, message: &str) -> Error {
        // A key that was left out is told at the nearest section around it.
        let mut at = key;
        let place = loop {
            match (self.tree.get(at), at.rsplit_once('.')) {
                (Some(node), _) => break node.place.to_string(),
                (None, Some((section, _))) => at = section,
                (None, None) => break self.source.clone(),
            }
        };
        Error::config(format!("{place}: '{key}': {message}"))
    }
}

impl<T: Algorithm> Loaded<T> {
    /// Refuses combinations that cannot run on `world_size` (at least 1) ranks, and tells where the value that does not
    /// fit was written.
    pub fn validate(&self, world_size: i64) -> Result<()> {
        self.config.conflict(world_size).map_or(Ok(()), |(key, message)| Err(self.error(key, &message)))
    }
}

impl<T: Serialize> Loaded<T> {
    /// The whole configuration as YAML, defaults and overrides filled in; loads again to the same value.
    pub fn resolved_yaml(&self) -> Result<String> {
        // By way of JSON, so that YAML's writer is compiled for one type.
        serde_json::to_value(&self.config)
            .map_err(|e| e.to_string())
            .and_then(|config| serde_saphyr::to_string(&config).map_err(|e| e.to_string()))
            .map_err(|e| Error::failed(format!("cannot write the configuration as YAML: {e}")))
    }
}
