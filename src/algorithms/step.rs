//! The training step that all algorithms share: micro-batches in, one update out.

use std::collections::VecDeque;

use kernels::comm::ReduceOp;
use kernels::ops;
use kernels::trace::{self, OpenSpan};
use tch::{Kind, Tensor};

use crate::algorithms::losses::read_scalars;
use crate::config::parallel::StageOrder;
use crate::config::sections::TrainSection;
use crate::distributed::pipeline::Transfers;
use crate::distributed::schedule::Pass;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::model::head::LogProbs;
use crate::model::llama::{Tape, WeightsLeft};
use crate::model::{Llama, LmHead, ModelInput, Recompute, ScoreHead};
use crate::optim::AdamW;

/// Some rows of a batch: what one forward and backward takes.
pub struct MicroBatch {
    /// Token ids of the rows, with what else the forward needs.
    pub input: ModelInput,
    /// The token that each position is to predict, int64 `[N]`; negative = left out of the loss.
    pub labels: Tensor,
}

impl MicroBatch {
    /// From rows of `columns` token ids and labels, one after the other.
    pub fn from_rows(input_ids: &[i64], labels: &[i64], columns: i64) -> MicroBatch {
        let ids = Tensor::from_slice(input_ids).view([-1, columns]);
        MicroBatch { input: ModelInput::new(ids), labels: Tensor::from_slice(labels) }
    }
}

/// What the micro-batches of this rank add to the losses of a step.
#[derive(Debug, Clone, Copy)]
pub struct Sums {
    /// The loss, over what the step counts (see [`apply_gradients`]).
    pub loss: f64,
    /// The load-balancing losses of the micro-batches, each times the micro-batch's share of the step's labelled tokens;
    /// none where the load of experts was not balanced.
    pub aux_loss: Option<f64>,
}

/// A micro-batch and what it adds to the loss of a step. Rows that a loss couples (pairs, groups) are in one micro-batch.
pub struct StepEntry<'a> {
    /// The rows, and the labels of their positions.
    pub batch: &'a MicroBatch,
    /// What they add to the loss.
    pub objective: Objective<'a>,
    /// A weight of the load-balancing loss of a mixture of experts, and the share of the step that this micro-batch is.
    pub balance: Option<(f64, f64)>,
}

/// A scalar function of what a head gives, which libtorch's autograd differentiates.
pub type Loss<'a, T> = Box<dyn FnMut(&T) -> Result<Tensor> + 'a>;

/// A part of a step's loss, as a function of what the model's head gives for a micro-batch.
pub enum Objective<'a> {
    /// -weight times the sum of the labels' log-probabilities: cross-entropy.
    CrossEntropy {
        /// 1 / the labelled tokens of the step, for a mean over them.
        weight: f64,
    },
    /// Any function of the labels' log-probabilities, A `[N]` (0 where there is no label), at a temperature, and of the
    /// entropies, if they are asked for (and differentiated if it depends on them, not if it only reads their values). It
    /// returns a scalar, which libtorch's autograd differentiates.
    LogProbs {
        /// Divides the logits.
        temperature: f64,
        /// Whether the head gives entropies, too.
        entropies: bool,
        /// Takes the log-probabilities and entropies of the micro-batch, and returns a scalar.
        loss: Loss<'a, LogProbs>,
    },
    /// Any function of the values that a scalar head gives, A `[N]`; the batch's labels are not read. It returns a scalar,
    /// too.
    Values {
        /// Takes the values of the micro-batch, A `[N]`, and returns a scalar.
        loss: Loss<'a, Tensor>,
    },
}

/// A scalar function's value at `leaves`, and its gradients there; none for leaves that it does not depend on.
pub fn differentiate(
    leaves: &[&Tensor],
    f: impl FnOnce(&[Tensor]) -> Result<Tensor>,
) -> Result<(Tensor, Vec<Option<Tensor>>)> {
    let leaves: Vec<Tensor> = leaves.iter().map(|t| t.detach().set_requires_grad(true)).collect();
    let value = tch::with_grad(|| f(&leaves))?;
    if value.requires_grad() {
        value.f_backward()?;
    }
    let gradient = |leaf: &Tensor| Some(leaf.grad()).filter(Tensor::defined);
    Ok((value.detach(), leaves.iter().map(gradient).collect()))
}

