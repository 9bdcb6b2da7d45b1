//! Quantization on CUDA.

use tch::{Device, Kind, Tensor};

use super::coding::QuantOps;
use super::dynamic::{CODE_BLOCK, Table, blocks, on};
use super::types::{Moment, NF4_BLOCK, Quantized, Scales, Scheme};
use crate::cuda::launch::{Launcher, adamw_numbers, matrix, need, opt, pack, threads, wide};
use crate::cuda::modules::Arg::{I32, I64, Null, Tensor as T};
use crate::error::{Error, Result};
use crate::ops::Gpu;
use crate::tensors::AdamW;

impl QuantOps for Gpu {
    fn nf4_quantize(&self, x: &Tensor, packed: &Tensor, absmax: &Tensor) -> Result<()> {
        let n = x.numel() as i64;
        let count = blocks(n, NF4_BLOCK);
        need(
            "nf4_quantize",
            &[
                ("x", x, x.kind(), n),
                ("packed", packed, Kind::Uint8, (n + 1) / 2),
                ("absmax", absmax, Kind::Float, count),
            ],
        )?;
        let args = [T(x), T(packed), T(absmax), I64(n)];
        // SAFETY: a warp takes a block of 64 values; it writes one of absmax and the bytes of values below n.
        unsafe { Launcher::quant(x)?.launch("nf4_quantize", blocks(count, 8), [256, 1], 0, &args) }
    }

    fn int8_quantize(&self, x: &Tensor, q: &Tensor, absmax: &Tensor) -> Result<()> {
        let (rows, c) = matrix("int8_quantize", x)?;
        need(
            "int8_quantize",
            &[
                ("x", x, x.kind(), rows * c),
                ("q", q, Kind::Int8, rows * c),
                ("absmax", absmax, Kind::Float, rows),
            ],
        )?;
        let args = [T(x), T(q), T(absmax), I32(c as i32)];
        // SAFETY: block r reads row r of x, and writes row r of q and absmax[r].
        unsafe { Launcher::quant(x)?.launch("int8_quantize", rows, [256, 1], 0, &args) }
    }

    fn dequantize(&self, w: &Quantized, out: &Tensor, row: i64, column: i64) -> Result<()> {
        let op = "dequantize";
        let [height, width] = w.shape();
        let (rows, columns) = matrix(op, out)?;
        if row < 0 || column < 0 || row + rows > height || column + columns > width {
            return Err(Error::new("rows and columns of out are not in the weight"));
        }
        let mut tensors = vec![("out", out, out.kind(), rows * columns)];
        let wanted = w.scheme().buffers(w.shape());
        tensors.extend(w.buffers().into_iter().zip(wanted).map(|(t, (kind, n))| ("weight", t, kind, n)));
        need(op, &tensors)?;
        let pack = pack(out);
        let kernels = Launcher::quant(out)?;
        let block = threads(columns, pack);
        let (codes, absmax, offset) = match w.scales() {
            Scales::Absmax(absmax) => (None, absmax, None),
            Scales::Double { codes, absmax, offset } => (Some(codes), absmax, Some(offset)),
        };
        if w.scheme() == Scheme::Int8 {
            let wide = wide(columns, pack, &[out]);
            let args = [
                T(w.data()),
                T(absmax),
                I64(width),
                I64(row),
                I64(column),
                T(out),
                I32(columns as i32),
                wide,
            ];
            // SAFETY: rows and columns lie in the weight, which has the buffers of its scheme: both checked above.
            return unsafe { kernels.launch("int8_dequantize", rows, block, 0, &args) };
        }
        let map = on(out.device(), Table::Signed);
        // Packs of the weight must not cross bytes or blocks: rows and the first column must be whole packs too.
        let together = if width % pack == 0 && column % pack == 0 { columns } else { 1 };
        let args = [
            T(w.data()),
            T(absmax),
            opt(codes),
            if codes.is_some() { T(&map) } else { Null },
            opt(offset),
            I64(width),
            I64(row),
            I64(column),
            T(out),
            I32(columns as i32),
            wide(together, pack, &[out]),
        ];
        // SAFETY: rows and columns lie in the weight, which has the buffers of its scheme: both checked above; the map
        // has a value for each byte.
        unsafe { kernels.launch("nf4_dequantize", rows, block, 0, &args) }
    }

    fn adamw8(
        &self,
        p: &Tensor,
        g: &Tensor,
        [m, v]: [&Moment; 2],
        copy: Option<&Tensor>,
        decayed: i64,
        o: AdamW,
    ) -> Result<()> {
        let n = p.numel() as i64;
        let count = blocks(n, CODE_BLOCK);
        let mut tensors = vec![("p", p, Kind::Float, n), ("g", g, Kind::Float, n)];
        for moment in [m, v] {
            tensors.push(("codes", &moment.codes, Kind::Uint8, n));
            tensors.push(("absmax", &moment.absmax, Kind::Float, count));
        }
        tensors.extend(copy.map(|c| ("copy", c, Kind::BFloat16, n)));
        need("adamw8", &tensors)?;
        let device: Device = p.device();
        let [m_map, m_midpoints, v_map, v_midpoints] =
            [Table::Signed, Table::SignedMidpoints, Table::Unsigned, Table::UnsignedMidpoints]
                .map(|t| on(device, t));
        let [decay, beta1, rest1, beta2, rest2, eps, rate, root2, scale] = adamw_numbers(o);
        let args = [
            T(p),
            T(g),
            T(&m.codes),
            T(&m.absmax),
            T(&m_map),
            T(&m_midpoints),
            T(&v.codes),
            T(&v.absmax),
            T(&v_map),
            T(&v_midpoints),
            opt(copy),
            I64(n),
            I64(decayed),
            decay,
            beta1,
            rest1,
            beta2,
            rest2,
            eps,
            rate,
            root2,
            scale,
        ];
        // SAFETY: p, g, codes and copy have n elements, absmax one a block of 256; the tables have 256 and 255 values;
        // threads beyond n write nothing.
        unsafe { Launcher::optim(p)?.launch("adamw8", count, [256, 1], 0, &args) }
    }
}

// SAFETY (all launches): as in ops/gpu.rs.
