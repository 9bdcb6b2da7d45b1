//! The shape of a model of the Llama family: the keys of Hugging Face's `config.json` that decide its mathematics. The
//! presets are in [`super::presets`].

use serde::{Deserialize, Serialize};

use super::section::{choice, section};
use crate::error::{Error, Result};

choice! {
    /// The model family: how it differs from Llama, and how its `config.json` is written.
    pub enum Family {
        /// Llama 1, 2 and 3.
        Llama = "llama",
        /// With a sliding window.
        Mistral = "mistral",
        /// A mixture of experts instead of each MLP.
        Mixtral = "mixtral",
        /// Qwen 1, 2 and 2.5: bias on q, k and v.
        Qwen2 = "qwen2",
        /// RMS norm of each head's query and key before their rotation.
        Qwen3 = "qwen3",
        /// Norms before and after attention and MLP, softcaps, windows in every other block.
        Gemma2 = "gemma2",
        /// Text: windows in most blocks, with a rotary base of their own.
        Gemma3 = "gemma3",
        /// Norms only after attention and MLP; norms of whole queries and keys.
        Olmo2 = "olmo2",
        /// A Llama with fused projections.
        Phi3 = "phi3",
    }
}

/// Which of a query and key are normalised together, before their rotation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QkNorm {
    /// Neither.
    #[default]
    None,
    /// The D numbers of each head, with one weight for all heads.
    Head,
    /// All numbers of the projection.
    Projection,
}

/// What the gate of an MLP goes through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// x sigmoid(x); the MLP is a SwiGLU.
    #[default]
    Silu,
    /// The tanh form of GELU.
    GeluTanh,
}

/// Where the norms of a block are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norms {
    /// Before attention and MLP.
    #[default]
    Before,
    /// On what attention and MLP give, before it is added to the stream.
    After,
    /// On the inputs and on the outputs of attention and MLP.
    Both,
}

/// What a block of a model sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// The last `sliding_window` positions.
    SlidingAttention,
    /// All positions up to its own.
    FullAttention,
}

/// What a model computes differently from a Llama; the default is a Llama's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Features {
    /// q, k and v have a bias.
    pub attention_bias: bool,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// What the gate of the MLP goes through.
    pub activation: Activation,
    /// Where a block's norms are.
    pub norms: Norms,
    /// Norms multiply by 1 + weight.
    pub norm_offset: bool,
    /// Embeddings are multiplied by sqrt(C), rounded to their dtype.
    pub scale_embeddings: bool,
    /// c: scores s become c tanh(s / c).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_softcap: Option<f64>,
    /// The same of logits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit_softcap: Option<f64>,
    /// x: scores are multiplied by 1 / sqrt(x); none: D.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query_pre_attn_scalar: Option<i64>,
    /// What each block sees, where that is not said by `sliding_window` and `max_window_layers`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_types: Option<Vec<LayerType>>,
    /// The rotary base of blocks with a window, without scaling; none: that of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_local_theta: Option<f64>,
    /// The scalar head is two layers with a bias each, and a ReLU between them: reward models of ChatLearn.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub score_layers: bool,
    /// f: rotary positions are divided by f (`rope_scaling` of type `linear`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_linear_factor: Option<f64>,
}

impl Features {
    fn is_llamas(&self) -> bool {
        *self == Features::default()
    }
}

impl Family {
    /// What all models of the family have, beyond what their configurations say.
    pub fn features(self) -> Features {
        match self {
            Family::Qwen2 => Features { attention_bias: true, ..Features::default() },
            Family::Qwen3 => Features { qk_norm: QkNorm::Head, ..Features::default() },
            Family::Olmo2 => {
                Features { norms: Norms::After, qk_norm: QkNorm::Projection, ..Features::default() }
            }
            _ => Features::default(),
        }
    }
}

/// What is made of the hidden states.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Head {
    /// Logits of the next token.
    #[default]
    Lm,
    /// One number a token: reward models and critics.
    Score,
}

impl Head {
    fn is_lm(&self) -> bool {
        *self == Head::Lm
    }
}

section! {
    /// Rope scaling of type `llama3` (Llama 3.1 and later): low frequencies are divided by `factor`.
    pub struct Llama3RopeScaling {
        /// The divisor of low frequencies.
        factor: f64, POSITIVE => State;
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low frequencies.
        low_freq_factor: f64, POSITIVE => State;
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are unchanged; between the two it is
        /// interpolated.
        high_freq_factor: f64, POSITIVE => State;
        /// Positions of the original training.
        original_max_position_embeddings: i64, COUNT => State;
    }
    check Llama3RopeScaling::ordered
}

impl Llama3RopeScaling {
    fn ordered(&mut self) -> Result<(), String> {
        match self.high_freq_factor > self.low_freq_factor {
            true => Ok(()),
            false => Err("high_freq_factor must be above low_freq_factor".into()),
        }
    }
}

