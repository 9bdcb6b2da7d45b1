//! The work of a training step, and its time at a known rate.

use super::rates::Rates;
use crate::config::sections::{Compute, Recompute};
use crate::config::shape::Shape;
use crate::distributed::plan::{GroupPlan, Role};

/// What AdamW reads and writes for a parameter: master value, gradient and two moments in float32, and a copy.
const UPDATE_BYTES: f64 = 30.0;

/// The work of a step, over all ranks. An upper bound: rows count as full.
#[derive(Debug, Clone, Copy)]
pub struct StepWork {
    /// Tokens of the sequences that are trained on.
    pub tokens: f64,
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes of parameters and caches that are read with little arithmetic: by updates, and by forwards of one token a row.
    pub read_bytes: f64,
    /// Whether responses are sampled.
    pub samples: bool,
    /// Of the trained model: products of wider models run at a higher rate.
    pub hidden_size: i64,
    /// The dtype of products.
    pub compute: Compute,
    /// Steps of the run, where the configuration tells.
    pub steps: Option<u64>,
    /// Ranks that share the work.
    pub ranks: i64,
}

/// How long a run will take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Seconds of a step.
    pub step_s: f64,
    /// Tokens that are trained on, a second.
    pub tokens_per_s: f64,
    /// Seconds of all steps, without validations and checkpoints, where their number is known.
    pub total_s: Option<f64>,
}

impl StepWork {
    /// The same with fewer tokens: `share` of the full rows.
    pub fn with_tokens(self, share: f64) -> StepWork {
        StepWork { tokens: self.tokens * share, flops: self.flops * share, ..self }
    }

    /// The same in a run of `steps`.
    pub fn with_steps(self, steps: u64) -> StepWork {
        StepWork { steps: Some(steps), ..self }
    }

    /// The time at these rates; none where a rate is unknown.
    pub fn predict(&self, rates: &Rates) -> Option<Prediction> {
        let computing_s = self.flops / rates.flops_per_s(self)?;
        let reading_s = match rates.bytes_per_s(self) {
            Some(rate) => self.read_bytes / rate,
            // The update is a small part of a step, sampling is not.
            None if self.samples => return None,
            None => 0.0,
        };
        let step_s = computing_s + reading_s;
        let total_s = self.steps.map(|steps| step_s * steps as f64);
        Some(Prediction { step_s, tokens_per_s: self.tokens / step_s, total_s })
    }
}

/// Floating-point operations of a forward for a token.
pub fn forward(shape: &Shape, length: i64) -> f64 {
    shape.forward_flops_per_token(length).iter().sum()
}

/// Floating-point operations of forward and backward for a token of a model that is trained as `plans` say. The backward ends
/// below the lowest block of which something is trained, weights that are frozen get no gradient, and blocks alone are computed
/// again.
pub fn forward_and_backward(shape: &Shape, plans: &[GroupPlan], length: i64, recompute: Recompute) -> f64 {
    let [products, attention] = shape.forward_flops_per_token(length);
    let head = 2.0 * (shape.head_rows() * shape.hidden_size) as f64;
    let layers = shape.num_hidden_layers as usize;
    let blocks = plans.get(1..=layers).unwrap_or_default();
    let trains = |plan: &GroupPlan| plan.roles.contains(&Role::Trained) || !plan.adapters.is_empty();
    let first = if plans.first().is_some_and(trains) { Some(0) } else { blocks.iter().position(trains) };
    // Shares of the blocks that the backward passes, of their weights that are trained, and of them that are computed again.
    let passed = first.map_or(0.0, |first| (blocks.len() - first) as f64 / blocks.len().max(1) as f64);
    let (mut trained, mut all, mut adapters) = (0.0, 0.0, 0.0);
    for plan in blocks {
        for (spec, role) in plan.layout.specs.iter().zip(&plan.roles).filter(|(spec, _)| spec.shape.len() > 1)
        {
            let taken = share_of_tokens(shape, &spec.name) * numel(&spec.shape);
            all += taken;
            trained += if *role == Role::Trained { taken } else { 0.0 };
        }
        for adapter in &plan.adapters {
            let taken = share_of_tokens(shape, &plan.layout.specs[adapter.target].name);
            adapters += taken * adapter.shapes(&plan.layout).iter().map(|shape| numel(shape)).sum::<f64>();
        }
    }
    let weights = if all > 0.0 { trained / all } else { 0.0 };
    let again = if recompute == Recompute::Full { passed } else { 0.0 };
    let head_group = if shape.tie_word_embeddings { 0 } else { layers + 1 };
    let head_is_trained =
        plans.get(head_group).is_some_and(|plan| plan.roles.first() == Some(&Role::Trained));
    (products - head) * (1.0 + passed + weights + again)
        + attention * (1.0 + 2.0 * passed + again)
        + head * if head_is_trained { 3.0 } else { 2.0 }
        + adapters * (6.0 + 2.0 * again)
}

