//! What may change between two starts of a run in the same folder: every key has a class, and the difference of two
//! configurations is told key by key.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{self, Component, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::algorithm::{Algorithm, parse};
use crate::error::{Error, Result};

/// What a change of a key does to a run that goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Changes the mathematics of the steps to come. Refused in the same folder; a checkpoint can go on with it in another.
    Mathematics,
    /// Changes which tensors are trained, or which data a position counts: a checkpoint cannot go on with it.
    State,
    /// The number of steps: the schedule is computed anew.
    Length,
    /// When something is logged, validated, sampled or saved, and how much of it. No bit of the training changes.
    Output,
    /// How the work is done: time-outs, caches, memory. No bit of the training changes.
    Execution,
    /// How the work is divided: the same mathematics, rounded in another order.
    Rounding,
    /// A file or folder: the same one under another spelling is no change, another one is a change of [`Class::State`].
    Path,
    /// The run's own folder.
    Folder,
}

use Class::*;

/// A section's keys and their classes. A section `optim`, `lora` or `freeze` of a model (`actor.optim`) is that section.
type Section = (&'static str, &'static [(&'static str, Class)]);

/// Every key of every configuration. What stands for one subcommand only is in [`OF_STAGE`].
const KEYS: &[Section] = &[
    ("", &[("seed", State), ("output_dir", Folder)]),
    ("model", &[("path", Path), ("preset", State)]),
    (
        "model.init",
        &[
            ("model_type", State),
            ("vocab_size", State),
            ("hidden_size", State),
            ("intermediate_size", State),
            ("num_hidden_layers", State),
            ("num_attention_heads", State),
            ("num_key_value_heads", State),
            ("head_dim", State),
            ("max_position_embeddings", State),
            ("rms_norm_eps", State),
            ("rope_theta", State),
            ("tie_word_embeddings", State),
            ("initializer_range", State),
            ("sliding_window", State),
            ("num_local_experts", State),
            ("num_experts_per_tok", State),
            ("router_aux_loss_coef", Mathematics),
        ],
    ),
    (
        "model.init.rope_scaling",
        &[
            ("factor", State),
            ("low_freq_factor", State),
            ("high_freq_factor", State),
            ("original_max_position_embeddings", State),
        ],
    ),
    (
        "tokenizer",
        &[
            ("path", Path),
            ("chat_template", Path),
            ("template", State),
            ("add_tokens", State),
            ("pad_token", State),
            ("pad_to_multiple_of", State),
        ],
    ),
    (
        "data",
        &[
            ("sequence_length", State),
            ("packing", State),
            ("train_on_prompt", State),
            ("too_long", State),
            ("split", State),
            ("on_error", State),
            ("template_date", State),
            ("cache", Execution),
        ],
    ),
    ("data.train", &[("path", Path), ("weight", State)]),
    ("data.valid", &[("path", Output), ("weight", Output)]),
    ("data.few_shot", &[("path", Path), ("count", State)]),
    ("parallel", &[("mode", Rounding), ("shard", Rounding), ("tensor", Rounding), ("timeout_s", Execution)]),
    ("precision", &[("compute", Mathematics)]),
    (
        "optim",
        &[
            ("lr", Mathematics),
            ("betas", Mathematics),
            ("eps", Mathematics),
            ("weight_decay", Mathematics),
            ("clip", Mathematics),
            ("moments", State),
            ("offload", Execution),
        ],
    ),
    ("schedule", &[("kind", Mathematics), ("warmup_steps", Mathematics), ("min_lr_ratio", Mathematics)]),
    (
        "train",
        &[
            ("steps", Length),
            ("epochs", Length),
            ("batch_size", Mathematics),
            ("micro_batch_size", Rounding),
            ("recompute", Execution),
        ],
    ),
    ("checkpoint", &[("every", Output), ("keep", Output)]),
    ("log", &[("every", Output)]),
    ("valid", &[("every", Output), ("batches", Output), ("keep_best", Output), ("patience", Output)]),
    ("samples", &[("every", Output), ("count", Output), ("trace", Output)]),
    ("freeze", &[("blocks", State), ("embeddings", State), ("train_only", State)]),
    (
        "lora",
        &[
            ("rank", State),
            ("alpha", Mathematics),
            ("dropout", Mathematics),
            ("targets", State),
            ("rslora", Mathematics),
            ("modules_to_save", State),
            ("base", Mathematics),
        ],
    ),
    (
        "reward",
        &[
            ("loss", Mathematics),
            ("score", Mathematics),
            ("margin", Mathematics),
            ("center", Mathematics),
            ("init_std", Mathematics),
        ],
    ),
    // Measured when the training is over.
    ("reward.normalize", &[("samples", Output), ("data", Output), ("of", Output)]),
    (
        "dpo",
        &[
            ("loss", Mathematics),
            ("beta", Mathematics),
            ("label_smoothing", Mathematics),
            ("sft_weight", Mathematics),
            ("pairs", Mathematics),
            ("reference", Mathematics),
            ("group_size", Mathematics),
            ("truncated", Mathematics),
            ("truncated_penalty", Mathematics),
        ],
    ),
    ("dpo.moving_reference", &[("every", Mathematics), ("rate", Mathematics)]),
    ("actor", MODEL),
    ("critic", MODEL),
    ("reference", MODEL),
    ("reward_model", MODEL),
    (
        "rewards",
        &[
            ("kind", Mathematics),
            ("weight", Mathematics),
            ("form", Mathematics),
            ("pattern", Mathematics),
            ("most", Mathematics),
            ("buffer", Mathematics),
            ("run", Mathematics),
            ("timeout_s", Execution),
        ],
    ),
    (
        "generation",
        &[
            ("max_new_tokens", Mathematics),
            ("min_new_tokens", Mathematics),
            ("temperature", Mathematics),
            ("top_k", Mathematics),
            ("top_p", Mathematics),
            ("stop", Mathematics),
            ("truncate_token", Mathematics),
            ("truncate_after", Mathematics),
            ("batch_size", Rounding),
            ("gather", Execution),
        ],
    ),
    (
        "grpo",
        &[
            ("group_size", Mathematics),
            ("rewards", Mathematics),
            ("advantages", Mathematics),
            ("loss", Mathematics),
            ("level", Mathematics),
            ("epsilon", Mathematics),
            ("epsilon_high", Mathematics),
            ("sapo_temperature_pos", Mathematics),
            ("sapo_temperature_neg", Mathematics),
            ("delta", Mathematics),
            ("beta", Mathematics),
            ("kl_estimator", Mathematics),
            ("measure_kl", Output),
            ("epochs", Mathematics),
            ("minibatch_size", Mathematics),
            ("truncated", Mathematics),
            ("truncated_penalty", Mathematics),
            ("resample", Mathematics),
        ],
    ),
    (
        "ppo",
        &[
            ("epochs", Mathematics),
            ("minibatch_size", Mathematics),
            ("clip", Mathematics),
            ("clip_high", Mathematics),
            ("dual_clip", Mathematics),
            ("clip_value", Mathematics),
            ("gamma", Mathematics),
            ("lambda", Mathematics),
            ("whiten_advantages", Mathematics),
            ("whiten_rewards", Mathematics),
            ("aggregation", Mathematics),
            ("entropy_coef", Mathematics),
            ("kl_coef", Mathematics),
            ("kl_estimator", Mathematics),
            ("kl_in", Mathematics),
            ("kl_target", Mathematics),
            ("kl_horizon", Mathematics),
            ("stop_kl", Mathematics),
            ("reward_clip", Mathematics),
            ("reward_baseline", Mathematics),
            ("missing_eos", Mathematics),
            ("missing_eos_penalty", Mathematics),
            ("value_warmup", Mathematics),
            ("ema", State),
            ("self_check", Execution),
        ],
    ),
    ("ppo.ptx", &[("coef", Mathematics), ("sequence_length", State), ("batch_size", Mathematics)]),
    ("ppo.ptx.data", &[("path", Path), ("weight", State)]),
];

/// Of a model that is one of several.
const MODEL: &[(&str, Class)] =
    &[("path", Path), ("device", Rounding), ("dtype", Mathematics), ("offload", Execution)];

/// Sections that mean something else for one subcommand.
const OF_STAGE: &[(&str, Section)] = &[
    // Only samples are generated.
    (
        "sft",
        (
            "generation",
            &[
                ("max_new_tokens", Output),
                ("temperature", Output),
                ("top_k", Output),
                ("top_p", Output),
                ("stop", Output),
            ],
        ),
    ),
];

/// Sections of a model that are read as sections of their own.
const OF_MODELS: [&str; 3] = ["optim", "lora", "freeze"];

/// The class of a dotted key of a subcommand's configuration; indices of lists do not count. None: the key has none.
pub fn class_of(stage: &str, key: &str) -> Option<Class> {
    let mut parts: Vec<&str> = key.split('.').filter(|part| part.parse::<usize>().is_err()).collect();
    if parts.len() > 2 && OF_MODELS.contains(&parts[1]) {
        parts.remove(0);
    }
    let name = parts.pop()?;
    let section = parts.join(".");
    let find = |(of, keys): &Section| {
        (*of == section).then(|| keys.iter().find(|(key, _)| *key == name)).flatten().map(|(_, class)| *class)
    };
    let special = OF_STAGE.iter().find_map(|(of, keys)| if *of == stage { find(keys) } else { None });
    special.or_else(|| KEYS.iter().find_map(find))
}

/// A key whose value is another one.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    pub key: String,
    pub class: Class,
    there: Option<Value>,
    here: Option<Value>,
}

impl Change {
    /// The mathematics or the state of the run is another.
    pub fn is_refused(&self) -> bool {
        matches!(self.class, Mathematics | State | Path)
    }

    /// For a change that is taken.
    pub fn before_and_now(&self) -> String {
        format!("{}: before {}, now {}", self.key, show(&self.there), show(&self.here))
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: there {}, here {}", self.key, show(&self.there), show(&self.here))
    }
}

/// Several changes in a row.
pub fn list<'a>(changes: impl IntoIterator<Item = &'a Change>) -> String {
    changes.into_iter().map(Change::to_string).collect::<Vec<_>>().join("; ")
}

/// A value as one writes it in YAML: small and large numbers with an exponent.
fn show(value: &Option<Value>) -> String {
    match value {
        None | Some(Value::Null) => "not set".into(),
        Some(Value::Number(n)) => match n.as_f64() {
            Some(x) if n.is_f64() && x != 0.0 && !(1e-3..1e7).contains(&x.abs()) => format!("{x:e}"),
            _ => n.to_string(),
        },
        Some(Value::String(text)) if text.is_empty() || text.contains(char::is_control) => {
            format!("{text:?}")
        }
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(items)) => {
            let items: Vec<String> = items.iter().map(|item| show(&Some(item.clone()))).collect();
            format!("[{}]", items.join(", "))
        }
        Some(other) => other.to_string(),
    }
}

