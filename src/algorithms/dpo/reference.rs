//! The reference's log-probabilities of whole completions: kept in a file, or computed when they are asked for.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use kernels::c10d::ReduceOp;
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::{Inputs, Work};
use crate::algorithms::rl::place::{Where, frozen};
use crate::algorithms::step;
use crate::algorithms::training::Learner;
use crate::checkpoint::{ModelRecord, TensorHash};
use crate::config::dpo::{Dpo, ReferenceFrom};
use crate::config::{Algorithm, sections};
use crate::data::examples::default_cache;
use crate::data::rows::RowLoader;
use crate::data::tokenizer::hex;
use crate::distributed::agree::agree;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::files::{AtomicFile, exists, read_error};
use crate::info;
use crate::model::{Llama, LmHead};

/// Where log-probabilities under the reference come from.
pub enum Reference {
    /// Of the training and the validation data.
    Cached(Table, Option<Table>),
    AdaptersOff,
    Copy(Box<Llama>),
}

/// Which data a micro-batch is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    Train,
    Valid,
}

/// The reference as it was opened, before anything is asked of it.
pub struct ReferenceModel {
    /// What it is; none where it is the learner without its adapters, which has a record of its own.
    pub record: Option<ModelRecord>,
    state: Loaded,
}

enum Loaded {
    AdaptersOff,
    Copy(Box<Llama>),
    /// The key of its cached log-probabilities.
    Cached(String),
}

/// Whether the reference is the learner without its adapters. An adapter that the model came with belongs to the reference.
fn adapters_off(c: &Dpo, inputs: &Inputs) -> bool {
    c.reference.is_none()
        && inputs.trainable.lora.is_some()
        && inputs.base.weights.as_ref().is_some_and(|w| w.lora().is_none())
}

impl ReferenceModel {
    /// Reads the reference, or, where its log-probabilities are cached, what it is. Collective.
    pub fn open(c: &Dpo, inputs: &Inputs, world: &World) -> Result<ReferenceModel> {
        let base = inputs.reference.as_ref().unwrap_or(&inputs.base);
        let key = if inputs.reference.is_some() { "reference.path" } else { "model.path" };
        let record = |hash| base.record_asked("reference", key, hash);
        if c.dpo.reference == ReferenceFrom::Online {
            if adapters_off(c, inputs) {
                return Ok(ReferenceModel { record: None, state: Loaded::AdaptersOff });
            }
            let (model, hash) = frozen_copy(c, inputs, world)?;
            return Ok(ReferenceModel { record: record(hash), state: Loaded::Copy(Box::new(model)) });
        }
        let weights = base.weights.as_ref().ok_or_else(|| Error::failed("a new model is no reference"))?;
        let kept = inputs.trainable.lora.as_ref().filter(|_| inputs.reference.is_none()).map(|l| l.base);
        let hash = weights.hash(&base.shape, &world.group)?;
        let record = record(hash);
        let details = record.as_ref().map(|record| record.details.to_string()).unwrap_or_default();
        let key = format!("{hash} {details} {kept:?} {:?}", c.precision.compute);
        Ok(ReferenceModel { record, state: Loaded::Cached(key) })
    }

