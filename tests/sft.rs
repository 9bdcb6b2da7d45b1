//! Fine-tuning through the real binaries.

use nix::sys::signal::Signal;
use std::fs;
use tch::Kind;
use testing::compare::{largest_relative, relative};
use testing::folder::folder;
use testing::program::{Program, corral, launch};
use testing::run::{Run, data, uint};
use testing::tolerance::{Quantity, allowed};

/// Micro-batches, ranks and modes divide the same work: losses, gradient norms and updates are those of one batch.
fn same_updates(name: &str, words: &[&str], kind: Kind) {
    let reference = Run::sft(&format!("{name}-reference"));
    reference.train(1, words);
    let expected = (reference.numbers("train", "loss"), reference.parameters());
    assert!(expected.0[19] < 0.7 * expected.0[0], "the loss falls: {:?}", expected.0);
    for (ranks, mode, micro, tensor) in [
        (1, "full", 2, 1),
        (2, "full", 4, 1),
        (2, "full", 1, 1),
        (2, "replicate", 2, 1),
        (2, "full", 4, 2),
        (4, "full", 2, 2),
    ] {
        let run = Run::sft(&format!("{name}-{ranks}-{mode}-{micro}-{tensor}"));
        let divided = [
            format!("parallel.mode={mode}"),
            format!("train.micro_batch_size={micro}"),
            format!("parallel.tensor={tensor}"),
        ];
        let divided: Vec<&str> = divided.iter().map(String::as_str).chain(words.iter().copied()).collect();
        run.train(ranks, &divided);
        let loss = largest_relative(&run.numbers("train", "loss"), &expected.0);
        let update = relative(&run.parameters(), &expected.1);
        println!(
            "{name}: {ranks} ranks, {mode}, tensor {tensor}, micro-batch {micro}: loss {loss:.1e}, parameters {update:.1e}"
        );
        assert!(loss <= allowed(Quantity::SameLosses, kind), "{loss:e}");
        assert!(update <= allowed(Quantity::SameParameters, kind), "{update:e}");
        // Every rank counts the same tokens, padding left out.
        assert_eq!(run.numbers("train", "tokens"), reference.numbers("train", "tokens"));
    }
}

#[test]
fn micro_batches_and_ranks_change_nothing() {
    same_updates("float32", &["train.steps=20"], Kind::Float);
    // Unpacked rows differ in length, and in what they count.
    same_updates("unpacked", &["data.packing=false"], Kind::Float);
}

#[test]
fn micro_batches_and_ranks_change_nothing_in_float64() {
    same_updates("float64", &["precision.compute=float64", "data.packing=false"], Kind::Double);
}

/// The first step has seen no update: 4 micro-batches of 2 are one batch of 8.
#[test]
fn the_first_step_is_the_same_for_micro_batches() {
    let first = |name: &str, words: &[&str], ranks: usize| {
        let run = Run::sft(name);
        run.train(ranks, &[&["train.steps=4", "data.packing=false"], words].concat());
        [run.numbers("train", "loss")[0], run.numbers("train", "grad_norm")[0]]
    };
    let whole = first("first-whole", &[], 1);
    for (ranks, micro) in [(1, "train.micro_batch_size=2"), (2, "train.micro_batch_size=2")] {
        let parts = first(&format!("first-{ranks}"), &[micro], ranks);
        let difference = largest_relative(&parts, &whole);
        assert!(difference < allowed(Quantity::Reduction, Kind::Float), "{difference:e}");
    }
}

/// An epoch has every row once: its last step is smaller, also where a rank has none of it.
#[test]
fn the_last_step_of_an_epoch_has_the_rows_that_are_left() {
    let epoch = |name: &str, ranks: usize, words: &[&str]| {
        let run = Run::sft(name);
        let of_an_epoch = [
            "train.steps=null",
            "train.epochs=1",
            "train.batch_size=64",
            "data.packing=false",
            "schedule.warmup_steps=0",
        ];
        run.train(ranks, &[&of_an_epoch, words].concat());
        run
    };
    let dropped = epoch("epoch-dropped", 1, &["train.drop_last=true"]);
    let whole = epoch("epoch-whole", 1, &[]);
    assert_eq!(whole.step(), dropped.step() + 1, "the data must not fill the last step");
    assert_eq!(whole.numbers("train", "epoch").last(), Some(&1.0));
    assert!(*dropped.numbers("train", "epoch").last().unwrap() < 1.0);
    let per_step = whole.numbers("train", "tokens");
    assert!(per_step[per_step.len() - 1] - per_step[per_step.len() - 2] < per_step[0], "{per_step:?}");
    for (ranks, micro) in
        [(1, "train.micro_batch_size=16"), (2, "train.micro_batch_size=8"), (4, "train.micro_batch_size=16")]
    {
        let run = epoch(&format!("epoch-{ranks}"), ranks, &[micro]);
        let loss = largest_relative(&run.numbers("train", "loss"), &whole.numbers("train", "loss"));
        assert!(loss <= allowed(Quantity::SameLosses, Kind::Float), "{ranks} ranks: {loss:e}");
        assert_eq!(run.numbers("train", "tokens"), per_step);
    }
}

