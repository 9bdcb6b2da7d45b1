//! The world: all ranks of a run, this process's place among them, its device, and the group of all.

use super::agreement::{Facts, agree_on};
use super::environment::RankEnvironment;
use super::mesh::{Axis, AxisName, Keep, Mesh, MeshPlan, Sharding};
use super::pipeline::Pipeline;
use crate::config::parallel::{Mode, Parallel, ShardSize};
use crate::env;
use crate::{Context, Error, Result};
use kernels::comm::{Backend, Group, ReduceOp, Store};
use kernels::cuda;
use kernels::watch::Watch;
use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tch::{Device, Kind};

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The CPU, with Gloo between ranks.
    Cpu,
    /// The GPU of the local rank.
    Cuda,
    /// This GPU; for a world of one.
    CudaIndex(usize),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match (s, s.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(DeviceChoice::Cpu),
            ("cuda", _) => Ok(DeviceChoice::Cuda),
            (_, Some(Ok(index))) => Ok(DeviceChoice::CudaIndex(index)),
            _ => Err(Error::config(format!("device {s:?}: it must be cpu, cuda or cuda:N"))),
        }
    }
}

impl DeviceChoice {
    /// `--device`, or without it the GPU where the machine has one, else the CPU.
    pub fn of(text: Option<&str>) -> Result<DeviceChoice> {
        match text {
            Some(text) => text.parse(),
            None if std::path::Path::new("/proc/driver/nvidia/gpus").exists() => Ok(DeviceChoice::Cuda),
            None => Ok(DeviceChoice::Cpu),
        }
    }
}

/// `--backend`, or what `launch --backend` passes on as CORRAL_BACKEND.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendChoice {
    /// NCCL if every rank has a GPU of its own, Gloo otherwise.
    Auto,
    /// Gloo: TCP between CPUs; tensors on GPUs pass through host memory.
    Gloo,
    /// NCCL, between GPUs.
    Nccl,
    /// MPI between processes that `mpirun` or `srun` has started; tensors on GPUs pass through host memory.
    Mpi,
}

impl FromStr for BackendChoice {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(BackendChoice::Auto),
            "gloo" => Ok(BackendChoice::Gloo),
            "nccl" => Ok(BackendChoice::Nccl),
            "mpi" if cfg!(feature = "mpi") => Ok(BackendChoice::Mpi),
            "mpi" => Err(Error::config(
                "backend mpi: this program was built without MPI; build it with `cargo build --release --features mpi`, or use \
                 gloo or nccl",
            )),
            _ => Err(Error::config(format!("backend {s:?}: it must be auto, nccl, gloo or mpi"))),
        }
    }
}

impl BackendChoice {
    /// `--backend`, else CORRAL_BACKEND, else `Auto`.
    pub fn of(text: Option<&str>) -> Result<BackendChoice> {
        match (text, env::text("CORRAL_BACKEND")) {
            (Some(text), _) => text.parse().context("--backend"),
            (None, Some(text)) => text.parse().context("CORRAL_BACKEND"),
            (None, None) => Ok(BackendChoice::Auto),
        }
    }
}

/// What `mode: hybrid` with `shard: auto` goes by, which must be the same on all hosts.
const HOST_RANKS: &str = "ranks of a host, numbered one after the other, for parallel.shard: auto";

/// Set once this process is one of several ranks that have met.
static MET: AtomicBool = AtomicBool::new(false);

/// Whether this process has met other ranks.
pub fn have_met() -> bool {
    MET.load(Ordering::Relaxed)
}

/// Leaves what ranks are connected by, where that is needed: this process is about to end in good order.
pub fn leave() {
    #[cfg(feature = "mpi")]
    mpi_engine::leave();
}

