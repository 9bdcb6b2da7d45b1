//! Copies of what a checkpoint holds, in host memory, while training goes on.

use kernels::cuda::{CopyStream, Pinned};
use tch::{Device, Tensor};

use super::manifest::{MASTER, tensor_name};
use super::safetensors::TensorEntry;
use super::saver::SavedPart;
use crate::distributed::sharded::Sharded;
use crate::error::Result;
use crate::optim::AdamW;

/// Where the copies lie. From a GPU they go to pinned memory, at the rate of the bus, which is kept from save to save; on a
/// CPU each has its own memory, and gives it back once it is written.
#[derive(Default)]
pub(super) struct Staging {
    pinned: Option<Pinned>,
    stream: Option<CopyStream>,
}

impl Staging {
    /// Makes room for copies of the models. Those of the save before must not be used any more.
    pub fn begin(&mut self, models: &[SavedPart]) -> Result<()> {
        let device = models.iter().map(|m| m.params.device()).find(|d| d.is_cuda());
        let Some(device) = device else { return Ok(()) };
        let writes = models.iter().filter(|m| m.params.replica_group().rank() == 0);
        let tensors = writes.flat_map(|m| saved_tensors(m.params, m.optim));
        let bytes = |t: &Tensor| (t.numel() * t.kind().elt_size_in_bytes()) as i64;
        self.reserve(tensors.map(|(_, t)| bytes(&t)).collect(), device)
    }

    fn reserve(&mut self, sizes: Vec<i64>, device: Device) -> Result<()> {
        match &mut self.pinned {
            Some(pinned) if pinned.fits(sizes.iter().copied()) => pinned.clear(),
            pinned => *pinned = Some(Pinned::for_sizes(sizes, device)?),
        }
        let stream = CopyStream::new(device)?;
        stream.after_computing()?;
        self.stream = Some(stream);
        Ok(())
    }

    /// Queues copies of a model, by name in the file; they are complete after [`Staging::wait`].
    pub fn copies(&mut self, params: &Sharded, optim: Option<&AdamW>) -> Result<Vec<(TensorEntry, Tensor)>> {
        if let Some(optim) = optim {
            optim.synchronize()?;
        }
        let copy = |(name, t): (String, Tensor)| {
            let copy = match &mut self.pinned {
                Some(pinned) => pinned.take(&t.size(), t.kind())?,
                None => Tensor::f_empty(t.size(), (t.kind(), Device::Cpu))?,
            };
            match self.stream.as_ref().filter(|stream| stream.device() == t.device()) {
                Some(stream) => stream.copy(&copy, &t)?,
                None => drop(tch::no_grad(|| copy.shallow_clone().f_copy_(&t))?),
            }
            Ok((TensorEntry { name, kind: t.kind(), shape: t.size() }, copy))
        };
        saved_tensors(params, optim).into_iter().map(copy).collect()
    }

    /// Waits until all copies are there.
    pub fn wait(&self) -> Result<()> {
        self.stream.as_ref().map_or(Ok(()), |stream| Ok(stream.wait()?))
    }
}

/// What a checkpoint holds of a model on this rank, by name in the file.
fn saved_tensors(params: &Sharded, optim: Option<&AdamW>) -> Vec<(String, Tensor)> {
    let mut tensors = Vec::with_capacity(params.len() * 3);
    for i in 0..params.len() {
        let moments = optim.into_iter().flat_map(|o| o.moments[i].tensors());
        // Nothing of what another stage writes.
        let written = |t: &Tensor| if params.owns(i) { t.shallow_clone() } else { t.narrow(0, 0, 0) };
        let named = |part: &str, t: &Tensor| (tensor_name(&params.layout(i).name, part), written(t));
        tensors.push(named(MASTER, &params.master(i)));
        tensors.extend(moments.map(|(part, t)| named(part, t)));
    }
    tensors
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::distributed::mesh::Sharding;
    use crate::distributed::sharded::Layout;
    use crate::optim::Hyper;

    /// Copies in one piece of memory, twice: they are what the model had, whatever it becomes.
    #[test]
    fn copies_keep_what_was_saved() {
        let layout = Layout::new("a", vec![("w".into(), vec![5, 7]), ("b".into(), vec![3])]);
        let mut params = Sharded::new([layout], Sharding::solo(), Kind::Float, Device::Cpu);
        let optim = AdamW::new(&params, Hyper { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.0 });
        let mut staging = Staging::default();
        for value in [1.5, -2.0] {
            params.fill(|_, _, values| Ok(values.shallow_clone().f_fill_(value).map(drop)?)).unwrap();
            let sizes =
                saved_tensors(&params, Some(&optim)).iter().map(|(_, t)| 4 * t.numel() as i64).collect();
            staging.reserve(sizes, Device::Cpu).unwrap();
            let copies = staging.copies(&params, Some(&optim)).unwrap();
            staging.wait().unwrap();
            params.fill(|_, _, values| Ok(values.shallow_clone().f_fill_(9.0).map(drop)?)).unwrap();
            assert_eq!(copies.len(), 3);
            assert!(copies[0].1.narrow(0, 0, 38).eq(value).all().int64_value(&[]) == 1);
            assert_eq!(copies[1].1.abs().sum(Kind::Double).double_value(&[]), 0.0);
        }
        assert!(staging.copies(&params, None).is_err(), "there is no room for more");
    }
}
