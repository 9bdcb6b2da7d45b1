//! The one place that reads the environment (clippy refuses the functions of `std::env` elsewhere). A variable that is empty
//! counts as unset, as for a shell's `${NAME:-default}`.
//!
//! | variable | of | for |
//! | --- | --- | --- |
//! | `RANK`, `WORLD_SIZE`, ..., `OMPI_COMM_WORLD_*`, `SLURM_*` | torchrun, mpirun, srun | which rank this is ([`distributed::environment`](crate::distributed::environment)) |
//! | `CORRAL_RDZV`, `CORRAL_BACKEND` | the user | where ranks meet, and by which backend |
//! | `CORRAL_RESTART_COUNT`, `CORRAL_TTY` | `launch` | the attempt of this world, the rank that draws the bar |
//! | `CORRAL_HOME`, `XDG_CACHE_HOME`, `HF_HUB_CACHE`, `HF_HOME`, `HOME` | the user | folders of fetched models and measured rates, token caches, the hub cache |
//! | `OMP_NUM_THREADS` | the user, `launch` | threads of this process |
//! | `PYTHON` | the user | the interpreter whose pip downloads for `corral get` |
//! | `TERM`, `COLUMNS` | the terminal | whether a bar can be drawn, and how wide |
//! | `CLICOLOR`, `CLICOLOR_FORCE`, `NO_COLOR` | the user | whether messages have colours |
//!
//! `kernels` reads two more, CUDA_HOME and GLOO_SOCKET_IFNAME; `launch` has a function of its own.

use std::ffi::OsString;
use std::path::PathBuf;

/// The value of a variable; `None` if it is unset or empty.
pub(crate) fn variable(name: &str) -> Option<OsString> {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// As [`variable`], as text; `None` also if it is not Unicode.
pub(crate) fn text(name: &str) -> Option<String> {
    variable(name)?.into_string().ok()
}

/// As [`variable`], parsed; `None` also if it cannot be.
pub(crate) fn parsed<T: std::str::FromStr>(name: &str) -> Option<T> {
    text(name)?.trim().parse().ok()
}

/// As [`variable`], as a path.
pub(crate) fn path(name: &str) -> Option<PathBuf> {
    variable(name).map(PathBuf::from)
}

/// The folder of what commands keep for later ones: CORRAL_HOME, else `~/.cache/corral`; `None` without a home.
pub(crate) fn corral_home() -> Option<PathBuf> {
    path("CORRAL_HOME").or_else(|| Some(path("HOME")?.join(".cache/corral")))
}
