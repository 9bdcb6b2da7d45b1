//! From one format into another. What was written is read again and compared before it gets its name.
//!
//! One tensor is in memory at a time, and for the comparison of logits two groups of parameters: a model need not fit
//! into memory to be converted.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tch::{Device, Kind, Tensor};

use super::gguf;
use super::hf::{self, Output};
use super::hf_config::SpecialIds;
use super::megatron::{MegatronForm, MegatronPlan};
use super::merge::{Merge, Merged, has_place_for_head};
use super::meta::MetaParts;
use super::ours::Scoring;
use super::safetensors::TensorEntry;
use super::source::TensorSource;
use super::weights::Weights;
use crate::config::shape::{Experts, Shape};
use crate::data::tokenizer::Tokenizer;
use crate::data::tokenizer::gguf::{GgufLimit, check_same};
use crate::distributed::plan::GroupPlan;
use crate::distributed::sharded::{Layout, Sharded, TensorSpec};
use crate::error::{Context, Error, Result};
use crate::files::{AtomicFile, AtomicFolder};
use crate::gguf::{GgufDtype, is_gguf};
use crate::model::layout::layouts;
use crate::model::{Llama, ModelInput};

/// Tokens of the text that logits are compared on.
const TOKENS: i64 = 32;

/// What to write.
#[derive(Debug, Clone, Copy)]
pub enum ConvertTarget {
    /// Hugging Face's format, in files of at most so many bytes.
    Hf {
        /// Bytes of tensors in a file; a tensor that is larger has a file of its own.
        max_shard_size: u64,
    },
    /// Meta's format, in so many model-parallel parts.
    Meta {
        /// Files `consolidated.NN.pth`, one a rank of Meta's tensor parallelism.
        parts: i64,
    },
    /// One of Megatron's formats.
    Megatron(MegatronForm),
    /// A GGUF file.
    Gguf,
}

/// What tensors are stored as.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StoredAs {
    /// As numbers of this dtype.
    Kind(Kind),
    /// In a GGUF file: Q8_0, Q4_0 or Q4_1.
    Blocks(GgufDtype),
}

impl StoredAs {
    fn kind(self) -> Option<Kind> {
        match self {
            StoredAs::Kind(kind) => Some(kind),
            StoredAs::Blocks(_) => None,
        }
    }
}

/// What was written, and what its check found.
#[derive(Debug, Clone)]
pub struct ConvertReport {
    /// Tensors in all files.
    pub num_tensors: usize,
    /// Bytes of the tensors.
    pub bytes: u64,
    /// Files with tensors.
    pub num_files: usize,
    /// The tokenizer's files that went along.
    pub copied: Vec<String>,
    /// What the format cannot say of the tokenizer.
    pub loss: Option<GgufLimit>,
    /// Tokens that logits were compared on.
    pub num_tokens: i64,
    /// Largest difference of a logit to the source, where its tensors were rounded to another dtype; else they are equal.
    pub rounding: Option<f64>,
    /// What llama.cpp does not read of a GGUF file, as a sentence for the user.
    pub unread: Option<String>,
    /// Tensors of the source's files that are none of the model's: neither written nor compared.
    pub left_out: Vec<String>,
    /// `max_position_embeddings` as it is read back, where the format does not keep it.
    pub positions: Option<i64>,
    /// Of a model with an adapter, which was merged.
    pub merged: Option<Merged>,
}

/// A model that is to be written in another form.
pub struct Conversion {
    shape: Shape,
    source: Rc<TensorSource>,
    /// Of a model with an adapter.
    merge: Option<Merge>,
    /// The source's folder.
    dir: PathBuf,
    /// Its special ids, where it has no tokenizer.
    ids: SpecialIds,
    /// Goes along.
    tokenizer: Option<Tokenizer>,
    scoring: Option<Scoring>,
    target: ConvertTarget,
    /// Of all tensors; none: each as it is.
    stored: Option<StoredAs>,
    /// Of a GGUF file.
    plan: Option<Rc<gguf::Plan>>,
    /// Where logits are computed.
    device: Device,
}

