//! `corral inspect` on every kind of path, whole and damaged.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::fs;
use std::path::{Path, PathBuf};
use testing::folder::{copy_files, folder};
use testing::golden::{golden, golden_model, json, tensors};
use testing::program::{Ended, Program};
use testing::run::{Run, data};

use serde_json::{Value, json};
use tch::Tensor;

fn inspect(path: &Path, words: &[&str]) -> Ended {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let name = format!("inspect-{}", path.to_string_lossy().replace('/', "-"));
    let name = format!("{}{}", &name[name.len().saturating_sub(100)..], words.join("-"));
    Program::corral(&["inspect"]).arg(path).args(words).run(dir, &name)
}

/// What it says of a path that is whole.
#[track_caller]
fn whole(path: &Path, words: &[&str]) -> Value {
    let text = inspect(path, words).expect_code(0).out;
    assert!(text.starts_with(&format!("{}: ", path.display())) && text.contains(", complete\n"), "{text}");
    let report = parse(&inspect(path, &[words, &["--json"]].concat()).expect_code(0));
    assert_eq!((&report["complete"], &report["problems"]), (&json!(true), &json!([])), "{report:#}");
    report
}

/// What it says of a path that is damaged: exit code 3, and all of `parts` in the text and in the problems.
#[track_caller]
fn damaged(path: &Path, words: &[&str], parts: &[&str]) -> Value {
    let ended = inspect(path, words).expect_error(3, &["damaged or incomplete: "]);
    assert!(ended.out.contains("damaged or incomplete\n"), "{ended}");
    let report = parse(&inspect(path, &[words, &["--json"]].concat()).expect_code(3));
    assert_eq!(report["complete"], false);
    let problems = all_problems(&report);
    for part in parts {
        assert!(problems.iter().any(|p| p.contains(part)), "`{part}` is not in {problems:#?}");
        assert!(ended.out.contains(part), "{ended}");
    }
    report
}

fn parse(ended: &Ended) -> Value {
    assert_eq!(ended.out.lines().count(), 1, "{ended}");
    serde_json::from_str(&ended.out).unwrap_or_else(|e| panic!("{e}: {ended}"))
}

fn all_problems(report: &Value) -> Vec<String> {
    let own = report["problems"].as_array().unwrap().iter().map(|p| p.as_str().unwrap().to_string());
    let parts = report["parts"].as_array().into_iter().flatten().flat_map(all_problems);
    own.chain(parts).collect()
}

fn copy(from: &Path, to: &str) -> PathBuf {
    let to = folder(to);
    copy_files(from, &to, |_| false);
    to
}

fn cut(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 7]).unwrap();
}

/// Changes a byte near the end.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() - 9;
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

const EXTRA: &str = "model.layers.9.extra.weight";

/// Writes a file of tensors anew without one of them, and with one that is too many.
fn without(path: &Path, gone: &str) {
    let mut all: Vec<(String, Tensor)> =
        tensors(path).into_iter().filter(|(name, _)| name != gone && name != EXTRA).collect();
    all.push((EXTRA.into(), Tensor::ones([2], (tch::Kind::Float, tch::Device::Cpu))));
    Tensor::write_safetensors(&all, path).unwrap();
}

