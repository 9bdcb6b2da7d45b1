//! Files of tensors, and models that are read and exported.

use super::*;
use crate::checkpoint::safetensors::{SafetensorsReader, SafetensorsWriter, TensorEntry};
use crate::checkpoint::source::TensorFile;
use crate::error::ErrorClass;
use crate::model::layout::{EMBEDDING, LM_HEAD};

#[test]
fn tensors_survive_files_in_every_dtype() {
    let folder = TestFolder::new("checkpoint");
    let path = folder.0.join("x.safetensors");
    let values = Tensor::randn([7, 300], (Kind::Double, Device::Cpu));
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half] {
        let entry =
            |name: &str, shape: &[i64]| TensorEntry { name: name.into(), kind, shape: shape.to_vec() };
        let entries = [entry("a", &[7, 300]), entry("empty", &[0]), entry("b", &[300, 7])];
        let mut writer = SafetensorsWriter::create(&path, &entries).unwrap();
        writer.write(&values).unwrap();
        writer.write(&values.narrow(0, 0, 0)).unwrap();
        writer.write(&values.tr()).unwrap();
        let written = writer.finish().unwrap();
        assert_eq!(written.bytes, fs::metadata(&path).unwrap().len());
        assert_eq!(written.crc32, crate::files::crc32(&path).unwrap());

        let reader = SafetensorsReader::open(&path).unwrap();
        assert_eq!(reader.metadata()["format"], "pt");
        assert_eq!(reader.info("b").unwrap(), (vec![300, 7], kind));
        for into in [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half] {
            let dst = Tensor::zeros([900], (into, Device::Cpu));
            reader.read("a", 450, &dst).unwrap();
            let right = values.view([-1]).narrow(0, 450, 900).to_kind(kind).to_kind(into);
            assert!(dst.equal(&right), "{kind:?} read as {into:?}");
        }
        // libtorch's own reader agrees.
        let theirs = Tensor::read_safetensors(&path).unwrap();
        let b = &theirs.iter().find(|(name, _)| name == "b").unwrap().1;
        assert!(b.equal(&values.tr().to_kind(kind)));
        assert!(reader.read("a", 2000, &Tensor::zeros([101], (Kind::Float, Device::Cpu))).is_err());
    }
}

#[test]
fn damaged_safetensors_are_refused_by_name() {
    let folder = TestFolder::new("checkpoint");
    let path = folder.0.join("x.safetensors");
    let entry = TensorEntry { name: "weight".into(), kind: Kind::Float, shape: vec![4, 4] };
    let mut writer = SafetensorsWriter::create(&path, &[entry]).unwrap();
    writer.write(&Tensor::ones([4, 4], (Kind::Float, Device::Cpu))).unwrap();
    writer.finish().unwrap();
    let good = fs::read(&path).unwrap();
    let header = String::from_utf8(good[8..good.len() - 64].to_vec()).unwrap();
    let with_header = |text: &str| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes.extend([0; 64]);
        bytes
    };
    let cases: [(&str, Vec<u8>, &str); 8] = [
        ("empty", vec![], "0 bytes"),
        ("cut in the header", good[..40].to_vec(), "header"),
        ("cut in the data", good[..good.len() - 1].to_vec(), "its header describes"),
        ("longer", [good.clone(), vec![0]].concat(), "its header describes"),
        ("huge header", [&u64::MAX.to_le_bytes(), &good[8..]].concat(), "header"),
        ("no JSON", with_header(&header.replace('{', "[")), "header not usable"),
        ("offsets", with_header(&header.replace("[0,64]", "[4,64]")), "weight"),
        ("shape", with_header(&header.replace("[4,4]", "[4,5]")), "header not usable"),
    ];
    for (what, bytes, part) in cases {
        fs::write(&path, bytes).unwrap();
        let e = SafetensorsReader::open(&path).err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert_eq!(e.kind, ErrorClass::Data, "{what}");
        assert!(e.message.contains("x.safetensors") && e.message.contains(part), "{what}: {e}");
    }
    fs::write(&path, with_header(&header.replace("F32", "I32"))).unwrap();
    let dst = Tensor::zeros([16], (Kind::Float, Device::Cpu));
    let e = SafetensorsReader::open(&path).unwrap().read("weight", 0, &dst).unwrap_err();
    assert!(e.message.contains("`weight` has dtype I32"), "{e}");
}

