//! Pretraining: next-token prediction on token shards, parameters sharded over the ranks.

use std::path::{Path, PathBuf};
use std::time::Instant;

use kernels::c10d::ReduceOp;
use serde::{Deserialize, Serialize};
use sha2::Digest;
use tch::Kind;

use crate::algorithms::run::{self, Resume, Signals};
use crate::algorithms::step::{self, MicroBatch, SkipGuard};
use crate::checkpoint::{Export, RunInfo, Saver, Weights, agree, export};
use crate::config::Loaded;
use crate::config::pretrain::{self as config, Compute, Mode, Pretrain};
use crate::config::shape::Shape;
use crate::data::loader::{Loader, Order, Source, State};
use crate::data::tokenizer::{Tokenizer, hex};
use crate::distributed::sharded::{Sharded, shard_groups};
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::info;
use crate::model::{Llama, init, layout};
use crate::optim::{AdamW, Hyper, Schedule};
use crate::telemetry::{Record, RunLog};

/// What a run reads before any rank talks to another: files are checked, and errors told, before a group could hang.
pub struct Inputs {
    pub tokenizer: Tokenizer,
    pub train: Loader,
    pub valid: Option<Loader>,
    pub shape: Shape,
    pub steps: u64,
    /// Weights to start from, where the model is not new.
    pub weights: Option<Weights>,
}

