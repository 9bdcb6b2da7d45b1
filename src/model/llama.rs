//! The trunk of a Llama: embedding, blocks, final norm. Every backward stands beside its forward.
//!
//! Shapes: B rows, T positions, N = B * T tokens, C = hidden size, H query heads, K key-value heads, D head dimension,
//! F = intermediate size, L blocks. Activations are 2-D, `[N, C]`, in the compute dtype.
//!
//! A block (Touvron et al. 2023):
//! ```text
//! x2 = x  + attention(rope(qkv(norm1(x)))) o
//! y  = x2 + swiglu(gate_up(norm2(x2))) down
//! ```

use kernels::ops::{self, Heads};
use tch::{Device, Kind, Tensor};

use crate::config::sections::Recompute;
use crate::config::shape::Shape;
use crate::distributed::sharded::Sharded;
use crate::error::{Error, Result};
use crate::model::layout::Block;

/// Token ids and what positions mean.
pub struct Input {
    /// int64 [B, T]
    pub ids: Tensor,
    /// Rotary positions, int64 `[N]`; none: 0 to T - 1 in every row.
    pub positions: Option<Tensor>,
    /// The first position that each position sees, int64 `[N]` (see [`ops::attention`]); none: 0.
    pub start: Option<Tensor>,
}

impl Input {
    /// Rows without padding.
    pub fn new(ids: Tensor) -> Input {
        Input { ids, positions: None, start: None }
    }

    /// Rows with padding, given by a mask (int64 [B, T], 1 = real): positions count the real tokens, and no token sees
    /// padding before it. Padding after a row's tokens needs nothing: causal attention never looks there.
    pub fn with_mask(ids: Tensor, mask: &Tensor) -> Input {
        let time = ids.size()[1];
        let positions = ((mask.cumsum(1, Kind::Int64) - 1i64) * mask).view([-1]);
        let first = mask.argmax(1, true);
        let at = Tensor::arange(time, (Kind::Int64, ids.device())).unsqueeze(0);
        let start = first.minimum(&at).contiguous().view([-1]);
        Input { ids, positions: Some(positions.contiguous()), start: Some(start) }
    }
}

/// What a block's forward keeps for its backward; the parts that are recomputed are none.
struct Saved {
    /// The block's input [N, C]
    x: Tensor,
    rest: Option<Rest>,
}

pub(super) struct Rest {
    rstd1: Tensor,
    /// After rotation [N, (H + 2K) D]
    pub(super) qkv: Tensor,
    /// The attention's output [N, H D] and its log-sum-exp [B, H, T]
    o: Tensor,
    lse: Tensor,
    /// After the attention's residual [N, C]
    x2: Tensor,
    rstd2: Tensor,
    /// [N, 2F]
    gate_up: Option<Tensor>,
}

/// What a forward of the trunk keeps for the backward.
pub struct Tape {
    context: Context,
    ids: Tensor,
    blocks: Vec<Saved>,
    /// The final norm's input and statistics.
    last: Option<(Tensor, Tensor)>,
    recompute: Recompute,
}

/// What all blocks of a forward share.
pub(super) struct Context {
    pub(super) heads: Heads,
    positions: Tensor,
    start: Option<Tensor>,
    cos: Tensor,
    sin: Tensor,
}

pub struct Llama {
    pub shape: Shape,
    pub params: Sharded,
    /// Rotary tables A [P, D / 2], grown as positions need.
    rope: Option<(Tensor, Tensor)>,
}

impl Llama {
    pub fn new(shape: Shape, params: Sharded) -> Llama {
        Llama { shape, params, rope: None }
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.shape.num_hidden_layers as usize
    }

    /// The group that holds the output projection: the head's own, or the embedding's where they are tied.
    pub fn head_group(&self) -> usize {
        if self.shape.tie_word_embeddings { 0 } else { self.num_blocks() + 1 }
    }

