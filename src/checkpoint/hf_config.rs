//! Hugging Face's `config.json`: what it says about the mathematics is taken or refused, never passed over.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;

use super::families::{self, Config, Description, Only, refused};
use crate::config::shape::{Family, Head, Llama3RopeScaling, Shape};
use crate::content::unusable;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Context, Error, Result};
use crate::files::{is_file, read_error};

/// Keys that [`common`] reads.
pub(super) const COMMON: [&str; 15] = [
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
];

/// Keys that change any model's mathematics in a way that is not built, unless they have this value (or null).
fn neutral(key: &str) -> Option<Only> {
    Some(match key {
        "use_qk_norm" | "qk_norm" => Only::Bool(false),
        "attention_dropout" | "hidden_dropout" | "resid_pdrop" | "embd_pdrop" => Only::Number(0.0),
        "partial_rotary_factor"
        | "embedding_multiplier"
        | "residual_multiplier"
        | "attention_multiplier"
        | "logits_scaling" => Only::Number(1.0),
        "quantization_config"
        | "layer_types"
        | "no_rope_layers"
        | "num_local_experts"
        | "num_experts"
        | "sliding_window"
        | "attn_logit_softcapping"
        | "final_logit_softcapping"
        | "query_pre_attn_scalar" => Only::Null,
        _ => return None,
    })
}

/// Keys that say nothing about the mathematics.
fn harmless(key: &str) -> bool {
    const KEYS: [&str; 37] = [
        "architectures",
        "model_type",
        "bos_token_id",
        "eos_token_id",
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
        "num_labels",
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
    ];
    key.starts_with('_') || KEYS.contains(&key)
}

/// Reads a JSON file that must hold an object.
pub fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).map_err(|e| read_error(path, &e))?;
    serde_json::from_str(&text)
        .map_err(|e| unusable(path, Error::data(format!("{}: no JSON object: {e}", path.display()))))
}

/// What a `config.json` describes: the family that it names, the shape, and the keys that are not known (so that they
/// can be reported).
pub fn read_shape(path: &Path) -> Result<(&'static Description, Shape, Vec<String>)> {
    let config = read_object(path)?;
    shape_of(&config).context(path.display())
}

fn shape_of(config: &Map<String, Value>) -> Result<(&'static Description, Shape, Vec<String>)> {
    let (family, head) = families::named(config)?;
    let mut unknown = Vec::new();
    for (key, value) in config {
        if value.is_null() || harmless(key) || family.harmless.contains(&key.as_str()) {
            continue;
        }
        let only = family.only.iter().find(|(k, _)| k == key).map(|(_, only)| *only);
        let read = family.keys.iter().any(|keys| keys.contains(&key.as_str()));
        match only.or_else(|| neutral(key).filter(|_| !read)) {
            Some(only) if only.is(value) => {}
            Some(only) => return Err(refused(key, value, &only.to_string())),
            None if read => {}
            None => unknown.push(key.clone()),
        }
    }
    let mut shape = (family.read)(&Config(config))?;
    if head == Head::Score {
        check_one_label(config)?;
        shape = shape.scored();
    }
    shape.check().map_err(|e| Error::data(e.message))?;
    Ok((family, shape, unknown))
}

/// Refuses a classifier: the scalar head is one label. transformers counts `id2label`; without it there are two.
fn check_one_label(config: &Map<String, Value>) -> Result<()> {
    let labels = match (config.get("num_labels"), config.get("id2label")) {
        (Some(number), _) if !number.is_null() => number.clone(),
        (_, Some(Value::Object(labels))) => json!(labels.len()),
        _ => json!(2),
    };
    match labels == json!(1) {
        true => Ok(()),
        false => Err(refused("num_labels (the entries of id2label)", &labels, "1")),
    }
}

/// What transformers takes where a key is missing.
pub(super) struct Defaults {
    pub family: Family,
    /// None: as many as query heads.
    pub num_key_value_heads: Option<i64>,
    /// None: the hidden size divided by the heads.
    pub head_dim: Option<i64>,
    pub max_position_embeddings: i64,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
}

