//! docs/corral.schema.json: a JSON Schema of configurations, with which editors complete and check keys.

use serde_json::{Map, Value as Json, json};

use super::catalog::{Catalog, default_of};
use crate::config::keys::{Key, KeyKind, Limits, Section};
use crate::error::{Error, Result};

/// The whole document: a definition for each recipe and for each section; a file is one of the recipes.
pub fn document(catalog: &Catalog) -> Result<String> {
    let mut definitions = Map::new();
    for (name, keys) in &catalog.recipes {
        definitions.insert((*name).into(), section(catalog, keys));
    }
    for shared in &catalog.sections {
        definitions.insert(name_of(&shared.title), section(catalog, &shared.section));
    }
    let recipes: Vec<Json> = catalog.recipes.iter().map(|(name, _)| reference(name)).collect();
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A configuration of corral",
        "anyOf": recipes,
        "$defs": definitions,
    });
    serde_json::to_string_pretty(&schema).map_err(|e| Error::failed(e.to_string()))
}

/// The definition of a section: apart from those of recipes, of which one has the same name.
fn name_of(title: &str) -> String {
    format!("section {}", title.trim_start_matches("section ")).replace(['(', ')'], "").replace(' ', "_")
}

fn reference(definition: &str) -> Json {
    json!({"$ref": format!("#/$defs/{definition}")})
}

fn section(catalog: &Catalog, section: &Section) -> Json {
    let properties: Map<String, Json> =
        section.keys.iter().map(|key| (key.name.to_string(), property(catalog, key))).collect();
    let required: Vec<&str> =
        section.keys.iter().filter(|key| key.default.is_none()).map(|key| key.name).collect();
    let mut schema = json!({
        "type": "object",
        "description": section.about,
        "properties": properties,
        "additionalProperties": false,
    });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

fn property(catalog: &Catalog, key: &Key) -> Json {
    let mut schema = of_kind(catalog, &key.kind, key.limits);
    let words = key.kind.choice().unwrap_or_default().iter().filter(|(_, about)| !about.is_empty());
    let words: String = words.map(|(word, about)| format!("\n- {word}: {about}")).collect();
    schema["description"] = format!("{}{words}", key.about).into();
    // Editors offer a default; a section's is made of its keys'.
    if let Some(default) = key.default.as_ref().filter(|d| !d.is_null() && !default_of(key).is_empty()) {
        schema["default"] = default.clone();
    }
    schema
}

fn of_kind(catalog: &Catalog, kind: &KeyKind, limits: Limits) -> Json {
    match kind {
        KeyKind::Bool => json!({"type": "boolean"}),
        KeyKind::Whole => numbers("integer", limits),
        KeyKind::Number => numbers("number", limits),
        // Numbers and booleans serve as text, as they are spelled.
        KeyKind::Text | KeyKind::Path => json!({"type": ["string", "number", "boolean"]}),
        KeyKind::Form(_) => json!({"type": "string"}),
        KeyKind::Choice(words) => json!({"enum": words.iter().map(|(word, _)| word).collect::<Vec<_>>()}),
        KeyKind::List(item, length) => {
            let mut schema = json!({"type": "array", "items": of_kind(catalog, item, limits)});
            if let Some(n) = length {
                schema["minItems"] = json!(n);
                schema["maxItems"] = json!(n);
            }
            schema
        }
        KeyKind::Optional(kind) => json!({"anyOf": [of_kind(catalog, kind, limits), {"type": "null"}]}),
        KeyKind::OneOf(kinds) => {
            json!({"anyOf": kinds.iter().map(|k| of_kind(catalog, k, limits)).collect::<Vec<_>>()})
        }
        // A section whose keys are all left out is an empty one.
        KeyKind::Section(section) if section.keys.iter().all(|key| key.default.is_some()) => {
            json!({"anyOf": [reference(&name_of(catalog.title(section))), {"type": "null"}]})
        }
        KeyKind::Section(section) => reference(&name_of(catalog.title(section))),
    }
}

fn numbers(kind: &str, limits: Limits) -> Json {
    let mut schema = json!({"type": kind});
    if limits.low.is_finite() {
        schema[if limits.above_low { "exclusiveMinimum" } else { "minimum" }] = json!(limits.low);
    }
    if limits.high.is_finite() {
        schema[if limits.below_high { "exclusiveMaximum" } else { "maximum" }] = json!(limits.high);
    }
    schema
}
