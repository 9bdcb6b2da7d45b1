//! Reward models through the real binaries.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use nix::sys::signal::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use tch::Kind;
use testing::compare::{largest_relative_at, relative, relative_number};
use testing::folder::folder;
use testing::golden::{json, tensors};
use testing::program::{Ended, Program};
use testing::run::{Run, beginner, check_small_last_step, data};
use testing::tolerance::{Quantity, allowed};

use serde_json::{Value, json};

/// 12 steps on the rankings of [`data`].
fn run(name: &str) -> Run {
    let (data, start) = (data().display(), beginner());
    let keys = format!(
        "model: {{path: {}}}
data:
  train: [{data}/rankings.train.jsonl]
  valid: [{data}/rankings.valid.jsonl]
  sequence_length: 128
  cache: {data}/cache-{name}
reward: {{normalize: {{samples: 20}}}}
optim: {{lr: 3.0e-3}}
schedule: {{kind: constant}}
train: {{steps: 12, batch_size: 4}}
valid: {{every: 6, batches: 2}}
",
        start.display()
    );
    Run::of("reward", name, &keys)
}

const KEYS: [&str; 4] = ["accuracy", "margin", "reward_chosen", "reward_rejected"];

fn ours(model: &Path) -> Value {
    json(&model.join("corral.json"))["reward"].clone()
}

fn words<'a>(words: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [words, more].concat()
}

#[test]
fn rankings_are_learnt_and_ranks_micro_batches_and_packing_change_nothing() {
    for (score, loss) in [("sum", "pairs"), ("mean", "order"), ("last", "best")] {
        let (score_is, loss_is) = (format!("reward.score={score}"), format!("reward.loss={loss}"));
        let options = ["precision.compute=float64", score_is.as_str(), loss_is.as_str()];
        let whole = run(&format!("whole-{score}"));
        whole.train(1, &options);
        let losses = whole.numbers("train", "loss");
        let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
        assert!(score != "sum" || mean(&losses[8..]) < mean(&losses[..4]), "{losses:?}");
        for key in [&KEYS[..], &["accuracy_low", "accuracy_high", "reward_mean", "reward_std"]].concat() {
            assert_eq!(whole.numbers("valid", key).len(), 2, "{key}");
        }
        let normalized = ours(&whole.output().join("model"));
        assert_eq!(normalized["score"], json!(score));
        assert_eq!(normalized["measured"]["samples"], json!(20));
        let cases: [(&str, usize, &[&str]); 4] = [
            ("tensor", 2, &["parallel.tensor=2"]),
            ("two", 2, &["data.packing=false"]),
            ("micro", 2, &["train.micro_batch_size=1"]),
            ("replicated", 2, &["parallel.mode=replicate", "data.packing=false"]),
        ];
        for (name, ranks, more) in cases.into_iter().take(if score == "sum" { 4 } else { 2 }) {
            let other = run(&format!("{name}-{score}"));
            other.train(ranks, &words(&options, more));
            for key in [&["loss"], &KEYS[..]].concat() {
                for kind in ["train", "valid"] {
                    let (a, b) = (other.numbers(kind, key), whole.numbers(kind, key));
                    for (a, b) in a.iter().zip(&b) {
                        assert!(
                            largest_relative_at(&[*a], &[*b], 1.0)
                                <= allowed(Quantity::SameMetrics, Kind::Double),
                            "{name} {kind} {key}: {a} {b}"
                        );
                    }
                }
            }
            let distance = relative(&other.parameters(), &whole.parameters());
            assert!(distance < allowed(Quantity::SameMetrics, Kind::Double), "{name}: {distance:e}");
            let gain = ours(&other.output().join("model"))["gain"].as_f64().unwrap();
            assert!(
                relative_number(gain, normalized["gain"].as_f64().unwrap())
                    < allowed(Quantity::SameMetrics, Kind::Double)
            );
        }
    }
}