#[test]
fn a_killed_run_resumes_bit_by_bit() {
    let whole = Run::sft("resume-whole");
    whole.train(1, &["checkpoint.every=5"]);
    let run = Run::sft("resume-killed");
    run.stop_at(12, Signal::SIGKILL, &["checkpoint.every=5"]);
    run.train(1, &["checkpoint.every=5"]);
    run.expect_equal(&whole);
}

#[test]
fn the_best_checkpoint_stays_and_patience_ends_the_run() {
    let run = Run::sft("best");
    // A learning rate that ruins the model after the first validation.
    let words =
        ["optim.lr=3.0", "optim.clip=0", "schedule={kind: constant, warmup_steps: 4}", "train.steps=40"];
    let ends =
        ["valid={every: 2, batches: 2, keep_best: true, patience: 3}", "checkpoint={every: 2, keep: 1}"];
    let words = [&words[..], &ends].concat();
    let ended = run.train(1, &words);
    let losses = run.numbers("valid", "loss");
    let best =
        losses.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| 2 * (i as u64 + 1)).unwrap();
    assert_eq!(losses.len() as u64, best / 2 + 3, "{losses:?}");
    let kept: Vec<u64> = run.checkpoints().iter().map(|(step, _)| *step).collect();
    assert_eq!(kept, [best, run.step()]);
    assert!(ended.err.contains(&format!("best at step {best}")), "{ended}");
    let (lowest, at_end) = (losses[best as usize / 2 - 1], losses[losses.len() - 1]);
    let told = format!("best: step {best}, loss {lowest:.4} (exported); last: {at_end:.4}");
    assert!(ended.err.lines().any(|line| line == told), "{ended}");
    // What is exported is the best checkpoint.
    let out = run.dir.join("best").to_string_lossy().into_owned();
    let kept = run.checkpoints()[0].1.to_string_lossy().into_owned();
    let convert = ["convert", "--from", &kept, "--to", &out, "--format", "hf"];
    Program::corral(&convert).run(&run.dir, "convert").expect_code(0);
    let exported = run.model();
    assert!(fs::read(run.dir.join("best/model.safetensors")).unwrap() == exported);
    let inspected = Program::corral(&["inspect", "--json"]).arg(run.output()).run(&run.dir, "inspect");
    let report: serde_json::Value = serde_json::from_str(&inspected.expect_code(0).out).unwrap();
    assert_eq!(
        (uint(&report["best"], "step"), &report["best"]["exported"]),
        (best, &true.into()),
        "{report}"
    );
    let marked: Vec<bool> =
        report["checkpoints"].as_array().unwrap().iter().map(|line| line["best"] == true).collect();
    assert_eq!(marked, [true, false], "{report}");

    // The same command again finds it ended, and exports the same.
    let last = run.step();
    fs::remove_dir_all(run.output().join("model")).unwrap();
    let again = run.train(1, &words);
    assert_eq!(run.step(), last, "it went on after its end");
    assert!(again.err.lines().any(|line| line == told) && run.model() == exported, "{again}");

    // In another folder it goes on, with a best of its own.
    let next = Run::sft("best-next");
    let from = run.checkpoints()[1].1.to_string_lossy().into_owned();
    let ended = next.train(1, &[&words[..], &["--resume", &from]].concat());
    assert!(next.step() > last && ended.err.lines().all(|line| line != told), "{ended}");
    let forgotten =
        format!("the best validation so far (step {best}, loss {lowest:.4}) does not count from here on");
    assert!(ended.err.contains(&format!("{forgotten}: its checkpoint stays")), "{ended}");
    // Without the best checkpoint the last model is exported, with a warning.
    fs::remove_dir_all(&kept).unwrap();
    let ended = run.train(1, &words);
    assert!(ended.err.contains(&forgotten) && ended.err.contains("is not there"), "{ended}");
    assert!(run.model() != exported, "{ended}");
}

