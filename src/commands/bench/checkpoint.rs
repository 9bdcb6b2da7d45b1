//! `corral bench checkpoint`: what saving in the background costs a training run, and how long loading takes.

use std::path::PathBuf;
use std::time::Instant;

use kernels::comm::ReduceOp;
use serde_json::{Value, json};

use super::{BenchTraining, Scratch, Workload, median};
use crate::checkpoint::{RunInfo, SavedPart, Saver, latest};
use crate::distributed::agree::agree;
use crate::distributed::world::World;
use crate::error::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub workload: Workload,
    /// Measured repetitions of saving, with and without training at the same time, and of loading
    #[arg(long, default_value_t = 3)]
    pub saves: usize,
    /// Steps without a save before each save
    #[arg(long, default_value_t = 6)]
    pub steps: usize,
    /// Warm-up steps
    #[arg(long, default_value_t = 3)]
    pub warmup: usize,
    /// Folder on the disk that is measured, which all ranks share; nothing stays in it
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub dir: PathBuf,
}

pub fn run(args: &Args, world: &World) -> Result<()> {
    if args.saves == 0 || args.steps == 0 {
        return Err(Error::config("--saves and --steps must be at least 1"));
    }
    // Rank 0 names the folder for all.
    let id = if world.is_main() { f64::from(std::process::id()) } else { 0.0 };
    let id = world.group.combine(&[id], ReduceOp::Max)?[0] as u32;
    let scratch = agree(
        &world.group,
        if world.is_main() { Scratch::create(&args.dir, id).map(Some) } else { Ok(None) },
    )?;
    let run_dir = args.dir.join(format!("bench-{id}"));

    let mut training = BenchTraining::new(&args.workload, world)?;
    for _ in 0..args.warmup {
        training.step(world)?;
    }
    let info = RunInfo { config_hash: "bench".into(), tokenizer: None };
    let mut saver = Saver::new(&run_dir, 1, info, &world.group)?;
    let mut times = SaveTimes::default();
    let mut step = 0;
    for _ in 0..args.saves {
        let mut plain = Vec::new();
        for _ in 0..args.steps {
            plain.push(training.step(world)?.0);
        }
        let step_s = median(&mut plain);
        times.plain.extend(plain);

        step += 1;
        let stall_s = begin(&mut saver, step, &training, world)?;
        let mut beside = Vec::new();
        loop {
            beside.push(training.step(world)?.0);
            if saver.poll()?.is_some() {
                break;
            }
            if saver.failed_saves() > 0 {
                return Err(Error::failed("the checkpoint could not be saved: there is nothing to measure"));
            }
        }
        times.stall.push(stall_s);
        times.cost.push(stall_s + beside.iter().map(|s| s - step_s).sum::<f64>());
        times.beside.extend(beside);

        step += 1;
        begin(&mut saver, step, &training, world)?;
        let begun = Instant::now();
        saver.finish()?;
        times.write.push(begun.elapsed().as_secs_f64());

        let Some(checkpoint) = latest(&run_dir)? else {
            return Err(Error::failed("the checkpoint that was saved is missing"));
        };
        world.group.barrier()?;
        let begun = Instant::now();
        checkpoint.load(&mut training.model.params, &mut training.optimizer)?;
        world.group.barrier()?;
        times.load.push(begun.elapsed().as_secs_f64());
    }
    if world.is_main() {
        let files = latest(&run_dir)?.map_or(0, |c| c.meta().files.iter().map(|f| f.bytes).sum::<u64>());
        println!("{}", times.into_json(args, &training, world, files));
    }
    // Nobody reads any more when the folder goes.
    world.group.barrier()?;
    drop(scratch);
    Ok(())
}

/// Starts a save; the seconds that training stands still, of the slowest rank.
fn begin(saver: &mut Saver, step: u64, training: &BenchTraining, world: &World) -> Result<f64> {
    world.group.barrier()?;
    let begun = Instant::now();
    let (shape, params, optim) = (&training.shape, &training.model.params, Some(&training.optimizer));
    saver.begin(
        step,
        &[SavedPart { name: "", shape, base: None, scoring: None, params, optim }],
        Value::Null,
    )?;
    Ok(world.group.combine(&[begun.elapsed().as_secs_f64()], ReduceOp::Max)?[0])
}

/// Seconds.
#[derive(Default)]
struct SaveTimes {
    /// Of steps with no save under way, and with one.
    plain: Vec<f64>,
    beside: Vec<f64>,
    stall: Vec<f64>,
    cost: Vec<f64>,
    write: Vec<f64>,
    load: Vec<f64>,
}

impl SaveTimes {
    fn into_json(mut self, args: &Args, training: &BenchTraining, world: &World, bytes: u64) -> Value {
        let (write_s, load_s) = (median(&mut self.write), median(&mut self.load));
        let stall_s = median(&mut self.stall);
        json!({
            "bench": "checkpoint", "preset": args.workload.preset, "params": training.shape.num_parameters(),
            "precision": args.workload.precision, "mode": args.workload.mode, "world_size": world.world_size,
            "saves": args.saves, "bytes": bytes,
            "stall_s": stall_s, "stall_bytes_per_s": bytes as f64 / world.world_size as f64 / stall_s,
            "step_s": median(&mut self.plain), "step_s_while_writing": median(&mut self.beside),
            "steps_while_writing": self.beside.len() as f64 / args.saves as f64,
            "cost_s": median(&mut self.cost),
            "write_s": write_s, "written_bytes_per_s": bytes as f64 / write_s,
            "load_s": load_s, "loaded_bytes_per_s": bytes as f64 / load_s,
            "threads": tch::get_num_threads(), "device": format!("{:?}", world.device),
        })
    }
}
