//! Adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors` (`.bin` is read), whose tensors have the
//! model's names after `base_model.model.`. What PEFT has no place for is in `corral.json`.

mod config;
mod joined;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tch::{Kind, Tensor};

use self::config::{DescribedAdapter, read_config, unread};
use self::joined::{Joined, JoinedTensor, Patterns};
use super::hf::write_tokenizer;
use super::hf_config::read_object;
use super::named::{ModelFolder, tokenizer_of};
use super::ours::{OURS, Ours, Scoring};
use super::safetensors::{self, SafetensorsWriter, TensorEntry};
use super::sharded::Checkpoint;
use super::source::TensorSource;
use super::tensor_hash::TensorHash;
use super::torch_file;
use super::unfit::{Unfit, common_prefix};
use super::weights::Weights;
use crate::config::shape::{Head, Shape};
use crate::data::tokenizer::{Tokenizer, is_tokenizer_file};
use crate::distributed::agree::agree;
use crate::distributed::plan::{Role, adapter_names};
use crate::distributed::sharded::{Sharded, TensorSpec};
use crate::error::{Context, Error, Result};
use crate::files::{AtomicFolder, exists, is_file, write_file};
use crate::model::Trainable;
use crate::model::layout::EMBEDDING;
use crate::model::trainable::{last_part, module};
use crate::telemetry::console::warn_once;
use kernels::comm::Group;

pub const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const OLD_WEIGHTS: &str = "adapter_model.bin";
const PREFIX: &str = "base_model.model.";

/// An adapter on disk, in PEFT's format or in a checkpoint: its configuration, and the header of its tensors. A checkpoint
/// of a run with `freeze` is one, too: of tensors that were trained as a whole.
pub struct PeftAdapter {
    dir: PathBuf,
    trainable: Trainable,
    /// The model has a scalar head, whatever its base has.
    scored: bool,
    /// Of a model with a scalar head.
    scoring: Option<Scoring>,
    base: Option<String>,
    /// Of the model with the adapter, where that may be another than its base's.
    vocab_size: Option<i64>,
    /// Its tensors, by the names in PEFT's files; once it was checked, by the model's names after the same beginning.
    source: TensorSource,
    /// What PEFT says of single modules.
    patterns: Patterns,
}

/// `task_type` of a model with a scalar head.
const SEQ_CLS: &str = "SEQ_CLS";

impl PeftAdapter {
    /// # Errors
    /// Of kind Data: files that are missing or damaged; kinds of adapters and options that are not built.
    pub fn open(dir: &Path) -> Result<PeftAdapter> {
        let path = dir.join(CONFIG);
        let config = read_object(&path)?;
        let DescribedAdapter { trainable, base, patterns } =
            read_config(&config).map_err(|e| Error::data(e).context(path.display()))?;
        if let Some(unread) = unread(&config) {
            warn_once(&format!("{}: {unread}", path.display()));
        }
        let scored = config.get("task_type").is_some_and(|t| t == SEQ_CLS);
        let (source, ours) = (open_weights(dir)?, Ours::read(dir)?);
        let vocab_size = source.view(&format!("{PREFIX}{EMBEDDING}")).ok().map(|v| v.shape[0]);
        let (dir, scoring) = (dir.to_path_buf(), ours.reward);
        let mut adapter = PeftAdapter { dir, trainable, scored, scoring, base, vocab_size, source, patterns };
        if let (Some(lora), Some(base)) = (&mut adapter.trainable.lora, ours.base) {
            lora.base = base;
        }
        Ok(adapter)
    }

    /// What a checkpoint holds of a run that did not train all of its model; none where it did.
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Option<PeftAdapter>> {
        let meta = checkpoint.meta();
        let Some(base) = &meta.base else { return Ok(None) };
        let mut source = checkpoint.source()?;
        source.views = source.views.drain().map(|(name, view)| (format!("{PREFIX}{name}"), view)).collect();
        Ok(Some(PeftAdapter {
            dir: checkpoint.dir().to_path_buf(),
            trainable: base.trainable.clone(),
            scored: meta.shape.head == Head::Score,
            scoring: meta.scoring.clone(),
            base: Some(base.path.clone()),
            vocab_size: Some(meta.shape.vocab_size),
            source,
            patterns: Patterns::default(),
        }))
    }

