//! Values of whole groups, gathered from the ranks for their use.
//!
//! In bfloat16 compute, matrices whose products are taken in 8-bit floats may be gathered in them ([`Form::Float8`]), which
//! is half of the bytes: after an update the ranks agree on the largest magnitude of each such matrix (one all-reduce for
//! all of them), every rank casts what it owns, once, and products take the bytes as they come. That is what each rank would
//! compute of the gathered bfloat16 values. The rest of a group (norms, biases, small matrices) is gathered beside it.

use std::ops::Range;

use kernels::comm::{Group, ReduceOp, Work};
use kernels::ops::{Float8Weight, float8_factors, to_float8};
use tch::{Kind, Tensor};

use super::{FlatGroup, Sharded};
use crate::distributed::float8_runs::{Float8Runs, len, owned, shared};
use crate::distributed::frozen::FrozenValue;
use crate::distributed::plan::{Home, Piece};
use crate::error::{Error, Result};

/// Values that are cast at once: in between they are in float32.
const CAST_AT_ONCE: i64 = 1 << 22;

/// In what form a group's values are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// In the compute dtype.
    Compute,
    /// Matrices of which [`Sharded::gather_in_float8`] says so in 8-bit floats, unless values are held.
    Float8,
}

/// All values of a group: of what is trained, and of what is frozen, in bytes; none where there is nothing of it.
pub struct Full {
    pub(super) trained: Option<Gathered>,
    pub(super) frozen: Option<Tensor>,
}

/// What is trained of a group, of all ranks.
pub(super) enum Gathered {
    /// T `[numel + padding]`
    Compute(Tensor),
    Float8(GatheredBytes),
}

/// What is trained of a group, with its [`Float8Runs`] in e4m3.
pub(super) struct GatheredBytes {
    /// uint8 `[numel + padding]`: of the runs; undefined elsewhere.
    bytes: Tensor,
    /// T [ranks, [`Float8Runs::rest_len`]]: of each rank, what lies outside of runs.
    rest: Tensor,
    /// Of each run: float `[runs]`.
    scales: Tensor,
}

/// What this rank owns of a group as it is sent, cast once after an update.
pub(super) struct OwnBytes {
    /// uint8 `[slice, padding included]`: zeros outside of runs.
    bytes: Tensor,
    /// T `[rest_len]`
    rest: Tensor,
}

/// What the [`Float8Runs`] of all groups are multiplied by in e4m3, and the reciprocals: float `[runs of all groups]`.
pub(super) struct RunScales {
    factors: Tensor,
    scales: Tensor,
}

/// All-gathers under way.
#[derive(Default)]
pub(super) struct Gathering(Vec<Work>);

impl Gathering {
    fn wait(&mut self) -> Result<()> {
        self.0.drain(..).try_for_each(|work| Ok(work.wait()?)) // of the host on a CPU, of the stream on a GPU
    }
}

impl Gathered {
    fn shallow_clone(&self) -> Gathered {
        match self {
            Gathered::Compute(t) => Gathered::Compute(t.shallow_clone()),
            Gathered::Float8(g) => Gathered::Float8(GatheredBytes {
                bytes: g.bytes.shallow_clone(),
                rest: g.rest.shallow_clone(),
                scales: g.scales.shallow_clone(),
            }),
        }
    }
}

impl Sharded {
    /// From now on [`Form::Float8`] gathers these matrices of the groups so: of each group the elements of its flat buffer
    /// of what is trained, a range for each factor of a product, in order. Nothing is gathered so on one rank, and in other
    /// compute dtypes than bfloat16.
    pub fn gather_in_float8(&mut self, runs: Vec<Vec<Range<i64>>>) {
        let ranks = self.sharding.shard.size();
        if ranks == 1 || self.compute != Kind::BFloat16 {
            return;
        }
        let mut first = 0;
        for (g, runs) in self.groups.iter_mut().zip(runs).filter(|(g, _)| g.plan.stage.here) {
            let next = first + runs.len();
            let slices = (0..ranks).map(|rank| g.owned(rank));
            g.float8 = Float8Runs::new(runs, first, slices);
            first = next;
        }
        self.drop_gathered();
    }

