//! PPO through the real binaries.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use nix::sys::signal::Signal;
use std::fs;
use std::path::Path;
use std::time::Duration;
use testing::compare::{largest_relative, largest_relative_at, relative};
use testing::folder::folder;
use testing::golden::{json, tensors};
use testing::program::Program;
use testing::run::{Run, answers, data, json_lines, parameters};
use testing::tolerance::{Quantity, allowed};

use corral::data::chat::Chat;
use corral::data::conversation::Message;
use corral::data::tokenizer::Tokenizer;
use serde_json::Value;
use tch::{Kind, Tensor};

/// 4 iterations from a model of [`answers`], rewarded for numbers.
fn ppo(name: &str) -> Run {
    let (data, model) = (data().display(), answers().display());
    let keys = format!(
        "actor: {{path: {model}, optim: {{lr: 3.0e-3}}}}
critic: {{path: {model}, optim: {{lr: 1.0e-2}}}}
data: {{train: [{data}/prompts.train.jsonl], sequence_length: 128}}
rewards: [{{kind: format, pattern: '[0-9]'}}, {{kind: length, most: 12, buffer: 8, weight: 0.5}}]
generation: {{max_new_tokens: [8, 12]}}
ppo: {{epochs: 2, minibatch_size: 8, kl_coef: 0.1, kl_target: 1.0, kl_horizon: 100}}
train: {{steps: 4, batch_size: 16}}
samples: {{every: 2, count: 2, trace: true}}
checkpoint: {{every: 1}}
"
    );
    Run::of("ppo", name, &keys)
}

#[test]
fn it_learns_what_is_rewarded_and_tells_about_it() {
    let run = ppo("learns");
    run.train(1, &["train.steps=12", "ppo.kl_target=20"]);
    let reward = run.numbers("train", "reward");
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&reward[9..]) > mean(&reward[..2]) + 0.1, "{reward:?}");
    let kl = run.numbers("train", "kl");
    assert_eq!(kl[0], 0.0, "actor and reference begin alike");
    assert!(kl[11] > 0.0 && kl.iter().all(|x| x.is_finite()), "{kl:?}");
    assert!(
        run.numbers("train", "sampler_distance_max")
            .iter()
            .all(|d| *d < allowed(Quantity::Sampler, Kind::Float))
    );
    for line in run.metrics() {
        for key in [
            "policy_loss",
            "value_loss",
            "clip_fraction",
            "approx_kl",
            "ratio_mean",
            "explained_variance",
            "response_tokens",
            "eos_fraction",
            "rollout_s",
            "update_s",
            "generated_tokens_per_s",
            "unscored",
            "dropped",
            "peak_bytes",
        ] {
            assert!(line[key].is_number(), "{key} of {line}");
        }
    }
    let samples = json_lines(&run.output().join("samples.jsonl"));
    assert_eq!(samples.len(), 12);
    let sample = &samples[0];
    assert!(
        sample["prompt"].as_str().unwrap().contains('?') && sample["rewards"]["format"]["reward"].is_number()
    );
    let trace = json_lines(&run.output().join("trace.jsonl"));
    let first: Vec<&Value> = trace.iter().filter(|t| t["step"] == 1 && t["sample"] == 0).collect();
    assert_eq!(first.len() as u64, sample["num_tokens"].as_u64().unwrap());
    // The rewards of tokens are the KL penalty (none yet) and the score at the end.
    let number = |t: &Value, key: &str| t[key].as_f64().unwrap();
    assert!(first[..first.len() - 1].iter().all(|t| number(t, "reward") == 0.0));
    assert!(
        (number(first[first.len() - 1], "reward") - number(sample, "reward")).abs()
            < allowed(Quantity::Printed, Kind::Float)
    );
    assert!(first.iter().any(|t| number(t, "logprob_new") != number(t, "logprob_old")));
    assert!(run.output().join("critic/model.safetensors").is_file());
    let path = run.output().join("trace.jsonl");
    let told = Program::corral(&["inspect", "--json"]).arg(&path).run(&run.dir, "inspect").expect_code(0);
    let told: Value = serde_json::from_str(&told.out).unwrap();
    assert_eq!(told["num_tokens"].as_u64().unwrap() as usize, trace.len());
    let last = trace.iter().filter(|t| t["step"] == 11).count();
    assert_eq!(told["tokens"].as_array().unwrap().len(), last);
}

