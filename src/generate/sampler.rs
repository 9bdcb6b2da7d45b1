//! The choice of the next token: greedy, or drawn after temperature, top-k and top-p, in transformers' order.
//!
//! A draw depends on (seed, sample, position) and the row's logits alone, never on the rows beside it. All is computed on
//! the logits' device, all rows together; what comes back is a few numbers a row.

use kernels::ops::{self, SampleOptions, SampleRows};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::random::{Rng, mix};

/// What the random numbers are for, see [`Rng`].
const PURPOSE: &str = "generate";

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the k most likely tokens, and what ties with the last of them; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability (Holtzman et al. 2020), and what ties with the
    /// last of them; 1: all.
    pub top_p: f64,
    /// With the sample's number and the token's position it decides each draw.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token, always.
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

/// What a row's next token is drawn for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// Keys the random number, with the seed and the position.
    pub sample: u64,
    /// Tokens of the completion so far.
    pub position: u64,
    /// Tokens that the completion has at least: before, none of those that end a row is chosen.
    pub least: u64,
}

impl Draw {
    /// Whether one of the tokens that end a row may be chosen.
    fn may_end(&self) -> bool {
        self.position + 1 >= self.least
    }

    pub(super) fn least_i64(&self) -> i64 {
        self.least.min(i64::MAX as u64) as i64
    }
}

/// A chosen token with its log-probabilities, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The token.
    pub id: i64,
    /// Under the model itself: at temperature 1, with nothing cut off.
    pub logprob: f64,
    /// Under the distribution that it was drawn from; 0 where the choice was greedy.
    pub sampler_logprob: f64,
}

/// Chooses a token a row. `logits`: T [rows, V]; `eos`: what a row with fewer than `least` tokens does not choose.
///
/// # Errors
/// Logits that are not finite.
pub fn choose(logits: &Tensor, draws: &[Draw], eos: &[i64], sampling: &Sampling) -> Result<Vec<Choice>> {
    if ops::samples(logits) {
        return choose_on_gpu(logits, draws, eos, sampling);
    }
    let logits = logits.to_kind(kernels::ops::accumulator(logits.kind()));
    let normalizers = logits.logsumexp([-1i64].as_slice(), true);
    let allowed = without_ends(&logits, draws, eos);
    let (ids, sampler_logprobs) = if sampling.temperature == 0.0 {
        let ids = allowed.argmax(-1, true);
        (ids.shallow_clone(), ids.zeros_like().to_kind(Kind::Double))
    } else {
        let probabilities = probabilities(&allowed, sampling);
        let ids = draw(&probabilities, draws, sampling.seed);
        let drawn = probabilities.gather(-1, &ids, false).log();
        (ids, drawn)
    };
    let logprobs = logits.gather(-1, &ids, false).to_kind(Kind::Double) - &normalizers.to_kind(Kind::Double);
    // One transfer for all; ids are exact in float64.
    let table = Tensor::cat(&[ids.to_kind(Kind::Double), logprobs, sampler_logprobs, normalizers], -1);
    choices(&table.to_device(Device::Cpu))
}

/// Rows of choices, their log-probabilities under the model and under what they were drawn from, and the logarithm of the
/// softmax's denominator: [rows, 4] on the CPU.
///
/// # Errors Logits that were not finite.
pub(super) fn choices(table: &Tensor) -> Result<Vec<Choice>> {
    let table = Vec::<f64>::try_from(table.to_kind(Kind::Double).reshape([-1]))?;
    if table.chunks(4).any(|row| !row[3].is_finite()) {
        return Err(Error::failed(
            "the model's logits are not finite: its weights may be damaged, or have diverged",
        ));
    }
    let choice = |row: &[f64]| Choice { id: row[0] as i64, logprob: row[1], sampler_logprob: row[2] };
    Ok(table.chunks(4).map(choice).collect())
}

/// As the kernel of a GPU takes it.
pub(super) fn gpu_options(sampling: &Sampling) -> SampleOptions {
    let Sampling { temperature, top_k, top_p, seed } = *sampling;
    SampleOptions { key: Rng::key(seed, PURPOSE), temperature, top_k, top_p }
}