/// All ranks of a run, seen from one of them.
pub struct World {
    /// This process among all ranks, from 0.
    pub rank: i64,
    /// Ranks of the run, over all hosts.
    pub world_size: i64,
    /// Among the ranks of this host.
    pub local_rank: i64,
    /// Ranks of this host.
    pub local_world_size: i64,
    /// Where this rank computes.
    pub device: Device,
    /// All ranks.
    pub group: Group,
    /// How they divide the work.
    pub mesh: Mesh,
    /// See [`World::reducing`].
    reduce: Group,
    keep: Keep,
    /// Tensor-parallel ranks divide rows.
    sequence: bool,
    /// Which backend was chosen, and why: one line to print.
    pub choice: String,
    backend: Backend,
    timeout: Duration,
    watch: Option<Arc<Watch>>,
}

impl World {
    /// Joins the world that the launcher's environment describes; without one, a world of one rank.
    /// `parallel.timeout_s` limits the meeting of the ranks and every collective.
    ///
    /// Errors: exit code 2 if the environment, the device or the backend cannot be; else which address or rank fails.
    pub fn from_env(backend: BackendChoice, device: DeviceChoice, parallel: &Parallel) -> Result<World> {
        World::join(RankEnvironment::from_env()?, backend, device, parallel, &Facts::new())
    }

    /// [`World::from_env`] with `--backend` or what the launcher asks for, and `--device`. Without `--device`: the GPU where
    /// there is one, else the CPU. All ranks must have the same `facts`.
    pub fn from_global(
        backend: Option<&str>,
        device: Option<&str>,
        parallel: &Parallel,
        facts: &Facts,
    ) -> Result<World> {
        World::join(
            RankEnvironment::from_env()?,
            BackendChoice::of(backend)?,
            DeviceChoice::of(device)?,
            parallel,
            facts,
        )
    }

    /// Whether this rank writes the files that a run has once, and prints.
    pub fn is_main(&self) -> bool {
        self.rank == 0
    }

    /// How the parameters of the models that are trained lie over the ranks.
    pub fn sharding(&self) -> Sharding {
        let group = |axis: &Axis| axis.group.clone();
        let (shard, replicate) = (group(&self.mesh.shard), group(&self.mesh.replicate));
        let tensor = self.mesh.tensor.clone();
        let (reduce, sequence, keep) = (self.reduce.clone(), self.sequence, self.keep);
        let (context, pipeline) = (self.mesh.context.clone(), self.mesh.pipeline.clone());
        Sharding { shard, reduce, replicate, tensor, sequence, context, pipeline, keep }
    }

    /// Numbers that are sums over rows, added up over the ranks that have different rows. One sum over all ranks, so that all have
    /// the same bits: of those that share every matrix, and so have the same rows, the first counts, of stages the last. Collective.
    pub fn sum_rows(&self, mine: &[f64]) -> Result<Vec<f64>> {
        match self.mesh.tensor.rank == 0 && self.mesh.pipeline.is_last() {
            true => Ok(self.group.combine(mine, ReduceOp::Sum)?),
            false => Ok(self.group.combine(&vec![0.0; mine.len()], ReduceOp::Sum)?),
        }
    }

