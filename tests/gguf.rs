//! GGUF files: models and tokenizers as the package `gguf` writes them (`tests/fixtures/make_gguf.py`), and ours there and
//! back. What llama.cpp and transformers make of ours is in `tests/interop/test_gguf.py`.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicU64;
use testing::compare::relative;
use testing::folder::folder;
use testing::golden::{golden_model, repository};
use testing::program::corral;
use testing::tolerance::{Quantity, allowed};

use common::load;
use corral::checkpoint::Weights;
use corral::checkpoint::convert::{Conversion, ConvertReport, ConvertTarget, StoredAs};
use corral::config::shape::{LayerType, Shape};
use corral::data::tokenizer::Tokenizer;
use corral::data::tokenizer::gguf::GgufLimit;
use corral::gguf::{Gguf, GgufDtype, GgufWriter, Metadata, MetadataArray, MetadataValue};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

fn fixture(name: &str) -> PathBuf {
    testing::golden::fixture("gguf").join(name)
}

/// The models that the fixtures were made of, whatever CORRAL_GOLDEN says.
fn model(name: &str) -> PathBuf {
    repository().join("tests/golden/models").join(name)
}

fn convert(
    from: &Path,
    to: &Path,
    target: ConvertTarget,
    stored: Option<StoredAs>,
) -> corral::Result<ConvertReport> {
    Conversion::new(Weights::open(from)?, target, stored, None, Device::Cpu)?.write(to, &AtomicU64::new(0))
}

/// A shape without what only training asks for.
fn without_training(shape: &Shape) -> Shape {
    let mut shape = shape.clone();
    shape.initializer_range = 0.0;
    shape.experts.iter_mut().for_each(|e| e.router_aux_loss_coef = 0.0);
    shape
}

/// A tensor as a float32 file gives it back: norms of a Gemma lie there plus 1.
fn as_kept(name: &str, shape: &Shape, t: &Tensor) -> Tensor {
    match shape.features.norm_offset && name.ends_with("norm.weight") {
        true => (t.to_kind(Kind::Float) + 1.0) - 1.0,
        false => t.shallow_clone(),
    }
}

/// The converter's file says less than the golden configuration.
fn as_converted(name: &str, mut shape: Shape) -> Shape {
    if shape.features.query_pre_attn_scalar.is_some() {
        shape.features.query_pre_attn_scalar = Some(shape.head_dim);
    }
    if name == "gemma3" {
        shape.features.layer_types = Some(vec![LayerType::SlidingAttention; 2]);
    }
    shape
}

#[test]
fn models_of_other_programs_are_the_golden_ones() {
    for (file, name) in [
        ("llama3.gguf", "llama3"),
        ("qwen2.gguf", "qwen2"),
        ("mixtral-00001-of-00002.gguf", "mixtral"),
        ("gemma2.gguf", "gemma2"),
        ("gemma3.gguf", "gemma3"),
        ("olmo2.gguf", "olmo2"),
        ("phi3.gguf", "phi3"),
    ] {
        let (read, golden) = (Weights::open(&fixture(file)).unwrap(), Weights::open(&model(name)).unwrap());
        let shape = golden.shape().clone();
        let wanted = as_converted(name, without_training(&shape));
        assert_eq!(without_training(read.shape()), wanted, "{name}");
        let (read, golden) = (read.into_source().unwrap(), golden.into_source().unwrap());
        let names: Vec<&String> = golden.views.keys().collect();
        assert_eq!(names.len(), read.views.len(), "{name}");
        for tensor in names {
            let (ours, theirs) = (read.tensor(tensor).unwrap(), golden.tensor(tensor).unwrap());
            let kept = as_kept(tensor, &shape, &theirs);
            assert_eq!(ours, kept.to_kind(ours.kind()), "{name}: {tensor}");
            let vector = theirs.dim() == 1 || tensor.ends_with("block_sparse_moe.gate.weight");
            assert_eq!(ours.kind(), if vector { Kind::Float } else { Kind::Half }, "{name}: {tensor}");
        }
    }
}

