//! The configuration of `corral pretrain`.

use serde::{Deserialize, Serialize};

use super::algorithm::{Algorithm, BuiltIn, built_in};
use super::common::{Common, configuration, conflict_of_inputs, sequence_length};
use super::conflict::Conflict;
use super::model::Model;
use super::numbers::count;
use super::sections::{Source, Tokenizer, Valid};
use super::shape::Shape;

configuration! {
    pub struct Pretrain {
        pub model: Model,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub tokenizer: Option<Tokenizer>,
        pub data: Data,
        #[serde(default)]
        pub valid: Valid,
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Token shards to train on; at least one.
    pub train: Vec<Source>,
    /// Token shards to validate on; with none there is no validation.
    #[serde(default)]
    pub valid: Vec<Source>,
    /// Tokens of one sample, T.
    #[serde(default = "sequence_length", deserialize_with = "count")]
    pub sequence_length: i64,
}

impl Algorithm for Pretrain {
    const SUBCOMMAND: &'static str = "pretrain";
    const DEFAULT: BuiltIn = built_in!("pretrain");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn conflict(&self, world_size: i64) -> Option<Conflict> {
        let positions = match &self.model {
            Model::Init(init) => init.max_position_embeddings,
            Model::Preset(name) => Shape::preset(name).map(|shape| shape.max_position_embeddings),
            Model::Path(_) => None,
        };
        let length = self.data.sequence_length;
        if let Some(positions) = positions.filter(|positions| length > *positions) {
            let why = format!("{length} tokens do not fit the model's max_position_embeddings, {positions}");
            return Some(("data.sequence_length", why));
        }
        conflict_of_inputs(&self.model, self.tokenizer.as_ref(), &self.data.train)
            .or_else(|| self.common().conflict(world_size))
            .or_else(|| self.valid.conflict(&self.data.valid))
    }
}
