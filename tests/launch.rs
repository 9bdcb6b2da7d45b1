//! `launch` through the real binary. CORRAL_BIN is `env`, so that `launch ... sh -c SCRIPT` makes every rank a shell.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};
use testing::folder::folder;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn launch(options: &[&str], words: &[&str]) -> Command {
    // Under nohup the tests ignore SIGHUP, and so would launch, as it must.
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP").arg(testing::program::launch());
    for inherited in
        ["CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "CORRAL_BACKEND", "CORRAL_TTY", "MASTER_ADDR"]
    {
        command.env_remove(inherited);
    }
    command.env("CORRAL_BIN", "/usr/bin/env").args(options).args(words).stdin(Stdio::null());
    command
}

/// Ranks that run `script`.
fn shells(options: &[&str], script: &str) -> Command {
    launch(options, &["sh", "-c", script])
}

fn run(mut command: Command) -> Output {
    command.output().expect("launch starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn sorted_lines(bytes: &[u8]) -> Vec<String> {
    let mut lines: Vec<_> = text(bytes).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// A `launch` that runs in the background, whose standard output is read line by line.
struct Running {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("launch starts");
        let lines = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, lines }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("readable");
        line.trim_end().to_owned()
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("launch is alive");
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().expect("a process number"))
    }

    /// Exit code, the rest of standard output, standard error.
    fn finish(mut self) -> (Option<i32>, String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        self.lines.read_to_string(&mut out).expect("readable");
        self.child.stderr.take().expect("piped").read_to_string(&mut err).expect("readable");
        (self.child.wait().expect("launch ends").code(), out, err)
    }
}

/// True once the process is gone (or waits to be reaped by somebody else), false if it stays for 10 seconds.
fn disappears(pid: &str) -> bool {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(10) {
        match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) if !stat.contains(") Z ") => std::thread::sleep(Duration::from_millis(20)),
            _ => return true,
        }
    }
    false
}

const SHOW_ENVIRONMENT: &str = "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $NODE_RANK $MASTER_ADDR \
                                $MASTER_PORT $CORRAL_RESTART_COUNT $OMP_NUM_THREADS ${CORRAL_BACKEND-none}";

#[test]
fn ranks_are_told_their_place() {
    let output = run(shells(&["--nproc", "2", "--backend", "gloo"], SHOW_ENVIRONMENT));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let cores = std::thread::available_parallelism().expect("cores").get();
    let lines = sorted_lines(&output.stdout);
    let port = lines[0].split(' ').nth(7).expect("MASTER_PORT").parse::<u16>().expect("a port");
    assert!(port > 0);
    let expected = [0, 1]
        .map(|rank| format!("[{rank}] {rank} {rank} 2 2 0 127.0.0.1 {port} 0 {} gloo", (cores / 2).max(1)));
    assert_eq!(lines, expected);
    assert_eq!(text(&output.stderr), "", "nothing to say");
}

#[test]
fn threads_that_are_set_stay_and_backend_is_left_alone() {
    let mut command = shells(&["--nproc", "2"], "echo $OMP_NUM_THREADS ${CORRAL_BACKEND-none}");
    command.env("OMP_NUM_THREADS", "7");
    assert_eq!(sorted_lines(&run(command).stdout), ["[0] 7 none", "[1] 7 none"]);
}

#[test]
fn words_after_the_subcommand_are_verbatim() {
    let words = ["printf", "<%s>", "--nproc", "3", "-h", "--", "--rdzv=x", "optim.lr=1", "a b", ""];
    let output = run(launch(&["--nproc", "1"], &words));
    assert_eq!(text(&output.stdout), "<--nproc><3><-h><--><--rdzv=x><optim.lr=1><a b><>");
}

#[test]
fn two_nodes_make_one_world() {
    let [first, second] = ["0", "1"].map(|node| {
        let options = ["--nproc", "2", "--nnodes", "2", "--node-rank", node, "--rdzv", "127.0.0.2:29517"];
        Running::start(shells(&options, SHOW_ENVIRONMENT))
    });
    let mut lines = Vec::new();
    for node in [first, second] {
        let (code, out, err) = node.finish();
        assert_eq!(code, Some(0), "{err}");
        lines.extend(sorted_lines(out.as_bytes()));
    }
    let fields: Vec<_> = lines.iter().map(|line| line.rsplitn(3, ' ').last().expect("fields")).collect();
    let expected =
        [0, 1, 2, 3].map(|rank| format!("[{rank}] {rank} {} 4 2 {} 127.0.0.2 29517 0", rank % 2, rank / 2));
    assert_eq!(fields, expected);
}

