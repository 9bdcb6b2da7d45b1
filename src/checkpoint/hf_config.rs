//! Hugging Face's `config.json`: what it says about the mathematics is taken or refused, never passed over.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;

use super::families::{self, Config, Description, refused};
use super::keys::{harmless, neutral, unread};
use super::rope;
use crate::config::shape::{Activation, Family, Features, Head, Shape};
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

/// Reads a JSON file that must hold an object.
pub fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).map_err(|e| read_error(path, &e))?;
    serde_json::from_str(&text)
        .map_err(|e| unusable(path, Error::data(format!("{}: not a JSON object: {e}", path.display()))))
}

/// What a `config.json` describes.
#[derive(Debug)]
pub struct DescribedModel {
    pub family: &'static Description,
    pub shape: Shape,
    /// What is to be told of keys that do not count.
    pub warnings: Vec<String>,
}

/// Reads a `config.json`.
///
/// # Errors
/// Of kind Data: an architecture that is not known; a key that changes the mathematics in a way that is not built.
pub fn read_shape(path: &Path) -> Result<DescribedModel> {
    let config = read_object(path)?;
    shape_of(&config).context(path.display())
}

fn shape_of(config: &Map<String, Value>) -> Result<DescribedModel> {
    let (family, head) = families::named(config)?;
    let mut warnings: Vec<String> = check_model_type(config, family)?.into_iter().collect();
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
    check_layer_types(config, &shape)?;
    warnings.extend(unread(config, family, unknown)?);
    if family.keys.iter().any(|keys| keys.contains(&"rope_parameters")) {
        let rope = rope::read(config, shape.rope_theta)?;
        if rope.by_type && shape.features.rope_local_theta.is_none() {
            let parameters = config.get("rope_parameters").unwrap_or(&Value::Null);
            return Err(refused("rope_parameters", parameters, "one set for all blocks"));
        }
        warnings.extend(rope.warnings);
    }
    Ok(DescribedModel { family, shape, warnings })
}

/// Compares `model_type` with the family that `architectures` names: transformers' Auto classes go by the former.
fn check_model_type(config: &Map<String, Value>, family: &Description) -> Result<Option<String>> {
    let Some(model_type) = config.get("model_type").and_then(Value::as_str) else { return Ok(None) };
    if model_type == family.model_type {
        return Ok(None);
    }
    match families::FAMILIES.iter().find(|f| f.model_type == model_type) {
        Some(other) => Err(Error::data(format!(
            "architectures names a {}, and model_type \"{model_type}\" a {}: correct the wrong one",
            family.architecture, other.architecture
        ))),
        None => Ok(Some(format!(
            "model_type \"{model_type}\" is not known: the model is read as a {}, which architectures names",
            family.architecture
        ))),
    }
}

