//! The vocabulary over tensor-parallel ranks: each has some rows of embedding and LM head, and so some logits of every token.
//!
//! ```text
//! m = max over ranks of max z,   s = sum over ranks of sum exp(z - m),   log p_y = z_y - m - log s
//! H = log s - sum over ranks of sum exp(z - m) (z - m) / s
//! ```

use kernels::comm::ReduceOp;
use kernels::ops;
use tch::Tensor;

use crate::distributed::mesh::Axis;
use crate::error::Result;

/// This rank's rows of the vocabulary.
pub(super) struct VocabularyPart {
    /// All ranks that have some.
    tensor: Axis,
    /// The first, and how many there are on each rank, padding included.
    first: i64,
    pub(super) rows: i64,
    /// Tokens of the whole vocabulary.
    whole: i64,
}

/// The softmax of a chunk of logits.
struct Softmax {
    /// A [n, rows]: logits minus the largest of all ranks'; padding: -inf
    shifted: Tensor,
    /// A [n, rows]: exp of these
    exp: Tensor,
    /// A [n, 1]: their sum over all ranks
    sum: Tensor,
    /// A [n, 1]: the sum over all ranks of exp times shifted; none where it was not asked for
    product: Option<Tensor>,
    /// A [n, 1]: the label's shifted logit
    label: Tensor,
}

impl VocabularyPart {
    /// A vocabulary of `whole` tokens over the ranks of `tensor`.
    pub fn new(tensor: &Axis, whole: i64) -> VocabularyPart {
        let rows = (whole + tensor.size - 1) / tensor.size;
        VocabularyPart { tensor: tensor.clone(), first: tensor.rank * rows, rows, whole }
    }

    /// Whether this rank has all of it.
    pub fn is_whole(&self) -> bool {
        self.tensor.size == 1
    }

    /// ids (int64 `[N]`) as rows of this rank, 0 where another has them; and which it has, `[N]`.
    fn local(&self, ids: &Tensor) -> (Tensor, Tensor) {
        let rows = ids - self.first;
        let here = rows.ge(0).logical_and(&rows.lt(self.rows));
        (rows * &here, here)
    }

    /// This rank's part of the embedding's rows of ids (int64 `[N]`): T [N, C], of `weight`, T [rows, C]; zeros where another
    /// rank has an id.
    pub fn embed(&self, weight: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let (rows, here) = self.local(ids);
        let beyond = ids.lt(0).logical_or(&ids.ge(self.whole)).unsqueeze(-1);
        Ok((weight.f_index_select(0, &rows)? * here.unsqueeze(-1)).f_masked_fill(&beyond, f64::NAN)?)
    }

    /// The backward of [`VocabularyPart::embed`]: adds dx (T [N, C]) to the rows of `dweight`, A [rows, C].
    pub fn embed_backward(&self, dx: &Tensor, ids: &Tensor, dweight: &Tensor) -> Result<()> {
        let (rows, here) = self.local(ids);
        Ok(ops::embedding_backward(&(dx * here.unsqueeze(-1)), &rows, dweight)?)
    }