    /// The adapter that `path` names: in PEFT's format, in a checkpoint, or in the folder of the run that trained it (see
    /// [`ModelFolder::find`]).
    ///
    /// # Errors
    /// Of kind Data: there is none, or a whole model.
    pub fn find(path: &Path) -> Result<PeftAdapter> {
        let whole = |dir: &Path| {
            Error::data(format!(
                "{}: no adapter, but a whole model: use it as it is, or write it in another format with `corral convert \
                 --from {}`",
                dir.display(),
                path.display()
            ))
        };
        match ModelFolder::find(path)? {
            ModelFolder::Adapter(dir) => PeftAdapter::open(&dir),
            ModelFolder::Checkpoint(dir) => {
                PeftAdapter::of_checkpoint(&Checkpoint::open(&dir)?)?.ok_or_else(|| whole(&dir))
            }
            ModelFolder::Hf(dir)
            | ModelFolder::Meta(dir)
            | ModelFolder::Megatron(dir)
            | ModelFolder::Gguf(dir) => Err(whole(&dir)),
        }
    }

    /// The folder of the adapter, or of the checkpoint that it was read from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The shape of a model of shape `base` with the adapter, which may have an embedding of more rows.
    pub fn shape(&self, base: &Shape) -> Shape {
        let mut shape = if self.scored { base.scored() } else { base.clone() };
        shape.vocab_size = shape.vocab_size.max(self.vocab_size.unwrap_or(0));
        shape
    }

    /// How a scalar head's values become a reward; none where nothing is said.
    pub fn scoring(&self) -> Option<&Scoring> {
        self.scoring.as_ref()
    }

    /// What was trained, and how the base was kept.
    pub fn trainable(&self) -> &Trainable {
        &self.trainable
    }

    /// Where the model that the adapter was trained for lies: as the adapter names it, seen from its folder if it is there.
    pub fn base(&self) -> Result<PathBuf> {
        let base = self.base.as_ref().ok_or_else(|| {
            Error::data(format!(
                "{}: base_model_name_or_path is empty, so the base model is unknown; set it to the model's folder",
                self.dir.join(CONFIG).display()
            ))
        })?;
        let beside = self.dir.join(base);
        Ok(if exists(&beside)? { beside } else { base.into() })
    }

    /// Opens the model that the adapter was trained for.
    ///
    /// # Errors
    /// Of kind Data: it is not there, or unusable; how to name another place is told.
    pub fn open_base(&self) -> Result<Weights> {
        let (base, dir) = (self.base()?, self.dir.display());
        let moved = |e: Error| match base.exists() {
            true => e,
            false => Error {
                message: format!(
                    "{}; if it has moved, name it: `corral merge --adapter {dir} --model DIR --output DIR`",
                    e.message
                ),
                ..e
            },
        };
        Weights::open(&base).map_err(moved).with_context(|| format!("the base model of {dir}"))
    }

    /// Of its adapters; 0 without any.
    fn rank(&self) -> i64 {
        self.trainable.lora.as_ref().map_or(0, |lora| lora.rank)
    }

    /// The tensors that the adapter consists of for a model of this shape, under the model's names.
    fn wanted(&self, shape: &Shape) -> Result<Vec<(String, Vec<i64>)>> {
        let mut wanted = Vec::new();
        for plan in self.trainable.plans(shape)? {
            let saved = plan.layout.specs.iter().zip(&plan.roles).filter(|(_, role)| **role == Role::Trained);
            wanted.extend(saved.map(|(spec, _)| (spec.name.clone(), spec.shape.clone())));
            for adapter in &plan.adapters {
                let names = adapter_names(&plan.layout.specs[adapter.target].name);
                wanted.extend(names.into_iter().zip(adapter.shapes(&plan.layout)));
            }
        }
        Ok(wanted)
    }