    /// cos and sin for positions below `length`: A [length, D / 2]. Angles are taken in float64, as far from rounding
    /// as can be had; the tables are rounded once.
    pub(crate) fn rope_tables(&mut self, length: i64) -> (Tensor, Tensor) {
        if let Some((cos, sin)) = &self.rope
            && cos.size()[0] >= length
        {
            return (cos.shallow_clone(), sin.shallow_clone());
        }
        let length = (length as u64).next_power_of_two() as i64;
        let (kind, device) = (ops::accumulator(self.params.compute()), self.params.device());
        let inverse = Tensor::from_slice(&inverse_frequencies(&self.shape));
        let angles = Tensor::arange(length, (Kind::Double, Device::Cpu)).outer(&inverse);
        let table = |t: Tensor| t.to_kind(kind).to_device(device);
        let (cos, sin) = (table(angles.cos()), table(angles.sin()));
        self.rope = Some((cos.shallow_clone(), sin.shallow_clone()));
        (cos, sin)
    }

    pub(super) fn context(&mut self, input: &Input) -> Result<Context> {
        let (batch, time) = (input.ids.size()[0], input.ids.size()[1]);
        let device = self.params.device();
        let length = match &input.positions {
            Some(p) => p.max().int64_value(&[]) + 1,
            None => time,
        };
        let (cos, sin) = self.rope_tables(length);
        let positions = match &input.positions {
            Some(p) => p.to_device(device),
            None => Tensor::arange(time, (Kind::Int64, device)).repeat([batch]),
        };
        let s = &self.shape;
        let heads = Heads {
            batch,
            heads: s.num_attention_heads,
            kv_heads: s.num_key_value_heads,
            head_dim: s.head_dim,
        };
        Ok(Context { heads, positions, start: input.start.as_ref().map(|t| t.to_device(device)), cos, sin })
    }

    /// The block's weights as views of the gathered buffer of group `i` (blocks are groups 1 to L).
    pub(crate) fn block_weights(&mut self, group: usize) -> Result<Block> {
        let flat = self.params.full(group)?;
        Ok(Block::of(&flat, self.params.layout(group), &self.shape))
    }

    /// The embedding's rows for ids (int64, any shape): T [numel, C].
    pub(crate) fn embed(&mut self, ids: &Tensor) -> Result<Tensor> {
        let flat = self.params.full(0)?;
        Ok(self.params.layout(0).specs[0].view(&flat).index_select(0, &ids.view([-1])))
    }

    /// The trunk without a backward: hidden states after the final norm, T [N, C].
    pub fn hidden(&mut self, input: &Input) -> Result<Tensor> {
        Ok(self.run(input, None)?.0)
    }

    /// The trunk for training: hidden states after the final norm, T [N, C], and the tape for [`Llama::backward`].
    /// The weights of the last block stay gathered for the backward.
    pub fn forward(&mut self, input: &Input, recompute: Recompute) -> Result<(Tensor, Tape)> {
        let (hidden, tape) = self.run(input, Some(recompute))?;
        Ok((hidden, tape.ok_or_else(|| Error::failed("a forward for training keeps a tape"))?))
    }

    fn run(&mut self, input: &Input, recompute: Option<Recompute>) -> Result<(Tensor, Option<Tape>)> {
        let context = self.context(input)?;
        let ids = input.ids.to_device(self.params.device()).contiguous().view([-1]);
        let layers = self.num_blocks();
        let keep_embedding = self.shape.tie_word_embeddings && layers <= 1;
        let mut x = self.embed(&ids)?;
        self.params.prefetch(1)?;
        if !keep_embedding {
            self.params.release(0);
        }
        let mut blocks = Vec::new();
        let mut last = None;
        let mut hidden = None;
        for i in 1..=layers {
            let w = self.block_weights(i)?;
            if i < layers {
                self.params.prefetch(i + 1)?;
            } else {
                self.params.prefetch(self.head_group())?;
            }
            let (y, rest) = block_forward(&w, &x, &context, self.shape.rms_norm_eps)?;
            if let Some(r) = recompute {
                blocks.push(Saved { x: x.shallow_clone(), rest: keep(rest, r) });
            }
            x = y;
            if let Some(norm) = &w.final_norm {
                let (h, rstd) = ops::rms_norm(&x, norm, self.shape.rms_norm_eps)?;
                hidden = Some(h);
                last = Some((x.shallow_clone(), rstd));
            }
            drop(w);
            if recompute.is_none() || i < layers {
                self.params.release(i);
            }
        }
        let hidden = hidden.ok_or_else(|| Error::failed("a model needs at least one block"))?;
        let tape = recompute.map(|recompute| Tape { context, ids, blocks, last, recompute });
        Ok((hidden, tape))
    }

