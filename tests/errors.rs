//! What goes wrong, through the real binaries: one clear message, the right exit code, nothing half-written.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tch::Kind;
use testing::compare::relative_number;
use testing::folder::folder;
use testing::program::{Program, Running, corral, launch, wait_until_gone};
use testing::run::{Run, data, uint};
use testing::tolerance::{Quantity, allowed};

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

const PAUSE: Duration = Duration::from_millis(2);

/// Runs for as long as it takes to disturb it.
const LONG: &str = "train.steps=5000";

fn fails(run: &Run, words: &[&str], code: i32, parts: &[&str]) {
    run.start(1, words).wait().expect_error(code, parts);
}

// ---- the command line and the configuration ----

#[test]
fn a_wrong_key_is_told_with_its_place_and_the_nearest() {
    let run = Run::new("wrong-key");
    let path = run.dir.join("config.yaml");
    let text = fs::read_to_string(&path).unwrap().replace("batch_size: 8", "batch_sise: 8");
    fs::write(&path, &text).unwrap();
    let (row, line) = text.lines().enumerate().find(|(_, line)| line.contains("batch_sise")).unwrap();
    let place = format!("{}:{}:{}: ", path.display(), row + 1, line.find("batch_sise").unwrap() + 1);
    fails(&run, &[], 2, &[&place, "'train.batch_sise'", "did you mean 'batch_size'?"]);
    assert!(!run.output().exists(), "nothing is begun");
}

#[test]
fn a_wrong_configuration_is_refused() {
    let run = Run::new("wrong-configuration");
    let missing = run.dir.join("missing.yaml").to_string_lossy().into_owned();
    let cases: [(&[&str], &[&str]); 8] = [
        (&["optim.lrr=1"], &["optim.lrr", "'lr'"]),
        (&["train.steps=many"], &["train.steps", "many"]),
        (&["optim.betas=[0.9, 1.5]"], &["betas", "1.5"]),
        (&["parallel.mode=hybrid", "parallel.shard=3"], &["parallel.shard", "3 must divide", "ranks, 1"]),
        (&["train.micro_batch_size=3"], &["train.batch_size", "8 is not a multiple of", "6 or 9 would be"]),
        (&["data.sequence_length=64", "model.init.max_position_embeddings=48"], &["64", "48"]),
        (&["model.init.num_key_value_heads=3"], &["num_key_value_heads"]),
        (&["--config", &missing], &["the argument '--config <FILE>' cannot be used multiple times"]),
    ];
    for (words, parts) in cases {
        fails(&run, words, 2, parts);
    }
    Program::corral(&["pretrain", "--config", &missing])
        .run(&run.dir, "missing")
        .expect_error(2, &["missing.yaml", "cannot read the configuration"]);
    assert!(!run.output().exists(), "nothing is begun");
}

#[test]
fn a_batch_that_does_not_divide_among_the_ranks_is_refused() {
    let run = Run::new("ranks");
    let ended = run.program(3, &[]).run(&run.dir, "pretrain").expect_code(2);
    assert!(ended.err.contains("8 is not a multiple of the number of ranks, 3; 6 or 9 would be"), "{ended}");
    let words = ["check", "pretrain", "--nproc", "3", "--config"];
    let check = Program::corral(&words).arg(run.dir.join("config.yaml")).run(&run.dir, "check");
    check.expect_error(2, &["config.yaml:", "8 is not a multiple of the number of ranks, 3"]);
}

