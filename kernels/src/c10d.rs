//! Communication between ranks: libtorch's c10d (TCPStore, Gloo, NCCL) behind safe types.
//!
//! A [`Store`] is the key-value store that ranks meet in; a [`Group`] is a set of ranks that call the same collectives in
//! the same order; a [`Work`] is a collective under way. Failures are told by rank: see [`crate::watch`].

use crate::abi::*;
use crate::error::{Error, Result, c_string, check, take_string};
pub use crate::store::Store;
use crate::store::millis;
use crate::watch::{Call, Poll, Watch};
use std::ffi::{c_char, c_int};
use std::fmt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// What libtorch's flight recorder has recorded (JSON): nothing, unless the user has switched it on.
pub fn recorder_trace() -> Result<String> {
    let mut trace = std::ptr::null_mut();
    // SAFETY: the function fills `trace` or gives a message.
    check(unsafe { corral_recorder_trace(&mut trace) })?;
    Ok(take_string(trace))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    Gloo,
    Nccl,
}

impl Backend {
    pub fn name(self) -> &'static str {
        match self {
            Backend::Gloo => "gloo",
            Backend::Nccl => "nccl",
        }
    }
}

/// How all-reduce and reduce-scatter combine values. `Avg` is for floating-point tensors; Gloo sums in the tensor's dtype
/// and then divides (in bf16 the sum is rounded to bf16 before).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    Sum,
    Max,
    Min,
    Avg,
}

/// Ranks that communicate. All members call the same collectives in the same order. Cheap to clone.
#[derive(Clone)]
pub struct Group(Arc<Inner>);

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "group `{}`: rank {} of {} ({})",
            self.name(),
            self.rank(),
            self.size(),
            self.backend_name()
        )
    }
}

struct Inner {
    name: String,
    /// World ranks of the members; the position is the rank in the group.
    ranks: Vec<i64>,
    rank: usize,
    timeout: Duration,
    device: Device,
    link: Option<Link>,
}

/// What a group that communicates has; a group of one has none.
struct Link {
    backend: Backend,
    raw: *mut BackendPtr,
    watch: Arc<Watch>,
    /// Number of the last collective; locked while one is issued, so that numbers follow the order of issue.
    issued: Mutex<u64>,
    /// Collectives not waited for yet.
    pending: AtomicI64,
    /// Set when a collective failed: all later ones fail likewise.
    failure: OnceLock<Error>,
}

// SAFETY: c10d's process groups may be called from any thread; calls that issue work are serialised by `issued`.
unsafe impl Send for Link {}
unsafe impl Sync for Link {}

impl Drop for Link {
    fn drop(&mut self) {
        // The backend's destructor waits for what is under way, which after an error here or there may never end: then it
        // is left alone.
        if self.failure.get().is_some() || self.pending.load(Ordering::Acquire) > 0 {
            return;
        }
        if self.backend == Backend::Nccl {
            // Nothing to do about an error here: the group is gone either way.
            let _ = crate::cuda::nccl_shutdown(self.raw);
        }
        // SAFETY: `raw` came from the C ABI and is freed once; works hold no reference to it that is used afterwards.
        unsafe { corral_backend_free(self.raw) }
    }
}

impl Group {
    /// A group of one: collectives copy or do nothing, and nothing communicates.
    pub fn solo() -> Group {
        Group(Arc::new(Inner {
            name: "solo".into(),
            ranks: vec![0],
            rank: 0,
            timeout: Duration::MAX,
            device: Device::Cpu,
            link: None,
        }))
    }

