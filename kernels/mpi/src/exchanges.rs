//! Collectives as messages between ranks: every rank sends each of the others what that one needs. A broadcast is MPI's own.

use tch::{Kind, Tensor};

use super::calls::{Communicator, Request, all_done};
use kernels::comm::engine::{Collective, ReduceOp};
use kernels::{Error, Result};

/// How far a collective has come since the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nowhere.
    None,
    /// Further.
    Some,
    /// To its end.
    Done,
}

impl Progress {
    fn done_if(done: bool) -> Progress {
        if done { Progress::Done } else { Progress::None }
    }
}

/// A collective that the thread of MPI drives.
pub(super) trait Steps: Send {
    /// Goes on a little, without waiting.
    fn advance(&mut self) -> Result<Progress>;
}

/// Sums up to this size (bytes, over all ranks) are made by every rank itself, of what all have: it takes one message's time,
/// where a sum in parts takes two.
const SMALL: usize = 256 << 10;

/// Larger sums are made in pieces: one is received while the other is added. What is received of all ranks has at most
/// about so many bytes, and a piece is neither smaller nor larger than these.
const SCRATCH: usize = 8 << 20;
const PIECES: [usize; 2] = [64 << 10, 1 << 20];

/// The steps of a collective. Nothing is sent before the first of them.
pub(super) fn steps(collective: &Collective, communicator: Communicator, tag: i32) -> Result<Box<dyn Steps>> {
    let Communicator { rank, size, .. } = communicator;
    Ok(match *collective {
        Collective::AllGather { out, input } => {
            let (parts, input) = (parts(out, size)?, input.f_view([-1])?);
            Messages::steps(move || {
                let own = &parts[rank];
                if own.data_ptr() != input.data_ptr() {
                    own.shallow_clone().f_copy_(&input)?;
                }
                communicator.exchange(tag, |_| Some(&input), |from| Some(&parts[from]))
            })
        }
        Collective::AllToAll { out, input } => {
            let (to, from) = (parts(out, size)?, parts(input, size)?);
            Messages::steps(move || {
                to[rank].shallow_clone().f_copy_(&from[rank])?;
                communicator.exchange(tag, |rank| Some(&from[rank]), |rank| Some(&to[rank]))
            })
        }
        Collective::Broadcast { t, root } => {
            let t = t.shallow_clone();
            Messages::steps(move || Ok(vec![communicator.broadcast(&t, root)?]))
        }
        Collective::Send { t, to } => {
            let t = t.shallow_clone();
            Messages::steps(move || Ok(vec![communicator.send(&t, to as usize, tag)?]))
        }
        Collective::Receive { t, from } => {
            let t = t.shallow_clone();
            Messages::steps(move || Ok(vec![communicator.receive(&t, from as usize, tag)?]))
        }
        Collective::ReduceScatter { out, input, op } => {
            let (ranges, out) = (parts(input, size)?, out.f_view([-1])?);
            Box::new(Reduction::new(communicator, tag, op, ranges, out, false)?)
        }
        Collective::AllReduce { t, op } => {
            let t = t.f_view([-1])?;
            match size * bytes(&t) <= SMALL {
                true => small_all_reduce(communicator, tag, op, t)?,
                false => {
                    let length = t.numel().div_ceil(size) as i64;
                    let ranges = t.f_split(length, 0)?;
                    let own = match ranges.get(rank) {
                        Some(own) => own.shallow_clone(),
                        None => t.f_narrow(0, 0, 0)?,
                    };
                    Box::new(Reduction::new(communicator, tag, op, ranges, own, true)?)
                }
            }
        }
    })
}

/// The equal parts of a contiguous tensor, flat.
fn parts(t: &Tensor, n: usize) -> Result<Vec<Tensor>> {
    Ok(t.f_view([n as i64, -1])?.f_unbind(0)?)
}

fn bytes(t: &Tensor) -> usize {
    t.numel() * t.kind().elt_size_in_bytes()
}

