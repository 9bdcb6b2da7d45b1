//! The Llama family: layout of the parameters, forward and backward, the LM head, token by token over a KV cache.

pub(crate) mod attention;
mod block;
pub(crate) mod decode;
pub mod head;
pub(crate) mod init;
pub mod layout;
pub(crate) mod linear;
pub mod llama;
mod mixture;
pub(crate) mod mlp;
mod norm;
pub(crate) mod score;
pub mod trainable;

pub use decode::KvCache;
pub use head::LmHead;
pub use llama::{DropoutPlace, Llama, ModelInput};
pub use score::ScoreHead;
pub use trainable::Trainable;

pub use crate::config::sections::Recompute;

use kernels::ops::{Float8, Scales};
use tch::{Device, Kind};

use crate::config::sections::{Compute, Float8Scales, Float8Section};
use crate::error::{Error, Result};

/// libtorch's name of a dtype that the configuration names. Of 8-bit floats there are only factors of products: what a model keeps is
/// bfloat16.
pub fn compute_kind(c: Compute) -> Kind {
    match c {
        Compute::Float32 => Kind::Float,
        Compute::Bfloat16 | Compute::Float8 => Kind::BFloat16,
        Compute::Float64 => Kind::Double,
    }
}

/// What products in 8-bit floats a configuration asks for, of a model whose dtype is `compute`.
pub fn float8(compute: Compute, c: &Float8Section) -> Option<Float8> {
    let scales = match c.scales {
        Float8Scales::Tensor => Scales::Tensor,
        Float8Scales::Row => Scales::Row,
    };
    (compute == Compute::Float8).then_some(Float8 { min_size: c.min_size, scales })
}

/// [`float8`], on its device.
///
/// # Errors
/// A GPU that has none.
pub fn float8_on(compute: Compute, c: &Float8Section, device: Device) -> Result<Option<Float8>> {
    let float8 = float8(compute, c);
    let needed = if c.scales == Float8Scales::Row { (9, 0) } else { (8, 9) };
    if let (Device::Cuda(index), true) = (device, float8.is_some()) {
        let info = kernels::cuda::load()?.device_info(index)?;
        if info.capability < needed {
            let ((major, minor), (a, b)) = (info.capability, needed);
            let why = format!(
                "{} has compute capability {major}.{minor}; float8 with one scale a {} needs {a}.{b}: choose bfloat16",
                info.name,
                c.scales.name()
            );
            return Err(Error::key("precision.compute", why));
        }
    }
    Ok(float8)
}