    /// Of logits T [n, rows] and labels int64 `[n]`, negative: none. Collective.
    fn softmax(&self, logits: &Tensor, labels: &Tensor, entropies: bool) -> Result<Softmax> {
        let mut shifted = logits.f_to_kind(ops::accumulator(logits.kind()))?; // [n, rows]
        if shifted.data_ptr() == logits.data_ptr() {
            shifted = shifted.copy();
        }
        let within = (self.whole - self.first).clamp(0, self.rows);
        if within < self.rows {
            let _ = shifted.narrow(1, within, self.rows - within).f_fill_(f64::NEG_INFINITY)?;
        }
        let largest = shifted.f_amax([1i64].as_slice(), true)?; // [n, 1]
        self.tensor.group.all_reduce(&largest, ReduceOp::Max)?.wait()?; // collective
        shifted -= &largest;
        let exp = shifted.exp(); // [n, rows]
        let sum_of = |t: &Tensor| t.f_sum_dim_intlist([1i64].as_slice(), true, None); // [n, 1]
        let (rows, here) = self.local(labels);
        let label = shifted.f_gather(1, &rows.unsqueeze(1), false)?; // [n, 1]
        // No product: what another rank's row 0 has may be -inf. A label beyond the vocabulary is no number, as in a whole one.
        let label = label.f_where_self(&here.unsqueeze(1), &label.zeros_like())?;
        let label = label.f_masked_fill(&labels.ge(self.whole).unsqueeze(1), f64::NAN)?;
        let mut sums = vec![sum_of(&exp)?, label];
        if entropies {
            // Where nothing is left of a probability, nothing is left of its logarithm's share.
            let product = (&exp * &shifted).f_where_self(&exp.gt(0.0), &exp)?; // [n, rows]
            sums.push(sum_of(&product)?);
        }
        let all = Tensor::f_cat(&sums, 1)?; // [n, 2 or 3]
        self.tensor.group.all_reduce(&all, ReduceOp::Sum)?.wait()?; // collective
        let column = |k: i64| all.narrow(1, k, 1); // [n, 1]
        Ok(Softmax { shifted, exp, sum: column(0), label: column(1), product: entropies.then(|| column(2)) })
    }

    /// What [`ops::log_softmax`] gives: into `logprobs` (and `entropies`), A `[n]`; with `coef`, A `[n]`, the logits T [n, rows]
    /// become the gradient of sum(coef * logprob), plus that of sum(of_entropies * entropy), of_entropies: A `[n]`. Collective.
    pub fn log_softmax(
        &self,
        logits: &Tensor,
        labels: &Tensor,
        gradients: Option<(&Tensor, Option<&Tensor>)>,
        logprobs: &Tensor,
        entropies: Option<&Tensor>,
    ) -> Result<()> {
        let of_entropies = gradients.and_then(|(_, of_entropies)| of_entropies);
        let s = self.softmax(logits, labels, entropies.is_some() || of_entropies.is_some())?;
        let log_sum = s.sum.log(); // [n, 1]
        let labelled = labels.ge(0).unsqueeze(1); // [n, 1]
        let mut out = logprobs.unsqueeze(1);
        out.f_copy_(&((&s.label - &log_sum) * &labelled))?;
        // [n, 1]
        let entropy = s.product.as_ref().map(|product| &log_sum - product / &s.sum);
        if let (Some(entropies), Some(entropy)) = (entropies, &entropy) {
            entropies.unsqueeze(1).f_copy_(entropy)?;
        }
        let Some((coef, of_entropies)) = gradients else { return Ok(()) };
        let p = s.exp / &s.sum; // [n, rows]
        let coef = coef.unsqueeze(1) * &labelled; // [n, 1]
        let (rows, here) = self.local(labels);
        let mut d = &p * -&coef; // [n, rows]
        d = d.f_scatter_add(1, &rows.unsqueeze(1), &(&coef * here.unsqueeze(1)))?;
        if let (Some(of), Some(entropy)) = (of_entropies, entropy) {
            // dH/dz = -p (log p + H)
            let logp = s.shifted - log_sum; // [n, rows]
            let of_entropy = &p * (logp + entropy) * -of.unsqueeze(1);
            d += of_entropy.f_where_self(&p.gt(0.0), &p)?;
        }
        logits.shallow_clone().f_copy_(&d)?;
        Ok(())
    }

    /// All logits, T [n, V], of this rank's, T [n, rows]. Collective.
    pub fn join(&self, logits: &Tensor) -> Result<Tensor> {
        let n = logits.size()[0];
        let all = Tensor::empty([self.tensor.size, n, self.rows], (logits.kind(), logits.device()));
        self.tensor.group.all_gather(&all.view([-1]), &logits.contiguous().view([-1]))?.wait()?; // collective
        let joined = all.transpose(0, 1).reshape([n, self.tensor.size * self.rows]);
        Ok(joined.narrow(1, 0, self.whole).contiguous())
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};
    use testing::ranks::on_ranks;
    use testing::tolerance::{Quantity, allowed};

