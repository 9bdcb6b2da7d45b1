//! What is stored: weights in 4 and 8 bits with their scales, and AdamW's moments in 8 bits.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::dynamic::{self, CODE_BLOCK, blocks};
use crate::error::{Error, Result};

/// NF4's values, in float32 as bitsandbytes has them.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Values of one scale of nf4.
pub const NF4_BLOCK: i64 = 64;

/// How a weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// 4 bits a value, a float32 for each block of 64.
    Nf4,
    /// The same with the blocks' scales in 8 bits.
    Nf4Double,
    /// 8 bits a value, a float32 for each row.
    Int8,
}

impl Scheme {
    /// Dtype and length of the tensors that a weight `[O, I]` consists of: the codes, then its scales.
    pub fn buffers(self, shape: [i64; 2]) -> Vec<(Kind, i64)> {
        let n = shape[0] * shape[1];
        let count = blocks(n, NF4_BLOCK);
        match self {
            Scheme::Int8 => vec![(Kind::Int8, n), (Kind::Float, shape[0])],
            Scheme::Nf4 => vec![(Kind::Uint8, (n + 1) / 2), (Kind::Float, count)],
            Scheme::Nf4Double => vec![
                (Kind::Uint8, (n + 1) / 2),
                (Kind::Uint8, count),
                (Kind::Float, blocks(count, CODE_BLOCK)),
                (Kind::Float, 1),
            ],
        }
    }
}

/// The scales of a weight.
#[derive(Debug)]
pub enum Scales {
    /// float32, one for each block (nf4) or row (int8): the largest absolute value.
    Absmax(Tensor),
    /// Scale b is `map[codes[b]] * absmax[b / 256] + offset`, with the signed [`dynamic_map`](super::dynamic_map).
    Double {
        /// uint8 `[blocks]`: codes of the scales.
        codes: Tensor,
        /// float32 `[blocks / 256]`, rounded up: scales of the codes.
        absmax: Tensor,
        /// float32 `[1]`: the mean of the scales, which was taken off.
        offset: Tensor,
    },
}

/// A weight `[O, I]`, quantized.
#[derive(Debug)]
pub struct Quantized {
    pub(super) scheme: Scheme,
    pub(super) shape: [i64; 2],
    /// uint8 `[O * I / 2]`, rounded up (nf4), or int8 `[O * I]`.
    pub(super) data: Tensor,
    pub(super) scales: Scales,
}

impl Quantized {
    /// How it is stored.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// `[O, I]`
    pub fn shape(&self) -> [i64; 2] {
        self.shape
    }

    /// Where its tensors lie.
    pub fn device(&self) -> Device {
        self.data.device()
    }

    /// The codes: uint8 `[O * I / 2]` (nf4) or int8 `[O * I]`.
    pub fn data(&self) -> &Tensor {
        &self.data
    }

    /// Its scales.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// What it takes of memory.
    pub fn bytes(&self) -> usize {
        self.buffers().iter().map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum()
    }

    /// How a part of it is stored: nf4's scales stay float32, since their codes belong to those of the whole weight.
    pub fn scheme_of_part(scheme: Scheme) -> Scheme {
        match scheme {
            Scheme::Nf4Double => Scheme::Nf4,
            other => other,
        }
    }

    /// Whether a part of a weight `[O, I]` of `rows` whole rows, or of `columns` columns, begins and ends with a scale's values.
    pub fn has_parts(scheme: Scheme, shape: [i64; 2], rows: i64, columns: i64) -> bool {
        let by_rows = columns == shape[1] && rows * columns % NF4_BLOCK == 0;
        scheme == Scheme::Int8 || by_rows || columns % NF4_BLOCK == 0 && shape[1] % NF4_BLOCK == 0
    }