/// The spans of a step's timeline.
#[derive(Debug, Clone, Copy)]
pub enum PassName {
    /// Of a micro-batch, on one stage.
    Forward,
    /// What of a backward does not wait.
    Backward,
    /// The gradients of matrices that have waited.
    Weights,
    /// Of all micro-batches, what is waited for included.
    All,
}

impl PassName {
    /// How its name begins.
    pub fn prefix(self) -> &'static str {
        match self {
            PassName::Forward => "forward of micro-batch",
            PassName::Backward => "backward of micro-batch",
            PassName::Weights => "gradients of matrices of micro-batch",
            PassName::All => "forwards and backwards",
        }
    }

    fn span(self, k: usize) -> Option<OpenSpan> {
        trace::computing(|| format!("{} {k}", self.prefix()))
    }
}

/// Forward and backward of the sum of `entries`. Leaves the gradients in the parameters' slices; returns each entry's loss,
/// and the load-balancing losses, each times its share. Collective where parameters are sharded: all ranks give equally many
/// entries. The host waits for the device once, at the end, for what the losses themselves do not read. Of stages all take the same
/// entries, and the last one knows the losses; they are 0 on the others.
pub fn accumulate(
    model: &mut Llama,
    entries: &mut [StepEntry],
    recompute: Recompute,
) -> Result<(Vec<f64>, Option<f64>)> {
    let (mut losses, mut aux_losses) = (Vec::new(), Vec::new()); // scalars on the device
    let pipeline = model.params.sharding().pipeline.clone();
    let mut transfers = Transfers::new(&pipeline, entries.len(), model.params.device());
    // Of micro-batches between their forward and backward, in order; on the last stage with the gradient of the hidden states.
    let mut under_way: VecDeque<(Tape, Option<Tensor>)> = VecDeque::new();
    let mut weights_left: VecDeque<WeightsLeft> = VecDeque::new();
    model.params.begin_step_gradients(entries.len());
    let all = trace::computing(|| PassName::All.prefix().into());
    for pass in pipeline.passes(entries.len()) {
        match pass {
            Pass::Forward(k) => {
                let before =
                    transfers.receive_activations(|k| model.stage_outputs(&entries[k].batch.input, true))?;
                let entry = &mut entries[k];
                // Before the forward is queued: a copy after it would wait for it.
                let labels = match pipeline.is_last() {
                    true => Some(upload_labels(model, entry.batch)?),
                    false => None,
                };
                let span = PassName::Forward.span(k);
                let (after, mut tape) = model.forward_stage(&entry.batch.input, before, recompute)?; // collective
                let dhidden = match labels {
                    None => None,
                    Some(labels) => {
                        let (loss, dhidden) = objective(model, &mut entry.objective, &after[0], &labels)?;
                        losses.push(loss);
                        if let Some((weight, share)) = entry.balance {
                            aux_losses.extend(tape.balance_loss(weight * share)?.map(|loss| loss * share));
                        }
                        Some(dhidden)
                    }
                };
                drop(span);
                transfers.send_activations(&after)?;
                under_way.push_back((tape, dhidden));
            }
            Pass::Backward(k) => {
                let (tape, dhidden) = under_way
                    .pop_front()
                    .ok_or_else(|| Error::failed("a backward comes after its forward"))?;
                if !model.has_backward() {
                    model.params.end_micro_batch()?;
                    continue;
                }
                let dafter = match dhidden {
                    Some(dhidden) => vec![dhidden],
                    None => {
                        let expected = |k: usize| {
                            model.stage_gradients(&entries[k].batch.input, entries[k].balance.is_some())
                        };
                        let received = transfers.receive_gradients(expected)?;
                        received.ok_or_else(|| Error::failed(format!("micro-batch {k} has no gradient")))?
                    }
                };
                let span = PassName::Backward.span(k);
                let mut left = (pipeline.order == StageOrder::ZeroBubble).then(WeightsLeft::new);
                let dbefore = model.backward_stage(dafter, tape, left.as_mut())?; // collective: gathers and reductions overlap it
                weights_left.extend(left);
                drop(span);
                if let Some(dbefore) = dbefore {
                    transfers.send_gradients(&dbefore)?;
                }
            }
            Pass::Weights(k) => {
                let _span = PassName::Weights.span(k);
                // None where the stage has no backward.
                let left = weights_left.pop_front().unwrap_or_default();
                model.finish_weights(left)?; // collective: reductions
            }
        }
    }
    transfers.finish()?;
    drop(all);
    model.params.finish_step_gradients()?;
    let num_losses = losses.len();
    losses.extend(aux_losses);
    let mut values = read_scalars(&losses)?;
    let aux_losses = values.split_off(num_losses);
    values.resize(entries.len(), 0.0);
    let balanced = entries.iter().any(|entry| entry.balance.is_some());
    Ok((values, balanced.then(|| aux_losses.iter().sum())))
}