#[test]
fn a_killed_run_resumes_bit_by_bit() {
    let words = ["ppo.ema=0.9", "train.steps=8", "ppo.value_warmup=1"];
    let whole = ppo("resume-whole");
    whole.train(1, &words);
    let run = ppo("resume-killed");
    for step in [2, 5] {
        run.stop_at(step, Signal::SIGKILL, &words);
    }
    run.train(1, &words);
    run.expect_equal(&whole);
    for file in ["critic/model.safetensors", "ema/model.safetensors", "samples.jsonl", "trace.jsonl"] {
        let read = |run: &Run| fs::read(run.output().join(file)).unwrap();
        assert!(read(&run) == read(&whole), "{file} differs");
    }
    assert!(parameters(&run.output().join("ema")) != parameters(&run.output().join("model")));
}

/// The same prompts, responses, advantages and updates, however they are divided.
#[test]
fn ranks_and_micro_batches_change_nothing_in_float64() {
    let base =
        ["precision.compute=float64", "ppo.entropy_coef=0.01", "ppo.whiten_rewards=true", "ppo.ema=0.9"];
    let reference = ppo("division-reference");
    reference.train(1, &base);
    let expected = ["model", "critic", "ema"].map(|part| parameters(&reference.output().join(part)));
    for (ranks, words) in [
        (1, &["train.micro_batch_size=2"][..]),
        (2, &["generation.gather=whole"]),
        (2, &["generation.gather=blocks", "train.micro_batch_size=2", "generation.batch_size=3"]),
        (2, &["parallel.mode=replicate"]),
        (2, &["parallel.mode=grads", "train.micro_batch_size=2"]),
        (4, &["parallel.mode=hybrid", "parallel.shard=2"]),
        (2, &["parallel.tensor=2", "train.micro_batch_size=2"]),
        (4, &["parallel.tensor=2", "generation.gather=blocks"]),
        // Models that ranks divide otherwise than the actor.
        (2, &["parallel.tensor=2", "critic.tensor=1"]),
        (4, &["critic.tensor=2", "train.micro_batch_size=2"]),
    ] {
        let run = ppo(&format!("division-{ranks}-{}", words.join("-")));
        run.train(ranks, &[&base[..], words].concat());
        for key in ["reward", "kl", "policy_loss", "value_loss", "response_tokens", "tokens"] {
            let (a, b) = (run.numbers("train", key), reference.numbers("train", key));
            let close = largest_relative_at(&a, &b, 1.0) <= allowed(Quantity::SameMetrics, Kind::Double);
            assert!(close, "{key} with {ranks} ranks, {words:?}: {a:?} {b:?}");
        }
        for (part, expected) in ["model", "critic", "ema"].iter().zip(&expected) {
            let distance = relative(&parameters(&run.output().join(part)), expected);
            assert!(
                distance < allowed(Quantity::SameMetrics, Kind::Double),
                "{part} with {ranks} ranks, {words:?}: {distance:e}"
            );
        }
        let samples = |run: &Run| fs::read(run.output().join("samples.jsonl")).unwrap();
        assert!(samples(&run) == samples(&reference), "{ranks} ranks, {words:?}: other samples");
    }
}

