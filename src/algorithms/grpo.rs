//! Group-relative policy optimization (Shao et al. 2024): several responses to every prompt are compared with each other, and
//! the better ones become more probable.

use std::cell::RefCell;
use std::time::Instant;

use kernels::c10d::ReduceOp;
use tch::{Device, Kind, Tensor};

use crate::algorithms::folder::RunFolder;
use crate::algorithms::records;
use crate::algorithms::rl::Counts;
use crate::algorithms::rl::experience::SamplerDistance;
use crate::algorithms::rl::grpo::{
    GroupAdvantages, GrpoLoss, LossType, ScaleRewards, group_advantages, rloo, varies,
};
use crate::algorithms::rl::policy::{Opened, Policy, Samplers, describe, logprobs, share_of};
use crate::algorithms::rl::sampling::{Batch, Sampled, Sampler};
use crate::algorithms::run::Start;
use crate::algorithms::step::{self, Entry, MicroBatch, Objective, Sums, Update};
use crate::algorithms::training::{Learner, Plan, Progress};
use crate::config::grpo::{Advantages, Grpo, Truncated};
use crate::config::shape::Shape;
use crate::config::{Algorithm, Loaded};
use crate::data::prompts::State;
use crate::distributed::agreement::Facts;
use crate::distributed::exchange::gather_rows;
use crate::distributed::world::World;
use crate::error::Result;
use crate::model::Trainable;
use crate::model::head::LogProbs;
use crate::optim::Schedule;
use crate::random::Permutation;
use crate::telemetry::Record;

/// What a run reads before any rank talks to another.
pub struct Inputs(Opened, Samplers);

impl crate::algorithms::base::Inputs for Inputs {
    fn add_facts(&self, facts: &mut Facts) -> Result<()> {
        self.1.add_facts(facts);
        self.0.add_facts(facts)
    }
}

impl Inputs {
    pub fn open(c: &Grpo) -> Result<Inputs> {
        Opened::open(&c.sections_of_responses(), c.uses_reference())
            .map(|(opened, samplers)| Inputs(opened, samplers))
    }

    /// The models that are trained: name, shape, and what of them.
    pub fn trained(&self) -> [(&str, &Shape, &Trainable); 1] {
        [("actor", &self.0.actor.shape, &self.0.trainable)]
    }

    /// Where prompts come from.
    pub fn samplers(&self) -> &Samplers {
        &self.1
    }
}

/// Runs the training that `loaded` describes, in `world`, on inputs that were opened before the ranks met.
pub fn grpo(loaded: &Loaded<Grpo>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
    let (c, Inputs(opened, samplers)) = (&loaded.config, inputs);
    let (common, sections) = (c.common(), c.sections_of_responses());
    let tokenizer = opened.tokenizer().clone();
    let mut folder = RunFolder::open(loaded, start, &sections.paths(), &tokenizer, world)?;
    let Samplers { train: mut sampler, mut valid } = samplers;
    opened.announce(&sampler, valid.as_ref(), c.train.batch_size, world);
    let mut policy = Policy::load(&sections, &opened, world)?;
    folder.record(std::mem::take(&mut policy.records))?;
    let progress = match folder.restore::<State>(&mut policy.actor)? {
        Some(progress) => {
            sampler.prompts.resume(&progress.data)?;
            progress
        }
        None => {
            policy.actor.begin(&opened.actor, c.seed)?;
            Progress::new(sampler.prompts.state(0))
        }
    };
    let optim = c.actor.optim.as_ref().unwrap_or(&c.optim);
    let schedule = Schedule::new(&crate::config::common::Common { optim, ..common }, opened.steps);
    let mut run = folder.start(progress, Plan::new(&common, opened.steps))?;

    if run.owes_validation() {
        let best = policy.validation(&mut valid, &c.valid, c.train.batch_size, &mut run, world)?;
        run.save(&[policy.actor.part("")], best)?;
    }
    while !run.done() {
        let step = run.progress.step;
        let asking = Instant::now();
        let asked = ask(c, &mut policy, &mut sampler, run.progress.data.next, world)?;
        policy.note_rewards(&asked.batch.samples, step, world);
        let asking_s = asking.elapsed().as_secs_f64();
        let batch = &asked.batch;
        let updating = Instant::now();
        let lr = schedule.rate(step);
        policy.wake()?;
        let (update, record) = update(c, &mut policy, batch, step, lr, sampler.temperature(), world)?;
        policy.rest()?;
        let update_s = updating.elapsed().as_secs_f64();

        run.progress.data = sampler.prompts.state(asked.next);
        let generated: usize = batch.samples.iter().map(|s| s.response.ids.len()).sum();
        let read: usize = batch.sequences.prompts.iter().map(Vec::len).sum();
        if c.samples.every > 0 && step.is_multiple_of(c.samples.every as u64) {
            for (i, sample) in batch.samples.iter().take(c.samples.count as usize).enumerate() {
                let (record, text) = sampler.record(sample, step + 1)?;
                run.log_sample(&record, &format!("samples/{i}"), &text);
            }
        }
        if let Some(train) = run.stepped((generated + read) as u64, &update, lr)?.record {
            let train = records::count(train, &sampler.prompts.odd, c.data.on_error);
            run.log(
                &train
                    .with(asked.told)
                    .with(record)
                    .count("resampled", asked.resampled)
                    .count("dropped", sampler.prompts.dropped)
                    .float("rollout_s", batch.rollout_s)
                    .float("score_s", asking_s - batch.rollout_s)
                    .float("update_s", update_s)
                    .float("generated_tokens_per_s", asked.generated as f64 / batch.rollout_s),
            );
        }
        let best = policy.validation(&mut valid, &c.valid, c.train.batch_size, &mut run, world)?;
        run.save(&[policy.actor.part("")], best)?;
    }
    policy.wake()?;
    run.take_best(|best| best.load_values(&mut policy.actor.model.params))?;
    run.finish(|dir| policy.actor.export(dir, &tokenizer, world))
}

