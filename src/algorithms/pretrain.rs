//! Pretraining: next-token prediction on token shards, parameters sharded over the ranks.

use std::ops::Range;

use crate::algorithms::base::{self, Base, LastStep, RunLength, shape_and_trainable};
use crate::algorithms::folder::RunFolder;
use crate::algorithms::learner::Learner;
use crate::algorithms::recipe::{Recipe, Shown};
use crate::algorithms::run::Start;
use crate::algorithms::session;
use crate::algorithms::step::{self, MicroBatch, StopCheck};
use crate::checkpoint::Metric;
use crate::config::parallel::Mode;
use crate::config::pretrain::Pretrain;
use crate::config::sections;
use crate::config::shape::{Head, Shape};
use crate::config::trainable::Freeze;
use crate::config::{Algorithm, Loaded, common};
use crate::data::loader::{Loader, WeightedSource, WindowOrder};
use crate::data::position::{Indexed, Position};
use crate::distributed::agreement::Facts;
use crate::distributed::world::World;
use crate::error::Result;
use crate::info;
use crate::model::{Llama, Trainable, compute_kind};
use crate::optim::Schedule;
use crate::plan::training::{RowShape, TrainingMemory};
use crate::plan::{MemoryPlan, PlanTarget};
use crate::telemetry::MetricsLine;

/// What a run reads before any rank talks to another.
pub struct Inputs {
    base: Base,
    trainable: Trainable,
    train: Loader,
    valid: Option<Loader>,
    length: RunLength,
}

type Session<'a> = session::Session<'a, Learner<'a>, Position>;

impl Recipe for Pretrain {
    const ABOUT: &'static str = "Train a model to predict the next token";
    type Inputs = Inputs;

    fn open(&self) -> Result<Inputs> {
        let length = self.data.sequence_length;
        let base = Base::open(&self.model, self.tokenizer.as_ref(), length)?;
        let Base { tokenizer, shape, .. } = &base;
        let open = |sources: &[sections::DataSource], order| {
            let sources: Vec<WeightedSource> =
                sources.iter().map(|s| WeightedSource { path: s.path.clone(), weight: s.weight }).collect();
            Loader::new(
                &sources,
                Some(tokenizer.base_hash()),
                shape.vocab_size as usize,
                length as usize,
                order,
            )
        };
        let train = open(&self.data.train, WindowOrder::Shuffled { seed: self.seed })?;
        let valid = match self.data.valid.is_empty() {
            true => None,
            false => Some(open(&self.data.valid, WindowOrder::Sequential)?),
        };
        let length = RunLength::new(&self.train, train.num_windows(), &self.schedule, LastStep::Kept)?;
        Ok(Inputs { base, trainable: Trainable::default(), train, valid, length })
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
        let windows = inputs.train.num_windows();
        format!(
            "{} tokens, {windows} samples of {} an epoch; {} steps of {} are {:.2} epochs",
            inputs.train.num_tokens(),
            self.data.sequence_length,
            inputs.length.steps,
            self.train.batch_size,
            inputs.length.epochs(inputs.length.steps),
        )
    }

    fn shown<'a>(&self, inputs: &'a Inputs) -> Shown<'a> {
        let (valid, tokenizer) = (inputs.valid.as_ref(), &inputs.base.tokenizer);
        Shown::Windows { train: &inputs.train, valid, tokenizer }
    }

    fn plan(&self, target: &PlanTarget) -> Result<MemoryPlan> {
        let (tokenizer, length) = (self.tokenizer.as_ref(), self.data.sequence_length);
        let (shape, trainable) =
            shape_and_trainable(&self.model, Head::Lm, tokenizer, length, &Freeze::default(), None)?;
        let (plans, rows) = (trainable.plans(&shape)?, RowShape::of(length, false));
        Ok(TrainingMemory::new(Self::SUBCOMMAND, &self.common(), shape, &plans, rows, target)?.into())
    }

    fn train(loaded: &Loaded<Self>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
        pretrain(loaded, &inputs, world, start)
    }
}

