//! The second half of a block: a gated network (SwiGLU or GeGLU, Shazeer 2020), or a mixture of them.

use kernels::ops;
use tch::Tensor;

use crate::config::shape::Activation;
use crate::error::Result;
use crate::model::linear::{Linear, LinearGrad};
use crate::model::mixture::{Mixture, Routed};
use crate::model::shared_rows::{GatheredRows, SharedRows};

pub enum Mlp<L> {
    Dense(Dense<L>),
    Mixture(Mixture<L>),
}

/// down(activation(gate(x)) * up(x))
pub struct Dense<L> {
    /// [2F, C]
    pub gate_up: L,
    /// [C, F]
    pub down: L,
    pub activation: Activation,
}

/// activation(gate) * up, T [N, F], of the product of gate and up, T [N, 2F].
pub(super) fn gated(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(match activation {
        Activation::Silu => ops::swiglu(gate_up)?,
        Activation::GeluTanh => ops::geglu(gate_up)?,
    })
}

/// The gradient of [`gated`], in place: `gate_up` becomes its gradient, `da`, the output's, becomes the output.
pub(super) fn gated_backward(gate_up: &Tensor, da: &Tensor, activation: Activation) -> Result<()> {
    match activation {
        Activation::Silu => ops::swiglu_backward(gate_up, da)?,
        Activation::GeluTanh => ops::geglu_backward(gate_up, da)?,
    }
    Ok(())
}

/// What a forward keeps for its backward.
pub(super) enum MlpSaved {
    /// The product of gate and up, T [N, 2F]; none where it is computed again.
    Dense(Option<Tensor>),
    Mixture(Routed),
}

impl MlpSaved {
    /// Drops the products of gate and up, which are the largest part.
    pub(super) fn drop_gate_up(&mut self) {
        match self {
            MlpSaved::Dense(gate_up) => *gate_up = None,
            MlpSaved::Mixture(routed) => routed.gate_up = None,
        }
    }

    pub(super) fn routed(&self) -> Option<&Routed> {
        match self {
            MlpSaved::Dense(_) => None,
            MlpSaved::Mixture(routed) => Some(routed),
        }
    }
}

impl Dense<Linear> {
    /// x, and its product of gate and up, T [N, 2F].
    fn gate_up(&self, x: GatheredRows) -> Result<(Tensor, Tensor)> {
        x.product(self.gate_up.takes_rows_apart(), |x| self.gate_up.forward(x))
    }
}

impl Mlp<Linear> {
    /// The forward up to what its backward needs, for x: T [N, C]. `experts` are those that the tokens went to in an
    /// earlier forward of the same x; none: the router chooses.
    pub(super) fn begin(&self, x: GatheredRows, experts: Option<Tensor>) -> Result<MlpSaved> {
        Ok(match self {
            Mlp::Dense(net) => MlpSaved::Dense(Some(net.gate_up(x)?.1)),
            Mlp::Mixture(mixture) => MlpSaved::Mixture(mixture.begin(&x.finish()?, experts)?),
        })
    }

    /// The rest of the forward: the output, T [N, C], plus a residual; a tensor-parallel rank's part of the output.
    pub(super) fn finish(&self, saved: &MlpSaved, residual: Option<&Tensor>) -> Result<Tensor> {
        match (self, saved) {
            (Mlp::Dense(net), MlpSaved::Dense(Some(gate_up))) => {
                net.down.forward_onto(&gated(gate_up, net.activation)?, residual)
            }
            (Mlp::Mixture(mixture), MlpSaved::Mixture(routed)) => mixture.finish(routed, residual),
            _ => unreachable!("what begin() gave"),
        }
    }

    /// Given the output's gradient dy (T [N, C]) and the input x, adds to the gradients and returns the input's, T of this
    /// rank's rows. Collective over tensor-parallel ranks. `balance`: A [N, E], the gradient of the routers' probabilities that does not come from dy.
    ///
    /// ```text
    /// (g | u) = x Wgu^T              dWgu += (dg | du)^T x,        dx = (dg | du) Wgu
    /// a = activation(g) * u          dg = da * u * activation'(g), du = da * activation(g)
    /// y = a Wd^T                     dWd += dy^T a,                da = dy Wd
    /// ```
    pub(super) fn backward(
        &self,
        dy: GatheredRows,
        x: GatheredRows,
        saved: MlpSaved,
        grad: &Mlp<LinearGrad>,
        balance: Option<&Tensor>,
        rows: &SharedRows,
    ) -> Result<Tensor> {
        match (self, saved, grad) {
            (Mlp::Dense(net), MlpSaved::Dense(gate_up), Mlp::Dense(grad)) => {
                let (x, gate_up) = match gate_up {
                    Some(t) => (x, t),
                    None => net.gate_up(x).map(|(x, made)| (GatheredRows::here(x), made))?,
                }; // [N, C], [N, 2F]
                let apart = net.down.takes_rows_apart();
                let (dy, da) = dy.product(apart, |dy| net.down.backward_input(dy))?; // [N, C], [N, F]
                gated_backward(&gate_up, &da, net.activation)?;
                let (dgate_up, a) = (gate_up, da); // [N, 2F], [N, F], in the same memory
                net.down.backward_weight(&dy, &a, &grad.down)?;
                drop((a, dy));
                let dx = || net.gate_up.backward_input(&dgate_up); // [N, C]
                rows.sum_during(dx, || net.gate_up.backward_weight(&dgate_up, &x.finish()?, &grad.gate_up))
            }
            (Mlp::Mixture(mixture), MlpSaved::Mixture(routed), Mlp::Mixture(grad)) => {
                rows.sum(mixture.backward(&dy.finish()?, &x.finish()?, routed, grad, balance)?)
            }
            _ => unreachable!("weights, gradients and what was saved are of one kind"),
        }
    }
}
