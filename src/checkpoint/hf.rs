//! Models in Hugging Face's format: import by slices, export group by group.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::families;
use super::families::Description;
use super::hf_config::{DescribedModel, SpecialIds, read_object, read_shape, write_shape};
use super::ours::{OURS, Ours, Scoring};
use super::safetensors::{self, SafetensorsWriter, TensorEntry};
use super::source::{TensorFile, TensorSource};
use super::torch_file;
use super::unfit::Unfit;
use crate::config::shape::Shape;
use crate::data::tokenizer::{Tokenizer, is_tokenizer_file};
use crate::distributed::agree::agree;
use crate::distributed::sharded::{Sharded, TensorSpec};
use crate::error::{Context, Error, Result};
use crate::files::{AtomicFolder, exists, is_file, write_file};
use crate::model::layout::{EMBEDDING, LM_HEAD, layouts};
use crate::model::rotary::inverse_frequencies;
use crate::telemetry::console::warn_once;
use kernels::comm::Group;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const BIN: &str = "pytorch_model.bin";
const BIN_INDEX: &str = "pytorch_model.bin.index.json";
/// The end of the names of tables that old files carry, and that are computed.
const INV_FREQ: &str = "rotary_emb.inv_freq";

/// A model in Hugging Face's format, checked and ready to be read.
pub struct HfModel {
    dir: PathBuf,
    shape: Shape,
    source: TensorSource,
    warnings: Vec<String>,
}

