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

use kernels::ops::{Float8, Granularity};
use tch::{Device, Kind};

use crate::config::sections::{Compute, Float8Scales, Float8Section};
use crate::error::{Error, Result};

/// libtorch's name of a dtype that the configuration names. Of 8-bit floats there are only factors of products: what a model
/// keeps is bfloat16.
pub fn compute_kind(c: Compute) -> Kind {
    match c {
        Compute::Float32 => Kind::Float,
        Compute::Bfloat16 | Compute::Float8 => Kind::BFloat16,
        Compute::Float64 => Kind::Double,
    }
}

/// The products that a configuration wants in 8-bit floats, of a model whose dtype is `compute`.
pub fn float8(compute: Compute, c: &Float8Section) -> Option<Float8> {
    let scales = match c.scales {
        Float8Scales::Tensor => Granularity::Tensor,
        Float8Scales::Row => Granularity::Row,
    };
    (compute == Compute::Float8).then_some(Float8 { min_size: c.min_size, scales })
}

/// [`float8`] of a model on `device`.
///
/// # Errors
/// A GPU whose compute capability is too low: 8.9, and 9.0 with one scale a row.
pub fn float8_on(compute: Compute, c: &Float8Section, device: Device) -> Result<Option<Float8>> {
    let float8 = float8(compute, c);
    let needed = if c.scales == Float8Scales::Row { (9, 0) } else { (8, 9) };
    if let (Device::Cuda(index), true) = (device, float8.is_some()) {
        let info = kernels::cuda::load()?.device_info(index)?;
        if info.capability < needed {
            let ((major, minor), (a, b)) = (info.capability, needed);
            let tensor = if info.capability >= (8, 9) { "set float8.scales=tensor, or " } else { "" };
            let why = format!(
                "{} has compute capability {major}.{minor}; with float8.scales: {} it needs {a}.{b}: {tensor}choose bfloat16",
                info.name,
                c.scales.name()
            );
            return Err(Error::key("precision.compute", why));
        }
    }
    Ok(float8)
}