impl Conversion {
    /// # Errors
    /// Of kind Config: blocks in another format than GGUF. Of kind Data: what the format cannot express. `tokenizer`: goes along
    /// instead of the model's own.
    pub fn new(
        weights: Weights,
        target: ConvertTarget,
        stored: Option<StoredAs>,
        tokenizer: Option<Tokenizer>,
        device: Device,
    ) -> Result<Conversion> {
        let (shape, dir) = (weights.shape().clone(), weights.dir().to_path_buf());
        if let Some(StoredAs::Blocks(blocks)) = stored
            && !matches!(target, ConvertTarget::Gguf)
        {
            return Err(Error::config(format!(
                "{blocks} is only for --format gguf; other formats have no such blocks"
            )));
        }
        has_place_for_head(&shape)?;
        if let ConvertTarget::Meta { .. } = target {
            shape.predicts().map_err(|e| e.context("Meta's format has no place for a scalar head"))?;
        }
        let scoring = weights.scoring()?;
        let tokenizer = match tokenizer {
            Some(given) => {
                given.check_fits(shape.vocab_size)?;
                Some(given)
            }
            None => weights.tokenizer_dir()?.map(Tokenizer::load).transpose()?,
        };
        let ids = SpecialIds::of_folder(weights.dirs()[weights.dirs().len() - 1])?;
        let (merge, source) = match weights {
            Weights::Adapted(model) if model.adapter.trainable().lora.is_some() => {
                let merge = Merge::new(model.base, model.adapter, None)?;
                let source = merge.source()?;
                (Some(merge), source)
            }
            weights => (None, weights.into_source()?),
        };
        let plan = match target {
            ConvertTarget::Gguf => Some(Rc::new(gguf::Plan::new(&shape, &source, stored)?)),
            _ => None,
        };
        let source = Rc::new(source);
        Ok(Conversion { shape, source, merge, dir, ids, tokenizer, scoring, target, stored, plan, device })
    }

    /// Bytes of the tensors as they will be.
    pub fn bytes(&self) -> Result<u64> {
        self.specs().map(|s| self.bytes_of(&s)).sum()
    }

    fn bytes_of(&self, spec: &TensorSpec) -> Result<u64> {
        match &self.plan {
            Some(plan) => Ok(plan.bytes_of(&spec.name, spec.numel())),
            None => Ok(self.entry(spec)?.bytes()),
        }
    }

    /// Writes the model to the folder, or the GGUF file, `to`: complete, checked against its source, or not at all; a model
    /// of the same format that is there is replaced. `done` counts the bytes that were written, and those that were compared.
    ///
    /// # Errors
    /// What the format cannot express (kind Data), a number of parts that does not divide the model or the source's own
    /// folder (kind Config), and any difference between what is read back and the source (kind Failed).
    pub fn write(&self, to: &Path, done: &AtomicU64) -> Result<ConvertReport> {
        if let (Ok(from), Ok(to)) = (self.dir.canonicalize(), to.canonicalize())
            && from.starts_with(&to)
        {
            return Err(Error::config(format!(
                "{}: the source model is in this folder; choose another one",
                to.display()
            )));
        }
        let mut begun = match self.target {
            ConvertTarget::Hf { max_shard_size } => self.write_hf(to, max_shard_size, done)?,
            ConvertTarget::Meta { parts } => self.write_meta(to, parts, done)?,
            ConvertTarget::Megatron(form) => self.write_megatron(to, form, done)?,
            ConvertTarget::Gguf => self.write_gguf(to, done)?,
        };
        let report = self.verify(&mut begun, done).with_context(|| {
            format!("{}: the check failed, and the written files were removed", to.display())
        })?;
        begun.unnamed.commit()?;
        Ok(report)
    }

