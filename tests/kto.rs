//! KTO through the real binaries, and against golden values.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

mod common;

use nix::sys::signal::Signal;
use std::fs;
use std::path::Path;
use testing::compare::{largest_relative_at, relative};
use testing::device::device;
use testing::golden::{golden, golden_model, tensors};
use testing::run::{Run, answers, check_small_last_step, data};
use testing::tolerance::{Quantity, allowed};

use common::load;
use corral::algorithms::losses::unpaired::{losses, reference_point};
use corral::algorithms::step::{MicroBatch, Objective, StepEntry, accumulate};
use corral::config::kto::{KtoLoss, KtoSection};
use corral::model::head::LogProbs;
use corral::model::{LmHead, ModelInput, Recompute};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

/// KL, loss and gradients of completions through a whole model, in one micro-batch.
#[test]
fn gradients_through_a_model_are_trls() {
    let golden = tensors(&golden().join("algo/kto_model.safetensors"));
    let number = |key: &str| golden[key].double_value(&[]);
    for kind in [Kind::Double, Kind::Float] {
        let tolerance = allowed(Quantity::LossFunction, kind);
        let mut model = load(&golden_model("llama2"), kind);
        let batch = |prefix: &str| {
            let of = |key: &str| &golden[&format!("{prefix}{key}")];
            let ids = of("input_ids");
            let (rows, columns) = ids.size2().unwrap();
            let next = ids.narrow(1, 1, columns - 1).to_device(device());
            let supervised = of("completion_mask").to_device(device()).narrow(1, 1, columns - 1);
            let labels = next.where_self(&supervised.eq(1), &Tensor::full_like(&next, -100));
            let none = Tensor::full([rows, 1], -100i64, (Kind::Int64, device()));
            let labels = Tensor::cat(&[labels, none], 1).contiguous().view([-1]);
            MicroBatch { input: ModelInput::with_mask(ids.shallow_clone(), of("attention_mask")), labels }
        };
        let rows = golden["labels"].size()[0];
        let sums =
            |logprobs: &Tensor| logprobs.view([rows, -1]).sum_dim_intlist([1i64].as_slice(), false, kind);
        let of = |key: &str| golden[key].to_device(device()).to_kind(kind);

        let mismatched = batch("kl_");
        let hidden = model.hidden(&mismatched.input).unwrap();
        let logprobs =
            LmHead::logprobs(&mut model, &hidden, &mismatched.labels, 1.0, false).unwrap().logprobs;
        let apart = (sums(&logprobs) - of("kl_ref_logps")).sum(Kind::Double).double_value(&[]);
        let kl = reference_point(KtoLoss::Kto, apart, rows as f64);
        assert!(
            (kl - number("kl")).abs() <= allowed(Quantity::KlEstimate, kind),
            "{kind:?}: {kl} {}",
            number("kl")
        );

        let section = KtoSection {
            loss: KtoLoss::Kto,
            beta: number("beta"),
            desirable_weight: number("desirable_weight"),
            undesirable_weight: number("undesirable_weight"),
        };
        let batch = batch("");
        let (reference, desirable) = (of("ref_logps"), of("labels"));
        let loss = |out: &LogProbs| {
            Ok(losses(&section, &(sums(&out.logprobs) - &reference), &desirable, kl).mean(kind))
        };
        let objective = Objective::LogProbs { temperature: 1.0, entropies: false, loss: Box::new(loss) };
        let mut entries = [StepEntry { batch: &batch, objective, balance: None }];
        let (values, _) = accumulate(&mut model, &mut entries, Recompute::None).unwrap();
        let (loss, wanted) = (values[0], number("loss"));
        assert!((loss - wanted).abs() <= tolerance * wanted, "{kind:?}: {loss} {wanted}");
        let mut compared = 0;
        for i in 0..model.params.len() {
            let gradient = model.params.slice_grad(i).expect("every group has a gradient");
            for spec in &model.params.layout(i).specs {
                if let Some(wanted) = golden.get(&format!("grad.{}", spec.name)) {
                    let distance = relative(&spec.view(&gradient), wanted);
                    assert!(
                        distance <= allowed(Quantity::UnpairedGradient, kind),
                        "{} in {kind:?}: {distance:e}",
                        spec.name
                    );
                    compared += 1;
                }
            }
        }
        assert!(compared > 0 && compared == golden.keys().filter(|k| k.starts_with("grad.")).count());
    }
}

