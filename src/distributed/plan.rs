//! What becomes of a group's tensors: which are trained, which are frozen, and which have adapters.

use std::collections::HashMap;
use std::ops::Range;

use kernels::ops::accumulator;
use tch::{Kind, Tensor};

use crate::distributed::cut::Share;
use crate::distributed::float8_runs::{Float8Runs, owned};
use crate::distributed::frozen::{self, Storage};
use crate::distributed::layout::{Layout, TensorSpec, padded_slice};

/// What becomes of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It has master values, a gradient and moments.
    Trained,
    /// It keeps its values, in this form.
    Frozen(Storage),
}

/// A low-rank addition to a weight: scale * B A, for A [rank, I] and B [O, rank].
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterPlan {
    /// The weight's place among the group's tensors.
    pub target: usize,
    /// The inner dimension of A and B, r.
    pub rank: i64,
    /// What B A is multiplied by: alpha / r, or alpha / sqrt(r) with `rslora`.
    pub scale: f64,
    /// Share of the inputs of A that a forward of training leaves out.
    pub dropout: f64,
    /// [`Role::Trained`], or frozen and dense.
    pub role: Role,
}

impl AdapterPlan {
    /// The shapes of A and B.
    pub fn shapes(&self, layout: &Layout) -> [Vec<i64>; 2] {
        let weight = &layout.specs[self.target].shape;
        [vec![self.rank, weight[1]], vec![weight[0], self.rank]]
    }
}

/// A group before its parameters are there: the model's tensors, what becomes of each, and adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupPlan {
    /// Every tensor of the model's, trained or not; its places in a flat buffer do not count.
    pub layout: Layout,
    /// One for each tensor.
    pub roles: Vec<Role>,
    /// In the order of their targets.
    pub adapters: Vec<AdapterPlan>,
    /// Where it is in a pipeline.
    pub stage: OnStage,
}

/// Which stage of a pipeline has a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnStage {
    /// The stage that has it, and writes it into checkpoints.
    pub owner: i64,
    /// Another one that has it, too: the last stage a tied embedding, whose gradients both sum.
    pub also: Option<i64>,
    /// Whether this rank's stage has it. If not, the rank knows its tensors and holds nothing of them.
    pub here: bool,
}

impl OnStage {
    /// Of the only stage.
    pub fn only() -> OnStage {
        OnStage { owner: 0, also: None, here: true }
    }
}

impl From<Layout> for GroupPlan {
    /// All is trained.
    fn from(layout: Layout) -> GroupPlan {
        let roles = vec![Role::Trained; layout.specs.len()];
        GroupPlan { layout, roles, adapters: Vec::new(), stage: OnStage::only() }
    }
}

impl GroupPlan {
    /// All tensors, those of adapters after the model's; what they are, not where.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut specs = self.layout.specs.clone();
        for adapter in &self.adapters {
            let target = &self.layout.specs[adapter.target];
            let new = adapter_names(&target.name).into_iter().zip(adapter.shapes(&self.layout));
            let new = new.zip(adapter_shares(target.share));
            specs.extend(
                new.map(|((name, shape), share)| TensorSpec { share, ..TensorSpec::new(name, shape) }),
            );
        }
        specs
    }

    /// Whether a tensor whose name ends so is trained.
    pub fn trains(&self, suffix: &str) -> bool {
        let named =
            |(spec, role): (&TensorSpec, &Role)| *role == Role::Trained && spec.name.ends_with(suffix);
        self.layout.specs.iter().zip(&self.roles).any(named)
    }

    /// The layout of what is trained, adapters included.
    pub fn trained(&self) -> Layout {
        self.place().layout
    }

    /// What the group takes of each rank's memory, in `compute`, in slices over `ranks`.
    pub fn bytes(&self, compute: Kind, ranks: i64) -> GroupBytes {
        if !self.stage.here {
            return GroupBytes::default();
        }
        let placed = self.place();
        let (value, master) = (compute.elt_size_in_bytes() as i64, accumulator(compute));
        let numel = placed.layout.numel;
        let (slice, a) = (padded_slice(numel, ranks), master.elt_size_in_bytes() as i64);
        let frozen = frozen::slice_bytes(placed.frozen.into_iter(), compute, ranks);
        let shared = if ranks > 1 { ranks } else { 0 };
        GroupBytes {
            num_trained: numel,
            slice_len: slice.min(numel),
            master: slice * a,
            copy: if compute == master { 0 } else { slice * value },
            frozen,
            gathered: shared * (slice * value + frozen),
            gradient: slice * a,
            whole_gradient: shared * slice * a,
        }
    }

    /// [`GroupPlan::bytes`] in bfloat16, `bytes`, where these runs of what is trained are gathered in 8-bit floats and the rest
    /// as it is. A rank keeps what it sends until an update.
    pub fn in_float8(&self, bytes: GroupBytes, runs: Vec<Range<i64>>, ranks: i64) -> GroupBytes {
        let numel = bytes.num_trained;
        let slice = padded_slice(numel, ranks);
        let rest = Float8Runs::new(runs, 0, (0..ranks).map(|rank| owned(rank, slice, numel))).rest_len;
        let sent = slice + Kind::BFloat16.elt_size_in_bytes() as i64 * rest;
        GroupBytes { copy: bytes.copy + sent, gathered: ranks * (sent + bytes.frozen), ..bytes }
    }

    pub(super) fn place(&self) -> Placed {
        let of_adapters = self.adapters.iter().flat_map(|a| [a.role; 2]);
        let roles: Vec<Role> = self.roles.iter().copied().chain(of_adapters).collect();
        let tensors = self.tensors();
        let all = || tensors.iter().zip(&roles);
        // What is trained in the same order, but matrices first.
        let trained = |matrix: bool| {
            let of = move |(spec, role): &(&TensorSpec, &Role)| {
                **role == Role::Trained && (spec.shape.len() > 1) == matrix
            };
            all().filter(of).map(|(spec, _)| spec.clone())
        };
        let layout = Layout::of(self.layout.name.clone(), trained(true).chain(trained(false)));
        let offsets: HashMap<&str, i64> = layout.specs.iter().map(|s| (s.name.as_str(), s.offset)).collect();
        let mut frozen = Vec::new();
        let mut homes = Vec::with_capacity(tensors.len());
        for (spec, role) in all() {
            homes.push(match role {
                Role::Trained => Home::Trained(offsets[spec.name.as_str()]),
                Role::Frozen(storage) => {
                    frozen.push((spec.clone(), *storage));
                    Home::Frozen(frozen.len() - 1)
                }
            });
        }
        let (homes, of_adapters) = homes.split_at(self.layout.specs.len());
        let adapter_homes = of_adapters.chunks_exact(2).map(|c| [c[0], c[1]]).collect();
        Placed { homes: homes.to_vec(), adapter_homes, layout, frozen }
    }
}

