//! `corral plan --search`: the meshes on which a run fits, the fastest as predicted first.

use super::{PlanArgs, load};
use crate::algorithms::recipe::Recipe;
use crate::commands::check::size;
use crate::commands::predict::short;
use crate::config::Setting;
use crate::config::parallel::Mode;
use crate::config::sections::Recompute;
use crate::distributed::mesh::MeshPlan;
use crate::error::{Error, Result};
use crate::plan::links::Links;
use crate::plan::rates::Rates;
use crate::plan::{MemoryPlan, PlanTarget};

/// Meshes that are shown.
const SHOWN: usize = 10;

/// A mesh on which the run fits.
struct FittingMesh {
    words: String,
    bytes: i64,
    step_s: f64,
    tokens_per_s: f64,
}

/// What became of a mesh that was tried.
enum Tried {
    /// It is none of this run's.
    NoMesh,
    /// The run does not fit, whatever its micro-batches.
    TooLarge,
    Fits(FittingMesh),
}

/// Those that are tried; stages that keep whole values gather them once a step.
const MODES: [Mode; 3] = [Mode::Full, Mode::Hybrid, Mode::Optimizer];

/// Prints them.
///
/// # Errors
/// Of kind Config: a GPU whose peak is not known; a run of several models.
pub fn search<R: Recipe>(
    args: &PlanArgs,
    target: &PlanTarget,
    rates: Option<&Rates>,
    links: Links,
    memory: u64,
) -> Result<()> {
    let ranks = target.ranks;
    let mut found: Vec<FittingMesh> = Vec::new();
    let mut tried = 0;
    for tensor in powers(links.of_node) {
        for context in powers(ranks / tensor).into_iter().filter(|x| *x == 1 || R::SHARES_SEQUENCES) {
            for pipeline in powers(ranks / tensor / context).into_iter().filter(|p| *p == 1 || R::PIPELINES) {
                for mode in MODES {
                    let axes = [tensor, context, pipeline];
                    match best_of::<R>(args, target, rates, links, memory, axes, mode)? {
                        Tried::NoMesh => {}
                        Tried::TooLarge => tried += 1,
                        Tried::Fits(mesh) => {
                            tried += 1;
                            found.push(mesh);
                        }
                    }
                }
            }
        }
    }
    found.sort_by(|a, b| a.step_s.total_cmp(&b.step_s));
    println!(
        "# {ranks} ranks of {}, {} a node; a rank sends {} GB/s inside a node, {} GB/s between: predicted, not measured",
        size(memory),
        links.of_node,
        short(links.inside / 1e9),
        short(links.across / 1e9)
    );
    println!("# {} of {tried} meshes fit; the fastest first:", found.len());
    for FittingMesh { words, bytes, step_s, tokens_per_s } in found.iter().take(SHOWN) {
        println!("{} s a step, {tokens_per_s:.0} tokens/s, {}: {words}", short(*step_s), size(*bytes as u64));
    }
    match found.is_empty() {
        true => Err(Error::config(format!("no mesh of {ranks} ranks fits into {} a rank", size(memory)))),
        false => Ok(()),
    }
}

/// 1, 2, 4, ... up to the largest that divides `n`.
fn powers(n: i64) -> Vec<i64> {
    (0..).map(|k| 1 << k).take_while(|p| *p <= n && n % p == 0).collect()
}

/// The fastest way to run on a mesh.
fn best_of<R: Recipe>(
    args: &PlanArgs,
    target: &PlanTarget,
    rates: Option<&Rates>,
    links: Links,
    memory: u64,
    [tensor, context, pipeline]: [i64; 3],
    mode: Mode,
) -> Result<Tried> {
    let ranks = target.ranks;
    let copies = ranks / tensor / pipeline;
    let shard = links.of_node / tensor;
    let none = match mode {
        Mode::Hybrid => shard >= copies || shard < 2 || copies % shard != 0,
        Mode::Optimizer => pipeline == 1 || copies == 1,
        _ => false,
    };
    if none {
        return Ok(Tried::NoMesh);
    }
    let mut mesh = vec![
        format!("parallel.tensor={tensor}"),
        format!("parallel.context={context}"),
        format!("parallel.pipeline={pipeline}"),
    ];
    mesh.push(format!("parallel.mode={}", mode.write().as_str().unwrap_or_default()));
    if mode == Mode::Hybrid {
        mesh.push(format!("parallel.shard={shard}"));
    }
    let (mut best, mut any): (Option<FittingMesh>, bool) = (None, false);
    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
        for micro in powers(1 << 10) {
            let more = [
                format!("train.micro_batch_size={micro}"),
                format!("train.recompute={}", recompute.write().as_str().unwrap_or_default()),
            ];
            let mut config = args.config.clone();
            config.overrides.extend(mesh.iter().chain(&more).cloned());
            let Ok(loaded) = load::<R>(&config, ranks) else { continue };
            let Ok(plan) = loaded.config.plan(target) else { continue };
            let MemoryPlan::Training(training) = &plan else {
                return Err(Error::config("--search is for runs of one model"));
            };
            any = true;
            let bytes = training.peak(training.micro_batch, 0);
            if bytes > memory as i64 {
                break;
            }
            let work = plan.work();
            let Some(predicted) = rates.and_then(|rates| work.predict(rates)) else {
                return Err(Error::config(
                    "--search needs a rate: --gpu H100, or corral bench rates on this machine",
                ));
            };
            // The products of gate and up once more; those of whole blocks are counted already.
            let s = &training.shape;
            let experts = s.experts.as_ref().map_or(1, |e| e.num_experts_per_tok);
            let gate_up = 4 * s.hidden_size * s.intermediate_size * s.num_hidden_layers * experts;
            let again = match recompute {
                Recompute::Selective => 1.0 + gate_up as f64 * work.tokens / work.flops,
                Recompute::None | Recompute::Full => 1.0,
            };
            let over = MeshPlan::of(loaded.config.common().parallel, ranks, Some(links.of_node))?;
            let step_s = links
                .sending(
                    &training.traffic(training.micro_batch),
                    &over,
                    training.micro_batches(training.micro_batch),
                )
                .step_s(predicted.step_s * again);
            if best.as_ref().is_none_or(|best| step_s < best.step_s) {
                let words = mesh.iter().chain(&more).cloned().collect::<Vec<_>>().join(" ");
                best = Some(FittingMesh { words, bytes, step_s, tokens_per_s: work.tokens / step_s });
            }
        }
    }
    Ok(match best {
        Some(best) => Tried::Fits(best),
        None if any => Tried::TooLarge,
        None => Tried::NoMesh,
    })
}
