//! Kahneman-Tversky optimization (Ethayarajh et al. 2024): completions that were found good become more probable, bad ones less,
//! compared with a reference; nothing need be paired.
//!
//! What rewards are compared with is an estimate of the KL to the reference, on prompts with the completion of the record before
//! it in the step (of the first: of the last). It counts all records of a step, so that it depends neither on ranks nor on
//! micro-batches; TRL's counts those of a micro-batch.

use std::cell::RefCell;

use kernels::ops;
use tch::{Device, Kind, Tensor};

use crate::algorithms::base::{self, Base, LastStep, RunLength, planned_model, shape_and_trainable};
use crate::algorithms::completions::Completions;
use crate::algorithms::folder::RunFolder;
use crate::algorithms::learner::Learner;
use crate::algorithms::losses::sums_of;
use crate::algorithms::losses::unpaired::{losses, reference_point};
use crate::algorithms::recipe::{Recipe, Shown};
use crate::algorithms::reference::{self, Reference};
use crate::algorithms::run::Start;
use crate::algorithms::step::{self, Objective, StepEntry, StopCheck};
use crate::algorithms::{records, session};
use crate::checkpoint::Metric;
use crate::config::kto::{Kto, KtoLoss, KtoSection};
use crate::config::shape::{Head, Shape};
use crate::config::{Algorithm, Loaded, common};
use crate::data::chat::Chat;
use crate::data::examples::{Encoded, Example};
use crate::data::feedback::{self, DESIRABLE};
use crate::data::position::{Indexed, Position};
use crate::data::preferences::SequenceBatch;
use crate::data::rows::RowLoader;
use crate::distributed::agreement::Facts;
use crate::distributed::world::World;
use crate::error::Result;
use crate::model::head::LogProbs;
use crate::model::{DropoutPlace, Llama, Trainable, compute_kind};
use crate::optim::Schedule;
use crate::plan::training::{RowShape, TrainingMemory};
use crate::plan::{MemoryPlan, PlanTarget};
use crate::telemetry::MetricsLine;
use crate::{info, warn};

/// What a run reads before any rank talks to another.
pub struct Inputs {
    base: Base,
    trainable: Trainable,
    chat: Chat,
    train: RowLoader,
    valid: Option<RowLoader>,
    /// Another reference than the model itself.
    reference: Option<Base>,
    length: RunLength,
}

type Session<'a> = session::Session<'a, Learner<'a>, Position>;

impl Recipe for Kto {
    const ABOUT: &'static str = "Train a model on completions that are labelled good or bad";
    type Inputs = Inputs;

    fn open(&self) -> Result<Inputs> {
        let (tokenizer, length) = (self.tokenizer.as_ref(), self.data.sequence_length);
        let base = Base::open(&self.model, tokenizer, length)?.dated(self.data.template_date);
        let trainable = base.trainable(&self.freeze, self.lora.as_ref())?;
        let chat = Chat::new(&base.tokenizer)?;
        let (train, valid) = feedback::open(&self.data, &chat, self.seed)?;
        let open =
            |r: &crate::config::dpo::ReferencePath| Reference::open_other(&r.path, tokenizer, length, &base);
        let reference = self.reference.as_ref().map(open).transpose()?;
        let length = RunLength::new(&self.train, train.num_rows(), &self.schedule, LastStep::Kept)?;
        Ok(Inputs { base, trainable, chat, train, valid, reference, length })
    }

    fn add_facts(inputs: &Inputs, facts: &mut Facts) -> Result<()> {
        let valid = inputs.valid.as_ref().map(|valid| valid.fingerprint());
        base::add_data(inputs.train.fingerprint(), valid, facts);
        inputs.base.add_facts("model", facts)?;
        inputs.reference.as_ref().map_or(Ok(()), |reference| reference.add_facts("reference", facts))
    }

    fn trained(inputs: &Inputs) -> Vec<(&'static str, &Shape, &Trainable)> {
        vec![("model", &inputs.base.shape, &inputs.trainable)]
    }

