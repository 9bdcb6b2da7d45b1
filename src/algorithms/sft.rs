//! Supervised fine-tuning: next-token prediction on the assistant's turns of conversations.

use std::ops::Range;

use crate::algorithms::base::{self, Base, LastStep, RunLength, planned_model, shape_and_trainable};
use crate::algorithms::folder::RunFolder;
use crate::algorithms::learner::Learner;
use crate::algorithms::recipe::{Recipe, Shown};
use crate::algorithms::records;
use crate::algorithms::run::Start;
use crate::algorithms::session;
use crate::algorithms::step::{self, MicroBatch, StopCheck};
use crate::algorithms::training::Run;
use crate::checkpoint::Metric;
use crate::config::sft::Sft;
use crate::config::shape::{Head, Shape};
use crate::config::{Algorithm, Loaded, common, sections};
use crate::data::chat::Chat;
use crate::data::conversation::conversation;
use crate::data::examples::{self, ExampleCounts, Split, Tokenization};
use crate::data::loader::WindowOrder;
use crate::data::position::{Indexed, Position};
use crate::data::readers::{self, Record as DataRecord};
use crate::data::rows::{self, RowLoader, RowSource, Rows};
use crate::data::supervised;
use crate::distributed::agreement::Facts;
use crate::distributed::sharded::Sharded;
use crate::distributed::world::World;
use crate::error::Result;
use crate::generate::{self as generation, Sampling};
use crate::generate::{EngineOptions, Request, generate};
use crate::info;
use crate::model::{DropoutPlace, Llama, ModelInput, Trainable};
use crate::optim::Schedule;
use crate::plan::training::{RowShape, TrainingMemory};
use crate::plan::{MemoryPlan, PlanTarget};
use crate::telemetry::MetricsLine;

/// What a run reads before any rank talks to another.
pub struct Inputs {
    base: Base,
    trainable: Trainable,
    chat: Chat,
    train: RowLoader,
    valid: Option<RowLoader>,
    /// What samples answer: the first prompts of the validation data.
    prompts: Vec<SamplePrompt>,
    length: RunLength,
}

type Session<'a> = session::Session<'a, Learner<'a>, Position>;

struct SamplePrompt {
    text: String,
    request: Request,
    /// The answer of the data.
    reference: String,
}

impl Recipe for Sft {
    const ABOUT: &'static str = "Train a model on the answers of conversations";
    type Inputs = Inputs;

    fn open(&self) -> Result<Inputs> {
        let base = Base::open(&self.model, self.tokenizer.as_ref(), self.data.sequence_length)?;
        let base = base.dated(self.data.template_date);
        let trainable = base.trainable(&self.freeze, self.lora.as_ref())?;
        let chat = Chat::new(&base.tokenizer)?;
        let train = sources(self, &chat, &self.data.train, true)?;
        let valid = sources(self, &chat, &self.data.valid, false)?;
        rows::check_records(self.data.on_error, train.iter().chain(&valid))?;
        let loader = |sources: Vec<RowSource>, order| {
            RowLoader::new(sources, self.data.sequence_length as usize, self.data.packing, order)
        };
        let train = loader(train, WindowOrder::Shuffled { seed: self.seed })?;
        let valid = (!valid.is_empty()).then(|| loader(valid, WindowOrder::Sequential)).transpose()?;
        let length = RunLength::new(&self.train, train.num_rows(), &self.schedule, LastStep::Kept)?;
        let prompts =
            if self.samples.every > 0 { sample_prompts(self, &chat, &base.shape)? } else { Vec::new() };
        Ok(Inputs { base, trainable, chat, train, valid, prompts, length })
    }

    fn add_facts(inputs: &Inputs, facts: &mut Facts) -> Result<()> {
        let valid = inputs.valid.as_ref().map(|valid| valid.fingerprint());
        base::add_data(inputs.train.fingerprint(), valid, facts);
        inputs.base.add_facts("model", facts)
    }