    /// Starts gathering group `i` in the compute dtype, if it is not there.
    pub fn prefetch(&mut self, i: usize) -> Result<()> {
        self.prefetch_as(i, Form::Compute)
    }

    /// Starts gathering group `i`, if it is not there. All ranks must ask for the same form.
    pub fn prefetch_as(&mut self, i: usize, form: Form) -> Result<()> {
        let size = self.sharding.shard.size();
        let float8 = form == Form::Float8 && !self.held && !self.groups[i].float8.runs.is_empty();
        let g = &mut self.groups[i];
        g.frozen.prefetch(&self.sharding.shard)?;
        // What an earlier request left in another form: products must not depend on it.
        let other_form = match &g.full {
            Some(Gathered::Float8(_)) => !float8,
            Some(Gathered::Compute(_)) => float8,
            None => false,
        };
        if other_form {
            g.drop_gathered();
        }
        if g.full.is_some() || g.layout.numel == 0 {
            return Ok(());
        }
        if let Some(load) = &self.load {
            let values = load(&g.layout)?.f_to_device(self.device)?.f_to_kind(self.compute)?;
            g.full = Some(Gathered::Compute(values));
            return Ok(());
        }
        if size == 1 {
            g.full = Some(Gathered::Compute(g.local.shallow_clone()));
            return Ok(());
        }
        if float8 {
            let scales = match self.scales.take() {
                Some(scales) => scales,
                None => self.agree_on_scales()?,
            };
            let scales = self.scales.insert(scales);
            return self.groups[i].gather_bytes(&self.sharding.shard, scales);
        }
        let full = Tensor::empty([g.shard_len * size], (self.compute, self.device));
        g.gathering.0.push(self.sharding.shard.all_gather(&full, &g.local)?); // collective, overlaps what follows
        g.full = Some(Gathered::Compute(full));
        Ok(())
    }

    /// From the largest magnitude in every run of every group. Collective.
    fn agree_on_scales(&self) -> Result<RunScales> {
        let rank = self.sharding.shard.rank();
        let mut largest = Vec::new();
        for g in &self.groups {
            let slice = g.owned(rank);
            for part in g.float8.runs.iter().map(|run| shared(run, &slice)) {
                largest.push(match part.is_empty() {
                    true => Tensor::zeros([], (Kind::Float, self.device)),
                    false => {
                        let values = g.local.narrow(0, part.start - slice.start, len(&part));
                        let (least, most) = values.f_aminmax(None, false)?;
                        least.f_neg()?.f_maximum(&most)?.f_to_kind(Kind::Float)?
                    }
                });
            }
        }
        let largest = Tensor::f_stack(&largest, 0)?; // [runs of all groups]
        self.sharding.shard.all_reduce(&largest, ReduceOp::Max)?.wait()?; // collective
        let factors = float8_factors(&largest)?;
        Ok(RunScales { scales: factors.f_reciprocal()?, factors })
    }

    /// All values of group `i` in the compute dtype. Held until [`Sharded::release`].
    pub fn full(&mut self, i: usize) -> Result<Full> {
        self.full_as(i, Form::Compute)
    }

    /// [`Sharded::full`], in this form.
    pub fn full_as(&mut self, i: usize, form: Form) -> Result<Full> {
        self.prefetch_as(i, form)?;
        let g = &mut self.groups[i];
        g.gathering.wait()?;
        Ok(Full {
            trained: g.full.as_ref().map(Gathered::shallow_clone),
            frozen: g.frozen.full(&self.sharding.shard)?,
        })
    }

    /// Drops the gathered values of group `i`, unless they are held or kept.
    pub fn release(&mut self, i: usize) {
        if !self.held && !self.sharding.keep.values() {
            let g = &mut self.groups[i];
            g.drop_gathered();
            g.frozen.release();
        }
    }

    /// Says that values have changed: what was gathered of them is no longer theirs.
    pub fn drop_gathered(&mut self) {
        self.scales = None;
        for g in &mut self.groups {
            g.drop_gathered();
            g.own_bytes = None;
        }
    }