    fn frozen_models<'a>(&self, inputs: &'a Inputs) -> Vec<(&'static str, &'a Base)> {
        inputs.reference.iter().map(|base| ("reference", base)).collect()
    }

    fn steps(inputs: &Inputs) -> u64 {
        inputs.length.steps
    }

    fn data_line(&self, inputs: &Inputs) -> String {
        let (good, bad) = labels(&inputs.train);
        let line = records::ranked_line(&inputs.train, &inputs.length);
        format!("{good} good and {bad} bad completions: {line}")
    }

    fn shown<'a>(&self, inputs: &'a Inputs) -> Shown<'a> {
        let (train, valid, chat) = (&inputs.train, inputs.valid.as_ref(), &inputs.chat);
        Shown::Examples { train, valid, chat, longest: self.data.sequence_length }
    }

    fn plan(&self, target: &PlanTarget) -> Result<MemoryPlan> {
        let (model, tokenizer) = (planned_model(&self.model), self.tokenizer.as_ref());
        let (length, lora) = (self.data.sequence_length, self.lora.as_ref());
        let (shape, trainable) =
            shape_and_trainable(&model, Head::Lm, tokenizer, length, &self.freeze, lora)?;
        let (plans, rows) = (trainable.plans(&shape)?, RowShape::completions(1, length, self.data.packing));
        let training = TrainingMemory::new(Self::SUBCOMMAND, &self.common(), shape, &plans, rows, target)?;
        let other = self.reference.as_ref().map(|r| r.path.as_path());
        Ok(match reference::planned(&self.model, other, tokenizer, lora, &self.common(), target)? {
            Some(memory) => training.with_reference(memory, true).into(),
            None => training.into(),
        })
    }

    fn train(loaded: &Loaded<Self>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
        kto(loaded, &inputs, world, start)
    }
}

fn kto(loaded: &Loaded<Kto>, inputs: &Inputs, world: &World, start: &Start) -> Result<()> {
    let c = &loaded.config;
    let common = c.common();
    let sources = c.data.train.iter().chain(&c.data.valid);
    let mut paths = common::paths(&c.model, c.tokenizer.as_ref(), sources);
    paths.extend(c.reference.as_ref().map(|r| r.path.as_path()));
    let tokenizer = &inputs.base.tokenizer;
    let mut folder = RunFolder::open(loaded, start, &paths, tokenizer, world)?;
    let (base, origin) = (&inputs.base, inputs.base.path(&c.model));
    let mut learner = Learner::new(base, origin, &inputs.trainable, &common, world)?;
    folder.record(learner.record("model"))?;
    let (mut reference, record) =
        Reference::open(base, &inputs.trainable, inputs.reference.as_ref(), &common, world)?;
    folder.record(record)?;
    let progress = folder.restore_or_begin(&mut learner, &inputs.train)?;
    announce(c, inputs, world);

    let schedule = Schedule::new(&common, inputs.length.steps);
    let mut session = Session::start(folder, progress, learner, &common, &inputs.length)?;
    session.catch_up(|s| validation(c, inputs, &mut reference, s))?;
    while !session.run.done() {
        let (next, step) = (session.run.progress.data.next, session.run.progress.step);
        let (lr, count) = (schedule.rate(step), inputs.length.rows_at(next));
        let rows = FeedbackRecords { c, data: &inputs.train, first: next, count };
        let model = &mut session.models.model;
        // Beyond the end of a smaller step: a record that counts nothing.
        let parts =
            || step::division(&c.train, count, world).map(|(n, rows)| (if rows == 0 { 0 } else { n }, rows));
        let kl = rows.kl(model, &mut reference, parts(), world)?;
        let mut batches: Vec<Feedback> =
            parts().map(|part| rows.batch(part, Some(step), world.device)).collect();
        for batch in &mut batches {
            batch.reference = reference.with(model, |reference| batch.completions.logps(reference))?;
        }
        let sums = RefCell::new(FeedbackSums::default());
        let mut entries: Vec<StepEntry> =
            batches.iter().map(|batch| batch.entry(&c.kto, kl, &sums)).collect();
        let update = session.models.update(&mut entries, lr, world)?;
        drop(entries);
        let sums = sums.into_inner().over_ranks(world)?;

        session.run.progress.data.next += count;
        let tokens = inputs.train.count(next, count).1;
        if let Some(record) = session.run.stepped(tokens, &update, lr)?.record {
            let record = sums.describe(record, kl);
            session.run.log(&records::counted(record, &inputs.train, c.data.on_error));
        }
        session.end_step(|s| validation(c, inputs, &mut reference, s))?;
    }
    session.take_best()?;
    session.finish(tokenizer)
}

