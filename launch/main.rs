//! `launch`: starts `corral SUBCOMMAND ARGS` once per rank, with the environment that torchrun would give it, watches
//! all ranks, and ends or restarts them together. It needs no libtorch and knows nothing of training.
//!
//! Read [`arguments`] for what it is told, [`environment`] for what it tells a rank, [`world`] for how ranks are
//! started, watched and stopped, [`output`] for the way their lines take.

mod arguments;
mod environment;
mod output;
mod world;

use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, LazyLock};

use arguments::{Failure, Plan};
use output::Screen;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};
use world::{Event, Outcome, World};

/// Exit codes that another attempt would not mend: wrong configuration, unusable data, stopped by SIGINT or SIGTERM.
const FINAL_CODES: [u8; 4] = [2, 3, 130, 143];

static SCREEN: LazyLock<Arc<Screen>> = LazyLock::new(|| Arc::new(Screen::new()));

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let outcome = if words.next().is_some_and(|word| word == world::RANK_WORD) {
        Err(world::become_rank(words))
    } else {
        run()
    };
    outcome.unwrap_or_else(|failure| {
        SCREEN.say(&failure.message);
        ExitCode::from(failure.code)
    })
}

/// Attempt after attempt, until the world is done, was stopped, or has failed for good.
fn run() -> Result<ExitCode, Failure> {
    let plan = Plan::from_command_line()?;
    let events = listen_to_signals()?;
    if let Some(reason) = &plan.nproc_reason {
        SCREEN.say(&format!("--nproc auto: {} on this node ({reason})", count(plan.nproc, "rank")));
    }
    let mut attempt = 0;
    loop {
        let world = World::start(&plan, attempt, &events, &SCREEN)?;
        let Outcome { code, interrupted } = world.watch(&plan, &SCREEN);
        let signalled = interrupted || events.signal_pending();
        if code == 0 || signalled || FINAL_CODES.contains(&code) {
            return Ok(ExitCode::from(code));
        }
        if attempt == plan.max_restarts {
            if attempt > 0 {
                SCREEN.say(&format!("failed again after {}; giving up", count(attempt, "restart")));
            }
            return Ok(ExitCode::from(code));
        }
        attempt += 1;
        SCREEN.say(&format!("restart {attempt} of {}", plan.max_restarts));
    }
}

/// Both ends of the one queue on which signals and the ends of ranks arrive, in the order in which they happened.
pub struct Events {
    sender: mpsc::Sender<Event>,
    receiver: Receiver<Event>,
}

impl Events {
    /// True when a signal waits in the queue; takes it out. Only for moments when no rank is running.
    fn signal_pending(&self) -> bool {
        self.receiver.try_iter().any(|event| matches!(event, Event::Signal(_)))
    }
}

fn listen_to_signals() -> Result<Events, Failure> {
    let mut wanted = vec![SIGINT, SIGTERM, SIGQUIT, SIGUSR1];
    if !hangup_is_ignored() {
        wanted.push(SIGHUP);
    }
    // SIGCHLD may have come ignored, and then the kernel would not keep the exit codes of the ranks for us.
    let unignored = signal_hook::flag::register(SIGCHLD, Arc::default());
    let mut signals = unignored
        .and_then(|_| signal_hook::iterator::Signals::new(wanted))
        .map_err(|error| Failure::new(1, format!("cannot handle signals: {error}")))?;
    let (sender, receiver) = mpsc::channel();
    let to_main = sender.clone();
    let listen = move || {
        for signal in signals.forever() {
            if to_main.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .spawn(listen)
        .map_err(|error| Failure::new(1, format!("cannot start a thread: {error}; see ulimit -u")))?;
    Ok(Events { sender, receiver })
}

/// Under `nohup` SIGHUP is ignored, and has to stay so.
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << (SIGHUP - 1)) != 0)
}

/// "1 rank", "3 ranks".
fn count(number: u32, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
