//! The keys of an architecture in the metadata: each is read, known to say nothing about the mathematics, refused, or told.

use crate::error::{Error, Result};
use crate::gguf::{Metadata, MetadataArray, MetadataValue};

/// Keys of the architecture that say nothing about the mathematics, or what others say, too.
const HARMLESS: [&str; 4] = [
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "expert_group_count",
];

/// Keys that change the mathematics unless they have this value.
const ONLY: [(&str, Neutral); 23] = [
    ("use_parallel_residual", Neutral::Bool(false)),
    ("attention.causal", Neutral::Bool(true)),
    ("attention.layer_norm_epsilon", Neutral::Absent),
    ("attention.max_alibi_bias", Neutral::Number(0.0)),
    ("attention.clamp_kqv", Neutral::Number(0.0)),
    ("attention.scale", Neutral::Absent),
    ("attention.q_lora_rank", Neutral::Absent),
    ("attention.kv_lora_rank", Neutral::Absent),
    ("attention.temperature_length", Neutral::Absent),
    ("attention.sliding_window", Neutral::Number(0.0)),
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
    ("rope.freq_base_swa", Neutral::Absent),
    ("rope.scaling.attn_factor", Neutral::Number(1.0)),
];

#[derive(Debug, Clone, Copy)]
enum Neutral {
    Bool(bool),
    Number(f64),
    Absent,
}

/// The architecture's keys, and which of them were read.
pub struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
    read: Vec<String>,
}

impl<'a> Keys<'a> {
    /// Those of `architecture`, of which none was read yet.
    pub(super) fn new(metadata: &'a Metadata, architecture: &'a str) -> Self {
        Keys { metadata, architecture, read: Vec::new() }
    }

    /// The whole name of a key, which counts as read.
    pub fn key(&mut self, key: &str) -> String {
        self.read.push(key.to_string());
        format!("{}.{key}", self.architecture)
    }

    /// A value of any type.
    pub fn value(&mut self, key: &str) -> Option<&'a MetadataValue> {
        let key = self.key(key);
        self.metadata.get(&key)
    }

    /// An integer, or a list with the same one for every block.
    pub fn integer(&mut self, key: &str) -> Result<Option<i64>> {
        let key = self.key(key);
        match self.metadata.get(&key) {
            Some(MetadataValue::Array(MetadataArray::Integers(list))) => match list.first() {
                Some(first) if list.iter().all(|n| n == first) => Ok(Some(*first)),
                _ => Err(Error::data(format!(
                    "`{key}` has different values in the blocks, which is not built"
                ))),
            },
            _ => self.metadata.integer(&key),
        }
    }

    /// An integer that must be there.
    pub(super) fn needed(&mut self, key: &str) -> Result<i64> {
        self.integer(key)?.ok_or_else(|| self.missing(key))
    }

    /// The error of a key that must be there.
    pub(super) fn missing(&self, key: &str) -> Error {
        Error::data(format!("`{}.{key}` is missing in the metadata", self.architecture))
    }

    /// A number, which may be an integer.
    pub fn number(&mut self, key: &str) -> Result<Option<f64>> {
        let key = self.key(key);
        self.metadata.number(&key)
    }

    /// A number that must be more than 0.
    pub fn positive(&mut self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if !(x > 0.0 && x.is_finite()) => Err(self.refused(key, x, "a number above 0")),
            number => Ok(number),
        }
    }

    /// The error of a key with a value that is not built; `only` is what is.
    pub fn refused(&self, key: &str, value: impl std::fmt::Display, only: &str) -> Error {
        let architecture = self.architecture;
        Error::data(format!(
            "`{architecture}.{key}` is {value}; that is not built: only {only} can be computed"
        ))
    }

    /// Refuses keys that change the mathematics; tells of those that are not known.
    pub(super) fn rest(&self) -> Result<Option<String>> {
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
                (Neutral::Bool(only), MetadataValue::Bool(b)) => (b == only, only.to_string()),
                (Neutral::Number(only), MetadataValue::Float(x)) => (x == only, format!("{only:?}")),
                (Neutral::Number(only), MetadataValue::Integer(n)) => {
                    (*n as f64 == *only, format!("{only:?}"))
                }
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
