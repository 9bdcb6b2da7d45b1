//! Direct preference optimization: the better of two completions becomes more probable than the worse one, compared with a
//! reference (Rafailov et al. 2023).

pub mod losses;
pub(super) mod reference;

use std::cell::RefCell;
use std::ops::Range;

use kernels::c10d::ReduceOp;
use kernels::ops;
use tch::{Device, Kind, Tensor};

use crate::algorithms::base::{self, Base};
use crate::algorithms::folder::RunFolder;
use crate::algorithms::records;
use crate::algorithms::run::Start;
use crate::algorithms::step::{self, Entry, MicroBatch, Objective, Stop, Sums};
use crate::algorithms::training::{Learner, Plan, Progress, Run, compute_kind};
use crate::checkpoint::Metric;
use crate::config::dpo::{Dpo, Pairs, Section};
use crate::config::model::Model;
use crate::config::{Algorithm, Loaded, common};
use crate::data::chat::Chat;
use crate::data::examples::Example;
use crate::data::loader::State;
use crate::data::preferences::{self, Batch};
use crate::data::rows::RowLoader;
use crate::distributed::agreement::Facts;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::info;
use crate::model::{DropoutPlace, Input, Llama, LmHead, Trainable};
use crate::optim::Schedule;
use crate::telemetry::Record;
use reference::{Of, Reference, ReferenceModel};

/// What a run reads before any rank talks to another: files are checked and tokenized, and errors told, before a group
/// could hang.
pub struct Inputs {
    pub base: Base,
    pub trainable: Trainable,
    pub chat: Chat,
    pub train: RowLoader,
    pub valid: Option<RowLoader>,
    /// Another reference than the model itself.
    reference: Option<Base>,
    pub steps: u64,
}

impl base::Inputs for Inputs {
    fn add_facts(&self, facts: &mut Facts) -> Result<()> {
        let valid = self.valid.as_ref().map(|valid| valid.fingerprint());
        base::add_data(self.train.fingerprint(), valid, facts);
        self.base.add_facts("model", facts)?;
        self.reference.as_ref().map_or(Ok(()), |reference| reference.add_facts("reference", facts))
    }
}

impl Inputs {
    /// Opens, checks and tokenizes all that the configuration names.
    pub fn open(c: &Dpo) -> Result<Inputs> {
        let base = Base::open(&c.model, c.tokenizer.as_ref(), c.data.sequence_length)?;
        let base = base.dated(c.data.template_date);
        let trainable = base.trainable(&c.freeze, c.lora.as_ref())?;
        let chat = Chat::new(&base.tokenizer)?;
        let (train, valid) = preferences::open(&c.data, &chat, c.seed)?;
        let steps = base::steps(&c.train, train.num_rows(), c.schedule.warmup_steps)?;
        let reference = match &c.reference {
            None => None,
            Some(r) => {
                let length = c.data.sequence_length;
                let opened = Base::open(&Model::Path(r.path.clone()), c.tokenizer.as_ref(), length);
                let opened = opened.map_err(|e| e.context("reference"))?;
                if opened.tokenizer.base_hash() != base.tokenizer.base_hash() {
                    return Err(Error::config(
                        "reference: its tokenizer is not the model's; it reads the same tokens, and must be of the same \
                         family",
                    ));
                }
                Some(opened)
            }
        };
        Ok(Inputs { base, trainable, chat, train, valid, reference, steps })
    }
}

/// A micro-batch of S completions, and what its loss is made of. P pairs, R supervised tokens of the longest completion.
pub(super) struct Work {
    pub batch: MicroBatch,
    /// Of each example: its source and its sequences there.
    places: Vec<(usize, Range<usize>)>,
    /// Where the completions' tokens are predicted, int64 [S * R], and which are there, A [S, R].
    positions: Tensor,
    pub mask: Tensor,
    /// Of each pair the numbers of its completions, int64 `[P]`, and its share of the loss, A `[P]`.
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor,
    /// 1 for the best completions, A `[S]`.
    best: Tensor,
    /// The reference's log-probabilities, A `[S]`.
    pub reference: Tensor,
}

/// What is told of pairs: sums over all of them, each times its share of the loss, but for the last two.
pub(super) const STATS: [&str; 8] = [
    "rewards_chosen",
    "rewards_rejected",
    "accuracy",
    "margin",
    "logps_chosen",
    "logps_rejected",
    "nll of the best completions",
    "tokens of the best completions",
];

