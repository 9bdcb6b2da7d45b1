//! Parameters that are on their device only while they are used.

use tch::{Device, Kind, Tensor};

use super::{FlatGroup, Sharded};
use crate::error::Result;

impl Sharded {
    /// Moves all values to host memory, pinned where the device is a GPU, until [`Sharded::unpark`]; the host memory is kept
    /// for the next time. Gradients must have been applied. Checkpoints can be written meanwhile.
    pub fn park(&mut self) -> Result<()> {
        if self.away {
            return Ok(());
        }
        let device = self.device;
        self.clear_gradients();
        for g in &mut self.groups {
            g.full = None;
            g.frozen.release();
            g.park(device)?;
        }
        self.away = true;
        Ok(())
    }

    /// Whether the values are in host memory, by [`Sharded::park`].
    pub fn is_parked(&self) -> bool {
        self.away
    }

    /// Ends [`Sharded::park`].
    pub fn unpark(&mut self) -> Result<()> {
        if !self.away {
            return Ok(());
        }
        let (compute, device) = (self.compute, self.device);
        self.groups.iter_mut().try_for_each(|g| g.unpark(compute, device))?;
        self.away = false;
        Ok(())
    }
}

impl FlatGroup {
    /// Moves the values to host memory.
    fn park(&mut self, device: Device) -> Result<()> {
        let aliased = self.local.kind() == self.master.kind();
        let [values, frozen] = match self.parked.take() {
            Some([values, frozen]) => {
                tch::no_grad(|| values.shallow_clone().f_copy_(&self.master))?; // host sync
                // What is not trained has not changed.
                [values, frozen]
            }
            None => [in_host_memory(&self.master, device)?, in_host_memory(self.frozen.local(), device)?],
        };
        self.master = values;
        self.local = match aliased {
            true => self.master.shallow_clone(),
            // Made of the values again.
            false => Tensor::empty([0], (self.local.kind(), Device::Cpu)),
        };
        self.frozen.set_local(frozen);
        Ok(())
    }

    /// Moves the values back to the device, and keeps the host memory.
    fn unpark(&mut self, compute: Kind, device: Device) -> Result<()> {
        let (values, frozen) = (self.master.shallow_clone(), self.frozen.local().shallow_clone());
        // A CPU's "device memory" must be other memory, too.
        self.master = values.f_to_device_(device, values.kind(), false, true)?;
        self.frozen.set_local(frozen.f_to_device_(device, Kind::Uint8, false, true)?);
        self.local = match self.master.kind() == compute {
            true => self.master.shallow_clone(),
            false => self.master.f_to_kind(compute)?,
        };
        self.parked = Some([values, frozen]);
        Ok(())
    }
}

/// A copy in host memory, from where a GPU reads it directly.
fn in_host_memory(t: &Tensor, device: Device) -> Result<Tensor> {
    let copy = t.f_to_device_(Device::Cpu, t.kind(), false, true)?; // host sync
    Ok(if device.is_cuda() { kernels::ops::pin(&copy)? } else { copy })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::distributed::frozen::FrozenValue;
    use crate::distributed::frozen::Storage;
    use crate::distributed::mesh::Sharding;
    use crate::distributed::plan::GroupPlan;
    use crate::distributed::plan::Role;
    use crate::distributed::sharded::Layout;

    /// Values go to host memory and come back as they are, and are trained on between.
    #[test]
    fn what_is_parked_comes_back() {
        for compute in [Kind::Float, Kind::BFloat16] {
            let layout = Layout::new("block", vec![("a".into(), vec![4, 8]), ("b".into(), vec![3])]);
            let mut plan = GroupPlan::from(layout);
            plan.roles[0] = Role::Frozen(Storage::Dense);
            let mut params = Sharded::new([plan], Sharding::solo(), compute, Device::Cpu);
            params
                .fill(|spec, first, values| {
                    let numbers = Tensor::arange(values.numel() as i64, (Kind::Float, Device::Cpu)) + first;
                    values.shallow_clone().copy_(&(numbers + spec.shape.len() as i64));
                    Ok(())
                })
                .unwrap();
            let used = |params: &mut Sharded| {
                let tensors = params.full(0).unwrap();
                let all: Vec<Tensor> = (0..2)
                    .map(|k| match params.value(0, &tensors, &params.pieces(0, k..k + 1)[0]).unwrap() {
                        FrozenValue::Dense(t) => t.to_kind(Kind::Double).copy(),
                        FrozenValue::Quantized(_) => panic!("dense"),
                    })
                    .collect();
                params.release(0);
                all
            };
            let before = used(&mut params);
            for _ in 0..2 {
                params.park().unwrap();
                params.park().unwrap();
                let away = params.master(0);
                params.unpark().unwrap();
                assert!(params.master(0).data_ptr() != away.data_ptr(), "other memory");
                assert_eq!(used(&mut params), before);
            }
            // An update between is kept.
            let _ = params.master(0).g_add_scalar_(1.0);
            params.refresh();
            let after = used(&mut params);
            assert_eq!(after[1], &before[1] + 1.0);
            params.park().unwrap();
            params.unpark().unwrap();
            assert_eq!(used(&mut params), after);
        }
    }
}
