//! The operations of [`crate::quant`] and [`crate::moments`] as compositions of libtorch's: used where no kernel is, and as
//! oracles.

use std::sync::{Mutex, OnceLock};

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::moments::Moment;
use crate::ops::AdamW;
use crate::quant::{CODE_BLOCK, NF4, NF4_BLOCK, Quantized, Scales, Scheme};

/// The values of codes, and what lies halfway between neighbours.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Table {
    Signed,
    Unsigned,
    SignedMidpoints,
    UnsignedMidpoints,
}

/// A table on a device; copied there once.
pub(crate) fn on(device: Device, table: Table) -> Tensor {
    static KNOWN: Mutex<Vec<(Device, Table, Tensor)>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(|e| e.into_inner());
    if let Some((.., t)) = known.iter().find(|(d, t, _)| *d == device && *t == table) {
        return t.shallow_clone();
    }
    let map = map(matches!(table, Table::Signed | Table::SignedMidpoints));
    let values: Vec<f32> = match table {
        Table::Signed | Table::Unsigned => map.to_vec(),
        _ => map.windows(2).map(|w| (w[0] + w[1]) * 0.5).collect(),
    };
    let t = Tensor::from_slice(&values).to_device(device);
    known.push((device, table, t.shallow_clone()));
    t
}

/// As bitsandbytes' `create_dynamic_map` computes it, step by step in float32.
fn map(signed: bool) -> &'static [f32; 256] {
    static MAPS: OnceLock<[[f32; 256]; 2]> = OnceLock::new();
    let maps = MAPS.get_or_init(|| {
        [false, true].map(|signed| {
            let mut values = vec![0.0, 1.0];
            for i in 0..7 {
                // The middles of 2^i (unsigned: 2^(i + 1)) equal parts of 0.1 to 1, times 10^(i - 6).
                let parts = 1 << if signed { i } else { i + 1 };
                let step = (1.0f32 - 0.1) / parts as f32;
                let boundary = |k: usize| {
                    // As torch.linspace: from both ends, product and sum rounded together.
                    let from_end = (parts - k) as f32;
                    if k < parts.div_ceil(2) {
                        step.mul_add(k as f32, 0.1)
                    } else {
                        (-step).mul_add(from_end, 1.0)
                    }
                };
                let scale = 10f64.powi(i - 6) as f32;
                for k in 0..parts {
                    let value = (boundary(k) + boundary(k + 1)) / 2.0 * scale;
                    values.push(value);
                    if signed {
                        values.push(-value);
                    }
                }
            }
            values.sort_by(f32::total_cmp);
            values.try_into().expect("2 and 2 (1 + 2 + ... + 64) or 2 + 4 + ... + 128 values")
        })
    });
    &maps[signed as usize]
}

fn nf4_table(device: Device) -> Tensor {
    Tensor::from_slice(&NF4).to_device(device)
}

/// The values of blocks, the last one filled up with zeros: `[blocks, block]`.
fn by_blocks(x: &Tensor, block: i64) -> Tensor {
    let n = x.numel() as i64;
    let padding = (n + block - 1) / block * block - n;
    x.view([-1]).constant_pad_nd([0, padding]).view([-1, block])
}

/// Per value what is there per block: `[n]`.
fn per_value(scales: &Tensor, block: i64, n: i64) -> Tensor {
    scales.repeat_interleave_self_int(block, 0, None).narrow(0, 0, n)
}

fn largest(x: &Tensor) -> Tensor {
    x.abs().amax([-1i64].as_slice(), false)
}

pub fn nf4_quantize(x: &Tensor, packed: &Tensor, absmax: &Tensor) -> Result<()> {
    let blocks = by_blocks(x, NF4_BLOCK);
    let most = largest(&blocks);
    let y = (blocks * most.clamp_min(1e-38).reciprocal().unsqueeze(-1)).view([-1]);
    let table = nf4_table(x.device());
    let middles = (table.narrow(0, 0, 15) + table.narrow(0, 1, 15)) / 2.0;
    let n = x.numel() as i64;
    let q = y.narrow(0, 0, n).constant_pad_nd([0, n % 2]).bucketize(&middles, true, false).view([-1, 2]);
    let bytes = q.select(1, 0) * 16 + q.select(1, 1);
    packed.shallow_clone().f_copy_(&bytes)?;
    absmax.shallow_clone().f_copy_(&most)?;
    Ok(())
}

pub fn int8_quantize(x: &Tensor, q: &Tensor, absmax: &Tensor) -> Result<()> {
    let most = largest(x);
    let scale = (&most / 127.0).unsqueeze(-1);
    let scale = scale.where_self(&scale.gt(0.0), &scale.ones_like());
    q.shallow_clone().f_copy_(&(x / scale).round().clamp(-127.0, 127.0).view([-1]))?;
    absmax.shallow_clone().f_copy_(&most)?;
    Ok(())
}

