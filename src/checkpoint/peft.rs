//! Adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors` (`.bin` is read), whose tensors have the
//! model's names after `base_model.model.`. What PEFT has no place for is in `corral.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tch::Kind;

use super::hf::write_tokenizer;
use super::hf_config::read_object;
use super::named::{ModelFolder, tokenizer_of};
use super::ours::{OURS, Ours, Scoring};
use super::safetensors::{self, Entry, Writer};
use super::sharded::Checkpoint;
use super::source::Source;
use super::tensor_hash::TensorHash;
use super::torch_file;
use super::unfit::{Unfit, common_prefix};
use super::weights::Weights;
use crate::config::shape::{Head, Shape};
use crate::config::trainable::{Base, Freeze, Lora, Targets};
use crate::data::tokenizer::{Tokenizer, is_tokenizer_file};
use crate::distributed::agree::agree;
use crate::distributed::plan::{Role, adapter_names};
use crate::distributed::sharded::{Sharded, Spec};
use crate::error::{Context, Error, Result};
use crate::files::{AtomicFolder, exists, is_file, write_file};
use crate::model::Trainable;
use crate::model::layout::EMBEDDING;
use crate::model::trainable::{last_part, module};
use crate::telemetry::console::warn_once;
use kernels::c10d::Group;

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
    /// Its tensors, by the names in PEFT's files.
    source: Source,
}

/// `task_type` of a model with a scalar head.
const SEQ_CLS: &str = "SEQ_CLS";

impl PeftAdapter {
    /// # Errors
    /// Of kind Data: files that are missing or damaged; kinds of adapters and options that are not built.
    pub fn open(dir: &Path) -> Result<PeftAdapter> {
        let path = dir.join(CONFIG);
        let config = read_object(&path)?;
        let (trainable, base) = read_config(&config).map_err(|e| Error::data(e).context(path.display()))?;
        if let Some(unread) = unread(&config) {
            warn_once(&format!("{}: {unread}", path.display()));
        }
        let scored = config.get("task_type").is_some_and(|t| t == SEQ_CLS);
        let (source, ours) = (open_weights(dir)?, Ours::read(dir)?);
        let vocab_size = source.view(&format!("{PREFIX}{EMBEDDING}")).ok().map(|v| v.shape[0]);
        let (dir, scoring) = (dir.to_path_buf(), ours.reward);
        let mut adapter = PeftAdapter { dir, trainable, scored, scoring, base, vocab_size, source };
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
            ModelFolder::Hf(dir) | ModelFolder::Meta(dir) | ModelFolder::Gguf(dir) => Err(whole(&dir)),
        }
    }

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
                "{}: base_model_name_or_path is empty, so that the model is not known; set it to the model's folder",
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
                    "{}; if it lies elsewhere now, name it: `corral merge --adapter {dir} --model DIR --output DIR`",
                    e.message
                ),
                ..e
            },
        };
        Weights::open(&base).map_err(moved).with_context(|| format!("the base model of {dir}"))
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
                "{}: the model has no {}, and the adapter no tensors for that: not used",
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
        let wanted = |spec: &Spec| self.has(&spec.name);
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

fn open_weights(dir: &Path) -> Result<Source> {
    let (path, old) = (dir.join(WEIGHTS), dir.join(OLD_WEIGHTS));
    Ok(Source::of_files(vec![match !is_file(&path)? && is_file(&old)? {
        true => Box::new(torch_file::Reader::open(&old)?),
        false => Box::new(safetensors::Reader::open(&path)?),
    }]))
}

/// Keys that change the mathematics in a way that is not built, unless they are off.
const REFUSED: [&str; 17] = [
    "bias",
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "num_virtual_tokens",
];

/// Keys that are read, or that say how an adapter was made and not what it is.
const KNOWN: [&str; 27] = [
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_lora_weights",
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "runtime_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "unsloth_version",
    "unsloth_fixed",
];

/// Null, false, nothing in it, or `none`: the key has no effect.
fn off(v: &Value) -> bool {
    match v {
        Value::Null | Value::Bool(false) => true,
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        Value::String(s) => s == "none",
        Value::Number(_) | Value::Bool(true) => false,
    }
}

/// What of PEFT's options changes the mathematics and is not built.
fn refused(config: &Map<String, Value>) -> Option<String> {
    for key in REFUSED {
        if let Some(value) = config.get(key).filter(|v| !off(v)) {
            return Some(format!("{key}: {value} is not built"));
        }
    }
    if let Some(pattern) =
        config.get("layers_pattern").filter(|v| !off(v) && **v != "layers" && **v != json!(["layers"]))
    {
        return Some(format!("layers_pattern: {pattern} is not built; the model's blocks are `layers`"));
    }
    // These ways of starting also change the base, which is not in the adapter.
    let start = config.get("init_lora_weights").and_then(Value::as_str).unwrap_or("");
    ["pissa", "olora", "corda", "loftq", "lora_ga"].iter().any(|name| start.starts_with(name)).then(|| {
        format!(
            "init_lora_weights: {start} changed the base; convert the adapter to plain LoRA when saving it"
        )
    })
}