#[test]
fn auto_counts_visible_gpus() {
    let script = "echo $WORLD_SIZE";
    for (devices, world, reason) in
        [("2,3,5", 3, "3 ranks on this node (3 GPUs by"), ("", 1, "1 rank on this node (no")]
    {
        let mut command = shells(&["--rank-filter", "0"], script);
        command.env("CUDA_VISIBLE_DEVICES", devices);
        let output = run(command);
        let shown = text(&output.stdout);
        assert_eq!(shown.trim_end().trim_start_matches("[0] "), world.to_string(), "{output:?}");
        assert!(text(&output.stderr).contains(reason), "{output:?}");
    }
}

#[test]
fn a_world_of_one_writes_as_it_is() {
    let output = run(shells(&["--nproc", "1"], "printf 'a\\r'; printf 'b' >&2"));
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"a\r"[..], &b"b"[..]));
}

#[test]
fn lines_are_prefixed_and_filtered() {
    let script = "echo out $RANK; echo err $RANK >&2; printf 'no end'";
    let output = run(shells(&["--nproc", "3"], script));
    let expected = ["[0] no end", "[0] out 0", "[1] no end", "[1] out 1", "[2] no end", "[2] out 2"];
    assert_eq!(sorted_lines(&output.stdout), expected);
    assert_eq!(sorted_lines(&output.stderr), ["[0] err 0", "[1] err 1", "[2] err 2"]);
    let output = run(shells(&["--nproc", "3", "--rank-filter", "0,2"], script));
    assert_eq!(sorted_lines(&output.stdout), ["[0] no end", "[0] out 0", "[2] no end", "[2] out 2"]);
    assert_eq!(sorted_lines(&output.stderr), ["[0] err 0", "[2] err 2"]);
}

