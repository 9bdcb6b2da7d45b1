//! One folder, several starts: what may change between them, who holds the folder, and that nothing is lost on the way.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use testing::program::{Program, Running};
use testing::run::{Run, data};

use nix::sys::signal::Signal;

const PAUSE: Duration = Duration::from_millis(2);

/// Runs for as long as it takes to disturb it.
const LONG: &str = "train.steps=5000";

/// Every file below a folder with its contents, but for what only a running process has there.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().unwrap().is_dir() {
            found.extend(contents(&entry.path()).into_iter().map(|(n, c)| (format!("{name}/{n}"), c)));
        } else {
            found.push((name, fs::read(entry.path()).unwrap()));
        }
    }
    found.sort();
    found
}

fn expect_unchanged(before: &[(String, Vec<u8>)], dir: &Path) {
    let after = contents(dir);
    let names = |of: &[(String, Vec<u8>)]| of.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    assert_eq!(names(before), names(&after));
    for ((name, old), (_, new)) in before.iter().zip(&after) {
        assert!(old == new, "{name} has changed");
    }
}

fn steps_of(run: &Run) -> Vec<u64> {
    run.checkpoints().into_iter().map(|(step, _)| step).collect()
}

// ---- going back ----

/// Every save stays, so that newer ones could be lost.
const SAVES: [&str; 3] = ["train.steps=12", "checkpoint.every=4", "checkpoint.keep=5"];

