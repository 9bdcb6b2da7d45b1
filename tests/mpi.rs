//! Runs over MPI: `mpirun -n N corral --backend mpi ...`. In builds with the feature `mpi`.

#![cfg(feature = "mpi")]
#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use nix::sys::signal::Signal;
use testing::compare::largest_relative;
use testing::hosts::Hosts;
use testing::program::{Program, Running, corral, launch};
use testing::ranks::free_port;
use testing::run::Run;
use testing::tolerance::{Quantity, allowed};

/// `corral` with these words on `ranks` ranks, which MPI starts.
fn mpirun(ranks: i64, run: &Run, words: &[&str]) -> Running {
    let words = [&["pretrain", "--device", "cpu", "--backend", "mpi"], words].concat();
    let program =
        Program::new("mpirun").args(&["-n", &ranks.to_string(), "--oversubscribe", "--allow-run-as-root"]);
    let program = program.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &free_port().to_string());
    let config = run.dir.join("config.yaml").display().to_string();
    program.arg(corral()).args(&words).args(&["--config", &config]).start(&run.dir, "mpirun")
}

/// Two ranks have the same bits over MPI and Gloo: sums of two do not depend on their order.
#[test]
fn a_run_over_mpi_is_that_over_gloo() {
    let gloo = Run::new("mpi-gloo");
    gloo.train(2, &["checkpoint.every=10"]);
    let run = Run::new("mpi-run");
    let ended = mpirun(2, &run, &["checkpoint.every=10"]).wait().expect_code(0);
    assert!(ended.err.contains("communication: mpi (ranks on CPU)"), "{ended}");
    run.expect_equal(&gloo);
}

/// Every axis of a mesh over MPI: shards, shared matrices, stages.
#[test]
fn meshes_over_mpi() {
    let whole = Run::new("mpi-whole");
    whole.train(1, &["precision.compute=float64", "train.micro_batch_size=4"]);
    for mesh in ["tensor: 2", "pipeline: 2", "context: 2"] {
        let run = Run::new(&format!("mpi-{}", &mesh[..3]));
        let parallel = format!("parallel={{{mesh}, timeout_s: 60}}");
        let words = ["precision.compute=float64", "train.micro_batch_size=2", &parallel];
        mpirun(4, &run, &words).wait().expect_code(0);
        let apart = largest_relative(&run.numbers("train", "loss"), &whole.numbers("train", "loss"));
        assert!(apart < allowed(Quantity::SameLosses, tch::Kind::Double), "{mesh}: {apart:e}");
    }
}

/// SIGUSR1 to `mpirun` reaches the ranks, which save; the run goes on as if nothing had been.
#[test]
fn a_run_over_mpi_stops_and_goes_on() {
    let words = ["train.steps=300", "checkpoint.every=100", "valid.every=100"];
    let whole = Run::new("mpi-stop-whole");
    whole.train(2, &words);
    let run = Run::new("mpi-stop");
    let mut running = mpirun(2, &run, &words);
    running.wait_for("some steps", Duration::from_millis(2), || run.step() >= 7);
    running.signal(Signal::SIGUSR1);
    let ended = running.wait().expect_code(143);
    assert!(ended.err.contains("stopped by SIGTERM"), "{ended}");
    assert!(run.step() < 300, "it came too late");
    assert_eq!(ended.err.matches("communication: mpi").count(), 1, "one rank prints: {ended}");
    mpirun(2, &run, &words).wait().expect_code(0);
    run.expect_equal(&whole);
}

/// `mpirun` on one host starts ranks on two, which it reaches by a stub of ssh; the run is that of two ranks of one host.
#[test]
fn mpi_starts_ranks_on_two_hosts() {
    let whole = Run::new("mpi-hosts-whole");
    whole.train(2, &[]);
    let Some(hosts) = Hosts::new(2) else { return };
    let run = Run::new("mpi-hosts");
    // Names that MPI looks up; the hosts' name server never answers.
    let names = run.dir.join("hosts");
    let [first, second] = [0, 1].map(|i| hosts.address(i));
    std::fs::write(&names, format!("127.0.0.1 localhost\n{first} node0\n{second} node1\n")).unwrap();
    // MPI tells hosts apart by their names.
    let become_host = |i: usize| format!("mount --bind {} /etc/hosts; hostname node{i}", names.display());
    // As ssh: the host, then what to run there.
    let there = |i: usize| {
        let (address, name, named) = (hosts.address(i), hosts.name(i), become_host(i));
        format!("{address}) exec ip netns exec {name} unshare --uts sh -c \"{named}; $*\";;")
    };
    let agent = run.dir.join("agent");
    let text = format!("#!/bin/sh\nhost=$1; shift\ncase $host in\n{}\n{}\nesac\n", there(0), there(1));
    std::fs::write(&agent, text).unwrap();
    std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755)).unwrap();
    let script = format!(
        "{}; exec mpirun --allow-run-as-root --mca plm_rsh_agent {} --host {first}:1,{second}:1 -n 2 -x \
         CORRAL_RDZV={first}:29600 -x OMP_NUM_THREADS=1 sh -c 'hostname >&2; exec \"$0\" \"$@\"' \"$@\"",
        become_host(0),
        agent.display()
    );
    let config = run.dir.join("config.yaml").display().to_string();
    let shell = hosts.shell(0, "exec unshare --uts sh -c \"$@\"", &[&script, "sh"]).arg(corral());
    let words = ["pretrain", "--device", "cpu", "--backend", "mpi", "--config", &config];
    let ended = shell.args(&words).run(&run.dir, "mpirun").expect_code(0);
    assert!(ended.err.contains("node0") && ended.err.contains("node1"), "ranks on both hosts: {ended}");
    run.expect_equal(&whole);
}

#[test]
fn what_mpi_cannot_start_is_refused() {
    let run = Run::new("mpi-refused");
    let wrong = mpirun(2, &run, &["optim.lr=fast"]).wait();
    assert!(wrong.code == 2 && wrong.err.contains("optim.lr"), "{wrong}");
    let config = run.dir.join("config.yaml").display().to_string();
    let words = ["pretrain", "--device", "cpu", "--config", &config];
    for (name, options, asks) in [
        ("flag", &["--backend", "mpi"][..], &[][..]),
        ("word", &[], &["--backend", "mpi"]),
        ("variable", &[], &[]),
    ] {
        let launched = Program::new(launch()).args(&["--nproc", "2"]).args(options).args(&words).args(asks);
        let launched = if name == "variable" { launched.env("CORRAL_BACKEND", "mpi") } else { launched };
        let ended = launched.run(&run.dir, name);
        assert!(ended.code == 2 && ended.err.contains("MPI starts its ranks itself"), "{name}: {ended}");
    }
    // Ranks of another launcher.
    let port = free_port().to_string();
    let rank = |rank: &str| {
        let program =
            Program::corral(&words).args(&["--backend", "mpi"]).env("RANK", rank).env("WORLD_SIZE", "2");
        program.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port).start(&run.dir, rank)
    };
    for ended in [rank("0"), rank("1")].map(Running::wait) {
        assert!(
            ended.code != 0 && ended.err.contains("start them with mpirun or srun --mpi=pmix"),
            "{ended}"
        );
    }
    assert!(!run.output().exists(), "nothing is begun");
}
