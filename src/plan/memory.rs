//! What a model takes of a rank's memory, in bytes, before it is there: parameters as they are laid out for training, and a
//! walk through forward, head and backward that takes and gives back what they do, in their order.
//!
//! [`Memory`] knows shapes only from [`Plan`]s and [`Block`]s, which the model itself is made of; the walk stands for
//! `llama.rs`, `mlp.rs`, `mixture.rs` and `head.rs`, and a test compares its peak with what libtorch's allocator gave to them.

use std::collections::HashSet;
use std::ops::Range;

use kernels::moments::Moment;
use kernels::ops::accumulator;
use kernels::quant;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::config::sections::{MomentsIn, Recompute};
use crate::config::shape::{Activation, Norms, Shape};
use crate::distributed::frozen::Storage;
use crate::distributed::mesh::{Keep, ShardingPlan};
use crate::distributed::plan::{GroupBytes, Plan, Role};
use crate::error::Result;
use crate::model::head;
use crate::model::layout::{Block, adapters_of};
use crate::model::mlp::{Dense, Mlp};

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// Slices of what is trained: master values, and copies in the compute dtype.
    pub weights: i64,
    /// Slices of what is not trained, quantized or not, with scales.
    pub frozen: i64,
    /// Groups that are gathered from the ranks for their use.
    pub gathered: i64,
    /// Slices of gradients.
    pub gradients: i64,
    /// Gradients of whole groups before they are reduced into slices.
    pub whole_gradients: i64,
    /// AdamW's moments.
    pub moments: i64,
    /// What forwards keep for their backwards.
    pub activations: i64,
    /// What a block's forward or backward computes with besides.
    pub work: i64,
    /// A chunk of logits, and the product that is its weight's gradient.
    pub head: i64,
}

impl Parts {
    pub fn total(&self) -> i64 {
        self.named().iter().map(|(_, bytes)| bytes).sum()
    }

    /// The parts with words for people.
    pub fn named(&self) -> [(&'static str, i64); 9] {
        [
            ("weights", self.weights),
            ("frozen weights", self.frozen),
            ("gathered weights", self.gathered),
            ("gradients", self.gradients),
            ("gradients in reduction", self.whole_gradients),
            ("moments", self.moments),
            ("activations", self.activations),
            ("work of one block", self.work),
            ("head", self.head),
        ]
    }
}

/// What is computed at once.
#[derive(Debug, Clone, Copy)]
pub struct Batch {
    /// Rows of a micro-batch, and tokens of a row.
    pub rows: i64,
    pub length: i64,
    /// Micro-batches of one update.
    pub micro_batches: i64,
    pub recompute: Recompute,
    /// Rows hold several documents: positions and first visible positions are tensors.
    pub packed: bool,
}

impl Batch {
    fn tokens(&self) -> i64 {
        self.rows * self.length
    }
}

/// A model on one rank.
pub struct Memory {
    shape: Shape,
    keep: Keep,
    groups: Vec<GroupBytes>,
    blocks: Vec<Block<Layer>>,
    /// Outputs of the head.
    vocab_size: i64,
    device: Device,
    compute: Kind,
    /// Bytes of a value in the compute dtype, and of statistics and gradients.
    t: i64,
    a: i64,
    /// The first group of which something is trained.
    lowest: usize,
}

/// A linear layer's sizes.
struct Layer {
    inputs: i64,
    outputs: i64,
    /// Products that it takes: dense tensors that lie together are one, and quantized ones.
    runs: Vec<Run>,
    /// Rows of the largest weight that has a gradient; 0: none has.
    trained_rows: i64,
    adapters: Vec<Adapter>,
}

struct Run {
    quantized: bool,
    /// Of all its tensors, and of the largest.
    rows: i64,
    most_rows: i64,
}

struct Adapter {
    rank: i64,
    dropout: bool,
    trained: bool,
}

impl Layer {
    fn new(plan: &Plan, tensors: Range<usize>) -> Layer {
        let specs = &plan.layout.specs[tensors.clone()];
        let mut runs: Vec<Run> = Vec::new();
        let mut trained_rows = 0;
        let mut before = None;
        for (spec, role) in specs.iter().zip(&plan.roles[tensors.clone()]) {
            let rows = spec.shape[0];
            match runs.last_mut() {
                Some(run) if before == Some(role) => {
                    (run.rows, run.most_rows) = (run.rows + rows, run.most_rows.max(rows));
                }
                _ => {
                    let quantized = matches!(role, Role::Frozen(Storage::Quantized(_)));
                    runs.push(Run { quantized, rows, most_rows: rows });
                }
            }
            before = Some(role);
            if *role == Role::Trained {
                trained_rows = runs.last().map_or(0, |run| run.rows).max(trained_rows);
            }
        }
        let adapter = |k: usize| {
            let a = &plan.adapters[k];
            Adapter { rank: a.rank, dropout: a.dropout > 0.0, trained: a.role == Role::Trained }
        };
        Layer {
            inputs: specs[0].shape[1],
            outputs: specs.iter().map(|s| s.shape[0]).sum(),
            runs,
            trained_rows,
            adapters: adapters_of(plan, &tensors).into_iter().map(|(k, _)| adapter(k)).collect(),
        }
    }