    /// Rows `rows` and columns `columns` of the weight, with the same values.
    ///
    /// # Errors
    /// A part that [`Quantized::has_parts`] excludes.
    pub fn part(&self, rows: Range<i64>, columns: Range<i64>) -> Result<Quantized> {
        let shape = [rows.end - rows.start, columns.end - columns.start];
        let [_, width] = self.shape;
        let begins = match columns == (0..width) {
            true => Quantized::has_parts(self.scheme, self.shape, rows.start, width),
            false => self.scheme == Scheme::Int8 || columns.start % NF4_BLOCK == 0,
        };
        if !(begins && Quantized::has_parts(self.scheme, self.shape, shape[0], shape[1])) {
            return Err(Error::new(format!(
                "rows {rows:?} and columns {columns:?} of a weight {:?} do not end with a block of {NF4_BLOCK} values",
                self.shape
            )));
        }
        // Of a matrix of so many numbers per `each` values of a row.
        let cut = |t: &Tensor, each: i64| -> Result<Tensor> {
            if columns == (0..width) {
                let (first, n) = (rows.start * width / each, shape[0] * width / each);
                return Ok(t.f_narrow(0, first, n)?.copy());
            }
            let part = t.f_view([-1, width / each])?.f_narrow(0, rows.start, shape[0])?;
            let part = part.f_narrow(1, columns.start / each, shape[1] / each)?;
            Ok(part.f_reshape([-1])?.copy())
        };
        let scheme = Quantized::scheme_of_part(self.scheme);
        let (data, absmax) = match &self.scales {
            Scales::Absmax(absmax) if self.scheme == Scheme::Int8 => {
                (cut(&self.data, 1)?, absmax.f_narrow(0, rows.start, shape[0])?.copy())
            }
            Scales::Absmax(absmax) => (cut(&self.data, 2)?, cut(absmax, NF4_BLOCK)?),
            Scales::Double { codes, absmax, offset } => {
                let all = dynamic::dequantize_dynamic(codes, absmax) + offset;
                (cut(&self.data, 2)?, cut(&all, NF4_BLOCK)?)
            }
        };
        Ok(Quantized { scheme, shape, data, scales: Scales::Absmax(absmax) })
    }

    /// The tensors that it consists of, in the order of [`Scheme::buffers`].
    pub fn buffers(&self) -> Vec<&Tensor> {
        match &self.scales {
            Scales::Absmax(absmax) => vec![&self.data, absmax],
            Scales::Double { codes, absmax, offset } => vec![&self.data, codes, absmax, offset],
        }
    }

    /// From tensors as [`Quantized::buffers`] gives them; they may be views of larger ones. An error where number, dtypes or
    /// sizes are not those of [`Scheme::buffers`].
    pub fn from_buffers(scheme: Scheme, shape: [i64; 2], buffers: Vec<Tensor>) -> Result<Quantized> {
        let wanted = scheme.buffers(shape);
        let fits = buffers.len() == wanted.len()
            && buffers.iter().zip(&wanted).all(|(t, (kind, n))| t.kind() == *kind && t.size() == [*n]);
        let mut buffers = buffers.into_iter();
        let mut next = || buffers.next().filter(|_| fits);
        let misfit = || Error::new(format!("the buffers are not those of {scheme:?} of {shape:?}"));
        let data = next().ok_or_else(misfit)?;
        let scales = match scheme {
            Scheme::Nf4Double => Scales::Double {
                codes: next().ok_or_else(misfit)?,
                absmax: next().ok_or_else(misfit)?,
                offset: next().ok_or_else(misfit)?,
            },
            _ => Scales::Absmax(next().ok_or_else(misfit)?),
        };
        Ok(Quantized { scheme, shape, data, scales })
    }
}

/// A moment of n values.
#[derive(Debug)]
pub struct Moment {
    /// uint8 `[n]`
    pub codes: Tensor,
    /// float32 `[n / 256]`, rounded up.
    pub absmax: Tensor,
}

impl Moment {
    /// Bytes of a moment of n values.
    pub fn bytes(n: i64) -> i64 {
        n + 4 * blocks(n, CODE_BLOCK)
    }

    /// A moment of n zeros.
    pub fn zeros(n: i64, device: Device) -> Moment {
        Moment {
            codes: Tensor::zeros([n], (Kind::Uint8, device)),
            absmax: Tensor::zeros([blocks(n, CODE_BLOCK)], (Kind::Float, device)),
        }
    }

    /// The values, float32 `[n]`; `signed` for a first moment.
    pub fn values(&self, signed: bool) -> Tensor {
        dynamic::dequantize(&self.codes, &self.absmax, signed)
    }
}