/// Old files hold each expert's matrices as tensors of their own, `blk.0.ffn_gate.3.weight`.
#[test]
fn experts_may_have_tensors_of_their_own() {
    let dir = folder("old_experts");
    let new = dir.join("new.gguf");
    convert(&model("mixtral"), &new, ConvertTarget::Gguf, None).unwrap();
    let file = Gguf::open(&new).unwrap();
    let mut parts: Vec<(String, GgufDtype, Vec<i64>, Vec<u8>)> = Vec::new();
    for tensor in file.tensors() {
        let mut bytes = vec![0; tensor.dtype.bytes(tensor.numel()) as usize];
        file.read_blocks(tensor, 0, &mut bytes).unwrap();
        match tensor.name.strip_suffix("_exps.weight") {
            Some(name) => {
                let of_one = bytes.len() / tensor.shape[0] as usize;
                parts.extend(bytes.chunks(of_one).enumerate().map(|(expert, bytes)| {
                    let name = format!("{name}.{expert}.weight");
                    (name, tensor.dtype, tensor.shape[1..].to_vec(), bytes.to_vec())
                }));
            }
            None => parts.push((tensor.name.clone(), tensor.dtype, tensor.shape.clone(), bytes)),
        }
    }
    assert!(parts.len() > file.tensors().len());
    let old = dir.join("old.gguf");
    let tensors = parts.iter().map(|(name, dtype, shape, _)| (name.as_str(), *dtype, shape.as_slice()));
    let mut writer = GgufWriter::create(&old, &file.metadata, tensors).unwrap();
    for (_, _, _, bytes) in &parts {
        writer.tensor(|put| put(bytes)).unwrap();
    }
    writer.finish().unwrap().commit().unwrap();
    let [a, b] = [&old, &new].map(|path| Weights::open(path).unwrap().into_source().unwrap());
    assert_eq!(a.views.len(), b.views.len());
    for tensor in a.views.keys() {
        assert_eq!(a.tensor(tensor).unwrap(), b.tensor(tensor).unwrap(), "{tensor}");
    }
}

#[test]
fn tokenizers_of_other_programs_give_the_golden_ids() {
    for (file, golden) in
        [("llama3.gguf", "llama3"), ("qwen2.gguf", "qwen2"), ("mixtral-00001-of-00002.gguf", "sp")]
    {
        let tokenizer = Tokenizer::load(fixture(file)).unwrap();
        let path = repository().join("tests/golden/tokenizer").join(format!("{golden}.json"));
        let golden: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = |key: &str| -> Vec<u32> { serde_json::from_value(case[key].clone()).unwrap() };
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids("ids"), "{file}: {text:?}");
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids("ids_no_special"), "{file}: {text:?}");
        }
        let template = tokenizer.chat_template().map(|t| t.source.as_str());
        if file != "mixtral-00001-of-00002.gguf" {
            assert_eq!(template, golden["chat_template"].as_str(), "{file}");
        }
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
        assert_eq!(text(tokenizer.bos_id()).as_deref(), golden["bos"].as_str(), "{file}");
        assert_eq!(text(tokenizer.eos_ids().first().copied()).as_deref(), golden["eos"].as_str(), "{file}");
    }
}

