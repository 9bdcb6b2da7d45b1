//! Models that have their own places.

use std::ops::Deref;

use tch::Device;

use crate::algorithms::base::Base;
use crate::checkpoint::TensorHash;
use crate::config::common::Common;
use crate::config::sections::Compute;
use crate::distributed::mesh::Sharding;
use crate::distributed::sharded::Sharded;
use crate::distributed::world::{DeviceChoice, World};
use crate::error::{Error, Result};
use crate::model::cuts::cut_for;
use crate::model::{Llama, Trainable, compute_kind, float8_on};
use crate::optim::Average;

/// The world that a model computes in: the run's, or one of this rank alone on another device.
pub enum Where<'a> {
    Run(&'a World),
    Own(Box<World>),
}

impl Deref for Where<'_> {
    type Target = World;

    fn deref(&self) -> &World {
        match self {
            Where::Run(world) => world,
            Where::Own(world) => world,
        }
    }
}

impl<'a> Where<'a> {
    /// The world of the model that section `name` places on `device`. What is trained on several ranks is on the run's
    /// device; what is only asked may be as a whole on each rank's other device.
    pub fn of(world: &'a World, name: &str, device: Option<&str>, trained: bool) -> Result<Where<'a>> {
        let Some(device) = device else { return Ok(Where::Run(world)) };
        let choice: DeviceChoice =
            device.parse().map_err(|e: Error| Error::key(&format!("{name}.device"), e.message))?;
        let same = match (choice, world.device) {
            (DeviceChoice::Cpu, Device::Cpu) => true,
            (DeviceChoice::Cuda, Device::Cuda(i)) => i == world.local_rank as usize,
            (DeviceChoice::CudaIndex(n), Device::Cuda(i)) => n == i,
            _ => false,
        };
        if same {
            return Ok(Where::Run(world));
        }
        if trained && world.world_size > 1 {
            let why = format!(
                "with several ranks a trained model must be on their device, {:?}; leave it out, or set --device",
                world.device
            );
            return Err(Error::key(&format!("{name}.device"), why));
        }
        let choice = match choice {
            DeviceChoice::Cuda => DeviceChoice::CudaIndex(world.local_rank as usize),
            other => other,
        };
        let own = World::solo(choice).map_err(|e| e.context(format!("{name}.device")))?;
        // Opening a GPU makes it this thread's: the run's is that again.
        if let Device::Cuda(index) = world.device {
            kernels::cuda::load()?.set_device(index)?;
        }
        Ok(Where::Own(Box::new(own)))
    }
}

/// A model that is only asked: what it may have learned as adapters acts. With the hash of its tensors. Collective.
pub fn frozen(base: &Base, c: &Common, dtype: Option<Compute>, world: &Where) -> Result<(Llama, TensorHash)> {
    let sharding = match world {
        Where::Run(world) => world.sharding(),
        Where::Own(_) => Sharding::solo(),
    };
    let plans = cut_for(base.plans_to_ask()?, &base.shape, &sharding)?;
    let compute = dtype.unwrap_or(c.precision.compute);
    let mut params = Sharded::new(plans, sharding, compute_kind(compute), world.device);
    let hash = base.fill(&mut params, c.seed)?;
    let mut model = Llama::new(base.shape.clone(), params);
    model.set_float8(float8_on(compute, c.float8, world.device)?)?;
    Ok((model, hash))
}

/// Lets a model work: its values are on its device meanwhile, and with `offload` only then.
pub fn at_work<T>(model: &mut Llama, offload: bool, work: impl FnOnce(&mut Llama) -> Result<T>) -> Result<T> {
    model.params.unpark()?;
    let result = work(model);
    if offload {
        model.params.park()?;
    }
    result
}

/// Lets a model work, and leaves its values where they were.
pub fn where_it_was<T>(model: &mut Llama, work: impl FnOnce(&mut Llama) -> Result<T>) -> Result<T> {
    let away = model.params.is_parked();
    at_work(model, away, work)
}

/// Refuses to offload from where there is nothing to offload to.
pub fn check_offload(name: &str, offload: bool, world: &World) -> Result<()> {
    match offload && world.device == Device::Cpu {
        true => Err(Error::key(
            &format!("{name}.offload"),
            "the model computes on the CPU and is already in host memory; leave it out",
        )),
        false => Ok(()),
    }
}

/// A moving average of a model that `base` opened; it begins as the model is. Collective.
pub fn average(base: &Base, trainable: &Trainable, of: &Sharded, decay: f64, seed: u64) -> Result<Average> {
    let plans = cut_for(trainable.plans(&base.shape)?, &base.shape, of.sharding())?;
    let mut params = Sharded::new(plans, of.sharding().clone(), of.compute(), of.device());
    base.fill(&mut params, seed)?;
    Ok(Average::new(params, of, decay))
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::config::shape::Shape;

    /// A model that is asked in the middle of its updates is on its device afterwards, one that was away is away.
    #[test]
    fn values_stay_where_they_were() {
        let shape = Shape::preset("llama-15m").unwrap();
        let plans = Trainable::default().plans(&shape).unwrap();
        let params = Sharded::new(plans, Sharding::solo(), Kind::Float, Device::Cpu);
        let mut model = Llama::new(shape, params);
        for away in [false, true] {
            if away {
                model.params.park().unwrap();
            }
            for asked in [Ok(1), Err(Error::failed("no"))] {
                let told = where_it_was(&mut model, |m| {
                    assert!(!m.params.is_parked());
                    asked.clone()
                });
                assert_eq!((told.is_ok(), model.params.is_parked()), (asked.is_ok(), away));
            }
        }
    }
}
