//! What the stages of a pipeline compute and wait for, from a timeline of measured steps.

use kernels::comm::ReduceOp;
use kernels::trace::{Lane, TraceSpan};
use serde_json::{Value, json};

use crate::algorithms::step::PassName;
use crate::config::parallel::StageOrder;
use crate::distributed::schedule::{PassTimes, bubble, passes, replay};
use crate::distributed::world::World;
use crate::error::Result;

/// Seconds of this rank's passes of a micro-batch, and of a step all passes, from `steps` steps of so many micro-batches.
fn mine(spans: &[TraceSpan], steps: usize, micro_batches: usize) -> [f64; 4] {
    let computed = || spans.iter().filter(|span| span.lane == Lane::Computing);
    let sum = |name: PassName| {
        let of = computed().filter(|span| span.name.starts_with(name.prefix()));
        of.map(|span| span.took.as_secs_f64()).sum::<f64>()
    };
    let each = |name| sum(name) / (steps * micro_batches) as f64;
    [
        each(PassName::Forward),
        each(PassName::Backward),
        each(PassName::Weights),
        sum(PassName::All) / steps as f64,
    ]
}

/// The bubble of a pipeline in the measured steps: what its stages waited for each other, as a share of what they computed; measured,
/// replayed from the mean times of the passes, and by the formula. And replayed of twice as many stages, of half of the times each. Null on one
/// stage, and on GPUs.
/// Collective.
pub fn report(spans: &[TraceSpan], steps: usize, micro_batches: usize, world: &World) -> Result<Value> {
    let pipeline = &world.mesh.pipeline;
    // Spans are the host's, which a GPU does not wait for.
    if pipeline.axis.size == 1 || world.device != tch::Device::Cpu {
        return Ok(Value::Null);
    }
    let (stage, stages) = (pipeline.axis.rank as usize, pipeline.axis.size as usize);
    // Those of the ranks of a stage, added up.
    let mut all = vec![0.0; 4 * stages];
    all[4 * stage..4 * stage + 4].copy_from_slice(&mine(spans, steps, micro_batches));
    let sums = world.group.combine(&all, ReduceOp::Sum)?;
    let of_stage = world.world_size as f64 / stages as f64;
    let rows: Vec<Vec<f64>> =
        sums.chunks_exact(4).map(|row| row.iter().map(|s| s / of_stage).collect()).collect();
    let times: Vec<PassTimes> =
        rows.iter().map(|r| PassTimes { forward: r[0], backward: r[1], weights: r[2] }).collect();
    let whole = rows.iter().map(|r| r[3]).fold(0.0, f64::max);
    let replayed = |order: StageOrder, times: &[PassTimes]| {
        let orders: Vec<_> = (0..times.len()).map(|s| passes(order, s, times.len(), micro_batches)).collect();
        bubble(replay(&orders, times), times, micro_batches)
    };
    let halves: Vec<PassTimes> = times
        .iter()
        .flat_map(|t| {
            let half =
                PassTimes { forward: t.forward / 2.0, backward: t.backward / 2.0, weights: t.weights / 2.0 };
            [half; 2]
        })
        .collect();
    let formula = |stages: usize| (stages - 1) as f64 / micro_batches as f64;
    let stage =
        |t: &PassTimes| json!({"forward_s": t.forward, "backward_s": t.backward, "weights_s": t.weights});
    Ok(json!({
        "stages": times.iter().map(stage).collect::<Vec<_>>(),
        "measured": bubble(whole, &times, micro_batches),
        "replayed": replayed(pipeline.order, &times),
        "formula_1f1b": formula(stages),
        "simulated_stages": 2 * stages,
        "simulated": replayed(pipeline.order, &halves),
        "simulated_formula_1f1b": formula(2 * stages),
    }))
}