#[test]
fn all_families_go_there_and_back() {
    let dir = folder("there_and_back");
    let families = [
        "llama2",
        "llama3",
        "tied",
        "mistral",
        "qwen2",
        "mixtral",
        "gemma2",
        "gemma3",
        "gemma3_new",
        "olmo2",
        "phi3",
    ];
    for name in families {
        let golden = golden_model(name);
        let shape = Weights::open(&golden).unwrap().shape().clone();
        for (i, stored) in [
            None,
            Some(StoredAs::Kind(Kind::Half)),
            Some(StoredAs::Kind(Kind::BFloat16)),
            Some(StoredAs::Blocks(GgufDtype::Q8_0)),
            Some(StoredAs::Blocks(GgufDtype::Q4_0)),
            Some(StoredAs::Blocks(GgufDtype::Q4_1)),
        ]
        .into_iter()
        .enumerate()
        {
            let file = dir.join(format!("{name}-{i}.gguf"));
            let report = convert(&golden, &file, ConvertTarget::Gguf, stored)
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            let rounds = stored.is_some() || shape.features.norm_offset;
            assert_eq!(report.rounding.is_some(), rounds, "{name} {stored:?}");
            assert!(
                stored.is_some()
                    || report.rounding.is_none_or(|most| most < allowed(Quantity::StoredNorms, Kind::Float)),
                "{name}: {report:?}"
            );
            let left_out = name == "mistral" || name == "phi3" || name.starts_with("gemma");
            assert_eq!(report.unread.is_some(), left_out, "{name}: {report:?}");
            if stored.is_some() {
                continue;
            }
            // Nothing else is lost on the way.
            let back = dir.join(format!("{name}-back"));
            convert(&file, &back, ConvertTarget::Hf { max_shard_size: 1 << 30 }, None).unwrap();
            let [a, b] = [back.as_path(), &golden].map(|path| Weights::open(path).unwrap());
            assert_eq!(without_training(a.shape()), without_training(b.shape()), "{name}");
            let [a, b] = [a, b].map(|weights| weights.into_source().unwrap());
            for tensor in a.views.keys() {
                let kept = as_kept(tensor, &shape, &b.tensor(tensor).unwrap());
                assert_eq!(a.tensor(tensor).unwrap(), kept, "{name}: {tensor}");
            }
            let [a, b] = [back.as_path(), &golden].map(|path| Tokenizer::load(path).unwrap());
            corral::data::tokenizer::gguf::check_same(&a, &b, report.loss).unwrap();
            assert_eq!(report.loss, (name == "mistral").then_some(GgufLimit::SpaceBefore), "{name}");
            assert_eq!(
                (a.bos_id(), a.eos_ids().first(), a.pad_id(), a.adds_bos()),
                (b.bos_id(), b.eos_ids().first(), b.pad_id(), b.adds_bos()),
                "{name}"
            );
            assert_eq!(a.chat_template().map(|t| &t.source), b.chat_template().map(|t| &t.source), "{name}");
        }
    }
    let leftovers: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().as_encoded_bytes()[0] == b'.')
        .collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

#[test]
fn what_a_file_cannot_express_is_refused() {
    let dir = folder("cannot_express");
    // A Qwen 3 whose window is off.
    let off =
        configured(&dir, "qwen3", &[("use_sliding_window", false.into()), ("layer_types", Value::Null)]);
    convert(&off, &dir.join("qwen3-off.gguf"), ConvertTarget::Gguf, Some(StoredAs::Blocks(GgufDtype::Q8_0)))
        .unwrap();
    // Its second block alone has a window.
    let e = convert(&model("qwen3"), &dir.join("qwen3.gguf"), ConvertTarget::Gguf, None).unwrap_err();
    assert!(e.exit_code() == 3 && e.message.contains("cannot express this model: a sliding window"), "{e}");
    assert!(!dir.join("qwen3.gguf").exists());
    let e = convert(
        &model("llama2"),
        &dir.join("hf"),
        ConvertTarget::Hf { max_shard_size: 1 },
        Some(StoredAs::Blocks(GgufDtype::Q4_0)),
    );
    assert!(e.as_ref().is_err_and(|e| e.exit_code() == 2 && e.message.contains("--format gguf")), "{e:?}");
}

