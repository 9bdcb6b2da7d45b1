//! Who is alive and how far: every process tells the store twice a second which collectives it has called, so that a
//! failed collective can name the ranks that are missing.
//!
//! Keys in the store: `beat/R` (a count and the last call in each group), `err/R` (R gave up on a collective; it is not
//! the one to blame), `told/R` (R has printed who is missing), `left/R` (R ended in good order), `failed` (somebody gave up).

use crate::c10d::Store;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

const BEAT: Duration = Duration::from_millis(500);

static REPORTER: OnceLock<fn(&Error)> = OnceLock::new();

/// Sets how an error is reported that ends the process from the watching thread; by default, as a line on stderr.
pub fn set_error_reporter(report: fn(&Error)) {
    let _ = REPORTER.set(report);
}

/// One collective of one group. `seq` counts the group's collectives from 1.
#[derive(Debug, Clone)]
pub struct Call {
    pub group: String,
    /// World ranks of the members.
    pub ranks: Vec<i64>,
    pub seq: u64,
    pub op: &'static str,
}

/// The state of work on a device, as the watching thread sees it.
pub enum Poll {
    Pending,
    Done,
    Failed(String),
}

/// This process's membership of the run: its connection to the store, its heartbeat, and the watch over its GPU's
/// collectives.
pub struct Watch {
    shared: Arc<Shared>,
    stop: Sender<()>,
    stopped: Mutex<Receiver<()>>,
    poller: Once,
}

struct Shared {
    store: Store,
    rank: i64,
    world_size: i64,
    /// Whether the store lives in this process.
    serves: bool,
    calls: Mutex<BTreeMap<String, (u64, &'static str)>>,
    peer_failed: AtomicBool,
    in_flight: Mutex<Vec<InFlight>>,
}

struct InFlight {
    call: Call,
    started: Instant,
    timeout: Duration,
    poll: Box<dyn Fn() -> Poll + Send>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// Runs `body` in a thread and waits at most `limit`: a call to a store whose server is stopped never returns.
fn bounded<T: Send + 'static>(
    limit: Duration,
    body: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (tx, rx) = channel();
    thread::spawn(move || tx.send(body()));
    rx.recv_timeout(limit)
        .unwrap_or_else(|_| Err(Error::new("the store does not answer: rank 0, which keeps it, hangs")))
}

impl Watch {
    /// Tells the store that rank `rank` of `world_size` is here, and goes on telling. `serves`: the store is in this process.
    pub fn start(store: Store, rank: i64, world_size: i64, serves: bool) -> Result<Arc<Watch>> {
        let beats = store.reconnect()?;
        let shared = Arc::new(Shared {
            store,
            rank,
            world_size,
            serves,
            calls: Mutex::new(BTreeMap::new()),
            peer_failed: AtomicBool::new(false),
            in_flight: Mutex::new(Vec::new()),
        });
        let ((stop, stop_rx), (stopped_tx, stopped)) = (channel(), channel());
        beats.set(&format!("beat/{rank}"), shared.beat(0).as_bytes())?;
        let thread_shared = shared.clone();
        thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || {
                heartbeat(&beats, &thread_shared, &stop_rx);
                // Nobody waits for this after a crash.
                let _ = stopped_tx.send(());
            })
            .map_err(|e| Error::new(format!("cannot start a thread: {e}")))?;
        Ok(Arc::new(Watch { shared, stop, stopped: Mutex::new(stopped), poller: Once::new() }))
    }

    pub fn rank(&self) -> i64 {
        self.shared.rank
    }

    pub fn world_size(&self) -> i64 {
        self.shared.world_size
    }

    pub fn store(&self) -> &Store {
        &self.shared.store
    }

    /// How long the other ranks are looked at before one of them is called gone.
    pub(crate) fn observation(timeout: Duration) -> Duration {
        (4 * BEAT).min(timeout / 2).max(BEAT + BEAT / 2)
    }

    /// Whether any rank of the run gave up on a collective.
    pub(crate) fn peer_failed(&self) -> bool {
        self.shared.peer_failed.load(Ordering::Relaxed)
    }

    pub(crate) fn called(&self, call: &Call) {
        lock(&self.shared.calls).insert(call.group.clone(), (call.seq, call.op));
    }

    /// Waits until all `ranks` have called this for the group `name`.
    pub(crate) fn join(&self, name: &str, ranks: &[i64], timeout: Duration) -> Result<()> {
        if lock(&self.shared.calls).insert(name.into(), (0, "set-up")).is_some() {
            return Err(Error::new(format!("the group `{name}` was made before in this run")));
        }
        self.meet("join", name, ranks, timeout)
    }

