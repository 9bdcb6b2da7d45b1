use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::rc::Rc;
use std::sync::atomic::AtomicU64;

use tch::{Device, Kind, Tensor};
use testing::folder::{TestFolder, copy_files};
use testing::golden::golden_megatron;
use testing::tolerance::{Quantity, allowed};

use super::*;
use crate::checkpoint::Weights;
use crate::checkpoint::convert::{Conversion, ConvertTarget, StoredAs, logits_of};
use crate::checkpoint::pickle::Pickled;
use crate::checkpoint::safetensors::TensorEntry;
use crate::checkpoint::source::View;
use crate::checkpoint::torch_file::TorchWriter;
use crate::distributed::sharded::{Layout, Sharded, TensorSpec};
use crate::model::layout::layouts;
use crate::model::{Llama, ModelInput, ScoreHead};

/// The checkpoints in a model's folder.
fn checkpoints(model: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(model).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = entries.filter(|path| name(path).starts_with("torch")).collect();
    found.sort();
    assert!(!found.is_empty(), "{}: no checkpoint", model.display());
    found
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// How a folder was written: `torch-tp2-pp1`, `torch_dist-tp2-pp1`, or `torch-te-tp2-pp1` with names of Transformer Engine's layers; none
/// of folders that differ in more.
fn form(path: &Path) -> Option<MegatronForm> {
    let name = name(path);
    let (format, ranks) = name.split_once("-tp")?;
    let (tensor, pipeline) = ranks.split_once("-pp")?;
    let (shared, engine) = match format {
        "torch" => (false, false),
        "torch_dist" => (true, false),
        "torch-te" | "torch-tegrouped" => (false, true),
        _ => return None,
    };
    let (tensor, pipeline) = (tensor.parse().ok()?, pipeline.parse().ok()?);
    Some(MegatronForm { shared, tensor, pipeline, vocab_multiple: None, engine })
}

fn convert(from: &Path, target: ConvertTarget, kind: Option<Kind>, to: &Path) -> Result<()> {
    let stored = kind.map(StoredAs::Kind);
    let conversion = Conversion::new(Weights::open(from)?, target, stored, None, Device::Cpu)?;
    conversion.write(to, &AtomicU64::new(0)).map(drop)
}

fn same_tensors(a: &Path, b: &Path) {
    let (a, b) = (Weights::open(a).unwrap(), Weights::open(b).unwrap());
    let shape = a.shape().clone();
    let (a, b) = (a.into_source().unwrap(), b.into_source().unwrap());
    for spec in layouts(&shape).iter().flat_map(|l| &l.specs) {
        let tensor = |source: &TensorSource| source.tensor(&spec.name).unwrap();
        assert!(tensor(&a).equal(&tensor(&b)), "{}", spec.name);
    }
}

/// Every tensor of files that megatron-core wrote is that of the same model in Hugging Face's format, however ranks divide it.
#[test]
fn files_of_megatron_core_hold_the_model() {
    for (model, dir) in golden_megatron() {
        let hf = dir.join("hf");
        for path in checkpoints(&dir) {
            let megatron = Weights::open(&path).unwrap_or_else(|e| panic!("{model}, {}: {e}", name(&path)));
            let mut expected = Weights::open(&hf).unwrap().shape().clone();
            if let (Some(expected), Some(read)) = (&mut expected.experts, &megatron.shape().experts) {
                // Of training alone, and said apart.
                expected.router_aux_loss_coef = read.router_aux_loss_coef;
            }
            assert_eq!(*megatron.shape(), expected, "{model}, {}", name(&path));
            same_tensors(&path, &hf);
        }
    }
}

/// Offsets or shapes, and bytes.
type Pieces = Vec<(Vec<i64>, Vec<u8>)>;

/// Tensors of files by file and name, with what a format says of each.
fn stored(path: &Path, form: MegatronForm) -> BTreeMap<String, Pieces> {
    let iteration = iteration(path).unwrap();
    let bytes = |file: &dyn TensorFile, name: &str| {
        let (shape, kind) = file.info(name).unwrap();
        let mut bytes = vec![0; shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes()];
        file.read_bytes(name, 0, &mut bytes).unwrap();
        bytes
    };
    let mut found: BTreeMap<String, Pieces> = BTreeMap::new();
    if form.shared {
        let (shared, files, _) = SharedTensors::open(&iteration).unwrap();
        for (name, size, chunks) in shared.chunks() {
            let parts = chunks.map(|(offsets, file)| {
                (offsets.to_vec(), bytes(files[file].as_ref(), &files[file].names()[0]))
            });
            let mut parts: Vec<_> = parts.collect();
            parts.sort();
            found.insert(format!("{name} {size:?}"), parts);
        }
        return found;
    }
    let (_, files, _) = RankFiles::open(&iteration).unwrap();
    for file in &files {
        let rank = name(file.path().parent().unwrap());
        for tensor in file.names() {
            let value = (file.info(&tensor).unwrap().0, bytes(file.as_ref(), &tensor));
            found.insert(format!("{rank} {tensor}"), vec![value]);
        }
    }
    found
}

/// What is written is what megatron-core wrote: the same names, in the same files or pieces, with the same bytes.
#[test]
fn files_are_those_that_megatron_core_writes() {
    let folder = TestFolder::new("megatron-write");
    for (model, dir) in golden_megatron() {
        let mut compared = 0;
        for path in checkpoints(&dir) {
            let Some(form) = form(&path) else { continue };
            let to = folder.0.join(format!("{model}-{}", name(&path)));
            convert(&dir.join("hf"), ConvertTarget::Megatron(form), None, &to)
                .unwrap_or_else(|e| panic!("{model}, {}: {e}", name(&path)));
            let (ours, theirs) = (stored(&to, form), stored(&path, form));
            let names = |of: &BTreeMap<String, _>| of.keys().cloned().collect::<BTreeSet<String>>();
            assert_eq!(names(&ours), names(&theirs), "{model}, {}", name(&path));
            for (name, value) in &ours {
                assert!(value == &theirs[name], "{model}, {}: {name}", path.display());
            }
            compared += 1;
        }
        assert!(compared > 0, "{model}");
    }
}

/// The logits of a model that was read are megatron-core's own.
#[test]
fn logits_are_those_of_megatron_core() {
    for (model, dir) in golden_megatron() {
        let golden: HashMap<_, _> =
            Tensor::read_safetensors(dir.join("golden.safetensors")).unwrap().into_iter().collect();
        let (ids, theirs) = (&golden["input_ids"], &golden["logits"]);
        for path in checkpoints(&dir) {
            let weights = Weights::open(&path).unwrap();
            let shape = weights.shape().clone();
            let source = Rc::new(weights.into_source().unwrap());
            for row in 0..ids.size()[0] {
                let ids: Vec<i64> = ids.get(row).try_into().unwrap();
                let source = source.clone();
                let tensor = move |spec: &TensorSpec| source.tensor(&spec.name);
                let ours = logits_of(&shape, layouts(&shape), tensor, Device::Cpu, &ids).unwrap();
                let theirs = theirs.get(row);
                let largest = theirs.abs().max().double_value(&[]);
                let difference = (ours - theirs).abs().max().double_value(&[]);
                let allowed = largest * allowed(Quantity::SingleReference, Kind::Float);
                assert!(difference < allowed, "{model}, {}: {difference:e} of {largest}", name(&path));
            }
        }
    }
}

/// From Hugging Face's format into one of Megatron's, at two ranks and two stages, into another format and back: the same bytes.
#[test]
fn round_trips_change_nothing() {
    let folder = TestFolder::new("megatron-round");
    let hf = ConvertTarget::Hf { max_shard_size: 1 << 30 };
    let form = MegatronForm { shared: false, tensor: 2, pipeline: 2, vocab_multiple: None, engine: false };
    for (model, dir) in golden_megatron() {
        let at = |step: &str| folder.0.join(format!("{model}-{step}"));
        for engine in [false, true] {
            convert(
                &dir.join("hf"),
                ConvertTarget::Megatron(MegatronForm { engine, ..form }),
                None,
                &at("a"),
            )
            .unwrap();
            convert(&at("a"), hf, None, &at("b")).unwrap();
            same_tensors(&at("b"), &dir.join("hf"));
        }
        let shared = MegatronForm { shared: true, ..form };
        convert(&at("a"), ConvertTarget::Megatron(shared), None, &at("c")).unwrap();
        let features = &Weights::open(&dir.join("hf")).unwrap().shape().clone();
        let of_meta = features.features == crate::config::shape::Features::default()
            && features.experts.is_none()
            && features.sliding_window.is_none();
        let last = match of_meta {
            true => {
                convert(&at("c"), ConvertTarget::Meta { parts: 2 }, None, &at("d")).unwrap();
                at("d")
            }
            false => at("c"),
        };
        convert(&last, hf, None, &at("e")).unwrap();
        same_tensors(&at("e"), &dir.join("hf"));
    }
}

/// The vocabulary is padded with its last row, to a multiple of what is asked for times the ranks, and cut again.
#[test]
fn vocabularies_are_padded_and_cut() {
    let folder = TestFolder::new("megatron-padded");
    for (model, dir) in golden_megatron() {
        let v = Weights::open(&dir.join("hf")).unwrap().shape().vocab_size;
        for shared in [false, true] {
            let to = folder.0.join(format!("{model}-{shared}"));
            let form =
                MegatronForm { shared, tensor: 2, pipeline: 2, vocab_multiple: Some(40), engine: false };
            convert(&dir.join("hf"), ConvertTarget::Megatron(form), None, &to).unwrap();
            same_tensors(&to, &dir.join("hf"));
            let (format, files, _) = MegatronFormat::open(&iteration(&to).unwrap()).unwrap();
            let rows = format.padded_rows(&files).unwrap();
            let padded = (v + 79) / 80 * 80;
            assert_eq!(rows, VocabRows { embedding: padded, head: padded });
            // The same tensors, read with their padding.
            let embedding = "embedding.word_embeddings.weight";
            let find = |tensors: Vec<CoreTensor>| {
                tensors.into_iter().find(|tensor| tensor.local == embedding).unwrap()
            };
            let model = MegatronModel::load(&to, None).unwrap();
            let tensor = find(core_tensors(model.shape(), rows));
            let width = tensor.shape[1];
            let last_row = |rows: i64| -> Vec<u8> {
                let rectangle = format.locate(&files, &tensor).unwrap().unwrap();
                let part = rectangle.iter().find(|part| part.rows.contains(&rows)).unwrap();
                let first = part.first + (rows - part.rows.start) * part.stride;
                let mut bytes = vec![0; width as usize * 4];
                files[part.file].read_bytes(&part.tensor, first, &mut bytes).unwrap();
                bytes
            };
            assert_eq!(last_row(padded - 1), last_row(v - 1), "padding repeats the last row");
            let View { kind, .. } = model.source().view("model.embed_tokens.weight").unwrap();
            assert_eq!(*kind, Kind::Float);
        }
    }
}

#[test]
fn what_cannot_be_written_is_told() {
    let folder = TestFolder::new("megatron-refused");
    let hf = golden_megatron()["llama"].join("hf");
    let form = MegatronForm { shared: false, tensor: 1, pipeline: 1, vocab_multiple: None, engine: false };
    let refused = |form: MegatronForm, part: &str| {
        let e = convert(&hf, ConvertTarget::Megatron(form), None, &folder.0.join("to")).unwrap_err();
        assert!(e.message.contains(part) && e.exit_code() == 2, "{part}: {e}");
        assert!(!folder.0.join("to").exists(), "nothing is left");
    };
    refused(MegatronForm { tensor: 7, ..form }, "--tensor 7: num_attention_heads");
    refused(MegatronForm { pipeline: 64, ..form }, "--pipeline 64: num_hidden_layers");
    for (family, part) in [("gemma2", "norms after attention and MLP"), ("olmo2", "norms after")] {
        let from = testing::golden::golden_model(family);
        let e = convert(&from, ConvertTarget::Megatron(form), None, &folder.0.join("to")).unwrap_err();
        assert!(e.message.contains(part) && e.exit_code() == 3, "{family}: {e}");
    }
    // Another checkpoint is not replaced.
    fs::create_dir_all(folder.0.join("to/iter_0005000")).unwrap();
    let e = convert(&hf, ConvertTarget::Megatron(form), None, &folder.0.join("to")).unwrap_err();
    assert!(e.message.contains("holds `iter_0005000`"), "{e}");
}

/// A copy of a checkpoint, to be spoiled.
fn copied(what: &str, name: &str) -> TestFolder {
    let from = golden_megatron()["llama"].join(what);
    let folder = TestFolder::new(&format!("megatron-{name}"));
    copy_files(&from, &folder.0, |_| false);
    for entry in fs::read_dir(&from).unwrap().map(|entry| entry.unwrap().path()) {
        if !entry.is_dir() {
            continue;
        }
        let to = folder.0.join(entry.file_name().unwrap());
        fs::create_dir_all(&to).unwrap();
        copy_files(&entry, &to, |_| false);
        for inner in fs::read_dir(&entry).unwrap().map(|entry| entry.unwrap().path()) {
            if inner.is_dir() {
                let to = to.join(inner.file_name().unwrap());
                fs::create_dir_all(&to).unwrap();
                copy_files(&inner, &to, |_| false);
            }
        }
    }
    folder
}

fn refused(dir: &TestFolder, part: &str) {
    let e = MegatronModel::load(&dir.0, None).err().unwrap();
    assert!(e.message.contains(part), "{part}: {e}");
}

#[test]
fn what_cannot_be_read_is_told() {
    let copy = |name: &str| copied("torch-tp2-pp1", name);
    let whole = copy("whole");
    assert!(MegatronModel::load(&whole.0, None).is_ok());
    assert!(MegatronModel::load(&whole.0.join("iter_0000001"), None).is_ok(), "the iteration itself");
    let dir = copy("missing");
    fs::remove_dir_all(dir.0.join("iter_0000001/mp_rank_01")).unwrap();
    refused(&dir, "mp_rank_01");
    let dir = copy("tracker");
    fs::write(dir.0.join(TRACKER), "7").unwrap();
    refused(&dir, "iter_0000007, which is not there");
    fs::write(dir.0.join(TRACKER), "newest").unwrap();
    refused(&dir, "must be a number or the word release");
    fs::write(dir.0.join(TRACKER), "release\n").unwrap();
    fs::rename(dir.0.join("iter_0000001"), dir.0.join("release")).unwrap();
    assert!(MegatronModel::load(&dir.0, None).is_ok());
    let dir = copy("experts");
    for rank in ["mp_rank_00", "mp_rank_01"] {
        let at = dir.0.join("iter_0000001");
        fs::rename(at.join(rank), at.join(format!("{rank}_000"))).unwrap();
        fs::rename(at.join(format!("{rank}_000")), at.join(format!("{rank}_000_000"))).unwrap();
    }
    refused(&dir, "expert_model_parallel_size above 1");
}

#[test]
fn damaged_torch_dist_is_refused() {
    let copy = |name: &str| copied("torch_dist-tp2-pp1", &format!("dist-{name}"));
    let whole = copy("whole");
    assert!(MegatronModel::load(&whole.0, None).is_ok());
    let dir = copy("common");
    fs::remove_file(dir.0.join("iter_0000001").join(shared::COMMON)).unwrap();
    refused(&dir, "no common.pt");
    let dir = copy("file");
    fs::remove_file(dir.0.join("iter_0000001/__0_0.distcp")).unwrap();
    refused(&dir, "__0_0.distcp");
    let dir = copy("short");
    let path = dir.0.join("iter_0000001/__0_0.distcp");
    fs::write(&path, &fs::read(&path).unwrap()[..3000]).unwrap();
    refused(&dir, "belong to a tensor: get it again");
    let dir = copy("metadata");
    let path = dir.0.join("iter_0000001").join(METADATA);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    refused(&dir, "the file is damaged: get it again");
    let spoil = |from: &[u8], to: &[u8]| {
        let at = bytes.windows(from.len()).position(|part| part == from).unwrap();
        fs::write(&path, [&bytes[..at], to, &bytes[at + from.len()..]].concat()).unwrap();
    };
    spoil(b"__0_0.distcp", b"../../secret");
    refused(&dir, "outside of the folder");
    spoil(b"decoder.final_layernorm.weight", b"decoder.other_layernorm.weight");
    refused(&dir, "does not say where");
    // The tensor under another name, wherever it is named.
    let renamed: Vec<u8> = {
        let (from, to) = (b"output_layer.weight", b"output_layer.wei_ht");
        let starts: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(from)).collect();
        let mut renamed = bytes.clone();
        starts.iter().for_each(|at| renamed[*at..at + to.len()].copy_from_slice(to));
        renamed
    };
    fs::write(&path, renamed).unwrap();
    refused(&dir, "`output_layer.weight` is missing");
    refused(&dir, "`output_layer.wei_ht` belongs to no such model");
}