/// Records `first..first + count` of a loader: those of a step, or of a validation.
struct FeedbackRecords<'a> {
    c: &'a Kto,
    data: &'a RowLoader,
    first: u64,
    count: u64,
}

impl FeedbackRecords<'_> {
    /// Completions of the records `range` (of these).
    fn completions(&self, range: std::ops::Range<u64>) -> u64 {
        let of = |n: u64| {
            let (source, i) = self.data.place(self.first + n);
            self.data.sources()[source].sequences(i).len() as u64
        };
        range.map(of).sum()
    }

    /// A micro-batch: `part` is its first record among these, and how many; 0: one that counts nothing. With adapters' dropout
    /// of `step`, where it is training.
    fn batch(&self, part: (u64, u64), step: Option<u64>, device: Device) -> Feedback {
        let (first, rows) = part;
        let examples: Vec<Example> =
            (first..first + rows.max(1)).map(|n| self.data.example(self.first + n)).collect();
        let share = if rows == 0 { 0.0 } else { 1.0 / self.completions(0..self.count) as f64 };
        let packing = self.c.data.packing;
        let kind = ops::accumulator(compute_kind(self.c.precision.compute));
        let mut batch = Feedback::new(&SequenceBatch::new(&examples, packing), packing, share, kind, device);
        if let Some(step) = step.filter(|_| self.c.lora.as_ref().is_some_and(|l| l.dropout > 0.0)) {
            let place = DropoutPlace { seed: self.c.seed, step, first_row: self.completions(0..first) };
            batch.completions.batch.input.dropout = Some(place);
        }
        batch
    }

    /// What log-ratios are compared with (see [`reference_point`]). `parts`: this rank's micro-batches; all ranks give equally
    /// many. Collective.
    fn kl(
        &self,
        model: &mut Llama,
        reference: &mut Reference,
        parts: impl Iterator<Item = (u64, u64)>,
        world: &World,
    ) -> Result<f64> {
        if self.c.kto.loss == KtoLoss::ApoZeroUnpaired {
            return Ok(reference_point(self.c.kto.loss, 0.0, 1.0));
        }
        let mut mine = [0.0, 0.0];
        for part in parts {
            let completions = self.mismatched(part, world.device);
            let policy = completions.logps(model)?;
            let ratios = policy - reference.with(model, |reference| completions.logps(reference))?;
            if part.1 > 0 {
                mine[0] += ratios.sum(Kind::Double).double_value(&[]);
                mine[1] += ratios.size()[0] as f64;
            }
        }
        let all = world.sum_rows(&mine)?;
        Ok(reference_point(self.c.kto.loss, all[0], all[1]))
    }

    /// The prompts of a micro-batch, each with the completion of the record before it among these.
    fn mismatched(&self, (first, rows): (u64, u64), device: Device) -> Completions {
        let example = |n: u64| self.data.example(self.first + n % self.count);
        let longest = self.c.data.sequence_length as usize;
        let sequences = (first..first + rows.max(1)).flat_map(|n| {
            let (of, before) = (example(n), example(n + self.count - 1));
            let number = 0..of.sequences.len();
            number.map(|i| feedback::mismatched(&of, i, &before, longest)).collect::<Vec<Encoded>>()
        });
        let examples: Vec<Example> = sequences.map(Example::from).collect();
        let packing = self.c.data.packing;
        let kind = ops::accumulator(compute_kind(self.c.precision.compute));
        Completions::new(&SequenceBatch::new(&examples, packing), packing, kind, device)
    }
}

