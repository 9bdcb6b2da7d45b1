//! The command line, and the plan that it comes to once everything that can be refused has been refused.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};

use crate::environment;

/// Why nothing was started, or could not be, and the exit code that says so.
#[derive(Debug)]
pub struct Failure {
    pub code: u8,
    pub message: String,
}

impl Failure {
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Start `corral SUBCOMMAND ARGS` once per rank, and watch over all ranks.
///
/// Everything from SUBCOMMAND on is passed to corral unchanged. The exit code is 0 when all ranks are done, else that
/// of the first rank that failed (128 + N when signal N killed it). SIGINT and SIGTERM are passed on: the ranks
/// finish their step, save and exit; a second signal kills them.
#[derive(Parser)]
#[command(
    name = "launch",
    version,
    disable_help_subcommand = true,
    override_usage = "launch [OPTIONS] SUBCOMMAND [ARGS]...",
    after_help = "\
Environment of a rank: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT,
CORRAL_RESTART_COUNT, and OMP_NUM_THREADS (cores / ranks of this node) unless it is set already.
CORRAL_BIN names the program to start; default: `corral` next to `launch`, else in PATH.

Example, two nodes of 8 GPUs; on the second one with --node-rank 1:
  launch --nproc 8 --nnodes 2 --node-rank 0 --rdzv node0:29500 pretrain --config configs/pretrain/llama-1b.yaml"
)]
struct Arguments {
    /// Ranks on this node, the same on every node; auto: one per visible NVIDIA GPU, else 1
    #[arg(long, value_name = "N|auto", default_value = "auto", aliases = ["nproc-per-node", "nproc_per_node"])]
    nproc: Nproc,
    /// Nodes; `launch` is started once on each
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    nnodes: u32,
    /// Which of the nodes this is, from 0
    #[arg(long, value_name = "I", alias = "node_rank")]
    node_rank: Option<u32>,
    /// Where rank 0 listens: an address of node 0, and a port that is free there; the same on every node.
    /// Restart K uses port PORT + K
    #[arg(long, value_name = "HOST:PORT", aliases = ["rdzv-endpoint", "rdzv_endpoint"])]
    rdzv: Option<Rendezvous>,
    /// After a failure, start all ranks again, at most K times; exit codes 2, 3, 130 and 143 are final.
    /// The same on every node
    #[arg(long, value_name = "K", default_value_t = 0, alias = "max_restarts", value_parser = clap::value_parser!(u32).range(0..=10000))]
    max_restarts: u32,
    /// Communication between ranks (CORRAL_BACKEND for the ranks); default: what corral chooses
    #[arg(long, value_enum)]
    backend: Option<Backend>,
    /// Show only the output of these ranks
    #[arg(long, value_name = "RANK,...", value_delimiter = ',')]
    rank_filter: Option<Vec<u32>>,
    /// Also write each rank's output, as it came, to DIR/attempt_K/rank_N/{stdout,stderr}.log
    #[arg(long, value_name = "DIR", alias = "log_dir")]
    log_dir: Option<PathBuf>,
    /// Seconds between SIGTERM and SIGKILL for the remaining ranks after one has failed
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    grace: u32,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The words for corral.
    #[command(external_subcommand)]
    Corral(Vec<OsString>),
}

#[derive(Clone, Copy)]
enum Nproc {
    Auto,
    Fixed(u32),
}

impl FromStr for Nproc {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self::Auto),
            (_, Ok(ranks @ 1..=1024)) => Ok(Self::Fixed(ranks)),
            _ => Err("expected a number from 1 to 1024, or auto".into()),
        }
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Backend {
    Nccl,
    Gloo,
    Mpi,
    Auto,
}

/// Address and port of rank 0's store.
#[derive(Clone)]
pub struct Rendezvous {
    pub host: String,
    pub port: u16,
}

impl FromStr for Rendezvous {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "expected HOST:PORT, such as node0:29500 or [fe80::1]:29500".to_string();
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = bracketed.unwrap_or(host);
        if host.is_empty() || (bracketed.is_none() && host.contains(':')) {
            return Err(wrong());
        }
        match port.parse() {
            Ok(port @ 1..) => Ok(Self { host: host.into(), port }),
            _ => Err(format!("port '{port}' is not a number from 1 to 65535")),
        }
    }
}

/// What to start and how to watch it: the command line, checked.
pub struct Plan {
    pub program: PathBuf,
    /// SUBCOMMAND and ARGS, verbatim.
    pub words: Vec<OsString>,
    /// Ranks on this node.
    pub nproc: u32,
    /// How `nproc` was found, where it was not given.
    pub nproc_reason: Option<String>,
    pub nnodes: u32,
    pub node_rank: u32,
    /// None on a single node: there every attempt takes a free port of its own.
    pub rendezvous: Option<Rendezvous>,
    pub max_restarts: u32,
    /// Value of CORRAL_BACKEND, where asked for.
    pub backend: Option<String>,
    pub rank_filter: Option<Vec<u32>>,
    pub log_dir: Option<PathBuf>,
    pub grace: Duration,
}