/// Keys that nothing reads, of which it is not known that they have no effect.
fn unread(config: &Map<String, Value>) -> Option<String> {
    let known = |key: &str| KNOWN.contains(&key) || REFUSED.contains(&key);
    let unread: Vec<String> = config
        .iter()
        .filter(|(key, value)| !known(key) && !off(value))
        .map(|(key, value)| format!("{key} ({value})"))
        .collect();
    let s = if unread.len() > 1 { "s" } else { "" };
    (!unread.is_empty())
        .then(|| format!("{} key{s} not known and not used: {}", unread.len(), unread.join(", ")))
}

fn read_config(config: &Map<String, Value>) -> Result<(Trainable, Option<String>), String> {
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    if text("peft_type") != Some("LORA") {
        return Err(format!(
            "peft_type is {}; only LORA is built",
            config.get("peft_type").unwrap_or(&Value::Null)
        ));
    }
    if let Some(why) = refused(config) {
        return Err(why);
    }
    let number = |key: &str, default: f64| match config.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(v) => v.as_f64().ok_or_else(|| format!("{key}: {v} is no number")),
    };
    let names = |key: &str| -> Result<Option<Vec<String>>, String> {
        match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => serde_json::from_value(v.clone())
                .map(Some)
                .map_err(|_| format!("{key}: {v} is no list of names")),
        }
    };
    let targets = match text("target_modules") {
        Some("all-linear") => Targets::AllLinear,
        Some(pattern) => {
            return Err(format!(
                "target_modules: the pattern {pattern:?} is not built; give a list of names"
            ));
        }
        None => Targets::Names(names("target_modules")?.ok_or("target_modules is missing")?),
    };
    let layers = match config.get("layers_to_transform") {
        None | Some(Value::Null) => None,
        Some(Value::Number(n)) => Some(vec![n.as_i64().ok_or("layers_to_transform: no whole number")?]),
        Some(v) => Some(
            serde_json::from_value(v.clone()).map_err(|_| format!("layers_to_transform: {v} is no list"))?,
        ),
    };
    let rank = number("r", 8.0)?;
    if rank < 1.0 || rank.fract() != 0.0 {
        return Err(format!("r: {rank} is no rank"));
    }
    let mut saved = names("modules_to_save")?.unwrap_or_default();
    if text("task_type") == Some(SEQ_CLS) {
        // PEFT names the heads of all kinds of classifiers, and always saves them.
        saved.retain(|name| name != "classifier");
        if !saved.iter().any(|name| name == "score") {
            saved.push("score".into());
        }
    }
    let lora = Lora {
        rank: rank as i64,
        alpha: number("lora_alpha", 8.0)?,
        dropout: number("lora_dropout", 0.0)?,
        targets,
        rslora: config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        modules_to_save: saved,
        base: Base::None,
    };
    let base = text("base_model_name_or_path").filter(|b| !b.is_empty()).map(str::to_string);
    Ok((Trainable { freeze: Freeze::default(), lora: Some(lora), layers }, base))
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
            return Err(Error::config(format!("{dir}: the adapter itself is there")));
        }
        if self.trainable.lora.is_none() {
            return Err(Error::data(format!(
                "{dir}: parts of the model were trained as a whole, without an adapter; write the model: --format hf"
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
        let entry = |(name, shape): (String, Vec<i64>)| -> Result<Entry> {
            let name = format!("{PREFIX}{name}");
            Ok(Entry {
                kind: dtype.map_or_else(|| Ok(self.source.view(&name)?.kind), Ok::<_, Error>)?,
                name,
                shape,
            })
        };
        let entries = self.wanted(shape)?.into_iter().map(entry).collect::<Result<Vec<_>>>()?;
        let mut writer = Writer::create(&folder.temporary().join(WEIGHTS), &entries)?;
        entries.iter().try_for_each(|e| writer.write(&self.source.tensor(&e.name)?))?;
        writer.finish()?;
        let mut read = PeftAdapter::open(folder.temporary())?;
        read.check(shape)?;
        for e in &entries {
            let right = self.source.tensor(&e.name)?.f_to_kind(e.kind)?;
            if !read.source.tensor(&e.name)?.f_equal(&right)? {
                return Err(Error::failed(format!("`{}` is another tensor when it is read back", e.name)));
            }
        }
        folder.commit()?;
        Ok(WrittenAdapter { base, num_tensors: entries.len(), bytes: entries.iter().map(Entry::bytes).sum() })
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
    let specs = || (0..params.len()).flat_map(|i| &params.layout(i).specs);
    let started = match world.rank() {
        0 => begin(dir, how).and_then(|folder| {
            let entry = |s: &crate::distributed::sharded::Spec| Entry {
                name: format!("{PREFIX}{}", s.name),
                kind: Kind::Float,
                shape: s.shape.clone(),
            };
            let entries: Vec<Entry> = specs().map(entry).collect();
            let writer = Writer::create(&folder.temporary().join(WEIGHTS), &entries)?;
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
        let flat = params.gather_master(i)?;
        if let (Some((_, writer)), Ok(())) = (&mut output, &status) {
            status = params.layout(i).specs.iter().try_for_each(|spec| writer.write(&spec.view(&flat)));
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
    let mut targets: Vec<String> = Vec::new();
    for plan in how.trainable.plans(how.shape)? {
        for adapter in &plan.adapters {
            let name = last_part(module(&plan.layout.specs[adapter.target].name)).to_string();
            if !targets.contains(&name) {
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
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "use_rslora": lora.rslora,
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
