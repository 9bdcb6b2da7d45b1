//! A record of what this process does, for a timeline: what it computes, what ranks send each other, and what it waits for. Off, it
//! costs a look at a flag.
//!
//! Times are the host's. On a CPU a span of a collective ends when its result was waited for, which may be after it was there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The row of a timeline that a span is in.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// What is computed.
    Computing,
    /// What is waited for on the host.
    Waiting,
    /// What the ranks of this group send each other.
    Group(String),
}

/// Something that took a time.
#[derive(Debug, Clone)]
pub struct TraceSpan {
    /// What it was.
    pub name: String,
    /// Its row.
    pub lane: Lane,
    /// Its begin, since 1970.
    pub start: Duration,
    /// How long it took.
    pub took: Duration,
    /// Bytes that this rank sent.
    pub bytes: Option<u64>,
}

/// Spans of a record; what comes after them is left out.
const MAX_SPANS: usize = 1 << 20;

static ON: AtomicBool = AtomicBool::new(false);
static SPANS: Mutex<Vec<TraceSpan>> = Mutex::new(Vec::new());

/// Begins a record of at most a million spans; what was recorded before is forgotten.
pub fn start() {
    SPANS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    ON.store(true, Ordering::Relaxed);
}

/// Ends the record, and returns it.
pub fn stop() -> Vec<TraceSpan> {
    ON.store(false, Ordering::Relaxed);
    std::mem::take(&mut SPANS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Whether a record is made.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// A span that ends when it is dropped.
#[must_use = "it ends when it is dropped"]
pub struct OpenSpan {
    name: String,
    lane: Lane,
    started: Instant,
}

impl Drop for OpenSpan {
    fn drop(&mut self) {
        record(std::mem::take(&mut self.name), self.lane.clone(), self.started, None);
    }
}

/// Begins a span of what is computed; nothing where no record is made.
pub fn computing(name: impl FnOnce() -> String) -> Option<OpenSpan> {
    open(Lane::Computing, name)
}

pub(crate) fn waiting(name: impl FnOnce() -> String) -> Option<OpenSpan> {
    open(Lane::Waiting, name)
}

fn open(lane: Lane, name: impl FnOnce() -> String) -> Option<OpenSpan> {
    is_on().then(|| OpenSpan { name: name(), lane, started: Instant::now() })
}

/// Records a span that began at `started` and ends now.
pub(crate) fn record(name: String, lane: Lane, started: Instant, bytes: Option<u64>) {
    if !is_on() {
        return;
    }
    let took = started.elapsed();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let span = TraceSpan { name, lane, start: now.saturating_sub(took), took, bytes };
    let mut spans = SPANS.lock().unwrap_or_else(PoisonError::into_inner);
    if spans.len() < MAX_SPANS {
        spans.push(span);
    }
}
