//! Weights of linear layers in 4 or 8 bits, and products with them.
//!
//! - `Nf4` (Dettmers et al. 2023): blocks of 64 values of the flattened weight, each divided by its largest absolute value
//!   and rounded to the nearest of 16 values; two to a byte, the first in the high half.
//! - `Nf4Double`: the same, and the blocks' largest values in 8 bits themselves ("double quantization"): their mean is
//!   taken off, then blocks of 256 are coded by [`quantize_dynamic`]. 0.516 bytes a value.
//! - `Int8`: q = round_half_even(w / (absmax / 127)) by row. 1 byte a value and 4 a row.
//!
//! All bits are those of bitsandbytes 0.50.2 on the CPU. Values are computed in float32 and rounded to the dtype asked for.
//! On the CPU in C++ (`cpp/cpu_quant.cpp`), on CUDA as kernels compiled at run time ([`crate::gpu_quant`]), else as
//! compositions of libtorch's operations ([`crate::composed_quant`]), the oracles in the tests.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::abi::*;
use crate::error::{Error, Result, check};
use crate::ops::{self, raw, raw_opt};
use crate::{composed_quant as composed, gpu_quant as gpu};

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
/// Values of one scale of a dynamic 8-bit code.
pub const CODE_BLOCK: i64 = 256;

pub(crate) fn blocks(n: i64, block: i64) -> i64 {
    (n + block - 1) / block
}

/// How a weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Nf4,
    Nf4Double,
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
    /// Scale b is `map[codes[b]] * absmax[b / 256] + offset`, with the signed [`dynamic_map`]. `codes`: uint8 `[blocks]`,
    /// `absmax`: float32 `[blocks / 256]`, rounded up, `offset`: float32 `[1]`.
    Double { codes: Tensor, absmax: Tensor, offset: Tensor },
}

/// A weight `[O, I]`, quantized.
#[derive(Debug)]
pub struct Quantized {
    scheme: Scheme,
    shape: [i64; 2],
    /// uint8 `[O * I / 2]`, rounded up (nf4), or int8 `[O * I]`.
    data: Tensor,
    scales: Scales,
}

/// Fills a [`Quantized`] by rows, so that the whole weight never has to exist.
#[derive(Debug)]
pub struct Quantizer {
    scheme: Scheme,
    shape: [i64; 2],
    data: Tensor,
    absmax: Tensor,
    /// Rows so far.
    rows: i64,
}

impl Quantizer {
    pub fn new(scheme: Scheme, shape: [i64; 2], device: Device) -> Quantizer {
        let (kind, bytes) = scheme.buffers(shape)[0];
        let scales = match scheme {
            Scheme::Int8 => shape[0],
            _ => blocks(shape[0] * shape[1], NF4_BLOCK),
        };
        Quantizer {
            scheme,
            shape,
            data: Tensor::empty([bytes], (kind, device)),
            absmax: Tensor::empty([scales], (Kind::Float, device)),
            rows: 0,
        }
    }

    /// Rows that can be pushed at once: the most whose values are at most `values`, at least one block's.
    pub fn panel_rows(&self, values: i64) -> i64 {
        let columns = self.shape[1].max(1);
        let step = match self.scheme {
            Scheme::Int8 => 1,
            _ => NF4_BLOCK / gcd(NF4_BLOCK, columns),
        };
        (values / columns / step).max(1) * step
    }

    /// The next rows of the weight, `[n, I]` in any float dtype; n a multiple of [`Quantizer::panel_rows`]`(1)` but for the
    /// last ones.
    pub fn push(&mut self, rows: &Tensor) -> Result<()> {
        let [height, columns] = self.shape;
        let n = match rows.size()[..] {
            [n, c] if c == columns && self.rows + n <= height => n,
            _ => {
                return Err(Error::new(format!(
                    "rows {:?} are not the next of a weight {:?} of which {} are there",
                    rows.size(),
                    self.shape,
                    self.rows
                )));
            }
        };
        if n % self.panel_rows(1) != 0 && self.rows + n < height {
            return Err(Error::new(format!(
                "{n} rows of {columns} do not end with a block of {NF4_BLOCK} values"
            )));
        }
        let first = self.rows * columns;
        let device = self.data.device();
        let kind = match (device, rows.kind()) {
            (Device::Cuda(_), Kind::BFloat16) => Kind::BFloat16, // the kernels read it
            _ => Kind::Float,
        };
        let x = rows.to_device(device).to_kind(kind).contiguous();
        let absmax;
        match self.scheme {
            Scheme::Int8 => {
                absmax = self.absmax.narrow(0, self.rows, n);
                int8_quantize(&x, &self.data.narrow(0, first, n * columns), &absmax)?;
            }
            Scheme::Nf4 | Scheme::Nf4Double => {
                absmax = self.absmax.narrow(0, first / NF4_BLOCK, blocks(n * columns, NF4_BLOCK));
                nf4_quantize(&x, &self.data.narrow(0, first / 2, (n * columns + 1) / 2), &absmax)?;
            }
        }
        // The kernels take a NaN for the largest.
        if !bool::try_from(absmax.isfinite().all())? {
            return Err(Error::new(format!(
                "rows {} to {} of the weight hold values that are not finite",
                self.rows,
                self.rows + n - 1
            )));
        }
        self.rows += n;
        Ok(())
    }