/// The first line of a run's `config.yaml`: the subcommand, and where relative paths begin.
const NOTE: [&str; 2] = ["# A run of `corral ", "`; relative paths are relative to "];

/// The resolved configuration of a subcommand, as it is written into a run's folder.
pub fn recorded(stage: &str, resolved: &str) -> String {
    match std::env::current_dir().map(|dir| dir.display().to_string()) {
        Ok(dir) if !dir.contains('\n') => format!("{}{stage}{}{dir}\n{resolved}", NOTE[0], NOTE[1]),
        _ => resolved.to_string(),
    }
}

/// The subcommand and the folder that the first line names, and the resolved configuration.
fn without_note(text: &str) -> (Option<(&str, &str)>, &str) {
    let noted = || {
        let (line, resolved) = text.split_once('\n')?;
        Some((line.strip_prefix(NOTE[0])?.split_once(NOTE[1])?, resolved))
    };
    noted().map_or((None, text), |(note, resolved)| (Some(note), resolved))
}

/// The resolved configuration, as it was before [`recorded`].
pub fn resolved(text: &str) -> &str {
    without_note(text).1
}

/// The subcommand that [`recorded`] has noted.
pub fn noted_stage(text: &str) -> Option<&str> {
    without_note(text).0.map(|(stage, _)| stage)
}

