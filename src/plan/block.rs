//! What a block's forward and backward take, in their order: stands for `model/block.rs` and its parts.

use tch::{Device, Kind};

use super::layer::Layer;
use super::memory::Memory;
use super::parts::BatchShape;
use super::walk::{Walk, activations, work};
use crate::config::sections::Recompute;
use crate::config::shape::{Activation, Norms};
use crate::model::mlp::{Dense, Mlp};

/// Matrices of scores that the composed attention has at once, without a cap of scores and with one.
const COMPOSED_FORWARD: i64 = 2;
const COMPOSED_BACKWARD: i64 = 4;
const CAPPED_FORWARD: i64 = 4;
const CAPPED_BACKWARD: i64 = 5;
/// Documents of a packed row that flash attention's memory is planned for.
const DOCUMENTS: i64 = 8;
/// Multiprocessors of an H100, over which flash attention divides its backward.
const PROCESSORS: i64 = 132;

fn blocks_of(n: i64, size: i64) -> i64 {
    (n + size - 1) / size.max(1)
}

/// Bytes of what a block's forward makes for its backward (`RestMemory` there).
#[derive(Clone, Copy)]
pub(super) struct RestMemory {
    /// Statistics of the norms and the attention, queries and keys before their norm, qkv, the attention's output, x2.
    pub attention: i64,
    /// What a mixture keeps besides: where tokens went.
    routing: i64,
    gate_up: i64,
}

impl RestMemory {
    pub fn total(&self) -> i64 {
        self.attention + self.routing + self.gate_up
    }

    /// What stays until the backward.
    pub fn kept(&self, recompute: Recompute, experts: i64) -> i64 {
        match recompute {
            Recompute::None => self.total(),
            Recompute::Selective => self.attention + self.routing,
            Recompute::Full => experts,
        }
    }
}

/// Of one block.
pub(super) struct BlockMemory {
    pub bytes: i64,
    pub rest: RestMemory,
}

impl Memory {
    /// What an attention takes besides its input and output. The composed form, on CUDA where flash attention does not fit and
    /// with a softcap everywhere, has matrices of scores; flash attention's backward has its own gradients and partial sums.
    pub(super) fn attention_work(&self, batch: &BatchShape, backward: bool) -> i64 {
        let (n, s) = (batch.tokens(), &self.local);
        if self.context > 1 {
            return self.shared_attention(batch, backward);
        }
        let scores = batch.rows * s.num_attention_heads * batch.length * batch.length;
        let heads = s.num_attention_heads * s.head_dim * n;
        // Queries, and keys and values for each of them, in A; scores, their cap's and mask's copies, probabilities.
        let composed = |forward, both| {
            let (matrices, besides) = if backward { (both, 6 * heads) } else { (forward, 3 * heads) };
            self.sizes.a * (matrices * scores + besides)
        };
        if s.features.attention_softcap.is_some() {
            return composed(CAPPED_FORWARD, CAPPED_BACKWARD);
        }
        if self.sizes.device == Device::Cpu {
            return 0;
        }
        if self.sizes.compute != Kind::BFloat16 || s.head_dim % 8 != 0 || s.head_dim > 256 {
            return composed(COMPOSED_FORWARD, COMPOSED_BACKWARD);
        }
        if !backward {
            return 0;
        }
        // Gradients of queries, keys and values before they lie side by side; of keys and values for each query head, where heads
        // share them; and the queries' sums, in float32, as many as it takes to keep the GPU busy.
        let separate = heads + 2 * s.num_key_value_heads * s.head_dim * n;
        let shared = if s.num_key_value_heads == s.num_attention_heads { 0 } else { 2 * heads };
        let splits = blocks_of(PROCESSORS, batch.rows * s.num_attention_heads);
        // Each segment's rows are rounded up; how many documents lie in a packed row is not known here.
        let segments = batch.rows * if batch.packed { DOCUMENTS } else { 1 };
        let padded = s.num_attention_heads * blocks_of(s.head_dim, 32) * 32 * (n + 128 * segments);
        self.sizes.values(separate + shared, 1) + 4 * splits * padded
    }

