//! The thread that makes all calls of MPI.

use std::ffi::c_int;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::environment::Universe;

use super::calls::{self, Communicator};
use super::exchanges::{Progress, Steps};
use super::{State, lock};
use kernels::{Error, Result};

/// An order to the thread.
pub(super) enum Order {
    /// A communicator of these ranks of the world, which all of them ask for.
    Connect { ranks: Vec<c_int>, tag: c_int, answer: Sender<Result<Communicator>> },
    /// A collective.
    Begin(Task),
    /// Frees a communicator.
    Disconnect(Communicator),
    /// The end of MPI in this process.
    Leave(Sender<()>),
}

/// A collective under way, and who waits for it.
pub(super) struct Task {
    steps: Option<Box<dyn Steps>>,
    state: Arc<State>,
}

impl Task {
    pub(super) fn new(steps: Box<dyn Steps>, state: Arc<State>) -> Task {
        Task { steps: Some(steps), state }
    }

    fn advance(&mut self) -> Result<Progress> {
        self.steps.as_mut().map_or(Ok(Progress::Done), |steps| steps.advance())
    }

    fn end(mut self, result: Result<()>) {
        // Its tensors go before anybody hears of the end, and allocates what comes next.
        self.steps = None;
        self.state.end(result);
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // Where it has not ended, the thread has.
        if self.steps.is_some() {
            self.state.end(Err(Error::new("the thread for MPI has ended")));
        }
    }
}

/// Between looks at what is under way: MPI goes on only inside of its own functions, and the cores compute. The longer nothing
/// has happened, the longer a pause, a sixteenth of that time: looks every 50 µs at a receive that a stage of a pipeline has posted
/// long before its time took a seventh of a step.
const PAUSES: [Duration; 2] = [Duration::from_micros(50), Duration::from_micros(500)];

/// So long after the last progress it looks without a pause.
const EAGER: Duration = Duration::from_micros(30);

static ORDERS: OnceLock<Result<Mutex<Sender<Order>>>> = OnceLock::new();

/// Hands an order to the thread, which begins with the first one.
pub(super) fn give(order: Order) -> Result<()> {
    let orders = ORDERS.get_or_init(start).as_ref().map_err(Error::clone)?;
    lock(orders).send(order).map_err(|_| Error::new("MPI has ended in this process"))
}

/// Leaves MPI, where this process has joined it: the process is about to end in good order. One that ends otherwise does not call this,
/// so that `mpirun` ends the others.
pub fn leave() {
    let (answer, answered) = channel();
    if ORDERS.get().is_some() && give(Order::Leave(answer)).is_ok() {
        // MPI waits there for the other ranks, one of which may be lost.
        let _ = answered.recv_timeout(Duration::from_secs(600));
    }
}

fn start() -> Result<Mutex<Sender<Order>>> {
    let (orders, received) = channel();
    let (answer, answered) = channel();
    thread::Builder::new()
        .name("corral_mpi".into())
        .spawn(move || match join() {
            Ok(universe) => {
                let _ = answer.send(Ok(()));
                tch::no_grad(|| serve(universe, &received));
            }
            Err(e) => drop(answer.send(Err(e))),
        })
        .map_err(|e| Error::new(format!("the thread for MPI: {e}")))?;
    answered.recv().map_err(|_| Error::new("MPI did not start"))??;
    Ok(Mutex::new(orders))
}

fn join() -> Result<Universe> {
    let (universe, level) = mpi::initialize_with_threading(Threading::Funneled)
        .ok_or_else(|| Error::new("MPI has been started in this process before"))?;
    if level < Threading::Funneled {
        return Err(Error::new(
            "this MPI does not allow that one of several threads calls it (MPI_THREAD_FUNNELED)",
        ));
    }
    calls::return_errors(&universe.world())?;
    // The cores compute.
    kernels::host::use_one_thread_here();
    Ok(universe)
}

fn serve(universe: Universe, orders: &Receiver<Order>) {
    let world = universe.world();
    let mut tasks: Vec<Task> = Vec::new();
    let mut progress = Instant::now();
    loop {
        match next(orders, tasks.is_empty(), progress) {
            Some(Order::Connect { ranks, tag, answer }) => {
                let made = match calls::world_size(&world) {
                    Ok(size) if ranks.iter().any(|r| i64::from(*r) >= size) => Err(Error::new(format!(
                        "MPI has started {size} of the ranks {ranks:?}: start them with mpirun or srun --mpi=pmix"
                    ))),
                    Ok(_) => Communicator::of(&world, &ranks, tag),
                    Err(e) => Err(e),
                };
                let _ = answer.send(made);
            }
            Some(Order::Begin(task)) => {
                progress = Instant::now();
                tasks.push(task);
            }
            Some(Order::Disconnect(communicator)) => communicator.free(),
            Some(Order::Leave(answer)) => {
                drop(universe);
                let _ = answer.send(());
                return;
            }
            None => {}
        }
        let mut i = 0;
        while i < tasks.len() {
            let advanced = tasks[i].advance();
            if advanced.as_ref().is_ok_and(|p| *p == Progress::None) {
                i += 1;
                continue;
            }
            progress = Instant::now();
            match advanced {
                Ok(Progress::Done) => tasks.remove(i).end(Ok(())),
                Ok(_) => i += 1,
                Err(e) => tasks.remove(i).end(Err(e)),
            }
        }
    }
}

/// The next order, if there is one: waits for it where nothing is under way, else at most for a pause.
fn next(orders: &Receiver<Order>, idle: bool, progress: Instant) -> Option<Order> {
    if idle {
        // Nobody can give orders any more when the process ends.
        return orders.recv().ok();
    }
    match orders.try_recv() {
        Ok(order) => return Some(order),
        Err(TryRecvError::Disconnected) => return None,
        Err(TryRecvError::Empty) => {}
    }
    if progress.elapsed() < EAGER {
        thread::yield_now();
        return None;
    }
    let [shortest, longest] = PAUSES;
    orders.recv_timeout((progress.elapsed() / 16).clamp(shortest, longest)).ok()
}