    /// Given the gradient of the hidden states (T [N, C]), adds to the gradients of all trunk groups. `last` is true in
    /// the last micro-batch of a step. Tied embeddings: the head's part must already be in the embedding's gradient.
    pub fn backward(&mut self, dhidden: Tensor, mut tape: Tape, last: bool) -> Result<()> {
        let layers = self.num_blocks();
        let mut dx = dhidden;
        for i in (1..=layers).rev() {
            let w = self.block_weights(i)?;
            if i > 1 {
                self.params.prefetch(i - 1)?;
            }
            let (flat, fresh) = self.params.grad(i);
            let layout = self.params.layout(i);
            if fresh {
                let _ = flat.narrow(0, layout.num_decayed, layout.numel - layout.num_decayed).zero_();
            }
            let g = Block::of(&flat, layout, &self.shape);
            if let (Some(norm), Some(dnorm)) = (&w.final_norm, &g.final_norm) {
                let (x, rstd) = tape.last.take().ok_or_else(|| Error::failed("a tape is used once"))?;
                dx = ops::rms_backward(&dx, &x, norm, &rstd, None, dnorm)?;
            }
            let saved = tape.blocks.pop().ok_or_else(|| Error::failed("a tape is used once"))?;
            dx = block_backward(
                &w,
                &g,
                fresh,
                dx,
                saved,
                &tape.context,
                self.shape.rms_norm_eps,
                tape.recompute,
            )?;
            drop(w);
            self.params.release(i);
            self.params.reduce(i, last)?;
        }
        let (flat, fresh) = self.params.grad(0);
        if fresh {
            let _ = flat.shallow_clone().zero_();
        }
        ops::embedding_backward(&dx, &tape.ids, &self.params.layout(0).specs[0].view(&flat))?;
        self.params.reduce(0, last)
    }
}

/// Inverse frequencies of the rotary positions, float64 [D / 2]; with llama3 scaling, wavelengths longer than the
/// original context are stretched by `factor`, with a smooth passage (transformers `modeling_rope_utils.py`).
pub fn inverse_frequencies(s: &Shape) -> Vec<f64> {
    let d = s.head_dim as f64;
    let plain = (0..s.head_dim / 2).map(|i| s.rope_theta.powf(-2.0 * i as f64 / d));
    let Some(r) = &s.rope_scaling else {
        return plain.collect();
    };
    let original = r.original_max_position_embeddings as f64;
    plain
        .map(|f| {
            let wavelength = std::f64::consts::TAU / f;
            if wavelength < original / r.high_freq_factor {
                f
            } else if wavelength > original / r.low_freq_factor {
                f / r.factor
            } else {
                let smooth =
                    (original / wavelength - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor);
                (1.0 - smooth) * f / r.factor + smooth * f
            }
        })
        .collect()
}

/// Drops what is to be recomputed.
fn keep(mut rest: Rest, recompute: Recompute) -> Option<Rest> {
    match recompute {
        Recompute::None => Some(rest),
        Recompute::Selective => {
            rest.gate_up = None;
            Some(rest)
        }
        Recompute::Full => None,
    }
}