/// Newer Megatron keeps what ranks have in common as an object in a file of tensors.
#[test]
fn common_state_may_be_an_object() {
    let folder = TestFolder::new("megatron-common");
    let to = folder.0.join("dist");
    let form = MegatronForm { shared: true, tensor: 1, pipeline: 1, vocab_multiple: None, engine: false };
    convert(&golden_megatron()["llama"].join("hf"), ConvertTarget::Megatron(form), None, &to).unwrap();
    let iteration = iteration(&to).unwrap();
    let common = fs::read(iteration.join(shared::COMMON)).unwrap();
    fs::remove_file(iteration.join(shared::COMMON)).unwrap();
    fs::write(iteration.join("__1_0.distcp"), [&b"before"[..], &common].concat()).unwrap();
    let key = Pickled::dict([("fqn", Pickled::text("common_state/shard_0_1"))]);
    let place = Pickled::dict([
        ("relative_path", Pickled::text("__1_0.distcp")),
        ("offset", Pickled::Integer(6)),
        ("length", Pickled::Integer(common.len() as i64)),
    ]);
    let item = [("MetadataIndex", key), ("_StorageInfo", place)].map(|(class, state)| {
        let pickle = Pickled::Object("torch.distributed.checkpoint", class, Box::new(state)).write().unwrap();
        // Without the marks of beginning and end.
        pickle[2..pickle.len() - 1].to_vec()
    });
    let path = iteration.join(METADATA);
    let metadata = fs::read(&path).unwrap();
    // The last item of what is stored.
    let end = b"uX\x0c\0\0\0storage_meta";
    let at = metadata.windows(end.len()).position(|part| part == end).unwrap();
    fs::write(&path, [&metadata[..at], &item.concat(), &metadata[at..]].concat()).unwrap();
    same_tensors(&to, &golden_megatron()["llama"].join("hf"));
}

