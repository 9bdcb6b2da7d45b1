//! Products of several weights with their own rows of one tensor, whose numbers only the device knows: libtorch's grouped product.

use std::ptr::null_mut;

use tch::{Kind, Tensor};

use super::products::WeightGrad;
use crate::abi::corral_grouped_mm;
use crate::cuda::takes_gpu_path;
use crate::error::{Error, Result, check};
use crate::tensors::{own, raw};

/// Weights of one shape, T [E, O, I], which lie at equal distances in one buffer.
pub struct GroupedWeights(Tensor);

/// Bytes of which a row, and the distance of two weights, must be multiples.
const ALIGNMENT: i64 = 16;

impl GroupedWeights {
    /// The weights together, without a copy; none where they do not lie so, or where products with them are better taken one by one: on a
    /// CPU, which knows the numbers of rows, and in float64.
    pub fn of(weights: &[&Tensor]) -> Option<GroupedWeights> {
        let first = weights.first()?;
        let kinds = [Kind::Float, Kind::BFloat16];
        let fits = takes_gpu_path(first.device()) && kinds.contains(&first.kind());
        Some(GroupedWeights(together(weights).filter(|all| fits && is_aligned(all))?))
    }

    /// x W^T, T [M, O], for x: T [M, I], of which weight e takes the rows up to `ends[e]` (int32 `[E]`), from those of weight e - 1 on.
    pub fn linear(&self, x: &Tensor, ends: &Tensor) -> Result<Tensor> {
        product(x, &self.0.transpose(1, 2), ends)
    }

    /// dy W, T [M, I], the gradient of x, for dy: T [M, O].
    pub fn linear_backward(&self, dy: &Tensor, ends: &Tensor) -> Result<Tensor> {
        product(dy, &self.0, ends)
    }
}

/// Adds the weights' gradients dy^T x to sums that lie at equal distances, A [E, O, I]. In bfloat16 they are rounded before they are
/// added.
pub fn add_grouped_products(sums: &[&WeightGrad], dy: &Tensor, x: &Tensor, ends: &Tensor) -> Result<()> {
    let tensors: Vec<&Tensor> = sums.iter().map(|sum| sum.memory()).collect();
    let mut all = together(&tensors).ok_or_else(|| Error::new("gradients of experts lie apart"))?;
    let product = product(&dy.tr(), x, ends)?; // [E, O, I]
    let begun: Vec<bool> = sums.iter().map(|sum| sum.begin()).collect();
    match begun.iter().all(|b| *b) {
        true => drop(all.f_add_(&product)?),
        false if begun.contains(&true) => return Err(Error::new("some experts' gradients have begun")),
        false => all.f_copy_(&product)?,
    }
    Ok(())
}

/// Tensors of one shape at equal distances, as one.
fn together(tensors: &[&Tensor]) -> Option<Tensor> {
    let first = tensors.first()?;
    let [rows, columns] = first.size()[..] else { return None };
    let bytes = first.kind().elt_size_in_bytes() as i64;
    let address = |t: &Tensor| t.data_ptr() as i64;
    let step = tensors.get(1).map_or(rows * columns * bytes, |second| address(second) - address(first));
    let alike = tensors.iter().enumerate().all(|(e, t)| {
        t.size() == [rows, columns]
            && t.kind() == first.kind()
            && t.is_contiguous()
            && address(t) == address(first) + e as i64 * step
    });
    if !alike || step < rows * columns * bytes || step % bytes != 0 {
        return None;
    }
    let size = [tensors.len() as i64, rows, columns];
    first.f_as_strided(size, [step / bytes, columns, 1], None::<i64>).ok()
}

fn is_aligned(all: &Tensor) -> bool {
    let bytes = all.kind().elt_size_in_bytes() as i64;
    let (stride, size) = (all.stride(), all.size());
    (all.data_ptr() as i64) % ALIGNMENT == 0
        && [stride[0], size[1], size[2]].iter().all(|n| n * bytes % ALIGNMENT == 0)
}

fn product(a: &Tensor, b: &Tensor, ends: &Tensor) -> Result<Tensor> {
    let mut y = null_mut();
    // SAFETY: libtorch checks shapes, dtypes and strides; the result is a new tensor. What `ends` holds is the caller's promise.
    check(unsafe { corral_grouped_mm(raw(a), raw(b), raw(ends), &mut y) })?;
    Ok(own(y))
}
