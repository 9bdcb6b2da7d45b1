//! A policy that learns from its own responses without a critic, what it is compared with, and who judges it.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use crate::algorithms::base::{self, Base, LastStep, RunLength};
use crate::algorithms::learner::{Learner, Learners};
use crate::algorithms::records;
use crate::algorithms::rl::checks::EqualRewards;
use crate::algorithms::rl::experience::Readout;
use crate::algorithms::rl::place::{Where, at_work, check_offload, frozen, where_it_was};
use crate::algorithms::rl::reward_model::{self, RewardModel};
use crate::algorithms::rl::sampling::{ResponseBatch, Said, Sampled, Sampler, Scorer};
use crate::algorithms::training::Run;
use crate::checkpoint::{Checkpoint, Metric, ModelRecord, SavedPart};
use crate::config::common::Common;
use crate::config::model::Model;
use crate::config::models::{FrozenModel, of_model};
use crate::config::policy::OwnResponses;
use crate::config::prompts::PromptData;
use crate::config::sections::{Compute, Precision, Valid};
use crate::data::chat::Chat;
use crate::data::position::Indexed;
use crate::data::prompts::Prompts;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::agreement::Facts;
use crate::distributed::exchange::gather_rows;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::generate::rollout::Sequences;
use crate::info;
use crate::model::{Llama, Trainable};
use crate::rewards::Judge;
use crate::telemetry::MetricsLine;
use serde::Serialize;
use tch::Tensor;

/// What a run reads before any rank talks to another: files are checked, and errors told, before a group could hang.
pub struct OpenedPolicy {
    pub actor: Base,
    pub trainable: Trainable,
    /// None: the actor without its adapters, where it has any.
    reference: Option<Base>,
    reward_model: Option<reward_model::OpenedRewardModel>,
    pub length: RunLength,
}

/// Where responses come from.
pub struct Samplers {
    pub train: Sampler,
    pub valid: Option<Sampler>,
}

impl Samplers {
    /// What all ranks must have of the prompts.
    pub fn add_facts(&self, facts: &mut Facts) {
        let valid = self.valid.as_ref().map(|valid| valid.prompts.fingerprint());
        base::add_data(self.train.prompts.fingerprint(), valid, facts);
    }
}

impl OpenedPolicy {
    /// Reference and reward model, where they have no device of their own.
    pub fn frozen_models(&self, s: &OwnResponses) -> Vec<(&'static str, &Base)> {
        let here = |section: Option<&FrozenModel>| section.is_none_or(|m| m.device.is_none());
        let reference = self.reference.as_ref().filter(|_| here(s.reference));
        let reward_model = self.reward_model.as_ref().filter(|_| here(s.reward_model));
        let reference = reference.map(|base| ("reference", base));
        reference.into_iter().chain(reward_model.map(|m| ("reward_model", m.base()))).collect()
    }

    /// Opens and checks all that the sections name. `reference`: whether it is asked.
    pub fn open(s: &OwnResponses, reference: bool) -> Result<(OpenedPolicy, Samplers)> {
        let c = &s.common;
        let length = s.data.sequence_length;
        let open = |path: &Path| Base::open(&Model::Path(path.to_path_buf()), s.tokenizer, length);
        let actor = open(&s.actor.path).map_err(|e| of_model("actor", e))?.dated(s.data.template_date);
        let trainable = actor.trainable(&s.actor.freeze, s.actor.lora.as_ref());
        let trainable = trainable.map_err(|e| of_model("actor", e))?;
        let adapted = actor.weights.as_ref().is_some_and(|w| w.lora().is_some());
        let reference = match s.reference {
            // Of adapters that the actor came with the reference is the model with them.
            None if !reference || (s.actor.lora.is_some() && !adapted) => None,
            section => {
                let base =
                    open(section.map_or(&s.actor.path, |r| &r.path)).map_err(|e| of_model("reference", e))?;
                check_reads(&base, &actor).map_err(|e| of_model("reference", e))?;
                Some(base)
            }
        };
        let reward_model =
            s.reward_model.map(|r| reward_model::OpenedRewardModel::open(r, &actor.tokenizer)).transpose();
        let reward_model = reward_model.map_err(|e| of_model("reward_model", e))?;
        let judge = Rc::new(RefCell::new(Judge::new(&s.rewards)?));
        let sampler = |data: &PromptData| {
            let chat = Chat::new(&actor.tokenizer)?;
            Sampler::open(data, s.generation, judge.clone(), chat, &actor.shape, c.seed)
        };
        let valid = match s.data.valid.is_empty() {
            true => None,
            false => Some(sampler(&PromptData {
                train: s.data.valid.clone(),
                split: Vec::new(),
                ..s.data.clone()
            })?),
        };
        let train = sampler(s.data)?;
        let mut odd = train.prompts.odd.clone();
        valid.iter().for_each(|valid| odd.merge(&valid.prompts.odd));
        odd.check(s.data.on_error)?;
        let length = RunLength::new(c.train, train.prompts.len() as u64, c.schedule, LastStep::Dropped)?;
        Ok((OpenedPolicy { actor, trainable, reference, reward_model, length }, Samplers { train, valid }))
    }

