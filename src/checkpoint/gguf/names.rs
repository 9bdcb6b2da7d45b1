//! What GGUF files call a model's tensors (`gguf-py/gguf/constants.py` of llama.cpp).

use crate::checkpoint::families;
use crate::config::shape::{Norms, Shape};
use crate::model::layout::{EMBEDDING, FINAL_NORM, LM_HEAD};

/// The factors by which a Llama 3's rotary frequencies are divided.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";
/// The factors of Phi-3's longer contexts, and of others.
pub(super) const LONGROPE: [&str; 2] = ["rope_factors_long.weight", "rope_factors_short.weight"];
pub(super) const OUTPUT: &str = "output.weight";
pub(super) const TOKEN_EMBEDDING: &str = "token_embd.weight";

/// Where a tensor of the model lies.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GgufSlice {
    pub tensor: String,
    /// The row there that it begins with.
    pub row: i64,
    /// Which of the tensors that are stacked there, if there are several.
    pub expert: Option<i64>,
    /// Whether its rows are rotated pairs, side by side as in Meta's files.
    pub rotary: bool,
    /// Whether its numbers lie there plus 1, as norms multiply by them.
    pub plus_one: bool,
}

/// Whether a tensor of a file is the weight of a norm.
pub(super) fn is_norm(tensor: &str) -> bool {
    tensor.ends_with("norm.weight")
}

/// The place of a tensor of the model; none where the format has no place for it. `one_by_one`: experts have tensors of
/// their own, as in files from before April 2024.
pub(super) fn place(name: &str, shape: &Shape, one_by_one: bool) -> Option<GgufSlice> {
    let family = families::of(shape.family);
    // llama.cpp's converter renames what a family's own files have, joined tensors included.
    let (stored, row) = (family.place)(name, shape);
    let place = |tensor: String, expert: Option<i64>| {
        let rotary =
            family.gguf.rotated_pairs && (tensor.contains(".attn_q.") || tensor.contains(".attn_k."));
        let plus_one = shape.features.norm_offset && is_norm(&tensor);
        Some(GgufSlice { tensor, row, expert, rotary, plus_one })
    };
    match stored.as_str() {
        EMBEDDING => return place(TOKEN_EMBEDDING.into(), None),
        FINAL_NORM => return place("output_norm.weight".into(), None),
        LM_HEAD => return place(OUTPUT.into(), None),
        _ => {}
    }
    let (block, part) = stored.strip_prefix("model.layers.")?.split_once('.')?;
    let here = match part {
        "self_attn.q_proj.weight" => "attn_q.weight",
        "self_attn.k_proj.weight" => "attn_k.weight",
        "self_attn.v_proj.weight" => "attn_v.weight",
        "self_attn.qkv_proj.weight" => "attn_qkv.weight",
        "self_attn.o_proj.weight" => "attn_output.weight",
        "self_attn.q_proj.bias" => "attn_q.bias",
        "self_attn.k_proj.bias" => "attn_k.bias",
        "self_attn.v_proj.bias" => "attn_v.bias",
        "self_attn.q_norm.weight" => "attn_q_norm.weight",
        "self_attn.k_norm.weight" => "attn_k_norm.weight",
        "mlp.gate_proj.weight" => "ffn_gate.weight",
        "mlp.up_proj.weight" | "mlp.gate_up_proj.weight" => "ffn_up.weight",
        "mlp.down_proj.weight" => "ffn_down.weight",
        "input_layernorm.weight" => "attn_norm.weight",
        // Llama calls so the norm before the MLP.
        "post_attention_layernorm.weight" if shape.features.norms == Norms::Before => "ffn_norm.weight",
        "post_attention_layernorm.weight" => "post_attention_norm.weight",
        "pre_feedforward_layernorm.weight" => "ffn_norm.weight",
        "post_feedforward_layernorm.weight" => "post_ffw_norm.weight",
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