/// The responses of an iteration.
struct Asked {
    batch: Batch,
    /// The number of the next prompt.
    next: u64,
    /// Groups that were asked in the place of others.
    resampled: u64,
    /// Tokens of all responses, also of those that were replaced.
    generated: usize,
    /// Of the responses to the prompts that were due, also of those that were replaced: what is left of resampling is the
    /// harder part of the data. `reward_kept` is the mean of those that are learned from.
    told: Record,
}

/// Asks the next prompts, and others in the place of those whose responses are all equally good, as often as is configured.
/// All ranks decide alike, since they know all responses. Collective.
fn ask(c: &Grpo, policy: &mut Policy, sampler: &mut Sampler, first: u64, world: &World) -> Result<Asked> {
    let (count, group) = (c.train.batch_size as u64, c.grpo.group_size as usize);
    let tokens = |batch: &Batch| batch.samples.iter().map(|s| s.response.ids.len()).sum::<usize>();
    let mut batch = policy.ask(sampler, first, count, group, world)?;
    let (mut next, mut resampled, mut generated) = (first + count, 0, tokens(&batch));
    let mut told = describe(&batch.samples);
    for _ in 0..c.grpo.resample {
        let flat: Vec<usize> =
            (0..count as usize).filter(|g| !differ(c, group_of(&batch, *g, group))).collect();
        if flat.is_empty() {
            break;
        }
        let more = (flat.len() as u64).next_multiple_of(world.mesh.data.size as u64);
        let other = policy.ask(sampler, next, more, group, world)?;
        next += more;
        generated += tokens(&other);
        batch.rollout_s += other.rollout_s;
        let varied = (0..more as usize).filter(|g| differ(c, group_of(&other, *g, group)));
        for (to, from) in flat.into_iter().zip(varied) {
            resampled += 1;
            for i in 0..group {
                let (to, from) = (to * group + i, from * group + i);
                batch.samples[to] = other.samples[from].clone();
                batch.sequences.prompts[to] = other.sequences.prompts[from].clone();
                batch.sequences.responses[to] = other.sequences.responses[from].clone();
            }
        }
    }
    if c.grpo.resample > 0 {
        told = told.float("reward_kept", describe(&batch.samples).get("reward").unwrap_or(f64::NAN));
    }
    Ok(Asked { batch, next, resampled, generated, told })
}

fn group_of(batch: &Batch, number: usize, size: usize) -> &[Sampled] {
    &batch.samples[number * size..(number + 1) * size]
}

/// Whether a group's rewards differ.
fn differ(c: &Grpo, group: &[Sampled]) -> bool {
    varies(&rewards(c, group))
}

/// The reward that each response is compared by; NaN where it could not be scored.
fn rewards(c: &Grpo, samples: &[Sampled]) -> Vec<f64> {
    let penalty = if c.grpo.truncated == Truncated::Penalize { c.grpo.truncated_penalty } else { 0.0 };
    let reward = |s: &Sampled| {
        let reward = s.judgement.reward.unwrap_or(f64::NAN);
        if s.ended() { reward } else { reward - penalty }
    };
    samples.iter().map(reward).collect()
}

