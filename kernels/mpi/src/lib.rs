//! The engine over MPI: `--backend mpi`, in programs built with the feature `mpi`. [`connect`] is what `kernels` is given for it.
//!
//! One thread makes all calls of MPI (level "funneled", which every MPI has), begins what other threads order, and drives what is
//! under way. MPI moves bytes; sums are libtorch's, in the order of ranks, so that results do not depend on the MPI or on
//! which rank is faster.

#![allow(unsafe_code)] // calls of MPI
#![warn(missing_docs)]

mod calls;
mod exchanges;
mod thread;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use self::calls::Communicator;
use self::thread::{Order, Task, give};
use kernels::comm::engine::{Collective, Engine, Exchange};
use kernels::{Error, Result};

pub use self::thread::leave;

/// Connects the world ranks `ranks`, of which this process is number `rank` there. All of them call this. The first call starts MPI.
///
/// Errors: MPI does not start, has not started these ranks, or numbers them otherwise than the environment.
pub fn connect(name: &str, ranks: &[i64], rank: usize) -> Result<Box<dyn Engine>> {
    let (answer, answered) = channel();
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    // Tells groups apart that are made at the same time; every MPI has tags up to 32767.
    let tag = (hasher.finish() % 32768) as i32;
    give(Order::Connect { ranks: ranks.iter().map(|r| *r as i32).collect(), tag, answer })?;
    let communicator = answered
        .recv()
        .map_err(|_| Error::new("MPI has ended in this process"))?
        .map_err(|e| e.context(format!("MPI group `{name}`")))?;
    let number = ranks[rank];
    match communicator.world_rank == number {
        true => Ok(Box::new(MpiGroup { communicator, begun: Mutex::new(0) })),
        false => Err(Error::new(format!(
            "MPI calls this process rank {}, the environment rank {number}: start ranks with mpirun or srun --mpi=pmix",
            communicator.world_rank
        ))),
    }
}

/// A communicator of MPI.
struct MpiGroup {
    communicator: Communicator,
    /// How many collectives have begun: their messages are told apart by it.
    begun: Mutex<u64>,
}

impl Drop for MpiGroup {
    fn drop(&mut self) {
        // Without the thread there is no MPI any more, and nothing to free.
        let _ = give(Order::Disconnect(self.communicator));
    }
}

impl Engine for MpiGroup {
    fn begin(&self, collective: &Collective) -> Result<Box<dyn Exchange>> {
        let mut begun = lock(&self.begun);
        // Ranks that call different collectives do not get each other's messages. Every MPI has tags up to 32767.
        let tag = (*begun % 4096) as i32 * 8 + kind(collective);
        *begun += 1;
        let state = Arc::new(State::default());
        let steps = exchanges::steps(collective, self.communicator, tag)?;
        // Under the lock: MPI's own collectives are matched by their order.
        give(Order::Begin(Task::new(steps, state.clone())))?;
        drop(begun);
        Ok(Box::new(MpiExchange(state)))
    }
}

/// A number below 8; a send and its receive have the same.
fn kind(collective: &Collective) -> i32 {
    match collective {
        Collective::AllReduce { .. } => 0,
        Collective::AllGather { .. } => 1,
        Collective::ReduceScatter { .. } => 2,
        Collective::Broadcast { .. } => 3,
        Collective::AllToAll { .. } => 4,
        Collective::Send { .. } | Collective::Receive { .. } => 5,
    }
}

/// The result of a collective; `None` until it has ended.
#[derive(Default)]
struct State {
    ended: Mutex<Option<Result<()>>>,
    changed: Condvar,
}

impl State {
    fn end(&self, result: Result<()>) {
        *lock(&self.ended) = Some(result);
        self.changed.notify_all();
    }
}

struct MpiExchange(Arc<State>);

impl Exchange for MpiExchange {
    fn wait(&self, limit: Duration) -> Result<bool> {
        let until = Instant::now() + limit;
        let mut ended = lock(&self.0.ended);
        while ended.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            ended = self.0.changed.wait_timeout(ended, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        ended.clone().unwrap_or(Ok(())).map(|()| true)
    }

    fn is_done(&self) -> Result<bool> {
        lock(&self.0.ended).clone().map_or(Ok(false), |result| result.map(|()| true))
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}
