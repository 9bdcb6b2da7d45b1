//! The configuration of `corral sft`.

use std::path::PathBuf;

use super::algorithm::{Algorithm, BuiltInConfig, built_in};
use super::common::{Common, configuration, conflicts_of_inputs, conflicts_of_validation};
use super::conflict::Conflicts;
use super::model::Model;
use super::preferences::conflicts_of_split;
use super::section::section;
use super::sections::{DataSource, OnError, TokenizerSection, TooLong, Valid};
use super::template_date::TemplateDate;
use super::trainable::{self, Freeze, Lora};

configuration! {
    /// Supervised fine-tuning on conversations.
    pub struct Sft {
        /// Where the model comes from.
        model: Model;
        /// The tokenizer, and how conversations are rendered.
        tokenizer: Option<TokenizerSection> = None;
        /// Training and validation data.
        data: SftData;
        /// Parameters that are not trained.
        freeze: Freeze = Freeze::default();
        /// Adapters; without them the model itself is trained.
        lora: Option<Lora> = None;
        /// Validation on `data.valid`.
        valid: Valid = Valid::default();
        /// Responses to the first prompts of the validation data, written to samples.jsonl and TensorBoard.
        samples: PromptSamples = PromptSamples::default();
        /// How the samples are generated.
        generation: SampleGeneration = SampleGeneration::default();
    }
}

section! {
    /// Conversations to train on: see the formats in docs/formats.md.
    pub struct SftData {
        /// Files to train on; at least one.
        train: Vec<DataSource>;
        /// Files to validate on; with none there is no validation.
        valid: Vec<DataSource> = Vec::new() => Output;
        /// Maximum tokens of a row, T.
        sequence_length: i64 = 512, COUNT => State;
        /// Packs several examples into a row, without attention between them; else one per row, padded to the longest.
        packing: bool = true => State;
        /// Also trains on tokens that are not the assistant's.
        train_on_prompt: bool = false => State;
        /// Treatment of examples that are longer than `sequence_length`; metrics.jsonl counts them (`truncated`, `dropped`).
        too_long: TooLong = TooLong::Truncate => State;
        /// Treatment of unusable records.
        on_error: OnError = OnError::Refuse => State;
        /// Relative sizes of the parts of the training files for the stages fine-tuning, reward model and RL: this stage takes
        /// the first part. A record's part depends only on its number in its file. Empty: every stage takes all.
        split: Vec<f64> = Vec::new() => State;
        /// The date for chat templates that use one. Default: the day on which the run begins.
        template_date: TemplateDate = TemplateDate::default() => State;
        /// Where tokenized data is cached. Default: `corral` in the user's cache folder.
        cache: Option<PathBuf> = None => Execution;
    }
}

section! {
    /// Responses to the first prompts of the validation data, written to samples.jsonl and TensorBoard.
    pub struct PromptSamples {
        /// Steps between samples; 0: no samples.
        every: i64 = 0, NOT_NEGATIVE => Output;
        /// Number of prompts.
        count: i64 = 4, COUNT => Output;
    }
}

section! {
    /// How the samples are generated.
    pub struct SampleGeneration {
        /// Maximum tokens of a response.
        max_new_tokens: i64 = 256, COUNT => Output;
        /// Divides the logits; 0: always the most probable token.
        temperature: f64 = 1.0, NOT_NEGATIVE => Output;
        /// Samples only from this many most probable tokens; 0: all.
        top_k: usize = 0 => Output;
        /// Nucleus sampling: samples from the most probable tokens whose total probability reaches this.
        top_p: f64 = 1.0, SHARE => Output;
    }
}

impl Algorithm for Sft {
    const SUBCOMMAND: &'static str = "sft";
    const BUILT_IN: &'static [BuiltInConfig] = built_in!("sft": "default", "gsm8k", "llama-3.1-8b-chats-qlora", "llama-3.2-1b-chats-lora", "llama-7b-full", "llama-7b-lora", "llama-7b-qlora", "mistral-7b-chats-qlora", "noisy", "qwen2.5-0.5b-chats-lora", "qwen2.5-7b-chats-qlora", "qwen3-4b-chats-lora", "smollm2-gsm8k", "smollm2-persona", "tiny");

    const SHARES_SEQUENCES: bool = true;
    const PIPELINES: bool = true;

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        conflicts_of_split(&self.data.split, 0, found);
        conflicts_of_validation(&self.data.valid, found);
        if self.data.valid.is_empty() && self.samples.every > 0 {
            found.add("samples.every", "the prompts are the validation data's: give data.valid");
        }
        if self.parallel.pipeline > 1 && self.samples.every > 0 {
            let why =
                "stages (parallel.pipeline) do not generate; set it to 0, and sample from the trained model";
            found.add("samples.every", why);
        }
        conflicts_of_inputs(&self.model, self.tokenizer.as_ref(), &self.data.train, found);
        self.parallel.conflicts_of_length(self.data.sequence_length, found);
        if self.parallel.context > 1 && !self.data.packing {
            let why = "parallel.context needs rows of one length; set data.packing to true";
            found.add("data.packing", why);
        }
        self.common().conflicts(world_size, found);
        self.valid.conflicts(&self.data.valid, found);
        trainable::conflicts(&self.freeze, self.lora.as_ref(), self.precision.compute, found);
    }
}
