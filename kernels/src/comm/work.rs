//! Collectives under way.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tch::Tensor;

use super::diagnosis::Call;
use super::engine::{Collective, Exchange};
use super::link::Link;
use super::staging::After;
use super::watch::Watch;
use crate::error::Result;
use crate::trace::{self, Lane};

/// A collective under way; holds its tensors until it is waited for. Results are there after [`Work::wait`] only.
#[must_use = "the result is there only after wait()"]
pub struct Work {
    /// None where there is nothing to wait for.
    under_way: Option<UnderWay>,
    started: Instant,
    tensors: Vec<Tensor>,
    after: After,
    /// Bytes that this rank sends in it.
    bytes: u64,
}

struct UnderWay {
    link: Arc<Link>,
    call: Call,
    exchange: Box<dyn Exchange>,
}

/// The name of a send and of its receive: diagnoses compare what both ranks have called.
pub(super) const TRANSFER: &str = "transfer";

/// How long one look at a pending collective takes, so that news of failed peers gets through.
const SLICE: Duration = Duration::from_millis(200);

impl Work {
    /// Nothing to wait for.
    pub fn done() -> Work {
        Work {
            under_way: None,
            started: Instant::now(),
            tensors: Vec::new(),
            after: After::default(),
            bytes: 0,
        }
    }

    /// Begins `collective` on the link; as `call` it gets the next number of the group's.
    pub(super) fn issue(
        link: &Arc<Link>,
        mut call: Call,
        tensors: &[&Tensor],
        collective: &Collective,
    ) -> Result<Work> {
        if let Some(error) = link.failure.get() {
            return Err(error.clone());
        }
        let mut issued = link.issued.lock().unwrap_or_else(|e| e.into_inner());
        *issued += 1;
        call.seq = *issued;
        link.watch.called(&call);
        let started = Instant::now();
        let begun = link.engine.begin(collective);
        drop(issued);
        let exchange = begun.map_err(|cause| link.fail(&call, &cause.message))?;
        if let Some(poller) = exchange.poller()? {
            let ahead = if call.op == TRANSFER { 2 } else { 1 };
            link.watch.add(call.clone(), link.timeout * ahead, poller);
        }
        link.pending.fetch_add(1, Ordering::AcqRel);
        Ok(Work {
            under_way: Some(UnderWay { link: link.clone(), call, exchange }),
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
        self.under_way.as_ref().is_none_or(|under_way| under_way.exchange.is_done().unwrap_or(true))
    }

    /// On CPU returns when the result is there. On CUDA the current stream waits for it and the host goes on; a peer
    /// that never comes then ends this process with the same message, from the watching thread.
    ///
    /// The error names the collective, the group and the missing ranks, within the group's time-out.
    pub fn wait(mut self) -> Result<()> {
        let Some(under_way) = self.under_way.take() else { return Ok(()) };
        let call = &under_way.call;
        let waiting = trace::waiting(|| format!("{} of {}", call.op, call.group));
        under_way.wait(self.started)?;
        under_way.link.pending.fetch_sub(1, Ordering::AcqRel);
        drop(waiting);
        if trace::is_on() {
            trace::record(call.op.into(), Lane::Group(call.group.clone()), self.started, Some(self.bytes));
        }
        self.after.finish()?;
        self.tensors.clear();
        Ok(())
    }
}

impl UnderWay {
    /// Until it is done, or its time is up, or another rank has failed.
    fn wait(&self, started: Instant) -> Result<()> {
        let UnderWay { link, call, exchange } = self;
        let timeout = link.timeout;
        // A receive is posted early: its time counts from the wait.
        let started = if call.op == TRANSFER { Instant::now() } else { started };
        let observe = Watch::observation(timeout);
        let mut diagnosis = None;
        let mut failure_seen = None;
        loop {
            if exchange.wait(SLICE).map_err(|e| link.fail(call, &e.message))? {
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
