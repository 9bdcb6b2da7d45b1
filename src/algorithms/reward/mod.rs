//! Reward models: a scalar head that learns to score better completions higher than worse ones.

mod ranked;

use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;

use ranked::{RankedScores, RankingTally};

use crate::algorithms::base::{self, Base, LastStep, RunLength, planned_model, shape_and_trainable};
use crate::algorithms::folder::RunFolder;
use crate::algorithms::interval::wilson;
use crate::algorithms::learner::Learner;
use crate::algorithms::recipe::{Recipe, Shown};
use crate::algorithms::run::Start;
use crate::algorithms::step::{self, StepEntry, StopCheck};
use crate::algorithms::{records, scorer, session};
use crate::checkpoint::{Measured, Metric, Scoring};
use crate::config::reward::{Reward, Score, Which};
use crate::config::shape::{Head, Shape};
use crate::config::{Algorithm, Loaded, common};
use crate::data::chat::Chat;
use crate::data::examples::{Encoded, Example};
use crate::data::odd::{Odd, OddRecords, OrOdd, Reason};
use crate::data::position::{Indexed, Position};
use crate::data::preferences::{self, SequenceBatch};
use crate::data::readers;
use crate::data::rows::RowLoader;
use crate::data::supervised;
use crate::distributed::agreement::Facts;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::model::{DropoutPlace, Llama, ScoreHead, Trainable};
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
    score: Score,
    train: RowLoader,
    valid: Option<RowLoader>,
    /// What the scores are normalised on.
    reference: NormalizationData,
    length: RunLength,
}

type Session<'a> = session::Session<'a, Learner<'a>, Position>;

/// Completions, and what they are, in words.
struct NormalizationData {
    sequences: Vec<Encoded>,
    on: String,
    /// Records of `reward.normalize.data` that cannot be used.
    odd: OddRecords,
}

impl Recipe for Reward {
    const ABOUT: &'static str = "Train a reward model on ranked completions";
    const PLAN_FLAGS: &'static [&'static str] = &["completions"];
    type Inputs = Inputs;

    fn open(&self) -> Result<Inputs> {
        let (tokenizer, length) = (self.tokenizer.as_ref(), self.data.sequence_length);
        let base = Base::open_scored(&self.model, tokenizer, length, self.reward.init_std)?;
        let base = base.dated(self.data.template_date);
        let scoring = base.weights.as_ref().map_or(Ok(None), |w| w.scoring())?;
        let score = self.reward.score.or(scoring.map(|s| s.score)).unwrap_or_default();
        check_pad_token(&base, tokenizer.and_then(|t| t.pad_token.as_deref()))?;
        let trainable = base.trainable(&self.freeze, self.lora.as_ref())?;
        let chat = Chat::new(&base.tokenizer)?;
        let (train, valid) = preferences::open(&self.data, &chat, self.seed)?;
        let length = RunLength::new(&self.train, train.num_rows(), &self.schedule, LastStep::Kept)?;
        let reference = NormalizationData::open(self, &chat, valid.as_ref().unwrap_or(&train))?;
        Ok(Inputs { base, trainable, chat, score, train, valid, reference, length })
    }

    fn add_facts(inputs: &Inputs, facts: &mut Facts) -> Result<()> {
        let valid = inputs.valid.as_ref().map(|valid| valid.fingerprint());
        base::add_data(inputs.train.fingerprint(), valid, facts);
        // Its scores are computed by all ranks together: as many on each.
        let sequences = &inputs.reference.sequences;
        let tokens: usize = sequences.iter().map(|s| s.ids.len()).sum();
        facts.add_contents("reward.normalize", &format!("{} sequences of {tokens} tokens", sequences.len()));
        inputs.base.add_facts("model", facts)
    }

    fn trained(inputs: &Inputs) -> Vec<(&'static str, &Shape, &Trainable)> {
        vec![("model", &inputs.base.shape, &inputs.trainable)]
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
            shape_and_trainable(&model, Head::Score, tokenizer, length, &self.freeze, self.lora.as_ref())?;
        let rows = RowShape::completions(target.completions, length, self.data.packing);
        let plans = trainable.plans(&shape)?;
        let training = TrainingMemory::new(Self::SUBCOMMAND, &self.common(), shape, &plans, rows, target)?;
        let tokens = self.reward.normalize.samples as i64 * length;
        Ok(training.with_scores_of(tokens.min(scorer::BATCH_TOKENS as i64)).into())
    }

    fn train(loaded: &Loaded<Self>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
        reward(loaded, &inputs, world, start)
    }
}

