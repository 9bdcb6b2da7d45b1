//! The sections that the configurations of all algorithms share.

use std::path::PathBuf;

use serde_json::Value as Json;

use super::conflict::Conflicts;
use super::keys::KeyKind;
use super::problems::Problems;
use super::section::{choice, section};
use super::setting::{At, Setting};
use super::yaml::YamlValue;

choice! {
    /// Treatment of unusable records: unreadable lines, no known format, messages that the chat template refuses.
    pub enum OnError {
        /// Count all, name the first ten, and stop before anything is computed
        Refuse = "refuse",
        /// Leave them out, and count them by reason
        Skip = "skip",
    }
}

section! {
    /// A source of data with its share of the samples.
    pub struct SourceKeys {
        /// A file or a folder: token shards for pretraining, else files of any supported format, or Arrow files (`save_to_disk`).
        path: PathBuf => Path;
        /// Share of this source in the samples, relative to the others' weights; set it for all sources of a list or for none.
        /// Without weights the sources are shuffled together at their own sizes.
        weight: Option<f64> = None, POSITIVE => State;
    }
}

/// A source of data: a path, or `{path: ..., weight: ...}`.
#[derive(Debug, Clone, PartialEq)]
pub struct DataSource {
    /// A file or a folder.
    pub path: PathBuf,
    /// See [`SourceKeys::weight`].
    pub weight: Option<f64>,
}

impl Setting for DataSource {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        match &at.node.value {
            YamlValue::Text(path) => Some(DataSource { path: path.into(), weight: None }),
            YamlValue::Section(_) => {
                let SourceKeys { path, weight } = SourceKeys::read(at, problems)?;
                Some(DataSource { path, weight })
            }
            _ => at.expected("a path, or {path: PATH, weight: NUMBER}", problems),
        }
    }

    fn write(&self) -> Json {
        SourceKeys { path: self.path.clone(), weight: self.weight }.write()
    }

    fn kind() -> KeyKind {
        KeyKind::OneOf(vec![KeyKind::Path, SourceKeys::kind()])
    }
}

section! {
    /// The tokenizer, and how conversations are rendered. Without this section: the model's, unchanged.
    pub struct TokenizerSection {
        /// A folder with a tokenizer, or its file. Default: the model's folder.
        path: Option<PathBuf> = None => Path;
        /// A chat template that replaces the tokenizer's: the name of a built-in one, a file, or Jinja source.
        chat_template: Option<String> = None => Path;
        /// A plain template that replaces the tokenizer's, with `{prompt}` and `{completion}`.
        template: Option<String> = None => State;
        /// Special tokens to add to the tokenizer; each gets a new embedding row, the mean of the model's rows.
        add_tokens: Vec<String> = Vec::new() => State;
        /// The padding token, added if the tokenizer does not have it (`'"[PAD]"'`: quote one in brackets; with `lora`,
        /// `lora.modules_to_save` must have `embed_tokens`, and `lm_head` if there is one). Only files for other programs need
        /// one: Corral does not use it.
        pad_token: Option<String> = None => State;
        /// Pads the number of embedding rows to a multiple of this.
        pad_to_multiple_of: Option<i64> = None, COUNT => State;
    }
}

impl TokenizerSection {
    /// What does not fit.
    pub fn conflicts(&self, found: &mut Conflicts) {
        if self.chat_template.is_some() && self.template.is_some() {
            found.add("tokenizer.template", "tokenizer.chat_template is given too; keep one");
        }
        if self.pad_token.as_ref().is_some_and(String::is_empty) {
            found.add("tokenizer.pad_token", "the token is empty");
        }
        for (i, token) in self.add_tokens.iter().enumerate() {
            let key = format!("tokenizer.add_tokens.{i}");
            if token.is_empty() {
                found.add(key, "a token is empty");
            } else if self.add_tokens[..i].contains(token) {
                found.add(key, format!("`{token}` is there twice"));
            }
        }
    }
}

section! {
    /// Numeric precision.
    pub struct Precision {
        /// The dtype of forward and backward.
        compute: Compute = Compute::Float32 => Mathematics;
    }
}

choice! {
    /// The dtype of forward and backward; masters and moments are float32 (float64 for float64).
    pub enum Compute {
        /// Single precision.
        Float32 = "float32",
        /// Half the memory of activations, and faster on processors with bfloat16 matrix products.
        Bfloat16 = "bfloat16",
        /// As bfloat16, with large products of the blocks in 8-bit floats (section `float8`): for GPUs that have them, from
        /// compute capability 8.9 on; on a CPU only for tests, slower than bfloat16.
        Float8 = "float8",
        /// For tests.
        Float64 = "float64",
    }
}