    /// What all ranks must have of the models.
    pub fn add_facts(&self, facts: &mut Facts) -> Result<()> {
        self.actor.add_facts("actor", facts)?;
        self.reference.as_ref().map_or(Ok(()), |reference| reference.add_facts("reference", facts))?;
        self.reward_model.as_ref().map_or(Ok(()), |model| model.add_facts(facts))
    }

    /// Whether the reference is the model that the actor begins as, computed in the same way.
    fn begins_as_reference(&self, s: &OwnResponses) -> bool {
        let Some(section) = s.reference else { return true };
        let kept =
            |t: Option<&Trainable>| t.and_then(|t| t.lora.as_ref()).map(|l| l.base).unwrap_or_default();
        let bases = [
            kept(Some(&self.trainable)),
            kept(self.reference.as_ref().and_then(|r| r.weights.as_ref()).and_then(|w| w.lora())),
        ];
        // A folder has many names, a hub id one.
        let [actor, reference] =
            [&s.actor.path, &section.path].map(|p| p.canonicalize().unwrap_or_else(|_| p.clone()));
        let dtype = |d: Option<Compute>| d.unwrap_or(s.common.precision.compute);
        actor == reference
            && bases[0] == bases[1]
            && dtype(section.dtype) == dtype(s.actor.dtype)
            && section.device == s.actor.device
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.actor.tokenizer
    }

    /// What the prompts are as training data, in a line.
    pub fn data_line(&self, prompts: &Prompts) -> String {
        format!(
            "{} prompts, {} dropped for their length; {} iterations are {:.2} epochs",
            prompts.len(),
            prompts.dropped,
            self.length.steps,
            self.length.epochs(self.length.steps)
        )
    }

    /// What a run begins with, told.
    pub fn announce(&self, train: &Sampler, valid: Option<&Sampler>, world: &World) {
        let prompts = &train.prompts;
        info!("actor: {:.2}M parameters", self.actor.shape.num_parameters() as f64 / 1e6);
        info!("data: {}", self.data_line(prompts));
        records::announce_skipped("data.train", &prompts.odd, world);
        if let Some(valid) = valid {
            records::announce_skipped("data.valid", &valid.prompts.odd, world);
        }
    }
}

/// The models on this rank.
pub struct Policy<'a> {
    pub actor: Learner<'a>,
    pub actor_world: Where<'a>,
    /// The actor's values are in host memory except while it works.
    offload: bool,
    reference: Option<FrozenPolicy<'a>>,
    /// The reference is the model that the actor begins as.
    pub begins_as_reference: bool,
    reward_model: Option<RewardModel<'a>>,
    equal_rewards: EqualRewards,
    /// What the models are.
    pub records: Vec<ModelRecord>,
}

/// A model that is only asked.
struct FrozenPolicy<'a> {
    model: Llama,
    offload: bool,
    _place: Where<'a>,
}