/// A micro-batch of S completions, and what its loss is made of.
struct Feedback {
    completions: Completions,
    /// 1 for good completions, 0 for bad ones, A `[S]`.
    desirable: Tensor,
    /// A completion's share of the loss.
    share: f64,
    /// The reference's log-probabilities, A `[S]`.
    reference: Tensor,
}

impl Feedback {
    /// `kind` (A): of sums and losses.
    fn new(batch: &SequenceBatch, packing: bool, share: f64, kind: Kind, device: Device) -> Feedback {
        let good = |rank: &u32| f64::from(u8::from(*rank == DESIRABLE));
        let desirable: Vec<f64> = batch.ranks.iter().flatten().map(good).collect();
        let desirable = Tensor::from_slice(&desirable).to_device(device).to_kind(kind);
        let completions = Completions::new(batch, packing, kind, device);
        Feedback { completions, share, reference: desirable.zeros_like(), desirable }
    }

    /// As an entry of a step; what is counted is added to `sums`.
    fn entry<'a>(
        &'a self,
        section: &'a KtoSection,
        kl: f64,
        sums: &'a RefCell<FeedbackSums>,
    ) -> StepEntry<'a> {
        let loss = move |out: &LogProbs| Ok(self.loss(&out.logprobs, section, kl, &mut sums.borrow_mut()));
        let objective = Objective::LogProbs { temperature: 1.0, entropies: false, loss: Box::new(loss) };
        StepEntry { batch: &self.completions.batch, objective, balance: None }
    }

    /// The loss of the micro-batch, from the log-probabilities of all labels, `[N]`; what is counted is added to `counted`.
    fn loss(&self, logprobs: &Tensor, section: &KtoSection, kl: f64, counted: &mut FeedbackSums) -> Tensor {
        let ratios = self.completions.sums(logprobs) - &self.reference; // [S]
        let losses = losses(section, &ratios, &self.desirable, kl); // [S]
        if self.share > 0.0 {
            let (now, good) = (ratios.detach(), &self.desirable);
            let bad: Tensor = 1.0 - good;
            let (above, below) = (now.gt(kl).to_kind(now.kind()), now.lt(kl).to_kind(now.kind()));
            let right = above * good + below * &bad;
            let [num_good, num_bad, of_good, of_bad, right] =
                sums_of([good.shallow_clone(), bad.shallow_clone(), &now * good, &now * &bad, right]);
            counted.add(&FeedbackSums {
                good: num_good,
                bad: num_bad,
                rewards_good: section.beta * of_good,
                rewards_bad: section.beta * of_bad,
                right,
            });
        }
        losses.sum(losses.kind()) * self.share
    }
}

/// What is counted of completions, over micro-batches and then over ranks.
#[derive(Debug, Clone, Copy, Default)]
struct FeedbackSums {
    good: f64,
    bad: f64,
    /// beta times the log-ratio to the reference: the implicit rewards.
    rewards_good: f64,
    rewards_bad: f64,
    /// Good completions whose log-ratio is above the KL, and bad ones whose is below.
    right: f64,
}

impl FeedbackSums {
    fn add(&mut self, other: &FeedbackSums) {
        self.good += other.good;
        self.bad += other.bad;
        self.rewards_good += other.rewards_good;
        self.rewards_bad += other.rewards_bad;
        self.right += other.right;
    }

    /// Those of all ranks. Collective.
    fn over_ranks(self, world: &World) -> Result<FeedbackSums> {
        let mine = [self.good, self.bad, self.rewards_good, self.rewards_bad, self.right];
        let all = world.sum_rows(&mine)?;
        let [good, bad, rewards_good, rewards_bad, right] = std::array::from_fn(|i| all[i]);
        Ok(FeedbackSums { good, bad, rewards_good, rewards_bad, right })
    }

    /// Adds means; null where there is no such completion.
    fn describe(&self, record: MetricsLine, kl: f64) -> MetricsLine {
        record
            .float("rewards_chosen", self.rewards_good / self.good)
            .float("rewards_rejected", self.rewards_bad / self.bad)
            .float("kl", kl)
            .float("accuracy", self.right / (self.good + self.bad))
            .count("desirable", self.good as u64)
            .count("undesirable", self.bad as u64)
    }
}

