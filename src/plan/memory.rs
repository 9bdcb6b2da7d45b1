//! What a model takes of a rank's memory, in bytes, before it is there: parameters as they are laid out for training, and a
//! walk through forward, head and backward that takes and gives back what they do, in their order.
//!
//! [`Memory`] knows shapes only from [`GroupPlan`]s and [`BlockParts`]s, which the model itself is made of; the walk stands for
//! `llama.rs`, `mlp.rs`, `mixture.rs` and `head.rs`, and a test compares its peak with what libtorch's allocator gave to them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;

use kernels::moments::Moment;
use kernels::ops::{Float8, accumulator};
use tch::{Device, Kind, Tensor};

use super::block::BlockMemory;
use super::layer::{Layer, Sizes};
pub use super::parts::{BatchShape, Parts};
use super::walk::{Walk, activations, logits, work};
use crate::config::parallel::StageOrder;
use crate::config::sections::{MomentsIn, Recompute};
use crate::config::shape::Shape;
use crate::distributed::mesh::{Keep, Place, ShardingPlan};
use crate::distributed::plan::{GroupBytes, GroupPlan};
use crate::distributed::schedule::{Pass, passes};
use crate::error::Result;
use crate::model::cuts::cut;
use crate::model::head;
use crate::model::layout::{BlockParts, float8_runs};
use crate::model::mlp::Mlp;
use crate::model::stages::{check_order, on_stages};

/// A model on one rank.
pub struct Memory {
    pub(super) shape: Shape,
    /// With the heads and the width of an MLP that a rank computes.
    pub(super) local: Shape,
    pub(super) plans: Vec<GroupPlan>,
    pub(super) keep: Keep,
    /// That slices lie over.
    pub(super) ranks: i64,
    /// Ranks that hold equal slices.
    pub(super) replicas: i64,
    /// That share every sequence.
    pub(super) context: i64,
    /// The stage of a pipeline, and the groups of its blocks.
    pub(super) stage: Place,
    pub(super) here: Range<usize>,
    order: StageOrder,
    pub(super) groups: Vec<GroupBytes>,
    /// All values in the compute dtype, gathered.
    whole: i64,
    pub(super) blocks: Vec<BlockParts<Layer>>,
    /// Outputs of the head.
    vocab_size: i64,
    pub(super) sizes: Sizes,
    /// The first group of which something is trained.
    pub(super) lowest: usize,
}

impl Memory {
    /// Of a model that is laid out in `plans` and over ranks as `sharding` says.
    pub fn new(
        shape: &Shape,
        plans: &[GroupPlan],
        compute: Kind,
        sharding: ShardingPlan,
        device: Device,
    ) -> Result<Memory> {
        let layers = shape.num_hidden_layers as usize;
        let place = Place { rank: 0, size: sharding.tensor };
        let plans = cut(plans.to_vec(), shape, place, sharding.sequence)?;
        check_order(shape, sharding.order)?;
        let plans = on_stages(plans, shape, sharding.stage, sharding.blocks.as_deref())?;
        let of_blocks = (1..=layers).filter(|i| plans[*i].stage.here);
        let first = of_blocks.clone().next().unwrap_or(1);
        let lowest = plans.iter().position(|p| p.trained().numel > 0);
        let block = |plan: &GroupPlan| {
            let linear = |weights, _| Ok(Layer::new(plan, weights));
            BlockParts::of(shape, plan.layout.specs.len(), linear, |_| Ok(Tensor::new()))
        };
        let groups: Vec<GroupBytes> = plans.iter().map(|p| p.bytes(compute, sharding.ranks)).collect();
        let head = if shape.tie_word_embeddings { 0 } else { layers + 1 };
        Ok(Memory {
            shape: shape.clone(),
            local: Shape {
                num_attention_heads: shape.num_attention_heads / sharding.tensor,
                num_key_value_heads: (shape.num_key_value_heads / sharding.tensor).max(1),
                intermediate_size: shape.intermediate_size / sharding.tensor,
                ..shape.clone()
            },
            lowest: lowest.unwrap_or(groups.len()),
            stage: sharding.stage,
            order: sharding.order,
            here: first..first + of_blocks.count(),
            keep: sharding.keep,
            ranks: sharding.ranks,
            context: sharding.context,
            replicas: sharding.replicas,
            whole: groups.iter().map(|g| g.gathered).sum(),
            groups,
            blocks: plans[1..=layers].iter().map(block).collect::<Result<_>>()?,
            vocab_size: plans[head].layout.specs[0].shape[0],
            plans,
            sizes: Sizes {
                device,
                compute,
                t: compute.elt_size_in_bytes() as i64,
                a: accumulator(compute).elt_size_in_bytes() as i64,
                float8: None,
                gathers_float8: false,
                tensor: sharding.tensor,
                sequence: sharding.sequence && sharding.tensor > 1,
            },
        })
    }

