//! The configuration of `corral ppo`.

use std::path::Path;

use serde_json::Value as Json;

use super::algorithm::{Algorithm, BuiltInConfig, built_in};
use super::common::Common;
use super::conflict::Conflicts;
use super::keys::KeyKind;
use super::models::{Critic, Trained, conflicts_of_device, conflicts_of_dtype};
use super::parallel::{Parallel, ShardSize};
use super::policy::{Aggregation, KlEstimator, no_dropout, policy_configuration};
use super::problems::Problems;
use super::rewards::{RewardKind, RewardTerm};
use super::section::{choice, section};
use super::sections::{DataSource, MomentsIn};
use super::setting::{At, Setting};
use super::template_date::TemplateDate;
use super::trainable;
use super::yaml::YamlValue;

policy_configuration! {
    /// Proximal policy optimization; `train.batch_size` counts prompts per iteration, `train.steps` counts iterations.
    pub struct Ppo {
        /// The critic, which predicts returns. Default: the reward model's weights, or without one the actor's with a new head.
        /// Keys that are not set take their defaults, not the actor's values.
        critic: Option<Critic> = None;
        /// Losses and rewards.
        ppo: PpoSection = PpoSection::default();
        /// Responses that are written to samples.jsonl and TensorBoard.
        samples: ResponseSamples = ResponseSamples::default();
    }
}

section! {
    /// Losses and rewards.
    pub struct PpoSection {
        /// Passes over an iteration's responses, each in a new order.
        epochs: i64 = 4, COUNT => Mathematics;
        /// Responses per update, over all ranks.
        minibatch_size: i64 = 8, COUNT => Mathematics;
        /// Clip range of the ratio around 1.
        clip: f64 = 0.2, POSITIVE => Mathematics;
        /// Clip range above 1, if different.
        clip_high: Option<f64> = None, POSITIVE => Mathematics;
        /// Upper bound of the loss for a negative advantage, in multiples of the advantage.
        dual_clip: Option<f64> = None, ABOVE_ONE => Mathematics;
        /// Clip range of a value around the old one; 0: no clipping.
        clip_value: f64 = 0.2, NOT_NEGATIVE => Mathematics;
        /// Weight of the value loss. The critic has its own optimizer, so this acts only through `optim.clip` and `optim.eps`;
        /// set its speed with `critic.optim.lr`.
        value_coef: f64 = 1.0, POSITIVE => Mathematics;
        /// Discount of later rewards.
        gamma: f64 = 1.0, RATIO => Mathematics;
        /// Lambda of generalized advantage estimation (Schulman et al. 2016).
        lambda: f64 = 0.95, RATIO => Mathematics;
        /// Advantages are normalised over the iteration.
        whiten_advantages: bool = true => Mathematics;
        /// Rewards with the KL penalty are divided by their standard deviation.
        whiten_rewards: bool = false => Mathematics;
        /// How token losses are aggregated.
        aggregation: Aggregation = Aggregation::TokenMean => Mathematics;
        /// Weight of the entropy bonus.
        entropy_coef: f64 = 0.0, NOT_NEGATIVE => Mathematics;
        /// Weight of the KL to the reference; with `kl_target`, its initial value.
        kl_coef: f64 = 0.05, NOT_NEGATIVE => Mathematics;
        /// The KL estimator. Default: `k1`, in the loss `k3`.
        kl_estimator: Option<KlEstimator> = None => Mathematics;
        /// Whether the KL is a penalty on rewards or a part of the loss.
        kl_in: KlIn = KlIn::Reward => Mathematics;
        /// Target KL of an adaptive weight, in nats per response; none: the weight is constant.
        kl_target: Option<f64> = None, POSITIVE => Mathematics;
        /// Horizon of the adaptive weight, in responses.
        kl_horizon: f64 = 10_000.0, POSITIVE => Mathematics;
        /// Ends an iteration's updates when their mean approximate KL to the sampling policy is above this, in nats per token.
        stop_kl: Option<f64> = None, POSITIVE => Mathematics;
        /// Scores are clipped at plus and minus this, before the KL penalty.
        reward_clip: Option<f64> = None, POSITIVE => Mathematics;
        /// Subtracted from every score: a number, or `batch`, the mean of the iteration's.
        reward_baseline: Baseline = Baseline::Number(0.0) => Mathematics;
        /// Treatment of truncated responses (without a stop token).
        missing_eos: MissingEos = MissingEos::Keep => Mathematics;
        /// The penalty of `missing_eos`.
        missing_eos_penalty: f64 = 1.0, NOT_NEGATIVE => Mathematics;
        /// Iterations in which only the critic is trained.
        value_warmup: u64 = 0 => Mathematics;
        /// Decay of a moving average of the actor's weights, written to RUN_DIR/ema; none: no average.
        ema: Option<f64> = None, RATIO => State;
        /// Pretraining data used besides the rollouts (Ouyang et al. 2022).
        ptx: Option<Ptx> = None;
        /// Checks at the start that ratios are 1 and that the KL is 0.
        self_check: bool = true => Execution;
    }
}

