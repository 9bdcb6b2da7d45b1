//! The subcommands: a file each, with its arguments.

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command};
use tch::Device;

use crate::distributed::agreement::Facts;
use crate::distributed::environment::RankEnvironment;
use crate::distributed::world::{DeviceChoice, World};
use crate::env;
use crate::error::{Error, Result};
use crate::signals;
use crate::telemetry::console;

mod answers;
pub mod bench;
pub mod chat;
pub mod check;
pub mod convert;
pub mod data;
pub mod eval;
pub mod generate;
pub mod get;
pub mod help;
mod inference;
pub mod init;
pub mod inspect;
mod intake;
pub mod library;
mod limits;
pub mod merge;
pub mod plan;
mod predict;
pub mod recipes;
pub mod report;
pub mod score;
pub mod slips;
pub mod tokenize;
pub mod tokenizer;
pub mod training;

/// Flags of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Threads to compute with [default: OMP_NUM_THREADS, else all cores]
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Where to compute: cpu, cuda (each rank its own GPU) or cuda:N [default: cuda if there is one, else cpu]
    #[arg(long, global = true, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Communication between ranks: auto, gloo (CPU), nccl (GPU), or mpi under mpirun or srun [default: CORRAL_BACKEND, else auto]
    #[arg(long, global = true, value_name = "BACKEND")]
    pub backend: Option<String>,
    /// Format of messages
    #[arg(long, global = true, value_enum, default_value = "pretty")]
    pub log_format: console::LogFormat,
    /// Only warnings and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Also details
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// What the command line gives, by name: see [`Global::note`].
    #[arg(skip)]
    given: Vec<(String, String)>,
}

impl Global {
    /// Notes the subcommand and the flags that were given, which all ranks must have alike.
    pub fn note(&mut self, command: &Command, matches: &ArgMatches) {
        let (mut command, mut level) = (command, matches);
        while let Some((name, below)) = level.subcommand() {
            self.given.push(("subcommand".into(), name.into()));
            let Some(known) = command.find_subcommand(name) else { return };
            (command, level) = (known, below);
            // Groups of flags have ids, too.
            let is_flag = |id: &clap::Id| command.get_arguments().any(|a| a.get_id() == id);
            for id in level
                .ids()
                .filter(|id| is_flag(id) && level.value_source(id.as_str()) == Some(ValueSource::CommandLine))
            {
                let values = level.try_get_raw(id.as_str()).ok().flatten().into_iter().flatten();
                for value in values {
                    self.given.push((id.as_str().replace('_', "-"), value.to_string_lossy().into_owned()));
                }
            }
        }
    }

    /// What all ranks must have alike, whatever the command.
    pub fn facts(&self) -> Facts {
        let mut facts = Facts::new();
        self.given.iter().for_each(|(name, values)| facts.add_flag(name, values));
        facts
    }

    /// The paths of `--input`.
    fn inputs(&self) -> impl Iterator<Item = &str> {
        self.given.iter().filter(|(name, _)| name == "input").map(|(_, path)| path.as_str())
    }

    /// How this process talks, before it knows more of its world than the environment tells.
    pub fn console(&self) -> console::ConsoleSettings {
        // An environment that cannot be read is refused where the world is joined.
        let place = RankEnvironment::from_env().ok().flatten();
        let (rank, world_size) = place.map_or((0, 1), |p| (p.rank, p.world_size));
        let Global { log_format: format, quiet, verbose, .. } = *self;
        console::ConsoleSettings { format, quiet, verbose, rank, world_size }
    }

    /// Signals, threads, allocator and the library for float32 products.
    pub fn set_up(&self) -> Result<()> {
        signals::keep_signals_from_computing_threads()?;
        // An environment that cannot be read is refused where the world is joined.
        let place = RankEnvironment::from_env().ok().flatten();
        let (ranks, of_host) = place.map_or((1, 1), |p| (p.world_size, p.local_world_size as usize));
        let threads =
            self.threads.or_else(|| env::parsed("OMP_NUM_THREADS")).or_else(|| limits::own_cores(of_host));
        match threads {
            Some(0) => return Err(Error::config("--threads must be at least 1")),
            Some(n) => {
                limits::check(n, ranks)?;
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build_global();
                pool.map_err(|e| Error::failed(format!("cannot start {n} threads: {e}")))?;
                tch::set_num_threads(n as i32);
            }
            None => limits::check(1, ranks)?,
        }
        kernels::host::tune_allocator(ranks == 1)?;
        kernels::host::choose_float32_products()?;
        Ok(())
    }

    /// The device of a command that runs as one process.
    pub fn single_device(&self) -> Result<Device> {
        Ok(World::solo(DeviceChoice::of(self.device.as_deref())?)?.device)
    }
}
