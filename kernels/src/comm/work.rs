//! Collectives under way.

use std::ffi::c_char;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tch::Tensor;

use super::diagnosis::Call;
use super::link::{Backend, Link};
use super::nccl;
use super::staging::After;
use super::store::millis;
use super::watch::{Poll, Watch};
use crate::abi::*;
use crate::error::{Result, check};
use crate::trace::{self, Lane};

/// A collective under way; holds its tensors until it is waited for. Results are there after [`Work::wait`] only.
#[must_use = "the result is there only after wait()"]
pub struct Work {
    raw: *mut WorkPtr,
    /// None where there is nothing to wait for.
    under_way: Option<(Arc<Link>, Call)>,
    started: Instant,
    tensors: Vec<Tensor>,
    after: After,
    /// Bytes that this rank sends in it.
    bytes: u64,
}

// SAFETY: c10d's work objects may be waited for from any thread; tensors are reference-counted atomically.
unsafe impl Send for Work {}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: `raw` came from the C ABI and is freed once; c10d holds references of its own while it runs.
            unsafe { corral_work_free(self.raw) }
        }
    }
}

/// The name of a send and of its receive: diagnoses compare what both ranks have called.
pub(super) const TRANSFER: &str = "transfer";

/// How long one look at a pending collective takes, so that news of failed peers gets through.
const SLICE: Duration = Duration::from_millis(200);

impl Work {
    /// Nothing to wait for.
    pub fn done() -> Work {
        Work {
            raw: null_mut(),
            under_way: None,
            started: Instant::now(),
            tensors: Vec::new(),
            after: After::default(),
            bytes: 0,
        }
    }

    /// Puts the collective `call` on the link, as number `seq` of the group's; `begin` is the C ABI's function for it.
    pub(super) fn issue(
        link: &Arc<Link>,
        mut call: Call,
        tensors: &[&Tensor],
        begin: impl FnOnce(*const BackendPtr, *mut *mut WorkPtr) -> *mut c_char,
    ) -> Result<Work> {
        if let Some(error) = link.failure.get() {
            return Err(error.clone());
        }
        let mut issued = link.issued.lock().unwrap_or_else(|e| e.into_inner());
        *issued += 1;
        call.seq = *issued;
        link.watch.called(&call);
        let started = Instant::now();
        let mut raw = null_mut();
        let result = check(begin(link.raw, &mut raw));
        drop(issued);
        if let Err(cause) = result {
            return Err(link.fail(&call, &cause.message));
        }
        if link.backend == Backend::Nccl {
            // SAFETY: `raw` was made above.
            let in_flight = InFlight(unsafe { nccl::work_clone(raw) }?);
            let ahead = if call.op == TRANSFER { 2 } else { 1 };
            link.watch.add(call.clone(), link.timeout * ahead, Box::new(move || in_flight.poll()));
        }
        link.pending.fetch_add(1, Ordering::AcqRel);
        Ok(Work {
            raw,
            under_way: Some((link.clone(), call)),
            started,
            tensors: tensors.iter().map(|t| t.shallow_clone()).collect(),
            after: After::default(),
            bytes: 0,
        })
    }

    pub(super) fn sending(mut self, bytes: u64) -> Work {
        self.bytes = bytes;
        self
    }

    pub(super) fn then(mut self, after: After) -> Work {
        self.after = after;
        self
    }

    /// Whether nothing is left to wait for: [`Work::wait`] returns at once, or says what failed.
    pub fn is_done(&self) -> bool {
        let mut done = 0;
        // SAFETY: `raw` is alive until drop.
        self.under_way.is_none()
            || check(unsafe { corral_work_poll(self.raw, &mut done) }).is_err()
            || done != 0
    }

    /// On CPU returns when the result is there. On CUDA the current stream waits for it and the host goes on; a peer
    /// that never comes then ends this process with the same message, from the watching thread.
    ///
    /// The error names the collective, the group and the missing ranks, within the group's time-out.
    pub fn wait(mut self) -> Result<()> {
        let Some((link, call)) = self.under_way.take() else { return Ok(()) };
        let waiting = trace::waiting(|| format!("{} of {}", call.op, call.group));
        if link.backend == Backend::Nccl {
            // SAFETY: `raw` is alive until drop.
            check(unsafe { corral_work_sync(self.raw) }).map_err(|e| link.fail(&call, &e.message))?;
        } else {
            self.wait_on_host(&link, &call)?;
        }
        link.pending.fetch_sub(1, Ordering::AcqRel);
        drop(waiting);
        if trace::is_on() {
            trace::record(call.op.into(), Lane::Group(call.group), self.started, Some(self.bytes));
        }
        self.after.finish()?;
        self.tensors.clear();
        Ok(())
    }

    fn wait_on_host(&self, link: &Link, call: &Call) -> Result<()> {
        let timeout = link.timeout;
        // A receive is posted early: its time counts from the wait.
        let started = if call.op == TRANSFER { Instant::now() } else { self.started };
        let observe = Watch::observation(timeout);
        let mut diagnosis = None;
        let mut failure_seen = None;
        loop {
            let mut done = 0;
            // SAFETY: `raw` is alive until drop.
            check(unsafe { corral_work_wait(self.raw, millis(SLICE), &mut done) })
                .map_err(|e| link.fail(call, &e.message))?;
            if done != 0 {
                return Ok(());
            }
            if let Some(error) = link.failure.get() {
                return Err(error.clone());
            }
            let waited = started.elapsed();
            // The look at the other ranks takes a while: it begins that much before the time is up.
            if waited + observe >= timeout && diagnosis.is_none() {
                diagnosis = Some(link.watch.diagnose(call));
            }
            if waited >= timeout
                && let Some(diagnosis) = diagnosis.take()
            {
                let error = diagnosis.finish(&format!("timed out after {:.0} s", timeout.as_secs_f64()));
                return Err(link.failure.get_or_init(|| error).clone());
            }
            // Another rank gave up: this one will not be answered either, but what is under way may still end.
            if link.watch.peer_failed() && failure_seen.get_or_insert_with(Instant::now).elapsed() > observe {
                return Err(link.fail(call, "another rank has failed"));
            }
        }
    }
}

/// A second reference to a work, for the watching thread.
struct InFlight(*mut WorkPtr);

// SAFETY: as for `Work`.
unsafe impl Send for InFlight {}

impl Drop for InFlight {
    fn drop(&mut self) {
        // SAFETY: made by nccl_work_clone, freed once.
        unsafe { corral_work_free(self.0) }
    }
}

impl InFlight {
    fn poll(&self) -> Poll {
        let mut done = 0;
        // SAFETY: alive until drop.
        match check(unsafe { corral_work_poll(self.0, &mut done) }) {
            Err(e) => Poll::Failed(e.message),
            Ok(()) if done != 0 => Poll::Done,
            Ok(()) => Poll::Pending,
        }
    }
}
