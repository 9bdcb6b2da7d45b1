//! Parameters as flat shards.
//!
//! The parameters that are used together (a block, the embedding, the head) are a group: tensors one after the other
//! in one flat buffer, padded so that it divides among the ranks of the shard group. A rank owns one slice of the
//! master values (float32; float64 in float64 compute) and of their gradients. Before use the slices are gathered in
//! the compute dtype, after use they are dropped; gradients are reduced and scattered back into slices.
//!
//! Two process groups say what is done: slices lie over `shard` (ZeRO-3: all ranks; DDP: a group of one), and the
//! slices' gradients are summed over `replica` (ZeRO-3: a group of one; DDP: all ranks). A group of one sends
//! nothing, so one rank alone runs the same code on its own buffers, without copies.

use kernels::c10d::{Group, ReduceOp, Work};
use tch::{Device, Kind, Tensor};

use crate::config::sections::Mode;
use crate::distributed::world::World;
use crate::error::Result;

/// A tensor's place in its group's flat buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// The name in Hugging Face checkpoints.
    pub name: String,
    pub shape: Vec<i64>,
    /// First element in the flat buffer.
    pub offset: i64,
}

impl Spec {
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// This tensor as a view of the flat buffer.
    pub fn view(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.offset, self.numel()).view(self.shape.as_slice())
    }
}

/// What lies where in a group's flat buffer: matrices first, then vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    pub name: String,
    pub specs: Vec<Spec>,
    /// Elements without the padding.
    pub numel: i64,
    /// Elements of the matrices: the prefix that weight decay works on.
    pub num_decayed: i64,
}

impl Layout {
    /// Lays the tensors one after the other; matrices must come before vectors.
    pub fn new(name: impl Into<String>, tensors: Vec<(String, Vec<i64>)>) -> Layout {
        let (mut offset, mut num_decayed) = (0, 0);
        let mut specs = Vec::with_capacity(tensors.len());
        for (name, shape) in tensors {
            let spec = Spec { name, shape, offset };
            if spec.shape.len() > 1 {
                assert_eq!(num_decayed, offset, "matrices come first in a group");
                num_decayed += spec.numel();
            }
            offset += spec.numel();
            specs.push(spec);
        }
        Layout { name: name.into(), specs, numel: offset, num_decayed }
    }
}

/// A slice of a group: which elements of its flat buffer this rank owns (padding excluded).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    pub start: i64,
    pub len: i64,
}

struct FlatGroup {
    layout: Layout,
    /// Elements of every rank's slice, padding included; a multiple of 64.
    shard_len: i64,
    /// This rank's slice of the values.
    master: Tensor,
    /// The slice in the compute dtype: `master` itself where the dtypes are equal.
    local: Tensor,
    /// The sum of the gradients of the step so far, over the slice.
    grad: Option<Tensor>,
    /// All values in the compute dtype, while they are in use.
    full: Option<Tensor>,
    gathering: Option<Work>,
    /// The gradient of one micro-batch over all values, between backward and reduction.
    full_grad: Option<Tensor>,
}

/// A reduction under way: its result is added to the group's slice when it is done.
struct Reduction {
    group: usize,
    work: Work,
    /// The slice of the sum; none where the group's gradient is reduced in place.
    out: Option<Tensor>,
}

/// Over which ranks slices lie, and which hold equal ones.
pub fn shard_groups(mode: Mode, world: &World) -> (Group, Group) {
    match mode {
        Mode::Full => (world.group.clone(), Group::solo()),
        Mode::Replicate => (Group::solo(), world.group.clone()),
    }
}

/// Gives all values of a group, in any dtype: `[numel]`.
type Load = Box<dyn Fn(&Layout) -> Result<Tensor>>;

/// All parameters of a model, in groups.
pub struct Sharded {
    groups: Vec<FlatGroup>,
    /// Where values come from that are not kept (see [`Sharded::on_demand`]).
    load: Option<Load>,
    reductions: Vec<Reduction>,
    shard: Group,
    replica: Group,
    compute: Kind,
    device: Device,
    /// Gathered values stay until [`Sharded::let_go`].
    held: bool,
}

/// Reductions that may be under way at once: one is sent while the next block computes.
const MAX_REDUCTIONS: usize = 1;

