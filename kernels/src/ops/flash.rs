//! What libtorch computes on CUDA and tch does not offer: flash attention with its statistics, and products of bfloat16
//! with float32 results.

use std::ptr::null_mut;

use tch::{Device, Kind, Tensor};

use crate::abi::{corral_flash_attention, corral_flash_attention_backward, corral_grad_weight};
use crate::cuda::launch::capability;
use crate::error::{Result, check};
use crate::tensors::{Heads, own, raw};

/// Whether flash attention takes this; it needs sm_80.
pub fn fits(qkv: &Tensor, start: Option<&Tensor>, h: Heads) -> Result<bool> {
    Ok(matches!(qkv.device(), Device::Cuda(_))
        && matches!(qkv.kind(), Kind::BFloat16 | Kind::Half)
        && start.is_none()
        && h.softcap.is_none()
        && h.head_dim % 8 == 0
        && h.head_dim <= 256
        && (qkv.data_ptr() as usize).is_multiple_of(16)
        && capability(qkv)?.0 >= 8)
}

pub fn forward(qkv: &Tensor, h: Heads) -> Result<(Tensor, Tensor)> {
    let (mut out, mut lse) = (null_mut(), null_mut());
    // SAFETY: the C++ side checks shapes and contiguity; outputs are new tensors.
    check(unsafe {
        corral_flash_attention(
            raw(qkv),
            h.batch,
            h.heads,
            h.kv_heads,
            h.head_dim,
            h.scale,
            &mut out,
            &mut lse,
        )
    })?;
    Ok((own(out), own(lse)))
}

pub fn backward(dout: &Tensor, qkv: &Tensor, out: &Tensor, lse: &Tensor, h: Heads) -> Result<Tensor> {
    let mut dqkv = null_mut();
    // SAFETY: as in forward.
    check(unsafe {
        corral_flash_attention_backward(
            raw(dout),
            raw(qkv),
            raw(out),
            raw(lse),
            h.batch,
            h.heads,
            h.kv_heads,
            h.head_dim,
            h.scale,
            &mut dqkv,
        )
    })?;
    Ok(own(dqkv))
}

/// dw (float32 `[O, I]`) = or += dy^T x, for dy `[N, O]`, x `[N, I]` in bfloat16 or float16.
pub fn grad_weight(dw: &Tensor, dy: &Tensor, x: &Tensor, add: bool) -> Result<()> {
    // SAFETY: libtorch checks shapes and dtypes; dw is the caller's to write.
    check(unsafe { corral_grad_weight(raw(dw), raw(dy), raw(x), add) })
}
