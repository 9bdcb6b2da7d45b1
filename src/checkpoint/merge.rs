//! An adapter into its model: W + scale * B A in float32, rounded to the dtype that is written. One tensor is in memory at
//! a time, and for the comparison of logits two groups of parameters.

use std::collections::HashMap;
use std::ops::Deref;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use kernels::quant::Quantized;
use tch::{Device, Kind, Tensor};

use super::convert::logits;
use super::grow::grown;
use super::hf::{self, Output};
use super::hf_config::SpecialIds;
use super::ours::Scoring;
use super::peft::PeftAdapter;
use super::safetensors::TensorEntry;
use super::source::{TensorFile, TensorSource, View, for_chunks};
use super::weights::{Weights, not_adapted};
use crate::config::shape::{Head, Shape};
use crate::config::trainable::BaseFormat;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::frozen::Storage;
use crate::distributed::plan::{GroupPlan, Role, adapter_names};
use crate::distributed::sharded::TensorSpec;
use crate::error::{Context, Error, Result};
use crate::model::layout::layouts;

/// A model and an adapter for it.
pub struct Merge {
    shape: Shape,
    /// The model's tensors as they were in training, quantized ones among them.
    plans: Vec<GroupPlan>,
    tensors: Arc<Tensors>,
    ids: SpecialIds,
    tokenizer: Option<Tokenizer>,
    scoring: Option<Scoring>,
    /// Of all tensors; none: each as it is in the model.
    dtype: Option<Kind>,
}

/// Where tensors come from.
struct Tensors {
    source: TensorSource,
    /// Rows of the source's embedding.
    rows: i64,
    adapter: PeftAdapter,
}

impl Tensors {
    /// A tensor as it was in training, its adapter aside: what was trained as a whole, what was quantized as it came back,
    /// everything else as it is in the model.
    fn trained(&self, spec: &TensorSpec, role: Role) -> Result<Tensor> {
        if self.adapter.has(&spec.name) {
            return self.adapter.tensor(&spec.name);
        }
        let flat = Tensor::f_empty([spec.numel()], (self.source.view(&spec.name)?.kind, Device::Cpu))?;
        let read = |spec: &TensorSpec, first, values: &Tensor| self.source.read(&spec.name, first, values);
        grown(self.rows, read, read)(spec, 0, &flat)?;
        let t = flat.f_view(spec.shape.as_slice())?;
        match role {
            Role::Frozen(Storage::Quantized(scheme)) => {
                let q = Quantized::quantize(&t, scheme).with_context(|| format!("tensor `{}`", spec.name))?;
                let [rows, columns] = q.shape();
                Ok(q.dequantize(0..rows, 0..columns, Kind::Float)?)
            }
            _ => Ok(t),
        }
    }

    /// The tensor of the merged model.
    fn merged(&self, spec: &TensorSpec, role: Role) -> Result<Tensor> {
        let w = self.trained(spec, role)?;
        let [a, b] = adapter_names(&spec.name);
        match (&self.adapter.trainable().lora, self.adapter.has(&a)) {
            (Some(lora), true) => {
                let float = |t: Tensor| t.to_kind(Kind::Float);
                let delta = float(self.adapter.tensor(&b)?).f_mm(&float(self.adapter.tensor(&a)?))?;
                Ok(float(w) + delta * lora.scale())
            }
            _ => Ok(w),
        }
    }

    /// The dtype of a tensor of the merged model: the model's, unless all of it was trained as it is in a checkpoint.
    fn kind(&self, name: &str) -> Result<Kind> {
        let adapts = self.adapter.trainable().lora.is_some();
        match self.adapter.kind(name) {
            // A head that came with the adapter.
            Some(_) if adapts && !self.source.views.contains_key(name) => Ok(Kind::Float),
            Some(kind) if !adapts => Ok(kind),
            _ => Ok(self.source.view(name)?.kind),
        }
    }

    /// Whether the adapter changes this tensor.
    fn changes(&self, spec: &TensorSpec) -> bool {
        self.adapter.has(&adapter_names(&spec.name)[0]) || self.adapter.has(&spec.name)
    }
}

/// What was written, and how far it is from the model with its adapter.
#[derive(Debug, Clone)]
pub struct MergeReport {
    /// Tensors in all files.
    pub num_tensors: usize,
    /// Tensors that the adapter changed.
    pub num_merged: usize,
    /// Bytes of the tensors.
    pub bytes: u64,
    /// Files with tensors.
    pub num_files: usize,
    merged: Merged,
}

impl Deref for MergeReport {
    type Target = Merged;

    fn deref(&self) -> &Merged {
        &self.merged
    }
}