#[test]
fn a_killed_run_resumes_bit_by_bit() {
    let whole = run("resume-whole");
    whole.train(1, &["checkpoint.every=3"]);
    let killed = run("resume-killed");
    killed.stop_at(7, Signal::SIGKILL, &["checkpoint.every=3"]);
    killed.train(1, &["checkpoint.every=3"]);
    killed.expect_equal(&whole);
    assert_eq!(ours(&killed.output().join("model")), ours(&whole.output().join("model")));
}

/// `corral score` of lines.
fn scored(model: &Path, name: &str, lines: &[Value]) -> Vec<Value> {
    let dir = folder(name);
    let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
    fs::write(dir.join("in.jsonl"), text).unwrap();
    let at = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let (input, output) = (at("in.jsonl"), at("out.jsonl"));
    let model = model.to_string_lossy().into_owned();
    let words = ["score", "--model", &model, "--input", &input, "--output", &output];
    Program::corral(&words).run(&dir, "score").expect_code(0);
    let text = fs::read_to_string(dir.join("out.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn rankings() -> Vec<Value> {
    let text = fs::read_to_string(data().join("rankings.valid.jsonl")).unwrap();
    text.lines().take(10).map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn eval(model: &Path, name: &str, more: &[&str]) -> Ended {
    let dir = folder(name);
    let at = |path: PathBuf| path.to_string_lossy().into_owned();
    let (model, input) = (at(model.to_path_buf()), at(data().join("rankings.valid.jsonl")));
    let options = ["eval", "--model", &model, "--task", "preference", "--input", &input];
    Program::corral(&words(&options, more)).run(&dir, "eval")
}

#[test]
fn scores_are_normalised_wherever_they_are_read() {
    let trained = run("score");
    trained.train(1, &["reward.score=sum"]);
    let model = trained.output().join("model");
    let scoring = ours(&model);
    let lines: Vec<Value> = rankings()
        .iter()
        .flat_map(|line| {
            let completions = line["completions"].as_array().unwrap().clone();
            completions.into_iter().map(|c| json!({"prompt": line["prompt"], "completion": c}))
        })
        .collect();
    let of_run = scored(&trained.output(), "score-run", &lines);
    for line in &of_run {
        let number = |key: &str| line[key].as_f64().unwrap();
        let reward = scoring["gain"].as_f64().unwrap() * number("score") + scoring["bias"].as_f64().unwrap();
        assert!((number("reward") - reward).abs() < allowed(Quantity::Printed, Kind::Double));
        assert!(line["token_ids"].as_array().unwrap().len() > 5);
    }
    // A checkpoint is not normalised yet.
    let (_, newest) = trained.checkpoints().pop().unwrap();
    for (line, raw) in of_run.iter().zip(scored(&newest, "score-checkpoint", &lines)) {
        assert_eq!((&line["score"], &line["score"]), (&raw["score"], &raw["reward"]));
    }
    // Converted, it scores the same.
    let dir = folder("score-converted");
    let at = |path: &Path| path.to_string_lossy().into_owned();
    let (from, to) = (at(&model), at(&dir.join("hf")));
    Program::corral(&["convert", "--from", &from, "--to", &to, "--format", "hf"])
        .run(&dir, "convert")
        .expect_code(0);
    assert_eq!(scored(&dir.join("hf"), "score-hf", &lines), of_run);
    Program::corral(&["convert", "--from", &from, "--to", &to, "--format", "meta"])
        .run(&dir, "meta")
        .expect_error(3, &["no place for a scalar head"]);

    eval(&model, "eval-reference", &["--reference", &at(&model)])
        .expect_error(2, &["--reference is for language models"]);
    let out = eval(&model, "eval", &["--by", "kinds", "--limit", "10"]).expect_code(0).out;
    let result: Value = serde_json::from_str(out.trim()).unwrap();
    let rewards: Vec<f64> = of_run.iter().map(|l| l["reward"].as_f64().unwrap()).collect();
    let (mut next, mut right, mut all, mut of_final) = (0, 0, 0, 0);
    for line in rankings() {
        let mine = &rewards[next..next + line["completions"].as_array().unwrap().len()];
        next += mine.len();
        for i in 0..mine.len() {
            for j in i + 1..mine.len() {
                all += 1;
                right += u64::from(mine[i] > mine[j]);
                of_final += u64::from(i == 0 && mine[i] > mine[j] && line["kinds"][j] == "final");
            }
        }
    }
    assert_eq!((&result["pairs"], &result["right"]), (&json!(all), &json!(right)));
    assert_eq!(result["by_kinds"]["final"]["pairs"], json!(rankings().len()));
    assert_eq!(result["by_kinds"]["final"]["right"], json!(of_final));
    assert!(result["by_kinds"].get("correct").is_none());
    let low = result["accuracy_95"][0].as_f64().unwrap();
    assert!(low < result["accuracy"].as_f64().unwrap());

    // It goes on with its own head; and predicts nothing.
    let again = run("again");
    let path = format!("model.path={}", model.display());
    again.train(1, &[&path, "optim.lr=1.0e-9", "train.steps=4", "valid.every=4"]);
    assert_eq!(ours(&again.output().join("model"))["score"], json!("sum"));
    for (line, other) in of_run.iter().zip(scored(&again.output(), "score-again", &lines)) {
        let number = |line: &Value| line["score"].as_f64().unwrap();
        assert!(
            (number(line) - number(&other)).abs() < allowed(Quantity::NearRewards, Kind::Float),
            "{line} {other}"
        );
    }
    let dir = folder("refused");
    let needs_logits: [&[&str]; 2] =
        [&["generate", "--prompt", "a"], &["eval", "--task", "perplexity", "--input", "x"]];
    for more in needs_logits {
        let arguments = words(more, &["--model", &from]);
        Program::corral(&arguments).run(&dir, more[0]).expect_error(3, &["scalar head"]);
    }
    fs::write(dir.join("in.jsonl"), "{\"text\": \"a\"}\n").unwrap();
    let (input, output) = (at(&dir.join("in.jsonl")), at(&dir.join("out.jsonl")));
    Program::corral(&["score", "--model", &from, "--input", &input, "--output", &output])
        .run(&dir, "score")
        .expect_error(3, &["in.jsonl:1", "give `prompt` and `completion`"]);
    let of_lm = eval(beginner(), "lm", &["--limit", "3"]).expect_code(0).out;
    assert!(of_lm.contains("\"compared\":\"logprobs\""), "{of_lm}");
}

#[test]
fn adapters_and_frozen_blocks_train_the_head_too() {
    let lines: Vec<Value> = rankings()
        .iter()
        .map(|line| json!({"prompt": line["prompt"], "completion": line["completions"][0]}))
        .collect();
    let adapter = run("lora");
    adapter.train(2, &["lora={rank: 4, alpha: 8, base: int8}"]);
    let dir = adapter.output().join("model");
    let config = json(&dir.join("adapter_config.json"));
    assert_eq!((&config["task_type"], &config["modules_to_save"]), (&json!("SEQ_CLS"), &json!(["score"])));
    let saved = tensors(&dir.join("adapter_model.safetensors"));
    assert!(saved.contains_key("base_model.model.score.weight"));
    assert_eq!(json(&dir.join("corral.json"))["base"], json!("int8"));
    let (_, newest) = adapter.checkpoints().pop().unwrap();
    for (line, raw) in
        scored(&dir, "score-lora", &lines).iter().zip(scored(&newest, "score-lora-checkpoint", &lines))
    {
        let number = |line: &Value| line["score"].as_f64().unwrap();
        assert!((number(line) - number(&raw)).abs() < allowed(Quantity::SameRewards, Kind::Float));
    }
    // Merged it is a reward model by itself, normalised as before.
    let merged = folder("merged");
    let at = |path: &Path| path.to_string_lossy().into_owned();
    let (from, to) = (at(&dir), at(&merged.join("hf")));
    Program::corral(&["merge", "--adapter", &from, "--output", &to]).run(&merged, "merge").expect_code(0);
    assert_eq!(ours(&merged.join("hf")), ours(&dir));
    for (line, other) in
        scored(&dir, "score-adapter", &lines).iter().zip(scored(&merged.join("hf"), "score-merged", &lines))
    {
        let number = |line: &Value| line["reward"].as_f64().unwrap();
        assert!((number(line) - number(&other)).abs() < allowed(Quantity::NearRewards, Kind::Float));
    }
    // An adapter of fine-tuning is trained further, with a new head.
    let tuned = Run::sft("tuned");
    let base = format!("model={{path: {}}}", beginner().display());
    tuned.train(1, &[&base, "lora={rank: 4, alpha: 8}", "train.steps=4", "valid.every=4"]);
    let further = run("further");
    let path = format!("model.path={}", tuned.output().display());
    further.train(1, &[&path, "lora={rank: 4, alpha: 8}", "train.steps=4", "valid.every=4"]);
    let before = tensors(&tuned.output().join("model/adapter_model.safetensors"));
    let after = tensors(&further.output().join("model/adapter_model.safetensors"));
    assert_eq!(before.len() + 1, after.len());
    for (name, tensor) in before.iter().filter(|(name, _)| name.contains("lora_A")) {
        assert!(relative(&after[name], tensor) < 0.5, "{name}");
    }

    let frozen = run("frozen");
    frozen.train(1, &["freeze.blocks=1", "freeze.embeddings=true", "freeze.train_only=[norm]"]);
    let (before, after) = (
        tensors(&beginner().join("model.safetensors")),
        tensors(&frozen.output().join("model/model.safetensors")),
    );
    assert!(after["score.weight"].abs().max().double_value(&[]) > 0.0);
    for (name, tensor) in &after {
        if name == "score.weight" {
            continue;
        }
        assert_eq!(tensor.equal(&before[name]), name != "model.norm.weight", "{name}");
    }
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let refused = |name: &str, words: &[&str], code: i32, parts: &[&str]| {
        let run = run(name);
        run.program(1, words).run(&run.dir, "refused").expect_error(code, parts);
    };
    refused("margin", &["reward.loss=best", "reward.margin=0.5"], 2, &["reward.margin", "only the loss"]);
    refused("dropout", &["lora={rank: 2, alpha: 4, dropout: 0.1}"], 2, &["data.packing"]);
    refused("normalize", &["reward.normalize.samples=1"], 2, &["no standard deviation"]);
    refused("loss", &["reward.loss=triples"], 2, &["reward.loss"]);
    refused(
        "pad",
        &["tokenizer.pad_token='</s>'"],
        2,
        &["tokenizer.pad_token must not be `</s>`", "ends texts with it"],
    );
}

/// A pad token that is new is one more row of the embedding, and stands in the files.
#[test]
fn a_pad_token_is_added_where_it_is_asked_for() {
    let trained = run("padded");
    trained.train(1, &["tokenizer.pad_token=<|fill|>", "train.steps=4"]);
    let model = trained.output().join("model");
    let (config, tokenizer) = (json(&model.join("config.json")), json(&model.join("tokenizer_config.json")));
    assert_eq!((&config["pad_token_id"], &config["vocab_size"]), (&json!(300), &json!(301)));
    assert_eq!(tokenizer["pad_token"], json!("<|fill|>"));
}

/// ChatML writes a line break after a turn, at which nothing is scored.
#[test]
fn the_end_of_a_turn_is_scored() {
    let trained = run("chatml");
    let template = "tokenizer={chat_template: chatml, add_tokens: ['<|im_start|>', '<|im_end|>']}";
    trained.train(1, &[template, "reward.score=last", "train.steps=4"]);
    let line = json!({"prompt": "1 + 1?", "completion": "2"});
    let scored = scored(&trained.output(), "score-chatml", &[line]);
    let ids = scored[0]["token_ids"].as_array().unwrap();
    assert_eq!(ids.iter().filter(|id| **id == json!(301)).count(), 2, "{ids:?}");
    assert_eq!(ids.last(), Some(&json!(301)), "{ids:?}");
}

/// PPO on the prompts of [`data`], rewarded by a model that is the critic, too.
fn ppo(name: &str, reward_model: &Path) -> Run {
    let (data, start, reward_model) = (data().display(), beginner(), reward_model.display());
    let keys = format!(
        "actor: {{path: {}}}
critic: {{optim: {{lr: 1.0e-30, weight_decay: 0.0}}}}
reward_model: {{path: {reward_model}}}
data: {{train: [{data}/prompts.train.jsonl], sequence_length: 128}}
generation: {{max_new_tokens: 8}}
ppo: {{epochs: 1, minibatch_size: 4}}
train: {{steps: 1, batch_size: 4}}
",
        start.display()
    );
    Run::of("ppo", name, &keys)
}

/// The values of a critic that was a reward model begin at the size of its rewards, where its head is of one token.
#[test]
fn a_reward_model_becomes_a_critic() {
    for score in ["last", "sum"] {
        let trained = run(&format!("critic-{score}"));
        // With a pad token that the actor does not know.
        let words = ["tokenizer.pad_token=<|fill|>", "train.steps=4"];
        trained.train(1, &[&words[..], &[&format!("reward.score={score}")]].concat());
        let model = trained.output().join("model");
        let run = ppo(&format!("ppo-{score}"), &model);
        run.train(1, &[]);
        let head = |dir: &Path| tensors(&dir.join("model.safetensors"))["score.weight"].shallow_clone();
        let gain = ours(&model)["gain"].as_f64().unwrap();
        assert!((gain - 1.0).abs() > 0.01, "{gain} shows nothing");
        let wanted = head(&model) * if score == "last" { gain } else { 1.0 };
        let distance = relative(&head(&run.output().join("critic")), &wanted);
        assert!(distance < allowed(Quantity::Converted, Kind::Float), "{score}: {distance:e}");
    }
}

/// A response that one rank's reward model cannot read ends all of them, at once and with its reason.
#[test]
fn ranks_fail_together_where_one_cannot_score() {
    let trained = run("unreadable");
    trained.train(1, &["train.steps=4"]);
    let model = trained.output().join("model");
    let path = model.join("chat_template.jinja");
    let template = fs::read_to_string(&path).unwrap();
    let refuse =
        "{%- if 'seven' in messages[0].content %}{{ raise_exception('cannot read seven') }}{% endif -%}";
    fs::write(&path, format!("{refuse}{template}")).unwrap();
    let run = ppo("ppo-unreadable", &model);
    let prompts = run.dir.join("prompts.jsonl");
    fs::write(&prompts, "{\"prompt\": \"1 + 1?\"}\n{\"prompt\": \"1 + seven?\"}\n").unwrap();
    let source = format!("data.train=[{}]", prompts.display());
    let words = ["train.batch_size=2", "ppo.minibatch_size=2", "parallel.mode=full", "parallel.timeout_s=20"];
    let ended = run.start(2, &[&words[..], &[&source]].concat()).wait();
    let ended = ended.expect_code(3);
    assert!(ended.err.contains("cannot read seven"), "{ended}");
    // Not by calls of one rank that meet others of the other one.
    assert!(!ended.err.contains("terminate called") && !ended.err.contains("mismatch"), "{ended}");
}

#[test]
fn the_last_step_of_an_epoch_has_the_rows_that_are_left() {
    check_small_last_step(run, &["loss", "margin", "accuracy"]);
}
