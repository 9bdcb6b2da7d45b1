//! Tensors before and after a collective: copies in host memory for engines that need them, sums that become averages.

use tch::{Device, Tensor};

use super::engine::Backend;
use crate::error::Result;

/// For an engine that works on host memory a CUDA tensor is copied there before and back after.
pub(crate) struct Staged {
    /// What the backend works on.
    pub(crate) out: Tensor,
    /// Where the result goes, if that is somewhere else.
    target: Option<Tensor>,
}

impl Staged {
    /// `content`: what `out` must hold before the collective, if anything.
    pub(crate) fn new(backend: Backend, out: &Tensor, content: Option<&Tensor>) -> Result<Staged> {
        if !backend.is_on_host() || out.device() == Device::Cpu {
            return Ok(Staged { out: out.shallow_clone(), target: None });
        }
        let host = match content {
            Some(t) => t.f_to_device(Device::Cpu)?,
            None => Tensor::f_empty(out.size(), (out.kind(), Device::Cpu))?,
        };
        Ok(Staged { out: host, target: Some(out.shallow_clone()) })
    }

    /// Shapes do not matter to the collective, but Gloo looks at them.
    pub(crate) fn flat(backend: Backend, out: &Tensor, input: &Tensor) -> Result<(Staged, Tensor)> {
        let staged = Staged::new(backend, &out.f_view([-1])?, None)?;
        let input = staged.input(&input.f_view([-1])?);
        Ok((staged, input))
    }

    pub(crate) fn input(&self, input: &Tensor) -> Tensor {
        if self.target.is_some() { input.to_device(Device::Cpu) } else { input.shallow_clone() }
    }

    pub(crate) fn after(self, divisor: Option<i64>) -> After {
        After { result: Some(self.out), divisor, target: self.target }
    }
}

/// What is left to do on the host when the collective is done.
#[derive(Default)]
pub(crate) struct After {
    result: Option<Tensor>,
    divisor: Option<i64>,
    target: Option<Tensor>,
}

impl After {
    /// Makes the result what the caller was promised.
    pub(crate) fn finish(&mut self) -> Result<()> {
        tch::no_grad(|| {
            if let (Some(result), Some(n)) = (&mut self.result, self.divisor) {
                let _ = result.f_div_scalar_(n)?;
            }
            if let (Some(result), Some(target)) = (&self.result, &mut self.target) {
                target.f_copy_(result)?;
            }
            Ok(())
        })
    }
}
