//! `corral convert`: there and back with equal tensors, and what it refuses.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::fs;
use std::path::{Path, PathBuf};
use testing::folder::folder;
use testing::golden::{fixture, golden, golden_megatron, json};
use testing::program::{Ended, Program};
use testing::run::Run;

use corral::checkpoint::Weights;
use tch::Kind;

/// Runs `corral convert`; the program's output.
fn convert(from: &Path, to: &Path, words: &[&str]) -> Ended {
    let dir = to.parent().unwrap();
    Program::corral(&["convert", "--from"]).arg(from).args(&["--to"]).arg(to).args(words).run(dir, "convert")
}

/// Asserts that two models have the same tensors, byte for byte.
fn assert_same(a: &Path, b: &Path) {
    let (a, b) = (Weights::open(a).unwrap(), Weights::open(b).unwrap());
    let specs: Vec<_> = corral::model::layout::layouts(a.shape()).into_iter().flat_map(|l| l.specs).collect();
    let (a, b) = (a.into_source().unwrap(), b.into_source().unwrap());
    assert!(specs.len() > 10);
    for spec in specs {
        let (x, y) = (a.tensor(&spec.name).unwrap(), b.tensor(&spec.name).unwrap());
        assert!(x.kind() == y.kind() && x.equal(&y), "{}", spec.name);
    }
}

/// The golden llama3 with positions that Meta's format can express, and as many key-value heads as parts.
fn llama3(dir: &Path) -> PathBuf {
    let model = dir.join("llama3");
    fs::create_dir(&model).unwrap();
    for name in ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        fs::copy(golden().join("models/llama3").join(name), model.join(name)).unwrap();
    }
    let mut config = json(&golden().join("models/llama3/config.json"));
    config["rope_scaling"]["factor"] = 32.0.into();
    config["rope_scaling"]["original_max_position_embeddings"] = 8192.into();
    config["max_position_embeddings"] = 131072.into();
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    model
}

#[test]
fn there_and_back_is_byte_equal() {
    let dir = folder("round-trips");
    let at = |name: &str| dir.join(name);
    // Tied and untied, both cuts of the embeddings, and heads that share keys and values.
    for (name, model, parts) in [
        ("llama2", golden().join("models/llama2"), "4"),
        ("llama3", llama3(&dir), "2"),
        ("tied", golden().join("models/tied"), "2"),
    ] {
        let (one, many, again, back) = (
            at(&format!("{name}-1")),
            at(&format!("{name}-many")),
            at(&format!("{name}-again")),
            at(&format!("{name}-hf")),
        );
        let ended = convert(&model, &one, &["--format", "meta"]).expect_code(0);
        assert!(ended.out.contains("largest difference: 0\n"), "{ended}");
        assert!(ended.out.contains("copied: tokenizer.json"), "{ended}");
        assert!(ended.err.contains("no tokenizer.model"), "{ended}");
        convert(&one, &many, &["--format", "meta", "--model-parallel", parts]).expect_code(0);
        convert(&many, &again, &["--format", "meta"]).expect_code(0);
        convert(&many, &back, &["--format", "hf", "--max-shard-size", "200kB"]).expect_code(0);
        assert_eq!(
            fs::read_dir(&many)
                .unwrap()
                .filter(|e| { e.as_ref().unwrap().file_name().to_string_lossy().ends_with(".pth") })
                .count()
                .to_string(),
            parts
        );
        assert!(back.join("model.safetensors.index.json").is_file());
        for other in [&one, &many, &again, &back] {
            assert_same(&model, other);
        }
        // One part is written as it was, whatever lay between.
        let file = |dir: &Path| fs::read(dir.join("consolidated.00.pth")).unwrap();
        assert!(file(&one) == file(&again), "{name}");
        let (model, back) = (Weights::open(&model).unwrap(), Weights::open(&back).unwrap());
        assert_eq!(back.shape().tie_word_embeddings, model.shape().tie_word_embeddings);
        assert_eq!(back.shape().rope_scaling, model.shape().rope_scaling);
    }
    let params = json(&at("llama3-many/params.json"));
    assert_eq!((&params["use_scaled_rope"], &params["n_kv_heads"]), (&true.into(), &2.into()));
    let sizes = |model: &str, name: &str| {
        let file = corral::checkpoint::torch_file::TorchReader::open(&at(model).join("consolidated.01.pth"))
            .unwrap();
        corral::checkpoint::source::TensorFile::info(&file, name).unwrap().0
    };
    assert_eq!(sizes("llama2-many", "tok_embeddings.weight"), [600, 16]);
    assert_eq!(sizes("llama3-many", "tok_embeddings.weight"), [300, 64]);
    assert_eq!(sizes("llama3-many", "layers.1.attention.wo.weight"), [64, 32]);
    assert_eq!(sizes("llama3-many", "layers.1.feed_forward.w2.weight"), [64, 80]);
    assert_eq!(sizes("llama3-many", "output.weight"), [300, 64]);
}