/// x w^T for x [N, I], w [O, I].
pub(super) fn linear(x: &Tensor, w: &Tensor) -> Tensor {
    x.mm(&w.tr())
}

/// All of a block's forward but its last step: what its backward needs.
fn block_rest(w: &Block, x: &Tensor, c: &Context, eps: f64) -> Result<Rest> {
    let (h1, rstd1) = ops::rms_norm(x, &w.norm1, eps)?;
    let qkv = linear(&h1, &w.qkv);
    drop(h1);
    rotate(&qkv, c, false)?;
    let (o, lse) = ops::attention(&qkv, c.start.as_ref(), c.heads)?;
    let x2 = x.addmm(&o, &w.o.tr());
    let (h2, rstd2) = ops::rms_norm(&x2, &w.norm2, eps)?;
    let gate_up = linear(&h2, &w.gate_up);
    Ok(Rest { rstd1, qkv, o, lse, x2, rstd2, gate_up: Some(gate_up) })
}

/// A block's output [N, C], and what its backward needs.
pub(super) fn block_forward(w: &Block, x: &Tensor, c: &Context, eps: f64) -> Result<(Tensor, Rest)> {
    let rest = block_rest(w, x, c, eps)?;
    let gate_up = rest.gate_up.as_ref().ok_or_else(|| Error::failed("gate_up is made above"))?;
    let y = rest.x2.addmm(&ops::swiglu(gate_up)?, &w.down.tr());
    Ok((y, rest))
}

fn rotate(qkv: &Tensor, c: &Context, inverse: bool) -> Result<()> {
    let heads = c.heads.heads + c.heads.kv_heads;
    Ok(ops::rope(qkv, &c.positions, &c.cos, &c.sin, heads, c.heads.head_dim, inverse)?)
}

/// Returns the gradient of the block's input; adds to `g` (or sets its matrices, where `fresh`).
#[allow(clippy::too_many_arguments)]
fn block_backward(
    w: &Block,
    g: &Block,
    fresh: bool,
    dy: Tensor,
    saved: Saved,
    c: &Context,
    eps: f64,
    recompute: Recompute,
) -> Result<Tensor> {
    let x = saved.x;
    let rest = match saved.rest {
        Some(rest) => rest,
        None => block_rest(w, &x, c, eps)?,
    };
    // The norms' outputs are made again from their statistics rather than kept.
    let h2 = ops::rms_apply(&rest.x2, &w.norm2, &rest.rstd2)?;
    let gate_up = match rest.gate_up {
        Some(t) => t,
        None => {
            debug_assert_eq!(recompute, Recompute::Selective);
            linear(&h2, &w.gate_up)
        }
    };
    let da = dy.mm(&w.down);
    ops::swiglu_backward(&gate_up, &da)?;
    let (dgate_up, a) = (gate_up, da);
    ops::grad_weight(&g.down, &dy, &a, fresh)?;
    drop(a);
    ops::grad_weight(&g.gate_up, &dgate_up, &h2, fresh)?;
    drop(h2);
    let dh2 = dgate_up.mm(&w.gate_up);
    drop(dgate_up);
    let dx2 = ops::rms_backward(&dh2, &rest.x2, &w.norm2, &rest.rstd2, Some(&dy), &g.norm2)?;
    drop((dh2, dy));

    ops::grad_weight(&g.o, &dx2, &rest.o, fresh)?;
    let dout = dx2.mm(&w.o);
    let dqkv = ops::attention_backward(&dout, &rest.qkv, &rest.o, &rest.lse, c.start.as_ref(), c.heads)?;
    drop(dout);
    rotate(&dqkv, c, true)?;
    let h1 = ops::rms_apply(&x, &w.norm1, &rest.rstd1)?;
    ops::grad_weight(&g.qkv, &dqkv, &h1, fresh)?;
    let dh1 = dqkv.mm(&w.qkv);
    Ok(ops::rms_backward(&dh1, &x, &w.norm1, &rest.rstd1, Some(&dx2), &g.norm1)?)
}
