//! The scalar head: a value of every token.

use kernels::ops;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::model::llama::Llama;

/// The scalar head of reward models and critics: a linear layer of one row without a bias, and every token has a value. Where a model
/// comes with two layers ([`SCORE_LAYERS`](crate::model::layout::SCORE_LAYERS)), these are used, and not trained.
pub struct ScoreHead;

impl ScoreHead {
    /// The values of hidden states, A `[N]`. `hidden`: T [N, C]. Products are summed in A, whatever T is.
    pub fn values(model: &mut Llama, hidden: &Tensor) -> Result<Tensor> {
        if model.shape.features.score_layers {
            return ScoreHead::values_of_layers(model, hidden);
        }
        let group = model.head_group();
        let kind = ops::accumulator(hidden.kind());
        let weight = model.params.single(group)?.to_kind(kind); // [1, C]; collective
        let values = hidden.to_kind(kind).f_mv(&weight.f_view([-1])?)?; // [N]
        model.params.release(group);
        Ok(values)
    }

    /// v = relu(h w1^T + b1) w2^T + b2
    fn values_of_layers(model: &mut Llama, hidden: &Tensor) -> Result<Tensor> {
        let group = model.head_group();
        let kind = ops::accumulator(hidden.kind());
        let full = model.params.full(group)?; // collective
        // In the order of `SCORE_LAYERS`.
        let part = |k: usize| -> Result<Tensor> {
            let piece = &model.params.pieces(group, k..k + 1)[0];
            Ok(model.params.dense(group, &full, piece)?.to_kind(kind))
        };
        let (w1, w2, b1, b2) = (part(0)?, part(1)?, part(2)?, part(3)?);
        let inner = b1.f_addmm(&hidden.to_kind(kind), &w1.f_tr()?)?.f_relu()?; // [N, C]
        let values = b2.f_addmm(&inner, &w2.f_tr()?)?.f_view([-1])?; // [N]
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
        if model.shape.features.score_layers {
            return Err(Error::failed("a scalar head of two layers is not trained"));
        }
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
