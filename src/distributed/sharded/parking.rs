//! Parameters that are on their device only while they are used.

use kernels::cuda::{CopyStream, Pinned};
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
        self.clear_gradients();
        if self.groups.iter().any(|g| g.parked.is_none()) {
            let bytes = |t: &Tensor| (t.numel() * t.kind().elt_size_in_bytes()) as i64;
            let sizes = self.groups.iter().flat_map(|g| [bytes(&g.master), bytes(g.frozen.local())]);
            let mut pinned = Pinned::for_sizes(sizes, self.device)?;
            for g in &mut self.groups {
                let mut place = |t: &Tensor| pinned.take(&t.size(), t.kind());
                g.parked = Some(HostCopies {
                    values: place(&g.master)?,
                    frozen: place(g.frozen.local())?,
                    filled: false,
                });
            }
        }
        let stream = CopyStream::new(self.device)?;
        stream.after_computing()?;
        for g in &mut self.groups {
            g.drop_gathered();
            g.own_bytes = None;
            g.frozen.release();
            g.park(&stream)?;
        }
        // What takes the device's memory next must not come before the copies.
        stream.wait()?;
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
        let stream = CopyStream::new(device)?;
        stream.after_computing()?; // the new tensors may have memory that the device still computes with
        self.groups.iter_mut().try_for_each(|g| g.unpark(device, &stream))?;
        stream.before_computing()?; // the host does not wait
        self.groups.iter_mut().try_for_each(|g| g.make_local(compute))?;
        self.away = false;
        Ok(())
    }
}

/// Host memory of what is parked.
pub(super) struct HostCopies {
    values: Tensor,
    /// What is not trained, in bytes, and whether it was copied: it does not change.
    frozen: Tensor,
    filled: bool,
}

impl FlatGroup {
    /// Queues copies of the values to host memory.
    fn park(&mut self, stream: &CopyStream) -> Result<()> {
        let aliased = self.local.kind() == self.master.kind();
        let Some(host) = &mut self.parked else { return Ok(()) };
        stream.copy(&host.values, &self.master)?;
        if !std::mem::replace(&mut host.filled, true) {
            stream.copy(&host.frozen, self.frozen.local())?;
        }
        self.master = host.values.shallow_clone();
        self.frozen.set_local(host.frozen.shallow_clone());
        self.local = match aliased {
            true => self.master.shallow_clone(),
            // Made of the values again.
            false => Tensor::empty([0], (self.local.kind(), Device::Cpu)),
        };
        Ok(())
    }

    /// Queues copies of the values back to the device, and keeps the host memory.
    fn unpark(&mut self, device: Device, stream: &CopyStream) -> Result<()> {
        let back = |t: &Tensor| -> Result<Tensor> {
            let there = Tensor::f_empty(t.size(), (t.kind(), device))?;
            stream.copy(&there, t)?;
            Ok(there)
        };
        self.master = back(&self.master)?;
        let frozen = back(self.frozen.local())?;
        self.frozen.set_local(frozen);
        Ok(())
    }

    /// The slice in the compute dtype, once the values are there.
    fn make_local(&mut self, compute: Kind) -> Result<()> {
        self.local = match self.master.kind() == compute {
            true => self.master.shallow_clone(),
            false => self.master.f_to_kind(compute)?,
        };
        Ok(())
    }
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
                        FrozenValue::Quantized(_) | FrozenValue::Float8(_) => panic!("dense"),
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