#[test]
fn a_full_disk_is_one_clear_message() {
    let folder = TestFolder::new("checkpoint");
    let path = folder.0.join("x.safetensors");
    std::os::unix::fs::symlink("/dev/full", folder.0.join(".tmp-x.safetensors")).unwrap();
    let entry = TensorEntry { name: "weight".into(), kind: Kind::Float, shape: vec![1 << 20] };
    let mut writer = SafetensorsWriter::create(&path, &[entry]).unwrap();
    let e = writer.write(&Tensor::ones([1 << 20], (Kind::Float, Device::Cpu))).unwrap_err();
    assert_eq!(e.exit_code(), 1);
    assert!(e.message.contains("x.safetensors") && e.message.contains("GB are free"), "{e}");
    drop(writer);
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 0, "nothing is left");
}

#[test]
fn golden_models_load_as_they_are() {
    for name in ["llama2", "llama3", "tied", "llama3_sharded", "mistral", "mixtral", "qwen2"] {
        let model = HfModel::load(&golden_model(name)).unwrap();
        assert!(model.warnings().is_empty(), "{:?}", model.warnings());
        let mut tensors = std::collections::HashMap::new();
        for entry in fs::read_dir(golden_model(name)).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap();
            if file.starts_with("model") && file.ends_with(".safetensors") {
                tensors.extend(Tensor::read_safetensors(&path).unwrap());
            }
        }
        let tensors = std::sync::Mutex::new(tensors);
        on_ranks(3, |world| {
            let mut params = params(model.shape(), &world, StorageMode::Full, Kind::Double);
            model.source().fill(&mut params).unwrap();
            for i in 0..params.len() {
                let full = params.gather_master(i).unwrap();
                for spec in &params.layout(i).specs {
                    let right = tensors.lock().unwrap()[&spec.name].to_kind(Kind::Double);
                    assert!(spec.view(&full).equal(&right), "{}", spec.name);
                }
            }
        });
    }
}

/// A tied model with another head is untied, one whose file has its embedding twice is not: transformers 5's `tie_weights`,
/// in files of both kinds.
#[test]
fn a_head_beside_a_tied_embedding_is_compared() {
    let weights = Tensor::read_safetensors(golden_model("tied").join("model.safetensors")).unwrap();
    let embedding = weights.iter().find(|(name, _)| name == EMBEDDING).unwrap().1.shallow_clone();
    let last = Tensor::zeros_like(&embedding);
    let _ = last.get(599).get(63).fill_(1.0);
    // The embedding's own names, the head, and whether the model stays tied.
    let cases: [(&str, bool, Option<Tensor>, bool); 4] = [
        ("equal", true, Some(embedding.copy()), true),
        ("other", true, Some(&embedding + &last), false),
        ("alone", false, Some(embedding.copy()), true),
        ("none", true, None, true),
    ];
    for (name, with_embedding, head, tied) in &cases {
        for bin in [false, true] {
            let folder = TestFolder::new("checkpoint");
            let dir = folder.0.join(format!("{name}-{bin}"));
            fs::create_dir(&dir).unwrap();
            fs::copy(golden_model("tied").join("config.json"), dir.join("config.json")).unwrap();
            let kept = weights.iter().filter(|(name, _)| *with_embedding || name != EMBEDDING);
            let head_too = head.iter().map(|head| (LM_HEAD, head));
            let tensors: Vec<(&str, &Tensor)> = kept.map(|(n, t)| (n.as_str(), t)).chain(head_too).collect();
            let entry = |(name, t): &(&str, &Tensor)| TensorEntry {
                name: name.to_string(),
                kind: Kind::Float,
                shape: t.size(),
            };
            let entries: Vec<TensorEntry> = tensors.iter().map(entry).collect();
            if bin {
                let path = dir.join("pytorch_model.bin");
                let mut writer = crate::checkpoint::torch_file::TorchWriter::create(&path, &entries).unwrap();
                tensors.iter().for_each(|(_, t)| writer.write(t).unwrap());
                writer.finish().unwrap();
            } else {
                let mut writer = SafetensorsWriter::create(&dir.join("model.safetensors"), &entries).unwrap();
                tensors.iter().for_each(|(_, t)| writer.write(t).unwrap());
                writer.finish().unwrap();
            }
            let model = HfModel::load(&dir).unwrap();
            assert_eq!(model.shape().tie_word_embeddings, *tied, "{name}");
            assert_eq!(model.warnings().len(), usize::from(!tied), "{name}: {:?}", model.warnings());
            let source = model.into_source();
            assert!(source.tensor(EMBEDDING).unwrap().equal(&embedding), "{name}");
            if !tied {
                assert!(source.tensor(LM_HEAD).unwrap().equal(head.as_ref().unwrap()), "{name}");
            }
        }
    }
}