    fn trained(inputs: &Inputs) -> Vec<(&'static str, &Shape, &Trainable)> {
        vec![("model", &inputs.base.shape, &inputs.trainable)]
    }

    fn steps(inputs: &Inputs) -> u64 {
        inputs.length.steps
    }

    fn data_line(&self, inputs: &Inputs) -> String {
        let (counts, rows) = (inputs.train.counts(), inputs.train.num_rows());
        format!(
            "{} examples, {} tokens, {} of them supervised; {} were truncated, {}; {rows} rows of {} tokens, {:.1} % padding; {} \
             steps are {:.2} epochs",
            counts.examples,
            counts.tokens,
            counts.supervised_tokens,
            counts.truncated,
            counts.dropped_and_why(),
            self.data.sequence_length,
            100.0 * inputs.train.padding(),
            inputs.length.steps,
            inputs.length.epochs(inputs.length.steps),
        )
    }

    fn shown<'a>(&self, inputs: &'a Inputs) -> Shown<'a> {
        let (train, valid, chat) = (&inputs.train, inputs.valid.as_ref(), &inputs.chat);
        Shown::Examples { train, valid, chat, longest: self.data.sequence_length }
    }

    fn plan(&self, target: &PlanTarget) -> Result<MemoryPlan> {
        let (tokenizer, length) = (self.tokenizer.as_ref(), self.data.sequence_length);
        let (shape, trainable) = shape_and_trainable(
            &planned_model(&self.model),
            Head::Lm,
            tokenizer,
            length,
            &self.freeze,
            self.lora.as_ref(),
        )?;
        let (plans, rows) = (trainable.plans(&shape)?, RowShape::of(length, self.data.packing));
        Ok(TrainingMemory::new(Self::SUBCOMMAND, &self.common(), shape, &plans, rows, target)?.into())
    }

    fn train(loaded: &Loaded<Self>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
        sft(loaded, &inputs, world, start)
    }
}

/// Tokenizes the sources, or takes them from the cache.
fn sources(c: &Sft, chat: &Chat, sources: &[sections::DataSource], training: bool) -> Result<Vec<RowSource>> {
    let split =
        (training && !c.data.split.is_empty()).then(|| Split { parts: c.data.split.clone(), part: 0 });
    let options = examples::ExampleOptions {
        sequence_length: c.data.sequence_length as usize,
        too_long: c.data.too_long,
        split,
    };
    let encode = |record: &DataRecord| supervised::example(record, chat, c.data.train_on_prompt);
    let fit = |example, counts: &mut ExampleCounts| examples::fit(example, &options, counts);
    let eos: Vec<u32> = chat.stop_ids();
    let tokenization = Tokenization {
        encode: &encode,
        fit: &fit,
        key: format!("{} {}", chat.tokenizer().text_fingerprint(), c.data.train_on_prompt),
        eos: &eos,
        options: options.clone(),
        cache: c.data.cache.clone().map_or_else(examples::default_cache, Ok)?,
    };
    let open =
        |s: &sections::DataSource| Ok(RowSource { examples: tokenization.open(&s.path)?, weight: s.weight });
    sources.iter().map(open).collect()
}

/// The first prompts of the validation data, up to the assistant's last turn.
fn sample_prompts(c: &Sft, chat: &Chat, shape: &Shape) -> Result<Vec<SamplePrompt>> {
    let mut prompts = Vec::new();
    for source in &c.data.valid {
        for record in readers::records_or_errors(&source.path, None, &Default::default())? {
            if prompts.len() == c.samples.count as usize {
                return Ok(prompts);
            }
            // What cannot be used is counted with the validation data.
            let Ok(record) = record? else { continue };
            let Ok(mut messages) = conversation(&record) else { continue };
            let Some(answer) = messages.pop_if(|m| m.role == "assistant") else { continue };
            let Ok(ids) = chat.prompt(&messages) else { continue };
            let ids = ids.into_iter().map(i64::from).collect();
            let number = prompts.len() as u64;
            let request = Request::new(ids, number, c.generation.max_new_tokens as usize);
            if let Err(e) = request.check(shape) {
                info!("samples: {} is not taken: {e}", record.place);
                continue;
            }
            let text = chat.render(&messages, true)?;
            prompts.push(SamplePrompt { text, request, reference: answer.text().into_owned() });
        }
    }
    Ok(prompts)
}