choice! {
    /// How much of a factor one scale is for.
    pub enum Float8Scales {
        /// All of it.
        Tensor = "tensor",
        /// A row of the left factor, a column of the right one: more exact, and slower; from compute capability 9.0 on.
        Row = "row",
    }
}

section! {
    /// Products in 8-bit floats, with `precision.compute: float8`: those of the blocks' linear layers, forward and backward.
    /// Activations and weights are in e4m3, gradients in e5m2, each scaled by its largest magnitude.
    pub struct Float8Section {
        /// Products with a side (tokens, inputs or outputs) below this, or not a multiple of 16, stay in bfloat16. Where
        /// weights are gathered in 8-bit floats (sharded parameters, `scales: tensor`), the number of tokens counts for
        /// gradients of weights only. Sides are those of a rank's part, with `parallel.tensor` and `parallel.context`.
        min_size: i64 = 2048, WHOLE => Mathematics;
        /// How much of a factor one scale is for.
        scales: Float8Scales = Float8Scales::Tensor => Mathematics;
    }
}

section! {
    /// AdamW.
    pub struct Optim {
        /// Peak learning rate.
        lr: f64 = 3e-4, POSITIVE => Mathematics;
        /// Decay rates of the first and second moment.
        betas: [f64; 2] = [0.9, 0.95], BELOW_ONE => Mathematics;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, POSITIVE => Mathematics;
        /// Decoupled weight decay, of matrices only.
        weight_decay: f64 = 0.1, NOT_NEGATIVE => Mathematics;
        /// Maximum global gradient norm; 0: no clipping.
        clip: f64 = 1.0, NOT_NEGATIVE => Mathematics;
        /// The format of the moments: 8 bytes per parameter, or 2.03 with `8bit`.
        moments: MomentsIn = MomentsIn::Float32 => State;
        /// Keeps moments in pinned host memory and copies them to the GPU in chunks of 16M values for the update; refused on a
        /// CPU, where it gains nothing.
        offload: bool = false => Execution;
    }
}

choice! {
    /// The format of AdamW's moments.
    pub enum MomentsIn {
        /// Float32 (float64 in float64 compute).
        Float32 = "float32",
        /// 8-bit codes, one scale per block of 256 (Dettmers et al. 2022).
        EightBit = "8bit",
    }
}

section! {
    /// The learning-rate schedule.
    pub struct ScheduleSection {
        /// The shape of the decay after the warm-up.
        kind: ScheduleKind = ScheduleKind::Cosine => Mathematics;
        /// Steps over which the learning rate rises linearly from 0 to its peak.
        warmup_steps: u64 = 0 => Mathematics;
        /// The same as a share of the run's steps, instead of `warmup_steps`.
        warmup_ratio: Option<f64> = None, RATIO => Mathematics;
        /// The learning rate at the end, as a share of its peak (cosine and linear).
        min_lr_ratio: f64 = 0.1, RATIO => Mathematics;
    }
}

impl ScheduleSection {
    /// The steps of warm-up in a run of `steps`, rounded up as transformers does.
    pub fn warmup(&self, steps: u64) -> u64 {
        self.warmup_ratio.map_or(self.warmup_steps, |ratio| (ratio * steps as f64).ceil() as u64)
    }

    /// What does not fit `train`.
    pub fn conflicts(&self, train: &TrainSection, found: &mut Conflicts) {
        if self.warmup_ratio.is_some() && self.warmup_steps > 0 {
            found.add("schedule.warmup_ratio", "schedule.warmup_steps is given too; keep one");
        }
        if let Some(steps) = train.steps.filter(|steps| self.warmup_steps > *steps as u64) {
            let why =
                format!("{} steps of warm-up are more than the {steps} of train.steps", self.warmup_steps);
            found.add("schedule.warmup_steps", why);
        }
    }
}

choice! {
    /// The shape of the learning rate's decay after the warm-up.
    pub enum ScheduleKind {
        /// Half a cosine period.
        Cosine = "cosine",
        /// A line.
        Linear = "linear",
        /// No decay.
        Constant = "constant",
    }
}

section! {
    /// Training length and batch sizes.
    pub struct TrainSection {
        /// Optimizer steps; either this or `epochs`.
        steps: Option<i64> = None, COUNT => Length;
        /// Passes over the training data; either this or `steps`.
        epochs: Option<f64> = None, POSITIVE => Length;
        /// With `epochs`: drops the last rows if they do not fill a step; otherwise the last step is smaller. ppo, grpo and
        /// online-dpo always drop them.
        drop_last: bool = false => Length;
        /// The global batch: sequences per step, over all ranks.
        batch_size: i64 = 32, COUNT => Mathematics;
        /// Sequences that a rank computes at once. Default: its whole share of the batch.
        micro_batch_size: Option<i64> = None, COUNT => Rounding;
        /// Which activations of a block are recomputed in the backward.
        recompute: Recompute = Recompute::None => Execution;
        /// On a GPU: flash attention's backward adds in a fixed order, so that the same run gives the same bits; `false`: in
        /// any order, faster. On a CPU the same run always gives the same bits.
        deterministic: bool = true => Rounding;
    }
}

