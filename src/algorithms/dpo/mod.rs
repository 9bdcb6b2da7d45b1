//! Direct preference optimization: the better of two completions becomes more probable than the worse one, compared with a
//! reference (Rafailov et al. 2023).

pub mod batch;
mod reference;

use std::cell::RefCell;
use std::ops::Range;

use crate::algorithms::base::{self, Base, LastStep, RunLength, planned_model, shape_and_trainable};
use crate::algorithms::folder::RunFolder;
use crate::algorithms::learner::Learner;
use crate::algorithms::recipe::{Recipe, Shown};
use crate::algorithms::reference as online;
use crate::algorithms::run::Start;
use crate::algorithms::step::{self, StepEntry, StopCheck};
use crate::algorithms::{records, session};
use crate::checkpoint::Metric;
use crate::config::dpo::{Dpo, ReferenceFrom};
use crate::config::shape::{Head, Shape};
use crate::config::{Algorithm, Loaded, common};
use crate::data::chat::Chat;
use crate::data::examples::Example;
use crate::data::position::{Indexed, Position};
use crate::data::preferences;
use crate::data::rows::RowLoader;
use crate::distributed::agreement::Facts;
use crate::distributed::world::World;
use crate::error::Result;
use crate::info;
use crate::model::{DropoutPlace, Llama, Trainable};
use crate::optim::Schedule;
use crate::plan::training::{RowShape, TrainingMemory};
use crate::plan::{MemoryPlan, PlanTarget};
use crate::telemetry::MetricsLine;
use batch::{PairSums, PreferenceBatch};
use reference::{ReferenceModel, ReferenceOf, ReferenceScores};

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

impl Recipe for Dpo {
    const ABOUT: &'static str = "Train a model to prefer the better of completions";
    const PLAN_FLAGS: &'static [&'static str] = &["completions"];
    type Inputs = Inputs;

    fn open(&self) -> Result<Inputs> {
        let length = self.data.sequence_length;
        let base = Base::open(&self.model, self.tokenizer.as_ref(), length)?;
        let base = base.dated(self.data.template_date);
        let trainable = base.trainable(&self.freeze, self.lora.as_ref())?;
        let chat = Chat::new(&base.tokenizer)?;
        let (train, valid) = preferences::open(&self.data, &chat, self.seed)?;
        let open = |r: &crate::config::dpo::ReferencePath| {
            online::Reference::open_other(&r.path, self.tokenizer.as_ref(), length, &base)
        };
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
        records::ranked_line(&inputs.train, &inputs.length)
    }

    fn shown<'a>(&self, inputs: &'a Inputs) -> Shown<'a> {
        let (train, valid, chat) = (&inputs.train, inputs.valid.as_ref(), &inputs.chat);
        Shown::Examples { train, valid, chat, longest: self.data.sequence_length }
    }

    fn plan(&self, target: &PlanTarget) -> Result<MemoryPlan> {
        let (model, tokenizer) = (planned_model(&self.model), self.tokenizer.as_ref());
        let length = self.data.sequence_length;
        let (shape, trainable) =
            shape_and_trainable(&model, Head::Lm, tokenizer, length, &self.freeze, self.lora.as_ref())?;
        let rows = RowShape::completions(target.completions, length, self.data.packing);
        let plans = trainable.plans(&shape)?;
        let training = TrainingMemory::new(Self::SUBCOMMAND, &self.common(), shape, &plans, rows, target)?;

        let online = self.dpo.reference == ReferenceFrom::Online;
        let other = self.reference.as_ref().map(|r| r.path.as_path());
        // Before its first step the trained model stands for its reference.
        if other.is_none() && !online {
            return Ok(training.into());
        }
        let lora = self.lora.as_ref();
        Ok(match online::planned(&self.model, other, tokenizer, lora, &self.common(), target)? {
            Some(memory) => training.with_reference(memory, online).into(),
            None => training.into(),
        })
    }

    fn train(loaded: &Loaded<Self>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
        dpo(loaded, &inputs, world, start)
    }
}