    /// Gathers all groups and keeps them until [`Sharded::let_go`]: forwards then communicate nothing. A collective
    /// call. For what reads the same values many times, where a rank has room for all of them.
    pub fn hold(&mut self) -> Result<()> {
        self.held = true;
        let here: Vec<usize> = (0..self.len()).filter(|i| self.is_here(*i)).collect();
        here.into_iter().try_for_each(|i| self.full(i).map(drop))
    }

    /// Ends [`Sharded::hold`]; values that change later need this first. What is kept anyway stays until then.
    pub fn let_go(&mut self) {
        self.held = false;
        (0..self.len()).for_each(|i| self.release(i));
    }

    /// Whether a forward may be a collective call: values are gathered from other ranks where they are not there.
    pub fn gathers(&self) -> bool {
        self.sharding.shard.size() > 1 && !self.held
    }

    /// Tensors `first..end` of group `i`, which have equal rows, in as few pieces as they lie in.
    pub fn pieces(&self, i: usize, tensors: Range<usize>) -> Vec<Piece> {
        let g = &self.groups[i];
        let mut pieces: Vec<Piece> = Vec::new();
        for k in tensors {
            let size = g.plan.layout.specs[k].shape.clone();
            if let Some(last) = pieces.last_mut() {
                let joined = match (last.home, g.homes[k]) {
                    (Home::Trained(offset), Home::Trained(next)) => {
                        offset + last.size.iter().product::<i64>() == next
                    }
                    (Home::Frozen(_), Home::Frozen(next)) => g.frozen.follows(next),
                    _ => false,
                };
                if joined {
                    last.size[0] += size[0];
                    continue;
                }
            }
            pieces.push(Piece { home: g.homes[k], size });
        }
        pieces
    }

    /// A and B of adapter `k` of group `i`.
    pub fn adapter_pieces(&self, i: usize, k: usize) -> [Piece; 2] {
        let g = &self.groups[i];
        let adapter = &g.plan.adapters[k];
        let [a, b] = adapter.shapes(&g.plan.layout);
        let [home_a, home_b] = g.adapter_homes[k];
        [Piece { home: home_a, size: a }, Piece { home: home_b, size: b }]
    }

    /// A piece of group `i` as a view of its values.
    pub fn value(&self, i: usize, full: &Full, piece: &Piece) -> Result<FrozenValue> {
        let absent = || Error::failed(format!("the values of group {i} are not there"));
        match piece.home {
            Home::Trained(offset) => match full.trained.as_ref().ok_or_else(absent)? {
                Gathered::Compute(flat) => {
                    let view = piece.of_trained(flat);
                    Ok(FrozenValue::Dense(view.ok_or_else(|| Error::failed("what is trained is dense"))?))
                }
                Gathered::Float8(gathered) => self.groups[i].value_in(gathered, offset, &piece.size),
            },
            Home::Frozen(index) => {
                let bytes = full.frozen.as_ref().ok_or_else(absent)?;
                self.groups[i].frozen.value(index, &piece.size, bytes)
            }
        }
    }

    /// [`Sharded::value`] of what is never quantized.
    pub fn dense(&self, i: usize, full: &Full, piece: &Piece) -> Result<Tensor> {
        match self.value(i, full, piece)? {
            FrozenValue::Dense(t) => Ok(t),
            FrozenValue::Quantized(_) | FrozenValue::Float8(_) => {
                Err(Error::failed(format!("group {i}: a dense tensor is not in the compute dtype")))
            }
        }
    }

    /// The one tensor of a group that has only one (the embedding, the head): T.
    pub fn single(&mut self, i: usize) -> Result<Tensor> {
        let full = self.full(i)?;
        self.dense(i, &full, &self.pieces(i, 0..1)[0])
    }
}

impl FlatGroup {
    /// The elements that a rank owns, padding left out.
    pub(super) fn owned(&self, rank: i64) -> Range<i64> {
        owned(rank, self.shard_len, self.layout.numel)
    }

