//! An adapter into its model: W + scale * B A in float32, rounded to the dtype that is written. One tensor is in memory at
//! a time, and for the comparison of logits two groups of parameters.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use kernels::quant::Quantized;
use tch::{Device, Kind, Tensor};

use super::convert::logits;
use super::hf::{self, Output};
use super::hf_config::SpecialIds;
use super::ours::{Ours, Scoring};
use super::peft::PeftAdapter;
use super::safetensors::Entry;
use super::source::Source;
use super::weights::Weights;
use crate::config::shape::{Head, Shape};
use crate::config::trainable::Base;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::frozen::Storage;
use crate::distributed::plan::{Plan, Role, adapter_names};
use crate::distributed::sharded::Spec;
use crate::error::{Context, Error, Result};
use crate::model::layout::layouts;

/// A model and an adapter for it.
pub struct Merge {
    shape: Shape,
    /// The model's tensors as they were in training, quantized ones among them.
    plans: Vec<Plan>,
    tensors: Rc<Tensors>,
    ids: SpecialIds,
    tokenizer: Option<Tokenizer>,
    scoring: Option<Scoring>,
    /// Of all tensors; none: each as it is in the model.
    dtype: Option<Kind>,
}

/// Where tensors come from.
struct Tensors {
    source: Source,
    adapter: PeftAdapter,
}

impl Tensors {
    /// A tensor as it was in training, its adapter aside: what was trained as a whole, what was quantized as it came back,
    /// everything else as it is in the model.
    fn trained(&self, spec: &Spec, role: Role) -> Result<Tensor> {
        if self.adapter.has(&spec.name) {
            return self.adapter.tensor(&spec.name);
        }
        let t = self.source.tensor(&spec.name)?;
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
    fn merged(&self, spec: &Spec, role: Role) -> Result<Tensor> {
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

    /// Whether the adapter changes this tensor.
    fn changes(&self, spec: &Spec) -> bool {
        self.adapter.has(&adapter_names(&spec.name)[0]) || self.adapter.has(&spec.name)
    }
}

/// What was written, and how far it is from the model with its adapter.
#[derive(Debug, Clone)]
pub struct Report {
    pub num_tensors: usize,
    /// Tensors that the adapter changed.
    pub num_merged: usize,
    pub bytes: u64,
    pub num_files: usize,
    /// How the model's weights were kept in training.
    pub base: Base,
    /// Mean over tokens of KL(model with adapter || merged model), in nats; with a scalar head, of the absolute difference
    /// of their values.
    pub distance: f64,
    /// The model has a scalar head.
    pub scored: bool,
    pub num_tokens: i64,
}

impl Merge {
    pub fn new(base: Weights, mut adapter: PeftAdapter, dtype: Option<Kind>) -> Result<Merge> {
        let shape = adapter.shape(base.shape());
        adapter.check(&shape)?;
        let plans = adapter.trainable().plans(&shape)?;
        let with_tokenizer = [adapter.tokenizer_dir()?, base.tokenizer_dir()?];
        let tokenizer = with_tokenizer.into_iter().flatten().next().map(Tokenizer::load).transpose()?;
        let ids = match &tokenizer {
            Some(tokenizer) => SpecialIds::of(tokenizer),
            None => SpecialIds::of_folder(base.dir())?,
        };
        let scoring = Ours::read(adapter.dir())?.reward.map_or_else(|| base.scoring(), |s| Ok(Some(s)))?;
        let tensors = Rc::new(Tensors { source: base.into_source()?, adapter });
        Ok(Merge { shape, plans, tensors, ids, tokenizer, scoring, dtype })
    }

    fn specs(&self) -> impl Iterator<Item = (&Spec, &Role)> {
        self.plans.iter().flat_map(|p| p.layout.specs.iter().zip(&p.roles))
    }

    fn entry(&self, spec: &Spec) -> Result<Entry> {
        let kind = match (self.dtype, &self.tensors.source) {
            (Some(dtype), _) => dtype,
            // A head that came with the adapter.
            (None, source) if !source.views.contains_key(&spec.name) => Kind::Float,
            (None, source) => source.view(&spec.name)?.kind,
        };
        Ok(Entry { name: spec.name.clone(), kind, shape: spec.shape.clone() })
    }

    /// Bytes of the tensors as they will be.
    pub fn bytes(&self) -> Result<u64> {
        self.specs().map(|(spec, _)| Ok(self.entry(spec)?.bytes())).sum()
    }

    /// Writes the merged model to the folder `to`, in Hugging Face's format and files of at most `max_shard_size` bytes:
    /// complete, or not at all. `done` counts the bytes that were written. Logits are compared on `device`.
    pub fn write(&self, to: &Path, max_shard_size: u64, device: Device, done: &AtomicU64) -> Result<Report> {
        let entries = self.specs().map(|(spec, _)| self.entry(spec)).collect::<Result<Vec<_>>>()?;
        let plan = hf::plan(entries.iter().cloned(), max_shard_size);
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
        let (distance, num_tokens) = self.divergence(&written, device)?;
        folder.commit()?;
        Ok(Report {
            num_tensors: entries.len(),
            num_merged,
            bytes: entries.iter().map(Entry::bytes).sum(),
            num_files: plan.len(),
            base: self.tensors.adapter.trainable().lora.as_ref().map_or(Base::None, |l| l.base),
            distance,
            scored: self.shape.head == Head::Score,
            num_tokens,
        })
    }

    /// How far the written model is from the one with its adapter, and on how many tokens (see [`Report::distance`]).
    fn divergence(&self, written: &Rc<Source>, device: Device) -> Result<(f64, i64)> {
        let with_adapter: Vec<Plan> = self
            .plans
            .iter()
            .map(|plan| Plan { roles: vec![Role::Trained; plan.roles.len()], ..plan.clone() })
            .collect();
        let roles: HashMap<String, Role> = self.specs().map(|(s, role)| (s.name.clone(), *role)).collect();
        let tensors = self.tensors.clone();
        let from = move |spec: &Spec| match roles.get(&spec.name) {
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
            return Err(Error::data("what the merged model gives is not finite"));
        }
        Ok((distance.max(0.0), p.size()[0]))
    }
}
