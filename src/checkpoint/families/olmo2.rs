//! OLMo 2: norms on what attention and MLP give instead of before them, and norms of all queries and keys of a token together.

use serde_json::json;

use super::{Config, Description, Only, same_place};
use crate::checkpoint::gguf::form::{GgufForm, check_head_dim};
use crate::checkpoint::hf_config::{COMMON, Defaults, common};
use crate::config::shape::{Family, Shape};
use crate::error::Result;

pub static OLMO2: Description = Description {
    architecture: "Olmo2ForCausalLM",
    model_type: "olmo2",
    keys: &[&COMMON],
    only: &[("attention_bias", Only::Bool(false))],
    harmless: &[],
    read,
    write: |_, config| {
        config.insert("attention_bias".into(), json!(false));
    },
    place: same_place,
    gguf: &GgufForm {
        write: |shape| {
            check_head_dim(shape)?;
            if shape.tie_word_embeddings {
                return Err("an Olmo2 whose LM head is tied to the embedding".into());
            }
            (GgufForm::plain("olmo2", Family::Olmo2).write)(shape)
        },
        ..GgufForm::plain("olmo2", Family::Olmo2)
    },
};

fn read(config: &Config) -> Result<Shape> {
    common(
        config,
        Defaults {
            family: Family::Olmo2,
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-5,
            rope_theta: 10000.0,
        },
    )
}
