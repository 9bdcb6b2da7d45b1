//! GRPO's updates: epochs of minibatches on an iteration's responses.

use std::cell::RefCell;

use tch::{Device, Kind, Tensor};

use super::{advantages, rewards};
use crate::algorithms::losses::ClipCounts;
use crate::algorithms::losses::grpo::{GroupAdvantages, GrpoLoss, LossType};
use crate::algorithms::losses::sums_of;
use crate::algorithms::rl::experience::SamplerDistance;
use crate::algorithms::rl::policy::{Policy, logprobs, share_of};
use crate::algorithms::rl::sampling::ResponseBatch;
use crate::algorithms::step::{MicroBatch, Objective, StepEntry, Update};
use crate::config::grpo::{Advantages, Grpo, Truncated};
use crate::distributed::exchange::gather_rows;
use crate::distributed::world::World;
use crate::error::Result;
use crate::model::head::LogProbs;
use crate::random::Permutation;
use crate::telemetry::MetricsLine;

/// What is known of an iteration's n responses before its updates, equal on all ranks. Matrices are [n, W] on the CPU, 0
/// where there is no token of a response.
struct GroupExperience {
    /// The log-probabilities under the reference, where there is one.
    reference: Option<Tensor>,
    /// The policy's log-probabilities and entropies before the updates. None where one update has all responses: its own
    /// forward gives them.
    old: Option<[Tensor; 2]>,
    /// Responses that have a reward.
    scored: Vec<bool>,
    /// 1 for responses that are learned from, 0 for those that have no reward or are masked.
    kept: Vec<f64>,
    groups: GroupAdvantages,
    advantages: Vec<f64>,
    /// The sum over the response's tokens of log policy - log reference, where both are known.
    kl: Option<Vec<f64>>,
    /// Tokens of all responses.
    tokens: f64,
    /// The updates would have no gradient: they would only follow the optimizer's momentum, and decay weights.
    idle: bool,
}

/// Sums over the tokens of an iteration's updates.
#[derive(Debug, Clone, Copy, Default)]
struct GrpoSums {
    /// Tokens that are learned from.
    tokens: f64,
    /// Those whose ratio is clipped.
    clipped: f64,
    /// Of all tokens, where the updates' own forward gives them.
    entropy: f64,
    kl: f64,
}

impl GrpoSums {
    fn add(&mut self, other: GrpoSums) {
        self.tokens += other.tokens;
        self.clipped += other.clipped;
        self.entropy += other.entropy;
        self.kl += other.kl;
    }

    /// Those of all ranks. Collective.
    fn over_ranks(self, world: &World) -> Result<GrpoSums> {
        let mine = [self.tokens, self.clipped, self.entropy, self.kl];
        let all = world.sum_rows(&mine)?;
        Ok(GrpoSums { tokens: all[0], clipped: all[1], entropy: all[2], kl: all[3] })
    }
}

/// The updates on an iteration's responses, which all ranks know; none where they teach nothing. The record has what is to be
/// logged. Collective.
pub fn update(
    c: &Grpo,
    policy: &mut Policy,
    batch: &ResponseBatch,
    step: u64,
    lr: f64,
    temperature: f64,
    world: &World,
) -> Result<(Update, MetricsLine)> {
    let e = experience(c, policy, batch, temperature, world)?;
    let n = batch.sequences.len();
    let (mut updates, mut sums, mut apart) = (Vec::new(), GrpoSums::default(), SamplerDistance::default());
    for epoch in 0..if e.idle { 0 } else { c.grpo.epochs as u64 } {
        let order = Permutation::new(n as u64, c.seed, "grpo.order", step << 16 | epoch);
        let order: Vec<usize> = (0..n as u64).map(|i| order.apply(i) as usize).collect();
        for minibatch in order.chunks(c.minibatch_size() as usize) {
            let update = MinibatchUpdate::new(c, batch, &e, minibatch, temperature, world);
            updates.push(update.run(policy, lr)?);
            sums.add(update.sums.into_inner().over_ranks(world)?);
            apart = update.apart.into_inner();
        }
    }
    let apart = match &e.old {
        Some([old, _]) => {
            let mut apart = SamplerDistance::default();
            apart.add(&batch.sequences, batch.samples.iter().map(|s| &s.response).enumerate(), old);
            apart
        }
        // One update had all responses.
        None => apart.over_ranks(world)?,
    };
    let record = apart.describe(describe(&e, &sums, batch, updates.len(), step)?);
    let mean = |f: fn(&Update) -> f64| updates.iter().map(f).sum::<f64>() / updates.len().max(1) as f64;
    let update = Update {
        loss: mean(|u| u.loss),
        aux_loss: None,
        grad_norm: mean(|u| u.grad_norm),
        skipped: updates.iter().any(|u| u.skipped),
    };
    Ok((update, record))
}

