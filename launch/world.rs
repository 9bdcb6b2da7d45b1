//! One attempt: all ranks of this node, started together, watched together, ended together.

use std::cell::Cell;
use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt, parent_id};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use signal_hook::consts::SIGINT;

use crate::Events;
use crate::arguments::{Failure, Plan, Rendezvous};
use crate::environment;
use crate::output::{Capture, Route, Screen};

/// First word of the command line on which `launch` starts itself as a rank: see [`become_rank`].
pub const RANK_WORD: &str = "__rank";

/// How long the last words of a dead rank are waited for where another process holds its pipe open.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub enum Event {
    /// The rank with this local rank has ended and is to be reaped.
    Ended(u32),
    /// `launch` got this signal.
    Signal(i32),
}

/// How an attempt ended.
pub struct Outcome {
    /// 0, or the exit code of the first rank that failed.
    pub code: u8,
    /// A signal came to `launch` meanwhile.
    pub interrupted: bool,
}

pub struct World<'a> {
    ranks: Vec<Rank>,
    attempt: u32,
    events: &'a Events,
}

struct Rank {
    rank: u32,
    child: Child,
    /// Leader of a process group of its own, so that what the rank has started ends with it; but one that talks is in `launch`'s, whose
    /// terminal it reads.
    group: Pid,
    talks: bool,
    running: bool,
    capture: Option<Capture>,
}

impl Rank {
    /// A signal to the whole process group. Safe against reuse of the number: until it is reaped, the rank holds it.
    fn signal(&self, signal: Signal) {
        if self.running {
            // Fails only where the group is gone already, and then nothing is left to do.
            let _ = if self.talks { kill(self.group, signal) } else { killpg(self.group, signal) };
        }
    }

    /// Reaps a rank that has ended, and ends what it left behind in its group.
    fn reap(&mut self) -> ExitStatus {
        self.signal(Signal::SIGKILL);
        self.running = false;
        self.child.wait().expect("a child that nobody else reaps")
    }
}

impl<'a> World<'a> {
    /// Starts all ranks of this node. Where one cannot be started, those that were are killed.
    pub fn start(
        plan: &Plan,
        attempt: u32,
        events: &'a Events,
        screen: &Arc<Screen>,
    ) -> Result<Self, Failure> {
        let meet = environment::rendezvous(plan, attempt)?;
        let mut world = World { ranks: Vec::with_capacity(plan.nproc as usize), attempt, events };
        for local in 0..plan.nproc {
            let rank = plan.node_rank * plan.nproc + local;
            if let Err(error) = world.start_rank(plan, &meet, local, screen) {
                for rank in &mut world.ranks {
                    rank.reap();
                }
                return Err(Failure::new(1, format!("cannot start rank {rank}: {error}")));
            }
        }
        Ok(world)
    }

    fn start_rank(
        &mut self,
        plan: &Plan,
        meet: &Rendezvous,
        local: u32,
        screen: &Arc<Screen>,
    ) -> std::io::Result<()> {
        let rank = plan.node_rank * plan.nproc + local;
        let talks = plan.talks(rank);
        let captured = plan.captures_output() && !talks;
        let bar = captured && rank == 0 && screen.live && plan.shows(rank);
        // The link leads to this very program even after its file was replaced.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("launch").args([RANK_WORD, &std::process::id().to_string()]);
        command.arg(&plan.program).args(&plan.words);
        if !talks {
            command.process_group(0).stdin(Stdio::null());
        }
        environment::describe_rank(&mut command, plan, meet, local, self.attempt, bar);
        let mut log_dir = None;
        if captured {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            if let Some(dir) = &plan.log_dir {
                let dir = rank_log_dir(dir, self.attempt, rank);
                std::fs::create_dir_all(&dir)?;
                log_dir = Some(dir);
            }
        }
        let mut child = command.spawn()?;
        let pipes = child.stdout.take().zip(child.stderr.take());
        let number = i32::try_from(child.id()).map_err(std::io::Error::other)?;
        let group = Pid::from_raw(number);
        self.ranks.push(Rank { rank, child, group, talks, running: true, capture: None });
        if let (Some((out, err)), Some(entry)) = (pipes, self.ranks.last_mut()) {
            let prefix = if plan.world_size() > 1 { format!("[{rank}] ") } else { String::new() };
            let route = Route { shown: plan.shows(rank), prefix, bar, log_dir };
            entry.capture = Some(Capture::start(out, err, route, screen)?);
        }
        let sender = self.events.sender.clone();
        std::thread::Builder::new().spawn(move || {
            // Waits without reaping, so that the main thread alone decides when the number becomes free.
            while waitid(Id::Pid(group), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR) {}
            // Without a receiver nobody watches any more.
            let _ = sender.send(Event::Ended(local));
        })?;
        Ok(())
    }