fn sft(loaded: &Loaded<Sft>, inputs: &Inputs, world: &World, start: &Start) -> Result<()> {
    let c = &loaded.config;
    let common = c.common();
    let paths = common::paths(&c.model, c.tokenizer.as_ref(), c.data.train.iter().chain(&c.data.valid));
    let tokenizer = &inputs.base.tokenizer;
    let mut folder = RunFolder::open(loaded, start, &paths, tokenizer, world)?;
    let origin = inputs.base.path(&c.model);
    let mut learner = Learner::new(&inputs.base, origin, &inputs.trainable, &common, world)?;
    folder.record(learner.record("model"))?;
    let progress = folder.restore_or_begin(&mut learner, &inputs.train)?;
    announce(c, inputs, &learner.model.params);
    records::announce(&inputs.train, inputs.valid.as_ref(), &inputs.chat, world);

    let schedule = Schedule::new(&common, inputs.length.steps);
    let mut session = Session::start(folder, progress, learner, &common, &inputs.length)?;
    session.catch_up(|s| validation(c, inputs, s))?;
    while !session.run.done() {
        let (next, step) = (session.run.progress.data.next, session.run.progress.step);
        let (lr, rows) = (schedule.rate(step), inputs.length.rows_at(next));
        // Every rank counts for all: rows are known everywhere.
        let (count, tokens) = inputs.train.count(next, rows);
        let micro_batches = this_ranks_batches(c, &inputs.train, next..next + rows, step, world);
        let model = &mut session.models.model;
        let sums = step::accumulate_gradients(model, &micro_batches, count as f64, c.train.recompute)?;
        let update = session.models.apply(sums, lr, world)?;

        session.run.progress.data.next += rows;
        if let Some(record) = session.run.stepped(tokens, &update, lr)?.record {
            session.run.log(&records::counted(record, &inputs.train, c.data.on_error));
        }
        session.end_step(|s| validation(c, inputs, s))?;
    }
    session.take_best()?;
    session.finish(tokenizer)
}

/// Validates and samples, where each is due; whether the checkpoint is the best so far, to be saved.
fn validation(c: &Sft, inputs: &Inputs, session: &mut Session) -> Result<bool> {
    let (run, model) = (&mut session.run, &mut session.models.model);
    let mut best = false;
    if let Some(valid) = &inputs.valid
        && run.due(c.valid.every)
    {
        let Some(loss) = validate(c, model, valid, session.world, &mut || run.interrupted())? else {
            return run.owe_validation();
        };
        let record = run.with_loss(MetricsLine::new("valid", run.progress.step), loss);
        run.log(&record.float("perplexity", loss.exp()));
        best = run.note_validation(Metric::Loss, loss, &c.valid);
        run.restart_window();
    }
    if c.samples.every > 0 && run.due(c.samples.every) {
        sample(c, inputs, model, run)?;
        run.restart_window();
    }
    Ok(best)
}