impl TrainSection {
    /// Micro-batches of a step on each of `ranks` ranks with different rows.
    pub fn micro_batches(&self, ranks: i64) -> i64 {
        let micro = self.micro_batch_size(ranks).max(1);
        (self.batch_size / ranks.max(1) + micro - 1) / micro
    }

    /// Sequences that one rank of `world_size` computes at once.
    pub fn micro_batch_size(&self, world_size: i64) -> i64 {
        self.micro_batch_size.unwrap_or(self.batch_size / world_size)
    }

    /// What does not fit on `world_size` ranks.
    pub fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        match (self.steps, self.epochs) {
            (Some(_), Some(_)) => found.add("train.epochs", "train.steps is given too; keep one"),
            (None, None) => found.add("train.steps", "give train.steps or train.epochs"),
            _ => {}
        }
        let (batch, unit) = match self.micro_batch_size {
            Some(micro) => (self.batch_size, micro * world_size),
            None => (self.batch_size, world_size),
        };
        if batch % unit == 0 {
            return;
        }
        let of = match self.micro_batch_size {
            Some(micro) => format!("train.micro_batch_size x ranks = {micro} x {world_size} = {unit}"),
            None => format!("the number of ranks, {world_size}"),
        };
        let (below, above) = (batch / unit * unit, (batch / unit + 1) * unit);
        let near = if below > 0 { format!("{below} or {above}") } else { above.to_string() };
        found.add("train.batch_size", format!("{batch} is not a multiple of {of}; {near} would be"));
    }
}

choice! {
    /// Which activations of a block are recomputed in the backward instead of being kept.
    pub enum Recompute {
        /// Only the norms' outputs and SwiGLU's, which cost one pass over memory.
        None = "none",
        /// Also the product of gate and up, the largest activation: 2F of the 2C + (2H + 2K) D + 2F numbers per token and block.
        Selective = "selective",
        /// The whole block, from its input.
        Full = "full",
    }
}

section! {
    /// When checkpoints are written.
    pub struct CheckpointSection {
        /// Steps between checkpoints; one is always written at the end.
        every: i64 = 100, COUNT => Output;
        /// Number of checkpoints to keep.
        keep: i64 = 3, COUNT => Output;
    }
}

section! {
    /// When metrics are written.
    pub struct Log {
        /// Steps between lines of metrics.
        every: i64 = 1, COUNT => Output;
        /// Writes report.html into the run's folder at the end.
        report: bool = true => Output;
    }
}

section! {
    /// A timeline of what every rank computes, sends and waits for.
    pub struct ProfileSection {
        /// Steps that are recorded, after the first of the process, into `profile/trace.json` in the run's folder; 0: none.
        steps: i64 = 0, WHOLE => Output;
    }
}

section! {
    /// Validation on `data.valid`.
    pub struct Valid {
        /// Steps between validations; 0: none.
        every: i64 = 100, WHOLE => Output;
        /// Maximum batches of `train.batch_size` sequences per validation.
        batches: i64 = 20, COUNT => Output;
        /// Keeps the checkpoint with the best validation, besides the last `checkpoint.keep`, and exports it.
        keep_best: bool = false => Output;
        /// Ends the run after so many validations without improvement, and keeps the best; 0: never.
        patience: u64 = 0 => Output;
    }
}

impl Valid {
    /// Whether the best checkpoint is kept and exported: a run that waits for a better one ends with a worse.
    pub fn keeps_best(&self) -> bool {
        self.keep_best || self.patience > 0
    }

    /// What does not fit the validation data.
    pub fn conflicts(&self, data: &[DataSource], found: &mut Conflicts) {
        let key = if self.keep_best { "valid.keep_best" } else { "valid.patience" };
        if self.keeps_best() && self.every == 0 {
            found.add(key, "it needs validations: give valid.every");
        }
        if self.keeps_best() && data.is_empty() {
            found.add(key, "it needs validation data: give data.valid");
        }
    }
}

choice! {
    /// Treatment of an example that is longer than a row.
    pub enum TooLong {
        /// Cut its end off, and count it.
        Truncate = "truncate",
        /// Leave it out, and count it.
        Drop = "drop",
    }
}