    fn write_gguf(&self, to: &Path, done: &AtomicU64) -> Result<Begun> {
        if !is_gguf(to) {
            return Err(Error::config(format!("{}: the name of a GGUF file ends in .gguf", to.display())));
        }
        let plan = self.plan.as_ref().expect("a GGUF file has a plan");
        let name = |path: &Path| path.file_stem().map(|name| name.to_string_lossy().into_owned());
        let name = self.dir.canonicalize().ok().as_deref().and_then(name).or(name(to)).unwrap_or_default();
        let (file, loss) = plan.write(to, &self.source, self.tokenizer.as_ref(), &name, done)?;
        let copied = self.tokenizer.as_ref().map(|_| vec!["tokenizer".to_string()]).unwrap_or_default();
        Ok(Begun { unnamed: Unnamed::File(file), copied, num_files: 1, loss })
    }

    /// What makes of a tensor of the source the one that is read back.
    fn rounding(&self) -> impl Fn(&str, &Tensor) -> Result<Tensor> + 'static {
        let (plan, kind) = (self.plan.clone(), self.stored.and_then(StoredAs::kind));
        move |name, t| match (&plan, kind) {
            (Some(plan), _) => plan.rounded(name, t),
            (None, Some(kind)) => Ok(t.f_to_kind(kind)?),
            (None, None) => Ok(t.shallow_clone()),
        }
    }

    fn specs(&self) -> impl Iterator<Item = TensorSpec> {
        layouts(&self.shape).into_iter().flat_map(|l| l.specs)
    }

    /// A tensor as it is to be written.
    fn entry(&self, spec: &TensorSpec) -> Result<TensorEntry> {
        let kind = self.stored.and_then(StoredAs::kind).unwrap_or(self.source.view(&spec.name)?.kind);
        Ok(TensorEntry { name: spec.name.clone(), kind, shape: spec.shape.clone() })
    }

    fn write_hf(&self, to: &Path, max_shard_size: u64, done: &AtomicU64) -> Result<Begun> {
        let entries = self.specs().map(|s| self.entry(&s)).collect::<Result<Vec<_>>>()?;
        let plan = hf::plan(hf::as_stored(&self.shape, entries.iter().cloned()), max_shard_size);
        let ids = match &self.tokenizer {
            Some(tokenizer) => SpecialIds::of(tokenizer),
            None => self.ids.clone(),
        };
        let (dtype, tokenizer) = (most_common(&entries), self.tokenizer.as_ref());
        let (folder, copied) =
            hf::begin(to, &self.shape, dtype, ids, tokenizer, self.scoring.as_ref(), &plan)?;
        let mut output = Output::new(folder.temporary(), &plan);
        for entry in &entries {
            output.write(&self.source.tensor(&entry.name)?)?;
            done.fetch_add(entry.bytes(), Relaxed);
        }
        drop(output);
        Ok(Begun { unnamed: Unnamed::Folder(folder), copied, num_files: plan.len(), loss: None })
    }

    fn write_meta(&self, to: &Path, parts: i64, done: &AtomicU64) -> Result<Begun> {
        let parts = MetaParts::new(&self.shape, parts, self.stored.and_then(StoredAs::kind))?;
        let (folder, copied) = parts.write(to, &self.source, self.tokenizer.as_ref(), done)?;
        Ok(Begun { unnamed: Unnamed::Folder(folder), copied, num_files: parts.count(), loss: None })
    }

    fn write_megatron(&self, to: &Path, form: MegatronForm, done: &AtomicU64) -> Result<Begun> {
        let kind = self.stored.and_then(StoredAs::kind);
        let plan = MegatronPlan::new(&self.shape, &self.source, form, kind)?;
        let (folder, copied) = plan.write(to, &self.source, self.tokenizer.as_ref(), done)?;
        Ok(Begun { unnamed: Unnamed::Folder(folder), copied, num_files: plan.num_files(), loss: None })
    }

    /// Reads back what was written, and compares shape, every tensor and the logits.
    #[expect(clippy::too_many_lines, reason = "a check after the other, each on what the one before read")]
    fn verify(&self, begun: &mut Begun, done: &AtomicU64) -> Result<ConvertReport> {
        let written = begun.unnamed.temporary()?;
        let (shape, source, device) = (&self.shape, &self.source, self.device);
        let weights = Weights::open(written)?;
        let read = weights.shape().clone();
        let expected = match self.target {
            ConvertTarget::Hf { .. } => shape.clone(),
            // Not said in Meta's format, where equal embeddings are tied ones, and a Mistral without a window a Llama.
            ConvertTarget::Meta { .. } => Shape {
                max_position_embeddings: read.max_position_embeddings,
                initializer_range: read.initializer_range,
                family: read.family,
                max_window_layers: read.max_window_layers,
                tie_word_embeddings: shape.tie_word_embeddings || read.tie_word_embeddings,
                ..shape.clone()
            },
            // A family is known there by what it has alone.
            ConvertTarget::Megatron(_) => {
                Shape { family: read.family, max_window_layers: read.max_window_layers, ..shape.clone() }
            }
            // A Mistral without a window is a Llama there, too; what only training asks for is not said.
            ConvertTarget::Gguf => Shape {
                family: read.family,
                initializer_range: read.initializer_range,
                experts: shape.experts.as_ref().zip(read.experts.as_ref()).map(|(ours, read)| Experts {
                    router_aux_loss_coef: read.router_aux_loss_coef,
                    ..ours.clone()
                }),
                ..shape.clone()
            },
        };
        if read != expected {
            return Err(Error::failed(format!("it is read back as {read:?}, but the source is {shape:?}")));
        }
        let back = Rc::new(weights.into_source()?);
        let (mut num_tensors, mut bytes, mut narrowed) = (0, 0, false);
        let rounding = self.rounding();
        for spec in self.specs() {
            let (ours, theirs) = (back.tensor(&spec.name)?, source.tensor(&spec.name)?);
            let rounded = rounding(&spec.name, &theirs)?;
            if !same_bytes(&ours, &rounded)? {
                return Err(Error::failed(format!("`{}` differs when it is read back", spec.name)));
            }
            narrowed |= theirs.kind() != rounded.kind() || !rounded.f_equal(&theirs)?;
            let size = self.bytes_of(&spec)?;
            (num_tensors, bytes) = (num_tensors + 1, bytes + size);
            done.fetch_add(size, Relaxed);
        }
        type Rounding = Box<dyn Fn(&str, &Tensor) -> Result<Tensor>>;
        let of = |shape: &Shape, source: &Rc<TensorSource>, rounding: Rounding| {
            let source = source.clone();
            let tensor = move |spec: &TensorSpec| rounding(&spec.name, &source.tensor(&spec.name)?);
            logits(shape, layouts(shape), tensor, device)
        };
        let as_it_is = || -> Rounding { Box::new(|_, t| Ok(t.shallow_clone())) };
        let ours = of(&read, &back, as_it_is())?;
        let rounded = of(shape, source, Box::new(rounding))?;
        let difference = largest_difference(&ours, &rounded)?;
        if !difference.is_finite() {
            return Err(Error::data(
                "its logits are not finite: the source is damaged, or its numbers are too large for the dtype",
            ));
        }
        if difference != 0.0 {
            return Err(Error::failed(format!(
                "its logits differ from the source's by up to {difference:e}"
            )));
        }
        let unrounded = || largest_difference(&ours, &of(shape, source, as_it_is())?);
        let rounding = narrowed.then(unrounded).transpose()?;
        let positions = (read.max_position_embeddings != shape.max_position_embeddings)
            .then_some(read.max_position_embeddings);
        let num_tokens = ours.size()[0];
        if let (ConvertTarget::Gguf, Some(tokenizer)) = (self.target, &self.tokenizer) {
            check_same(tokenizer, &Tokenizer::load(written)?, begun.loss)?;
        }
        let merged = self.merge.as_ref().map(|merge| merge.check(&back, device)).transpose()?;
        Ok(ConvertReport {
            num_tensors,
            bytes,
            num_files: begun.num_files,
            copied: std::mem::take(&mut begun.copied),
            loss: begun.loss,
            num_tokens,
            rounding,
            unread: self.plan.as_ref().and_then(|plan| plan.left_out()),
            left_out: source.left_out.clone(),
            positions,
            merged,
        })
    }
}