/// The labels of the tokens that this rank's forward gives hidden states of, int64 `[N]`, where the model computes.
fn upload_labels(model: &Llama, batch: &MicroBatch) -> Result<Tensor> {
    let labels = model.own_tokens(&batch.labels, &batch.input.ids)?;
    Ok(ops::upload(&labels, model.params.device())?)
}

/// The loss of hidden states T [N, C] and their gradient, T [N, C].
fn objective(
    model: &mut Llama,
    objective: &mut Objective,
    hidden: &Tensor,
    labels: &Tensor,
) -> Result<(Tensor, Tensor)> {
    Ok(match objective {
        Objective::CrossEntropy { weight } => {
            let kind = ops::accumulator(hidden.kind());
            let coefs = Tensor::full([labels.size()[0]], -*weight, (kind, hidden.device())); // [N]
            let (logprobs, dhidden) = LmHead::linear_loss(model, hidden, labels, &coefs)?; // [N], [N, C]
            (logprobs.sum(Kind::Double) * -*weight, dhidden)
        }
        Objective::LogProbs { temperature, entropies, loss } => {
            let out = LmHead::logprobs(model, hidden, labels, *temperature, *entropies)?; // [N] each
            let mut leaves = vec![&out.logprobs];
            leaves.extend(&out.entropies);
            let (value, gradients) = differentiate(&leaves, |leaves| {
                let entropies = leaves.get(1).map(Tensor::shallow_clone);
                loss(&LogProbs { logprobs: leaves[0].shallow_clone(), entropies })
            })?;
            // Entropies that are only told have no gradient, and so no backward.
            let [logprobs, entropies] = [0, 1].map(|i| gradients.get(i).and_then(Option::as_ref));
            let gradients = LogProbs {
                logprobs: logprobs.map_or_else(|| out.logprobs.zeros_like(), Tensor::shallow_clone),
                entropies: entropies.map(Tensor::shallow_clone),
            };
            let dhidden = LmHead::backward(model, hidden, labels, *temperature, &gradients)?; // [N, C]
            (value, dhidden)
        }
        Objective::Values { loss } => {
            let values = ScoreHead::values(model, hidden)?; // [N]
            let (value, mut gradients) = differentiate(&[&values], |leaves| loss(&leaves[0]))?;
            let gradient = gradients.remove(0).unwrap_or_else(|| values.zeros_like()); // [N]
            (value, ScoreHead::backward(model, hidden, &gradient)?)
        }
    })
}

/// Forward and backward of the mean cross-entropy over `count` labelled tokens (of all ranks and micro-batches). Leaves
/// the gradients in the parameters' slices.
pub fn accumulate_gradients(
    model: &mut Llama,
    micro_batches: &[MicroBatch],
    count: f64,
    recompute: Recompute,
) -> Result<Sums> {
    accumulate_balanced(model, micro_batches, count, recompute, None)
}

/// [`accumulate_gradients`] of the loss + `coef` times the load-balancing loss of a mixture of experts, if `coef` is
/// given. That loss is no sum over tokens: the step's is the mean of the micro-batches', weighted by their labelled
/// tokens.
pub fn accumulate_balanced(
    model: &mut Llama,
    micro_batches: &[MicroBatch],
    count: f64,
    recompute: Recompute,
    coef: Option<f64>,
) -> Result<Sums> {
    let entry = |batch| {
        let balance = |coef| (coef, num_labels(batch) / count);
        let objective = Objective::CrossEntropy { weight: 1.0 / count };
        StepEntry { batch, objective, balance: coef.map(balance) }
    };
    let mut entries: Vec<StepEntry> = micro_batches.iter().map(entry).collect();
    let (losses, aux_loss) = accumulate(model, &mut entries, recompute)?;
    Ok(Sums { loss: losses.iter().sum(), aux_loss: aux_loss.or(coef.map(|_| 0.0)) })
}