    /// [`Memory::attention_work`] where ranks share sequences: keys and values of whole rows, in both dtypes and with their
    /// gradients, and the scores of some queries.
    fn shared_attention(&self, batch: &BatchShape, backward: bool) -> i64 {
        let (n, s) = (batch.tokens(), &self.local);
        let kv = 2 * s.num_key_value_heads * s.head_dim * n * self.context;
        let gathered = 2 * self.sizes.values(kv, 1);
        let scores = batch.rows * s.num_attention_heads * batch.length * batch.length * self.context;
        let most = if self.sizes.device == Device::Cpu { 16 << 20 } else { 256 << 20 };
        let (matrices, wide) = if backward { (4, 3) } else { (3, 1) };
        let queries = self.sizes.values(s.num_attention_heads * s.head_dim * n, 1);
        gathered + self.sizes.a * (matrices * scores.min(most) + wide * kv) + queries
    }

    /// `block_rest`: leaves what it made as work.
    pub(super) fn block_rest(&self, walk: &mut Walk, batch: &BatchShape, i: usize) -> RestMemory {
        let (s, n, block) = (&self.local, batch.tokens(), &self.blocks[i - 1]);
        let (stream, full) = (self.stream(n), self.sizes.values(n, s.hidden_size));
        let own = self.sizes.own_rows(n);
        let (q, k) = (s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim);
        let mut attention = 0;
        let mut keep = |walk: &mut Walk, bytes: i64| {
            walk.take(work, bytes);
            attention += bytes;
        };
        keep(walk, self.inner(n, i));
        // A norm's statistics, and what it gives: only where there is one before.
        let before = s.features.norms != Norms::After;
        let rstd = if before { own * self.sizes.a } else { 0 };
        let h = if before || self.sizes.sequence { full } else { 0 };
        keep(walk, rstd);
        walk.take(work, h); // h1
        walk.pass(work, self.gathered(n));
        keep(walk, self.sizes.values(n, block.attention.qkv.outputs));
        walk.pass(work, block.attention.qkv.forward(&self.sizes, n));
        walk.give(work, h);
        for (width, size) in [q, k].into_iter().zip(s.qk_norm_sizes().into_iter().flatten()) {
            keep(walk, self.sizes.values(n, width) + n * width / size * self.sizes.a);
            walk.pass(work, self.sizes.values(n, width));
        }
        keep(walk, self.sizes.values(n, q) + n * s.num_attention_heads * self.sizes.a);
        walk.pass(work, self.attention_work(batch, false));
        keep(walk, stream); // x2
        walk.pass(work, block.attention.o.forward(&self.sizes, n).max(self.sum(n)));
        if s.features.norms != Norms::Before {
            keep(walk, stream + own * self.sizes.a); // the attention's output
            walk.pass(work, stream);
        }
        keep(walk, rstd);
        walk.take(work, h); // h2
        walk.pass(work, self.gathered(n));
        let (routing, gate_up) = self.begin(walk, n, i);
        walk.give(work, h);
        RestMemory { attention, routing, gate_up }
    }

    /// What a rank has of rows while they are gathered.
    fn gathered(&self, n: i64) -> i64 {
        if self.sizes.sequence { self.stream(n) } else { 0 }
    }

    /// What a block's adapters keep.
    fn inner(&self, n: i64, i: usize) -> i64 {
        let block = &self.blocks[i - 1];
        let of = |net: &Dense<Layer>, n| net.gate_up.inner(&self.sizes, n) + net.down.inner(&self.sizes, n);
        let mlp = match &block.mlp {
            Mlp::Dense(net) => of(net, n),
            Mlp::Mixture(m) => {
                let pairs = n * m.per_token / m.experts.len().max(1) as i64;
                m.experts.iter().map(|net| of(net, pairs)).sum()
            }
        };
        block.attention.qkv.inner(&self.sizes, n) + block.attention.o.inner(&self.sizes, n) + mlp
    }

    /// `Mlp::begin`: routing and products of gate and up, which stay as work.
    pub(super) fn begin(&self, walk: &mut Walk, n: i64, i: usize) -> (i64, i64) {
        let f = self.local.intermediate_size;
        match &self.blocks[i - 1].mlp {
            Mlp::Dense(net) => {
                let gate_up = self.sizes.values(n, 2 * f);
                walk.take(work, gate_up);
                walk.pass(work, net.gate_up.forward(&self.sizes, n));
                (0, gate_up)
            }
            Mlp::Mixture(mixture) => {
                let pairs = n * mixture.per_token;
                let routing = self.sizes.values(n, mixture.experts.len() as i64) + 3 * 8 * pairs;
                let gate_up = self.sizes.values(pairs, 2 * f);
                walk.take(work, routing + self.sizes.values(pairs, self.shape.hidden_size));
                walk.take(work, gate_up);
                walk.pass(work, largest(&mixture.experts, |e| e.gate_up.forward(&self.sizes, pairs)));
                walk.give(work, self.sizes.values(pairs, self.shape.hidden_size));
                (routing, gate_up)
            }
        }
    }

