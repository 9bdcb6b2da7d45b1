//! The bytes that a rank sends to others in a training step, by axis of the mesh, as rings send them: of n ranks each sends
//! (n - 1) / n of what is gathered or scattered, and twice that of what is reduced on all.

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
        Traffic { shard, replicate, tensor, context: micro_batches * self.of_sequences(&own) }
    }

    /// Over the shard and the replica group.
    fn of_parameters(&self, micro_batches: i64) -> (f64, f64) {
        let (last, head) = (self.blocks.len(), self.head_group());
        let (mut shard, mut replicate) = (0.0, 0.0);
        for (i, group) in self.groups.iter().enumerate() {
            // Forward and backward; the last block stays for its backward, and a tied embedding comes back for the head.
            let uses = match i {
                0 if head == 0 && last > 1 => 2,
                i if (1..last).contains(&i) && i >= self.lowest => 2,
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
        let layers = self.blocks.len();
        let trained = (layers + 1 - self.lowest.max(1)) as f64;
        let again = match (batch.recompute, self.shape.features.norms) {
            (Recompute::Full, Norms::Before) => 2.0 * gather + sum,
            (Recompute::Full, _) => 2.0 * gather + 2.0 * sum,
            _ => 0.0,
        };
        let routed: i64 = self.blocks[self.lowest.max(1) - 1..]
            .iter()
            .map(|block| match &block.mlp {
                Mlp::Mixture(mixture) => n * mixture.per_token * a,
                Mlp::Dense(_) => 0,
            })
            .sum();
        // Below the lowest block that is trained nothing needs a gradient.
        let unneeded = if self.lowest > 0 { sum } else { 0.0 };
        let blocks = layers as f64 * (2.0 * gather + 2.0 * sum)
            + trained * (4.0 * gather + 2.0 * sum + again)
            - unneeded;
        let embedding = sum + if self.lowest == 0 { gather } else { 0.0 };
        // The largest logit, and two sums for each token; the gradient of all hidden states.
        let head = gather + 2.0 * ring(ranks, n * c * a + 3 * n * a);
        blocks + embedding + head + 2.0 * ring(ranks, routed)
    }

    /// Over tensor-parallel ranks, once a step: gradients that each has a part of.
    fn of_summed(&self) -> f64 {
        let (ranks, a) = (self.sizes.tensor, self.sizes.a);
        let trained = self.plans.iter().map(|plan| plan.trained());
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

    /// Over ranks that share sequences, in a micro-batch.
    fn of_sequences(&self, batch: &BatchShape) -> f64 {
        let s = &self.local;
        let kv = 2 * s.num_key_value_heads * s.head_dim * batch.tokens() * self.context;
        let gather = ring(self.context, self.sizes.values(kv, 1));
        let layers = self.blocks.len();
        let trained = (layers + 1 - self.lowest.max(1)) as f64;
        let again = if batch.recompute == Recompute::Full { gather } else { 0.0 };
        layers as f64 * gather + trained * (gather + ring(self.context, kv * self.sizes.a) + again)
    }
}
