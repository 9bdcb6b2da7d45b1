//! GRPO and online DPO through the real binaries.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use nix::sys::signal::Signal;
use std::fs;
use tch::Kind;
use testing::compare::relative_number;
use testing::compare::{largest_of, relative};
use testing::golden::tensors;
use testing::run::{Run, answers, data, uint};
use testing::tolerance::{Quantity, allowed};

use serde_json::Value;

/// What a model of this size can learn: a reward that many of its responses get.
const EASY: &str = "rewards=[{kind: format, pattern: '[02468]'}]";

fn run(subcommand: &'static str, name: &str) -> Run {
    let (start, data) = (answers(), data().display());
    let keys = format!(
        "actor: {{path: {}}}
data:
  train: [{data}/prompts.train.jsonl]
  valid: [{data}/prompts.valid.jsonl]
  sequence_length: 128
rewards: [{{kind: format, pattern: '7'}}]
generation: {{max_new_tokens: 12}}
optim: {{lr: 3.0e-3}}
schedule: {{kind: constant}}
train: {{steps: 6, batch_size: 4}}
valid: {{every: 3, batches: 1}}
samples: {{every: 2, count: 3}}
",
        start.display()
    );
    Run::of(subcommand, name, &keys)
}

const GRPO: [&str; 8] =
    ["reward", "reward_std", "kl", "entropy", "clip_fraction", "response_tokens", "eos_fraction", "loss"];

/// The largest distance of the numbers of two runs.
fn apart(a: &Run, b: &Run, keys: &[&str]) -> f64 {
    let of = |key: &&str| largest_of(&a.numbers("train", key), &b.numbers("train", key));
    keys.iter().map(of).fold(0.0, f64::max)
}

#[test]
fn ranks_and_micro_batches_change_nothing() {
    let words = ["precision.compute=float64", "grpo={group_size: 4, beta: 0.05}"];
    let several =
        "grpo={group_size: 4, epochs: 2, minibatch_size: 8, loss: dapo, epsilon_high: 0.28, beta: 0.05}";
    let whole = run("grpo", "whole");
    whole.train(1, &words);
    assert!(
        whole.numbers("train", "kl")[0].abs() < allowed(Quantity::TwoWays, Kind::Double),
        "the reference is the policy at the start"
    );
    assert!(whole.numbers("train", "kl")[5].abs() > 1e-6, "the policy moves");
    assert_eq!(whole.numbers("valid", "reward").len(), 2);
    let cases: [(&str, usize, &[&str]); 6] = [
        ("micro", 1, &["train.micro_batch_size=2"]),
        ("tensor", 2, &["parallel.tensor=2"]),
        ("tensor-data", 4, &["parallel.tensor=2", "train.micro_batch_size=2"]),
        ("two", 2, &[]),
        ("replicated", 2, &["parallel.mode=replicate", "train.micro_batch_size=4"]),
        ("optimizer", 2, &["parallel.mode=optimizer", "train.micro_batch_size=2"]),
    ];
    let same = |other: &Run, whole: &Run| {
        let (metrics, parameters) =
            (apart(other, whole, &GRPO), relative(&other.parameters(), &whole.parameters()));
        println!("{}: {metrics:.1e} {parameters:.1e}", other.dir.display());
        assert!(
            metrics.max(parameters) < allowed(Quantity::SameMetrics, Kind::Double),
            "{metrics:e} {parameters:e}"
        );
    };
    for (name, ranks, more) in cases {
        let other = run("grpo", name);
        other.train(ranks, &[&words[..], more].concat());
        same(&other, &whole);
    }
    let (one, two) = (run("grpo", "several-1"), run("grpo", "several-2"));
    one.train(1, &[words[0], several]);
    two.train(2, &[words[0], several]);
    assert_eq!(one.numbers("train", "updates"), [4.0; 6]);
    same(&two, &one);
}

/// A reward that responses can get is got more often.
#[test]
fn rewards_rise() {
    for (subcommand, section) in [("grpo", "grpo={group_size: 8}"), ("online-dpo", "dpo={group_size: 4}")] {
        let run = run(subcommand, &format!("rise-{subcommand}"));
        run.train(1, &[section, "train={steps: 30, batch_size: 8}"]);
        let rewards = run.numbers("train", "reward");
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let (first, last) = (mean(&rewards[..5]), mean(&rewards[25..]));
        assert!(last > first + 0.1, "{subcommand}: {first} to {last}, {rewards:?}");
    }
}

