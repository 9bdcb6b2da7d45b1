//! What a rank is told, and what is found out about this machine for it: the program, the GPUs, the cores, a port.

use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

use crate::arguments::{Failure, Plan, Rendezvous};

/// Tells the one rank that may draw a progress bar that its standard error ends on a terminal. It draws by lines that
/// end in a carriage return; a blank one takes the bar away.
const TTY: &str = "CORRAL_TTY";

/// A variable of this process's environment; one that is set and empty is there: CUDA reads it as a list of no devices.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
pub fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

/// `$CORRAL_BIN`, else `corral` beside this executable, else in PATH.
pub fn find_corral() -> Result<PathBuf, Failure> {
    if let Some(program) = variable("CORRAL_BIN").map(PathBuf::from) {
        return match is_program(&program) {
            true => Ok(program),
            false => Err(Failure::new(2, format!("CORRAL_BIN: {} is not a program", program.display()))),
        };
    }
    let beside = std::env::current_exe().ok().and_then(|launch| Some(launch.parent()?.to_path_buf()));
    let path = variable("PATH").unwrap_or_default();
    let candidates =
        beside.into_iter().chain(std::env::split_paths(&path)).map(|folder| folder.join("corral"));
    candidates.into_iter().find(|program| is_program(program)).ok_or_else(|| {
        Failure::new(
            2,
            "no `corral` next to `launch` or in PATH: install both into one folder, or set CORRAL_BIN",
        )
    })
}

fn is_program(path: &Path) -> bool {
    path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
}

/// Ranks for `--nproc auto`, and why: the entries of CUDA_VISIBLE_DEVICES, else the GPUs that the NVIDIA driver
/// lists, at least 1.
pub fn visible_gpus() -> (u32, String) {
    let (gpus, source) = match variable("CUDA_VISIBLE_DEVICES").and_then(|list| list.into_string().ok()) {
        Some(devices) => (named_devices(&devices), "CUDA_VISIBLE_DEVICES"),
        None => {
            let listed = std::fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, |entries| entries.count());
            (u32::try_from(listed).unwrap_or(u32::MAX), "/proc/driver/nvidia/gpus")
        }
    };
    match gpus {
        0 => (1, format!("no NVIDIA GPU by {source}")),
        _ => (gpus, format!("{} by {source}", crate::count(gpus, "GPU"))),
    }
}

/// As CUDA reads the list: indices and UUIDs, up to the first entry that is neither.
fn named_devices(list: &str) -> u32 {
    let names_device = |entry: &&str| {
        ["GPU-", "MIG-"].iter().any(|kind| entry.starts_with(kind)) || entry.parse::<u32>().is_ok()
    };
    u32::try_from(list.split(',').map(str::trim).take_while(names_device).count()).unwrap_or(u32::MAX)
}

/// Where the ranks of this attempt meet. On several nodes every launcher sees the failure of the world through its
/// own ranks and restarts by itself; PORT + attempt keeps a rank of one attempt from joining the store of another.
pub fn rendezvous(plan: &Plan, attempt: u32) -> Result<Rendezvous, Failure> {
    if let Some(Rendezvous { host, port }) = &plan.rendezvous {
        let port = u16::try_from(u32::from(*port) + attempt)
            .map_err(|_| Failure::new(2, format!("no port {port} + {attempt} for this restart")))?;
        return Ok(Rendezvous { host: host.clone(), port });
    }
    // The system picks a port that nobody has; rank 0 takes it over some milliseconds later.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    let port = port.map_err(|error| Failure::new(1, format!("no free port on 127.0.0.1: {error}")))?.port();
    Ok(Rendezvous { host: Ipv4Addr::LOCALHOST.to_string(), port })
}

/// Sets the variables of local rank `local`.
pub fn describe_rank(
    command: &mut Command,
    plan: &Plan,
    meet: &Rendezvous,
    local: u32,
    attempt: u32,
    bar: bool,
) {
    let numbers = [
        ("RANK", plan.node_rank * plan.nproc + local),
        ("LOCAL_RANK", local),
        ("WORLD_SIZE", plan.world_size()),
        ("LOCAL_WORLD_SIZE", plan.nproc),
        ("NODE_RANK", plan.node_rank),
        ("MASTER_PORT", meet.port.into()),
        ("CORRAL_RESTART_COUNT", attempt),
    ];
    command.envs(numbers.map(|(name, number)| (name, number.to_string()))).env("MASTER_ADDR", &meet.host);
    // An agent of torchrun, should one have started us, owns no store of this world.
    command.env_remove("TORCHELASTIC_USE_AGENT_STORE");
    if let Some(backend) = &plan.backend {
        command.env("CORRAL_BACKEND", backend);
    }
    if variable("OMP_NUM_THREADS").is_none() {
        command.env("OMP_NUM_THREADS", threads_per_rank(plan.nproc).to_string());
    }
    match bar {
        true => command.env(TTY, "1"),
        false => command.env_remove(TTY),
    };
}

/// Cores that this process may use (affinity and cgroup quota count), shared among the ranks of the node.
fn threads_per_rank(nproc: u32) -> usize {
    let cores = available_parallelism().map_or(1, NonZero::get);
    (cores / nproc as usize).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_lists_are_read_as_cuda_reads_them() {
        let cases = [
            ("", 0),
            ("-1", 0),
            ("0", 1),
            ("0,1, 3", 3),
            ("0,1,-1,2", 2),
            ("GPU-8932f937,MIG-1", 2),
            ("NoDevFiles", 0),
        ];
        for (list, gpus) in cases {
            assert_eq!(named_devices(list), gpus, "{list:?}");
        }
    }
}
