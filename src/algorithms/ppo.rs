//! Proximal policy optimization (Schulman et al. 2017) as it is used on language models (Ziegler et al. 2019, Ouyang et al.
//! 2022): an iteration samples responses, scores them, and takes several epochs of updates on them.

use std::cell::RefCell;
use std::path::Path;
use std::time::Instant;

use kernels::c10d::{Group, ReduceOp};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::algorithms::base::{self, Base};
use crate::algorithms::rl::advantages::explained_variance;
use crate::algorithms::rl::experience::{Readout, gather_rows, sampler_distance};
use crate::algorithms::rl::losses::{policy_loss, value_loss};
use crate::algorithms::rl::place::{Average, Where, frozen};
use crate::algorithms::rl::sampling::{Batch, Said, Sampler, Scorer};
use crate::algorithms::rl::{
    Clip, Counts, KlController, Moments, PolicySums, checks, gae, reward_model, token_rewards, whiten,
};
use crate::algorithms::step::{self, Entry, MicroBatch, Objective, Sums, Update};
use crate::algorithms::training::{Learner, Plan, Progress, Run, RunFolder, Start};
use crate::checkpoint::Part;
use crate::config::common::Common;
use crate::config::models::Trained;
use crate::config::ppo::{Baseline, KlIn, MissingEos, Ppo};
use crate::config::pretrain::Model;
use crate::config::sections::Precision;
use crate::config::{Algorithm, Loaded};
use crate::data::chat::Chat;
use crate::data::loader::{Loader, Order, Source, State as LoaderState};
use crate::data::prompts::State;
use crate::data::rng::Permutation;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::generate::rollout::Sequences;
use crate::info;
use crate::model::{Llama, Trainable};
use crate::optim::Schedule;
use crate::telemetry::Record;

/// What a run reads before any rank talks to another: files are checked, and errors told, before a group could hang.
pub struct Inputs {
    actor: (Base, Trainable),
    critic: (Base, Trainable),
    /// None: the actor without its adapters.
    reference: Option<Base>,
    reward_model: Option<reward_model::Opened>,
    sampler: Sampler,
    ptx: Option<Loader>,
    steps: u64,
}

impl Inputs {
    /// Opens and checks all that the configuration names.
    pub fn open(c: &Ppo) -> Result<Inputs> {
        let length = c.data.sequence_length;
        let model = |path: &Path| Model::Path(path.to_path_buf());
        let actor = Base::open(&model(&c.actor.path), c.tokenizer.as_ref(), length)
            .map_err(|e| e.context("actor"))?;
        let like_actor = |name: &str, base: Base| match base.tokenizer.base_hash()
            == actor.tokenizer.base_hash()
        {
            true => Ok(base),
            false => Err(Error::config(format!(
                "{name}: its tokenizer is not the actor's; it reads the same tokens, and must be of the same family"
            ))),
        };
        let critic_section = critic_section(c);
        let critic = Base::open_scored(&model(&critic_section.path), c.tokenizer.as_ref(), length, Some(0.0));
        let critic = critic.and_then(|base| like_actor("critic", base)).map_err(|e| e.context("critic"))?;
        let reference = match &c.reference {
            None if c.actor.lora.is_some() => None,
            section => {
                let path = section.as_ref().map_or(&c.actor.path, |r| &r.path);
                let base = Base::open(&model(path), c.tokenizer.as_ref(), length);
                Some(base.and_then(|b| like_actor("reference", b)).map_err(|e| e.context("reference"))?)
            }
        };
        let reward_model = match &c.reward_model {
            None => None,
            Some(section) => {
                let opened = reward_model::Opened::open(section, &actor.tokenizer);
                Some(opened.map_err(|e| e.context("reward_model"))?)
            }
        };
        let trainable = |base: &Base, m: &Trained| base.trainable(&m.freeze, m.lora.as_ref());
        let actor_trainable = trainable(&actor, &c.actor).map_err(|e| e.context("actor"))?;
        let critic_trainable = trainable(&critic, &critic_section).map_err(|e| e.context("critic"))?;
        let chat = Chat::new(&actor.tokenizer)?;
        let rewards = c.rewards();
        let sampler = Sampler::open(&c.data, &c.generation, &rewards, chat, &actor.shape, c.seed)?;
        let ptx = match &c.ppo.ptx {
            None => None,
            Some(ptx) => {
                let source =
                    |s: &crate::config::sections::Source| Source { path: s.path.clone(), weight: s.weight };
                let sources: Vec<Source> = ptx.data.iter().map(source).collect();
                let order = Order::Shuffled { seed: c.seed };
                let (hash, rows) = (actor.tokenizer.base_hash(), actor.shape.vocab_size as usize);
                Some(Loader::new(&sources, Some(hash), rows, ptx.sequence_length as usize, order)?)
            }
        };
        let steps = base::steps(&c.train, sampler.prompts.len() as u64, c.schedule.warmup_steps)?;
        Ok(Inputs {
            actor: (actor, actor_trainable),
            critic: (critic, critic_trainable),
            reference,
            reward_model,
            sampler,
            ptx,
            steps,
        })
    }
}