#[test]
fn other_families_and_unfit_tensors_are_refused() {
    let folder = TestFolder::new("checkpoint");
    let copy = |from: &str, to: &str| {
        fs::copy(golden_model("llama3_sharded").join(from), folder.0.join(to)).unwrap();
    };
    let config = fs::read_to_string(golden_model("llama3_sharded").join("config.json")).unwrap();
    fs::write(folder.0.join("config.json"), &config).unwrap();
    copy("model.safetensors.index.json", "model.safetensors.index.json");
    for part in 1..=3 {
        let name = format!("model-{part:05}-of-00004.safetensors");
        copy(&name, &name);
    }
    let error = || HfModel::load(&folder.0).err().unwrap();
    assert!(error().message.contains("model-00004-of-00004.safetensors"), "{}", error());
    copy("model-00004-of-00004.safetensors", "model-00004-of-00004.safetensors");
    HfModel::load(&folder.0).unwrap();

    fs::write(folder.0.join("config.json"), config.replace("LlamaFor", "GemmaFor")).unwrap();
    assert_eq!(error().exit_code(), 3);
    let known = "known are: LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, QWenLMHeadModel, \
                 Qwen2ForCausalLM, Qwen3ForCausalLM";
    assert!(error().message.contains("config.json") && error().message.contains(known), "{}", error());
    let other = config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    fs::write(folder.0.join("config.json"), other).unwrap();
    assert!(
        error().message.contains("`model.layers.2.input_layernorm.weight` [64] is missing"),
        "{}",
        error()
    );
    fs::write(
        folder.0.join("config.json"),
        config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"),
    )
    .unwrap();
    assert!(
        error().message.contains("`model.layers.1.mlp.up_proj.weight` belongs to no LlamaForCausalLM"),
        "{}",
        error()
    );
    fs::write(folder.0.join("config.json"), config.replace("\"vocab_size\": 600", "\"vocab_size\": 601"))
        .unwrap();
    assert!(error().message.contains("is [600, 64] and should be [601, 64]"), "{}", error());
    assert_eq!(error().exit_code(), 3);

    let index = folder.0.join("model.safetensors.index.json");
    fs::write(folder.0.join("config.json"), config).unwrap();
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replace("model-00001-of", "../model-00001-of")).unwrap();
    assert!(error().message.contains("names no file of its folder"), "{}", error());
}

#[test]
fn an_export_is_an_import() {
    let mut cases = vec![(tiny(false), 1, u64::MAX), (tiny(true), 2, 9000)];
    cases.extend(one_a_family().into_iter().map(|shape| (shape, 2, 9000)));
    for (shape, ranks, max_shard_size) in cases {
        let folder = TestFolder::new("checkpoint");
        let dir = folder.0.join("model");
        let tokenizer = tokenizer("llama3");
        // The second export replaces the first.
        for _ in 0..2 {
            on_ranks(ranks, |world| {
                let (params, _) = trained(&shape, &world, StorageMode::Full, Kind::Float);
                let how =
                    Export { dtype: Kind::Float, max_shard_size, tokenizer: Some(&tokenizer), scoring: None };
                export(&dir, &shape, &params, &how, &world).unwrap();
            });
        }
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "temporary folders are left");
        assert_eq!(dir.join("model.safetensors").exists(), max_shard_size == u64::MAX);
        assert!(dir.join("tokenizer.json").is_file());
        let model = HfModel::load(&dir).unwrap();
        assert_eq!(model.shape(), &shape);
        let config: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["eos_token_id"], json!([593, 598]));
        assert_eq!(config["torch_dtype"], "float32");
        let mut loaded = params(&shape, &Group::solo(), StorageMode::Full, Kind::Float);
        Weights::open(&folder.0).unwrap().fill(&mut loaded).unwrap();
        let (right, _) = trained(&shape, &Group::solo(), StorageMode::Full, Kind::Float);
        for i in 0..loaded.len() {
            assert!(loaded.master(i).equal(&right.master(i)));
        }
    }
}

