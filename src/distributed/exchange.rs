//! Bytes that ranks tell each other.

use kernels::c10d::ReduceOp;
use tch::{Device, Kind, Tensor};

use crate::distributed::world::World;
use crate::error::Result;

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
