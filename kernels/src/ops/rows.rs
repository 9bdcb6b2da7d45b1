//! The row operations as a trait, which the CPU's kernels, CUDA's, and libtorch's operations implement.

use tch::Tensor;

use super::spans::Spans;
use crate::error::Result;
use crate::tensors::{AdamW, Gain, Heads, KeysValues, Rotation};

/// Operations on rows. Shapes, dtypes and formulas are those of the functions of the same names in [`crate::ops`], which
/// choose the implementation by device and dtype. All tensors lie on one device; one that "is added to" or "becomes" is
/// written in place.
///
/// Errors: an implementation may refuse what it has no kernel for, and what does not fit.
pub trait RowOps {
    /// [`rms_norm`](crate::ops::rms_norm): y and rstd.
    fn rms_norm(&self, x: &Tensor, w: Gain, eps: f64) -> Result<(Tensor, Tensor)>;

    /// [`rms_apply`](crate::ops::rms_apply): y.
    fn rms_apply(&self, x: &Tensor, w: Gain, rstd: &Tensor) -> Result<Tensor>;

    /// [`rms_backward`](crate::ops::rms_backward): dx + residual; `dw` is added to.
    fn rms_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: Gain,
        rstd: &Tensor,
        residual: Option<&Tensor>,
        dw: &Tensor,
    ) -> Result<Tensor>;

    /// [`rope`](crate::ops::rope): heads of x are rotated in place.
    fn rope(&self, x: &Tensor, r: Rotation) -> Result<()>;

    /// [`attention`](crate::ops::attention): out and the logarithms of the softmax's denominators.
    fn attention(&self, qkv: &Tensor, spans: &Spans, h: Heads) -> Result<(Tensor, Tensor)>;

    /// [`attention_backward`](crate::ops::attention_backward): the gradient of qkv.
    fn attention_backward(
        &self,
        dout: &Tensor,
        qkv: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        spans: &Spans,
        h: Heads,
    ) -> Result<Tensor>;

    /// [`decode_attention`](crate::ops::decode_attention): out; the rows' keys and values are written to the caches.
    fn decode_attention(&self, qkv: &Tensor, cache: KeysValues, h: Heads) -> Result<Tensor>;

    /// [`swiglu`](crate::ops::swiglu): silu(g) * u.
    fn swiglu(&self, gu: &Tensor) -> Result<Tensor>;

    /// [`swiglu_backward`](crate::ops::swiglu_backward): `gu` becomes its gradient, `da` silu(g) * u.
    fn swiglu_backward(&self, gu: &Tensor, da: &Tensor) -> Result<()>;

    /// [`log_softmax`](crate::ops::log_softmax): `logp` and `entropy` are written; with `coef`, `logits` becomes its gradient.
    fn log_softmax(
        &self,
        logits: &Tensor,
        labels: &Tensor,
        coef: Option<&Tensor>,
        logp: &Tensor,
        entropy: Option<&Tensor>,
    ) -> Result<()>;

    /// [`adamw`](crate::ops::adamw): p, m and v are updated, `copy` is written.
    fn adamw(
        &self,
        p: &Tensor,
        g: &Tensor,
        m: &Tensor,
        v: &Tensor,
        copy: Option<&Tensor>,
        o: AdamW,
    ) -> Result<()>;

    /// [`sum_squares_of_all`](crate::ops::sum_squares_of_all).
    fn sum_squares(&self, tensors: &[&Tensor]) -> Result<f64>;

    /// [`dropout`](crate::ops::dropout): an element is 0 where its 32 random bits are below `threshold`, else x times `scale`.
    fn dropout(
        &self,
        x: &Tensor,
        rows: &Tensor,
        key: u64,
        threshold: u32,
        scale: f64,
        first: u32,
    ) -> Result<Tensor>;

    /// [`accumulate`](crate::ops::accumulate): `dst` is added to, or becomes `src`.
    fn accumulate(&self, dst: &Tensor, src: &Tensor, add: bool) -> Result<()>;

    /// [`embedding_backward`](crate::ops::embedding_backward): `dw` is added to.
    fn embedding_backward(&self, dx: &Tensor, ids: &Tensor, dw: &Tensor) -> Result<()>;
}
