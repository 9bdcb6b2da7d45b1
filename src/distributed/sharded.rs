//! Parameters as flat shards.
//!
//! The parameters that are used together (a block, the embedding, the head) are a group: tensors one after the other
//! in one flat buffer, padded so that it divides among the ranks of the shard group. A rank owns one slice of the
//! master values (float32; float64 in float64 compute) and of their gradients. Before use the slices are gathered in
//! the compute dtype, after use they are dropped; gradients are reduced and scattered back into slices. A rank may also keep
//! both whole for longer ([`Keep`](super::mesh::Keep)).
//!
//! What of a group is not trained lies in a flat buffer of its own ([`super::frozen`]), sliced and gathered alike. A
//! group's adapters (LoRA) are tensors like others, besides those of the model.
//!
//! Two process groups say what is done: slices lie over `shard` (ZeRO-3: all ranks; DDP: a group of one; HSDP: some), and the
//! slices' gradients are summed over `replicate` (ZeRO-3: a group of one; DDP: all ranks; HSDP: the others). A group of one
//! sends nothing, so one rank alone runs the same code on its own buffers, without copies.
//!
//! A tensor-parallel rank's tensors may be parts of others (`super::cut`). The layouts of these ranks are equal, and so are the
//! places of their slices.

pub mod gathered;
pub mod gradients;
mod parking;
mod parts;

use std::collections::HashSet;

use kernels::comm::Group;
use tch::{Device, Kind, Tensor};

use crate::distributed::float8_runs::{Float8Runs, len};
use crate::distributed::frozen::{Frozen, FrozenValue, Storage};
use crate::distributed::layout::padded_slice;
pub use crate::distributed::layout::{Layout, TensorSpec};
use crate::distributed::mesh::Sharding;
use crate::distributed::plan::{GroupPlan, Home, Placed, Role, is_adapter};
use crate::error::{Error, Result};
use gathered::{Full, Gathered, Gathering, OwnBytes, RunScales};
use gradients::Reduction;

/// A slice of a group: which elements of its flat buffer this rank owns (padding excluded).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// The first element, counted in the flat buffer.
    pub start: i64,
    /// Elements from there; 0 for ranks beyond the end.
    pub len: i64,
}

struct FlatGroup {
    plan: GroupPlan,
    /// Of the plan's tensors, and of A and B of each adapter.
    homes: Vec<Home>,
    adapter_homes: Vec<[Home; 2]>,
    frozen: Frozen,
    /// What is trained.
    layout: Layout,
    /// Elements of every rank's slice, padding included; a multiple of 256.
    shard_len: i64,
    /// This rank's slice of the values.
    master: Tensor,
    /// The slice in the compute dtype: `master` itself where the dtypes are equal.
    local: Tensor,
    /// The sum of the gradients of the step so far, over the slice.
    grad: Option<Tensor>,
    /// All values, while they are in use, held or kept.
    full: Option<Gathered>,
    gathering: Gathering,
    /// What is gathered in 8-bit floats.
    float8: Float8Runs,
    /// What this rank sends of it; none where values have changed since.
    own_bytes: Option<OwnBytes>,
    /// The gradient over all values, between backward and reduction: of one micro-batch, or of all so far where gradients are kept.
    full_grad: Option<Tensor>,
    /// Micro-batches of the step of which the gradient is complete.
    reduced: usize,
    /// Host memory of what is parked, once it was.
    parked: Option<parking::HostCopies>,
}

/// Gives all values of a group, in any dtype: `[numel]`.
type Load = Box<dyn Fn(&Layout) -> Result<Tensor>>;

/// All parameters of a model, in groups.
pub struct Sharded {
    groups: Vec<FlatGroup>,
    /// Where values come from that are not kept (see [`Sharded::on_demand`]).
    load: Option<Load>,
    reductions: Vec<Reduction>,
    /// Micro-batches of the step under way, and those of them that have not ended.
    micro_batches: usize,
    micro_batches_left: usize,
    sharding: Sharding,
    compute: Kind,
    device: Device,
    /// Gathered values stay until [`Sharded::let_go`].
    held: bool,
    /// Of what is gathered in 8-bit floats; none where values have changed since.
    scales: Option<RunScales>,
    /// The values are in host memory (see [`Sharded::park`]).
    away: bool,
}

impl Sharded {
    /// Allocates the slices of this rank; the values are undefined until they are filled. A [`Layout`] is a group that is
    /// trained as a whole.
    pub fn new(
        groups: impl IntoIterator<Item = impl Into<GroupPlan>>,
        sharding: Sharding,
        compute: Kind,
        device: Device,
    ) -> Sharded {
        let groups = groups
            .into_iter()
            .map(|plan| FlatGroup::new(plan.into(), sharding.shard.size(), compute, device))
            .collect();
        Sharded {
            groups,
            load: None,
            reductions: Vec::new(),
            micro_batches: 0,
            micro_batches_left: 0,
            sharding,
            compute,
            device,
            held: false,
            scales: None,
            away: false,
        }
    }

