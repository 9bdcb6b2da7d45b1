//! What the system allows a process, checked at its start: libraries end the process where a thread cannot be started, and wait
//! for ever where a connection cannot be opened.

use std::sync::{Arc, RwLock};
use std::thread::Builder;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::error::{Error, Result};

/// Threads of one rank besides those that compute: for signals, saving, the run's lock, reading.
const THREADS: usize = 8;
/// The store's, the watch's, and those of process groups.
const THREADS_OF_GROUPS: usize = 16;
/// Bytes of a thread's stack that only waits.
const STACK: usize = 64 << 10;

/// Refuses to start where `threads` threads to compute with, and those that a rank of `ranks` needs besides, cannot be started,
/// or too few files may be open.
pub fn check(threads: usize, ranks: i64) -> Result<()> {
    let groups = if ranks > 1 { THREADS_OF_GROUPS } else { 0 };
    check_threads(2 * threads + THREADS + groups)?;
    check_files(24 + 8 * ranks as u64)
}

fn check_threads(wanted: usize) -> Result<()> {
    let gate = Arc::new(RwLock::new(()));
    let closed = gate.write();
    let wait = || {
        let gate = gate.clone();
        Builder::new().stack_size(STACK).spawn(move || drop(gate.read()))
    };
    let started: Vec<_> = (0..wanted).map(|_| wait()).take_while(Result::is_ok).collect();
    drop(closed);
    let count = started.len();
    for thread in started.into_iter().flatten() {
        // It only waits: it cannot fail.
        let _ = thread.join();
    }
    match count == wanted {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "the system allows {count} more threads, and this command may need {wanted}: raise the limit of processes (ulimit -u, \
             or pids.max of the container), or compute with fewer --threads"
        ))),
    }
}

/// Raises the limit of open files as far as is allowed.
fn check_files(wanted: u64) -> Result<()> {
    let error = |e: nix::Error| Error::failed(format!("the limit of open files: {}", e.desc()));
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(error)?;
    if soft < hard {
        // Where the hard limit is more than the kernel takes the soft one stays.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).map_err(error)?;
    match soft >= wanted {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "the system allows {soft} open files, and this command may need {wanted}: raise the limit (ulimit -n)"
        ))),
    }
}

/// The cores that one of the `ranks` of this host computes with: those that its launcher has bound it to, else its share of all.
pub fn own_cores(ranks: usize) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let bound = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).map(str::trim);
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok()?;
    let cores = std::thread::available_parallelism().ok()?.get();
    Some(if bound == Some(online.trim()) { (cores / ranks.max(1)).max(1) } else { cores })
}