    /// What a forward over `n` rows takes besides input and output.
    fn forward(&self, m: &Memory, n: i64) -> i64 {
        let panel = |r: &Run| m.t * quant::forward_panel(m.device, r.most_rows, self.inputs);
        let scratch = self.runs.iter().filter(|r| r.quantized).map(panel).max().unwrap_or(0);
        let joined = if self.runs.len() > 1 { n * self.outputs * m.t } else { 0 };
        let adapter = |a: &Adapter| m.t * n * (2 * a.rank + if a.dropout { self.inputs } else { 0 });
        joined.max(scratch).max(self.adapters.iter().map(adapter).max().unwrap_or(0))
    }

    /// What the input's gradient takes besides itself and the output's.
    fn backward_input(&self, m: &Memory, n: i64) -> i64 {
        let run = |(i, r): (usize, &Run)| match (r.quantized, i) {
            (false, _) => 0,
            (true, i) => {
                m.t * (quant::backward_panel(m.device, r.rows, self.inputs)
                    + i.min(1) as i64 * n * self.inputs)
            }
        };
        let adapter = |a: &Adapter| m.t * n * (2 * a.rank + if a.dropout { 2 * self.inputs } else { 0 });
        let adapters = self.adapters.iter().map(adapter);
        self.runs.iter().enumerate().map(run).chain(adapters).max().unwrap_or(0)
    }

    /// What the weights' gradients take besides themselves.
    fn backward_weight(&self, m: &Memory, n: i64) -> i64 {
        let adapter = |a: &Adapter| match a.trained {
            true => m.t * n * (2 * a.rank + if a.dropout { self.inputs } else { 0 }),
            false => 0,
        };
        let weight = m.rounded_product(self.trained_rows, self.inputs);
        weight.max(self.adapters.iter().map(adapter).max().unwrap_or(0))
    }
}

/// What is there at a time, and what was there when it was the most.
struct Walk {
    now: Parts,
    peak: Parts,
    /// Groups whose gathered values stay.
    kept: HashSet<usize>,
}

impl Walk {
    fn from(now: Parts) -> Walk {
        Walk { now, peak: now, kept: HashSet::new() }
    }

    fn take(&mut self, part: impl Fn(&mut Parts) -> &mut i64, bytes: i64) {
        *part(&mut self.now) += bytes;
        if self.now.total() > self.peak.total() {
            self.peak = self.now;
        }
    }

    fn give(&mut self, part: impl Fn(&mut Parts) -> &mut i64, bytes: i64) {
        *part(&mut self.now) -= bytes;
    }

    /// What is taken and given back at once.
    fn pass(&mut self, part: impl Fn(&mut Parts) -> &mut i64, bytes: i64) {
        self.take(&part, bytes);
        self.give(&part, bytes);
    }
}

/// Matrices of scores that the composed attention has at once.
const SCORES_FORWARD: i64 = 4;
const SCORES_BACKWARD: i64 = 5;

fn work(p: &mut Parts) -> &mut i64 {
    &mut p.work
}

fn activations(p: &mut Parts) -> &mut i64 {
    &mut p.activations
}

fn logits(p: &mut Parts) -> &mut i64 {
    &mut p.head
}

/// Bytes of what a block's forward makes for its backward (`llama.rs`, `Rest`).
#[derive(Clone, Copy)]
struct Rest {
    /// Statistics of the norms and the attention, queries and keys before their norm, qkv, the attention's output, x2.
    attention: i64,
    /// What a mixture keeps besides: where tokens went.
    routing: i64,
    gate_up: i64,
}

impl Rest {
    fn total(&self) -> i64 {
        self.attention + self.routing + self.gate_up
    }