    /// Until every rank has ended. The first failure ends the others: SIGTERM at once, SIGKILL after the grace. A
    /// signal to `launch` is passed on and the ranks may take their time; a second one kills them.
    pub fn watch(mut self, plan: &Plan, screen: &Screen) -> Outcome {
        let mut failed = None; // exit code of the first rank that failed
        let mut stopped = None; // exit code that a signal to `launch` has led to
        let mut passed_on: Option<Signal> = None;
        let mut killed = false; // by a second signal
        let mut kill_at: Option<Instant> = None;
        while self.running() > 0 {
            let event = match kill_at {
                None => self.events.receiver.recv().map_err(RecvTimeoutError::from),
                Some(at) => self.events.receiver.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match event {
                Ok(Event::Ended(local)) => {
                    let status = self.ranks[local as usize].reap();
                    let code = exit_code(status);
                    if passed_on.is_some_and(|signal| code == signal_code(signal)) {
                        stopped = stopped.or(Some(code));
                    } else if code != 0 && failed.is_none() && !killed {
                        failed = Some(code);
                        if passed_on.is_none() {
                            self.signal(Signal::SIGTERM);
                        }
                        kill_at = Some(Instant::now() + plan.grace);
                        self.report(local, status, plan, screen);
                    }
                }
                // At a terminal who talks gets it, too, and stops an answer.
                Ok(Event::Signal(SIGINT)) if self.ranks.iter().any(|rank| rank.talks) => {}
                Ok(Event::Signal(number)) => {
                    let received = Signal::try_from(number).unwrap_or(Signal::SIGTERM);
                    // The end of the terminal, and a site's early notice, ask for the same as SIGTERM.
                    let signal = match received {
                        Signal::SIGHUP | Signal::SIGUSR1 => Signal::SIGTERM,
                        other => other,
                    };
                    if passed_on.is_none() {
                        passed_on = Some(signal);
                        self.signal(signal);
                        screen.say(&format!(
                            "{received}: passed on, waiting for the ranks to finish their step and save; again to kill"
                        ));
                    } else {
                        killed = true;
                        stopped = Some(signal_code(signal));
                        self.signal(Signal::SIGKILL);
                        screen.say(&format!("{received} again: ranks killed"));
                    }
                }
                Err(_) => {
                    let left =
                        self.ranks.iter().filter(|rank| rank.running).map(|rank| rank.rank.to_string());
                    let left = left.collect::<Vec<_>>().join(", ");
                    let grace = plan.grace.as_secs();
                    screen.say(&format!("still running after {grace} s, killed: rank {left}"));
                    self.signal(Signal::SIGKILL);
                    kill_at = None;
                }
            }
        }
        let signalled = Cell::new(passed_on.is_some());
        for capture in self.ranks.iter().filter_map(|rank| rank.capture.as_ref()) {
            capture.finish(LAST_WORDS, || {
                signalled.set(signalled.get() | self.events.signal_pending());
                signalled.get()
            });
        }
        Outcome { code: failed.or(stopped).unwrap_or(0), interrupted: signalled.get() }
    }

    fn running(&self) -> usize {
        self.ranks.iter().filter(|rank| rank.running).count()
    }

    fn signal(&self, signal: Signal) {
        self.ranks.iter().for_each(|rank| rank.signal(signal));
    }

    /// Says which rank failed first and how, and its last lines.
    fn report(&self, local: u32, status: ExitStatus, plan: &Plan, screen: &Screen) {
        let Rank { rank, group, capture, .. } = &self.ranks[local as usize];
        let mut text = format!("rank {rank} (pid {group}) {}", describe(status));
        match self.running() {
            0 => {}
            1 => text += "; stopping the other rank",
            others => text += &format!("; stopping the other {others} ranks"),
        }
        if let Some(capture) = capture {
            capture.finish(LAST_WORDS, || true);
            let lines = capture.last_lines();
            // One line of error, which has just been shown, needs no second showing.
            let told = plan.shows(*rank) && matches!(status.code(), Some(2 | 3));
            if !lines.is_empty() && !told {
                text += &format!("\nlaunch: the last lines of rank {rank}'s standard error:");
                lines.iter().for_each(|line| text += &format!("\n    {line}"));
            }
        }
        if let Some(dir) = &plan.log_dir {
            text +=
                &format!("\nlaunch: all of its output: {}", rank_log_dir(dir, self.attempt, *rank).display());
        }
        screen.say(&text);
    }
}

fn rank_log_dir(dir: &Path, attempt: u32, rank: u32) -> PathBuf {
    dir.join(format!("attempt_{attempt}")).join(format!("rank_{rank}"))
}

fn signal_code(signal: Signal) -> u8 {
    128 + signal as u8
}

/// As a shell tells it: the exit code, or 128 + N when signal N killed the process.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|number| 128 + number));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

fn describe(status: ExitStatus) -> String {
    let Some(number) = status.signal() else {
        return match exit_code(status) {
            code @ 130 => format!("was stopped by SIGINT (exit code {code})"),
            code @ 143 => format!("was stopped by SIGTERM (exit code {code})"),
            code => format!("failed with exit code {code}"),
        };
    };
    match Signal::try_from(number) {
        Ok(Signal::SIGKILL) => {
            format!("was killed by signal {number} (SIGKILL); `dmesg` shows whether memory ran out")
        }
        Ok(signal) => format!("was killed by signal {number} ({signal})"),
        Err(_) => format!("was killed by signal {number}"),
    }
}

/// The first moments of a rank, still in `launch`'s program: asks the kernel for SIGTERM when `launch` dies, of
/// SIGKILL for example, then becomes `program` with `words`. Returns only where that fails.
pub fn become_rank(mut words: impl Iterator<Item = OsString>) -> Failure {
    let launcher = words.next().and_then(|word| word.into_string().ok()).and_then(|word| word.parse().ok());
    let (Some(launcher), Some(program)) = (launcher, words.next()) else {
        return Failure::new(2, format!("{RANK_WORD} is for launch itself"));
    };
    if let Err(error) = set_pdeathsig(Signal::SIGTERM) {
        return Failure::new(1, format!("cannot tie a rank to launch: {error}"));
    }
    if parent_id() != launcher {
        return Failure::new(1, "launch ended before its ranks had started");
    }
    let error = Command::new(&program).args(words).exec();
    Failure::new(2, format!("cannot start {}: {error}", program.display()))
}