/// Without `keep_best` the last model is exported, and which was the best is told.
#[test]
fn the_last_model_is_exported_where_the_best_is_not_kept() {
    let run = Run::sft("last");
    let words =
        ["optim.lr=3.0", "optim.clip=0", "schedule={kind: constant, warmup_steps: 4}", "train.steps=8"];
    let ended = run.train(1, &[&words[..], &["valid={every: 2, batches: 2}"]].concat());
    let losses = run.numbers("valid", "loss");
    let best = losses.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i).unwrap();
    let (at, lowest, last) = (2 * (best + 1), losses[best], losses[losses.len() - 1]);
    let told = format!("best: step {at}, loss {lowest:.4}; last: {last:.4} (exported)");
    assert!(ended.err.lines().any(|line| line == told), "{ended}");
}

#[test]
fn what_is_cut_or_left_out_is_counted() {
    let run = Run::sft("counts");
    run.train(1, &["data.sequence_length=90", "train.steps=4"]);
    let line = run.metrics().into_iter().find(|l| l["kind"] == "train").unwrap();
    assert!(uint(&line, "truncated") > 0 && uint(&line, "truncated") < 150, "{line}");
    let run = Run::sft("dropped");
    run.train(1, &["data.sequence_length=90", "data.too_long=drop", "train.steps=4"]);
    let line = run.metrics().into_iter().find(|l| l["kind"] == "train").unwrap();
    assert!(uint(&line, "dropped") > 0 && uint(&line, "truncated") == 0, "{line}");
}

#[test]
fn bad_data_is_told_with_its_place() {
    let dir = folder("bad-data");
    let cases = [
        ("{\"question\": \"a\"}\n", "bad.jsonl:1: no known format"),
        (
            "{\"question\": \"a\", \"answer\": \"b\"}\n{\"messages\": []}\n",
            "bad.jsonl:2: `messages` is empty",
        ),
        ("{\"question\": \n", "bad.jsonl:1"),
    ];
    for (i, (text, wanted)) in cases.iter().enumerate() {
        let path = dir.join("bad.jsonl");
        fs::write(&path, text).unwrap();
        let run = Run::sft(&format!("bad-{i}"));
        let source = format!("data.train=[{}]", path.display());
        run.expect_refused(&[&source], 3, wanted);
    }
    let missing = Program::corral(&["sft", "--config"]).arg(dir.join("none.yaml")).run(&dir, "none");
    missing.expect_error(2, &["none.yaml"]);
    assert!(data().exists());
}

/// What was trained answers questions through the template that it was trained with, the same on two ranks.
#[test]
fn an_evaluation_counts_exact_answers() {
    let run = Run::sft("eval");
    run.train(1, &[]);
    let input = data().join("sft.valid.jsonl");
    let evaluate = |ranks: usize, name: &str| {
        let program = match ranks {
            1 => Program::new(corral()),
            _ => Program::new(launch()).args(&["--nproc", &ranks.to_string()]),
        };
        let output = run.dir.join(format!("{name}.json"));
        let words = [
            "eval",
            "--device",
            "cpu",
            "--task",
            "gsm8k",
            "--limit",
            "5",
            "--max-new-tokens",
            "20",
            "--by",
            "level",
        ];
        let program = program.args(&words).arg("--model").arg(run.output()).arg("--input").arg(&input);
        program.arg("--output").arg(&output).run(&run.dir, name).expect_code(0);
        let answers = fs::read_to_string(output.with_extension("answers.jsonl")).unwrap();
        (fs::read_to_string(output).unwrap(), answers)
    };
    let (result, answers) = evaluate(1, "one");
    let result_json: serde_json::Value = serde_json::from_str(&result).unwrap();
    assert_eq!(uint(&result_json, "scored"), 5, "{result}");
    let lines: Vec<serde_json::Value> = answers.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 5);
    let correct = lines.iter().filter(|l| l["parsed"] == l["gold"] && l["correct"] == true).count() as u64;
    assert_eq!(uint(&result_json, "correct"), correct);
    let by_level: u64 =
        result_json["by_level"].as_object().unwrap().values().map(|v| uint(v, "scored")).sum();
    assert_eq!(by_level, 5);
    assert_eq!(evaluate(2, "two"), (result, answers));

    let nothing = folder("eval-nothing").join("x.jsonl");
    fs::write(&nothing, "{\"question\": \"a\", \"answer\": \"#### many\"}\n").unwrap();
    let program = Program::corral(&["eval", "--task", "gsm8k", "--model"]).arg(run.output()).arg("--input");
    program.arg(&nothing).run(&run.dir, "nothing").expect_error(3, &["no line of the input has an answer"]);
}

