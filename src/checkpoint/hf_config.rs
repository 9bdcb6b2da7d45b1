//! Hugging Face's `config.json`: what it says about the mathematics is taken or refused, never passed over.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;

use crate::config::shape::{Llama3RopeScaling, Shape};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Context, Error, Result};
use crate::files::read_error;

/// Architectures that can be read.
const ARCHITECTURES: [&str; 1] = ["LlamaForCausalLM"];

/// Keys that are read below.
const READ: [&str; 19] = [
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "initializer_range",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
];

/// Keys that change the model's mathematics in a way that is not built, unless they have this value (or null).
fn neutral(key: &str) -> Option<Value> {
    Some(match key {
        "attention_bias" | "mlp_bias" | "use_qk_norm" | "qk_norm" => json!(false),
        "attention_dropout" | "hidden_dropout" | "resid_pdrop" | "embd_pdrop" => json!(0.0),
        "partial_rotary_factor"
        | "embedding_multiplier"
        | "residual_multiplier"
        | "attention_multiplier"
        | "logits_scaling" => json!(1.0),
        "quantization_config"
        | "layer_types"
        | "no_rope_layers"
        | "num_local_experts"
        | "num_experts"
        | "attn_logit_softcapping"
        | "final_logit_softcapping"
        | "query_pre_attn_scalar" => Value::Null,
        _ => return None,
    })
}

/// Keys that say nothing about the mathematics.
fn harmless(key: &str) -> bool {
    const KEYS: [&str; 34] = [
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "pad_token_id",
        "pretraining_tp",
        "auto_map",
        "is_decoder",
        "is_encoder_decoder",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
        "tokenizer_class",
        "prefix",
        "add_cross_attention",
        "tie_encoder_decoder",
        "pruned_heads",
        "torchscript",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "sep_token_id",
        "use_bfloat16",
        "tf_legacy_loss",
        "unsloth_version",
        "unsloth_fixed",
        "attn_implementation",
        "use_sliding_window",
        "max_window_layers",
    ];
    key.starts_with('_') || KEYS.contains(&key)
}

/// Reads a JSON file that must hold an object.
pub fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).map_err(|e| read_error(path, &e))?;
    serde_json::from_str(&text).map_err(|e| Error::data(format!("{}: no JSON object: {e}", path.display())))
}

/// The shape that a `config.json` describes, and the keys that are not known (so that they can be reported).
pub fn read_shape(path: &Path) -> Result<(Shape, Vec<String>)> {
    let config = read_object(path)?;
    shape_of(&config).context(path.display())
}

fn shape_of(config: &Map<String, Value>) -> Result<(Shape, Vec<String>)> {
    check_architecture(config)?;
    let get = |key: &str| config.get(key).filter(|v| !v.is_null());
    let mut unknown = Vec::new();
    for (key, value) in config {
        if READ.contains(&key.as_str()) || harmless(key) || value.is_null() {
            continue;
        }
        match neutral(key) {
            Some(neutral) if same(value, &neutral) => {}
            Some(neutral) => return Err(refused(key, value, &neutral.to_string())),
            None if key == "sliding_window" => {
                if config.get("use_sliding_window") != Some(&json!(false)) {
                    return Err(refused(key, value, "null"));
                }
            }
            None => unknown.push(key.clone()),
        }
    }
    if let Some(act) = get("hidden_act")
        && act != "silu"
    {
        return Err(refused("hidden_act", act, "\"silu\""));
    }

    let integer = |key: &str, default: Option<i64>| match (get(key), default) {
        (Some(v), _) => v.as_i64().ok_or_else(|| Error::data(format!("{key} is {v}; it must be an integer"))),
        (None, Some(default)) => Ok(default),
        (None, None) => Err(Error::data(format!("{key} is missing"))),
    };
    let number = |key: &str, default: f64| match get(key) {
        Some(v) => v.as_f64().ok_or_else(|| Error::data(format!("{key} is {v}; it must be a number"))),
        None => Ok(default),
    };
    let heads = integer("num_attention_heads", None)?;
    let hidden_size = integer("hidden_size", None)?;
    if heads <= 0 || (get("head_dim").is_none() && hidden_size % heads != 0) {
        return Err(Error::data(format!(
            "hidden_size ({hidden_size}) does not divide by num_attention_heads ({heads})"
        )));
    }
    let (rope_theta, rope_scaling) = rope(config)?;
    let tie_word_embeddings = match get("tie_word_embeddings") {
        Some(v) => v
            .as_bool()
            .ok_or_else(|| Error::data(format!("tie_word_embeddings is {v}; it must be true or false")))?,
        None => false,
    };
    let shape = Shape {
        vocab_size: integer("vocab_size", None)?,
        hidden_size,
        intermediate_size: integer("intermediate_size", None)?,
        num_hidden_layers: integer("num_hidden_layers", None)?,
        num_attention_heads: heads,
        num_key_value_heads: integer("num_key_value_heads", Some(heads))?,
        head_dim: integer("head_dim", Some(hidden_size / heads))?,
        // transformers' defaults for a Llama.
        max_position_embeddings: integer("max_position_embeddings", Some(2048))?,
        rms_norm_eps: number("rms_norm_eps", 1e-6)?,
        rope_theta,
        rope_scaling,
        tie_word_embeddings,
        initializer_range: number("initializer_range", 0.02)?,
    };
    shape.check().map_err(|e| Error::data(e.message))?;
    Ok((shape, unknown))
}