    /// Gives all ranks' `mine` to `compare`, on rank 0, and returns on all ranks what it finds.
    pub fn compare(
        &self,
        mine: Vec<u8>,
        timeout: Duration,
        compare: impl FnOnce(&[Vec<u8>]) -> Option<String> + Send + 'static,
    ) -> Result<Option<String>> {
        let ranks: Vec<i64> = (0..self.shared.world_size).collect();
        let key = |rank: i64| format!("facts/{rank}");
        let (shared, my_key) = (self.shared.clone(), key(self.shared.rank));
        let limit = timeout.saturating_add(20 * BEAT);
        bounded(limit, move || shared.store.reconnect()?.set(&my_key, &mine))?;
        self.meet("meet", "world", &ranks, timeout)?;
        let shared = self.shared.clone();
        bounded(limit, move || {
            let store = shared.store.reconnect()?;
            if shared.rank != 0 {
                let found = store.get_within("facts/found", timeout)?;
                store.add("facts/read", 1)?;
                return Ok(Some(String::from_utf8_lossy(&found).into_owned()).filter(|f| !f.is_empty()));
            }
            let all = ranks.iter().map(|rank| store.get_within(&key(*rank), timeout));
            let found = compare(&all.collect::<Result<Vec<_>>>()?);
            store.set("facts/found", found.as_deref().unwrap_or_default().as_bytes())?;
            // Where all end now, the store, which this rank may keep, stays until all know why.
            let deadline = Instant::now() + 8 * BEAT;
            while found.is_some()
                && store.add("facts/read", 0)? < shared.world_size - 1
                && Instant::now() < deadline
            {
                thread::sleep(BEAT / 25);
            }
            Ok(found)
        })
    }

    /// Waits until all `ranks` have called this; `name` is the group that is made, for messages.
    fn meet(&self, what: &'static str, name: &str, ranks: &[i64], timeout: Duration) -> Result<()> {
        let (shared, name, ranks) = (self.shared.clone(), name.to_string(), ranks.to_vec());
        let limit = timeout.saturating_add(20 * BEAT);
        bounded(limit, move || {
            let store = shared.store.reconnect()?;
            let (all, me) = (format!("{what}/{name}/all"), format!("{what}/{name}/{}", shared.rank));
            let deadline = Instant::now() + timeout;
            store.set(&me, b"1")?;
            if store.add(&format!("{what}/{name}/count"), 1)? == ranks.len() as i64 {
                store.set(&all, b"1")?;
            }
            while store.get_within(&all, Duration::from_secs(1).min(timeout)).is_err() {
                // The store itself may be what failed: these calls say so.
                let mut missing = Vec::new();
                let mut hopeless = store.check("failed")?;
                for &r in &ranks {
                    if !store.check(&format!("{what}/{name}/{r}"))? {
                        missing.push(r);
                        hopeless |= store.check(&format!("left/{r}"))?;
                    }
                }
                if hopeless || Instant::now() >= deadline {
                    let call = Call { group: name.clone(), ranks: ranks.clone(), seq: 0, op: "set-up" };
                    let seen = missing.iter().map(|&r| (r, String::new())).collect();
                    shared.tell(&store, &call, &Seen { missing: seen, gave_up: Vec::new() })?;
                    let missing: Vec<_> = missing.iter().map(|r| format!("rank {r}")).collect();
                    let missing =
                        if missing.is_empty() { "nobody, by now".into() } else { missing.join(", ") };
                    return Err(Error::new(format!(
                        "the set-up of group `{name}` of {} ranks ended after {:.0} s without all of them; missing: \
                         {missing}",
                        ranks.len(),
                        timeout
                            .saturating_sub(deadline.saturating_duration_since(Instant::now()))
                            .as_secs_f64()
                    )));
                }
            }
            Ok(())
        })
    }

    /// Starts to look at the other members of a collective that is about to run out of time.
    pub(crate) fn diagnose(&self, call: &Call) -> Diagnosis {
        self.shared.diagnose(call)
    }

    /// The same for a collective that has failed by itself: says so at once, lest others blame this rank.
    pub(crate) fn diagnose_failed(&self, call: &Call) -> Diagnosis {
        self.shared.diagnose_failed(call)
    }

    /// Watches work that the host does not wait for. If it fails or exceeds its time-out this process ends with an error:
    /// the host may be inside a CUDA call that never returns.
    pub(crate) fn add(&self, call: Call, timeout: Duration, poll: Box<dyn Fn() -> Poll + Send>) {
        lock(&self.shared.in_flight).push(InFlight { call, started: Instant::now(), timeout, poll });
        self.poller.call_once(|| {
            let shared = self.shared.clone();
            thread::spawn(move || {
                loop {
                    thread::sleep(Duration::from_millis(100));
                    shared.poll_in_flight();
                }
            });
        });
    }

