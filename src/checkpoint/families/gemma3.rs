//! Gemma 3 (text): Gemma 2 with norms of each head's query and key in the place of the scores' softcap, and with a rotary base of
//! their own in blocks with a window.

use serde_json::json;

use super::gemma2::{InGguf, KEYS, read_gemma, write};
use super::{Config, Description, Only, refused, same_place};
use crate::checkpoint::gguf::form::{GgufForm, WINDOW};
use crate::checkpoint::hf_config::COMMON;
use crate::config::shape::{Family, LayerType, QkNorm, Shape};
use crate::error::{Error, Result};
use crate::gguf::MetadataValue;

pub static GEMMA3: Description = Description {
    architecture: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    keys: &[&COMMON, &KEYS, &["rope_local_base_freq", "sliding_window_pattern"]],
    only: &[("attention_bias", Only::Bool(false)), ("use_bidirectional_attention", Only::Off)],
    // transformers reads hidden_activation alone, and has the cap of scores as a key without using it.
    harmless: &["hidden_act", "cache_implementation", "attn_logit_softcapping"],
    read,
    write: |shape, config| {
        write(shape, config);
        config.insert("attn_logit_softcapping".into(), json!(null));
        config.insert("rope_local_base_freq".into(), json!(shape.features.rope_local_theta));
    },
    place: same_place,
    gguf: &GgufForm {
        read: |keys, shape| {
            GGUF.read(keys, shape)?;
            let f = &mut shape.features;
            // The converter leaves the window out where no block has it.
            if keys.integer(WINDOW)?.is_none_or(|n| n <= 0) {
                f.layer_types.iter_mut().flatten().for_each(|t| *t = LayerType::FullAttention);
            }
            f.qk_norm = QkNorm::Head;
            f.rope_local_theta = Some(keys.positive(LOCAL_BASE)?.unwrap_or(1e4));
            f.logit_softcap = keys.number(SOFTCAP)?.filter(|cap| *cap != 0.0);
            Ok(())
        },
        write: |shape| {
            let mut own = GGUF.write(shape)?;
            let f = &shape.features;
            own.extend(f.rope_local_theta.map(|theta| (LOCAL_BASE, MetadataValue::Float(theta))));
            own.extend(f.logit_softcap.map(|cap| (SOFTCAP, MetadataValue::Float(cap))));
            Ok(own)
        },
        left_out: |shape| GGUF.left_out(shape),
        ..GgufForm::plain("gemma3", Family::Gemma3)
    },
};

const GGUF: InGguf = InGguf { period: 6, largest: 62 };
const LOCAL_BASE: &str = "rope.freq_base_swa";
const SOFTCAP: &str = "final_logit_softcapping";

fn read(config: &Config) -> Result<Shape> {
    let pattern = config.some_integer("sliding_window_pattern")?.unwrap_or(6);
    if pattern < 1 {
        return Err(Error::data(format!("sliding_window_pattern is {pattern}; it must be at least 1")));
    }
    // Each so-many-th block sees everything.
    let slides = |layer: i64| (layer + 1) % pattern != 0;
    let mut shape = read_gemma(config, Family::Gemma3, (131072, 1e6), slides)?;
    // transformers 5 writes the base of blocks with a window into rope_parameters.
    let nested = config.get("rope_parameters").and_then(|p| p.get("sliding_attention"));
    if let Some(kind) = nested.and_then(|p| p.get("rope_type")).filter(|kind| *kind != "default") {
        return Err(refused("rope_parameters.sliding_attention.rope_type", kind, "\"default\""));
    }
    let local = match nested.and_then(|p| p.get("rope_theta")) {
        Some(theta) => theta
            .as_f64()
            .ok_or_else(|| Error::data(format!("rope_parameters.sliding_attention.rope_theta is {theta}")))?,
        None => config.number("rope_local_base_freq", 1e4)?,
    };
    shape.features.qk_norm = QkNorm::Head;
    shape.features.rope_local_theta = Some(local);
    shape.features.logit_softcap = config
        .get("final_logit_softcapping")
        .map(|_| config.number("final_logit_softcapping", 0.0))
        .transpose()?;
    Ok(shape)
}