    /// Refuses an adapter whose tensors are not those that its configuration asks for on a model of this shape. Names in the
    /// configuration that the model does not have are passed over, with a warning, as PEFT does.
    pub fn check(&mut self, shape: &Shape) -> Result<()> {
        if let Some(lora) = &mut self.trainable.lora {
            joined::split(&mut self.source, lora, std::mem::take(&mut self.patterns), shape)
                .with_context(|| self.dir.display().to_string())?;
        }
        let forgotten = self.trainable.forget_missing(shape);
        let wanted = self.wanted(shape).map_err(|e| Error::data(e.message).context(self.dir.display()))?;
        let wanted: BTreeMap<String, Vec<i64>> =
            wanted.into_iter().map(|(name, size)| (format!("{PREFIX}{name}"), size)).collect();
        let there: BTreeSet<&str> = self.source.names().map(String::as_str).collect();
        let names: BTreeSet<&str> = wanted.keys().map(String::as_str).collect();
        let mut unfit = Unfit { hint: common_prefix(&names, &there), ..Unfit::default() };
        for (name, size) in &wanted {
            if !there.contains(name.as_str()) {
                unfit.missing.push(format!("`{name}` {size:?} is missing"));
                continue;
            }
            let found = &self.source.view(name)?.shape;
            if found != size {
                unfit.wrong.push(format!("`{name}` is {found:?} and should be {size:?}"));
            }
        }
        unfit.extra = there.difference(&names).map(|n| format!("`{n}` has no place in the model")).collect();
        unfit.into_result(&format!(
            "{}: the adapter does not fit its configuration and the model",
            self.dir.display()
        ))?;
        if !forgotten.is_empty() {
            warn_once(&format!(
                "{}: the model has no {}, and the adapter has no tensors for it: not used",
                self.dir.join(CONFIG).display(),
                forgotten.join(", ")
            ));
        }
        Ok(())
    }

    /// Whether the adapter has this tensor of the model, trained as a whole or part of an adapter.
    pub fn has(&self, name: &str) -> bool {
        self.source.views.contains_key(&format!("{PREFIX}{name}"))
    }

    /// The dtype of a tensor of the adapter, by the model's name; none where it has no such tensor.
    pub fn kind(&self, name: &str) -> Option<Kind> {
        self.source.views.get(&format!("{PREFIX}{name}")).map(|view| view.kind)
    }

    /// Fills `values` with elements `first..` of a tensor, which goes by the model's name.
    pub fn read(&self, name: &str, first: i64, values: &tch::Tensor) -> Result<()> {
        self.source.read(&format!("{PREFIX}{name}"), first, values)
    }

    /// A tensor of the adapter's, by the model's name.
    pub fn tensor(&self, name: &str) -> Result<tch::Tensor> {
        self.source.tensor(&format!("{PREFIX}{name}"))
    }

    /// The folder with its tokenizer, if it has one.
    pub fn tokenizer_dir(&self) -> Result<Option<PathBuf>> {
        tokenizer_of(&self.dir)
    }

    /// Fills the adapters, and what was trained as a whole, of which the vocabulary may be larger now (see [`super::grow`]).
    /// Returns the hash of those of them that are not trained. Collective over the ranks that hold the parameters.
    pub fn fill(&self, params: &mut Sharded) -> Result<TensorHash> {
        let rows = self.vocab_size.unwrap_or(i64::MAX);
        let wanted = |spec: &TensorSpec| self.has(&spec.name);
        self.source.fill_where(params, rows, wanted, |name| format!("{PREFIX}{name}"))
    }

    /// The hash of its tensors, as [`PeftAdapter::fill`] gives it where nothing is trained. The ranks of `group` read them
    /// together. Collective.
    pub fn hash(&self, group: &Group) -> Result<TensorHash> {
        let mut names: Vec<&String> = self.source.names().collect();
        names.sort();
        let renamed = names.iter().map(|name| (name.as_str(), name.strip_prefix(PREFIX).unwrap_or(name)));
        self.source.hash(renamed, group)
    }
}