/// [`choose`] in one kernel, in float32.
fn choose_on_gpu(logits: &Tensor, draws: &[Draw], eos: &[i64], sampling: &Sampling) -> Result<Vec<Choice>> {
    let (rows, device) = (draws.len() as i64, logits.device());
    let numbers: Vec<i64> = draws
        .iter()
        .map(|d| d.sample as i64)
        .chain(draws.iter().map(|d| d.position as i64))
        .chain(draws.iter().map(Draw::least_i64))
        .collect();
    let numbers = ops::upload(&Tensor::from_slice(&numbers).view([3, rows]), device)?;
    let [sample, position, least] = [0, 1, 2].map(|i| numbers.select(0, i));
    let ids = Tensor::empty([rows], (Kind::Int64, device));
    let table = Tensor::empty([rows, 4], (Kind::Float, device));
    let rows = SampleRows { sample: &sample, position: &position, least: &least };
    let ends = ops::upload(&Tensor::from_slice(eos), device)?;
    ops::sample(&logits.contiguous(), &rows, &ends, gpu_options(sampling), [&ids, &table], false)?;
    choices(&table.to_device(Device::Cpu)) // host sync
}

/// The logits, with -inf for `eos` in the rows that may not end.
fn without_ends(logits: &Tensor, draws: &[Draw], eos: &[i64]) -> Tensor {
    let ends: Vec<i64> = eos.iter().copied().filter(|id| (0..logits.size()[1]).contains(id)).collect();
    if ends.is_empty() || draws.iter().all(Draw::may_end) {
        return logits.shallow_clone();
    }
    let device = logits.device();
    let keeps: Vec<bool> = draws.iter().map(|d| !d.may_end()).collect();
    let rows = Tensor::from_slice(&keeps).to_device(device).unsqueeze(1);
    let mut columns = Tensor::zeros([1, logits.size()[1]], (Kind::Bool, device));
    let _ = columns.index_fill_(1, &Tensor::from_slice(&ends).to_device(device), 1);
    logits.masked_fill(&rows.logical_and(&columns), f64::NEG_INFINITY)
}

/// What tokens are drawn from: float64 [rows, V], each row's sum 1. `logits`: [rows, V]; the temperature must not be 0.
pub fn probabilities(logits: &Tensor, sampling: &Sampling) -> Tensor {
    let vocab_size = logits.size()[1];
    let mut scaled = logits.to_kind(Kind::Double) / sampling.temperature;
    if (1..vocab_size).contains(&(sampling.top_k as i64)) {
        let kept = scaled.topk(sampling.top_k as i64, -1, true, true).0;
        scaled = scaled.masked_fill(&scaled.lt_tensor(&kept.narrow(1, -1, 1)), f64::NEG_INFINITY);
    }
    let all = scaled.softmax(-1, Kind::Double);
    if sampling.top_p >= 1.0 {
        return all;
    }
    // A nucleus is small next to a vocabulary: the likeliest few are sorted, and more only if they do not reach top_p.
    let mut head = 64.min(vocab_size);
    let last = loop {
        let likeliest = all.topk(head, -1, true, true).0;
        let before = likeliest.cumsum(-1, Kind::Double).lt(sampling.top_p);
        let count = before.sum_dim_intlist([-1i64].as_slice(), true, Kind::Int64);
        if head == vocab_size || count.max().int64_value(&[]) < head {
            break likeliest.gather(-1, &count.clamp_max(head - 1), false);
        }
        head = (8 * head).min(vocab_size);
    };
    let nucleus = all.masked_fill(&all.lt_tensor(&last), 0.0);
    let sum = nucleus.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
    nucleus / sum
}

/// The token at each row's uniform number in the cumulative distribution by rising id: int64 [rows, 1].
fn draw(probabilities: &Tensor, draws: &[Draw], seed: u64) -> Tensor {
    let uniform = |d: &Draw| Rng::new(seed, PURPOSE, mix(d.sample ^ mix(!d.position))).uniform();
    let uniform: Vec<f64> = draws.iter().map(uniform).collect();
    let uniform = Tensor::from_slice(&uniform).to_device(probabilities.device()).unsqueeze(1);
    let cumulative = probabilities.cumsum(-1, Kind::Double);
    // Below the sum, whatever rounding left of it, lies a token with a probability above 0.
    let sum = cumulative.narrow(1, -1, 1);
    let place = (uniform * &sum).minimum(&(&sum * (1.0 - f64::EPSILON)));
    let ids = place.searchsorted(&cumulative, false, true, "right", None::<Tensor>);
    // What is not finite is told by the caller.
    ids.clamp_max(probabilities.size()[1] - 1)
}