    /// Joins the group `name` (unique in the run) of the world ranks `ranks`, of which this process must be one. All of
    /// them must call this. Every collective must end within `timeout`.
    ///
    /// `device`: the GPU for NCCL (its tensors must be there); with Gloo, CUDA tensors are copied through the host.
    ///
    /// Errors name the ranks that did not join in time.
    pub fn new(
        watch: &Arc<Watch>,
        backend: Backend,
        name: &str,
        ranks: &[i64],
        timeout: Duration,
        device: Device,
    ) -> Result<Group> {
        let Some(rank) = ranks.iter().position(|&r| r == watch.rank()) else {
            return Err(Error::new(format!(
                "rank {} is not a member of the group `{name}` {ranks:?}",
                watch.rank()
            )));
        };
        if ranks.iter().any(|&r| r < 0 || r >= watch.world_size())
            || (1..ranks.len()).any(|i| ranks[..i].contains(&ranks[i]))
        {
            let size = watch.world_size();
            return Err(Error::new(format!(
                "group `{name}`: {ranks:?} are not different ranks of a world of {size}"
            )));
        }
        watch.join(name, ranks, timeout)?;
        let raw = match (backend, device) {
            (Backend::Gloo, _) => gloo(watch.store(), rank, ranks.len(), name, timeout)?,
            (Backend::Nccl, Device::Cuda(index)) => {
                // The watcher covers the set-up too: it would otherwise wait for a lost peer without limit.
                let done = watch
                    .guard(Call { group: name.into(), ranks: ranks.to_vec(), seq: 0, op: "set-up" }, timeout);
                let raw = crate::cuda::nccl(
                    watch.store(),
                    rank,
                    ranks.len(),
                    name,
                    backend_timeout(timeout),
                    index,
                )?;
                drop(done);
                raw
            }
            (Backend::Nccl, _) => return Err(Error::new("NCCL needs a CUDA device")),
        };
        let link = Link {
            backend,
            raw,
            watch: watch.clone(),
            issued: Mutex::new(0),
            pending: AtomicI64::new(0),
            failure: OnceLock::new(),
        };
        let ranks = ranks.to_vec();
        Ok(Group(Arc::new(Inner { name: name.into(), ranks, rank, timeout, device, link: Some(link) })))
    }

    /// This process's rank in the group.
    pub fn rank(&self) -> i64 {
        self.0.rank as i64
    }

    pub fn size(&self) -> i64 {
        self.0.ranks.len() as i64
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The members' world ranks, by rank in the group.
    pub fn ranks(&self) -> &[i64] {
        &self.0.ranks
    }

    /// `gloo`, `nccl`, or `none` for a group of one.
    pub fn backend_name(&self) -> &'static str {
        self.0.link.as_ref().map_or("none", |l| l.backend.name())
    }

    /// Combines `t` over all ranks, in place on all of them.
    pub fn all_reduce(&self, t: &Tensor, op: ReduceOp) -> Result<Work> {
        self.whole("all-reduce", &[t])?;
        averages("all-reduce", t, op)?;
        let Some(link) = &self.0.link else { return Ok(Work::done()) };
        let staged = Staged::new(link, t, Some(t))?;
        let raw_op = link.reduce_op(op);
        // SAFETY (here and in the other collectives): tensors are alive during the call; c10d keeps its own references
        // while the collective runs.
        self.issue(link, "all-reduce", &[&staged.out], |b, w| unsafe {
            corral_all_reduce(b, staged.out.as_ptr(), raw_op, w)
        })
        .map(|work| work.then(staged.after(link.divisor(op, self.size()))))
    }

    /// Concatenates every rank's `input` into `out`, by rank. `out`: `size * input.numel()` elements, same dtype.
    pub fn all_gather(&self, out: &Tensor, input: &Tensor) -> Result<Work> {
        self.split("all-gather", out, input, out.numel(), input.numel())?;
        let Some(link) = &self.0.link else { return copied(out, input) };
        let (staged, input) = Staged::flat(link, out, input)?;
        self.issue(link, "all-gather", &[&staged.out, &input], |b, w| unsafe {
            corral_all_gather(b, staged.out.as_ptr(), input.as_ptr(), w)
        })
        .map(|work| work.then(staged.after(None)))
    }

    /// Combines `input` over all ranks and gives rank r its r-th part as `out`. `input`: `size * out.numel()` elements,
    /// same dtype; it is left as it is.
    pub fn reduce_scatter(&self, out: &Tensor, input: &Tensor, op: ReduceOp) -> Result<Work> {
        self.split("reduce-scatter", out, input, input.numel(), out.numel())?;
        averages("reduce-scatter", out, op)?;
        let Some(link) = &self.0.link else { return copied(out, input) };
        let (staged, input) = Staged::flat(link, out, input)?;
        let raw_op = link.reduce_op(op);
        self.issue(link, "reduce-scatter", &[&staged.out, &input], |b, w| unsafe {
            corral_reduce_scatter(b, staged.out.as_ptr(), input.as_ptr(), raw_op, w)
        })
        .map(|work| work.then(staged.after(link.divisor(op, self.size()))))
    }

