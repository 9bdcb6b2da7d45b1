//! The Llama family: layout of the parameters, forward and backward, the LM head, token by token over a KV cache.

pub(crate) mod attention;
mod block;
pub mod cuts;
pub(crate) mod decode;
pub mod head;
pub(crate) mod init;
mod input;
pub mod layout;
pub(crate) mod linear;
pub mod llama;
mod mixture;
pub(crate) mod mlp;
mod norm;
pub mod rotary;
pub(crate) mod score;
mod shared_rows;
mod shared_sequence;
pub(crate) mod stages;
pub mod trainable;
mod vocabulary;

pub use decode::KvCache;
pub use head::LmHead;
pub use input::{DropoutPlace, ModelInput};
pub use llama::Llama;
pub use score::ScoreHead;
pub use trainable::Trainable;

pub use crate::config::sections::Recompute;

use kernels::ops::{self, Float8, Granularity};
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
    if let (Device::Cuda(index), Some(float8)) = (device, float8) {
        let info = kernels::cuda::load()?.device_info(index)?;
        if let Some(why) = lacks_float8(&info.name, info.capability, float8.scales) {
            return Err(Error::key("precision.compute", why));
        }
    }
    Ok(float8)
}

/// Why a GPU cannot take such products, if it cannot.
fn lacks_float8(name: &str, capability: (i32, i32), scales: Granularity) -> Option<String> {
    let ((major, minor), (a, b)) = (capability, ops::float8_capability(scales));
    let by_tensor = capability >= ops::float8_capability(Granularity::Tensor);
    let instead = if by_tensor { "set float8.scales=tensor, or " } else { "" };
    (capability < (a, b)).then(|| {
        format!("{name} has compute capability {major}.{minor}, and these products need {a}.{b}: {instead}choose bfloat16")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_without_8_bit_floats_are_refused() {
        let lacks = |capability, scales| lacks_float8("a GPU", capability, scales);
        assert!(lacks((9, 0), Granularity::Row).is_none() && lacks((8, 9), Granularity::Tensor).is_none());
        let why = lacks((8, 9), Granularity::Row).unwrap();
        assert!(
            why.contains("8.9") && why.contains("need 9.0: set float8.scales=tensor, or choose"),
            "{why}"
        );
        let why = lacks((8, 0), Granularity::Tensor).unwrap();
        assert!(why.ends_with("need 8.9: choose bfloat16"), "{why}");
    }
}