impl HfModel {
    /// Opens a folder with `config.json` and `model.safetensors`, or its parts with an index; where these are not there,
    /// `pytorch_model.bin` or its parts. Reads and checks all headers; of the tensors only a tied model's embedding and head,
    /// where the files have both, and tables of rotary positions. What is in the folder and does not count is told once.
    ///
    /// Errors are of kind Data: an architecture or an option that is not built, files that are missing or damaged, and
    /// in one message all tensors that are missing, superfluous or of another shape.
    pub fn load(dir: &Path) -> Result<HfModel> {
        let config = dir.join("config.json");
        let DescribedModel { family, mut shape, mut warnings } = read_shape(&config)?;
        warnings.iter_mut().for_each(|w| w.insert_str(0, "config.json: "));
        let files = open_weights(dir)?;
        let source = find_tensors(family, &mut shape, files, &mut warnings).context(dir.display())?;
        for warning in &warnings {
            warn_once(&format!("{}: {warning}", dir.display()));
        }
        Ok(HfModel { dir: dir.to_path_buf(), shape, source, warnings })
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is in the folder and does not count.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The tensors, under the model's names.
    pub fn source(&self) -> &TensorSource {
        &self.source
    }

    pub fn into_source(self) -> TensorSource {
        self.source
    }
}

/// Compares the tensors in the files with those that the shape asks for, and finds the model's in them. A tied model whose
/// files have another head is untied.
fn find_tensors(
    family: &Description,
    shape: &mut Shape,
    mut files: TensorSource,
    warnings: &mut Vec<String>,
) -> Result<TensorSource> {
    let found: BTreeSet<String> = files.names().cloned().collect();
    // Before anything is made for every block and expert.
    let experts = shape.experts.as_ref().map_or(1, |e| e.num_local_experts);
    if shape.num_hidden_layers * experts > found.len() as i64 {
        let of = if experts > 1 { format!(" of {experts} experts") } else { String::new() };
        return Err(Error::data(format!(
            "config.json has num_hidden_layers {}{of}, but there are {} tensors",
            shape.num_hidden_layers,
            found.len()
        )));
    }
    let (head, _) = (family.place)(LM_HEAD, shape);
    let embedding = tied_embedding(family, shape, &files, &found, warnings)?;
    // The tensors of the family's files, of which each holds one or more of the model's.
    let mut wanted: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    let mut places = Vec::new();
    for spec in layouts(shape).into_iter().flat_map(|layout| layout.specs) {
        let (tensor, row) = match (&embedding, spec.name.as_str()) {
            (Some(embedding), EMBEDDING) => (embedding.clone(), 0),
            _ => (family.place)(&spec.name, shape),
        };
        let size = wanted.entry(tensor.clone()).or_insert_with(|| [&[0], &spec.shape[1..]].concat());
        size[0] += spec.shape[0];
        places.push((spec, tensor, row));
    }
    let mut unfit = Unfit::of(&wanted, &files)?;
    let mut tables = Vec::new();
    for name in found.iter().filter(|name| !wanted.contains_key(*name)) {
        match name.ends_with(INV_FREQ) {
            // Tables that old files carry.
            true => tables.push(name.clone()),
            // The second name of a tied embedding.
            false if shape.tie_word_embeddings && *name == head => {}
            false => {
                let architecture = family.architecture(shape.head).unwrap_or_default();
                unfit.extra.push(format!("`{name}` belongs to no {architecture}"));
            }
        }
    }
    unfit.into_result("the tensors do not fit its config.json")?;
    warnings.extend(check_tables(&files, &tables, shape)?);
    files.left_out = tables;
    files.regroup(places.into_iter().map(|(spec, tensor, row)| (spec.name, spec.shape, tensor, row)))
}

/// Where a tied embedding lies, as transformers 5 finds out (`tie_weights`): where the files have the head alone, there. A
/// head that is another tensor than the embedding unties the model.
fn tied_embedding(
    family: &Description,
    shape: &mut Shape,
    files: &TensorSource,
    found: &BTreeSet<String>,
    warnings: &mut Vec<String>,
) -> Result<Option<String>> {
    if !shape.tie_word_embeddings {
        return Ok(None);
    }
    let [(embedding, _), (head, _)] = [EMBEDDING, LM_HEAD].map(|name| (family.place)(name, shape));
    match (found.contains(&embedding), found.contains(&head)) {
        (false, true) => Ok(Some(head)),
        (true, true) if !files.equal(&embedding, &head)? => {
            shape.tie_word_embeddings = false;
            warnings.push(format!(
                "tie_word_embeddings is true, but `{head}` is another tensor than `{embedding}`: both are used and the model \
                 is untied, as in transformers; set tie_word_embeddings to false"
            ));
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Compares tables of rotary frequencies with those that are computed.
fn check_tables(files: &TensorSource, tables: &[String], shape: &Shape) -> Result<Option<String>> {
    let computed = Tensor::from_slice(&inverse_frequencies(shape));
    let mut other = Vec::new();
    for name in tables {
        let table = files.tensor(name)?.to_kind(Kind::Double);
        // They may have been rounded to float16.
        let near = |table: &Tensor| table.allclose(&computed, 1e-2, 1e-7, false);
        if table.size() != computed.size() || !near(&table) {
            other.push(name.as_str());
        }
    }
    Ok(other.first().map(|first| {
        format!(
            "{} of {} tables of rotary frequencies (`{first}`) differ from config.json and are not used, as in transformers",
            other.len(),
            tables.len()
        )
    }))
}

/// Opens the weights' files and finds out which tensor lies where.
fn open_weights(dir: &Path) -> Result<TensorSource> {
    for (single, index) in [(SINGLE, INDEX), (BIN, BIN_INDEX)] {
        if is_file(&dir.join(single))? {
            return Ok(TensorSource::of_files(vec![open_file(&dir.join(single))?]));
        }
        if is_file(&dir.join(index))? {
            return open_parts(dir, &dir.join(index));
        }
    }
    Err(Error::data(format!("{}: no {SINGLE} and no {INDEX}, no {BIN} and no {BIN_INDEX}", dir.display())))
}

fn open_file(path: &Path) -> Result<Box<dyn TensorFile>> {
    Ok(match path.extension().is_some_and(|e| e == "safetensors") {
        true => Box::new(safetensors::SafetensorsReader::open(path)?),
        false => Box::new(torch_file::TorchReader::open(path)?),
    })
}

/// Opens the files that an index names, and checks that each holds what the index says.
fn open_parts(dir: &Path, index: &Path) -> Result<TensorSource> {
    let object = read_object(index)?;
    let Some(map) = object.get("weight_map").and_then(Value::as_object) else {
        return Err(Error::data(format!("{}: there is no weight_map", index.display())));
    };
    let mut files: BTreeMap<&str, (Box<dyn TensorFile>, BTreeSet<String>)> = BTreeMap::new();
    for (tensor, file) in map {
        let file = file.as_str().filter(|f| {
            let mut parts = Path::new(f).components();
            matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        });
        let Some(file) = file else {
            return Err(Error::data(format!("{}: `{tensor}` names no file of its folder", index.display())));
        };
        if !files.contains_key(file) {
            let open = open_file(&dir.join(file)).context(format!("{} names {file}", index.display()))?;
            let names = open.names().into_iter().collect();
            files.insert(file, (open, names));
        }
        if !files[file].1.contains(tensor) {
            return Err(Error::data(format!(
                "{}: there is no tensor `{tensor}` in {file}, although the index has it there",
                index.display()
            )));
        }
    }
    let order: Vec<&str> = files.keys().copied().collect();
    // What lies in a file and not in the index is named as superfluous later, like everything that nobody asked for.
    let mut source = TensorSource::of_files(files.into_values().map(|(file, _)| file).collect());
    for (tensor, file) in map {
        if let Some(i) = order.iter().position(|name| file == name) {
            source.take_from(i, tensor);
        }
    }
    Ok(source)
}

/// How a model is written.
pub struct Export<'a> {
    /// Dtype of the tensors: float32, bfloat16, float16 or float64.
    pub dtype: Kind,
    /// Most bytes of tensors in one file; a tensor that is larger has a file of its own.
    pub max_shard_size: u64,
    /// Whose files and special ids go with the model.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Of a reward model.
    pub scoring: Option<&'a Scoring>,
}

/// Writes the model to the folder `dir`, which transformers loads: complete, or not at all; a model that is there is
/// replaced. A collective call: groups of parameters are gathered one after the other, and rank 0 of `world` writes.
/// All ranks fail together.
pub fn export(dir: &Path, shape: &Shape, params: &Sharded, how: &Export, world: &Group) -> Result<()> {
    let writes = world.rank() == 0;
    let specs = (0..params.len()).flat_map(|i| &params.plan(i).layout.specs);
    let entry =
        |s: &TensorSpec| TensorEntry { name: s.name.clone(), kind: how.dtype, shape: s.whole().shape };
    let plan = plan(as_stored(shape, specs.map(entry)), how.max_shard_size);
    let started = match writes {
        true => (|| {
            let ids = how.tokenizer.map_or_else(SpecialIds::default, SpecialIds::of);
            let (folder, _) = begin(dir, shape, how.dtype, ids, how.tokenizer, how.scoring, &plan)?;
            Ok(Some(folder))
        })(),
        false => Ok(None),
    };
    let folder =
        agree(world, started).with_context(|| format!("exporting the model to {}", dir.display()))?;

    let mut status = Ok(());
    let mut output = folder.as_ref().map(|f| Output::new(f.temporary(), &plan));
    for i in 0..params.len() {
        // Replicas of rank 0's shard group have nothing to do until the end.
        if params.replica_group().rank() != 0 {
            break;
        }
        params.gather_tensors(i, |_, value| {
            if let (Some(output), Ok(())) = (&mut output, &status) {
                status = output.write(&value);
            }
            Ok(())
        })?;
    }
    drop(output);
    let status = status.and_then(|()| folder.map_or(Ok(()), AtomicFolder::commit));
    agree(world, status).with_context(|| format!("exporting the model to {}", dir.display()))
}

/// The files of an export with their tensors, in the order of the groups.
pub(super) type FileEntries = Vec<(String, Vec<TensorEntry>)>;

/// The tensors as the family's files have them: some hold several of the model's, one after the other.
pub(super) fn as_stored(
    shape: &Shape,
    entries: impl Iterator<Item = TensorEntry>,
) -> impl Iterator<Item = TensorEntry> {
    let family = families::of(shape.family);
    let mut stored: Vec<TensorEntry> = Vec::new();
    for entry in entries {
        let (name, _) = (family.place)(&entry.name, shape);
        match stored.last_mut().filter(|last| last.name == name) {
            Some(last) => last.shape[0] += entry.shape[0],
            None => stored.push(TensorEntry { name, ..entry }),
        }
    }
    stored.into_iter()
}

/// Divides tensors among files of at most `max_shard_size` bytes.
pub(super) fn plan(entries: impl Iterator<Item = TensorEntry>, max_shard_size: u64) -> FileEntries {
    let (mut parts, mut bytes): (Vec<Vec<TensorEntry>>, u64) = (vec![Vec::new()], 0);
    for entry in entries {
        if bytes > 0 && bytes + entry.bytes() > max_shard_size {
            parts.push(Vec::new());
            bytes = 0;
        }
        bytes += entry.bytes();
        parts.last_mut().expect("starts with one").push(entry);
    }
    let n = parts.len();
    let name = |i: usize| match n {
        1 => SINGLE.to_string(),
        _ => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
    };
    parts.into_iter().enumerate().map(|(i, part)| (name(i), part)).collect()
}

/// Makes the temporary folder with all but the weights; returns also the names of the tokenizer's files in it.
pub(super) fn begin(
    dir: &Path,
    shape: &Shape,
    dtype: Kind,
    ids: SpecialIds,
    tokenizer: Option<&Tokenizer>,
    scoring: Option<&Scoring>,
    plan: &FileEntries,
) -> Result<(AtomicFolder, Vec<String>)> {
    let ours = |name: &str| {
        ["config.json", OURS].contains(&name)
            || (name.starts_with("model") && name.contains(".safetensors"))
            || is_tokenizer_file(name)
    };
    let folder = AtomicFolder::create(dir, ours)?;
    let temp = folder.temporary();
    let write = |name: &str, value: &Value| -> Result<()> {
        let text = serde_json::to_string_pretty(value).map_err(|e| Error::failed(format!("{name}: {e}")))?;
        write_file(&temp.join(name), format!("{text}\n").as_bytes())
    };
    write("config.json", &write_shape(shape, dtype, &ids))?;
    let generation = [("bos_token_id", ids.bos), ("eos_token_id", ids.eos), ("pad_token_id", ids.pad)];
    let generation: serde_json::Map<String, Value> =
        generation.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.to_string(), v)).collect();
    write("generation_config.json", &Value::Object(generation))?;
    Ours { base: None, reward: scoring.cloned() }.write(temp)?;
    let written = tokenizer.map_or(Ok(Vec::new()), |tokenizer| write_tokenizer(tokenizer, temp))?;
    if plan.len() > 1 {
        let total: u64 = plan.iter().flat_map(|(_, entries)| entries).map(TensorEntry::bytes).sum();
        let map: serde_json::Map<String, Value> = plan
            .iter()
            .flat_map(|(file, entries)| entries.iter().map(move |e| (e.name.clone(), json!(file))))
            .collect();
        write(INDEX, &json!({"metadata": {"total_size": total}, "weight_map": map}))?;
    }
    Ok((folder, written.into_iter().map(|(name, ..)| name).collect()))
}

/// Writes tensors into the files of the plan, one after the other.
pub(super) struct Output<'a> {
    dir: &'a Path,
    plan: &'a FileEntries,
    file: usize,
    /// Tensors written to the current file.
    tensor: usize,
    /// The parts of the next one that are there.
    parts: Vec<tch::Tensor>,
    writer: Option<SafetensorsWriter>,
}