impl Sharded {
    /// Allocates the slices of this rank; the values are undefined until [`Sharded::fill`].
    pub fn new(layouts: Vec<Layout>, shard: Group, replica: Group, compute: Kind, device: Device) -> Sharded {
        let master_kind = kernels::ops::accumulator(compute);
        let groups = layouts
            .into_iter()
            .map(|layout| {
                let shard_len = padded_slice(layout.numel, shard.size());
                let master = Tensor::zeros([shard_len], (master_kind, device));
                let local = if compute == master_kind {
                    master.shallow_clone()
                } else {
                    Tensor::zeros([shard_len], (compute, device))
                };
                FlatGroup {
                    layout,
                    shard_len,
                    master,
                    local,
                    grad: None,
                    full: None,
                    gathering: None,
                    full_grad: None,
                }
            })
            .collect();
        Sharded { groups, load: None, reductions: Vec::new(), shard, replica, compute, device, held: false }
    }

    /// Parameters of one rank that are loaded anew whenever a group is used, and dropped after it: for the forward of a
    /// model of which two groups fit into memory. There is nothing to fill, train or export.
    pub fn on_demand(
        layouts: Vec<Layout>,
        compute: Kind,
        device: Device,
        load: impl Fn(&Layout) -> Result<Tensor> + 'static,
    ) -> Sharded {
        let groups = layouts
            .into_iter()
            .map(|layout| {
                let none = || Tensor::empty([0], (compute, device));
                FlatGroup {
                    layout,
                    shard_len: 0,
                    master: none(),
                    local: none(),
                    grad: None,
                    full: None,
                    gathering: None,
                    full_grad: None,
                }
            })
            .collect();
        let (shard, replica) = (Group::solo(), Group::solo());
        Sharded {
            groups,
            load: Some(Box::new(load)),
            reductions: Vec::new(),
            shard,
            replica,
            compute,
            device,
            held: false,
        }
    }

    pub fn len(&self) -> usize {
        self.groups.len()
    }

    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    pub fn layout(&self, i: usize) -> &Layout {
        &self.groups[i].layout
    }

