//! Models in Megatron's formats, written.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tch::{Kind, Tensor};

use super::names::{CoreTensor, RankDivision, StageHolder, VocabRows, core_tensors, expressible};
use super::namespace::namespace;
use super::ranks::{FILE, rank_folder};
use super::shared_write::SharedFiles;
use super::{TRACKER, WRITTEN_ITERATION};
use crate::checkpoint::hf::write_tokenizer;
use crate::checkpoint::pickle::Pickled;
use crate::checkpoint::safetensors::TensorEntry;
use crate::checkpoint::source::TensorSource;
use crate::checkpoint::torch_file::TorchWriter;
use crate::config::shape::Shape;
use crate::data::tokenizer::{Tokenizer, is_tokenizer_file};
use crate::error::{Error, Result};
use crate::files::{AtomicFolder, create_dir, write_file};

/// How a model is stored for Megatron.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MegatronForm {
    /// In the format `torch_dist` rather than `torch`.
    pub shared: bool,
    /// Tensor-parallel ranks.
    pub tensor: i64,
    /// Pipeline stages.
    pub pipeline: i64,
    /// The vocabulary is padded to a multiple of this times `tensor`; none: not padded.
    pub vocab_multiple: Option<i64>,
    /// Names in the format `torch`: those of Transformer Engine's layers rather than Megatron's own.
    pub engine: bool,
}

/// A model to be written in one of Megatron's formats.
pub(in crate::checkpoint) struct MegatronPlan {
    pub(super) form: MegatronForm,
    pub(super) shape: Shape,
    /// Rows of the embedding, with padding.
    pub(super) padded_rows: i64,
    /// With the dtype that each is written in.
    pub(super) tensors: Vec<(CoreTensor, Kind)>,
}

impl MegatronPlan {
    /// # Errors
    /// Of kind Data: what the format cannot express. Of kind Config: ranks or stages that do not divide the model.
    pub fn new(
        shape: &Shape,
        source: &TensorSource,
        form: MegatronForm,
        kind: Option<Kind>,
    ) -> Result<MegatronPlan> {
        expressible(shape)?;
        check_ranks(shape, form)?;
        let multiple = form.vocab_multiple.unwrap_or(1).saturating_mul(form.tensor);
        let padded_rows = match form.vocab_multiple {
            Some(_) => shape.vocab_size.saturating_add(multiple - 1) / multiple * multiple,
            None => shape.vocab_size,
        };
        let rows = VocabRows { embedding: padded_rows, head: padded_rows };
        let tensors = core_tensors(shape, rows).into_iter().map(|tensor| {
            let kinds = tensor.runs.iter().map(|run| source.view(&run.tensor).map(|view| view.kind));
            let kinds = kinds.collect::<Result<Vec<_>>>()?;
            match kind {
                Some(kind) => Ok((tensor, kind)),
                None if kinds.iter().all(|kind| *kind == kinds[0]) => Ok((tensor, kinds[0])),
                None => Err(Error::config(format!(
                    "`{}` and `{}`, which are one tensor there, differ in their dtypes: choose one with --dtype",
                    tensor.runs[0].tensor,
                    tensor.runs[tensor.runs.len() - 1].tensor
                ))),
            }
        });
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        Ok(MegatronPlan { form, shape: shape.clone(), padded_rows, tensors })
    }

    /// The dtype that most numbers have.
    pub fn kind(&self) -> Kind {
        let numbers = |kind: Kind| {
            let of_kind = self.tensors.iter().filter(|(_, other)| *other == kind);
            of_kind.map(|(tensor, _)| tensor.shape.iter().product::<i64>()).sum::<i64>()
        };
        let kinds = [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double];
        kinds.into_iter().max_by_key(|kind| numbers(*kind)).unwrap_or(Kind::Float)
    }

    /// Files with tensors.
    pub fn num_files(&self) -> usize {
        (self.form.tensor * self.form.pipeline) as usize
    }

    /// The stage that has a tensor.
    pub(super) fn stage(&self, holder: StageHolder) -> i64 {
        match holder {
            StageHolder::First => 0,
            StageHolder::Last => self.form.pipeline - 1,
            StageHolder::Layer(layer) => layer / (self.shape.num_hidden_layers / self.form.pipeline),
        }
    }