    /// `Mlp::finish`: the block's output stays as work.
    pub(super) fn finish(&self, walk: &mut Walk, n: i64, i: usize) {
        let (c, f) = (self.local.hidden_size, self.local.intermediate_size);
        match &self.blocks[i - 1].mlp {
            Mlp::Dense(net) => {
                walk.take(work, self.sizes.values(n, f));
                walk.pass(work, self.composed_gate(n, false));
                walk.take(work, self.stream(n));
                walk.pass(work, net.down.forward(&self.sizes, n).max(self.sum(n)));
                walk.give(work, self.sizes.values(n, f));
            }
            Mlp::Mixture(mixture) => {
                // One expert after the other, of which the outputs stay; then those together, and in the tokens' order.
                let pairs = n * mixture.per_token;
                let outputs = self.sizes.values(pairs, c);
                walk.pass(work, outputs + self.sizes.values(pairs, f));
                walk.take(work, 2 * outputs);
                self.add_pairs(walk, pairs, true);
                walk.pass(work, self.sum(n));
                walk.take(work, self.stream(n));
                walk.give(work, 2 * outputs);
            }
        }
    }

    /// What a gate that is composed takes besides input and output: all of it in A.
    pub(super) fn composed_gate(&self, n: i64, backward: bool) -> i64 {
        if self.shape.features.activation == Activation::Silu {
            return 0;
        }
        let copies = match (self.sizes.a == self.sizes.t, backward) {
            (true, false) => 1,
            (true, true) => 4,
            (false, false) => 4,
            (false, true) => 6,
        };
        copies * n * self.local.intermediate_size * self.sizes.a
    }

    /// What stays of an MLP's output where a norm comes after it, as work.
    pub(super) fn normed_output(&self, walk: &mut Walk, n: i64) -> i64 {
        if self.shape.features.norms == Norms::Before {
            return 0;
        }
        let (stream, rstd) = (self.stream(n), self.sizes.own_rows(n) * self.sizes.a);
        walk.take(work, stream + rstd);
        walk.pass(work, stream);
        stream + rstd
    }

    /// `Routed::add_pairs`, up to the sum: rows in the tokens' order, in A, and with weights.
    pub(super) fn add_pairs(&self, walk: &mut Walk, pairs: i64, weighted: bool) {
        let c = self.shape.hidden_size;
        let wide = pairs * c * self.sizes.a;
        let sorted = self.sizes.values(pairs, c);
        match (self.sizes.a == self.sizes.t, weighted) {
            (true, false) => walk.pass(work, sorted),
            (true, true) => walk.pass(work, sorted + wide),
            (false, false) => walk.pass(work, sorted + wide),
            (false, true) => walk.pass(work, 2 * wide),
        }
    }