    /// What stays until the backward.
    fn kept(&self, recompute: Recompute, experts: i64) -> i64 {
        match recompute {
            Recompute::None => self.total(),
            Recompute::Selective => self.attention + self.routing,
            Recompute::Full => experts,
        }
    }
}

impl Memory {
    /// Of a model that is laid out in `plans` and over ranks as `sharding` says.
    pub fn new(
        shape: &Shape,
        plans: &[Plan],
        compute: Kind,
        sharding: ShardingPlan,
        device: Device,
    ) -> Result<Memory> {
        let layers = shape.num_hidden_layers as usize;
        let block = |plan: &Plan| {
            let linear = |weights, _| Ok(Layer::new(plan, weights));
            Block::of(shape, plan.layout.specs.len(), linear, |_| Ok(Tensor::new()))
        };
        let groups: Vec<GroupBytes> = plans.iter().map(|p| p.bytes(compute, sharding.ranks)).collect();
        let head = if shape.tie_word_embeddings { 0 } else { layers + 1 };
        Ok(Memory {
            shape: shape.clone(),
            lowest: groups.iter().position(|g| g.num_trained > 0).unwrap_or(groups.len()),
            keep: sharding.keep,
            groups,
            blocks: plans[1..=layers].iter().map(block).collect::<Result<_>>()?,
            vocab_size: plans[head].layout.specs[0].shape[0],
            device,
            compute,
            t: compute.elt_size_in_bytes() as i64,
            a: accumulator(compute).elt_size_in_bytes() as i64,
        })
    }

    /// What stays for the whole run, moments left out.
    pub fn resident(&self) -> Parts {
        let sum = |f: fn(&GroupBytes) -> i64| self.groups.iter().map(f).sum();
        Parts { weights: sum(|g| g.master + g.copy), frozen: sum(|g| g.frozen), ..Parts::default() }
    }

    /// Gathered values that stay after their first use, until an update changes them.
    pub fn kept(&self) -> i64 {
        if self.keep.values() { self.groups.iter().map(|g| g.gathered).sum() } else { 0 }
    }

    /// Slices of the master values, as a checkpoint holds them.
    pub fn masters(&self) -> i64 {
        self.groups.iter().map(|g| g.slice_len * self.a).sum()
    }

    /// AdamW's moments of this rank's slices.
    pub fn moments(&self, kept: MomentsIn) -> i64 {
        let of = |g: &GroupBytes| match kept {
            MomentsIn::Float32 => 2 * self.a * g.slice_len,
            MomentsIn::EightBit => 2 * Moment::bytes(g.slice_len),
        };
        self.groups.iter().map(of).sum()
    }

    /// What a forward over a batch takes at its peak, and the log-probabilities of its tokens; what stays included.
    pub fn forward(&self, batch: &Batch) -> Parts {
        let now = self.resident();
        let mut walk = Walk::from(now);
        self.trunk(&mut walk, batch, None);
        self.head(&mut walk, batch.tokens(), None);
        walk.peak
    }

    /// What an update takes at its peak; what stays included, moments left out.
    pub fn step(&self, batch: &Batch) -> Parts {
        let now = self.resident();
        let mut walk = Walk::from(now);
        // Ids and labels of all micro-batches, positions and first visible positions.
        let inputs = if batch.packed { 4 } else { 2 } * 8 * batch.tokens();
        walk.take(activations, batch.micro_batches * inputs);
        // The rotary tables.
        walk.take(
            activations,
            (batch.length as u64).next_power_of_two() as i64 * self.shape.head_dim * self.a,
        );
        // From the second one on all are alike.
        let distinct = batch.micro_batches.min(2);
        for k in 0..distinct {
            let (fresh, last) = (k == 0, k + 1 == distinct);
            let mut gradients = Gradients { fresh, last, reducing: None, tied: false };
            let kept = self.trunk(&mut walk, batch, Some(batch.recompute));
            self.head(&mut walk, batch.tokens(), Some(&mut gradients));
            self.backward(&mut walk, batch, kept, &mut gradients);
        }
        walk.peak
    }

    fn head_group(&self) -> usize {
        if self.shape.tie_word_embeddings { 0 } else { self.blocks.len() + 1 }
    }

