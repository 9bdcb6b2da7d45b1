//! The reference's log-probabilities of whole completions: kept in a file, or computed when they are needed.

use kernels::comm::ReduceOp;
use tch::Tensor;

use super::Inputs;
use super::batch::PreferenceBatch;
use crate::algorithms::learner::Learner;
use crate::algorithms::reference::Reference as Online;
use crate::algorithms::rl::place::{Where, frozen};
use crate::algorithms::step;
use crate::checkpoint::ModelRecord;
use crate::config::dpo::{Dpo, ReferenceFrom};
use crate::config::{Algorithm, sections};
use crate::data::examples::default_cache;
use crate::data::rows::RowLoader;
use crate::data::sequence_values::SequenceValues;
use crate::distributed::agree::agree;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::info;
use crate::model::Llama;

/// Where log-probabilities under the reference come from.
pub enum ReferenceScores {
    /// Of the training and the validation data.
    Cached(SequenceValues, Option<SequenceValues>),
    Online(Online),
}

/// Which data a micro-batch is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReferenceOf {
    Train,
    Valid,
}

/// The reference as it was opened, before anything was computed with it.
pub struct ReferenceModel {
    /// What it is; none where it is the learner without its adapters, which has a record of its own.
    pub record: Option<ModelRecord>,
    state: LoadedReference,
}

enum LoadedReference {
    Online(Online),
    /// The key of its cached log-probabilities.
    Cached(String),
}

impl ReferenceModel {
    /// Reads the reference, or, where its log-probabilities are cached, what it is. Collective.
    pub fn open(c: &Dpo, inputs: &Inputs, world: &World) -> Result<ReferenceModel> {
        let other = inputs.reference.as_ref();
        if c.dpo.reference == ReferenceFrom::Online {
            let (base, trainable) = (&inputs.base, &inputs.trainable);
            let (online, record) = Online::open(base, trainable, other, &c.common(), world)?;
            return Ok(ReferenceModel { record, state: LoadedReference::Online(online) });
        }
        let base = other.unwrap_or(&inputs.base);
        let weights =
            base.weights.as_ref().ok_or_else(|| Error::failed("a new model cannot be the reference"))?;
        let kept = inputs.trainable.lora.as_ref().filter(|_| other.is_none()).map(|l| l.base);
        let hash = weights.hash(&base.shape, &world.group)?;
        let key = if other.is_some() { "reference.path" } else { "model.path" };
        let record = base.record_asked("reference", key, hash);
        let details = record.as_ref().map(|record| record.details.to_string()).unwrap_or_default();
        let key = format!("{hash} {details} {kept:?} {:?}", c.precision.compute);
        Ok(ReferenceModel { record, state: LoadedReference::Cached(key) })
    }

    /// Computes log-probabilities that are not in the cache yet. `is_new`: the learner is as the run begins. Collective.
    pub fn ready(
        self,
        c: &Dpo,
        inputs: &Inputs,
        learner: &mut Learner,
        is_new: bool,
        world: &World,
    ) -> Result<ReferenceScores> {
        let key = match self.state {
            LoadedReference::Online(online) => return Ok(ReferenceScores::Online(online)),
            LoadedReference::Cached(key) => key,
        };
        let mut train = open_cache(c, &inputs.train, &key, world)?;
        let steps = inputs.length.rows();
        let missing = train.missing(&inputs.train, steps.min(inputs.train.num_rows()));
        let mut valid = match &inputs.valid {
            Some(rows) => Some(open_cache(c, rows, &key, world)?),
            None => None,
        };
        let valid_missing = match (&valid, &inputs.valid) {
            (Some(values), Some(rows)) => values.missing(rows, super::num_valid(c, rows)),
            _ => Vec::new(),
        };
        let count = missing.len() + valid_missing.len();
        if count > 0 {
            info!("reference: computing the log-probabilities of the completions of {count} prompts, once");
            let mut fill_both = |model: &mut Llama| {
                fill(&mut train, model, c, &inputs.train, &missing, world)?;
                match (&mut valid, &inputs.valid) {
                    (Some(values), Some(rows)) => fill(values, model, c, rows, &valid_missing, world),
                    _ => Ok(()),
                }
            };
            let (base, other) = (&inputs.base, inputs.reference.as_ref());
            if Online::is_adapters_off(base, &inputs.trainable, other) {
                learner.model.without_adapters(fill_both)?;
            } else if is_new && other.is_none() {
                fill_both(&mut learner.model)?;
            } else {
                let (mut model, _) = frozen(other.unwrap_or(base), &c.common(), None, &Where::Run(world))?;
                fill_both(&mut model)?;
            }
        }
        Ok(ReferenceScores::Cached(train, valid))
    }
}

