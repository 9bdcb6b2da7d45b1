//! Which ranks are missing from a collective, by what all tell the store (see [`super::watch`] for its keys).

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::store::Store;
use crate::error::{Error, Result};

/// How often every rank tells the store that it is alive.
pub(crate) const BEAT: Duration = Duration::from_millis(500);

/// One collective of one group. `seq` counts the group's collectives from 1.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) group: String,
    /// World ranks of the members.
    pub(crate) ranks: Vec<i64>,
    pub(crate) seq: u64,
    pub(crate) op: &'static str,
}

/// This process as one of the run's ranks.
pub(crate) struct Member {
    pub(crate) store: Store,
    pub(crate) rank: i64,
    /// Whether the store lives in this process.
    pub(crate) serves: bool,
}

/// Runs `body` in a thread and waits at most `limit`: a call to a store whose server is stopped never returns.
pub(crate) fn bounded<T: Send + 'static>(
    limit: Duration,
    body: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (tx, rx) = channel();
    thread::spawn(move || tx.send(body()));
    rx.recv_timeout(limit)
        .unwrap_or_else(|_| Err(Error::new("the store does not answer: rank 0, which serves it, hangs")))
}

/// What became of the members of a collective.
#[derive(Clone)]
pub(crate) struct Seen {
    /// World rank and what is known of it.
    pub(crate) missing: Vec<(i64, String)>,
    /// Ranks that gave up on a collective themselves.
    pub(crate) gave_up: Vec<i64>,
}

impl Member {
    pub(crate) fn diagnose(self: &Arc<Self>, call: &Call) -> Diagnosis {
        let (found_tx, found) = channel();
        let (message, message_rx) = channel();
        let (told_tx, told) = channel();
        let (member, thread_call) = (self.clone(), call.clone());
        thread::spawn(move || {
            let store = match member.store.reconnect() {
                Ok(store) => store,
                Err(_) => return drop(found_tx.send(None)),
            };
            let seen = member.observe(&store, &thread_call);
            if found_tx.send(seen.as_ref().ok().cloned()).is_err() {
                return; // the collective ended after all
            }
            if let (Ok(seen), Ok(())) = (seen, message_rx.recv()) {
                // If the store goes now there is nobody left to tell.
                let _ = member.tell(&store, &thread_call, &seen);
            }
            let _ = told_tx.send(());
        });
        Diagnosis { call: call.clone(), member: self.clone(), found, message, told }
    }

    pub(crate) fn diagnose_failed(self: &Arc<Self>, call: &Call) -> Diagnosis {
        let member = self.clone();
        let _ = bounded(BEAT, move || member.store.reconnect().and_then(|s| member.give_up(&s)));
        self.diagnose(call)
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
    pub(crate) fn tell(&self, store: &Store, call: &Call, seen: &Seen) -> Result<()> {
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
        Some((0, _)) if call.seq > 0 => {
            Some("is alive, but has not called any collective of the group yet".into())
        }
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
    member: Arc<Member>,
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
            0 => format!("{op} of group `{group}` failed on rank {}: {cause}", self.member.rank),
            _ => format!("{op} #{seq} of group `{group}` failed on rank {}: {cause}", self.member.rank),
        };
        let seen = match self.found.recv_timeout(6 * BEAT) {
            Ok(Some(seen)) => seen,
            Ok(None) => {
                let at = self.member.store.address();
                return Error::new(format!(
                    "{head}; missing: rank 0 (the store that it serves at {at} is gone)"
                ));
            }
            Err(_) => {
                let at = self.member.store.address();
                return Error::new(format!(
                    "{head}; missing: rank 0 (the store that it serves at {at} does not answer)"
                ));
            }
        };
        if self.message.send(()).is_ok() {
            let _ = self.told.recv_timeout(if self.member.serves { 10 * BEAT } else { BEAT });
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
