//! A model's shape as the metadata has it: what it says about the mathematics is taken or refused, never passed over.

use super::names::{OUTPUT, ROPE_FREQS, TOKEN_EMBEDDING, architecture};
use crate::checkpoint::source::Source;
use crate::config::shape::{Experts, Family, Head, Llama3RopeScaling, Shape};
use crate::error::{Error, Result};
use crate::gguf::{Array, Metadata, Value};
use crate::model::llama::inverse_frequencies;

/// Keys of the architecture that say nothing about the mathematics, or what others say, too.
const HARMLESS: [&str; 4] = [
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "expert_group_count",
];

/// Keys that change the mathematics unless they have this value.
const ONLY: [(&str, Neutral); 22] = [
    ("use_parallel_residual", Neutral::Bool(false)),
    ("attention.causal", Neutral::Bool(true)),
    ("attention.layer_norm_epsilon", Neutral::Absent),
    ("attention.max_alibi_bias", Neutral::Number(0.0)),
    ("attention.clamp_kqv", Neutral::Number(0.0)),
    ("attention.scale", Neutral::Absent),
    ("attention.q_lora_rank", Neutral::Absent),
    ("attention.kv_lora_rank", Neutral::Absent),
    ("attention.temperature_length", Neutral::Absent),
    ("attention.sliding_window_pattern", Neutral::Absent),
    ("attn_logit_softcapping", Neutral::Number(0.0)),
    ("final_logit_softcapping", Neutral::Number(0.0)),
    ("logit_scale", Neutral::Number(1.0)),
    ("embedding_scale", Neutral::Number(1.0)),
    ("residual_scale", Neutral::Number(1.0)),
    ("expert_shared_count", Neutral::Number(0.0)),
    ("expert_feed_forward_length", Neutral::Absent),
    ("expert_weights_scale", Neutral::Number(1.0)),
    ("expert_weights_norm", Neutral::Bool(true)),
    ("leading_dense_block_count", Neutral::Number(0.0)),
    ("rope.scale_linear", Neutral::Number(1.0)),
    ("rope.scaling.factor", Neutral::Number(1.0)),
];

#[derive(Debug, Clone, Copy)]
enum Neutral {
    Bool(bool),
    Number(f64),
    Absent,
}

pub(super) struct Read {
    pub shape: Shape,
    pub warnings: Vec<String>,
}

/// The architecture's keys, and which of them were read.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
    read: Vec<String>,
}

impl Keys<'_> {
    fn key(&mut self, key: &str) -> String {
        self.read.push(key.to_string());
        format!("{}.{key}", self.architecture)
    }

    /// An integer, or a list with the same one for every block.
    fn integer(&mut self, key: &str) -> Result<Option<i64>> {
        let key = self.key(key);
        match self.metadata.get(&key) {
            Some(Value::Array(Array::Integers(list))) => match list.first() {
                Some(first) if list.iter().all(|n| n == first) => Ok(Some(*first)),
                _ => Err(Error::data(format!("`{key}` has another value in each block, which is not built"))),
            },
            _ => self.metadata.integer(&key),
        }
    }

    fn needed(&mut self, key: &str) -> Result<i64> {
        let value = self.integer(key)?;
        value.ok_or_else(|| Error::data(format!("`{}.{key}` is missing in the metadata", self.architecture)))
    }

    fn number(&mut self, key: &str) -> Result<Option<f64>> {
        let key = self.key(key);
        self.metadata.number(&key)
    }

    fn refused(&self, key: &str, value: impl std::fmt::Display, only: &str) -> Error {
        let architecture = self.architecture;
        Error::data(format!(
            "`{architecture}.{key}` is {value}; that is not built: only {only} can be computed"
        ))
    }

    /// Refuses keys that change the mathematics; tells of those that are not known.
    fn rest(&self) -> Result<Option<String>> {
        let prefix = format!("{}.", self.architecture);
        let mut unknown = Vec::new();
        for name in self.metadata.keys() {
            let Some(key) = name.strip_prefix(&prefix) else { continue };
            if self.read.iter().any(|read| read == key) || HARMLESS.contains(&key) {
                continue;
            }
            let Some((_, only)) = ONLY.iter().find(|(known, _)| *known == key) else {
                unknown.push(name);
                continue;
            };
            let value = self.metadata.get(name).expect("it is one of the keys");
            let (neutral, said) = match (only, value) {
                (Neutral::Bool(only), Value::Bool(b)) => (b == only, only.to_string()),
                (Neutral::Number(only), Value::Float(x)) => (x == only, format!("{only:?}")),
                (Neutral::Number(only), Value::Integer(n)) => (*n as f64 == *only, format!("{only:?}")),
                (Neutral::Absent, _) => (false, "models without it".to_string()),
                (Neutral::Bool(_) | Neutral::Number(_), _) => (false, "models without it".to_string()),
            };
            if !neutral {
                return Err(self.refused(key, value, &said));
            }
        }
        let s = if unknown.len() > 1 { "s" } else { "" };
        Ok((!unknown.is_empty())
            .then(|| format!("{} key{s} not known and not used: {}", unknown.len(), unknown.join(", "))))
    }
}