    /// `block_backward`: the output's gradient is there before it, the input's after it. What the forward kept goes.
    #[expect(clippy::too_many_lines, reason = "the order in which memory is taken and given back")]
    pub(super) fn block_backward(&self, walk: &mut Walk, batch: &BatchShape, i: usize, kept: BlockMemory) {
        let (s, n, block) = (&self.local, batch.tokens(), &self.blocks[i - 1]);
        let (stream, full) = (self.stream(n), self.sizes.values(n, s.hidden_size));
        let gathered = if self.sizes.sequence { full } else { 0 };
        // From here on all of it is work.
        walk.give(activations, kept.bytes);
        match batch.recompute {
            Recompute::None => walk.take(work, kept.rest.total()),
            Recompute::Selective => walk.take(work, kept.rest.attention + kept.rest.routing),
            Recompute::Full => {
                let _ = self.block_rest(walk, batch, i);
                if s.features.norms != Norms::Before {
                    self.finish(walk, n, i);
                    walk.give(work, stream);
                    self.normed_output(walk, n);
                }
            }
        }
        if s.features.norms != Norms::Before {
            walk.pass(work, stream); // the gradient of the MLP's output, in the place of that
        }
        let h = if s.features.norms == Norms::After && !self.sizes.sequence { 0 } else { full };
        walk.take(work, h); // h2
        walk.pass(work, self.gathered(n));
        walk.take(work, gathered); // all rows of the output's gradient
        match &block.mlp {
            Mlp::Dense(net) => {
                if batch.recompute == Recompute::Selective {
                    walk.take(work, kept.rest.gate_up);
                    walk.pass(work, net.gate_up.forward(&self.sizes, n));
                }
                let a = self.sizes.values(n, s.intermediate_size);
                walk.take(work, a);
                walk.pass(work, net.down.backward_input(&self.sizes, n));
                walk.pass(work, self.composed_gate(n, true));
                walk.pass(work, net.down.backward_weight(&self.sizes, n));
                walk.give(work, a);
                walk.pass(work, net.gate_up.backward_weight(&self.sizes, n));
                walk.pass(work, self.sum(n));
                walk.give(work, h); // h2
                walk.take(work, stream); // its gradient
                walk.pass(work, net.gate_up.backward_input(&self.sizes, n));
                walk.give(work, kept.rest.gate_up);
            }
            Mlp::Mixture(mixture) => {
                let pairs = n * mixture.per_token;
                let (f, pair_rows) = (s.intermediate_size, self.sizes.values(pairs, s.hidden_size));
                let selective = batch.recompute == Recompute::Selective;
                // Inputs and output gradients of the pairs; the inputs' gradients, which come together at the end. The
                // products of gate and up go expert by expert.
                walk.take(work, 2 * pair_rows + if selective { kept.rest.gate_up } else { 0 });
                let inside = |of: i64| {
                    of * f * (2 * self.sizes.a + 2 * self.sizes.t) + self.sizes.values(of, s.hidden_size)
                };
                let expert = |e: &Dense<Layer>| {
                    let of = pairs / mixture.experts.len().max(1) as i64;
                    inside(of)
                        .max(e.gate_up.backward_weight(&self.sizes, of))
                        .max(e.down.backward_weight(&self.sizes, of))
                };
                // On a GPU those of all experts together, whose gradients come in the compute dtype first.
                let plain = mixture.experts.iter().all(|e| e.gate_up.is_plain() && e.down.is_plain());
                let grouped = self.sizes.device != Device::Cpu && self.sizes.compute != Kind::Double && plain;
                let most = match grouped {
                    true => {
                        let weights = mixture.experts.len() as i64 * 2 * f * s.hidden_size;
                        inside(pairs) + self.sizes.values(weights, 1)
                    }
                    false => largest(&mixture.experts, expert),
                };
                walk.pass(work, most);
                walk.give(work, kept.rest.gate_up);
                walk.take(work, 2 * pair_rows);
                self.add_pairs(walk, pairs, false);
                walk.give(work, 4 * pair_rows);
                walk.take(work, full);
                walk.pass(work, full);
                walk.give(work, kept.rest.routing + full);
            }
        }
        walk.give(work, gathered);
        walk.take(work, stream); // dx2
        walk.give(work, stream); // dh2
        walk.give(activations, stream); // dy
        let dout = self.sizes.values(n, block.attention.o.inputs);
        walk.take(work, gathered); // all rows of the attention's gradient
        walk.pass(work, block.attention.o.backward_weight(&self.sizes, n));
        walk.take(work, dout);
        walk.pass(work, block.attention.o.backward_input(&self.sizes, n));
        walk.take(work, self.sizes.values(n, block.attention.qkv.outputs));
        walk.pass(work, self.attention_work(batch, true));
        walk.give(work, dout + gathered);
        if s.qk_norm_sizes().is_some() {
            walk.pass(work, 2 * self.sizes.values(n, block.attention.o.inputs));
        }
        walk.take(work, h); // h1
        walk.pass(work, self.gathered(n).max(self.sum(n)));
        walk.pass(work, block.attention.qkv.backward_weight(&self.sizes, n));
        walk.give(work, h);
        walk.take(work, stream); // dh1
        walk.pass(work, block.attention.qkv.backward_input(&self.sizes, n));
        walk.take(work, stream); // dx
        walk.now.work = 0;
        walk.give(activations, stream); // x
        walk.take(activations, stream); // dx
    }
}

fn largest(experts: &[Dense<Layer>], f: impl Fn(&Dense<Layer>) -> i64) -> i64 {
    experts.iter().map(f).max().unwrap_or(0)
}
