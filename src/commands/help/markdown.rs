//! docs/config.md: every key in a table.

use super::catalog::{Catalog, Shared, default_of, is_list, values_of};
use super::effect;
use crate::config::changes::show;
use crate::config::defaults::STAGES;
use crate::config::keys::{Class, Key, Section};

const INTRODUCTION: &str = "\
# Keys of configurations

Made by `corral help --markdown`; a test compares it with the program.

A configuration is YAML: `corral sft --config FILE KEY=VALUE ...`, where `KEY=VALUE` (`optim.lr=1e-4`, `data.train.0=FILE`) counts
more than the file. All that is wrong is told at once, each with its place. `corral help KEY` tells of one key,
`corral check RECIPE --config FILE` shows the whole configuration with its defaults.

Editors complete and check keys with [corral.schema.json](corral.schema.json), where the file says so:

```yaml
# yaml-language-server: $schema=PATH/docs/corral.schema.json#/$defs/sft
```

\"not set\" is null: what then happens is said with the key. The column \"change\" says what a change of the key does to a run that goes
on in its folder:

";

/// The whole document.
pub fn document(catalog: &Catalog) -> String {
    let mut text = INTRODUCTION.to_string();
    let classes = [
        Class::Mathematics,
        Class::State,
        Class::Length,
        Class::Output,
        Class::Execution,
        Class::Rounding,
        Class::Path,
        Class::Folder,
    ];
    for class in classes {
        text += &format!("- {}\n", effect(class));
    }
    text += &defaults_by_stage();
    text += "\n## Recipes\n";
    for (name, keys) in &catalog.recipes {
        text += &format!("\n### {name}\n\n{}\n\n{}", keys.about, table(catalog, keys));
    }
    text += "\n## Sections\n";
    for shared in &catalog.sections {
        text += &format!("\n### {}\n\n{}\n\n{}\n\n", shared.title, shared.section.about, places(shared));
        text += &table(catalog, &shared.section);
    }
    text
}

/// The table of defaults that depend on the stage.
fn defaults_by_stage() -> String {
    let mut text = String::from(
        "\n## Defaults by stage\n\nThese take the place of the defaults below where a configuration leaves them out; the run's first \
         lines name them.\n\n| stage | `optim.lr` | with `lora` | `optim.weight_decay` | source |\n| --- | --- | --- | --- | --- |\n",
    );
    let number = |x: f64| show(&Some(x.into()));
    for row in STAGES {
        text += &format!(
            "| {} | {} | {} | {} | {} |\n",
            row.stage,
            number(row.lr),
            number(row.lr_of_adapters),
            number(row.weight_decay),
            row.source
        );
    }
    text + "\n`corral init` halves the rate for models of 30B and more (Llama 2: 1.5e-4 above 13B; QLoRA: 1e-4 from 33B on), and doubles \
            it for new models below 200M (GPT-3: 6e-4 at 125M).\n"
}

/// Where a section stands.
fn places(shared: &Shared) -> String {
    let mut names: Vec<&str> = shared.places.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    let mut seen: Vec<&str> = Vec::new();
    names.retain(|name| {
        !seen.contains(name) && {
            seen.push(name);
            true
        }
    });
    let of = |name: &str| {
        let recipes: Vec<&str> =
            shared.places.iter().filter(|(n, _)| n == name).map(|(_, recipe)| *recipe).collect();
        format!("`{name}` of {}", recipes.join(", "))
    };
    names.iter().map(|name| of(name)).collect::<Vec<_>>().join("; ")
}

fn table(catalog: &Catalog, section: &Section) -> String {
    let mut text = "| key | values | default | change | |\n| --- | --- | --- | --- | --- |\n".to_string();
    for key in &section.keys {
        let class = key.class.map_or("", |class| effect(class).split(':').next().unwrap_or_default());
        let cells =
            [format!("`{}`", key.name), values(catalog, key), default_of(key), class.into(), about(key)];
        text += &format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
    text
}

fn values(catalog: &Catalog, key: &Key) -> String {
    let Some(section) = key.kind.section() else { return values_of(key) };
    let title = catalog.title(section);
    let link = format!("[{title}](#{})", anchor(title));
    match is_list(&key.kind) {
        // Sources: a path is short for the section.
        true if key.kind.words().contains("path, or") => format!("a list of paths or {link}"),
        true => format!("a list of {link}"),
        false => link,
    }
}

/// As GitHub makes it of a heading.
fn anchor(title: &str) -> String {
    let kept = title
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .collect::<String>();
    kept.replace(' ', "-")
}

/// What a key means, with the words that it may have.
fn about(key: &Key) -> String {
    let words = key.kind.choice().unwrap_or_default();
    let told: Vec<String> = words
        .iter()
        .filter(|(_, about)| !about.is_empty())
        .map(|(word, about)| format!("`{word}`: {about}"))
        .collect();
    format!("{} {}", key.about, told.join(" ")).trim().to_string()
}
