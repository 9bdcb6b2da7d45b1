//! The scalar head: a value of every token.

use kernels::ops;
use tch::Tensor;

use crate::error::Result;
use crate::model::llama::Llama;

/// The scalar head of reward models and critics: a linear layer of one row without a bias, and every token has a value.
pub struct ScoreHead;

impl ScoreHead {
    /// The values of hidden states, A `[N]`. `hidden`: T [N, C]. Products are summed in A, whatever T is.
    pub fn values(model: &mut Llama, hidden: &Tensor) -> Result<Tensor> {
        let group = model.head_group();
        let kind = ops::accumulator(hidden.kind());
        let weight = model.params.single(group)?.to_kind(kind); // [1, C]; collective
        let values = hidden.to_kind(kind).f_mv(&weight.f_view([-1])?)?; // [N]
        model.params.release(group);
        Ok(values)
    }

    /// Given the gradient of the values, A `[N]`: returns that of `hidden`, T [N, C], and adds to the head's gradient, if it
    /// is trained.
    ///
    /// ```text
    /// v = h w^T       dh = dv w,  dw += dv^T h
    /// ```
    pub fn backward(model: &mut Llama, hidden: &Tensor, dvalues: &Tensor) -> Result<Tensor> {
        let group = model.head_group();
        let kind = ops::accumulator(hidden.kind());
        let weight = model.params.single(group)?.to_kind(kind); // [1, C]; collective
        let dvalues = dvalues.f_view([-1, 1])?; // [N, 1]
        let dhidden = dvalues.f_mm(&weight)?.to_kind(hidden.kind()); // [N, C]
        model.params.release(group);
        if let Some(dweight) = model.params.single_grad(group) {
            dweight.add_product(&dvalues, &hidden.to_kind(kind))?;
            model.params.reduce(group)?; // collective, overlaps the trunk's backward
        }
        Ok(dhidden)
    }
}
