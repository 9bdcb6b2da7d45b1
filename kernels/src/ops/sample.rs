//! The choice of the next token on a GPU, in one kernel.

use tch::{Kind, Tensor};

use crate::cuda::launch::{Launcher, matrix, need, pack, wide};
use crate::cuda::modules::Arg::{F32, I32, Tensor as T, U64};
use crate::cuda::takes_gpu_path;
use crate::error::{Error, Result};

/// What rows choose for, int64 `[rows]` each, on the logits' device.
#[derive(Debug)]
pub struct SampleRows<'a> {
    /// A sample's number: with the key and the position it decides the draw.
    pub sample: &'a Tensor,
    /// Tokens of the completion so far.
    pub position: &'a Tensor,
    /// Tokens that a completion has before one of `ends` is chosen.
    pub least: &'a Tensor,
}

/// How tokens are chosen.
#[derive(Debug, Clone, Copy)]
pub struct SampleOptions {
    /// Of the run's random numbers.
    pub key: u64,
    /// Divides the logits; 0: the likeliest token.
    pub temperature: f64,
    /// Only the k likeliest; 0: all.
    pub top_k: usize,
    /// Only the likeliest that together reach it; 1: all.
    pub top_p: f64,
}

/// Whether [`sample`] takes these logits.
pub fn samples(logits: &Tensor) -> bool {
    takes_gpu_path(logits.device()) && matches!(logits.kind(), Kind::Float | Kind::BFloat16)
}

/// Chooses a token a row, without waiting for the device. `logits`: float32 or bfloat16 [rows, V]; `ends`: int64, what a row
/// with too few tokens does not choose. `ids` (int64 `[rows]`) becomes the choices, `table` (float32 [rows, 4]) them, their
/// log-probabilities under the model, under what they were drawn from (0 where greedy), and the logarithm of the softmax's
/// denominator. With `next`, the rows' positions go up by one.
///
/// # Errors Tensors that do not fit, and those that [`samples`] does not take.
pub fn sample(
    logits: &Tensor,
    rows: &SampleRows,
    ends: &Tensor,
    options: SampleOptions,
    [ids, table]: [&Tensor; 2],
    next: bool,
) -> Result<()> {
    let (n, v) = matrix("sample", logits)?;
    let int = |name, t| (name, t, Kind::Int64, n);
    need(
        "sample",
        &[
            ("logits", logits, logits.kind(), n * v),
            int("sample", rows.sample),
            int("position", rows.position),
            int("least", rows.least),
            int("ids", ids),
            ("ends", ends, Kind::Int64, ends.numel() as i64),
            ("table", table, Kind::Float, n * 4),
        ],
    )?;
    if !(options.temperature >= 0.0 && options.top_p > 0.0) || v < 1 {
        return Err(Error::new(format!("sample: {options:?} over {v} logits")));
    }
    let args = [
        T(logits),
        T(rows.sample),
        T(rows.position),
        T(rows.least),
        T(ends),
        T(ids),
        T(table),
        U64(options.key),
        F32(options.temperature as f32),
        F32(options.top_p as f32),
        I32(options.top_k.min(v as usize) as i32),
        I32(ends.numel() as i32),
        I32(v as i32),
        I32(next as i32),
        wide(v, pack(logits), &[logits]),
    ];
    // SAFETY: block r reads row r of logits and element r of the rows' tensors, and writes element r of ids and position and
    // row r of table; ids of `ends` are only compared.
    unsafe { Launcher::sample(logits)?.launch("sample", n, [1024, 1], 0, &args) }
}