    fn gather(&self, walk: &mut Walk, group: usize) {
        if self.keep.values() && !walk.kept.insert(group) {
            return;
        }
        walk.take(|p| &mut p.gathered, self.groups[group].gathered);
    }

    fn release(&self, walk: &mut Walk, group: usize) {
        if !self.keep.values() {
            walk.give(|p| &mut p.gathered, self.groups[group].gathered);
        }
    }

    /// n rows of `width` values.
    fn values(&self, n: i64, width: i64) -> i64 {
        n * width * self.t
    }

    /// bfloat16 products on the CPU are rounded before they are added to a gradient.
    fn rounded_product(&self, rows: i64, columns: i64) -> i64 {
        let rounded = self.device == Device::Cpu && self.compute == Kind::BFloat16;
        if rounded { rows * columns * self.t } else { 0 }
    }

    /// `Context`: positions, and the first visible ones, where a window asks for them.
    fn context(&self, batch: &Batch) -> i64 {
        let windowed = self.shape.sliding_window.is_some_and(|w| w < batch.length);
        8 * batch.tokens() * (i64::from(!batch.packed) + i64::from(windowed))
    }

    /// Scores, where the attention has no fused form: on CUDA, unless it is flash attention; everywhere with a softcap.
    fn scores(&self, batch: &Batch, backward: bool) -> i64 {
        let scores = batch.rows * self.shape.num_attention_heads * batch.length * batch.length;
        if self.shape.features.attention_softcap.is_some() {
            // Queries, and keys and values for each of them, in A; scores, their cap's and mask's copies, probabilities.
            let heads = 3 * self.shape.num_attention_heads * self.shape.head_dim * batch.tokens();
            let besides = if backward { 2 * heads } else { heads };
            return self.a * ((if backward { SCORES_BACKWARD } else { SCORES_FORWARD }) * scores + besides);
        }
        let windowed = self.shape.sliding_window.is_some_and(|w| w < batch.length);
        let fused = self.device == Device::Cpu
            || (self.compute == Kind::BFloat16 && !batch.packed && !windowed && self.shape.head_dim % 8 == 0);
        if fused { 0 } else { 2 * scores * self.a }
    }

    /// `Llama::run`. Returns what each block keeps, from the lowest that is trained on.
    fn trunk(&self, walk: &mut Walk, batch: &Batch, recompute: Option<Recompute>) -> Vec<Kept> {
        let (n, layers) = (batch.tokens(), self.blocks.len());
        let stream = self.values(n, self.shape.hidden_size);
        walk.take(activations, self.context(batch));
        self.gather(walk, 0);
        walk.take(activations, stream);
        self.gather(walk, 1);
        let keep_embedding = self.shape.tie_word_embeddings && layers <= 1;
        if !keep_embedding {
            self.release(walk, 0);
        }
        let mut kept = Vec::new();
        for i in 1..=layers {
            match i < layers {
                true => self.gather(walk, i + 1),
                false if keep_embedding => {}
                false => self.gather(walk, self.head_group()),
            }
            let mut rest = self.block_rest(walk, batch, i);
            self.finish(walk, n, i);
            rest.attention += self.normed_output(walk, n);
            walk.give(work, rest.total() + stream);
            walk.take(activations, stream);
            match recompute.filter(|_| i >= self.lowest) {
                Some(recompute) => {
                    let experts = self.shape.experts.as_ref().map_or(0, |e| 8 * n * e.num_experts_per_tok);
                    let bytes = rest.kept(recompute, experts);
                    walk.take(activations, bytes);
                    kept.push(Kept { bytes, rest });
                }
                None => walk.give(activations, stream),
            }
            if recompute.is_none() || i < layers || i < self.lowest {
                self.release(walk, i);
            }
        }
        // The hidden states; the last block's output stays for the final norm's backward.
        walk.take(activations, stream + n * self.a);
        if recompute.is_none() {
            walk.give(activations, stream + n * self.a + self.context(batch));
        }
        kept
    }

