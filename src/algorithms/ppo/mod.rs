//! Proximal policy optimization (Schulman et al. 2017) as it is used on language models (Ziegler et al. 2019, Ouyang et al.
//! 2022): an iteration samples responses, scores them, and takes several epochs of updates on them.

mod experience;
mod update;

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::algorithms::base::Base;
use crate::algorithms::folder::RunFolder;
use crate::algorithms::learner::{Learner, Learners};
use crate::algorithms::losses::KlController;
use crate::algorithms::recipe::{Recipe, Shown};
use crate::algorithms::records;
use crate::algorithms::rl::checks::Stalled;
use crate::algorithms::rl::memory::{self, Others, PlannedCritic, Work};
use crate::algorithms::rl::place::{Where, average, check_offload};
use crate::algorithms::rl::policy::{OpenedPolicy, Policy, Samplers, check_reads, share_of};
use crate::algorithms::rl::sampling::SamplingTimes;
use crate::algorithms::run::Start;
use crate::algorithms::session;
use crate::checkpoint::{Checkpoint, SavedPart};
use crate::config::common::Common;
use crate::config::model::Model;
use crate::config::models::of_model;
use crate::config::parallel::Parallel;
use crate::config::ppo::Ppo;
use crate::config::reward::Score;
use crate::config::sections::{self, Precision};
use crate::config::shape::Shape;
use crate::config::{Algorithm, Loaded};
use crate::data::loader::{Loader, WeightedSource, WindowOrder};
use crate::data::position::{Indexed, Position as At, Positioned};
use crate::data::prompts::Prompts;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::agreement::Facts;
use crate::distributed::exchange::gather_rows;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::generate::rollout::Sequences;
use crate::info;
use crate::model::{Trainable, init};
use crate::optim::Average;
use crate::plan::{MemoryPlan, PlanTarget};

/// What a run reads before any rank talks to another.
pub struct Inputs {
    opened: OpenedPolicy,
    samplers: Samplers,
    critic: (Base, Trainable),
    ptx: Option<Loader>,
}

impl Recipe for Ppo {
    const ABOUT: &'static str = "Train a model on its own answers by PPO";
    type Inputs = Inputs;

    fn open(&self) -> Result<Inputs> {
        let (opened, samplers) = OpenedPolicy::open(&self.sections_of_responses(), true)?;
        let actor = &opened.actor;
        let section = self.critic();
        let critic = || -> Result<(Base, Trainable)> {
            let (model, length) = (Model::Path(section.path.clone()), self.data.sequence_length);
            let base = Base::open_scored(&model, self.tokenizer.as_ref(), length, Some(0.0))?;
            check_reads(&base, actor)?;
            let trainable = base.trainable(&section.freeze, section.lora.as_ref())?;
            Ok((base, trainable))
        };
        let critic = critic().map_err(|e| of_model("critic", e))?;
        let ptx = match &self.ppo.ptx {
            None => None,
            Some(ptx) => {
                let source =
                    |s: &sections::DataSource| WeightedSource { path: s.path.clone(), weight: s.weight };
                let sources: Vec<WeightedSource> = ptx.data.iter().map(source).collect();
                let order = WindowOrder::Shuffled { seed: self.seed };
                let (hash, rows) = (actor.tokenizer.base_hash(), actor.shape.vocab_size as usize);
                Some(Loader::new(&sources, Some(hash), rows, ptx.sequence_length as usize, order)?)
            }
        };
        Ok(Inputs { opened, samplers, critic, ptx })
    }

    fn add_facts(inputs: &Inputs, facts: &mut Facts) -> Result<()> {
        inputs.samplers.add_facts(facts);
        inputs.opened.add_facts(facts)?;
        inputs.ptx.iter().for_each(|ptx| facts.add_contents("ppo.ptx.data", ptx.fingerprint()));
        inputs.critic.0.add_facts("critic", facts)
    }

    fn parallel_of(&self, model: &str) -> Parallel {
        if model == "critic" { self.parallel_of_critic() } else { self.parallel.clone() }
    }

    fn trained(inputs: &Inputs) -> Vec<(&'static str, &Shape, &Trainable)> {
        let (opened, (critic, of_critic)) = (&inputs.opened, &inputs.critic);
        vec![("actor", &opened.actor.shape, &opened.trainable), ("critic", &critic.shape, of_critic)]
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
        memory::names_preset(&self.sections_of_responses(), Some(&self.critic().path))
    }

    fn plan(&self, target: &PlanTarget) -> Result<MemoryPlan> {
        let work = |parallel: &Parallel| {
            let ranks = parallel.data_ranks(target.ranks);
            Work {
                responses: self.train.batch_size / ranks,
                micro_batch: self.micro_batch_size(ranks),
                update: self.ppo.minibatch_size / ranks,
                learned: self.ppo.epochs * self.train.batch_size,
            }
        };
        let (critic, parallel) = (self.critic(), self.parallel_of_critic());
        let critic = PlannedCritic { section: &critic, parallel: &parallel, work: work(&parallel) };
        let work = work(&self.parallel);
        let others = Others { critic: Some(critic), reference: true, average: self.ppo.ema.is_some() };
        memory::plan(Self::SUBCOMMAND, &self.sections_of_responses(), &others, work, target)
    }