fn check_architecture(config: &Map<String, Value>) -> Result<()> {
    let known = ARCHITECTURES.join(", ");
    match config.get("architectures") {
        Some(Value::Array(list)) if list.len() == 1 => match list[0].as_str() {
            Some(name) if ARCHITECTURES.contains(&name) => Ok(()),
            _ => Err(Error::data(format!("architecture {} is not known; known are: {known}", list[0]))),
        },
        None | Some(Value::Null) if config.get("model_type").is_some_and(|t| t == "llama") => Ok(()),
        other => Err(Error::data(format!(
            "architectures is {}; it must name one of: {known}",
            other.unwrap_or(&Value::Null)
        ))),
    }
}

fn same(value: &Value, neutral: &Value) -> bool {
    match (value.as_f64(), neutral.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => value == neutral,
    }
}

fn refused(key: &str, value: &Value, supported: &str) -> Error {
    Error::data(format!("{key} is {value}; that is not built: only {supported} can be computed"))
}

/// Rotary base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
fn rope(config: &Map<String, Value>) -> Result<(f64, Option<Llama3RopeScaling>)> {
    let number = |from: &Map<String, Value>, key: &str| match from.get(key).filter(|v| !v.is_null()) {
        Some(v) => {
            v.as_f64().map(Some).ok_or_else(|| Error::data(format!("{key} is {v}; it must be a number")))
        }
        None => Ok(None),
    };
    let (key, parameters) = match (config.get("rope_parameters"), config.get("rope_scaling")) {
        (Some(v), _) if !v.is_null() => ("rope_parameters", v),
        (_, Some(v)) if !v.is_null() => ("rope_scaling", v),
        _ => return Ok((number(config, "rope_theta")?.unwrap_or(10000.0), None)),
    };
    let Some(parameters) = parameters.as_object() else {
        return Err(Error::data(format!("{key} is {parameters}; it must be an object")));
    };
    let theta = match number(parameters, "rope_theta")? {
        Some(theta) => theta,
        None => number(config, "rope_theta")?.unwrap_or(10000.0),
    };
    // Before transformers 4.43 the type was called `type`.
    let kind = parameters.get("rope_type").or(parameters.get("type")).unwrap_or(&Value::Null);
    let known: &[&str] = match kind.as_str() {
        Some("default") => &[],
        Some("llama3") => {
            &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        }
        _ => return Err(refused(&format!("{key}.rope_type"), kind, "\"default\" and \"llama3\"")),
    };
    for (name, value) in parameters {
        let neutral = name == "partial_rotary_factor" && same(value, &json!(1.0));
        if !(known.contains(&name.as_str())
            || neutral
            || value.is_null()
            || ["rope_type", "type", "rope_theta"].contains(&name.as_str()))
        {
            return Err(refused(&format!("{key}.{name}"), value, "its absence"));
        }
    }
    if known.is_empty() {
        return Ok((theta, None));
    }
    let required =
        |name: &str| number(parameters, name)?.ok_or_else(|| Error::data(format!("{key}.{name} is missing")));
    let original = required("original_max_position_embeddings")?;
    if original.fract() != 0.0 || original < 1.0 {
        return Err(Error::data(format!(
            "{key}.original_max_position_embeddings is {original}; it must be a positive integer"
        )));
    }
    Ok((
        theta,
        Some(Llama3RopeScaling {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_max_position_embeddings: original as i64,
        }),
    ))
}

