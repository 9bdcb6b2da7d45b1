//! Weights are quantized by rows, so that the whole weight never has to exist.

use tch::{Device, Kind, Tensor};

use super::dispatch::{int8_quantize, nf4_quantize};
use super::dynamic::{blocks, mean, quantize_dynamic};
use super::types::{NF4_BLOCK, Quantized, Scales, Scheme};
use crate::error::{Error, Result};

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
    /// For a weight of this shape `[O, I]`, with no rows yet.
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
                    "rows {:?} are not the next of a weight {:?} of which {} are done",
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
                let offset = mean(&absmax);
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
}
