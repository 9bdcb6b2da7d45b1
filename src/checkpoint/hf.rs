//! Models in Hugging Face's format: import by slices, export group by group.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::agree::{agree, agree_over};
use super::families::Description;
use super::grow::grown;
use super::hf_config::{SpecialIds, read_object, read_shape, write_shape};
use super::safetensors::{Entry, Reader, Writer};
use crate::config::shape::Shape;
use crate::data::tokenizer::{Tokenizer, is_tokenizer_file};
use crate::distributed::sharded::{Layout, Sharded, Spec};
use crate::error::{Context, Error, Result};
use crate::files::{AtomicFolder, write_file};
use crate::model::layout::{LM_HEAD, layouts};
use kernels::c10d::Group;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A model in Hugging Face's format, checked and ready to be read.
pub struct HfModel {
    dir: PathBuf,
    shape: Shape,
    files: Vec<Reader>,
    /// Where the model's tensors lie.
    places: HashMap<String, Place>,
    unknown_keys: Vec<String>,
}

/// Where a tensor of the model lies.
struct Place {
    file: usize,
    /// The name that it has there, alone or with others.
    tensor: String,
    /// Its first element in there.
    first: i64,
}

impl HfModel {
    /// Opens a folder with `config.json` and `model.safetensors`, or its parts with an index. Reads and checks all
    /// headers, and no tensor.
    ///
    /// Errors are of kind Data: an architecture or an option that is not built, files that are missing or damaged, and
    /// in one message all tensors that are missing, superfluous or of another shape.
    pub fn load(dir: &Path) -> Result<HfModel> {
        let (family, shape, unknown_keys) = read_shape(&dir.join("config.json"))?;
        let (files, tensors) = open_weights(dir)?;
        let places = check_tensors(family, &shape, &files, &tensors).context(dir.display())?;
        Ok(HfModel { dir: dir.to_path_buf(), shape, files, places, unknown_keys })
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Keys of `config.json` that are not known and had no effect: worth a warning.
    pub fn unknown_keys(&self) -> &[String] {
        &self.unknown_keys
    }

    /// Fills the parameters, whose vocabulary may be larger than the model's (see [`super::grow`]); every rank reads its
    /// own slices only. All ranks that hold them call this, and fail
    /// together.
    pub fn fill(&self, params: &mut Sharded) -> Result<()> {
        let read = |spec: &Spec, first, values: &Tensor| match self.places.get(&spec.name) {
            Some(place) => self.files[place.file].read(&place.tensor, place.first + first, values),
            None => Err(Error::data(format!("{}: there is no tensor `{}`", self.dir.display(), spec.name))),
        };
        let mine = params.fill(grown(self.shape.vocab_size, read));
        agree_over(params, mine)
    }
}

/// Compares the tensors with those that the shape asks for. Returns where those of the model lie.
fn check_tensors(
    family: &Description,
    shape: &Shape,
    files: &[Reader],
    tensors: &HashMap<String, usize>,
) -> Result<HashMap<String, Place>> {
    // The tensors of the family's files, of which each holds one or more of the model's.
    let mut wanted: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    let mut places = HashMap::new();
    for spec in layouts(shape).into_iter().flat_map(|layout| layout.specs) {
        let (tensor, row) = (family.place)(&spec.name, shape);
        let first = row * spec.numel() / spec.shape[0];
        let size = wanted.entry(tensor.clone()).or_insert_with(|| [&[0], &spec.shape[1..]].concat());
        size[0] += spec.shape[0];
        if let Some(&file) = tensors.get(&tensor) {
            places.insert(spec.name, Place { file, tensor, first });
        }
    }
    let mut wrong = Vec::new();
    for (name, shape) in &wanted {
        match tensors.get(name) {
            None => wrong.push(format!("`{name}` {shape:?} is missing")),
            Some(&i) => {
                let (found, _) = files[i].info(name)?;
                if found != *shape {
                    wrong.push(format!("`{name}` is {found:?} and should be {shape:?}"));
                }
            }
        }
    }
    let mut extra: Vec<&String> = tensors.keys().filter(|n| !wanted.contains_key(*n)).collect();
    extra.sort();
    for name in extra {
        // Tables that old files carry, and the second name of tied embeddings.
        let harmless =
            name.ends_with("rotary_emb.inv_freq") || (shape.tie_word_embeddings && name.as_str() == LM_HEAD);
        if !harmless {
            wrong.push(format!("`{name}` belongs to no {}", family.architecture));
        }
    }
    if wrong.is_empty() {
        return Ok(places);
    }
    const SHOWN: usize = 12;
    let more = wrong.len().saturating_sub(SHOWN);
    wrong.truncate(SHOWN);
    let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
    Err(Error::data(format!("the tensors do not fit its config.json:\n  {}{more}", wrong.join("\n  "))))
}

/// Opens the weights' files and finds out which tensor lies where.
fn open_weights(dir: &Path) -> Result<(Vec<Reader>, HashMap<String, usize>)> {
    let index = dir.join(INDEX);
    if dir.join(SINGLE).is_file() {
        let reader = Reader::open(&dir.join(SINGLE))?;
        let tensors = reader.names().into_iter().map(|n| (n, 0)).collect();
        return Ok((vec![reader], tensors));
    }
    if !index.is_file() {
        let pickled = fs::read_dir(dir).is_ok_and(|mut entries| {
            entries.any(|e| e.is_ok_and(|e| e.file_name().to_string_lossy().starts_with("pytorch_model")))
        });
        let advice = match pickled {
            true => "; pytorch_model*.bin cannot be read: save the model with safe_serialization=True",
            false => "",
        };
        return Err(Error::data(format!("{}: no {SINGLE} and no {INDEX}{advice}", dir.display())));
    }
    let object = read_object(&index)?;
    let Some(map) = object.get("weight_map").and_then(Value::as_object) else {
        return Err(Error::data(format!("{}: there is no weight_map", index.display())));
    };
    let (mut files, mut by_name, mut tensors) = (Vec::new(), HashMap::new(), HashMap::new());
    for (tensor, file) in map {
        let file = file.as_str().filter(|f| {
            let mut parts = Path::new(f).components();
            matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        });
        let Some(file) = file else {
            return Err(Error::data(format!("{}: `{tensor}` names no file of its folder", index.display())));
        };
        let i = match by_name.get(file) {
            Some(&i) => i,
            None => {
                let reader =
                    Reader::open(&dir.join(file)).context(format!("{} names {file}", index.display()))?;
                files.push(reader);
                by_name.insert(file, files.len() - 1);
                files.len() - 1
            }
        };
        files[i].info(tensor).context(index.display())?;
        tensors.insert(tensor.clone(), i);
    }
    // What lies in a file and not in the index is named as superfluous later, like everything that nobody asked for.
    for (i, file) in files.iter().enumerate() {
        for name in file.names() {
            tensors.entry(name).or_insert(i);
        }
    }
    Ok((files, tensors))
}

/// How a model is written.
pub struct Export<'a> {
    /// Dtype of the tensors: float32, bfloat16, float16 or float64.
    pub dtype: Kind,
    /// Most bytes of tensors in one file; a tensor that is larger has a file of its own.
    pub max_shard_size: u64,
    /// Whose files and special ids go with the model.
    pub tokenizer: Option<&'a Tokenizer>,
}