    /// `block_rest`: leaves what it made as work.
    fn block_rest(&self, walk: &mut Walk, batch: &Batch, i: usize) -> Rest {
        let (s, n, block) = (&self.shape, batch.tokens(), &self.blocks[i - 1]);
        let stream = self.values(n, s.hidden_size);
        let (q, k) = (s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim);
        let mut attention = 0;
        let mut keep = |walk: &mut Walk, bytes: i64| {
            walk.take(work, bytes);
            attention += bytes;
        };
        // A norm's statistics, and what it gives: only where there is one before.
        let (rstd, h) = if s.features.norms == Norms::After { (0, 0) } else { (n * self.a, stream) };
        keep(walk, rstd);
        walk.take(work, h); // h1
        keep(walk, self.values(n, block.attention.qkv.outputs));
        walk.pass(work, block.attention.qkv.forward(self, n));
        walk.give(work, h);
        for (width, size) in [q, k].into_iter().zip(s.qk_norm_sizes().into_iter().flatten()) {
            keep(walk, self.values(n, width) + n * width / size * self.a);
            walk.pass(work, self.values(n, width));
        }
        keep(walk, self.values(n, q) + n * s.num_attention_heads * self.a);
        walk.pass(work, self.scores(batch, false));
        keep(walk, stream); // x2
        walk.pass(work, block.attention.o.forward(self, n));
        if s.features.norms != Norms::Before {
            keep(walk, stream + n * self.a); // the attention's output
            walk.pass(work, stream);
        }
        keep(walk, rstd);
        walk.take(work, h); // h2
        let (routing, gate_up) = self.begin(walk, n, i);
        walk.give(work, h);
        Rest { attention, routing, gate_up }
    }

    /// `Mlp::begin`: routing and products of gate and up, which stay as work.
    fn begin(&self, walk: &mut Walk, n: i64, i: usize) -> (i64, i64) {
        let f = self.shape.intermediate_size;
        match &self.blocks[i - 1].mlp {
            Mlp::Dense(net) => {
                let gate_up = self.values(n, 2 * f);
                walk.take(work, gate_up);
                walk.pass(work, net.gate_up.forward(self, n));
                (0, gate_up)
            }
            Mlp::Mixture(mixture) => {
                let pairs = n * mixture.per_token;
                let routing = self.values(n, mixture.experts.len() as i64) + 3 * 8 * pairs;
                let gate_up = self.values(pairs, 2 * f);
                walk.take(work, routing + self.values(pairs, self.shape.hidden_size));
                walk.take(work, gate_up);
                walk.pass(work, largest(&mixture.experts, |e| e.gate_up.forward(self, pairs)));
                walk.give(work, self.values(pairs, self.shape.hidden_size));
                (routing, gate_up)
            }
        }
    }

    /// `Mlp::finish`: the block's output stays as work.
    fn finish(&self, walk: &mut Walk, n: i64, i: usize) {
        let (c, f) = (self.shape.hidden_size, self.shape.intermediate_size);
        match &self.blocks[i - 1].mlp {
            Mlp::Dense(net) => {
                walk.take(work, self.values(n, f));
                walk.pass(work, self.composed_gate(n, false));
                walk.take(work, self.values(n, c));
                walk.pass(work, net.down.forward(self, n));
                walk.give(work, self.values(n, f));
            }
            Mlp::Mixture(mixture) => {
                // One expert after the other, of which the outputs stay; then those together, and in the tokens' order.
                let pairs = n * mixture.per_token;
                let outputs = self.values(pairs, c);
                walk.pass(work, outputs + self.values(pairs, f));
                walk.take(work, 2 * outputs);
                self.add_pairs(walk, pairs, true);
                walk.take(work, self.values(n, c));
                walk.give(work, 2 * outputs);
            }
        }
    }

    /// What a gate that is composed takes besides input and output: all of it in A.
    fn composed_gate(&self, n: i64, backward: bool) -> i64 {
        if self.shape.features.activation == Activation::Silu {
            return 0;
        }
        let copies = match (self.a == self.t, backward) {
            (true, false) => 1,
            (true, true) => 4,
            (false, false) => 4,
            (false, true) => 6,
        };
        copies * n * self.shape.intermediate_size * self.a
    }

    /// What stays of an MLP's output where a norm comes after it, as work.
    fn normed_output(&self, walk: &mut Walk, n: i64) -> i64 {
        if self.shape.features.norms == Norms::Before {
            return 0;
        }
        let stream = self.values(n, self.shape.hidden_size);
        walk.take(work, stream + n * self.a);
        walk.pass(work, stream);
        stream + n * self.a
    }

