//! From one format into another. What was written is read again and compared before it gets its name.
//!
//! One tensor is in memory at a time, and for the comparison of logits two groups of parameters: a model need not fit
//! into memory to be converted.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tch::{Device, Kind, Tensor};

use super::gguf;
use super::hf::{self, Output, write_tokenizer};
use super::hf_config::SpecialIds;
use super::merge::{Merge, Merged};
use super::meta::{self, PARAMS, TensorCut};
use super::ours::Scoring;
use super::safetensors::TensorEntry;
use super::source::{RowOrder, TensorSource};
use super::torch_file;
use super::weights::Weights;
use crate::config::shape::{Experts, Shape};
use crate::data::tokenizer::gguf::{GgufLimit, check_same};
use crate::data::tokenizer::{Tokenizer, is_tokenizer_file};
use crate::distributed::plan::GroupPlan;
use crate::distributed::sharded::{Layout, Sharded, TensorSpec};
use crate::error::{Context, Error, Result};
use crate::files::{AtomicFile, AtomicFolder, write_file};
use crate::gguf::{GgufDtype, is_gguf};
use crate::model::layout::{EMBEDDING, LM_HEAD, layouts};
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
    /// Of kind Config: blocks in another format than GGUF. Of kind Data: what the format cannot express.
    pub fn new(
        weights: Weights,
        target: ConvertTarget,
        stored: Option<StoredAs>,
        device: Device,
    ) -> Result<Conversion> {
        let (shape, dir) = (weights.shape().clone(), weights.dir().to_path_buf());
        if let (Some(StoredAs::Blocks(blocks)), ConvertTarget::Hf { .. } | ConvertTarget::Meta { .. }) =
            (stored, target)
        {
            return Err(Error::config(format!(
                "{blocks} is only for --format gguf; other formats have no such blocks"
            )));
        }
        if let ConvertTarget::Meta { .. } = target {
            shape.predicts().map_err(|e| e.context("Meta's format has no place for a scalar head"))?;
        }
        let scoring = weights.scoring()?;
        let tokenizer = weights.tokenizer_dir()?.map(Tokenizer::load).transpose()?;
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
            ConvertTarget::Hf { .. } | ConvertTarget::Meta { .. } => None,
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
            && from == to
        {
            return Err(Error::config(format!(
                "{}: the source model is in this folder; choose another one",
                to.display()
            )));
        }
        let mut begun = match self.target {
            ConvertTarget::Hf { max_shard_size } => self.write_hf(to, max_shard_size, done)?,
            ConvertTarget::Meta { parts } => self.write_meta(to, parts, done)?,
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
        let (shape, source) = (&self.shape, &self.source);
        // A tied output projection has a copy of its own there.
        let untied = Shape { tie_word_embeddings: false, ..shape.clone() };
        let params = meta::write_params(&untied)?;
        meta::check_parts(shape, parts)?;
        let ours = |name: &str| {
            name == PARAMS
                || (name.starts_with("consolidated.") && name.ends_with(".pth"))
                || is_tokenizer_file(name)
        };
        let tensors = layouts(&untied)
            .into_iter()
            .flat_map(|l| l.specs)
            .map(|spec| {
                let tied = shape.tie_word_embeddings && spec.name == LM_HEAD;
                let from = if tied { EMBEDDING.to_string() } else { spec.name.clone() };
                let named = meta::named(&spec.name).ok_or_else(|| {
                    Error::failed(format!("Meta's format has no place for `{}`", spec.name))
                })?;
                let cut = match named.cut {
                    TensorCut::Embedding if meta::is_llama3(shape) => TensorCut::Rows,
                    TensorCut::Embedding => TensorCut::Columns,
                    cut => cut,
                };
                let mut shape = spec.shape;
                match cut {
                    TensorCut::Columns => shape[1] /= parts,
                    TensorCut::Rows => shape[0] /= parts,
                    TensorCut::Copy | TensorCut::Embedding => {}
                }
                let kind = self.stored.and_then(StoredAs::kind).unwrap_or(source.view(&from)?.kind);
                Ok((TensorEntry { name: named.name, kind, shape }, from, cut, named.rotary))
            })
            .collect::<Result<Vec<_>>>()?;

        let folder = AtomicFolder::create(to, ours)?;
        let temp = folder.temporary();
        write_file(&temp.join(PARAMS), format!("{params}\n").as_bytes())?;
        let copied = self.tokenizer.as_ref().map_or(Ok(Vec::new()), |t| write_tokenizer(t, temp))?;
        let copied = copied.into_iter().map(|(name, ..)| name).collect();
        let entries: Vec<TensorEntry> = tensors.iter().map(|(entry, ..)| entry.clone()).collect();
        let mut files = (0..parts as usize)
            .map(|i| torch_file::TorchWriter::create(&temp.join(meta::part_name(i)), &entries))
            .collect::<Result<Vec<_>>>()?;
        for (entry, from, cut, rotary) in &tensors {
            let whole = source.tensor(from)?;
            for (i, file) in files.iter_mut().enumerate() {
                let part = match cut {
                    TensorCut::Rows => whole.f_narrow(0, i as i64 * entry.shape[0], entry.shape[0])?,
                    TensorCut::Columns => whole.f_narrow(1, i as i64 * entry.shape[1], entry.shape[1])?,
                    TensorCut::Copy | TensorCut::Embedding => whole.shallow_clone(),
                };
                file.write(&if *rotary { to_meta_order(&part, shape.head_dim)? } else { part })?;
            }
            done.fetch_add(entry.bytes() * parts as u64, Relaxed);
        }
        files.into_iter().try_for_each(torch_file::TorchWriter::finish)?;
        Ok(Begun { unnamed: Unnamed::Folder(folder), copied, num_files: parts as usize, loss: None })
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

/// The rows of whole heads [H D, C] in Meta's order.
pub(super) fn to_meta_order(t: &Tensor, head_dim: i64) -> Result<Tensor> {
    let (order, rows) = (RowOrder::MetaRotary { head_dim }, t.size()[0]);
    let mut from = vec![0; rows as usize];
    (0..rows).for_each(|row| from[order.row(row) as usize] = row);
    Ok(t.f_index_select(0, &Tensor::from_slice(&from))?)
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
    let load = move |layout: &Layout| -> Result<Tensor> {
        let flat = Tensor::f_empty([layout.numel], (Kind::Float, Device::Cpu))?;
        for spec in &layout.specs {
            flat.f_narrow(0, spec.offset, spec.numel())?.f_copy_(&tensor(spec)?.f_view([-1])?)?;
        }
        Ok(flat)
    };
    let params = Sharded::on_demand(groups, Kind::Float, device, load);
    let mut model = Llama::new(shape.clone(), params);
    let time = TOKENS.min(shape.max_position_embeddings);
    let ids: Vec<i64> = (0..time).map(|i| (i + 1) * 7919 % shape.vocab_size).collect();
    let hidden = model.hidden(&ModelInput::new(Tensor::from_slice(&ids).view([1, time])))?;
    Ok(model.next_token_logits(&hidden)?.f_to_device(Device::Cpu)?)
}
