//! Online DPO: of several responses of the policy to a prompt the best and the worst are a pair (Guo et al. 2024).

use std::cell::RefCell;
use std::path::Path;
use std::time::Instant;

use kernels::ops;

use crate::algorithms::base::Base;
use crate::algorithms::dpo::batch::{PairSums, PreferenceBatch};
use crate::algorithms::folder::RunFolder;
use crate::algorithms::learner::Learners;
use crate::algorithms::recipe::{Recipe, Shown};
use crate::algorithms::records;
use crate::algorithms::rl::memory::{self, Others, Work};
use crate::algorithms::rl::place::average;
use crate::algorithms::rl::policy::{OpenedPolicy, Policy, Samplers, describe};
use crate::algorithms::rl::sampling::{ResponseBatch, Sampled, SamplingTimes};
use crate::algorithms::run::Start;
use crate::algorithms::session::Session;
use crate::algorithms::step::{self, StepEntry, Update};
use crate::checkpoint::{Checkpoint, SavedPart};
use crate::config::common::Common;
use crate::config::dpo::ComparedPairs;
use crate::config::grpo::Truncated;
use crate::config::online_dpo::OnlineDpo;
use crate::config::shape::Shape;
use crate::config::{Algorithm, Loaded};
use crate::data::examples::{Encoded, Example};
use crate::data::position::Indexed;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::agreement::Facts;
use crate::distributed::world::World;
use crate::error::Result;
use crate::model::{Llama, Trainable};
use crate::optim::Schedule;
use crate::optim::average::approach;
use crate::plan::{MemoryPlan, PlanTarget};

/// What a run reads before any rank talks to another.
pub struct Inputs {
    opened: OpenedPolicy,
    samplers: Samplers,
}

/// The name of a moving reference in checkpoints.
const REFERENCE: &str = "reference";

impl Recipe for OnlineDpo {
    const ABOUT: &'static str = "Train a model to prefer the better of its own answers";
    type Inputs = Inputs;

    fn open(&self) -> Result<Inputs> {
        let frozen = self.dpo.moving_reference.is_none();
        let (opened, samplers) = OpenedPolicy::open(&self.sections_of_responses(), frozen)?;
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
        let rows = 2 * self.train.batch_size / ranks;
        let work = Work {
            responses: self.train.batch_size * self.dpo.group_size / ranks,
            micro_batch: self.train.micro_batch_size.map_or(rows, |prompts| 2 * prompts),
            update: rows,
            learned: rows * ranks,
        };
        let others = Others { critic: None, reference: true, average: false };
        memory::plan(Self::SUBCOMMAND, &self.sections_of_responses(), &others, work, target)
    }

    fn train(loaded: &Loaded<Self>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
        online_dpo(loaded, &inputs.opened, inputs.samplers, world, start)
    }
}

/// The policy, and the reference where it follows the policy.
struct OnlineDpoModels<'a> {
    policy: Policy<'a>,
    moving: Moving<'a>,
}

/// A reference that follows the policy: it has the parameters of the actor, each at its place.
struct Moving<'a> {
    c: &'a OnlineDpo,
    opened: &'a OpenedPolicy,
    /// None where the reference does not move, and until the actor has its values.
    model: Option<Llama>,
}

impl Moving<'_> {
    /// Begins as the actor is. Collective.
    fn begin(&mut self, policy: &Policy) -> Result<()> {
        if self.c.dpo.moving_reference.is_some() {
            let params = &policy.actor.model.params;
            let OpenedPolicy { actor, trainable, .. } = self.opened;
            let average = average(actor, trainable, params, 0.0, self.c.seed)?;
            let mut model = Llama::new(actor.shape.clone(), average.params);
            model.set_float8(policy.actor.model.float8())?;
            self.model = Some(model);
        }
        Ok(())
    }

    /// Follows the actor after `steps` steps, where that is due.
    fn follow(&mut self, policy: &Policy, steps: u64) {
        if let (Some(how), Some(reference)) = (&self.c.dpo.moving_reference, &mut self.model)
            && steps.is_multiple_of(how.every as u64)
        {
            approach(&mut reference.params, &policy.actor.model.params, how.rate);
        }
    }
}

impl Learners for OnlineDpoModels<'_> {
    fn parts(&self) -> Vec<SavedPart<'_>> {
        let actor = self.policy.actor.part("");
        let moving = self.moving.model.as_ref();
        let moving =
            moving.map(|m| SavedPart { params: &m.params, optim: None, ..self.policy.actor.part(REFERENCE) });
        [Some(actor), moving].into_iter().flatten().collect()
    }

    fn begin(&mut self) -> Result<()> {
        self.policy.begin()?;
        self.moving.begin(&self.policy)
    }

    fn restore(&mut self, from: &Checkpoint) -> Result<serde_json::Value> {
        let state = self.policy.restore(from)?;
        self.moving.begin(&self.policy)?;
        if let Some(moving) = &mut self.moving.model {
            from.part(REFERENCE)?.load_values(&mut moving.params)?;
        }
        Ok(state)
    }

    fn onload(&mut self) -> Result<()> {
        self.policy.onload()
    }

    fn take(&mut self, best: &Checkpoint) -> Result<()> {
        self.policy.take(best)
    }

    fn export(&self, dir: &Path, tokenizer: &Tokenizer, world: &World) -> Result<()> {
        self.policy.export(dir, tokenizer, world)
    }
}