/// A reward model of ChatLearn's is read with its two layers, and its values are those of the formula.
#[test]
fn reward_models_of_chatlearn_score() {
    let hf = golden_megatron()["llama"].join("hf");
    let folder = TestFolder::new("megatron-reward");
    let weights = Weights::open(&hf).unwrap();
    let shape = weights.shape().clone();
    let source = weights.into_source().unwrap();
    let form = MegatronForm { shared: false, tensor: 1, pipeline: 1, vocab_multiple: None, engine: false };
    let plan = MegatronPlan::new(&shape, &source, form, None).unwrap();
    let c = shape.hidden_size;
    tch::manual_seed(7);
    let layers = [vec![c, c], vec![1, c], vec![c], vec![1]]
        .map(|shape| Tensor::randn(shape, (Kind::Float, Device::Cpu)));

    // Each layer's weight, then its bias.
    let order = [0, 2, 1, 3];
    // The file of a language model, and beside it the head in a dictionary of its own.
    let mut entries = plan.entries(0).unwrap();
    let tensors: Vec<Tensor> = {
        let to = folder.0.join("language");
        convert(&hf, ConvertTarget::Megatron(form), None, &to).unwrap();
        let (_, files, _) = RankFiles::open(&iteration(&to).unwrap()).unwrap();
        let read = |entry: &TensorEntry| {
            let mut bytes = vec![0; entry.bytes() as usize];
            files[0].read_bytes(&format!("model.{}", entry.name), 0, &mut bytes).unwrap();
            Tensor::from_data_size(&bytes, &entry.shape, entry.kind)
        };
        entries.iter().map(read).chain(order.map(|i| layers[i].shallow_clone())).collect()
    };
    let tensor = |entry: &TensorEntry| Pickled::Tensor { kind: entry.kind, shape: entry.shape.clone() };
    let mut model: Vec<(Pickled, Pickled)> =
        entries.iter().map(|entry| (Pickled::text(&entry.name), tensor(entry))).collect();
    let of_head = |i: usize| TensorEntry { name: String::new(), kind: Kind::Float, shape: layers[i].size() };
    entries.extend(order.map(of_head));
    let dense =
        |i: usize| Pickled::dict([("weight", tensor(&of_head(i))), ("bias", tensor(&of_head(i + 2)))]);
    let head = Pickled::dict([("dense1", dense(0)), ("dense2", dense(1))]);
    model.push((Pickled::text("pooler_head"), head));
    let path = folder.0.join("reward/release/mp_rank_00").join(ranks::FILE);
    let value = plan.checkpoint(Some(Pickled::Dict(model)));
    let mut writer = TorchWriter::create_with(&path, &value, &entries).unwrap();
    tensors.iter().for_each(|t| writer.write(t).unwrap());
    writer.finish().unwrap();
    fs::write(folder.0.join("reward").join(TRACKER), "release").unwrap();

    let weights = Weights::open(&folder.0.join("reward")).unwrap();
    let scored = weights.shape().clone();
    assert!(scored.head == Head::Score && scored.features.score_layers && scored.predicts().is_err());
    let expected_parameters: usize = layers.iter().map(Tensor::numel).sum();
    let of_trunk = shape.num_parameters() - shape.vocab_size * c;
    assert_eq!(scored.num_parameters(), of_trunk + expected_parameters as i64);
    let Err(e) = Conversion::new(weights, ConvertTarget::Gguf, None, None, Device::Cpu) else {
        panic!("a head of two layers is converted");
    };
    assert!(e.message.contains("no format has a place"), "{e}");
    let source = Rc::new(Weights::open(&folder.0.join("reward")).unwrap().into_source().unwrap());
    let load = move |layout: &Layout| -> Result<Tensor> {
        let flat = Tensor::zeros([layout.numel], (Kind::Float, Device::Cpu));
        for spec in &layout.specs {
            flat.narrow(0, spec.offset, spec.numel()).copy_(&source.tensor(&spec.name)?.view([-1]));
        }
        Ok(flat)
    };
    let params = Sharded::on_demand(layouts(&scored), Kind::Float, Device::Cpu, load);
    let mut model = Llama::new(scored, params);
    let ids = Tensor::arange(10, (Kind::Int64, Device::Cpu)).view([1, 10]);
    let hidden = model.hidden(&ModelInput::new(ids)).unwrap();
    let values = ScoreHead::values(&mut model, &hidden).unwrap();
    let [w1, w2, b1, b2] = &layers;
    let inner = (hidden.matmul(&w1.tr()) + b1).relu();
    let expected = (inner.matmul(&w2.tr()) + b2).view([-1]);
    assert!(f64::try_from((values - expected).abs().max()).unwrap() < 1e-5);
    assert!(
        ScoreHead::backward(&mut model, &hidden, &Tensor::zeros([10], (Kind::Float, Device::Cpu))).is_err()
    );
}

