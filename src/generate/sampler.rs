//! The choice of the next token: greedy, or drawn after temperature, top-k and top-p, in transformers' order.
//!
//! A draw depends on (seed, sample, position) and the row's logits alone, never on the rows beside it.

use tch::{Device, Kind, Tensor};

use crate::data::rng::{Rng, mix};
use crate::error::{Error, Result};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the k most likely tokens, and what ties with the last of them; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability (Holtzman et al. 2020); 1: all.
    pub top_p: f64,
    pub seed: u64,
}

impl Sampling {
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

    /// Refuses values outside of their ranges.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            let t = self.temperature;
            return Err(Error::config(format!(
                "temperature is {t}; it must be 0 (greedy) or a positive number"
            )));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::config(format!("top-p is {}; it must be above 0 and at most 1", self.top_p)));
        }
        Ok(())
    }
}

/// A chosen token and its log-probability (nats) under the model itself: at temperature 1, with nothing cut off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    pub id: i64,
    pub logprob: f64,
}

/// Chooses a token a row. `logits`: T [rows, V]; `keys`: (sample, position) of each row.
///
/// # Errors
/// Logits that are not finite.
pub fn choose(logits: &Tensor, keys: &[(u64, u64)], sampling: &Sampling) -> Result<Vec<Choice>> {
    let kind = kernels::ops::accumulator(logits.kind());
    let logits = logits.to_kind(kind);
    let normalizers = doubles(&logits.logsumexp([-1i64].as_slice(), false))?;
    if normalizers.iter().any(|z| !z.is_finite()) {
        return Err(Error::failed(
            "the model's logits are not finite: its weights may be damaged, or have diverged",
        ));
    }
    let choice = |row: usize, id: i64, logit: f64| Choice { id, logprob: logit - normalizers[row] };
    if sampling.temperature == 0.0 {
        let (logits, ids) = logits.max_dim(-1, false);
        let (logits, ids) = (doubles(&logits)?, Vec::<i64>::try_from(ids.to_device(Device::Cpu))?);
        return Ok(ids
            .into_iter()
            .zip(logits)
            .enumerate()
            .map(|(row, (id, x))| choice(row, id, x))
            .collect());
    }
    let vocab_size = logits.size()[1] as usize;
    let rows = doubles(&logits.view([-1]))?;
    Ok(rows
        .chunks(vocab_size)
        .zip(keys)
        .enumerate()
        .map(|(row, (logits, &(sample, position)))| {
            let uniform = Rng::new(sampling.seed, "generate", mix(sample ^ mix(!position))).uniform();
            let id = draw(&distribution(logits, sampling), uniform);
            choice(row, id as i64, logits[id])
        })
        .collect())
}

fn doubles(t: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::<f64>::try_from(t.to_device(Device::Cpu).to_kind(Kind::Double).contiguous())?)
}

/// The tokens that may be drawn, by rising id, with their probabilities (sum 1).
pub fn distribution(logits: &[f64], sampling: &Sampling) -> Vec<(usize, f64)> {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weight = |x: f64| ((x - top) / sampling.temperature).exp();
    let mut threshold = f64::NEG_INFINITY;
    if (1..logits.len()).contains(&sampling.top_k) {
        let mut sorted = logits.to_vec();
        threshold = *sorted.select_nth_unstable_by(sampling.top_k - 1, |a, b| b.total_cmp(a)).1;
    }
    let likely = logits.iter().enumerate().filter(|(_, x)| **x >= threshold);
    let mut kept: Vec<(usize, f64)> = likely.map(|(id, x)| (id, weight(*x))).collect();
    if sampling.top_p < 1.0 {
        kept = nucleus(kept, sampling.top_p);
        // By id, so that a rounding of the logits that swaps two tokens moves no other token's place.
        kept.sort_unstable_by_key(|(id, _)| *id);
    }
    let sum: f64 = kept.iter().map(|(_, w)| w).sum();
    kept.iter_mut().for_each(|(_, w)| *w /= sum);
    kept
}

/// The most likely tokens until they reach the share `p` of all; the one that reaches it belongs to them.
fn nucleus(mut weights: Vec<(usize, f64)>, p: f64) -> Vec<(usize, f64)> {
    let likelier = |a: &(usize, f64), b: &(usize, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let needed = p * weights.iter().map(|(_, w)| w).sum::<f64>();
    // A nucleus is small next to a vocabulary: sort the likeliest few, and more only if they do not reach p.
    let mut head = 64;
    loop {
        if head < weights.len() {
            weights.select_nth_unstable_by(head, likelier);
        } else {
            head = weights.len();
        }
        weights[..head].sort_unstable_by(likelier);
        let mut sum = 0.0;
        let reached = weights[..head].iter().position(|(_, w)| {
            sum += w;
            sum >= needed
        });
        if let Some(last) = reached.or((head == weights.len()).then(|| head - 1)) {
            weights.truncate(last + 1);
            return weights;
        }
        head *= 8;
    }
}

/// The token at `uniform` (in [0, 1)) of the cumulative distribution.
fn draw(distribution: &[(usize, f64)], uniform: f64) -> usize {
    let mut sum = 0.0;
    let hit = distribution.iter().find(|(_, p)| {
        sum += p;
        uniform < sum
    });
    // Rounding may leave the sum a little below 1.
    let likely = || distribution.iter().rev().find(|(_, p)| *p > 0.0);
    hit.or_else(likely).map_or(0, |(id, _)| *id)
}