/// A file with another name, or with some of its bytes changed: `find` becomes `put`, which is as long.
fn changed(dir: &Path, name: &str, find: &[u8], put: &[u8]) -> PathBuf {
    let mut bytes = fs::read(fixture("llama3.gguf")).unwrap();
    let at = bytes.windows(find.len()).position(|w| w == find).unwrap_or_else(|| panic!("{name}: not there"));
    bytes[at..at + put.len()].copy_from_slice(put);
    let path = dir.join(format!("{name}.gguf"));
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn what_is_not_known_is_named() {
    let dir = folder("refused");
    let key = |key: &str, kind: u32| {
        [&(key.len() as u64).to_le_bytes()[..], key.as_bytes(), &kind.to_le_bytes()].concat()
    };
    // The type stands after the number of dimensions and two of them.
    let tensor = |kind: u32| {
        let name = "token_embd.weight";
        [
            &(name.len() as u64).to_le_bytes()[..],
            name.as_bytes(),
            &2u32.to_le_bytes(),
            &64u64.to_le_bytes(),
            &600u64.to_le_bytes(),
            &kind.to_le_bytes(),
        ]
        .concat()
    };
    let text =
        |value: &str| [&key("general.architecture", 8)[..], &5u64.to_le_bytes(), value.as_bytes()].concat();
    for (name, find, put, said) in [
        ("magic", b"GGUF".to_vec(), b"GGML".to_vec(), "does not begin with `GGUF`"),
        ("old", b"GGUF\x03\0\0\0".to_vec(), b"GGUF\x01\0\0\0".to_vec(), "version 1 of GGUF is not known"),
        ("new", b"GGUF\x03\0\0\0".to_vec(), b"GGUF\x09\0\0\0".to_vec(), "version 9 of GGUF is not known"),
        ("big", b"GGUF\x03\0\0\0".to_vec(), b"GGUF\0\0\0\x03".to_vec(), "big-endian"),
        ("architecture", text("llama"), text("gemma"), "architecture \"gemma\" is not known"),
        ("type", tensor(1), tensor(23), "tensor `token_embd.weight`: its type is IQ4_XS; built are F32"),
        ("no_type", tensor(1), tensor(99), "its type is 99, which is not known"),
        (
            "name",
            b"blk.1.attn_q.weight".to_vec(),
            b"blk.1.attn_z.weight".to_vec(),
            "`blk.1.attn_q.weight` [64, 64] is missing",
        ),
        ("pre", b"llama-bpe".to_vec(), b"llama-bpX".to_vec(), "pre-tokenizer \"llama-bpX\" is not built"),
        (
            "heads",
            key("llama.attention.head_count", 4),
            key("llama.attention.head_counX", 4),
            "`llama.attention.head_count` is missing",
        ),
    ] {
        let path = changed(&dir, name, &find, &put);
        let model = Weights::open(&path).map(drop);
        let e = model.and_then(|()| Tokenizer::load(&path).map(drop)).expect_err(name);
        assert!(
            e.exit_code() == 3 && e.message.contains(said) && e.message.contains(&format!("{name}.gguf")),
            "{name}: {e}"
        );
    }
    let part = |name: &str| dir.join(name);
    let first = "mixtral-00001-of-00002.gguf";
    fs::copy(fixture(first), part(first)).unwrap();
    let e = Weights::open(&part(first)).map(drop).unwrap_err();
    assert!(e.message.contains("mixtral-00002-of-00002.gguf is missing"), "{e}");
    let second = "mixtral-00002-of-00002.gguf";
    let e = Weights::open(&fixture(second)).map(drop).unwrap_err();
    assert!(e.message.contains("name the first") && e.message.contains(first), "{e}");
    fs::copy(fixture(first), part("alone.gguf")).unwrap();
    let e = Weights::open(&part("alone.gguf")).map(drop).unwrap_err();
    assert!(e.message.contains("it is part 1 of 2"), "{e}");
    fs::copy(fixture(first), part(second)).unwrap();
    let e = Weights::open(&part(first)).map(drop).unwrap_err();
    assert!(e.message.contains("by its name it is part 2 of 2, by split.no and split.count 1 of 2"), "{e}");
}

#[test]
fn a_folder_with_one_gguf_model_is_that_model() {
    let dir = folder("one_file");
    fs::copy(fixture("qwen2.gguf"), dir.join("a.gguf")).unwrap();
    assert_eq!(Weights::open(&dir).unwrap().shape().hidden_size, 64);
    fs::copy(fixture("llama3.gguf"), dir.join("b.gguf")).unwrap();
    let e = Weights::open(&dir).map(drop).unwrap_err();
    assert!(e.message.contains(": several GGUF models (a.gguf, b.gguf): name one"), "{e}");
    // Parts are one model.
    let dir = folder("one_model");
    for i in 1..=2 {
        let name = format!("mixtral-0000{i}-of-00002.gguf");
        fs::copy(fixture(&name), dir.join(name)).unwrap();
    }
    assert!(Weights::open(&dir).unwrap().shape().experts.is_some());
}

#[test]
fn a_model_scores_alike_from_both_formats() {
    let dir = folder("scores");
    for name in ["llama2", "gemma2", "gemma3", "gemma3_new", "olmo2", "phi3"] {
        let (golden, file) = (golden_model(name), dir.join(format!("{name}.gguf")));
        convert(&golden, &file, ConvertTarget::Gguf, None).unwrap();
        let shape = Weights::open(&golden).unwrap().shape().clone();
        let ids: Vec<i64> = (0..40).map(|i| i * 13 % shape.vocab_size).collect();
        let ids = Tensor::from_slice(&ids).view([1, 40]);
        let logits = |path: &Path| {
            let mut model = load(path, Kind::Float);
            let hidden = model.hidden(&corral::model::ModelInput::new(ids.shallow_clone())).unwrap();
            model.next_token_logits(&hidden).unwrap()
        };
        let (ours, theirs) = (logits(&file), logits(&golden));
        match shape.features.norm_offset {
            false => assert_eq!(ours, theirs, "{name}"),
            // A norm's weight plus 1 is rounded to 2^-24 of its size.
            true => {
                assert!(relative(&ours, &theirs) < allowed(Quantity::RoundedNorms, Kind::Float), "{name}")
            }
        }
    }
}

/// A file with other metadata and the same tensors.
fn with_metadata(from: &Path, to: &Path, change: impl FnOnce(&mut Metadata)) {
    let file = Gguf::open(from).unwrap();
    let mut metadata = file.metadata.clone();
    change(&mut metadata);
    let tensors = file.tensors().iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice()));
    let mut writer = GgufWriter::create(to, &metadata, tensors).unwrap();
    for tensor in file.tensors() {
        let mut bytes = vec![0; tensor.dtype.bytes(tensor.numel()) as usize];
        file.read_blocks(tensor, 0, &mut bytes).unwrap();
        writer.tensor(|put| put(&bytes)).unwrap();
    }
    writer.finish().unwrap().commit().unwrap();
}

