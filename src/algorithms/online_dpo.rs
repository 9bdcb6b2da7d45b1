//! Online DPO: of several responses of the policy to a prompt the best and the worst are a pair (Guo et al. 2024).

use std::cell::RefCell;
use std::time::Instant;

use kernels::c10d::ReduceOp;
use kernels::ops;

use crate::algorithms::dpo::reference::sums;
use crate::algorithms::dpo::{STATS, Work};
use crate::algorithms::folder::RunFolder;
use crate::algorithms::records;
use crate::algorithms::rl::place::average;
use crate::algorithms::rl::policy::{Opened, Policy, Samplers, describe};
use crate::algorithms::rl::sampling::{Batch, Sampled};
use crate::algorithms::run::Start;
use crate::algorithms::step::{self, Entry, Objective, Sums, Update};
use crate::algorithms::training::{Learner, Plan, Progress};
use crate::checkpoint::Part;
use crate::config::common::Common;
use crate::config::dpo::Pairs;
use crate::config::grpo::Truncated;
use crate::config::online_dpo::OnlineDpo;
use crate::config::shape::Shape;
use crate::config::{Algorithm, Loaded};
use crate::data::examples::{Encoded, Example};
use crate::data::prompts::State;
use crate::distributed::agreement::Facts;
use crate::distributed::world::World;
use crate::error::Result;
use crate::model::Llama;
use crate::model::Trainable;
use crate::model::head::LogProbs;
use crate::optim::Schedule;
use crate::optim::average::approach;

/// What a run reads before any rank talks to another.
pub struct Inputs(Opened, Samplers);

impl crate::algorithms::base::Inputs for Inputs {
    fn add_facts(&self, facts: &mut Facts) -> Result<()> {
        self.1.add_facts(facts);
        self.0.add_facts(facts)
    }
}