#[test]
fn what_is_not_there_is_refused() {
    let dir = folder("not-there");
    let ended = Program::new(corral()).args(&["pretrian"]).run(&dir, "subcommand");
    ended.expect_error(2, &["unrecognized subcommand 'pretrian'"]);
    let ended =
        Program::new(launch()).args(&["--nproc", "2", "--backend", "mpi", "pretrain"]).run(&dir, "mpi");
    assert!(ended.expect_code(2).err.contains("MPI starts its ranks itself"));
    // CUDA_VISIBLE_DEVICES is empty: no GPU, also where there is one.
    let run = Run::new("cuda");
    let config = run.dir.join("config.yaml");
    for device in ["cuda", "cuda:1"] {
        let program = Program::new(corral()).args(&["pretrain", "--device", device, "--config"]).arg(&config);
        program.run(&run.dir, "cuda").expect_error(2, &["--device cuda"]);
    }
    let program = Program::new(corral()).args(&["pretrain", "--device", "tpu", "--config"]).arg(&config);
    program.run(&run.dir, "tpu").expect_error(2, &["tpu", "cpu, cuda or cuda:N"]);
}

// ---- data, tokenizer, model ----

/// A copy of the token shards for a test to damage.
fn copy_of_shards(to: &Path) -> PathBuf {
    fs::create_dir_all(to).unwrap();
    let shard = to.join("shard-00000.tokens");
    fs::copy(data().join("tokens/train/shard-00000.tokens"), &shard).unwrap();
    shard
}

fn flip_a_byte(path: &Path, at: impl Fn(usize) -> usize) {
    let mut bytes = fs::read(path).unwrap();
    let at = at(bytes.len());
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn truncate(path: &Path) {
    let len = fs::metadata(path).unwrap().len();
    File::options().write(true).open(path).unwrap().set_len(len - 100).unwrap();
}

#[test]
fn damaged_token_shards_are_named() {
    let run = Run::new("shards");
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 3] = [
        ("corrupt: the checksum", |path| flip_a_byte(path, |len| len / 2)),
        ("corrupt: the header's checksum", |path| flip_a_byte(path, |_| 30)),
        ("truncated", truncate),
    ];
    for (i, (what, damage)) in damages.into_iter().enumerate() {
        let dir = run.dir.join(format!("shards-{i}"));
        let shard = copy_of_shards(&dir);
        let words = format!("data.train=[{}]", dir.display());
        damage(&shard);
        let path = shard.to_string_lossy();
        fails(&run, &[&words], 3, &[&path, what, "corral tokenize"]);
        let check = Program::corral(&["check", "pretrain", &words, "--config"]);
        check.arg(run.dir.join("config.yaml")).run(&run.dir, "check").expect_error(3, &[&path, what]);
    }
    let missing = run.dir.join("nothing");
    let missing = missing.to_string_lossy();
    fails(&run, &[&format!("data.train=[{missing}]")], 3, &[&missing]);
    assert!(!run.output().exists(), "nothing is begun");
}

#[test]
fn a_tokenizer_that_does_not_fit_is_refused() {
    let run = Run::new("tokenizer");
    let other = run.dir.join("bpe").to_string_lossy().into_owned();
    let text = data().join("pretrain.train.jsonl").to_string_lossy().into_owned();
    let words = ["tokenizer", "train", "--input", &text, "--vocab-size", "290", "--output", &other];
    Program::corral(&words).run(&run.dir, "bpe").expect_code(0);
    let shards = data().join("tokens/train").to_string_lossy().into_owned();
    fails(&run, &[&format!("tokenizer.path={other}")], 3, &[&shards, "tokenizer"]);
    fails(
        &run,
        &["model.init.vocab_size=299"],
        3,
        &["has 300 tokens, more than the model's vocab_size of 299"],
    );
    fails(&run, &["tokenizer.path=/nowhere"], 3, &["/nowhere"]);
    assert!(!run.output().exists(), "nothing is begun");
}

#[test]
fn a_damaged_model_to_start_from_is_named() {
    let first = Run::new("model-first");
    first.train(1, &[]);
    let (run, model) = (Run::new("model"), first.output().join("model"));
    truncate(&model.join("model.safetensors"));
    fails(&run, &[&format!("model={{path: {}}}", model.display())], 3, &["model.safetensors"]);
    fails(&run, &["model={path: /nowhere}"], 3, &["/nowhere"]);
}

