//! The groups of a Llama's parameters, under Hugging Face's names.
//!
//! Group 0 is the embedding, 1 to L are the blocks (the last one carries the final norm), L + 1 is the LM head where
//! it is not tied to the embedding. q, k, v lie one after the other, and gate and up, so that each is one product.

use tch::Tensor;

use crate::config::shape::Shape;
use crate::distributed::sharded::Layout;
use crate::model::linear::{Linear, LinearGrad};

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const FINAL_NORM: &str = "model.norm.weight";
pub const LM_HEAD: &str = "lm_head.weight";

/// The layouts of all groups, in the order of the forward.
pub fn layouts(s: &Shape) -> Vec<Layout> {
    let mut groups =
        vec![Layout::new("embedding", vec![(EMBEDDING.into(), vec![s.vocab_size, s.hidden_size])])];
    groups.extend((0..s.num_hidden_layers).map(|i| block(s, i)));
    if !s.tie_word_embeddings {
        groups.push(Layout::new("head", vec![(LM_HEAD.into(), vec![s.vocab_size, s.hidden_size])]));
    }
    groups
}

fn block(s: &Shape, i: i64) -> Layout {
    let (c, f, d) = (s.hidden_size, s.intermediate_size, s.head_dim);
    let (q, kv) = (s.num_attention_heads * d, s.num_key_value_heads * d);
    let name = |part: &str| format!("model.layers.{i}.{part}.weight");
    let mut tensors = vec![
        (name("self_attn.q_proj"), vec![q, c]),
        (name("self_attn.k_proj"), vec![kv, c]),
        (name("self_attn.v_proj"), vec![kv, c]),
        (name("self_attn.o_proj"), vec![c, q]),
        (name("mlp.gate_proj"), vec![f, c]),
        (name("mlp.up_proj"), vec![f, c]),
        (name("mlp.down_proj"), vec![c, f]),
        (name("input_layernorm"), vec![c]),
        (name("post_attention_layernorm"), vec![c]),
    ];
    if i + 1 == s.num_hidden_layers {
        tensors.push((FINAL_NORM.into(), vec![c]));
    }
    Layout::new(format!("block {i}"), tensors)
}

/// A block's parts as views of a flat buffer: of its weights ([`Linear`]s) or of their gradients ([`LinearGrad`]s).
pub struct Block<L> {
    /// [(H + 2K) * D, C]
    pub qkv: L,
    /// [C, H * D]
    pub o: L,
    /// [2F, C]
    pub gate_up: L,
    /// [C, F]
    pub down: L,
    /// `[C]`
    pub norm1: Tensor,
    /// `[C]`
    pub norm2: Tensor,
    /// `[C]`, in the last block
    pub final_norm: Option<Tensor>,
}

impl Block<Linear> {
    /// The weights of a block, T.
    pub fn weights(flat: &Tensor, layout: &Layout, s: &Shape) -> Self {
        Self::of(flat, layout, s, Linear::new)
    }
}

impl Block<LinearGrad> {
    /// Where the gradients of a block's weights go, A.
    pub fn gradients(flat: &Tensor, layout: &Layout, s: &Shape) -> Self {
        Self::of(flat, layout, s, |weight, bias| LinearGrad { weight: Some(weight), bias })
    }
}

impl<L> Block<L> {
    fn of(flat: &Tensor, layout: &Layout, s: &Shape, linear: impl Fn(Tensor, Option<Tensor>) -> L) -> Self {
        let t = &layout.specs;
        let fused = |first: usize, rows: i64| {
            flat.narrow(0, t[first].offset, rows * s.hidden_size).view([rows, s.hidden_size])
        };
        Block {
            qkv: linear(fused(0, (s.num_attention_heads + 2 * s.num_key_value_heads) * s.head_dim), None),
            o: linear(t[3].view(flat), None),
            gate_up: linear(fused(4, 2 * s.intermediate_size), None),
            down: linear(t[6].view(flat), None),
            norm1: t[7].view(flat),
            norm2: t[8].view(flat),
            final_norm: t.get(9).map(|n| n.view(flat)),
        }
    }
}