    /// `Routed::add_pairs`, up to the sum: rows in the tokens' order, in A, and with weights.
    fn add_pairs(&self, walk: &mut Walk, pairs: i64, weighted: bool) {
        let c = self.shape.hidden_size;
        let wide = pairs * c * self.a;
        let sorted = self.values(pairs, c);
        match (self.a == self.t, weighted) {
            (true, false) => walk.pass(work, sorted),
            (true, true) => walk.pass(work, sorted + wide),
            (false, false) => walk.pass(work, sorted + wide),
            (false, true) => walk.pass(work, 2 * wide),
        }
    }

    /// The head over `n` rows: for a training its gradient too, after which the hidden states' gradient is there in their
    /// place.
    fn head(&self, walk: &mut Walk, n: i64, gradients: Option<&mut Gradients>) {
        let group = self.head_group();
        let hidden = self.values(n, self.shape.hidden_size);
        let chunk = head::chunk(self.device, self.vocab_size, n).min(n);
        // With a cap its slope beside the logits, and what both are made of.
        let copies = if self.shape.features.logit_softcap.is_some() { 5 } else { 1 };
        let chunk_bytes = copies * self.values(chunk, self.vocab_size);
        let Some(gradients) = gradients else {
            walk.take(logits, n * self.a);
            walk.pass(logits, chunk_bytes);
            walk.give(logits, n * self.a);
            walk.give(activations, hidden);
            self.release(walk, group);
            return;
        };
        let trains = self.groups[group].num_trained > 0;
        walk.take(logits, 2 * n * self.a);
        if trains {
            self.gradient(walk, group, gradients);
        }
        walk.take(activations, hidden); // its gradient
        walk.take(logits, chunk_bytes);
        if trains {
            walk.pass(logits, self.rounded_product(self.vocab_size, self.shape.hidden_size));
        }
        walk.give(logits, chunk_bytes + 2 * n * self.a);
        walk.give(activations, hidden);
        self.release(walk, group);
        match (trains, self.shape.tie_word_embeddings) {
            (true, false) => self.reduce(walk, group, gradients),
            (true, true) => gradients.tied = true,
            (false, _) => {}
        }
    }

    /// `Llama::backward`.
    fn backward(&self, walk: &mut Walk, batch: &Batch, mut kept: Vec<Kept>, gradients: &mut Gradients) {
        let (n, layers) = (batch.tokens(), self.blocks.len());
        let stream = self.values(n, self.shape.hidden_size);
        for i in (self.lowest.max(1)..=layers).rev() {
            if i > self.lowest.max(1) {
                self.gather(walk, i - 1);
            }
            let trains = self.groups[i].num_trained > 0;
            if trains {
                self.gradient(walk, i, gradients);
            }
            if i == layers {
                // The final norm's input and statistics.
                walk.pass(work, stream);
                walk.give(activations, stream + n * self.a);
            }
            if let Some(kept) = kept.pop() {
                self.block_backward(walk, batch, i, kept);
            }
            self.release(walk, i);
            if trains {
                self.reduce(walk, i, gradients);
            }
        }
        if self.lowest == 0 {
            if !gradients.tied {
                self.gradient(walk, 0, gradients);
            }
            self.reduce(walk, 0, gradients);
        }
        self.finish_reduction(walk, gradients);
        // The gradient of the embedding's rows.
        walk.give(activations, stream + self.context(batch));
    }