/// Where the critic comes from, where nothing is said: the reward model, else the actor's trunk.
fn critic_section(c: &Ppo) -> Trained {
    let path = c.reward_model.as_ref().map_or(&c.actor.path, |m| &m.path);
    let default = Trained { path: path.clone(), lora: None, ..c.actor.clone() };
    c.critic.clone().unwrap_or(default)
}

/// Where a run stands.
#[derive(Debug, Serialize, Deserialize)]
struct Position {
    prompts: State,
    kl: KlController,
    ptx: Option<LoaderState>,
}

/// The models of a run on this rank.
struct Models<'a> {
    actor: Learner,
    actor_world: Where<'a>,
    critic: Learner,
    critic_world: Where<'a>,
    reference: Option<(Llama, Where<'a>)>,
    ema: Option<Average>,
}

/// All responses of an iteration, the same on every rank: [n, W], in the actor's accumulator, 0 where there is no token of
/// a response.
struct Experience {
    sequences: Sequences,
    /// 1 at the tokens that are learned from.
    mask: Tensor,
    logprobs: Tensor,
    reference: Tensor,
    values: Tensor,
    rewards: Tensor,
    advantages: Tensor,
    returns: Tensor,
}

/// Runs the training that `loaded` describes, in `world`, on inputs that were opened before the ranks met.
pub fn ppo(loaded: &Loaded<Ppo>, mut inputs: Inputs, world: &World, start: &Start) -> Result<()> {
    let c = &loaded.config;
    let common = c.common();
    let read: Vec<&Path> = inputs_of(c);
    let tokenizer = inputs.actor.0.tokenizer.clone();
    let folder = RunFolder::open(&common, &loaded.resolved_yaml()?, start, &read, &tokenizer, world)?;
    let reward_opened = inputs.reward_model.take();
    let mut models = Models::load(c, &inputs, world)?;
    let mut reward_model = match (&reward_opened, &c.reward_model) {
        (Some(opened), Some(section)) => Some(opened.load(section, &common, world)?),
        _ => None,
    };
    let progress = match folder.restore::<Position>(&mut models.actor)? {
        Some(progress) => {
            inputs.sampler.prompts.resume(&progress.data.prompts)?;
            if let (Some(ptx), Some(state)) = (&inputs.ptx, &progress.data.ptx) {
                ptx.resume(state)?;
            }
            if let Some(from) = folder.from() {
                let Learner { model, optimizer, .. } = &mut models.critic;
                from.part("critic")?.load(&mut model.params, optimizer)?;
                if let Some(ema) = &mut models.ema {
                    from.part("ema")?.fill_weights(&mut ema.params)?;
                }
            }
            progress
        }
        None => {
            models.actor.begin(&inputs.actor.0, c.seed)?;
            models.critic.begin(&inputs.critic.0, c.seed)?;
            let coef = c.ppo.kl_coef;
            let kl = match c.ppo.kl_target {
                Some(target) => KlController::Adaptive { coef, target, horizon: c.ppo.kl_horizon },
                None => KlController::Fixed { coef },
            };
            let ptx = inputs.ptx.as_ref().map(|p| p.state(0));
            Progress::new(Position { prompts: inputs.sampler.prompts.state(0), kl, ptx })
        }
    };
    announce(c, &inputs, &models);
    let mut run = folder.start(progress, Plan::new(&common, inputs.steps))?;

    while !run.done() {
        let step = run.progress.step;
        let first = run.progress.data.prompts.next;
        let kl_coef = run.progress.data.kl.coef();
        let asked = Instant::now();
        let actor = &mut models.actor.model;
        let mut score = |said: &[Said]| reward_model.as_mut().map_or(Ok(Vec::new()), |m| m.score(said));
        let scorer: Option<Scorer> = reward_opened.is_some().then_some(&mut score);
        let batch = inputs.sampler.sample(actor, first, c.train.batch_size as u64, 1, scorer, world)?;
        let scored = Instant::now();
        let (experience, mut record) = experience(c, &mut models, &batch, kl_coef, step, world)?;
        let score_s = scored.elapsed().as_secs_f64();
        let updating = Instant::now();
        let updated = update(c, &inputs, &mut models, &experience, &mut run, world)?;
        let update_s = updating.elapsed().as_secs_f64();

        let tokens: usize = batch.samples.iter().map(|s| s.response.ids.len()).sum();
        let read: usize = batch.sequences.prompts.iter().map(Vec::len).sum();
        let kl = record.get("kl").unwrap_or(0.0);
        let data = &mut run.progress.data;
        data.prompts.next += c.train.batch_size as u64;
        data.kl.update(kl, c.train.batch_size as f64);
        if samples_due(c, step) {
            let trace = c.samples.trace.then(|| models.logprobs(c, &experience, world)).transpose()?;
            write_samples(c, &inputs.sampler, &batch, &experience, trace, &mut run)?;
        }
        let rate = updated.rate;
        if let Some(train) = run.stepped((tokens + read) as u64, &updated.update, rate)?.record {
            record = updated.describe(train.with(record));
            run.log(
                &record
                    .float("kl_coef", kl_coef)
                    .count("dropped", inputs.sampler.prompts.dropped)
                    .float("rollout_s", batch.rollout_s)
                    .float("score_s", score_s + (scored - asked).as_secs_f64() - batch.rollout_s)
                    .float("update_s", update_s)
                    .float("generated_tokens_per_s", tokens as f64 / batch.rollout_s),
            );
        }
        let Models { actor, critic, ema, .. } = &models;
        let mut parts = vec![actor.part(""), critic.part("critic")];
        parts.extend(ema.as_ref().map(|ema| Part { params: &ema.params, optim: None, ..actor.part("ema") }));
        run.save(&parts, false)?;
    }
    let Models { actor, critic, ema, .. } = &models;
    run.finish(|dir| {
        actor.export(dir, &tokenizer, world)?;
        let beside = |name| dir.with_file_name(name);
        critic.export(&beside("critic"), &tokenizer, world)?;
        match ema {
            Some(ema) => actor.export_as(&ema.params, &beside("ema"), &tokenizer, world),
            None => Ok(()),
        }
    })
}

