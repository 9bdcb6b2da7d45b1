//! What the configurations of all algorithms are, and how they are read: files, overrides, places of values.

use std::path::Path;

use super::common::Common;
use super::conflict::Conflicts;
use super::defaults;
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

    /// The recipes that are compiled in. The first is taken where none is named.
    const BUILT_IN: &'static [BuiltInConfig];

    /// The key that holds the trained model, and may be called `model`.
    const MODEL: &'static str = "model";

    /// Whether ranks may share sequences (`parallel.context`).
    const SHARES_SEQUENCES: bool = false;

    /// Whether the blocks may lie over stages (`parallel.pipeline`).
    const PIPELINES: bool = false;

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
    /// It is compiled in: no file was named, or one of [`Algorithm::BUILT_IN`]. The user should be told.
    pub compiled_in: bool,
    /// Keys that the stage has given its own default, each with the value.
    pub defaults: Vec<(&'static str, f64)>,
    tree: Node,
}

/// A recipe that is compiled in.
#[derive(Debug, Clone, Copy)]
pub struct BuiltInConfig {
    /// The file's name without its end.
    pub name: &'static str,
    /// Its path in the source tree.
    pub file: &'static str,
    pub text: &'static str,
}

/// The recipes of a folder of `configs/`, by their names.
macro_rules! built_in {
    ($folder:literal: $($name:literal),+) => {
        &[$($crate::config::algorithm::BuiltInConfig {
            name: $name,
            file: concat!("configs/", $folder, "/", $name, ".yaml"),
            text: include_str!(concat!("../../configs/", $folder, "/", $name, ".yaml")),
        }),+]
    };
}
pub(super) use built_in;

/// Reads `file`, which may be the name of a recipe that is compiled in (none: the first of these), applies the overrides (`optim.lr=3e-4`, in order, values in YAML) and turns
/// the result into `T`.
///
/// # Errors
/// All of kind `Config`: an unreadable file, broken YAML, a duplicate or unknown key, a wrong type, a value out of
/// range, each with its place.
pub fn load<T: Algorithm>(file: Option<&Path>, overrides: &[String]) -> Result<Loaded<T>> {
    let named = match file {
        None => T::BUILT_IN.first(),
        Some(file) if file.exists() => None,
        Some(file) => T::BUILT_IN.iter().find(|b| file == Path::new(b.name) || file == Path::new(b.file)),
    };
    let (file, source) = match (named, file) {
        (Some(built_in), _) => return parse(built_in.text, built_in.file.to_string(), true, overrides),
        (None, Some(file)) => (file, file.display().to_string()),
        (None, None) => return Err(Error::config("name a configuration: --config FILE")),
    };
    let text = std::fs::read_to_string(file).map_err(|e| {
        let names: Vec<&str> = T::BUILT_IN.iter().map(|b| b.name).collect();
        let why = broken_link(file).unwrap_or(format!(
            "{e}; the recipes of {} are {}",
            T::SUBCOMMAND,
            names.join(", ")
        ));
        let e = format!("{source}: cannot read the configuration: {why}");
        crate::content::unusable(file, Error::config(e))
    })?;
    parse(&text, source, false, overrides)
}

/// Reads a configuration that was just made, and applies the overrides.
///
/// # Errors
/// As [`load`].
pub fn load_text<T: Algorithm>(text: &str, overrides: &[String]) -> Result<Loaded<T>> {
    parse(text, "the made configuration".into(), false, overrides)
}

pub(super) fn parse<T: Algorithm>(
    text: &str,
    source: String,
    compiled_in: bool,
    overrides: &[String],
) -> Result<Loaded<T>> {
    let mut tree = Node::parse_file(text, &source)?;
    tree.rename("model", T::MODEL)?;
    for text in overrides {
        match text.strip_prefix("model").filter(|rest| T::MODEL != "model" && rest.starts_with(['.', '='])) {
            Some(rest) => tree.apply_override(&format!("{}{rest}", T::MODEL))?,
            None => tree.apply_override(text)?,
        }
    }
    let defaults = defaults::fill(T::SUBCOMMAND, &mut tree);
    let mut problems = Problems::of(T::keys().all().into_iter().map(|(name, _)| name).collect());
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
        (None, Some(config)) => Ok(Loaded { config, source, compiled_in, defaults, tree }),
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
        if !T::SHARES_SEQUENCES && self.config.common().parallel.context > 1 {
            let why = format!(
                "{} does not share sequences among ranks; pretrain and sft do. Set it to 1",
                T::SUBCOMMAND
            );
            found.add("parallel.context", why);
        }
        if !T::PIPELINES && self.config.common().parallel.pipeline > 1 {
            let why = format!("{} does not run in stages; pretrain and sft do. Set it to 1", T::SUBCOMMAND);
            found.add("parallel.pipeline", why);
        }
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
