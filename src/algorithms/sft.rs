//! Supervised fine-tuning: next-token prediction on the assistant's turns of conversations.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::algorithms::pretrain::{MAX_SHARD_SIZE, compute_kind};
use crate::algorithms::step::{self, MicroBatch};
use crate::algorithms::training::{Plan, Progress, Run, RunFolder, Start};
use crate::checkpoint::{Export, Weights, export};
use crate::config::pretrain::Model;
use crate::config::sft::Sft;
use crate::config::{Loaded, sections, shape::Shape};
use crate::data::conversation::Conversation;
use crate::data::examples::{self, Encoded, Options, Split, Tokenization};
use crate::data::loader::{Order, State};
use crate::data::readers::Record as DataRecord;
use crate::data::rows::{RowLoader, Rows, Source};
use crate::data::tokenizer::Tokenizer;
use crate::distributed::sharded::{Sharded, shard_groups};
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::info;
use crate::model::{Input, Llama, init, layout};
use crate::optim::{AdamW, Hyper, Schedule};
use crate::telemetry::Record;

/// What a run reads before any rank talks to another: files are checked and tokenized, and errors told, before a group
/// could hang.
pub struct Inputs {
    pub tokenizer: Tokenizer,
    /// The folder that the tokenizer comes from.
    pub tokenizer_dir: PathBuf,
    pub train: RowLoader,
    pub valid: Option<RowLoader>,
    pub shape: Shape,
    pub steps: u64,
    /// Weights to start from, where the model is not new.
    pub weights: Option<Weights>,
}

/// Where a run stands in its data, and its best validation.
#[derive(Debug, Serialize, Deserialize)]
struct Position {
    rows: State,
    /// Step and loss of the best validation.
    best: Option<(u64, f64)>,
    /// Validations since then.
    worse: u64,
}

impl Inputs {
    /// Opens, checks and tokenizes all that the configuration names.
    pub fn open(c: &Sft) -> Result<Inputs> {
        let weights = match &c.model {
            Model::Path(path) => Some(Weights::open(path)?),
            Model::Preset(_) | Model::Init(_) => None,
        };
        let tokenizer_dir = match (&c.tokenizer, &weights) {
            (Some(tokenizer), _) => tokenizer.path.clone(),
            (None, Some(weights)) => weights.tokenizer_dir().ok_or_else(|| {
                Error::data(format!(
                    "{} has no tokenizer.json; name a tokenizer's folder in tokenizer.path",
                    weights.dir().display()
                ))
            })?,
            (None, None) => return Err(Error::config("a new model needs tokenizer.path")),
        };
        let tokenizer = Tokenizer::load(&tokenizer_dir)?;
        let (vocab, length) = (tokenizer.vocab_size() as i64, c.data.sequence_length);
        let shape = match (&c.model, &weights) {
            (_, Some(weights)) => weights.shape().clone(),
            (Model::Init(init), _) => init.shape(vocab, length),
            (Model::Preset(name), _) => Shape::preset(name)
                .ok_or_else(|| Error::config(format!("model.preset: '{name}' is not known")))?,
            (Model::Path(path), None) => {
                return Err(Error::failed(format!("{} was not opened", path.display())));
            }
        };
        shape.check()?;
        if vocab > shape.vocab_size {
            return Err(Error::data(format!(
                "the tokenizer {} has {vocab} tokens, more than the model's vocab_size of {}",
                tokenizer_dir.display(),
                shape.vocab_size
            )));
        }
        if length > shape.max_position_embeddings {
            return Err(Error::config(format!(
                "data.sequence_length: {length} is more than the model's max_position_embeddings, {}",
                shape.max_position_embeddings
            )));
        }
        let train = rows(c, &tokenizer, &c.data.train, Order::Shuffled { seed: c.seed })?;
        let valid = match c.data.valid.is_empty() {
            true => None,
            false => Some(rows(c, &tokenizer, &c.data.valid, Order::Sequential)?),
        };
        let steps = match (c.train.steps, c.train.epochs) {
            (Some(steps), _) => steps as u64,
            (None, epochs) => {
                let rows = train.num_rows() * epochs.unwrap_or(1) as u64;
                match rows / c.train.batch_size as u64 {
                    0 => {
                        return Err(Error::config(format!(
                            "'train.epochs': the data gives {rows} rows, fewer than the {} of train.batch_size",
                            c.train.batch_size
                        )));
                    }
                    steps => steps,
                }
            }
        };
        Ok(Inputs { tokenizer, tokenizer_dir, train, valid, shape, steps, weights })
    }
}