impl Plan {
    /// Exits by itself on `--help`, `--version` and words that clap refuses (code 2).
    pub fn from_command_line() -> Result<Self, Failure> {
        Self::new(Arguments::parse())
    }

    fn new(arguments: Arguments) -> Result<Self, Failure> {
        let refuse = |message: String| Err(Failure::new(2, message));
        let Arguments { nnodes, node_rank, rdzv, max_restarts, log_dir, .. } = arguments;
        if nnodes > 1 && (rdzv.is_none() || node_rank.is_none()) {
            let missing = if rdzv.is_none() { "--rdzv HOST:PORT" } else { "--node-rank I" };
            return refuse(format!("--nnodes {nnodes} needs {missing}"));
        }
        let node_rank = node_rank.unwrap_or(0);
        if node_rank >= nnodes {
            return refuse(format!("--node-rank {node_rank} does not exist with --nnodes {nnodes}"));
        }
        if let Some(Rendezvous { port, .. }) = rdzv
            && u32::from(port) + max_restarts > u32::from(u16::MAX)
        {
            return refuse(format!(
                "restart K uses port {port} + K, and {port} + {max_restarts} is above 65535: take a lower --rdzv port"
            ));
        }
        let Command::Corral(given) = &arguments.command;
        let asks = |pair: &[OsString]| pair[0] == "--backend" && pair[1] == "mpi";
        let for_ranks = given.windows(2).any(asks) || given.iter().any(|word| word == "--backend=mpi");
        let inherited = environment::variable("CORRAL_BACKEND").is_some_and(|backend| backend == "mpi");
        if arguments.backend == Some(Backend::Mpi) || for_ranks || (inherited && arguments.backend.is_none())
        {
            return refuse(
                "--backend mpi: MPI starts its ranks itself: `mpirun -n N corral --backend mpi pretrain ...`, or `srun \
                 --mpi=pmix corral ...` (docs/operations.md)"
                    .into(),
            );
        }
        let (nproc, nproc_reason) = match arguments.nproc {
            Nproc::Fixed(ranks) => (ranks, None),
            Nproc::Auto => {
                let (ranks, reason) = environment::visible_gpus();
                (ranks, Some(reason))
            }
        };
        let world_size = nnodes * nproc;
        if let Some(rank) = arguments.rank_filter.iter().flatten().find(|rank| **rank >= world_size) {
            return refuse(format!("--rank-filter: rank {rank} does not exist in a world of {world_size}"));
        }
        if let Some(dir) = &log_dir
            && let Err(error) = std::fs::create_dir_all(dir)
        {
            return refuse(format!("--log-dir: cannot create {}: {error}", dir.display()));
        }
        let Command::Corral(mut words) = arguments.command;
        // `launch corral sft`, as torchrun names the program.
        if words.len() > 1 && words[0] == "corral" {
            words.remove(0);
        }
        Ok(Self {
            program: environment::find_corral()?,
            words,
            nproc,
            nproc_reason,
            nnodes,
            node_rank,
            rendezvous: rdzv,
            max_restarts,
            backend: arguments.backend.and_then(|b| b.to_possible_value()).map(|v| v.get_name().to_owned()),
            rank_filter: arguments.rank_filter,
            log_dir,
            grace: Duration::from_secs(arguments.grace.into()),
        })
    }

    pub fn world_size(&self) -> u32 {
        self.nnodes * self.nproc
    }

    /// Is the output of this rank shown?
    pub fn shows(&self, rank: u32) -> bool {
        self.rank_filter.as_ref().is_none_or(|ranks| ranks.contains(&rank))
    }

    /// Whether this rank is one that a person talks with: it has the terminal, or whatever `launch` has in its place.
    pub fn talks(&self, rank: u32) -> bool {
        rank == 0 && self.words.first().is_some_and(|word| word == "chat")
    }

    /// A world of one rank writes straight to where `launch` writes, unless its output has another way to take.
    pub fn captures_output(&self) -> bool {
        self.world_size() > 1 || self.log_dir.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn rendezvous_takes_names_and_addresses() {
        let cases = [
            ("node0:29500", "node0", 29500),
            ("[fe80::1]:1", "fe80::1", 1),
            ("127.0.0.2:65535", "127.0.0.2", 65535),
        ];
        for (text, host, port) in cases {
            let rendezvous: Rendezvous = text.parse().expect(text);
            assert_eq!((rendezvous.host.as_str(), rendezvous.port), (host, port), "{text}");
        }
        for text in ["node0", ":29500", "node0:", "node0:0", "node0:65536", "fe80::1:29500", "node0:x"] {
            assert!(text.parse::<Rendezvous>().is_err(), "{text} was accepted");
        }
    }
}
