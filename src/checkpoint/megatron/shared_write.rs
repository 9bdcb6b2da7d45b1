//! The format `torch_dist`, written: see [`super::shared`].

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use super::names::{CoreTensor, StageHolder};
use super::shared::{COMMON, FORMAT, METADATA};
use super::write::{MegatronPlan, parts_of_rank};
use crate::checkpoint::pickle::Pickled;
use crate::checkpoint::safetensors::TensorEntry;
use crate::checkpoint::torch_file::TorchWriter;
use crate::config::shape::QkNorm;
use crate::error::{Error, Result};
use crate::files::{AtomicFile, write_file};

/// The classes of the metadata.
const METADATA_MODULE: &str = "torch.distributed.checkpoint.metadata";

/// The contents of [`FORMAT`].
const TORCH_DIST: &str = r#"{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}"#;

/// The folder in an archive that is written to no file of its own.
const ARCHIVE: &str = "archive";

/// The files of the ranks of a checkpoint.
pub(super) struct SharedFiles<'a> {
    plan: &'a MegatronPlan,
    iteration: PathBuf,
    /// Stage by stage, and in a stage rank by rank.
    files: Vec<CountedFile>,
    /// Tensors by their names, in the order in which they came.
    tensors: Vec<(String, SavedParts)>,
    /// What lies where.
    stored: Vec<(Pickled, Pickled)>,
}

/// What is known of a tensor whose parts come one after the other.
struct SavedParts {
    kind: Kind,
    size: Vec<i64>,
    /// Offsets and sizes.
    parts: Vec<(Vec<i64>, Vec<i64>)>,
}

/// A file, and the bytes that were put into it.
struct CountedFile {
    name: String,
    file: AtomicFile,
    len: u64,
}