impl Inputs {
    /// Opens and checks all that the configuration names.
    pub fn open(c: &Pretrain) -> Result<Inputs> {
        let weights = match &c.model {
            config::Model::Path(path) => Some(Weights::open(path)?),
            config::Model::Preset(_) | config::Model::Init(_) => None,
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
        let vocab = tokenizer.vocab_size() as i64;
        let length = c.data.sequence_length;
        let shape = match (&c.model, &weights) {
            (_, Some(weights)) => weights.shape().clone(),
            (config::Model::Init(init), _) => init.shape(vocab, length),
            (config::Model::Preset(name), _) => Shape::preset(name)
                .ok_or_else(|| Error::config(format!("model.preset: '{name}' is not known")))?,
            (config::Model::Path(path), None) => {
                return Err(Error::failed(format!("{} was not opened", path.display())));
            }
        };
        shape.check()?;
        tokenizer.check_fits(shape.vocab_size)?;
        if length > shape.max_position_embeddings {
            return Err(Error::config(format!(
                "data.sequence_length: {length} is more than the model's max_position_embeddings, {}",
                shape.max_position_embeddings
            )));
        }
        let open = |sources: &[config::Source], order| {
            let sources: Vec<Source> =
                sources.iter().map(|s| Source { path: s.path.clone(), weight: s.weight }).collect();
            Loader::new(&sources, Some(tokenizer.hash()), shape.vocab_size as usize, length as usize, order)
        };
        let train = open(&c.data.train, Order::Shuffled { seed: c.seed })?;
        let valid =
            if c.data.valid.is_empty() { None } else { Some(open(&c.data.valid, Order::Sequential)?) };
        let steps = match (c.train.steps, c.train.epochs) {
            (Some(steps), _) => steps as u64,
            (None, epochs) => {
                let samples = train.num_windows() * epochs.unwrap_or(1) as u64;
                let steps = samples / c.train.batch_size as u64;
                if steps == 0 {
                    return Err(Error::config(format!(
                        "'train.epochs': the data gives {samples} samples, fewer than the {} of train.batch_size",
                        c.train.batch_size
                    )));
                }
                steps
            }
        };
        if c.schedule.warmup_steps > steps {
            return Err(Error::config(format!(
                "'schedule.warmup_steps': {} steps of warm-up are more than the {steps} steps of the run",
                c.schedule.warmup_steps
            )));
        }
        Ok(Inputs { tokenizer, train, valid, shape, steps, weights })
    }
}

/// What a checkpoint holds besides parameters and moments.
#[derive(Serialize, Deserialize)]
struct Progress {
    step: u64,
    data: State,
    tokens: u64,
    skipped_steps: u64,
    elapsed_s: f64,
}

pub fn compute_kind(c: Compute) -> Kind {
    match c {
        Compute::Float32 => Kind::Float,
        Compute::Bfloat16 => Kind::BFloat16,
        Compute::Float64 => Kind::Double,
    }
}

/// Runs the training that `loaded` describes, in `world`, on inputs that were opened before the ranks met.
pub fn pretrain(
    loaded: &Loaded<Pretrain>,
    inputs: Inputs,
    world: &World,
    resume: &Resume,
    overwrite: bool,
) -> Result<()> {
    let c = &loaded.config;
    let dir = &c.output_dir;
    let resolved = loaded.resolved_yaml()?;
    let sources = inputs_of(c);
    agree(&world.group, run::check_folder(dir, &resolved, resume, overwrite, &sources))?;
    run::prepare_folder(dir, &resolved, *resume == Resume::Never, world)?;
    let run_info = RunInfo {
        shape: inputs.shape.clone(),
        config_hash: hex(&sha2::Sha256::digest(resolved.as_bytes())),
        tokenizer: Some(inputs.tokenizer.clone()),
    };
    let mut saver = Saver::new(dir, c.checkpoint.keep as usize, run_info, &world.group)?;
    let from = agree(&world.group, run::find_checkpoint(dir, resume))?;
    let signals = Signals::watch()?;

    // The model on this rank, its optimizer, and where the run stands.
    let (shard, replica) = shard_groups(c.parallel.mode, world);
    let params = Sharded::new(
        layout::layouts(&inputs.shape),
        shard,
        replica,
        compute_kind(c.precision.compute),
        world.device,
    );
    let mut model = Llama::new(inputs.shape.clone(), params);
    let hyper = Hyper { betas: c.optim.betas, eps: c.optim.eps, weight_decay: c.optim.weight_decay };
    let mut optimizer = AdamW::new(&model.params, hyper);
    let mut progress =
        Progress { step: 0, data: inputs.train.state(0), tokens: 0, skipped_steps: 0, elapsed_s: 0.0 };
    if let Some(from) = &from {
        let state = from.load(&mut model.params, &mut optimizer)?.state;
        progress = serde_json::from_value(state)
            .map_err(|e| Error::data(format!("{}: its state cannot be read: {e}", from.dir().display())))?;
        inputs.train.resume(&progress.data)?;
        run::drop_later_checkpoints(dir, progress.step, world)?;
        info!("resumed from {}", from.dir().display());
    } else {
        match &inputs.weights {
            Some(weights) => weights.fill(&mut model.params)?,
            None => init::init(&mut model.params, &inputs.shape, c.seed)?,
        }
    }
    announce(c, &inputs, &model, world);

    let schedule = Schedule {
        kind: c.schedule.kind,
        lr: c.optim.lr,
        warmup_steps: c.schedule.warmup_steps,
        total_steps: inputs.steps,
        min_lr_ratio: c.schedule.min_lr_ratio,
    };
    let resumed_at = from.as_ref().map(|_| progress.step);
    let mut log = agree(&world.group, RunLog::create(dir, world.rank, resumed_at, inputs.steps))?;
    let peak_flops = world.peak_flops(compute_kind(c.precision.compute))?;
    let mut guard = SkipGuard::new(progress.skipped_steps);
    let (started, elapsed_before) = (Instant::now(), progress.elapsed_s);
    let (mut window, mut window_tokens) = (Instant::now(), 0u64);

    while progress.step < inputs.steps {
        let step = progress.step + 1;
        let micro_batches = this_ranks_batches(c, &inputs.train, progress.data.next, world)?;
        // Windows of training data have a label at every position, so that no rank needs to ask the others.
        let count = (c.train.batch_size * c.data.sequence_length) as f64;

        let loss_sum = step::accumulate_gradients(&mut model, &micro_batches, count, c.train.recompute)?;
        let lr = schedule.rate(progress.step);
        let update =
            step::apply_gradients(&mut model, &mut optimizer, world, loss_sum, count, lr, c.optim.clip)?;

        progress.step = step;
        progress.data.next += c.train.batch_size as u64;
        progress.tokens += (c.train.batch_size * c.data.sequence_length) as u64;
        window_tokens += (c.train.batch_size * c.data.sequence_length) as u64;
        progress.elapsed_s = elapsed_before + started.elapsed().as_secs_f64();
        let fatal = guard.note(step, &update);
        progress.skipped_steps = guard.skipped_steps;

        // Ranks decide together: a signal that reached one of them stops all.
        let most = world.group.combine(&[signals.received(), world.peak_bytes()? as f64], ReduceOp::Max)?;
        let (signal, peak) = (most[0], most[1]);
        if step.is_multiple_of(c.log.every as u64) || step == inputs.steps || update.skipped {
            let seconds = window.elapsed().as_secs_f64();
            let steps = window_tokens as f64 / (c.train.batch_size * c.data.sequence_length) as f64;
            let mut record = with_loss(c, Record::new("train", step), update.loss)
                .float("lr", lr)
                .float("grad_norm", update.grad_norm)
                .count("tokens", progress.tokens)
                .float("tokens_per_s", window_tokens as f64 / seconds)
                .float("step_s", seconds / steps)
                .float("elapsed_s", progress.elapsed_s)
                .count("peak_bytes", peak as u64)
                .count("skipped_steps", guard.skipped_steps);
            if let Some(peak) = peak_flops {
                let flops = inputs.shape.flops_per_token(c.data.sequence_length) * window_tokens as f64;
                record = record.float("mfu", flops / seconds / (peak * world.world_size as f64));
            }
            if saver.failed_saves() > 0 {
                record = record.count("failed_saves", saver.failed_saves());
            }
            log.log(&record);
            (window, window_tokens) = (Instant::now(), 0);
        }
        if let Err(e) = fatal {
            saver.finish()?; // what was last finite may be in it
            return Err(e);
        }

        if let Some(valid) = &inputs.valid
            && (step.is_multiple_of(c.valid.every as u64) || step == inputs.steps)
        {
            let loss = validate(c, &mut model, valid, world)?;
            log.log(&with_loss(c, Record::new("valid", step), loss).float("perplexity", loss.exp()));
            window = Instant::now();
            window_tokens = 0;
        }

        saver.poll()?;
        let last = step == inputs.steps || signal > 0.0;
        if step.is_multiple_of(c.checkpoint.every as u64) || last {
            saver.begin(step, &model.params, &optimizer, to_json(&progress)?)?;
        }
        if signal > 0.0 && step < inputs.steps {
            saver.finish()?;
            return Err(Signals::stopped(signal, step));
        }
    }
    // The model is written even where the last checkpoint could not be: it needs less room.
    let saved = saver.finish();
    let how = Export {
        dtype: compute_kind(c.precision.compute),
        max_shard_size: 5_000_000_000,
        tokenizer: Some(&inputs.tokenizer),
    };
    let exported = export(&dir.join("model"), &inputs.shape, &model.params, &how, &world.group);
    saved?;
    exported?;
    drop(log);
    info!("the trained model is in {}", dir.join("model").display());
    Ok(())
}

/// Adds the loss, in the precision that it was computed in.
fn with_loss(c: &Pretrain, record: Record, loss: f64) -> Record {
    match c.precision.compute {
        Compute::Float64 => record.float("loss", loss),
        Compute::Float32 | Compute::Bfloat16 => record.float32("loss", loss as f32),
    }
}

/// The paths that the configuration reads from.
pub fn inputs_of(c: &Pretrain) -> Vec<&Path> {
    let model = match &c.model {
        config::Model::Path(path) => Some(path),
        config::Model::Preset(_) | config::Model::Init(_) => None,
    };
    let sources = c.data.train.iter().chain(&c.data.valid).map(|s| s.path.as_path());
    let tokenizer = c.tokenizer.iter().map(|t| t.path.as_path());
    sources.chain(tokenizer).chain(model.map(PathBuf::as_path)).collect()
}

fn to_json(progress: &Progress) -> Result<serde_json::Value> {
    serde_json::to_value(progress).map_err(|e| Error::failed(e.to_string()))
}

/// The samples of the step that begins at global sample `first` are divided among the ranks in order, then into
/// micro-batches in order.
fn this_ranks_batches(c: &Pretrain, data: &Loader, first: u64, world: &World) -> Result<Vec<MicroBatch>> {
    let (rows, micro) = (c.train.batch_size / world.world_size, c.micro_batch_size(world.world_size));
    let first = first + (world.rank * rows) as u64;
    (0..rows / micro)
        .map(|i| {
            let batch = data.batch(first + (i * micro) as u64, micro as usize)?;
            Ok(MicroBatch::from_rows(&batch.input_ids, &batch.labels, batch.columns as i64))
        })
        .collect()
}

/// Mean loss over the first `valid.batches` batches of the validation data (or all of it), in nats a token.
fn validate(c: &Pretrain, model: &mut Llama, data: &Loader, world: &World) -> Result<f64> {
    let micro = c.micro_batch_size(world.world_size) as u64;
    let windows = data.num_windows().min((c.valid.batches * c.train.batch_size) as u64);
    let (ranks, rank) = (world.world_size as u64, world.rank as u64);
    let rounds = windows.div_ceil(micro * ranks);
    let batches = (0..rounds).map(|round| {
        // Every rank runs as many forwards, since they gather weights together: beyond the end, on rows without labels.
        let first = (round * ranks + rank) * micro;
        let rows = windows.saturating_sub(first).min(micro);
        let mut batch = data.batch(if rows == 0 { 0 } else { first }, rows.max(1) as usize)?;
        if rows == 0 {
            batch.labels.fill(-100);
        }
        Ok(MicroBatch::from_rows(&batch.input_ids, &batch.labels, batch.columns as i64))
    });
    Ok(step::evaluate(model, world, batches)?.0)
}

fn announce(c: &Pretrain, inputs: &Inputs, model: &Llama, world: &World) {
    let mode = match c.parallel.mode {
        _ if world.world_size == 1 => "one rank",
        Mode::Full => "parameters, gradients and optimizer sharded over all ranks",
        Mode::Replicate => "replicated on every rank",
    };
    info!(
        "model: {:.2}M parameters, {} blocks, {:?} compute; {} rank(s), {mode}",
        inputs.shape.num_parameters() as f64 / 1e6,
        inputs.shape.num_hidden_layers,
        model.params.compute(),
        world.world_size,
    );
    info!(
        "data: {} tokens to train on, {} steps of {} x {} tokens, {:.2} epochs",
        inputs.train.num_tokens(),
        inputs.steps,
        c.train.batch_size,
        c.data.sequence_length,
        inputs.steps as f64 * c.train.batch_size as f64 / inputs.train.num_windows() as f64,
    );
}