/// A critic whose matrices other ranks share than the actor's: so it lies in checkpoints, and a run goes on bit by bit.
#[test]
fn a_critic_has_ranks_of_its_own() {
    let words = ["parallel.tensor=2", "critic.tensor=1", "train.steps=8", "checkpoint.every=4"];
    let whole = ppo("critic-ranks-whole");
    whole.train(2, &words);
    let run = ppo("critic-ranks");
    let mut running = run.start(2, &words);
    running.wait_for("some steps", Duration::from_millis(2), || run.step() >= 2);
    running.signal(Signal::SIGTERM);
    running.wait().expect_code(143);
    assert!(run.step() < 8, "it came too late");
    run.train(2, &words);
    run.expect_equal(&whole);
    let last = whole.output().join("checkpoints/step-00000008");
    for (part, ranks) in [("", 2), ("critic", 1)] {
        let meta: Value =
            serde_json::from_str(&fs::read_to_string(last.join(part).join("meta.json")).unwrap()).unwrap();
        assert_eq!(meta["checkpoint"]["tensor"].as_i64().unwrap_or(1), ranks, "{part}");
    }
    for (word, why) in [
        ("critic.tensor=3", "critic.tensor': 3 must divide the number of ranks, 2"),
        ("critic={tensor: 2, optim: {moments: 8bit}}", "8-bit moments are not built"),
    ] {
        let refused = run.program(2, &[word, "--resume", "never"]).run(&run.dir, "refused").expect_code(2);
        assert!(refused.err.contains(why), "{refused}");
    }
}

#[test]
fn adapters_have_their_base_as_the_reference() {
    let run = ppo("lora");
    run.train(1, &["actor.lora={rank: 4, alpha: 8}", "actor.optim.lr=1e-2"]);
    let kl = run.numbers("train", "kl");
    assert!(kl[0] == 0.0 && kl[3] != 0.0, "{kl:?}");
    assert!(run.output().join("model/adapter_model.safetensors").is_file());
    // The same reference as a model of its own.
    let other = ppo("lora-reference");
    let reference = format!("reference.path={}", answers().display());
    other.train(1, &["actor.lora={rank: 4, alpha: 8}", "actor.optim.lr=1e-2", &reference]);
    assert!(
        largest_relative(&other.numbers("train", "reward"), &run.numbers("train", "reward"))
            < allowed(Quantity::Printed, Kind::Float)
    );
}

/// Whether actor and reference begin alike is known by what they are, not by how they are written.
#[test]
fn a_reference_is_recognized_as_the_model_that_the_actor_began_as() {
    let parent =
        answers().parent().unwrap().join("..").join(answers().parent().unwrap().file_name().unwrap());
    let spelt = format!("reference.path={}", parent.join(answers().file_name().unwrap()).display());
    // The weights of nf4 are others than those of its file.
    for (name, adapters, checks) in
        [("spelt", "actor.lora=null", 1), ("nf4", "actor.lora={rank: 4, alpha: 8, base: nf4}", 0)]
    {
        let run = ppo(&format!("begins-{name}"));
        let ended = run.train(1, &[&spelt, adapters, "train.steps=1"]);
        assert_eq!(ended.err.matches("self-check: actor and reference").count(), checks, "{ended}");
    }
}

/// The weight of the KL follows its target from the actor's first update on.
#[test]
fn the_kl_weight_waits_for_the_actor() {
    let run = ppo("kl-weight");
    run.train(1, &["ppo.value_warmup=2"]);
    let coef = run.numbers("train", "kl_coef");
    assert!(coef[0] == 0.1 && coef[1] == 0.1 && coef[2] == 0.1 && coef[3] != 0.1, "{coef:?}");
}

/// A section without a path: the actor's trunk with an optimizer of its own, as if the path were given.
#[test]
fn the_weight_of_the_value_loss_scales_its_gradient() {
    let first_step = |coef: &str| {
        let run = ppo(&format!("value-coef-{coef}"));
        let coef = format!("ppo.value_coef={coef}");
        run.train(1, &[&coef, "ppo.epochs=1", "ppo.minibatch_size=16", "train.steps=1"]);
        [run.numbers("train", "value_loss")[0], run.numbers("train", "critic_grad_norm")[0]]
    };
    let ([loss, norm], [same_loss, half_norm]) = (first_step("1.0"), first_step("0.5"));
    let close = |a: f64, b: f64| {
        relative(&Tensor::from(a), &Tensor::from(b)) < allowed(Quantity::Reduction, Kind::Float)
    };
    assert!(loss > 0.0 && close(loss, same_loss), "{loss} {same_loss}");
    assert!(close(norm, 2.0 * half_norm), "{norm} {half_norm}");
}

