//! `corral bench`: what it prints is one JSON object a measurement, and nothing of what it writes stays.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::fs;
use std::path::Path;
use testing::folder::folder;
use testing::golden::repository;
use testing::program::{Ended, Program, launch};
use testing::run::data;

use serde_json::{Value, json};

/// The measurements, without the prefix of a rank.
fn measurements(ended: &Ended) -> Vec<Value> {
    let objects = ended.out.lines().map(|l| &l[l.find('{').unwrap_or_else(|| panic!("{ended}"))..]);
    objects.map(|o| serde_json::from_str(o).unwrap_or_else(|e| panic!("{e}: {ended}"))).collect()
}

#[track_caller]
fn positive(of: &Value, keys: &[&str]) {
    for key in keys {
        assert!(of[key].as_f64().is_some_and(|x| x > 0.0), "{key} of {of}");
    }
}

fn empty(dir: &Path) -> bool {
    fs::read_dir(dir).unwrap().next().is_none()
}

const SMALL: [&str; 10] =
    ["--saves", "1", "--steps", "1", "--warmup", "0", "--batch-size", "2", "--sequence-length", "8"];

#[test]
fn checkpoint() {
    let (logs, disk) = (folder("checkpoint"), folder("checkpoint-disk"));
    for ranks in [1, 2] {
        let program = match ranks {
            1 => Program::corral(&["bench"]),
            _ => Program::new(launch()).args(&["--nproc", "2", "bench", "--device", "cpu"]),
        };
        let program = program.args(&["checkpoint", "--dir"]).arg(&disk).args(&SMALL);
        let found = measurements(&program.run(&logs, &format!("ranks-{ranks}")).expect_code(0));
        let [found] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((&found["bench"], &found["world_size"]), (&json!("checkpoint"), &json!(ranks)));
        // Master values and two moments in float32, and headers.
        let numbers = 12 * found["params"].as_u64().unwrap();
        let bytes = found["bytes"].as_u64().unwrap();
        assert!((numbers..numbers + 100_000).contains(&bytes), "{found}");
        let times = ["stall_s", "step_s", "step_s_while_writing", "steps_while_writing", "write_s", "load_s"];
        positive(found, &times);
        positive(found, &["written_bytes_per_s", "loaded_bytes_per_s"]);
        assert!(empty(&disk), "nothing stays");
    }
}

/// What a rank sends in a step is what the plan says, by axis: all but a few numbers.
#[test]
fn bytes_that_are_sent() {
    let logs = folder("sent");
    let small = ["--steps", "1", "--warmup", "0", "--batch-size", "4", "--sequence-length", "64"];
    for (ranks, words) in [
        (2, &["--micro-batch-size", "1"][..]),
        (2, &["--mode", "grads", "--micro-batch-size", "1"]),
        (2, &["--mode", "optimizer", "--micro-batch-size", "1"]),
        (2, &["--mode", "replicate"]),
        (2, &["--tensor", "2", "--precision", "bfloat16"]),
        (2, &["--tensor", "2", "--lora", "8", "--recompute", "full"]),
        (2, &["--context", "2"]),
        (4, &["--tensor", "2", "--context", "2", "--recompute", "full"]),
        (4, &["--tensor", "2", "--micro-batch-size", "1"]),
        (2, &["--pipeline", "2", "--micro-batch-size", "1"]),
        (4, &["--pipeline", "2", "--mode", "optimizer", "--micro-batch-size", "1"]),
        (4, &["--pipeline", "2", "--tensor", "2", "--recompute", "full"]),
    ] {
        let number = ranks.to_string();
        let program = Program::new(launch()).args(&["--nproc", &number, "bench", "--device", "cpu", "train"]);
        let ended = program.args(&small).args(words).run(&logs, &words.join("")).expect_code(0);
        let found = measurements(&ended);
        let [found] = found.as_slice() else { panic!("{ended}") };
        let staged = words.contains(&"--pipeline");
        assert_eq!(found["bubble"].is_object(), staged, "{found}");
        if staged {
            assert_eq!(found["bubble"]["stages"].as_array().map(Vec::len), Some(2), "{found}");
            positive(&found["bubble"], &["measured", "replayed", "formula_1f1b", "simulated"]);
        }
        let sent = found["sent_bytes"].as_object().unwrap();
        assert!(!sent.is_empty(), "{found}");
        for (axis, sent) in sent {
            let (sent, planned) = (sent.as_f64().unwrap(), found["planned_bytes"][axis].as_f64().unwrap());
            assert!((planned / sent - 1.0).abs() < 0.01, "{words:?}, {axis}: sent {sent}, planned {planned}");
        }
    }
}