fn open_weights(dir: &Path) -> Result<TensorSource> {
    let (path, old) = (dir.join(WEIGHTS), dir.join(OLD_WEIGHTS));
    Ok(TensorSource::of_files(vec![match !is_file(&path)? && is_file(&old)? {
        true => Box::new(torch_file::TorchReader::open(&old)?),
        false => Box::new(safetensors::SafetensorsReader::open(&path)?),
    }]))
}

/// An adapter that was written.
pub struct WrittenAdapter {
    /// The model that it is for.
    pub base: String,
    pub num_tensors: usize,
    /// Of the tensors.
    pub bytes: u64,
}

impl PeftAdapter {
    /// Writes the adapter for a model of this shape to the folder `to`, in PEFT's format: complete, read back and compared,
    /// or not at all. `dtype`: of all tensors; none: each as it is.
    ///
    /// # Errors
    /// Of kind Data: tensors that do not fit the model, or that are no adapter; of kind Config: `to` is the adapter's folder.
    pub fn write(&mut self, to: &Path, shape: &Shape, dtype: Option<Kind>) -> Result<WrittenAdapter> {
        let dir = self.dir.display().to_string();
        if let (Ok(from), Ok(to)) = (self.dir.canonicalize(), to.canonicalize())
            && from == to
        {
            return Err(Error::config(format!(
                "{dir}: the source adapter is in this folder; choose another one"
            )));
        }
        if self.trainable.lora.is_none() {
            return Err(Error::data(format!(
                "{dir}: parts of the model were trained in full, without an adapter; write the model: --format hf"
            )));
        }
        self.check(shape)?;
        let base = match self.base()? {
            base if base.exists() => base.canonicalize().unwrap_or(base),
            base => base,
        };
        let base = base.to_string_lossy().into_owned();
        let tokenizer = self.tokenizer_dir()?.map(|dir| Tokenizer::load(&dir)).transpose()?;
        let (tokenizer, scoring) = (tokenizer.as_ref(), self.scoring.as_ref());
        let how = AdapterExport { trainable: &self.trainable, shape, base: &base, tokenizer, scoring };
        let folder = begin(to, &how)?;
        let kind = |name: &str| match dtype {
            Some(dtype) => Ok(dtype),
            None => Ok::<_, Error>(self.source.view(&format!("{PREFIX}{name}"))?.kind),
        };
        let wanted = self.wanted(shape)?;
        let stored = JoinedTensor::of(&Joined::all(shape), self.rank(), wanted.iter().cloned());
        let entry = |t: &JoinedTensor| Ok(t.entry(kind(t.first())?));
        let entries = stored.iter().map(entry).collect::<Result<Vec<_>>>()?;
        let mut writer = SafetensorsWriter::create(&folder.temporary().join(WEIGHTS), &entries)?;
        for t in &stored {
            writer.write(&t.assemble(|name| self.tensor(name))?)?;
        }
        writer.finish()?;
        let mut read = PeftAdapter::open(folder.temporary())?;
        read.check(shape)?;
        for (name, _) in &wanted {
            let right = self.tensor(name)?.f_to_kind(kind(name)?)?;
            if !read.tensor(name)?.f_equal(&right)? {
                return Err(Error::failed(format!("`{name}` differs when it is read back")));
            }
        }
        folder.commit()?;
        Ok(WrittenAdapter {
            base,
            num_tensors: entries.len(),
            bytes: entries.iter().map(TensorEntry::bytes).sum(),
        })
    }
}

/// What an adapter's folder says besides its tensors.
pub struct AdapterExport<'a> {
    pub trainable: &'a Trainable,
    pub shape: &'a Shape,
    /// The model that the adapter is for: a path or a hub id.
    pub base: &'a str,
    pub tokenizer: Option<&'a Tokenizer>,
    /// Of a reward model.
    pub scoring: Option<&'a Scoring>,
}