/// transformers' sequence classification finds a text's last token by what pads it. `given`: the configuration's pad token.
fn check_pad_token(base: &Base, given: Option<&str>) -> Result<()> {
    let (tokenizer, place) = (&base.tokenizer, base.tokenizer.place());
    let what = match (tokenizer.pad_id(), given) {
        (None, _) => format!("tokenizer.pad_token is missing: the tokenizer {place} has no pad token."),
        (Some(pad), _) if !tokenizer.eos_ids().contains(&pad) => return Ok(()),
        (Some(_), None) => {
            format!(
                "tokenizer.pad_token is missing: the tokenizer {place} pads with a token that ends texts."
            )
        }
        (Some(_), Some(token)) => {
            format!("tokenizer.pad_token must not be `{token}`: the tokenizer {place} ends texts with it.")
        }
    };
    Err(Error::config(format!(
        "{what} transformers finds the token that a reward model's score is read at by the padding after it. Set \
         tokenizer.pad_token to a token that the tokenizer has and no text uses, such as \"<unk>\". Or set it to a new one, \
         such as \"<pad>\" (one in brackets in quotes: '\"[PAD]\"'), for which the embedding gets a row. With lora a new one \
         also needs lora.modules_to_save: [embed_tokens].",
    )))
}

impl NormalizationData {
    /// The first completions of `c.reward.normalize`'s files, or of the run's own data.
    fn open(c: &Reward, chat: &Chat, data: &RowLoader) -> Result<NormalizationData> {
        let normalize = &c.reward.normalize;
        let most = normalize.samples as usize;
        let mut sequences = Vec::new();
        let mut take = |example: Example| {
            let wanted = |rank: u32| normalize.of == Which::All || rank == 0;
            let all = example.sequences.into_iter().zip(example.ranks).filter(|(_, rank)| wanted(*rank));
            sequences.extend(all.map(|(s, _)| s).take(most - sequences.len()));
            sequences.len() < most
        };
        let which = match normalize.of {
            Which::All => "all completions",
            Which::Best => "the best completions",
        };
        if normalize.data.is_empty() {
            let sources = if c.data.valid.is_empty() { &c.data.train } else { &c.data.valid };
            if most > 0 {
                let _ = (0..data.num_rows()).all(|i| take(data.example(i)));
            }
            let files: Vec<&Path> = sources.iter().map(|s| s.path.as_path()).collect();
            let odd = OddRecords::default();
            return Ok(NormalizationData { sequences, on: format!("{which} of {}", names(&files)), odd });
        }
        let mut odd = OddRecords::default();
        'files: for path in normalize.data.iter().filter(|_| most > 0) {
            for record in readers::records_or_errors(path, None, &Default::default())? {
                odd.records += 1;
                let example = record?
                    .or_odd(Reason::Unreadable)
                    .and_then(|record| reference_example(&record, chat, c.data.sequence_length as usize));
                match example {
                    Ok(example) => {
                        if !take(example) {
                            break 'files;
                        }
                    }
                    Err(one) => odd.add(one)?,
                }
            }
        }
        odd.check(c.data.on_error).map_err(|e| e.context("reward.normalize.data"))?;
        let files: Vec<&Path> = normalize.data.iter().map(|p| p.as_path()).collect();
        if most > 0 && sequences.len() < 2 {
            return Err(Error::data(format!(
                "reward.normalize.data: {} gives {} completions of at most {} tokens; at least 2 are needed",
                names(&files),
                sequences.len(),
                c.data.sequence_length
            )));
        }
        Ok(NormalizationData { sequences, on: format!("{which} of {}", names(&files)), odd })
    }
}

