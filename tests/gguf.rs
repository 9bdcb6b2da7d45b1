//! GGUF files: models and tokenizers as the package `gguf` writes them (`tests/fixtures/make_gguf.py`), and ours there and
//! back. What llama.cpp and transformers make of ours is in `tests/interop/test_gguf.py`.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicU64;

use common::run::folder;
use corral::checkpoint::Weights;
use corral::checkpoint::convert::{Conversion, Report, Stored, Target};
use corral::data::tokenizer::Tokenizer;
use corral::data::tokenizer::gguf::Loss;
use corral::gguf::{Dtype, Gguf, Writer};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf").join(name)
}

/// The models that the fixtures were made of, whatever CORRAL_GOLDEN says.
fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(name)
}

fn convert(from: &Path, to: &Path, target: Target, stored: Option<Stored>) -> corral::Result<Report> {
    Conversion::new(Weights::open(from)?, target, stored, Device::Cpu)?.write(to, &AtomicU64::new(0))
}

#[test]
fn models_of_other_programs_are_the_golden_ones() {
    for (file, name) in
        [("llama3.gguf", "llama3"), ("qwen2.gguf", "qwen2"), ("mixtral-00001-of-00002.gguf", "mixtral")]
    {
        let (read, golden) = (Weights::open(&fixture(file)).unwrap(), Weights::open(&model(name)).unwrap());
        let (mut shape, mut wanted) = (read.shape().clone(), golden.shape().clone());
        // What only training asks for.
        for shape in [&mut shape, &mut wanted] {
            shape.initializer_range = 0.0;
            shape.experts.iter_mut().for_each(|e| e.router_aux_loss_coef = 0.0);
        }
        assert_eq!(shape, wanted, "{name}");
        let (read, golden) = (read.into_source().unwrap(), golden.into_source().unwrap());
        let names: Vec<&String> = golden.views.keys().collect();
        assert_eq!(names.len(), read.views.len(), "{name}");
        for tensor in names {
            let (ours, theirs) = (read.tensor(tensor).unwrap(), golden.tensor(tensor).unwrap());
            assert_eq!(ours, theirs.to_kind(ours.kind()), "{name}: {tensor}");
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
    convert(&model("mixtral"), &new, Target::Gguf, None).unwrap();
    let file = Gguf::open(&new).unwrap();
    let mut parts: Vec<(String, Dtype, Vec<i64>, Vec<u8>)> = Vec::new();
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
    let mut writer = Writer::create(&old, &file.metadata, tensors).unwrap();
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
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/tokenizer")
            .join(format!("{golden}.json"));
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
    for name in ["llama2", "llama3", "tied", "mistral", "qwen2", "mixtral"] {
        for (i, stored) in [
            None,
            Some(Stored::Kind(Kind::Half)),
            Some(Stored::Kind(Kind::BFloat16)),
            Some(Stored::Blocks(Dtype::Q8_0)),
            Some(Stored::Blocks(Dtype::Q4_0)),
            Some(Stored::Blocks(Dtype::Q4_1)),
        ]
        .into_iter()
        .enumerate()
        {
            let file = dir.join(format!("{name}-{i}.gguf"));
            let report =
                convert(&model(name), &file, Target::Gguf, stored).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(report.rounding.is_some(), stored.is_some(), "{name} {stored:?}");
            if stored.is_some() {
                continue;
            }
            // Nothing is lost on the way.
            let back = dir.join(format!("{name}-back"));
            convert(&file, &back, Target::Hf { max_shard_size: 1 << 30 }, None).unwrap();
            let [a, b] = [back.as_path(), &model(name)]
                .map(|path| Weights::open(path).unwrap().into_source().unwrap());
            for tensor in a.views.keys() {
                assert_eq!(a.tensor(tensor).unwrap(), b.tensor(tensor).unwrap(), "{name}: {tensor}");
            }
            let [a, b] = [back.as_path(), &model(name)].map(|path| Tokenizer::load(path).unwrap());
            corral::data::tokenizer::gguf::check_same(&a, &b, report.loss).unwrap();
            assert_eq!(report.loss, (name == "mistral").then_some(Loss::SpaceBefore), "{name}");
            assert_eq!(
                (a.bos_id(), a.eos_ids().first(), a.pad_id(), a.adds_bos()),
                (b.bos_id(), b.eos_ids().first(), b.pad_id(), b.adds_bos()),
                "{name}"
            );
            assert_eq!(a.chat_template().map(|t| &t.source), b.chat_template().map(|t| &t.source), "{name}");
        }
    }
    // A Qwen 3 whose window is off.
    let off = dir.join("qwen3-off");
    fs::create_dir_all(&off).unwrap();
    for entry in fs::read_dir(model("qwen3")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, off.join(path.file_name().unwrap())).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&fs::read(off.join("config.json")).unwrap()).unwrap();
    config["use_sliding_window"] = false.into();
    config["layer_types"] = Value::Null;
    fs::write(off.join("config.json"), config.to_string()).unwrap();
    convert(&off, &dir.join("qwen3-off.gguf"), Target::Gguf, Some(Stored::Blocks(Dtype::Q8_0))).unwrap();
    // Its second block alone has a window.
    let e = convert(&model("qwen3"), &dir.join("qwen3.gguf"), Target::Gguf, None).unwrap_err();
    assert!(e.exit_code() == 3 && e.message.contains("cannot express this model: a sliding window"), "{e}");
    assert!(!dir.join("qwen3.gguf").exists());
    let e = convert(
        &model("llama2"),
        &dir.join("hf"),
        Target::Hf { max_shard_size: 1 },
        Some(Stored::Blocks(Dtype::Q4_0)),
    );
    assert!(e.as_ref().is_err_and(|e| e.exit_code() == 2 && e.message.contains("--format gguf")), "{e:?}");
    let leftovers: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().as_encoded_bytes()[0] == b'.')
        .collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
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
    let file = dir.join("llama2.gguf");
    convert(&model("llama2"), &file, Target::Gguf, None).unwrap();
    let ids = Tensor::from_slice(&(0..40).map(|i| i * 13 % 600).collect::<Vec<i64>>()).view([1, 40]);
    let logits = |path: &Path| {
        let mut model = common::load(path, Kind::Float);
        let hidden = model.hidden(&corral::model::Input::new(ids.shallow_clone())).unwrap();
        model.next_token_logits(&hidden).unwrap()
    };
    assert_eq!(logits(&file), logits(&model("llama2")));
}

#[test]
fn inspect_tells_what_a_file_holds() {
    let inspect = |path: &Path| {
        let output = Command::new(env!("CARGO_BIN_EXE_corral"))
            .args(["inspect", "--json"])
            .arg(path)
            .output()
            .unwrap();
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
        let output = Command::new(env!("CARGO_BIN_EXE_corral"))
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
        code == Some(3) && said.contains("is not fetched: `corral get smollm2-135m-instruct` does it"),
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
    assert!(code == Some(3) && said.contains("nothing that is known"), "{said}");
}