#[test]
fn a_critic_needs_no_path() {
    let base = ppo("critic-path");
    let text = fs::read_to_string(base.dir.join("config.yaml")).unwrap();
    let path = format!("path: {}, optim: {{lr: 1.0e-2}}", answers().display());
    assert!(text.contains(&format!("critic: {{{path}}}")));
    let bare = ppo("critic-bare");
    let text = text.replace(&format!("critic: {{{path}}}"), "critic: {optim: {lr: 1.0e-2}}");
    fs::write(bare.dir.join("config.yaml"), text.replace("critic-path", "critic-bare")).unwrap();
    for run in [&base, &bare] {
        run.train(1, &["train.steps=1"]);
    }
    let of = |run: &Run| parameters(&run.output().join("critic"));
    assert!(relative(&of(&bare), &of(&base)) == 0.0);
}

#[test]
fn a_warm_up_trains_the_critic_alone() {
    let run = ppo("warm-up");
    run.train(1, &["ppo.value_warmup=4"]);
    let (start, model) = (parameters(answers()), parameters(&run.output().join("model")));
    assert!(relative(&model, &start) == 0.0, "the actor is as it was");
    let loss = run.numbers("train", "value_loss");
    assert!(loss[3] < loss[0], "{loss:?}");
    assert!(run.numbers("train", "ratio_mean").iter().all(|r| *r == 1.0));
}

/// Ratios are checked at the actor's first update, whenever that is.
#[test]
fn ratios_are_checked_after_a_warm_up() {
    for (i, warmup) in ["ppo.value_warmup=0", "ppo.value_warmup=2", "ppo.value_warmup=4"].iter().enumerate() {
        let run = ppo(&format!("warm-up-check-{i}"));
        let ended = run.train(1, &[warmup]);
        let checks = ended.err.matches("self-check: ratios are 1").count();
        assert_eq!(checks, usize::from(i < 2), "{warmup}: {ended}");
    }
}

#[test]
fn options_do_what_they_say() {
    let last = |name: &str, words: &[&str], key: &str| {
        let run = ppo(name);
        run.train(1, words);
        (run.numbers("train", key), parameters(&run.output().join("model")))
    };
    let plain = last("plain", &[], "reward");
    // Each changes the result.
    for (i, words) in [
        &["ppo.kl_in=loss", "ppo.kl_target=null", "ppo.kl_estimator=k3+"][..],
        &["ppo.kl_in=loss", "ppo.kl_target=null"],
        &["ppo.whiten_advantages=false"],
        &["ppo.aggregation=seq-mean-token-sum-norm"],
        &["ppo.reward_baseline=batch"],
        &["ppo.reward_clip=0.1"],
        &["ppo.missing_eos=replace", "ppo.missing_eos_penalty=3"],
        &["ppo.missing_eos=mask"],
        &["generation.temperature=0.7"],
        &["generation.truncate_token='1'", "generation.truncate_after=2"],
        &["ppo.clip=0.001", "ppo.clip_high=0.01"],
    ]
    .iter()
    .enumerate()
    {
        let (reward, model) = last(&format!("option-{i}"), words, "reward");
        assert!(reward.iter().all(|r| r.is_finite()));
        assert!(relative(&model, &plain.1) > 0.0, "{words:?} changes nothing");
    }
    let (stopped, _) = last("stop-kl", &["ppo.stop_kl=1e-9"], "stopped_early");
    assert_eq!(stopped, [1.0; 4]);
    let ptx =
        format!("ppo.ptx={{data: [{}/tokens/train], coef: 1.0, sequence_length: 32}}", data().display());
    let (losses, _) = last("ptx", &[&ptx, "train.micro_batch_size=4"], "ptx_loss");
    assert!(losses[3] < losses[0], "{losses:?}");
}

