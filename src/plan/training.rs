//! A run that trains one model, with a reference that it may have.

use kernels::ops::accumulator;
use tch::{Device, Kind};

use super::PlanTarget;
use super::memory::{BatchShape, Memory, Parts};
use super::traffic::Traffic;
use super::work::{self, StepWork};
use crate::config::common::Common;
use crate::config::sections::{MomentsIn, Recompute};
use crate::config::shape::{Head, Shape};
use crate::distributed::mesh::ShardingPlan;
use crate::distributed::plan::GroupPlan;
use crate::error::Result;
use crate::model::{compute_kind, float8};
use crate::optim::streamed_bytes;

/// What the rows are that `train.batch_size` counts.
#[derive(Debug, Clone, Copy)]
pub struct RowShape {
    /// Sequences of a row: the completions of a prompt.
    pub sequences: i64,
    /// Tokens of a sequence.
    pub length: i64,
    /// Rows hold several documents.
    packed: bool,
    /// All sequences of a micro-batch are packed into one row.
    joined: bool,
}

impl RowShape {
    /// Rows of `length` tokens, which hold several documents where they are `packed`.
    pub fn of(length: i64, packed: bool) -> RowShape {
        RowShape { sequences: 1, length, packed, joined: false }
    }

    /// Prompts with `completions` of at most `length` tokens each; where they are `packed`, those of a micro-batch are in one
    /// row.
    pub fn completions(completions: i64, length: i64, packed: bool) -> RowShape {
        RowShape { sequences: completions, length, packed, joined: packed }
    }
}

/// What the model has on one stage of a pipeline.
pub struct StageMemory {
    memory: Memory,
    /// AdamW's moments, on the device or, with `offload`, in host memory.
    pub moments: i64,
    /// Host memory of a checkpoint while it is written; 0 where the only one is written after the last step.
    pub checkpoint: i64,
}

/// A frozen model beside the one that is trained.
struct ReferenceMemory {
    memory: Memory,
    /// It stays; else it goes before the first step.
    online: bool,
}

/// What a run has in memory. Bytes are those of one rank.
pub struct TrainingMemory {
    /// The recipe, such as `sft`.
    pub subcommand: &'static str,
    /// The trained model's.
    pub shape: Shape,
    /// Of each stage.
    stages: Vec<StageMemory>,
    /// Moments are in host memory.
    pub offload: bool,
    /// How they are kept.
    kept: MomentsIn,
    recompute: Recompute,
    /// The rows of a sample.
    pub each: RowShape,
    /// Samples of a micro-batch.
    pub micro_batch: i64,
    /// Samples of a step on one rank.
    pub rows: i64,
    reference: Option<ReferenceMemory>,
    /// Tokens of a forward that scores, by which a reward model is normalised at the end.
    scored: i64,
    /// What a step computes.
    pub work: StepWork,
    /// Ranks of the run.
    pub ranks: i64,
    /// The dtype of forward and backward.
    pub compute: Kind,
    /// Where the model is.
    pub device: Device,
}

impl TrainingMemory {
    /// Of a model of this shape, laid out in `plans`. `subcommand` is what runs it.
    ///
    /// # Errors
    /// Of kind Config: ranks that `parallel` cannot divide.
    pub fn new(
        subcommand: &'static str,
        c: &Common,
        shape: Shape,
        plans: &[GroupPlan],
        each: RowShape,
        target: &PlanTarget,
    ) -> Result<TrainingMemory> {
        let (ranks, device) = (target.ranks, target.device);
        let data_ranks = c.parallel.data_ranks(ranks);
        let compute = compute_kind(c.precision.compute);
        let only_at_the_end = c.train.steps.is_some_and(|steps| steps <= c.checkpoint.every);
        let stage = |sharding| {
            let memory = Memory::new(&shape, plans, compute, sharding, device)?
                .in_float8(float8(c.precision.compute, c.float8))?;
            let moments = memory.moments(c.optim.moments);
            let checkpoint = if only_at_the_end { 0 } else { memory.masters() + moments };
            Ok(StageMemory { memory, moments, checkpoint })
        };
        let stages = ShardingPlan::of(c.parallel, ranks)?.stages().map(stage).collect::<Result<_>>()?;
        let tokens = (c.train.batch_size * each.sequences * each.length) as f64;
        let work = StepWork {
            tokens,
            flops: tokens * work::forward_and_backward(&shape, plans, each.length, c.train.recompute),
            read_bytes: work::update_bytes(plans),
            samples: false,
            hidden_size: shape.hidden_size,
            compute: c.precision.compute,
            steps: c.train.steps.map(|steps| steps as u64),
            ranks,
        };
        Ok(TrainingMemory {
            subcommand,
            stages,
            offload: c.optim.offload,
            kept: c.optim.moments,
            recompute: c.train.recompute,
            each,
            micro_batch: c.train.micro_batch_size(data_ranks),
            rows: c.train.batch_size / data_ranks,
            reference: None,
            scored: 0,
            work,
            shape,
            ranks,
            compute,
            device,
        })
    }