/// What the rewards say of groups, and the advantage of each response.
fn advantages(c: &Grpo, rewards: &[f64]) -> (GroupAdvantages, Vec<f64>) {
    let group = c.grpo.group_size as usize;
    let scale = match c.grpo.advantages {
        Advantages::Batch => ScaleRewards::Batch,
        Advantages::None => ScaleRewards::None,
        _ => ScaleRewards::Group,
    };
    let groups = group_advantages(rewards, group, scale);
    let advantages = match c.grpo.advantages {
        Advantages::Rloo => rloo(rewards, group),
        Advantages::Reinforce => group_advantages(rewards, rewards.len(), ScaleRewards::Group).advantages,
        _ => groups.advantages.clone(),
    };
    (groups, advantages)
}

/// The updates on an iteration's responses, which all ranks know; none where they teach nothing. The record has what is to be told. Collective.
fn update(
    c: &Grpo,
    policy: &mut Policy,
    batch: &Batch,
    step: u64,
    lr: f64,
    temperature: f64,
    world: &World,
) -> Result<(Update, Record)> {
    let (grpo, sequences, samples) = (&c.grpo, &batch.sequences, &batch.samples);
    let n = sequences.len();
    let size = c.minibatch_size() as usize;
    let micro = c.micro_batch_size(world.mesh.data.size) as usize;
    let several = c.num_updates() > 1;
    let share = share_of(sequences, micro, world);

    // What the policy and the reference said, of all responses: [n, W].
    let reference = match c.uses_reference() {
        true => Some(policy.with_reference(|model| logprobs(model, &share, temperature, world))?),
        false => None,
    };
    // What cannot be scored, or is masked, is left out of the losses.
    let mut rewards = rewards(c, samples);
    let scored: Vec<bool> = rewards.iter().map(|r| !r.is_nan()).collect();
    let kept = |(s, scored): (&Sampled, &bool)| *scored && (s.ended() || grpo.truncated != Truncated::Mask);
    let kept: Vec<f64> = samples.iter().zip(&scored).map(|s| f64::from(u8::from(kept(s)))).collect();
    let (mut groups, mut advantages) = self::advantages(c, &rewards);
    // A step without a gradient would only follow the optimizer's momentum, and decay weights.
    let idle = (0..n).all(|i| kept[i] == 0.0 || (advantages[i] == 0.0 && grpo.beta == 0.0));
    // With one update the policy is what it was: its own forward tells.
    let penalized = grpo.advantages == Advantages::Reinforce && grpo.beta > 0.0;
    let old = match several || penalized || idle {
        true => {
            let [logprobs, entropies] = share.logprobs_and_entropies(&mut policy.actor.model, temperature)?;
            Some([gather_rows(world, &logprobs)?, gather_rows(world, &entropies)?])
        }
        false => None,
    };
    let mask = sequences.mask(Kind::Double);
    let per_response = |t: &Tensor| -> Result<Vec<f64>> {
        let sums = (t.to_kind(Kind::Double) * &mask).sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
        Ok(Vec::<f64>::try_from(sums)?)
    };
    let kl = match (&old, &reference) {
        (Some([old, _]), Some(reference)) => Some(per_response(&(old - reference))?),
        _ => None,
    };
    if let (true, Some(kl)) = (penalized, &kl) {
        rewards.iter_mut().zip(kl).for_each(|(reward, kl)| *reward -= grpo.beta * kl);
        (groups, advantages) = self::advantages(c, &rewards);
    }
    let length = |i: usize| kept[i] * sequences.responses[i].len() as f64;

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
    let longest = c.generation.max_new_tokens.high as i64;
    let (mut updates, mut told) = (Vec::new(), [0.0; 4]);
    // With one update every response goes through it once, and tells it here.
    let apart = RefCell::new(SamplerDistance::default());
    for epoch in 0..if idle { 0 } else { grpo.epochs as u64 } {
        let order = Permutation::new(n as u64, c.seed, "grpo.order", step << 16 | epoch);
        let order: Vec<usize> = (0..n as u64).map(|i| order.apply(i) as usize).collect();
        for minibatch in order.chunks(size) {
            let tokens = match grpo.loss {
                // By the rollout's tokens, so that no update weighs its own more.
                LossType::Dapo | LossType::Cispo => (0..n).map(length).sum::<f64>() * size as f64 / n as f64,
                _ => minibatch.iter().map(|i| length(*i)).sum(),
            };
            let scored_here = minibatch.iter().filter(|i| scored[**i]).count();
            let counts = Counts { sequences: scored_here as f64, tokens };
            let mut mine = minibatch[world.mesh.data.share(size)].to_vec();
            // Rows of like length together: less padding.
            mine.sort_by_key(|i| (sequences.width([*i]), *i));
            let rows: Vec<&[usize]> = mine.chunks(micro).collect();
            let batches: Vec<MicroBatch> = rows.iter().map(|r| sequences.rows(r).micro_batch()).collect();
            let stats = RefCell::new([0.0; 4]);
            let entry = |(rows, batch)| {
                let (rows, batch): (&&[usize], &MicroBatch) = (rows, batch);
                let width = batch.input.ids.size()[1];
                let (stats, apart, counts, objective) = (&stats, &apart, &counts, &objective);
                let (reference, old, kept, advantages) = (&reference, &old, &kept, &advantages);
                let loss = move |out: &LogProbs| {
                    let logprobs = out.logprobs.view([-1, width]);
                    let (kind, device) = (logprobs.kind(), logprobs.device());
                    let numbers: Vec<i64> = rows.iter().map(|i| *i as i64).collect();
                    let numbers = Tensor::from_slice(&numbers);
                    let of = |t: &Tensor| {
                        t.index_select(0, &numbers).narrow(1, 0, width).to_kind(kind).to_device(device)
                    };
                    let each = |values: &[f64]| {
                        let values: Vec<f64> = rows.iter().map(|i| values[*i]).collect();
                        Tensor::from_slice(&values).to_kind(kind).to_device(device)
                    };
                    let all = batch.labels.ge(0).view([-1, width]).to_device(device).to_kind(kind);
                    let mask = &all * each(kept).unsqueeze(1);
                    let advantages = each(advantages);
                    let before = match old {
                        Some([old, _]) => of(old),
                        None => logprobs.detach(),
                    };
                    let reference = reference.as_ref().map(of);
                    let now = logprobs.detach();
                    if old.is_none() {
                        let responses = rows.iter().map(|i| (*i, &samples[*i].response));
                        apart.borrow_mut().add(sequences, responses, &now.to_device(Device::Cpu));
                    }
                    let sum = |t: &Tensor, mask: &Tensor| (t * mask).sum(Kind::Double).double_value(&[]);
                    let (low, high) = objective.clipped(&now, &before, &advantages, &mask);
                    let mut stats = stats.borrow_mut();
                    stats[0] += sum(&mask.ones_like(), &mask);
                    stats[1] += low + high;
                    stats[2] +=
                        out.entropies.as_ref().map_or(0.0, |e| sum(&e.detach().view([-1, width]), &all));
                    stats[3] += reference.as_ref().map_or(0.0, |r| sum(&(&now - r), &all));
                    let loss =
                        objective.per_token(&logprobs, &before, reference.as_ref(), &advantages, &mask);
                    Ok((loss * objective.weights(&mask, counts, longest)).sum(kind))
                };
                let objective =
                    Objective::LogProbs { temperature, entropies: old.is_none(), loss: Box::new(loss) };
                Entry { batch, objective, balance: None }
            };
            let mut entries: Vec<Entry> = rows.iter().zip(&batches).map(entry).collect();
            let Learner { model, optimizer, .. } = &mut policy.actor;
            let losses = step::accumulate(model, &mut entries, c.train.recompute)?.0;
            drop(entries);
            let sums = Sums { loss: losses.iter().sum(), aux_loss: None };
            let clip = c.actor.optim.as_ref().unwrap_or(&c.optim).clip;
            updates.push(step::apply_gradients(model, optimizer, &policy.actor_world, sums, lr, clip)?);
            let stats = world.group.combine(&stats.into_inner(), ReduceOp::Sum)?;
            told.iter_mut().zip(stats).for_each(|(sum, x)| *sum += x);
        }
    }

    let all_tokens = mask.sum(Kind::Double).double_value(&[]).max(1.0);
    let entropy = match &old {
        Some([_, entropies]) => per_response(entropies)?.iter().sum::<f64>(),
        None => told[2],
    };
    let kl = match (&reference, &kl) {
        (None, _) => f64::NAN,
        (Some(_), Some(kl)) => kl.iter().sum::<f64>(),
        (Some(_), None) => told[3],
    };
    let record = Record::new("train", step + 1)
        .float("reward_std", groups.reward_std)
        .float("kl", kl / n as f64)
        .float("entropy", entropy / all_tokens)
        .float("clip_fraction", told[1] / told[0].max(1.0))
        .count("updates", updates.len() as u64)
        .count("groups_without_variance", groups.without_variance);
    let apart = match &old {
        Some([old, _]) => {
            let mut apart = SamplerDistance::default();
            apart.add(sequences, samples.iter().map(|s| &s.response).enumerate(), old);
            apart
        }
        None => apart.into_inner().combine(&world.group)?,
    };
    let record = apart.describe(record);
    let mean = |f: fn(&Update) -> f64| updates.iter().map(f).sum::<f64>() / updates.len().max(1) as f64;
    let update = Update {
        loss: mean(|u| u.loss),
        aux_loss: None,
        grad_norm: mean(|u| u.grad_norm),
        skipped: updates.iter().any(|u| u.skipped),
    };
    Ok((update, record))
}