section! {
    /// Text whose cross-entropy is added to the actor's loss.
    pub struct Ptx {
        /// Token shards, as for pretraining.
        data: Vec<DataSource>;
        /// Weight of the mean loss per token.
        coef: f64, POSITIVE => Mathematics;
        /// Tokens per sequence.
        sequence_length: i64 = 512, COUNT => State;
        /// Sequences per update, over all ranks. Default: `ppo.minibatch_size`.
        batch_size: Option<i64> = None, COUNT => Mathematics;
    }
}

impl PpoSection {
    /// The estimator of the KL to the reference.
    pub fn kl_estimator(&self) -> KlEstimator {
        self.kl_estimator.unwrap_or(match self.kl_in {
            KlIn::Reward => KlEstimator::K1,
            KlIn::Loss => KlEstimator::K3,
        })
    }
}

choice! {
    /// Whether the KL is a penalty on rewards or a part of the loss.
    pub enum KlIn {
        /// A penalty on the rewards.
        Reward = "reward",
        /// A part of the loss.
        Loss = "loss",
    }
}

/// The baseline that is subtracted from every score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Baseline {
    /// A number that stays.
    Number(f64),
    /// The mean of the iteration's scores.
    Batch,
}

const BATCH: &str = "batch";

impl Setting for Baseline {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        match &at.node.value {
            YamlValue::Text(word) if word == BATCH => Some(Baseline::Batch),
            YamlValue::Int(_) | YamlValue::Float(_) => f64::read(at, problems).map(Baseline::Number),
            _ => at.expected("a number, or batch: the mean of the iteration's scores", problems),
        }
    }

    fn write(&self) -> Json {
        match self {
            Baseline::Number(x) => (*x).into(),
            Baseline::Batch => BATCH.into(),
        }
    }

    fn kind() -> KeyKind {
        KeyKind::OneOf(vec![
            KeyKind::Number,
            KeyKind::Choice(vec![(BATCH, "The mean of the iteration's scores.".into())]),
        ])
    }
}

choice! {
    /// Treatment of truncated responses (without a stop token).
    pub enum MissingEos {
        /// Their score is kept.
        Keep = "keep",
        /// Their score becomes minus the penalty.
        Replace = "replace",
        /// The penalty is subtracted from their score.
        Subtract = "subtract",
        /// They are left out of the losses.
        Mask = "mask",
    }
}

section! {
    /// Responses that are written to samples.jsonl and TensorBoard.
    pub struct ResponseSamples {
        /// Iterations between samples; 0: no samples.
        every: u64 = 10 => Output;
        /// Number of responses per iteration.
        count: i64 = 4, COUNT => Output;
        /// Also writes every token of them to trace.jsonl.
        trace: bool = false => Output;
    }
}

impl Ppo {
    /// What responses are rewarded for: the reward model, where nothing else is said.
    pub fn rewards(&self) -> Vec<RewardTerm> {
        match self.rewards.is_empty() {
            true => vec![RewardTerm::new(RewardKind::Model)],
            false => self.rewards.clone(),
        }
    }

    /// The critic's section; where it names no path: the reward model's weights, else the actor's trunk.
    pub fn critic(&self) -> Trained {
        let path = self.reward_model.as_ref().map_or(&self.actor.path, |m| &m.path);
        self.critic.clone().unwrap_or_default().or_path(path)
    }

    /// How ranks divide the critic: as all models, but for `critic.tensor`.
    pub fn parallel_of_critic(&self) -> Parallel {
        let tensor = self.critic.as_ref().and_then(|critic| critic.tensor);
        Parallel { tensor: tensor.unwrap_or(self.parallel.tensor), ..self.parallel.clone() }
    }

    /// The paths that are read.
    pub fn paths(&self) -> Vec<&Path> {
        let mut paths = self.sections_of_responses().paths();
        paths.extend(self.critic.iter().filter_map(|c| c.path.as_deref()));
        paths.extend(self.ppo.ptx.iter().flat_map(|p| &p.data).map(|s| s.path.as_path()));
        paths
    }

    /// Sequences that one rank computes at once.
    pub fn micro_batch_size(&self, world_size: i64) -> i64 {
        self.train.micro_batch_size.unwrap_or(self.ppo.minibatch_size / world_size)
    }
}

