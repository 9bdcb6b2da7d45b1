//! A linear layer as a block sees it: its products forward and backward, whatever its weight is made of.
//!
//! Shapes: N tokens, I inputs, O outputs; T is the compute dtype, A that of gradients (see [`ops::accumulator`]).

use std::cell::RefCell;
use std::rc::Rc;

use kernels::ops::{self, Float8, Float8Weight, WeightGrad};
use kernels::quant;
use tch::Tensor;

use crate::distributed::frozen::FrozenValue;
use crate::error::{Error, Result};

/// y = x W^T + b, and for every adapter `y[rows]` += scale * B A dropout(x) (Hu et al. 2021). Layers that read the same
/// input lie in one another's rows (q, k, v; gate, up), so that they are one product, where all of them are dense, or
/// quantized.
///
/// A tensor-parallel rank may have some of the inputs: y is then a part of a sum over ranks. Or some of the outputs: then the input's
/// gradient is.
pub struct Linear {
    /// W's rows one above the other, dense (T), quantized or in 8-bit floats: [O, I] together.
    parts: Vec<FrozenValue>,
    /// T `[O]`
    bias: Option<Tensor>,
    adapters: Vec<Adapter>,
    /// Products with dense weights in 8-bit floats; none: all in the compute dtype, as adapters' always are.
    float8: Option<Float8>,
}

/// A low-rank addition to some rows of a weight.
pub struct Adapter {
    /// The first row, and how many.
    pub first: i64,
    /// T [r, I]
    pub a: Tensor,
    /// T [rows, r]
    pub b: Tensor,
    /// What B A x is multiplied by.
    pub scale: f64,
    /// None: all inputs are used, as outside of training.
    pub dropout: Option<Dropout>,
    /// Where a forward leaves scale * A dropout(x) for the backward, which else computes it again; none: it does not.
    pub inner: Option<KeptInner>,
}

/// A place for what an adapter's forward keeps: T [N, r].
pub type KeptInner = Rc<RefCell<Option<Tensor>>>;

/// Which of an adapter's inputs are left out.
pub struct Dropout {
    /// Share of them.
    pub p: f64,
    /// What decides, besides the rows: the same in forward and backward.
    pub key: u64,
    /// int64 `[N]`, a number for each token
    pub rows: Tensor,
    /// The first of the inputs that this rank has.
    pub first: u32,
}

/// Where the gradients of a [`Linear`] go; what is none gets no gradient.
#[derive(Default)]
pub struct LinearGrad {
    /// One for each part, or none at all.
    pub weight: Vec<Option<WeightGrad>>,
    /// First row and gradient, A: zero at first.
    pub bias: Vec<(i64, Tensor)>,
    /// Of A and B of each adapter, or none at all.
    pub adapters: Vec<Option<[WeightGrad; 2]>>,
}

impl LinearGrad {
    /// Where the gradient of a weight in one piece goes; none where it is frozen.
    pub fn plain_weight(&self) -> Option<&WeightGrad> {
        match self.weight.as_slice() {
            [Some(weight)] => Some(weight),
            _ => None,
        }
    }
}

fn rows(part: &FrozenValue) -> i64 {
    match part {
        FrozenValue::Dense(w) => w.size()[0],
        FrozenValue::Quantized(q) => q.shape()[0],
        FrozenValue::Float8(w) => w.shape()[0],
    }
}