    /// Until the guard is dropped, `call` counts as work under way.
    pub(crate) fn guard(&self, call: Call, timeout: Duration) -> impl Drop + use<> {
        struct Guard(Arc<AtomicBool>);
        impl Drop for Guard {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let guard = Guard(Arc::new(AtomicBool::new(false)));
        let done = guard.0.clone();
        let poll = move || if done.load(Ordering::Relaxed) { Poll::Done } else { Poll::Pending };
        self.add(call, timeout, Box::new(poll));
        guard
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Lets the others know that this rank ended in good order; bounded, as the store may be gone.
        if self.stop.send(()).is_ok() {
            let _ = lock(&self.stopped).recv_timeout(BEAT);
        }
    }
}

fn heartbeat(store: &Store, shared: &Shared, stop: &Receiver<()>) {
    let rank = shared.rank;
    for count in 1u64.. {
        if !matches!(stop.recv_timeout(BEAT), Err(RecvTimeoutError::Timeout)) {
            // The run is over for this rank; if the store is gone, so is the need to say it.
            let _ = store.set(&format!("left/{rank}"), b"1");
            return;
        }
        // Without a store there is nobody to tell; the collectives notice by themselves.
        if store.set(&format!("beat/{rank}"), shared.beat(count).as_bytes()).is_err() {
            return;
        }
        match store.check("failed") {
            Ok(true) => shared.peer_failed.store(true, Ordering::Relaxed),
            Ok(false) => {}
            Err(_) => return,
        }
    }
}

/// What became of the members of a collective.
#[derive(Clone)]
struct Seen {
    /// World rank and what is known of it.
    missing: Vec<(i64, String)>,
    /// Ranks that gave up on a collective themselves.
    gave_up: Vec<i64>,
}

impl Shared {
    /// `count`, then `name=seq:op` of every group, separated by semicolons.
    fn beat(&self, count: u64) -> String {
        let calls = lock(&self.calls);
        calls.iter().fold(count.to_string(), |s, (name, (seq, op))| format!("{s};{name}={seq}:{op}"))
    }

    fn diagnose(self: &Arc<Self>, call: &Call) -> Diagnosis {
        let (found_tx, found) = channel();
        let (message, message_rx) = channel();
        let (told_tx, told) = channel();
        let (shared, thread_call) = (self.clone(), call.clone());
        thread::spawn(move || {
            let store = match shared.store.reconnect() {
                Ok(store) => store,
                Err(_) => return drop(found_tx.send(None)),
            };
            let seen = shared.observe(&store, &thread_call);
            if found_tx.send(seen.as_ref().ok().cloned()).is_err() {
                return; // the collective ended after all
            }
            if let (Ok(seen), Ok(())) = (seen, message_rx.recv()) {
                // If the store goes now there is nobody left to tell.
                let _ = shared.tell(&store, &thread_call, &seen);
            }
            let _ = told_tx.send(());
        });
        Diagnosis { call: call.clone(), shared: self.clone(), found, message, told }
    }

    fn diagnose_failed(self: &Arc<Self>, call: &Call) -> Diagnosis {
        let shared = self.clone();
        let _ = bounded(BEAT, move || shared.store.reconnect().and_then(|s| shared.give_up(&s)));
        self.diagnose(call)
    }

    fn poll_in_flight(self: &Arc<Self>) {
        let mut failed = None;
        lock(&self.in_flight).retain(|work| match (work.poll)() {
            Poll::Done => false,
            Poll::Failed(cause) => {
                failed.get_or_insert((work.call.clone(), Some(cause), work.timeout));
                true
            }
            Poll::Pending => {
                // The look at the other ranks takes the rest of the time.
                if work.started.elapsed() + Watch::observation(work.timeout) >= work.timeout {
                    failed.get_or_insert((work.call.clone(), None, work.timeout));
                }
                true
            }
        });
        let Some((call, cause, timeout)) = failed else { return };
        let error = match cause {
            Some(cause) => self.diagnose_failed(&call).finish(&cause),
            None => {
                let diagnosis = self.diagnose(&call);
                thread::sleep(Watch::observation(timeout));
                let same = |w: &InFlight| w.call.group == call.group && w.call.seq == call.seq;
                if lock(&self.in_flight).iter().any(|w| same(w) && matches!((w.poll)(), Poll::Done)) {
                    return;
                }
                diagnosis.finish(&format!("timed out after {:.0} s", timeout.as_secs_f64()))
            }
        };
        match REPORTER.get() {
            Some(tell) => tell(&error),
            None => eprintln!("error: {error}"),
        }
        crate::cuda::exit_now(1);
    }

    fn give_up(&self, store: &Store) -> Result<()> {
        store.set(&format!("err/{}", self.rank), b"1")?;
        store.set("failed", b"1")
    }