#[test]
fn what_fails_is_told() {
    let run = ppo("failing");
    let fails = |words: &[&str], code: i32, parts: &[&str]| {
        run.start(1, words).wait().expect_error(code, parts);
    };
    fails(&["rewards=[]"], 2, &["there is nothing to learn from"]);
    fails(&["ppo.minibatch_size=6"], 2, &["'ppo.minibatch_size'", "16 prompts, is not a multiple of 6"]);
    fails(&["generation.max_new_tokens=[9, 3]"], 2, &["9 to 3"]);
    fails(&["rewards=[{kind: length, pattern: x}]"], 2, &["'rewards.0.pattern': is of the kind format"]);
    fails(&["ppo.klcoef=1"], 2, &["klcoef"]);
    let k1 = ["ppo.kl_in=loss", "ppo.kl_target=null", "ppo.kl_estimator=k1"];
    fails(&k1, 2, &["'ppo.kl_estimator'", "the gradient of k1 is 0"]);
    let reward_model = format!("reward_model.path={}", answers().display());
    fails(&[&reward_model, "rewards=[{kind: model}]"], 3, &["no scalar head"]);
    fails(&["rewards=[{kind: command, run: 'read line; exit 7'}]"], 1, &["exit status: 7"]);
    fails(&["data.sequence_length=14"], 3, &["no prompt is left"]);
    // An answer that cannot be compared is left out and counted; where all are, nothing is learned.
    let none = ppo("unscored");
    none.train(
        1,
        &[
            "rewards=[{kind: command, run: 'while read l; do echo null; done'}]",
            "train.steps=2",
            "actor.optim.weight_decay=0.0",
        ],
    );
    assert_eq!(none.numbers("train", "unscored"), [16.0, 16.0]);
    let (start, model) = (parameters(answers()), parameters(&none.output().join("model")));
    assert!(relative(&model, &start) < allowed(Quantity::TwoWays, Kind::Double), "nothing was learned");
}

/// `corral score` of lines: what it writes of each.
fn scored(model: &Path, dir: &Path, input: &[Value]) -> Vec<Value> {
    let at = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let text: String = input.iter().map(|line| format!("{line}\n")).collect();
    fs::write(at("in.jsonl"), text).unwrap();
    let (model, input, output) = (model.to_string_lossy(), at("in.jsonl"), at("out.jsonl"));
    let words = ["score", "--model", &*model, "--input", &input, "--output", &output];
    Program::corral(&words).run(dir, "score").expect_code(0);
    json_lines(Path::new(&output))
}