    /// The dtype of forward and backward.
    pub fn compute(&self) -> Kind {
        self.compute
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// The ranks that the slices lie on.
    pub fn shard_group(&self) -> &Group {
        &self.shard
    }

    /// The ranks that hold equal slices.
    pub fn replica_group(&self) -> &Group {
        &self.replica
    }

    /// Which elements of group `i` this rank owns.
    pub fn slice(&self, i: usize) -> Slice {
        let g = &self.groups[i];
        let start = (self.shard.rank() * g.shard_len).min(g.layout.numel);
        Slice { start, len: g.shard_len.min(g.layout.numel - start) }
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

    /// Sets the values: `f(spec, first, values)` fills `values` (A `[n]`, a view of the slice) with elements
    /// `first..first + n` of the flattened tensor `spec`.
    pub fn fill(&mut self, mut f: impl FnMut(&Spec, i64, &Tensor) -> Result<()>) -> Result<()> {
        for i in 0..self.groups.len() {
            let slice = self.slice(i);
            for spec in &self.groups[i].layout.specs {
                let first = slice.start.max(spec.offset);
                let end = (slice.start + slice.len).min(spec.offset + spec.numel());
                if first < end {
                    let values = self.groups[i].master.narrow(0, first - slice.start, end - first);
                    f(spec, first - spec.offset, &values)?;
                }
            }
        }
        self.refresh();
        Ok(())
    }

    /// Brings the compute copies up to the master values.
    pub fn refresh(&mut self) {
        for g in &mut self.groups {
            if g.local.kind() != g.master.kind() {
                g.local.copy_(&g.master);
            }
        }
    }

    /// Starts gathering group `i`, if it is not there.
    pub fn prefetch(&mut self, i: usize) -> Result<()> {
        let size = self.shard.size();
        let g = &mut self.groups[i];
        if g.full.is_some() {
            return Ok(());
        }
        if let Some(load) = &self.load {
            g.full = Some(load(&g.layout)?.f_to_device(self.device)?.f_to_kind(self.compute)?);
            return Ok(());
        }
        if size == 1 {
            g.full = Some(g.local.shallow_clone());
            return Ok(());
        }
        let full = Tensor::empty([g.shard_len * size], (self.compute, self.device));
        g.gathering = Some(self.shard.all_gather(&full, &g.local)?);
        g.full = Some(full);
        Ok(())
    }

    /// All values of group `i` in the compute dtype, flat: T [numel + padding]. Held until [`Sharded::release`].
    pub fn full(&mut self, i: usize) -> Result<Tensor> {
        self.prefetch(i)?;
        let g = &mut self.groups[i];
        if let Some(work) = g.gathering.take() {
            work.wait()?;
        }
        Ok(g.full.as_ref().expect("gathered above").shallow_clone())
    }

    /// Drops the gathered values of group `i`, unless they are held.
    pub fn release(&mut self, i: usize) {
        if !self.held {
            let g = &mut self.groups[i];
            g.gathering = None;
            g.full = None;
        }
    }

    /// Gathers all groups and keeps them until [`Sharded::let_go`]: forwards then communicate nothing. A collective
    /// call. For what reads the same values many times, where a rank has room for all of them.
    pub fn hold(&mut self) -> Result<()> {
        self.held = true;
        (0..self.len()).try_for_each(|i| self.full(i).map(drop))
    }

    /// Ends [`Sharded::hold`]; values that change later need this first.
    pub fn let_go(&mut self) {
        self.held = false;
        (0..self.len()).for_each(|i| self.release(i));
    }

    /// Whether a forward is a collective call: values must be gathered from other ranks.
    pub fn gathers(&self) -> bool {
        self.shard.size() > 1 && !self.held
    }

    /// Where the backward of group `i` adds its gradient: A [numel + padding], and whether it is fresh: then its
    /// contents are undefined, and the first writer of every element must set instead of add.
    pub fn grad(&mut self, i: usize) -> (Tensor, bool) {
        let size = self.shard.size();
        let g = &mut self.groups[i];
        let target = if size == 1 { &mut g.grad } else { &mut g.full_grad };
        if let Some(t) = target {
            return (t.shallow_clone(), false);
        }
        let t = Tensor::empty([g.shard_len * size], (g.master.kind(), self.device));
        let padding = g.shard_len * size - g.layout.numel;
        if padding > 0 {
            let _ = t.narrow(0, g.layout.numel, padding).zero_();
        }
        *target = Some(t.shallow_clone());
        (t, true)
    }

    /// Says that the gradient of group `i` is complete for this micro-batch. Slices are reduced at once, so that no
    /// rank keeps a whole gradient; replicas wait for the `last` micro-batch of the step.
    pub fn reduce(&mut self, i: usize, last: bool) -> Result<()> {
        while self.reductions.len() >= MAX_REDUCTIONS {
            self.finish_oldest_reduction()?;
        }
        let g = &mut self.groups[i];
        if let Some(full_grad) = g.full_grad.take() {
            let out = Tensor::empty([g.shard_len], (full_grad.kind(), self.device));
            let work = self.shard.reduce_scatter(&out, &full_grad, ReduceOp::Sum)?;
            self.reductions.push(Reduction { group: i, work, out: Some(out) });
        }
        if last && self.replica.size() > 1 {
            while self.reductions.iter().any(|r| r.group == i) {
                self.finish_oldest_reduction()?;
            }
            if let Some(grad) = &self.groups[i].grad {
                let work = self.replica.all_reduce(grad, ReduceOp::Sum)?;
                self.reductions.push(Reduction { group: i, work, out: None });
            }
        }
        Ok(())
    }

    fn finish_oldest_reduction(&mut self) -> Result<()> {
        let Reduction { group, work, out } = self.reductions.remove(0);
        work.wait()?;
        if let Some(out) = out {
            let g = &mut self.groups[group];
            match &mut g.grad {
                Some(grad) => {
                    let _ = grad.g_add_(&out);
                }
                None => g.grad = Some(out),
            }
        }
        Ok(())
    }

    /// Waits for all reductions: the slices then hold the step's gradient.
    pub fn finish_step_gradients(&mut self) -> Result<()> {
        while !self.reductions.is_empty() {
            self.finish_oldest_reduction()?;
        }
        Ok(())
    }

    /// Forgets the step's gradients.
    pub fn clear_gradients(&mut self) {
        for g in &mut self.groups {
            g.grad = None;
            g.full_grad = None;
        }
    }

    /// All master values of group `i`, unpadded: A `[numel]`, gathered over the shard group (a collective call).
    pub fn gather_master(&self, i: usize) -> Result<Tensor> {
        let g = &self.groups[i];
        if self.shard.size() == 1 {
            return Ok(g.master.narrow(0, 0, g.layout.numel));
        }
        let full = Tensor::empty([g.shard_len * self.shard.size()], (g.master.kind(), self.device));
        self.shard.all_gather(&full, &g.master)?.wait()?;
        Ok(full.narrow(0, 0, g.layout.numel))
    }

    /// Sum of a function of the slices over all ranks that own different ones.
    pub fn sum_over_slices(&self, local: f64) -> Result<f64> {
        Ok(self.shard.combine(&[local], ReduceOp::Sum)?[0])
    }
}

/// Elements of one rank's slice: the group divided by the ranks, rounded up to a multiple of 64.
fn padded_slice(numel: i64, ranks: i64) -> i64 {
    ((numel + ranks - 1) / ranks + 63) & !63
}