    fn train(loaded: &Loaded<Self>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
        let Inputs { opened, samplers, critic, ptx } = inputs;
        ppo(loaded, &Ready { opened, critic, ptx }, samplers, world, start)
    }
}

/// [`Inputs`] of which the samplers are in use.
struct Ready {
    opened: OpenedPolicy,
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
struct PpoPosition {
    prompts: At,
    kl: KlController,
    ptx: Option<At>,
}

/// What a run goes through: its prompts, and pretraining data.
struct PpoData<'a> {
    c: &'a Ppo,
    prompts: &'a Prompts,
    ptx: Option<&'a Loader>,
}

impl Positioned for PpoData<'_> {
    type Position = PpoPosition;

    fn begin(&self) -> PpoPosition {
        let coef = self.c.ppo.kl_coef;
        let kl = match self.c.ppo.kl_target {
            Some(target) => KlController::Adaptive { coef, target, horizon: self.c.ppo.kl_horizon },
            None => KlController::Fixed { coef },
        };
        PpoPosition { prompts: self.prompts.begin(), kl, ptx: self.ptx.map(Positioned::begin) }
    }

    fn check(&self, position: &PpoPosition) -> Result<()> {
        self.prompts.check(&position.prompts)?;
        match (self.ptx, &position.ptx) {
            (Some(ptx), Some(position)) => ptx.check(position),
            _ => Ok(()),
        }
    }
}

/// The models of a run on this rank.
struct PpoModels<'a> {
    /// The actor, its reference, and the reward model.
    policy: Policy<'a>,
    critic: Learner<'a>,
    critic_world: Where<'a>,
    /// What the values of the critic's head are multiplied by at the start.
    gain_of_values: Option<f64>,
    ema: Option<Average>,
}

type Session<'a> = session::Session<'a, PpoModels<'a>, PpoPosition>;

/// All responses of an iteration, the same on every rank: [n, W], in the actor's accumulator, 0 where there is no token of
/// a response.
struct PpoExperience {
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

fn ppo(loaded: &Loaded<Ppo>, inputs: &Ready, samplers: Samplers, world: &World, start: &Start) -> Result<()> {
    let c = &loaded.config;
    let (common, tokenizer) = (c.common(), inputs.opened.tokenizer());
    let mut folder = RunFolder::open(loaded, start, &c.paths(), tokenizer, world)?;
    let Samplers { train: mut sampler, mut valid } = samplers;
    let mut models = PpoModels::load(c, inputs, world)?;
    folder.record(std::mem::take(&mut models.policy.records))?;
    folder.record(models.critic.record("critic"))?;
    let data = PpoData { c, prompts: &sampler.prompts, ptx: inputs.ptx.as_ref() };
    let progress = folder.restore_or_begin(&mut models, &data)?;
    inputs.opened.announce(&sampler, valid.as_ref(), world);
    let size = models.critic.model.shape.num_parameters() as f64 / 1e6;
    info!("critic: {size:.2}M parameters on {:?}", models.critic_world.device);

    let (mut stalled, count) = (Stalled::default(), c.train.batch_size as u64);
    let optim = c.actor.optim.as_ref().unwrap_or(&c.optim);
    let common = Common { optim, ..common };
    let mut session = Session::start(folder, progress, models, &common, &inputs.opened.length)?;
    let mut validation = |s: &mut Session| {
        s.models.policy.validation(&mut valid, &c.valid, c.train.batch_size, &mut s.run, world)
    };
    session.catch_up(&mut validation)?;
    while !session.run.done() {
        let (models, step) = (&mut session.models, session.run.progress.step);
        let PpoPosition { prompts: At { next: first, .. }, kl, .. } = &session.run.progress.data;
        let (first, kl_coef, asking) = (*first, kl.coef(), Instant::now());
        let batch = models.policy.ask(&mut sampler, first, count, 1, world)?;
        models.policy.note_rewards(&batch.samples, step, world);
        let (experience, record) = experience::experience(c, models, &batch, kl_coef, step, world)?;
        let (asking_s, updating) = (asking.elapsed().as_secs_f64(), Instant::now());
        let updated = update::update(c, inputs, models, &experience, &mut session.run, world)?;
        let update_s = updating.elapsed().as_secs_f64();
        let explained = record.get("explained_variance").unwrap_or(f64::NAN);
        stalled.check(explained, updated.value_loss, updated.critic_grad_norm)?;

        session.run.progress.data.prompts = sampler.prompts.at(first + count);
        // While only the critic is trained the KL says nothing about the weight.
        if step >= c.ppo.value_warmup {
            session.run.progress.data.kl.update(record.get("kl").unwrap_or(0.0), count as f64);
        }
        experience::log_samples(c, &sampler, &batch, &experience, &mut session)?;
        let stepped = session.run.stepped(batch.tokens(), &updated.update, updated.rate)?;
        if let Some(train) = stepped.record {
            let record = records::count(train.with(record), &sampler.prompts.odd, c.data.on_error);
            let record = updated.describe(record).float("kl_coef", kl_coef);
            let record = record.count("dropped", sampler.prompts.dropped);
            let (rollout_s, generated_tokens) = (batch.rollout_s, batch.generated_tokens());
            let times = SamplingTimes { asking_s, rollout_s, update_s, generated_tokens };
            session.run.log(&times.describe(record));
        }
        session.end_step(&mut validation)?;
    }
    session.take_best()?;
    session.finish(tokenizer)
}

impl<'a> PpoModels<'a> {
    fn load(c: &Ppo, inputs: &'a Ready, world: &'a World) -> Result<PpoModels<'a>> {
        let common = c.common();
        let section = c.critic();
        let mut critic_world = Where::of(world, "critic", section.device.as_deref(), true)?;
        let parallel = c.parallel_of_critic();
        if parallel.tensor != c.parallel.tensor && matches!(critic_world, Where::Run(_)) {
            let its_own = world.divided_as("critic", &parallel);
            let its_own = its_own.map_err(|e| match e.key {
                // Such as the ranks of a host, which the critic's do not fit.
                Some(key) => {
                    Error::key("critic.tensor", format!("{}: {key}: {}", parallel.tensor, e.message))
                }
                None => e,
            })?;
            critic_world = Where::Own(Box::new(its_own));
        }
        let policy = Policy::load(&c.sections_of_responses(), &inputs.opened, world)?;
        check_offload("critic", section.offload, &critic_world)?;
        let precision = Precision { compute: section.dtype.unwrap_or(c.precision.compute) };
        let optim = section.optim.as_ref().unwrap_or(&c.optim);
        let own = Common { precision: &precision, optim, ..common };
        let (base, trainable) = &inputs.critic;
        let origin = base.path(&Model::Path(section.path.clone()));
        let critic = Learner::new(base, origin, trainable, &own, &critic_world)?;
        let ema = match c.ppo.ema {
            Some(decay) => {
                let OpenedPolicy { actor, trainable, .. } = &inputs.opened;
                Some(average(actor, trainable, &policy.actor.model.params, decay, c.seed)?)
            }
            None => None,
        };
        Ok(PpoModels { policy, critic, critic_world, gain_of_values: inputs.gain_of_values()?, ema })
    }

