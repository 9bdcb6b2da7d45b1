//! The LM head: per-token log-probabilities of labels, in chunks of tokens, so that the logits `[N, V]` of a batch
//! never exist at once, forward or backward.

use kernels::{ops, trace};
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::model::llama::Llama;
use crate::model::shared_rows::SharedRows;

/// Elements of a chunk of logits: some 16 MB in float32 on a CPU, where it stays near the cache; 0.5 GB in bfloat16 on a GPU, since
/// every chunk reads and writes the whole gradient of the weight. Large vocabularies take more (see `chunk`).
const CHUNK_CPU: i64 = 4 << 20;
const CHUNK_GPU: i64 = 256 << 20;

/// Rows of a chunk of logits of a vocabulary, for `n` rows on a device.
pub(crate) fn chunk(device: Device, vocab_size: i64, n: i64) -> i64 {
    let elements = if device == Device::Cpu { CHUNK_CPU } else { CHUNK_GPU };
    let most = (elements / vocab_size).max(512);
    let even = n / ((n + most - 1) / most).max(1);
    ((even + 63) / 64 * 64).max(64)
}

/// The output projection of a Llama, tied or not.
pub struct LmHead;

/// Log-probabilities of labels, A `[N]` (0 where the label is negative), and entropies if they were asked for; or a loss's
/// gradients with respect to them.
pub struct LogProbs {
    /// Of the labels, in nats, A `[N]`.
    pub logprobs: Tensor,
    /// Of the whole distributions, in nats, A `[N]`; none where they were not asked for.
    pub entropies: Option<Tensor>,
}

impl LmHead {
    /// The weight, T [V, C]; gathered until its group is released. Collective where it is sharded.
    fn weight(model: &mut Llama) -> Result<Tensor> {
        model.params.single(model.head_group())
    }

    /// Rows of a chunk, for `n` rows: at least 512, since every chunk reads the weight and adds to its whole gradient, and
    /// all of nearly one size.
    fn chunk(model: &Llama, n: i64) -> i64 {
        chunk(model.params.device(), model.vocabulary().rows, n)
    }

    /// Log-probabilities of labels (and entropies, in nats) of softmax(logits / temperature). Keeps nothing: see
    /// [`LmHead::backward`]. `hidden`: T [N, C]; `labels`: int64 `[N]`, negative = left out.
    pub fn logprobs(
        model: &mut Llama,
        hidden: &Tensor,
        labels: &Tensor,
        temperature: f64,
        entropies: bool,
    ) -> Result<LogProbs> {
        let _span = trace::computing(|| "head: forward".into());
        let (weight, softcap) = (Self::weight(model)?, model.shape.features.logit_softcap);
        let (n, vocabulary) = (hidden.size()[0], model.vocabulary());
        let chunk = Self::chunk(model, n);
        let new = || Tensor::zeros([n], (ops::accumulator(hidden.kind()), hidden.device()));
        let out = LogProbs { logprobs: new(), entropies: entropies.then(new) };
        for first in (0..n).step_by(chunk as usize) {
            let part = |t: &Tensor| t.narrow(0, first, chunk.min(n - first));
            let logits = logits(&part(hidden), &weight, softcap, temperature); // [chunk, V]
            let entropy = out.entropies.as_ref().map(part); // [chunk]
            let (labels, logprobs, entropy) = (part(labels), part(&out.logprobs), entropy.as_ref());
            match vocabulary.is_whole() {
                true => ops::log_softmax(&logits, &labels, None, &logprobs, entropy)?,
                false => vocabulary.log_softmax(&logits, &labels, None, &logprobs, entropy)?,
            }
        }
        let group = model.head_group();
        model.params.release(group);
        Ok(out)
    }

    /// The backward of [`LmHead::logprobs`] with the same `hidden`, `labels` and `temperature`, whose logits are computed
    /// again: from `gradients`, d loss / d log-probability (and d entropy), A `[N]`, the gradient of `hidden`, T [N, C].
    /// Adds to the head's gradient, if it is trained; of a tied head in one stage the reduction is left to the embedding's backward.
    pub fn backward(
        model: &mut Llama,
        hidden: &Tensor,
        labels: &Tensor,
        temperature: f64,
        gradients: &LogProbs,
    ) -> Result<Tensor> {
        let coef = &gradients.logprobs / temperature;
        let entropies = gradients.entropies.as_ref().map(|g| g / temperature);
        Ok(Self::run_backward(model, hidden, labels, &coef, entropies.as_ref(), temperature)?.1)
    }

    /// A loss that is linear in the log-probabilities, sum(coef * logprob), with its gradient in the same pass: returns
    /// the log-probabilities A `[N]` and the gradient of `hidden`, T [N, C], and adds to the head's gradient, if it is trained. `coef`:
    /// A `[N]`. Of a tied head in one stage the reduction is left to the embedding's backward.
    pub fn linear_loss(
        model: &mut Llama,
        hidden: &Tensor,
        labels: &Tensor,
        coef: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        Self::run_backward(model, hidden, labels, coef, None, 1.0)
    }