/// Tokenizes the sources, or takes them from the cache.
fn rows(c: &Sft, tokenizer: &Tokenizer, sources: &[sections::Source], order: Order) -> Result<RowLoader> {
    let encode = |record: &DataRecord| encode(record, tokenizer, c.data.train_on_prompt);
    let training = matches!(order, Order::Shuffled { .. });
    let split =
        (training && !c.data.split.is_empty()).then(|| Split { parts: c.data.split.clone(), part: 0 });
    let options =
        Options { sequence_length: c.data.sequence_length as usize, too_long: c.data.too_long, split };
    let tokenization = Tokenization {
        encode: &encode,
        key: crate::data::tokenizer::hex(&tokenizer.hash()),
        eos: tokenizer.eos_ids(),
        options,
        cache: c.data.cache.clone().map_or_else(examples::default_cache, Ok)?,
    };
    let open = |s: &sections::Source| {
        Ok(Source { examples: tokenization.open(&s.path, &Default::default())?, weight: s.weight })
    };
    let sources = sources.iter().map(open).collect::<Result<_>>()?;
    RowLoader::new(sources, c.data.sequence_length as usize, c.data.packing, order)
}

fn encode(record: &DataRecord, tokenizer: &Tokenizer, train_on_prompt: bool) -> Result<Encoded> {
    let Conversation::Pair { prompt, completion } = Conversation::read(record)? else {
        return Err(Error::data(format!(
            "{}: messages are not read yet; give prompt and completion",
            record.place
        )));
    };
    let mut ids = tokenizer.encode(&format!("{prompt}\n"), true)?;
    let mut supervised = vec![train_on_prompt; ids.len()];
    ids.extend(tokenizer.encode(&completion, false)?);
    ids.extend(tokenizer.eos_ids().first());
    supervised.resize(ids.len(), true);
    Ok(Encoded { ids, supervised })
}

/// Runs the training that `loaded` describes, in `world`, on inputs that were opened before the ranks met.
pub fn sft(loaded: &Loaded<Sft>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
    let c = &loaded.config;
    let folder = RunFolder::open(
        &c.output_dir,
        &loaded.resolved_yaml()?,
        start,
        &inputs_of(c),
        &inputs.shape,
        &inputs.tokenizer_dir,
        c.checkpoint.keep,
        world,
    )?;
    let (shard, replica) = shard_groups(c.parallel.mode, world);
    let compute = compute_kind(c.precision.compute);
    let params = Sharded::new(layout::layouts(&inputs.shape), shard, replica, compute, world.device);
    let mut model = Llama::new(inputs.shape.clone(), params);
    let hyper = Hyper { betas: c.optim.betas, eps: c.optim.eps, weight_decay: c.optim.weight_decay };
    let mut optimizer = AdamW::new(&model.params, hyper);
    let progress = match folder.restore::<Position>(&mut model.params, &mut optimizer)? {
        Some(progress) => {
            inputs.train.resume(&progress.data.rows)?;
            progress
        }
        None => {
            match &inputs.weights {
                Some(weights) => weights.fill(&mut model.params)?,
                None => init::init(&mut model.params, &inputs.shape, c.seed)?,
            }
            Progress::new(Position { rows: inputs.train.state(0), best: None, worse: 0 })
        }
    };
    announce(c, &inputs);
    let schedule = Schedule {
        kind: c.schedule.kind,
        lr: c.optim.lr,
        warmup_steps: c.schedule.warmup_steps,
        total_steps: inputs.steps,
        min_lr_ratio: c.schedule.min_lr_ratio,
    };
    let plan = Plan {
        steps: inputs.steps,
        log_every: c.log.every,
        checkpoint_every: c.checkpoint.every,
        compute: c.precision.compute,
    };
    let mut run = folder.start(progress, plan)?;
    let counts = inputs.train.counts();
    if let Some((step, _)) = run.progress.data.best {
        run.keep_best(step);
    }

    while !run.done() {
        let (next, batch) = (run.progress.data.rows.next, c.train.batch_size as u64);
        // Every rank counts for all: rows are known everywhere.
        let (count, tokens) = inputs.train.count(next, batch);
        let micro_batches = this_ranks_batches(c, &inputs.train, next, world);
        let loss_sum =
            step::accumulate_gradients(&mut model, &micro_batches, count as f64, c.train.recompute)?;
        let (lr, clip) = (schedule.rate(run.progress.step), c.optim.clip);
        let update =
            step::apply_gradients(&mut model, &mut optimizer, world, loss_sum, count as f64, lr, clip)?;

        run.progress.data.rows.next += batch;
        if let Some(record) = run.stepped(tokens, &update, lr)?.record {
            run.log(&record.count("truncated", counts.truncated).count("dropped", counts.dropped()));
        }
        let mut best = false;
        if let Some(valid) = &inputs.valid
            && run.due(c.valid.every)
        {
            let loss = validate(c, &mut model, valid, world)?;
            let record = run.with_loss(Record::new("valid", run.progress.step), loss);
            run.log(&record.float("perplexity", loss.exp()));
            best = note_validation(c, &mut run, loss);
            run.restart_window();
        }
        run.save(&model.params, &optimizer, best)?;
    }
    run.finish(|dir| {
        let tokenizer_dir = Some(inputs.tokenizer_dir.as_path());
        let how = Export { dtype: compute, max_shard_size: MAX_SHARD_SIZE, tokenizer_dir };
        export(dir, &inputs.shape, &model.params, &how, &world.group)
    })
}