fn num_labels(batch: &MicroBatch) -> f64 {
    batch.labels.ge(0).sum(Kind::Double).double_value(&[])
}

/// The micro-batches of this rank in a step of `train.batch_size` rows, which are divided among the ranks in order, then into
/// micro-batches in order: each one's first row within the step, and its rows. In a step of fewer `rows` what is beyond them
/// has 0 rows: all ranks have equally many micro-batches.
pub fn division(train: &TrainSection, rows: u64, world: &World) -> impl Iterator<Item = (u64, u64)> {
    let micro = train.micro_batch_size(world.mesh.data.size) as usize;
    let mine = world.mesh.data.share(train.batch_size as usize);
    mine.step_by(micro).map(move |first| (first as u64, rows.saturating_sub(first as u64).min(micro as u64)))
}

/// The micro-batches of this rank in a pass over `total` rows: each one's first row, and its rows. All ranks get equally many,
/// since they gather weights together: beyond the end, of 0 rows.
pub fn rounds(total: u64, train: &TrainSection, world: &World) -> impl Iterator<Item = (u64, u64)> {
    let data = &world.mesh.data;
    let round = (train.micro_batch_size(data.size) * data.size) as u64;
    let mine = data.share(round as usize);
    (0..total.div_ceil(round)).map(move |i| {
        let first = i * round + mine.start as u64;
        (first, total.saturating_sub(first).min(mine.len() as u64))
    })
}

/// Whether a validation is to end before its end, the same on all ranks. Collective.
pub type StopCheck<'a> = &'a mut dyn FnMut() -> Result<bool>;

/// What an update did.
pub struct Update {
    /// The loss of the step, over all ranks, before the update: a mean cross-entropy is in nats.
    pub loss: f64,
    /// The load-balancing loss of the step (see [`accumulate_balanced`]), where there is one.
    pub aux_loss: Option<f64>,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The update was left out, by all ranks together, because the loss or the gradient was not finite.
    pub skipped: bool,
}

/// Clips and applies the gradients of the step, or forgets them if they are not finite. The step's loss is the sum of all
/// ranks' `sums`, whose entries have been divided by what the step counts.
pub fn apply_gradients(
    model: &mut Llama,
    optimizer: &mut AdamW,
    world: &World,
    sums: Sums,
    lr: f64,
    clip: f64,
) -> Result<Update> {
    // Ranks that hold equal slices each count a part of theirs: one sum over all ranks, so that all have the same bits.
    let squares = AdamW::sum_squares(&model.params)? / model.params.replica_group().size() as f64; // host sync
    // Ranks that share every matrix have the same rows, and the same losses: those of the first count. Of stages the last has them.
    let once = |counts: bool| if counts { 1.0 } else { 0.0 };
    let first = world.mesh.tensor.rank == 0;
    let mut values = vec![once(first) * sums.loss, squares];
    // Those that share the sequences have parts of the loss; of experts' load each has counted all.
    values.extend(sums.aux_loss.map(|loss| once(first && world.mesh.context.rank == 0) * loss));
    let values = world.group.combine(&values, ReduceOp::Sum)?; // collective, host sync
    let (loss, grad_norm) = (values[0], values[1].sqrt());
    let aux_loss = sums.aux_loss.map(|_| values[2]);
    // Equal on all ranks, since both are sums over all of them.
    let skipped = !(loss.is_finite() && grad_norm.is_finite());
    if skipped {
        model.params.clear_gradients();
    } else {
        optimizer.update(&mut model.params, lr, AdamW::clip_scale(grad_norm, clip))?;
    }
    Ok(Update { loss, aux_loss, grad_norm, skipped })
}

/// Counts skipped steps, and stops a run that only skips.
#[derive(Debug, Default)]
pub struct SkipGuard {
    /// Over the whole run, those before a resume included.
    pub skipped_steps: u64,
    in_a_row: u64,
    last_finite: Option<(u64, f64, f64)>,
}

impl SkipGuard {
    /// Skipped steps in a row that end the run.
    const MAX_IN_A_ROW: u64 = 3;

    /// For a run that skipped so many steps before it was resumed.
    pub fn new(skipped_steps: u64) -> SkipGuard {
        SkipGuard { skipped_steps, ..SkipGuard::default() }
    }