/// How far a merged model is from the model with its adapter.
#[derive(Debug, Clone, Copy)]
pub struct Merged {
    /// How the model's weights were kept in training.
    pub base: BaseFormat,
    /// Mean over tokens of KL(model with adapter || merged model), in nats; with a scalar head, of the absolute difference
    /// of their values.
    pub distance: f64,
    /// The model has a scalar head.
    pub scored: bool,
    /// Tokens of the text that both models read.
    pub num_tokens: i64,
}

/// Refuses a scalar head that no format has a place for.
pub(super) fn has_place_for_head(shape: &Shape) -> Result<()> {
    match shape.features.score_layers {
        false => Ok(()),
        true => Err(Error::data(
            "no format has a place for a scalar head of two layers (ChatLearn's pooler_head); such models are scored where they are \
             (corral score, corral eval, reward_model.path)",
        )),
    }
}

impl Merge {
    /// Opens the merge of `adapter` into `base`; `dtype` is the result's, by default that of each tensor of the base.
    pub fn new(base: Weights, mut adapter: PeftAdapter, dtype: Option<Kind>) -> Result<Merge> {
        not_adapted(&base, &adapter)?;
        let shape = adapter.shape(base.shape());
        has_place_for_head(&shape)?;
        adapter.check(&shape)?;
        let plans = adapter.trainable().plans(&shape)?;
        let with_tokenizer = [adapter.tokenizer_dir()?, base.tokenizer_dir()?];
        let tokenizer = with_tokenizer.into_iter().flatten().next().map(Tokenizer::load).transpose()?;
        let ids = match &tokenizer {
            Some(tokenizer) => SpecialIds::of(tokenizer),
            None => SpecialIds::of_folder(base.dir())?,
        };
        let scoring = adapter.scoring().map_or_else(|| base.scoring(), |s| Ok(Some(s.clone())))?;
        let tensors =
            Arc::new(Tensors { rows: base.shape().vocab_size, source: base.into_source()?, adapter });
        Ok(Merge { shape, plans, tensors, ids, tokenizer, scoring, dtype })
    }

    fn specs(&self) -> impl Iterator<Item = (&TensorSpec, &Role)> {
        self.plans.iter().flat_map(|p| p.layout.specs.iter().zip(&p.roles))
    }

    fn entry(&self, spec: &TensorSpec) -> Result<TensorEntry> {
        let kind = self.dtype.map_or_else(|| self.tensors.kind(&spec.name), Ok)?;
        Ok(TensorEntry { name: spec.name.clone(), kind, shape: spec.shape.clone() })
    }

    /// The merged model as tensors of a file, of which one is in memory at a time.
    pub fn source(&self) -> Result<TensorSource> {
        let mut source = TensorSource::default();
        for (spec, _) in self.specs() {
            let view = View::whole(0, &spec.name, spec.shape.clone(), self.entry(spec)?.kind);
            source.views.insert(spec.name.clone(), view);
        }
        let entries = self
            .specs()
            .map(|(spec, role)| Ok((spec.name.clone(), (self.entry(spec)?, spec.clone(), *role))));
        source.files = vec![Box::new(MergedFile {
            tensors: self.tensors.clone(),
            entries: entries.collect::<Result<_>>()?,
            last: Mutex::default(),
        })];
        Ok(source)
    }

    /// Bytes of the tensors as they will be.
    pub fn bytes(&self) -> Result<u64> {
        self.specs().map(|(spec, _)| Ok(self.entry(spec)?.bytes())).sum()
    }

    /// Writes the merged model to the folder `to`, in Hugging Face's format and files of at most `max_shard_size` bytes:
    /// complete, or not at all. `done` counts the bytes that were written. Logits are compared on `device`.
    pub fn write(
        &self,
        to: &Path,
        max_shard_size: u64,
        device: Device,
        done: &AtomicU64,
    ) -> Result<MergeReport> {
        let entries = self.specs().map(|(spec, _)| self.entry(spec)).collect::<Result<Vec<_>>>()?;
        let plan = hf::plan(hf::as_stored(&self.shape, entries.iter().cloned()), max_shard_size);
        let dtype = super::convert::most_common(&entries);
        let (ids, tokenizer) = (self.ids.clone(), self.tokenizer.as_ref());
        let (folder, _) = hf::begin(to, &self.shape, dtype, ids, tokenizer, self.scoring.as_ref(), &plan)?;
        let mut output = Output::new(folder.temporary(), &plan);
        let mut num_merged = 0;
        for ((spec, role), entry) in self.specs().zip(&entries) {
            let merged = self.tensors.merged(spec, *role)?.f_to_kind(entry.kind)?;
            if !bool::try_from(merged.f_isfinite()?.f_all()?)? {
                return Err(Error::data(format!("`{}` is not finite after merging", spec.name)));
            }
            output.write(&merged)?;
            num_merged += usize::from(self.tensors.changes(spec));
            done.fetch_add(entry.bytes(), Relaxed);
        }
        drop(output);
        let written = Rc::new(Weights::open(folder.temporary())?.into_source()?);
        let merged = self.check(&written, device)?;
        folder.commit()?;
        Ok(MergeReport {
            num_tensors: entries.len(),
            num_merged,
            bytes: entries.iter().map(TensorEntry::bytes).sum(),
            num_files: plan.len(),
            merged,
        })
    }

