//! Ranks on this machine: threads of this process.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kernels::comm::{Backend, Group, Store};
use kernels::watch::Watch;
use tch::Device;

const TIMEOUT: Duration = Duration::from_secs(30);

/// Runs `f` on `n` ranks, threads of this process on the CPU; returns what they return, by rank. A single rank needs no
/// thread and has a group that sends nothing.
pub fn on_ranks<T: Send>(n: i64, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    match n {
        1 => vec![f(Group::solo())],
        _ => on_ranks_with_groups(n, |group, _| f(group)),
    }
}

/// [`on_ranks`] where `f` can also make groups of some of the (at least two) ranks, by name.
pub fn on_ranks_with_groups<T: Send>(
    n: i64,
    f: impl Fn(Group, &dyn Fn(&str, &[i64]) -> Group) -> T + Sync,
) -> Vec<T> {
    let server = Store::tcp("127.0.0.1", 0, true, TIMEOUT).unwrap();
    let stores: Vec<Store> = (0..n).map(|_| server.reconnect().unwrap()).collect();
    let ranks: Vec<i64> = (0..n).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = stores
            .into_iter()
            .enumerate()
            .map(|(rank, store)| {
                let (ranks, f) = (&ranks, &f);
                scope.spawn(move || {
                    let watch = Watch::start(store, rank as i64, n, rank == 0).unwrap();
                    let group = |name: &str, ranks: &[i64]| {
                        Group::new(&watch, Backend::Gloo, name, ranks, TIMEOUT, Device::Cpu).unwrap()
                    };
                    f(group("world", ranks), &group)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// A port that no program listens on: none of those that the system gives to sockets which ask for any, such as Gloo's, and which might
/// be taken before it is used.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let (first, ports) = (10_000, 20_000);
    loop {
        let number = std::process::id().wrapping_mul(101) + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = (first + number % ports) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Starts this test's program once more as a rank: its test `as_rank`, with the variables that `launch` sets and `more`.
pub fn start_as_rank(rank: i64, world_size: i64, port: u16, more: &[(&str, &str)]) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["as_rank", "--exact", "--nocapture"])
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", world_size.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string())
        .env("OMP_NUM_THREADS", "1")
        .envs(more.iter().copied())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// `mpirun` for `n` ranks on this machine, as root too and on fewer cores; what to start, and with which arguments, is left to add.
pub fn mpirun(n: i64) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["-n", &n.to_string(), "--oversubscribe", "--allow-run-as-root"])
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", free_port().to_string())
        .env("OMP_NUM_THREADS", "1")
        .env("CORRAL_BACKEND", "mpi");
    command
}