    /// # Errors
    /// The third skipped step in a row.
    pub fn note(&mut self, step: u64, update: &Update) -> Result<()> {
        if !update.skipped {
            self.in_a_row = 0;
            self.last_finite = Some((step, update.loss, update.grad_norm));
            return Ok(());
        }
        self.skipped_steps += 1;
        self.in_a_row += 1;
        if self.in_a_row < Self::MAX_IN_A_ROW {
            return Ok(());
        }
        let last = match self.last_finite {
            Some((step, loss, norm)) => {
                format!("last finite: step {step} with loss {loss} and gradient norm {norm}")
            }
            None => "no step of this process was finite".to_string(),
        };
        Err(Error::failed(format!(
            "the loss or the gradient was not finite in {} steps in a row, up to step {step} (loss {}, gradient norm \
             {}); {last}. Try a lower learning rate, a longer warm-up or float32, and look at the data around there",
            Self::MAX_IN_A_ROW,
            update.loss,
            update.grad_norm
        )))
    }
}

/// Mean loss in nats over the labelled tokens of this rank's `micro_batches` and all other ranks'; none where `stop`, which all
/// ranks ask before each (before some where there are stages), answers true. All ranks must give equally many micro-batches.
pub fn evaluate(
    model: &mut Llama,
    world: &World,
    micro_batches: impl Iterator<Item = Result<MicroBatch>>,
    stop: StopCheck,
) -> Result<Option<f64>> {
    let (mut loss_sum, mut count) = (0.0, 0.0);
    let mut micro_batches = micro_batches;
    let pipeline = model.params.sharding().pipeline.clone();
    // Stages are busy while some micro-batches follow each other.
    let at_once = if pipeline.axis.size == 1 { 1 } else { 4 * pipeline.axis.size as usize };
    loop {
        let batches = micro_batches.by_ref().take(at_once).collect::<Result<Vec<MicroBatch>>>()?;
        if batches.is_empty() {
            break;
        }
        if stop()? {
            return Ok(None);
        }
        let mut transfers = Transfers::new(&pipeline, batches.len(), model.params.device());
        for batch in &batches {
            let before = transfers.receive_activations(|k| model.stage_outputs(&batches[k].input, false))?;
            let after = model.hidden_stage(&batch.input, before)?; // collective
            transfers.send_activations(&after)?;
            if pipeline.is_last() {
                let labels = upload_labels(model, batch)?; // [N]
                let (sum, n) = LmHead::loss_sum(model, &after[0], &labels)?; // collective, host sync
                loss_sum += sum;
                count += n as f64;
            }
        }
        transfers.finish()?;
    }
    let total = world.sum_rows(&[loss_sum, count])?; // collective, host sync
    Ok(Some(total[0] / total[1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(loss: f64) -> Update {
        Update { loss, aux_loss: None, grad_norm: loss, skipped: !loss.is_finite() }
    }

    #[test]
    fn what_a_loss_only_reads_has_no_gradient() {
        let [a, b] = [2.0, 3.0].map(|x| Tensor::from_slice(&[x]));
        let read = differentiate(&[&a, &b], |leaves| Ok((&leaves[0] * leaves[1].detach()).sum(Kind::Double)));
        let (value, gradients) = read.unwrap();
        assert_eq!((value.double_value(&[]), gradients[1].is_none()), (6.0, true));
        assert_eq!(gradients[0].as_ref().map(|g| g.double_value(&[0])), Some(3.0));
        // Nor has anything where nothing is differentiated.
        let (value, gradients) =
            differentiate(&[&a], |leaves| Ok(leaves[0].detach().sum(Kind::Double))).unwrap();
        assert_eq!((value.double_value(&[]), gradients[0].is_none()), (2.0, true));
    }

    #[test]
    fn three_steps_in_a_row_that_are_not_finite_end_the_run() {
        let mut guard = SkipGuard::new(4);
        guard.note(1, &update(2.5)).unwrap();
        guard.note(2, &update(f64::NAN)).unwrap();
        guard.note(3, &update(f64::INFINITY)).unwrap();
        guard.note(4, &update(2.25)).unwrap();
        guard.note(5, &update(f64::NAN)).unwrap();
        guard.note(6, &update(f64::NAN)).unwrap();
        let e = guard.note(7, &update(f64::NAN)).unwrap_err();
        assert!(e.message.contains("up to step 7") && e.message.contains("step 4 with loss 2.25"), "{e}");
        assert_eq!(guard.skipped_steps, 9);
        assert_eq!(e.exit_code(), 1);
    }
}