impl<'a> Policy<'a> {
    /// Values of the actor come with [`Learners::begin`] or [`Learners::restore`]. Collective.
    pub fn load(s: &OwnResponses, opened: &'a OpenedPolicy, world: &'a World) -> Result<Policy<'a>> {
        let c = &s.common;
        let actor_world = Where::of(world, "actor", s.actor.device.as_deref(), true)?;
        let precision = Precision { compute: s.actor.dtype.unwrap_or(c.precision.compute) };
        let optim = s.actor.optim.as_ref().unwrap_or(c.optim);
        let own = Common { precision: &precision, optim, ..*c };
        let origin = opened.actor.path(&Model::Path(s.actor.path.clone()));
        let actor = Learner::new(&opened.actor, origin, &opened.trainable, &own, &actor_world)?;
        let mut records: Vec<ModelRecord> = actor.record("actor").into_iter().collect();
        let reference = match &opened.reference {
            None => None,
            Some(base) => {
                let device = s.reference.map_or(&s.actor.device, |r| &r.device);
                let place = Where::of(world, "reference", device.as_deref(), false)?;
                let dtype = s.reference.map_or(s.actor.dtype, |r| r.dtype);
                let offload = s.reference.is_some_and(|r| r.offload);
                check_offload("reference", offload, &place)?;
                let (model, hash) = frozen(base, c, dtype, &place)?;
                let key = if s.reference.is_some() { "reference.path" } else { "actor.path" };
                records.extend(base.record_asked("reference", key, hash));
                Some(FrozenPolicy { model, offload, _place: place })
            }
        };
        let reward_model = match (&opened.reward_model, s.reward_model) {
            (Some(opened), Some(section)) => {
                let (model, record) = opened.load(section, c, world)?;
                records.extend(record);
                Some(model)
            }
            _ => None,
        };
        let offload = s.actor.offload;
        check_offload("actor", offload, &actor_world)?;
        let begins_as_reference = opened.begins_as_reference(s);
        let equal_rewards = EqualRewards::default();
        Ok(Policy {
            actor,
            actor_world,
            offload,
            reference,
            begins_as_reference,
            reward_model,
            equal_rewards,
            records,
        })
    }

    /// `samples` judged responses to each of the prompts `first .. first + count` of a sampler. Collective.
    pub fn ask(
        &mut self,
        sampler: &mut Sampler,
        first: u64,
        count: u64,
        samples: usize,
        world: &World,
    ) -> Result<ResponseBatch> {
        let judged = self.reward_model.is_some();
        let reward_model = &mut self.reward_model;
        let mut score = |said: &[Said]| reward_model.as_mut().map_or(Ok(Vec::new()), |m| m.score(said));
        let scorer: Option<Scorer> = judged.then_some(&mut score);
        at_work(&mut self.actor.model, self.offload, |actor| {
            sampler.sample(actor, first, count, samples, scorer, world)
        })
    }

    /// Warns, once, where the rewards of a step's responses are all equal.
    pub fn note_rewards(&mut self, samples: &[Sampled], step: u64, world: &World) {
        let rewards: Vec<f64> = samples.iter().filter_map(|s| s.judgement.reward).collect();
        self.equal_rewards.check(&rewards, step + 1, world.rank);
    }

    /// Calls `f` with the actor's values on its device; with `offload` they are in host memory again afterwards.
    pub fn on_device<T>(&mut self, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.onload()?;
        let result = f(self);
        self.offload()?;
        result
    }

    /// Brings the actor's values to its device, where they are until [`Policy::offload`].
    pub fn onload(&mut self) -> Result<()> {
        self.actor.model.params.unpark()
    }

    /// Ends [`Policy::onload`]: with `offload` the values are in host memory again.
    pub fn offload(&mut self) -> Result<()> {
        if self.offload { self.actor.model.params.park() } else { Ok(()) }
    }

    /// Calls `f` with the reference: a model of its own, or the actor without its adapters.
    pub fn with_reference<T>(&mut self, f: impl FnOnce(&mut Llama) -> Result<T>) -> Result<T> {
        match &mut self.reference {
            Some(reference) => at_work(&mut reference.model, reference.offload, f),
            // The actor may be awake, for its updates: then it stays so.
            None => where_it_was(&mut self.actor.model, |actor| actor.without_adapters(f)),
        }
    }

    /// Validates, where it is due, on one sampled response to each of the first prompts of the validation data (mean reward,
    /// tokens, and the share that ended); whether the checkpoint is the best so far, to be saved.
    pub fn validation<D: Serialize>(
        &mut self,
        sampler: &mut Option<Sampler>,
        valid: &Valid,
        batch_size: i64,
        run: &mut Run<D>,
        world: &World,
    ) -> Result<bool> {
        let Some(sampler) = sampler.as_mut().filter(|_| run.due(valid.every)) else { return Ok(false) };
        let ranks = world.mesh.data.size as u64;
        let count = (sampler.prompts.len() as u64).min((valid.batches * batch_size) as u64);
        let mut samples = Vec::new();
        for first in (0..count).step_by(batch_size as usize) {
            if run.interrupted()? {
                return run.owe_validation();
            }
            // Equally many a rank; the first ones again, where there are too few.
            let prompts = (count - first).min(batch_size as u64).next_multiple_of(ranks);
            samples.extend(self.ask(sampler, first, prompts, 1, world)?.samples);
        }
        let told = describe(&samples[..count as usize]);
        let reward = told.get("reward").unwrap_or(f64::NAN);
        run.log(&MetricsLine::new("valid", run.progress.step).with(told));
        run.restart_window();
        Ok(run.note_validation(Metric::Reward, reward, valid))
    }
}