/// A checkpoint is not replaced by what is made of it.
#[test]
fn a_source_is_not_written_over() {
    let dir = copied("torch-tp1-pp1", "source");
    let form = MegatronForm { shared: false, tensor: 1, pipeline: 1, vocab_multiple: None, engine: false };
    for from in [dir.0.clone(), dir.0.join("iter_0000001")] {
        let e = convert(&from, ConvertTarget::Megatron(form), None, &dir.0).unwrap_err();
        assert!(e.message.contains("the source model is in this folder") && e.exit_code() == 2, "{e}");
    }
    assert!(MegatronModel::load(&dir.0, None).is_ok());
}

/// The copy of a tied embedding on the last stage is one.
#[test]
fn a_tied_head_that_differs_is_refused() {
    let folder = TestFolder::new("megatron-tied");
    let to = folder.0.join("tied");
    let form = MegatronForm { shared: false, tensor: 1, pipeline: 2, vocab_multiple: None, engine: false };
    convert(&golden_megatron()["tied"].join("hf"), ConvertTarget::Megatron(form), None, &to).unwrap();
    let model = MegatronModel::load(&to, None).unwrap();
    assert!(model.shape().tie_word_embeddings && model.source().view("lm_head.weight").is_err());
    let embedding = model.source().tensor("model.embed_tokens.weight").unwrap();
    let mut row = vec![0; embedding.size()[1] as usize * 4];
    embedding.get(0).copy_data_u8(&mut row, embedding.size()[1] as usize);
    let path = to.join("iter_0000001/mp_rank_00_001").join(ranks::FILE);
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(row.len()).position(|part| part == row).unwrap();
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    let e = MegatronModel::load(&to, None).err().unwrap();
    assert!(e.message.contains("output_layer.weight differs from the embedding"), "{e}");
}