/// Whether this validation is the best so far and its checkpoint is to stay; ends the run where too many were none.
fn note_validation(c: &Sft, run: &mut Run<Position>, loss: f64) -> bool {
    let step = run.progress.step;
    let position = &mut run.progress.data;
    if position.best.is_none_or(|(_, best)| loss < best) {
        (position.best, position.worse) = (Some((step, loss)), 0);
        if c.valid.keep_best {
            run.keep_best(step);
        }
        return c.valid.keep_best;
    }
    position.worse += 1;
    if c.valid.patience > 0 && position.worse >= c.valid.patience {
        let best = position.best.map_or(0, |(step, _)| step);
        info!(
            "the validation loss was lowest at step {best}, {} validations ago: the run ends here",
            position.worse
        );
        run.stop_here();
    }
    false
}

/// The paths that the configuration reads from.
pub fn inputs_of(c: &Sft) -> Vec<&Path> {
    let model = match &c.model {
        Model::Path(path) => Some(path.as_path()),
        Model::Preset(_) | Model::Init(_) => None,
    };
    let sources = c.data.train.iter().chain(&c.data.valid).map(|s| s.path.as_path());
    sources.chain(c.tokenizer.iter().map(|t| t.path.as_path())).chain(model).collect()
}

/// The rows of the step that begins at row `first` are divided among the ranks in order, then into micro-batches in
/// order.
fn this_ranks_batches(c: &Sft, data: &RowLoader, first: u64, world: &World) -> Vec<MicroBatch> {
    let (rows, micro) = (c.train.batch_size / world.world_size, c.train.micro_batch_size(world.world_size));
    let first = first + (world.rank * rows) as u64;
    (0..rows / micro)
        .map(|i| micro_batch(data.rows(first + (i * micro) as u64, micro as u64), c.data.packing))
        .collect()
}

/// Rows of one document each need neither positions nor starts: they begin at 0, and padding comes after them.
fn micro_batch(rows: Rows, packed: bool) -> MicroBatch {
    let mut batch = MicroBatch::from_rows(&rows.input_ids, &rows.labels, rows.columns as i64);
    if packed {
        batch.input = Input {
            positions: Some(tch::Tensor::from_slice(&rows.positions)),
            start: Some(tch::Tensor::from_slice(&rows.starts)),
            ..batch.input
        };
    }
    batch
}

/// Mean loss over the supervised tokens of the first `valid.batches` batches of the validation data, in nats.
fn validate(c: &Sft, model: &mut Llama, data: &RowLoader, world: &World) -> Result<f64> {
    let micro = c.train.micro_batch_size(world.world_size) as u64;
    let total = data.num_rows().min((c.valid.batches * c.train.batch_size) as u64);
    let (ranks, rank) = (world.world_size as u64, world.rank as u64);
    let batches = (0..total.div_ceil(micro * ranks)).map(|round| {
        // Every rank runs as many forwards, since they gather weights together: beyond the end, on rows without labels.
        let first = (round * ranks + rank) * micro;
        let rows = total.saturating_sub(first).min(micro);
        let mut rows = match rows {
            0 => Rows { labels: Vec::new(), ..data.rows(0, 1) },
            n => data.rows(first, n),
        };
        rows.labels.resize(rows.input_ids.len(), crate::data::loader::IGNORE);
        Ok(micro_batch(rows, c.data.packing))
    });
    Ok(step::evaluate(model, world, batches)?.0)
}

fn announce(c: &Sft, inputs: &Inputs) {
    let counts = inputs.train.counts();
    info!("model: {:.2}M parameters", inputs.shape.num_parameters() as f64 / 1e6);
    info!(
        "data: {} examples, {} tokens, {} of them supervised; {} rows of {} tokens, {:.1} % padding; {} steps are {:.2} \
         epochs",
        counts.examples,
        counts.tokens,
        counts.supervised_tokens,
        inputs.train.num_rows(),
        c.data.sequence_length,
        100.0 * inputs.train.padding(),
        inputs.steps,
        inputs.steps as f64 * c.train.batch_size as f64 / inputs.train.num_rows() as f64,
    );
}