    /// Bytes that this rank has sent so far, by axis (see [`Group::sent_bytes`]); axes of one rank are left out. Where the data axis
    /// is all ranks, so are sums over all ranks.
    pub fn sent_bytes(&self) -> BTreeMap<&'static str, u64> {
        let mesh = &self.mesh;
        let axes = [
            (AxisName::Shard, &mesh.shard.group),
            (AxisName::Replicate, &mesh.replicate.group),
            (AxisName::Tensor, &mesh.tensor.group),
            (AxisName::Context, &mesh.context.group),
        ];
        let mut sent: BTreeMap<&'static str, u64> = axes
            .into_iter()
            .filter(|(_, group)| group.size() > 1)
            .map(|(axis, group)| (axis.name(), group.sent_bytes()))
            .collect();
        if mesh.pipeline.axis.size > 1 {
            sent.insert(AxisName::Pipeline.name(), mesh.pipeline.sent_bytes());
        }
        // A group of its own, with NCCL.
        if self.reduce.name() != mesh.shard.group.name() {
            *sent.entry(AxisName::Shard.name()).or_default() += self.reduce.sent_bytes();
        }
        sent
    }

    /// Where ranks leave each other messages; a world of one rank has none.
    pub(super) fn store(&self) -> Option<&Store> {
        self.watch.as_ref().map(|watch| watch.store())
    }

    /// Waits until this rank's device has done all that was asked of it.
    pub fn synchronize(&self) -> Result<()> {
        match self.device {
            Device::Cuda(index) => Ok(cuda::load()?.synchronize(index)?),
            _ => Ok(()),
        }
    }

    /// Peak memory of this rank so far: of the process on a CPU, of the device's allocator on a GPU.
    pub fn peak_bytes(&self) -> Result<u64> {
        match self.device {
            Device::Cuda(index) => Ok(cuda::load()?.memory(index)?.peak_allocated as u64),
            _ => Ok(crate::telemetry::peak_bytes()),
        }
    }

    /// Peak FLOP/s of dense matrix products in this dtype on this rank's GPU, where it is known.
    pub fn peak_flops(&self, kind: Kind) -> Result<Option<f64>> {
        match self.device {
            Device::Cuda(index) => Ok(cuda::peak_flops(&cuda::load()?.device_info(index)?.name, kind)),
            _ => Ok(None),
        }
    }

    /// A world of one rank, whatever the environment says; nothing communicates.
    pub fn solo(device: DeviceChoice) -> Result<World> {
        World::join(None, BackendChoice::Auto, device, &Parallel::default(), &Facts::new())
    }

    fn join(
        place: Option<RankEnvironment>,
        backend: BackendChoice,
        device: DeviceChoice,
        parallel: &Parallel,
        facts: &Facts,
    ) -> Result<World> {
        let timeout = Duration::from_secs_f64(parallel.timeout_s);
        let world_size = place.as_ref().map_or(1, |p| p.world_size);
        let (rank, local_rank, local_world_size) =
            place.as_ref().map_or((0, 0, 1), |p| (p.rank, p.local_rank, p.local_world_size));
        if let (DeviceChoice::CudaIndex(n), 2..) = (device, world_size) {
            return Err(Error::config(format!(
                "device cuda:{n} is for a single rank, but there are {world_size}: use --device cuda, which gives every \
                 local rank a GPU"
            )));
        }
        if (backend, device) == (BackendChoice::Nccl, DeviceChoice::Cpu) {
            return Err(Error::config("backend nccl needs GPUs: use --device cuda, or --backend gloo"));
        }
        let device = open_device(device, local_rank)?;
        let mut world = World {
            rank,
            world_size,
            local_rank,
            local_world_size,
            device,
            group: Group::solo(),
            mesh: Mesh::solo(),
            reduce: Group::solo(),
            keep: Keep::of(parallel.mode),
            sequence: parallel.sequence,
            choice: "communication: none (one rank)".into(),
            backend: Backend::Gloo,
            timeout,
            watch: None,
        };
        let Some(place) = place.filter(|p| p.world_size > 1 || backend == BackendChoice::Nccl) else {
            return Ok(world);
        };

        let serves = place.rank == 0 && !place.store_is_served;
        let store = Store::tcp(&place.host, place.port, serves, timeout)?
            .prefix(&format!("corral/{}", place.attempt))?;
        let watch = Watch::start(store, rank, world_size, serves)?;
        let mut facts = facts.clone();
        facts.add("the backend, of --backend or CORRAL_BACKEND", format!("{backend:?}"));
        if let (Mode::Hybrid, ShardSize::Auto) = (parallel.mode, parallel.shard) {
            facts.add(HOST_RANKS, local_world_size.to_string());
            // Such as after `srun --distribution=cyclic`: neighbours are then on different hosts.
            if rank % local_world_size != local_rank {
                facts.add(HOST_RANKS, format!("(rank {rank} is number {local_rank} of its host)"));
            }
        }
        if parallel.tensor > 1 {
            // Gradients of what all of them have must be equal to the bit.
            facts.add("threads a rank, for parallel.tensor", tch::get_num_threads().to_string());
        }
        agree_on(&watch, &facts, timeout)?;
        let (chosen, why) = choose_backend(&watch, backend, device, timeout)?;
        let ranks: Vec<i64> = (0..world_size).collect();
        world.group = Group::new(&watch, chosen, "world", &ranks, timeout, device)?;
        MET.store(true, Ordering::Relaxed);
        world.backend = chosen;
        world.choice = format!("communication: {} ({why})", chosen.name());
        world.watch = Some(watch);
        world.mesh = world.divide("", parallel)?;
        world.reduce = world.reducing("")?;
        Ok(world)
    }

    /// The same ranks, divided otherwise: for a model that has ways of its own; `name` is unique in the run. Collective.
    pub fn divided_as(&self, name: &str, parallel: &Parallel) -> Result<World> {
        let threads = f64::from(tch::get_num_threads());
        let most = self.group.combine(&[threads, -threads], ReduceOp::Max)?;
        if parallel.tensor > 1 && most[0] != -most[1] {
            return Err(Error::config(format!(
                "ranks that share matrices need equally many threads, for gradients that are equal to the bit, and have from {} to \
                 {}: set --threads",
                -most[1], most[0]
            )));
        }
        let mut world = World {
            group: self.group.clone(),
            mesh: Mesh::solo(),
            reduce: Group::solo(),
            keep: Keep::of(parallel.mode),
            sequence: parallel.sequence,
            choice: self.choice.clone(),
            watch: self.watch.clone(),
            ..*self
        };
        if self.watch.is_some() {
            world.mesh = self.divide(&format!("{name}/"), parallel)?;
            world.reduce = world.reducing(&format!("{name}/"))?;
        }
        Ok(world)
    }

    /// The axes of this world; `of` begins the names of their groups. All ranks ask together.
    fn divide(&self, of: &str, parallel: &Parallel) -> Result<Mesh> {
        let plan = MeshPlan::of(parallel, self.world_size, Some(self.local_world_size))?;
        let axis = |name| self.axis(of, &plan, name);
        let data = axis(AxisName::Data)?;
        // The same ranks need one group.
        let shard = match plan.context {
            1 if plan.shard == plan.data => data.clone(),
            _ => axis(AxisName::Shard)?,
        };
        let replicate = match plan.context {
            1 if plan.shard == 1 => data.clone(),
            _ => axis(AxisName::Replicate)?,
        };
        let tensor = axis(AxisName::Tensor)?;
        // Never a group that gathers parameters, too: the attention would wait for them.
        let ranks = plan.axis(AxisName::Context, self.rank);
        let context = Axis::of(self.new_group(&format!("{of}context/{}", ranks[0]), &ranks)?);
        let stages = plan.axis(AxisName::Pipeline, self.rank);
        let stage = stages.iter().position(|rank| *rank == self.rank).unwrap_or_default();
        let device = if self.backend == Backend::Nccl { self.device } else { Device::Cpu };
        let new_group = |name: &str, ranks: &[i64]| self.new_group(&format!("{of}{name}"), ranks);
        let mut pipeline = Pipeline::connect(&stages, stage, device, &new_group)?;
        (pipeline.blocks, pipeline.order) = (parallel.stages.clone(), parallel.schedule);
        Ok(Mesh { data, shard, replicate, tensor, context, pipeline })
    }

    /// This rank's axis of this name.
    fn axis(&self, of: &str, plan: &MeshPlan, axis: AxisName) -> Result<Axis> {
        let ranks = plan.axis(axis, self.rank);
        if ranks.len() as i64 == self.world_size {
            return Ok(Axis::of(self.group.clone()));
        }
        Ok(Axis::of(self.new_group(&format!("{of}{}/{}", axis.name(), ranks[0]), &ranks)?))
    }

    /// The ranks of the shard axis, for reductions. NCCL works off the collectives of a group one after the other: with a
    /// group of their own, reductions do not wait for gathers, nor gathers for reductions.
    fn reducing(&self, of: &str) -> Result<Group> {
        let shard = &self.mesh.shard.group;
        if self.backend != Backend::Nccl || shard.size() == 1 {
            return Ok(shard.clone());
        }
        self.new_group(&format!("{of}reduce/{}", shard.ranks()[0]), shard.ranks())
    }

    /// The group `name` (unique in the run) of these world ranks, which all of them and only they must ask for. A group of
    /// this rank alone needs no communication.
    pub fn new_group(&self, name: &str, ranks: &[i64]) -> Result<Group> {
        match &self.watch {
            Some(watch) if ranks.len() > 1 => {
                Ok(Group::new(watch, self.backend, name, ranks, self.timeout, self.device)?)
            }
            _ if ranks == [self.rank] => Ok(Group::solo()),
            _ => Err(Error::failed(format!(
                "group `{name}`: {ranks:?} does not fit rank {} of a world of {}",
                self.rank, self.world_size
            ))),
        }
    }
}