impl Write for CountedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.len += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl<'a> SharedFiles<'a> {
    pub fn create(plan: &'a MegatronPlan, iteration: &Path) -> Result<SharedFiles<'a>> {
        let file = |rank: i64| {
            let name = format!("__{rank}_0.distcp");
            let file = AtomicFile::create(&iteration.join(&name))?;
            Ok(CountedFile { name, file, len: 0 })
        };
        let files = (0..plan.form.tensor * plan.form.pipeline).map(file).collect::<Result<_>>()?;
        let iteration = iteration.to_path_buf();
        Ok(SharedFiles { plan, iteration, files, tensors: Vec::new(), stored: Vec::new() })
    }

    /// The name of the tensor that this one lies in, that one's leading sizes, and its place there: layers that are alike are one
    /// tensor, and so are their experts.
    fn placed(&self, tensor: &CoreTensor) -> (String, Vec<i64>, Vec<i64>) {
        let StageHolder::Layer(layer) = tensor.holder else { return (tensor.shared.clone(), vec![], vec![]) };
        let (mut sizes, mut indices) = (vec![self.plan.shape.num_hidden_layers], vec![layer]);
        if let (Some(expert), Some(experts)) = (tensor.expert, &self.plan.shape.experts) {
            sizes.push(experts.num_local_experts);
            indices.push(expert);
        }
        let engine = self.plan.form.engine && tensor.expert.is_none();
        let name = if engine { &tensor.engine } else { &tensor.shared };
        (format!("decoder.layers.{name}"), sizes, indices)
    }

    /// Writes a tensor, a part to each rank's file; what every rank has is in the first one's.
    pub fn write(&mut self, tensor: &CoreTensor, whole: &Tensor) -> Result<()> {
        let ranks = self.plan.form.tensor;
        let stage = self.plan.stage(tensor.holder);
        let (name, leading, indices) = self.placed(tensor);
        for rank in 0..ranks {
            if rank > 0 && tensor.shape_of_rank(ranks)? == tensor.shape {
                break;
            }
            for (part, at) in parts_of_rank(tensor, whole, rank, ranks)? {
                let ones = vec![1; leading.len()];
                let sizes = [ones, part.size()].concat();
                let offsets = [indices.as_slice(), &at[..tensor.shape.len()]].concat();
                let entry = TensorEntry { name: String::new(), kind: whole.kind(), shape: sizes.clone() };
                let value = Pickled::Tensor { kind: entry.kind, shape: sizes.clone() };
                let file = (stage * ranks + rank) as usize;
                self.put(file, &name, Some(&offsets), &value, &[entry], &[part])?;
                let size = [leading.as_slice(), &tensor.shape].concat();
                let known = match self.tensors.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, known)) => known,
                    None => {
                        self.tensors
                            .push((name.clone(), SavedParts { kind: whole.kind(), size, parts: Vec::new() }));
                        &mut self.tensors.last_mut().expect("one was added").1
                    }
                };
                if known.kind != whole.kind() {
                    return Err(Error::config(format!(
                        "the layers of `{name}` differ in their dtypes: choose one with --dtype"
                    )));
                }
                known.parts.push((offsets, sizes));
            }
        }
        Ok(())
    }

    /// Adds a file of `torch.save` to a rank's file.
    fn put(
        &mut self,
        file: usize,
        name: &str,
        offsets: Option<&[i64]>,
        value: &Pickled,
        entries: &[TensorEntry],
        tensors: &[Tensor],
    ) -> Result<()> {
        let file = &mut self.files[file];
        let start = file.len;
        let path = self.iteration.join(&file.name);
        let mut writer = TorchWriter::begin(&path, ARCHIVE, &mut *file, value, entries)?;
        tensors.iter().try_for_each(|tensor| writer.write(tensor))?;
        writer.end()?;
        let mut index = vec![("fqn", Pickled::text(name))];
        index.extend(offsets.map(|offsets| ("offset", size(offsets))));
        index.push(("index", Pickled::None));
        let place = [
            ("relative_path", Pickled::text(&file.name)),
            ("offset", Pickled::Integer(start as i64)),
            ("length", Pickled::Integer((file.len - start) as i64)),
            ("transform_descriptors", Pickled::None),
        ];
        self.stored.push((
            Pickled::Object(METADATA_MODULE, "MetadataIndex", Box::new(Pickled::dict(index))),
            Pickled::Object(
                "torch.distributed.checkpoint.filesystem",
                "_StorageInfo",
                Box::new(Pickled::dict(place)),
            ),
        ));
        Ok(())
    }

    /// Writes what else loaders ask for, and brings all to the disk.
    pub fn finish(mut self, common: &Pickled) -> Result<()> {
        let mut described: Vec<(Pickled, Pickled)> =
            self.tensors.iter().map(|(name, saved)| (Pickled::text(name), saved.described())).collect();
        for (stage, name) in self.extra_states() {
            let nothing = Pickled::List(vec![Pickled::None]);
            self.put((stage * self.plan.form.tensor) as usize, &name, None, &nothing, &[], &[])?;
            let bytes =
                Pickled::Object(METADATA_MODULE, "BytesStorageMetadata", Box::new(Pickled::Dict(vec![])));
            described.push((Pickled::text(name), bytes));
        }
        let metadata = Pickled::dict([
            ("state_dict_metadata", Pickled::Dict(described)),
            ("planner_data", Pickled::None),
            ("storage_data", Pickled::Dict(self.stored)),
            ("storage_meta", Pickled::None),
            ("version", Pickled::text("1.0.0")),
        ]);
        let metadata = Pickled::Object(METADATA_MODULE, "Metadata", Box::new(metadata));
        let path = self.iteration.join(METADATA);
        let bytes = metadata.write().map_err(|e| Error::failed(format!("{}: {e}", path.display())))?;
        self.files.into_iter().try_for_each(|file| file.file.commit())?;
        TorchWriter::create_with(&self.iteration.join(COMMON), common, &[])?.finish()?;
        write_file(&self.iteration.join(FORMAT), TORCH_DIST.as_bytes())?;
        write_file(&path, &bytes)
    }

    /// Names of the states that Megatron's modules have besides weights, with the stage of each: loaders ask for them, although all
    /// are empty. Products have them, and with Transformer Engine's layers norms that stand alone.
    fn extra_states(&self) -> Vec<(i64, String)> {
        let s = &self.plan.shape;
        let layers = s.num_hidden_layers;
        let mut modules = vec!["self_attention.linear_qkv", "self_attention.linear_proj"];
        if self.plan.form.engine {
            let heads = ["self_attention.q_layernorm", "self_attention.k_layernorm"];
            modules.extend(heads.iter().filter(|_| s.features.qk_norm == QkNorm::Head));
            modules.extend(s.experts.as_ref().map(|_| "pre_mlp_layernorm"));
        }
        let products = ["linear_fc1", "linear_fc2"];
        let mut states = Vec::new();
        for layer in 0..layers {
            let stage = self.plan.stage(StageHolder::Layer(layer));
            let mut put = |name: &str, shard: &str| {
                states.push((stage, format!("decoder.layers.{name}._extra_state/shard_{shard}")));
            };
            let shard = format!("{layer}_{layers}");
            modules.iter().for_each(|module| put(module, &shard));
            match s.experts.as_ref().map(|experts| experts.num_local_experts) {
                None => products.iter().for_each(|product| put(&format!("mlp.{product}"), &shard)),
                Some(count) => {
                    for (product, expert) in products.iter().flat_map(|p| (0..count).map(move |e| (p, e))) {
                        let shard = format!("{layer}.{expert}_{layers}.{count}");
                        put(&format!("mlp.experts.experts.{product}"), &shard);
                    }
                }
            }
        }
        if self.plan.form.engine {
            let last = self.plan.stage(StageHolder::Last);
            states.push((last, "decoder.final_layernorm._extra_state/shard_0_1".into()));
        }
        states
    }
}

impl SavedParts {
    /// What the metadata says of the tensor.
    fn described(&self) -> Pickled {
        let dtype = match self.kind {
            Kind::Double => "float64",
            Kind::BFloat16 => "bfloat16",
            Kind::Half => "float16",
            _ => "float32",
        };
        // dtype, layout, whether it has a gradient, memory format, whether it is pinned
        let properties = Pickled::Tuple(vec![
            Pickled::Name("torch", dtype),
            Pickled::Call("torch.serialization", "_get_layout", vec![Pickled::text("torch.strided")]),
            Pickled::Truth(false),
            Pickled::Call(METADATA_MODULE, "_MEM_FORMAT_ENCODING", vec![Pickled::Integer(0)]),
            Pickled::Truth(false),
        ]);
        let parts = self.parts.iter().map(|(offsets, sizes)| {
            let part = [("offsets", size(offsets)), ("sizes", size(sizes))];
            Pickled::Object(METADATA_MODULE, "ChunkStorageMetadata", Box::new(Pickled::dict(part)))
        });
        let fields = [
            ("properties", Pickled::Object(METADATA_MODULE, "TensorProperties", Box::new(properties))),
            ("size", size(&self.size)),
            ("chunks", Pickled::List(parts.collect())),
        ];
        Pickled::Object(METADATA_MODULE, "TensorStorageMetadata", Box::new(Pickled::dict(fields)))
    }
}

/// A `torch.Size`.
fn size(numbers: &[i64]) -> Pickled {
    Pickled::Call("torch", "Size", vec![Pickled::integers(numbers)])
}