/// Keys that only some converters write, and what llama.cpp takes where they are missing.
#[test]
fn keys_of_an_architecture_are_read_or_refused() {
    use MetadataValue::{Array, Float, Integer, Text};
    let dir = folder("keys");
    let read = |of: &str, key: &str, value: Option<MetadataValue>| {
        let path = dir.join(format!("{of}.gguf"));
        with_metadata(&fixture(&format!("{of}.gguf")), &path, |metadata| {
            let all: Vec<(String, MetadataValue)> =
                metadata.keys().map(|k| (k.to_string(), metadata.get(k).unwrap().clone())).collect();
            *metadata = Metadata::default();
            let key = format!("{of}.{key}");
            all.into_iter().filter(|(k, _)| *k != key).for_each(|(k, v)| metadata.set(k, v));
            value.into_iter().for_each(|v| metadata.set(key.clone(), v));
        });
        Weights::open(&path).map(|weights| weights.shape().clone())
    };
    let (sliding, full) = (LayerType::SlidingAttention, LayerType::FullAttention);
    let types = |of: &str, key: &str, value| read(of, key, value).unwrap().features.layer_types.unwrap();
    let pattern = "attention.sliding_window_pattern";
    assert_eq!(types("gemma2", pattern, None), [sliding, full]);
    assert_eq!(types("gemma2", pattern, Some(Integer(1))), [full, full]);
    assert_eq!(types("gemma2", pattern, Some(Integer(0))), [sliding, sliding]);
    let list = Array(MetadataArray::Bools(vec![false, true]));
    assert_eq!(types("gemma3", pattern, Some(list)), [full, sliding]);
    // Without a window none of Gemma 3's blocks has one.
    assert_eq!(types("gemma3", "attention.sliding_window", None), [full, full]);
    assert_eq!(read("gemma2", "attention.sliding_window", None).unwrap().sliding_window, Some(4096));
    let caps = |shape: Shape| (shape.features.attention_softcap, shape.features.logit_softcap);
    assert_eq!(caps(read("gemma2", "attn_logit_softcapping", None).unwrap()), (Some(50.0), Some(8.0)));
    assert_eq!(caps(read("gemma2", "final_logit_softcapping", None).unwrap()), (Some(3.0), Some(30.0)));
    assert_eq!(
        caps(read("gemma3", "final_logit_softcapping", Some(Float(30.0))).unwrap()),
        (None, Some(30.0))
    );
    assert_eq!(read("gemma3", "rope.freq_base_swa", None).unwrap().features.rope_local_theta, Some(10000.0));
    let scale = Float(1.0 / 224f64.sqrt());
    let shape = read("gemma2", "attention.scale", Some(scale)).unwrap();
    assert_eq!(shape.features.query_pre_attn_scalar, Some(224));
    assert_eq!(read("phi3", "attention.sliding_window", Some(Integer(0))).unwrap().sliding_window, None);
    // Without a type a factor is linear, as under the old name.
    for key in ["rope.scaling.factor", "rope.scale_linear"] {
        let shape = read("olmo2", key, Some(Float(4.0))).unwrap();
        assert_eq!(shape.features.rope_linear_factor, Some(4.0), "{key}");
    }
    for (of, key, value, said) in [
        ("gemma2", "attn_logit_softcapping", Float(0.0), "only a number above 0"),
        ("gemma2", "attention.scale", Float(0.3), "1 / sqrt(n) of a whole number n"),
        ("gemma2", "rope.freq_base_swa", Float(500.0), "only models without it"),
        ("gemma3", "attn_logit_softcapping", Float(50.0), "`gemma3.attn_logit_softcapping` is 50.0"),
        ("gemma3", pattern, Array(MetadataArray::Bools(vec![true; 3])), "has 3 values, of 2 blocks"),
        ("olmo2", "attention.sliding_window", Integer(4096), "`olmo2.attention.sliding_window` is 4096"),
        ("olmo2", "rope.scaling.type", Text("yarn".into()), "is \"yarn\"; that is not built"),
        ("phi3", "rope.scaling.type", Text("longrope".into()), "is \"longrope\"; that is not built"),
        ("phi3", "rope.scaling.attn_factor", Float(1.19), "`phi3.rope.scaling.attn_factor` is 1.19"),
        ("phi3", "rope.dimension_count", Integer(6), "only 8, a head's size,"),
    ] {
        let e = read(of, key, Some(value)).expect_err(key);
        assert!(e.exit_code() == 3 && e.message.contains(said), "{of}.{key}: {e}");
    }
}