    /// Parameters of one rank that are loaded anew whenever a group is used, and dropped after it: for the forward of a
    /// model of which two groups fit into memory. There is nothing to fill, train or export.
    pub fn on_demand(
        groups: impl IntoIterator<Item = impl Into<GroupPlan>>,
        compute: Kind,
        device: Device,
        load: impl Fn(&Layout) -> Result<Tensor> + 'static,
    ) -> Sharded {
        let group = |plan: GroupPlan| FlatGroup::empty(plan, 1, compute, device);
        let groups = groups.into_iter().map(|plan| group(plan.into())).collect();
        Sharded {
            groups,
            load: Some(Box::new(load)),
            reductions: Vec::new(),
            micro_batches: 0,
            micro_batches_left: 0,
            sharding: Sharding::solo(),
            compute,
            device,
            held: false,
            scales: None,
            away: false,
        }
    }

    /// The number of groups: the embedding, the blocks, and the head unless it is tied.
    pub fn len(&self) -> usize {
        self.groups.len()
    }

    /// Whether there are no groups.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// What is trained of group `i`; it may be nothing.
    pub fn layout(&self, i: usize) -> &Layout {
        &self.groups[i].layout
    }

    /// Group `i` as it was planned.
    pub fn plan(&self, i: usize) -> &GroupPlan {
        &self.groups[i].plan
    }

    /// Whether this rank's stage has group `i`.
    pub fn is_here(&self, i: usize) -> bool {
        self.groups[i].plan.stage.here
    }

    /// Whether this rank's stage is the one that counts and writes its slices of group `i`.
    pub fn owns(&self, i: usize) -> bool {
        let stage = self.groups[i].plan.stage;
        stage.here && stage.owner == self.sharding.pipeline.axis.rank
    }

    /// Whether something of group `i` is trained, here or on another stage.
    pub fn trains(&self, i: usize) -> bool {
        self.groups[i].layout.numel > 0
    }

    /// The first group of all stages of which something is trained; the number of groups where nothing is.
    pub fn first_trained(&self) -> usize {
        (0..self.len()).find(|i| self.trains(*i)).unwrap_or(self.len())
    }

    /// Numbers that are trained, over all ranks.
    pub fn num_trained(&self) -> i64 {
        let numel = |specs: &[TensorSpec]| specs.iter().map(|s| s.whole().numel()).sum::<i64>();
        self.groups.iter().map(|g| numel(&g.layout.specs)).sum()
    }

    /// Numbers that are not trained, over all ranks.
    pub fn num_frozen(&self) -> i64 {
        let numel = |g: &FlatGroup| g.plan.tensors().iter().map(|s| s.whole().numel()).sum::<i64>();
        self.groups.iter().map(numel).sum::<i64>() - self.num_trained()
    }

    /// Bytes of this rank's slices of what is not trained.
    pub fn frozen_bytes(&self) -> i64 {
        self.groups.iter().map(|g| g.frozen.bytes()).sum()
    }

    /// Bytes of all values as forwards use them, on a rank that gathers them all.
    pub fn whole_bytes(&self) -> i64 {
        let ranks = self.sharding.shard.size();
        let of = |g: &FlatGroup| {
            ranks * (g.shard_len * self.compute.elt_size_in_bytes() as i64 + g.frozen.bytes())
        };
        self.groups.iter().map(of).sum()
    }

    /// The dtype of forward and backward.
    pub fn compute(&self) -> Kind {
        self.compute
    }

    /// Where this rank's slices lie, and where it computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// How the values lie over ranks.
    pub fn sharding(&self) -> &Sharding {
        &self.sharding
    }

    /// The ranks that the slices lie on.
    pub fn shard_group(&self) -> &Group {
        &self.sharding.shard
    }

    /// The ranks that hold equal slices.
    pub fn replica_group(&self) -> &Group {
        &self.sharding.replicate
    }

    /// Which elements of group `i` this rank owns.
    pub fn slice(&self, i: usize) -> Slice {
        let g = &self.groups[i];
        let owned = g.owned(self.sharding.shard.rank());
        Slice { start: owned.start, len: len(&owned) }
    }

    /// Of this rank's slice of group `i` what it writes into checkpoints, as all ranks' parts in order of their stages: nothing, at
    /// the group's beginning or end, where another stage does.
    pub fn written_slice(&self, i: usize) -> Slice {
        let behind = self.sharding.pipeline.axis.rank > self.groups[i].plan.stage.owner;
        match self.owns(i) {
            true => self.slice(i),
            false => Slice { start: if behind { self.groups[i].layout.numel } else { 0 }, len: 0 },
        }
    }