/// Answers the sample prompts, into samples.jsonl and TensorBoard. All ranks generate the same.
fn sample(c: &Sft, inputs: &Inputs, model: &mut Llama, run: &mut Run<Position>) -> Result<()> {
    let step = run.progress.step;
    let sampling = Sampling {
        temperature: c.generation.temperature,
        top_k: c.generation.top_k,
        top_p: c.generation.top_p,
        seed: c.seed,
    };
    let eos: Vec<i64> = inputs.chat.stop_ids().into_iter().map(i64::from).collect();
    let options = EngineOptions { sampling, batch_size: inputs.prompts.len(), eos: &eos, stop: None };
    let requests: Vec<Request> = inputs.prompts.iter().map(|p| p.request.clone()).collect();
    let completions = generate(model, &requests, options, |_, _| Ok(()))?;
    for (i, (prompt, completion)) in inputs.prompts.iter().zip(&completions).enumerate() {
        let ids = &prompt.request.prompt;
        let response = generation::text(inputs.chat.tokenizer(), ids, &completion.ids, &[])?;
        let record = MetricsLine::new("sample", step)
            .text("prompt", &prompt.text)
            .text("response", &response)
            .text("reference", &prompt.reference)
            .count("num_tokens", completion.ids.len() as u64);
        run.log_sample(&record, &format!("samples/{i}"), &format!("{}{response}", prompt.text));
    }
    Ok(())
}

/// This rank's part of the step of some rows.
fn this_ranks_batches(
    c: &Sft,
    data: &RowLoader,
    of: Range<u64>,
    step: u64,
    world: &World,
) -> Vec<MicroBatch> {
    let dropout = c.lora.as_ref().is_some_and(|l| l.dropout > 0.0);
    let micro_batch = |(first_row, rows): (u64, u64)| {
        let mut batch = micro_batch(rows_or_none(data, of.start + first_row, rows), c.data.packing);
        batch.input.dropout = dropout.then_some(DropoutPlace { seed: c.seed, step, first_row });
        batch
    };
    step::division(&c.train, of.end - of.start, world).map(micro_batch).collect()
}

/// `count` rows of a loader; where there are none, one whose loss counts nothing.
fn rows_or_none(data: &RowLoader, first: u64, count: u64) -> Rows {
    let mut rows = match count {
        0 => Rows { labels: Vec::new(), ..data.rows(0, 1) },
        n => data.rows(first, n),
    };
    rows.labels.resize(rows.input_ids.len(), crate::data::loader::IGNORE);
    rows
}

/// Rows of one document each need neither positions nor starts: they begin at 0, and padding comes after them.
fn micro_batch(rows: Rows, packed: bool) -> MicroBatch {
    let mut batch = MicroBatch::from_rows(&rows.input_ids, &rows.labels, rows.columns as i64);
    if packed {
        batch.input = ModelInput {
            positions: Some(tch::Tensor::from_slice(&rows.positions)),
            start: Some(tch::Tensor::from_slice(&rows.starts)),
            ..batch.input
        };
    }
    batch
}

/// Mean loss over the supervised tokens of the first `valid.batches` batches of the validation data, in nats; none where it was
/// stopped.
fn validate(
    c: &Sft,
    model: &mut Llama,
    data: &RowLoader,
    world: &World,
    stop: StopCheck,
) -> Result<Option<f64>> {
    let total = data.num_rows().min((c.valid.batches * c.train.batch_size) as u64);
    let batches = step::rounds(total, &c.train, world)
        .map(|(first, rows)| Ok(micro_batch(rows_or_none(data, first, rows), c.data.packing)));
    step::evaluate(model, world, batches, stop)
}

fn announce(c: &Sft, inputs: &Inputs, params: &Sharded) {
    let total = inputs.base.shape.num_parameters();
    let trained = params.num_trained();
    match params.num_frozen() {
        0 => info!("model: {:.2}M parameters", total as f64 / 1e6),
        frozen => info!(
            "model: {:.2}M parameters, of which {:.2}M stay in {:.1} MB a rank; {:.3}M are trained",
            total as f64 / 1e6,
            frozen as f64 / 1e6,
            params.frozen_bytes() as f64 / 1e6,
            trained as f64 / 1e6
        ),
    }
    info!("data: {}", c.data_line(inputs));
}
