//! Who is alive and how far: every process tells the store twice a second which collectives it has called, so that a
//! failed collective can name the ranks that are missing.
//!
//! Keys in the store: `beat/R` (a count and the last call in each group), `err/R` (R gave up on a collective; it is not
//! the one to blame), `told/R` (R has printed who is missing), `left/R` (R ended in good order), `failed` (somebody gave up).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use super::diagnosis::{BEAT, Call, Diagnosis, Member, Seen, bounded};
use super::engine::Poll;
use super::store::Store;
use crate::error::{Error, Result};
use crate::host::process::exit_now;

static REPORTER: OnceLock<fn(&Error)> = OnceLock::new();

/// Sets how an error is reported that ends the process from the watching thread; by default, as a line on stderr.
pub fn set_error_reporter(report: fn(&Error)) {
    let _ = REPORTER.set(report);
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
    member: Arc<Member>,
    world_size: i64,
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

impl Watch {
    /// Tells the store that rank `rank` of `world_size` is here, and goes on telling. `serves`: the store is in this process.
    pub fn start(store: Store, rank: i64, world_size: i64, serves: bool) -> Result<Arc<Watch>> {
        let beats = store.reconnect()?;
        let shared = Arc::new(Shared {
            member: Arc::new(Member { store, rank, serves }),
            world_size,
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

    /// This process's rank in the world.
    pub fn rank(&self) -> i64 {
        self.shared.member.rank
    }

    /// How many ranks the world has.
    pub fn world_size(&self) -> i64 {
        self.shared.world_size
    }

    /// The connection to the store.
    pub fn store(&self) -> &Store {
        &self.shared.member.store
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
        let (member, my_key) = (self.shared.member.clone(), key(self.shared.member.rank));
        let limit = timeout.saturating_add(20 * BEAT);
        bounded(limit, move || member.store.reconnect()?.set(&my_key, &mine))?;
        self.meet("meet", "world", &ranks, timeout)?;
        let (member, world_size) = (self.shared.member.clone(), self.shared.world_size);
        bounded(limit, move || {
            let store = member.store.reconnect()?;
            if member.rank != 0 {
                let found = store.get_within("facts/found", timeout)?;
                store.add("facts/read", 1)?;
                return Ok(Some(String::from_utf8_lossy(&found).into_owned()).filter(|f| !f.is_empty()));
            }
            let all = ranks.iter().map(|rank| store.get_within(&key(*rank), timeout));
            let found = compare(&all.collect::<Result<Vec<_>>>()?);
            store.set("facts/found", found.as_deref().unwrap_or_default().as_bytes())?;
            // Where all end now, the store, which this rank may keep, stays until all know why.
            let deadline = Instant::now() + 8 * BEAT;
            while found.is_some() && store.add("facts/read", 0)? < world_size - 1 && Instant::now() < deadline
            {
                thread::sleep(BEAT / 25);
            }
            Ok(found)
        })
    }

    /// Waits until all `ranks` have called this; `name` is the group that is made, for messages.
    fn meet(&self, what: &'static str, name: &str, ranks: &[i64], timeout: Duration) -> Result<()> {
        let (member, name, ranks) = (self.shared.member.clone(), name.to_string(), ranks.to_vec());
        let limit = timeout.saturating_add(20 * BEAT);
        bounded(limit, move || {
            let store = member.store.reconnect()?;
            let (all, me) = (format!("{what}/{name}/all"), format!("{what}/{name}/{}", member.rank));
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
                    member.tell(&store, &call, &Seen { missing: seen, gave_up: Vec::new() })?;
                    let waited = timeout.saturating_sub(deadline.saturating_duration_since(Instant::now()));
                    return Err(Error::new(not_joined(&name, ranks.len(), &missing, waited)));
                }
            }
            Ok(())
        })
    }

    /// Starts to look at the other members of a collective that is about to run out of time.
    pub(crate) fn diagnose(&self, call: &Call) -> Diagnosis {
        self.shared.member.diagnose(call)
    }

    /// The same for a collective that has failed by itself: says so at once, lest others blame this rank.
    pub(crate) fn diagnose_failed(&self, call: &Call) -> Diagnosis {
        self.shared.member.diagnose_failed(call)
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

/// The error of a group that some ranks have not joined in time.
fn not_joined(name: &str, ranks: usize, missing: &[i64], waited: Duration) -> String {
    let who = missing.iter().map(|r| format!("rank {r}")).collect::<Vec<_>>().join(", ");
    let waited = waited.as_secs_f64();
    match missing.len() {
        0 => format!("the group `{name}` of {ranks} ranks was not complete within {waited:.0} s"),
        n => {
            let have = if n == 1 { "has" } else { "have" };
            format!(
                "{who} {have} not joined within {waited:.0} s (group `{name}` of {ranks} ranks): not started, or cannot reach this host"
            )
        }
    }
}

/// Beats without a sign of life after which a rank is lost. They are counted by the rank that looks: where all are stopped for a while,
/// none is lost.
const SILENT_BEATS: u32 = 60;

/// The rank after this one, of which this one looks whether it lives: a connection may stay open although nobody is there.
struct NextRank {
    rank: i64,
    last: Vec<u8>,
    silent: u32,
}

impl NextRank {
    fn of(shared: &Shared) -> Option<NextRank> {
        let next = (shared.member.rank + 1) % shared.world_size;
        (shared.world_size > 1).then(|| NextRank { rank: next, last: Vec::new(), silent: 0 })
    }

    /// Looks once; whether it was silent for too long, which is said once.
    fn is_lost(&mut self, store: &Store) -> Result<bool> {
        let key = format!("beat/{}", self.rank);
        let beat = match store.check(&key)? {
            true => store.get_within(&key, BEAT)?,
            false => Vec::new(), // it has not come yet: the meeting has a time-out of its own
        };
        match beat.is_empty() || beat != self.last {
            true => (self.last, self.silent) = (beat, 0),
            false => self.silent += 1,
        }
        Ok(self.silent == SILENT_BEATS && !store.check(&format!("left/{}", self.rank))?)
    }
}

fn heartbeat(store: &Store, shared: &Shared, stop: &Receiver<()>) {
    let rank = shared.member.rank;
    let mut next_rank = NextRank::of(shared);
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
        let lost = next_rank.as_mut().map_or(Ok(false), |n| n.is_lost(store));
        // All ranks that wait for something then look who is missing.
        if matches!(lost, Ok(true)) && store.set("failed", b"1").is_err() {
            return;
        }
        match store.check("failed") {
            Ok(true) => shared.peer_failed.store(true, Ordering::Relaxed),
            Ok(false) => {}
            Err(_) => return,
        }
    }
}

impl Shared {
    /// `count`, then `name=seq:op` of every group, separated by semicolons.
    fn beat(&self, count: u64) -> String {
        let calls = lock(&self.calls);
        calls.iter().fold(count.to_string(), |s, (name, (seq, op))| format!("{s};{name}={seq}:{op}"))
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
            Some(cause) => self.member.diagnose_failed(&call).finish(&cause),
            None => {
                let diagnosis = self.member.diagnose(&call);
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
        exit_now(1);
    }
}
