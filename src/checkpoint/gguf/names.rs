//! What GGUF files call a model's tensors (`gguf-py/gguf/constants.py` of llama.cpp).

use crate::config::shape::{Family, Shape};
use crate::model::layout::{EMBEDDING, FINAL_NORM, LM_HEAD};

/// The factors by which a Llama 3's rotary frequencies are divided.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";
pub(super) const OUTPUT: &str = "output.weight";
pub(super) const TOKEN_EMBEDDING: &str = "token_embd.weight";

/// Where a tensor of the model lies.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Place {
    pub tensor: String,
    /// Which of the tensors that are stacked there, if there are several.
    pub expert: Option<i64>,
    /// Whether its rows are rotated pairs, side by side as in Meta's files.
    pub rotary: bool,
}

/// The architecture of a family: Llama's holds all whose blocks are Llama's.
pub(super) fn architecture(family: Family) -> &'static str {
    match family {
        Family::Llama | Family::Mistral | Family::Mixtral => "llama",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
        Family::Gemma2 => "gemma2",
        Family::Gemma3 => "gemma3",
        Family::Olmo2 => "olmo2",
        Family::Phi3 => "phi3",
    }
}

/// The place of a tensor of the model; none where the format has no place for it. `one_by_one`: experts have tensors of
/// their own, as in files from before April 2024.
pub(super) fn place(name: &str, shape: &Shape, one_by_one: bool) -> Option<Place> {
    let place = |tensor: String, expert: Option<i64>| {
        let rotary = architecture(shape.family) == "llama"
            && (tensor.contains(".attn_q.") || tensor.contains(".attn_k."));
        Some(Place { tensor, expert, rotary })
    };
    match name {
        EMBEDDING => return place(TOKEN_EMBEDDING.into(), None),
        FINAL_NORM => return place("output_norm.weight".into(), None),
        LM_HEAD => return place(OUTPUT.into(), None),
        _ => {}
    }
    let (block, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let here = match part {
        "self_attn.q_proj.weight" => "attn_q.weight",
        "self_attn.k_proj.weight" => "attn_k.weight",
        "self_attn.v_proj.weight" => "attn_v.weight",
        "self_attn.o_proj.weight" => "attn_output.weight",
        "self_attn.q_proj.bias" => "attn_q.bias",
        "self_attn.k_proj.bias" => "attn_k.bias",
        "self_attn.v_proj.bias" => "attn_v.bias",
        "self_attn.q_norm.weight" => "attn_q_norm.weight",
        "self_attn.k_norm.weight" => "attn_k_norm.weight",
        "mlp.gate_proj.weight" => "ffn_gate.weight",
        "mlp.up_proj.weight" => "ffn_up.weight",
        "mlp.down_proj.weight" => "ffn_down.weight",
        "input_layernorm.weight" => "attn_norm.weight",
        "post_attention_layernorm.weight" => "ffn_norm.weight",
        "block_sparse_moe.gate.weight" => "ffn_gate_inp.weight",
        _ => {
            let (expert, matrix) = part.strip_prefix("block_sparse_moe.experts.")?.split_once('.')?;
            let matrix = match matrix {
                "w1.weight" => "ffn_gate",
                "w3.weight" => "ffn_up",
                "w2.weight" => "ffn_down",
                _ => return None,
            };
            return match one_by_one {
                true => place(format!("blk.{block}.{matrix}.{expert}.weight"), None),
                false => place(format!("blk.{block}.{matrix}_exps.weight"), Some(expert.parse().ok()?)),
            };
        }
    };
    place(format!("blk.{block}.{here}"), None)
}
