//! Proximal policy optimization (Schulman et al. 2017) as it is used on language models (Ziegler et al. 2019, Ouyang et al.
//! 2022): an iteration samples responses, scores them, and takes several epochs of updates on them.

mod experience;
mod update;

use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::algorithms::base::Base;
use crate::algorithms::folder::RunFolder;
use crate::algorithms::records;
use crate::algorithms::rl::KlController;
use crate::algorithms::rl::checks::Stalled;
use crate::algorithms::rl::place::{Where, average, check_offload};
use crate::algorithms::rl::policy::{Opened, Policy, Samplers, check_reads, share_of};
use crate::algorithms::run::Start;
use crate::algorithms::training::{Learner, Plan, Progress};
use crate::checkpoint::{Checkpoint, Part};
use crate::config::common::Common;
use crate::config::model::Model;
use crate::config::ppo::Ppo;
use crate::config::reward::Score;
use crate::config::sections::{self, Precision};
use crate::config::shape::Shape;
use crate::config::{Algorithm, Loaded};
use crate::data::loader::{Loader, Order, Source, State as LoaderState};
use crate::data::prompts::State;
use crate::distributed::agreement::Facts;
use crate::distributed::exchange::gather_rows;
use crate::distributed::world::World;
use crate::error::Result;
use crate::generate::rollout::Sequences;
use crate::info;
use crate::model::{Trainable, init};
use crate::optim::Average;

/// What a run reads before any rank talks to another: files are checked, and errors told, before a group could hang.
pub struct Inputs {
    opened: Opened,
    samplers: Samplers,
    critic: (Base, Trainable),
    ptx: Option<Loader>,
}

impl crate::algorithms::base::Inputs for Inputs {
    fn add_facts(&self, facts: &mut Facts) -> Result<()> {
        self.samplers.add_facts(facts);
        self.opened.add_facts(facts)?;
        self.ptx.iter().for_each(|ptx| facts.add_contents("ppo.ptx.data", ptx.fingerprint()));
        self.critic.0.add_facts("critic", facts)
    }
}

impl Inputs {
    /// Opens and checks all that the configuration names.
    pub fn open(c: &Ppo) -> Result<Inputs> {
        let (opened, samplers) = Opened::open(&c.sections_of_responses(), true)?;
        let actor = &opened.actor;
        let section = c.critic();
        let critic = || -> Result<(Base, Trainable)> {
            let (model, length) = (Model::Path(section.path.clone()), c.data.sequence_length);
            let base = Base::open_scored(&model, c.tokenizer.as_ref(), length, Some(0.0))?;
            check_reads(&base, actor)?;
            let trainable = base.trainable(&section.freeze, section.lora.as_ref())?;
            Ok((base, trainable))
        };
        let critic = critic().map_err(|e| e.context("critic"))?;
        let ptx = match &c.ppo.ptx {
            None => None,
            Some(ptx) => {
                let source = |s: &sections::Source| Source { path: s.path.clone(), weight: s.weight };
                let sources: Vec<Source> = ptx.data.iter().map(source).collect();
                let order = Order::Shuffled { seed: c.seed };
                let (hash, rows) = (actor.tokenizer.base_hash(), actor.shape.vocab_size as usize);
                Some(Loader::new(&sources, Some(hash), rows, ptx.sequence_length as usize, order)?)
            }
        };
        Ok(Inputs { opened, samplers, critic, ptx })
    }

    /// The models that are trained: name, shape, and what of them.
    pub fn trained(&self) -> [(&str, &Shape, &Trainable); 2] {
        let (opened, (critic, of_critic)) = (&self.opened, &self.critic);
        [("actor", &opened.actor.shape, &opened.trainable), ("critic", &critic.shape, of_critic)]
    }

    /// Where prompts come from.
    pub fn samplers(&self) -> &Samplers {
        &self.samplers
    }
}

/// [`Inputs`] of which the samplers are in use.
struct Ready {
    opened: Opened,
    critic: (Base, Trainable),
    ptx: Option<Loader>,
}