    /// Writes a folder that has no name yet, and tells which files of the tokenizer went along. `done` counts bytes.
    pub fn write(
        &self,
        to: &Path,
        source: &TensorSource,
        tokenizer: Option<&Tokenizer>,
        done: &AtomicU64,
    ) -> Result<(AtomicFolder, Vec<String>)> {
        let iteration = format!("iter_{WRITTEN_ITERATION:07}");
        let ours = |name: &str| name == TRACKER || name == iteration || is_tokenizer_file(name);
        let folder = AtomicFolder::create(to, ours)?;
        let temp = folder.temporary();
        let copied = tokenizer.map_or(Ok(Vec::new()), |t| write_tokenizer(t, temp))?;
        let inner = temp.join(iteration);
        create_dir(&inner)?;
        match self.form.shared {
            true => self.write_shared(&inner, source, done)?,
            false => self.write_ranks(&inner, source, done)?,
        }
        write_file(&temp.join(TRACKER), WRITTEN_ITERATION.to_string().as_bytes())?;
        Ok((folder, copied.into_iter().map(|(name, ..)| name).collect()))
    }

    fn write_shared(&self, iteration: &Path, source: &TensorSource, done: &AtomicU64) -> Result<()> {
        let mut files = SharedFiles::create(self, iteration)?;
        for (tensor, kind) in &self.tensors {
            files.write(tensor, &assemble(tensor, *kind, source, done)?)?;
        }
        files.finish(&self.checkpoint(None))
    }

    fn write_ranks(&self, iteration: &Path, source: &TensorSource, done: &AtomicU64) -> Result<()> {
        let (ranks, stages) = (self.form.tensor, self.form.pipeline);
        let mut files = Vec::new();
        for stage in 0..stages {
            let entries = self.entries(stage)?;
            for rank in 0..ranks {
                let leaf = rank_folder(iteration, rank, (stages > 1).then_some(stage));
                let model = self.checkpoint(Some(self.model(&entries)));
                files.push(TorchWriter::create_with(&leaf.join(FILE), &model, &entries)?);
            }
        }
        let mut put = |tensor: &CoreTensor, whole: &Tensor, stage: i64| -> Result<()> {
            for rank in 0..ranks {
                let parts = parts_of_rank(tensor, whole, rank, ranks)?;
                let part = Tensor::f_cat(&parts.iter().map(|(part, _)| part).collect::<Vec<_>>(), 0)?;
                files[(stage * ranks + rank) as usize].write(&part)?;
            }
            Ok(())
        };
        for (tensor, kind) in &self.tensors {
            put(tensor, &assemble(tensor, *kind, source, done)?, self.stage(tensor.holder))?;
        }
        if let Some((head, kind)) = self.tied_head() {
            put(&head, &assemble(&head, kind, source, &AtomicU64::new(0))?, stages - 1)?;
        }
        files.into_iter().try_for_each(TorchWriter::finish)
    }

    /// The embedding on the last of several stages, where it is the output projection, too.
    fn tied_head(&self) -> Option<(CoreTensor, Kind)> {
        let (embedding, kind) = &self.tensors[0];
        let name = "output_layer.weight".to_string();
        (self.shape.tie_word_embeddings && self.form.pipeline > 1).then(|| {
            let head = CoreTensor {
                holder: StageHolder::Last,
                local: name.clone(),
                engine: name,
                ..embedding.clone()
            };
            (head, *kind)
        })
    }

    /// What a stage's files have, in their order.
    pub(super) fn entries(&self, stage: i64) -> Result<Vec<TensorEntry>> {
        let each = self.shape.num_hidden_layers / self.form.pipeline;
        let tied = self.tied_head();
        let tensors = self.tensors.iter().chain(&tied).filter(|(t, _)| self.stage(t.holder) == stage);
        let entry = |(tensor, kind): &(CoreTensor, Kind)| {
            let name = if self.form.engine { &tensor.engine } else { &tensor.local };
            let name = match tensor.holder {
                StageHolder::Layer(layer) => format!("decoder.layers.{}.{name}", layer % each),
                StageHolder::First | StageHolder::Last => name.clone(),
            };
            Ok(TensorEntry { name, kind: *kind, shape: tensor.shape_of_rank(self.form.tensor)? })
        };
        tensors.map(entry).collect()
    }

    /// The dictionary `model` of a rank: its tensors, and for every product the state that loaders ask for, although it is empty.
    fn model(&self, entries: &[TensorEntry]) -> Pickled {
        let mut model = Vec::new();
        for TensorEntry { name, kind, shape } in entries {
            model.push((name.clone(), Pickled::Tensor { kind: *kind, shape: shape.clone() }));
            let mut state = |module: &str| model.push((format!("{module}._extra_state"), Pickled::None));
            // Experts of one module have weights with numbers.
            let Some((module, "weight" | "weight0")) = name.rsplit_once('.') else { continue };
            let last = module.rsplit_once('.').map_or(module, |(_, last)| last);
            let norm = self.form.engine && last.ends_with("layernorm");
            if last.starts_with("linear_") || last == "output_layer" || norm {
                state(module);
            }
            if let Some(attention) = module.strip_suffix("linear_proj").filter(|_| self.form.engine) {
                state(&format!("{attention}core_attention"));
            }
        }
        Pickled::dict(model)
    }

