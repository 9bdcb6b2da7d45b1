//! `corral bench collectives`: all-reduce, all-gather and reduce-scatter over all ranks.

use std::time::Instant;

use kernels::comm::ReduceOp;
use serde_json::json;
use tch::{Kind, Tensor};

use super::median;
use crate::distributed::world::World;
use crate::error::Result;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Largest tensor, in MiB of float32
    #[arg(long, default_value_t = 64)]
    pub max_mib: usize,
}

pub fn run(args: &Args, world: &World) -> Result<()> {
    let ranks = world.world_size;
    let mut mib = 1;
    while mib <= args.max_mib {
        for kind in [Kind::Float, Kind::BFloat16] {
            let n = (mib as i64 * (1 << 18)) / ranks * ranks;
            let whole = Tensor::ones([n], (kind, world.device));
            let slice = Tensor::ones([n / ranks], (kind, world.device));
            for op in ["all_reduce", "all_gather", "reduce_scatter"] {
                let mut seconds = Vec::new();
                for _ in 0..6 {
                    world.group.barrier()?;
                    let begun = Instant::now();
                    match op {
                        "all_reduce" => world.group.all_reduce(&whole, ReduceOp::Max)?,
                        "all_gather" => world.group.all_gather(&whole, &slice)?,
                        _ => world.group.reduce_scatter(&slice, &whole, ReduceOp::Max)?,
                    }
                    .wait()?;
                    world.synchronize()?;
                    seconds.push(begun.elapsed().as_secs_f64());
                }
                let median = median(&mut seconds[1..]);
                let bytes = n as f64 * if kind == Kind::Float { 4.0 } else { 2.0 };
                if world.is_main() {
                    println!(
                        "{}",
                        json!({
                            "bench": "collectives", "op": op, "dtype": if kind == Kind::Float { "float32" } else { "bfloat16" },
                            "bytes": bytes as u64, "world_size": ranks, "backend": world.group.backend_name(),
                            "median_s": median, "gb_per_s": bytes / median / 1e9,
                        })
                    );
                }
            }
        }
        mib *= 4;
    }
    Ok(())
}