/// Weights, adapters on quantized weights, 8-bit moments, 8-bit floats; and decoding.
#[test]
fn training_and_generation() {
    let logs = folder("train");
    let small = ["--steps", "1", "--warmup", "1", "--batch-size", "2", "--sequence-length", "16"];
    let train = |name: &str, words: &[&str]| {
        let words = [&["bench", "train"], &small[..], words].concat();
        Program::corral(&words).run(&logs, name)
    };
    let cases: [&[&str]; 4] = [
        &[],
        &["--lora", "2", "--base", "nf4"],
        &["--moments", "8bit", "--recompute", "full"],
        &["--precision", "float8", "--float8-min-size", "16"],
    ];
    for (i, words) in cases.into_iter().enumerate() {
        let found = measurements(&train(&format!("train-{i}"), words).expect_code(0));
        let [found] = found.as_slice() else { panic!("{found:?}") };
        positive(
            found,
            &["tokens_per_s", "matmul_gflops", "memory_gb_per_s", "speed_of_light_share", "peak_bytes"],
        );
    }
    for (i, (words, why)) in [
        (&["--lora", "0"][..], "0 is not in 1.."),
        (&["--float8-min-size", "16"], "--float8-min-size needs --precision float8"),
        (&["--lora", "2", "--base", "int8", "--precision", "float8"], "products with quantized weights"),
    ]
    .into_iter()
    .enumerate()
    {
        train(&format!("refused-{i}"), words).expect_error(2, &[why]);
    }
    let generate = |name: &str, words: &[&str]| {
        let words =
            [&["bench", "generate", "--new-tokens", "6", "--runs", "1", "--batch-size", "2"], words].concat();
        Program::corral(&words).run(&logs, name)
    };
    let found = measurements(&generate("generate", &[]).expect_code(0));
    positive(&found[0], &["new_tokens_per_s", "decode_step_s", "decode_gb_per_s", "memory_share"]);
    generate("generate-float8", &["--precision", "float8"])
        .expect_error(2, &["generation computes in bfloat16"]);
}

#[test]
fn data_reading() {
    let (logs, disk) = (folder("data-logs"), folder("data-disk"));
    let input = data().join("pretrain.train.jsonl");
    let bench = |words: &[&str]| Program::corral(&["bench", "data", "--dir"]).arg(&disk).args(words);
    let words =
        ["--input", input.to_str().unwrap(), "--runs", "1", "--vocab-size", "300", "--sequence-length", "32"];
    let found = measurements(&bench(&words).run(&logs, "all").expect_code(0));
    let ops: Vec<_> = found.iter().map(|f| f["op"].as_str().unwrap()).collect();
    assert_eq!(ops, ["tokenizer_train", "tokenize", "loader"]);
    positive(&found[0], &["text_bytes", "mb_per_s", "vocab_size"]);
    positive(&found[1], &["text_bytes", "mb_per_s", "tokens", "tokens_per_s"]);
    positive(&found[2], &["tokens", "tokens_per_s", "open_s"]);
    assert!(empty(&disk), "nothing stays");

    let tokenizer = data().join("bpe");
    let words = [&words[..], &["--tokenizer", tokenizer.to_str().unwrap()]].concat();
    let found = measurements(&bench(&words).run(&logs, "tokenizer").expect_code(0));
    assert_eq!(found.len(), 2, "{found:?}");

    bench(&["--input", "absent.jsonl"]).run(&logs, "absent").expect_error(3, &["absent.jsonl"]);
    bench(&["--runs", "0"]).run(&logs, "none").expect_error(2, &["--runs"]);
    assert!(empty(&disk), "nothing stays after an error");
    let launched = Program::new(launch()).args(&["--nproc", "2", "bench", "--device", "cpu", "data"]);
    launched.run(&logs, "two").expect_code(2);
}

#[test]
fn generation_by_a_model_and_by_a_preset() {
    let logs = folder("generate");
    let model = repository().join("tests/golden/models/tied");
    let small = ["--runs", "1", "--batch-size", "2", "--prompt-tokens", "4", "--new-tokens", "3"];
    let bench = |of: [&str; 2]| Program::corral(&["bench", "generate"]).args(&of).args(&small);
    let of_model = ["--model", model.to_str().unwrap()];
    let found = measurements(&bench(of_model).run(&logs, "model").expect_code(0));
    let [found] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((&found["model"], &found["preset"]), (&json!(model.to_str().unwrap()), &Value::Null));
    positive(found, &["new_tokens_per_s", "total_s"]);
    let preset = measurements(&bench(["--preset", "llama-15m"]).run(&logs, "preset").expect_code(0));
    assert_eq!((&preset[0]["preset"], &preset[0]["model"]), (&json!("llama-15m"), &Value::Null));
    bench(of_model).args(&["--preset", "llama-15m"]).run(&logs, "both").expect_error(2, &["--preset"]);
}
