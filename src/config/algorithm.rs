//! What the configurations of all algorithms are, and how they are read: files, overrides, places of values.

use std::path::Path;

use super::common::Common;
use super::conflict::Conflicts;
use super::keys::Section;
use super::problems::Problems;
use super::setting::{At, Setting};
use super::template_date::TemplateDate;
use super::yaml::{ConfigPlace, Node};
use crate::error::{Error, Result};
use crate::files::broken_link;

/// The configuration of an algorithm.
pub trait Algorithm: Setting {
    /// The subcommand that runs it.
    const SUBCOMMAND: &'static str;

    /// What is taken where no file is named.
    const DEFAULT: BuiltInConfig;

    fn common(&self) -> Common<'_>;

    /// What does not fit on `world_size` (at least 1) ranks; touches no file and no device.
    fn conflicts(&self, world_size: i64, found: &mut Conflicts);

    /// The date that its chat template is told; none where no template is used.
    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        None
    }

    /// Its keys.
    fn keys() -> Section {
        let kind = Self::kind();
        kind.section().cloned().unwrap_or_else(|| unreachable!("a configuration is a section"))
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
pub struct BuiltInConfig {
    /// Its path in the source tree.
    pub file: &'static str,
    pub text: &'static str,
}

/// The [`BuiltInConfig`] of a folder of `configs/`: its `default.yaml`.
macro_rules! built_in {
    ($folder:literal) => {
        $crate::config::algorithm::BuiltInConfig {
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

pub(super) fn parse<T: Algorithm>(
    text: &str,
    source: String,
    compiled_in: bool,
    overrides: &[String],
) -> Result<Loaded<T>> {
    let mut tree = Node::parse_file(text, &source)?;
    for text in overrides {
        tree.apply_override(text)?;
    }
    let mut problems = Problems::default();
    let read = T::read(&At::root(&tree), &mut problems);
    // What does not fit is told too, where it cannot follow from what is wrong; one rank is what asks least.
    if let Some(config) = read.as_ref().filter(|_| !problems.is_empty()) {
        let mut found = Conflicts::default();
        config.conflicts(1, &mut found);
        for (key, why) in found.iter() {
            if !problems.may_cause(key, why) {
                problems.of_value(&place(&tree, key), key, why);
            }
        }
    }
    match (problems.into_error(), read) {
        (None, Some(config)) => Ok(Loaded { config, source, compiled_in, tree }),
        (Some(e), _) => Err(e),
        (None, None) => Err(Error::config(format!("{source}: cannot be read"))),
    }
}

/// Where the value of a dotted key was written; one that was left out: the nearest section around it.
fn place(tree: &Node, key: &str) -> ConfigPlace {
    let mut at = key;
    loop {
        match (tree.get(at), at.rsplit_once('.')) {
            (Some(node), _) => return node.place.clone(),
            (None, Some((section, _))) => at = section,
            (None, None) => return tree.place.clone(),
        }
    }
}

impl<T> Loaded<T> {
    /// An error about the value of a dotted key, which tells where it was written: in the file, by an override, or (a
    /// default) at the section around it.
    pub fn error(&self, key: &str, message: &str) -> Error {
        Error::config(format!("{}: '{key}': {message}", place(&self.tree, key)))
    }

    /// An error that is about a key ([`Error::key`]), with its place.
    pub fn locate(&self, e: Error) -> Error {
        match &e.key {
            Some(key) => self.error(key, &e.message),
            None => e,
        }
    }
}

impl<T: Algorithm> Loaded<T> {
    /// Refuses combinations that cannot run on `world_size` (at least 1) ranks: a line each, with the place where the value
    /// that does not fit was written.
    pub fn validate(&self, world_size: i64) -> Result<()> {
        let mut found = Conflicts::default();
        self.config.conflicts(world_size, &mut found);
        self.refuse(&found)
    }

    /// An error of all that does not fit.
    pub fn refuse(&self, found: &Conflicts) -> Result<()> {
        let mut problems = Problems::default();
        for (key, why) in found.iter() {
            problems.of_value(&place(&self.tree, key), key, why);
        }
        problems.into_error().map_or(Ok(()), Err)
    }

    /// The whole configuration as YAML, defaults and overrides filled in; loads again to the same value.
    pub fn resolved_yaml(&self) -> Result<String> {
        serde_saphyr::to_string(&self.config.write())
            .map_err(|e| Error::failed(format!("cannot write the configuration as YAML: {e}")))
    }
}