/// Writes the model to the folder `dir`, which transformers loads: complete, or not at all; a model that is there is
/// replaced. A collective call: groups of parameters are gathered one after the other, and rank 0 of `world` writes.
/// All ranks fail together.
pub fn export(dir: &Path, shape: &Shape, params: &Sharded, how: &Export, world: &Group) -> Result<()> {
    let writes = world.rank() == 0;
    let plan = plan((0..params.len()).map(|i| params.layout(i)), how);
    let started = if writes { begin(dir, shape, how, &plan).map(Some) } else { Ok(None) };
    let folder =
        agree(world, started).with_context(|| format!("exporting the model to {}", dir.display()))?;

    let mut status = Ok(());
    let mut output = folder.as_ref().map(|f| Output::new(f.temporary(), &plan));
    for i in 0..params.len() {
        // Replicas of rank 0's shard group have nothing to do until the end.
        if params.replica_group().rank() != 0 {
            break;
        }
        let flat = params.gather_master(i)?;
        if let (Some(output), Ok(())) = (&mut output, &status) {
            status = params.layout(i).specs.iter().try_for_each(|spec| output.write(&spec.view(&flat)));
        }
    }
    drop(output);
    let status = status.and_then(|()| folder.map_or(Ok(()), AtomicFolder::commit));
    agree(world, status).with_context(|| format!("exporting the model to {}", dir.display()))
}