impl Inputs {
    pub fn open(c: &OnlineDpo) -> Result<Inputs> {
        let frozen = c.dpo.moving_reference.is_none();
        Opened::open(&c.sections_of_responses(), frozen).map(|(opened, samplers)| Inputs(opened, samplers))
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

/// The name of a moving reference in checkpoints.
const REFERENCE: &str = "reference";

/// Runs the training that `loaded` describes, in `world`, on inputs that were opened before the ranks met.
pub fn online_dpo(loaded: &Loaded<OnlineDpo>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
    let (c, Inputs(opened, samplers)) = (&loaded.config, inputs);
    let (common, sections) = (c.common(), c.sections_of_responses());
    let Samplers { train: mut sampler, mut valid } = samplers;
    let tokenizer = opened.tokenizer().clone();
    let mut folder = RunFolder::open(loaded, start, &sections.paths(), &tokenizer, world)?;
    opened.announce(&sampler, valid.as_ref(), c.train.batch_size, world);
    let mut policy = Policy::load(&sections, &opened, world)?;
    folder.record(std::mem::take(&mut policy.records))?;
    let restored = folder.restore::<State>(&mut policy.actor)?;
    if restored.is_none() {
        policy.actor.begin(&opened.actor, c.seed)?;
    }
    // It has the parameters of the actor, each at its place.
    let mut moving = match &c.dpo.moving_reference {
        None => None,
        Some(_) => {
            let params = &policy.actor.model.params;
            let average = average(&opened.actor, &opened.trainable, params, 0.0, c.seed)?;
            Some(Llama::new(opened.actor.shape.clone(), average.params))
        }
    };
    let progress = match restored {
        Some(progress) => {
            sampler.prompts.resume(&progress.data)?;
            if let (Some(moving), Some(from)) = (&mut moving, folder.from()) {
                from.part(REFERENCE)?.load_values(&mut moving.params)?;
            }
            progress
        }
        None => Progress::new(sampler.prompts.state(0)),
    };
    let optim = c.actor.optim.as_ref().unwrap_or(&c.optim);
    let schedule = Schedule::new(&Common { optim, ..common }, opened.steps);
    let mut run = folder.start(progress, Plan::new(&common, opened.steps))?;

    if run.owes_validation() {
        let best = policy.validation(&mut valid, &c.valid, c.train.batch_size, &mut run, world)?;
        run.save(&parts(&policy, moving.as_ref()), best)?;
    }
    while !run.done() {
        let (step, count) = (run.progress.step, c.train.batch_size as u64);
        let asking = Instant::now();
        let group = c.dpo.group_size as usize;
        let batch = policy.ask(&mut sampler, run.progress.data.next, count, group, world)?;
        policy.note_rewards(&batch.samples, step, world);
        let asking_s = asking.elapsed().as_secs_f64();
        let updating = Instant::now();
        let lr = schedule.rate(step);
        let (pairs, ties) = pairs(c, &batch);
        policy.wake()?;
        let (update, stats) = update(c, &mut policy, moving.as_mut(), &pairs, lr, world)?;
        if let (Some(how), Some(reference)) = (&c.dpo.moving_reference, &mut moving)
            && (step + 1).is_multiple_of(how.every as u64)
        {
            approach(&mut reference.params, &policy.actor.model.params, how.rate);
        }
        policy.rest()?;
        let update_s = updating.elapsed().as_secs_f64();

        run.progress.data = sampler.prompts.state(run.progress.data.next + count);
        let generated: usize = batch.samples.iter().map(|s| s.response.ids.len()).sum();
        let read: usize = batch.sequences.prompts.iter().map(Vec::len).sum();
        if c.samples.every > 0 && step.is_multiple_of(c.samples.every as u64) {
            for (i, sample) in batch.samples.iter().take(c.samples.count as usize).enumerate() {
                let (record, text) = sampler.record(sample, step + 1)?;
                run.log_sample(&record, &format!("samples/{i}"), &text);
            }
        }
        if let Some(train) = run.stepped((generated + read) as u64, &update, lr)?.record {
            let train = train.with(describe(&batch.samples));
            let train = records::count(train, &sampler.prompts.odd, c.data.on_error);
            let train = STATS.iter().zip(stats).take(6).fold(train, |r, (key, x)| r.float(key, x));
            run.log(
                &train
                    .count("pairs", pairs.len() as u64)
                    .count("ties", ties)
                    .count("unpaired", count - ties - pairs.len() as u64)
                    .count("dropped", sampler.prompts.dropped)
                    .float("rollout_s", batch.rollout_s)
                    .float("score_s", asking_s - batch.rollout_s)
                    .float("update_s", update_s)
                    .float("generated_tokens_per_s", generated as f64 / batch.rollout_s),
            );
        }
        let best = policy.validation(&mut valid, &c.valid, c.train.batch_size, &mut run, world)?;
        run.save(&parts(&policy, moving.as_ref()), best)?;
    }
    policy.wake()?;
    run.take_best(|best| best.load_values(&mut policy.actor.model.params))?;
    run.finish(|dir| policy.actor.export(dir, &tokenizer, world))
}

/// The run's checkpoint.
fn parts<'a>(policy: &'a Policy, moving: Option<&'a Llama>) -> Vec<Part<'a>> {
    let actor = policy.actor.part("");
    let moving = moving.map(|m| Part { params: &m.params, optim: None, ..policy.actor.part(REFERENCE) });
    [Some(actor), moving].into_iter().flatten().collect()
}

/// The best and the worst response to each prompt; none of prompts whose responses are equally good, or the same, whose
/// number comes with them, and none of those without two responses that have a reward.
fn pairs(c: &OnlineDpo, batch: &Batch) -> (Vec<Example>, u64) {
    let penalty = if c.dpo.truncated == Truncated::Penalize { c.dpo.truncated_penalty } else { 0.0 };
    let reward = |s: &Sampled| {
        let reward = s.judgement.reward?;
        match (s.ended(), c.dpo.truncated) {
            (false, Truncated::Mask) => None,
            (false, _) => Some(reward - penalty),
            (true, _) => Some(reward),
        }
    };
    let size = c.dpo.group_size as usize;
    let mut ties = 0;
    let pair = |(group, samples): (usize, &[Sampled])| {
        let scored: Vec<(usize, f64)> =
            samples.iter().enumerate().filter_map(|(i, s)| Some((i, reward(s)?))).collect();
        let comparable = scored.len() > 1;
        let mut best: Option<(usize, f64)> = None;
        let mut worst = best;
        for (i, reward) in scored {
            // The first of equals.
            if best.is_none_or(|(_, most)| reward > most) {
                best = Some((i, reward));
            }
            if worst.is_none_or(|(_, least)| reward < least) {
                worst = Some((i, reward));
            }
        }
        let ((best, most), (worst, least)) = best.zip(worst)?;
        let prompt = &batch.sequences.prompts[group * size];
        let encode = |i: usize| {
            let response = &samples[i].response.ids;
            let ids = prompt.iter().chain(response).map(|id| *id as u32).collect();
            Encoded {
                ids,
                supervised: (0..prompt.len() + response.len()).map(|i| i >= prompt.len()).collect(),
            }
        };
        let sequences = vec![encode(best), encode(worst)];
        let differ = most > least && sequences[0].ids != sequences[1].ids;
        ties += u64::from(comparable && !differ);
        differ.then(|| Example { sequences, ranks: vec![0, 1], leftovers: Default::default() })
    };
    let pairs = batch.samples.chunks(size).enumerate().filter_map(pair).collect();
    (pairs, ties)
}

/// One update on the pairs, which all ranks know, and what is told of them. Without pairs there is none. Collective.
fn update(
    c: &OnlineDpo,
    policy: &mut Policy,
    mut moving: Option<&mut Llama>,
    pairs: &[Example],
    lr: f64,
    world: &World,
) -> Result<(Update, Vec<f64>)> {
    if pairs.is_empty() {
        let update = Update { loss: 0.0, aux_loss: None, grad_norm: 0.0, skipped: false };
        return Ok((update, vec![0.0; STATS.len()]));
    }
    let (section, device) = (c.dpo.of_pairs(), policy.actor.model.params.device());
    let kind = ops::accumulator(policy.actor.model.params.compute());
    let mut works = Vec::new();
    for (first, count) in step::rounds(pairs.len() as u64, &c.train, world) {
        // Ranks without a pair go along with one that counts nothing.
        let (examples, share) = match count as usize {
            0 => (&pairs[..1], 0.0),
            n => (&pairs[first as usize..][..n], 1.0 / pairs.len() as f64),
        };
        let mut work = Work::of(examples, true, Pairs::All, share, kind, device);
        work.reference = match &mut moving {
            Some(reference) => sums(reference, &work)?,
            None => policy.with_reference(|reference| sums(reference, &work))?,
        };
        works.push(work);
    }
    let stats = RefCell::new([0.0; 8]);
    let entry = |work| {
        let (work, section, stats): (&Work, _, _) = (work, &section, &stats);
        let loss = move |out: &LogProbs| Ok(work.loss(&out.logprobs, section, 0.0, stats));
        let objective = Objective::LogProbs { temperature: 1.0, entropies: false, loss: Box::new(loss) };
        Entry { batch: &work.batch, objective, balance: None }
    };
    let mut entries: Vec<Entry> = works.iter().map(entry).collect();
    let Learner { model, optimizer, .. } = &mut policy.actor;
    let losses = step::accumulate(model, &mut entries, c.train.recompute)?.0;
    drop(entries);
    let loss = Sums { loss: losses.iter().sum(), aux_loss: None };
    let clip = c.actor.optim.as_ref().unwrap_or(&c.optim).clip;
    let update = step::apply_gradients(model, optimizer, &policy.actor_world, loss, lr, clip)?;
    Ok((update, world.group.combine(&stats.into_inner(), ReduceOp::Sum)?))
}
