//! Group-relative policy optimization (Shao et al. 2024): several responses to every prompt are compared with each other, and
//! the better ones become more probable.

mod update;

use std::time::Instant;

use crate::algorithms::base::Base;
use crate::algorithms::folder::RunFolder;
use crate::algorithms::losses::grpo::{GroupAdvantages, ScaleRewards, group_advantages, rloo, varies};
use crate::algorithms::recipe::{Recipe, Shown};
use crate::algorithms::records;
use crate::algorithms::rl::memory::{self, Others, Work};
use crate::algorithms::rl::policy::{OpenedPolicy, Policy, Samplers, describe};
use crate::algorithms::rl::sampling::{ResponseBatch, Sampled, Sampler, SamplingTimes};
use crate::algorithms::run::Start;
use crate::algorithms::session::Session;
use crate::config::common::Common;
use crate::config::grpo::{Advantages, Grpo, Truncated};
use crate::config::shape::Shape;
use crate::config::{Algorithm, Loaded};
use crate::data::position::Indexed;
use crate::distributed::agreement::Facts;
use crate::distributed::world::World;
use crate::error::Result;
use crate::model::Trainable;
use crate::optim::Schedule;
use crate::plan::{MemoryPlan, PlanTarget};
use crate::telemetry::MetricsLine;

/// What a run reads before any rank talks to another.
pub struct Inputs {
    opened: OpenedPolicy,
    samplers: Samplers,
}

impl Recipe for Grpo {
    const ABOUT: &'static str = "Train a model on its own answers by GRPO";
    type Inputs = Inputs;

    fn open(&self) -> Result<Inputs> {
        let (opened, samplers) = OpenedPolicy::open(&self.sections_of_responses(), self.uses_reference())?;
        Ok(Inputs { opened, samplers })
    }

    fn add_facts(inputs: &Inputs, facts: &mut Facts) -> Result<()> {
        inputs.samplers.add_facts(facts);
        inputs.opened.add_facts(facts)
    }

    fn trained(inputs: &Inputs) -> Vec<(&'static str, &Shape, &Trainable)> {
        vec![("actor", &inputs.opened.actor.shape, &inputs.opened.trainable)]
    }

    fn frozen_models<'a>(&self, inputs: &'a Inputs) -> Vec<(&'static str, &'a Base)> {
        inputs.opened.frozen_models(&self.sections_of_responses())
    }

    fn steps(inputs: &Inputs) -> u64 {
        inputs.opened.length.steps
    }

    fn data_line(&self, inputs: &Inputs) -> String {
        inputs.opened.data_line(&inputs.samplers.train.prompts)
    }

    fn shown<'a>(&self, inputs: &'a Inputs) -> Shown<'a> {
        Shown::Prompts(&inputs.samplers)
    }

    fn names_preset(&self) -> bool {
        memory::names_preset(&self.sections_of_responses(), None)
    }

    fn plan(&self, target: &PlanTarget) -> Result<MemoryPlan> {
        let ranks = self.parallel.data_ranks(target.ranks);
        let work = Work {
            responses: self.num_responses() / ranks,
            micro_batch: self.micro_batch_size(ranks),
            update: self.minibatch_size() / ranks,
            learned: self.num_updates() * self.minibatch_size(),
        };
        let others = Others { critic: None, reference: self.uses_reference(), average: false };
        memory::plan(Self::SUBCOMMAND, &self.sections_of_responses(), &others, work, target)
    }

    fn train(loaded: &Loaded<Self>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
        grpo(loaded, &inputs.opened, inputs.samplers, world, start)
    }
}

fn grpo(
    loaded: &Loaded<Grpo>,
    opened: &OpenedPolicy,
    samplers: Samplers,
    world: &World,
    start: &Start,
) -> Result<()> {
    let c = &loaded.config;
    let (common, sections) = (c.common(), c.sections_of_responses());
    let tokenizer = opened.tokenizer();
    let mut folder = RunFolder::open(loaded, start, &sections.paths(), tokenizer, world)?;
    let Samplers { train: mut sampler, mut valid } = samplers;
    opened.announce(&sampler, valid.as_ref(), world);
    let mut policy = Policy::load(&sections, opened, world)?;
    folder.record(std::mem::take(&mut policy.records))?;
    let progress = folder.restore_or_begin(&mut policy, &sampler.prompts)?;

    let optim = c.actor.optim.as_ref().unwrap_or(&c.optim);
    let common = Common { optim, ..common };
    let schedule = Schedule::new(&common, opened.length.steps);
    let mut session = Session::start(folder, progress, policy, &common, &opened.length)?;
    let mut validation = |s: &mut Session<Policy, _>| {
        s.models.validation(&mut valid, &c.valid, c.train.batch_size, &mut s.run, world)
    };
    session.catch_up(&mut validation)?;
    while !session.run.done() {
        let (step, first) = (session.run.progress.step, session.run.progress.data.next);
        let (lr, asking) = (schedule.rate(step), Instant::now());
        let policy = &mut session.models;
        let asked = ask(c, policy, &mut sampler, first, world)?;
        let batch = &asked.batch;
        policy.note_rewards(&batch.samples, step, world);
        let (asking_s, updating) = (asking.elapsed().as_secs_f64(), Instant::now());
        let temperature = sampler.temperature();
        let (update, record) =
            policy.on_device(|policy| update::update(c, policy, batch, step, lr, temperature, world))?;
        let update_s = updating.elapsed().as_secs_f64();

        session.run.progress.data = sampler.prompts.at(asked.next);
        sampler.log_samples(batch, &c.samples, &mut session.run)?;
        if let Some(train) = session.run.stepped(batch.tokens(), &update, lr)?.record {
            let train = records::count(train, &sampler.prompts.odd, c.data.on_error)
                .with(asked.told)
                .with(record)
                .count("resampled", asked.resampled)
                .count("dropped", sampler.prompts.dropped);
            let (rollout_s, generated_tokens) = (batch.rollout_s, asked.generated);
            let times = SamplingTimes { asking_s, rollout_s, update_s, generated_tokens };
            session.run.log(&times.describe(train));
        }
        session.end_step(&mut validation)?;
    }
    session.take_best()?;
    session.finish(tokenizer)
}

/// The responses of an iteration.
struct GroupResponses {
    batch: ResponseBatch,
    /// The number of the next prompt.
    next: u64,
    /// Groups that were asked in the place of others.
    resampled: u64,
    /// Tokens of all responses, also of those that were replaced.
    generated: usize,
    /// Of the responses to the prompts that were due, also of those that were replaced: what is left of resampling is the
    /// harder part of the data. `reward_kept` is the mean of those that are learned from.
    told: MetricsLine,
}

/// Asks the next prompts, and others in the place of those whose responses are all equally good, as often as is configured.
/// All ranks decide alike, since they know all responses. Collective.
fn ask(
    c: &Grpo,
    policy: &mut Policy,
    sampler: &mut Sampler,
    first: u64,
    world: &World,
) -> Result<GroupResponses> {
    let (count, group) = (c.train.batch_size as u64, c.grpo.group_size as usize);
    let mut batch = policy.ask(sampler, first, count, group, world)?;
    let (mut next, mut resampled, mut generated) = (first + count, 0, batch.generated_tokens());
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
        generated += other.generated_tokens();
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
    Ok(GroupResponses { batch, next, resampled, generated, told })
}

fn group_of(batch: &ResponseBatch, number: usize, size: usize) -> &[Sampled] {
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