    /// The quantized weight, once all rows are there.
    pub fn finish(self) -> Result<Quantized> {
        let Quantizer { scheme, shape, data, absmax, rows } = self;
        if rows != shape[0] {
            return Err(Error::new(format!("a weight {shape:?} was quantized with {rows} rows")));
        }
        let scales = match scheme {
            Scheme::Nf4Double => {
                let device = absmax.device();
                let absmax = absmax.to_device(Device::Cpu); // few; the CPU's bits on every device
                let offset = composed::mean(&absmax);
                let (codes, absmax) = quantize_dynamic(&(absmax - &offset));
                let put = |t: Tensor| t.to_device(device);
                Scales::Double { codes: put(codes), absmax: put(absmax), offset: put(offset) }
            }
            _ => Scales::Absmax(absmax),
        };
        Ok(Quantized { scheme, shape, data, scales })
    }
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Quantized {
    /// Quantizes a weight `[O, I]` that is there as a whole.
    pub fn quantize(w: &Tensor, scheme: Scheme) -> Result<Quantized> {
        let [rows, columns] = w.size()[..] else {
            return Err(Error::new(format!("{:?} is not a matrix", w.size())));
        };
        let mut quantizer = Quantizer::new(scheme, [rows, columns], w.device());
        quantizer.push(w)?;
        quantizer.finish()
    }

    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// `[O, I]`
    pub fn shape(&self) -> [i64; 2] {
        self.shape
    }

    pub fn device(&self) -> Device {
        self.data.device()
    }

    /// The codes: uint8 `[O * I / 2]` (nf4) or int8 `[O * I]`.
    pub fn data(&self) -> &Tensor {
        &self.data
    }

    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// What it takes of memory.
    pub fn bytes(&self) -> usize {
        self.buffers().iter().map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum()
    }

    /// The tensors that it consists of, in the order of [`Scheme::buffers`].
    pub fn buffers(&self) -> Vec<&Tensor> {
        match &self.scales {
            Scales::Absmax(absmax) => vec![&self.data, absmax],
            Scales::Double { codes, absmax, offset } => vec![&self.data, codes, absmax, offset],
        }
    }

    /// From tensors as [`Quantized::buffers`] gives them; they may be views of larger ones.
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

    /// Some rows and columns of the weight in float32, bfloat16 or float64: T `[rows, columns]`.
    pub fn dequantize(&self, rows: Range<i64>, columns: Range<i64>, kind: Kind) -> Result<Tensor> {
        let size = [(rows.end - rows.start).max(0), (columns.end - columns.start).max(0)];
        let out = Tensor::empty(size, (kind, self.device()));
        self.dequantize_into(&out, rows.start, columns.start)?;
        Ok(out)
    }

    /// Writes the weight's values from `row` and `column` on to `out`: T `[rows, columns]`.
    pub fn dequantize_into(&self, out: &Tensor, row: i64, column: i64) -> Result<()> {
        match (out.device(), out.kind()) {
            (Device::Cpu, _) => {}
            (Device::Cuda(_), Kind::Float | Kind::BFloat16) => {
                return gpu::dequantize(self, out, row, column);
            }
            _ => return composed::dequantize_into(self, out, row, column),
        }
        let [height, width] = self.shape;
        let map = dynamic_map(true, Device::Cpu);
        let (codes, absmax, offset) = match &self.scales {
            Scales::Absmax(absmax) => (None, absmax, None),
            Scales::Double { codes, absmax, offset } => (Some(codes), absmax, Some(offset)),
        };
        // SAFETY: the C++ side checks device, contiguity, dtype and size of every tensor; out is written in place.
        check(unsafe {
            if self.scheme == Scheme::Int8 {
                corral_int8_dequantize(raw(&self.data), raw(absmax), height, width, row, column, raw(out))
            } else {
                let map = codes.map(|_| &map);
                corral_nf4_dequantize(
                    raw(&self.data),
                    raw(absmax),
                    raw_opt(codes),
                    raw_opt(map),
                    raw_opt(offset),
                    height,
                    width,
                    row,
                    column,
                    raw(out),
                )
            }
        })
    }
}

fn nf4_quantize(x: &Tensor, packed: &Tensor, absmax: &Tensor) -> Result<()> {
    match x.device() {
        // SAFETY: as in dequantize_into.
        Device::Cpu => check(unsafe { corral_nf4_quantize(raw(x), raw(packed), raw(absmax)) }),
        Device::Cuda(_) => gpu::nf4_quantize(x, packed, absmax),
        _ => composed::nf4_quantize(x, packed, absmax),
    }
}

fn int8_quantize(x: &Tensor, q: &Tensor, absmax: &Tensor) -> Result<()> {
    match x.device() {
        // SAFETY: as in dequantize_into.
        Device::Cpu => check(unsafe { corral_int8_quantize(raw(x), raw(q), raw(absmax)) }),
        Device::Cuda(_) => gpu::int8_quantize(x, q, absmax),
        _ => composed::int8_quantize(x, q, absmax),
    }
}

/// bitsandbytes' dynamic 8-bit map (Dettmers 2016), float32 `[256]` in ascending order: seven powers of ten, with more
/// values the larger they are, and 0 and 1; signed, or of numbers from 0 on.
pub fn dynamic_map(signed: bool, device: Device) -> Tensor {
    composed::on(device, if signed { composed::Table::Signed } else { composed::Table::Unsigned })
}

/// Codes (uint8 `[n]`) and scales (float32 `[n / 256]`, rounded up) of x: float32 `[n]` in the signed [`dynamic_map`], bit
/// for bit as bitsandbytes' CPU code computes them: a value divided by its block's largest is first rounded to one of
/// 65,536 places between -1 and 1, then to the nearest code.
pub fn quantize_dynamic(x: &Tensor) -> (Tensor, Tensor) {
    composed::quantize_dynamic(x)
}

/// float32 `[n]` of what [`quantize_dynamic`] gave.
pub fn dequantize_dynamic(codes: &Tensor, absmax: &Tensor) -> Tensor {
    composed::dequantize_blocks(codes, absmax, true)
}

/// Values that are dequantized at once: enough rows or columns for a product to run at its full rate.
fn panel_values(device: Device) -> i64 {
    if device == Device::Cpu { 1 << 20 } else { 1 << 23 }
}

fn panel_rows(device: Device, columns: i64) -> i64 {
    (panel_values(device) / columns.max(1)).max(1)
}

/// Values of W that exist at once in [`linear`], where the largest part has `rows`.
pub fn forward_panel(device: Device, rows: i64, columns: i64) -> i64 {
    rows.min(panel_rows(device, columns)) * columns
}

/// Values of W `[rows, columns]` that exist at once in [`linear_backward`].
pub fn backward_panel(device: Device, rows: i64, columns: i64) -> i64 {
    let step = blocks(panel_values(device) / rows.max(1), NF4_BLOCK).max(1) * NF4_BLOCK;
    rows * step.min(columns)
}

/// O and I of weights one above the other.
fn stacked(parts: &[&Quantized], x: &Tensor, dim: usize) -> Result<[i64; 2]> {
    let columns = parts.first().map_or(0, |p| p.shape[1]);
    let size = [parts.iter().map(|p| p.shape[0]).sum(), columns];
    if parts.iter().any(|p| p.shape[1] != columns) || x.dim() != 2 || x.size()[1] != size[dim] {
        let shapes: Vec<_> = parts.iter().map(|p| p.shape).collect();
        return Err(Error::new(format!("a product of {:?} with weights {shapes:?} does not fit", x.size())));
    }
    Ok(size)
}

/// y = x W^T for W `[O, I]`, the parts' rows one above the other: T `[N, O]` for x: T `[N, I]`. Of W only a panel of rows
/// exists at a time.
pub fn linear(parts: &[&Quantized], x: &Tensor) -> Result<Tensor> {
    let [rows, columns] = stacked(parts, x, 1)?;
    let options = (x.kind(), x.device());
    let y = Tensor::empty([x.size()[0], rows], options);
    let step = panel_rows(x.device(), columns);
    let most = parts.iter().map(|p| p.shape[0]).max().unwrap_or(0);
    let scratch = Tensor::empty([forward_panel(x.device(), most, columns)], options).view([-1, columns]);
    let few = x.device() == Device::Cpu && x.size()[0] <= ops::few_rows(x.kind());
    let mut at = 0;
    for part in parts {
        let mut row = 0;
        while row < part.shape[0] {
            let n = step.min(part.shape[0] - row);
            let w = scratch.narrow(0, 0, n);
            part.dequantize_into(&w, row, 0)?;
            let mut out = y.narrow(1, at, n);
            match few {
                true => out.f_copy_(&ops::linear(x, &w, None)?)?,
                false => drop(x.f_mm_out(&out, &w.tr())?),
            }
            row += n;
            at += n;
        }
    }
    Ok(y)
}

/// dx = dy W, the gradient of [`linear`]: T `[N, I]` for dy: T `[N, O]`. Of W only a panel of columns exists at a time.
pub fn linear_backward(parts: &[&Quantized], dy: &Tensor) -> Result<Tensor> {
    let [rows, columns] = stacked(parts, dy, 0)?;
    let options = (dy.kind(), dy.device());
    let dx = Tensor::empty([dy.size()[0], columns], options);
    let panel = backward_panel(dy.device(), rows, columns);
    let (step, scratch) = (panel / rows.max(1), Tensor::empty([panel], options));
    let mut column = 0;
    while column < columns {
        let n = step.min(columns - column);
        let w = scratch.narrow(0, 0, rows * n).view([rows, n]);
        let mut row = 0;
        for part in parts {
            part.dequantize_into(&w.narrow(0, row, part.shape[0]), 0, column)?;
            row += part.shape[0];
        }
        let _ = dy.f_mm_out(&dx.narrow(1, column, n), &w)?;
        column += n;
    }
    Ok(dx)
}