/// Refuses `layer_types` that say something else than the window that the other keys give.
fn check_layer_types(config: &Map<String, Value>, shape: &Shape) -> Result<()> {
    let Some(types) = config.get("layer_types").filter(|v| !v.is_null()) else { return Ok(()) };
    let of = |layer| if shape.window(layer).is_some() { "sliding_attention" } else { "full_attention" };
    let computed: Vec<&str> = (0..shape.num_hidden_layers).map(of).collect();
    match *types == json!(computed) {
        true => Ok(()),
        false => Err(refused("layer_types", types, &format!("{} by the other keys", json!(computed)))),
    }
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
    // Two names of one function.
    if let Some(act) = config.get("hidden_act").filter(|_| config.get("hidden_activation").is_none())
        && act != "silu"
        && act != "swish"
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
                "hidden_size ({hidden_size}) is not divisible by num_attention_heads ({heads})"
            )));
        }
    };
    let default = if config.is_null("num_key_value_heads") { None } else { d.num_key_value_heads };
    let kv_heads = config.some_integer("num_key_value_heads")?.or(default).unwrap_or(heads);
    let rope = rope::read(config.0, d.rope_theta)?;
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
        rope_theta: rope.theta,
        rope_scaling: rope.scaling,
        tie_word_embeddings: config.flag("tie_word_embeddings", false)?,
        initializer_range: config.number("initializer_range", 0.02)?,
        sliding_window: None,
        max_window_layers: 0,
        experts: None,
        features: Features { rope_linear_factor: rope.linear, ..d.family.features() },
    })
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
    let linear = s.features.rope_linear_factor.map(|factor| json!({"factor": factor, "rope_type": "linear"}));
    let act = match s.features.activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    };
    let family = families::of(s.family);
    let Value::Object(mut config) = json!({
        "architectures": [family.architecture(s.head)],
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "head_dim": s.head_dim,
        "hidden_act": act,
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
        "rope_scaling": rope_scaling.or(linear),
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
    use crate::checkpoint::families::Only;

    fn shape_of(config: &Map<String, Value>) -> Result<(&'static Description, Shape, Vec<String>)> {
        super::shape_of(config).map(|d| (d.family, d.shape, d.warnings))
    }

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
            ("rope_scaling", json!({"type": "dynamic", "factor": 2.0}), "dynamic"),
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
            ("hidden_size", json!(290), "is not divisible"),
            ("hidden_size", json!("288"), "integer"),
            ("vocab_size", Value::Null, "vocab_size is missing"),
            ("num_key_value_heads", json!(4), "multiple"),
            ("tie_word_embeddings", json!("no"), "true or false"),
            ("model_type", json!("qwen2"), "model_type \"qwen2\" a Qwen2ForCausalLM"),
            ("layer_types", json!(["sliding_attention"]), "layer_types is [\"sliding_attention\"]"),
            ("text_config", json!({"tie_word_embeddings": true}), "text_config"),
            ("logit_scale", json!(0.0625), "logit_scale"),
            ("qkv_bias", json!(true), "qkv_bias"),
            ("add_cross_attention", json!(true), "add_cross_attention"),
            ("pruned_heads", json!({"0": [1]}), "pruned_heads"),
            ("rotary_pct", json!(0.25), "rotary_pct"),
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
            config.insert("model_type".into(), json!("qwen2"));
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
            config.insert("model_type".into(), json!("mistral"));
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
    fn other_names_of_a_key_are_told_or_refused() {
        let warned = |key: &str, value: Value| {
            let mut config = llama();
            config.insert(key.into(), value);
            shape_of(&config).unwrap().2
        };
        let shape = Shape::preset("llama-15m").unwrap();
        assert!(warned("n_embd", json!(shape.hidden_size)).is_empty());
        assert!(warned("layer_norm_eps", json!(shape.rms_norm_eps)).is_empty());
        assert!(warned("hidden_activation", json!("silu")).is_empty());
        let other = warned("n_ctx", json!(4096));
        assert!(
            other[0].starts_with("n_ctx is 4096 and is not used: max_position_embeddings counts"),
            "{other:?}"
        );
        assert!(warned("model_type", json!("mine"))[0].contains("\"mine\" is not known"));
        let full = vec!["full_attention"; shape.num_hidden_layers as usize];
        assert!(warned("layer_types", json!(full)).is_empty());
        for (key, value) in [
            ("pruned_heads", json!({})),
            ("add_cross_attention", json!(false)),
            ("hidden_act", json!("swish")),
        ] {
            assert!(warned(key, value).is_empty(), "{key}");
        }
        // Its default would be taken without a word.
        let mut config = llama();
        config.remove("max_position_embeddings");
        config.insert("n_positions".into(), json!(4096));
        let e = shape_of(&config).unwrap_err();
        assert!(e.message.contains("n_positions is 4096, and max_position_embeddings is missing"), "{e}");
        assert!(Only::Off.is(&json!([])) && Only::Off.is(&json!(0)) && !Only::Off.is(&json!(1)));
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
        assert_eq!(unknown, ["1 key not known and not used: my_note"]);
        assert_eq!((shape.head_dim, shape.num_key_value_heads, shape.max_position_embeddings), (48, 6, 2048));
        assert_eq!((shape.rope_theta, shape.rms_norm_eps), (10000.0, 1e-6));
    }
}