fn numel(shape: &[i64]) -> f64 {
    shape.iter().product::<i64>() as f64
}

/// The share of the tokens that go to an expert; 1 for weights that all tokens take.
fn share_of_tokens(shape: &Shape, name: &str) -> f64 {
    match &shape.experts {
        Some(e) if name.contains(".experts.") => e.num_experts_per_tok as f64 / e.num_local_experts as f64,
        _ => 1.0,
    }
}

/// Bytes that an update of what is trained reads and writes.
pub fn update_bytes(plans: &[GroupPlan]) -> f64 {
    plans.iter().map(|plan| plan.trained().numel as f64).sum::<f64>() * UPDATE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::trainable::{BaseFormat, Freeze, Lora, Targets};
    use crate::model::{Trainable, layout};

    fn shape() -> Shape {
        Shape::preset("llama-15m").unwrap()
    }

    #[test]
    fn a_whole_training_is_three_forwards() {
        let plans: Vec<GroupPlan> = layout::layouts(&shape()).into_iter().map(GroupPlan::from).collect();
        let whole = forward_and_backward(&shape(), &plans, 256, Recompute::None);
        assert!((whole / shape().flops_per_token(256) - 1.0).abs() < 1e-12);
        let again = forward_and_backward(&shape(), &plans, 256, Recompute::Full);
        let head = 2.0 * (shape().head_rows() * shape().hidden_size) as f64;
        let expected = 4.0 * forward(&shape(), 256) - head;
        assert!((again / expected - 1.0).abs() < 1e-12, "blocks alone are computed again");
    }

    #[test]
    fn adapters_save_the_gradients_of_weights() {
        let lora = Lora {
            rank: 8,
            alpha: None,
            dropout: 0.0,
            targets: Targets::AllLinear,
            rslora: false,
            modules_to_save: Vec::new(),
            base: BaseFormat::None,
        };
        let plans = Trainable::new(&Freeze::default(), Some(&lora)).plans(&shape()).unwrap();
        let share = forward_and_backward(&shape(), &plans, 256, Recompute::None) / forward(&shape(), 256);
        assert!((2.0..2.4).contains(&share), "{share}");
    }

    #[test]
    fn frozen_blocks_below_save_their_backward() {
        let freeze = Freeze { train_only: vec!["model.layers.5".into()], ..Freeze::default() };
        let plans = Trainable::new(&freeze, None).plans(&shape()).unwrap();
        let work = forward_and_backward(&shape(), &plans, 256, Recompute::None);
        let [products, attention] = shape().forward_flops_per_token(256);
        let head = 2.0 * (shape().head_rows() * shape().hidden_size) as f64;
        // All of the forward; the head's input; the last of six blocks, its input and its weights.
        let expected = products + attention + head + (products - head) / 3.0 + attention / 3.0;
        assert!((work / expected - 1.0).abs() < 1e-9, "{work} and {expected}");
    }

    #[test]
    fn an_expert_takes_a_share_of_the_tokens() {
        let shape = Shape::preset("mixtral-8x7b").unwrap();
        let plans: Vec<GroupPlan> = layout::layouts(&shape).into_iter().map(GroupPlan::from).collect();
        let whole = forward_and_backward(&shape, &plans, 256, Recompute::None);
        assert!((whole / shape.flops_per_token(256) - 1.0).abs() < 1e-9);
    }
}
