//! What every training run does around its algorithm: the run's folder, where to resume, signals.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::checkpoint::{self, Checkpoint, agree};
use crate::distributed::world::World;
use crate::error::{Context, Error, Kind, Result};
use crate::info;

/// `--resume`: from where a run goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// From the newest checkpoint of the run's folder, if there is one.
    Auto,
    /// From this checkpoint.
    From(PathBuf),
    /// Not at all: a new run.
    Never,
}

impl std::str::FromStr for Resume {
    type Err = std::convert::Infallible;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(match s {
            "auto" => Resume::Auto,
            "never" => Resume::Never,
            path => Resume::From(path.into()),
        })
    }
}

/// Refuses a folder that holds another run, or what looks like one and is not ours to change. Reads only: ranks may call
/// it at different times. `inputs` are the paths that the run reads, which a replaced run must not hold.
pub fn check_folder(
    dir: &Path,
    resolved: &str,
    resume: &Resume,
    overwrite: bool,
    inputs: &[&Path],
) -> Result<()> {
    let config = dir.join("config.yaml");
    let refuse = |what: &str| {
        Err(Error::config(format!(
            "{} {what}; choose another output_dir, or replace what is there with --resume never --overwrite",
            dir.display()
        )))
    };
    if *resume == Resume::Never && overwrite {
        let inside = |path: &&&Path| {
            let absolute = |p: &Path| p.canonicalize().unwrap_or_else(|_| p.to_path_buf());
            REMOVED.iter().any(|name| absolute(path).starts_with(absolute(&dir.join(name))))
        };
        if let Some(path) = inputs.iter().find(inside) {
            return Err(Error::config(format!(
                "--overwrite would remove {}, which the run reads; choose another output_dir",
                path.display()
            )));
        }
        return Ok(());
    }
    // Without a configuration, what a run would write over belongs to somebody else.
    if !config.exists()
        && (dir.join("metrics.jsonl").exists() || dir.join("model").exists() || has_events(dir))
    {
        return refuse("holds metrics, a model or TensorBoard files, but no run's config.yaml");
    }
    match resume {
        Resume::Never if config.exists() || dir.join("checkpoints").exists() => {
            refuse("already holds a run (--resume auto goes on with it)")
        }
        Resume::Never => Ok(()),
        Resume::Auto | Resume::From(_) if config.exists() => {
            let text = std::fs::read_to_string(&config).data_error(config.display())?;
            if text == resolved {
                return Ok(());
            }
            refuse(&format!("holds a run with another configuration ({})", first_difference(&text, resolved)))
        }
        Resume::Auto | Resume::From(_) => Ok(()),
    }
}

/// What a new run removes of the one that it replaces.
const REMOVED: [&str; 4] = ["checkpoints", "model", "critic", "ema"];

fn has_events(dir: &Path) -> bool {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.into_iter().any(|e| e.file_name().to_string_lossy().starts_with("events.out.tfevents."))
}

/// Removes the checkpoints after `step`, which a run that goes back to `step` gives up: a restart would take them.
pub fn drop_later_checkpoints(dir: &Path, step: u64, world: &World) -> Result<()> {
    let remove = || -> Result<()> {
        for (later, path) in checkpoint::sharded::list(&checkpoint::sharded::checkpoints_dir(dir))? {
            if later > step {
                std::fs::remove_dir_all(&path).context(format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    };
    agree(&world.group, if world.rank == 0 { remove() } else { Ok(()) })
}

/// The checkpoint that the run goes on from, if any.
pub fn find_checkpoint(dir: &Path, resume: &Resume) -> Result<Option<Checkpoint>> {
    match resume {
        Resume::Auto => checkpoint::latest(dir),
        Resume::From(path) => Checkpoint::open(path).map(Some),
        Resume::Never => Ok(None),
    }
}

fn first_difference(there: &str, here: &str) -> String {
    let (mut a, mut b) = (there.lines(), here.lines());
    loop {
        match (a.next(), b.next()) {
            (Some(x), Some(y)) if x == y => {}
            (None, None) => return "they differ in line ends".into(),
            (x, y) => {
                let line = |l: Option<&str>| l.map_or("nothing".to_string(), |l| format!("'{}'", l.trim()));
                return format!("there {}, here {}", line(x), line(y));
            }
        }
    }
}

/// Makes the run's folder (rank 0) and writes the resolved configuration. With `fresh`, what an earlier run left there is
/// removed first. All ranks return when it is done.
pub fn prepare_folder(dir: &Path, resolved: &str, fresh: bool, world: &World) -> Result<()> {
    let make = || -> Result<()> {
        if fresh {
            for old in REMOVED {
                let path = dir.join(old);
                if path.exists() {
                    std::fs::remove_dir_all(&path).context(format!("cannot remove {}", path.display()))?;
                }
            }
        }
        std::fs::create_dir_all(dir).context(format!("cannot make the folder {}", dir.display()))?;
        crate::files::write_file(&dir.join("config.yaml"), resolved.as_bytes())
    };
    agree(&world.group, if world.rank == 0 { make() } else { Ok(()) })
}

/// Leaves SIGINT and SIGTERM to a thread of their own: the calling thread and all that it starts later do not get them.
/// What a signal does stays as it is. Call this before anything computes.
///
/// The kernel puts a handler's frame on the stack of the thread that it interrupts, and while oneDNN's float32 products
/// run (`avx512_common_gemm_f32`) that thread's stack pointer may point at a workspace in the heap: the frame would
/// overwrite what lies before it.
pub fn keep_signals_from_computing_threads() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block().map_err(std::io::Error::from).context("cannot block signals")?;
    let wait = move || {
        // Cannot fail for these signals; if it did, they would wait unseen.
        let _ = signals.thread_unblock();
        loop {
            std::thread::park();
        }
    };
    let thread = std::thread::Builder::new().name("signals".into()).spawn(wait);
    thread.map(drop).context("cannot start the thread that takes signals")
}

/// SIGINT and SIGTERM, asked for by the launcher, the site or the user: the step is finished and a checkpoint written.
pub struct Signals {
    received: Arc<AtomicUsize>,
}

impl Signals {
    /// A second SIGINT ends the process at once; a second SIGTERM does not, since sites send it to every process of a
    /// job besides the launcher's.
    pub fn watch() -> Result<Signals> {
        let received = Arc::new(AtomicUsize::new(0));
        let again = Arc::new(AtomicBool::new(false));
        let register = || -> std::io::Result<()> {
            signal_hook::flag::register_conditional_shutdown(SIGINT, 128 + SIGINT, again.clone())?;
            signal_hook::flag::register(SIGINT, again.clone())?;
            for signal in [SIGINT, SIGTERM] {
                signal_hook::flag::register_usize(signal, received.clone(), signal as usize)?;
            }
            Ok(())
        };
        register().context("cannot watch for signals")?;
        Ok(Signals { received })
    }

    /// The signal that this process has received, 0 if none.
    pub fn received(&self) -> f64 {
        self.received.load(Ordering::Relaxed) as f64
    }

    /// The end of a run that a signal stopped after its checkpoint was written.
    pub fn stopped(signal: f64, step: u64) -> Error {
        let name = if signal as i32 == SIGINT { "SIGINT" } else { "SIGTERM" };
        info!("stopped by {name} after step {step}; the same command goes on from its checkpoint");
        Error { kind: Kind::Stopped(signal as i32), message: format!("stopped by {name}") }
    }
}