fn inputs_of(c: &Ppo) -> Vec<&Path> {
    let models = [
        Some(&c.actor.path),
        c.critic.as_ref().map(|m| &m.path),
        c.reward_model.as_ref().map(|m| &m.path),
        c.reference.as_ref().map(|m| &m.path),
    ];
    let sources = c.data.train.iter().chain(&c.data.valid);
    let ptx = c.ppo.ptx.iter().flat_map(|p| &p.data);
    let paths = sources.chain(ptx).map(|s| &s.path).chain(models.into_iter().flatten());
    let tokenizer = c.tokenizer.as_ref().and_then(|t| t.path.as_ref());
    paths.chain(tokenizer).map(|p| p.as_path()).collect()
}

impl<'a> Models<'a> {
    fn load(c: &Ppo, inputs: &Inputs, world: &'a World) -> Result<Models<'a>> {
        let common = c.common();
        let critic = critic_section(c);
        let place =
            |name, device: &Option<String>, trained| Where::of(world, name, device.as_deref(), trained);
        let learner = |section: &Trained, (base, trainable): &(Base, Trainable), place: &World| {
            let precision = Precision { compute: section.dtype.unwrap_or(c.precision.compute) };
            let optim = section.optim.as_ref().unwrap_or(&c.optim);
            let own = Common { precision: &precision, optim, ..common };
            Learner::new(base, base.path(&Model::Path(section.path.clone())), trainable, &own, place)
        };
        let actor_world = place("actor", &c.actor.device, true)?;
        let critic_world = place("critic", &critic.device, true)?;
        let actor = learner(&c.actor, &inputs.actor, &actor_world)?;
        let critic = learner(&critic, &inputs.critic, &critic_world)?;
        let reference = match &inputs.reference {
            None => None,
            Some(base) => {
                let section = c.reference.as_ref();
                let own = section.map_or(&c.actor.device, |r| &r.device);
                let place = place("reference", own, false)?;
                let dtype = section.map_or(c.actor.dtype, |r| r.dtype);
                Some((frozen(base, &common, dtype, &place)?, place))
            }
        };
        let ema = match c.ppo.ema {
            Some(decay) => {
                let (base, trainable) = &inputs.actor;
                Some(Average::new(base, trainable, &actor.model.params, decay, c.seed)?)
            }
            None => None,
        };
        Ok(Models { actor, actor_world, critic, critic_world, reference, ema })
    }

    /// The actor's log-probabilities as it is now, of all responses.
    fn logprobs(&mut self, c: &Ppo, experience: &Experience, world: &World) -> Result<Tensor> {
        let readout = readout(c, &experience.sequences, world);
        gather_rows(world, &readout.logprobs(&mut self.actor.model, c.generation.temperature)?)
    }
}

/// This rank's share of the responses.
fn readout<'a>(c: &Ppo, sequences: &'a Sequences, world: &World) -> Readout<'a> {
    let mine = sequences.len() / world.world_size as usize;
    let first = mine * world.rank as usize;
    Readout {
        sequences,
        rows: first..first + mine,
        micro_batch_size: c.micro_batch_size(world.world_size) as usize,
        width: sequences.width(0..sequences.len()),
    }
}

