//! A model in stages: which groups each stage of a pipeline has (its blocks, the first one the embedding, the last one the head), and
//! what it takes and gives.

use kernels::ops::accumulator;
use kernels::trace;
use tch::Tensor;

use crate::config::parallel::StageOrder;
use crate::config::shape::Shape;
use crate::distributed::mesh::Place;
use crate::distributed::pipeline::{Expected, blocks_of_stages};
use crate::distributed::plan::{GroupPlan, OnStage};
use crate::error::{Error, Result};
use crate::model::Recompute;
use crate::model::input::{ModelInput, only};
use crate::model::llama::{Llama, Tape, WeightsLeft};
use crate::model::mixture::Balance;

/// A model's groups as they are for a rank of this stage. `given`: blocks of each stage; none: divided evenly. A tied embedding is
/// on the first stage and on the last.
///
/// # Errors
/// Of kind Config: stages without blocks, or whose blocks are not the model's.
pub fn on_stages(
    mut plans: Vec<GroupPlan>,
    shape: &Shape,
    stage: Place,
    given: Option<&[i64]>,
) -> Result<Vec<GroupPlan>> {
    if stage.size == 1 {
        return Ok(plans);
    }
    let blocks = blocks(shape, stage.size, given)?;
    let last = stage.size - 1;
    let of_blocks = (0..).zip(blocks).flat_map(|(stage, n)| (0..n).map(move |_| stage));
    let owners = std::iter::once(0).chain(of_blocks).chain(std::iter::once(last));
    for (i, (plan, owner)) in plans.iter_mut().zip(owners).enumerate() {
        let also = (i == 0 && shape.tie_word_embeddings).then_some(last);
        plan.stage = OnStage { owner, also, here: owner == stage.rank || also == Some(stage.rank) };
    }
    Ok(plans)
}

fn blocks(shape: &Shape, stages: i64, given: Option<&[i64]>) -> Result<Vec<i64>> {
    let all = shape.num_hidden_layers;
    if stages > all {
        let why = format!("{stages} stages are more than the model's {all} blocks");
        return Err(Error::key("parallel.pipeline", why));
    }
    let blocks = blocks_of_stages(all, stages, given);
    let sum: i64 = blocks.iter().sum();
    if sum != all {
        let why = format!("{blocks:?} are {sum} blocks, and the model has {all}");
        return Err(Error::key("parallel.stages", why));
    }
    if let Some(stage) = blocks.iter().position(|n| *n < 1) {
        return Err(Error::key("parallel.stages", format!("stage {stage} has no blocks in {blocks:?}")));
    }
    Ok(blocks)
}

/// Refuses an order in which this model cannot be computed.
pub fn check_order(shape: &Shape, order: StageOrder) -> Result<()> {
    match order == StageOrder::ZeroBubble && shape.experts.is_some() {
        true => Err(Error::key(
            "parallel.schedule",
            "zero_bubble is not built for mixtures of experts; set it to 1f1b",
        )),
        false => Ok(()),
    }
}

impl Llama {
    /// [`Llama::forward`] of this rank's stage. `before`: what the stage before gives (see [`Llama::stage_outputs`]); none on the first.
    /// Returns what the next stage takes, on the last one the hidden states, T [N, C].
    pub fn forward_stage(
        &mut self,
        input: &ModelInput,
        before: Option<Vec<Tensor>>,
        recompute: Recompute,
    ) -> Result<(Vec<Tensor>, Tape)> {
        let (after, tape) = self.run(input, before, Some(recompute))?;
        Ok((after, tape.ok_or_else(|| Error::failed("a forward for training keeps a tape"))?))
    }

    /// [`Llama::hidden`] of this rank's stage.
    pub fn hidden_stage(&mut self, input: &ModelInput, before: Option<Vec<Tensor>>) -> Result<Vec<Tensor>> {
        Ok(self.run(input, before, None)?.0)
    }

