//! PPO's updates: epochs of minibatches on an iteration's responses.

use std::cell::RefCell;

use tch::Tensor;

use super::{PpoExperience, PpoModels, PpoPosition, Ready};
use crate::algorithms::losses::policy::{policy_loss, value_loss};
use crate::algorithms::losses::{Clip, ClipCounts, PolicySums};
use crate::algorithms::rl::checks;
use crate::algorithms::rl::policy::Policy;
use crate::algorithms::step::{MicroBatch, Objective, StepEntry, Sums, Update};
use crate::algorithms::training::Run;
use crate::config::Algorithm;
use crate::config::common::Common;
use crate::config::ppo::{KlIn, Ppo};
use crate::config::sections::Optim;
use crate::distributed::world::World;
use crate::error::Result;
use crate::model::head::LogProbs;
use crate::optim::Schedule;
use crate::random::Permutation;
use crate::telemetry::MetricsLine;

/// What an iteration's updates did.
pub struct Updated {
    /// Means over the updates; of the actor (of the critic, while only that is trained).
    pub update: Update,
    pub rate: f64,
    pub policy: PolicySums,
    pub policy_loss: f64,
    pub value_loss: f64,
    pub ptx_loss: Option<f64>,
    pub critic_grad_norm: f64,
    pub critic_rate: f64,
    /// Updates of the critic.
    pub updates: u64,
    pub stopped_early: bool,
}

impl Updated {
    pub fn describe(&self, record: MetricsLine) -> MetricsLine {
        let record = match self.policy.tokens > 0.0 {
            true => record
                .float("clip_fraction", self.policy.clip_fraction())
                .float("approx_kl", self.policy.approx_kl())
                .float("ratio_mean", self.policy.ratio_mean()),
            // Only the critic was trained: the policy is where it was.
            false => record.float("clip_fraction", 0.0).float("approx_kl", 0.0).float("ratio_mean", 1.0),
        };
        let record = record
            .float("policy_loss", self.policy_loss)
            .float("value_loss", self.value_loss)
            .float("critic_grad_norm", self.critic_grad_norm)
            .float("critic_lr", self.critic_rate)
            .count("updates", self.updates)
            .count("stopped_early", u64::from(self.stopped_early));
        match self.ptx_loss {
            Some(loss) => record.float("ptx_loss", loss),
            None => record,
        }
    }
}

/// One minibatch of an epoch, as this rank sees it.
struct Minibatch {
    /// Of all ranks.
    counts: ClipCounts,
    /// This rank's micro-batches: numbers of responses, and their rows.
    parts: Vec<(Tensor, MicroBatch)>,
}

impl Minibatch {
    /// What of an experience belongs to the rows of a micro-batch: in the shape, dtype and device of `like`, [B, T].
    fn part(t: &Tensor, rows: &Tensor, like: &Tensor) -> Tensor {
        let part = t.index_select(0, rows).narrow(1, 0, like.size()[1]);
        part.to_kind(like.kind()).to_device(like.device())
    }
}

/// The minibatches of all epochs of an iteration; each epoch has its own order, the same on all ranks.
fn minibatches<'a>(
    c: &'a Ppo,
    e: &'a PpoExperience,
    step: u64,
    world: &World,
) -> impl Iterator<Item = Minibatch> + 'a {
    let n = e.sequences.len();
    let micro = c.micro_batch_size(world.mesh.data.size) as usize;
    let size = c.ppo.minibatch_size as usize;
    let mine = world.mesh.data.share(size);
    let number = |rows: &[usize]| Tensor::from_slice(&rows.iter().map(|i| *i as i64).collect::<Vec<_>>());
    (0..c.ppo.epochs as u64).flat_map(move |epoch| {
        let order = Permutation::new(n as u64, c.seed, "ppo.order", step << 16 | epoch);
        let order: Vec<usize> = (0..n as u64).map(|i| order.apply(i) as usize).collect();
        let mine = mine.clone();
        let minibatch = move |i: usize| {
            let rows = &order[i * size..(i + 1) * size];
            let counts = ClipCounts::of(&e.mask.index_select(0, &number(rows)));
            let parts = rows[mine.clone()].chunks(micro);
            let parts = parts.map(|rows| (number(rows), e.sequences.rows(rows).micro_batch())).collect();
            Minibatch { counts, parts }
        };
        (0..n / size).map(minibatch)
    })
}

/// What updates of the actor on an iteration's responses did.
#[derive(Default)]
struct PolicyUpdates {
    updates: Vec<Update>,
    sums: PolicySums,
    ptx_losses: Vec<f64>,
    stopped_early: bool,
}