/// A mixture of experts: every token goes to the `num_experts_per_tok` experts that its router prefers (Jiang et al. 2024).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// E
    pub num_local_experts: i64,
    /// Experts of a token, k.
    pub num_experts_per_tok: i64,
    /// Weight of the load-balancing loss in pretraining.
    pub router_aux_loss_coef: f64,
}

/// Shape and constants of a model, under Hugging Face's names. C = `hidden_size`, H = `num_attention_heads`,
/// K = `num_key_value_heads`, D = `head_dim`, V = `vocab_size`, F = `intermediate_size` (of one expert, where there are
/// several).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// What it is called in `config.json`, and what that implies.
    #[serde(default)]
    pub family: Family,
    /// Of a language model, or of a reward model or critic.
    #[serde(default, skip_serializing_if = "Head::is_lm")]
    pub head: Head,
    /// V, rows of the embedding.
    pub vocab_size: i64,
    /// C, width of the hidden states.
    pub hidden_size: i64,
    /// F, width of the MLP, or of each expert.
    pub intermediate_size: i64,
    /// The number of blocks.
    pub num_hidden_layers: i64,
    /// H, query heads.
    pub num_attention_heads: i64,
    /// K, heads of keys and values; H is a multiple of it.
    pub num_key_value_heads: i64,
    /// D, width of a head.
    pub head_dim: i64,
    /// Positions that a sequence has at most.
    pub max_position_embeddings: i64,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies: pair i turns by `rope_theta^(-2i / D)` a position.
    pub rope_theta: f64,
    /// None: frequencies as the base says.
    #[serde(default, with = "super::json")]
    pub rope_scaling: Option<Llama3RopeScaling>,
    /// The LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    /// Positions that a position sees, itself included; none: all before it.
    #[serde(default)]
    pub sliding_window: Option<i64>,
    /// The first blocks, so many, see all positions in spite of `sliding_window`.
    #[serde(default)]
    pub max_window_layers: i64,
    /// None: one MLP a block.
    #[serde(default)]
    pub experts: Option<Experts>,
    /// What it computes differently from a Llama.
    #[serde(default, skip_serializing_if = "Features::is_llamas")]
    pub features: Features,
}

impl Shape {
    /// Of a checkpoint from before features were written: those of its family.
    pub fn complete(&mut self) {
        if self.features.is_llamas() {
            self.features = self.family.features();
        }
    }

    /// The offset of norms' weights.
    pub fn norm_offset(&self) -> f64 {
        if self.features.norm_offset { 1.0 } else { 0.0 }
    }

    /// What scores of attention are multiplied by.
    pub fn attention_scale(&self) -> f64 {
        1.0 / (self.features.query_pre_attn_scalar.unwrap_or(self.head_dim) as f64).sqrt()
    }

    /// The same shape with the rotary positions of blocks with a window, where those have their own.
    pub fn of_windows(&self) -> Option<Shape> {
        let rope_theta = self.features.rope_local_theta?;
        let features = Features { rope_local_theta: None, rope_linear_factor: None, ..self.features.clone() };
        Some(Shape { rope_theta, rope_scaling: None, features, ..self.clone() })
    }

    /// Numbers of the weights that normalise queries and keys; none where nothing does.
    pub fn qk_norm_sizes(&self) -> Option<[i64; 2]> {
        let d = self.head_dim;
        match self.features.qk_norm {
            QkNorm::None => None,
            QkNorm::Head => Some([d, d]),
            QkNorm::Projection => Some([self.num_attention_heads * d, self.num_key_value_heads * d]),
        }
    }

    /// The same trunk with a scalar head, which is tied to nothing.
    pub fn scored(&self) -> Shape {
        Shape { head: Head::Score, tie_word_embeddings: false, ..self.clone() }
    }

    /// The same shape, if it has an LM head.
    ///
    /// # Errors
    /// Of kind Data: a reward model or critic predicts no tokens.
    pub fn predicts(&self) -> Result<&Shape> {
        match self.head {
            Head::Lm => Ok(self),
            Head::Score => Err(Error::data(
                "the model has a scalar head (a reward model or critic): it predicts no tokens; take a model with an LM \
                 head",
            )),
        }
    }

    /// The sliding window of block `layer`, if it has one.
    pub fn window(&self, layer: i64) -> Option<i64> {
        self.sliding_window.filter(|_| match &self.features.layer_types {
            Some(types) => types.get(layer as usize) == Some(&LayerType::SlidingAttention),
            None => layer >= self.max_window_layers,
        })
    }