/// What was written, and what a [`ConvertReport`] tells of it.
struct Begun {
    unnamed: Unnamed,
    copied: Vec<String>,
    num_files: usize,
    loss: Option<GgufLimit>,
}

/// What has no name yet.
enum Unnamed {
    Folder(AtomicFolder),
    File(AtomicFile),
}

impl Unnamed {
    fn temporary(&mut self) -> Result<&Path> {
        match self {
            Unnamed::Folder(folder) => Ok(folder.temporary()),
            Unnamed::File(file) => file.temporary(),
        }
    }

    fn commit(self) -> Result<()> {
        match self {
            Unnamed::Folder(folder) => folder.commit(),
            Unnamed::File(file) => file.commit(),
        }
    }
}

/// The dtype that most bytes have.
pub(super) fn most_common(entries: &[TensorEntry]) -> Kind {
    let bytes = |kind: Kind| entries.iter().filter(|e| e.kind == kind).map(TensorEntry::bytes).sum::<u64>();
    let kinds = [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double];
    kinds.into_iter().max_by_key(|kind| bytes(*kind)).unwrap_or(Kind::Float)
}

/// Whether two tensors have the same dtype, shape and bits.
fn same_bytes(a: &Tensor, b: &Tensor) -> Result<bool> {
    let bits = match a.kind().elt_size_in_bytes() {
        2 => Kind::Int16,
        4 => Kind::Int,
        _ => Kind::Int64,
    };
    Ok(a.kind() == b.kind()
        && a.size() == b.size()
        && a.f_view_dtype(bits)?.f_equal(&b.f_contiguous()?.f_view_dtype(bits)?)?)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    Ok((a - b).f_abs()?.f_max()?.f_double_value(&[])?)
}