impl Work {
    /// Rows of a loader, of which each is a `share` of the loss.
    fn new(c: &Dpo, rows: &RowLoader, numbers: &[u64], share: f64, device: Device) -> Work {
        let examples: Vec<Example> = numbers.iter().map(|n| rows.example(*n)).collect();
        let kind = ops::accumulator(compute_kind(c.precision.compute));
        let places = numbers.iter().map(|n| rows.place(*n));
        let places = places.map(|(s, i)| (s, rows.sources()[s].sequences(i))).collect();
        Work { places, ..Work::of(&examples, c.data.packing, c.dpo.pairs, share, kind, device) }
    }

    /// Examples that are in no file, of which each is a `share` of the loss. `kind`: of sums and losses.
    pub fn of(
        examples: &[Example],
        packing: bool,
        which: Pairs,
        share: f64,
        kind: Kind,
        device: Device,
    ) -> Work {
        let batch = Batch::new(examples, packing);
        let (mut chosen, mut rejected, mut weights, mut best) = (vec![], vec![], vec![], vec![]);
        for ranks in &batch.ranks {
            let first = best.len();
            let lowest = ranks.iter().min().copied().unwrap_or(0);
            let before = chosen.len();
            for (i, a) in ranks.iter().enumerate() {
                for (j, _) in ranks.iter().enumerate().filter(|(_, b)| a < *b) {
                    if which == Pairs::All || *a == lowest {
                        chosen.push((first + i) as i64);
                        rejected.push((first + j) as i64);
                    }
                }
            }
            let n = chosen.len() - before;
            weights.extend(std::iter::repeat_n(share / n as f64, n));
            best.extend(ranks.iter().map(|r| f64::from(u8::from(share > 0.0 && *r == lowest))));
        }
        let (positions, there) = batch.supervised();
        let numbers = |values: &[f64]| Tensor::from_slice(values).to_device(device).to_kind(kind);
        let indices = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let mask = Tensor::from_slice(&there).to_device(device).to_kind(kind);
        let rows = &batch.rows;
        let mut micro_batch = MicroBatch::from_rows(&rows.input_ids, &rows.labels, rows.columns as i64);
        if packing {
            micro_batch.input = Input {
                positions: Some(Tensor::from_slice(&rows.positions)),
                start: Some(Tensor::from_slice(&rows.starts)),
                ..micro_batch.input
            };
        }
        Work {
            batch: micro_batch,
            places: Vec::new(),
            positions: indices(&positions),
            mask: mask.view([batch.num_sequences() as i64, -1]),
            chosen: indices(&chosen),
            rejected: indices(&rejected),
            weights: numbers(&weights),
            reference: numbers(&vec![0.0; best.len()]),
            best: numbers(&best),
        }
    }

    /// The log-probabilities of whole completions, `[S]`, from those of all labels.
    fn sums(&self, logprobs: &Tensor) -> Tensor {
        // Every position is taken at most once but for the first, with a mask of 0: the gradient is the same in any order.
        let tokens = logprobs.index_select(0, &self.positions).view_as(&self.mask) * &self.mask;
        tokens.sum_dim_intlist([1i64].as_slice(), false, self.mask.kind())
    }