    /// This rank's slice of the master values: A `[n]`, n the length of its [`Sharded::slice`].
    pub fn master(&self, i: usize) -> Tensor {
        self.groups[i].master.narrow(0, 0, self.slice(i).len)
    }

    /// The compute copy of the slice, where it is a copy (bfloat16 compute).
    pub fn copy(&self, i: usize) -> Option<Tensor> {
        let g = &self.groups[i];
        (g.local.kind() != g.master.kind()).then(|| g.local.narrow(0, 0, self.slice(i).len))
    }

    /// This rank's slice of the step's gradient, once [`Sharded::finish_step_gradients`] has run.
    pub fn slice_grad(&self, i: usize) -> Option<Tensor> {
        self.groups[i].grad.as_ref().map(|g| g.narrow(0, 0, self.slice(i).len))
    }

    /// Sets the values of the model's tensors, trained or not: `f(spec, first, values)` fills `values` (in any float
    /// dtype, `[n]`) with elements `first..first + n` of the flattened tensor `spec`, which is whole, also where this rank has
    /// a part of it.
    pub fn fill(&mut self, mut f: impl FnMut(&TensorSpec, i64, &Tensor) -> Result<()>) -> Result<()> {
        self.fill_where(|spec| !is_adapter(&spec.name), true, &mut f)
    }

    /// Sets the values of the adapters, as [`Sharded::fill`] does those of the model.
    pub fn fill_adapters(
        &mut self,
        mut f: impl FnMut(&TensorSpec, i64, &Tensor) -> Result<()>,
    ) -> Result<()> {
        self.fill_where(|spec| is_adapter(&spec.name), true, &mut f)
    }

    /// Sets the values of all that is trained: of the model and of adapters.
    pub fn fill_trained(&mut self, mut f: impl FnMut(&TensorSpec, i64, &Tensor) -> Result<()>) -> Result<()> {
        self.fill_where(|_| true, false, &mut f)
    }

    /// Sets the values of the tensors that are `wanted`: of what is trained, and, if `frozen`, of what is not.
    pub fn fill_where(
        &mut self,
        wanted: impl Fn(&TensorSpec) -> bool,
        frozen: bool,
        f: &mut impl FnMut(&TensorSpec, i64, &Tensor) -> Result<()>,
    ) -> Result<()> {
        for i in 0..self.groups.len() {
            let slice = self.slice(i);
            let group = &mut self.groups[i];
            for spec in group.layout.specs.iter().filter(|s| wanted(s)) {
                let first = slice.start.max(spec.offset);
                let end = (slice.start + slice.len).min(spec.offset + spec.numel());
                if first < end {
                    let values = group.master.narrow(0, first - slice.start, end - first);
                    spec.fill(first - spec.offset, &values, f)?;
                }
            }
            if frozen {
                group.frozen.release();
                let part = |spec: &TensorSpec, first, values: &Tensor| spec.fill(first, values, f);
                group.frozen.fill(self.sharding.shard.rank(), &wanted, part)?;
            }
        }
        self.refresh();
        Ok(())
    }

    /// The names of tensors that are not trained and whose reads by this rank count in a hash of all ranks' (see
    /// [`Frozen::counted`]).
    pub fn counted(&self) -> HashSet<String> {
        let rank = self.sharding.shard.rank();
        let owned = (0..self.len()).filter(|i| self.owns(*i)).map(|i| &self.groups[i]);
        let counted = owned.flat_map(|g| g.frozen.counted(rank));
        let counts = |spec: &TensorSpec, whole: bool| match whole {
            true => self.sharding.tensor.rank == 0,
            false => self.counts(spec),
        };
        counted.filter(|(spec, whole)| counts(spec, *whole)).map(|(spec, _)| spec.name.clone()).collect()
    }

    /// Brings the compute copies up to the master values.
    pub fn refresh(&mut self) {
        self.drop_gathered();
        for g in &mut self.groups {
            if g.local.kind() != g.master.kind() {
                g.local.copy_(&g.master);
            }
        }
    }

    /// All master values of group `i`, unpadded: A `[numel]`, gathered over the shard group (a collective call).
    pub fn gather_master(&self, i: usize) -> Result<Tensor> {
        let g = &self.groups[i];
        if self.sharding.shard.size() == 1 {
            return Ok(g.master.narrow(0, 0, g.layout.numel));
        }
        let full = Tensor::empty([g.shard_len * self.sharding.shard.size()], (g.master.kind(), self.device));
        if g.layout.numel > 0 {
            self.sharding.shard.all_gather(&full, &g.master)?.wait()?; // collective
        }
        Ok(full.narrow(0, 0, g.layout.numel))
    }