#[test]
fn every_family_goes_out_in_hugging_faces_format() {
    let dir = folder("families");
    for name in ["mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_new", "olmo2", "phi3"] {
        let (model, out) = (golden().join("models").join(name), dir.join(name));
        let ended = convert(&model, &out, &["--format", "hf", "--max-shard-size", "50kB"]).expect_code(0);
        assert!(ended.out.contains("largest difference: 0\n"), "{ended}");
        assert_same(&model, &out);
        assert_eq!(Weights::open(&out).unwrap().shape(), Weights::open(&model).unwrap().shape());
    }
}

#[test]
fn a_narrower_dtype_is_checked_against_rounded_tensors() {
    let dir = folder("dtypes");
    let model = golden().join("models/llama2");
    for (dtype, kind) in [("bfloat16", Kind::BFloat16), ("float16", Kind::Half)] {
        let (out, back) = (dir.join(dtype), dir.join(format!("{dtype}-32")));
        let ended = convert(&model, &out, &["--format", "hf", "--dtype", dtype]).expect_code(0);
        assert!(ended.out.contains(&format!("converted to {dtype}; logits of 32 tokens")), "{ended}");
        assert!(
            ended.out.contains("largest difference: 0\n") && ended.out.contains("to the source as it is: "),
            "{ended}"
        );
        assert_eq!(json(&out.join("config.json"))["torch_dtype"], dtype);
        convert(&out, &back, &["--format", "meta", "--dtype", "float32"]).expect_code(0);
        let (right, read) = (Weights::open(&model).unwrap(), Weights::open(&back).unwrap());
        let (right, read) = (right.into_source().unwrap(), read.into_source().unwrap());
        for name in ["lm_head.weight", "model.layers.1.self_attn.q_proj.weight"] {
            let rounded = right.tensor(name).unwrap().to_kind(kind).to_kind(Kind::Float);
            assert!(read.tensor(name).unwrap().equal(&rounded));
        }
    }
}

#[test]
fn a_checkpoint_of_a_run_can_be_converted() {
    let run = Run::new("convert-run");
    run.program(2, &["train.steps=4", "precision.compute=float32"]).run(&run.dir, "pretrain").expect_code(0);
    let checkpoint = run.output().join("checkpoints/step-00000004");
    let out = run.dir.join("out");
    let ended = convert(&checkpoint, &out, &["--format", "hf"]).expect_code(0);
    assert!(ended.out.contains("tokenizer.json"), "{ended}");
    assert_same(&run.output().join("model"), &out);
}

#[test]
fn a_tokenizer_of_metas_goes_along() {
    let dir = folder("tokenizers");
    let (model, meta, back) = (dir.join("model"), dir.join("meta"), dir.join("back"));
    fs::create_dir(&model).unwrap();
    for name in ["model.safetensors", "config.json"] {
        fs::copy(golden().join("models/llama2").join(name), model.join(name)).unwrap();
    }
    let fixtures = fixture("tokenizers");
    fs::copy(fixtures.join("llama.model"), model.join("tokenizer.model")).unwrap();
    let ended = convert(&model, &meta, &["--format", "meta"]).expect_code(0);
    assert!(ended.out.contains("tokenizer.model") && !ended.err.contains("no tokenizer.model"), "{ended}");
    assert!(
        fs::read(meta.join("tokenizer.model")).unwrap() == fs::read(model.join("tokenizer.model")).unwrap()
    );
    convert(&meta, &back, &["--format", "hf"]).expect_code(0);
    assert!(back.join("tokenizer.json").is_file() && back.join("tokenizer.model").is_file());
    let config = json(&back.join("config.json"));
    assert_eq!((&config["bos_token_id"], &config["eos_token_id"]), (&1.into(), &2.into()));
    // Without one, the ids of the model's own configuration stay.
    fs::remove_file(model.join("tokenizer.model")).unwrap();
    convert(&model, &back, &["--format", "hf"]).expect_code(0);
    assert!(!back.join("tokenizer.json").exists());
    assert_eq!(json(&back.join("config.json"))["eos_token_id"], 2);
}