impl Algorithm for Ppo {
    const SUBCOMMAND: &'static str = "ppo";
    const MODEL: &'static str = "actor";
    const BUILT_IN: &'static [BuiltInConfig] = built_in!("ppo": "default", "llama-13b-8gpu", "llama-7b-one-gpu", "reward_model", "smollm2-hh", "smollm2-sums");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        self.conflicts_of_sizes(self.parallel.data_ranks(world_size), found);
        self.ppo.conflicts(found);
        if self.rewards.is_empty() && self.reward_model.is_none() {
            let why = "there is nothing to learn from: give reward_model, or rewards by rule such as [{kind: gsm8k}]";
            found.add("rewards", why);
        } else {
            self.sections_of_responses().conflicts_of_rewards(found);
        }
        if let Some(critic) = &self.critic {
            found.within("critic", |found| {
                conflicts_of_device(critic.device.as_ref(), world_size, found);
                conflicts_of_dtype(critic.dtype, self.precision.compute, found);
                trainable::conflicts(&critic.freeze, critic.lora.as_ref(), self.precision.compute, found);
            });
            self.conflicts_of_critics_ranks(world_size, found);
            let what = "the values that returns are compared with";
            if let Some(why) = no_dropout(critic.lora.as_ref(), what) {
                found.add("critic.lora.dropout", why);
            }
        }
        self.sections_of_responses().conflicts_but_rewards(world_size, found);
        self.valid.conflicts(&self.data.valid, found);
    }
}

impl Ppo {
    /// What does not fit among responses, updates and micro-batches.
    fn conflicts_of_sizes(&self, ranks: i64, found: &mut Conflicts) {
        let (ppo, batch) = (&self.ppo, self.train.batch_size);
        let micro = self.micro_batch_size(ranks);
        let unit = micro.max(1) * ranks;
        if ppo.minibatch_size % unit != 0 || micro < 1 {
            let why = format!(
                "{} is not a multiple of train.micro_batch_size x ranks = {unit}",
                ppo.minibatch_size
            );
            found.add("ppo.minibatch_size", why);
        } else if batch % ppo.minibatch_size != 0 {
            let why =
                format!("train.batch_size, {batch} prompts, is not a multiple of {}", ppo.minibatch_size);
            found.add("ppo.minibatch_size", why);
        }
        let Some(ptx) = &ppo.ptx else { return };
        let rows = ptx.batch_size.unwrap_or(ppo.minibatch_size);
        if ptx.data.is_empty() {
            found.add("ppo.ptx.data", "name at least one folder of token shards");
        }
        if rows % unit != 0 {
            let why = format!("{rows} is not a multiple of train.micro_batch_size x ranks = {unit}");
            found.add("ppo.ptx.batch_size", why);
        }
    }
}

impl Ppo {
    /// What does not fit the ranks that share the critic.
    fn conflicts_of_critics_ranks(&self, world_size: i64, found: &mut Conflicts) {
        let Some(critic) = self.critic.as_ref().filter(|critic| critic.tensor.is_some()) else { return };
        let parallel = self.parallel_of_critic();
        if world_size % parallel.tensor != 0 {
            let why = format!("{} must divide the number of ranks, {world_size}", parallel.tensor);
            found.add("critic.tensor", why);
            return;
        }
        if let ShardSize::Ranks(n) = parallel.shard
            && (world_size / parallel.tensor) % n != 0
        {
            let why = format!(
                "the {} ranks that then share nothing of the critic's matrices are not a multiple of parallel.shard, {n}",
                world_size / parallel.tensor
            );
            found.add("critic.tensor", why);
        }
        let ranks = parallel.data_ranks(world_size);
        let unit = self.micro_batch_size(ranks).max(1) * ranks;
        if self.ppo.minibatch_size % unit != 0 {
            let why = format!(
                "ppo.minibatch_size, {}, is not a multiple of train.micro_batch_size x the critic's ranks with different rows = \
                 {unit}",
                self.ppo.minibatch_size
            );
            found.add("critic.tensor", why);
        }
        let moments = critic.optim.as_ref().unwrap_or(&self.optim).moments;
        if parallel.tensor > 1 && moments == MomentsIn::EightBit {
            found.add(
                "critic.tensor",
                "8-bit moments are not built for ranks that share matrices: set it to 1",
            );
        }
    }
}

impl PpoSection {
    /// What does not fit among the keys of the section.
    fn conflicts(&self, found: &mut Conflicts) {
        if self.kl_target.is_some() && self.kl_coef == 0.0 {
            found.add("ppo.kl_target", "a weight of 0 (kl_coef) stays 0, whatever its target");
        }
        if self.kl_target.is_some() && self.kl_in == KlIn::Loss {
            found.add("ppo.kl_target", "the weight is controlled where the KL is a penalty on rewards");
        }
        if self.kl_in == KlIn::Loss && self.kl_coef > 0.0 && self.kl_estimator() == KlEstimator::K1 {
            found.add("ppo.kl_estimator", KlEstimator::NO_LOSS);
        }
    }
}
