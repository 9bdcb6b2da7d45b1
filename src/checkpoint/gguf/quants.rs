//! ggml's block formats: blocks of numbers with a scale (`ggml-quants.c`, `dequantize_row_*` and `quantize_row_*_ref`).
//! Results are equal to ggml's to the bit: the same operations in float32, in the same order.

use half::f16;

use crate::gguf::GgufDtype;

/// Elements of a block of the types that are not K types.
const SMALL: usize = 32;

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Numbers of whole blocks in float32. Floating-point types are no blocks, and are read as they are.
pub(super) fn dequantize(dtype: GgufDtype, blocks: &[u8], to: &mut [f32]) {
    let block: fn(&[u8], &mut [f32]) = match dtype {
        GgufDtype::Q4_0 => q4_0,
        GgufDtype::Q4_1 => q4_1,
        GgufDtype::Q5_0 => q5_0,
        GgufDtype::Q5_1 => q5_1,
        GgufDtype::Q8_0 => q8_0,
        GgufDtype::Q2_K => q2_k,
        GgufDtype::Q3_K => q3_k,
        GgufDtype::Q4_K => q4_k,
        GgufDtype::Q5_K => q5_k,
        GgufDtype::Q6_K => q6_k,
        GgufDtype::F32 | GgufDtype::F16 | GgufDtype::BF16 | GgufDtype::F64 => {
            unreachable!("{dtype} has no blocks")
        }
    };
    let (bytes, len) = (dtype.block_bytes(), dtype.block_len());
    for (from, to) in blocks.chunks_exact(bytes).zip(to.chunks_exact_mut(len)) {
        block(from, to);
    }
}

/// Low halves of 16 bytes, then high halves.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes.iter().map(|b| b & 15).chain(bytes.iter().map(|b| b >> 4))
}

/// Scale, 16 bytes.
fn q4_0(b: &[u8], to: &mut [f32]) {
    let d = half(b, 0);
    for (y, q) in to.iter_mut().zip(nibbles(&b[2..18])) {
        *y = (i32::from(q) - 8) as f32 * d;
    }
}

/// Scale, minimum, 16 bytes.
fn q4_1(b: &[u8], to: &mut [f32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (y, q) in to.iter_mut().zip(nibbles(&b[4..20])) {
        *y = f32::from(q) * d + m;
    }
}

/// The fifth bits of 32 numbers.
fn fifth(b: &[u8]) -> impl Iterator<Item = u8> {
    let bits = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    (0..SMALL).map(move |i| ((bits >> i & 1) << 4) as u8)
}

/// Scale, fifth bits, 16 bytes.
fn q5_0(b: &[u8], to: &mut [f32]) {
    let d = half(b, 0);
    for (y, (q, h)) in to.iter_mut().zip(nibbles(&b[6..22]).zip(fifth(&b[2..6]))) {
        *y = (i32::from(q | h) - 16) as f32 * d;
    }
}

/// Scale, minimum, fifth bits, 16 bytes.
fn q5_1(b: &[u8], to: &mut [f32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (y, (q, h)) in to.iter_mut().zip(nibbles(&b[8..24]).zip(fifth(&b[4..8]))) {
        *y = f32::from(q | h) * d + m;
    }
}

/// Scale, 32 bytes.
fn q8_0(b: &[u8], to: &mut [f32]) {
    let d = half(b, 0);
    for (y, q) in to.iter_mut().zip(&b[2..34]) {
        *y = f32::from(*q as i8) * d;
    }
}

/// 16 pairs of a scale and a minimum, 4 bits each; 64 bytes; their scale and minimum.
fn q2_k(b: &[u8], to: &mut [f32]) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    let (d, dmin) = (half(b, 80), half(b, 82));
    for (i, y) in to.iter_mut().enumerate() {
        // Two halves of 128, in each four planes of 2 bits over the same 32 bytes.
        let q = qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        let s = scales[i / 16];
        *y = d * f32::from(s & 15) * f32::from(q) - dmin * f32::from(s >> 4);
    }
}

/// 32 bytes of third bits, 64 bytes, 16 scales of 6 bits, their scale.
fn q3_k(b: &[u8], to: &mut [f32]) {
    let (high, qs, packed) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half(b, 108);
    let scale = |i: usize| {
        let low = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
        let top = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        i32::from(low | top << 4) - 32
    };
    for (i, y) in to.iter_mut().enumerate() {
        let q = i32::from(qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3);
        // The bit that is set stands for 0, the other for -4.
        let q = if high[i % 32] >> (i / 32) & 1 == 1 { q } else { q - 4 };
        *y = d * scale(i / 16) as f32 * q as f32;
    }
}

/// Scale and minimum `i` of 8, 6 bits each, in 12 bytes.
fn scale_min(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = match i {
        0..4 => (packed[i] & 63, packed[i + 4] & 63),
        _ => (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4),
    };
    (f32::from(scale), f32::from(min))
}

/// Scale and minimum, 8 pairs of them in 12 bytes, 128 bytes.
fn q4_k(b: &[u8], to: &mut [f32]) {
    let (d, dmin, packed, qs) = (half(b, 0), half(b, 2), &b[4..16], &b[16..144]);
    for (i, part) in to.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(packed, i);
        let (scale, min) = (d * scale, dmin * min);
        for (y, q) in part.iter_mut().zip(&qs[i / 2 * 32..]) {
            *y = scale * f32::from(q >> (i % 2 * 4) & 15) - min;
        }
    }
}