    /// With products in 8-bit floats.
    pub fn in_float8(mut self, float8: Option<Float8>) -> Result<Memory> {
        self.sizes.float8 = float8;
        self.sizes.gathers_float8 = false;
        if let Some(float8) = float8
            && self.ranks > 1
            && self.sizes.compute == Kind::BFloat16
        {
            self.sizes.gathers_float8 = true;
            let runs = float8_runs(&self.shape, self.plans.iter(), float8)?;
            for ((group, plan), runs) in self.groups.iter_mut().zip(&self.plans).zip(runs) {
                if !runs.is_empty() && plan.stage.here {
                    *group = plan.in_float8(*group, runs, self.ranks);
                }
            }
        }
        Ok(self)
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

    /// All values in the compute dtype, as generation holds them.
    pub fn gathered_bytes(&self) -> i64 {
        self.whole
    }

    /// Slices of the master values, as a checkpoint holds them.
    pub fn masters(&self) -> i64 {
        self.groups.iter().map(|g| g.slice_len * self.sizes.a).sum()
    }

    /// AdamW's moments of this rank's slices.
    pub fn moments(&self, kept: MomentsIn) -> i64 {
        let of = |g: &GroupBytes| match kept {
            MomentsIn::Float32 => 2 * self.sizes.a * g.slice_len,
            MomentsIn::EightBit => 2 * Moment::bytes(g.slice_len),
        };
        self.groups.iter().map(of).sum()
    }

    /// What a forward over a batch takes at its peak, and the log-probabilities of its tokens; what stays included.
    pub fn forward(&self, batch: &BatchShape) -> Parts {
        let batch = &batch.shared_by(self.context);
        let now = self.resident();
        let mut walk = Walk::from(now);
        self.trunk(&mut walk, batch, None);
        self.head(&mut walk, batch.tokens(), None);
        walk.peak
    }

    /// What an update takes at its peak; what stays included, moments left out.
    pub fn step(&self, batch: &BatchShape) -> Parts {
        let (whole, batch) = (batch, &batch.shared_by(self.context));
        let now = self.resident();
        let mut walk = Walk::from(now);
        // Ids and labels of all micro-batches, positions and first visible positions.
        let inputs = if batch.packed { 4 } else { 2 } * 8 * whole.tokens();
        walk.take(activations, batch.micro_batches * inputs);
        // The rotary tables.
        walk.take(
            activations,
            (whole.length as u64).next_power_of_two() as i64 * self.shape.head_dim * self.sizes.a,
        );
        // One more tensor each way to and from each neighbour, which comes and goes while others are computed.
        let neighbours = i64::from(!self.is_first()) + i64::from(!self.is_last());
        walk.take(activations, 2 * neighbours * self.stream(batch.tokens()));
        // From the second one on all are alike, of stages from the second one of the last.
        let micro_batches = batch.micro_batches.min(2 * self.stage.size);
        let mut gradients = Gradients::of_step(micro_batches);
        let mut under_way = VecDeque::new();
        let (stage, stages) = (self.stage.rank as usize, self.stage.size as usize);
        for pass in passes(self.order, stage, stages, micro_batches as usize) {
            match pass {
                Pass::Forward(_) => {
                    under_way.push_back(self.trunk(&mut walk, batch, Some(batch.recompute)));
                    if self.is_last() {
                        self.head(&mut walk, batch.tokens(), Some(&mut gradients));
                    }
                }
                Pass::Backward(_) => {
                    let kept = under_way.pop_front().unwrap_or_default();
                    self.backward(&mut walk, batch, kept, &mut gradients);
                }
                Pass::Weights(_) => self.weights(&mut walk, batch, &mut gradients),
            }
        }
        walk.peak
    }

    pub(super) fn is_first(&self) -> bool {
        self.stage.rank == 0
    }

    pub(super) fn is_last(&self) -> bool {
        self.stage.rank + 1 == self.stage.size
    }

    /// The stream between attention and MLP.
    pub(super) fn stream(&self, n: i64) -> i64 {
        self.sizes.values(self.sizes.own_rows(n), self.shape.hidden_size)
    }

    /// What a sum over tensor-parallel ranks takes besides its result: a rank's part, in both dtypes.
    pub(super) fn sum(&self, n: i64) -> i64 {
        if self.sizes.tensor == 1 {
            return 0;
        }
        let wide = if self.sizes.a == self.sizes.t { 0 } else { n * self.shape.hidden_size * self.sizes.a };
        self.sizes.values(n, self.shape.hidden_size) + wide
    }

    /// What the softmax of logits of a part of the vocabulary takes besides them.
    fn vocabulary_work(&self, rows: i64) -> i64 {
        // Shifted logits, exponentials, probabilities, and the product that becomes the gradient.
        if self.sizes.tensor == 1 { 0 } else { 4 * rows * self.vocab_size * self.sizes.a }
    }

    pub(super) fn head_group(&self) -> usize {
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

    /// `Context`: positions, or where packed documents begin; and the first visible ones, where a window asks for them.
    fn context(&self, batch: &BatchShape) -> i64 {
        let windowed = self.shape.sliding_window.is_some_and(|w| w < batch.length);
        8 * batch.tokens() * (1 + i64::from(windowed))
    }

    /// `Llama::run`. Returns what each block keeps, from the lowest that is trained on.
    fn trunk(&self, walk: &mut Walk, batch: &BatchShape, recompute: Option<Recompute>) -> Vec<BlockMemory> {
        let (n, Range { start, end }) = (batch.tokens(), self.here.clone());
        let stream = self.stream(n);
        walk.take(activations, self.context(batch));
        let keep_embedding = self.shape.tie_word_embeddings && self.blocks.len() <= 1;
        if self.is_first() {
            self.gather(walk, 0);
            walk.pass(work, self.sum(n));
        }
        walk.take(activations, stream);
        self.gather(walk, start);
        if self.is_first() && !keep_embedding {
            self.release(walk, 0);
        }
        let mut kept = Vec::new();
        for i in start..end {
            match i + 1 < end {
                true => self.gather(walk, i + 1),
                false if keep_embedding || !self.is_last() => {}
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
                    kept.push(BlockMemory { bytes, rest });
                }
                None => walk.give(activations, stream),
            }
            if recompute.is_none() || i + 1 < end || i < self.lowest {
                self.release(walk, i);
            }
        }
        if !self.is_last() {
            // To the next stage.
            let context = if recompute.is_none() { self.context(batch) } else { 0 };
            walk.give(activations, stream + context);
            return kept;
        }
        // The hidden states; the last block's output stays for the final norm's backward.
        let rstd = self.sizes.own_rows(n) * self.sizes.a;
        walk.pass(work, stream);
        walk.take(activations, self.sizes.values(n, self.shape.hidden_size) + rstd);
        if recompute.is_none() {
            walk.give(activations, stream + rstd + self.context(batch));
        }
        kept
    }

    /// The head over `n` rows: for a training its gradient too, after which the hidden states' gradient is there in their
    /// place.
    fn head(&self, walk: &mut Walk, n: i64, gradients: Option<&mut Gradients>) {
        let group = self.head_group();
        let hidden = self.sizes.values(n, self.shape.hidden_size);
        let chunk = head::chunk(self.sizes.device, self.vocab_size, n).min(n);
        // With a cap its slope beside the logits, and what both are made of.
        let copies = if self.shape.features.logit_softcap.is_some() { 5 } else { 1 };
        let chunk_bytes = copies * self.sizes.values(chunk, self.vocab_size);
        let Some(gradients) = gradients else {
            walk.take(logits, n * self.sizes.a);
            walk.pass(logits, chunk_bytes + self.vocabulary_work(chunk));
            walk.give(logits, n * self.sizes.a);
            walk.give(activations, hidden);
            self.release(walk, group);
            return;
        };
        let trains = self.groups[group].num_trained > 0;
        walk.take(logits, 2 * n * self.sizes.a);
        if trains {
            self.gradient(walk, group, gradients);
        }
        walk.take(activations, hidden); // its gradient
        walk.take(logits, chunk_bytes);
        walk.pass(logits, self.vocabulary_work(chunk));
        if trains {
            walk.pass(logits, self.sizes.rounded_product(self.vocab_size, self.shape.hidden_size));
        }
        walk.give(logits, chunk_bytes + 2 * n * self.sizes.a);
        walk.give(activations, hidden);
        self.release(walk, group);
        if trains && !(group == 0 && self.is_first()) {
            self.reduce(walk, group, gradients);
        }
    }

    /// `Llama::backward`.
    fn backward(
        &self,
        walk: &mut Walk,
        batch: &BatchShape,
        mut kept: Vec<BlockMemory>,
        gradients: &mut Gradients,
    ) {
        let (n, Range { start, end }) = (batch.tokens(), self.here.clone());
        let stream = self.stream(n);
        // This rank's rows of the hidden states' gradient, or what the next stage gives.
        let there = if self.is_last() { self.sizes.values(n, self.shape.hidden_size) } else { 0 };
        walk.give(activations, there - stream);
        for i in (self.lowest.max(start)..end).rev() {
            if i > self.lowest.max(start) {
                self.gather(walk, i - 1);
            }
            let trains = self.groups[i].num_trained > 0;
            if trains {
                self.gradient(walk, i, gradients);
            }
            if i == self.blocks.len() {
                // The final norm's input and statistics.
                walk.pass(work, stream);
                walk.give(activations, stream + self.sizes.own_rows(n) * self.sizes.a);
            }
            if let Some(kept) = kept.pop() {
                self.block_backward(walk, batch, i, kept);
            }
            self.release(walk, i);
            match trains {
                true if self.delays() => walk.take(activations, self.factors(i, n)),
                true => self.reduce(walk, i, gradients),
                false => {}
            }
        }
        if self.lowest == 0 && self.is_first() {
            self.gradient(walk, 0, gradients);
            self.reduce(walk, 0, gradients);
        }
        self.finish_reduction(walk, gradients);
        // The gradient of the embedding's rows.
        walk.give(activations, stream + self.context(batch));
    }

    /// Whether the gradients of matrices wait.
    fn delays(&self) -> bool {
        self.order == StageOrder::ZeroBubble
    }

    /// What the gradients of a block's matrices are products of: inputs, and gradients of outputs.
    fn factors(&self, group: usize, n: i64) -> i64 {
        let block = &self.blocks[group - 1];
        let of = |layer: &Layer| {
            if layer.trains() { self.sizes.values(n, layer.inputs + layer.outputs) } else { 0 }
        };
        let mlp = match &block.mlp {
            Mlp::Dense(net) => of(&net.gate_up) + of(&net.down),
            Mlp::Mixture(_) => 0,
        };
        of(&block.attention.qkv) + of(&block.attention.o) + mlp
    }

    /// `Llama::finish_weights`
    fn weights(&self, walk: &mut Walk, batch: &BatchShape, gradients: &mut Gradients) {
        let Range { start, end } = self.here.clone();
        for i in (self.lowest.max(start)..end).rev().filter(|i| self.groups[*i].num_trained > 0) {
            self.gradient(walk, i, gradients);
            walk.give(activations, self.factors(i, batch.tokens()));
            self.reduce(walk, i, gradients);
        }
        self.finish_reduction(walk, gradients);
    }

    /// `Sharded::grad`
    fn gradient(&self, walk: &mut Walk, group: usize, gradients: &mut Gradients) {
        let g = &self.groups[group];
        if g.whole_gradient > 0 {
            if gradients.whole.insert(group) {
                walk.take(|p| &mut p.whole_gradients, g.whole_gradient);
            }
        } else if gradients.slices.insert(group) {
            walk.take(|p| &mut p.gradients, g.gradient);
        }
    }

    /// `Sharded::reduce`
    fn reduce(&self, walk: &mut Walk, group: usize, gradients: &mut Gradients) {
        let reduced = gradients.reduced.entry(group).or_default();
        *reduced += 1;
        if self.keep.gradients() && *reduced < gradients.micro_batches {
            return;
        }
        self.finish_reduction(walk, gradients);
        if gradients.whole.remove(&group) {
            walk.take(|p| &mut p.gradients, self.groups[group].gradient);
            gradients.reducing = Some(group);
        }
    }

    fn finish_reduction(&self, walk: &mut Walk, gradients: &mut Gradients) {
        if let Some(group) = gradients.reducing.take() {
            walk.give(|p| &mut p.whole_gradients, self.groups[group].whole_gradient);
            if !gradients.slices.insert(group) {
                // Added to the slice of earlier micro-batches.
                walk.give(|p| &mut p.gradients, self.groups[group].gradient);
            }
        }
    }
}

/// The gradients of a step, as [`Sharded`](crate::distributed::sharded::Sharded) has them.
struct Gradients {
    micro_batches: i64,
    /// Of a group, those of which its gradient is complete.
    reduced: HashMap<usize, i64>,
    /// Groups with a gradient over all values.
    whole: HashSet<usize>,
    /// Groups with a slice of the step's gradient.
    slices: HashSet<usize>,
    /// The group whose gradient is under reduction.
    reducing: Option<usize>,
}

impl Gradients {
    fn of_step(micro_batches: i64) -> Gradients {
        Gradients {
            micro_batches,
            reduced: HashMap::new(),
            whole: HashSet::new(),
            slices: HashSet::new(),
            reducing: None,
        }
    }
}