#[test]
fn every_kind_of_advantage_and_loss_runs_and_counts() {
    let sections = [
        "{group_size: 4, advantages: batch, loss: bnpo, level: sequence}",
        "{group_size: 4, advantages: none, loss: dr_grpo, delta: 3, truncated: mask}",
        "{group_size: 4, advantages: rloo, loss: cispo, epochs: 2, truncated: penalize}",
        "{group_size: 1, advantages: reinforce++, loss: sapo, beta: 0.05}",
        "{group_size: 4, loss: luspo, level: sequence, resample: 2, measure_kl: false}",
    ];
    for (i, section) in sections.iter().enumerate() {
        let run = run("grpo", &format!("kind-{i}"));
        run.train(1, &[&format!("grpo={section}"), "train.steps=3"]);
        let lines: Vec<Value> = run.metrics().into_iter().filter(|l| l["kind"] == "train").collect();
        assert_eq!(lines.len(), 3);
        for line in &lines {
            for key in ["groups_without_variance", "resampled", "unscored", "truncated", "dropped"] {
                uint(line, key);
            }
            assert!(line["grad_norm"].as_f64().is_some() && line["update_s"].as_f64() > Some(0.0), "{line}");
            let kl = &line["kl"];
            assert!(kl.is_number() != section.contains("measure_kl: false"), "{section}: {kl}");
        }
    }
}

/// Where all responses are equally good nothing is learned: no step by the optimizer's momentum or weight decay.
#[test]
fn without_variance_there_is_no_update() {
    let flat = run("grpo", "flat");
    let words = ["rewards=[{kind: format, pattern: ''}]", "grpo.group_size=3", "train.steps=2"];
    flat.train(1, &[&words[..], &["optim.weight_decay=0.1"]].concat());
    assert_eq!(flat.numbers("train", "updates"), [0.0; 2]);
    assert_eq!(flat.numbers("train", "groups_without_variance"), [4.0; 2]);
    let begin = tensors(&answers().join("model.safetensors"));
    for (name, tensor) in tensors(&flat.output().join("model/model.safetensors")) {
        assert!(tensor.equal(&begin[&name]), "{name}");
    }
    // With a KL in the loss there is something.
    let kl = run("grpo", "flat-kl");
    kl.train(1, &[&words[..], &["grpo.beta=0.1"]].concat());
    assert_eq!(kl.numbers("train", "updates"), [1.0; 2]);
}

/// A response that cannot be scored has no part in the loss: neither in what it is divided by nor in the KL.
#[test]
fn what_cannot_be_scored_is_left_out_of_the_loss() {
    let trained = |name: &str, other: &str, more: &[&str]| {
        let run = run("grpo", name);
        let prompts = run.dir.join("prompts.jsonl");
        fs::write(&prompts, "{\"prompt\": \"1 + 1?\"}\n{\"prompt\": \"1 + 2?\"}\n").unwrap();
        let source = format!("data.train=[{}]", prompts.display());
        let judge = format!(
            "rewards=[{{kind: command, run: 'while read -r l; do case \"$l\" in *\"1 + 2\"*) echo {other};; \
             *) echo ${{#l}};; esac; done'}}]"
        );
        run.train(
            1,
            &[&[source.as_str(), &judge, "train.steps=1", "precision.compute=float64"], more].concat(),
        );
        run
    };
    // Equal rewards have no gradient either, but are answers of the batch: half of them.
    let [unscored, equal] =
        [("unscored-half", "null"), ("equal-half", "1")].map(|(name, other)| trained(name, other, &[]));
    assert_eq!(unscored.numbers("train", "unscored"), [16.0]);
    let norm = |run: &Run| run.numbers("train", "grad_norm")[0];
    assert!(norm(&equal) > 0.0);
    assert!(
        relative_number(norm(&unscored), 2.0 * norm(&equal)) < allowed(Quantity::SameMetrics, Kind::Double),
        "{} {}",
        norm(&unscored),
        norm(&equal)
    );
    let none = trained(
        "unscored-all",
        "null",
        &["rewards=[{kind: command, run: 'while read l; do echo null; done'}]", "grpo.beta=0.1"],
    );
    assert_eq!(none.numbers("train", "updates"), [0.0]);
}

