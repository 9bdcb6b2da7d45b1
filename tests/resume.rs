//! Runs that are killed, stopped and resumed, against the same runs left alone.

use std::fs;
use std::time::Duration;
use tch::Kind;
use testing::compare::largest_relative;
use testing::program::{Running, corral, wait_until_gone};
use testing::run::Run;
use testing::tolerance::{Quantity, allowed};

use nix::sys::signal::{Signal, kill};

/// A checkpoint is under way most of the time.
const WORDS: [&str; 2] = ["train.steps=40", "checkpoint.every=1"];

/// A few milliseconds: saves of the tiny model take about as long.
const PAUSE: Duration = Duration::from_millis(1);

/// Numbers for where to kill, from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % n
    }
}

/// Whether a save is under way, or was when the run ended.
fn in_a_save(run: &Run) -> bool {
    let entries = fs::read_dir(run.output().join("checkpoints"));
    entries.is_ok_and(|e| e.flatten().any(|e| e.file_name().to_string_lossy().starts_with(".tmp-")))
}

/// Lets the run get from where it is to a step that `random` chooses, and some milliseconds further.
fn reach_some_step(run: &Run, running: &mut Running, random: &mut Random) {
    let step = run.step() + 1 + random.below(8);
    running.wait_for("a step", PAUSE, || run.step() >= step.min(36));
    std::thread::sleep(Duration::from_micros(random.below(12_000)));
}

fn kill_and_wait(mut running: Running) {
    assert!(!running.has_ended(), "it was to be killed while it runs");
    running.signal(Signal::SIGKILL);
    assert_eq!(running.wait().code, 137);
}

#[test]
fn killed_at_random_moments_one_rank_resumes_bit_by_bit() {
    let reference = Run::new("kill-1-reference");
    reference.train(1, &WORDS);
    assert_eq!(reference.numbers("train", "loss").len(), 40);
    for seed in 1..=4 {
        let (run, mut random) = (Run::new(&format!("kill-1-{seed}")), Random(seed));
        for _ in 0..4 {
            let mut running = run.start(1, &WORDS);
            // At first before the first step, too.
            if random.below(4) > 0 {
                reach_some_step(&run, &mut running, &mut random);
            } else {
                std::thread::sleep(Duration::from_millis(random.below(400)));
            }
            kill_and_wait(running);
        }
        run.train(1, &WORDS);
        run.expect_equal(&reference);
        assert!(!in_a_save(&run), "leftovers are removed");
    }
}

#[test]
fn killed_within_a_save_it_resumes_bit_by_bit() {
    let reference = Run::new("kill-save-reference");
    reference.train(1, &WORDS);
    let run = Run::new("kill-save");
    let mut hits = 0;
    for _ in 0..20 {
        let mut running = run.start(1, &WORDS);
        let step = run.step() + 1;
        running.wait_for("a save", Duration::ZERO, || run.step() >= step && in_a_save(&run));
        kill_and_wait(running);
        hits += usize::from(in_a_save(&run));
        if hits == 3 || run.step() > 34 {
            break;
        }
    }
    assert!(hits > 0, "no kill met a save");
    run.train(1, &WORDS);
    run.expect_equal(&reference);
}

/// A few kills of the script, which takes all algorithms and as many kills as it is given.
#[test]
fn the_script_of_kills_finds_no_difference() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut script = std::process::Command::new("python3");
    script.arg(root.join("scripts/kills.py")).args(["--kills", "4", "--only", "lora,ppo", "--bin"]);
    let output = script.arg(corral().parent().unwrap()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && out.contains("\n4 kills, "), "{out}{err}");
}

#[test]
fn a_killed_world_resumes_bit_by_bit() {
    // Ranks with different rows; that share every matrix; every sequence; the blocks.
    for (mesh, seeds) in
        [("tensor=1", 1..=2), ("tensor=2", 3..=3), ("context=2", 4..=4), ("pipeline=2", 5..=5)]
    {
        let key = format!("parallel.{mesh}");
        let words = [&WORDS[..], &[key.as_str()]].concat();
        let reference = Run::new(&format!("kill-2-reference-{mesh}"));
        reference.train(2, &words);
        for seed in seeds {
            killed_two_ranks(seed, &words, &reference);
        }
    }
}