/// What the models say about the responses; scores become rewards, rewards advantages. The record has what is to be told.
fn experience(
    c: &Ppo,
    models: &mut Models,
    batch: &Batch,
    kl_coef: f64,
    step: u64,
    world: &World,
) -> Result<(Experience, Record)> {
    let (ppo, temperature) = (&c.ppo, c.generation.temperature);
    let readout = readout(c, &batch.sequences, world);
    let [logprobs, entropies] = readout.logprobs_and_entropies(&mut models.actor.model, temperature)?;
    let values = readout.values(&mut models.critic.model)?;
    let reference = match &mut models.reference {
        Some((reference, _)) => readout.logprobs(reference, temperature)?,
        None => {
            models.actor.model.adapters = false;
            let reference = readout.logprobs(&mut models.actor.model, temperature);
            models.actor.model.adapters = true;
            reference?
        }
    };
    let kind = logprobs.kind();
    let gather = |t: Tensor| gather_rows(world, &t.to_kind(kind));
    let (logprobs, entropies) = (gather(logprobs)?, gather(entropies)?);
    let (values, reference) = (gather(values)?, gather(reference)?);

    // From here on all ranks compute the same.
    let alone = Group::solo();
    let all = batch.sequences.mask(kind);
    let raw: Vec<Option<f64>> = batch.samples.iter().map(|s| s.judgement.reward).collect();
    let scores = scores(c, batch);
    let learned = |i: usize| scores[i].is_some();
    let rows: Vec<f64> = (0..raw.len()).map(|i| f64::from(learned(i))).collect();
    let mask = &all * Tensor::from_slice(&rows).to_kind(kind).unsqueeze(1);
    let scores: Vec<f64> = scores.iter().map(|s| s.unwrap_or(0.0)).collect();
    let penalty = match ppo.kl_in {
        KlIn::Reward => ppo.kl_estimator.estimate(&logprobs, &reference),
        KlIn::Loss => logprobs.zeros_like(),
    };
    let mut rewards = token_rewards(&Tensor::from_slice(&scores).to_kind(kind), &penalty, kl_coef, &mask);
    if ppo.whiten_rewards {
        rewards = whiten(&rewards, &mask, true, &alone)?;
    }
    let values = values * &mask;
    let (advantages, returns) = gae(&rewards, &values, &mask, None, ppo.gamma, ppo.lambda);
    let advantages = match ppo.whiten_advantages {
        true => whiten(&advantages, &mask, false, &alone)?,
        false => advantages,
    };

    let distance = (&logprobs - &reference) * &all;
    let kl = distance.sum(Kind::Double).double_value(&[]) / raw.len() as f64;
    if step == 0 && ppo.self_check && same_start(c) {
        let apart = Moments::of(&distance.abs(), &all, &alone)?.mean;
        checks::kl_is_zero(apart, models.actor.model.params.compute())?;
    }
    let there: Vec<f64> = raw.iter().flatten().copied().collect();
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let share = |n: usize| n as f64 / raw.len() as f64;
    let responses = batch.samples.iter().map(|s| s.response.clone()).collect::<Vec<_>>();
    let (apart, most_apart) = sampler_distance(&batch.sequences, &responses, &logprobs);
    let record = Record::new("train", step + 1)
        .float("reward", mean(&there))
        .float("kl", kl)
        .float("entropy", Moments::of(&entropies, &all, &alone)?.mean)
        .float("explained_variance", explained_variance(&values, &returns, &mask, &alone)?)
        .float("return", Moments::of(&returns, &mask, &alone)?.mean)
        .float("response_tokens", all.sum(Kind::Double).double_value(&[]) / raw.len() as f64)
        .float("eos_fraction", share(batch.samples.iter().filter(|s| s.ended()).count()))
        .count("unscored", (raw.len() - there.len()) as u64)
        .float("sampler_distance", apart)
        .float("sampler_distance_max", most_apart);
    let sequences = batch.sequences.clone();
    let experience =
        Experience { sequences, mask, logprobs, reference, values, rewards, advantages, returns };
    Ok((experience, record))
}

