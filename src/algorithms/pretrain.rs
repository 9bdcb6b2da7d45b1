//! Pretraining: next-token prediction on token shards, parameters sharded over the ranks.

use crate::algorithms::base::{self, Base};
use crate::algorithms::folder::RunFolder;
use crate::algorithms::run::Start;
use crate::algorithms::step::{self, MicroBatch, Stop};
use crate::algorithms::training::{Learner, Plan, Progress, Run, compute_kind};
use crate::checkpoint::Metric;
use crate::config::parallel::Mode;
use crate::config::pretrain::Pretrain;
use crate::config::sections;
use crate::config::{Algorithm, Loaded, common};
use crate::data::loader::{Loader, Order, Source, State};
use crate::distributed::agreement::Facts;
use crate::distributed::world::World;
use crate::error::Result;
use crate::info;
use crate::model::{Llama, Trainable};
use crate::optim::Schedule;
use crate::telemetry::Record;

/// What a run reads before any rank talks to another: files are checked, and errors told, before a group could hang.
pub struct Inputs {
    pub base: Base,
    pub train: Loader,
    pub valid: Option<Loader>,
    pub steps: u64,
}

impl base::Inputs for Inputs {
    fn add_facts(&self, facts: &mut Facts) -> Result<()> {
        let valid = self.valid.as_ref().map(|valid| valid.fingerprint());
        base::add_data(self.train.fingerprint(), valid, facts);
        self.base.add_facts("model", facts)
    }
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

/// Runs the training that `loaded` describes, in `world`, on inputs that were opened before the ranks met.
pub fn pretrain(loaded: &Loaded<Pretrain>, inputs: Inputs, world: &World, start: &Start) -> Result<()> {
    let c = &loaded.config;
    let common = c.common();
    let inputs_of = common::paths(&c.model, c.tokenizer.as_ref(), c.data.train.iter().chain(&c.data.valid));
    let tokenizer = &inputs.base.tokenizer;
    let mut folder = RunFolder::open(loaded, start, &inputs_of, tokenizer, world)?;

    // The model on this rank, its optimizer, and where the run stands.
    let mut learner = Learner::new(&inputs.base, None, &Trainable::default(), &common, world)?;
    folder.record(learner.record("model", &inputs.base))?;
    let progress = match folder.restore::<State>(&mut learner)? {
        Some(progress) => {
            inputs.train.resume(&progress.data)?;
            progress
        }
        None => {
            learner.begin(&inputs.base, c.seed)?;
            Progress::new(inputs.train.state(0))
        }
    };
    announce(c, &inputs, &learner.model, world);

    let schedule = Schedule::new(&common, inputs.steps);
    let mut run = folder.start(progress, Plan::new(&common, inputs.steps))?;
    let compute = compute_kind(c.precision.compute);
    let peak_flops = world.peak_flops(compute)?;
    // Windows of training data have a label at every position, so that no rank needs to ask the others.
    let count = c.train.batch_size * c.data.sequence_length;

    let aux_coef = inputs.base.shape.experts.as_ref().map(|e| e.router_aux_loss_coef);

    if run.owes_validation() {
        let best = validation(c, &inputs, &mut learner.model, &mut run, world)?;
        run.save(&[learner.part("")], best)?;
    }
    while !run.done() {
        let micro_batches = this_ranks_batches(c, &inputs.train, run.progress.data.next, world)?;
        let Learner { model, optimizer, .. } = &mut learner;
        let sums =
            step::accumulate_balanced(model, &micro_batches, count as f64, c.train.recompute, aux_coef)?;
        let (lr, clip) = (schedule.rate(run.progress.step), c.optim.clip);
        let update = step::apply_gradients(model, optimizer, world, sums, lr, clip)?;

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
        let due = run.due(c.valid.every);
        let best = due && validation(c, &inputs, &mut learner.model, &mut run, world)?;
        run.save(&[learner.part("")], best)?;
    }
    run.take_best(|best| best.load_values(&mut learner.model.params))?;
    run.finish(|dir| learner.export(dir, tokenizer, world))
}

/// This rank's part of the step that begins at global sample `first`.
fn this_ranks_batches(c: &Pretrain, data: &Loader, first: u64, world: &World) -> Result<Vec<MicroBatch>> {
    let micro_batch = |(offset, rows): (u64, u64)| {
        let batch = data.batch(first + offset, rows as usize)?;
        Ok(MicroBatch::from_rows(&batch.input_ids, &batch.labels, batch.columns as i64))
    };
    step::division(&c.train, world).map(micro_batch).collect()
}

/// Validates, where there is data to validate on; whether the checkpoint is the best so far, to be saved.
fn validation(
    c: &Pretrain,
    inputs: &Inputs,
    model: &mut Llama,
    run: &mut Run<State>,
    world: &World,
) -> Result<bool> {
    let Some(valid) = &inputs.valid else { return Ok(false) };
    let Some(loss) = validate(c, model, valid, world, &mut || run.interrupted())? else {
        return run.owe_validation();
    };
    let record = run.with_loss(Record::new("valid", run.progress.step), loss);
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
    stop: Stop,
) -> Result<Option<f64>> {
    let windows = data.num_windows().min((c.valid.batches * c.train.batch_size) as u64);
    let batches = step::rounds(windows, &c.train, world).map(|(first, rows)| {
        let mut batch = data.batch(if rows == 0 { 0 } else { first }, rows.max(1) as usize)?;
        if rows == 0 {
            batch.labels.fill(-100);
        }
        Ok(MicroBatch::from_rows(&batch.input_ids, &batch.labels, batch.columns as i64))
    });
    step::evaluate(model, world, batches, stop)
}

fn announce(c: &Pretrain, inputs: &Inputs, model: &Llama, world: &World) {
    let mode = match c.parallel.mode {
        _ if world.world_size == 1 => "one rank".to_string(),
        Mode::Full => "parameters, gradients and optimizer sharded over all ranks".into(),
        Mode::Grads => "gradients and optimizer sharded over all ranks".into(),
        Mode::Optimizer => "optimizer sharded over all ranks".into(),
        Mode::Hybrid => {
            let (shard, replicate) = (world.mesh.shard.size, world.mesh.replicate.size);
            format!(
                "{replicate} copies of parameters, gradients and optimizer, each sharded over {shard} ranks"
            )
        }
        Mode::Replicate => "replicated on every rank".into(),
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
