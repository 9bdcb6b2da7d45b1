//! `corral bench generate`: tokens a second, and the share of the memory's rate that decoding reaches.

use std::time::Instant;

use serde_json::json;
use tch::{Kind, Tensor};

use super::{GenerateArgs, limits, median, random_model, shape};
use crate::commands::inference::{ModelArgs, RanksArgs};
use crate::config::sections::Compute;
use crate::config::shape::Shape;
use crate::distributed::mesh::Sharding;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::generate::sampler::Sampling;
use crate::generate::{EngineOptions, Request, engine};
use crate::model::compute_kind;

/// What a step of generation reads at least: every weight, and the keys and values of what its rows have read.
fn step_bytes(shape: &Shape, args: &GenerateArgs) -> f64 {
    let element = compute_kind(args.precision).elt_size_in_bytes() as f64;
    let weights = (shape.num_parameters() - shape.num_unread_parameters()) as f64 * element;
    let read = args.prompt_tokens as f64 + args.new_tokens as f64 / 2.0;
    let cached = (2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim) as f64 * element;
    weights + args.batch_size as f64 * read * cached
}

pub fn run(args: &GenerateArgs, world: &World) -> Result<()> {
    let model = args.model.clone().map(|model| ModelArgs { model, dtype: Some(args.precision) });
    let opened = model.map(|model| model.open()).transpose()?;
    let shape = opened.as_ref().map_or_else(|| shape(&args.preset), |opened| Ok(opened.shape().clone()))?;
    if world.world_size > 1 {
        return Err(Error::config("bench generate runs on one rank"));
    }
    if args.precision == Compute::Float8 {
        let why =
            "--precision float8 is for bench train and bench checkpoint: generation computes in bfloat16";
        return Err(Error::config(format!("{why}; choose bfloat16")));
    }
    if args.batch_size == 0 || args.prompt_tokens == 0 || args.new_tokens == 0 || args.runs == 0 {
        return Err(Error::config(
            "--batch-size, --prompt-tokens, --new-tokens and --runs must be at least 1",
        ));
    }
    if args.prompt_tokens + args.new_tokens > shape.max_position_embeddings as usize {
        return Err(Error::config(format!(
            "--prompt-tokens and --new-tokens are more than {} together, the model's positions",
            shape.max_position_embeddings
        )));
    }
    let mut model = match &opened {
        Some(opened) => opened.load(world, RanksArgs::REPLICATE)?,
        None => random_model(&shape, Sharding::solo(), compute_kind(args.precision), world)?,
    };
    tch::manual_seed(3);
    let prompts: Vec<Request> = (0..args.batch_size as u64)
        .map(|sample| {
            let ids = Tensor::randint_low(
                3,
                shape.vocab_size,
                [args.prompt_tokens as i64],
                (Kind::Int64, tch::Device::Cpu),
            );
            Ok(Request::new(Vec::<i64>::try_from(&ids)?, sample, args.new_tokens))
        })
        .collect::<Result<_>>()?;
    let options =
        EngineOptions { sampling: Sampling::GREEDY, batch_size: args.batch_size, eos: &[], stop: None };
    let (mut seconds, mut decoding) = (Vec::new(), Vec::new());
    for run in 0..=args.runs {
        let begun = Instant::now();
        // All prompts have been read when a row has its second token.
        let mut read = None;
        engine::generate(&mut model, &prompts, options.clone(), |completion, _| {
            if completion.ids.len() == 2 && read.is_none() {
                read = Some(Instant::now());
            }
            Ok(())
        })?;
        world.synchronize()?;
        if run > 0 {
            seconds.push(begun.elapsed().as_secs_f64());
            decoding.extend(read.map(|read| read.elapsed().as_secs_f64()));
        }
    }
    let total_s = median(&mut seconds);
    let tokens = (args.batch_size * args.new_tokens) as f64;
    let step_bytes = step_bytes(&shape, args);
    drop(model);
    let (peak_bytes, memory) = (world.peak_bytes()?, limits::memory_bytes_per_s(world.device)?);
    let step_s = (args.new_tokens > 2 && !decoding.is_empty())
        .then(|| median(&mut decoding) / (args.new_tokens - 2) as f64);
    println!(
        "{}",
        json!({
            "bench": "generate", "preset": args.model.is_none().then_some(&args.preset),
            "model": args.model.as_ref().map(|model| model.display().to_string()), "precision": args.precision,
            "batch_size": args.batch_size, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens,
            "runs": args.runs, "total_s": total_s, "new_tokens_per_s": tokens / total_s,
            "decode_step_s": step_s, "decode_gb_per_s": step_s.map(|s| step_bytes / s / 1e9),
            "memory_gb_per_s": memory / 1e9, "memory_share": step_s.map(|s| step_bytes / s / memory),
            "peak_bytes": peak_bytes, "threads": tch::get_num_threads(),
            "device": format!("{:?}", world.device),
        })
    );
    Ok(())
}