#[test]
fn an_export_spares_what_is_not_its_own_and_fails_on_all_ranks() {
    let (folder, shape) = (TestFolder::new("checkpoint"), tiny(false));
    fs::write(folder.0.join("thesis.txt"), "precious").unwrap();
    let errors = on_ranks(2, |world| {
        let (params, _) = trained(&shape, &world, StorageMode::Replicate, Kind::Float);
        let how = Export { dtype: Kind::BFloat16, max_shard_size: u64::MAX, tokenizer: None, scoring: None };
        let e = export(Path::new("."), &shape, &params, &how, &world).unwrap_err();
        assert!(e.message.contains("not a name for a file or folder"), "{e}");
        export(&folder.0, &shape, &params, &how, &world).unwrap_err()
    });
    for e in errors {
        assert_eq!(e.exit_code(), 2);
        assert!(e.message.contains("`thesis.txt`"), "{e}");
    }
    assert!(folder.0.join("thesis.txt").exists());
}

#[test]
fn a_path_without_a_model_is_told_what_a_model_is() {
    let folder = TestFolder::new("checkpoint");
    let error = |path: &Path| Weights::open(path).err().unwrap();
    assert!(error(&folder.0).message.contains("config.json"));
    assert!(error(&folder.0.join("nowhere")).message.contains("no such folder"));
    fs::create_dir(folder.0.join("checkpoints")).unwrap();
    assert_eq!(error(&folder.0).exit_code(), 3);
    fs::write(folder.0.join("params.json"), "{}").unwrap();
    assert!(error(&folder.0).message.contains("there is params.json, and no consolidated.00.pth"));
}

#[test]
fn new_rows_are_the_mean_of_the_old_ones() {
    for tied in [false, true] {
        let (folder, shape) = (TestFolder::new("checkpoint"), tiny(tied));
        save(&folder.0, &shape, 2, StorageMode::Full, Kind::Float, &[1]);
        let (old, _) = trained(&shape, &Group::solo(), StorageMode::Full, Kind::Float);
        let how = Export { dtype: Kind::Float, max_shard_size: u64::MAX, tokenizer: None, scoring: None };
        let model = folder.0.join("exported");
        export(&model, &shape, &old, &how, &Group::solo()).unwrap();
        let larger = Shape { vocab_size: 64, ..shape.clone() };
        for path in [model, step_dir(&folder.0, 1)] {
            for (ranks, mode) in [(1, StorageMode::Full), (3, StorageMode::Full), (2, StorageMode::Replicate)]
            {
                on_ranks(ranks, |world| {
                    let (old, _) = trained(&shape, &Group::solo(), StorageMode::Full, Kind::Float);
                    let mut grown = params(&larger, &world, mode, Kind::Float);
                    Weights::open(&path).unwrap().fill(&mut grown).unwrap();
                    for i in 0..grown.len() {
                        let (now, before) = (grown.gather_master(i).unwrap(), old.gather_master(i).unwrap());
                        if !["embedding", "head"].contains(&grown.layout(i).name.as_str()) {
                            assert!(now.equal(&before));
                            continue;
                        }
                        let (now, before) = (now.view([64, 24]), before.view([37, 24]));
                        assert!(now.narrow(0, 0, 37).equal(&before));
                        let mean = before.to_kind(Kind::Double).mean_dim(0, true, Kind::Double);
                        let mean = mean.to_kind(Kind::Float).expand([27, 24], false);
                        let off = (now.narrow(0, 37, 27) - mean).abs().max().double_value(&[]);
                        assert!(off < allowed(Quantity::RoundedMean, Kind::Float), "{off}");
                    }
                });
            }
        }
        // A run that goes on must have the model that it had.
        let e = load_error(&Checkpoint::open(&step_dir(&folder.0, 1)).unwrap(), &larger);
        assert!(e.message.contains("is [37, 24] in the checkpoint, [64, 24] in the model"), "{e}");
    }
}