#[test]
fn what_cannot_be_written_is_refused() {
    let dir = folder("refused");
    let (model, out) = (golden().join("models/llama2"), dir.join("out"));
    let refused = |from: &Path, to: &Path, words: &[&str], code: i32, parts: &[&str]| {
        convert(from, to, words).expect_error(code, parts);
        assert!(!out.exists() && !dir.join(".tmp-out").exists());
    };
    let parts = ["--format", "meta", "--model-parallel", "3"];
    refused(&model, &out, &parts, 2, &["num_attention_heads (4)", "1, 2, 4 would do"]);
    refused(&model, &out, &["--format", "hf", "--model-parallel", "2"], 2, &["--format meta"]);
    refused(&model, &out, &["--format", "meta", "--max-shard-size", "1GB"], 2, &["--format hf"]);
    refused(&model, &out, &["--format", "meta", "--tensor", "2"], 2, &["--model-parallel"]);
    refused(&model, &out, &["--format", "megatron", "--model-parallel", "2"], 2, &["are --tensor"]);
    refused(
        &model,
        &out,
        &["--format", "megatron", "--tensor", "3"],
        2,
        &["num_attention_heads", "1, 2, 4 would do"],
    );
    // A model of 64 tokens.
    let small = golden_megatron()["llama"].join("torch-tp1-pp1");
    let other = ["--format", "hf", "--tokenizer", model.to_str().unwrap()];
    refused(&small, &out, &other, 3, &["600 tokens, more than the model's vocab_size of 64"]);
    refused(
        &golden().join("models/llama3"),
        &out,
        &["--format", "meta"],
        3,
        &[
            "cannot express this model: rope_scaling is {\"factor\":8.0",
            "\"original_max_position_embeddings\":8192",
        ],
    );
    for (name, part) in [
        ("qwen2", "it has no place for `model.layers.0.self_attn.q_proj.bias`"),
        ("qwen3", "it has no place for `model.layers.0.self_attn.q_norm.weight`"),
        ("mixtral", "it has no place for `model.layers.0.block_sparse_moe.gate.weight`"),
        ("mistral", "a sliding window (of 8 positions)"),
    ] {
        let model = golden().join("models").join(name);
        refused(&model, &out, &["--format", "meta"], 3, &["cannot express this model: ", part]);
    }
    let own = dir.join("own");
    convert(&model, &own, &["--format", "hf"]).expect_code(0);
    convert(&own, &own, &["--format", "hf"]).expect_error(2, &["the source model is in this folder"]);

    // Another's folder stays as it is.
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.tex"), "precious").unwrap();
    convert(&model, &out, &["--format", "hf"]).expect_error(2, &["thesis.tex"]);
    convert(&model, &out, &["--format", "meta"]).expect_error(2, &["thesis.tex"]);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
}

#[test]
fn a_source_that_is_not_finite_is_no_model() {
    let dir = folder("infinite");
    let model = dir.join("model");
    fs::create_dir(&model).unwrap();
    fs::copy(golden().join("models/llama2/config.json"), model.join("config.json")).unwrap();
    let path = model.join("model.safetensors");
    let mut bytes = fs::read(golden().join("models/llama2/model.safetensors")).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    convert(&model, &dir.join("out"), &["--format", "hf"]).expect_error(3, &["its logits are not finite"]);
    assert!(!dir.join("out").exists() && !dir.join(".tmp-out").exists());
}