/// A reward model of another tokenizer and template than the actor's is given the text of what was said, and scores it as
/// `corral score` does; of a response that was cut, without what the template writes after an answer.
#[test]
fn a_reward_model_of_another_tokenizer_scores_the_text() {
    let (data, bpe) = (data().display(), folder("other-bpe"));
    let (text, tokenizer) = (format!("{data}/pretrain.train.jsonl"), bpe.to_string_lossy().into_owned());
    let words = ["tokenizer", "train", "--input", &text, "--vocab-size", "340", "--output", &tokenizer];
    Program::corral(&words).run(&bpe, "bpe").expect_code(0);
    let chatml = "chat_template: chatml, add_tokens: ['<|im_start|>', '<|im_end|>']";
    let plain = "template: \"Q: {prompt}\\nA: {completion}\\nThat is all.\"";
    for (score, template) in [("last", chatml), ("sum", plain)] {
        let keys = format!(
            "model: {{init: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}}}}
tokenizer: {{path: {tokenizer}, {template}}}
data: {{train: [{data}/rankings.train.jsonl], sequence_length: 128, cache: {data}/cache-{score}}}
reward: {{score: {score}, normalize: {{samples: 10}}}}
optim: {{lr: 1.0e-2}}
train: {{steps: 4, batch_size: 4}}
"
        );
        let trained = Run::of("reward", &format!("other-reward-{score}"), &keys);
        trained.train(1, &[]);
        let reward_model = trained.output().join("model");

        let run = ppo(&format!("other-{score}"));
        let path = format!("reward_model.path={}", reward_model.display());
        run.train(1, &[&path, "rewards=[]", "train.steps=2", "samples.every=1", "samples.count=16"]);
        let samples = json_lines(&run.output().join("samples.jsonl"));
        assert_eq!(samples.len(), 32);
        let (cut, ended): (Vec<_>, Vec<_>) = samples.iter().partition(|s| s["finish_reason"] == "length");
        assert!(cut.len() > 2 && ended.len() > 2, "{} were cut, {} ended", cut.len(), ended.len());
        let text = |sample: &Value, key: &str| sample[key].as_str().unwrap().to_string();
        // As the actor's template writes it.
        let prompt = |sample: &Value| {
            let rendered = text(sample, "prompt");
            rendered.strip_prefix("<s>").unwrap().strip_suffix('\n').unwrap().to_string()
        };
        let equal = |sample: &Value, expected: f64| {
            let reward = sample["rewards"]["model"]["reward"].as_f64().unwrap();
            assert!(
                (reward - expected).abs() < allowed(Quantity::SameRewards, Kind::Float),
                "{score}: {expected} expected of {sample}"
            );
        };

        let line = |s: &&Value| serde_json::json!({"prompt": prompt(s), "completion": text(s, "response")});
        let told = scored(&reward_model, &run.dir, &ended.iter().map(line).collect::<Vec<_>>());
        ended.iter().zip(&told).for_each(|(sample, told)| equal(sample, told["reward"].as_f64().unwrap()));

        // A model of the same values that tells the last one, of every beginning of what was said.
        let last = run.dir.join("last");
        fs::create_dir(&last).unwrap();
        for entry in fs::read_dir(&reward_model).unwrap().flatten() {
            fs::copy(entry.path(), last.join(entry.file_name())).unwrap();
        }
        let mut ours = json(&last.join("corral.json"));
        let number = |key: &str| ours["reward"][key].as_f64().unwrap();
        let (gain, bias) = (number("gain"), number("bias"));
        ours["reward"]["score"] = "last".into();
        fs::write(last.join("corral.json"), ours.to_string()).unwrap();
        let theirs = Tokenizer::load(&reward_model).unwrap();
        let chat = Chat::new(&theirs).unwrap();
        let (mut beginnings, mut first) = (Vec::new(), vec![0]);
        for sample in &cut {
            let asked = chat.prompt(&[Message::new("user", prompt(sample))]).unwrap();
            let said = theirs.encode(&text(sample, "response"), false).unwrap();
            let beginning = |n: usize| serde_json::json!({"input_ids": ([&asked[..], &said[..n]].concat())});
            beginnings.extend((1..=said.len()).map(beginning));
            first.push(beginnings.len());
        }
        let told = scored(&last, &run.dir, &beginnings);
        let values: Vec<f64> = told.iter().map(|line| line["score"].as_f64().unwrap()).collect();
        for (sample, range) in cut.iter().zip(first.windows(2)) {
            let values = &values[range[0]..range[1]];
            let raw = if score == "sum" { values.iter().sum() } else { values[values.len() - 1] };
            equal(sample, gain * raw + bias);
        }
    }
}

/// The critic begins as a language model, so its head is 0: whatever else of it is trained, the head is, or no gradient
/// reaches anything.
#[test]
fn the_head_of_a_critic_is_always_trained() {
    for (name, words) in [
        ("whole", "critic.freeze={}"),
        ("lora", "critic.lora={rank: 4, alpha: 8, targets: [q_proj, v_proj]}"),
        ("nf4", "critic.lora={rank: 4, alpha: 8, base: nf4}"),
        ("blocks", "critic.freeze={blocks: 2, embeddings: true}"),
        ("train-only", "critic.freeze={train_only: [q_proj]}"),
    ] {
        let run = ppo(&format!("critic-{name}"));
        run.train(1, &["train.steps=12", words]);
        let of = |key: &str| run.numbers("train", key);
        let (norms, explained, loss) = (of("critic_grad_norm"), of("explained_variance"), of("value_loss"));
        assert!(norms.iter().all(|norm| *norm > 0.0), "{words}: {norms:?}");
        assert!(explained[0] == 0.0 && explained[1..].iter().all(|e| *e != 0.0), "{words}: {explained:?}");
        let last = loss[8..].iter().sum::<f64>() / 4.0;
        assert!(last < 0.5 * loss[0], "{words}: {loss:?}");
    }
}