    /// Overwrites `t` on all ranks with that of rank `root` (a rank of the group).
    pub fn broadcast(&self, t: &Tensor, root: i64) -> Result<Work> {
        self.whole("broadcast", &[t])?;
        if root < 0 || root >= self.size() {
            return Err(Error::new(format!(
                "broadcast in group `{}`: no rank {root} of {}",
                self.name(),
                self.size()
            )));
        }
        let Some(link) = &self.0.link else { return Ok(Work::done()) };
        let staged = Staged::new(link, t, Some(t))?;
        self.issue(link, "broadcast", &[&staged.out], |b, w| unsafe {
            corral_broadcast(b, staged.out.as_ptr(), root, w)
        })
        .map(|work| work.then(staged.after(None)))
    }

    /// Sends the r-th of `size` equal parts of `input` (along dimension 0) to rank r; `out` gets the parts by sender.
    pub fn all_to_all(&self, out: &Tensor, input: &Tensor) -> Result<Work> {
        self.whole("all-to-all", &[out, input])?;
        let divides = |t: &Tensor| t.dim() > 0 && t.size()[0] % self.size() == 0;
        if out.size() != input.size() || out.kind() != input.kind() || !divides(out) {
            return Err(Error::new(format!(
                "all-to-all in group `{}` of {}: out {} and input {} must be equal in shape and dtype, and dimension 0 a \
                 multiple of the group's size",
                self.name(),
                self.size(),
                describe(out),
                describe(input)
            )));
        }
        let Some(link) = &self.0.link else { return copied(out, input) };
        let staged = Staged::new(link, out, None)?;
        let input = staged.input(input);
        self.issue(link, "all-to-all", &[&staged.out, &input], |b, w| unsafe {
            corral_all_to_all(b, staged.out.as_ptr(), input.as_ptr(), w)
        })
        .map(|work| work.then(staged.after(None)))
    }

    /// Returns when all ranks have called it (with NCCL: and all earlier work of this GPU's current stream is done).
    pub fn barrier(&self) -> Result<()> {
        let Some(link) = &self.0.link else { return Ok(()) };
        let device = if link.backend == Backend::Nccl { self.0.device } else { Device::Cpu };
        let one = Tensor::ones([1], (Kind::Float, device));
        self.issue(link, "barrier", &[&one], |b, w| unsafe { corral_all_reduce(b, one.as_ptr(), 0, w) })?
            .wait()?;
        // Reading the value makes the host wait for the GPU.
        let seen = one.f_double_value(&[0])?;
        if seen as i64 != self.size() {
            return Err(Error::new(format!(
                "barrier of group `{}`: {seen} of {} ranks",
                self.name(),
                self.size()
            )));
        }
        Ok(())
    }

    /// Combines a few numbers over all ranks and waits: for decisions that ranks must take together.
    pub fn combine(&self, values: &[f64], op: ReduceOp) -> Result<Vec<f64>> {
        let t = Tensor::from_slice(values);
        let nccl = self.0.link.as_ref().is_some_and(|l| l.backend == Backend::Nccl);
        let t = if nccl { t.f_to_device(self.0.device)? } else { t };
        self.all_reduce(&t, op)?.wait()?;
        Ok(Vec::<f64>::try_from(&t.f_to_device(Device::Cpu)?)?)
    }

    fn issue(
        &self,
        link: &Link,
        op: &'static str,
        tensors: &[&Tensor],
        call: impl FnOnce(*const BackendPtr, *mut *mut WorkPtr) -> *mut c_char,
    ) -> Result<Work> {
        if let Some(error) = link.failure.get() {
            return Err(error.clone());
        }
        let mut issued = link.issued.lock().unwrap_or_else(|e| e.into_inner());
        *issued += 1;
        let call_id = Call { group: self.0.name.clone(), ranks: self.0.ranks.clone(), seq: *issued, op };
        link.watch.called(&call_id);
        let started = Instant::now();
        let mut raw = null_mut();
        let result = check(call(link.raw, &mut raw));
        drop(issued);
        if let Err(cause) = result {
            return Err(self.fail(link, &call_id, &cause.message));
        }
        if link.backend == Backend::Nccl {
            let in_flight = InFlight(crate::cuda::nccl_work_clone(raw)?);
            link.watch.add(call_id.clone(), self.0.timeout, Box::new(move || in_flight.poll()));
        }
        link.pending.fetch_add(1, Ordering::AcqRel);
        Ok(Work {
            raw,
            group: Some(self.clone()),
            call: Some(call_id),
            started,
            tensors: tensors.iter().map(|t| t.shallow_clone()).collect(),
            after: After::default(),
        })
    }