/// The family and its shape. `files` has the tensors under their names in the files.
pub(super) fn read(metadata: &Metadata, files: &Source) -> Result<Read> {
    let Some(architecture) = metadata.text("general.architecture")? else {
        return Err(Error::data("`general.architecture` is missing in the metadata"));
    };
    let mut keys = Keys { metadata, architecture, read: Vec::new() };
    let experts = keys.integer("expert_count")?.filter(|n| *n > 0);
    let window = keys.integer("attention.sliding_window")?.filter(|n| *n > 0);
    // llama.cpp writes Mistral and Mixtral as llama; transformers tells the former by its name.
    let mistral = metadata.text("general.name")?.is_some_and(|name| name.to_lowercase().contains("mistral"));
    let family = match architecture {
        "llama" if experts.is_some() => Family::Mixtral,
        "llama" if mistral || window.is_some() => Family::Mistral,
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        other => {
            return Err(Error::data(format!(
                "architecture \"{other}\" is not known; known are: llama, qwen2, qwen3"
            )));
        }
    };
    if let (Some(window), Family::Qwen2 | Family::Qwen3) = (window, family) {
        return Err(keys.refused("attention.sliding_window", window, "models without it"));
    }
    let rows = |name: &str| files.view(name).map(|view| view.shape.first().copied().unwrap_or(0));
    let vocab_size = rows(TOKEN_EMBEDDING)?;
    if let Some(said) = keys.integer("vocab_size")?.filter(|said| *said != vocab_size) {
        return Err(Error::data(format!(
            "`{architecture}.vocab_size` is {said}, and `{TOKEN_EMBEDDING}` has {vocab_size} rows"
        )));
    }
    let (hidden_size, heads) = (keys.needed("embedding_length")?, keys.needed("attention.head_count")?);
    let (key, value) = (keys.integer("attention.key_length")?, keys.integer("attention.value_length")?);
    let rotary = keys.integer("rope.dimension_count")?;
    if heads < 1 {
        return Err(Error::data(format!("`{architecture}.attention.head_count` is {heads}")));
    }
    let head_dim = key.or(rotary).unwrap_or(hidden_size / heads);
    for (name, said) in [("attention.value_length", value), ("rope.dimension_count", rotary)] {
        if let Some(said) = said.filter(|said| *said != head_dim) {
            return Err(keys.refused(name, said, &format!("{head_dim}, a head's size,")));
        }
    }
    let scaling = keys.key("rope.scaling.type");
    if let Some(kind) = metadata.text(&scaling)?.filter(|kind| *kind != "none" && *kind != "linear") {
        return Err(keys.refused("rope.scaling.type", kind, "none, and the table of a Llama 3,"));
    }
    let eps = keys.number("attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
        Error::data(format!("`{architecture}.attention.layer_norm_rms_epsilon` is missing in the metadata"))
    })?;
    let per_token = keys.integer("expert_used_count")?;
    let experts = match (experts, per_token) {
        (None, _) => None,
        (Some(_), None) => {
            return Err(Error::data(format!(
                "`{architecture}.expert_used_count` is missing in the metadata"
            )));
        }
        (Some(num_local_experts), Some(num_experts_per_tok)) => {
            Some(Experts { num_local_experts, num_experts_per_tok, router_aux_loss_coef: 0.001 })
        }
    };
    let mut shape = Shape {
        family,
        head: Head::Lm,
        vocab_size,
        hidden_size,
        intermediate_size: keys.needed("feed_forward_length")?,
        num_hidden_layers: keys.needed("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: keys.integer("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        max_position_embeddings: keys.needed("context_length")?,
        rms_norm_eps: eps,
        rope_theta: keys.number("rope.freq_base")?.unwrap_or(10000.0),
        rope_scaling: None,
        tie_word_embeddings: !files.views.contains_key(OUTPUT),
        initializer_range: 0.02,
        sliding_window: window,
        max_window_layers: 0,
        experts,
        features: family.features(),
    };
    shape.check().map_err(|e| Error::data(e.message))?;
    if files.views.contains_key(ROPE_FREQS) {
        let original = metadata.integer(&format!("{architecture}.rope.scaling.original_context_length"))?;
        shape.rope_scaling = scaling_of(files, &shape, original)?;
    }
    Ok(Read { warnings: keys.rest()?.into_iter().collect(), shape })
}

