//! The bytes that a rank sends to others in a training step, by axis of the mesh, as rings send them: of n ranks each sends
//! (n - 1) / n of what is gathered or scattered, and twice that of what is reduced on all.

use std::ops::Range;

use serde::Serialize;

use super::memory::Memory;
use super::parts::BatchShape;
use crate::config::sections::Recompute;
use crate::config::shape::Norms;
use crate::distributed::cut::Share;
use crate::model::mlp::Mlp;

/// Bytes of a rank in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Traffic {
    /// Gathers of parameters and reductions of gradients over the ranks of one copy.
    pub shard: f64,
    /// Sums of gradients over copies.
    pub replicate: f64,
    /// Activations between ranks that share every matrix.
    pub tensor: f64,
    /// Keys, values and their gradients between ranks that share every sequence.
    pub context: f64,
    /// Activations to the next stage and gradients to the one before.
    pub pipeline: f64,
}

impl Traffic {
    /// Over all axes.
    pub fn total(&self) -> f64 {
        self.shard + self.replicate + self.tensor + self.context + self.pipeline
    }
}

fn ring(ranks: i64, bytes: i64) -> f64 {
    bytes as f64 * (ranks - 1) as f64 / ranks as f64
}

impl Memory {
    /// Of a step over a batch.
    pub fn traffic(&self, batch: &BatchShape) -> Traffic {
        let own = batch.shared_by(self.context);
        let micro_batches = batch.micro_batches as f64;
        let (shard, replicate) = self.of_parameters(batch.micro_batches);
        let tensor = micro_batches * self.of_rows(&own) + self.of_summed();
        let context = micro_batches * self.of_sequences(&own);
        Traffic { shard, replicate, tensor, context, pipeline: self.of_stages(&own) }
    }

    /// To the neighbours in the pipeline, and of a tied embedding's gradient between the ends.
    fn of_stages(&self, batch: &BatchShape) -> f64 {
        let stream = self.stream(batch.tokens());
        // The load of experts, and what their routers get in the backward.
        let experts = self.shape.experts.as_ref().map_or(0, |e| e.num_local_experts);
        let (sums, of_each) = match experts {
            0 => (0, 0),
            n => (2 * n * self.sizes.a, n * self.sizes.a),
        };
        let forward = if self.is_last() { 0 } else { stream + sums };
        let backward = if self.is_first() || self.lowest >= self.here.start { 0 } else { stream + of_each };
        let shared = |i: &usize| self.plans[*i].stage.here && self.plans[*i].stage.also.is_some();
        let slices: i64 = (0..self.groups.len()).filter(shared).map(|i| self.groups[i].gradient).sum();
        (batch.micro_batches * (forward + backward)) as f64 + 2.0 * ring(2, slices)
    }

    /// Over the shard and the replica group.
    fn of_parameters(&self, micro_batches: i64) -> (f64, f64) {
        let (here, head) = (self.here.clone(), self.head_group());
        let (mut shard, mut replicate) = (0.0, 0.0);
        for (i, group) in self.groups.iter().enumerate() {
            // Forward and backward; the last block stays for its backward, and a tied embedding comes back for the head.
            let uses = match i {
                0 if head == 0 && self.blocks.len() > 1 && self.stage.size == 1 => 2,
                i if (here.start..here.end - 1).contains(&i) && i >= self.lowest => 2,
                _ => 1,
            };
            let gathers = if self.keep.values() { 1 } else { uses * micro_batches };
            let reductions = if self.keep.gradients() { 1 } else { micro_batches };
            shard += ring(self.ranks, gathers * group.gathered + reductions * group.whole_gradient);
            replicate += 2.0 * ring(self.replicas, group.gradient);
        }
        (shard, replicate)
    }

    /// Over tensor-parallel ranks, in a micro-batch.
    fn of_rows(&self, batch: &BatchShape) -> f64 {
        let (ranks, n, c, a) = (self.sizes.tensor, batch.tokens(), self.shape.hidden_size, self.sizes.a);
        if ranks == 1 {
            return 0.0;
        }
        let all = self.sizes.values(n, c);
        let (gather, sum) = match self.sizes.sequence {
            true => (ring(ranks, all), ring(ranks, n * c * a)),
            false => (0.0, 2.0 * ring(ranks, n * c * a)),
        };
        let (layers, trained) = self.layers_here();
        let again = match (batch.recompute, self.shape.features.norms) {
            (Recompute::Full, Norms::Before) => 2.0 * gather + sum,
            (Recompute::Full, _) => 2.0 * gather + 2.0 * sum,
            _ => 0.0,
        };
        let Range { start, end } = self.here.clone();
        let routed: i64 = self.blocks[self.lowest.clamp(start, end) - 1..end - 1]
            .iter()
            .map(|block| match &block.mlp {
                Mlp::Mixture(mixture) => n * mixture.per_token * a,
                Mlp::Dense(_) => 0,
            })
            .sum();
        // Below the lowest block that is trained nothing needs a gradient.
        let unneeded = if self.here.contains(&self.lowest) { sum } else { 0.0 };
        let blocks =
            layers * (2.0 * gather + 2.0 * sum) + trained * (4.0 * gather + 2.0 * sum + again) - unneeded;
        let embedding = match self.is_first() {
            true => sum + if self.lowest == 0 { gather } else { 0.0 },
            false => 0.0,
        };
        // The largest logit, and two sums for each token; the gradient of all hidden states.
        let head = match self.is_last() {
            true => gather + 2.0 * ring(ranks, n * c * a + 3 * n * a),
            false => 0.0,
        };
        blocks + embedding + head + 2.0 * ring(ranks, routed)
    }

    /// Over tensor-parallel ranks, once a step: gradients that each has a part of.
    fn of_summed(&self) -> f64 {
        let (ranks, a) = (self.sizes.tensor, self.sizes.a);
        let trained = self.plans.iter().filter(|plan| plan.stage.here).map(|plan| plan.trained());
        let numel: i64 = trained
            .flat_map(|layout| layout.specs)
            .map(|spec| match spec.share {
                Share::Summed => spec.numel(),
                // In a place for each rectangle.
                Share::Cut(cut) if cut.copies > 1 => spec.numel() * ranks / cut.copies,
                Share::Whole | Share::Cut(_) => 0,
            })
            .sum();
        2.0 * ring(ranks, numel * a / self.ranks)
    }

    /// Blocks of this stage, and those of them from the lowest that is trained on.
    fn layers_here(&self) -> (f64, f64) {
        let Range { start, end } = self.here;
        ((end - start) as f64, (end - self.lowest.clamp(start, end)) as f64)
    }

    /// Over ranks that share sequences, in a micro-batch.
    fn of_sequences(&self, batch: &BatchShape) -> f64 {
        let s = &self.local;
        let kv = 2 * s.num_key_value_heads * s.head_dim * batch.tokens() * self.context;
        let gather = ring(self.context, self.sizes.values(kv, 1));
        let (layers, trained) = self.layers_here();
        let again = if batch.recompute == Recompute::Full { gather } else { 0.0 };
        layers * gather + trained * (gather + ring(self.context, kv * self.sizes.a) + again)
    }
}