/// A gold answer that cannot be read is neither rewarded nor punished; what was read of responses is told.
#[test]
fn what_cannot_be_scored_is_counted_and_samples_tell_what_was_read() {
    let run = run("grpo", "unscored");
    let prompts = run.dir.join("prompts.jsonl");
    let lines =
        "{\"prompt\": \"1 + 1?\", \"answer\": \"#### many\"}\n{\"prompt\": \"1 + 2?\", \"answer\": \"3\"}\n";
    fs::write(&prompts, lines).unwrap();
    let source = format!("data.train=[{}]", prompts.display());
    run.train(1, &[&source, "rewards=[]", "grpo={rewards: [gsm8k], group_size: 4}", "train.steps=2"]);
    let lines: Vec<Value> = run.metrics().into_iter().filter(|l| l["kind"] == "train").collect();
    assert!(lines.iter().all(|l| uint(l, "unscored") == 8), "{lines:?}");
    for line in &lines {
        assert!(
            line["sampler_distance_max"]
                .as_f64()
                .is_some_and(|d| 0.0 < d && d < allowed(Quantity::Sampler, Kind::Float)),
            "{line}"
        );
    }
    let samples = fs::read_to_string(run.output().join("samples.jsonl")).unwrap();
    let samples: Vec<Value> = samples.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(samples.len(), 3);
    for sample in samples {
        let part = &sample["rewards"]["gsm8k"];
        assert!(
            sample["prompt"].is_string() && sample["response"].is_string() && part.is_object(),
            "{sample}"
        );
        assert_eq!(part["reward"].is_null(), part["gold"].is_null(), "{sample}");
    }
}

/// Of prompts that are asked in the place of others the rewards do not hide what the policy gets where it is due.
#[test]
fn rewards_are_of_the_prompts_that_were_due() {
    let run = run("grpo", "resampled");
    run.train(1, &["grpo={group_size: 4, resample: 3}", "rewards=[{kind: format, pattern: '[37]'}]"]);
    let of = |key: &str| run.numbers("train", key);
    let (mut replaced, mut apart) = (0, 0);
    for ((reward, kept), resampled) in of("reward").into_iter().zip(of("reward_kept")).zip(of("resampled")) {
        assert!(resampled > 0.0 || reward == kept, "{reward} {kept}");
        replaced += i32::from(resampled > 0.0);
        apart += i32::from(reward != kept);
    }
    assert!(replaced > 0 && apart > 0, "{replaced} {apart}");
}

#[test]
fn examples_stand_before_every_prompt() {
    let run = run("grpo", "few-shot");
    let shots = run.dir.join("shots.jsonl");
    fs::write(&shots, "{\"prompt\": \"1 + 1?\", \"completion\": \"2\"}\n").unwrap();
    let few = format!("data.few_shot={{path: {}, count: 1}}", shots.display());
    let words = ["tokenizer={chat_template: human-assistant}", "train.steps=1", few.as_str()];
    run.train(1, &words);
    let samples = fs::read_to_string(run.output().join("samples.jsonl")).unwrap();
    assert_eq!(samples.lines().count(), 3);
    for sample in samples.lines() {
        let sample: Value = serde_json::from_str(sample).unwrap();
        let prompt = sample["prompt"].as_str().unwrap();
        let rest = prompt.split_once("\n\nHuman: 1 + 1?\n\nAssistant: 2</s>\n\nHuman: ").expect(prompt).1;
        assert!(rest.ends_with("\n\nAssistant:") && rest.matches("Human").count() == 0, "{prompt}");
    }
}

#[test]
fn killed_runs_resume_bit_by_bit() {
    let moving = "dpo={group_size: 3, moving_reference: {every: 2, rate: 0.5}}";
    for (subcommand, section) in
        [("grpo", "grpo={group_size: 4, epochs: 2, resample: 1}"), ("online-dpo", moving)]
    {
        let words = [section, EASY, "train.steps=12", "checkpoint.every=2"];
        let whole = run(subcommand, &format!("resume-whole-{subcommand}"));
        whole.train(1, &words);
        let killed = run(subcommand, &format!("resume-killed-{subcommand}"));
        killed.stop_at(7, Signal::SIGKILL, &words);
        killed.train(1, &words);
        killed.expect_equal(&whole);
        assert_eq!(killed.numbers("train", "reward"), whole.numbers("train", "reward"));
        let samples = |run: &Run| fs::read_to_string(run.output().join("samples.jsonl")).unwrap();
        assert_eq!(samples(&killed), samples(&whole));
    }
}