/// The score that each response is trained with; none where it is left out.
fn scores(c: &Ppo, batch: &Batch) -> Vec<Option<f64>> {
    let ppo = &c.ppo;
    let score = |s: &crate::algorithms::rl::sampling::Sampled| {
        let score = s.judgement.reward?;
        let penalty = ppo.missing_eos_penalty;
        Some(match (s.ended(), ppo.missing_eos) {
            (true, _) | (false, MissingEos::Keep) => score,
            (false, MissingEos::Replace) => -penalty,
            (false, MissingEos::Subtract) => score - penalty,
            (false, MissingEos::Mask) => return None,
        })
    };
    let scores: Vec<Option<f64>> = batch.samples.iter().map(score).collect();
    let there: Vec<f64> = scores.iter().flatten().copied().collect();
    let baseline = match ppo.reward_baseline {
        Baseline::Number(x) => x,
        Baseline::Of(_) => there.iter().sum::<f64>() / there.len().max(1) as f64,
    };
    let clip = ppo.reward_clip.unwrap_or(f64::INFINITY);
    scores.into_iter().map(|s| s.map(|s| (s - baseline).clamp(-clip, clip))).collect()
}

/// Whether the actor begins as its reference.
fn same_start(c: &Ppo) -> bool {
    let dtype = |d: Option<crate::config::sections::Compute>| d.unwrap_or(c.precision.compute);
    match &c.reference {
        None => true,
        Some(r) => {
            r.path == c.actor.path && dtype(r.dtype) == dtype(c.actor.dtype) && r.device == c.actor.device
        }
    }
}