    /// `block_backward`: the output's gradient is there before it, the input's after it. What the forward kept goes.
    fn block_backward(&self, walk: &mut Walk, batch: &Batch, i: usize, kept: Kept) {
        let (s, n, block) = (&self.shape, batch.tokens(), &self.blocks[i - 1]);
        let stream = self.values(n, s.hidden_size);
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
        let h = if s.features.norms == Norms::After { 0 } else { stream };
        walk.take(work, h); // h2
        match &block.mlp {
            Mlp::Dense(net) => {
                if batch.recompute == Recompute::Selective {
                    walk.take(work, kept.rest.gate_up);
                    walk.pass(work, net.gate_up.forward(self, n));
                }
                let a = self.values(n, s.intermediate_size);
                walk.take(work, a);
                walk.pass(work, net.down.backward_input(self, n));
                walk.pass(work, self.composed_gate(n, true));
                walk.pass(work, net.down.backward_weight(self, n));
                walk.give(work, a);
                walk.pass(work, net.gate_up.backward_weight(self, n));
                walk.give(work, h); // h2
                walk.take(work, stream); // its gradient
                walk.pass(work, net.gate_up.backward_input(self, n));
                walk.give(work, kept.rest.gate_up);
            }
            Mlp::Mixture(mixture) => {
                let pairs = n * mixture.per_token;
                let (f, pair_rows) = (s.intermediate_size, self.values(pairs, s.hidden_size));
                let selective = batch.recompute == Recompute::Selective;
                // Inputs and output gradients of the pairs; the inputs' gradients, which come together at the end. The
                // products of gate and up go expert by expert.
                walk.take(work, 2 * pair_rows + if selective { kept.rest.gate_up } else { 0 });
                let expert = |e: &Dense<Layer>| {
                    let of = pairs / mixture.experts.len().max(1) as i64;
                    let inside = of * f * (2 * self.a + 2 * self.t) + self.values(of, s.hidden_size);
                    inside.max(e.gate_up.backward_weight(self, of)).max(e.down.backward_weight(self, of))
                };
                walk.pass(work, largest(&mixture.experts, expert));
                walk.give(work, kept.rest.gate_up);
                walk.take(work, 2 * pair_rows);
                self.add_pairs(walk, pairs, false);
                walk.give(work, 4 * pair_rows);
                walk.take(work, stream);
                walk.pass(work, stream);
                walk.give(work, kept.rest.routing + stream);
            }
        }
        walk.take(work, stream); // dx2
        walk.give(work, stream); // dh2
        walk.give(activations, stream); // dy
        let dout = self.values(n, block.attention.o.inputs);
        walk.pass(work, block.attention.o.backward_weight(self, n));
        walk.take(work, dout);
        walk.pass(work, block.attention.o.backward_input(self, n));
        walk.take(work, self.values(n, block.attention.qkv.outputs));
        walk.pass(work, self.scores(batch, true));
        walk.give(work, dout);
        if s.qk_norm_sizes().is_some() {
            walk.pass(work, 2 * self.values(n, block.attention.o.inputs));
        }
        walk.take(work, h); // h1
        walk.pass(work, block.attention.qkv.backward_weight(self, n));
        walk.give(work, h);
        walk.take(work, stream); // dh1
        walk.pass(work, block.attention.qkv.backward_input(self, n));
        walk.take(work, stream); // dx
        walk.now.work = 0;
        walk.give(activations, stream); // x
        walk.take(activations, stream); // dx
    }

    /// `Sharded::grad`
    fn gradient(&self, walk: &mut Walk, group: usize, gradients: &Gradients) {
        let g = &self.groups[group];
        if g.whole_gradient > 0 {
            if self.keep.gradients() && !gradients.fresh {
                return;
            }
            walk.take(|p| &mut p.whole_gradients, g.whole_gradient);
        } else if gradients.fresh {
            walk.take(|p| &mut p.gradients, g.gradient);
        }
    }

    /// `Sharded::reduce`
    fn reduce(&self, walk: &mut Walk, group: usize, gradients: &mut Gradients) {
        if self.keep.gradients() && !gradients.last {
            return;
        }
        self.finish_reduction(walk, gradients);
        if self.groups[group].whole_gradient > 0 {
            walk.take(|p| &mut p.gradients, self.groups[group].gradient);
            gradients.reducing = Some(group);
        }
    }

    fn finish_reduction(&self, walk: &mut Walk, gradients: &mut Gradients) {
        if let Some(group) = gradients.reducing.take() {
            walk.give(|p| &mut p.whole_gradients, self.groups[group].whole_gradient);
            if !gradients.fresh && !self.keep.gradients() {
                // Added to the slice that was there.
                walk.give(|p| &mut p.gradients, self.groups[group].gradient);
            }
        }
    }
}

/// Of one block.
struct Kept {
    bytes: i64,
    rest: Rest,
}

/// What becomes of gradients in a micro-batch.
struct Gradients {
    /// It is the first of its step: there are no slices yet.
    fresh: bool,
    /// It is the last of its step.
    last: bool,
    /// The group whose gradient is under reduction.
    reducing: Option<usize>,
    /// The head has begun the embedding's gradient.
    tied: bool,
}

fn largest(experts: &[Dense<Layer>], f: impl Fn(&Dense<Layer>) -> i64) -> i64 {
    experts.iter().map(f).max().unwrap_or(0)
}