#[test]
fn check_shows_an_example_and_how_examples_end() {
    let run = Run::sft("check");
    let words = ["check", "sft", "--example", "2", "--config"];
    let checked = Program::corral(&words).arg(run.dir.join("config.yaml")).run(&run.dir, "check");
    let checked = checked.expect_code(0);
    for part in
        ["# example 2 of 150", "⟦", "#### ", "</s>⟧", "# tokens a sequence: ", "(100.0 %) end in a superv"]
    {
        assert!(checked.out.contains(part), "{part}: {checked}");
    }
    // What is before the answer is not marked.
    let shown = checked.out.split_once("# example 2").unwrap().1;
    let (question, answer) = shown.split_once("and ⟧:").unwrap().1.split_once('⟦').unwrap();
    assert!(question.contains('?') && !answer.split_once('⟧').unwrap().0.contains('?'), "{checked}");

    let path = run.dir.join("config.yaml");
    let beyond = Program::corral(&["check", "sft", "--example", "151", "--config"]).arg(&path);
    beyond.run(&run.dir, "beyond").expect_error(2, &["--example 151: there are 150"]);
}

#[test]
fn check_tells_what_templates_and_lengths_do() {
    let run = Run::sft("check-more");
    let config = run.dir.join("config.yaml");
    let check = |name: &str, words: &[&str]| {
        let program = Program::corral(&["check", "sft", "--config"]).arg(&config).args(words);
        program.run(&run.dir, name)
    };
    let tokenizer = data().join("tokens/tokenizer");
    let with = |keys: &str| format!("tokenizer={{path: {}, {keys}}}", tokenizer.display());
    // What ends a turn of ChatML stands before a line break.
    let chatml = with("chat_template: chatml, add_tokens: ['<|im_start|>', '<|im_end|>']");
    let told = check("chatml", &[&chatml, "data.sequence_length=256"]).expect_code(0);
    assert!(told.out.contains("# 150 of 150 sequences (100.0 %) end in a superv"), "{told}");
    assert!(told.out.contains("# 0 of 150 sequences are longer than data.sequence_length, 256"), "{told}");

    // Lengths are those before anything is cut, or left out.
    let longest = |out: &str| -> u64 {
        let line = out.split_once("# tokens a sequence: ").unwrap().1.split_once(',').unwrap().0.to_string();
        line.split_once(" to ").unwrap().1.parse().unwrap()
    };
    let uncut = longest(&told.out);
    for too_long in ["truncate", "drop"] {
        let words = [chatml.as_str(), "data.sequence_length=96", &format!("data.too_long={too_long}")];
        let told = check(too_long, &words).expect_code(0);
        assert!(uncut > 96 && longest(&told.out) == uncut, "{told}");
        let longer = told.out.split_once(" of 150 sequences are longer than").unwrap().0;
        assert!(longer.rsplit_once("# ").unwrap().1.parse::<u64>().unwrap() > 0, "{told}");
    }
    let cut = Run::sft("cut");
    let told = cut.train(1, &["data.sequence_length=64", "train.steps=1", "schedule.warmup_steps=0"]);
    let counted = told.err.split_once(" were truncated, ").expect("what was cut").0;
    assert!(counted.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap() > 0, "{told}");

    let pad = with("template: \"{prompt}\\n{completion}\", pad_token: '</s>'");
    let told = check("pad", &[&pad]).expect_code(0);
    assert!(told.out.contains("the pad token (</s>) also ends a sequence"), "{told}");
    let twice = with(
        "chat_template: '{{ bos_token }}{% for m in messages %}{% if m.role == \"assistant\" %}{% generation %}{{ \
         bos_token + m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}'",
    );
    check("twice", &[&twice]).expect_error(3, &["example 1 begins with two BOS tokens (<s>)"]);

    // A folder of Arrow files, and one of splits.
    let saved = testing::golden::fixture("arrow");
    let told = check("saved", &[&format!("data.train=[{}]", saved.display())]).expect_code(0);
    assert!(told.out.contains("# 5 of 5 sequences (100.0 %) end in a superv"), "{told}");
    let splits = run.dir.join("splits");
    fs::create_dir(&splits).unwrap();
    fs::write(splits.join("dataset_dict.json"), r#"{"splits": ["train", "test"]}"#).unwrap();
    let source = format!("data.train=[{}]", splits.display());
    check("splits", &[&source]).expect_error(3, &["holds the splits train, test; name the folder of one"]);
}