/// What an iteration's updates did.
struct Updated {
    /// Means over the updates; of the actor (of the critic, while only that is trained).
    update: Update,
    rate: f64,
    policy: PolicySums,
    policy_loss: f64,
    value_loss: f64,
    ptx_loss: Option<f64>,
    critic_grad_norm: f64,
    critic_rate: f64,
    /// Updates of the critic.
    updates: u64,
    stopped_early: bool,
}

impl Updated {
    fn describe(&self, record: Record) -> Record {
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

/// The epochs of updates on an iteration's responses.
fn update(
    c: &Ppo,
    inputs: &Inputs,
    models: &mut Models,
    e: &Experience,
    run: &mut Run<Position>,
    world: &World,
) -> Result<Updated> {
    let (ppo, common, step) = (&c.ppo, c.common(), run.progress.step);
    let n = e.sequences.len();
    let (size, ranks) = (ppo.minibatch_size as usize, world.world_size as usize);
    let micro = c.micro_batch_size(world.world_size) as usize;
    let critic_optim = critic_section(c).optim.unwrap_or_else(|| c.optim.clone());
    let actor_optim = c.actor.optim.clone().unwrap_or_else(|| c.optim.clone());
    let rate = |optim| Schedule::new(&Common { optim, ..common }, inputs.steps).rate(step);
    let (actor_rate, critic_rate) = (rate(&actor_optim), rate(&critic_optim));
    let clip = Clip { low: ppo.clip, high: ppo.clip_high.unwrap_or(ppo.clip), dual: ppo.dual_clip };
    let warming_up = step < ppo.value_warmup;
    let longest = inputs.sampler.longest() as i64;
    let kl_coef = match ppo.kl_in {
        KlIn::Reward => 0.0,
        KlIn::Loss => run.progress.data.kl.coef(),
    };

    let mut policy = PolicySums::default();
    let (mut actor_updates, mut critic_updates) = (Vec::new(), Vec::new());
    let (mut ptx_losses, mut stopped_early) = (Vec::new(), false);
    'epochs: for epoch in 0..ppo.epochs as u64 {
        let order = Permutation::new(n as u64, c.seed, "ppo.order", step << 16 | epoch);
        let order: Vec<usize> = (0..n as u64).map(|i| order.apply(i) as usize).collect();
        for minibatch in order.chunks(size) {
            let part = |t: &Tensor, rows: &[usize]| {
                let rows: Vec<i64> = rows.iter().map(|i| *i as i64).collect();
                t.index_select(0, &Tensor::from_slice(&rows))
            };
            let counts = Counts::of(&part(&e.mask, minibatch));
            let mine = size / ranks * world.rank as usize;
            let rows: Vec<&[usize]> = minibatch[mine..mine + size / ranks].chunks(micro).collect();
            let batches: Vec<MicroBatch> =
                rows.iter().map(|rows| e.sequences.rows(rows).micro_batch()).collect();
            // What a micro-batch's losses are made of, on the device that they are computed on.
            let shaped = |t: &Tensor, rows: &[usize], like: &Tensor| {
                part(t, rows).narrow(1, 0, like.size()[1]).to_kind(like.kind()).to_device(like.device())
            };
            let columns = |batch: &MicroBatch| batch.input.ids.size()[1];

            if !warming_up {
                let sums = RefCell::new(PolicySums::default());
                let ptx = ptx_batches(c, inputs, run, micro, world)?;
                let mut entries: Vec<Entry> = rows
                    .iter()
                    .zip(&batches)
                    .map(|(rows, batch)| {
                        let (sums, clip, counts) = (&sums, &clip, &counts);
                        let width = columns(batch);
                        let loss = move |out: &crate::model::head::LogProbs| {
                            let logprobs = out.logprobs.view([-1, width]);
                            let of = |t: &Tensor| shaped(t, rows, &logprobs);
                            let (mask, old, advantages) = (of(&e.mask), of(&e.logprobs), of(&e.advantages));
                            sums.borrow_mut().add(&logprobs, &old, &advantages, None, clip, &mask);
                            let weights = ppo.aggregation.weights(&mask, counts, longest);
                            let mut loss = policy_loss(&logprobs, &old, &advantages, clip);
                            if let Some(entropies) = &out.entropies {
                                loss -= entropies.view([-1, width]) * ppo.entropy_coef;
                            }
                            if kl_coef != 0.0 {
                                loss += ppo.kl_estimator.estimate(&logprobs, &of(&e.reference)) * kl_coef;
                            }
                            Ok((loss * weights).sum(mask.kind()))
                        };
                        let objective = Objective::LogProbs {
                            temperature: c.generation.temperature,
                            entropies: ppo.entropy_coef != 0.0,
                            loss: Box::new(loss),
                        };
                        Entry { batch, objective, balance: None }
                    })
                    .collect();
                entries.extend(ptx.iter().map(|(batch, weight)| {
                    let objective = Objective::CrossEntropy { weight: *weight };
                    Entry { batch, objective, balance: None }
                }));
                let Learner { model, optimizer, .. } = &mut models.actor;
                let losses = step::accumulate(model, &mut entries, c.train.recompute)?.0;
                drop(entries);
                let sums = sums.into_inner().combine(&world.group)?;
                if step == 0 && actor_updates.is_empty() && ppo.self_check {
                    let distance = sums.ratio_distance / sums.tokens.max(1.0);
                    checks::ratios_are_one(distance, model.params.compute(), n == micro)?;
                }
                if ppo.stop_kl.is_some_and(|most| sums.approx_kl() > most) {
                    model.params.clear_gradients();
                    stopped_early = true;
                    break 'epochs;
                }
                policy = policy.plus(&sums);
                let (ours, theirs) = losses.split_at(rows.len());
                if !theirs.is_empty() {
                    let sum = world.group.combine(&[theirs.iter().sum()], ReduceOp::Sum)?[0];
                    ptx_losses.push(sum / ppo.ptx.as_ref().map_or(1.0, |p| p.coef));
                }
                let loss = Sums { loss: ours.iter().sum(), aux_loss: None };
                let place = &models.actor_world;
                let update =
                    step::apply_gradients(model, optimizer, place, loss, actor_rate, actor_optim.clip)?;
                if let (Some(ema), false) = (&mut models.ema, update.skipped) {
                    ema.follow(&model.params);
                }
                actor_updates.push(update);
            }

            let clip_value = (ppo.clip_value > 0.0).then_some(ppo.clip_value);
            let entry = |(rows, batch)| {
                let rows: &&[usize] = rows;
                let width = columns(batch);
                let counts = &counts;
                let loss = move |values: &Tensor| {
                    let values = values.view([-1, width]);
                    let of = |t: &Tensor| shaped(t, rows, &values);
                    let weights = of(&e.mask) / counts.tokens.max(1.0);
                    let loss = value_loss(&values, &of(&e.values), &of(&e.returns), clip_value);
                    Ok((loss * weights).sum(values.kind()))
                };
                Entry { batch, objective: Objective::Values { loss: Box::new(loss) }, balance: None }
            };
            let mut entries: Vec<Entry> = rows.iter().zip(&batches).map(entry).collect();
            let Learner { model, optimizer, .. } = &mut models.critic;
            let losses = step::accumulate(model, &mut entries, c.train.recompute)?.0;
            drop(entries);
            let loss = Sums { loss: losses.iter().sum(), aux_loss: None };
            let place = &models.critic_world;
            critic_updates.push(step::apply_gradients(
                model,
                optimizer,
                place,
                loss,
                critic_rate,
                critic_optim.clip,
            )?);
        }
    }
    let mean = |updates: &[Update], f: fn(&Update) -> f64| {
        updates.iter().map(f).sum::<f64>() / updates.len().max(1) as f64
    };
    let (actor, critic) = (mean(&actor_updates, |u| u.loss), mean(&critic_updates, |u| u.loss));
    let told = if warming_up { &critic_updates } else { &actor_updates };
    Ok(Updated {
        update: Update {
            loss: actor + critic,
            aux_loss: None,
            grad_norm: mean(told, |u| u.grad_norm),
            skipped: actor_updates.iter().chain(&critic_updates).any(|u| u.skipped),
        },
        rate: if warming_up { 0.0 } else { actor_rate },
        policy,
        policy_loss: actor,
        value_loss: critic,
        ptx_loss: (!ptx_losses.is_empty()).then(|| ptx_losses.iter().sum::<f64>() / ptx_losses.len() as f64),
        critic_grad_norm: mean(&critic_updates, |u| u.grad_norm),
        critic_rate,
        updates: critic_updates.len() as u64,
        stopped_early,
    })
}

/// The next rows of pretraining data, this rank's, with the weight of a token's loss.
fn ptx_batches(
    c: &Ppo,
    inputs: &Inputs,
    run: &mut Run<Position>,
    micro: usize,
    world: &World,
) -> Result<Vec<(MicroBatch, f64)>> {
    let (Some(ptx), Some(data), Some(state)) = (&c.ppo.ptx, &inputs.ptx, &mut run.progress.data.ptx) else {
        return Ok(Vec::new());
    };
    let rows = ptx.batch_size.unwrap_or(c.ppo.minibatch_size);
    let weight = ptx.coef / (rows * ptx.sequence_length) as f64;
    let mine = rows / world.world_size;
    let first = state.next + (world.rank * mine) as u64;
    state.next += rows as u64;
    (0..mine as usize / micro)
        .map(|i| {
            let batch = data.batch(first + (i * micro) as u64, micro)?;
            let batch = MicroBatch::from_rows(&batch.input_ids, &batch.labels, batch.columns as i64);
            Ok((batch, weight))
        })
        .collect()
}

fn samples_due(c: &Ppo, step: u64) -> bool {
    c.samples.every > 0 && step.is_multiple_of(c.samples.every)
}

/// The first responses of an iteration into samples.jsonl and TensorBoard, their tokens into trace.jsonl.
fn write_samples(
    c: &Ppo,
    sampler: &Sampler,
    batch: &Batch,
    e: &Experience,
    new: Option<Tensor>,
    run: &mut Run<Position>,
) -> Result<()> {
    let step = run.progress.step + 1;
    let tokenizer = sampler.chat.tokenizer();
    for (i, sample) in batch.samples.iter().take(c.samples.count as usize).enumerate() {
        let (record, text) = sampler.record(sample, step)?;
        run.log_sample(&record, &format!("samples/{i}"), &text);
        let Some(new) = &new else { continue };
        for (position, (place, id)) in e.sequences.range(i).zip(&sample.response.ids).enumerate() {
            let at = |t: &Tensor| t.double_value(&[i as i64, place as i64]);
            run.log_trace(
                &Record::new("token", step)
                    .count("sample", i as u64)
                    .count("position", position as u64)
                    .text("token", &tokenizer.decode(&[*id as u32], false)?)
                    .count("id", *id as u64)
                    .float("logprob_old", at(&e.logprobs))
                    .float("logprob_new", at(new))
                    .float("logprob_reference", at(&e.reference))
                    .float("kl", at(&e.logprobs) - at(&e.reference))
                    .float("value", at(&e.values))
                    .float("reward", at(&e.rewards))
                    .float("advantage", at(&e.advantages))
                    .float("return", at(&e.returns)),
            );
        }
    }
    Ok(())
}

fn announce(c: &Ppo, inputs: &Inputs, models: &Models) {
    let size = |m: &Llama| m.shape.num_parameters() as f64 / 1e6;
    info!(
        "actor: {:.2}M parameters on {:?}; critic: {:.2}M on {:?}; reference: {}",
        size(&models.actor.model),
        models.actor_world.device,
        size(&models.critic.model),
        models.critic_world.device,
        match &models.reference {
            Some((model, place)) => format!("{:.2}M on {:?}", size(model), place.device),
            None => "the actor without its adapters".into(),
        }
    );
    info!(
        "data: {} prompts, {} dropped for their length; {} iterations are {:.2} epochs",
        inputs.sampler.prompts.len(),
        inputs.sampler.prompts.dropped,
        inputs.steps,
        inputs.steps as f64 * c.train.batch_size as f64 / inputs.sampler.prompts.len() as f64
    );
}