/// The part of the shape that is in the same keys in nearly all families.
pub(super) fn common(config: &Config, d: Defaults) -> Result<Shape> {
    if let Some(act) = config.get("hidden_act")
        && act != "silu"
    {
        return Err(refused("hidden_act", act, "\"silu\""));
    }
    let heads = config.integer("num_attention_heads")?;
    let hidden_size = config.integer("hidden_size")?;
    let head_dim = match config.some_integer("head_dim")?.or(d.head_dim) {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden_size % heads == 0 => hidden_size / heads,
        None => {
            return Err(Error::data(format!(
                "hidden_size ({hidden_size}) does not divide by num_attention_heads ({heads})"
            )));
        }
    };
    let default = if config.is_null("num_key_value_heads") { None } else { d.num_key_value_heads };
    let kv_heads = config.some_integer("num_key_value_heads")?.or(default).unwrap_or(heads);
    let (rope_theta, rope_scaling) = rope(config.0, d.rope_theta)?;
    Ok(Shape {
        family: d.family,
        head: Head::Lm,
        vocab_size: config.integer("vocab_size")?,
        hidden_size,
        intermediate_size: config.integer("intermediate_size")?,
        num_hidden_layers: config.integer("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        max_position_embeddings: config
            .some_integer("max_position_embeddings")?
            .unwrap_or(d.max_position_embeddings),
        rms_norm_eps: config.number("rms_norm_eps", d.rms_norm_eps)?,
        rope_theta,
        rope_scaling,
        tie_word_embeddings: config.flag("tie_word_embeddings", false)?,
        initializer_range: config.number("initializer_range", 0.02)?,
        sliding_window: None,
        max_window_layers: 0,
        experts: None,
    })
}

/// Rotary base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
fn rope(config: &Map<String, Value>, default: f64) -> Result<(f64, Option<Llama3RopeScaling>)> {
    let number = |from: &Map<String, Value>, key: &str| match from.get(key).filter(|v| !v.is_null()) {
        Some(v) => {
            v.as_f64().map(Some).ok_or_else(|| Error::data(format!("{key} is {v}; it must be a number")))
        }
        None => Ok(None),
    };
    let (key, parameters) = match (config.get("rope_parameters"), config.get("rope_scaling")) {
        (Some(v), _) if !v.is_null() => ("rope_parameters", v),
        (_, Some(v)) if !v.is_null() => ("rope_scaling", v),
        _ => return Ok((number(config, "rope_theta")?.unwrap_or(default), None)),
    };
    let Some(parameters) = parameters.as_object() else {
        return Err(Error::data(format!("{key} is {parameters}; it must be an object")));
    };
    let theta = match number(parameters, "rope_theta")? {
        Some(theta) => theta,
        None => number(config, "rope_theta")?.unwrap_or(default),
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
        let neutral = name == "partial_rotary_factor" && Only::Number(1.0).is(value);
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

/// The `config.json` of a model, in the layout that transformers reads from 4.43 on.
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
    let family = families::of(s.family);
    let Value::Object(mut config) = json!({
        "architectures": [family.architecture(s.head)],
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden_size,
        "initializer_range": s.initializer_range,
        "intermediate_size": s.intermediate_size,
        "max_position_embeddings": s.max_position_embeddings,
        "model_type": family.model_type,
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
    }) else {
        unreachable!("the literal above is an object")
    };
    (family.write)(s, &mut config);
    if s.head == Head::Score {
        config.insert("id2label".into(), json!({"0": "LABEL_0"}));
        config.insert("label2id".into(), json!({"LABEL_0": 0}));
    }
    Value::Object(config)
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
    /// What `generation_config.json` of a model's folder says, else its `config.json`.
    pub fn of_folder(dir: &Path) -> Result<SpecialIds> {
        let mut ids = SpecialIds::default();
        for name in ["generation_config.json", "config.json"] {
            let path = dir.join(name);
            let object = if is_file(&path)? { read_object(&path)? } else { Map::new() };
            for (id, key) in [
                (&mut ids.bos, "bos_token_id"),
                (&mut ids.eos, "eos_token_id"),
                (&mut ids.pad, "pad_token_id"),
            ] {
                if id.is_null() {
                    *id = object.get(key).cloned().unwrap_or_default();
                }
            }
        }
        Ok(ids)
    }

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
        let presets = Shape::PRESETS.map(|name| Shape::preset(name).unwrap());
        for shape in presets.iter().flat_map(|s| [s.clone(), s.scored()]) {
            let config = write_shape(&shape, Kind::BFloat16, &SpecialIds::default());
            let (family, back, unknown) = shape_of(config.as_object().unwrap()).unwrap();
            assert_eq!((family.model_type, back), (families::of(shape.family).model_type, shape));
            assert!(unknown.is_empty(), "{unknown:?}");
        }
    }

    #[test]
    fn what_changes_the_mathematics_is_refused() {
        let cases = [
            ("architectures", json!(["GemmaForCausalLM"]), "known are: LlamaForCausalLM, MistralForCausalLM"),
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
    fn a_scalar_head_has_one_label() {
        let shape = Shape::preset("llama-3.2-1b").unwrap();
        let config = write_shape(&shape.scored(), Kind::Float, &SpecialIds::default());
        assert_eq!(config["architectures"], json!(["LlamaForSequenceClassification"]));
        let mut config = config.as_object().unwrap().clone();
        // Nothing is tied to a scalar head, whatever is said.
        config.insert("tie_word_embeddings".into(), json!(true));
        assert_eq!(shape_of(&config).unwrap().1, shape.scored());
        assert!(shape.scored().predicts().unwrap_err().message.contains("scalar head"));
        for (key, value, labels) in [
            ("id2label", json!({"0": "a", "1": "b"}), "is 2"),
            ("id2label", Value::Null, "is 2"),
            ("num_labels", json!(3), "is 3"),
        ] {
            let mut other = config.clone();
            other.insert(key.into(), value);
            let e = shape_of(&other).unwrap_err();
            assert!(e.exit_code() == 3 && e.message.contains(labels), "{e}");
        }
    }

    /// Keys of published models.
    #[test]
    fn published_configurations_are_the_presets() {
        let qwen = |c, f, layers, heads, vocab, length, theta| {
            json!({
                "architectures": ["QWenLMHeadModel"], "model_type": "qwen",
                "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}, "attn_dropout_prob": 0.0,
                "bf16": false, "emb_dropout_prob": 0.0, "fp16": false, "fp32": false, "hidden_size": c,
                "initializer_range": 0.02, "intermediate_size": f, "kv_channels": 128,
                "layer_norm_epsilon": 1e-6, "max_position_embeddings": 8192, "no_bias": true,
                "num_attention_heads": heads, "num_hidden_layers": layers, "onnx_safe": null,
                "rotary_emb_base": theta, "rotary_pct": 1.0, "scale_attn_weights": true, "seq_length": length,
                "tie_word_embeddings": false, "tokenizer_class": "QWenTokenizer",
                "transformers_version": "4.32.0", "use_cache": true, "use_dynamic_ntk": true,
                "use_flash_attn": "auto", "use_logn_attn": true, "vocab_size": vocab,
            })
        };
        let cases = [
            (
                "llama-3.2-1b",
                json!({
                    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
                    "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu",
                    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
                    "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
                    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
                    "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": {
                        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                        "original_max_position_embeddings": 8192, "rope_type": "llama3"
                    }, "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
                    "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256,
                }),
            ),
            (
                "mistral-7b",
                json!({
                    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
                    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
                    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
                    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
                    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
                    "tie_word_embeddings": false, "torch_dtype": "bfloat16",
                    "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000,
                }),
            ),
            (
                "mixtral-8x7b",
                json!({
                    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
                    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
                    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
                    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
                    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
                    "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
                    "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
                    "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32000,
                }),
            ),
            ("qwen-7b", qwen(4096, 22016, 32, 32, 151936, 8192, 10000)),
            ("qwen-14b", qwen(5120, 27392, 40, 40, 152064, 2048, 10000)),
            ("qwen-72b", qwen(8192, 49152, 80, 64, 152064, 32768, 1000000)),
        ];
        for (name, config) in cases {
            let (_, shape, unknown) = shape_of(config.as_object().unwrap()).unwrap();
            assert_eq!(shape, Shape::preset(name).unwrap(), "{name}");
            assert!(unknown.is_empty(), "{name}: {unknown:?}");
        }
    }

    #[test]
    fn windows_are_read_block_by_block() {
        let qwen2 = |keys: Value| {
            let mut config = llama();
            config.insert("architectures".into(), json!(["Qwen2ForCausalLM"]));
            config.extend(keys.as_object().unwrap().clone());
            shape_of(&config).map(|(_, s, _)| (0..6).map(|i| s.window(i).unwrap_or(0)).collect::<Vec<_>>())
        };
        let (full, sliding) = ("full_attention", "sliding_attention");
        let types = |t: [&str; 6]| json!({"use_sliding_window": true, "sliding_window": 9, "layer_types": t});
        for (keys, windows) in [
            (json!({"sliding_window": 9}), [0; 6]),
            (json!({"sliding_window": 9, "use_sliding_window": false, "max_window_layers": 2}), [0; 6]),
            (json!({"sliding_window": 9, "use_sliding_window": true}), [0; 6]), // 28 blocks without
            (
                json!({"sliding_window": 9, "use_sliding_window": true, "max_window_layers": 4}),
                [0, 0, 0, 0, 9, 9],
            ),
            (json!({"use_sliding_window": true, "max_window_layers": 0}), [4096; 6]),
            (types([full; 6]), [0; 6]),
            (types([full, full, sliding, sliding, sliding, sliding]), [0, 0, 9, 9, 9, 9]),
        ] {
            assert_eq!(qwen2(keys.clone()).unwrap(), windows, "{keys}");
        }
        for (keys, part) in [
            (types([sliding, full, full, full, full, full]), "full_attention before sliding_attention"),
            (types([full, full, full, full, full, "chunked_attention"]), "chunked_attention"),
            (json!({"layer_types": [full]}), "a list of 6"),
            (json!({"layer_types": [sliding, sliding, sliding, sliding, sliding, sliding]}), "no window"),
            (json!({"use_sliding_window": 1}), "true or false"),
        ] {
            let e = qwen2(keys.clone()).unwrap_err();
            assert!(e.exit_code() == 3 && e.message.contains(part), "{keys}: {e}");
        }
        // A missing window is the class's default in Mistral, and null is none.
        let mistral = |keys: Value| {
            let mut config = llama();
            config.insert("architectures".into(), json!(["MistralForCausalLM"]));
            config.extend(keys.as_object().unwrap().clone());
            shape_of(&config).unwrap().1.sliding_window
        };
        assert_eq!(mistral(json!({})), Some(4096));
        assert_eq!(mistral(json!({"sliding_window": null})), None);
    }

    #[test]
    fn what_changes_other_families_mathematics_is_refused() {
        let refused = |name: &str, key: &str, value: Value, part: &str| {
            let mut config = write_shape(&Shape::preset(name).unwrap(), Kind::Float, &SpecialIds::default());
            config[key] = value.clone();
            let e = shape_of(config.as_object().unwrap()).expect_err(&format!("{name} {key}: {value}"));
            assert!(e.exit_code() == 3 && e.message.contains(part), "{name} {key}: {e}");
        };
        refused("mixtral-8x7b", "router_jitter_noise", json!(0.1), "router_jitter_noise");
        refused("mixtral-8x7b", "num_experts_per_tok", json!(9), "more than num_local_experts");
        refused("mixtral-8x7b", "num_local_experts", json!(0), "num_local_experts");
        refused("mistral-7b", "num_local_experts", json!(8), "num_local_experts");
        refused("mistral-7b", "layer_types", json!(["full_attention"]), "layer_types");
        refused("mistral-7b", "sliding_window", json!(0), "sliding_window");
        refused("qwen-7b", "attention_bias", json!(true), "attention_bias");
        refused("qwen-7b", "rope_scaling", json!({"type": "yarn", "factor": 4.0}), "yarn");
    }

    #[test]
    fn what_changes_the_first_qwens_mathematics_is_refused() {
        let config = json!({
            "architectures": ["QWenLMHeadModel"], "hidden_size": 64, "intermediate_size": 128,
            "kv_channels": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "seq_length": 32,
            "vocab_size": 100,
        });
        let (family, shape, _) = shape_of(config.as_object().unwrap()).unwrap();
        assert_eq!((family.model_type, shape.family), ("qwen", Family::Qwen2));
        assert_eq!((shape.intermediate_size, shape.max_position_embeddings), (64, 32));
        for (key, value) in [
            ("rotary_pct", json!(0.5)),
            ("no_bias", json!(false)),
            ("scale_attn_weights", json!(false)),
            ("attn_dropout_prob", json!(0.1)),
            ("rope_theta", json!(5.0)),
            ("intermediate_size", json!(127)),
            ("seq_length", Value::Null),
            ("use_logn_attn", json!("yes")),
            ("quantization_config", json!({"bits": 4})),
        ] {
            let mut other = config.clone();
            other[key] = value.clone();
            let e = shape_of(other.as_object().unwrap()).expect_err(&format!("{key}: {value}"));
            assert!(e.exit_code() == 3 && e.message.contains(key), "{key}: {e}");
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
        let (_, shape, unknown) = shape_of(&config).unwrap();
        assert_eq!(unknown, ["my_note"]);
        assert_eq!((shape.head_dim, shape.num_key_value_heads, shape.max_position_embeddings), (48, 6, 2048));
        assert_eq!((shape.rope_theta, shape.rms_norm_eps), (10000.0, 1e-6));
    }
}