/// Validates, where that is due; whether the checkpoint is the best so far, to be saved.
fn validation(c: &Kto, inputs: &Inputs, reference: &mut Reference, session: &mut Session) -> Result<bool> {
    let Some(valid) = inputs.valid.as_ref().filter(|_| session.run.due(c.valid.every)) else {
        return Ok(false);
    };
    let (run, model) = (&mut session.run, &mut session.models.model);
    let validated = validate(c, model, reference, valid, session.world, &mut || run.interrupted())?;
    let Some((loss, kl, sums)) = validated else { return run.owe_validation() };
    let record = run.with_loss(MetricsLine::new("valid", run.progress.step), loss);
    run.log(&sums.describe(record, kl));
    run.restart_window();
    Ok(run.note_validation(Metric::Loss, loss, &c.valid))
}

/// The mean loss over the first `valid.batches` batches of the validation data, whose KL is one estimate over all of them, and
/// what is counted with it; none where it was stopped. Collective.
fn validate(
    c: &Kto,
    model: &mut Llama,
    reference: &mut Reference,
    data: &RowLoader,
    world: &World,
    stop: StopCheck,
) -> Result<Option<(f64, f64, FeedbackSums)>> {
    let total = data.num_rows().min((c.valid.batches * c.train.batch_size) as u64);
    let rows = FeedbackRecords { c, data, first: 0, count: total };
    // Beyond the end: a record that counts nothing.
    let parts =
        || step::rounds(total, &c.train, world).map(|(n, rows)| (if rows == 0 { 0 } else { n }, rows));
    let kl = rows.kl(model, reference, parts(), world)?;
    let (mut loss, mut sums) = (0.0, FeedbackSums::default());
    for part in parts() {
        if stop()? {
            return Ok(None);
        }
        let mut batch = rows.batch(part, None, world.device);
        batch.reference = reference.with(model, |reference| batch.completions.logps(reference))?;
        let logprobs = batch.completions.logprobs(model)?;
        loss += batch.loss(&logprobs, &c.kto, kl, &mut sums).double_value(&[]);
    }
    let loss = world.sum_rows(&[loss])?[0];
    Ok(Some((loss, kl, sums.over_ranks(world)?)))
}

/// Good and bad completions of all sources.
fn labels(data: &RowLoader) -> (u64, u64) {
    let ranks = data.sources().iter().flat_map(|s| (0..s.len()).flat_map(move |i| s.get(i).ranks));
    ranks.fold((0, 0), |(good, bad), rank| if rank == DESIRABLE { (good + 1, bad) } else { (good, bad + 1) })
}

fn announce(c: &Kto, inputs: &Inputs, world: &World) {
    info!("model: {:.2}M parameters", inputs.base.shape.num_parameters() as f64 / 1e6);
    info!("data: {}", c.data_line(inputs));
    records::announce(&inputs.train, inputs.valid.as_ref(), &inputs.chat, world);
    if let Some(warning) = unbalanced(&c.kto, labels(&inputs.train)).filter(|_| world.is_main()) {
        warn!("{warning}");
    }
}

/// What is said of weights that do not make up for the numbers of good and bad completions (Ethayarajh et al. 2024, eq. 8: good
/// ones should weigh 1 to 4/3 times as much as bad ones in all).
fn unbalanced(s: &KtoSection, (good, bad): (u64, u64)) -> Option<String> {
    let ratio = s.desirable_weight * good as f64 / (s.undesirable_weight * bad as f64);
    if (0.99..=1.34).contains(&ratio) || good == 0 || bad == 0 || s.undesirable_weight == 0.0 {
        return None;
    }
    let weight = s.undesirable_weight * bad as f64 / good as f64;
    Some(format!(
        "data.train has {good} good and {bad} bad completions, which weigh {ratio:.2} to 1 in all; 1 to 1.33 is advised: set \
         kto.desirable_weight between {weight:.3} and {:.3}",
        weight * 4.0 / 3.0
    ))
}