    use super::*;
    use crate::model::head::entropy_backward;
    use crate::model::shared_rows::SharedRows;

    #[track_caller]
    fn near(what: &str, a: &Tensor, b: &Tensor) {
        let d = testing::compare::largest(a, b);
        assert!(d < allowed(Quantity::Autograd, Kind::Double), "{what}: {d:e}");
    }

    /// Numbers that are the same on every rank.
    fn numbers(seed: f64, size: &[i64]) -> Tensor {
        let n: i64 = size.iter().product();
        (Tensor::arange(n, (Kind::Double, Device::Cpu)) * (1.7 + seed) + seed).sin().view(size)
    }

    /// Embedding, log-probabilities, entropies and their gradients are those of one rank, also where a rank has only padding.
    #[test]
    fn parts_are_the_whole() {
        let (n, c) = (6, 4);
        for (v, ranks) in [(8, 2), (7, 2), (5, 4)] {
            on_ranks(ranks, |world| {
                let (weight, hidden, dx) =
                    (numbers(0.1, &[v, c]), numbers(0.2, &[n, c]), numbers(0.3, &[n, c]));
                let (coef, of_entropies) = (numbers(0.4, &[n]), numbers(0.5, &[n]));
                let labels = Tensor::from_slice(&[0i64, v - 1, -1, 2, 1, v - 1]);
                let ids = labels.clamp_min(0);
                let zeros = |size: &[i64]| Tensor::zeros(size, (Kind::Double, Device::Cpu));
                let (logprobs, entropies, dweight) = (zeros(&[n]), zeros(&[n]), zeros(&[v, c]));
                let logits = hidden.mm(&weight.tr());
                let of_entropy = entropy_backward(&logits, &of_entropies);
                let d = logits.copy();
                ops::log_softmax(&d, &labels, None, &logprobs, Some(&entropies)).unwrap();
                ops::log_softmax(&d, &labels, Some(&coef), &logprobs, None).unwrap();
                let d = d + of_entropy;
                ops::embedding_backward(&dx, &ids, &dweight).unwrap();

                let axis = Axis::of(world);
                let part = VocabularyPart::new(&axis, v);
                let rows = |t: &Tensor| {
                    let padded = t.constant_pad_nd([0, 0, 0, part.rows * axis.size - v]);
                    padded.narrow(0, part.first, part.rows)
                };
                let own = rows(&weight);
                let embedded = SharedRows::whole(&axis).sum(part.embed(&own, &ids).unwrap()).unwrap();
                near("embedding", &embedded, &weight.index_select(0, &ids));
                let own_gradient = own.zeros_like();
                part.embed_backward(&dx, &ids, &own_gradient).unwrap();
                near("its gradient", &own_gradient, &rows(&dweight));
                let own_logits = hidden.mm(&own.tr());
                near("logits", &part.join(&own_logits).unwrap(), &logits);
                let (p, e) = (zeros(&[n]), zeros(&[n]));
                part.log_softmax(&own_logits, &labels, None, &p, Some(&e)).unwrap();
                near("log-probabilities", &p, &logprobs);
                near("entropies", &e, &entropies);
                let gradients = Some((&coef, Some(&of_entropies)));
                part.log_softmax(&own_logits, &labels, gradients, &p, None).unwrap();
                near("log-probabilities with gradients", &p, &logprobs);
                near("gradients", &own_logits, &rows(&d.tr()).tr());
                let beyond = Tensor::from_slice(&[v]).repeat([n]);
                part.log_softmax(&hidden.mm(&own.tr()), &beyond, None, &p, None).unwrap();
                assert!(bool::try_from(p.isnan().all()).unwrap(), "a label beyond the vocabulary");
                assert!(bool::try_from(part.embed(&own, &beyond).unwrap().isnan().all()).unwrap());
            });
        }
    }
}