#[test]
fn online_dpo_drops_ties_and_ranks_change_nothing() {
    let words = ["precision.compute=float64", EASY, "dpo={group_size: 3}"];
    let keys = ["loss", "reward", "rewards_chosen", "rewards_rejected", "accuracy", "margin", "ties"];
    let whole = run("online-dpo", "online-whole");
    whole.train(1, &words);
    let ties = whole.numbers("train", "ties");
    let pairs = whole.numbers("train", "pairs");
    assert!(ties.iter().zip(&pairs).all(|(t, p)| t + p == 4.0), "{ties:?} {pairs:?}");
    assert!(whole.numbers("train", "margin")[0].abs() < allowed(Quantity::TwoWays, Kind::Double));
    let cases: [(&str, usize, &[&str]); 3] = [
        ("online-micro", 1, &["train.micro_batch_size=1"]),
        ("online-two", 2, &[]),
        ("online-tensor", 2, &["parallel.tensor=2"]),
    ];
    for (name, ranks, more) in cases {
        let other = run("online-dpo", name);
        other.train(ranks, &[&words[..], more].concat());
        let (metrics, parameters) =
            (apart(&other, &whole, &keys), relative(&other.parameters(), &whole.parameters()));
        assert!(
            metrics.max(parameters) < allowed(Quantity::SameMetrics, Kind::Double),
            "{name}: {metrics:e} {parameters:e}"
        );
    }
    // A reference that moves is the moved one also where ranks keep its values whole.
    let moving = [words[0], EASY, "dpo={group_size: 3, moving_reference: {every: 1, rate: 0.5}}"];
    let (one, two) = (run("online-dpo", "online-moving-1"), run("online-dpo", "online-moving-2"));
    one.train(1, &moving);
    two.train(2, &[&moving[..], &["parallel.mode=grads"]].concat());
    let (metrics, parameters) = (apart(&two, &one, &keys), relative(&two.parameters(), &one.parameters()));
    assert!(
        metrics.max(parameters) < allowed(Quantity::SameMetrics, Kind::Double),
        "{metrics:e} {parameters:e}"
    );
    // Responses without a reward are no ties.
    let unscored = run("online-dpo", "online-unscored");
    let prompts = unscored.dir.join("prompts.jsonl");
    let lines =
        "{\"prompt\": \"1 + 1?\", \"answer\": \"#### many\"}\n{\"prompt\": \"1 + 2?\", \"answer\": \"3\"}\n";
    fs::write(&prompts, lines).unwrap();
    let source = format!("data.train=[{}]", prompts.display());
    unscored.train(1, &[&source, "rewards=[{kind: gsm8k}]", "train.steps=2"]);
    let (ties, pairs) = (unscored.numbers("train", "ties"), unscored.numbers("train", "pairs"));
    assert_eq!(unscored.numbers("train", "unpaired"), [2.0; 2]);
    assert!(ties.iter().zip(&pairs).all(|(t, p)| t + p == 2.0), "{ties:?} {pairs:?}");
    // Nothing is learnt where all responses are equally good.
    let flat = run("online-dpo", "online-flat");
    flat.train(1, &["rewards=[{kind: format, pattern: ''}]", "train.steps=2"]);
    assert_eq!(flat.numbers("train", "ties"), [4.0; 2]);
    assert_eq!(flat.numbers("train", "grad_norm"), [0.0; 2]);
}

#[test]
fn what_cannot_be_is_refused() {
    let cases: [(&'static str, &[&str], &str); 17] = [
        ("grpo", &["rewards=[]"], "nothing to learn from"),
        ("grpo", &["grpo.group_size=1"], "must be at least 2"),
        ("grpo", &["grpo.minibatch_size=5"], "not a multiple of 5"),
        ("grpo", &["train.micro_batch_size=5"], "train.micro_batch_size"),
        ("grpo", &["grpo.loss=sapo", "grpo.delta=4"], "no delta"),
        ("grpo", &["grpo.sapo_temperature_neg=2"], "a key of `loss: sapo`"),
        ("grpo", &["grpo.delta=1.1"], "above 1 + epsilon"),
        ("grpo", &["grpo.delta=1.25", "grpo.epsilon_high=0.28"], "above 1 + epsilon_high"),
        ("grpo", &["grpo.kl_estimator=k1", "grpo.beta=0.1"], "the gradient of k1 is 0"),
        ("grpo", &["grpo={group_size: 1, advantages: reinforce++, resample: 1}"], "no variance"),
        ("grpo", &["rewards=[{kind: model}]"], "needs reward_model"),
        ("grpo", &["grpo.advantages=reinforce++", "grpo.kl_estimator=k3"], "the sum of k1"),
        ("grpo", &["actor.lora={rank: 4, alpha: 8, dropout: 0.1}"], "actor.lora.dropout"),
        ("online-dpo", &["actor.lora={rank: 4, alpha: 8, dropout: 0.1}"], "actor.lora.dropout"),
        (
            "ppo",
            &["train.batch_size=8", "critic={path: x, lora: {rank: 4, alpha: 8, dropout: 0.1}}"],
            "critic.lora.dropout",
        ),
        ("online-dpo", &["dpo.group_size=1"], "2 responses"),
        ("online-dpo", &["data.sequence_length=12"], "leave no room"),
    ];
    for (subcommand, words, part) in cases {
        let run = run(subcommand, "refused");
        run.expect_refused(words, 2, part);
    }
}
