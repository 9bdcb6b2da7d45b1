//! bitsandbytes' dynamic 8-bit codes: the values that they stand for, and tensors coded with them.

use std::sync::{Mutex, OnceLock};

use tch::{Device, Kind, Tensor};

/// Values of one scale of a dynamic 8-bit code.
pub const CODE_BLOCK: i64 = 256;

/// How many blocks n values take.
pub(crate) fn blocks(n: i64, block: i64) -> i64 {
    (n + block - 1) / block
}

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

/// The values of blocks, the last one filled up with zeros: `[blocks, block]`.
pub(crate) fn by_blocks(x: &Tensor, block: i64) -> Tensor {
    let n = x.numel() as i64;
    let padding = (n + block - 1) / block * block - n;
    x.view([-1]).constant_pad_nd([0, padding]).view([-1, block])
}

/// Per value what is there per block: `[n]`.
pub(crate) fn per_value(scales: &Tensor, block: i64, n: i64) -> Tensor {
    scales.repeat_interleave_self_int(block, 0, None).narrow(0, 0, n)
}

pub(crate) fn largest(x: &Tensor) -> Tensor {
    x.abs().amax([-1i64].as_slice(), false)
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

/// bitsandbytes' dynamic 8-bit map (Dettmers 2016), float32 `[256]` in ascending order: seven powers of ten, with more
/// values the larger they are, and 0 and 1; signed, or of numbers from 0 on.
pub fn dynamic_map(signed: bool, device: Device) -> Tensor {
    on(device, if signed { Table::Signed } else { Table::Unsigned })
}

/// Codes (uint8 `[n]`) and scales (float32 `[n / 256]`, rounded up) of x: float32 `[n]` in the signed [`dynamic_map`], bit
/// for bit as bitsandbytes' CPU code computes them: a value divided by its block's largest is first rounded to one of
/// 65,536 places between -1 and 1, then to the nearest code.
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

/// float32 `[n]` of what [`quantize_dynamic`] gave.
pub fn dequantize_dynamic(codes: &Tensor, absmax: &Tensor) -> Tensor {
    dequantize(codes, absmax, true)
}

/// float32 `[n]` of codes of either map.
pub(crate) fn dequantize(codes: &Tensor, absmax: &Tensor, signed: bool) -> Tensor {
    let map = on(codes.device(), if signed { Table::Signed } else { Table::Unsigned });
    map.index_select(0, &codes.to_kind(Kind::Int64)) * per_value(absmax, CODE_BLOCK, codes.numel() as i64)
}