impl Ready {
    /// What the values of the critic's head are multiplied by at the start, where it was a reward model's: so that they are
    /// of the size of its rewards. Only of a head whose value at the last token is the score; those of which the values of
    /// tokens are added or averaged begin as they are.
    fn gain_of_values(&self) -> Result<Option<f64>> {
        let scoring = self.critic.0.weights.as_ref().map_or(Ok(None), |w| w.scoring())?;
        Ok(scoring.filter(|s| s.score == Score::Last && s.gain != 1.0).map(|s| s.gain))
    }
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
    /// The actor, its reference, and the reward model.
    policy: Policy<'a>,
    critic: Learner,
    critic_world: Where<'a>,
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
pub fn ppo(loaded: &Loaded<Ppo>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
    let Inputs { opened, samplers, critic, ptx } = inputs;
    let (inputs, samplers) = (&Ready { opened, critic, ptx }, samplers);
    let c = &loaded.config;
    let common = c.common();
    let tokenizer = inputs.opened.tokenizer().clone();
    let mut folder = RunFolder::open(loaded, start, &c.paths(), &tokenizer, world)?;
    let Samplers { train: mut sampler, mut valid } = samplers;
    let mut models = Models::load(c, inputs, world)?;
    folder.record(std::mem::take(&mut models.policy.records))?;
    folder.record(models.critic.record("critic", &inputs.critic.0))?;
    let progress = match folder.restore::<Position>(&mut models.policy.actor)? {
        Some(progress) => {
            sampler.prompts.resume(&progress.data.prompts)?;
            if let (Some(ptx), Some(state)) = (&inputs.ptx, &progress.data.ptx) {
                ptx.resume(state)?;
            }
            if let Some(from) = folder.from() {
                let Learner { model, optimizer, .. } = &mut models.critic;
                from.part("critic")?.load(&mut model.params, optimizer)?;
                if let Some(ema) = &mut models.ema {
                    from.part("ema")?.load_values(&mut ema.params)?;
                }
            }
            progress
        }
        None => {
            models.policy.actor.begin(&inputs.opened.actor, c.seed)?;
            models.critic.begin(&inputs.critic.0, c.seed)?;
            if let Some(gain) = inputs.gain_of_values()? {
                init::scale_score(&mut models.critic.model.params, gain)?;
            }
            let coef = c.ppo.kl_coef;
            let kl = match c.ppo.kl_target {
                Some(target) => KlController::Adaptive { coef, target, horizon: c.ppo.kl_horizon },
                None => KlController::Fixed { coef },
            };
            let ptx = inputs.ptx.as_ref().map(|p| p.state(0));
            Progress::new(Position { prompts: sampler.prompts.state(0), kl, ptx })
        }
    };
    inputs.opened.announce(&sampler, valid.as_ref(), c.train.batch_size, world);
    let size = models.critic.model.shape.num_parameters() as f64 / 1e6;
    info!("critic: {size:.2}M parameters on {:?}", models.critic_world.device);
    let mut run = folder.start(progress, Plan::new(&common, inputs.opened.steps))?;

    if run.owes_validation() {
        let best = models.policy.validation(&mut valid, &c.valid, c.train.batch_size, &mut run, world)?;
        run.save(&models.parts(), best)?;
    }
    let mut stalled = Stalled::default();
    while !run.done() {
        let (step, count) = (run.progress.step, c.train.batch_size as u64);
        let first = run.progress.data.prompts.next;
        let kl_coef = run.progress.data.kl.coef();
        let asking = Instant::now();
        let batch = models.policy.ask(&mut sampler, first, count, 1, world)?;
        models.policy.note_rewards(&batch.samples, step, world);
        let (experience, mut record) = experience::experience(c, &mut models, &batch, kl_coef, step, world)?;
        let score_s = asking.elapsed().as_secs_f64() - batch.rollout_s;
        let updating = Instant::now();
        let updated = update::update(c, inputs, &mut models, &experience, &mut run, world)?;
        let update_s = updating.elapsed().as_secs_f64();
        let explained = record.get("explained_variance").unwrap_or(f64::NAN);
        stalled.check(explained, updated.value_loss, updated.critic_grad_norm)?;

        let generated: usize = batch.samples.iter().map(|s| s.response.ids.len()).sum();
        let read: usize = batch.sequences.prompts.iter().map(Vec::len).sum();
        let data = &mut run.progress.data;
        data.prompts = sampler.prompts.state(first + count);
        // While only the critic is trained the KL says nothing about the weight.
        if step >= c.ppo.value_warmup {
            data.kl.update(record.get("kl").unwrap_or(0.0), count as f64);
        }
        if experience::samples_due(c, step) {
            let trace = c.samples.trace.then(|| models.logprobs(c, &experience, world)).transpose()?;
            experience::write_samples(c, &sampler, &batch, &experience, trace, &mut run)?;
        }
        if let Some(train) = run.stepped((generated + read) as u64, &updated.update, updated.rate)?.record {
            record = updated.describe(train.with(record));
            record = records::count(record, &sampler.prompts.odd, c.data.on_error);
            run.log(
                &record
                    .float("kl_coef", kl_coef)
                    .count("dropped", sampler.prompts.dropped)
                    .float("rollout_s", batch.rollout_s)
                    .float("score_s", score_s)
                    .float("update_s", update_s)
                    .float("generated_tokens_per_s", generated as f64 / batch.rollout_s),
            );
        }
        let best = models.policy.validation(&mut valid, &c.valid, c.train.batch_size, &mut run, world)?;
        run.save(&models.parts(), best)?;
    }
    models.policy.wake()?;
    models.critic.model.params.unpark()?;
    run.take_best(|best| models.take(best))?;
    let Models { policy, critic, ema, .. } = &models;
    run.finish(|dir| {
        policy.actor.export(dir, &tokenizer, world)?;
        critic.export(&dir.with_file_name("critic"), &tokenizer, world)?;
        match ema {
            Some(ema) => policy.actor.export_as(&ema.params, &dir.with_file_name("ema"), &tokenizer, world),
            None => Ok(()),
        }
    })
}

impl<'a> Models<'a> {
    fn load(c: &Ppo, inputs: &'a Ready, world: &'a World) -> Result<Models<'a>> {
        let common = c.common();
        let policy = Policy::load(&c.sections_of_responses(), &inputs.opened, world)?;
        let section = c.critic();
        let critic_world = Where::of(world, "critic", section.device.as_deref(), true)?;
        check_offload("critic", section.offload, &critic_world)?;
        let precision = Precision { compute: section.dtype.unwrap_or(c.precision.compute) };
        let optim = section.optim.as_ref().unwrap_or(&c.optim);
        let own = Common { precision: &precision, optim, ..common };
        let (base, trainable) = &inputs.critic;
        let origin = base.path(&Model::Path(section.path.clone()));
        let critic = Learner::new(base, origin, trainable, &own, &critic_world)?;
        let ema = match c.ppo.ema {
            Some(decay) => {
                let Opened { actor, trainable, .. } = &inputs.opened;
                Some(average(actor, trainable, &policy.actor.model.params, decay, c.seed)?)
            }
            None => None,
        };
        Ok(Models { policy, critic, critic_world, ema })
    }

    /// The run's checkpoint.
    fn parts(&self) -> Vec<Part<'_>> {
        let actor = self.policy.actor.part("");
        let ema = self.ema.as_ref();
        let ema = ema.map(|ema| Part { params: &ema.params, optim: None, ..self.policy.actor.part("ema") });
        [Some(actor), Some(self.critic.part("critic")), ema].into_iter().flatten().collect()
    }

    /// Sets the models that are trained to those of a checkpoint. Collective.
    fn take(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        checkpoint.load_values(&mut self.policy.actor.model.params)?;
        checkpoint.part("critic")?.load_values(&mut self.critic.model.params)?;
        match &mut self.ema {
            Some(ema) => checkpoint.part("ema")?.load_values(&mut ema.params),
            None => Ok(()),
        }
    }

    /// The actor's log-probabilities as it is now, of all responses.
    fn logprobs(&mut self, c: &Ppo, e: &Experience, world: &World) -> Result<Tensor> {
        let share = share_of(&e.sequences, c.micro_batch_size(world.mesh.data.size) as usize, world);
        self.policy.wake()?;
        let mine = share.logprobs(&mut self.policy.actor.model, c.generation.temperature)?;
        self.policy.rest()?;
        gather_rows(world, &mine)
    }
}