/// The head lies with the adapter, as PEFT's sequence classification has it, and is there again.
#[test]
fn the_head_of_a_critic_is_saved_with_its_adapter() {
    let run = ppo("critic-saved");
    let words = ["critic.lora={rank: 4, alpha: 8}", "train.steps=3"];
    run.train(1, &words);
    let critic = run.output().join("critic");
    let config = json(&critic.join("adapter_config.json"));
    assert_eq!(
        (&config["task_type"], &config["modules_to_save"]),
        (&"SEQ_CLS".into(), &serde_json::json!(["score"]))
    );
    let saved = tensors(&critic.join("adapter_model.safetensors"));
    let head = &saved["base_model.model.score.weight"];
    assert!(head.abs().max().double_value(&[]) > 0.0, "{head:?}");
    // Scored as it is, and merged into its model.
    let lines = [serde_json::json!({"input_ids": [1, 5, 9, 14]}), serde_json::json!({"input_ids": [1, 7]})];
    let rewards = |model: &Path| -> Vec<f64> {
        scored(model, &run.dir, &lines).iter().map(|line| line["reward"].as_f64().unwrap()).collect()
    };
    let merged = run.dir.join("merged");
    let (from, to) = (critic.to_string_lossy().into_owned(), merged.to_string_lossy().into_owned());
    Program::corral(&["merge", "--adapter", &from, "--output", &to]).run(&run.dir, "merge").expect_code(0);
    let (adapted, whole) = (rewards(&critic), rewards(&merged));
    assert!(
        adapted[0] != adapted[1]
            && largest_relative(&adapted, &whole) < allowed(Quantity::SameRewards, Kind::Float),
        "{adapted:?} {whole:?}"
    );
    // Another run goes on with it, and a run that was stopped as if it had not been.
    let next = ppo("critic-next");
    next.train(1, &[&format!("critic.path={from}"), "critic.lora={rank: 4, alpha: 8}", "train.steps=1"]);
    assert!(next.numbers("train", "explained_variance")[0] != 0.0, "the head is there from the start");
    let stopped = ppo("critic-stopped");
    let stop = [&words[..1], &["train.steps=3"]].concat();
    stopped.stop_at(1, Signal::SIGKILL, &stop);
    stopped.train(1, &stop);
    assert!(
        tensors(&stopped.output().join("critic/adapter_model.safetensors"))
            .iter()
            .all(|(name, tensor)| tensor.equal(&saved[name]))
    );
}

/// A critic whose hidden states are 0 has no gradient: an error at the second step. Without anything to learn it is none,
/// and equal rewards are told once.
#[test]
fn a_critic_that_cannot_learn_ends_the_run() {
    let dead = folder("dead-critic");
    for entry in fs::read_dir(answers()).unwrap().flatten() {
        fs::copy(entry.path(), dead.join(entry.file_name())).unwrap();
    }
    let file = dead.join("model.safetensors");
    let zeroed: Vec<(String, Tensor)> = Tensor::read_safetensors(&file)
        .unwrap()
        .into_iter()
        .map(|(name, t)| if name == "model.norm.weight" { (name, t.zeros_like()) } else { (name, t) })
        .collect();
    Tensor::write_safetensors(&zeroed, &file).unwrap();
    let path = format!("critic.path={}", dead.display());
    let equal = "rewards=[{kind: format, pattern: 'never said'}]";
    let run = ppo("dead");
    let words = [&path, "critic.freeze={train_only: [q_proj]}"];
    let ended = run.start(1, &words).wait();
    ended.expect_error(1, &["critic: it has learned nothing in 2 steps", "gradient is 0"]);
    assert_eq!(run.step(), 1, "the second step is not logged");
    let run = ppo("nothing-to-learn");
    let ended = run.train(1, &[&path, equal, "ppo.kl_coef=0", "ppo.kl_target=null", words[1]]);
    assert!(run.numbers("train", "value_loss").iter().all(|loss| *loss == 0.0));
    assert!(run.numbers("train", "critic_grad_norm").iter().all(|norm| *norm == 0.0));
    assert_eq!(ended.err.matches("rewards are 0").count(), 1, "{ended}");
}