pub fn dequantize_into(w: &Quantized, out: &Tensor, row: i64, column: i64) -> Result<()> {
    let [rows, columns] = w.shape();
    let n = rows * columns;
    let values = if w.scheme() == Scheme::Int8 {
        let Scales::Absmax(absmax) = w.scales() else { unreachable!("int8 has one scale a row") };
        w.data().view([rows, columns]).to_kind(Kind::Float) * (absmax / 127.0).unsqueeze(-1)
    } else {
        let scales = match w.scales() {
            Scales::Absmax(absmax) => absmax.shallow_clone(),
            Scales::Double { codes, absmax, offset } => dequantize_blocks(codes, absmax, true) + offset,
        };
        let low = w.data().remainder(16);
        let high = (w.data() - &low).divide_scalar_mode(16, "trunc");
        let codes = Tensor::stack(&[high, low], 1).view([-1]).narrow(0, 0, n).to_kind(Kind::Int64);
        (nf4_table(w.device()).index_select(0, &codes) * per_value(&scales, NF4_BLOCK, n))
            .view([rows, columns])
    };
    let [r, c] = out.size()[..] else {
        return Err(crate::Error::new("out must be a matrix"));
    };
    out.shallow_clone().f_copy_(&values.f_narrow(0, row, r)?.f_narrow(1, column, c)?)?;
    Ok(())
}

/// The mean in float32, `[1]`, in libtorch's order of summation as far as that does not depend on the number of threads.
pub(crate) fn mean(x: &Tensor) -> Tensor {
    const SERIAL: i64 = 32767; // what libtorch sums on one thread
    let n = x.numel() as i64;
    let sum = |t: &Tensor| t.sum(Kind::Float);
    let parts = || Tensor::stack(&x.split(SERIAL, 0).iter().map(sum).collect::<Vec<_>>(), 0);
    let total = if n <= SERIAL { sum(x) } else { sum(&parts()) };
    (total / n as f64).view([1])
}

pub fn quantize_dynamic(x: &Tensor) -> (Tensor, Tensor) {
    let x = x.to_kind(Kind::Float);
    let blocks = by_blocks(&x, CODE_BLOCK);
    let absmax = largest(&blocks);
    let none = absmax.eq(0.0).unsqueeze(-1);
    let y = (blocks * absmax.reciprocal().unsqueeze(-1)).clamp(-1.0, 1.0);
    let place = ((y + 1.0) * 0.5 * 65535.0 + 0.5).floor();
    let rounded = place * 2.0 / Tensor::full([1], 65535.0, (Kind::Float, x.device())) - 1.0;
    let midpoints = on(x.device(), Table::SignedMidpoints);
    let codes = rounded.bucketize(&midpoints, false, false).masked_fill(&none, 0).to_kind(Kind::Uint8);
    (codes.view([-1]).narrow(0, 0, x.numel() as i64), absmax)
}

pub(crate) fn dequantize_blocks(codes: &Tensor, absmax: &Tensor, signed: bool) -> Tensor {
    let map = on(codes.device(), if signed { Table::Signed } else { Table::Unsigned });
    map.index_select(0, &codes.to_kind(Kind::Int64)) * per_value(absmax, CODE_BLOCK, codes.numel() as i64)
}

/// The nearest codes; for unsigned ones, no positive value gets the code of 0.
fn store_nearest(x: &Tensor, to: &Moment, signed: bool) -> Result<()> {
    let n = x.numel() as i64;
    let absmax = largest(&by_blocks(x, CODE_BLOCK));
    let divisor = absmax.where_self(&absmax.gt(0.0), &absmax.ones_like());
    let table = if signed { Table::SignedMidpoints } else { Table::UnsignedMidpoints };
    let mut codes = (x / per_value(&divisor, CODE_BLOCK, n)).bucketize(&on(x.device(), table), false, false);
    if !signed {
        codes = codes.maximum(&x.gt(0.0).to_kind(Kind::Int64));
    }
    to.codes.shallow_clone().f_copy_(&codes)?;
    to.absmax.shallow_clone().f_copy_(&absmax)?;
    Ok(())
}

pub fn adamw8(
    p: &Tensor,
    g: &Tensor,
    m: &Moment,
    v: &Moment,
    copy: Option<&Tensor>,
    decayed: i64,
    o: AdamW,
) -> Result<()> {
    let kind = p.kind();
    let g = (g * o.grad_scale).to_kind(Kind::Float);
    let first = m.values(true) * o.beta1 + &g * (1.0 - o.beta1);
    let second = v.values(false) * o.beta2 + &g * &g * (1.0 - o.beta2);
    let correction = |beta: f64| 1.0 - beta.powi(o.step as i32);
    let denominator = second.to_kind(kind).sqrt() / correction(o.beta2).sqrt() + o.eps;
    let mut p = p.shallow_clone();
    let _ = p.narrow(0, 0, decayed.min(p.numel() as i64)).g_mul_scalar_(1.0 - o.lr * o.weight_decay);
    let _ = p.g_sub_(&(first.to_kind(kind) / denominator * (o.lr / correction(o.beta1))));
    if let Some(c) = copy {
        c.shallow_clone().f_copy_(&p)?;
    }
    store_nearest(&first, m, true)?;
    store_nearest(&second, v, false)
}
