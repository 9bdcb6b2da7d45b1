//! Tensors at the border to C++, and what operations and quantization both take.

use tch::{Kind, Tensor};

use crate::abi::Raw;

/// The C++ side may write to the data, not to the handle.
pub(crate) fn raw(t: &Tensor) -> Raw {
    t.as_ptr() as Raw
}

pub(crate) fn raw_opt(t: Option<&Tensor>) -> Raw {
    t.map_or(std::ptr::null_mut(), raw)
}

/// Takes over a tensor that the C++ side made with `new at::Tensor`.
pub(crate) fn own(t: Raw) -> Tensor {
    // SAFETY: `t` comes from `new at::Tensor` on the C++ side, which gives up its ownership.
    unsafe { Tensor::from_ptr(t) }
}

/// The dtype of statistics, gradients of weights and log-probabilities for a compute dtype.
pub fn accumulator(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// What a norm multiplies by: a weight, T `[C]`, plus a number. Gemma's weights are stored less 1: their offset is 1, others' 0.
#[derive(Debug, Clone, Copy)]
pub struct Gain<'a> {
    /// T `[C]`
    pub weight: &'a Tensor,
    /// Added to it.
    pub offset: f64,
}

/// What an attention works on: B rows, H query heads, K key-value heads, D numbers a head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// B
    pub batch: i64,
    /// H, a multiple of K.
    pub heads: i64,
    /// K
    pub kv_heads: i64,
    /// D
    pub head_dim: i64,
    /// What scores are multiplied by.
    pub scale: f64,
    /// c: scores s become c tanh(s / c) before the softmax (Gemma 2); composed on every device.
    pub softcap: Option<f64>,
}

impl Heads {
    /// With the usual scale, 1 / sqrt(D), and no cap.
    pub fn new(batch: i64, heads: i64, kv_heads: i64, head_dim: i64) -> Heads {
        Heads { batch, heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f64).sqrt(), softcap: None }
    }

    /// Scores with their cap, from scaled ones.
    pub fn cap(&self, scores: Tensor) -> Tensor {
        match self.softcap {
            Some(c) => (scores / c).tanh() * c,
            None => scores,
        }
    }
}

/// How far and where heads are rotated.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// int64 `[N]`: the row of the tables for each row.
    pub positions: &'a Tensor,
    /// A `[P, D/2]`
    pub cos: &'a Tensor,
    /// A `[P, D/2]`
    pub sin: &'a Tensor,
    /// How many heads, from the first column on.
    pub heads: i64,
    /// D
    pub head_dim: i64,
    /// Backwards, which is also the gradient.
    pub inverse: bool,
}

/// Keys and values of earlier tokens, and what each of B rows sees of them.
#[derive(Debug, Clone, Copy)]
pub struct KeysValues<'a> {
    /// T `[slots, K, capacity, D]`
    pub keys: &'a Tensor,
    /// T `[slots, K, capacity, D]`
    pub values: &'a Tensor,
    /// int64 `[B]`: each row's slot.
    pub slot: &'a Tensor,
    /// int64 `[B]`: where in the slot the row's new token stands, the last that it sees.
    pub position: &'a Tensor,
    /// int64 `[B]`: the first position that the row sees; none: 0.
    pub first: Option<&'a Tensor>,
    /// All positions are below it. On a GPU it decides the number of blocks, and a row beyond it gets NaN.
    pub longest: i64,
}

/// One AdamW step (Loshchilov and Hutter 2019, algorithm 2; PyTorch's order of operations).
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment, the mean of gradients.
    pub beta1: f64,
    /// Decay of the second moment, the mean of their squares.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Values are multiplied by 1 - lr * weight_decay first.
    pub weight_decay: f64,
    /// Number of this update, from 1: for the bias corrections.
    pub step: i64,
    /// The gradient is multiplied by this first (clipping).
    pub grad_scale: f64,
}

impl AdamW {
    /// 1 - beta^step: what the first and the second moment are divided by, which begin at zero.
    pub(crate) fn corrections(&self) -> [f64; 2] {
        [self.beta1, self.beta2].map(|beta| 1.0 - beta.powi(self.step as i32))
    }
}