/// The sum of each row's tokens, `[n]`, of [n, W].
fn per_response(t: &Tensor, mask: &Tensor) -> Result<Vec<f64>> {
    let sums = (t.to_kind(Kind::Double) * mask).sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
    Ok(Vec::<f64>::try_from(sums)?)
}

/// What the models say about the responses, and what follows from their rewards. Collective.
fn experience(
    c: &Grpo,
    policy: &mut Policy,
    batch: &ResponseBatch,
    temperature: f64,
    world: &World,
) -> Result<GroupExperience> {
    let (grpo, sequences, samples) = (&c.grpo, &batch.sequences, &batch.samples);
    let share = share_of(sequences, c.micro_batch_size(world.mesh.data.size) as usize, world);
    let reference = match c.uses_reference() {
        true => Some(policy.with_reference(|model| logprobs(model, &share, temperature, world))?),
        false => None,
    };
    // What cannot be scored, or is masked, is left out of the losses.
    let mut rewards = rewards(c, samples);
    let scored: Vec<bool> = rewards.iter().map(|r| !r.is_nan()).collect();
    let masked = |ended: bool| !ended && grpo.truncated == Truncated::Mask;
    let kept: Vec<f64> = samples
        .iter()
        .zip(&scored)
        .map(|(s, scored)| f64::from(u8::from(*scored && !masked(s.ended()))))
        .collect();
    let (mut groups, mut advantages) = advantages(c, &rewards);
    let idle = kept.iter().zip(&advantages).all(|(k, a)| *k == 0.0 || (*a == 0.0 && grpo.beta == 0.0));
    let penalized = grpo.advantages == Advantages::Reinforce && grpo.beta > 0.0;
    let old = match c.num_updates() > 1 || penalized || idle {
        true => {
            let [logprobs, entropies] = share.logprobs_and_entropies(&mut policy.actor.model, temperature)?;
            Some([gather_rows(world, &logprobs)?, gather_rows(world, &entropies)?])
        }
        false => None,
    };
    let mask = sequences.mask(Kind::Double);
    let kl = match (&old, &reference) {
        (Some([old, _]), Some(reference)) => Some(per_response(&(old - reference), &mask)?),
        _ => None,
    };
    if let (true, Some(kl)) = (penalized, &kl) {
        rewards.iter_mut().zip(kl).for_each(|(reward, kl)| *reward -= grpo.beta * kl);
        (groups, advantages) = self::advantages(c, &rewards);
    }
    let tokens = mask.sum(Kind::Double).double_value(&[]);
    Ok(GroupExperience { reference, old, scored, kept, groups, advantages, kl, tokens, idle })
}

/// What is logged of an iteration.
fn describe(
    e: &GroupExperience,
    sums: &GrpoSums,
    batch: &ResponseBatch,
    updates: usize,
    step: u64,
) -> Result<MetricsLine> {
    let entropy = match &e.old {
        Some([_, entropies]) => {
            per_response(entropies, &batch.sequences.mask(Kind::Double))?.iter().sum::<f64>()
        }
        None => sums.entropy,
    };
    let kl = match (&e.reference, &e.kl) {
        (None, _) => f64::NAN,
        (Some(_), Some(kl)) => kl.iter().sum::<f64>(),
        (Some(_), None) => sums.kl,
    };
    Ok(MetricsLine::new("train", step + 1)
        .float("reward_std", e.groups.reward_std)
        .float("kl", kl / batch.sequences.len() as f64)
        .float("entropy", entropy / e.tokens.max(1.0))
        .float("clip_fraction", sums.clipped / sums.tokens.max(1.0))
        .count("updates", updates as u64)
        .count("groups_without_variance", e.groups.without_variance))
}

/// One update.
struct MinibatchUpdate<'a> {
    batch: &'a ResponseBatch,
    e: &'a GroupExperience,
    objective: GrpoLoss,
    counts: ClipCounts,
    temperature: f64,
    /// The longest response that may be.
    longest: i64,
    /// This rank's micro-batches: numbers of responses, and their rows.
    parts: Vec<(Vec<usize>, MicroBatch)>,
    sums: RefCell<GrpoSums>,
    /// How far its own forward is from the sampler.
    apart: RefCell<SamplerDistance>,
}

