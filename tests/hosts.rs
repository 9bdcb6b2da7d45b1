//! Runs on several hosts: network namespaces with addresses of their own, where this machine allows them.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]
#![allow(clippy::disallowed_methods, reason = "PATH, which a stub is put into")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use testing::compare::largest_relative;
use testing::hosts::Hosts;
use testing::program::{Ended, Program, Running, launch, wait_until_gone};
use testing::run::Run;
use testing::tolerance::{Quantity, allowed};

const PAUSE: Duration = Duration::from_millis(5);
/// Enough for a test to come in between.
const LONG: &str = "train.steps=100";
/// In the order of sums that one host with as many ranks has, too.
const EXACT: [&str; 3] = ["precision.compute=float64", "valid.every=5", "checkpoint.every=5"];

/// Starts a run of two ranks a host, which share every matrix, on all `hosts`.
fn start(hosts: &Hosts, count: usize, ranks: usize, run: &Run, words: &[&str]) -> Vec<Running> {
    let config = run.dir.join("config.yaml").display().to_string();
    let host = |i: usize| {
        let program = hosts.launch(i, ranks, &["--grace", "2"]);
        let program = program.args(&["pretrain", "--device", "cpu", "--config", &config]);
        program.args(&EXACT).args(words).start(&run.dir, &format!("host-{i}"))
    };
    (0..count).map(host).collect()
}

fn train(hosts: &Hosts, count: usize, ranks: usize, run: &Run, words: &[&str]) {
    for host in start(hosts, count, ranks, run, words) {
        host.wait().expect_code(0);
    }
}

/// Ends, on every host, with an error; returns what they said.
fn all_fail(hosts: Vec<Running>, within: Duration) -> Vec<Ended> {
    let since = Instant::now();
    let ended: Vec<Ended> = hosts.into_iter().map(Running::wait).collect();
    assert!(since.elapsed() < within, "{:?}", since.elapsed());
    for host in &ended {
        assert!(host.code != 0 && host.err.contains("error (rank "), "{host}");
        assert!(!host.err.contains("frame #") && !host.err.contains("panicked"), "{host}");
    }
    ended
}

const MESH: &str = "parallel={tensor: 2, timeout_s: 6}";

/// Matrices are shared inside of a host, rows divided among hosts; the result is that of one host.
#[test]
fn hosts_train_together() {
    let whole = Run::new("hosts-whole");
    whole.train(4, &[&EXACT[..], &[MESH]].concat());
    for (count, ranks) in [(2, 2), (4, 1)] {
        let Some(hosts) = Hosts::new(count) else { return };
        let run = Run::new(&format!("hosts-{count}"));
        let mesh = if ranks == 2 { MESH } else { "parallel.mode=full" };
        train(&hosts, count, ranks, &run, &[mesh]);
        let apart = largest_relative(&run.numbers("train", "loss"), &whole.numbers("train", "loss"));
        assert!(apart < allowed(Quantity::SameLosses, tch::Kind::Double), "{count} hosts: {apart:e}");
    }
}

/// A cable that is cut, and a host that is lost, end the run on every host with an error that names who is missing; it goes on as if
/// nothing had been.
#[test]
fn lost_hosts_are_named() {
    let whole = Run::new("hosts-lost-whole");
    whole.train(4, &[&EXACT[..], &[MESH, LONG]].concat());
    for how in ["cut", "killed"] {
        let Some(hosts) = Hosts::new(2) else { return };
        let run = Run::new(&format!("hosts-{how}"));
        let mut running = start(&hosts, 2, 2, &run, &[MESH, LONG]);
        running[0].wait_for("some steps", PAUSE, || run.step() >= 7);
        let within = Duration::from_secs(60);
        if how == "cut" {
            hosts.cut(1);
            let ended = all_fail(running, within);
            // Either rank of the lost host: whose partner waited first.
            let lost = ["missing: rank 2", "missing: rank 3"];
            assert!(lost.iter().any(|rank| ended[0].err.contains(rank)), "{}", ended[0]);
            assert!(ended[1].err.contains("rank 0 (the store that it serves at 10.77."), "{}", ended[1]);
            hosts.mend(1);
        } else {
            let ranks = [running[1].rank(2), running[1].rank(3)];
            let lost = running.remove(1);
            lost.signal(Signal::SIGKILL);
            // With the host all its processes end, whatever their launcher would do.
            ranks.iter().for_each(|rank| {
                let _ = kill(*rank, Signal::SIGKILL);
            });
            ranks.into_iter().for_each(wait_until_gone);
            drop(lost);
            let ended = all_fail(running, within);
            assert!(
                ended[0].err.contains("missing: rank 2") || ended[0].err.contains("missing: rank 3"),
                "{}",
                ended[0]
            );
        }
        assert!(run.step() < 100, "{how}: it came too late");
        train(&hosts, 2, 2, &run, &[MESH, LONG]);
        run.expect_equal(&whole);
    }
}

