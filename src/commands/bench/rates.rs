//! How fast this machine trains and samples, by width and dtype: what predictions rest on.

use serde_json::json;
use tch::Device;

use super::{BatchSize, BenchTraining, median, random_model};
use crate::config::sections::{Compute, Optim, Recompute};
use crate::config::shape::Shape;
use crate::distributed::mesh::Sharding;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::generate::sampler::Sampling;
use crate::generate::{EngineOptions, Request, engine};
use crate::model::{Trainable, compute_kind};
use crate::plan::rates::{DecodingRate, MachineRates, TrainingRate, this_machine};
use crate::telemetry;
use crate::{info, warn};

/// Widths of models of some 1M, 15M, 110M and 1B parameters.
const WIDTHS: [i64; 4] = [128, 288, 768, 2048];
/// A step that takes longer is measured once, and none of a wider model.
const LONG_S: f64 = 2.0;

/// Measures, prints a JSON object for each rate, and keeps all for later predictions.
pub fn run(world: &World) -> Result<()> {
    if world.device != Device::Cpu {
        return Err(Error::config("a GPU is predicted by its data sheet: corral plan STAGE --gpu H100"));
    }
    if world.world_size > 1 {
        return Err(Error::config("bench rates runs on one rank, with all cores"));
    }
    let (processor, cores) = this_machine();
    let threads = tch::get_num_threads() as usize;
    if threads != cores {
        return Err(Error::config(format!(
            "bench rates measures all {cores} cores, and this process has {threads} threads: leave out --threads and \
             OMP_NUM_THREADS"
        )));
    }
    let (mut training, mut decoding) = (Vec::new(), Vec::new());
    for compute in [Compute::Float32, Compute::Bfloat16] {
        for hidden_size in WIDTHS {
            let (flops_per_s, step_s) = training_rate(hidden_size, compute, world)?;
            training.push(TrainingRate { hidden_size, compute, flops_per_s });
            let gflops = flops_per_s / 1e9;
            println!(
                "{}",
                json!({"bench": "rates", "training": hidden_size, "compute": compute, "gflops": gflops})
            );
            if step_s > LONG_S {
                break;
            }
        }
        let bytes_per_s = decoding_rate(compute, world)?;
        decoding.push(DecodingRate { compute, bytes_per_s });
        let gb = bytes_per_s / 1e9;
        println!("{}", json!({"bench": "rates", "sampling": true, "compute": compute, "gb_per_s": gb}));
    }
    let date = telemetry::today();
    // They are printed already: a home that cannot be written is no reason to fail.
    match (MachineRates { processor, cores, date, training, decoding }).keep() {
        Ok(path) => info!("kept in {}", path.display()),
        Err(e) => warn!("not kept for predictions: {e}"),
    }
    Ok(())
}

/// A model of this width, of so few blocks that a step is short.
fn shape(hidden_size: i64, num_hidden_layers: i64) -> Result<Shape> {
    let preset = Shape::preset("llama-110m").ok_or_else(|| Error::failed("a preset is missing"))?;
    let heads = (hidden_size / 64).max(2);
    Ok(Shape {
        // Small models have small vocabularies.
        vocab_size: if hidden_size < 256 { 512 } else { 8192 },
        hidden_size,
        intermediate_size: 8 * hidden_size / 3 / 32 * 32,
        num_hidden_layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim: hidden_size / heads,
        ..preset
    })
}

/// FLOP/s of steps, and seconds of one.
fn training_rate(hidden_size: i64, compute: Compute, world: &World) -> Result<(f64, f64)> {
    let shape = shape(hidden_size, if hidden_size < 1024 { 4 } else { 1 })?;
    let (rows, length) = if hidden_size < 1024 { (8, 256) } else { (2, 256) };
    let flops = shape.flops_per_token(length) * (rows * length) as f64;
    let size = BatchSize { rows, micro: rows, length };
    let mut training = BenchTraining::of(
        shape,
        &Trainable::default(),
        &Optim::default(),
        compute,
        Recompute::None,
        size,
        world,
    )?;
    let (first_s, _) = training.step(world)?;
    let mut seconds = vec![first_s];
    if first_s <= LONG_S {
        seconds = (0..5).map(|_| Ok(training.step(world)?.0)).collect::<Result<_>>()?;
    }
    let step_s = median(&mut seconds);
    Ok((flops / step_s, step_s))
}

/// Bytes of parameters that forwards of one token in each of a few rows read in a second.
fn decoding_rate(compute: Compute, world: &World) -> Result<f64> {
    const ROWS: usize = 8;
    const NEW: usize = 24;
    let shape = shape(768, 4)?;
    let kind = compute_kind(compute);
    let mut model = random_model(&shape, Sharding::solo(), kind, world)?;
    let prompts: Vec<Request> =
        (0..ROWS as u64).map(|sample| Request::new((3..11).collect(), sample, NEW)).collect();
    let options = EngineOptions { sampling: Sampling::GREEDY, batch_size: ROWS, eos: &[], stop: None };
    let mut seconds = Vec::new();
    for run in 0..4 {
        let begun = std::time::Instant::now();
        engine::generate(&mut model, &prompts, options.clone(), |_, _| Ok(()))?;
        if run > 0 {
            seconds.push(begun.elapsed().as_secs_f64());
        }
    }
    let bytes = shape.num_parameters() as f64 * kind.elt_size_in_bytes() as f64;
    Ok(bytes * NEW as f64 / median(&mut seconds))
}