    /// Two looks at the heartbeats of the members, some beats apart.
    fn observe(&self, store: &Store, call: &Call) -> Result<Seen> {
        let others = || call.ranks.iter().copied().filter(|&r| r != self.rank);
        let beat = |r: i64| -> Result<Option<String>> {
            let key = format!("beat/{r}");
            if !store.check(&key)? {
                return Ok(None);
            }
            Ok(Some(String::from_utf8_lossy(&store.get_within(&key, BEAT)?).into_owned()))
        };
        let before = others().map(beat).collect::<Result<Vec<_>>>()?;
        thread::sleep(3 * BEAT);
        let mut seen = Seen { missing: Vec::new(), gave_up: Vec::new() };
        for (r, before) in others().zip(before) {
            let now = beat(r)?;
            if store.check(&format!("err/{r}"))? {
                seen.gave_up.push(r);
            } else if store.check(&format!("left/{r}"))? {
                seen.missing.push((r, "has ended".into()));
            } else if now == before {
                seen.missing.push((r, "gives no sign of life: killed, crashed or stopped".into()));
            } else if let Some(what) = behind(now.as_deref().unwrap_or(""), call) {
                seen.missing.push((r, what));
            }
        }
        Ok(seen)
    }

    /// Marks this rank as one that gave up. The rank that keeps the store stays until the others have had their look.
    fn tell(&self, store: &Store, call: &Call, seen: &Seen) -> Result<()> {
        self.give_up(store)?;
        store.set(&format!("told/{}", self.rank), b"1")?;
        if !self.serves {
            return Ok(());
        }
        let deadline = Instant::now() + 8 * BEAT;
        let alive =
            call.ranks.iter().filter(|r| **r != self.rank && !seen.missing.iter().any(|m| m.0 == **r));
        for r in alive {
            while !store.check(&format!("told/{r}"))? && Instant::now() < deadline {
                thread::sleep(BEAT / 5);
            }
        }
        Ok(())
    }
}

/// What a living rank's heartbeat says about `call`, if it has not called it.
fn behind(beat: &str, call: &Call) -> Option<String> {
    let last = beat.split(';').skip(1).find_map(|entry| {
        let (name, at) = entry.rsplit_once('=')?;
        let (seq, op) = at.split_once(':')?;
        (name == call.group).then_some((seq.parse::<u64>().ok()?, op))
    });
    match last {
        None => Some("is alive, but has not joined the group".into()),
        Some((0, _)) if call.seq > 0 => Some("is alive, but has called nothing in the group yet".into()),
        Some((seq, op)) if seq < call.seq => {
            Some(format!("is alive, but got only to #{seq} ({op}) of the group"))
        }
        Some((seq, op)) if seq == call.seq && op != call.op => Some(format!("called {op} as #{seq} instead")),
        Some(_) => None,
    }
}

/// A look at the other ranks under way.
pub(crate) struct Diagnosis {
    call: Call,
    shared: Arc<Shared>,
    found: Receiver<Option<Seen>>,
    message: Sender<()>,
    told: Receiver<()>,
}

impl Diagnosis {
    /// Waits for the result (2 s, a little more if the store is slow) and words the error.
    pub(crate) fn finish(self, cause: &str) -> Error {
        let Call { group, seq, op, ranks } = &self.call;
        // Gloo begins with the place in its source.
        let cause = match cause.split_once("] ") {
            Some((place, rest)) if place.starts_with('[') && place.contains(".cc:") => rest,
            _ => cause,
        };
        let head = match seq {
            0 => format!("{op} of group `{group}` failed on rank {}: {cause}", self.shared.rank),
            _ => format!("{op} #{seq} of group `{group}` failed on rank {}: {cause}", self.shared.rank),
        };
        let seen = match self.found.recv_timeout(6 * BEAT) {
            Ok(Some(seen)) => seen,
            Ok(None) => {
                let at = self.shared.store.address();
                return Error::new(format!(
                    "{head}; missing: rank 0 (the store that it keeps at {at} is gone)"
                ));
            }
            Err(_) => {
                let at = self.shared.store.address();
                return Error::new(format!(
                    "{head}; missing: rank 0 (the store that it keeps at {at} does not answer)"
                ));
            }
        };
        if self.message.send(()).is_ok() {
            let _ = self.told.recv_timeout(if self.shared.serves { 10 * BEAT } else { BEAT });
        }
        let list = |items: Vec<String>| items.join(", ");
        let missing = list(seen.missing.iter().map(|(r, what)| format!("rank {r} ({what})")).collect());
        let gave_up = list(seen.gave_up.iter().map(|r| format!("rank {r}")).collect());
        Error::new(match (seen.missing.is_empty(), seen.gave_up.is_empty()) {
            (false, _) => format!("{head}; missing: {missing}"),
            (true, false) => format!("{head}; {gave_up} failed as well: see the message there"),
            (true, true) => format!(
                "{head}; all {} ranks are alive and called it: the network between them failed or is too slow",
                ranks.len()
            ),
        })
    }
}
