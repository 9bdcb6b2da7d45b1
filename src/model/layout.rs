//! The groups of a model's parameters, under Hugging Face's names, matrices before vectors.
//!
//! Group 0 is the embedding, 1 to L are the blocks (the last one carries the final norm), L + 1 is the LM head where
//! it is not tied to the embedding. q, k, v lie one after the other, and gate and up, so that each is one product. Experts lie in
//! their block's group.

use tch::Tensor;

use crate::config::shape::Shape;
use crate::distributed::sharded::Layout;
use crate::model::linear::{Linear, LinearGrad};
use crate::model::mixture::Mixture;
use crate::model::mlp::{Dense, Mlp};

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
    let name = |part: &str| format!("model.layers.{i}.{part}");
    let mut tensors = vec![
        (name("self_attn.q_proj.weight"), vec![q, c]),
        (name("self_attn.k_proj.weight"), vec![kv, c]),
        (name("self_attn.v_proj.weight"), vec![kv, c]),
        (name("self_attn.o_proj.weight"), vec![c, q]),
    ];
    match &s.experts {
        None => tensors.extend([
            (name("mlp.gate_proj.weight"), vec![f, c]),
            (name("mlp.up_proj.weight"), vec![f, c]),
            (name("mlp.down_proj.weight"), vec![c, f]),
        ]),
        // w1 is the gate, w3 is up, w2 is down.
        Some(e) => {
            let name = |part: &str| name(&format!("block_sparse_moe.{part}.weight"));
            tensors.push((name("gate"), vec![e.num_local_experts, c]));
            for e in 0..e.num_local_experts {
                tensors.push((name(&format!("experts.{e}.w1")), vec![f, c]));
                tensors.push((name(&format!("experts.{e}.w3")), vec![f, c]));
                tensors.push((name(&format!("experts.{e}.w2")), vec![c, f]));
            }
        }
    }
    if s.qkv_bias() {
        tensors.extend([
            (name("self_attn.q_proj.bias"), vec![q]),
            (name("self_attn.k_proj.bias"), vec![kv]),
            (name("self_attn.v_proj.bias"), vec![kv]),
        ]);
    }
    if s.qk_norm() {
        tensors.push((name("self_attn.q_norm.weight"), vec![d]));
        tensors.push((name("self_attn.k_norm.weight"), vec![d]));
    }
    tensors.push((name("input_layernorm.weight"), vec![c]));
    tensors.push((name("post_attention_layernorm.weight"), vec![c]));
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
    pub mlp: Mlp<L>,
    /// Of each head's query and key, `[D]`.
    pub qk_norm: Option<[Tensor; 2]>,
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
    /// Takes the tensors in the order of `block`.
    fn of(flat: &Tensor, layout: &Layout, s: &Shape, linear: impl Fn(Tensor, Option<Tensor>) -> L) -> Self {
        let mut specs = layout.specs.as_slice();
        // The next n tensors, which lie one after the other, as one.
        let mut take = |n: usize| {
            let (parts, rest) = specs.split_at(n);
            specs = rest;
            let mut size = parts[0].shape.clone();
            size[0] = parts.iter().map(|p| p.shape[0]).sum();
            flat.narrow(0, parts[0].offset, size.iter().product()).view(size.as_slice())
        };
        let (qkv, o) = (take(3), take(1));
        let mlp = match &s.experts {
            None => Mlp::Dense(Dense { gate_up: linear(take(2), None), down: linear(take(1), None) }),
            Some(e) => {
                let router = linear(take(1), None);
                let mut expert = |_| Dense { gate_up: linear(take(2), None), down: linear(take(1), None) };
                let experts = (0..e.num_local_experts).map(&mut expert).collect();
                Mlp::Mixture(Mixture { router, experts, per_token: e.num_experts_per_tok })
            }
        };
        let bias = s.qkv_bias().then(|| take(3));
        Block {
            qkv: linear(qkv, bias),
            o: linear(o, None),
            mlp,
            qk_norm: s.qk_norm().then(|| [take(1), take(1)]),
            norm1: take(1),
            norm2: take(1),
            final_norm: (!specs.is_empty()).then(|| specs[0].view(flat)),
        }
    }
}