/// The `config.json` of a Llama, in the layout that transformers reads from 4.43 on.
pub fn write_shape(s: &Shape, dtype: Kind, ids: &SpecialIds) -> Value {
    let rope_scaling = s.rope_scaling.as_ref().map(|r| {
        json!({
            "factor": r.factor,
            "high_freq_factor": r.high_freq_factor,
            "low_freq_factor": r.low_freq_factor,
            "original_max_position_embeddings": r.original_max_position_embeddings,
            "rope_type": "llama3",
        })
    });
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden_size,
        "initializer_range": s.initializer_range,
        "intermediate_size": s.intermediate_size,
        "max_position_embeddings": s.max_position_embeddings,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": s.num_attention_heads,
        "num_hidden_layers": s.num_hidden_layers,
        "num_key_value_heads": s.num_key_value_heads,
        "pad_token_id": ids.pad,
        "rms_norm_eps": s.rms_norm_eps,
        "rope_scaling": rope_scaling,
        "rope_theta": s.rope_theta,
        "tie_word_embeddings": s.tie_word_embeddings,
        "torch_dtype": dtype_name(dtype),
        "use_cache": true,
        "vocab_size": s.vocab_size,
    })
}

fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        Kind::Double => "float64",
        _ => "float32",
    }
}

/// The ids that begin, end and pad texts, as `config.json` has them: null, a number, or (eos) a list.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SpecialIds {
    pub bos: Value,
    pub eos: Value,
    pub pad: Value,
}

impl SpecialIds {
    /// The tokenizer's; several ends of a text in ascending order, as published models have them.
    pub fn of(tokenizer: &Tokenizer) -> SpecialIds {
        let mut eos = tokenizer.eos_ids().to_vec();
        eos.sort_unstable();
        let eos = match eos[..] {
            [] => Value::Null,
            [one] => json!(one),
            _ => json!(eos),
        };
        SpecialIds { bos: json!(tokenizer.bos_id()), eos, pad: json!(tokenizer.pad_id()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> Map<String, Value> {
        let Value::Object(map) =
            write_shape(&Shape::preset("llama-15m").unwrap(), Kind::Float, &SpecialIds::default())
        else {
            unreachable!()
        };
        map
    }

    #[test]
    fn shapes_survive_the_way_out_and_back() {
        for name in Shape::PRESETS {
            let shape = Shape::preset(name).unwrap();
            let config = write_shape(&shape, Kind::BFloat16, &SpecialIds::default());
            let (back, unknown) = shape_of(config.as_object().unwrap()).unwrap();
            assert_eq!(back, shape);
            assert!(unknown.is_empty(), "{unknown:?}");
        }
    }

    #[test]
    fn what_changes_the_mathematics_is_refused() {
        let cases = [
            ("architectures", json!(["MixtralForCausalLM"]), "known are: LlamaForCausalLM"),
            ("architectures", json!([]), "LlamaForCausalLM"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("attention_bias", json!(true), "attention_bias"),
            ("mlp_bias", json!(true), "mlp_bias"),
            ("attention_dropout", json!(0.1), "attention_dropout"),
            ("sliding_window", json!(4096), "sliding_window"),
            ("quantization_config", json!({"bits": 4}), "quantization_config"),
            ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "linear"),
            (
                "rope_scaling",
                json!({"rope_type": "llama3", "factor": 2.0}),
                "original_max_position_embeddings",
            ),
            (
                "rope_parameters",
                json!({"rope_type": "default", "partial_rotary_factor": 0.5}),
                "partial_rotary",
            ),
            ("hidden_size", json!(290), "does not divide"),
            ("hidden_size", json!("288"), "integer"),
            ("vocab_size", Value::Null, "vocab_size is missing"),
            ("num_key_value_heads", json!(4), "multiple"),
            ("tie_word_embeddings", json!("no"), "true or false"),
        ];
        for (key, value, part) in cases {
            let mut config = llama();
            if key == "hidden_size" {
                config.insert("head_dim".into(), Value::Null);
            }
            config.insert(key.into(), value.clone());
            let e = shape_of(&config).expect_err(&format!("{key}: {value}"));
            assert_eq!(e.exit_code(), 3, "{key}: {e}");
            assert!(e.message.contains(part), "{key}: {e}");
        }
    }

    #[test]
    fn unknown_keys_are_reported_and_defaults_are_those_of_transformers() {
        let mut config = llama();
        config.insert("my_note".into(), json!(1));
        config.insert("_name_or_path".into(), json!("x"));
        for key in
            ["head_dim", "num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps"]
        {
            config.remove(key);
        }
        let (shape, unknown) = shape_of(&config).unwrap();
        assert_eq!(unknown, ["my_note"]);
        assert_eq!((shape.head_dim, shape.num_key_value_heads, shape.max_position_embeddings), (48, 6, 2048));
        assert_eq!((shape.rope_theta, shape.rms_norm_eps), (10000.0, 1e-6));
    }
}
