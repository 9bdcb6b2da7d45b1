//! AdamW with its moments in 8 bits (Dettmers et al. 2022): blocks of 256 values, each divided by its block's largest
//! absolute value and rounded to the nearest code of bitsandbytes' dynamic map, signed for the first moment, unsigned for
//! the second. An update dequantizes a block, computes in float32, and quantizes it again.
//!
//! As bitsandbytes' kernels do it, but for what is rounded to 0: a second moment that is positive keeps the smallest
//! positive code. With 0 the step of its parameter would be the first moment divided by eps.

pub use super::dispatch::adamw8;
pub use super::types::Moment;