    /// What a checkpoint holds besides tensors, and the `model` that it may hold itself.
    pub(super) fn checkpoint(&self, model: Option<Pickled>) -> Pickled {
        let mut entries = vec![
            ("args", namespace(self)),
            ("checkpoint_version", Pickled::Number(3.0)),
            ("iteration", Pickled::Integer(WRITTEN_ITERATION)),
        ];
        entries.extend(model.map(|model| ("model", model)));
        entries.push(("num_floating_point_operations_so_far", Pickled::Integer(0)));
        Pickled::dict(entries)
    }
}

/// Puts a tensor of Megatron's together, and pads it. `done` counts the model's bytes.
fn assemble(tensor: &CoreTensor, kind: Kind, source: &TensorSource, done: &AtomicU64) -> Result<Tensor> {
    let mut read: HashMap<&str, Tensor> = HashMap::new();
    let mut parts = Vec::new();
    for run in &tensor.runs {
        if !read.contains_key(run.tensor.as_str()) {
            let t = source.tensor(&run.tensor)?.f_to_kind(kind)?;
            done.fetch_add(t.numel() as u64 * kind.elt_size_in_bytes() as u64, Relaxed);
            read.insert(&run.tensor, t);
        }
        parts.push(read[run.tensor.as_str()].f_narrow(0, run.first, run.rows)?);
    }
    let rows: i64 = tensor.runs.iter().map(|run| run.rows).sum();
    let missing = tensor.shape[0] - rows;
    if missing > 0 {
        // As Megatron's own converter pads.
        let last = parts[parts.len() - 1].f_slice(0, -1, i64::MAX, 1)?;
        parts.push(last.f_expand([missing, tensor.shape[1]], false)?);
    }
    Ok(match parts.as_slice() {
        [only] => only.shallow_clone(),
        _ => Tensor::f_cat(&parts, 0)?,
    })
}

/// What a rank has of a tensor: the parts that lie one below the other in its file, each with the row and the column that it begins
/// with in the whole.
pub(super) fn parts_of_rank(
    tensor: &CoreTensor,
    whole: &Tensor,
    rank: i64,
    ranks: i64,
) -> Result<Vec<(Tensor, [i64; 2])>> {
    let part = |dim: i64, first: i64, len: i64| -> Result<(Tensor, [i64; 2])> {
        let mut at = [0; 2];
        at[dim as usize] = first;
        Ok((whole.f_narrow(dim, first, len)?, at))
    };
    let shape = tensor.shape_of_rank(ranks)?;
    match tensor.division {
        RankDivision::Copies => Ok(vec![(whole.shallow_clone(), [0, 0])]),
        RankDivision::Rows => Ok(vec![part(0, rank * shape[0], shape[0])?]),
        RankDivision::Columns => Ok(vec![part(1, rank * shape[1], shape[1])?]),
        RankDivision::HalvesByRows => {
            let (half, len) = (tensor.shape[0] / 2, tensor.shape[0] / 2 / ranks);
            Ok(vec![part(0, rank * len, len)?, part(0, half + rank * len, len)?])
        }
    }
}

/// Refuses numbers of ranks and stages that do not divide a model as Megatron wants it.
fn check_ranks(s: &Shape, form: MegatronForm) -> Result<()> {
    let (ranks, stages) = (form.tensor, form.pipeline);
    if s.num_hidden_layers % stages != 0 {
        return Err(Error::config(format!(
            "--pipeline {stages}: num_hidden_layers ({}) is not divisible by it",
            s.num_hidden_layers
        )));
    }
    let vocab_size = if form.vocab_multiple.is_some() { 0 } else { s.vocab_size };
    let cut = |ranks: i64| {
        let groups = s.num_key_value_heads;
        let of_groups = if groups % ranks == 0 || ranks % groups == 0 { 0 } else { groups };
        [
            ("num_attention_heads", s.num_attention_heads % ranks, s.num_attention_heads),
            ("num_key_value_heads", of_groups, groups),
            ("intermediate_size", s.intermediate_size % ranks, s.intermediate_size),
            ("vocab_size", vocab_size % ranks, s.vocab_size),
        ]
    };
    let Some((name, _, n)) = cut(ranks).into_iter().find(|(_, rest, _)| *rest != 0) else { return Ok(()) };
    let fit = |ranks: &i64| cut(*ranks).iter().all(|(_, rest, _)| *rest == 0);
    let fitting: Vec<String> = (1..=64).filter(fit).map(|n| n.to_string()).collect();
    let padding = match name {
        "vocab_size" => "; --make-vocab-size-divisible-by pads it",
        _ => "",
    };
    Err(Error::config(format!(
        "--tensor {ranks}: {name} ({n}) is not divisible by it; {} would do{padding}",
        fitting.join(", ")
    )))
}