impl Adapter {
    /// scale * A dropout(x): T [N, r]
    fn inner(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.drop(x)?.f_mm(&self.a.tr())? * self.scale)
    }

    fn drop(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match &self.dropout {
            Some(d) => ops::dropout(x, &d.rows, d.key, d.p, d.first)?,
            None => x.shallow_clone(),
        })
    }

    /// This adapter's columns of an output, or of its gradient.
    fn columns(&self, y: &Tensor) -> Tensor {
        y.narrow(1, self.first, self.b.size()[0])
    }

    /// Adds to the output.
    fn add_to(&self, y: &Tensor, x: &Tensor) -> Result<()> {
        let inner = self.inner(x)?;
        let _ = self.columns(y).f_addmm_(&inner, &self.b.tr())?;
        if let Some(kept) = &self.inner {
            kept.replace(Some(inner));
        }
        Ok(())
    }

    /// What the forward kept, or the same again.
    fn kept_inner(&self, x: &Tensor) -> Result<Tensor> {
        let kept = self.inner.as_ref().and_then(|kept| kept.take());
        kept.map_or_else(|| self.inner(x), Ok)
    }

    /// The gradient of A dropout(x), from the output's: scale * dy B, T [N, r].
    fn inner_gradient(&self, dy: &Tensor) -> Result<Tensor> {
        Ok(self.columns(dy).f_mm(&self.b)? * self.scale)
    }
}

impl Linear {
    /// A layer of `parts`, whose rows follow each other: W is [O, I] in all. `bias`: T `[O]`.
    pub fn new(parts: Vec<FrozenValue>, bias: Option<Tensor>, adapters: Vec<Adapter>) -> Linear {
        Linear { parts, bias, adapters, float8: None }
    }

    /// The weight, T [O, I], of a layer that is nothing else: dense, in one piece, without bias, adapters and 8-bit floats.
    pub fn plain_weight(&self) -> Option<&Tensor> {
        match self.parts.as_slice() {
            [FrozenValue::Dense(w)]
                if self.bias.is_none() && self.adapters.is_empty() && self.float8.is_none() =>
            {
                Some(w)
            }
            _ => None,
        }
    }

    /// Whether a product of some rows gives what that of all rows gives for them: adapters know the rows by their numbers, and 8-bit
    /// floats have a scale of all.
    pub fn takes_rows_apart(&self) -> bool {
        self.adapters.is_empty() && self.float8.is_none()
    }

    /// With products in 8-bit floats.
    pub fn in_float8(self, float8: Option<Float8>) -> Linear {
        Linear { float8, ..self }
    }

    /// How a product with a dense weight is taken in 8-bit floats, if it is. x: T [N, I], or the output's gradient, T [N, O].
    fn float8_for(&self, x: &Tensor, w: &Tensor) -> Option<Float8> {
        self.float8.filter(|f| f.takes(x, w))
    }

    /// x W^T for a dense weight, plus `add` where there is one: T [N, O].
    fn dense_product(&self, x: &Tensor, w: &Tensor, add: Option<&Tensor>) -> Result<Tensor> {
        let Some(float8) = self.float8_for(x, w) else { return Ok(ops::linear(x, w, add)?) };
        let mut y = float8.linear(x, w)?;
        if let Some(add) = add {
            let _ = y.f_add_(add)?;
        }
        Ok(y)
    }

    /// A weight T [O, I] as it is.
    pub fn dense(weight: Tensor, bias: Option<Tensor>) -> Linear {
        Linear::new(vec![FrozenValue::Dense(weight)], bias, Vec::new())
    }