impl ReferenceScores {
    /// The log-probabilities of a micro-batch's completions, `[S]`, in the dtype of its mask.
    pub fn logps(&mut self, model: &mut Llama, batch: &PreferenceBatch, of: ReferenceOf) -> Result<Tensor> {
        match self {
            ReferenceScores::Cached(train, valid) => {
                let cached = if of == ReferenceOf::Train { train } else { valid.as_ref().unwrap_or(train) };
                let of_example =
                    |(s, n): &(usize, std::ops::Range<usize>)| cached.values[*s][n.clone()].to_vec();
                let values: Vec<f64> = batch.places.iter().flat_map(of_example).collect();
                let mask = &batch.completions.mask;
                Ok(Tensor::from_slice(&values).to_device(mask.device()).to_kind(mask.kind()))
            }
            ReferenceScores::Online(online) => {
                online.with(model, |reference| batch.completions.logps(reference))
            }
        }
    }
}

/// What the cache holds of any rank. Collective.
fn open_cache(c: &Dpo, rows: &RowLoader, key: &str, world: &World) -> Result<SequenceValues> {
    let cache = c.data.cache.clone().map_or_else(default_cache, Ok)?;
    let mut mine = agree(&world.group, SequenceValues::open(rows, key, &cache))?;
    // A rank on another machine may know more or less; log-probabilities are above minus infinity.
    for values in mine.values.iter_mut().filter(|v| !v.is_empty()) {
        values.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = f64::NEG_INFINITY);
        *values = world.group.combine(values, ReduceOp::Max)?;
        values.iter_mut().filter(|x| !x.is_finite()).for_each(|x| *x = f64::NAN);
    }
    Ok(mine)
}

/// Computes what is missing, and keeps it. Collective.
fn fill(
    cached: &mut SequenceValues,
    model: &mut Llama,
    c: &Dpo,
    rows: &RowLoader,
    missing: &[u64],
    world: &World,
) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let train = sections::TrainSection { batch_size: missing.len() as i64, ..c.train.clone() };
    let micro = c.train.micro_batch_size(world.mesh.data.size);
    let train = sections::TrainSection { micro_batch_size: Some(micro), ..train };
    // One number a sequence of `missing`, in order.
    let mut offsets = vec![0];
    for row in missing {
        let (s, i) = rows.place(*row);
        offsets.push(offsets[offsets.len() - 1] + rows.sources()[s].sequences(i).len());
    }
    let mut values = vec![0.0; offsets[missing.len()]];
    for (first, count) in step::rounds(missing.len() as u64, &train, world) {
        let chosen = match count {
            0 => &missing[..1],
            n => &missing[first as usize..(first + n) as usize],
        };
        let batch = PreferenceBatch::new(c, rows, chosen, 0.0, world.device);
        let logps = Vec::<f64>::try_from(batch.completions.logps(model)?.to_kind(tch::Kind::Double))?;
        if count > 0 {
            let at = offsets[first as usize];
            values[at..at + logps.len()].copy_from_slice(&logps);
        }
    }
    let values = world.sum_rows(&values)?;
    for (row, at) in missing.iter().zip(&offsets) {
        let (s, i) = rows.place(*row);
        let sequences = rows.sources()[s].sequences(i);
        let n = sequences.len();
        cached.values[s][sequences].copy_from_slice(&values[*at..at + n]);
    }
    agree(&world.group, if world.is_main() { cached.write() } else { Ok(()) })
}