    /// `coef` and `entropies`: the loss's gradients, divided by the temperature t. For logits z = c tanh(h W^T / c) / t,
    /// p = softmax(z) and each token's label y:
    ///
    /// ```text
    /// dz / t = coef (onehot(y) - p) + entropies dH/dz       of log p_y and of the entropy H
    /// d  = (dz / t) (1 - tanh^2)                            of h W^T; without a cap dz / t
    /// dh = d W,  dW += d^T h
    /// ```
    fn run_backward(
        model: &mut Llama,
        hidden: &Tensor,
        labels: &Tensor,
        coef: &Tensor,
        entropies: Option<&Tensor>,
        temperature: f64,
    ) -> Result<(Tensor, Tensor)> {
        let _span = trace::computing(|| "head: forward and backward".into());
        let group = model.head_group();
        let (weight, softcap) = (Self::weight(model)?, model.shape.features.logit_softcap);
        let dweight = model.params.single_grad(group);
        let (n, vocabulary) = (hidden.size()[0], model.vocabulary());
        let rows = SharedRows::whole(&model.params.sharding().tensor);
        let chunk = Self::chunk(model, n);
        let logprobs = Tensor::zeros([n], (coef.kind(), hidden.device())); // [N]
        let dhidden = Tensor::empty_like(hidden); // [N, C]
        for first in (0..n).step_by(chunk as usize) {
            let part = |t: &Tensor| t.narrow(0, first, chunk.min(n - first));
            let h = part(hidden); // [chunk, C]
            let mut logits = logits(&h, &weight, softcap, temperature); // [chunk, V]
            // 1 - tanh^2, [chunk, V], of logits that the loss's gradient overwrites.
            let slope = softcap.map(|c| 1.0 - (&logits * (temperature / c)).square());
            let (labels, coef, logprobs) = (part(labels), part(coef), part(&logprobs));
            let entropies = entropies.map(part);
            if vocabulary.is_whole() {
                let of_entropy = entropies.map(|g| entropy_backward(&logits, &g)); // [chunk, V]
                ops::log_softmax(&logits, &labels, Some(&coef), &logprobs, None)?;
                if let Some(d) = of_entropy {
                    logits += d;
                }
            } else {
                let gradients = Some((&coef, entropies.as_ref()));
                vocabulary.log_softmax(&logits, &labels, gradients, &logprobs, None)?;
            }
            let dlogits = match slope {
                Some(slope) => logits * slope,
                None => logits,
            }; // [chunk, V]
            match vocabulary.is_whole() {
                true => drop(dlogits.f_mm_out(&part(&dhidden), &weight)?),
                false => part(&dhidden).f_copy_(&rows.sum(dlogits.f_mm(&weight)?)?)?,
            }
            if let Some(dweight) = &dweight {
                dweight.add_product(&dlogits, &h)?;
            }
        }
        model.params.release(group);
        if dweight.is_some() && !model.is_input_embedding(group) {
            model.params.reduce(group)?; // collective, overlaps the trunk's backward
        }
        Ok((logprobs, dhidden))
    }

    /// The sum over tokens of the negative log-probabilities, and how many tokens count, without a backward.
    pub fn loss_sum(model: &mut Llama, hidden: &Tensor, labels: &Tensor) -> Result<(f64, i64)> {
        let logprobs = Self::logprobs(model, hidden, labels, 1.0, false)?.logprobs;
        let count = labels.ge(0).sum(Kind::Int64).int64_value(&[]); // host sync
        Ok((-logprobs.sum(Kind::Double).double_value(&[]), count)) // host sync
    }
}

/// c tanh(logits / c), where there is a cap (Gemma 2).
pub(super) fn capped(logits: Tensor, softcap: Option<f64>) -> Tensor {
    match softcap {
        Some(c) => (logits / c).tanh() * c,
        None => logits,
    }
}

/// T [n, V], with their cap, divided by the temperature.
fn logits(hidden: &Tensor, weight: &Tensor, softcap: Option<f64>, temperature: f64) -> Tensor {
    let mut logits = capped(hidden.mm(&weight.tr()), softcap); // [n, V]
    if temperature != 1.0 {
        let _ = logits.g_mul_scalar_(1.0 / temperature);
    }
    logits
}

/// The gradient of sum(g * entropy): of H = -sum(p log p) it is -p (log p + H).
pub(super) fn entropy_backward(logits: &Tensor, g: &Tensor) -> Tensor {
    let logp = logits.log_softmax(-1, g.kind()); // [n, V]
    let p = logp.exp(); // [n, V]
    let entropy = -(&p * &logp).sum_dim_intlist([-1i64].as_slice(), true, None); // [n, 1]
    (p * (logp + entropy) * -g.unsqueeze(-1)).to_kind(logits.kind())
}