/// All epochs of updates of the actor; fewer where it has gone too far from where it was (`stop_kl`).
fn update_policy(
    c: &Ppo,
    inputs: &Ready,
    models: &mut PpoModels,
    e: &PpoExperience,
    run: &mut Run<PpoPosition>,
    rate: f64,
    world: &World,
) -> Result<PolicyUpdates> {
    let (ppo, step) = (&c.ppo, run.progress.step);
    let clip = Clip { low: ppo.clip, high: ppo.clip_high.unwrap_or(ppo.clip), dual: ppo.dual_clip };
    let longest = c.generation.max_new_tokens.high as i64;
    let kl_coef = match ppo.kl_in {
        KlIn::Reward => 0.0,
        KlIn::Loss => run.progress.data.kl.coef(),
    };
    let mut done = PolicyUpdates::default();
    let Policy { actor, actor_world, .. } = &mut models.policy;
    for Minibatch { counts, parts } in minibatches(c, e, step, world) {
        let sums = RefCell::new(PolicySums::default());
        let loss = |out: &LogProbs, rows: &Tensor, width: i64| {
            let logprobs = out.logprobs.view([-1, width]);
            let of = |t: &Tensor| Minibatch::part(t, rows, &logprobs);
            let (mask, old, advantages) = (of(&e.mask), of(&e.logprobs), of(&e.advantages));
            sums.borrow_mut().add(&logprobs, &old, &advantages, None, &clip, &mask);
            let mut loss = policy_loss(&logprobs, &old, &advantages, &clip);
            if let Some(entropies) = &out.entropies {
                loss -= entropies.view([-1, width]) * ppo.entropy_coef;
            }
            if kl_coef != 0.0 {
                loss += ppo.kl_estimator().estimate(&logprobs, &of(&e.reference)) * kl_coef;
            }
            Ok((loss * ppo.aggregation.weights(&mask, &counts, longest)).sum(mask.kind()))
        };
        let entry = |(rows, batch): &'_ (Tensor, MicroBatch)| {
            let (rows, width, loss) = (rows.shallow_clone(), batch.input.ids.size()[1], &loss);
            Objective::LogProbs {
                temperature: c.generation.temperature,
                entropies: ppo.entropy_coef != 0.0,
                loss: Box::new(move |out| loss(out, &rows, width)),
            }
        };
        let ptx = ptx_batches(c, inputs, run, world)?;
        let ours =
            parts.iter().map(|part| StepEntry { batch: &part.1, objective: entry(part), balance: None });
        let theirs = ptx.iter().map(|(batch, weight)| StepEntry {
            batch,
            objective: Objective::CrossEntropy { weight: *weight },
            balance: None,
        });
        let mut entries: Vec<StepEntry> = ours.chain(theirs).collect();
        let losses = actor.accumulate(&mut entries)?;
        drop(entries);
        let sums = sums.borrow().over_ranks(world)?;
        if step == ppo.value_warmup && done.updates.is_empty() && ppo.self_check {
            let distance = sums.ratio_distance / sums.tokens.max(1.0);
            let same_rows = parts.len() == 1 && ppo.minibatch_size == e.sequences.len() as i64;
            let (compute, float8) = (actor.model.params.compute(), actor.model.float8().is_some());
            checks::ratios_are_one(distance, compute, float8, same_rows)?;
        }
        if ppo.stop_kl.is_some_and(|most| sums.approx_kl() > most) {
            actor.model.params.clear_gradients();
            done.stopped_early = true;
            break;
        }
        done.sums = done.sums.plus(&sums);
        let (ours, theirs) = losses.split_at(parts.len());
        if !theirs.is_empty() {
            let sum = world.sum_rows(&[theirs.iter().sum()])?[0];
            done.ptx_losses.push(sum / ppo.ptx.as_ref().map_or(1.0, |p| p.coef));
        }
        let loss = Sums { loss: ours.iter().sum(), aux_loss: None };
        let update = actor.apply(loss, rate, actor_world)?;
        if let (Some(ema), false) = (&mut models.ema, update.skipped) {
            ema.follow(&actor.model.params);
        }
        done.updates.push(update);
    }
    Ok(done)
}

