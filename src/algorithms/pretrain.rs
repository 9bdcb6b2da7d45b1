//! Pretraining: next-token prediction on token shards, parameters sharded over the ranks.

use std::path::{Path, PathBuf};

use tch::Kind;

use crate::algorithms::base::{self, Base};
use crate::algorithms::step::{self, MicroBatch};
use crate::algorithms::training::{Plan, Progress, RunFolder, Start};
use crate::checkpoint::{Export, export};
use crate::config::Loaded;
use crate::config::pretrain::{Model, Pretrain};
use crate::config::sections::{self, Compute, Mode};
use crate::data::loader::{Loader, Order, Source, State};
use crate::distributed::sharded::{Sharded, shard_groups};
use crate::distributed::world::World;
use crate::error::Result;
use crate::info;
use crate::model::{Llama, init, layout};
use crate::optim::{AdamW, Hyper, Schedule};
use crate::telemetry::Record;

/// Bytes of tensors in one file of an exported model.
pub const MAX_SHARD_SIZE: u64 = 5_000_000_000;

/// What a run reads before any rank talks to another: files are checked, and errors told, before a group could hang.
pub struct Inputs {
    pub base: Base,
    pub train: Loader,
    pub valid: Option<Loader>,
    pub steps: u64,
}

impl Inputs {
    /// Opens and checks all that the configuration names.
    pub fn open(c: &Pretrain) -> Result<Inputs> {
        let length = c.data.sequence_length;
        let base = Base::open(&c.model, c.tokenizer.as_ref(), length)?;
        let Base { tokenizer, shape, .. } = &base;
        let open = |sources: &[sections::Source], order| {
            let sources: Vec<Source> =
                sources.iter().map(|s| Source { path: s.path.clone(), weight: s.weight }).collect();
            Loader::new(
                &sources,
                Some(tokenizer.base_hash()),
                shape.vocab_size as usize,
                length as usize,
                order,
            )
        };
        let train = open(&c.data.train, Order::Shuffled { seed: c.seed })?;
        let valid =
            if c.data.valid.is_empty() { None } else { Some(open(&c.data.valid, Order::Sequential)?) };
        let steps = base::steps(&c.train, train.num_windows(), c.schedule.warmup_steps)?;
        Ok(Inputs { base, train, valid, steps })
    }
}

pub fn compute_kind(c: Compute) -> Kind {
    match c {
        Compute::Float32 => Kind::Float,
        Compute::Bfloat16 => Kind::BFloat16,
        Compute::Float64 => Kind::Double,
    }
}

/// Runs the training that `loaded` describes, in `world`, on inputs that were opened before the ranks met.
pub fn pretrain(loaded: &Loaded<Pretrain>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
    let c = &loaded.config;
    let folder = RunFolder::open(
        &c.output_dir,
        &loaded.resolved_yaml()?,
        start,
        &inputs_of(c),
        &inputs.base.shape,
        &inputs.base.tokenizer,
        c.checkpoint.keep,
        world,
    )?;

    // The model on this rank, its optimizer, and where the run stands.
    let (shard, replica) = shard_groups(c.parallel.mode, world);
    let compute = compute_kind(c.precision.compute);
    let params = Sharded::new(layout::layouts(&inputs.base.shape), shard, replica, compute, world.device);
    let mut model = Llama::new(inputs.base.shape.clone(), params);
    let hyper = Hyper { betas: c.optim.betas, eps: c.optim.eps, weight_decay: c.optim.weight_decay };
    let mut optimizer = AdamW::new(&model.params, hyper);
    let progress = match folder.restore::<State>(&mut model.params, &mut optimizer)? {
        Some(progress) => {
            inputs.train.resume(&progress.data)?;
            progress
        }
        None => {
            match &inputs.base.weights {
                Some(weights) => weights.fill(&mut model.params)?,
                None => init::init(&mut model.params, &inputs.base.shape, c.seed)?,
            }
            Progress::new(inputs.train.state(0))
        }
    };
    announce(c, &inputs, &model, world);

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
    let peak_flops = world.peak_flops(compute)?;
    // Windows of training data have a label at every position, so that no rank needs to ask the others.
    let count = c.train.batch_size * c.data.sequence_length;

    let aux_coef = inputs.base.shape.experts.as_ref().map(|e| e.router_aux_loss_coef);

    while !run.done() {
        let micro_batches = this_ranks_batches(c, &inputs.train, run.progress.data.next, world)?;
        let sums =
            step::accumulate_balanced(&mut model, &micro_batches, count as f64, c.train.recompute, aux_coef)?;
        let (lr, clip) = (schedule.rate(run.progress.step), c.optim.clip);
        let update = step::apply_gradients(&mut model, &mut optimizer, world, sums, count as f64, lr, clip)?;

        run.progress.data.next += c.train.batch_size as u64;
        let stepped = run.stepped(count as u64, &update, lr)?;
        if let Some(mut record) = stepped.record {
            if let Some(aux_loss) = update.aux_loss {
                record = record.float("aux_loss", aux_loss);
            }
            if let Some(peak) = peak_flops {
                let flops = inputs.base.shape.flops_per_token(c.data.sequence_length) * stepped.tokens_per_s;
                record = record.float("mfu", flops / (peak * world.world_size as f64));
            }
            run.log(&record);
        }
        if let Some(valid) = &inputs.valid
            && run.due(c.valid.every)
        {
            let loss = validate(c, &mut model, valid, world)?;
            let record = run.with_loss(Record::new("valid", run.progress.step), loss);
            run.log(&record.float("perplexity", loss.exp()));
            run.restart_window();
        }
        run.save(&model.params, &optimizer, false)?;
    }
    run.finish(|dir| {
        let tokenizer = Some(&inputs.base.tokenizer);
        let how = Export { dtype: compute, max_shard_size: MAX_SHARD_SIZE, tokenizer };
        export(dir, &inputs.base.shape, &model.params, &how, &world.group)
    })
}

/// The paths that the configuration reads from.
pub fn inputs_of(c: &Pretrain) -> Vec<&Path> {
    let model = match &c.model {
        Model::Path(path) => Some(path),
        Model::Preset(_) | Model::Init(_) => None,
    };
    let sources = c.data.train.iter().chain(&c.data.valid).map(|s| s.path.as_path());
    let tokenizer = c.tokenizer.iter().filter_map(|t| t.path.as_deref());
    sources.chain(tokenizer).chain(model.map(PathBuf::as_path)).collect()
}

/// The samples of the step that begins at global sample `first` are divided among the ranks in order, then into
/// micro-batches in order.
fn this_ranks_batches(c: &Pretrain, data: &Loader, first: u64, world: &World) -> Result<Vec<MicroBatch>> {
    let (rows, micro) = (c.train.batch_size / world.world_size, c.train.micro_batch_size(world.world_size));
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
    let micro = c.train.micro_batch_size(world.world_size) as u64;
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
        inputs.base.shape.num_parameters() as f64 / 1e6,
        inputs.base.shape.num_hidden_layers,
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