/// Pairs of equal rank, which no loss compares, of rows `first..first + count`.
fn ties(rows: &RowLoader, first: u64, count: u64) -> u64 {
    let of = |ranks: Vec<u32>| {
        let equal = |(i, rank): (usize, &u32)| ranks[i + 1..].iter().filter(|r| *r == rank).count();
        ranks.iter().enumerate().map(equal).sum::<usize>() as u64
    };
    (first..first + count).map(|n| of(rows.example(n).ranks)).sum()
}

/// Tokens of the best completions of rows `first..first + count`.
fn best_tokens(rows: &RowLoader, first: u64, count: u64) -> f64 {
    let tokens = |example: Example| {
        let lowest = example.ranks.iter().min().copied();
        let best = example.sequences.iter().zip(&example.ranks).filter(|(_, r)| Some(**r) == lowest);
        best.map(|(s, _)| s.supervised.iter().filter(|s| **s).count()).sum::<usize>() as f64
    };
    (first..first + count).map(|n| tokens(rows.example(n))).sum()
}

/// The weight of a token of the best completions among rows `first..first + count`.
fn sft_weight(c: &Dpo, rows: &RowLoader, first: u64, count: u64) -> f64 {
    if c.dpo.sft_weight == 0.0 { 0.0 } else { c.dpo.sft_weight / best_tokens(rows, first, count) }
}

fn dpo(loaded: &Loaded<Dpo>, inputs: &Inputs, world: &World, start: &Start) -> Result<()> {
    let c = &loaded.config;
    let common = c.common();
    let sources = c.data.train.iter().chain(&c.data.valid);
    let mut paths = common::paths(&c.model, c.tokenizer.as_ref(), sources);
    paths.extend(c.reference.as_ref().map(|r| r.path.as_path()));
    let tokenizer = &inputs.base.tokenizer;
    let mut folder = RunFolder::open(loaded, start, &paths, tokenizer, world)?;
    let origin = inputs.base.path(&c.model);
    let mut learner = Learner::new(&inputs.base, origin, &inputs.trainable, &common, world)?;
    folder.record(learner.record("model"))?;
    let mut reference = ReferenceModel::open(c, inputs, world)?;
    folder.record(reference.record.take())?;
    let progress = folder.restore_or_begin(&mut learner, &inputs.train)?;
    announce(c, inputs);
    records::announce(&inputs.train, inputs.valid.as_ref(), &inputs.chat, world);
    let is_new = folder.from().is_none();
    let mut reference = reference.ready(c, inputs, &mut learner, is_new, world)?;

    let schedule = Schedule::new(&common, inputs.length.steps);
    let mut session = Session::start(folder, progress, learner, &common, &inputs.length)?;
    session.catch_up(|s| validation(c, inputs, &mut reference, s))?;
    while !session.run.done() {
        let (next, step) = (session.run.progress.data.next, session.run.progress.step);
        let (lr, count) = (schedule.rate(step), inputs.length.rows_at(next));
        let sft = sft_weight(c, &inputs.train, next, count);
        let mut batches = this_ranks_batches(c, &inputs.train, next..next + count, step, world);
        for batch in &mut batches {
            batch.reference = reference.logps(&mut session.models.model, batch, ReferenceOf::Train)?;
        }
        let sums = RefCell::new(PairSums::default());
        let mut entries: Vec<StepEntry> =
            batches.iter().map(|batch| batch.entry(&c.dpo, sft, &sums)).collect();
        let update = session.models.update(&mut entries, lr, world)?;
        drop(entries);
        let sums = sums.into_inner().over_ranks(world)?;

        session.run.progress.data.next += count;
        let tokens = inputs.train.count(next, count).1;
        if let Some(record) = session.run.stepped(tokens, &update, lr)?.record {
            let record = records::counted(describe(record, &sums, c), &inputs.train, c.data.on_error);
            let record = record.count("duplicates", inputs.train.counts().duplicates);
            session.run.log(&record.count("ties", ties(&inputs.train, next, count)));
        }
        session.end_step(|s| validation(c, inputs, &mut reference, s))?;
    }
    session.take_best()?;
    session.finish(tokenizer)
}