impl<'a> Output<'a> {
    pub(super) fn new(dir: &'a Path, plan: &'a FileEntries) -> Self {
        Output { dir, plan, file: 0, tensor: 0, parts: Vec::new(), writer: None }
    }

    /// Writes the next tensor of the model, or keeps it until all are there that lie in one tensor with it.
    pub(super) fn write(&mut self, t: &tch::Tensor) -> Result<()> {
        let (name, entries) = &self.plan[self.file];
        let entry = &entries[self.tensor];
        let numel: i64 = entry.shape.iter().product();
        let joined = match self.parts.is_empty() && t.numel() as i64 == numel {
            true => t.shallow_clone(),
            false => {
                // Exporting gathers one tensor after the other into the same memory.
                self.parts.push(t.f_reshape([-1])?.copy());
                let there: usize = self.parts.iter().map(tch::Tensor::numel).sum();
                if (there as i64) < numel {
                    return Ok(());
                }
                tch::Tensor::f_cat(&std::mem::take(&mut self.parts), 0)?
            }
        };
        let mut writer = match self.writer.take() {
            Some(writer) => writer,
            None => SafetensorsWriter::create(&self.dir.join(name), entries)?,
        };
        writer.write(&joined)?;
        self.tensor += 1;
        if self.tensor < entries.len() {
            self.writer = Some(writer);
            return Ok(());
        }
        writer.finish()?;
        (self.file, self.tensor) = (self.file + 1, 0);
        Ok(())
    }
}

/// Writes the tokenizer's files, all but those that are there already. Returns name, size and CRC-32 of each.
pub(super) fn write_tokenizer(tokenizer: &Tokenizer, to: &Path) -> Result<Vec<(String, u64, u32)>> {
    let mut written = Vec::new();
    for (name, bytes) in tokenizer.files() {
        if !exists(&to.join(name))? {
            write_file(&to.join(name), bytes)?;
            written.push((name.to_string(), bytes.len() as u64, crc32fast::hash(bytes)));
        }
    }
    Ok(written)
}