    /// Computes log-probabilities that are not in the cache yet. `fresh`: the learner is as the run begins. Collective.
    pub fn ready(
        self,
        c: &Dpo,
        inputs: &Inputs,
        learner: &mut Learner,
        fresh: bool,
        world: &World,
    ) -> Result<Reference> {
        let key = match self.state {
            Loaded::AdaptersOff => return Ok(Reference::AdaptersOff),
            Loaded::Copy(model) => return Ok(Reference::Copy(model)),
            Loaded::Cached(key) => key,
        };
        let cache = c.data.cache.clone().map_or_else(default_cache, Ok)?;
        let mut train = Table::open(&inputs.train, &key, &cache, world)?;
        let wanted = inputs.steps * c.train.batch_size as u64;
        let missing = train.missing(&inputs.train, wanted.min(inputs.train.num_rows()));
        let mut valid = match &inputs.valid {
            Some(rows) => Some(Table::open(rows, &key, &cache, world)?),
            None => None,
        };
        let valid_missing = match (&valid, &inputs.valid) {
            (Some(table), Some(rows)) => table.missing(rows, super::num_valid(c, rows)),
            _ => Vec::new(),
        };
        let count = missing.len() + valid_missing.len();
        if count > 0 {
            info!("reference: computing the log-probabilities of the completions of {count} prompts, once");
            let mut fill = |model: &mut Llama| {
                train.fill(model, c, &inputs.train, &missing, world)?;
                match (&mut valid, &inputs.valid) {
                    (Some(table), Some(rows)) => table.fill(model, c, rows, &valid_missing, world),
                    _ => Ok(()),
                }
            };
            if adapters_off(c, inputs) {
                learner.model.adapters = false;
                let filled = fill(&mut learner.model);
                learner.model.adapters = true;
                filled?;
            } else if fresh && c.reference.is_none() {
                fill(&mut learner.model)?;
            } else {
                fill(&mut frozen_copy(c, inputs, world)?.0)?;
            }
        }
        Ok(Reference::Cached(train, valid))
    }
}

impl Reference {
    /// The log-probabilities of a micro-batch's completions, `[S]`, in the dtype of its mask.
    pub fn sums(&mut self, model: &mut Llama, work: &Work, of: Of) -> Result<Tensor> {
        match self {
            Reference::Cached(train, valid) => {
                let table = if of == Of::Train { train } else { valid.as_ref().unwrap_or(train) };
                let values: Vec<f64> =
                    work.places.iter().flat_map(|(s, n)| &table.values[*s][n.clone()]).copied().collect();
                Ok(Tensor::from_slice(&values).to_device(work.mask.device()).to_kind(work.mask.kind()))
            }
            Reference::AdaptersOff => {
                model.adapters = false;
                let sums = sums(model, work);
                model.adapters = true;
                sums
            }
            Reference::Copy(copy) => sums(copy, work),
        }
    }
}

/// Log-probabilities of a micro-batch's completions under a model, `[S]`.
pub fn sums(model: &mut Llama, work: &Work) -> Result<Tensor> {
    let hidden = model.hidden(&work.batch.input)?;
    let labels = work.batch.labels.to_device(hidden.device());
    let logprobs = LmHead::logprobs(model, &hidden, &labels, 1.0, false)?.logprobs;
    // The reference may be in another place, and another dtype.
    Ok(work.sums(&logprobs.to_device(work.mask.device()).to_kind(work.mask.kind())))
}

/// The reference as a model of its own. Collective.
fn frozen_copy(c: &Dpo, inputs: &Inputs, world: &World) -> Result<(Llama, TensorHash)> {
    let base = inputs.reference.as_ref().unwrap_or(&inputs.base);
    frozen(base, &c.common(), None, &Where::Run(world))
}

/// Log-probabilities of all completions of a loader's files, in nats; NaN where they were not computed yet. A file in the
/// cache for each: the numbers in float64, little-endian, and their CRC-32.
pub struct Table {
    files: Vec<PathBuf>,
    /// By source and sequence.
    values: Vec<Vec<f64>>,
}

/// Of how log-probabilities are computed: part of every cache's key.
const VERSION: u32 = 1;

impl Table {
    /// What the cache holds of any rank. `key` tells models and precisions apart. Collective.
    fn open(rows: &RowLoader, key: &str, cache: &Path, world: &World) -> Result<Table> {
        let file = |data: &str| {
            let hash = Sha256::digest(format!("{VERSION} {data} {key}"));
            cache.join(format!("{}.reference", hex(&hash[..16])))
        };
        let files: Vec<PathBuf> = rows.sources().iter().map(|s| file(s.key())).collect();
        let read = files.iter().zip(rows.sources()).map(|(f, s)| read(f, s.counts().sequences as usize));
        let mine: Vec<Vec<f64>> = agree(&world.group, read.collect::<Result<_>>())?;
        // A rank on another machine may know more or less; log-probabilities are above minus infinity.
        let known = |v: Vec<f64>| -> Result<Vec<f64>> {
            let v: Vec<f64> = v.into_iter().map(|x| if x.is_nan() { f64::NEG_INFINITY } else { x }).collect();
            let v = if v.is_empty() { v } else { world.group.combine(&v, ReduceOp::Max)? };
            Ok(v.into_iter().map(|x| if x.is_finite() { x } else { f64::NAN }).collect())
        };
        Ok(Table { files, values: mine.into_iter().map(known).collect::<Result<_>>()? })
    }