    /// The loss of the micro-batch, and its part of what is told ([`STATS`]). `sft`: the weight of a token of the best
    /// completions.
    pub fn loss(&self, logprobs: &Tensor, section: &Section, sft: f64, stats: &RefCell<[f64; 8]>) -> Tensor {
        let (sums, kind) = (self.sums(logprobs), self.mask.kind());
        let ratios = &sums - &self.reference;
        let tokens = self.mask.sum_dim_intlist([1i64].as_slice(), false, kind);
        let pairs = losses::Pairs {
            chosen: ratios.index_select(0, &self.chosen),
            rejected: ratios.index_select(0, &self.rejected),
            chosen_tokens: tokens.index_select(0, &self.chosen),
            rejected_tokens: tokens.index_select(0, &self.rejected),
        };
        let mut loss = (losses::losses(section, &pairs) * &self.weights).sum(kind);
        if sft > 0.0 {
            loss -= (&sums * &self.best).sum(kind) * sft;
        }
        let total = |t: Tensor| t.detach().sum(Kind::Double).double_value(&[]);
        let weighted = |t: &Tensor| total(t.detach() * &self.weights);
        let beta = section.beta;
        let margin = &pairs.chosen - &pairs.rejected;
        let logp = |which: &Tensor| sums.detach().index_select(0, which);
        let values = [
            weighted(&pairs.chosen) * beta,
            weighted(&pairs.rejected) * beta,
            weighted(&margin.gt(0.0).to_kind(kind)),
            weighted(&margin) * beta,
            weighted(&logp(&self.chosen)),
            weighted(&logp(&self.rejected)),
            -total(&sums * &self.best),
            total(tokens * &self.best),
        ];
        stats.borrow_mut().iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
        loss
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

/// Runs the training that `loaded` describes, in `world`, on inputs that were opened before the ranks met.
pub fn dpo(loaded: &Loaded<Dpo>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
    let c = &loaded.config;
    let common = c.common();
    let sources = c.data.train.iter().chain(&c.data.valid);
    let mut paths = common::paths(&c.model, c.tokenizer.as_ref(), sources);
    paths.extend(c.reference.as_ref().map(|r| r.path.as_path()));
    let tokenizer = &inputs.base.tokenizer;
    let mut folder = RunFolder::open(loaded, start, &paths, tokenizer, world)?;
    let origin = inputs.base.path(&c.model);
    let mut learner = Learner::new(&inputs.base, origin, &inputs.trainable, &common, world)?;
    folder.record(learner.record("model", &inputs.base))?;
    let mut reference = ReferenceModel::open(c, &inputs, world)?;
    folder.record(reference.record.take())?;
    let restored = folder.restore::<State>(&mut learner)?;
    let fresh = restored.is_none();
    let progress = match restored {
        Some(progress) => {
            inputs.train.resume(&progress.data)?;
            progress
        }
        None => {
            learner.begin(&inputs.base, c.seed)?;
            Progress::new(inputs.train.state(0))
        }
    };
    announce(c, &inputs);
    records::announce(&inputs.train, inputs.valid.as_ref(), &inputs.chat, world);
    let mut reference = reference.ready(c, &inputs, &mut learner, fresh, world)?;
    let schedule = Schedule::new(&common, inputs.steps);
    let mut run = folder.start(progress, Plan::new(&common, inputs.steps))?;
    let (counts, odd) = (inputs.train.counts(), inputs.train.odd());

    if run.owes_validation() {
        let best = validation(c, &inputs, &mut learner.model, &mut reference, &mut run, world)?;
        run.save(&[learner.part("")], best)?;
    }
    while !run.done() {
        let (next, batch) = (run.progress.data.next, c.train.batch_size as u64);
        let tokens = inputs.train.count(next, batch).1;
        let sft = sft_weight(c, &inputs.train, next, batch);
        let mut works = this_ranks_work(c, &inputs.train, next, run.progress.step, world);
        for work in &mut works {
            work.reference = reference.sums(&mut learner.model, work, Of::Train)?;
        }
        let stats = RefCell::new([0.0; 8]);
        let entry = |work| {
            let (work, stats): (&Work, _) = (work, &stats);
            let loss =
                move |out: &crate::model::head::LogProbs| Ok(work.loss(&out.logprobs, &c.dpo, sft, stats));
            let objective = Objective::LogProbs { temperature: 1.0, entropies: false, loss: Box::new(loss) };
            Entry { batch: &work.batch, objective, balance: None }
        };
        let mut entries: Vec<Entry> = works.iter().map(entry).collect();
        let Learner { model, optimizer, .. } = &mut learner;
        let (losses, _) = step::accumulate(model, &mut entries, c.train.recompute)?;
        drop(entries);
        let (lr, clip) = (schedule.rate(run.progress.step), c.optim.clip);
        let sums = Sums { loss: losses.iter().sum(), aux_loss: None };
        let update = step::apply_gradients(model, optimizer, world, sums, lr, clip)?;
        let stats = world.group.combine(&stats.into_inner(), ReduceOp::Sum)?;

        run.progress.data.next += batch;
        if let Some(record) = run.stepped(tokens, &update, lr)?.record {
            let record = tell(record, &stats, c);
            let (truncated, dropped) = (counts.truncated, counts.dropped());
            let record = record.count("truncated", truncated).count("dropped", dropped);
            let record = records::count(record, &odd, c.data.on_error);
            let ties = ties(&inputs.train, next, batch);
            run.log(&record.count("duplicates", counts.duplicates).count("ties", ties));
        }
        let due = run.due(c.valid.every);
        let best = due && validation(c, &inputs, &mut learner.model, &mut reference, &mut run, world)?;
        run.save(&[learner.part("")], best)?;
    }
    run.take_best(|best| best.load_values(&mut learner.model.params))?;
    run.finish(|dir| learner.export(dir, tokenizer, world))
}

fn tell(record: Record, stats: &[f64], c: &Dpo) -> Record {
    let record = STATS.iter().zip(stats).take(6).fold(record, |r, (key, x)| r.float(key, *x));
    if c.dpo.sft_weight == 0.0 { record } else { record.float("nll", stats[6] / stats[7]) }
}

/// This rank's part of the step that begins at example `first`.
fn this_ranks_work(c: &Dpo, data: &RowLoader, first: u64, step: u64, world: &World) -> Vec<Work> {
    let dropout = c.lora.as_ref().is_some_and(|l| l.dropout > 0.0);
    let work = |(row, count): (u64, u64)| {
        let numbers: Vec<u64> = (first + row..first + row + count).collect();
        let mut work = Work::new(c, data, &numbers, 1.0 / c.train.batch_size as f64, world.device);
        if dropout {
            let sequences = |n: u64| {
                let (s, i) = data.place(n);
                data.sources()[s].sequences(i).len() as u64
            };
            let first_row = (first..first + row).map(sequences).sum();
            work.batch.input.dropout = Some(DropoutPlace { seed: c.seed, step, first_row });
        }
        work
    };
    step::division(&c.train, world).map(work).collect()
}

/// Examples that a validation takes.
fn num_valid(c: &Dpo, data: &RowLoader) -> u64 {
    data.num_rows().min((c.valid.batches * c.train.batch_size) as u64)
}

/// Validates, where there is data to validate on; whether the checkpoint is the best so far, to be saved.
fn validation(
    c: &Dpo,
    inputs: &Inputs,
    model: &mut Llama,
    reference: &mut Reference,
    run: &mut Run<State>,
    world: &World,
) -> Result<bool> {
    let Some(valid) = &inputs.valid else { return Ok(false) };
    let validated = validate(c, model, reference, valid, world, &mut || run.interrupted())?;
    let Some((loss, stats)) = validated else { return run.owe_validation() };
    let record = run.with_loss(Record::new("valid", run.progress.step), loss);
    let record = tell(record, &stats, c).float("perplexity", (stats[6] / stats[7]).exp());
    run.log(&record.count("ties", ties(valid, 0, num_valid(c, valid))));
    run.restart_window();
    Ok(run.note_validation(Metric::Loss, loss, &c.valid))
}

/// The loss over the first `valid.batches` batches of the validation data, and what is told with it; none where it was
/// stopped.
fn validate(
    c: &Dpo,
    model: &mut Llama,
    reference: &mut Reference,
    data: &RowLoader,
    world: &World,
    stop: Stop,
) -> Result<Option<(f64, Vec<f64>)>> {
    let total = num_valid(c, data);
    let sft = sft_weight(c, data, 0, total);
    let (mut loss, stats) = (0.0, RefCell::new([0.0; 8]));
    for (first, count) in step::rounds(total, &c.train, world) {
        if stop()? {
            return Ok(None);
        }
        let (numbers, share): (Vec<u64>, f64) = match count {
            0 => (vec![0], 0.0),
            n => ((first..first + n).collect(), 1.0 / total as f64),
        };
        let mut work = Work::new(c, data, &numbers, share, world.device);
        work.reference = reference.sums(model, &work, Of::Valid)?;
        let hidden = model.hidden(&work.batch.input)?;
        let labels = work.batch.labels.to_device(hidden.device());
        let logprobs = LmHead::logprobs(model, &hidden, &labels, 1.0, false)?.logprobs;
        loss += work.loss(&logprobs, &c.dpo, sft, &stats).double_value(&[]);
    }
    let mut sums = stats.into_inner().to_vec();
    sums.push(loss);
    let mut sums = world.group.combine(&sums, ReduceOp::Sum)?;
    Ok(Some((sums.pop().unwrap_or(f64::NAN), sums)))
}

fn announce(c: &Dpo, inputs: &Inputs) {
    let counts = inputs.train.counts();
    info!("model: {:.2}M parameters", inputs.base.shape.num_parameters() as f64 / 1e6);
    info!(
        "data: {} prompts with {} completions, {} tokens; {} were truncated, {}; {} steps are {:.2} epochs",
        counts.examples,
        counts.sequences,
        counts.tokens,
        counts.truncated,
        counts.dropped_and_why(),
        inputs.steps,
        inputs.steps as f64 * c.train.batch_size as f64 / inputs.train.num_rows() as f64,
    );
}