    /// The actor's log-probabilities as it is now, of all responses.
    fn logprobs(&mut self, c: &Ppo, e: &PpoExperience, world: &World) -> Result<Tensor> {
        let share = share_of(&e.sequences, c.micro_batch_size(world.mesh.data.size) as usize, world);
        let logprobs =
            |policy: &mut Policy| share.logprobs(&mut policy.actor.model, c.generation.temperature);
        let mine = self.policy.on_device(logprobs)?;
        gather_rows(world, &mine)
    }
}

impl Learners for PpoModels<'_> {
    fn parts(&self) -> Vec<SavedPart<'_>> {
        let actor = self.policy.actor.part("");
        let ema = self.ema.as_ref();
        let ema =
            ema.map(|ema| SavedPart { params: &ema.params, optim: None, ..self.policy.actor.part("ema") });
        [Some(actor), Some(self.critic.part("critic")), ema].into_iter().flatten().collect()
    }

    fn begin(&mut self) -> Result<()> {
        self.policy.begin()?;
        self.critic.begin()?;
        match self.gain_of_values {
            Some(gain) => init::scale_score(&mut self.critic.model.params, gain),
            None => Ok(()),
        }
    }

    fn restore(&mut self, from: &Checkpoint) -> Result<serde_json::Value> {
        let state = self.policy.restore(from)?;
        let Learner { model, optimizer, .. } = &mut self.critic;
        from.part("critic")?.load(&mut model.params, optimizer)?;
        if let Some(ema) = &mut self.ema {
            from.part("ema")?.load_values(&mut ema.params)?;
        }
        Ok(state)
    }

    fn onload(&mut self) -> Result<()> {
        self.policy.onload()?;
        self.critic.model.params.unpark()
    }

    fn take(&mut self, best: &Checkpoint) -> Result<()> {
        self.policy.take(best)?;
        best.part("critic")?.load_values(&mut self.critic.model.params)?;
        match &mut self.ema {
            Some(ema) => best.part("ema")?.load_values(&mut ema.params),
            None => Ok(()),
        }
    }

    /// The critic and the moving average are written beside the actor.
    fn export(&self, dir: &Path, tokenizer: &Tokenizer, world: &World) -> Result<()> {
        let actor = &self.policy.actor;
        actor.export(dir, tokenizer, world)?;
        self.critic.export(&dir.with_file_name("critic"), tokenizer, world)?;
        match &self.ema {
            Some(ema) => actor.export_as(&ema.params, &dir.with_file_name("ema"), tokenizer, world),
            None => Ok(()),
        }
    }
}
