//! The configuration of `corral pretrain`.

use super::algorithm::{Algorithm, BuiltInConfig, built_in};
use super::common::{Common, configuration, conflicts_of_inputs, conflicts_of_validation};
use super::conflict::Conflicts;
use super::model::Model;
use super::section::section;
use super::sections::{DataSource, TokenizerSection, Valid};
use super::shape::Shape;

configuration! {
    /// Pretraining on token shards.
    pub struct Pretrain {
        /// Where the model comes from.
        model: Model;
        /// The tokenizer of the shards. Default: the model's.
        tokenizer: Option<TokenizerSection> = None;
        /// Training and validation data.
        data: PretrainData;
        /// Validation on `data.valid`.
        valid: Valid = Valid::default();
    }
}

section! {
    /// Token shards.
    pub struct PretrainData {
        /// Token shards to train on; at least one.
        train: Vec<DataSource>;
        /// Token shards to validate on; with none there is no validation.
        valid: Vec<DataSource> = Vec::new() => Output;
        /// Tokens of one sample, T.
        sequence_length: i64 = 512, COUNT => State;
    }
}

impl Algorithm for Pretrain {
    const SUBCOMMAND: &'static str = "pretrain";
    const BUILT_IN: &'static [BuiltInConfig] = built_in!("pretrain": "default", "llama-1b", "llama-3-405b-32x8", "llama-3-70b-4x8", "llama-8b", "shakespeare", "smollm2-shakespeare");

    const SHARES_SEQUENCES: bool = true;
    const PIPELINES: bool = true;

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        let positions = match &self.model {
            Model::Init(init) => init.max_position_embeddings,
            Model::Preset(name) => Shape::preset(name).map(|shape| shape.max_position_embeddings),
            Model::Path(_) => None,
        };
        let length = self.data.sequence_length;
        if let Some(positions) = positions.filter(|positions| length > *positions) {
            let why = format!("{length} tokens do not fit the model's max_position_embeddings, {positions}");
            found.add("data.sequence_length", why);
        }
        conflicts_of_validation(&self.data.valid, found);
        conflicts_of_inputs(&self.model, self.tokenizer.as_ref(), &self.data.train, found);
        self.parallel.conflicts_of_length(length, found);
        self.common().conflicts(world_size, found);
        self.valid.conflicts(&self.data.valid, found);
    }
}
