//! The LM head: per-token log-probabilities of labels, in chunks of tokens, so that the logits `[N, V]` of a batch
//! never exist at once, forward or backward; and the scalar head: a value of every token.

use kernels::ops;
use tch::{Kind, Tensor};

use crate::error::Result;
use crate::model::llama::Llama;

/// Elements of a chunk of logits: some 16 MB in float32 on a CPU, where it stays near the cache; 256 MB on a GPU. Large
/// vocabularies take more (see `chunk`).
const CHUNK_CPU: i64 = 4 << 20;
const CHUNK_GPU: i64 = 64 << 20;

/// The output projection of a Llama, tied or not.
pub struct LmHead;

/// Log-probabilities of labels, A `[N]` (0 where the label is negative), and entropies if they were asked for.
pub struct LogProbs {
    pub logprobs: Tensor,
    pub entropies: Option<Tensor>,
}

impl LmHead {
    /// The weight, T [V, C]; gathered until its group is released.
    fn weight(model: &mut Llama) -> Result<Tensor> {
        model.params.single(model.head_group())
    }

    /// Rows of a chunk, for `n` rows: at least 512, since every chunk reads the weight and adds to its whole gradient, and
    /// all of nearly one size.
    fn chunk(model: &Llama, n: i64) -> i64 {
        let elements = if model.params.device() == tch::Device::Cpu { CHUNK_CPU } else { CHUNK_GPU };
        let most = (elements / model.shape.vocab_size).max(512);
        let even = n / ((n + most - 1) / most).max(1);
        ((even + 63) / 64 * 64).max(64)
    }

    /// Log-probabilities (and entropies, in nats) of labels, without a backward. `hidden`: T [N, C]; `labels`: int64
    /// `[N]`, negative = left out.
    pub fn logprobs(
        model: &mut Llama,
        hidden: &Tensor,
        labels: &Tensor,
        entropies: bool,
    ) -> Result<LogProbs> {
        let weight = Self::weight(model)?;
        let n = hidden.size()[0];
        let chunk = Self::chunk(model, n);
        let new = || Tensor::zeros([n], (ops::accumulator(hidden.kind()), hidden.device()));
        let out = LogProbs { logprobs: new(), entropies: entropies.then(new) };
        for first in (0..n).step_by(chunk as usize) {
            let part = |t: &Tensor| t.narrow(0, first, chunk.min(n - first));
            let logits = part(hidden).mm(&weight.tr());
            let entropy = out.entropies.as_ref().map(part);
            ops::log_softmax(&logits, &part(labels), None, &part(&out.logprobs), entropy.as_ref())?;
        }
        let group = model.head_group();
        model.params.release(group);
        Ok(out)
    }

    /// A loss that is linear in the log-probabilities, sum(coef * logprob), with its gradient in the same pass: returns
    /// the log-probabilities A `[N]` and the gradient of `hidden`, T [N, C], and adds to the head's gradient, if it is trained. `coef`:
    /// A `[N]`. `last` is true in the last micro-batch of a step; a tied head's reduction is left to the embedding's
    /// backward.
    pub fn linear_loss(
        model: &mut Llama,
        hidden: &Tensor,
        labels: &Tensor,
        coef: &Tensor,
        last: bool,
    ) -> Result<(Tensor, Tensor)> {
        let group = model.head_group();
        let weight = Self::weight(model)?;
        let trains = model.params.trains(group);
        let (dweight, mut fresh) = match trains.then(|| model.params.grad(group)) {
            Some((flat, fresh)) => (Some(model.params.layout(group).specs[0].view(&flat)), fresh),
            None => (None, false),
        };
        let n = hidden.size()[0];
        let chunk = Self::chunk(model, n);
        let logprobs = Tensor::zeros([n], (coef.kind(), hidden.device()));
        let dhidden = Tensor::empty_like(hidden);
        for first in (0..n).step_by(chunk as usize) {
            let part = |t: &Tensor| t.narrow(0, first, chunk.min(n - first));
            let h = part(hidden);
            let logits = h.mm(&weight.tr());
            ops::log_softmax(&logits, &part(labels), Some(&part(coef)), &part(&logprobs), None)?;
            let dlogits = logits;
            let _ = dlogits.f_mm_out(&part(&dhidden), &weight)?;
            if let Some(dweight) = &dweight {
                ops::grad_weight(dweight, &dlogits, &h, fresh)?;
                fresh = false;
            }
        }
        model.params.release(group);
        if trains && !model.shape.tie_word_embeddings {
            model.params.reduce(group, last)?;
        }
        Ok((logprobs, dhidden))
    }

    /// The sum over tokens of the negative log-probabilities, and how many tokens count, without a backward.
    pub fn loss_sum(model: &mut Llama, hidden: &Tensor, labels: &Tensor) -> Result<(f64, i64)> {
        let logprobs = Self::logprobs(model, hidden, labels, false)?.logprobs;
        let count = labels.ge(0).sum(Kind::Int64).int64_value(&[]);
        Ok((-logprobs.sum(Kind::Double).double_value(&[]), count))
    }
}

/// The scalar head of reward models and critics: a linear layer of one row without a bias, and every token has a value.
pub struct ScoreHead;

impl ScoreHead {
    /// The values of hidden states, A `[N]`. `hidden`: T [N, C]. Products are summed in A, whatever T is.
    pub fn values(model: &mut Llama, hidden: &Tensor) -> Result<Tensor> {
        let group = model.head_group();
        let kind = ops::accumulator(hidden.kind());
        let weight = model.params.single(group)?.to_kind(kind);
        let values = hidden.to_kind(kind).f_mv(&weight.f_view([-1])?)?;
        model.params.release(group);
        Ok(values)
    }

    /// Given the gradient of the values, A `[N]`: returns that of `hidden`, T [N, C], and adds to the head's gradient, if it
    /// is trained. `last` is true in the last micro-batch of a step.
    pub fn backward(model: &mut Llama, hidden: &Tensor, dvalues: &Tensor, last: bool) -> Result<Tensor> {
        let group = model.head_group();
        let kind = ops::accumulator(hidden.kind());
        let weight = model.params.single(group)?.to_kind(kind);
        let dvalues = dvalues.f_view([-1, 1])?;
        let dhidden = dvalues.f_mm(&weight)?.to_kind(hidden.kind());
        model.params.release(group);
        if model.params.trains(group) {
            let (flat, fresh) = model.params.grad(group);
            let dweight = model.params.layout(group).specs[0].view(&flat);
            ops::grad_weight(&dweight, &dvalues, &hidden.to_kind(kind), fresh)?;
            model.params.reduce(group, last)?;
        }
        Ok(dhidden)
    }
}