fn online_dpo(
    loaded: &Loaded<OnlineDpo>,
    opened: &OpenedPolicy,
    samplers: Samplers,
    world: &World,
    start: &Start,
) -> Result<()> {
    let c = &loaded.config;
    let (common, sections) = (c.common(), c.sections_of_responses());
    let Samplers { train: mut sampler, mut valid } = samplers;
    let tokenizer = opened.tokenizer();
    let mut folder = RunFolder::open(loaded, start, &sections.paths(), tokenizer, world)?;
    opened.announce(&sampler, valid.as_ref(), world);
    let mut policy = Policy::load(&sections, opened, world)?;
    folder.record(std::mem::take(&mut policy.records))?;
    let mut models = OnlineDpoModels { policy, moving: Moving { c, opened, model: None } };
    let progress = folder.restore_or_begin(&mut models, &sampler.prompts)?;

    let optim = c.actor.optim.as_ref().unwrap_or(&c.optim);
    let common = Common { optim, ..common };
    let schedule = Schedule::new(&common, opened.length.steps);
    let (count, group) = (c.train.batch_size as u64, c.dpo.group_size as usize);
    let mut session = Session::start(folder, progress, models, &common, &opened.length)?;
    let mut validation = |s: &mut Session<OnlineDpoModels, _>| {
        s.models.policy.validation(&mut valid, &c.valid, c.train.batch_size, &mut s.run, world)
    };
    session.catch_up(&mut validation)?;
    while !session.run.done() {
        let (step, first) = (session.run.progress.step, session.run.progress.data.next);
        let (lr, asking) = (schedule.rate(step), Instant::now());
        let policy = &mut session.models.policy;
        let batch = policy.ask(&mut sampler, first, count, group, world)?;
        policy.note_rewards(&batch.samples, step, world);
        let (asking_s, updating) = (asking.elapsed().as_secs_f64(), Instant::now());
        let (pairs, ties) = pairs(c, &batch);
        let OnlineDpoModels { policy, moving } = &mut session.models;
        let (update, sums) = policy.on_device(|policy| {
            let updated = update(c, policy, moving.model.as_mut(), &pairs, lr, world)?;
            moving.follow(policy, step + 1);
            Ok(updated)
        })?;
        let update_s = updating.elapsed().as_secs_f64();

        session.run.progress.data = sampler.prompts.at(first + count);
        sampler.log_samples(&batch, &c.samples, &mut session.run)?;
        if let Some(record) = session.run.stepped(batch.tokens(), &update, lr)?.record {
            let record = sums.describe(record.with(describe(&batch.samples)));
            let record = records::count(record, &sampler.prompts.odd, c.data.on_error)
                .count("pairs", pairs.len() as u64)
                .count("ties", ties)
                .count("unpaired", count - ties - pairs.len() as u64)
                .count("dropped", sampler.prompts.dropped);
            let (rollout_s, generated_tokens) = (batch.rollout_s, batch.generated_tokens());
            let times = SamplingTimes { asking_s, rollout_s, update_s, generated_tokens };
            session.run.log(&times.describe(record));
        }
        session.end_step(&mut validation)?;
    }
    session.take_best()?;
    session.finish(tokenizer)
}

/// The best and the worst response to each prompt; none of prompts whose responses are equally good, or the same, whose
/// number comes with them, and none of those without two responses that have a reward.
fn pairs(c: &OnlineDpo, batch: &ResponseBatch) -> (Vec<Example>, u64) {
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

/// One update on the pairs, which all ranks know, and what is counted of them. Without pairs there is none. Collective.
fn update(
    c: &OnlineDpo,
    policy: &mut Policy,
    mut moving: Option<&mut Llama>,
    pairs: &[Example],
    lr: f64,
    world: &World,
) -> Result<(Update, PairSums)> {
    if pairs.is_empty() {
        let update = Update { loss: 0.0, aux_loss: None, grad_norm: 0.0, skipped: false };
        return Ok((update, PairSums::default()));
    }
    let (section, device) = (c.dpo.of_pairs(), policy.actor.model.params.device());
    let kind = ops::accumulator(policy.actor.model.params.compute());
    let mut batches = Vec::new();
    for (first, count) in step::rounds(pairs.len() as u64, &c.train, world) {
        // Ranks without a pair go along with one that counts nothing.
        let (examples, share) = match count as usize {
            0 => (&pairs[..1], 0.0),
            n => (&pairs[first as usize..][..n], 1.0 / pairs.len() as f64),
        };
        let mut batch = PreferenceBatch::of(examples, true, ComparedPairs::All, share, kind, device);
        batch.reference = match &mut moving {
            Some(reference) => batch.completions.logps(reference)?,
            None => policy.with_reference(|reference| batch.completions.logps(reference))?,
        };
        batches.push(batch);
    }
    let sums = RefCell::new(PairSums::default());
    let mut entries: Vec<StepEntry> = batches.iter().map(|batch| batch.entry(&section, 0.0, &sums)).collect();
    let update = policy.actor.update(&mut entries, lr, &policy.actor_world)?;
    drop(entries);
    Ok((update, sums.into_inner().over_ranks(world)?))
}
