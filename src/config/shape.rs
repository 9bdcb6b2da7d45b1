//! The shape of a Llama: the keys of Hugging Face's `config.json` that decide its mathematics, and the presets.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// `rope_scaling` of type `llama3` (Llama 3.1 and later): low frequencies are slowed down by `factor`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Llama3RopeScaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: i64,
}

/// Shape and constants of a Llama, under Hugging Face's names. C = `hidden_size`, H = `num_attention_heads`,
/// K = `num_key_value_heads`, D = `head_dim`, V = `vocab_size`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    pub num_key_value_heads: i64,
    pub head_dim: i64,
    pub max_position_embeddings: i64,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: Option<Llama3RopeScaling>,
    pub tie_word_embeddings: bool,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
}

impl Shape {
    /// A preset by name, with the shapes of the benchmark table (`llama-15m`, `llama-42m`, `llama-110m`) or of
    /// the published model (`llama-1b` is Llama-3.2-1B).
    pub fn preset(name: &str) -> Option<Shape> {
        let small = |hidden_size, layers, heads, intermediate_size, vocab_size, positions| Shape {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: hidden_size / heads,
            max_position_embeddings: positions,
            rms_norm_eps: 1e-5,
            rope_theta: 10000.0,
            rope_scaling: None,
            tie_word_embeddings: false,
            initializer_range: 0.02,
        };
        Some(match name {
            "llama-15m" => small(288, 6, 6, 768, 4096, 256),
            "llama-42m" => small(512, 8, 8, 1376, 8192, 512),
            "llama-110m" => small(768, 12, 12, 2048, 32000, 1024),
            "llama-1b" => Shape {
                vocab_size: 128256,
                hidden_size: 2048,
                intermediate_size: 8192,
                num_hidden_layers: 16,
                num_attention_heads: 32,
                num_key_value_heads: 8,
                head_dim: 64,
                max_position_embeddings: 131072,
                rms_norm_eps: 1e-5,
                rope_theta: 500000.0,
                rope_scaling: Some(Llama3RopeScaling {
                    factor: 32.0,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position_embeddings: 8192,
                }),
                tie_word_embeddings: true,
                initializer_range: 0.02,
            },
            _ => return None,
        })
    }

    pub const PRESETS: [&'static str; 4] = ["llama-15m", "llama-42m", "llama-110m", "llama-1b"];

    /// Refuses shapes that no Llama can have.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (name, value) in positive {
            if value <= 0 || value > i64::from(i32::MAX) {
                return Err(Error::config(format!(
                    "model: {name} is {value}; it must be at least 1 and at most {}",
                    i32::MAX
                )));
            }
        }
        if self.num_attention_heads % self.num_key_value_heads != 0 {
            return Err(Error::config(format!(
                "model: num_attention_heads ({}) must be a multiple of num_key_value_heads ({})",
                self.num_attention_heads, self.num_key_value_heads
            )));
        }
        if self.head_dim % 2 != 0 {
            return Err(Error::config(format!(
                "model: head_dim is {}; rotary positions need an even number",
                self.head_dim
            )));
        }
        Ok(())
    }

    /// Number of parameters; tied embeddings count once.
    pub fn num_parameters(&self) -> i64 {
        let (c, d) = (self.hidden_size, self.head_dim);
        let attention = 2 * c * d * (self.num_attention_heads + self.num_key_value_heads);
        let block = attention + 3 * c * self.intermediate_size + 2 * c;
        let embeddings = self.vocab_size * c * if self.tie_word_embeddings { 1 } else { 2 };
        embeddings + self.num_hidden_layers * block + c
    }

    /// Floating-point operations of forward and backward for one token of a sequence of `length`: 6 for every weight of a
    /// product, and 6 `length` for every channel of the heads in causal attention, which sees half of the positions on
    /// average. What is recomputed does not count.
    pub fn flops_per_token(&self, length: i64) -> f64 {
        let vectors = (2 * self.num_hidden_layers + 1) * self.hidden_size;
        let embedding = if self.tie_word_embeddings { 0 } else { self.vocab_size * self.hidden_size };
        let products = self.num_parameters() - vectors - embedding;
        let attention = self.num_hidden_layers * self.num_attention_heads * self.head_dim * length;
        6.0 * (products + attention) as f64
    }
}
