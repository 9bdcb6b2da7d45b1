//! A run of several models, each on its device, while responses are sampled, scored and learned from.

use std::collections::BTreeMap;

use tch::Kind;

use super::work::StepWork;

/// What such a run does one after the other in an iteration.
pub const PHASES: [&str; 3] = ["sampling", "scoring", "learning"];

/// A model on one rank. Bytes.
pub struct ModelMemory {
    /// Its name in the run, such as `actor`.
    pub name: &'static str,
    /// Values of the whole model.
    pub parameters: i64,
    /// The dtype of its forwards.
    pub compute: Kind,
    /// As a configuration names it.
    pub device: String,
    /// Its values are on the device only while it works.
    pub offload: bool,
    /// What it has on its device where it is not offloaded, moments that are there included.
    pub resident: i64,
    /// Gathered values that stay there after its first forward.
    pub kept: i64,
    /// What it has there at most in each of [`PHASES`]; none where it does nothing.
    pub at_work: [Option<i64>; 3],
    /// Moments that are in host memory.
    pub host: i64,
    /// Floating-point operations for a token of a forward, and of forward and backward, 0 where it does not learn.
    pub flops: [f64; 2],
    /// What an update of it reads and writes; 0 where it does not learn.
    pub update_bytes: f64,
    /// Numbers of a hidden state.
    pub hidden_size: i64,
    /// Keys and values of a token that it samples.
    pub cache_bytes: f64,
}

/// All models of a run.
pub struct ModelsMemory {
    /// What runs them.
    pub subcommand: &'static str,
    /// Ranks of the run.
    pub ranks: i64,
    /// One a section of the configuration.
    pub models: Vec<ModelMemory>,
    /// What an iteration computes.
    pub work: StepWork,
}

impl ModelsMemory {
    /// The models by their devices.
    pub fn by_device(&self) -> BTreeMap<&str, Vec<&ModelMemory>> {
        let mut devices: BTreeMap<&str, Vec<&ModelMemory>> = BTreeMap::new();
        self.models.iter().for_each(|m| devices.entry(&m.device).or_default().push(m));
        devices
    }

    /// Host memory of what is offloaded from other devices.
    pub fn host(&self) -> i64 {
        let of = |m: &ModelMemory| m.host + if m.offload { m.resident } else { 0 };
        self.models.iter().filter(|m| m.device != "cpu").map(of).sum()
    }
}

/// What a device with these models has at most in each of [`PHASES`]: what stays on it, and what its models, one after the
/// other, take besides.
pub fn peaks(on: &[&ModelMemory]) -> [i64; 3] {
    let stays = |m: &&ModelMemory| if m.offload { 0 } else { m.resident + m.kept };
    let all: i64 = on.iter().map(stays).sum();
    std::array::from_fn(|phase| {
        let besides = on.iter().filter_map(|m| Some(m.at_work[phase]? - stays(m))).max();
        all + besides.unwrap_or(0).max(0)
    })
}