/// Writes the adapters, and what is trained as a whole, to the folder `dir`, in float32: complete, or not at all. A
/// collective call, like [`super::export`].
pub fn export_adapter(dir: &Path, params: &Sharded, how: &AdapterExport, world: &Group) -> Result<()> {
    let said = || format!("exporting the adapter to {}", dir.display());
    let (joined, rank) = (Joined::all(how.shape), how.trainable.lora.as_ref().map_or(0, |lora| lora.rank));
    // Tensors that lie in one belong to the same group.
    let stored = |i: usize| {
        JoinedTensor::of(
            &joined,
            rank,
            params.layout(i).specs.iter().map(|s| (s.name.clone(), s.whole().shape)),
        )
    };
    let started = match world.rank() {
        0 => begin(dir, how).and_then(|folder| {
            let entries: Vec<TensorEntry> =
                (0..params.len()).flat_map(stored).map(|t| t.entry(Kind::Float)).collect();
            let writer = SafetensorsWriter::create(&folder.temporary().join(WEIGHTS), &entries)?;
            Ok(Some((folder, writer)))
        }),
        _ => Ok(None),
    };
    let mut output = agree(world, started).with_context(said)?;
    let mut status = Ok(());
    for i in (0..params.len()).filter(|i| params.trains(*i)) {
        if params.replica_group().rank() != 0 {
            break;
        }
        let trained: HashMap<String, Tensor> = params.gather_trained(i)?.into_iter().collect();
        if let (Some((_, writer)), Ok(())) = (&mut output, &status) {
            let tensor = |name: &str| match trained.get(name) {
                Some(tensor) => Ok(tensor.shallow_clone()),
                None => Err(Error::failed(format!("`{name}` is not in its group"))),
            };
            status = stored(i).iter().try_for_each(|t| writer.write(&t.assemble(tensor)?));
        }
    }
    let status = status.and_then(|()| match output {
        Some((folder, writer)) => {
            writer.finish()?;
            folder.commit()
        }
        None => Ok(()),
    });
    agree(world, status).with_context(said)
}

/// Makes the temporary folder with all but the tensors.
fn begin(dir: &Path, how: &AdapterExport) -> Result<AtomicFolder> {
    let ours = |name: &str| [CONFIG, WEIGHTS, OURS].contains(&name) || is_tokenizer_file(name);
    let folder = AtomicFolder::create(dir, ours)?;
    let temp = folder.temporary();
    let write = |name: &str, value: &Value| -> Result<()> {
        let text = serde_json::to_string_pretty(value).map_err(|e| Error::failed(format!("{name}: {e}")))?;
        write_file(&temp.join(name), format!("{text}\n").as_bytes())
    };
    let Some(lora) = &how.trainable.lora else {
        return Err(Error::failed("there is no adapter to be written"));
    };
    // The layers that have one, by the last parts of their names.
    let joined = Joined::all(how.shape);
    let (mut targets, mut patterns): (Vec<String>, _) = (Vec::new(), Patterns::default());
    for plan in how.trainable.plans(how.shape)? {
        for adapter in &plan.adapters {
            let target = module(&plan.layout.specs[adapter.target].name);
            let there = joined.iter().find(|j| j.has(target));
            let name = last_part(there.map_or(target, Joined::module)).to_string();
            if !targets.contains(&name) {
                there.iter().for_each(|j| patterns.add(j, lora));
                targets.push(name);
            }
        }
    }
    let saved = (!lora.modules_to_save.is_empty()).then_some(&lora.modules_to_save);
    write(
        CONFIG,
        &json!({
            "peft_type": "LORA",
            "task_type": if how.shape.head == Head::Score { SEQ_CLS } else { "CAUSAL_LM" },
            "base_model_name_or_path": how.base,
            "inference_mode": true,
            "r": lora.rank,
            "lora_alpha": lora.alpha(),
            "lora_dropout": lora.dropout,
            "use_rslora": lora.rslora,
            "rank_pattern": patterns.ranks,
            "alpha_pattern": patterns.alphas,
            "target_modules": targets,
            "layers_to_transform": how.trainable.adapted_layers(how.shape),
            "modules_to_save": saved,
            "bias": "none",
            "fan_in_fan_out": false,
        }),
    )?;
    Ours { base: Some(lora.base), reward: how.scoring.cloned() }.write(temp)?;
    if let Some(tokenizer) = how.tokenizer {
        write_tokenizer(tokenizer, temp)?;
    }
    Ok(folder)
}
