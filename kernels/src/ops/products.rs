//! Products with a weight: the library's, ours for a few rows on a CPU, and the gradient of the weight.

use std::cell::{Cell, RefCell};
use std::ptr::null_mut;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::dispatch::accumulate;
use super::flash;
use super::float8::Float8;
use crate::abi::{corral_few_rows, corral_set_float32_onednn};
use crate::error::{Result, check};
use crate::tensors::{own, raw, raw_opt};

/// Sends float32 matrix products on the CPU to oneDNN (true) or MKL (false, libtorch's default).
pub fn set_float32_onednn(on: bool) -> Result<()> {
    // SAFETY: sets a flag of libtorch's global context.
    check(unsafe { corral_set_float32_onednn(on) })
}

/// Rows up to which [`linear`] has a product of its own on a CPU: where it was no slower than the library's with weights
/// of tens of megabytes, which do not stay in a cache. (Of bfloat16 processors multiply pairs, which ours does not use.)
pub fn few_rows(kind: Kind) -> i64 {
    if kind == Kind::BFloat16 { 8 } else { 16 }
}

/// x w^T, plus `add` where there is one. x: T `[N, I]`; w: T `[O, I]`; `add`: T `[N, O]` or `[O]`. Returns T `[N, O]`.
///
/// On a CPU a product of at most [`few_rows`] rows, as in a step of generation, reads the weight once and adds up every
/// element in an order that does not depend on the other rows.
pub fn linear(x: &Tensor, w: &Tensor, add: Option<&Tensor>) -> Result<Tensor> {
    if x.device() != Device::Cpu || x.size()[0] > few_rows(x.kind()) {
        return Ok(match add {
            None => x.f_mm(&w.tr())?,
            Some(add) => add.f_addmm(x, &w.tr())?,
        });
    }
    let (x, w) = (x.contiguous(), w.contiguous());
    let mut y = null_mut();
    // SAFETY: as in rms_norm.
    check(unsafe { corral_few_rows(raw(&x), raw(&w), raw_opt(add), &mut y) })?;
    Ok(own(y))
}

/// The gradient of a linear layer's weight, A `[O, I]`: a sum of products dy^T x. It knows whether it has begun: the first
/// product sets memory whose contents are undefined, later ones add.
pub struct WeightGrad {
    sum: Tensor,
    begun: Cell<bool>,
    /// Where products wait to be taken; none: they are taken at once.
    later: Option<(DelayedProducts, i64)>,
}

/// Products of weights' gradients that are taken later, in their order. They keep their factors until then, which must not change.
#[derive(Clone, Default)]
pub struct DelayedProducts(Rc<RefCell<Vec<DelayedProduct>>>);

/// dy^T x, for the sum that begins at element `first` of a flat buffer.
struct DelayedProduct {
    first: i64,
    /// T `[N, O]`
    dy: Tensor,
    /// T `[N, I]`
    x: Tensor,
    float8: Option<Float8>,
}

impl DelayedProducts {
    /// Takes all of them, and adds each to its place in `flat`, A `[n]`, where all sums have begun.
    pub fn add_to(&self, flat: &Tensor) -> Result<()> {
        self.0.take().into_iter().try_for_each(|DelayedProduct { first, dy, x, float8 }| {
            let (outputs, inputs) = (dy.size()[1], x.size()[1]);
            let sum =
                WeightGrad::begun(flat.f_narrow(0, first, outputs * inputs)?.f_view([outputs, inputs])?);
            match float8 {
                Some(float8) => sum.add_float8_product(&dy, &x, float8),
                None => sum.add_product(&dy, &x),
            }
        })
    }

    fn push(&self, first: i64, dy: &Tensor, x: &Tensor, float8: Option<Float8>) {
        let (dy, x) = (dy.shallow_clone(), x.shallow_clone());
        self.0.borrow_mut().push(DelayedProduct { first, dy, x, float8 });
    }
}

impl WeightGrad {
    /// A sum of nothing yet, in memory whose contents are undefined.
    pub fn undefined(memory: Tensor) -> WeightGrad {
        WeightGrad { sum: memory, begun: Cell::new(false), later: None }
    }

    /// A sum that later products are added to.
    pub fn begun(sum: Tensor) -> WeightGrad {
        WeightGrad { sum, begun: Cell::new(true), later: None }
    }

    /// A sum that has begun, and whose products wait in `products` for its place at element `first` of a flat buffer.
    pub fn delayed(sum: Tensor, products: &DelayedProducts, first: i64) -> WeightGrad {
        WeightGrad { later: Some((products.clone(), first)), ..WeightGrad::begun(sum) }
    }

    pub(super) fn memory(&self) -> &Tensor {
        &self.sum
    }

    /// Whether the sum had begun; it has from now on.
    pub(super) fn begin(&self) -> bool {
        self.begun.replace(true)
    }

    /// The sum, A `[O, I]`, for additions that are no products: zeros where it has not begun.
    pub fn sum(&self) -> Result<&Tensor> {
        if !self.begun.replace(true) {
            let _ = self.sum.shallow_clone().f_zero_()?;
        }
        Ok(&self.sum)
    }

    /// Adds dy^T x, for dy: T `[N, O]`, x: T `[N, I]`; N may be 0.
    ///
    /// Where T is A the product goes straight into the sum. So it does on CUDA in bfloat16, summed in float32; on the CPU
    /// bfloat16 products are rounded before they are added, as under PyTorch's autocast.
    pub fn add_product(&self, dy: &Tensor, x: &Tensor) -> Result<()> {
        if x.size()[0] == 0 {
            return self.sum().map(drop);
        }
        if let Some((products, first)) = &self.later {
            products.push(*first, dy, x, None);
            return Ok(());
        }
        let add = self.begun.replace(true);
        let mut sum = self.sum.shallow_clone(); // [O, I]
        match (x.device(), sum.kind() == x.kind()) {
            (_, true) if add => drop(sum.f_addmm_(&dy.tr(), x)?),
            (_, true) => drop(dy.tr().f_mm_out(&sum, x)?),
            (Device::Cuda(_), false) => flash::grad_weight(&sum, dy, x, add)?,
            _ => accumulate(&sum, &dy.tr().f_mm(x)?, add)?,
        }
        Ok(())
    }

    /// [`WeightGrad::add_product`] in 8-bit floats.
    pub fn add_float8_product(&self, dy: &Tensor, x: &Tensor, float8: Float8) -> Result<()> {
        if let Some((products, first)) = &self.later {
            products.push(*first, dy, x, Some(float8));
            return Ok(());
        }
        float8.grad_weight(&self.sum, dy, x, self.begun.replace(true))
    }
}