/// Logits [T, V] of a fixed text in float32. `tensor(spec)` gives a tensor when it is needed, group by group.
pub(super) fn logits(
    shape: &Shape,
    groups: impl IntoIterator<Item = impl Into<GroupPlan>>,
    tensor: impl Fn(&TensorSpec) -> Result<Tensor> + 'static,
    device: Device,
) -> Result<Tensor> {
    let time = TOKENS.min(shape.max_position_embeddings);
    let ids: Vec<i64> = (0..time).map(|i| (i + 1) * 7919 % shape.vocab_size).collect();
    logits_of(shape, groups, tensor, device, &ids)
}

/// [`logits`] of these tokens.
pub(super) fn logits_of(
    shape: &Shape,
    groups: impl IntoIterator<Item = impl Into<GroupPlan>>,
    tensor: impl Fn(&TensorSpec) -> Result<Tensor> + 'static,
    device: Device,
    ids: &[i64],
) -> Result<Tensor> {
    let load = move |layout: &Layout| -> Result<Tensor> {
        let flat = Tensor::f_empty([layout.numel], (Kind::Float, Device::Cpu))?;
        for spec in &layout.specs {
            flat.f_narrow(0, spec.offset, spec.numel())?.f_copy_(&tensor(spec)?.f_view([-1])?)?;
        }
        Ok(flat)
    };
    let params = Sharded::on_demand(groups, Kind::Float, device, load);
    let mut model = Llama::new(shape.clone(), params);
    let time = ids.len() as i64;
    let hidden = model.hidden(&ModelInput::new(Tensor::from_slice(ids).view([1, time])))?;
    Ok(model.next_token_logits(&hidden)?.f_to_device(Device::Cpu)?)
}