/// All epochs of updates of the critic.
fn update_values(
    c: &Ppo,
    models: &mut PpoModels,
    e: &PpoExperience,
    step: u64,
    rate: f64,
) -> Result<Vec<Update>> {
    let clip = (c.ppo.clip_value > 0.0).then_some(c.ppo.clip_value);
    let mut updates = Vec::new();
    for Minibatch { counts, parts } in minibatches(c, e, step, &models.critic_world) {
        let loss = |values: &Tensor, rows: &Tensor, width: i64| {
            let values = values.view([-1, width]);
            let of = |t: &Tensor| Minibatch::part(t, rows, &values);
            let weights = of(&e.mask) / counts.tokens.max(1.0);
            let loss =
                (value_loss(&values, &of(&e.values), &of(&e.returns), clip) * weights).sum(values.kind());
            Ok(loss * c.ppo.value_coef)
        };
        let entry = |(rows, batch): &'_ (Tensor, MicroBatch)| {
            let (rows, width, loss) = (rows.shallow_clone(), batch.input.ids.size()[1], &loss);
            Objective::Values { loss: Box::new(move |values| loss(values, &rows, width)) }
        };
        let entries =
            parts.iter().map(|part| StepEntry { batch: &part.1, objective: entry(part), balance: None });
        let mut entries: Vec<StepEntry> = entries.collect();
        updates.push(models.critic.update(&mut entries, rate, &models.critic_world)?);
    }
    Ok(updates)
}

/// The epochs of updates on an iteration's responses.
pub fn update(
    c: &Ppo,
    inputs: &Ready,
    models: &mut PpoModels,
    e: &PpoExperience,
    run: &mut Run<PpoPosition>,
    world: &World,
) -> Result<Updated> {
    let (common, step) = (c.common(), run.progress.step);
    let rate =
        |optim: &Optim| Schedule::new(&Common { optim, ..common }, inputs.opened.length.steps).rate(step);
    let critic_section = c.critic();
    let actor_rate = rate(c.actor.optim.as_ref().unwrap_or(&c.optim));
    let critic_rate = rate(critic_section.optim.as_ref().unwrap_or(&c.optim));
    let warming_up = step < c.ppo.value_warmup;
    let policy = match warming_up {
        true => PolicyUpdates::default(),
        false => {
            models.policy.onload()?;
            let done = update_policy(c, inputs, models, e, run, actor_rate, world)?;
            models.policy.offload()?;
            done
        }
    };
    models.critic.model.params.unpark()?;
    let values = update_values(c, models, e, step, critic_rate)?;
    if critic_section.offload {
        models.critic.model.params.park()?;
    }

    let mean = |updates: &[Update], f: fn(&Update) -> f64| {
        updates.iter().map(f).sum::<f64>() / updates.len().max(1) as f64
    };
    let (policy_loss, value_loss) = (mean(&policy.updates, |u| u.loss), mean(&values, |u| u.loss));
    let told = if warming_up { &values } else { &policy.updates };
    let ptx = &policy.ptx_losses;
    Ok(Updated {
        update: Update {
            loss: policy_loss + value_loss,
            aux_loss: None,
            grad_norm: mean(told, |u| u.grad_norm),
            skipped: policy.updates.iter().chain(&values).any(|u| u.skipped),
        },
        rate: if warming_up { 0.0 } else { actor_rate },
        policy: policy.sums,
        policy_loss,
        value_loss: value_loss / c.ppo.value_coef,
        ptx_loss: (!ptx.is_empty()).then(|| ptx.iter().sum::<f64>() / ptx.len() as f64),
        critic_grad_norm: mean(&values, |u| u.grad_norm),
        critic_rate,
        updates: values.len() as u64,
        stopped_early: policy.stopped_early,
    })
}

/// The next rows of pretraining data, this rank's, with the weight of a token's loss.
fn ptx_batches(
    c: &Ppo,
    inputs: &Ready,
    run: &mut Run<PpoPosition>,
    world: &World,
) -> Result<Vec<(MicroBatch, f64)>> {
    let micro = c.micro_batch_size(world.mesh.data.size) as usize;
    let (Some(ptx), Some(data), Some(state)) = (&c.ppo.ptx, &inputs.ptx, &mut run.progress.data.ptx) else {
        return Ok(Vec::new());
    };
    let rows = ptx.batch_size.unwrap_or(c.ppo.minibatch_size);
    let weight = ptx.coef / (rows * ptx.sequence_length) as f64;
    let first = state.next;
    state.next += rows as u64;
    let mine = world.mesh.data.share(rows as usize);
    mine.step_by(micro)
        .map(|row| {
            let batch = data.batch(first + row as u64, micro)?;
            let batch = MicroBatch::from_rows(&batch.input_ids, &batch.labels, batch.columns as i64);
            Ok((batch, weight))
        })
        .collect()
}