/// What differs between the configuration `text` that a run's folder holds (as [`recorded`] writes it) and `here`.
///
/// # Errors
/// The text is no configuration of this subcommand; the message says why.
pub fn between<T: Algorithm>(text: &str, source: &str, here: &T) -> Result<Vec<Change>> {
    let there = parse::<T>(text, source.to_string(), false, &[])?.config;
    let base = match without_note(text).0 {
        Some((_, base)) => PathBuf::from(base),
        None => std::env::current_dir().map_err(Error::from)?,
    };
    let (there, here) = (leaves(&there)?, leaves(here)?);
    let keys: BTreeSet<&String> = there.keys().chain(here.keys()).collect();
    let changes = keys.into_iter().filter_map(|key| {
        let (old, new) = (there.get(key), here.get(key));
        // A key that nobody has classified changes the mathematics until somebody says otherwise.
        let class = class_of(T::SUBCOMMAND, key).unwrap_or(Mathematics);
        let same = match (class, old, new) {
            (Folder, ..) => true,
            (Path, Some(Value::String(old)), Some(Value::String(new))) => same_path(&base, old, new),
            _ => old == new,
        };
        let change = || Change { key: key.clone(), class, there: old.cloned(), here: new.cloned() };
        (!same).then(change)
    });
    Ok(changes.collect())
}

