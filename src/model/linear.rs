//! A linear layer as a block sees it: its products forward and backward, whatever its weight is made of.
//!
//! Shapes: N tokens, I inputs, O outputs; T is the compute dtype, A that of gradients (see [`ops::accumulator`]).

use kernels::ops;
use tch::Tensor;

use crate::error::Result;

/// y = x W^T + b. Layers that read the same input lie in one another's rows (q, k, v; gate, up), so that they are one
/// product.
pub struct Linear {
    /// T [O, I]
    weight: Tensor,
    /// T `[O]`
    bias: Option<Tensor>,
}

/// Where the gradients of a [`Linear`] go; what is none gets no gradient.
#[derive(Default)]
pub struct LinearGrad {
    /// A [O, I]: undefined before the first product of a step, which sets it
    pub weight: Option<Tensor>,
    /// A `[O]`: zero before the first product of a step
    pub bias: Option<Tensor>,
}

impl Linear {
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Linear {
        Linear { weight, bias }
    }

    /// x: T [N, I]. Returns T [N, O].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::linear(x, &self.weight, self.bias.as_ref())?)
    }

    /// residual (T [N, O]) + [`Linear::forward`], in one pass where there is no bias.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let mut y = ops::linear(x, &self.weight, Some(residual))?;
        if let Some(bias) = &self.bias {
            let _ = y.f_add_(bias)?;
        }
        Ok(y)
    }

    /// Given the output's gradient dy (T [N, O]) and the input x (T [N, I]), adds to the gradients, or sets the
    /// weight's where `fresh`, and returns the input's gradient, T [N, I].
    pub fn backward(&self, dy: &Tensor, x: &Tensor, grad: &LinearGrad, fresh: bool) -> Result<Tensor> {
        self.backward_weight(dy, x, grad, fresh)?;
        self.backward_input(dy)
    }

    /// The half of [`Linear::backward`] that gives the input's gradient.
    pub fn backward_input(&self, dy: &Tensor) -> Result<Tensor> {
        Ok(dy.f_mm(&self.weight)?)
    }

    /// The half of [`Linear::backward`] that adds to the gradients: for callers that have x only after the other half,
    /// or free it between the two.
    pub fn backward_weight(&self, dy: &Tensor, x: &Tensor, grad: &LinearGrad, fresh: bool) -> Result<()> {
        if let Some(dw) = &grad.weight {
            ops::grad_weight(dw, dy, x, fresh)?;
        }
        if let Some(db) = &grad.bias {
            let sum = dy.f_sum_dim_intlist([0i64].as_slice(), false, ops::accumulator(dy.kind()))?;
            let _ = db.shallow_clone().f_add_(&sum)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    /// Forward and backward against libtorch's autograd in float64, twice: the first sets the gradients, the second adds.
    #[test]
    fn products_are_those_of_autograd() {
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let near = |a: &Tensor, b: &Tensor| {
            let d = (a - b).abs().max().double_value(&[]);
            assert!(d < 1e-12, "{d:e}");
        };
        for with_bias in [false, true] {
            let (x, w, b, residual) =
                (random(&[5, 3]), random(&[4, 3]), with_bias.then(|| random(&[4])), random(&[5, 4]));
            let dy = Tensor::randn([5, 4], (Kind::Double, Device::Cpu));
            let expected = x.linear(&w, b.as_ref()) + &residual;
            (&expected * &dy).sum(Kind::Double).backward();

            let layer = Linear::new(w.detach(), b.as_ref().map(Tensor::detach));
            near(&layer.forward_add(&x.detach(), &residual.detach()).unwrap(), &expected.detach());
            let plain = layer.forward(&x.detach()).unwrap();
            near(&plain, &(&expected - &residual).detach());
            let undefined = Tensor::full_like(&w.detach(), f64::NAN);
            let zero = b.as_ref().map(|b| b.detach().zeros_like());
            let grad = LinearGrad { weight: Some(undefined), bias: zero };
            for times in [1.0, 2.0] {
                let dx = layer.backward(&dy, &x.detach(), &grad, times == 1.0).unwrap();
                near(&dx, &x.grad());
                near(grad.weight.as_ref().unwrap(), &(w.grad() * times));
                if let Some(b) = &b {
                    near(grad.bias.as_ref().unwrap(), &(b.grad() * times));
                }
            }
            near(&layer.backward(&dy, &x.detach(), &LinearGrad::default(), true).unwrap(), &x.grad());
        }
    }
}