    /// The first of the loader's rows 0 to `count` with each example that is not known.
    fn missing(&self, rows: &RowLoader, count: u64) -> Vec<u64> {
        let mut seen = HashSet::new();
        let unknown = |(s, i): (usize, usize)| {
            let n = rows.sources()[s].sequences(i);
            self.values[s][n].iter().any(|x| x.is_nan())
        };
        (0..count).filter(|row| unknown(rows.place(*row)) && seen.insert(rows.place(*row))).collect()
    }

    /// Computes what is missing, and keeps it. Collective.
    fn fill(
        &mut self,
        model: &mut Llama,
        c: &Dpo,
        rows: &RowLoader,
        missing: &[u64],
        world: &World,
    ) -> Result<()> {
        if missing.is_empty() {
            return Ok(());
        }
        let train = sections::Train { batch_size: missing.len() as i64, ..c.train.clone() };
        let micro = c.train.micro_batch_size(world.mesh.data.size);
        let train = sections::Train { micro_batch_size: Some(micro), ..train };
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
            let work = Work::new(c, rows, chosen, 0.0, world.device);
            let sums = Vec::<f64>::try_from(sums(model, &work)?.to_kind(tch::Kind::Double))?;
            if count > 0 {
                let at = offsets[first as usize];
                values[at..at + sums.len()].copy_from_slice(&sums);
            }
        }
        let values = world.group.combine(&values, ReduceOp::Sum)?;
        for (row, at) in missing.iter().zip(&offsets) {
            let (s, i) = rows.place(*row);
            let sequences = rows.sources()[s].sequences(i);
            let n = sequences.len();
            self.values[s][sequences].copy_from_slice(&values[*at..at + n]);
        }
        let write = || self.files.iter().zip(&self.values).try_for_each(|(file, values)| write(file, values));
        agree(&world.group, if world.is_main() { write() } else { Ok(()) })
    }
}

/// NaN where nothing is known: there is no such file, or it is damaged.
fn read(path: &Path, len: usize) -> Result<Vec<f64>> {
    let unknown = vec![f64::NAN; len];
    if !exists(path)? {
        return Ok(unknown);
    }
    let bytes = std::fs::read(path).map_err(|e| read_error(path, &e))?;
    let Some((values, crc)) = bytes.split_last_chunk::<4>() else { return Ok(unknown) };
    if values.len() != 8 * len || crc32fast::hash(values) != u32::from_le_bytes(*crc) {
        return Ok(unknown);
    }
    Ok(values.chunks_exact(8).map(|b| f64::from_le_bytes(std::array::from_fn(|i| b[i]))).collect())
}

fn write(path: &Path, values: &[f64]) -> Result<()> {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut file = AtomicFile::create(path)?;
    file.put(&bytes)?;
    file.put(&crc32fast::hash(&bytes).to_le_bytes())?;
    file.commit()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::TestFolder;

    #[test]
    fn what_is_damaged_is_not_known() {
        let folder = TestFolder::new("dpo-reference");
        let path = folder.0.join("a.reference");
        let unknown = |values: Vec<f64>| values.iter().all(|x| x.is_nan());
        assert!(unknown(read(&path, 3).unwrap()));
        write(&path, &[-1.5, f64::NAN, -1e300]).unwrap();
        let values = read(&path, 3).unwrap();
        assert!(values[0] == -1.5 && values[1].is_nan() && values[2] == -1e300);
        assert!(unknown(read(&path, 2).unwrap()));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[3] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(unknown(read(&path, 3).unwrap()));
        std::fs::write(&path, b"xy").unwrap();
        assert!(unknown(read(&path, 3).unwrap()));
    }
}
