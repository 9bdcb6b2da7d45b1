//! Ranks that communicate.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::diagnosis::Call;
use super::engine::{Backend, Collective, ReduceOp};
use super::link::Link;
use super::staging::Staged;
use super::watch::Watch;
use super::work::{TRANSFER, Work};
use crate::error::{Error, Result};

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
    device: Device,
    /// A group of one has none.
    link: Option<Arc<Link>>,
    /// See [`Group::sent_bytes`].
    sent: AtomicU64,
}

impl Group {
    /// A group of one: collectives copy or do nothing, and nothing communicates.
    pub fn solo() -> Group {
        Group(Arc::new(Inner {
            name: "solo".into(),
            ranks: vec![0],
            rank: 0,
            device: Device::Cpu,
            link: None,
            sent: AtomicU64::new(0),
        }))
    }

    /// Joins the group `name` (unique in the run) of the world ranks `ranks`, of which this process must be one. All of
    /// them must call this. Every collective must end within `timeout`.
    ///
    /// `device`: the GPU for NCCL (its tensors must be there); with Gloo and MPI, CUDA tensors are copied through the host.
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
        let set_up = Call { group: name.into(), ranks: ranks.to_vec(), seq: 0, op: "set-up" };
        let link = Link::connect(watch, backend, set_up, rank, timeout, device)?;
        let (name, ranks, link) = (name.into(), ranks.to_vec(), Some(Arc::new(link)));
        Ok(Group(Arc::new(Inner { name, ranks, rank, device, link, sent: AtomicU64::new(0) })))
    }

    /// This process's rank in the group.
    pub fn rank(&self) -> i64 {
        self.0.rank as i64
    }

    /// How many ranks the group has.
    pub fn size(&self) -> i64 {
        self.0.ranks.len() as i64
    }

    /// The name that it was made with, unique in the run.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The members' world ranks, by rank in the group.
    pub fn ranks(&self) -> &[i64] {
        &self.0.ranks
    }

    /// Bytes that this rank has sent in this group: in all-reduces, all-gathers and reduce-scatters as a ring sends them (of n
    /// ranks (n - 1) / n of what is gathered or scattered, and twice that of what is reduced on all), and to the other of two.
    pub fn sent_bytes(&self) -> u64 {
        self.0.sent.load(Ordering::Relaxed)
    }

    /// Counts what is sent, and returns it.
    fn count(&self, whole: &Tensor, times: u64) -> u64 {
        let (bytes, n) = (whole.numel() * whole.kind().elt_size_in_bytes(), self.size() as u64);
        let sent = times * bytes as u64 * (n - 1) / n;
        self.0.sent.fetch_add(sent, Ordering::Relaxed);
        sent
    }

    /// `gloo`, `nccl`, `mpi`, or `none` for a group of one.
    pub fn backend_name(&self) -> &'static str {
        self.0.link.as_ref().map_or("none", |l| l.backend.name())
    }

    /// Combines `t` over all ranks, in place on all of them.
    pub fn all_reduce(&self, t: &Tensor, op: ReduceOp) -> Result<Work> {
        self.check_contiguous("all-reduce", &[t])?;
        averages("all-reduce", t, op)?;
        let bytes = self.count(t, 2);
        let Some(link) = &self.0.link else { return Ok(Work::done()) };
        let staged = Staged::new(link.backend, t, Some(t))?;
        let collective = Collective::AllReduce { t: &staged.out, op: link.reduction(op) };
        self.issue(link, "all-reduce", &[&staged.out], bytes, &collective)
            .map(|work| work.then(staged.after(link.divisor(op, self.size()))))
    }

    /// Concatenates every rank's `input` into `out`, by rank. `out`: `size * input.numel()` elements, same dtype.
    pub fn all_gather(&self, out: &Tensor, input: &Tensor) -> Result<Work> {
        self.split("all-gather", out, input, out.numel(), input.numel())?;
        let bytes = self.count(out, 1);
        let Some(link) = &self.0.link else { return copied(out, input) };
        let (staged, input) = Staged::flat(link.backend, out, input)?;
        let collective = Collective::AllGather { out: &staged.out, input: &input };
        self.issue(link, "all-gather", &[&staged.out, &input], bytes, &collective)
            .map(|work| work.then(staged.after(None)))
    }

    /// Combines `input` over all ranks and gives rank r its r-th part as `out`. `input`: `size * out.numel()` elements,
    /// same dtype; it is left as it is.
    pub fn reduce_scatter(&self, out: &Tensor, input: &Tensor, op: ReduceOp) -> Result<Work> {
        self.split("reduce-scatter", out, input, input.numel(), out.numel())?;
        averages("reduce-scatter", out, op)?;
        let bytes = self.count(input, 1);
        let Some(link) = &self.0.link else { return copied(out, input) };
        let (staged, input) = Staged::flat(link.backend, out, input)?;
        let collective =
            Collective::ReduceScatter { out: &staged.out, input: &input, op: link.reduction(op) };
        self.issue(link, "reduce-scatter", &[&staged.out, &input], bytes, &collective)
            .map(|work| work.then(staged.after(link.divisor(op, self.size()))))
    }

    /// Overwrites `t` on all ranks with that of rank `root` (a rank of the group).
    pub fn broadcast(&self, t: &Tensor, root: i64) -> Result<Work> {
        self.check_contiguous("broadcast", &[t])?;
        if root < 0 || root >= self.size() {
            return Err(Error::new(format!(
                "broadcast in group `{}`: no rank {root} of {}",
                self.name(),
                self.size()
            )));
        }
        let Some(link) = &self.0.link else { return Ok(Work::done()) };
        let staged = Staged::new(link.backend, t, Some(t))?;
        let collective = Collective::Broadcast { t: &staged.out, root };
        self.issue(link, "broadcast", &[&staged.out], 0, &collective)
            .map(|work| work.then(staged.after(None)))
    }

    /// Sends the r-th of `size` equal parts of `input` (along dimension 0) to rank r; `out` gets the parts by sender.
    pub fn all_to_all(&self, out: &Tensor, input: &Tensor) -> Result<Work> {
        self.check_contiguous("all-to-all", &[out, input])?;
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
        let staged = Staged::new(link.backend, out, None)?;
        let input = staged.input(input);
        let collective = Collective::AllToAll { out: &staged.out, input: &input };
        self.issue(link, "all-to-all", &[&staged.out, &input], 0, &collective)
            .map(|work| work.then(staged.after(None)))
    }

    /// Sends `t` to the other rank of a group of two, which calls [`Group::receive`] for it. The work is done when it is sent; until
    /// then `t` must not change.
    pub fn send(&self, t: &Tensor) -> Result<Work> {
        let link = self.pair("send", t)?;
        let bytes = (t.numel() * t.kind().elt_size_in_bytes()) as u64;
        self.0.sent.fetch_add(bytes, Ordering::Relaxed);
        let staged = Staged::new(link.backend, t, Some(t))?;
        let to = 1 - self.rank();
        let collective = Collective::Send { t: &staged.out, to };
        self.issue(link, TRANSFER, &[&staged.out], bytes, &collective)
    }

    /// Overwrites `t` with what the other rank of a group of two has sent, of the same shape and dtype.
    pub fn receive(&self, t: &Tensor) -> Result<Work> {
        let link = self.pair("receive", t)?;
        let staged = Staged::new(link.backend, t, None)?;
        let from = 1 - self.rank();
        let collective = Collective::Receive { t: &staged.out, from };
        self.issue(link, TRANSFER, &[&staged.out], 0, &collective).map(|work| work.then(staged.after(None)))
    }

    /// The link of a group of two, for a tensor that goes from one to the other.
    fn pair(&self, op: &str, t: &Tensor) -> Result<&Arc<Link>> {
        self.check_contiguous(op, &[t])?;
        match &self.0.link {
            Some(link) if self.size() == 2 => Ok(link),
            _ => Err(Error::new(format!(
                "{op} in group `{}` of {}: it takes two ranks",
                self.name(),
                self.size()
            ))),
        }
    }

    /// Returns when all ranks have called it (with NCCL: and all earlier work of this GPU's current stream is done).
    pub fn barrier(&self) -> Result<()> {
        let Some(link) = &self.0.link else { return Ok(()) };
        let device = if link.backend == Backend::Nccl { self.0.device } else { Device::Cpu };
        let one = Tensor::ones([1], (Kind::Float, device));
        let collective = Collective::AllReduce { t: &one, op: ReduceOp::Sum };
        self.issue(link, "barrier", &[&one], 0, &collective)?.wait()?;
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

    /// Numbers the collective `op` and hands it to the backend; `tensors` are kept until it has been waited for. `bytes`: what this rank
    /// sends in it, where that is counted.
    fn issue(
        &self,
        link: &Arc<Link>,
        op: &'static str,
        tensors: &[&Tensor],
        bytes: u64,
        collective: &Collective,
    ) -> Result<Work> {
        let call = Call { group: self.0.name.clone(), ranks: self.0.ranks.clone(), seq: 0, op };
        Ok(Work::issue(link, call, tensors, collective)?.sending(bytes))
    }

    fn check_contiguous(&self, op: &str, tensors: &[&Tensor]) -> Result<()> {
        match tensors.iter().find(|t| !t.is_contiguous()) {
            Some(t) => {
                Err(Error::new(format!("{op} in group `{}`: {} is not contiguous", self.name(), describe(t))))
            }
            None => Ok(()),
        }
    }

    fn split(&self, op: &str, out: &Tensor, input: &Tensor, long: usize, short: usize) -> Result<()> {
        self.check_contiguous(op, &[out, input])?;
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
