//! What ranks tell each other: bytes, objects, rows, words.

use std::time::Duration;

use kernels::comm::ReduceOp;
use tch::{Device, Kind, Tensor};

use crate::distributed::world::World;
use crate::error::{Error, Result};

/// What every rank says, by rank. A collective call; meant for little, since all ranks get all of it.
pub fn gather_bytes(world: &World, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
    if world.world_size == 1 {
        return Ok(vec![mine.to_vec()]);
    }
    let mut sizes = vec![0.0; world.world_size as usize];
    sizes[world.rank as usize] = mine.len() as f64;
    let sizes = world.group.combine(&sizes, ReduceOp::Sum)?;
    let longest = sizes.iter().copied().fold(0.0, f64::max) as usize;
    if longest == 0 {
        return Ok(vec![Vec::new(); sizes.len()]);
    }
    let mut padded = mine.to_vec();
    padded.resize(longest, 0);
    let all = Tensor::empty([(longest * sizes.len()) as i64], (Kind::Uint8, world.device));
    world.group.all_gather(&all, &Tensor::from_slice(&padded).to_device(world.device))?.wait()?;
    let all = Vec::<u8>::try_from(all.to_device(Device::Cpu))?;
    Ok(all.chunks(longest).zip(sizes).map(|(bytes, size)| bytes[..size as usize].to_vec()).collect())
}

/// What the ranks have of their rows, by rank, as JSON on the way. Ranks that share matrices or sequences have the same rows, and
/// the first of them says what they have. A collective call.
pub fn gather_objects<T: serde::Serialize + serde::de::DeserializeOwned>(
    world: &World,
    mine: &[T],
) -> Result<Vec<T>> {
    let first = world.mesh.tensor.rank == 0 && world.mesh.context.rank == 0;
    let mine = if first { mine } else { &[] };
    let bytes = serde_json::to_vec(mine).map_err(|e| Error::failed(e.to_string()))?;
    let mut all = Vec::new();
    for bytes in gather_bytes(world, &bytes)? {
        let theirs: Vec<T> = serde_json::from_slice(&bytes)
            .map_err(|e| Error::failed(format!("the message of another rank cannot be read: {e}")))?;
        all.extend(theirs);
    }
    Ok(all)
}

/// The rows of all ranks that have different ones, each of which gives `[n, W]` on the CPU: `[ranks * n, W]`. A collective call.
pub fn gather_rows(world: &World, mine: &Tensor) -> Result<Tensor> {
    if world.mesh.data.size == 1 {
        return Ok(mine.shallow_clone());
    }
    let (rows, width) = (mine.size()[0], mine.size()[1]);
    let all = Tensor::empty([world.mesh.data.size * rows * width], (mine.kind(), world.device));
    world.mesh.data.group.all_gather(&all, &mine.contiguous().view([-1]).to_device(world.device))?.wait()?;
    Ok(all.to_device(Device::Cpu).view([-1, width]))
}

/// Messages of rank 0 to all others, which wait as long as it takes: such as for what a person types. A collective's time would run out.
#[derive(Debug, Default)]
pub struct Words {
    number: u64,
}

impl Words {
    /// The next message: rank 0's `mine`, on every rank. All ranks call this.
    ///
    /// # Errors
    /// `mine` failed, on rank 0; it has ended, on the others.
    pub fn next(&mut self, world: &World, mine: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
        let Some(store) = world.store() else { return mine() };
        self.number += 1;
        let key = format!("words/{}", self.number);
        if world.is_main() {
            let said = mine()?;
            store.set(&key, &said)?;
            return Ok(said);
        }
        while !store.check(&key)? {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(store.get(&key)?)
    }
}