#[test]
fn a_start_that_is_refused_removes_nothing() {
    let run = Run::sft("refused");
    let file = run.dir.join("train.jsonl");
    fs::copy(data().join("sft.train.jsonl"), &file).unwrap();
    let train = format!("data.train=[{}]", file.display());
    let words = [&SAVES[..], &[&train, "log.every=1"]].concat();
    run.train(1, &words);
    assert_eq!(steps_of(&run), [4, 8, 12]);
    let before = contents(&run.output());
    let old = run.checkpoints()[0].1.to_string_lossy().into_owned();

    // Another digit in the data.
    let text = fs::read_to_string(&file).unwrap();
    let at = text.rfind(|c: char| c.is_ascii_digit()).unwrap();
    let digit = if &text[at..=at] == "7" { "8" } else { "7" };
    fs::write(&file, format!("{}{digit}{}", &text[..at], &text[at + 1..])).unwrap();
    for ranks in [1, 2] {
        let ended = run.start(ranks, &[&words[..], &["--resume", &old]].concat()).wait().expect_code(2);
        assert!(ended.err.contains("of other data"), "{ended}");
        assert_eq!(ended.err.matches("of other data").count(), 1, "one message, whatever the ranks\n{ended}");
        expect_unchanged(&before, &run.output());
    }
    fs::write(&file, text).unwrap();

    // An older checkpoint that is damaged.
    let shard = run.checkpoints()[0].1.join("shard-00000-of-00001.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let end = bytes.len() - 50;
    bytes[end] ^= 1;
    fs::write(&shard, &bytes).unwrap();
    let damaged = contents(&run.output());
    let ended = run.start(1, &[&words[..], &["--resume", &old]].concat()).wait();
    ended.expect_error(3, &["damaged: its checksum"]);
    expect_unchanged(&damaged, &run.output());
    bytes[end] ^= 1;
    fs::write(&shard, &bytes).unwrap();
    expect_unchanged(&before, &run.output());
}

/// Until the first save of a start stands, the next one puts everything back.
#[test]
fn a_start_that_is_killed_before_its_first_save_is_undone() {
    let reference = Run::new("undone-reference");
    reference.train(1, &SAVES);
    let run = Run::new("undone");
    run.train(1, &SAVES);
    let before = contents(&run.output());
    let old = run.checkpoints()[0].1.to_string_lossy().into_owned();
    for flags in [&["--resume", &old][..], &["--resume", "never", "--overwrite"]] {
        // Another length, so that the start has a configuration of its own and runs until it is killed.
        let words = [&["checkpoint.every=100000", "checkpoint.keep=5", LONG][..], flags].concat();
        let mut running = run.start(1, &words);
        running.wait_for("steps", PAUSE, || run.step() > 12);
        assert_eq!(steps_of(&run), [4, 8, 12], "newer checkpoints stay until a save stands");
        running.signal(Signal::SIGKILL);
        assert_eq!(running.wait().code, 137);
        // The next start goes on from the newest checkpoint: the run is done, with the log that it had.
        let ended = run.train(1, &SAVES);
        assert!(ended.err.contains("resumed from") && ended.err.contains("step-00000012"), "{ended}");
        run.expect_equal(&reference);
        let after = contents(&run.output());
        let name = |n: &str| before.iter().find(|(name, _)| name == n).map(|(_, c)| c.clone());
        let now = |n: &str| after.iter().find(|(name, _)| name == n).map(|(_, c)| c.clone());
        assert!(name("metrics.jsonl") == now("metrics.jsonl"), "the very lines");
        assert!(!run.output().join(".before-start").exists());
    }
}

#[test]
fn the_first_save_gives_up_what_came_after() {
    let reference = Run::new("given-up-reference");
    reference.train(1, &SAVES);
    let run = Run::new("given-up");
    run.train(1, &SAVES);
    let old = run.checkpoints()[0].1.to_string_lossy().into_owned();
    let mut running = run.start(1, &[&SAVES[..], &["--resume", &old, "train.steps=5000"]].concat());
    running.wait_for("a save", PAUSE, || steps_of(&run).last().is_some_and(|step| *step > 12));
    running.signal(Signal::SIGTERM);
    running.wait().expect_code(143);
    assert!(!run.output().join(".before-start").exists());
    // Replaced as a whole: nothing of the old run stays.
    let words = ["train.steps=6", "checkpoint.every=2", "checkpoint.keep=1", "optim.lr=1e-3"];
    run.train(1, &[&words[..], &["--resume", "never", "--overwrite"]].concat());
    assert_eq!(steps_of(&run), [6]);
    assert_eq!(run.numbers("train", "step"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
}

// ---- one process group at a time ----

#[test]
fn a_second_process_is_told_who_holds_the_folder() {
    let run = Run::new("second");
    let long = ["train.steps=100000", "checkpoint.every=100000"];
    let mut running = run.start(1, &long);
    running.wait_for("some steps", PAUSE, || run.step() >= 3);
    let pid = format!("pid {} on ", running.pid());
    for ranks in [1, 2] {
        let second = run.program(ranks, &long).run(&run.dir, "second").expect_code(2);
        let told = second.err.lines().filter(|line| line.contains("another run holds")).count();
        assert_eq!(told, 1, "one message, whatever the ranks\n{second}");
        assert!(second.err.contains(&pid) && second.err.contains(", since 20"), "{second}");
    }
    // Who only reads needs no lock.
    let inspected = Program::corral(&["inspect", "--json"]).arg(run.output()).run(&run.dir, "inspect");
    assert!(inspected.out.contains(&pid), "{inspected}");
    let config = run.dir.join("config.yaml");
    Program::corral(&["check", "pretrain", long[0], "--config"])
        .arg(&config)
        .run(&run.dir, "check")
        .expect_code(0);
    let step = run.step();
    running.wait_for("more steps", PAUSE, || run.step() > step);
    running.signal(Signal::SIGKILL);
    running.wait();
    // What a dead process left is taken over.
    let ended = run.train(1, &["train.steps=12"]);
    assert!(!ended.err.contains("resumed"), "{ended}");
    assert!(!run.output().join(".lock").exists() && !run.output().join(".heartbeat").exists());
}

#[test]
fn a_run_whose_folder_is_removed_ends_with_an_error() {
    for ranks in [1, 2] {
        let run = Run::new(&format!("removed-{ranks}"));
        let mut running = run.start(ranks, &[LONG]);
        running.wait_for("some steps", PAUSE, || run.step() >= 3);
        fs::remove_dir_all(run.output()).or_else(|_| fs::remove_dir_all(run.output())).unwrap();
        let ended = running.wait().expect_code(1);
        assert!(ended.err.contains("was removed or moved while the run was writing into it"), "{ended}");
        assert!(!run.output().join("model").exists());
    }
}

// ---- what may change ----

#[test]
fn what_does_not_change_the_mathematics_may_change() {
    let words = ["train.steps=16", "checkpoint.every=8"];
    let reference = Run::new("changed-reference");
    reference.train(1, &words);
    let run = Run::new("changed");
    let mut running = run.start(1, &[words[0], "checkpoint.every=1"]);
    running.wait_for("a save", PAUSE, || !run.checkpoints().is_empty());
    running.signal(Signal::SIGTERM);
    running.wait().expect_code(143);
    // The same folder by another name, and other intervals.
    let link = run.dir.join("link");
    std::os::unix::fs::symlink(&run.dir, &link).unwrap();
    let tokens = data().join("tokens");
    let words = [
        words[0],
        "checkpoint.every=3",
        "checkpoint.keep=7",
        "valid.batches=2",
        "train.recompute=full",
        "parallel.timeout_s=50",
        &format!("output_dir={}/./run/", link.display()),
        &format!("data.train=[{}/./train/]", tokens.display()),
    ];
    let ended = run.train(1, &words);
    for part in [
        "changed: checkpoint.every: before 1, now 3; checkpoint.keep: before 3, now 7",
        "parallel.timeout_s: before 100.0, now 50.0",
        "train.recompute: before none, now full",
    ] {
        assert!(ended.err.contains(part), "`{part}`\n{ended}");
    }
    assert!(!ended.err.contains("rounding"), "all bits are the same\n{ended}");
    assert_eq!(run.numbers("train", "loss"), reference.numbers("train", "loss"));
    assert!(run.model() == reference.model());
    // It says so where they are not.
    let mut words = words.to_vec();
    words.extend(["train.micro_batch_size=2", "train.steps=20"]);
    let ended = run.train(1, &words);
    assert!(
        ended
            .err
            .contains("train.micro_batch_size: before not set, now 2: from here on results are equal up to"),
        "{ended}"
    );
    assert!(
        ended.err.contains("train.steps: before 16, now 20: the schedule is now one over 20 steps"),
        "{ended}"
    );
    assert_eq!(run.numbers("train", "loss").len(), 20);
    let ended = run.program(2, &words).env("OMP_NUM_THREADS", "2").run(&run.dir, "ranks").expect_code(0);
    assert!(ended.err.contains("ranks: before 1, now 2; threads: before 1, now 2"), "{ended}");
}

#[test]
fn another_run_is_refused_with_every_key_and_the_way_on() {
    let run = Run::new("another");
    run.train(1, &["train.steps=6"]);
    let before = contents(&run.output());
    let output = run.output().display().to_string();
    let words = ["train.steps=6", "optim.lr=1e-4", "seed=3", "schedule.warmup_steps=2", "log.every=2"];
    let parts = [
        "optim.lr: there 0.01, here 1e-4; schedule.warmup_steps: there 4, here 2; seed: there 1, here 3.",
        &format!("--resume {output} output_dir=NEW (with seed as there: a checkpoint is bound to it)"),
        "--resume never --overwrite",
    ];
    run.start(1, &words).wait().expect_error(2, &parts);
    let ended = run.start(3, &["train.steps=6", "optim.lr=1e-4", "train.batch_size=9"]).wait().expect_code(2);
    assert_eq!(ended.err.matches("holds a run with another configuration").count(), 1, "{ended}");
    run.start(1, &["train.steps=4"]).wait().expect_error(2, &["stands at step 6, beyond the 4"]);
    expect_unchanged(&before, &run.output());
    // The advice works, with a run's folder as with a checkpoint.
    let new = run.dir.join("new");
    let to = format!("output_dir={}", new.display());
    let words = ["train.steps=8", "optim.lr=1e-4", &to, "--resume", &output];
    let ended = run.start(1, &words).wait().expect_code(0);
    assert!(ended.err.contains("resumed from") && ended.err.contains("step-00000006"), "{ended}");
    assert!(new.join("model").is_dir());
    expect_unchanged(&before, &run.output());
    let nothing = run.dir.to_string_lossy().into_owned();
    let words = ["--resume", &nothing];
    run.start(1, &words)
        .wait()
        .expect_error(3, &["neither a checkpoint nor the folder of a run that has one"]);
    // A folder of another stage.
    let sft = Run::sft("another-sft");
    sft.start(1, &[&format!("output_dir={output}")])
        .wait()
        .expect_error(2, &["holds a run of `corral pretrain`"]);
}

#[test]
fn a_folder_without_a_checkpoint_blocks_nothing() {
    let run = Run::new("claimed");
    let mut running = run.start(1, &[LONG, "checkpoint.every=100000"]);
    running.wait_for("some steps", PAUSE, || run.step() >= 3);
    running.signal(Signal::SIGKILL);
    running.wait();
    run.train(1, &["train.steps=5", "optim.lr=1e-3", "seed=9"]);
    assert_eq!(run.numbers("train", "step"), [1.0, 2.0, 3.0, 4.0, 5.0]);
    // A start that fails claims nothing at all.
    let run = Run::new("claims-nothing");
    run.start(1, &["data.train=[/nowhere]"]).wait().expect_code(3);
    assert!(!run.output().exists());
}

// ---- what belongs together ----

#[test]
fn the_best_checkpoint_stays_only_where_it_is_asked_for() {
    let words = ["train.steps=12", "checkpoint.every=1", "checkpoint.keep=2", "valid.every=2"];
    let run = Run::new("best");
    let mut running = run.start(1, &words);
    running.wait_for("a validation", PAUSE, || run.checkpoints().last().is_some_and(|(step, _)| *step >= 4));
    running.signal(Signal::SIGTERM);
    running.wait();
    run.train(1, &words);
    assert_eq!(steps_of(&run), [11, 12]);
}

#[test]
fn lines_that_are_missing_before_the_checkpoint_are_told() {
    let run = Run::new("hole");
    run.train(1, &["train.steps=6"]);
    let metrics = run.output().join("metrics.jsonl");
    let text = fs::read_to_string(&metrics).unwrap();
    let lines: Vec<&str> = text.lines().take(4).collect();
    fs::write(&metrics, lines.join("\n") + "\n").unwrap();
    let ended = run.train(1, &["train.steps=8"]);
    let told = "warning: metrics.jsonl ends at step 4, and the checkpoint is of step 6";
    assert!(ended.err.contains(told), "{ended}");
    let run = Run::new("no-hole");
    run.train(1, &["train.steps=6", "log.every=4"]);
    let ended = run.train(1, &["train.steps=8", "log.every=4"]);
    assert!(!ended.err.contains("warning"), "{ended}");
}

/// Waits until a validation is under way: its step is logged, and its own line is not.
fn wait_for_validation(run: &Run, running: &mut Running) {
    running.wait_for("a validation", PAUSE, || run.step() >= 2);
    std::thread::sleep(Duration::from_millis(300));
}

#[test]
fn a_signal_ends_a_validation_which_is_done_again() {
    for ranks in [1, 2] {
        // Many copies of the data, in micro-batches of one: many seconds.
        let valid = data().join("tokens/train");
        let valid = vec![valid.to_string_lossy().into_owned(); 12].join(", ");
        let valid = format!("data.valid=[{valid}]");
        let words =
            [&valid, "train.steps=4", "valid.every=2", "valid.batches=100000", "train.micro_batch_size=1"];
        let run = Run::new(&format!("validation-{ranks}"));
        let mut running = run.start(ranks, &words);
        wait_for_validation(&run, &mut running);
        assert_eq!(run.numbers("valid", "loss").len(), 0, "still under way");
        let asked = Instant::now();
        running.signal(Signal::SIGTERM);
        running.wait().expect_code(143);
        let waited = asked.elapsed();
        assert_eq!(run.step(), 2, "no further step");
        assert_eq!(run.numbers("valid", "loss").len(), 0);
        let resumed = Instant::now();
        run.train(ranks, &words);
        assert!(waited < resumed.elapsed() / 2, "it took {waited:?}, and the rest {:?}", resumed.elapsed());
        assert_eq!(run.numbers("valid", "step"), [2.0, 4.0]);
        assert_eq!(run.numbers("train", "step"), [1.0, 2.0, 3.0, 4.0]);
    }
}