/// The files of an export with their tensors, in the order of the groups.
fn plan<'a>(layouts: impl Iterator<Item = &'a Layout>, how: &Export) -> Vec<(String, Vec<Entry>)> {
    let (mut parts, mut bytes): (Vec<Vec<Entry>>, u64) = (vec![Vec::new()], 0);
    for spec in layouts.flat_map(|l| &l.specs) {
        let entry = Entry { name: spec.name.clone(), kind: how.dtype, shape: spec.shape.clone() };
        if bytes > 0 && bytes + entry.bytes() > how.max_shard_size {
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

/// Makes the temporary folder with all but the weights.
fn begin(dir: &Path, shape: &Shape, how: &Export, plan: &[(String, Vec<Entry>)]) -> Result<AtomicFolder> {
    let ours = |name: &str| {
        name == "config.json"
            || (name.starts_with("model") && name.contains(".safetensors"))
            || is_tokenizer_file(name)
    };
    let folder = AtomicFolder::create(dir, ours)?;
    let temp = folder.temporary();
    let ids = how.tokenizer.map_or_else(SpecialIds::default, SpecialIds::of);
    let write = |name: &str, value: &Value| -> Result<()> {
        let text = serde_json::to_string_pretty(value).map_err(|e| Error::failed(format!("{name}: {e}")))?;
        write_file(&temp.join(name), format!("{text}\n").as_bytes())
    };
    write("config.json", &write_shape(shape, how.dtype, &ids))?;
    let generation = [("bos_token_id", ids.bos), ("eos_token_id", ids.eos), ("pad_token_id", ids.pad)];
    let generation: serde_json::Map<String, Value> =
        generation.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.to_string(), v)).collect();
    write("generation_config.json", &Value::Object(generation))?;
    if let Some(tokenizer) = how.tokenizer {
        write_tokenizer(tokenizer, temp)?;
    }
    if plan.len() > 1 {
        let total: u64 = plan.iter().flat_map(|(_, entries)| entries).map(Entry::bytes).sum();
        let map: serde_json::Map<String, Value> = plan
            .iter()
            .flat_map(|(file, entries)| entries.iter().map(move |e| (e.name.clone(), json!(file))))
            .collect();
        write(INDEX, &json!({"metadata": {"total_size": total}, "weight_map": map}))?;
    }
    Ok(folder)
}

/// Writes tensors into the files of the plan, one after the other.
struct Output<'a> {
    dir: &'a Path,
    plan: &'a [(String, Vec<Entry>)],
    file: usize,
    /// Tensors written to the current file.
    tensor: usize,
    writer: Option<Writer>,
}

impl<'a> Output<'a> {
    fn new(dir: &'a Path, plan: &'a [(String, Vec<Entry>)]) -> Self {
        Output { dir, plan, file: 0, tensor: 0, writer: None }
    }

    fn write(&mut self, t: &tch::Tensor) -> Result<()> {
        let (name, entries) = &self.plan[self.file];
        let mut writer = match self.writer.take() {
            Some(writer) => writer,
            None => Writer::create(&self.dir.join(name), entries)?,
        };
        writer.write(t)?;
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
        if !to.join(name).exists() {
            write_file(&to.join(name), bytes)?;
            written.push((name.to_string(), bytes.len() as u64, crc32fast::hash(bytes)));
        }
    }
    Ok(written)
}