    /// x: T [N, I]. Returns T [N, O].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = match self.parts.as_slice() {
            [FrozenValue::Dense(w)] => self.dense_product(x, w, self.bias.as_ref())?, // [N, O]
            _ => {
                let mut y = self.product(x)?; // [N, O]
                if let Some(bias) = &self.bias {
                    let _ = y.f_add_(bias)?;
                }
                y
            }
        };
        self.adapters.iter().try_for_each(|a| a.add_to(&y, x))?;
        Ok(y)
    }

    /// residual (T [N, O]) + [`Linear::forward`], in one pass where W is dense and there is no bias.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let mut y = match self.parts.as_slice() {
            [FrozenValue::Dense(w)] => self.dense_product(x, w, Some(residual))?,
            _ => self.product(x)?.f_add_(residual)?,
        }; // [N, O]
        if let Some(bias) = &self.bias {
            let _ = y.f_add_(bias)?;
        }
        self.adapters.iter().try_for_each(|a| a.add_to(&y, x))?;
        Ok(y)
    }

    /// [`Linear::forward_add`] where there is a residual, else [`Linear::forward`].
    pub fn forward_onto(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        match residual {
            Some(residual) => self.forward_add(x, residual),
            None => self.forward(x),
        }
    }

    /// x W^T: T [N, O]
    fn product(&self, x: &Tensor) -> Result<Tensor> {
        let runs = self.runs();
        let mut products = Vec::with_capacity(runs.len());
        for run in runs {
            products.push(match run {
                WeightSpan::Dense(w) => self.dense_product(x, w, None)?,
                WeightSpan::Quantized(parts) => quant::linear(&parts, x)?,
                WeightSpan::Float8(w) => w.linear(x)?,
            }); // [N, rows of the run]
        }
        Ok(if products.len() == 1 { products.remove(0) } else { Tensor::f_cat(&products, 1)? })
    }

    /// Parts that are one product: a dense one, or quantized ones that follow each other.
    fn runs(&self) -> Vec<WeightSpan<'_>> {
        let mut runs = Vec::new();
        for part in &self.parts {
            match (part, runs.last_mut()) {
                (FrozenValue::Dense(w), _) => runs.push(WeightSpan::Dense(w)),
                (FrozenValue::Quantized(q), Some(WeightSpan::Quantized(parts))) => parts.push(q),
                (FrozenValue::Quantized(q), _) => runs.push(WeightSpan::Quantized(vec![q])),
                (FrozenValue::Float8(w), _) => runs.push(WeightSpan::Float8(w)),
            }
        }
        runs
    }

    /// Given the output's gradient dy (T [N, O]) and the input x (T [N, I]), adds to the gradients, and returns the input's,
    /// T [N, I].
    ///
    /// ```text
    /// y = x W^T + b          dx = dy W,                     dW += dy^T x,  db += sum over rows of dy
    ///   + s D(x) A^T B^T     dx += D(s dy B A),             dA += (s dy B)^T D(x),  dB += dy^T (s D(x) A^T)
    /// ```
    ///
    /// for an adapter of scale s with dropout D, on the columns of dy that it adds to. D is linear, and its own transpose.
    pub fn backward(&self, dy: &Tensor, x: &Tensor, grad: &LinearGrad) -> Result<Tensor> {
        self.backward_weight(dy, x, grad)?;
        self.backward_input(dy)
    }

    /// The half of [`Linear::backward`] that gives the input's gradient.
    pub fn backward_input(&self, dy: &Tensor) -> Result<Tensor> {
        let mut dx: Option<Tensor> = None;
        let mut first = 0;
        for run in self.runs() {
            let n = match &run {
                WeightSpan::Dense(w) => w.size()[0],
                WeightSpan::Quantized(parts) => parts.iter().map(|p| p.shape()[0]).sum(),
                WeightSpan::Float8(w) => w.shape()[0],
            };
            let part = dy.narrow(1, first, n); // [N, rows of the run]
            first += n;
            dx = Some(match (run, dx) {
                (WeightSpan::Dense(w), dx) => match (self.float8_for(&part, w), dx) {
                    (Some(float8), None) => float8.linear_backward(&part, w)?,
                    (Some(float8), Some(mut dx)) => dx.f_add_(&float8.linear_backward(&part, w)?)?,
                    (None, None) => part.f_mm(w)?,
                    (None, Some(mut dx)) => dx.f_addmm_(&part, w)?,
                },
                (WeightSpan::Float8(w), None) => w.linear_backward(&part)?,
                (WeightSpan::Float8(w), Some(mut dx)) => dx.f_add_(&w.linear_backward(&part)?)?,
                (WeightSpan::Quantized(parts), None) => quant::linear_backward(&parts, &part)?,
                (WeightSpan::Quantized(parts), Some(mut dx)) => {
                    dx.f_add_(&quant::linear_backward(&parts, &part)?)?
                }
            }); // [N, I]
        }
        let mut dx = match dx {
            Some(dx) => dx,
            None => return Err(Error::failed("a linear layer has no weight")),
        };
        for adapter in &self.adapters {
            let inner = adapter.inner_gradient(dy)?; // [N, r]
            match adapter.dropout {
                None => drop(dx.f_addmm_(&inner, &adapter.a)?),
                Some(_) => drop(dx.f_add_(&adapter.drop(&inner.f_mm(&adapter.a)?)?)?),
            }
        }
        Ok(dx)
    }

    /// The half of [`Linear::backward`] that adds to the gradients: for callers that have x only after the other half,
    /// or free it between the two.
    pub fn backward_weight(&self, dy: &Tensor, x: &Tensor, grad: &LinearGrad) -> Result<()> {
        let mut first = 0;
        for (part, dw) in self.parts.iter().zip(&grad.weight) {
            let n = rows(part);
            if let Some(dw) = dw {
                let dy = dy.narrow(1, first, n); // [N, rows of the part]
                let float8 = match part {
                    FrozenValue::Dense(w) => self.float8_for(x, w),
                    FrozenValue::Float8(w) => {
                        let [outputs, inputs] = w.shape();
                        self.float8.filter(|f| f.takes_sides([x.size()[0], outputs, inputs]))
                    }
                    FrozenValue::Quantized(_) => None,
                };
                match float8 {
                    Some(float8) => dw.add_float8_product(&dy, x, float8)?,
                    None => dw.add_product(&dy, x)?,
                }
            }
            first += n;
        }
        for (first, db) in &grad.bias {
            let part = dy.narrow(1, *first, db.size()[0]); // [N, rows of the bias]
            let sum = part.f_sum_dim_intlist([0i64].as_slice(), false, ops::accumulator(dy.kind()))?; // A [rows of the bias]
            let _ = db.shallow_clone().f_add_(&sum)?;
        }
        for (adapter, grads) in self.adapters.iter().zip(&grad.adapters) {
            if let Some([da, db]) = grads {
                db.add_product(&adapter.columns(dy), &adapter.kept_inner(x)?)?;
                da.add_product(&adapter.inner_gradient(dy)?, &adapter.drop(x)?)?;
            }
        }
        Ok(())
    }
}