#[test]
fn a_damaged_checkpoint_is_named_and_an_older_one() {
    let (run, words) = (Run::new("checkpoint"), ["checkpoint.every=8"]);
    run.train(2, &words);
    let reference = run.curve();
    let (last, older) = (run.output().join("checkpoints/step-00000020"), "checkpoints/step-00000016");
    let damage = last.join("shard-00001-of-00002.safetensors");
    let whole = fs::read(&damage).unwrap();
    let path = damage.to_string_lossy();
    truncate(&damage);
    fails(&run, &words, 3, &[&path, "bytes, should be", older]);
    // A world of several ranks ends together, and is not restarted.
    let restarts = run.launched(2, &["--max-restarts", "3"], &words).run(&run.dir, "pretrain").expect_code(3);
    assert!(restarts.err.contains(&*path) && restarts.err.contains(older), "{restarts}");
    assert!(!restarts.err.contains("restart 1"), "{restarts}");

    fs::write(&damage, &whole).unwrap();
    flip_a_byte(&damage, |len| len - 50);
    fails(&run, &words, 3, &[&path, "damaged: its checksum is", older]);
    fs::write(&damage, &whole).unwrap();
    flip_a_byte(&last.join("meta.json"), |len| len / 2);
    fails(&run, &words, 3, &["step-00000020/meta.json", older]);
    assert_eq!(run.curve(), reference, "what was refused changes nothing");

    // What the message advises works.
    let older = run.output().join(older).to_string_lossy().into_owned();
    run.train(2, &[words[0], "--resume", &older]);
    assert_eq!(run.curve(), reference);
}

// ---- the disk ----

/// A file system of 4 MiB, where this user may mount one.
struct SmallDisk<'a>(&'a Path);

impl SmallDisk<'_> {
    fn mount(at: &Path) -> Option<SmallDisk<'_>> {
        fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(at).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then_some(SmallDisk(at))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// A run whose disk takes no checkpoint any more from its fifth step on ends with an error, keeps what it had, and goes