    /// What is trained of group `i`, by name, as whole tensors: A. A collective call over the ranks that one copy lies on, of all
    /// stages.
    pub fn gather_trained(&self, i: usize) -> Result<Vec<(String, Tensor)>> {
        let flat = self.owns(i).then(|| self.gather_master(i)).transpose()?;
        let kind = kernels::ops::accumulator(self.compute);
        let tensor = |spec: &TensorSpec| {
            let here = flat.as_ref().map(|flat| self.join(spec, spec.view(flat))).transpose()?;
            Ok((spec.name.clone(), self.to_all_stages(i, spec, kind, here)?))
        };
        self.groups[i].layout.specs.iter().map(tensor).collect()
    }

    /// A tensor of group `i`, as a whole, which the stage that owns it has, on all stages. Collective over these.
    fn to_all_stages(&self, i: usize, spec: &TensorSpec, kind: Kind, here: Option<Tensor>) -> Result<Tensor> {
        let stages = &self.sharding.pipeline.axis;
        if stages.size == 1 {
            return here.ok_or_else(|| Error::failed("one stage has all groups"));
        }
        let tensor = match here {
            Some(tensor) => tensor.contiguous(),
            None => Tensor::f_empty(spec.whole().shape, (kind, self.device))?,
        };
        stages.group.broadcast(&tensor, self.groups[i].plan.stage.owner)?.wait()?; // collective
        Ok(tensor)
    }

    /// Gives the model's tensors of group `i` to `f`, whole and in the plan's order: masters of what is trained, values in the
    /// compute dtype of what is not, quantized ones in float32. A collective call over the ranks that one copy lies on, of all
    /// stages.
    pub fn gather_tensors(
        &self,
        i: usize,
        mut f: impl FnMut(&TensorSpec, Tensor) -> Result<()>,
    ) -> Result<()> {
        let full = self.owns(i).then(|| {
            let frozen = self.groups[i].frozen.gather(&self.sharding.shard)?;
            Ok::<_, Error>(Full { trained: Some(Gathered::Compute(self.gather_master(i)?)), frozen })
        });
        let full = full.transpose()?;
        let plan = &self.groups[i].plan;
        for (k, (spec, role)) in plan.layout.specs.iter().zip(&plan.roles).enumerate() {
            let kind = match role {
                Role::Trained => kernels::ops::accumulator(self.compute),
                Role::Frozen(Storage::Dense) => self.compute,
                Role::Frozen(Storage::Quantized(_)) => Kind::Float,
            };
            let here =
                full.as_ref().map(|full| self.join(spec, self.dequantized(i, full, k)?)).transpose()?;
            f(&spec.whole(), self.to_all_stages(i, spec, kind, here)?)?;
        }
        Ok(())
    }

    /// Tensor `k` of group `i` of gathered masters, a rank's part of it: dense.
    fn dequantized(&self, i: usize, full: &Full, k: usize) -> Result<Tensor> {
        match self.value(i, full, &self.pieces(i, k..k + 1)[0])? {
            FrozenValue::Dense(t) => Ok(t),
            FrozenValue::Quantized(q) => {
                let [rows, columns] = q.shape();
                Ok(q.dequantize(0..rows, 0..columns, Kind::Float)?)
            }
            FrozenValue::Float8(_) => Err(Error::failed("masters are never in 8-bit floats")),
        }
    }
}

impl FlatGroup {
    /// With this rank's slice allocated.
    fn new(plan: GroupPlan, ranks: i64, compute: Kind, device: Device) -> FlatGroup {
        let mut group = FlatGroup::empty(plan, ranks, compute, device);
        let master_kind = kernels::ops::accumulator(compute);
        if !group.plan.stage.here {
            // Written by this rank, too, without values.
            group.master = Tensor::empty([0], (master_kind, device));
            return group;
        }
        group.shard_len = padded_slice(group.layout.numel, ranks);
        group.master = Tensor::zeros([group.shard_len], (master_kind, device));
        group.local = match compute == master_kind {
            true => group.master.shallow_clone(),
            false => Tensor::zeros([group.shard_len], (compute, device)),
        };
        group
    }

    /// Without memory for what is trained.
    fn empty(plan: GroupPlan, ranks: i64, compute: Kind, device: Device) -> FlatGroup {
        let Placed { layout, mut frozen, homes, adapter_homes } = plan.place();
        if !plan.stage.here {
            frozen.clear();
        }
        FlatGroup {
            shard_len: 0,
            master: Tensor::empty([0], (compute, device)),
            local: Tensor::empty([0], (compute, device)),
            frozen: Frozen::new(frozen.into_iter(), compute, ranks, device),
            homes,
            adapter_homes,
            plan,
            layout,
            grad: None,
            full: None,
            gathering: Gathering::default(),
            float8: Float8Runs::default(),
            own_bytes: None,
            full_grad: None,
            reduced: 0,
            parked: None,
        }
    }
}