/// A golden model with another configuration.
fn configured(dir: &Path, name: &str, keys: &[(&str, Value)]) -> PathBuf {
    let to = dir.join(format!("{name}-{}", keys[0].0));
    fs::create_dir_all(&to).unwrap();
    for entry in fs::read_dir(model(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    let path = to.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    keys.iter().for_each(|(key, value)| config[*key] = value.clone());
    fs::write(path, config.to_string()).unwrap();
    to
}

/// Spaces become pieces, none is put before a text, and a cut at spaces finds none.
#[test]
fn gemmas_tokenizer_is_sentencepieces() {
    let dir = folder("gemma_tokenizer");
    let from = configured(&dir, "llama2", &[("use_cache", true.into())]);
    let path = from.join("tokenizer.json");
    let mut definition: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    definition["normalizer"] =
        serde_json::json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    definition["pre_tokenizer"] = serde_json::json!({
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false
    });
    fs::write(&path, definition.to_string()).unwrap();
    let file = dir.join("model.gguf");
    // It reads the tokenizer back and compares ids.
    let report = convert(&from, &file, ConvertTarget::Gguf, None).unwrap();
    assert_eq!(report.loss, None);
    let metadata = Gguf::open(&file).unwrap().metadata.clone();
    assert_eq!(metadata.text("tokenizer.ggml.model").unwrap(), Some("llama"));
    assert_eq!(metadata.flag("tokenizer.ggml.add_space_prefix").unwrap(), Some(false));
}

#[test]
fn what_llama_cpp_has_no_place_for_is_refused() {
    let dir = folder("no_place");
    for (name, keys, said) in [
        ("gemma2", vec![("attn_logit_softcapping", Value::Null)], "a Gemma2 without attn_logit_softcapping"),
        (
            "gemma2",
            vec![("final_logit_softcapping", Value::Null)],
            "a Gemma2 without final_logit_softcapping",
        ),
    ] {
        let e = convert(&configured(&dir, name, &keys), &dir.join("x.gguf"), ConvertTarget::Gguf, None)
            .unwrap_err();
        let said = format!("GGUF cannot express this model: {said}");
        assert!(e.exit_code() == 3 && e.message.contains(&said), "{name} {keys:?}: {e}");
    }
    // Where it has one, all is as published models have it.
    let usual = [
        ("query_pre_attn_scalar", 12.into()),
        ("layer_types", vec!["sliding_attention"; 2].into()),
        ("sliding_window_pattern", Value::Null),
    ];
    let file = dir.join("usual.gguf");
    let report = convert(&configured(&dir, "gemma3", &usual), &file, ConvertTarget::Gguf, None).unwrap();
    assert_eq!(report.unread, None);
    let metadata = Gguf::open(&file).unwrap().metadata.clone();
    for key in ["attention.scale", "attention.sliding_window_pattern"] {
        assert_eq!(metadata.get(&format!("gemma3.{key}")), None);
    }
}

#[test]
fn inspect_tells_what_a_file_holds() {
    let inspect = |path: &Path| {
        let output = Command::new(corral()).args(["inspect", "--json"]).arg(path).output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (report, output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (report, code, _) = inspect(&fixture("mixtral-00001-of-00002.gguf"));
    assert_eq!(code, Some(0), "{report}");
    assert_eq!(
        (&report["format"], &report["architecture"], &report["complete"]),
        (&"gguf".into(), &"llama".into(), &true.into())
    );
    assert_eq!(report["files"].as_array().unwrap().len(), 2);
    let golden = Weights::open(&model("mixtral")).unwrap().into_source().unwrap();
    let parameters: i64 = golden.views.values().map(|view| view.numel()).sum();
    assert_eq!(report["parameters"]["total"], parameters);
    assert_eq!(report["parts"][0]["vocab_size"], 600);
    // Cut off within its last tensor.
    let bytes = fs::read(fixture("qwen2.gguf")).unwrap();
    let cut = folder("inspect").join("cut.gguf");
    fs::write(&cut, &bytes[..bytes.len() - 64]).unwrap();
    let (report, code, said) = inspect(&cut);
    assert_eq!((code, &report["complete"]), (Some(3), &false.into()), "{report}");
    assert!(said.contains("cut.gguf") && said.contains("the file is damaged"), "{said}");
}

/// A model that `corral get` fetched goes by its name, also where a run names it as what it was trained from.
#[test]
fn fetched_models_go_by_their_names() {
    let dir = folder("fetched");
    let name = "smollm2-135m-instruct";
    let corral = |args: &[&str]| {
        let output = Command::new(corral())
            .args(args)
            .env("CORRAL_HOME", dir.join("home"))
            .current_dir(&dir)
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout) + &text(output.stderr))
    };
    let (code, said) = corral(&["inspect", name]);
    assert!(
        code == Some(3) && said.contains("is not fetched: run `corral get smollm2-135m-instruct`"),
        "{said}"
    );
    // Another model in its place, which is small.
    let store = dir.join("home/models").join(name);
    fs::create_dir_all(&store).unwrap();
    for entry in fs::read_dir(model("llama2")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, store.join(path.file_name().unwrap())).unwrap();
    }
    let (code, said) = corral(&["get", name]);
    assert!(code == Some(0) && said.contains("smollm2-135m-instruct is in "), "{said}");
    fs::write(dir.join("chats.jsonl"), "{\"prompt\": \"Hello\", \"completion\": \" world\"}\n".repeat(4))
        .unwrap();
    fs::write(
        dir.join("sft.yaml"),
        "output_dir: run\nmodel: {path: smollm2-135m-instruct}\ntokenizer: {template: '{prompt}{completion}'}\n\
         data: {train: [chats.jsonl], sequence_length: 32, cache: cache}\nlora: {rank: 2, alpha: 4}\n\
         optim: {lr: 1.0e-3}\ntrain: {steps: 1, batch_size: 2}\n",
    )
    .unwrap();
    let (code, said) = corral(&["sft", "--config", "sft.yaml", "--device", "cpu"]);
    assert_eq!(code, Some(0), "{said}");
    let checkpoint = fs::read_dir(dir.join("run/checkpoints")).unwrap().next().unwrap().unwrap().path();
    let (code, said) = corral(&["inspect", checkpoint.to_str().unwrap()]);
    assert!(code == Some(0) && said.contains("complete"), "{said}");
    let tokenize = |tokenizer| {
        [
            "tokenize",
            "--input",
            "chats.jsonl",
            "--text-key",
            "prompt",
            "--tokenizer",
            tokenizer,
            "--output",
            "tokens",
        ]
    };
    let (code, said) = corral(&tokenize(name));
    assert_eq!(code, Some(0), "{said}");
    let words =
        ["tokenizer={path: smollm2-135m-instruct, template: '{prompt}{completion}'}", "output_dir=run2"];
    let (code, said) = corral(&[&["sft", "--config", "sft.yaml", "--device", "cpu"], &words[..]].concat());
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = corral(&tokenize("nowhere"));
    assert!(code != Some(0) && said.contains("nowhere"), "{said}");
    // What lies under that name in the folder comes first.
    fs::create_dir(dir.join(name)).unwrap();
    let (code, said) = corral(&["inspect", name]);
    assert!(code == Some(3) && said.contains("not recognized"), "{said}");
}