/// `out` = a combined with b; both, or neither, may be `out`.
fn combine(op: ReduceOp, out: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    match op {
        ReduceOp::Sum => drop(a.f_add_out(out, b)?),
        ReduceOp::Max => drop(a.f_maximum_out(out, b)?),
        ReduceOp::Min => drop(a.f_minimum_out(out, b)?),
        ReduceOp::Avg => return Err(Error::new("MPI has no average: a sum is divided afterwards")),
    }
    Ok(())
}

impl Communicator {
    /// Sends every other rank what `for_rank` names and receives from it what `from_rank` names.
    fn exchange<'a>(
        self,
        tag: i32,
        for_rank: impl Fn(usize) -> Option<&'a Tensor>,
        from_rank: impl Fn(usize) -> Option<&'a Tensor>,
    ) -> Result<Vec<Request>> {
        let mut requests = Vec::with_capacity(2 * self.size);
        // Neighbours first, so that not all ranks send to the same one at once.
        for k in 1..self.size {
            let from = (self.rank + self.size - k) % self.size;
            if let Some(t) = from_rank(from) {
                requests.push(self.receive(t, from, tag)?);
            }
        }
        for k in 1..self.size {
            let to = (self.rank + k) % self.size;
            if let Some(t) = for_rank(to) {
                requests.push(self.send(t, to, tag)?);
            }
        }
        Ok(requests)
    }
}

type Begin = Box<dyn FnOnce() -> Result<Vec<Request>> + Send>;
type Finish = Box<dyn FnOnce() -> Result<()> + Send>;

/// Messages that are all sent at once, and what is done when they have come.
struct Messages {
    begin: Option<Begin>,
    finish: Option<Finish>,
    requests: Vec<Request>,
}

impl Messages {
    fn steps(begin: impl FnOnce() -> Result<Vec<Request>> + Send + 'static) -> Box<dyn Steps> {
        Box::new(Messages { begin: Some(Box::new(begin)), finish: None, requests: Vec::new() })
    }
}

impl Steps for Messages {
    fn advance(&mut self) -> Result<Progress> {
        if let Some(begin) = self.begin.take() {
            self.requests = begin()?;
        }
        if !all_done(&mut self.requests)? {
            return Ok(Progress::None);
        }
        self.finish.take().map_or(Ok(()), |finish| finish())?;
        Ok(Progress::Done)
    }
}

/// Everybody gets everything, and combines it in the order of ranks.
fn small_all_reduce(communicator: Communicator, tag: i32, op: ReduceOp, t: Tensor) -> Result<Box<dyn Steps>> {
    let Communicator { rank, size, .. } = communicator;
    let all = Tensor::f_empty([size as i64, t.numel() as i64], (t.kind(), t.device()))?.f_unbind(0)?;
    let result: Vec<Tensor> = all.iter().map(|t| t.shallow_clone()).collect();
    let mut target = t.shallow_clone();
    let begin = move || {
        all[rank].shallow_clone().f_copy_(&t)?;
        communicator.exchange(tag, |_| Some(&all[rank]), |from| Some(&all[from]))
    };
    let finish = move || {
        for part in &result[1..] {
            combine(op, &result[0], &result[0], part)?;
        }
        target.f_copy_(&result[0])?;
        Ok(())
    };
    Ok(Box::new(Messages {
        begin: Some(Box::new(begin)),
        finish: Some(Box::new(finish)),
        requests: Vec::new(),
    }))
}

/// Every rank combines its own range of what all ranks have, piece by piece, in the order of ranks; for an all-reduce it then sends
/// the result to all.
struct Reduction {
    communicator: Communicator,
    tag: i32,
    op: ReduceOp,
    /// This rank's input, by the rank that combines it.
    ranges: Vec<Tensor>,
    /// Where this rank's result goes; its own range, in an all-reduce.
    target: Tensor,
    /// Elements of a piece.
    piece: i64,
    num_pieces: i64,
    /// Pieces posted, and combined.
    posted: i64,
    combined: i64,
    /// [2, size, piece]: what is received of two pieces; this rank's own row is where they are combined.
    scratch: Tensor,
    receiving: [Vec<Request>; 2],
    sent: Vec<Request>,
    /// The second half of an all-reduce, which has not begun.
    gathers: bool,
    gathering: Vec<Request>,
}