fn names(files: &[&Path]) -> String {
    files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// A record's completions: ranked ones, or the answer of a conversation. What is too long is left out.
fn reference_example(record: &readers::Record, chat: &Chat, longest: usize) -> Result<Example, Odd> {
    let has = |key: &&str| record.fields.get(*key).is_some_and(|v| !v.is_null());
    let ranked = ["completions", "rejected", "response_k"].iter().any(has);
    let example = match ranked {
        true => preferences::read_and_encode(record, chat)?,
        false => Example::from(
            supervised::example(record, chat, false)?.sequences.remove(0).cut_after_the_last_turn(),
        ),
    };
    let fits = |s: &Encoded| s.ids.len() <= longest && s.supervised.iter().skip(1).any(|s| *s);
    let (sequences, ranks) =
        example.sequences.into_iter().zip(example.ranks).filter(|(s, _)| fits(s)).unzip();
    Ok(Example { sequences, ranks, leftovers: example.leftovers })
}

fn reward(loaded: &Loaded<Reward>, inputs: &Inputs, world: &World, start: &Start) -> Result<()> {
    let c = &loaded.config;
    let common = c.common();
    let mut paths = common::paths(&c.model, c.tokenizer.as_ref(), c.data.train.iter().chain(&c.data.valid));
    paths.extend(c.reward.normalize.data.iter().map(|p| p.as_path()));
    let tokenizer = &inputs.base.tokenizer;
    let mut folder = RunFolder::open(loaded, start, &paths, tokenizer, world)?;
    let origin = inputs.base.path(&c.model);
    let mut learner = Learner::new(&inputs.base, origin, &inputs.trainable, &common, world)?;
    learner.scoring = Some(Scoring::raw(inputs.score));
    folder.record(learner.record("model"))?;
    let progress = folder.restore_or_begin(&mut learner, &inputs.train)?;
    announce(c, inputs, &learner.model);
    records::announce(&inputs.train, inputs.valid.as_ref(), &inputs.chat, world);
    records::announce_skipped("reward.normalize.data", &inputs.reference.odd, world);

    let schedule = Schedule::new(&common, inputs.length.steps);
    let mut session = Session::start(folder, progress, learner, &common, &inputs.length)?;
    session.catch_up(|s| validation(c, inputs, s))?;
    while !session.run.done() {
        let (next, step) = (session.run.progress.data.next, session.run.progress.step);
        let (lr, batch) = (schedule.rate(step), inputs.length.rows_at(next));
        let ranked = this_ranks_batches(c, inputs, next..next + batch, step, &session.models.model, world);
        let tally = RefCell::new(RankingTally::default());
        let entry = |ranked| RankedScores::entry(ranked, &c.reward, batch, &tally);
        let mut entries: Vec<StepEntry> = ranked.iter().map(entry).collect();
        let update = session.models.update(&mut entries, lr, world)?;
        drop(entries);
        let tally = tally.into_inner().over_ranks(world)?;

        session.run.progress.data.next += batch;
        let tokens = inputs.train.count(next, batch).1;
        if let Some(record) = session.run.stepped(tokens, &update, lr)?.record {
            let record = tally.add_to(record).count("ties", tally.pairs.ties as u64);
            let record = records::counted(record, &inputs.train, c.data.on_error);
            session.run.log(&record.count("duplicates", inputs.train.counts().duplicates));
        }
        session.end_step(|s| validation(c, inputs, s))?;
    }
    session.take_best()?;
    session.models.scoring = Some(normalized(inputs, &mut session.models.model, world)?);
    session.finish(tokenizer)
}

/// This rank's part of the step of some prompts.
fn this_ranks_batches(
    c: &Reward,
    inputs: &Inputs,
    of: Range<u64>,
    step: u64,
    model: &Llama,
    world: &World,
) -> Vec<RankedScores> {
    let dropout = c.lora.as_ref().is_some_and(|l| l.dropout > 0.0);
    let ranked = |(offset, prompts): (u64, u64)| {
        // Beyond the end of a smaller step: a prompt that does not count.
        let (first, count) = if prompts == 0 { (of.start, 1) } else { (of.start + offset, prompts) };
        let mut ranked = ranked(c, inputs.score, &inputs.train, first, count, model);
        ranked.counts = prompts > 0;
        if dropout {
            // Rows are completions, of which prompts have different numbers.
            let before =
                (of.start..of.start + offset).map(|i| inputs.train.example(i).ranks.len() as u64).sum();
            ranked.batch.input.dropout = Some(DropoutPlace { seed: c.seed, step, first_row: before });
        }
        ranked
    };
    step::division(&c.train, of.end - of.start, world).map(ranked).collect()
}

/// Prompts `first..first + count` with their completions.
fn ranked(c: &Reward, score: Score, data: &RowLoader, first: u64, count: u64, model: &Llama) -> RankedScores {
    let examples: Vec<Example> = (first..first + count).map(|i| data.example(i)).collect();
    RankedScores::new(&SequenceBatch::new(&examples, c.data.packing), score, model)
}

/// Validates, where that is due; whether the checkpoint is the best so far, to be saved.
fn validation(c: &Reward, inputs: &Inputs, session: &mut Session) -> Result<bool> {
    let Some(valid) = inputs.valid.as_ref().filter(|_| session.run.due(c.valid.every)) else {
        return Ok(false);
    };
    let (run, model) = (&mut session.run, &mut session.models.model);
    let validated = validate(c, inputs.score, model, valid, session.world, &mut || run.interrupted())?;
    let Some((prompts, tally)) = validated else { return run.owe_validation() };
    let loss = tally.loss / prompts;
    let record = tally.add_to(run.with_loss(MetricsLine::new("valid", run.progress.step), loss));
    let (mean, std) = tally.mean_and_std();
    let [low, high] = wilson(tally.pairs.right as u64, tally.pairs.num_pairs as u64).unwrap_or([0.0, 1.0]);
    run.log(
        &record
            .float("accuracy_low", low)
            .float("accuracy_high", high)
            .float("reward_mean", mean)
            .float("reward_std", std),
    );
    run.restart_window();
    Ok(run.note_validation(Metric::Loss, loss, &c.valid))
}

/// How many prompts of the validation data were taken (at most `valid.batches` batches), and what was counted of them; none
/// where it was stopped.
fn validate(
    c: &Reward,
    score: Score,
    model: &mut Llama,
    data: &RowLoader,
    world: &World,
    stop: StopCheck,
) -> Result<Option<(f64, RankingTally)>> {
    let total = data.num_rows().min((c.valid.batches * c.train.batch_size) as u64);
    let mut tally = RankingTally::default();
    for (first, count) in step::rounds(total, &c.train, world) {
        if stop()? {
            return Ok(None);
        }
        // All ranks take equally many forwards: beyond the end, of a prompt that does not count.
        let ranked = ranked(c, score, data, if count == 0 { 0 } else { first }, count.max(1), model);
        let hidden = model.hidden(&ranked.batch.input)?;
        let values = ScoreHead::values(model, &hidden)?;
        if count > 0 {
            let scores = ranked.scores(&values);
            tally.add(&scores, &ranked);
            tally.loss += ranked.loss(&scores, &c.reward).double_value(&[]);
        }
    }
    Ok(Some((total as f64, tally.over_ranks(world)?)))
}

/// The normalisation of the trained model's scores, equal on all ranks. Collective.
fn normalized(inputs: &Inputs, model: &mut Llama, world: &World) -> Result<Scoring> {
    let (score, sequences) = (inputs.score, &inputs.reference.sequences);
    if sequences.is_empty() {
        return Ok(Scoring::raw(score));
    }
    let scores = scorer::scores_of_all(model, world, score, sequences)?;
    let n = scores.len() as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let std = (scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
    // NaN where there is only one.
    if std.is_nan() || std == 0.0 {
        warn!("all {n} reference scores are {mean}: the reward is left as the score");
        return Ok(Scoring::raw(score));
    }
    let measured = Measured { on: inputs.reference.on.clone(), samples: scores.len() as u64, mean, std };
    let scoring = Scoring::normalized(score, measured);
    info!(
        "scores of {}: mean {mean:.4}, standard deviation {std:.4} over {n} samples; reward = {:.4} * score {:+.4}",
        inputs.reference.on, scoring.gain, scoring.bias
    );
    if score != Score::Last {
        info!(
            "the score is the {} over the completion's tokens, as corral.json says beside the model; transformers' class \
             reads the last token's value",
            if score == Score::Sum { "sum" } else { "mean" }
        );
    }
    Ok(scoring)
}

fn announce(c: &Reward, inputs: &Inputs, model: &Llama) {
    let params = &model.params;
    let trained = params.num_trained();
    info!(
        "model: {:.2}M parameters, of which {:.2}M are trained",
        model.shape.num_parameters() as f64 / 1e6,
        trained as f64 / 1e6
    );
    info!("data: {}", c.data_line(inputs));
}