    /// [`Llama::backward`] of this rank's stage: of the gradients of what [`Llama::forward_stage`] gave those of what it took; none
    /// where the stages before need none. `later`: takes what [`Llama::finish_weights`] is then to do for the gradients of the blocks'
    /// matrices; none: that is done here.
    pub fn backward_stage(
        &mut self,
        dafter: Vec<Tensor>,
        mut tape: Tape,
        later: Option<&mut WeightsLeft>,
    ) -> Result<Option<Vec<Tensor>>> {
        if let (Some(balance), Some(router)) = (&mut tape.balance, dafter.get(1)) {
            balance.set_router_gradient(router.shallow_clone());
        }
        let dx = self.backward_blocks(only(dafter)?, &mut tape, later)?;
        let dbefore = match dx {
            Some(dx) if self.params.sharding().pipeline.is_first() => {
                self.embed_backward(tape.context.rows.gather(dx)?, &tape.ids)?;
                None
            }
            Some(dx) => {
                let router =
                    tape.balance.as_ref().and_then(Balance::router_gradient).map(Tensor::shallow_clone);
                Some(std::iter::once(dx).chain(router).collect())
            }
            None => None,
        };
        self.params.end_micro_batch()?;
        Ok(dbefore)
    }

    /// Does what backwards have left for the gradients of matrices.
    pub fn finish_weights(&mut self, left: WeightsLeft) -> Result<()> {
        for (i, products) in left {
            if let Some(flat) = self.params.grad_as(i, Some(&products)) {
                let span = trace::computing(|| format!("block {}: gradients of matrices", i - 1));
                products.add_to(flat.flat())?;
                drop(span);
                self.params.reduce(i)?; // collective, overlaps the products of the next block
            }
        }
        Ok(())
    }

    /// What one stage gives the next of an input: the stream, T [n, C], and for a training of a mixture of experts the sums of their
    /// load, A [2 E].
    pub fn stage_outputs(&self, input: &ModelInput, training: bool) -> Result<Vec<Expected>> {
        let experts = self.shape.experts.as_ref().filter(|_| training);
        let sums = experts.map(|e| (vec![2 * e.num_local_experts], accumulator(self.params.compute())));
        Ok(std::iter::once(self.stream(input)?).chain(sums).collect())
    }

    /// What one stage gives the stage before in a backward: the gradient of the stream, T [n, C], and where the load of experts is
    /// `balanced` that of each router's probabilities, A `[E]`.
    pub fn stage_gradients(&self, input: &ModelInput, balanced: bool) -> Result<Vec<Expected>> {
        let experts = self.shape.experts.as_ref().filter(|_| balanced);
        let router = experts.map(|e| (vec![e.num_local_experts], accumulator(self.params.compute())));
        Ok(std::iter::once(self.stream(input)?).chain(router).collect())
    }

    /// Size and dtype of the stream of an input.
    fn stream(&self, input: &ModelInput) -> Result<Expected> {
        let size = input.ids.size();
        let tokens = self.shared_sequence([size[0], size[1]])?.tokens();
        let rows = self.shared_rows(tokens, true).rows_here(tokens);
        Ok((vec![rows, self.shape.hidden_size], self.params.compute()))
    }

    /// Whether this stage's output has a gradient: something here or before is trained.
    pub fn has_backward(&self) -> bool {
        self.params.sharding().pipeline.is_last() || self.params.first_trained() < self.blocks.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::layout::layouts;

    fn here(shape: &Shape, rank: i64, size: i64, given: Option<&[i64]>) -> Vec<usize> {
        let plans = layouts(shape).into_iter().map(GroupPlan::from).collect();
        let plans = on_stages(plans, shape, Place { rank, size }, given).unwrap();
        (0..plans.len()).filter(|i| plans[*i].stage.here).collect()
    }

    #[test]
    fn every_group_is_on_a_stage() {
        let shape = |tied| Shape {
            num_hidden_layers: 5,
            tie_word_embeddings: tied,
            ..Shape::preset("llama-15m").unwrap()
        };
        let stages = |tied, given| (0..3).map(move |rank| here(&shape(tied), rank, 3, given));
        assert!(stages(false, None).eq([vec![0, 1, 2], vec![3, 4], vec![5, 6]]));
        assert!(stages(true, Some(&[1, 3, 1])).eq([vec![0, 1], vec![2, 3, 4], vec![0, 5]]));
        let refused = |stages, given| blocks(&shape(false), stages, given).unwrap_err().to_string();
        assert!(refused(6, None).contains("6 stages are more than the model's 5 blocks"));
        assert!(refused(2, Some(&[5, 0])).contains("stage 1 has no blocks"));
        assert!(refused(2, Some(&[2, 2])).contains("[2, 2] are 4 blocks, and the model has 5"));
    }
}
