//! SIGINT, SIGTERM and SIGUSR1: which thread gets them, and what a run makes of them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

use crate::error::{Context, Error, ErrorClass, Result};
use crate::info;

/// Leaves these signals to a thread of their own: the calling thread and all that it starts later do not get them.
/// What a signal does stays as it is. Call this before anything computes.
///
/// The kernel puts a handler's frame on the stack of the thread that it interrupts, and while oneDNN's float32 products
/// run (`avx512_common_gemm_f32`) that thread's stack pointer may point at a workspace in the heap: the frame would
/// overwrite what lies before it.
pub fn keep_signals_from_computing_threads() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGUSR1].into_iter().collect();
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

/// The signals that this process's [`Signals`] have received.
static RECEIVED: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// Whether a run on this process was asked to end.
pub fn is_asked_to_end() -> bool {
    RECEIVED.get().is_some_and(|received| received.load(Ordering::Relaxed) > 0)
}

/// SIGINT and SIGTERM, asked for by the launcher, the site or the user: the step is finished and a checkpoint written. SIGUSR1 counts as
/// SIGTERM: `mpirun` passes it on without killing the ranks a second later.
pub struct Signals {
    received: Arc<AtomicUsize>,
    /// How a run that they stop goes on.
    goes_on: &'static str,
}

impl Signals {
    /// `goes_on` says how a run that they stop goes on. A second SIGINT ends the process at once; a second SIGTERM does not, since sites send it to every process of a
    /// job besides the launcher's.
    pub fn watch(goes_on: &'static str) -> Result<Signals> {
        let received = RECEIVED.get_or_init(Arc::default).clone();
        let again = Arc::new(AtomicBool::new(false));
        let register = || -> std::io::Result<()> {
            signal_hook::flag::register_conditional_shutdown(SIGINT, 128 + SIGINT, again.clone())?;
            signal_hook::flag::register(SIGINT, again.clone())?;
            for (signal, counts_as) in [(SIGINT, SIGINT), (SIGTERM, SIGTERM), (SIGUSR1, SIGTERM)] {
                signal_hook::flag::register_usize(signal, received.clone(), counts_as as usize)?;
            }
            Ok(())
        };
        register().context("cannot watch for signals")?;
        Ok(Signals { received, goes_on })
    }

    /// The signal that this process has received, 0 if none.
    pub fn received(&self) -> f64 {
        self.received.load(Ordering::Relaxed) as f64
    }

    /// The end of a run that a signal stopped after its checkpoint was written.
    pub fn stopped(&self, signal: f64, step: u64) -> Error {
        let name = if signal as i32 == SIGINT { "SIGINT" } else { "SIGTERM" };
        info!("stopped by {name} after step {step}; {}", self.goes_on);
        Error { kind: ErrorClass::Stopped(signal as i32), message: format!("stopped by {name}"), key: None }
    }
}