/// Whether `there`, from the folder `base`, and `here`, from the current one, name the same file. What does not exist (a hub
/// id, the name of a template) is compared by its spelling.
fn same_path(base: &path::Path, there: &str, here: &str) -> bool {
    let from_base = base.join(there);
    match (from_base.canonicalize(), std::fs::canonicalize(here)) {
        (Ok(there), Ok(here)) => there == here,
        (Err(_), Err(_)) => {
            let absolute = path::absolute(here).unwrap_or_else(|_| here.into());
            there == here || cleaned(&from_base) == cleaned(&absolute)
        }
        _ => false,
    }
}

/// Without `.` and a slash at the end.
fn cleaned(path: &path::Path) -> PathBuf {
    path.components().filter(|part| *part != Component::CurDir).collect()
}

/// The values of a configuration by their dotted keys. A list of plain values is one value; what is not set is left out.
fn leaves<T: Serialize>(config: &T) -> Result<BTreeMap<String, Value>> {
    let value = serde_json::to_value(config).map_err(|e| Error::failed(e.to_string()))?;
    let mut found = BTreeMap::new();
    collect("", &value, &mut found);
    Ok(found)
}

fn collect(key: &str, value: &Value, found: &mut BTreeMap<String, Value>) {
    let below = |name: &str| if key.is_empty() { name.to_string() } else { format!("{key}.{name}") };
    match value {
        Value::Object(keys) => keys.iter().for_each(|(name, value)| collect(&below(name), value, found)),
        Value::Array(items) if items.iter().any(|item| item.is_object()) => {
            items.iter().enumerate().for_each(|(i, item)| collect(&below(&i.to_string()), item, found));
        }
        Value::Null => {}
        Value::Array(items) if items.is_empty() => {}
        other => {
            found.insert(key.to_string(), other.clone());
        }
    }
}

#[cfg(test)]
mod tests;