/// Local rank r computes on GPU r (modulo their number: a launcher may show each rank its own GPU only, and ranks may
/// share one).
fn open_device(choice: DeviceChoice, local_rank: i64) -> Result<Device> {
    let want = match choice {
        DeviceChoice::Cpu => return Ok(Device::Cpu),
        DeviceChoice::Cuda => None,
        DeviceChoice::CudaIndex(n) => Some(n),
    };
    let cuda = cuda::load().config_error("--device cuda")?;
    let count = cuda.device_count().config_error("--device cuda: no usable GPU")?;
    let index = want.unwrap_or(local_rank as usize % count);
    if index >= count {
        return Err(Error::config(format!("--device cuda:{index}: there are {count} GPUs, counted from 0")));
    }
    cuda.set_device(index)?;
    if let Some(home) = crate::env::corral_home() {
        cuda::nvrtc::keep_in(home.join("kernels"));
    }
    Ok(Device::Cuda(index))
}

/// All ranks choose alike: on GPUs each tells the others which one it has.
fn choose_backend(
    watch: &Watch,
    choice: BackendChoice,
    device: Device,
    timeout: Duration,
) -> Result<(Backend, String)> {
    let backend = if choice == BackendChoice::Mpi { Backend::Mpi } else { Backend::Gloo };
    #[cfg(feature = "mpi")]
    kernels::comm::engine::set_mpi(mpi_engine::connect);
    let Device::Cuda(index) = device else { return Ok((backend, "ranks on CPU".into())) };
    if matches!(choice, BackendChoice::Gloo | BackendChoice::Mpi) {
        return Ok((backend, "as requested; tensors on GPUs are copied through the host".into()));
    }
    let store = watch.store();
    store.set(&format!("gpu/{}", watch.rank()), &cuda::load()?.device_info(index)?.uuid)?;
    let mut owners: BTreeMap<Vec<u8>, i64> = BTreeMap::new();
    for rank in 0..watch.world_size() {
        let uuid = store
            .get_within(&format!("gpu/{rank}"), timeout)
            .map_err(|e| e.context(format!("rank {rank} did not join within {timeout:?}")))?;
        if let Some(other) = owners.insert(uuid, rank) {
            let shared = format!("ranks {other} and {rank} share a GPU");
            if choice == BackendChoice::Nccl {
                return Err(Error::config(format!(
                    "backend nccl needs a GPU for every rank, but {shared}: start fewer ranks, or use --backend gloo"
                )));
            }
            return Ok((Backend::Gloo, format!("{shared}; NCCL needs one for every rank")));
        }
    }
    Ok((Backend::Nccl, "every rank has a GPU of its own".into()))
}