impl Learners for Policy<'_> {
    fn parts(&self) -> Vec<SavedPart<'_>> {
        self.actor.parts()
    }

    fn begin(&mut self) -> Result<()> {
        self.actor.begin()
    }

    fn restore(&mut self, from: &Checkpoint) -> Result<serde_json::Value> {
        self.actor.restore(from)
    }

    fn onload(&mut self) -> Result<()> {
        Policy::onload(self)
    }

    fn take(&mut self, best: &Checkpoint) -> Result<()> {
        self.actor.take(best)
    }

    fn export(&self, dir: &Path, tokenizer: &Tokenizer, world: &World) -> Result<()> {
        self.actor.export(dir, tokenizer, world)
    }
}

/// Refuses a model that is to read the actor's tokens and takes them for others. It may know further ones, such as a pad
/// token that it was given.
pub fn check_reads(model: &Base, actor: &Base) -> Result<()> {
    match model.tokenizer.knows_tokens_of(&actor.tokenizer) {
        true => Ok(()),
        false => Err(Error::config(format!(
            "its tokenizer differs from the actor's ({} and {} tokens); both models read the same token ids, so they need the \
             same vocabulary",
            model.tokenizer.vocab_size(),
            actor.tokenizer.vocab_size()
        ))),
    }
}

/// What is told of judged responses.
pub fn describe(samples: &[Sampled]) -> MetricsLine {
    let n = samples.len() as f64;
    let there: Vec<f64> = samples.iter().filter_map(|s| s.judgement.reward).collect();
    let ended = samples.iter().filter(|s| s.ended()).count();
    let tokens: usize = samples.iter().map(|s| s.response.ids.len()).sum();
    MetricsLine::new("train", 0)
        .float("reward", there.iter().sum::<f64>() / there.len() as f64)
        .float("response_tokens", tokens as f64 / n)
        .float("eos_fraction", ended as f64 / n)
        .count("unscored", (samples.len() - there.len()) as u64)
        .count("truncated", (samples.len() - ended) as u64)
}

/// This rank's share of responses that all ranks know, for forwards.
pub fn share_of<'a>(sequences: &'a Sequences, micro: usize, world: &World) -> Readout<'a> {
    Readout {
        sequences,
        rows: world.mesh.data.share(sequences.len()),
        micro_batch_size: micro,
        width: sequences.width(0..sequences.len()),
    }
}

/// Log-probabilities of all responses' tokens under a model, [n, W] on the CPU, on every rank. Collective.
pub fn logprobs(model: &mut Llama, share: &Readout, temperature: f64, world: &World) -> Result<Tensor> {
    gather_rows(world, &share.logprobs(model, temperature)?)
}