fn pretrain(loaded: &Loaded<Pretrain>, inputs: &Inputs, world: &World, start: &Start) -> Result<()> {
    let c = &loaded.config;
    let common = c.common();
    let paths = common::paths(&c.model, c.tokenizer.as_ref(), c.data.train.iter().chain(&c.data.valid));
    let tokenizer = &inputs.base.tokenizer;
    let mut folder = RunFolder::open(loaded, start, &paths, tokenizer, world)?;
    let mut learner = Learner::new(&inputs.base, None, &inputs.trainable, &common, world)?;
    folder.record(learner.record("model"))?;
    let progress = folder.restore_or_begin(&mut learner, &inputs.train)?;
    announce(c, inputs, &learner.model, world);

    let schedule = Schedule::new(&common, inputs.length.steps);
    let peak_flops = world.peak_flops(compute_kind(c.precision.compute))?;
    let aux_coef = inputs.base.shape.experts.as_ref().map(|e| e.router_aux_loss_coef);
    let mut session = Session::start(folder, progress, learner, &common, &inputs.length)?;
    session.catch_up(|s| validation(c, inputs, s))?;
    while !session.run.done() {
        let (next, lr) = (session.run.progress.data.next, schedule.rate(session.run.progress.step));
        let rows = inputs.length.rows_at(next);
        // Windows of training data have a label at every position, so that no rank needs to ask the others.
        let count = rows * c.data.sequence_length as u64;
        let micro_batches = this_ranks_batches(c, &inputs.train, next..next + rows, world)?;
        let model = &mut session.models.model;
        let sums =
            step::accumulate_balanced(model, &micro_batches, count as f64, c.train.recompute, aux_coef)?;
        let update = session.models.apply(sums, lr, world)?;

        session.run.progress.data.next += rows;
        let stepped = session.run.stepped(count, &update, lr)?;
        if let Some(mut record) = stepped.record {
            if let Some(aux_loss) = update.aux_loss {
                record = record.float("aux_loss", aux_loss);
            }
            if let Some(peak) = peak_flops {
                let flops = inputs.base.shape.flops_per_token(c.data.sequence_length) * stepped.tokens_per_s;
                record = record.float("mfu", flops / (peak * world.world_size as f64));
            }
            session.run.log(&record);
        }
        session.end_step(|s| validation(c, inputs, s))?;
    }
    session.take_best()?;
    session.finish(tokenizer)
}

/// This rank's part of the step of some global samples.
fn this_ranks_batches(c: &Pretrain, data: &Loader, of: Range<u64>, world: &World) -> Result<Vec<MicroBatch>> {
    let parts = step::division(&c.train, of.end - of.start, world);
    parts.map(|(offset, rows)| micro_batch(data, of.start + offset, rows)).collect()
}

/// `rows` windows of a loader; where there are none, one whose loss counts nothing.
fn micro_batch(data: &Loader, first: u64, rows: u64) -> Result<MicroBatch> {
    let mut batch = data.batch(if rows == 0 { 0 } else { first }, rows.max(1) as usize)?;
    if rows == 0 {
        batch.labels.fill(-100);
    }
    Ok(MicroBatch::from_rows(&batch.input_ids, &batch.labels, batch.columns as i64))
}

/// Validates, where that is due; whether the checkpoint is the best so far, to be saved.
fn validation(c: &Pretrain, inputs: &Inputs, session: &mut Session) -> Result<bool> {
    let Some(valid) = inputs.valid.as_ref().filter(|_| session.run.due(c.valid.every)) else {
        return Ok(false);
    };
    let (run, model) = (&mut session.run, &mut session.models.model);
    let Some(loss) = validate(c, model, valid, session.world, &mut || run.interrupted())? else {
        return run.owe_validation();
    };
    let record = run.with_loss(MetricsLine::new("valid", run.progress.step), loss);
    run.log(&record.float("perplexity", loss.exp()));
    run.restart_window();
    Ok(run.note_validation(Metric::Loss, loss, &c.valid))
}

/// Mean loss over the first `valid.batches` batches of the validation data (or all of it), in nats a token; none where it was
/// stopped.
fn validate(
    c: &Pretrain,
    model: &mut Llama,
    data: &Loader,
    world: &World,
    stop: StopCheck,
) -> Result<Option<f64>> {
    let windows = data.num_windows().min((c.valid.batches * c.train.batch_size) as u64);
    let batches = step::rounds(windows, &c.train, world).map(|(first, rows)| micro_batch(data, first, rows));
    step::evaluate(model, world, batches, stop)
}

fn announce(c: &Pretrain, inputs: &Inputs, model: &Llama, world: &World) {
    let axes = [&world.mesh.pipeline.axis, &world.mesh.data, &world.mesh.context, &world.mesh.tensor];
    let [pipeline, data, context, tensor] = axes.map(|axis| axis.size);
    let (copies, mesh) = match data * context == world.world_size {
        true if context == 1 => ("all ranks".to_string(), String::new()),
        _ => (
            format!("{} of them", data * context),
            format!(" (pipeline {pipeline} x data {data} x context {context} x tensor {tensor})"),
        ),
    };
    let mode = match c.parallel.mode {
        _ if world.world_size == 1 => "one rank".to_string(),
        _ if data * context == 1 && pipeline > 1 => {
            "in stages, whose parameters are not sharded further".to_string()
        }
        Mode::Full => format!("parameters, gradients and optimizer sharded over {copies}"),
        Mode::Grads => format!("gradients and optimizer sharded over {copies}"),
        Mode::Optimizer => format!("optimizer sharded over {copies}"),
        Mode::Hybrid => {
            let (shard, replicate) = (world.mesh.shard.size, world.mesh.replicate.size);
            format!(
                "{replicate} copies of parameters, gradients and optimizer, each sharded over {shard} ranks"
            )
        }
        Mode::Replicate => format!("replicated on {copies}"),
    };
    info!(
        "model: {:.2}M parameters, {} blocks, {:?} compute; {} rank(s){mesh}, {mode}",
        inputs.base.shape.num_parameters() as f64 / 1e6,
        inputs.base.shape.num_hidden_layers,
        model.params.compute(),
        world.world_size,
    );
    info!("data: {}", c.data_line(inputs));
}
