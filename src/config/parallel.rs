//! The section `parallel`: what ranks divide among them.

use serde_json::Value as Json;

use super::conflict::Conflicts;
use super::keys::{KeyKind, Limits};
use super::problems::Problems;
use super::section::{choice, section};
use super::setting::{At, Setting};
use super::yaml::YamlValue;

section! {
    /// How the work is divided among the ranks.
    pub struct Parallel {
        /// The sharding mode.
        mode: Mode = Mode::Full => Rounding;
        /// `hybrid`: the ranks that share one copy of the parameters; `auto`: those of a host.
        shard: ShardSize = ShardSize::Auto => Rounding;
        /// Ranks that share every matrix (tensor parallelism), neighbours, which divide the ranks of the run; the others have
        /// different rows of a batch.
        tensor: i64 = 1, COUNT => Rounding;
        /// Ranks that share every matrix divide the tokens between attention and MLP (sequence parallelism), which takes less
        /// memory.
        sequence: bool = true => Rounding;
        /// Ranks that share every sequence (context parallelism), of pretrain and sft.
        context: i64 = 1, COUNT => Rounding;
        /// Stages that share the blocks (pipeline parallelism), of pretrain and sft.
        pipeline: i64 = 1, COUNT => Rounding;
        /// Blocks of each stage, such as `[9, 8, 8, 7]`; null: divided evenly.
        stages: Option<Vec<i64>> = None, COUNT => Rounding;
        /// In which order stages compute the micro-batches of a step.
        schedule: StageOrder = StageOrder::OneForwardOneBackward => Rounding;
        /// Time limit in seconds of the rendezvous and of every collective.
        timeout_s: f64 = 600.0, SECONDS => Execution;
    }
}

impl Parallel {
    /// Ranks of `world_size` that have different rows of a batch.
    pub fn data_ranks(&self, world_size: i64) -> i64 {
        (world_size / (self.tensor * self.context * self.pipeline)).max(1)
    }

    /// Refuses rows of so many tokens that ranks cannot share.
    pub fn conflicts_of_length(&self, length: i64, found: &mut Conflicts) {
        let unit = 2 * self.context;
        if self.context > 1 && length % unit != 0 {
            let why = format!(
                "{length} is not a multiple of {unit}: each of parallel.context = {} ranks has two equal chunks of a row",
                self.context
            );
            found.add("data.sequence_length", why);
        }
    }

    /// What does not fit on `world_size` ranks.
    pub fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        if let Some(stages) = self.stages.as_ref().filter(|s| s.len() as i64 != self.pipeline) {
            let why = format!(
                "{} numbers for parallel.pipeline = {}; one for each stage",
                stages.len(),
                self.pipeline
            );
            found.add("parallel.stages", why);
        } else if self.stages.is_some() && self.pipeline == 1 {
            found.add("parallel.stages", "is a key of pipelines; leave it out, or set parallel.pipeline");
        }
        if self.schedule != StageOrder::OneForwardOneBackward && self.pipeline == 1 {
            found.add("parallel.schedule", "is a key of pipelines; leave it out, or set parallel.pipeline");
        }
        if world_size % self.pipeline != 0 {
            let why = format!("{} must divide the number of ranks, {world_size}", self.pipeline);
            found.add("parallel.pipeline", why);
            return;
        }
        let (world_size, of) = match self.pipeline {
            1 => (world_size, "the number of ranks"),
            stages => (world_size / stages, "the number of ranks of a stage"),
        };
        if world_size % self.tensor != 0 {
            let why = format!("{} must divide {of}, {world_size}", self.tensor);
            found.add("parallel.tensor", why);
        }
        if self.context > 1 && world_size % (self.tensor * self.context) != 0 {
            let why = match self.tensor {
                1 => format!("{} must divide {of}, {world_size}", self.context),
                tensor => format!(
                    "{} must divide {of} divided by parallel.tensor, {world_size} / {tensor}",
                    self.context
                ),
            };
            found.add("parallel.context", why);
        }
        // Slices lie over ranks that share sequences, too.
        let ranks = (world_size / self.tensor).max(1);
        match self.shard {
            ShardSize::Auto => {}
            ShardSize::Ranks(_) if self.mode != Mode::Hybrid => {
                found.add(
                    "parallel.shard",
                    "is a key of `mode: hybrid`; leave it out, or set parallel.mode=hybrid",
                );
            }
            ShardSize::Ranks(n) if ranks % n != 0 => {
                let by = if self.tensor == 1 { "" } else { " divided by parallel.tensor" };
                found.add("parallel.shard", format!("{n} must divide {of}{by}, {ranks}"));
            }
            ShardSize::Ranks(_) => {}
        }
    }
}

choice! {
    /// Sharding over the ranks.
    pub enum Mode {
        /// Parameters, gradients and optimizer state (ZeRO-3, FSDP).
        Full = "full",
        /// Gradients and optimizer state (ZeRO-2).
        Grads = "grads",
        /// Optimizer state (ZeRO-1).
        Optimizer = "optimizer",
        /// Like `full`, but over `parallel.shard` ranks; such groups of ranks hold equal copies (HSDP).
        Hybrid = "hybrid",
        /// Nothing: every rank holds all (DDP).
        Replicate = "replicate",
    }
}

choice! {
    /// The order of forwards and backwards on the stages of a pipeline.
    pub enum StageOrder {
        /// A forward and a backward by turns (1F1B).
        OneForwardOneBackward = "1f1b",
        /// The same, but the gradients of matrices wait until a stage would else wait itself (ZB-H1). Takes more memory: what these products
        /// are made of.
        ZeroBubble = "zero_bubble",
    }
}

/// `auto`, or a number of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShardSize {
    /// The ranks of a host.
    Auto,
    /// So many neighbours, which divide the ranks of the run.
    Ranks(i64),
}

const AUTO: &str = "auto";

impl Setting for ShardSize {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        match &at.node.value {
            YamlValue::Text(word) if word == AUTO => Some(ShardSize::Auto),
            YamlValue::Int(_) => {
                i64::read(&At { limits: Limits::COUNT, ..at.clone() }, problems).map(ShardSize::Ranks)
            }
            _ => at.expected("a number of ranks, or auto: the ranks of a host", problems),
        }
    }

    fn write(&self) -> Json {
        match self {
            ShardSize::Auto => AUTO.into(),
            ShardSize::Ranks(n) => (*n).into(),
        }
    }

    fn kind() -> KeyKind {
        KeyKind::OneOf(vec![KeyKind::Whole, KeyKind::Choice(vec![(AUTO, "The ranks of a host.".into())])])
    }
}