/// Files of two saves are no checkpoint.
#[test]
fn files_of_two_saves_are_refused() {
    let folder = TestFolder::new("megatron-saves");
    let model = |model: &str, to: &str, tensor: i64| {
        let form = MegatronForm { shared: false, tensor, pipeline: 1, vocab_multiple: None, engine: false };
        let hf = golden_megatron()[model].join("hf");
        convert(&hf, ConvertTarget::Megatron(form), None, &folder.0.join(to)).unwrap();
    };
    model("llama", "two", 2);
    model("llama", "other", 2);
    let rank = "iter_0000001/mp_rank_01/model_optim_rng.pt";
    let path = folder.0.join("two").join(rank);
    // The number of the iteration, which `args` has besides.
    let bytes = fs::read(&path).unwrap();
    let key = b"X\x09\0\0\0iterationJ\x01";
    let starts: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(key)).collect();
    assert_eq!(starts.len(), 2);
    let mut other = bytes;
    starts.iter().for_each(|at| other[at + key.len() - 1] = 2);
    fs::write(&path, other).unwrap();
    let e = MegatronModel::load(&folder.0.join("two"), None).err().unwrap();
    assert!(e.message.contains("of another save than the first file"), "{e}");
    assert!(MegatronModel::load(&folder.0.join("other"), None).is_ok());
}