/// The rankings of [`data`] as feedback, a line for each completion; what follows from being the best or not.
fn feedback(name: &str, to: &Path) {
    let mut lines = String::new();
    for line in fs::read_to_string(data().join(name)).unwrap().lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        let good = record["num_correct"].as_u64().unwrap() as usize;
        for (i, completion) in record["completions"].as_array().unwrap().iter().enumerate() {
            let line = json!({"prompt": record["prompt"], "completion": completion, "label": i < good});
            lines.push_str(&format!("{line}\n"));
        }
    }
    fs::write(to, lines).unwrap();
}

/// 24 steps on feedback.
fn run(name: &str) -> Run {
    let run = Run::of("kto", name, "");
    let (train, valid) = (run.dir.join("train.jsonl"), run.dir.join("valid.jsonl"));
    feedback("rankings.train.jsonl", &train);
    feedback("rankings.valid.jsonl", &valid);
    let text = format!(
        "output_dir: {}
model: {{path: {}}}
data:
  train: [{}]
  valid: [{}]
  sequence_length: 128
  cache: {}
optim: {{lr: 1.0e-3}}
schedule: {{kind: constant}}
train: {{steps: 24, batch_size: 8}}
valid: {{every: 12, batches: 2}}
",
        run.output().display(),
        answers().display(),
        train.display(),
        valid.display(),
        run.dir.join("cache").display()
    );
    fs::write(run.dir.join("config.yaml"), text).unwrap();
    run
}

const KEYS: [&str; 5] = ["loss", "rewards_chosen", "rewards_rejected", "kl", "accuracy"];

/// How far the metrics of two runs are from each other.
fn distance(a: &Run, b: &Run) -> f64 {
    let numbers = |run: &Run, key: &str| -> Vec<f64> {
        // Null in steps without such a completion.
        run.metrics().iter().map(|line| line[key].as_f64().unwrap_or(-1.0)).collect()
    };
    // What is 0 at the start is told apart in absolute numbers.
    let apart = |key: &str| {
        let (a, b) = (numbers(a, key), numbers(b, key));
        assert_eq!((a.len(), b.len()), (26, 26), "{key}");
        largest_relative_at(&a, &b, 1e-2)
    };
    KEYS.into_iter().map(apart).fold(0.0, f64::max)
}

#[test]
fn feedback_is_learnt_and_ranks_micro_batches_and_packing_change_nothing() {
    for (loss, other_loss) in [("kto", false), ("apo_zero_unpaired", true)] {
        // Most are bad ones: with this weight good ones decide, and the KL grows.
        let words = ["precision.compute=float64", &format!("kto={{loss: {loss}, undesirable_weight: 0.05}}")];
        let whole = run(&format!("{loss}-whole"));
        whole.train(1, &words);
        let losses = whole.numbers("train", "loss");
        let (good, bad) = (whole.numbers("train", "desirable"), whole.numbers("train", "undesirable"));
        assert!(good.iter().zip(&bad).all(|(good, bad)| good + bad == 8.0), "{good:?} {bad:?}");
        let first = 0.5 * (good[0] + 0.05 * bad[0]) / 8.0;
        assert!(
            (losses[0] - first).abs() < allowed(Quantity::TwoWays, Kind::Double),
            "the model is its own reference: {losses:?}"
        );
        let valid = whole.numbers("valid", "loss");
        assert!(valid[1] < valid[0], "{valid:?}");
        let kl = whole.numbers("train", "kl");
        assert!(kl.iter().all(|kl| *kl >= 0.0) && other_loss == kl.iter().all(|kl| *kl == 0.0), "{kl:?}");
        let cases: [(&str, usize, &[&str]); 6] = [
            ("tensor", 2, &["parallel.tensor=2"]),
            ("two", 2, &["data.packing=false"]),
            ("micro", 1, &["train.micro_batch_size=1", "data.packing=false"]),
            ("packed", 2, &["train.micro_batch_size=2"]),
            ("four", 4, &["parallel.mode=grads"]),
            ("other", 2, &[&format!("reference.path={}", answers().display())]),
        ];
        for (name, ranks, more) in cases {
            let other = run(&format!("{loss}-{name}"));
            other.train(ranks, &[&words[..], more].concat());
            let metrics = distance(&other, &whole);
            let parameters = relative(&other.parameters(), &whole.parameters());
            println!("{loss} {name}: metrics {metrics:.1e}, parameters {parameters:.1e}");
            assert!(
                metrics.max(parameters) < allowed(Quantity::SameMetrics, Kind::Double),
                "{loss} {name}: {metrics:e} {parameters:e}"
            );
        }
    }
}