    pub(super) fn drop_gathered(&mut self) {
        self.gathering = Gathering::default();
        self.full = None;
    }

    /// Starts gathering with runs in e4m3.
    fn gather_bytes(&mut self, shard: &Group, scales: &RunScales) -> Result<()> {
        let Float8Runs { runs, first, rest_len } = &self.float8;
        let of_group = |t: &Tensor| t.narrow(0, *first as i64, runs.len() as i64);
        let own = match self.own_bytes.take() {
            Some(own) => own,
            None => self.cast_own(shard.rank(), &of_group(&scales.factors))?,
        };
        let on = |kind| (kind, self.local.device());
        let bytes = Tensor::empty([shard.size() * self.shard_len], on(Kind::Uint8));
        self.gathering.0.push(shard.all_gather(&bytes, &own.bytes)?); // collective, overlaps what follows
        let rest = Tensor::empty([shard.size(), *rest_len], on(self.local.kind()));
        if *rest_len > 0 {
            self.gathering.0.push(shard.all_gather(&rest, &own.rest)?); // collective, overlaps what follows
        }
        let scales = of_group(&scales.scales);
        self.full = Some(Gathered::Float8(GatheredBytes { bytes, rest, scales }));
        self.own_bytes = Some(own);
        Ok(())
    }

    /// What a rank owns, with runs in e4m3: times these factors, float `[runs]`.
    fn cast_own(&self, rank: i64, factors: &Tensor) -> Result<OwnBytes> {
        let on = |kind| (kind, self.local.device());
        let slice = self.owned(rank);
        let part = |range: &Range<i64>| self.local.narrow(0, range.start - slice.start, len(range));
        let bytes = Tensor::zeros([self.shard_len], on(Kind::Uint8));
        for (k, run) in self.float8.runs.iter().map(|run| shared(run, &slice)).enumerate() {
            let factor = factors.narrow(0, k as i64, 1);
            for from in run.clone().step_by(CAST_AT_ONCE as usize) {
                let panel = from..(from + CAST_AT_ONCE).min(run.end);
                let values = to_float8(&part(&panel), &factor)?.f_view_dtype(Kind::Uint8)?;
                bytes.narrow(0, from - slice.start, len(&panel)).f_copy_(&values)?;
            }
        }
        let rest = Tensor::zeros([self.float8.rest_len], on(self.local.kind()));
        let mut at = 0;
        for range in self.float8.rest_of(&slice) {
            rest.narrow(0, at, len(&range)).f_copy_(&part(&range))?;
            at += len(&range);
        }
        Ok(OwnBytes { bytes, rest })
    }

    /// What begins at element `offset`.
    fn value_in(&self, gathered: &GatheredBytes, offset: i64, size: &[i64]) -> Result<FrozenValue> {
        let range = offset..offset + size.iter().product::<i64>();
        if let Some(k) = self.float8.runs.iter().position(|run| *run == range) {
            let values = gathered.bytes.narrow(0, offset, len(&range)).f_view_dtype(Kind::Float8e4m3fn)?;
            let scale = gathered.scales.narrow(0, k as i64, 1);
            return Ok(FrozenValue::Float8(Float8Weight::new(values.f_view(size)?, scale)));
        }
        if self.float8.runs.iter().any(|run| !shared(run, &range).is_empty()) {
            return Err(Error::failed("a part of a matrix is asked for that is in 8-bit floats as a whole"));
        }
        let ranks = gathered.rest.size()[0];
        let mut parts = Vec::new();
        for rank in 0..ranks {
            let slice = self.owned(rank);
            let own = shared(&range, &slice);
            if !own.is_empty() {
                let at = self.float8.rest_before(own.start) - self.float8.rest_before(slice.start);
                parts.push(gathered.rest.select(0, rank).narrow(0, at, len(&own)));
            }
        }
        let values = if parts.len() == 1 { parts.remove(0) } else { Tensor::f_cat(&parts, 0)? };
        Ok(FrozenValue::Dense(values.f_view(size)?))
    }
}
