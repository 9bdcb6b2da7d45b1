//! What a training takes of memory and time, before anything of it is there: [`Memory`] is one model on one rank, [`TrainingMemory`] a run that
//! trains one model, [`ModelsMemory`] a run of several, each on its device. [`StepWork`] is what a step computes, and how long that
//! takes at known [`Rates`](rates::Rates).
//!
//! Which models a run has is said by its recipe (`Recipe::plan`).

mod block;
mod layer;
pub mod links;
pub mod memory;
pub(crate) mod models;
mod parts;
pub mod rates;
pub mod traffic;
pub(crate) mod training;
mod walk;
pub mod work;

use tch::Device;

pub use memory::Memory;
pub(crate) use models::ModelsMemory;
pub(crate) use training::TrainingMemory;
use work::StepWork;

/// What a plan is made for.
#[derive(Debug, Clone)]
pub struct PlanTarget {
    /// Ranks that the run will have, at least 1.
    pub ranks: i64,
    /// What models are on whose section names no device.
    pub device: Device,
    /// The same as a configuration names it.
    pub device_name: String,
    /// Completions of a prompt in the data, which a plan does not open.
    pub completions: i64,
}

/// What a run has in memory.
pub enum MemoryPlan {
    /// A model that learns from data, with its reference if it has one.
    Training(Box<TrainingMemory>),
    /// Models that take turns: the algorithms that sample responses.
    Models(ModelsMemory),
}

impl MemoryPlan {
    /// The work of a step.
    pub fn work(&self) -> StepWork {
        match self {
            MemoryPlan::Training(t) => t.work,
            MemoryPlan::Models(m) => m.work,
        }
    }

    /// Bytes of the device that takes most, without those of the process itself.
    pub fn bytes(&self) -> i64 {
        match self {
            MemoryPlan::Training(t) => t.peak(t.micro_batch, 0),
            MemoryPlan::Models(m) => {
                let most = |on: &Vec<&models::ModelMemory>| models::peaks(on).into_iter().max().unwrap_or(0);
                m.by_device().values().map(most).max().unwrap_or(0)
            }
        }
    }
}

impl From<TrainingMemory> for MemoryPlan {
    fn from(training: TrainingMemory) -> MemoryPlan {
        MemoryPlan::Training(Box::new(training))
    }
}