/// A disk that is full on one host only: no checkpoint is complete then, which is said at each save and is an error on every host at
/// the end. The last complete one stays, and the run goes on from it.
#[test]
fn a_full_disk_of_one_host_ends_all() {
    let words = [MESH, LONG, "checkpoint.every=40"];
    let whole = Run::new("hosts-disk-whole");
    whole.train(4, &[&EXACT[..], &words].concat());
    let Some(hosts) = Hosts::new(2) else { return };
    let run = Run::new("hosts-disk");
    let mut running = start(&hosts, 2, 2, &run, &words);
    running[0].wait_for("some steps", PAUSE, || run.step() >= 7);
    running[0].signal(Signal::SIGTERM);
    running.into_iter().for_each(|host| drop(host.wait().expect_code(143)));
    let config = run.dir.join("config.yaml").display().to_string();
    let saved = run.output().join("checkpoints");
    let before = names(&saved);
    let host = |i: usize| {
        let program = match i {
            0 => hosts.launch(i, 2, &[]),
            _ => hosts.launch_on_small_disk((i, 2), &[], &saved, 24),
        };
        let program = program.args(&["pretrain", "--device", "cpu", "--config", &config]);
        program.args(&EXACT).args(&words).start(&run.dir, &format!("full-{i}"))
    };
    let ended = all_fail((0..2).map(host).collect(), Duration::from_secs(60));
    assert!(
        ended[0].err.contains("No space left on device") && ended[0].err.contains("rank 2"),
        "{}",
        ended[0]
    );
    assert_eq!(names(&saved), before, "the last complete checkpoint stays, and nothing else");
    train(&hosts, 2, 2, &run, &words);
    run.expect_equal(&whole);
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The template for Slurm under a stub of `srun`, which starts its command on both hosts at once, and a stub of `scontrol`.
#[test]
fn the_template_for_slurm_starts_both_nodes() {
    let Some(hosts) = Hosts::new(2) else { return };
    let run = Run::new("hosts-slurm");
    let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/templates/slurm.sbatch");
    let config = run.dir.join("config.yaml").display().to_string();
    let last = "pretrain --config configs/pretrain/llama-1b.yaml";
    let text = std::fs::read_to_string(template).unwrap();
    assert!(text.contains(last), "the template's last command");
    let script = run.dir.join("slurm.sbatch");
    std::fs::write(&script, text.replace(last, &format!("pretrain --device cpu --config {config}"))).unwrap();
    let bin = run.dir.join("bin");
    std::fs::create_dir(&bin).unwrap();
    let stub = |name: &str, text: String| {
        std::fs::write(bin.join(name), format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(bin.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    stub("scontrol", format!("echo \"$@\" >>{}/scontrol.log; echo {}", run.dir.display(), hosts.address(0)));
    // Its own options come first.
    let node =
        |i: usize| format!("SLURM_NODEID={i} ip netns exec {} \"$@\" & pids=\"$pids $!\"; ", hosts.name(i));
    let wait = "code=0; for pid in $pids; do wait $pid || code=$?; done; exit $code";
    stub("srun", format!("while [ \"${{1#--}}\" != \"$1\" ]; do shift; done; {}{}{wait}", node(0), node(1)));
    let programs = launch().parent().unwrap().display().to_string();
    let path = format!("{}:{programs}:{}", bin.display(), std::env::var("PATH").unwrap());
    let job = |name: &str| {
        let program = Program::new("bash").arg(&script).current_dir(&run.dir).env("PATH", &path);
        let program =
            program.env("SLURM_JOB_NODELIST", "a,b").env("SLURM_JOB_ID", "77").env("SLURM_NNODES", "2");
        program.env("SLURM_CPUS_PER_TASK", "1").run(&run.dir, name)
    };
    job("job").expect_code(0);
    assert_eq!(run.step(), 20);
    let log = run.dir.join("logs/77/attempt_0");
    assert!(log.join("rank_0").is_dir() && log.join("rank_1").is_dir(), "both nodes have logs");
    let asked = std::fs::read_to_string(run.dir.join("scontrol.log")).unwrap();
    assert_eq!(asked.trim(), "show hostnames a,b");
}

/// A host that comes late is waited for; one that does not come is named when the time is up.
#[test]
fn a_late_host_is_waited_for() {
    let Some(hosts) = Hosts::new(2) else { return };
    let run = Run::new("hosts-late");
    let config = run.dir.join("config.yaml").display().to_string();
    let host = |i: usize, name: &str| {
        let program = hosts.launch(i, 1, &[]).args(&["pretrain", "--device", "cpu", "--config", &config]);
        program.args(&EXACT).args(&["parallel.timeout_s=8"]).start(&run.dir, name)
    };
    let alone = host(0, "alone").wait().expect_code(1);
    assert!(alone.err.contains("error (rank 0): rank 1 has not joined within 8 s"), "{alone}");
    let first = host(0, "first");
    std::thread::sleep(Duration::from_secs(3));
    let late = host(1, "late");
    for host in [first, late] {
        host.wait().expect_code(0);
    }
    let lone = host(1, "lone").wait().expect_code(1);
    assert!(lone.err.contains("rank 0 does not answer at 10.77."), "{lone}");
}

/// Addresses are not looked up: a name server that does not answer would cost 10 s a connection.
#[test]
fn names_are_not_looked_up() {
    assert!(kernels::process::names_are_numbers());
}
