//! Runs over MPI: `mpirun -n N corral --backend mpi ...`. In builds with the feature `mpi`.

#![cfg(feature = "mpi")]
#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::time::Duration;

use nix::sys::signal::Signal;
use testing::compare::largest_relative;
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

/// SIGTERM to `mpirun` reaches the ranks, which save; the run goes on as if nothing had been.
#[test]
fn a_run_over_mpi_stops_and_goes_on() {
    // `mpirun` takes two seconds to pass a signal on.
    let words = ["train.steps=500", "checkpoint.every=250", "valid.every=250"];
    let whole = Run::new("mpi-stop-whole");
    whole.train(2, &words);
    let run = Run::new("mpi-stop");
    let mut running = mpirun(2, &run, &words);
    running.wait_for("some steps", Duration::from_millis(2), || run.step() >= 7);
    running.signal(Signal::SIGTERM);
    let ended = running.wait();
    assert!(ended.code != 0 && ended.err.contains("stopped by SIGTERM"), "{ended}");
    assert!(run.step() < 500, "it came too late");
    assert_eq!(ended.err.matches("communication: mpi").count(), 1, "one rank prints: {ended}");
    mpirun(2, &run, &words).wait().expect_code(0);
    run.expect_equal(&whole);
}

#[test]
fn what_mpi_cannot_start_is_refused() {
    let run = Run::new("mpi-refused");
    let wrong = mpirun(2, &run, &["optim.lr=fast"]).wait();
    assert!(wrong.code == 2 && wrong.err.contains("optim.lr"), "{wrong}");
    let config = run.dir.join("config.yaml").display().to_string();
    let words = ["--nproc", "2", "pretrain", "--device", "cpu", "--config", &config];
    let alone = Program::new(launch()).args(&words).env("CORRAL_BACKEND", "mpi").run(&run.dir, "launch");
    assert!(alone.code != 0 && alone.err.contains("start them with mpirun or srun --mpi=pmix"), "{alone}");
    assert!(!run.output().exists(), "nothing is begun");
}
