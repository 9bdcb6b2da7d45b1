//! What `corral bench train` and `corral bench checkpoint` train.

use crate::config::parallel::{Mode, Parallel, StageOrder};
use crate::config::sections::{Compute, MomentsIn, Recompute};
use crate::config::trainable::BaseFormat;
use crate::error::{Error, Result};

/// What is trained.
#[derive(Debug, clap::Args)]
pub struct Workload {
    /// A preset's shape with random weights, such as llama-110m or qwen2.5-1.5b (corral help model lists all)
    #[arg(long, default_value = "llama-15m")]
    pub preset: String,
    #[arg(long, value_enum, default_value = "float32")]
    pub precision: Compute,
    /// Trains adapters of this rank on all linear layers, in place of the weights
    #[arg(long, value_name = "RANK", value_parser = clap::value_parser!(i64).range(1..))]
    pub lora: Option<i64>,
    /// With --lora: the format of the frozen weights
    #[arg(long, value_enum, default_value = "none", requires = "lora")]
    pub base: BaseFormat,
    /// With --precision float8: products with a shorter side stay in bfloat16 [default: 2048]
    #[arg(long, value_name = "SIZE", value_parser = clap::value_parser!(i64).range(0..))]
    pub float8_min_size: Option<i64>,
    /// How AdamW's moments are kept
    #[arg(long, value_enum, default_value = "float32")]
    pub moments: MomentsIn,
    /// Sequences a step over all ranks [default: the preset's]
    #[arg(long)]
    pub batch_size: Option<i64>,
    /// Sequences computed at once [default: a rank's share]
    #[arg(long)]
    pub micro_batch_size: Option<i64>,
    /// Tokens of a sequence [default: the preset's]
    #[arg(long)]
    pub sequence_length: Option<i64>,
    #[arg(long, value_enum, default_value = "none")]
    pub recompute: Recompute,
    #[arg(long, value_enum, default_value = "full")]
    pub mode: Mode,
    /// Ranks that share every matrix
    #[arg(long, value_name = "RANKS", default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..))]
    pub tensor: i64,
    /// Ranks that share every sequence
    #[arg(long, value_name = "RANKS", default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..))]
    pub context: i64,
    /// Stages that share the blocks
    #[arg(long, value_name = "STAGES", default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..))]
    pub pipeline: i64,
    /// With --pipeline: blocks of each stage, such as 5,3 [default: divided evenly]
    #[arg(long, value_name = "BLOCKS", value_delimiter = ',', requires = "pipeline")]
    pub stages: Option<Vec<i64>>,
    /// With --pipeline: the order of forwards and backwards
    #[arg(long, value_enum, default_value = "1f1b")]
    pub schedule: StageOrder,
}

impl Workload {
    /// How so many ranks divide it.
    ///
    /// # Errors
    /// Of kind Config: they cannot.
    pub fn parallel(&self, ranks: i64) -> Result<Parallel> {
        let Workload { mode, tensor, context, pipeline, schedule, .. } = *self;
        if ranks % (tensor * context * pipeline) != 0 {
            let why = format!("--tensor times --context times --pipeline must divide the {ranks} ranks");
            return Err(Error::config(why));
        }
        if self.stages.as_ref().is_some_and(|stages| stages.len() as i64 != pipeline) {
            return Err(Error::config("--stages must have a number for each stage of --pipeline"));
        }
        let stages = self.stages.clone();
        Ok(Parallel { mode, tensor, context, pipeline, stages, schedule, ..Parallel::default() })
    }
}

/// Sequences a step and tokens a sequence: 2,048 tokens a step for the small presets, as the peers' benchmarks have.
pub fn default_batch(preset: &str) -> (i64, i64) {
    match preset {
        "llama-15m" => (8, 256),
        "llama-42m" => (4, 512),
        "llama-110m" => (2, 1024),
        _ => (1, 2048),
    }
}