/// With adapters the reference is the model without them. Both are the same at the start.
#[test]
fn the_reference_of_adapters_is_the_model_without_them() {
    let words = ["precision.compute=float64", "lora={rank: 4, alpha: 8}", "optim.lr=1e-2"];
    let (off, other) = (run("lora-off"), run("lora-other"));
    off.train(1, &words);
    let reference = format!("reference.path={}", answers().display());
    other.train(2, &[&words[..], &[&reference]].concat());
    assert!(off.numbers("train", "rewards_rejected")[23].abs() > 1e-4);
    let metrics = distance(&off, &other);
    assert!(metrics < allowed(Quantity::SameMetrics, Kind::Double), "{metrics:e}");
    assert!(off.output().join("model/adapter_model.safetensors").exists());
}

/// Ranked completions are feedback, too: the best are good ones, the others bad.
#[test]
fn rankings_are_read_as_feedback() {
    let run = run("rankings");
    let rankings = run.dir.join("ranked.jsonl");
    let line = "{\"prompt\": \"1 + 1?\", \"completions\": [\"2\", \"two\", \"3\"], \"num_correct\": 2}\n";
    fs::write(&rankings, line.repeat(4)).unwrap();
    let data = format!("data.train=[{}]", rankings.display());
    let ended = run.train(1, &[&data, "train={steps: 2, batch_size: 4}"]);
    assert_eq!(run.numbers("train", "desirable"), [8.0; 2]);
    assert_eq!(run.numbers("train", "undesirable"), [4.0; 2]);
    assert!(ended.err.contains("8 good and 4 bad completions, which weigh 2.00 to 1"), "{ended}");
    assert!(ended.err.contains("kto.desirable_weight between 0.500 and 0.667"), "{ended}");
}

#[test]
fn a_killed_run_resumes_bit_by_bit() {
    let words = ["checkpoint.every=3"];
    let whole = run("resume-whole");
    whole.train(1, &words);
    let killed = run("resume-killed");
    killed.stop_at(7, Signal::SIGKILL, &words);
    killed.train(1, &words);
    killed.expect_equal(&whole);
    assert_eq!(killed.numbers("train", "kl"), whole.numbers("train", "kl"));
}

#[test]
fn what_cannot_be_is_refused() {
    let run = run("refused");
    let cases: [(&[&str], i32, &str); 7] = [
        (&["kto.loss=ktoo"], 2, "did you mean 'kto'"),
        (&["train.batch_size=1"], 2, "at least 2"),
        (&["kto={desirable_weight: 0, undesirable_weight: 0}"], 2, "above 0"),
        (&["kto.beta=0"], 2, "kto.beta"),
        (&["model={preset: llama-15m}"], 2, "give model.path"),
        (&["lora={rank: 4, alpha: 8, dropout: 0.1}"], 2, "data.packing"),
        (&["data.sequence_length=8"], 3, "no example"),
    ];
    for (words, code, part) in cases {
        run.expect_refused(words, code, part);
    }
    let bad = run.dir.join("bad.jsonl");
    let lines = [
        ("{\"prompt\": \"a\", \"completion\": \"b\"}", "no `label`"),
        ("{\"prompt\": \"a\", \"completion\": \"b\", \"label\": \"good\"}", "must be true or false"),
        ("{\"completion\": \"b\", \"label\": true}", "known"),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"label\": true}", "a completion"),
    ];
    for (line, part) in lines {
        fs::write(&bad, format!("{line}\n")).unwrap();
        let source = format!("data.train=[{}]", bad.display());
        run.start(1, &[&source]).wait().expect_error(3, &["bad.jsonl:1", part]);
    }
}

#[test]
fn the_last_step_of_an_epoch_has_the_rows_that_are_left() {
    check_small_last_step(run, &["loss", "kl"]);
}