impl Reduction {
    fn new(
        communicator: Communicator,
        tag: i32,
        op: ReduceOp,
        ranges: Vec<Tensor>,
        target: Tensor,
        gathers: bool,
    ) -> Result<Reduction> {
        let kind: Kind = target.kind();
        // The first range is the longest.
        let longest = ranges.first().map_or(0, |r| r.numel() as i64);
        let [smallest, largest] = PIECES;
        let bytes = (SCRATCH / (2 * communicator.size)).clamp(smallest, largest);
        let piece = ((bytes / kind.elt_size_in_bytes()) as i64).min(longest).max(1);
        let scratch = Tensor::f_empty([2, communicator.size as i64, piece], (kind, target.device()))?;
        Ok(Reduction {
            communicator,
            tag,
            op,
            ranges,
            target,
            piece,
            num_pieces: (longest + piece - 1) / piece,
            posted: 0,
            combined: 0,
            scratch,
            receiving: Default::default(),
            sent: Vec::new(),
            gathers,
            gathering: Vec::new(),
        })
    }

    /// The `p`-th piece of what belongs to `rank`, if there is one.
    fn part(&self, rank: usize, p: i64) -> Result<Option<Tensor>> {
        let Some(range) = self.ranges.get(rank) else { return Ok(None) };
        let length = (range.numel() as i64 - p * self.piece).min(self.piece);
        match length > 0 {
            true => Ok(Some(range.f_narrow(0, p * self.piece, length)?)),
            false => Ok(None),
        }
    }

    /// Where the `p`-th piece from `rank` is received; this rank's own place is where it is combined.
    fn received(&self, rank: usize, p: i64, length: i64) -> Result<Tensor> {
        Ok(self.scratch.f_get(p % 2)?.f_get(rank as i64)?.f_narrow(0, 0, length)?)
    }

    fn post(&mut self) -> Result<()> {
        let (p, Communicator { rank, size, .. }) = (self.posted, self.communicator);
        if let Some(own) = self.part(rank, p)? {
            for k in 1..size {
                let from = (rank + size - k) % size;
                let place = self.received(from, p, own.numel() as i64)?;
                self.receiving[(p % 2) as usize].push(self.communicator.receive(&place, from, self.tag)?);
            }
        }
        for k in 1..size {
            let to = (rank + k) % size;
            if let Some(part) = self.part(to, p)? {
                self.sent.push(self.communicator.send(&part, to, self.tag)?);
            }
        }
        self.posted += 1;
        Ok(())
    }

    fn combine(&self) -> Result<()> {
        let (p, Communicator { rank, size, .. }) = (self.combined, self.communicator);
        let Some(own) = self.part(rank, p)? else { return Ok(()) };
        let length = own.numel() as i64;
        let parts = (0..size)
            .map(|r| if r == rank { Ok(own.shallow_clone()) } else { self.received(r, p, length) })
            .collect::<Result<Vec<Tensor>>>()?;
        let result = self.received(rank, p, length)?;
        let (first, more) = parts.split_at(2.min(parts.len()));
        match first {
            [a, b] => combine(self.op, &result, a, b)?,
            alone => result.shallow_clone().f_copy_(&alone[0])?,
        }
        for part in more {
            combine(self.op, &result, &result, part)?;
        }
        self.target.f_narrow(0, p * self.piece, length)?.f_copy_(&result)?;
        Ok(())
    }
}

impl Steps for Reduction {
    fn advance(&mut self) -> Result<Progress> {
        if self.combined < self.num_pieces {
            while self.posted < self.num_pieces.min(self.combined + 2) {
                self.post()?;
            }
            if !all_done(&mut self.receiving[(self.combined % 2) as usize])? {
                return Ok(Progress::None);
            }
            self.combine()?;
            self.combined += 1;
            return Ok(Progress::Some);
        }
        if !all_done(&mut self.sent)? {
            return Ok(Progress::None);
        }
        if self.gathers {
            // Only now: what others send takes the place of what this rank has sent them.
            self.gathers = false;
            let ranges = &self.ranges;
            let own = ranges.get(self.communicator.rank);
            self.gathering = self.communicator.exchange(self.tag, |_| own, |from| ranges.get(from))?;
        }
        Ok(Progress::done_if(all_done(&mut self.gathering)?))
    }
}