/// What a model's rotary frequencies are divided by, float32 `[head_dim / 2]`; none where they are as they are.
pub(super) fn rope_factors(shape: &Shape) -> Option<Vec<f32>> {
    let plain = Shape { rope_scaling: None, ..shape.clone() };
    shape.rope_scaling.as_ref()?;
    let pairs = inverse_frequencies(&plain).into_iter().zip(inverse_frequencies(shape));
    Some(pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect())
}

/// The scaling that the table of factors stands for: the file does not say how it was computed. All of Meta's models have
/// the same bounds.
fn scaling_of(files: &Source, shape: &Shape, original: Option<i64>) -> Result<Option<Llama3RopeScaling>> {
    let table: Vec<f32> = Vec::try_from(files.tensor(ROPE_FREQS)?.to_kind(tch::Kind::Float).view(-1))?;
    if table.iter().all(|factor| *factor == 1.0) {
        return Ok(None);
    }
    let factor = table.iter().fold(1f32, |most, factor| most.max(*factor));
    for original_max_position_embeddings in original.into_iter().chain([8192]) {
        let scaling = Llama3RopeScaling {
            factor: factor.into(),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings,
        };
        let scaled = Shape { rope_scaling: Some(scaling), ..shape.clone() };
        let factors = rope_factors(&scaled).unwrap_or_default();
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * b.abs();
        if scaled.check().is_ok() && factors.len() == table.len() && factors.iter().zip(&table).all(near) {
            return Ok(scaled.rope_scaling);
        }
    }
    Err(Error::data(format!(
        "`{ROPE_FREQS}` is another table of rotary factors than that of a Llama 3 (factor {factor}, bounds 1 and 4, 8192 \
         positions), which is not built"
    )))
}

/// The metadata of a shape.
pub(super) fn write(shape: &Shape, metadata: &mut Metadata) {
    let architecture = architecture(shape.family);
    let mut set = |key: &str, value: Value| metadata.set(format!("{architecture}.{key}"), value);
    for (key, n) in [
        ("block_count", shape.num_hidden_layers),
        ("context_length", shape.max_position_embeddings),
        ("embedding_length", shape.hidden_size),
        ("feed_forward_length", shape.intermediate_size),
        ("attention.head_count", shape.num_attention_heads),
        ("attention.head_count_kv", shape.num_key_value_heads),
        ("attention.key_length", shape.head_dim),
        ("attention.value_length", shape.head_dim),
        ("rope.dimension_count", shape.head_dim),
        ("vocab_size", shape.vocab_size),
    ] {
        set(key, Value::Integer(n));
    }
    set("attention.layer_norm_rms_epsilon", Value::Float(shape.rms_norm_eps));
    set("rope.freq_base", Value::Float(shape.rope_theta));
    if let Some(experts) = &shape.experts {
        set("expert_count", Value::Integer(experts.num_local_experts));
        set("expert_used_count", Value::Integer(experts.num_experts_per_tok));
    }
    if let Some(scaling) = &shape.rope_scaling {
        set("rope.scaling.original_context_length", Value::Integer(scaling.original_max_position_embeddings));
    }
    if let Some(window) = shape.sliding_window {
        set("attention.sliding_window", Value::Integer(window));
    }
}
