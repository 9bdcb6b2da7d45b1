//! RMS norms as a model has them.

use kernels::ops::{self, Gain};
use tch::Tensor;

use crate::config::shape::Shape;
use crate::error::Result;

/// y = x / rms(x) * (weight + offset); see [`ops::rms_norm`].
#[derive(Debug, Clone, Copy)]
pub(super) struct RmsNorm {
    eps: f64,
    offset: f64,
}

impl RmsNorm {
    pub(super) fn of(s: &Shape) -> RmsNorm {
        RmsNorm { eps: s.rms_norm_eps, offset: s.norm_offset() }
    }

    fn gain(self, weight: &Tensor) -> Gain<'_> {
        Gain { weight, offset: self.offset }
    }

    /// y: T [N, C] for x: T [N, C], and the statistics of its rows, A `[N]`.
    pub(super) fn forward(self, x: &Tensor, w: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok(ops::rms_norm(x, self.gain(w), self.eps)?)
    }

    /// y again from the saved statistics, to the bit.
    pub(super) fn again(self, x: &Tensor, w: &Tensor, rstd: &Tensor) -> Result<Tensor> {
        Ok(ops::rms_apply(x, self.gain(w), rstd)?)
    }

    /// The gradient of x, plus `residual`; adds to the weight's, A `[C]`.
    ///
    /// ```text
    /// n = x r, y = g n       for r = 1 / rms(x) of each row, g = weight + offset
    /// dweight += sum over rows of dy * n
    /// dx = r (g dy - n mean(g dy * n))       since dr/dx = -r^3 x / C
    /// ```
    pub(super) fn backward(
        self,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        rstd: &Tensor,
        residual: Option<&Tensor>,
        dw: &Tensor,
    ) -> Result<Tensor> {
        Ok(ops::rms_backward(dy, x, self.gain(w), rstd, residual, dw)?)
    }
}