/// Kills a run of two ranks three times, a rank or `launch`, and lets it end.
fn killed_two_ranks(seed: u64, words: &[&str], reference: &Run) {
    let (run, mut random) = (Run::new(&format!("kill-2-{seed}")), Random(100 + seed));
    for who in ["rank 0", "launch", "rank 1"] {
        let mut running = run.start(2, words);
        let ranks = [running.rank(0), running.rank(1)];
        reach_some_step(&run, &mut running, &mut random);
        if who == "launch" {
            kill_and_wait(running);
            ranks.into_iter().for_each(wait_until_gone);
            continue;
        }
        let rank = usize::from(who == "rank 1");
        kill(ranks[rank], Signal::SIGKILL).expect("the rank is there");
        let ended = running.wait().expect_code(137);
        assert!(ended.err.contains(&format!("launch: rank {rank} (pid {})", ranks[rank])), "{ended}");
    }
    run.train(2, words);
    run.expect_equal(reference);
}

#[test]
fn launch_restarts_a_killed_world_which_resumes() {
    let reference = Run::new("restart-reference");
    reference.train(2, &WORDS);
    // Also where the command asks for a new run: a restart goes on with what the first attempt began.
    for (name, flags) in [("auto", &[][..]), ("never", &["--resume", "never", "--overwrite"])] {
        let run = Run::new(&format!("restart-{name}"));
        if name == "never" {
            run.train(1, &["train.steps=5"]);
        }
        let words = [&WORDS[..], flags].concat();
        let mut running = run.launched(2, &["--max-restarts", "2"], &words).start(&run.dir, "pretrain");
        let rank = running.rank(1);
        let saved = || run.checkpoints().last().is_some_and(|(step, _)| (6..30).contains(step));
        running.wait_for("a checkpoint", PAUSE, saved);
        kill(rank, Signal::SIGKILL).expect("the rank is there");
        let ended = running.wait().expect_code(0);
        assert!(ended.err.contains("launch: restart 1 of 2") && !ended.err.contains("restart 2"), "{ended}");
        assert!(ended.err.contains("resumed from"), "{ended}");
        run.expect_equal(&reference);
    }
}

#[test]
fn a_restart_of_what_never_began_begins() {
    let run = Run::new("restart-at-once");
    run.train(1, &["train.steps=5"]);
    let words = ["train.steps=6", "--resume", "never", "--overwrite"];
    let restarted = |name| {
        let program = run.program(1, &words).env("RANK", "0").env("WORLD_SIZE", "1");
        program.env("CORRAL_RESTART_COUNT", "1").run(&run.dir, name).expect_code(0)
    };
    // The first attempt has left the folder to the older run; then it has begun.
    for (name, resumes) in [("first", false), ("second", true)] {
        let ended = restarted(name);
        assert_eq!(ended.err.contains("resumed from"), resumes, "{ended}");
        assert_eq!(run.numbers("train", "loss").len(), 6);
    }
}

/// Starts a run and sends it a signal after a few steps; returns how far it got.
fn stop(run: &Run, ranks: usize, words: &[&str], signal: Signal, code: i32) -> usize {
    let mut running = run.start(ranks, words);
    running.wait_for("some steps", PAUSE, || run.step() >= 3);
    running.signal(signal);
    let ended = running.wait().expect_code(code);
    assert!(ended.err.contains("the same command goes on from its checkpoint"), "{ended}");
    let step = run.step();
    assert!(step < 40, "stopped before the end");
    let last = run.checkpoints().pop().expect("a checkpoint");
    assert_eq!(last.0, step, "the checkpoint is of the last step");
    assert!(!run.output().join("model").exists(), "no model of a run that is not done");
    step as usize
}