    /// Finds out which ranks are missing, tells the others, and makes the group fail from now on.
    fn fail(&self, link: &Link, call: &Call, cause: &str) -> Error {
        let error = link.watch.diagnose_failed(call).finish(cause);
        link.failure.get_or_init(|| error).clone()
    }

    fn whole(&self, op: &str, tensors: &[&Tensor]) -> Result<()> {
        match tensors.iter().find(|t| !t.is_contiguous()) {
            Some(t) => {
                Err(Error::new(format!("{op} in group `{}`: {} is not contiguous", self.name(), describe(t))))
            }
            None => Ok(()),
        }
    }

    fn split(&self, op: &str, out: &Tensor, input: &Tensor, long: usize, short: usize) -> Result<()> {
        self.whole(op, &[out, input])?;
        if long as i64 != short as i64 * self.size()
            || out.kind() != input.kind()
            || out.device() != input.device()
        {
            return Err(Error::new(format!(
                "{op} in group `{}` of {}: out {} does not fit input {}",
                self.name(),
                self.size(),
                describe(out),
                describe(input)
            )));
        }
        Ok(())
    }
}

impl Link {
    fn reduce_op(&self, op: ReduceOp) -> c_int {
        match op {
            ReduceOp::Avg if self.backend == Backend::Gloo => 0,
            ReduceOp::Sum => 0,
            ReduceOp::Max => 1,
            ReduceOp::Min => 2,
            ReduceOp::Avg => 3,
        }
    }

    /// Gloo has no average: the sum is divided afterwards.
    fn divisor(&self, op: ReduceOp, size: i64) -> Option<i64> {
        (op == ReduceOp::Avg && self.backend == Backend::Gloo).then_some(size)
    }
}