fn describe(record: MetricsLine, sums: &PairSums, c: &Dpo) -> MetricsLine {
    let record = sums.describe(record);
    if c.dpo.sft_weight == 0.0 { record } else { record.float("nll", sums.nll()) }
}

/// This rank's part of the step of some examples.
fn this_ranks_batches(
    c: &Dpo,
    data: &RowLoader,
    of: Range<u64>,
    step: u64,
    world: &World,
) -> Vec<PreferenceBatch> {
    let dropout = c.lora.as_ref().is_some_and(|l| l.dropout > 0.0);
    let batch = |(row, count): (u64, u64)| {
        let first = of.start;
        let (numbers, share): (Vec<u64>, f64) = match count {
            0 => (vec![first], 0.0),
            n => ((first + row..first + row + n).collect(), 1.0 / (of.end - of.start) as f64),
        };
        let mut batch = PreferenceBatch::new(c, data, &numbers, share, world.device);
        if dropout {
            let sequences = |n: u64| {
                let (s, i) = data.place(n);
                data.sources()[s].sequences(i).len() as u64
            };
            let first_row = (first..first + row).map(sequences).sum();
            let input = &mut batch.completions.batch.input;
            input.dropout = Some(DropoutPlace { seed: c.seed, step, first_row });
        }
        batch
    };
    step::division(&c.train, of.end - of.start, world).map(batch).collect()
}

/// Examples that a validation takes.
fn num_valid(c: &Dpo, data: &RowLoader) -> u64 {
    data.num_rows().min((c.valid.batches * c.train.batch_size) as u64)
}

/// Validates, where that is due; whether the checkpoint is the best so far, to be saved.
fn validation(
    c: &Dpo,
    inputs: &Inputs,
    reference: &mut ReferenceScores,
    session: &mut Session,
) -> Result<bool> {
    let Some(valid) = inputs.valid.as_ref().filter(|_| session.run.due(c.valid.every)) else {
        return Ok(false);
    };
    let (run, model) = (&mut session.run, &mut session.models.model);
    let validated = validate(c, model, reference, valid, session.world, &mut || run.interrupted())?;
    let Some((loss, sums)) = validated else { return run.owe_validation() };
    let record = run.with_loss(MetricsLine::new("valid", run.progress.step), loss);
    let record = describe(record, &sums, c).float("perplexity", sums.nll().exp());
    run.log(&record.count("ties", ties(valid, 0, num_valid(c, valid))));
    run.restart_window();
    Ok(run.note_validation(Metric::Loss, loss, &c.valid))
}

/// The loss over the first `valid.batches` batches of the validation data, and what is counted with it; none where it was
/// stopped.
fn validate(
    c: &Dpo,
    model: &mut Llama,
    reference: &mut ReferenceScores,
    data: &RowLoader,
    world: &World,
    stop: StopCheck,
) -> Result<Option<(f64, PairSums)>> {
    let total = num_valid(c, data);
    let sft = sft_weight(c, data, 0, total);
    let (mut loss, mut sums) = (0.0, PairSums::default());
    for (first, count) in step::rounds(total, &c.train, world) {
        if stop()? {
            return Ok(None);
        }
        let (numbers, share): (Vec<u64>, f64) = match count {
            0 => (vec![0], 0.0),
            n => ((first..first + n).collect(), 1.0 / total as f64),
        };
        let mut batch = PreferenceBatch::new(c, data, &numbers, share, world.device);
        batch.reference = reference.logps(model, &batch, ReferenceOf::Valid)?;
        let logprobs = batch.completions.logprobs(model)?;
        loss += batch.loss(&logprobs, &c.dpo, sft, &mut sums).double_value(&[]);
    }
    let loss = world.sum_rows(&[loss])?[0];
    Ok(Some((loss, sums.over_ranks(world)?)))
}

fn announce(c: &Dpo, inputs: &Inputs) {
    info!("model: {:.2}M parameters", inputs.base.shape.num_parameters() as f64 / 1e6);
    info!("data: {}", c.data_line(inputs));
}