#[test]
fn a_model() {
    let report = whole(&golden_model("tied"), &["--tensors"]);
    assert_eq!((&report["kind"], &report["architecture"]), (&json!("model"), &json!("LlamaForCausalLM")));
    let config = json(&golden_model("tied").join("config.json"));
    for key in
        ["vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "tie_word_embeddings"]
    {
        assert_eq!(report["shape"][key], config[key], "{key}");
    }
    // Counted by hand from the shape: 600 x 64; per block 2 x 64 x 64 + 2 x 32 x 64 and 3 x 64 x 160 and 2 x 64.
    let parameters =
        json!({"total": 124_736, "embedding": 38_400, "attention": 24_576, "mlp": 61_440, "norms": 320});
    assert_eq!(report["parameters"], parameters);
    assert_eq!(report["dtypes"], json!({"F32": {"num_tensors": 20, "bytes": 4 * 124_736}}));
    assert_eq!(report["tensors"].as_array().unwrap().len(), 20);
    assert!(report["tensors"].as_array().unwrap().contains(
        &json!({"name": "model.layers.1.mlp.down_proj.weight", "dtype": "F32", "shape": [64, 160]})
    ));
    assert_eq!(
        (&report["parts"][0]["kind"], &report["parts"][0]["vocab_size"]),
        (&json!("tokenizer"), &json!(600))
    );

    for family in ["llama2", "llama3", "mistral", "mixtral", "qwen2", "qwen3"] {
        let report = whole(&golden_model(family), &[]);
        let other = report["parameters"].get("other");
        assert!(other.is_none(), "{family}: every tensor has its group: {report:#}");
        assert_eq!(report["parameters"].get("experts").is_some(), family == "mixtral");
    }

    let sharded = whole(&golden_model("llama3_sharded"), &[]);
    assert_eq!(sharded["files"].as_array().unwrap().len(), 4);
    assert_eq!(sharded["parameters"]["head"], 38_400);
    assert_eq!(sharded["tensors"], Value::Null);
}

fn fixture(name: &str) -> PathBuf {
    testing::golden::fixture("formats").join(name)
}

#[test]
fn models_of_torch_files() {
    let bin = whole(&fixture("bin"), &[]);
    let parts = whole(&fixture("bin_parts"), &[]);
    assert_eq!((bin["format"].as_str(), parts["files"].as_array().unwrap().len()), (Some("hf"), 2));
    let meta = whole(&fixture("meta2"), &[]);
    assert_eq!((meta["format"].as_str(), meta["files"].as_array().unwrap().len()), (Some("meta"), 2));
    assert_eq!(meta["params"]["dim"], json(&fixture("meta2").join("params.json"))["dim"]);
    // Norms are whole in both parts and count once.
    let (shape, sums) = (&meta["shape"], &meta["parameters"]);
    let of = |key: &str| shape[key].as_u64().unwrap();
    assert_eq!(sums["norms"], (2 * of("num_hidden_layers") + 1) * of("hidden_size"));
    assert_eq!(sums["embedding"], of("vocab_size") * of("hidden_size"));
    let file = whole(&fixture("meta2/consolidated.00.pth"), &[]);
    assert_eq!(
        (&file["kind"], &file["tensors"][0]["name"]),
        (&json!("torch file"), &json!("tok_embeddings.weight"))
    );

    // A pickle that would call something is refused by name, and a part that is missing is, too.
    damaged(&fixture("imports_os"), &[], &["pytorch_model.bin: its pickle is refused", "posix"]);
    let dir = copy(&fixture("bin_parts"), "bin-missing");
    fs::remove_file(dir.join("pytorch_model-00002-of-00002.bin")).unwrap();
    damaged(&dir, &[], &["pytorch_model-00002-of-00002.bin: missing; the index places"]);
    let dir = copy(&fixture("meta2"), "meta-missing");
    cut(&dir.join("consolidated.01.pth"));
    damaged(&dir, &[], &["consolidated.01.pth: "]);
    fs::remove_file(dir.join("consolidated.00.pth")).unwrap();
    fs::copy(fixture("meta2/consolidated.01.pth"), dir.join("consolidated.01.pth")).unwrap();
    damaged(&dir, &[], &["consolidated.00.pth"]);
}

#[test]
fn a_damaged_model() {
    let dir = copy(&golden_model("llama3_sharded"), "model-missing");
    fs::remove_file(dir.join("model-00003-of-00004.safetensors")).unwrap();
    cut(&dir.join("model-00004-of-00004.safetensors"));
    let parts = [
        "model-00003-of-00004.safetensors: missing; the index places 13 tensors in it",
        "model-00004-of-00004.safetensors: it has ",
    ];
    let report = damaged(&dir, &[], &parts);
    assert_eq!(report["parameters"]["embedding"], 38_400, "what is left is told");

    let dir = copy(&golden_model("tied"), "model-tensors");
    without(&dir.join("model.safetensors"), "model.layers.1.mlp.up_proj.weight");
    let parts = ["`model.layers.1.mlp.up_proj.weight` [160, 64] is missing", "`model.layers.9.extra.weight`"];
    damaged(&dir, &[], &parts);

    let dir = copy(&golden_model("tied"), "model-config");
    let mut config = json(&dir.join("config.json"));
    config["architectures"] = json!(["GPT2LMHeadModel"]);
    config["model_type"] = json!("gpt2");
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let report = damaged(&dir, &[], &["GPT2LMHeadModel"]);
    assert_eq!(report["parameters"]["total"], 124_736);
    fs::remove_file(dir.join("config.json")).unwrap();
    damaged(&dir, &[], &["config.json"]);
}

#[test]
fn an_adapter() {
    let report = whole(&golden().join("lora"), &[]);
    assert_eq!(
        (&report["kind"], &report["r"], &report["peft_type"]),
        (&json!("adapter"), &json!(4), &json!("LORA"))
    );
    assert_eq!(report["target_modules"].as_array().unwrap().len(), 7);
    assert_eq!(report["dtypes"]["F32"]["num_tensors"], 28);

    let dir = copy(&golden().join("lora"), "adapter-pair");
    let module = "base_model.model.model.layers.1.mlp.up_proj";
    without(&dir.join("adapter_model.safetensors"), &format!("{module}.lora_B.weight"));
    damaged(&dir, &[], &[&format!("`{module}.lora_B.weight` is missing")]);
    without(&dir.join("adapter_model.safetensors"), &format!("{module}.lora_A.weight"));
    damaged(&dir, &[], &["`mlp.up_proj` of layer 1 is missing, other layers have it"]);
    let mut config = json(&dir.join("adapter_config.json"));
    config["r"] = json!(8);
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    damaged(&dir, &[], &["has rank 4, adapter_config.json says 8"]);
    fs::remove_file(dir.join("adapter_model.safetensors")).unwrap();
    damaged(&dir, &[], &["adapter_model.safetensors"]);
}

#[test]
fn a_file_of_tensors() {
    let report = whole(&golden().join("reward_model/golden.safetensors"), &[]);
    assert_eq!((&report["kind"], &report["metadata"]["format"]), (&json!("safetensors file"), &json!("pt")));
    assert!(
        report["tensors"]
            .as_array()
            .unwrap()
            .contains(&json!({"name": "input_ids", "dtype": "I64", "shape": [6, 15]}))
    );
    let dir = copy(&golden().join("reward_model"), "file-cut");
    cut(&dir.join("golden.safetensors"));
    damaged(&dir.join("golden.safetensors"), &[], &["golden.safetensors: it has "]);
    fs::write(dir.join("golden.safetensors"), b"none").unwrap();
    damaged(&dir.join("golden.safetensors"), &[], &["only 4 bytes"]);
}

#[test]
fn token_shards_and_tokenizers() {
    let tokens = data().join("tokens");
    let report = whole(&tokens, &["--checksums"]);
    let parts = report["parts"].as_array().unwrap();
    let kinds: Vec<_> = parts.iter().map(|p| p["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["token shards", "token shards", "tokenizer"]);
    assert_eq!(parts[0]["tokenizer_sha256"], parts[2]["sha256"]);
    assert_eq!(
        parts[0]["num_documents"].as_u64().unwrap() + parts[1]["num_documents"].as_u64().unwrap(),
        150
    );
    let single = whole(&tokens.join("train/shard-00000.tokens"), &[]);
    for key in ["num_tokens", "vocab_size", "text_bytes"] {
        assert_eq!(single[key], parts[0][key], "{key}");
    }
    assert_eq!(whole(&tokens.join("tokenizer"), &[])["adds_bos"], true);

    let dir = copy(&tokens.join("train"), "tokens-flipped");
    let shard = dir.join("shard-00000.tokens");
    flip(&shard);
    whole(&dir, &[]);
    damaged(&dir, &["--checksums"], &["shard-00000.tokens: corrupt: the checksum of its tokens"]);
    cut(&shard);
    damaged(&dir, &[], &["shard-00000.tokens: truncated"]);
    fs::copy(tokens.join("train/shard-00000.tokens"), dir.join("shard-00000.tokens")).unwrap();
    fs::copy(tokens.join("train/shard-00000.tokens"), dir.join("shard-00002.tokens")).unwrap();
    let report = damaged(&dir, &[], &["shard-00001.tokens is missing"]);
    assert_eq!(report["num_tokens"].as_u64(), single["num_tokens"].as_u64().map(|n| 2 * n));

    let dir = copy(&tokens.join("tokenizer"), "tokenizer-cut");
    cut(&dir.join("tokenizer.json"));
    damaged(&dir, &[], &["tokenizer.json"]);

    let dir = folder("tokens-other-tokenizer");
    for part in ["train", "tokenizer"] {
        fs::rename(copy(&tokens.join(part), "tokens-part"), dir.join(part)).unwrap();
    }
    whole(&dir, &[]);
    for file in fs::read_dir(golden_model("tied")).unwrap().flatten() {
        if file.file_name().to_string_lossy().starts_with("tokenizer") {
            fs::copy(file.path(), dir.join("tokenizer").join(file.file_name())).unwrap();
        }
    }
    damaged(&dir, &[], &["made with another tokenizer"]);
}

#[test]
fn a_run_and_its_checkpoints() {
    let run = Run::new("run");
    run.train(2, &["train.steps=6", "checkpoint.every=2", "checkpoint.keep=2"]);
    let report = whole(&run.output(), &["--checksums"]);
    assert_eq!(report["kind"], "run");
    assert_eq!(report["config"]["train"]["steps"], 6);
    let last = run.metrics().into_iter().rfind(|l| l["kind"] == "train").unwrap();
    assert_eq!((&report["last_metrics"]["train"]["step"], &last["step"]), (&json!(6), &json!(6)));
    assert_eq!(report["last_metrics"]["train"]["loss"], last["loss"]);
    let checkpoints = report["checkpoints"].as_array().unwrap();
    let steps: Vec<_> = checkpoints.iter().map(|c| (c["step"].as_u64(), c["complete"].as_bool())).collect();
    assert_eq!(steps, [(Some(4), Some(true)), (Some(6), Some(true))]);
    assert_eq!(report["parts"][0]["kind"], "model");

    let checkpoint = run.output().join("checkpoints/step-00000006");
    let report = whole(&checkpoint, &["--checksums"]);
    assert_eq!(
        (&report["kind"], &report["step"], &report["world_size"]),
        (&json!("checkpoint"), &json!(6), &json!(2))
    );
    assert_eq!(report["files"].as_array().unwrap().len(), 2);
    // Master values and two moments of every parameter.
    let parameters = report["parameters"]["total"].as_u64().unwrap();
    assert_eq!(report["dtypes"]["F32"]["bytes"].as_u64().unwrap(), 12 * parameters);
    assert_eq!(report["state"]["tokens"], last["tokens"]);

    let shard = checkpoint.join("shard-00001-of-00002.safetensors");
    let sound = fs::read(&shard).unwrap();
    flip(&shard);
    whole(&checkpoint, &[]);
    damaged(&checkpoint, &["--checksums"], &["shard-00001-of-00002.safetensors: damaged: its checksum is"]);
    fs::write(&shard, &sound).unwrap();
    cut(&shard);
    let what = "shard-00001-of-00002.safetensors: ";
    damaged(&checkpoint, &[], &[what]);
    let report = damaged(&run.output(), &[], &[what]);
    assert_eq!(report["checkpoints"][1]["complete"], false);
    fs::remove_file(&shard).unwrap();
    damaged(&checkpoint, &[], &["shard-00001-of-00002.safetensors: missing"]);
    fs::write(&shard, &sound).unwrap();

    fs::rename(run.output().join("model"), run.dir.join("model")).unwrap();
    damaged(&run.output(), &[], &["model: missing: the run stands at step 6 of 6"]);
    fs::rename(run.dir.join("model"), run.output().join("model")).unwrap();
    let metrics = run.output().join("metrics.jsonl");
    let lines = fs::read_to_string(&metrics).unwrap();
    fs::write(&metrics, format!("{lines}{{\"kind\": \"tr")).unwrap();
    damaged(&run.output(), &[], &["metrics.jsonl:"]);
    fs::write(&metrics, lines).unwrap();
    whole(&run.output(), &[]);

    // As a killed save leaves it.
    fs::remove_file(checkpoint.join("meta.json")).unwrap();
    let report = damaged(&checkpoint, &[], &["meta.json"]);
    assert_eq!(report["files"].as_array().unwrap().len(), 2);
}

#[test]
fn what_is_nothing_that_is_known() {
    let dir = folder("nothing");
    inspect(&dir, &[]).expect_error(3, &["not recognized", "config.json"]);
    inspect(&dir.join("absent"), &[]).expect_error(3, &["there is no such folder"]);
    fs::write(dir.join("file.txt"), "text").unwrap();
    inspect(&dir.join("file.txt"), &[]).expect_error(3, &["not recognized"]);
}