enum WeightSpan<'a> {
    Dense(&'a Tensor),
    Quantized(Vec<&'a quant::Quantized>),
    Float8(&'a Float8Weight),
}

#[cfg(test)]
mod tests {
    use kernels::quant::{Quantized, Scheme};
    use tch::{Device, Kind};

    use testing::tolerance::{Quantity, allowed};

    use super::*;

    fn random(size: &[i64]) -> Tensor {
        Tensor::randn(size, (Kind::Double, Device::Cpu))
    }

    #[track_caller]
    fn near(a: &Tensor, b: &Tensor) {
        let d = testing::compare::largest(a, b);
        assert!(d < allowed(Quantity::Autograd, Kind::Double), "{d:e}");
    }

    fn leaf(t: &Tensor) -> Tensor {
        t.copy().set_requires_grad(true)
    }

    /// Forward and backward against libtorch's autograd in float64, twice: the first sets the gradients, the second adds.
    /// Weights in one piece, in several of which the middle one is not trained, and partly quantized; with and without
    /// bias; with and without adapters, which leave out inputs.
    #[test]
    #[expect(
        clippy::too_many_lines,
        reason = "one product, with and without bias, adapters and quantization"
    )]
    fn products_are_those_of_autograd() {
        let (n, i) = (5, 64);
        let quantized =
            |rows| Quantized::quantize(&random(&[rows, i]).to_kind(Kind::Float), Scheme::Nf4).unwrap();
        let heights = [4, 2, 3];
        for quantize in [[false, false, false], [false, true, true], [true, true, false], [true, true, true]]
        {
            for (one_piece, with_bias, with_adapters) in
                [(true, false, false), (true, true, true), (false, true, false), (false, false, true)]
            {
                if one_piece && quantize.contains(&true) {
                    continue;
                }
                let (mut parts, mut dense) = (Vec::new(), Vec::new());
                for (rows, quantize) in heights.into_iter().zip(quantize) {
                    if quantize {
                        let q = quantized(rows);
                        dense.push(q.dequantize(0..rows, 0..i, Kind::Double).unwrap());
                        parts.push(FrozenValue::Quantized(q));
                    } else {
                        dense.push(random(&[rows, i]));
                        parts.push(FrozenValue::Dense(dense[dense.len() - 1].shallow_clone()));
                    }
                }
                if one_piece {
                    dense = vec![Tensor::cat(&dense, 0)];
                    parts = vec![FrozenValue::Dense(dense[0].shallow_clone())];
                }
                let o: i64 = heights.iter().sum();
                let (x, residual, dy) = (random(&[n, i]), random(&[n, o]), random(&[n, o]));
                let bias = with_bias.then(|| random(&[o]));
                let token = Tensor::arange(n, (Kind::Int64, Device::Cpu));
                let adapter = |first, rows, p| Adapter {
                    first,
                    a: random(&[2, i]),
                    b: random(&[rows, 2]),
                    scale: 1.5,
                    dropout: Some(Dropout {
                        p,
                        key: 7 + first as u64,
                        rows: token.shallow_clone(),
                        first: 0,
                    })
                    .filter(|d| d.p > 0.0),
                    inner: (first == 0).then(KeptInner::default),
                };
                let adapters =
                    if with_adapters { vec![adapter(0, 4, 0.0), adapter(6, 3, 0.4)] } else { Vec::new() };

                let x2 = leaf(&x);
                let w2: Vec<Tensor> = dense.iter().map(leaf).collect();
                let b2 = bias.as_ref().map(leaf);
                let mut expected = x2.linear(&Tensor::cat(&w2, 0), b2.as_ref());
                let mut adapters2 = Vec::new();
                for d in &adapters {
                    let (a, b) = (leaf(&d.a), leaf(&d.b));
                    let mask = d.drop(&x.ones_like()).unwrap();
                    let delta = (&x2 * mask).matmul(&a.tr()).matmul(&b.tr()) * d.scale;
                    let after = o - d.first - d.b.size()[0];
                    expected += delta.constant_pad_nd([d.first, after]);
                    adapters2.push([a, b]);
                }
                (&expected * &dy).sum(Kind::Double).backward();
                let expected = expected.detach();

                let undefined = |t: &Tensor| WeightGrad::undefined(Tensor::full_like(&t.detach(), f64::NAN));
                let sum = |grad: &WeightGrad| grad.sum().unwrap().shallow_clone();
                let grad = LinearGrad {
                    weight: parts
                        .iter()
                        .zip(&dense)
                        .enumerate()
                        .map(|(k, (part, w))| {
                            (k != 1 && matches!(part, FrozenValue::Dense(_))).then(|| undefined(w))
                        })
                        .collect(),
                    bias: bias.iter().map(|b| (2, b.narrow(0, 2, 5).zeros_like())).collect(),
                    adapters: adapters.iter().map(|d| Some([undefined(&d.a), undefined(&d.b)])).collect(),
                };
                let layer = Linear::new(parts, bias, adapters);
                near(&layer.forward(&x).unwrap(), &expected);
                near(&layer.forward_add(&x, &residual).unwrap(), &(&expected + &residual));
                for times in [1.0, 2.0] {
                    near(&layer.backward(&dy, &x, &grad).unwrap(), &x2.grad());
                    for (dw, w) in grad.weight.iter().zip(&w2) {
                        if let Some(dw) = dw {
                            near(&sum(dw), &(w.grad() * times));
                        }
                    }
                    for (first, db) in &grad.bias {
                        let all = b2.as_ref().unwrap().grad() * times;
                        near(db, &all.narrow(0, *first, db.size()[0]));
                    }
                    for (grads, of) in grad.adapters.iter().zip(&adapters2) {
                        for (g, t) in grads.as_ref().unwrap().iter().zip(of) {
                            near(&sum(g), &(t.grad() * times));
                        }
                    }
                }
                near(&layer.backward(&dy, &x, &LinearGrad::default()).unwrap(), &x2.grad());
            }
        }
    }
}
