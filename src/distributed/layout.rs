//! Where tensors lie in their group's flat buffer.

use tch::Tensor;

use super::cut::Share;
use crate::error::Result;

/// A tensor's place in its group's flat buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// The name in Hugging Face checkpoints.
    pub name: String,
    /// Sizes of its dimensions on this rank; a matrix is [O, I], as in Hugging Face checkpoints.
    pub shape: Vec<i64>,
    /// What this rank has of it.
    pub share: Share,
    /// First element in the flat buffer.
    pub offset: i64,
}

impl TensorSpec {
    /// Of a whole tensor, whose place is not known yet.
    pub fn new(name: impl Into<String>, shape: Vec<i64>) -> TensorSpec {
        TensorSpec { name: name.into(), shape, share: Share::Whole, offset: 0 }
    }

    /// The whole tensor that this rank has a part of.
    pub fn whole(&self) -> TensorSpec {
        let mut spec = TensorSpec { share: Share::Whole, ..self.clone() };
        if let Share::Cut(cut) = self.share {
            spec.shape[cut.dim] = cut.whole;
        }
        spec
    }

    /// Sets elements `first..` of this tensor, `values` (in any dtype, `[n]`): `f(whole, first, part)` is to fill `part` with
    /// elements `first..` of the flattened whole tensor. Padding becomes 0.
    pub fn fill(
        &self,
        first: i64,
        values: &Tensor,
        f: &mut impl FnMut(&TensorSpec, i64, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let Share::Cut(cut) = self.share else { return f(self, first, values) };
        let whole = self.whole();
        for run in cut.runs(&self.shape, first..first + values.numel() as i64) {
            let mut part = values.narrow(0, run.part - first, run.len);
            match run.whole {
                Some(at) => f(&whole, at, &part)?,
                None => drop(part.f_zero_()?),
            }
        }
        Ok(())
    }

    /// Its number of elements.
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// This tensor as a view of the flat buffer.
    pub fn view(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.offset, self.numel()).view(self.shape.as_slice())
    }
}

/// What lies where in a group's flat buffer: matrices first, then vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// The name of the group in checkpoints, such as `block 0`.
    pub name: String,
    /// Its tensors, in the order of the buffer.
    pub specs: Vec<TensorSpec>,
    /// Elements without the padding.
    pub numel: i64,
    /// Elements of the matrices: the prefix that weight decay works on.
    pub num_decayed: i64,
}

impl Layout {
    /// Lays the tensors one after the other; matrices must come before vectors.
    pub fn new(name: impl Into<String>, tensors: Vec<(String, Vec<i64>)>) -> Layout {
        Layout::of(name, tensors.into_iter().map(|(name, shape)| TensorSpec::new(name, shape)))
    }

    /// [`Layout::new`] of tensors that may be parts of others.
    pub fn of(name: impl Into<String>, tensors: impl IntoIterator<Item = TensorSpec>) -> Layout {
        let (mut offset, mut num_decayed) = (0, 0);
        let mut specs = Vec::new();
        for spec in tensors {
            let spec = TensorSpec { offset, ..spec };
            if spec.shape.len() > 1 {
                assert_eq!(num_decayed, offset, "matrices come first in a group");
                num_decayed += spec.numel();
            }
            offset += spec.numel();
            specs.push(spec);
        }
        Layout { name: name.into(), specs, numel: offset, num_decayed }
    }
}

/// Elements (or bytes) of one rank's slice: the group divided by the ranks, rounded up to a multiple of 256, so that blocks
/// of moments in 8 bits lie in one slice.
pub(super) fn padded_slice(numel: i64, ranks: i64) -> i64 {
    ((numel + ranks - 1) / ranks + 255) & !255
}