#[test]
fn a_signal_ends_the_step_and_saves() {
    let words = ["train.steps=40", "checkpoint.every=1000"];
    for ranks in [1, 2] {
        let reference = Run::new(&format!("signal-{ranks}-reference"));
        reference.train(ranks, &words);
        for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
            let run = Run::new(&format!("signal-{ranks}-{code}"));
            stop(&run, ranks, &words, signal, code);
            run.train(ranks, &words);
            run.expect_equal(&reference);
        }
    }
}

/// A signal's frame on the stack of a thread that computes would, once in some 30 signals, damage memory: see
/// `keep_signals_from_computing_threads`.
#[test]
fn only_one_thread_takes_signals() {
    let run = Run::new("threads");
    let mut running =
        run.program(2, &["train.steps=5000"]).env("OMP_NUM_THREADS", "2").start(&run.dir, "pretrain");
    let ranks = [running.rank(0), running.rank(1)];
    running.wait_for("some steps", PAUSE, || run.step() >= 3);
    let signals = (1_u64 << (Signal::SIGINT as u64 - 1)) | (1 << (Signal::SIGTERM as u64 - 1));
    for rank in ranks {
        let (mut blocking, mut taking) = (0, vec![]);
        for thread in fs::read_dir(format!("/proc/{rank}/task")).unwrap().flatten() {
            // A thread may end meanwhile.
            let Ok(status) = fs::read_to_string(thread.path().join("status")) else { continue };
            let field =
                |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim().to_string();
            match u64::from_str_radix(&field("SigBlk:"), 16).unwrap() & signals {
                0 => taking.push(field("Name:")),
                blocked => {
                    assert_eq!(blocked, signals, "{status}");
                    blocking += 1;
                }
            }
        }
        assert_eq!(taking, ["signals"]);
        // At least the trainer, its helper for products, and the communication's.
        assert!(blocking >= 3, "{blocking} threads");
    }
    running.signal(Signal::SIGTERM);
    running.wait().expect_code(143);
}

#[test]
fn a_run_goes_on_with_other_ranks() {
    let cases = [
        ("full", 2, 1),
        ("full", 1, 2),
        ("replicate", 2, 1),
        ("replicate", 1, 2),
        ("grads", 2, 1),
        ("optimizer", 1, 2),
        ("hybrid, shard: 2", 4, 2),
    ];
    for (mode, before, after) in cases {
        let mode_word = format!("parallel={{mode: {mode}}}");
        let words = ["train.steps=40", "checkpoint.every=1000", &mode_word];
        let name = format!("resize-{}-{before}-{after}", &mode[..4]);
        let (reference, run) = (Run::new(&format!("{name}-reference")), Run::new(&name));
        reference.train(before, &words);
        let stopped = stop(&run, before, &words, Signal::SIGTERM, 143);
        run.train(after, &words);
        for (kind, key) in [("train", "loss"), ("valid", "loss")] {
            let (found, expected) = (run.numbers(kind, key), reference.numbers(kind, key));
            let difference = largest_relative(&found, &expected);
            assert!(
                difference <= allowed(Quantity::SameLosses, Kind::Float),
                "{name}, stopped at step {stopped}: {kind} differs by {difference:e}"
            );
        }
        assert_eq!(run.numbers("train", "loss")[..stopped], reference.numbers("train", "loss")[..stopped]);
        // The same samples: as many tokens, and other ones would give other losses.
        assert_eq!(run.numbers("train", "tokens"), reference.numbers("train", "tokens"));
    }
}

#[test]
fn a_run_resumes_from_a_checkpoint_that_is_named() {
    let words = ["train.steps=12", "checkpoint.every=4"];
    let reference = Run::new("named-reference");
    reference.train(1, &words);
    let run = Run::new("named");
    run.train(1, &words);
    let (step, path) = run.checkpoints().remove(0);
    assert_eq!(step, 4);
    let ended = run.train(1, &[&words[..], &["--resume", &path.to_string_lossy()]].concat());
    assert!(ended.err.contains(&format!("resumed from {}", path.display())), "{ended}");
    run.expect_equal(&reference);
}