impl<'a> MinibatchUpdate<'a> {
    /// On these responses, of which this rank takes its share.
    fn new(
        c: &Grpo,
        batch: &'a ResponseBatch,
        e: &'a GroupExperience,
        minibatch: &[usize],
        temperature: f64,
        world: &World,
    ) -> Self {
        let (grpo, sequences) = (&c.grpo, &batch.sequences);
        let (n, size) = (sequences.len(), c.minibatch_size() as usize);
        let micro = c.micro_batch_size(world.mesh.data.size) as usize;
        let length = |i: usize| e.kept[i] * sequences.responses[i].len() as f64;
        let tokens = match grpo.loss {
            // By the rollout's tokens, so that no update weighs its own more.
            LossType::Dapo | LossType::Cispo => (0..n).map(length).sum::<f64>() * size as f64 / n as f64,
            _ => minibatch.iter().map(|i| length(*i)).sum(),
        };
        let scored = minibatch.iter().filter(|i| e.scored[**i]).count();
        let mut mine = minibatch[world.mesh.data.share(size)].to_vec();
        // Rows of like length together: less padding.
        mine.sort_by_key(|i| (sequences.width([*i]), *i));
        let parts = mine.chunks(micro).map(|rows| (rows.to_vec(), sequences.rows(rows).micro_batch()));
        let objective = GrpoLoss {
            loss: grpo.loss,
            level: grpo.level,
            epsilon_low: grpo.epsilon,
            epsilon_high: grpo.epsilon_high(),
            delta: grpo.delta,
            beta: if grpo.advantages == Advantages::Reinforce { 0.0 } else { grpo.beta },
            kl: c.kl_estimator(),
            temperatures: grpo.sapo_temperatures(),
        };
        MinibatchUpdate {
            batch,
            e,
            objective,
            counts: ClipCounts { sequences: scored as f64, tokens },
            temperature,
            longest: c.generation.max_new_tokens.high as i64,
            parts: parts.collect(),
            sums: RefCell::default(),
            apart: RefCell::default(),
        }
    }

    /// Forward, backward and update. Collective.
    fn run(&self, policy: &mut Policy, lr: f64) -> Result<Update> {
        let entries = self.parts.iter().map(|(rows, batch)| self.entry(rows, batch));
        let mut entries: Vec<StepEntry> = entries.collect();
        policy.actor.update(&mut entries, lr, &policy.actor_world)
    }

    fn entry<'b>(&'b self, rows: &'b [usize], batch: &'b MicroBatch) -> StepEntry<'b> {
        let objective = Objective::LogProbs {
            temperature: self.temperature,
            entropies: self.e.old.is_none(),
            loss: Box::new(move |out| Ok(self.loss(rows, batch, out))),
        };
        StepEntry { batch, objective, balance: None }
    }

    /// The part of the loss that these responses are; [B, T], of which `out` has the labels' log-probabilities `[B * T]`.
    fn loss(&self, rows: &[usize], batch: &MicroBatch, out: &LogProbs) -> Tensor {
        let (e, width) = (self.e, batch.input.ids.size()[1]);
        let logprobs = out.logprobs.view([-1, width]);
        let (kind, device) = (logprobs.kind(), logprobs.device());
        let numbers: Vec<i64> = rows.iter().map(|i| *i as i64).collect();
        let numbers = Tensor::from_slice(&numbers);
        let of = |t: &Tensor| t.index_select(0, &numbers).narrow(1, 0, width).to_kind(kind).to_device(device);
        let each = |values: &[f64]| {
            let values: Vec<f64> = rows.iter().map(|i| values[*i]).collect();
            Tensor::from_slice(&values).to_kind(kind).to_device(device)
        };
        let all = batch.labels.ge(0).view([-1, width]).to_device(device).to_kind(kind);
        let mask = &all * each(&e.kept).unsqueeze(1);
        let advantages = each(&e.advantages);
        let before = match &e.old {
            Some([old, _]) => of(old),
            None => logprobs.detach(),
        };
        let reference = e.reference.as_ref().map(of);
        let now = logprobs.detach();
        if e.old.is_none() {
            let responses = rows.iter().map(|i| (*i, &self.batch.samples[*i].response));
            self.apart.borrow_mut().add(&self.batch.sequences, responses, &now.to_device(Device::Cpu));
        }
        let (low, high) = self.objective.clipped(&now, &before, &advantages, &mask);
        let none = || Tensor::zeros([1], (kind, device));
        let entropy = out.entropies.as_ref().map_or_else(none, |e| e.detach().view([-1, width]) * &all);
        let kl = reference.as_ref().map_or_else(none, |r| (&now - r) * &all);
        let [tokens, entropy, kl] = sums_of([mask.shallow_clone(), entropy, kl]);
        self.sums.borrow_mut().add(GrpoSums { tokens, clipped: low + high, entropy, kl });
        let loss = self.objective.per_token(&logprobs, &before, reference.as_ref(), &advantages, &mask);
        (loss * self.objective.weights(&mask, &self.counts, self.longest)).sum(kind)
    }
}