    /// With a frozen reference, which stays (`online`), or goes before the first step.
    pub fn with_reference(self, memory: Memory, online: bool) -> TrainingMemory {
        let mut work = self.work;
        if online {
            work.flops += work.tokens * work::forward(&memory.shape, self.each.length);
        }
        TrainingMemory { reference: Some(ReferenceMemory { memory, online }), work, ..self }
    }

    /// With scores of at most `tokens` tokens at once, by which a reward model is normalised at the end.
    pub fn with_scores_of(self, tokens: i64) -> TrainingMemory {
        TrainingMemory { scored: tokens, ..self }
    }

    /// Of a step with micro-batches of `rows`.
    fn batch(&self, rows: i64) -> BatchShape {
        let RowShape { sequences, length, packed, joined } = self.each;
        let all = rows * sequences;
        let (count, length) = if joined { (1, all * length) } else { (all, length) };
        let micro_batches = (self.rows + rows - 1) / rows;
        BatchShape { rows: count, length, micro_batches, recompute: self.recompute, packed }
    }

    /// Micro-batches of a step of `rows` each.
    pub fn micro_batches(&self, rows: i64) -> i64 {
        self.batch(rows).micro_batches
    }

    /// What the rank that sends most sends in a step with micro-batches of `rows`.
    pub fn traffic(&self, rows: i64) -> Traffic {
        let of = |stage: &StageMemory| stage.memory.traffic(&self.batch(rows));
        self.stages.iter().map(of).max_by(|a, b| a.total().total_cmp(&b.total())).unwrap_or_default()
    }

    /// Moments of a stage that are on the device.
    fn moments_there(&self, stage: &StageMemory) -> i64 {
        if self.offload { streamed_bytes(stage.moments, self.kept) } else { stage.moments }
    }

    /// The stage that takes most in a step with micro-batches of `rows`: its number, and what it has.
    pub fn largest_stage(&self, rows: i64) -> (usize, &StageMemory) {
        let total = |stage: &StageMemory| self.step_of(stage, rows).total();
        let stages = self.stages.iter().enumerate();
        stages.rev().max_by_key(|(_, stage)| total(stage)).unwrap_or((0, &self.stages[0]))
    }

    /// Stages of the pipeline.
    pub fn num_stages(&self) -> usize {
        self.stages.len()
    }

    /// The peak of a step with micro-batches of `rows` on the stage that takes most, by what it is for.
    pub fn step(&self, rows: i64) -> Parts {
        self.step_of(self.largest_stage(rows).1, rows)
    }

    /// The peak of a step on each stage, in order.
    pub fn steps(&self, rows: i64) -> Vec<i64> {
        self.stages.iter().map(|stage| self.step_of(stage, rows).total()).collect()
    }

    fn step_of(&self, stage: &StageMemory, rows: i64) -> Parts {
        let batch = self.batch(rows);
        let mut parts = stage.memory.step(&batch);
        parts.moments = self.moments_there(stage);
        if self.shape.head == Head::Score {
            // Which of all values are a sequence's score, of every micro-batch.
            let accumulator = accumulator(self.compute).elt_size_in_bytes() as i64;
            let values = batch.rows * batch.length;
            parts.head += batch.micro_batches * rows * self.each.sequences * values * accumulator;
        }
        parts
    }

    /// What stays of a reference.
    pub fn stays(&self) -> i64 {
        self.reference
            .as_ref()
            .filter(|r| r.online)
            .map_or(0, |r| r.memory.resident().total() + r.memory.kept())
    }

    /// What the forwards besides the steps take, with all that is there then: a reference is asked, or scores are normalised.
    pub fn asking(&self, rows: i64) -> i64 {
        let of = |stage: &StageMemory| {
            let (memory, moments) = (&stage.memory, self.moments_there(stage));
            let reference = self.reference.as_ref().map(|r| {
                let learner = memory.resident().total() + memory.kept() + moments;
                learner + r.memory.forward(&self.batch(rows)).total()
            });
            let scores = (self.scored > 0).then(|| {
                let batch = BatchShape { rows: 1, length: self.scored, packed: true, ..self.batch(rows) };
                memory.forward(&batch).total() + moments
            });
            reference.max(scores).unwrap_or(0)
        };
        self.stages.iter().map(of).max().unwrap_or(0)
    }

    /// What the device must have for micro-batches of `rows`; `process` is what the process takes without a model.
    pub fn peak(&self, rows: i64, process: i64) -> i64 {
        let of = |stage: &StageMemory| {
            let on_host = if self.device == Device::Cpu { stage.checkpoint } else { 0 };
            (self.step_of(stage, rows).total() + self.stays()).max(self.asking(rows)) + process + on_host
        };
        self.stages.iter().map(of).max().unwrap_or(0)
    }

    /// The most rows of a micro-batch whose peak is within `bytes`; 0: not even one.
    pub fn largest(&self, bytes: i64, process: i64) -> i64 {
        let fits = |rows: i64| self.peak(rows, process) <= bytes;
        let (mut low, mut high) = (0, 1);
        while high <= 1 << 20 && fits(high) {
            (low, high) = (high, 2 * high);
        }
        while high - low > 1 {
            let middle = (low + high) / 2;
            if fits(middle) {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    }
}