    /// Compares what was written with the model and its adapter, on the text of [`logits`].
    pub(super) fn check(&self, written: &Rc<TensorSource>, device: Device) -> Result<Merged> {
        let with_adapter: Vec<GroupPlan> = self
            .plans
            .iter()
            .map(|plan| GroupPlan { roles: vec![Role::Trained; plan.roles.len()], ..plan.clone() })
            .collect();
        let roles: HashMap<String, Role> = self.specs().map(|(s, role)| (s.name.clone(), *role)).collect();
        let tensors = self.tensors.clone();
        let from = move |spec: &TensorSpec| match roles.get(&spec.name) {
            Some(role) => tensors.trained(spec, *role),
            None => tensors.adapter.tensor(&spec.name),
        };
        let p = logits(&self.shape, with_adapter, from, device)?;
        let written = written.clone();
        let q = logits(&self.shape, layouts(&self.shape), move |spec| written.tensor(&spec.name), device)?;
        let [p, q] = match self.shape.head {
            Head::Lm => [p, q].map(|t| t.log_softmax(-1, Kind::Double)),
            Head::Score => [p, q].map(|t| t.to_kind(Kind::Double)),
        };
        let each = match self.shape.head {
            Head::Lm => p.exp() * (&p - q),
            Head::Score => (&p - q).abs(),
        };
        let distance = each.sum(Kind::Double).double_value(&[]) / p.size()[0] as f64;
        if !distance.is_finite() {
            return Err(Error::data("the merged model's outputs are not finite"));
        }
        let base = self.tensors.adapter.trainable().lora.as_ref().map_or(BaseFormat::None, |l| l.base);
        let scored = self.shape.head == Head::Score;
        Ok(Merged { base, distance: distance.max(0.0), scored, num_tokens: p.size()[0] })
    }
}

/// A merged model as a file: a tensor is merged when something of it is read.
struct MergedFile {
    tensors: Arc<Tensors>,
    entries: HashMap<String, (TensorEntry, TensorSpec, Role)>,
    /// The tensor that was read last, since tensors are read in parts.
    last: Mutex<Option<(String, Vec<u8>)>>,
}

impl MergedFile {
    fn entry(&self, name: &str) -> Result<&(TensorEntry, TensorSpec, Role)> {
        self.entries.get(name).ok_or_else(|| Error::data(format!("there is no tensor `{name}`")))
    }

    /// All bytes of a merged tensor.
    fn merged(&self, name: &str) -> Result<Vec<u8>> {
        let (entry, spec, role) = self.entry(name)?;
        let merged = self.tensors.merged(spec, *role)?.f_to_kind(entry.kind)?;
        if !bool::try_from(merged.f_isfinite()?.f_all()?)? {
            return Err(Error::data(format!("`{name}` is not finite after merging")));
        }
        let mut bytes = Vec::with_capacity(entry.bytes() as usize);
        for_chunks(&merged, entry.kind, |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        Ok(bytes)
    }
}

impl TensorFile for MergedFile {
    fn path(&self) -> &Path {
        self.tensors.adapter.dir()
    }

    fn names(&self) -> Vec<String> {
        self.entries.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Result<(Vec<i64>, Kind)> {
        let (entry, ..) = self.entry(name)?;
        Ok((entry.shape.clone(), entry.kind))
    }

    fn read_bytes(&self, name: &str, first: i64, to: &mut [u8]) -> Result<()> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref().is_none_or(|(of, _)| of != name) {
            *last = Some((name.to_string(), self.merged(name)?));
        }
        let start = first as usize * self.entry(name)?.0.kind.elt_size_in_bytes();
        let bytes = last.as_ref().and_then(|(_, bytes)| bytes.get(start..start + to.len()));
        to.copy_from_slice(bytes.ok_or_else(|| Error::failed(format!("`{name}` is shorter")))?);
        Ok(())
    }
}
