//! The keys of `config.json` that no family reads: which of them change the mathematics, which say nothing about it, and which
//! are other names for a key that is read.

use serde_json::{Map, Value};

use super::families::{Description, Only};
use crate::error::{Error, Result};

/// Keys that change any model's mathematics in a way that is not built, unless they have this value (or null).
pub(super) fn neutral(key: &str) -> Option<Only> {
    Some(match key {
        "attention_dropout" | "hidden_dropout" | "resid_pdrop" | "embd_pdrop" | "attn_pdrop"
        | "residual_dropout" | "dropout" => Only::Number(0.0),
        "partial_rotary_factor"
        | "rotary_pct"
        | "rope_pct"
        | "embedding_multiplier"
        | "residual_multiplier"
        | "attention_multiplier"
        | "logits_scaling"
        | "logit_scale"
        | "lm_head_multiplier"
        | "key_multiplier"
        | "embedding_scale"
        | "scale_emb" => Only::Number(1.0),
        // Other parts of a model.
        "text_config" | "vision_config" | "audio_config" | "encoder" | "decoder" => Only::Off,
        // Other weights.
        "quantization_config" | "quantization" | "compression_config" | "pruned_heads" => Only::Off,
        // Another attention.
        "use_qk_norm"
        | "qk_norm"
        | "no_rope_layers"
        | "no_rope_layer_interval"
        | "sliding_window"
        | "attention_chunk_size"
        | "attn_logit_softcapping"
        | "query_pre_attn_scalar"
        | "attn_temperature_tuning"
        | "clip_qkv"
        | "alibi"
        | "use_alibi"
        | "rotary_dim"
        | "kv_lora_rank"
        | "q_lora_rank"
        | "num_kv_shared_layers"
        | "is_encoder_decoder"
        | "add_cross_attention"
        | "cross_attention_hidden_size" => Only::Off,
        // Another block.
        "num_local_experts"
        | "num_experts"
        | "n_routed_experts"
        | "moe_num_experts"
        | "parallel_attn"
        | "use_parallel_residual"
        | "parallel_residual"
        | "scale_depth"
        | "dim_model_base"
        | "use_mup" => Only::Off,
        // Biases.
        "bias" | "use_bias" | "qkv_bias" | "use_qkv_bias" | "add_qkv_bias" | "add_bias_linear" | "o_bias"
        | "lm_head_bias" => Only::Off,
        // Another embedding or head.
        "final_logit_softcapping" | "scale_embeddings" | "normalize_embedding" | "normalize_embeddings" => {
            Only::Off
        }
        _ => return None,
    })
}

/// Keys that say nothing about the mathematics.
pub(super) fn harmless(key: &str) -> bool {
    const KEYS: [&str; 33] = [
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
        "tie_encoder_decoder",
        "torchscript",
        "decoder_start_token_id",
        "sep_token_id",
        "use_bfloat16",
        "tf_legacy_loss",
        "unsloth_version",
        "unsloth_fixed",
        "attn_implementation",
    ];
    // The layers' types are compared with the window that is read.
    key.starts_with('_') || key == "layer_types" || KEYS.contains(&key)
}

/// What other families call a key that is read here.
const OTHER_NAMES: [(&str, &str); 32] = [
    ("n_embd", "hidden_size"),
    ("d_model", "hidden_size"),
    ("dim", "hidden_size"),
    ("n_inner", "intermediate_size"),
    ("ffn_dim", "intermediate_size"),
    ("ffn_hidden_size", "intermediate_size"),
    ("n_layer", "num_hidden_layers"),
    ("n_layers", "num_hidden_layers"),
    ("num_layers", "num_hidden_layers"),
    ("n_head", "num_attention_heads"),
    ("n_heads", "num_attention_heads"),
    ("num_heads", "num_attention_heads"),
    ("n_kv_heads", "num_key_value_heads"),
    ("num_kv_heads", "num_key_value_heads"),
    ("multi_query_group_num", "num_key_value_heads"),
    ("kv_channels", "head_dim"),
    ("attention_head_dim", "head_dim"),
    ("n_ctx", "max_position_embeddings"),
    ("n_positions", "max_position_embeddings"),
    ("seq_length", "max_position_embeddings"),
    ("max_seq_len", "max_position_embeddings"),
    ("max_sequence_length", "max_position_embeddings"),
    ("model_max_length", "max_position_embeddings"),
    ("layer_norm_eps", "rms_norm_eps"),
    ("layer_norm_epsilon", "rms_norm_eps"),
    ("norm_eps", "rms_norm_eps"),
    ("rotary_emb_base", "rope_theta"),
    ("rope_base", "rope_theta"),
    ("hidden_activation", "hidden_act"),
    ("activation_function", "hidden_act"),
    ("tie_embeddings", "tie_word_embeddings"),
    ("padded_vocab_size", "vocab_size"),
];

/// What is to be told of keys that nothing reads (`unknown`). A key under another family's name counts for nothing, as in
/// transformers.
///
/// # Errors
/// Of kind Data: a key that is there only under another name, so that its default would be taken.
pub(super) fn unread(
    config: &Map<String, Value>,
    family: &Description,
    mut unknown: Vec<String>,
) -> Result<Vec<String>> {
    let there = |key: &str| config.get(key).filter(|v| !v.is_null());
    let mut warnings = Vec::new();
    for (other, key) in OTHER_NAMES {
        let Some(at) = unknown.iter().position(|name| name == other) else { continue };
        let (name, value) = (unknown.remove(at), &config[other]);
        let reads = family.keys.iter().any(|keys| keys.contains(&key));
        match there(key) {
            Some(counts) if equal(counts, value) => {}
            Some(counts) => {
                warnings.push(format!("{name} is {value} and is not used: {key} counts, which is {counts}"));
            }
            None if reads => {
                return Err(Error::data(format!(
                    "{name} is {value}, and {key} is missing: a {} has the key under that name; rename it, or remove it to use \
                     the default",
                    family.model_type
                )));
            }
            None => unknown.push(name),
        }
    }
    if !unknown.is_empty() {
        let s = if unknown.len() > 1 { "s" } else { "" };
        warnings.push(format!("{} key{s} not known and not used: {}", unknown.len(), unknown.join(", ")));
    }
    Ok(warnings)
}

/// Whether two values are the same, numbers by their value.
fn equal(a: &Value, b: &Value) -> bool {
    a == b || (a.is_number() && a.as_f64() == b.as_f64())
}