    /// Refuses shapes that no model of these families can have.
    pub fn check(&self) -> Result<()> {
        let mut positive = vec![
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        positive.extend(self.sliding_window.map(|w| ("sliding_window", w)));
        positive.extend(self.features.query_pre_attn_scalar.map(|x| ("query_pre_attn_scalar", x)));
        if let Some(e) = &self.experts {
            positive.push(("num_local_experts", e.num_local_experts));
            positive.push(("num_experts_per_tok", e.num_experts_per_tok));
        }
        for (name, value) in positive {
            if value <= 0 || value > i64::from(i32::MAX) {
                return Err(Error::config(format!(
                    "model: {name} is {value}; it must be at least 1 and at most {}",
                    i32::MAX
                )));
            }
        }
        let refuse = |why: String| Err(Error::config(format!("model: {why}")));
        if self.num_attention_heads % self.num_key_value_heads != 0 {
            return refuse(format!(
                "num_attention_heads ({}) must be a multiple of num_key_value_heads ({})",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if self.head == Head::Score && self.tie_word_embeddings {
            return refuse("a scalar head is tied to no embedding: tie_word_embeddings must be false".into());
        }
        if self.head_dim % 2 != 0 {
            return refuse(format!("head_dim is {}; rotary positions need an even number", self.head_dim));
        }
        if self.family == Family::Llama && self.sliding_window.is_some() {
            return refuse("a llama has no sliding_window".into());
        }
        if !(0..=self.num_hidden_layers).contains(&self.max_window_layers) {
            return refuse(format!(
                "max_window_layers is {}, of {} layers",
                self.max_window_layers, self.num_hidden_layers
            ));
        }
        if let Some(types) =
            self.features.layer_types.as_ref().filter(|t| t.len() as i64 != self.num_hidden_layers)
        {
            return refuse(format!(
                "layer_types has {} entries, of {} layers",
                types.len(),
                self.num_hidden_layers
            ));
        }
        match &self.experts {
            None if self.family == Family::Mixtral => refuse("a mixtral needs experts".into()),
            Some(_) if self.family != Family::Mixtral => refuse("only a mixtral has experts".into()),
            Some(e) if e.num_experts_per_tok > e.num_local_experts => refuse(format!(
                "num_experts_per_tok ({}) is more than num_local_experts ({})",
                e.num_experts_per_tok, e.num_local_experts
            )),
            Some(e) if !(e.router_aux_loss_coef >= 0.0 && e.router_aux_loss_coef.is_finite()) => {
                refuse(format!("router_aux_loss_coef is {}; it must be at least 0", e.router_aux_loss_coef))
            }
            _ => Ok(()),
        }
    }

    /// Numbers that the head makes of a hidden state.
    pub fn head_rows(&self) -> i64 {
        match self.head {
            Head::Lm => self.vocab_size,
            Head::Score => 1,
        }
    }

    /// Numbers in the matrices of one block's attention, and of its MLP with `experts` experts.
    fn matrices(&self, experts: i64) -> (i64, i64) {
        let c = self.hidden_size;
        let attention = 2 * c * self.head_dim * (self.num_attention_heads + self.num_key_value_heads);
        let router = self.experts.as_ref().map_or(0, |e| e.num_local_experts * c);
        (attention, router + experts * 3 * c * self.intermediate_size)
    }

    /// Number of parameters; tied embeddings count once.
    pub fn num_parameters(&self) -> i64 {
        let (c, d) = (self.hidden_size, self.head_dim);
        let (attention, mlp) = self.matrices(self.experts.as_ref().map_or(1, |e| e.num_local_experts));
        let mut vectors = if self.features.norms == Norms::Both { 4 * c } else { 2 * c };
        if self.features.attention_bias {
            vectors += (self.num_attention_heads + 2 * self.num_key_value_heads) * d;
        }
        vectors += self.qk_norm_sizes().map_or(0, |sizes| sizes.iter().sum());
        let head = match self.tie_word_embeddings {
            true => 0,
            // C + 1 rows, each with a bias.
            false if self.features.score_layers => (c + 1) * (c + 1),
            false => self.head_rows() * c,
        };
        self.vocab_size * c + head + self.num_hidden_layers * (attention + mlp + vectors) + c
    }

    /// Parameters that a decoding step does not read: an untied embedding, of which it takes one row a token.
    pub fn num_unread_parameters(&self) -> i64 {
        if self.tie_word_embeddings { 0 } else { self.vocab_size * self.hidden_size }
    }

    /// Floating-point operations of forward and backward for one token of a sequence of `length`: three times those of the
    /// forward. What is recomputed does not count.
    pub fn flops_per_token(&self, length: i64) -> f64 {
        let [products, attention] = self.forward_flops_per_token(length);
        3.0 * (products + attention)
    }

    /// Floating-point operations of a forward for one token of a sequence of `length`: of the products with weights, 2 for every
    /// weight that the token takes part in (of the experts: those that it goes to); and of attention, 4 for every channel of
    /// the heads and position that a query sees on average, half of the sequence without a window.
    pub fn forward_flops_per_token(&self, length: i64) -> [f64; 2] {
        let (attention, mlp) = self.matrices(self.experts.as_ref().map_or(1, |e| e.num_experts_per_tok));
        let products = self.num_hidden_layers * (attention + mlp) + self.head_rows() * self.hidden_size;
        let seen = |layer| {
            let (n, w) = (length as f64, self.window(layer).unwrap_or(length).min(length) as f64);
            w * (n - w / 2.0) / n
        };
        let seen: f64 = (0..self.num_hidden_layers).map(seen).sum();
        [2.0 * products as f64, 4.0 * (self.num_attention_heads * self.head_dim) as f64 * seen]
    }
}
