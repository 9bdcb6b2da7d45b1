//! All keys of all recipes, each section once.

use serde_json::Value as Json;

use crate::commands::recipes::RECIPES;
use crate::config::changes::show;
use crate::config::keys::{Class, Key, KeyKind, Limits, Section};

/// The keys of all recipes.
pub struct Catalog {
    pub recipes: Vec<(&'static str, Section)>,
    /// Sections below the top, in the order of their first key.
    pub sections: Vec<Shared>,
}

/// A section, and where it stands.
pub struct Shared {
    /// Of all sections another: `optim`; where two have one name: `data (sft)`; where a recipe has it: `section grpo`.
    pub title: String,
    pub section: Section,
    /// Dotted key and recipe.
    pub places: Vec<(String, &'static str)>,
}

/// A dotted key and what it is in some recipes.
pub struct KeyPlace {
    pub name: String,
    pub recipes: Vec<&'static str>,
    pub key: Key,
    pub class: Option<Class>,
}

impl Catalog {
    pub fn new() -> Catalog {
        let recipes: Vec<(&'static str, Section)> = RECIPES.iter().map(|r| (r.name(), r.keys())).collect();
        let mut sections: Vec<Shared> = Vec::new();
        for (recipe, keys) in &recipes {
            for (name, key) in keys.all() {
                let Some(section) = key.kind.section() else { continue };
                match sections.iter_mut().find(|s| s.section == *section) {
                    Some(there) => there.places.push((name, recipe)),
                    None => {
                        let plain = match recipes.iter().any(|(recipe, _)| *recipe == name) {
                            true => format!("section {name}"),
                            false => name.clone(),
                        };
                        let taken = sections.iter().any(|s| s.title == plain);
                        let title = if taken { format!("{plain} ({recipe})") } else { plain };
                        sections.push(Shared {
                            title,
                            section: section.clone(),
                            places: vec![(name, recipe)],
                        });
                    }
                }
            }
        }
        Catalog { recipes, sections }
    }

    /// The title of a section.
    pub fn title(&self, section: &Section) -> &str {
        self.sections.iter().find(|s| s.section == *section).map_or("", |s| s.title.as_str())
    }

    /// Every dotted key, once for the recipes in which it is the same.
    pub fn places(&self) -> Vec<KeyPlace> {
        let mut places: Vec<KeyPlace> = Vec::new();
        for (recipe, keys) in &self.recipes {
            for (name, key) in keys.all() {
                match places.iter_mut().find(|p| p.name == name && p.key == *key) {
                    Some(there) => there.recipes.push(recipe),
                    None => {
                        let class = keys.class_of(&name);
                        places.push(KeyPlace { name, recipes: vec![recipe], key: key.clone(), class });
                    }
                }
            }
        }
        places
    }
}

/// What a user may write at a key: its kind, with the range of its numbers.
pub fn values_of(key: &Key) -> String {
    let limits = match key.limits {
        limits if limits == Limits::COUNT => "of at least 1".to_string(),
        limits => limits.to_string(),
    };
    format!("{} {limits}", key.kind.words()).trim_end().to_string()
}

/// What is taken where a key is left out, as one writes it.
pub fn default_of(key: &Key) -> String {
    match &key.default {
        None => "none: required".into(),
        Some(Json::Null) => "not set".into(),
        Some(Json::Array(items)) if items.is_empty() => "[]".into(),
        Some(_) if key.kind.section().is_some() => String::new(),
        Some(default) => show(&Some(default.clone())),
    }
}

/// Whether a kind has nothing below it that is worth a table of its own.
pub fn is_list(kind: &KeyKind) -> bool {
    match kind {
        KeyKind::List(..) => true,
        KeyKind::Optional(kind) => is_list(kind),
        _ => false,
    }
}
