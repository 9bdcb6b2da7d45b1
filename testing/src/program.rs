//! Runs of `corral` and `launch`, each with a time limit, so that a hang is a failure that shows its output.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::folder::programs;

/// Far more than any of these programs takes, also on a machine that does other work.
const TIME_LIMIT: Duration = Duration::from_secs(180);

/// The program `corral`.
pub fn corral() -> PathBuf {
    programs().join("corral")
}

/// The program `launch`.
pub fn launch() -> PathBuf {
    programs().join("launch")
}

/// A program to run, away from what the environment of the tests may ask of it.
pub struct Program(Command);

impl Program {
    pub fn new(program: impl AsRef<OsStr>) -> Program {
        let mut command = Command::new(program);
        for inherited in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CORRAL_BACKEND", "CORRAL_BIN"]
        {
            command.env_remove(inherited);
        }
        // One thread a rank; no GPU, where there is one, so that all machines test the same.
        command.env("OMP_NUM_THREADS", "1").env("CUDA_VISIBLE_DEVICES", "");
        // A wish for backtraces is one for panics of the tests.
        command.env_remove("RUST_BACKTRACE").stdin(Stdio::null());
        Program(command)
    }

    pub fn corral(words: &[&str]) -> Program {
        let mut program = Program::new(corral());
        program.0.args(["--device", "cpu"]).args(words);
        program
    }

    pub fn arg(mut self, word: impl Into<OsString>) -> Program {
        self.0.arg(word.into());
        self
    }

    pub fn args(mut self, words: &[&str]) -> Program {
        self.0.args(words);
        self
    }

    /// Where it runs; else in the folder of the tests.
    pub fn current_dir(mut self, dir: &Path) -> Program {
        self.0.current_dir(dir);
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Program {
        self.0.env(name, value);
        self
    }

    /// Starts it; its output goes to `dir/NAME.{out,err}`.
    pub fn start(mut self, dir: &Path, name: &str) -> Running {
        let (out, err) = (dir.join(format!("{name}.out")), dir.join(format!("{name}.err")));
        let child = self
            .0
            .stdout(File::create(&out).expect("a file for its output"))
            .stderr(File::create(&err).expect("a file for its output"))
            .spawn()
            .expect("the program starts");
        Running { what: format!("{:?}", self.0), child, out, err, ended: None, started: Instant::now() }
    }

    pub fn run(self, dir: &Path, name: &str) -> Ended {
        self.start(dir, name).wait()
    }
}

/// A program that runs; killed when it is dropped.
pub struct Running {
    what: String,
    child: Child,
    out: PathBuf,
    err: PathBuf,
    ended: Option<ExitStatus>,
    started: Instant,
}

impl Running {
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it is there until it is waited for");
    }

    pub fn has_ended(&mut self) -> bool {
        self.ended = self.ended.or_else(|| self.child.try_wait().expect("a child"));
        self.ended.is_some()
    }

    /// Waits until `condition` holds, looking every `pause`; it must come before the end of the program.
    pub fn wait_for(&mut self, what: &str, pause: Duration, mut condition: impl FnMut() -> bool) {
        while !condition() {
            assert!(!self.has_ended(), "ended before {what}\n{}", self.story());
            self.check_time(what);
            std::thread::sleep(pause);
        }
    }

    pub fn wait(mut self) -> Ended {
        while !self.has_ended() {
            self.check_time("its end");
            std::thread::sleep(Duration::from_millis(5));
        }
        use std::os::unix::process::ExitStatusExt;
        let status = self.ended.expect("ended");
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).expect("a code");
        Ended { what: self.what.clone(), code, out: read(&self.out), err: read(&self.err) }
    }

    fn check_time(&mut self, what: &str) {
        if self.started.elapsed() > TIME_LIMIT {
            let _ = self.child.kill();
            panic!("no sign of {what} within {TIME_LIMIT:?}\n{}", self.story());
        }
    }

    fn story(&self) -> String {
        format!("{}\n{}{}", self.what, read(&self.out), read(&self.err))
    }

    /// The process of a rank of this `launch`.
    pub fn rank(&mut self, rank: usize) -> Pid {
        let (launch, mut found) = (self.pid().to_string(), None);
        self.wait_for("the start of a rank", Duration::from_millis(2), || {
            found = processes().find(|pid| {
                let of = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
                let stat = String::from_utf8_lossy(&of("stat")).into_owned();
                let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
                let variable = format!("RANK={rank}");
                parent == Some(launch.as_str())
                    && of("comm") == b"corral\n"
                    && of("environ").split(|byte| *byte == 0).any(|v| v == variable.as_bytes())
            });
            found.is_some()
        });
        Pid::from_raw(found.expect("found above"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // SIGTERM first: a killed `launch` could not end its ranks.
            let _ = kill(self.pid(), Signal::SIGTERM);
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Waits until a process that is not our child is gone.
pub fn wait_until_gone(pid: Pid) {
    let started = Instant::now();
    while fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(started.elapsed() < TIME_LIMIT, "process {pid} stays");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a program left.
pub struct Ended {
    what: String,
    /// As a shell tells it: 128 + N where signal N ended it.
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ended {
    pub fn expect_code(self, code: i32) -> Ended {
        assert_eq!(self.code, code, "{self}");
        assert!(!self.err.contains("panicked") && !self.err.contains("internal error"), "{self}");
        assert!(!self.err.contains("stack backtrace") && !self.err.contains("frame #"), "{self}");
        self
    }

    /// Ended with `code` and exactly one line of error, which holds all of `parts`.
    pub fn expect_error(self, code: i32, parts: &[&str]) -> Ended {
        let ended = self.expect_code(code);
        let errors: Vec<_> = ended.err.lines().filter(|l| l.starts_with("error")).collect();
        assert_eq!(errors.len(), 1, "one line of error\n{ended}");
        for part in parts {
            assert!(errors[0].contains(part), "`{part}` is not in the error\n{ended}");
        }
        ended
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} ended with {}\n{}{}", self.what, self.code, self.out, self.err)
    }
}

pub(crate) fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