#[test]
fn logs_hold_the_output_of_every_rank_and_attempt() {
    let dir = folder("logs").join("new");
    let script = "printf 'out %s\\rx' $RANK; echo err $RANK >&2; test $CORRAL_RESTART_COUNT = 1";
    let options =
        ["--nproc", "2", "--rank-filter", "1", "--max-restarts", "1", "--log-dir", &dir.to_string_lossy()];
    let output = run(shells(&options, script));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    for rank in 0..2 {
        let read = |name| {
            let path = dir.join(format!("attempt_1/rank_{rank}/{name}"));
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        assert_eq!(read("stdout.log"), format!("out {rank}\rx"));
        assert_eq!(read("stderr.log"), format!("err {rank}\n"));
    }
    assert!(dir.join("attempt_0/rank_0/stdout.log").is_file());
    assert!(!text(&output.stdout).contains("[0]"), "rank 0 was filtered: {output:?}");
    std::fs::remove_dir_all(dir.parent().expect("the test's folder")).expect("removable");
}

#[test]
fn the_first_failure_ends_all_and_gives_the_code() {
    let script = "if [ $RANK = 1 ]; then echo what went wrong >&2; exit 7; fi
                  trap 'echo terminated; exit 143' TERM; sleep 60 & wait";
    let started = Instant::now();
    let output = run(shells(&["--nproc", "3", "--rank-filter", "0,2"], script));
    assert!(started.elapsed() < Duration::from_secs(9), "the others ended by SIGTERM, not by SIGKILL");
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let err = text(&output.stderr);
    assert!(err.contains("launch: rank 1 (pid "), "{err}");
    assert!(err.contains("failed with exit code 7; stopping the other 2 ranks"), "{err}");
    assert!(err.contains("last lines of rank 1's standard error:\n    what went wrong\n"), "{err}");
    assert_eq!(err.matches("failed with").count(), 1, "only the first failure is reported: {err}");
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed_after_the_grace() {
    let dir = folder("deaf");
    let ready = dir.join("ready");
    let script = format!(
        "if [ $RANK = 1 ]; then until [ -e {0} ]; do sleep 0.02; done; exit 5; fi
         trap '' TERM; touch {0}; while :; do sleep 0.1; done",
        ready.display()
    );
    let output = run(shells(&["--nproc", "2", "--grace", "1"], &script));
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert!(text(&output.stderr).contains("launch: still running after 1 s, killed: rank 0"), "{output:?}");
    std::fs::remove_dir_all(dir).expect("removable");
}

#[test]
fn a_killed_rank_gives_128_and_its_signal() {
    let output = run(shells(&["--nproc", "2"], "[ $RANK = 0 ] && kill -9 $$; sleep 60"));
    assert_eq!(output.status.code(), Some(137), "{output:?}");
    let err = text(&output.stderr);
    assert!(
        err.contains("launch: rank 0 (pid ") && err.contains("was killed by signal 9 (SIGKILL)"),
        "{err}"
    );
}

#[test]
fn what_a_rank_started_ends_with_it() {
    let output = run(shells(&["--nproc", "2"], "sleep 300 & echo $!"));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    for line in sorted_lines(&output.stdout) {
        let pid = line.rsplit(' ').next().expect("a process number");
        assert!(disappears(pid), "{pid} has outlived its rank");
    }
}

#[test]
fn the_world_restarts_as_a_whole() {
    let script = "echo $CORRAL_RESTART_COUNT; [ $RANK = 0 ] && [ $CORRAL_RESTART_COUNT -lt 2 ] && exit 9
                  [ $CORRAL_RESTART_COUNT = 2 ] || sleep 60";
    let output = run(shells(&["--nproc", "2", "--max-restarts", "3"], script));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let lines = sorted_lines(&output.stdout);
    for attempt in 0..3 {
        assert!(lines.contains(&format!("[0] {attempt}")), "{lines:?}");
    }
    assert!(lines.contains(&"[1] 2".into()), "{lines:?}");
    let err = text(&output.stderr);
    assert!(err.contains("launch: restart 2 of 3\n") && !err.contains("restart 3"), "{err}");
}

#[test]
fn restarts_are_counted_and_the_last_code_is_passed_on() {
    let script = "exit $((20 + CORRAL_RESTART_COUNT))";
    let output = run(shells(&["--nproc", "1", "--max-restarts", "2"], script));
    assert_eq!(output.status.code(), Some(22), "{output:?}");
    assert!(text(&output.stderr).contains("failed again after 2 restarts; giving up"), "{output:?}");
}

#[test]
fn a_restart_on_several_nodes_takes_the_next_port() {
    let script = "echo $MASTER_PORT; [ $CORRAL_RESTART_COUNT = 1 ]";
    let options = ["--nproc=1", "--nnodes=2", "--node-rank=1", "--rdzv=127.0.0.2:29400", "--max-restarts=1"];
    let output = run(shells(&options, script));
    assert_eq!(text(&output.stdout), "[1] 29400\n[1] 29401\n", "{output:?}");
}

#[test]
fn final_codes_are_not_restarted() {
    for code in [2, 3, 130, 143] {
        let output = run(shells(&["--nproc", "1", "--max-restarts", "2"], &format!("exit {code}")));
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(!text(&output.stderr).contains("restart"), "{output:?}");
    }
}

/// Ranks that save on SIGINT and SIGTERM, as corral does.
const SAVES: &str = "trap 'sleep 0.3; echo saved after SIGTERM; exit 143' TERM
    trap 'sleep 0.3; echo saved after SIGINT; exit 130' INT
    echo ready; while :; do sleep 0.05; done";

#[test]
fn signals_are_passed_on_and_ranks_may_save() {
    for (sent, name, code) in [
        (Signal::SIGTERM, "SIGTERM", 143),
        (Signal::SIGINT, "SIGINT", 130),
        (Signal::SIGHUP, "SIGTERM", 143),
        (Signal::SIGUSR1, "SIGTERM", 143),
    ] {
        let mut running = Running::start(shells(&["--nproc", "2", "--max-restarts", "2"], SAVES));
        assert!(running.line().ends_with("ready"));
        assert!(running.line().ends_with("ready"));
        running.signal(sent);
        let (exit, out, err) = running.finish();
        assert_eq!(exit, Some(code), "{err}");
        let expected = [0, 1].map(|rank| format!("[{rank}] saved after {name}"));
        assert_eq!(sorted_lines(out.as_bytes()), expected, "{err}");
        assert!(err.contains(&format!("launch: {sent}: passed on")), "{err}");
        assert!(!err.contains("rank 0") && !err.contains("rank 1") && !err.contains("restart"), "{err}");
    }
}

#[test]
fn a_failure_while_stopping_is_a_failure() {
    let script = "trap 'echo disk full >&2; exit 1' TERM; echo ready; while :; do sleep 0.05; done";
    let mut running =
        Running::start(shells(&["--nproc", "1", "--log-dir", &folder("full").to_string_lossy()], script));
    assert_eq!(running.line(), "ready");
    running.signal(Signal::SIGTERM);
    let (exit, _, err) = running.finish();
    assert_eq!(exit, Some(1), "{err}");
    assert!(err.contains("rank 0 (pid ") && err.contains("\n    disk full\n"), "{err}");
    std::fs::remove_dir_all(folder("full")).expect("removable");
}

#[test]
fn a_failure_counts_even_after_a_rank_that_has_stopped() {
    let script = "trap 'if [ $RANK = 0 ]; then exit 143; fi; sleep 0.5; exit 6' TERM
                  echo ready; while :; do sleep 0.05; done";
    let mut running = Running::start(shells(&["--nproc", "2"], script));
    assert!(running.line().ends_with("ready"));
    assert!(running.line().ends_with("ready"));
    running.signal(Signal::SIGTERM);
    let (exit, _, err) = running.finish();
    assert_eq!(exit, Some(6), "{err}");
    assert!(err.contains("launch: rank 1 (pid ") && err.contains("failed with exit code 6\n"), "{err}");
}

#[test]
fn a_second_signal_kills() {
    let script = "trap 'echo deaf' INT; echo ready; while :; do sleep 0.05; done";
    let mut running = Running::start(shells(&["--nproc", "2"], script));
    assert!(running.line().ends_with("ready"));
    assert!(running.line().ends_with("ready"));
    running.signal(Signal::SIGINT);
    assert!(running.line().ends_with("deaf"));
    assert!(running.line().ends_with("deaf"));
    running.signal(Signal::SIGINT);
    let (exit, _, err) = running.finish();
    assert_eq!(exit, Some(130), "{err}");
    assert!(err.contains("launch: SIGINT again: ranks killed"), "{err}");
}

#[test]
fn ranks_do_not_outlive_a_killed_launch() {
    let mut running = Running::start(shells(&["--nproc", "2"], "echo $$; exec sleep 300"));
    let pids = [running.line(), running.line()];
    running.signal(Signal::SIGKILL);
    let _ = running.child.wait();
    for line in pids {
        let pid = line.rsplit(' ').next().expect("a process number");
        assert!(disappears(pid), "rank {pid} has outlived launch");
    }
}

#[test]
fn a_closed_output_stops_nobody() {
    let dir = folder("closed");
    let done = dir.join("done");
    let script = format!(
        "echo ready; sleep 0.3; for i in $(seq 2000); do echo $i; echo $i >&2; done; touch {}",
        done.display()
    );
    let mut running = Running::start(shells(&["--nproc", "2"], &script));
    assert!(running.line().ends_with("ready"));
    drop(running.lines);
    drop(running.child.stderr.take());
    assert_eq!(running.child.wait().expect("launch ends").code(), Some(0));
    assert!(done.is_file());
    std::fs::remove_dir_all(dir).expect("removable");
}

#[test]
fn an_ignored_sigchld_is_no_trouble() {
    // A shell cannot hand an ignored SIGCHLD to its children, `env` can.
    let mut command = Command::new("/usr/bin/env");
    command.arg("--ignore-signal=CHLD").arg(testing::program::launch());
    command.args(["--nproc", "2", "sh", "-c", "exit 4"]);
    command.env("CORRAL_BIN", "/usr/bin/env");
    let output = run(command);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
}

#[test]
fn what_is_wrong_is_refused_with_code_2() {
    let file = folder("refused").join("file");
    std::fs::write(&file, "").expect("writable");
    let inside_file = file.join("logs");
    let inside_file = inside_file.to_string_lossy();
    let cases: &[(&[&str], &str)] = &[
        (&["--nproc", "0"], "number from 1 to 1024, or auto"),
        (&["--nproc", "many"], "number from 1 to 1024, or auto"),
        (&["--nnodes", "2"], "--nnodes 2 needs --rdzv HOST:PORT"),
        (&["--nnodes", "2", "--rdzv", "node0:29500"], "--nnodes 2 needs --node-rank I"),
        (&["--nnodes", "2", "--rdzv", "node0", "--node-rank", "0"], "expected HOST:PORT"),
        (&["--nnodes", "2", "--rdzv", "node0:29500", "--node-rank", "2"], "--node-rank 2 does not exist"),
        (&["--node-rank", "1"], "--node-rank 1 does not exist with --nnodes 1"),
        (&["--rdzv", "node0:65530", "--max-restarts", "9"], "take a lower --rdzv port"),
        (&["--backend", "mpi"], "MPI starts its ranks itself"),
        (&["--backend", "smoke"], "possible values: nccl, gloo, mpi, auto"),
        (&["--nproc", "2", "--rank-filter", "0,2"], "rank 2 does not exist in a world of 2"),
        (&["--log-dir", &inside_file], "--log-dir: cannot create"),
        (&["--no-such-option"], "--no-such-option"),
    ];
    for (options, message) in cases {
        let output = run(shells(options, "echo started"));
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{options:?}: {err}");
        assert!(err.contains(message), "{options:?}: {err}");
        assert!(output.stdout.is_empty(), "{options:?} started something");
    }
    assert_eq!(run(launch(&["--nproc", "2"], &[])).status.code(), Some(2), "no subcommand");
    let mut command = shells(&[], "echo started");
    command.env("CORRAL_BIN", &file);
    let output = run(command);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(text(&output.stderr).contains("is not a program"), "{output:?}");
    std::fs::remove_dir_all(folder("refused")).expect("removable");
}

#[test]
fn help_shows_the_options() {
    let output = run(launch(&["--help"], &[]));
    assert_eq!(output.status.code(), Some(0));
    let help = text(&output.stdout);
    for option in
        ["--nproc", "--rdzv", "--max-restarts", "--rank-filter", "--log-dir", "--grace", "--backend"]
    {
        assert!(help.contains(option), "{help}");
    }
}