/// What a group takes of a rank's memory; bytes, but for the two counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupBytes {
    /// Numbers that are trained, over all ranks with equal rectangles.
    pub num_trained: i64,
    /// Numbers of the largest slice of them, for which there are moments.
    pub slice_len: i64,
    /// Bytes of the slice of the master values.
    pub master: i64,
    /// Bytes of the slice's copy in the compute dtype; 0 where the master values are in it.
    pub copy: i64,
    /// The slice of what is not trained.
    pub frozen: i64,
    /// All values in the compute dtype while they are in use; 0 where one rank has them anyway.
    pub gathered: i64,
    /// Bytes of the slice of the gradient.
    pub gradient: i64,
    /// Bytes of the gradient of the whole group before it is reduced; 0 for one rank.
    pub whole_gradient: i64,
}

/// What lies where.
pub(super) struct Placed {
    /// What is trained.
    pub layout: Layout,
    pub frozen: Vec<(TensorSpec, Storage)>,
    /// Of the plan's tensors, and of A and B of each adapter.
    pub homes: Vec<Home>,
    pub adapter_homes: Vec<[Home; 2]>,
}

/// What a tensor-parallel rank has of A and B, by what it has of the weight: A reads the weight's columns, B gives its rows, and
/// the other one of both has its gradient in parts.
fn adapter_shares(weight: Share) -> [Share; 2] {
    match weight {
        Share::Cut(cut) if cut.dim == 0 => [Share::Summed, weight],
        Share::Cut(_) => [weight, Share::Summed],
        _ => [weight; 2],
    }
}

/// The names of an adapter's A and B, for a weight `NAME.weight`.
pub fn adapter_names(weight: &str) -> [String; 2] {
    let module = weight.strip_suffix(".weight").unwrap_or(weight);
    ["A", "B"].map(|part| format!("{module}.lora_{part}.weight"))
}

/// Whether a tensor belongs to an adapter.
pub fn is_adapter(name: &str) -> bool {
    name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight")
}

/// Where a tensor lies in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    /// At this element of the flat buffer of what is trained.
    Trained(i64),
    /// At this place among what is frozen.
    Frozen(usize),
}

/// Tensors of a group that lie one after the other and are used as one: their rows follow each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    pub(super) home: Home,
    /// Its shape: the rows of all its tensors, and their columns.
    pub size: Vec<i64>,
}

impl Piece {
    /// Its first element in a flat buffer of what is trained; none where it is frozen.
    pub(super) fn first_trained(&self) -> Option<i64> {
        match self.home {
            Home::Trained(offset) => Some(offset),
            Home::Frozen(_) => None,
        }
    }

    /// This piece of a flat buffer of a group's trainable parameters, or of their gradients; none where it is frozen.
    pub(super) fn of_trained(&self, flat: &Tensor) -> Option<Tensor> {
        match self.home {
            Home::Trained(offset) => {
                Some(flat.narrow(0, offset, self.size.iter().product()).view(self.size.as_slice()))
            }
            Home::Frozen(_) => None,
        }
    }
}
