//! DPO through the real binaries, and against golden values.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

mod common;

use nix::sys::signal::Signal;
use std::fs;
use testing::compare::{largest_relative, largest_relative_at, relative};
use testing::device::device;
use testing::golden::{golden, golden_model, tensors};
use testing::program::Program;
use testing::run::{Run, beginner, check_small_last_step, data};
use testing::tolerance::{Quantity, allowed};

use common::load;
use corral::algorithms::losses::preference::{PairLogRatios, losses};
use corral::algorithms::step::{MicroBatch, Objective, StepEntry, accumulate};
use corral::config::dpo::DpoSection;
use corral::model::{ModelInput, Recompute};
use tch::{Kind, Tensor};

/// Loss and gradients of pairs through a whole model, in one micro-batch.
#[test]
fn gradients_through_a_model_are_trls() {
    let golden = tensors(&golden().join("algo/dpo_model.safetensors"));
    for kind in [Kind::Double, Kind::Float] {
        let tolerance = allowed(Quantity::LossFunction, kind);
        let mut model = load(&golden_model("llama2"), kind);
        let (ids, mask) = (&golden["input_ids"], &golden["attention_mask"]);
        let completion = golden["completion_mask"].to_device(device());
        let (rows, columns) = ids.size2().unwrap();
        let next = ids.narrow(1, 1, columns - 1).to_device(device());
        let supervised = completion.narrow(1, 1, columns - 1);
        let labels = next.where_self(&supervised.eq(1), &Tensor::full_like(&next, -100));
        let none = Tensor::full([rows, 1], -100i64, (Kind::Int64, device()));
        let labels = Tensor::cat(&[labels, none], 1).contiguous().view([-1]);
        let batch = MicroBatch { input: ModelInput::with_mask(ids.shallow_clone(), mask), labels };
        let section = DpoSection::default();
        let reference = golden["ref_logps"].to_device(device()).to_kind(kind);
        let tokens = completion.sum_dim_intlist([1i64].as_slice(), false, kind);
        let loss = |out: &corral::model::head::LogProbs| {
            let sums = out.logprobs.view([rows, columns]).sum_dim_intlist([1i64].as_slice(), false, kind);
            let (ratios, tokens) = ((sums - &reference).chunk(2, 0), tokens.chunk(2, 0));
            let pairs = PairLogRatios {
                chosen: ratios[0].shallow_clone(),
                rejected: ratios[1].shallow_clone(),
                chosen_tokens: tokens[0].shallow_clone(),
                rejected_tokens: tokens[1].shallow_clone(),
            };
            Ok(losses(&section, &pairs).mean(kind))
        };
        let objective = Objective::LogProbs { temperature: 1.0, entropies: false, loss: Box::new(loss) };
        let mut entries = [StepEntry { batch: &batch, objective, balance: None }];
        let (values, _) = accumulate(&mut model, &mut entries, Recompute::None).unwrap();
        let wanted = golden["loss"].double_value(&[]);
        assert!((values[0] - wanted).abs() <= tolerance * wanted, "{kind:?}: {} {wanted}", values[0]);
        let mut compared = 0;
        for i in 0..model.params.len() {
            let gradient = model.params.slice_grad(i).expect("every group has a gradient");
            for spec in &model.params.layout(i).specs {
                if let Some(wanted) = golden.get(&format!("grad.{}", spec.name)) {
                    let distance = relative(&spec.view(&gradient), wanted);
                    assert!(distance <= tolerance, "{} in {kind:?}: {distance:e}", spec.name);
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, golden.keys().filter(|k| k.starts_with("grad.")).count());
    }
}

/// 12 steps on the rankings of [`data`].
fn run(name: &str) -> Run {
    let data = data().display();
    let start = beginner();
    let keys = format!(
        "model: {{path: {}}}
data:
  train: [{data}/rankings.train.jsonl]
  valid: [{data}/rankings.valid.jsonl]
  sequence_length: 128
  cache: {data}/cache-{name}
optim: {{lr: 1.0e-3}}
schedule: {{kind: constant}}
train: {{steps: 12, batch_size: 4}}
valid: {{every: 6, batches: 2}}
",
        start.display()
    );
    Run::of("dpo", name, &keys)
}

const KEYS: [&str; 4] = ["rewards_chosen", "rewards_rejected", "accuracy", "margin"];

/// How far the metrics of two runs are from each other, and their models.
fn distance(a: &Run, b: &Run) -> (f64, f64) {
    let numbers = |run: &Run, key: &str| [run.numbers("train", key), run.numbers("valid", key)].concat();
    let metrics = [&["loss"], &KEYS[..]].concat();
    // What is 0 at the start is told apart in absolute numbers.
    let apart = |key: &str| {
        let (a, b) = (numbers(a, key), numbers(b, key));
        largest_relative_at(&a, &b, 1e-2)
    };
    let metrics = metrics.into_iter().map(apart).fold(0.0, f64::max);
    let parameters = relative(&a.parameters(), &b.parameters());
    (metrics, parameters)
}

#[test]
fn pairs_are_learnt_and_ranks_micro_batches_and_packing_change_nothing() {
    let whole = run("whole");
    let words = ["precision.compute=float64", "dpo.sft_weight=0.1"];
    whole.train(1, &words);
    let (loss, accuracy) = (whole.numbers("train", "loss"), whole.numbers("train", "accuracy"));
    assert!(
        whole.numbers("train", "margin")[0].abs() < allowed(Quantity::TwoWays, Kind::Double),
        "the model is its own reference"
    );
    assert!(loss[11] < loss[0] && accuracy[11] > 0.6, "{loss:?} {accuracy:?}");
    for key in KEYS {
        assert_eq!(whole.numbers("valid", key).len(), 2);
    }
    let cases: [(&str, usize, &[&str]); 9] = [
        ("tensor", 2, &["parallel.tensor=2", "train.micro_batch_size=1"]),
        ("tensor-data", 4, &["parallel.tensor=2", "dpo.reference=online", "data.packing=false"]),
        ("two", 2, &["data.packing=false"]),
        ("micro", 1, &["train.micro_batch_size=1", "data.packing=false"]),
        ("packed", 2, &["train.micro_batch_size=1"]),
        ("replicated", 2, &["parallel.mode=replicate"]),
        ("grads", 2, &["parallel.mode=grads", "dpo.reference=online"]),
        ("hybrid", 2, &["parallel={mode: hybrid, shard: 1}"]),
        ("online", 2, &["dpo.reference=online"]),
    ];
    for (name, ranks, more) in cases {
        let other = run(name);
        other.train(ranks, &[&words[..], more].concat());
        let (metrics, parameters) = distance(&other, &whole);
        println!("{name}: metrics {metrics:.1e}, parameters {parameters:.1e}");
        assert!(
            metrics.max(parameters) < allowed(Quantity::SameMetrics, Kind::Double),
            "{name}: {metrics:e} {parameters:e}"
        );
    }
}

#[test]
fn completions_of_equal_rank_are_counted() {
    let run = run("ties");
    let tied = run.dir.join("tied.jsonl");
    let line = "{\"prompt\": \"1 + 1?\", \"completions\": [\"2\", \"two\", \"3\"], \"num_correct\": 2}\n";
    fs::write(&tied, line.repeat(4)).unwrap();
    run.train(1, &[&format!("data.train=[{}]", tied.display()), "train.steps=6"]);
    assert_eq!(run.numbers("train", "ties"), [4.0; 6]);
    assert_eq!(run.numbers("valid", "ties"), [0.0]);
}

/// With adapters the reference is the model without them, whether it is computed in every step or once.
#[test]
fn the_reference_of_adapters_is_the_model_without_them() {
    let words = ["precision.compute=float64", "lora={rank: 4, alpha: 8}", "optim.lr=1e-2"];
    let (cached, online) = (run("lora-cached"), run("lora-online"));
    cached.train(1, &words);
    online.train(2, &[&words[..], &["dpo.reference=online"]].concat());
    assert!(cached.numbers("train", "margin")[11].abs() > 1e-4);
    let key = |run: &Run, key| run.numbers("train", key);
    for k in ["loss", "grad_norm"] {
        let apart = largest_relative(&key(&cached, k), &key(&online, k));
        assert!(apart < allowed(Quantity::SameMetrics, Kind::Double), "{k}: {apart:e}");
    }
    assert!(cached.output().join("model/adapter_model.safetensors").exists());
}

#[test]
fn a_killed_run_resumes_bit_by_bit() {
    let words = ["checkpoint.every=3"];
    let whole = run("resume-whole");
    whole.train(1, &words);
    for (name, forget) in [("resume-killed", false), ("resume-without-cache", true)] {
        let killed = run(name);
        killed.stop_at(7, Signal::SIGKILL, &words);
        if forget {
            // The reference is not the model of the checkpoint.
            fs::remove_dir_all(data().join(format!("cache-{name}"))).unwrap();
        }
        let ended = killed.train(1, &words);
        assert_eq!(ended.err.contains("reference: computing"), forget, "{ended}");
        killed.expect_equal(&whole);
        assert_eq!(killed.numbers("train", "margin"), whole.numbers("train", "margin"));
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let run = run("refused");
    let cases: [(&[&str], i32, &str); 7] = [
        (&["dpo.label_smoothing=0.5"], 2, "below 0.5"),
        (&["dpo.loss=ipo", "dpo.label_smoothing=0.1"], 2, "only sigmoid, robust and exo_pair"),
        (&["dpo.loss=ippo"], 2, "did you mean 'ipo'"),
        (&["model={preset: llama-15m}"], 2, "give model.path"),
        (&["lora={rank: 4, alpha: 8, dropout: 0.1}"], 2, "data.packing"),
        (&["data.split=[1, 0]"], 2, "the second"),
        (&["data.sequence_length=8"], 3, "no example"),
    ];
    for (words, code, part) in cases {
        run.expect_refused(words, code, part);
    }
    let bad = run.dir.join("bad.jsonl");
    fs::write(&bad, "{\"prompt\": \"a\", \"chosen\": \"b\"}\n").unwrap();
    let source = format!("data.train=[{}]", bad.display());
    run.start(1, &[&source]).wait().expect_error(3, &["bad.jsonl:1: no preference"]);
    let none = Program::corral(&["dpo", "--config"]).arg(run.dir.join("none.yaml")).run(&run.dir, "none");
    none.expect_error(2, &["none.yaml"]);
}

#[test]
fn the_last_step_of_an_epoch_has_the_rows_that_are_left() {
    check_small_last_step(run, &["loss", "margin", "accuracy"]);
}