fn averages(op: &str, t: &Tensor, reduce: ReduceOp) -> Result<()> {
    if reduce == ReduceOp::Avg
        && !matches!(t.kind(), Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
    {
        return Err(Error::new(format!("{op}: an average of {:?} values", t.kind())));
    }
    Ok(())
}

fn describe(t: &Tensor) -> String {
    format!("{:?} {:?} on {:?}", t.size(), t.kind(), t.device())
}

fn copied(out: &Tensor, input: &Tensor) -> Result<Work> {
    let input = input.f_view_as(out)?;
    tch::no_grad(|| out.shallow_clone().f_copy_(&input))?;
    Ok(Work::done())
}

/// Gloo works on host memory: a CUDA tensor is copied there before and back after.
struct Staged {
    /// What the backend works on.
    out: Tensor,
    /// Where the result goes, if that is somewhere else.
    target: Option<Tensor>,
}

impl Staged {
    /// `content`: what `out` must hold before the collective, if anything.
    fn new(link: &Link, out: &Tensor, content: Option<&Tensor>) -> Result<Staged> {
        if link.backend == Backend::Nccl || out.device() == Device::Cpu {
            return Ok(Staged { out: out.shallow_clone(), target: None });
        }
        let host = match content {
            Some(t) => t.f_to_device(Device::Cpu)?,
            None => Tensor::f_empty(out.size(), (out.kind(), Device::Cpu))?,
        };
        Ok(Staged { out: host, target: Some(out.shallow_clone()) })
    }

    /// Shapes do not matter to the collective, but Gloo looks at them.
    fn flat(link: &Link, out: &Tensor, input: &Tensor) -> Result<(Staged, Tensor)> {
        let staged = Staged::new(link, &out.f_view([-1])?, None)?;
        let input = staged.input(&input.f_view([-1])?);
        Ok((staged, input))
    }

    fn input(&self, input: &Tensor) -> Tensor {
        if self.target.is_some() { input.to_device(Device::Cpu) } else { input.shallow_clone() }
    }

    fn after(self, divisor: Option<i64>) -> After {
        After { result: Some(self.out), divisor, target: self.target }
    }
}

/// What is left to do on the host when the collective is done.
#[derive(Default)]
struct After {
    result: Option<Tensor>,
    divisor: Option<i64>,
    target: Option<Tensor>,
}

/// A collective under way; holds its tensors until it is waited for. Results are there after [`Work::wait`] only.
#[must_use = "the result is there only after wait()"]
pub struct Work {
    raw: *mut WorkPtr,
    group: Option<Group>,
    call: Option<Call>,
    started: Instant,
    tensors: Vec<Tensor>,
    after: After,
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

/// How long one look at a pending collective takes, so that news of failed peers gets through.
const SLICE: Duration = Duration::from_millis(200);

impl Work {
    /// Nothing to wait for.
    pub fn done() -> Work {
        Work {
            raw: null_mut(),
            group: None,
            call: None,
            started: Instant::now(),
            tensors: Vec::new(),
            after: After::default(),
        }
    }

    fn then(mut self, after: After) -> Work {
        self.after = after;
        self
    }

    /// On CPU returns when the result is there. On CUDA the current stream waits for it and the host goes on; a peer
    /// that never comes then ends this process with the same message, from the watching thread.
    ///
    /// The error names the collective, the group and the missing ranks, within the group's time-out.
    pub fn wait(mut self) -> Result<()> {
        let (Some(group), Some(call)) = (self.group.take(), self.call.take()) else { return Ok(()) };
        let Some(link) = &group.0.link else { return Ok(()) };
        if link.backend == Backend::Nccl {
            // SAFETY: `raw` is alive until drop.
            check(unsafe { corral_work_sync(self.raw) }).map_err(|e| group.fail(link, &call, &e.message))?;
        } else {
            self.wait_on_host(&group, link, &call)?;
        }
        link.pending.fetch_sub(1, Ordering::AcqRel);
        tch::no_grad(|| -> Result<()> {
            if let (Some(result), Some(n)) = (&mut self.after.result, self.after.divisor) {
                let _ = result.f_div_scalar_(n)?;
            }
            if let (Some(result), Some(target)) = (&self.after.result, &mut self.after.target) {
                target.f_copy_(result)?;
            }
            Ok(())
        })?;
        self.tensors.clear();
        Ok(())
    }

    fn wait_on_host(&self, group: &Group, link: &Link, call: &Call) -> Result<()> {
        let timeout = group.0.timeout;
        let observe = Watch::observation(timeout);
        let mut diagnosis = None;
        let mut failure_seen = None;
        loop {
            let mut done = 0;
            // SAFETY: `raw` is alive until drop.
            check(unsafe { corral_work_wait(self.raw, millis(SLICE), &mut done) })
                .map_err(|e| group.fail(link, call, &e.message))?;
            if done != 0 {
                return Ok(());
            }
            if let Some(error) = link.failure.get() {
                return Err(error.clone());
            }
            let waited = self.started.elapsed();
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
                return Err(group.fail(link, call, "another rank has failed"));
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

/// The backend's own limit lies behind ours, which can tell who is missing.
fn backend_timeout(timeout: Duration) -> Duration {
    timeout.saturating_add(Duration::from_secs(60))
}

fn gloo(store: &Store, rank: usize, size: usize, name: &str, timeout: Duration) -> Result<*mut BackendPtr> {
    let interface = std::env::var("GLOO_SOCKET_IFNAME").ok().filter(|s| !s.is_empty());
    let interface =
        interface.as_deref().map(|i| i.split(',').next().unwrap_or(i)).map(c_string).transpose()?;
    let host = c_string(&store.local_address()?.to_string())?;
    let name = c_string(name)?;
    let mut raw = null_mut();
    // SAFETY: strings outlive the call; a null interface means "none".
    check(unsafe {
        corral_gloo(
            store.raw(),
            rank as c_int,
            size as c_int,
            name.as_ptr(),
            millis(backend_timeout(timeout)),
            interface.as_ref().map_or(std::ptr::null(), |i| i.as_ptr()),
            host.as_ptr(),
            &mut raw,
        )
    })
    .map_err(|e| e.context(format!("gloo group {name:?} (set GLOO_SOCKET_IFNAME to choose the network)")))?;
    Ok(raw)
}