/// on from there when there is room again.
fn checkpoints_cannot_be_written(
    run: &Run,
    reference: &Run,
    disturb: impl FnOnce(&mut Running),
    words: &[&str],
) {
    // As a shell leaves it to a program to be told of a limit to its files, instead of being killed.
    let ignoring = Program::new("sh").args(&["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]).arg(corral());
    let config = run.dir.join("config.yaml");
    let mut running = ignoring
        .args(&["pretrain", "--device", "cpu", "--config"])
        .arg(config)
        .args(words)
        .start(&run.dir, "full");
    let saved = || run.checkpoints().last().is_some_and(|(step, _)| *step >= 5);
    running.wait_for("a checkpoint", PAUSE, saved);
    disturb(&mut running);
    let ended =
        running.wait().expect_error(1, &["the checkpoint of step 40 could not be saved", "cannot write"]);
    assert!(ended.err.contains("the run goes on without it"), "{ended}");
    let step = run.checkpoints().last().expect("a checkpoint").0;
    assert!((5..40).contains(&step), "{ended}");
    let entries = fs::read_dir(run.output().join("checkpoints")).unwrap().flatten();
    let left: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    assert!(left.iter().all(|name| name.starts_with("step-")), "{left:?}");
    assert!(!run.output().join("model").exists());

    let _ = fs::remove_file(run.output().join("ballast"));
    let again = run.train(1, words);
    assert!(again.err.contains(&format!("step-{step:08}")), "{again}");
    run.expect_equal(reference);
}

#[test]
fn a_full_disk_loses_nothing_that_was_saved() {
    let words = ["train.steps=40", "checkpoint.every=1", "checkpoint.keep=2"];
    let reference = Run::new("full-reference");
    reference.train(1, &words);

    // Files may not grow beyond what metrics take: every user can have that.
    let run = Run::new("limited");
    let limit = |running: &mut Running| {
        let mut prlimit = Command::new("prlimit");
        prlimit.args(["--fsize=100000", "--pid", &running.pid().to_string()]);
        assert!(prlimit.status().expect("prlimit, of util-linux").success());
    };
    checkpoints_cannot_be_written(&run, &reference, limit, &words);

    // A disk that is full, metrics included; where mounting is not allowed the limit above has to do.
    let run = Run::new("full");
    let output = run.output();
    let Some(_disk) = SmallDisk::mount(&output) else { return };
    let fill = |running: &mut Running| {
        let mut ballast = File::create(output.join("ballast")).unwrap();
        // What pruning and failed saves give free is taken as well.
        while !running.has_ended() {
            while ballast.write_all(&[1; 4096]).is_ok() {}
            std::thread::sleep(PAUSE);
        }
    };
    checkpoints_cannot_be_written(&run, &reference, fill, &words);
}

#[test]
fn metrics_that_cannot_be_written_end_no_run() {
    let run = Run::new("metrics");
    fs::create_dir_all(run.output()).unwrap();
    std::os::unix::fs::symlink("/dev/full", run.output().join("metrics.jsonl")).unwrap();
    let ended = run.start(1, &["--resume", "never", "--overwrite"]).wait().expect_code(0);
    let warnings: Vec<_> = ended.err.lines().filter(|l| l.starts_with("warning")).collect();
    assert_eq!(warnings.len(), 2, "one when it begins, one with the count at the end\n{ended}");
    assert!(warnings[0].contains("metrics.jsonl: No space left on device"), "{ended}");
    assert!(warnings[1].contains("22 lines of metrics.jsonl could not be written"), "{ended}");
    assert!(run.output().join("model/model.safetensors").is_file());
}

#[test]
fn a_folder_that_cannot_be_made_is_told() {
    let run = Run::new("no-folder");
    fs::write(run.output(), "a file").unwrap();
    let inside = run.output().join("inside");
    let inside = inside.to_string_lossy();
    fails(&run, &[&format!("output_dir={inside}")], 1, &["cannot", &inside]);
}

// ---- other ranks ----

fn free_port() -> String {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port().to_string()
}

/// One rank of a world of two whose launcher is not ours.
fn lone_rank(run: &Run, rank: &str, port: &str, words: &[&str]) -> Running {
    let environment =
        [("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)];
    let program = environment.into_iter().fold(run.program(1, words), |p, (name, value)| p.env(name, value));
    program.start(&run.dir, &format!("rank-{rank}"))
}

#[test]
fn a_port_in_use_is_told() {
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let run = Run::new("port");
    let ended = lone_rank(&run, "0", &port, &["parallel.timeout_s=5"]).wait();
    ended.expect_error(1, &[&format!("port {port} on 127.0.0.1 is in use")]);
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let run = Run::new("never");
    let ended = lone_rank(&run, "0", &free_port(), &["parallel.timeout_s=2"]).wait();
    ended.expect_error(1, &["rank 1 has not joined within", "group `world` of 2 ranks"]);
}

#[test]
fn a_lost_rank_is_named_by_the_others() {
    let (run, port) = (Run::new("lost"), free_port());
    let [mut left, lost] = ["0", "1"].map(|rank| lone_rank(&run, rank, &port, &[LONG]));
    left.wait_for("some steps", PAUSE, || run.step() >= 3);
    lost.signal(Signal::SIGKILL);
    let killed = Instant::now();
    left.wait().expect_error(1, &["of group `world` failed", "missing: rank 1"]);
    assert!(killed.elapsed() < Duration::from_secs(60), "long before the time-out of 100 s");
    assert_eq!(lost.wait().code, 137);
}

#[test]
fn launch_ends_with_a_killed_rank() {
    let run = Run::new("killed");
    let mut running = run.start(2, &[LONG]);
    let ranks = [running.rank(0), running.rank(1)];
    running.wait_for("some steps", PAUSE, || run.step() >= 3);
    kill(ranks[1], Signal::SIGKILL).unwrap();
    let ended = running.wait().expect_code(137);
    let told = format!("launch: rank 1 (pid {}) was killed by signal 9 (SIGKILL)", ranks[1]);
    assert!(ended.err.contains(&told), "{ended}");
    ranks.into_iter().for_each(wait_until_gone);
}

#[test]
fn a_rank_that_hangs_is_named_when_the_time_is_up() {
    let run = Run::new("hang");
    let words = [LONG, "parallel.timeout_s=3"];
    let mut running = run.launched(2, &["--grace", "1"], &words).start(&run.dir, "pretrain");
    let ranks = [running.rank(0), running.rank(1)];
    running.wait_for("some steps", PAUSE, || run.step() >= 3);
    kill(ranks[1], Signal::SIGSTOP).unwrap();
    let ended = running.wait().expect_code(1);
    let error = ended.err.lines().find(|line| line.contains("error (rank 0)")).expect("an error of rank 0");
    for part in ["group `world`", "timed out after 3 s", "missing: rank 1"] {
        assert!(error.contains(part), "`{part}`\n{ended}");
    }
    assert!(
        ["all-gather", "reduce-scatter", "all-reduce"].iter().any(|name| error.contains(name)),
        "{ended}"
    );
    assert!(ended.err.contains("still running after 1 s, killed: rank 1"), "{ended}");
    ranks.into_iter().for_each(wait_until_gone);
}

/// Connections stay open, but its heart does not beat.
#[test]
fn a_rank_that_stops_is_named_long_before_the_time_is_up() {
    let (run, port) = (Run::new("stopped"), free_port());
    let [mut left, stopped] =
        ["0", "1"].map(|rank| lone_rank(&run, rank, &port, &[LONG, "parallel.timeout_s=600"]));
    left.wait_for("some steps", PAUSE, || run.step() >= 3);
    stopped.signal(Signal::SIGSTOP);
    left.wait().expect_error(1, &["another rank has failed", "missing: rank 1 (gives no sign of life"]);
    stopped.signal(Signal::SIGKILL);
    stopped.wait();
}

// ---- numbers ----

#[test]
fn three_steps_that_are_not_finite_end_the_run() {
    for ranks in [1, 2] {
        let run = Run::new(&format!("not-finite-{ranks}"));
        let ended = run.start(ranks, &["optim.lr=1e30"]).wait().expect_code(1);
        let lines = run.metrics();
        assert_eq!(lines.len() as u64, uint(&lines[lines.len() - 1], "step"), "a line for every step");
        let skipped: Vec<u64> = lines.iter().map(|line| uint(line, "skipped_steps")).collect();
        assert_eq!(skipped[skipped.len() - 3..], [1, 2, 3], "{skipped:?}");
        for line in &lines[lines.len() - 3..] {
            let null = ["loss", "grad_norm"].into_iter().filter(|key| line[*key] == Value::Null);
            let note = line["note"].as_str().unwrap_or_else(|| panic!("a note in {line}"));
            assert!(null.clone().count() > 0 && null.clone().all(|key| note.contains(key)), "{line}");
        }
        let finite = &lines[lines.len() - 4];
        let loss = finite["loss"].as_f64().unwrap();
        let last = format!("last finite: step {} with loss ", finite["step"]);
        let told = ended.err.split_once(&last).unwrap_or_else(|| panic!("`{last}`\n{ended}")).1;
        let told: f64 = told.split(' ').next().and_then(|x| x.parse().ok()).unwrap();
        assert!(
            relative_number(told, loss) < allowed(Quantity::Printed, Kind::Float),
            "{told} is not {loss}\n{ended}"
        );
        let up_to = format!("not finite in 3 steps in a row, up to step {}", lines.len());
        for part in [&up_to, "Try a lower learning rate"] {
            assert!(ended.err.contains(part), "`{part}`\n{ended}");
        }
        assert!(run.checkpoints().is_empty() && !run.output().join("model").exists());
    }
}
