//! PEFT's `adapter_config.json`: what it says about the mathematics is taken or refused, never passed over.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::SEQ_CLS;
use super::joined::Patterns;
use crate::config::trainable::{BaseFormat, Freeze, Lora, Targets};
use crate::model::Trainable;

/// Keys that change the mathematics in a way that is not built, unless they are off.
const REFUSED: [&str; 15] = [
    "bias",
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "exclude_modules",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "num_virtual_tokens",
];

/// Keys that are read, or that say how an adapter was made and not what it is.
const KNOWN: [&str; 29] = [
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_lora_weights",
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "runtime_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "unsloth_version",
    "unsloth_fixed",
];

/// Null, false, nothing in it, or `none`: the key has no effect.
fn off(v: &Value) -> bool {
    match v {
        Value::Null | Value::Bool(false) => true,
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        Value::String(s) => s == "none",
        Value::Number(_) | Value::Bool(true) => false,
    }
}

/// What of PEFT's options changes the mathematics and is not built.
fn refused(config: &Map<String, Value>) -> Option<String> {
    for key in REFUSED {
        if let Some(value) = config.get(key).filter(|v| !off(v)) {
            return Some(format!("{key}: {value} is not built"));
        }
    }
    if let Some(pattern) =
        config.get("layers_pattern").filter(|v| !off(v) && **v != "layers" && **v != json!(["layers"]))
    {
        return Some(format!("layers_pattern: {pattern} is not built; the model's blocks are `layers`"));
    }
    // These ways of starting also change the base, which is not in the adapter.
    let start = config.get("init_lora_weights").and_then(Value::as_str).unwrap_or("");
    ["pissa", "olora", "corda", "loftq", "lora_ga"].iter().any(|name| start.starts_with(name)).then(|| {
        format!(
            "init_lora_weights: {start} changed the base; convert the adapter to plain LoRA when saving it"
        )
    })
}

/// Keys that nothing reads, of which it is not known that they have no effect.
pub(super) fn unread(config: &Map<String, Value>) -> Option<String> {
    let known = |key: &str| KNOWN.contains(&key) || REFUSED.contains(&key);
    let unread: Vec<String> = config
        .iter()
        .filter(|(key, value)| !known(key) && !off(value))
        .map(|(key, value)| format!("{key} ({value})"))
        .collect();
    let s = if unread.len() > 1 { "s" } else { "" };
    (!unread.is_empty())
        .then(|| format!("{} key{s} not known and not used: {}", unread.len(), unread.join(", ")))
}

/// What a configuration describes.
pub(super) struct DescribedAdapter {
    pub trainable: Trainable,
    /// The model that the adapter is for.
    pub base: Option<String>,
    pub patterns: Patterns,
}

pub(super) fn read_config(config: &Map<String, Value>) -> Result<DescribedAdapter, String> {
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    if text("peft_type") != Some("LORA") {
        return Err(format!(
            "peft_type is {}; only LORA is built",
            config.get("peft_type").unwrap_or(&Value::Null)
        ));
    }
    if let Some(why) = refused(config) {
        return Err(why);
    }
    let number = |key: &str, default: f64| match config.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(v) => v.as_f64().ok_or_else(|| format!("{key}: {v} is not a number")),
    };
    let names = |key: &str| -> Result<Option<Vec<String>>, String> {
        match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => serde_json::from_value(v.clone())
                .map(Some)
                .map_err(|_| format!("{key}: {v} is not a list of names")),
        }
    };
    let targets = match text("target_modules") {
        Some("all-linear") => Targets::AllLinear,
        Some(pattern) => {
            return Err(format!(
                "target_modules: the pattern {pattern:?} is not built; give a list of names"
            ));
        }
        None => Targets::Names(names("target_modules")?.ok_or("target_modules is missing")?),
    };
    let layers = match config.get("layers_to_transform") {
        None | Some(Value::Null) => None,
        Some(Value::Number(n)) => Some(vec![n.as_i64().ok_or("layers_to_transform: not a whole number")?]),
        Some(v) => Some(
            serde_json::from_value(v.clone())
                .map_err(|_| format!("layers_to_transform: {v} is not a list"))?,
        ),
    };
    let rank = number("r", 8.0)?;
    if rank < 1.0 || rank.fract() != 0.0 {
        return Err(format!("r: {rank} is not a valid rank"));
    }
    let mut saved = names("modules_to_save")?.unwrap_or_default();
    if text("task_type") == Some(SEQ_CLS) {
        // PEFT names the heads of all kinds of classifiers, and always saves them.
        saved.retain(|name| name != "classifier");
        if !saved.iter().any(|name| name == "score") {
            saved.push("score".into());
        }
    }
    let lora = Lora {
        rank: rank as i64,
        alpha: Some(number("lora_alpha", 8.0)?),
        dropout: number("lora_dropout", 0.0)?,
        targets,
        rslora: config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        modules_to_save: saved,
        base: BaseFormat::None,
    };
    let base = text("base_model_name_or_path").filter(|b| !b.is_empty()).map(str::to_string);
    let trainable = Trainable { freeze: Freeze::default(), lora: Some(lora), layers };
    Ok(DescribedAdapter { trainable, base, patterns: read_patterns(config)? })
}

/// Ranks and alphas of single modules.
fn read_patterns(config: &Map<String, Value>) -> Result<Patterns, String> {
    Ok(Patterns { ranks: numbers(config, "rank_pattern")?, alphas: numbers(config, "alpha_pattern")? })
}

/// An object of names with numbers; empty where the key is off.
fn numbers<T: DeserializeOwned>(
    config: &Map<String, Value>,
    key: &str,
) -> Result<BTreeMap<String, T>, String> {
    match config.get(key).filter(|v| !off(v)) {
        None => Ok(BTreeMap::new()),
        Some(v) => serde_json::from_value(v.clone())
            .map_err(|_| format!("{key}: {v} is not an object of names with numbers")),
    }
}