/// Scale and minimum, 8 pairs of them in 12 bytes, 32 bytes of fifth bits, 128 bytes.
fn q5_k(b: &[u8], to: &mut [f32]) {
    let (d, dmin, packed, high, qs) = (half(b, 0), half(b, 2), &b[4..16], &b[16..48], &b[48..176]);
    for (i, part) in to.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(packed, i);
        let (scale, min) = (d * scale, dmin * min);
        for ((y, q), h) in part.iter_mut().zip(&qs[i / 2 * 32..]).zip(high) {
            *y = scale * f32::from(q >> (i % 2 * 4) & 15 | (h >> i & 1) << 4) - min;
        }
    }
}

/// 128 bytes of low halves, 64 bytes of high quarters, 16 scales, their scale.
fn q6_k(b: &[u8], to: &mut [f32]) {
    let (low, high, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half(b, 208);
    for (i, y) in to.iter_mut().enumerate() {
        let (half, at) = (i / 128, i % 128);
        let l = low[half * 64 + at % 64] >> (at / 64 * 4) & 15;
        let h = high[half * 32 + at % 32] >> (at / 32 * 2) & 3;
        *y = d * f32::from(scales[i / 16] as i8) * (i32::from(l | h << 4) - 32) as f32;
    }
}

/// Blocks of `dtype` (Q8_0, Q4_0 or Q4_1) of these numbers, added to `to`; their number must be a multiple of 32.
pub(super) fn quantize(dtype: GgufDtype, numbers: &[f32], to: &mut Vec<u8>) {
    let block: fn(&[f32], &mut Vec<u8>) = match dtype {
        GgufDtype::Q8_0 => to_q8_0,
        GgufDtype::Q4_0 => to_q4_0,
        GgufDtype::Q4_1 => to_q4_1,
        _ => unreachable!("{dtype} is not written"),
    };
    numbers.chunks_exact(SMALL).for_each(|part| block(part, to));
}

/// 1 / `d`, or 0.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn put_half(x: f32, to: &mut Vec<u8>) {
    to.extend(f16::from_f32(x).to_le_bytes());
}

/// Two numbers of 4 bits a byte, the second 16 after the first.
fn put_nibbles(of: &[f32], to: &mut Vec<u8>, q: impl Fn(f32) -> u8) {
    let (low, high) = of.split_at(SMALL / 2);
    to.extend(low.iter().zip(high).map(|(a, b)| q(*a) | q(*b) << 4));
}

fn to_q8_0(of: &[f32], to: &mut Vec<u8>) {
    let most = of.iter().fold(0f32, |most, x| most.max(x.abs()));
    let d = most / 127.0;
    let id = inverse(d);
    put_half(d, to);
    // Away from zero where it lies in the middle, as C's roundf.
    to.extend(of.iter().map(|x| (x * id).round() as i8 as u8));
}

fn to_q4_0(of: &[f32], to: &mut Vec<u8>) {
    // The first of the largest magnitude, with its sign, becomes -8.
    let max = of.iter().copied().reduce(|max, x| if x.abs() > max.abs() { x } else { max }).unwrap_or(0.0);
    let d = max / -8.0;
    let id = inverse(d);
    put_half(d, to);
    put_nibbles(of, to, |x| ((x * id + 8.5) as u8).min(15));
}

fn to_q4_1(of: &[f32], to: &mut Vec<u8>) {
    let (min, max) = of.iter().fold((f32::MAX, f32::MIN), |(min, max), x| (min.min(*x), max.max(*x)));
    let d = (max - min) / 15.0;
    let id = inverse(d);
    put_half(d, to);
    put_half(min, to);
    put_nibbles(of, to, |x| (((x - min) * id + 0.5) as u8).min(15));
}
