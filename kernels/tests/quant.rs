//! Quantized weights, products with them, and AdamW with moments in 8 bits, against the compositions of libtorch's
//! operations: bit for bit on the CPU. With CORRAL_TEST_DEVICE=cuda on a GPU.

#![allow(clippy::disallowed_methods, reason = "the tests' own variables, CORRAL_TEST_* among them")]

use kernels::moments::{self, Moment};
use kernels::ops::{self, Composed};
use kernels::quant::{self, QuantOps, Quantized, Quantizer, Scales, Scheme};
use tch::{Device, Kind, Tensor};
use testing::device::{device, gpu_path, put};
use testing::tolerance::{Quantity, allowed};

const SCHEMES: [Scheme; 3] = [Scheme::Nf4, Scheme::Nf4Double, Scheme::Int8];
const KINDS: [Kind; 3] = [Kind::Double, Kind::Float, Kind::BFloat16];

fn randn(size: &[i64]) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu))
}

/// A weight with large values, a block and a row of zeros where there is room.
fn weight(rows: i64, columns: i64) -> Tensor {
    let w = randn(&[rows, columns]) * 0.02;
    let _ = w.get(0).get(columns / 2).fill_(1.5);
    if rows > 2 {
        let _ = w.get(rows - 1).zero_();
    }
    let _ = w.view([-1]).narrow(0, 0, (rows * columns).min(64)).zero_();
    w
}

const SHAPES: [[i64; 2]; 6] = [[1, 1], [7, 33], [5, 64], [130, 192], [64, 130], [3, 1000]];

fn equal(a: &Tensor, b: &Tensor) -> bool {
    a.to_device(Device::Cpu).equal(&b.to_device(Device::Cpu))
}

#[test]
fn codes_and_scales_are_the_compositions() {
    for [rows, columns] in SHAPES {
        let w = weight(rows, columns);
        let n = rows * columns;
        let bytes = |n, kind| Tensor::zeros([n], (kind, Device::Cpu));
        for scheme in SCHEMES {
            let q = Quantized::quantize(&put(&w), scheme).unwrap();
            let (data, absmax);
            if scheme == Scheme::Int8 {
                (data, absmax) = (bytes(n, Kind::Int8), bytes(rows, Kind::Float));
                Composed.int8_quantize(&w, &data, &absmax).unwrap();
            } else {
                (data, absmax) = (bytes((n + 1) / 2, Kind::Uint8), bytes((n + 63) / 64, Kind::Float));
                Composed.nf4_quantize(&w, &data, &absmax).unwrap();
            }
            let what = format!("{scheme:?} of [{rows}, {columns}]");
            assert!(equal(q.data(), &data), "{what}: codes");
            match q.scales() {
                Scales::Absmax(a) => assert!(equal(a, &absmax), "{what}: scales"),
                Scales::Double { codes, absmax: of_codes, offset } => {
                    let again = quant::dequantize_dynamic(codes, of_codes) + offset;
                    let spread = (&absmax - offset.to_device(Device::Cpu)).abs().max().double_value(&[]);
                    let worst = (again.to_device(Device::Cpu) - absmax).abs().max().double_value(&[]);
                    assert!(worst <= 0.02 * spread, "{what}: scales differ by {worst} of {spread}");
                }
            }
        }
    }
}

#[test]
fn any_rows_and_columns_are_the_compositions() {
    for [rows, columns] in SHAPES {
        let w = weight(rows, columns);
        for scheme in SCHEMES {
            let q = Quantized::quantize(&put(&w), scheme).unwrap();
            assert_eq!(q.shape(), [rows, columns]);
            for kind in KINDS {
                let whole = q.dequantize(0..rows, 0..columns, kind).unwrap();
                // Half a step of the coarsest scheme, nf4's, at the largest value of a block.
                let error = (whole.to_device(Device::Cpu).to_kind(Kind::Float) - &w).abs().max();
                assert!(error.double_value(&[]) <= 0.16 * 1.5, "{scheme:?} {kind:?}: {error:?}");
                for (r, c) in [(0, 0), (rows / 2, columns / 3), (rows - 1, columns - 1)] {
                    let size = [(rows - r + 1) / 2, (columns - c + 2) / 3];
                    let part = q.dequantize(r..r + size[0], c..c + size[1], kind).unwrap();
                    let twin = Tensor::empty(size, (kind, device()));
                    Composed.dequantize(&q, &twin, r, c).unwrap();
                    let what = format!("{scheme:?} [{rows}, {columns}] from {r}, {c} in {kind:?}");
                    assert!(part.equal(&twin), "{what}");
                    assert!(part.equal(&whole.narrow(0, r, size[0]).narrow(1, c, size[1])), "{what}");
                }
            }
        }
    }
}

#[test]
fn panels_give_the_same_weight() {
    let w = weight(50, 96); // blocks of 64 end with every second row
    for scheme in SCHEMES {
        let whole = Quantized::quantize(&w, scheme).unwrap();
        let mut quantizer = Quantizer::new(scheme, [50, 96], Device::Cpu);
        assert_eq!(quantizer.panel_rows(1), if scheme == Scheme::Int8 { 1 } else { 2 });
        let step = quantizer.panel_rows(96 * 7);
        assert_eq!(step, if scheme == Scheme::Int8 { 7 } else { 6 });
        let mut row = 0;
        while row < 50 {
            let n = step.min(50 - row);
            quantizer.push(&w.narrow(0, row, n)).unwrap();
            row += n;
        }
        let parts = quantizer.finish().unwrap();
        let all = |q: &Quantized| q.dequantize(0..50, 0..96, Kind::Float).unwrap();
        assert!(whole.data().equal(parts.data()) && all(&whole).equal(&all(&parts)), "{scheme:?}");
    }
}

/// Parts have the values of the whole, by rows and by columns.
#[test]
fn parts_have_the_same_values() {
    let whole = weight(12, 256);
    for scheme in [Scheme::Nf4, Scheme::Nf4Double, Scheme::Int8] {
        let q = Quantized::quantize(&whole, scheme).unwrap();
        let values = q.dequantize(0..12, 0..256, Kind::Float).unwrap();
        for (rows, columns) in [(0..12, 0..256), (4..8, 0..256), (0..12, 64..192), (3..9, 192..256)] {
            let part = q.part(rows.clone(), columns.clone()).unwrap();
            let [n, width] = part.shape();
            let expected = values.narrow(0, rows.start, n).narrow(1, columns.start, width);
            assert!(equal(&part.dequantize(0..n, 0..width, Kind::Float).unwrap(), &expected), "{scheme:?}");
        }
        let between = q.part(0..12, 32..96);
        assert_eq!(between.is_err(), scheme != Scheme::Int8, "{scheme:?}");
    }
    assert!(Quantized::has_parts(Scheme::Nf4, [8, 48], 4, 48));
    assert!(!Quantized::has_parts(Scheme::Nf4, [6, 48], 3, 48));
    assert!(!Quantized::has_parts(Scheme::Nf4, [6, 96], 6, 48));
}

#[test]
fn bytes_of_a_value() {
    for (scheme, limit) in [(Scheme::Nf4Double, 0.55), (Scheme::Int8, 1.05)] {
        let q = Quantized::quantize(&randn(&[256, 512]), scheme).unwrap();
        let each = q.bytes() as f64 / (256.0 * 512.0);
        assert!(each < limit && each > 0.5, "{scheme:?}: {each}");
    }
}

#[test]
fn what_cannot_be_quantized_is_refused() {
    #[track_caller]
    fn refused<T>(result: kernels::Result<T>, why: &str) {
        let e = result.err().expect("refused").to_string();
        assert!(e.contains(why), "{e}");
    }
    for scheme in SCHEMES {
        for bad in [f64::NAN, f64::INFINITY] {
            let w = randn(&[4, 64]);
            let _ = w.get(2).get(3).fill_(bad);
            refused(
                Quantized::quantize(&put(&w), scheme),
                "rows 0 to 3 of the weight hold values that are not finite",
            );
        }
        refused(Quantized::quantize(&randn(&[4]), scheme), "[4] is not a matrix");
        refused(Quantizer::new(scheme, [4, 64], device()).push(&randn(&[5, 64])), "are not the next");
        refused(Quantizer::new(scheme, [4, 64], device()).finish(), "was quantized with 0 rows");
        let q = Quantized::quantize(&put(&randn(&[4, 64])), scheme).unwrap();
        refused(q.dequantize(2..5, 0..64, Kind::Float), "not in the weight");
        refused(q.dequantize(0..4, 1..65, Kind::BFloat16), "not in the weight");
        refused(quant::linear(&[&q], &put(&randn(&[2, 63]))), "does not fit");
    }
    refused(Quantizer::new(Scheme::Nf4, [4, 32], device()).push(&randn(&[1, 32])), "do not end with a block");
}

#[test]
fn products_are_those_with_the_dequantized_weight() {
    for (shapes, n) in
        [(vec![[130i64, 192]], 5), (vec![[96, 160], [32, 160], [32, 160]], 17), (vec![[1500, 1000]], 3)]
    {
        for scheme in SCHEMES {
            let parts: Vec<_> = shapes
                .iter()
                .map(|&[r, c]| Quantized::quantize(&put(&weight(r, c)), scheme).unwrap())
                .collect();
            let each: Vec<_> = parts.iter().collect();
            for kind in KINDS {
                let whole: Vec<_> = parts
                    .iter()
                    .map(|p| p.dequantize(0..p.shape()[0], 0..p.shape()[1], kind).unwrap())
                    .collect();
                let w = Tensor::cat(&whole, 0);
                let (x, dy) =
                    (randn(&[n, w.size()[1]]).to_kind(kind), randn(&[n, w.size()[0]]).to_kind(kind));
                let (x, dy) = (put(&x), put(&dy));
                let tolerance = allowed(Quantity::QuantizedProduct, kind);
                for (what, a, b) in [
                    ("y", quant::linear(&each, &x).unwrap(), x.matmul(&w.tr())),
                    ("dx", quant::linear_backward(&each, &dy).unwrap(), dy.matmul(&w)),
                ] {
                    let d = (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[]);
                    let size = b.abs().max().double_value(&[]);
                    assert!(d <= tolerance * size, "{what} {scheme:?} {kind:?} {shapes:?}: {d} of {size}");
                }
            }
        }
    }
}

fn step(number: i64) -> ops::AdamW {
    ops::AdamW {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: number,
        grad_scale: 0.7,
    }
}

#[test]
fn adamw8_is_its_composition() {
    for kind in [Kind::Float, Kind::Double] {
        for (n, decayed) in [(1, 0), (5, 5), (256, 100), (1000, 256), (100_003, 70_000)] {
            let p = randn(&[n]).to_kind(kind);
            let (p1, p2) = (put(&p), put(&p));
            let new = || (Moment::zeros(n, device()), Moment::zeros(n, device()));
            let ((m1, v1), (m2, v2)) = (new(), new());
            let copy = Tensor::zeros([n], (Kind::BFloat16, device()));
            let mut always_same = Tensor::ones([n], (Kind::Bool, device()));
            for number in 1..4 {
                // Gradients over many powers of ten, some of them zero.
                let g = randn(&[n]) * (randn(&[n]) * 3.0).exp() * randn(&[n]).gt(-1.5);
                let g = put(&g.to_kind(kind));
                moments::adamw8(&p1, &g, &m1, &v1, Some(&copy), decayed, step(number)).unwrap();
                Composed.adamw8(&p2, &g, [&m2, &v2], None, decayed, step(number)).unwrap();
                assert!(copy.equal(&p1.to_kind(Kind::BFloat16)), "the bfloat16 copy is the rounded value");
                let apart = (&p1 - &p2).abs().max().double_value(&[]);
                if !gpu_path() {
                    // The moments need no square root.
                    assert!(
                        apart < allowed(Quantity::FusedUpdate, Kind::Float),
                        "p: {apart} apart, {n} in {kind:?}"
                    );
                    for (a, b) in [(&m1, &m2), (&v1, &v2)] {
                        assert!(a.codes.equal(&b.codes) && a.absmax.equal(&b.absmax), "{n} in {kind:?}");
                    }
                } else {
                    // There products and sums may be contracted: few codes next to a boundary are their neighbours, and where
                    // both moments have the same codes parameters are as near as on a CPU.
                    let same = m1.codes.eq_tensor(&m2.codes) * v1.codes.eq_tensor(&v2.codes);
                    let differ = 1.0 - same.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
                    assert!(differ * n as f64 <= 2.0 + 1e-3 * n as f64, "{differ} of {n} codes differ");
                    always_same *= same;
                    let apart = ((&p1 - &p2) * &always_same).abs().max().double_value(&[]);
                    assert!(apart < allowed(Quantity::FusedUpdateOnGpu, Kind::Float), "p: {apart} apart");
                }
            }
        }
    }
    let (p, m) = (randn(&[4]), Moment::zeros(4, Device::Cpu));
    let e = moments::adamw8(&p, &p, &m, &m, None, 5, step(1)).unwrap_err().to_string();
    assert!(e.contains("5 of 4 values"), "{e}");
    let e = moments::adamw8(&p, &p, &m, &Moment::zeros(5, Device::Cpu), None, 4, step(1))
        .unwrap_err()
        .to_string();
    assert!(e.contains("codes must"), "{e}");
}

/// Near AdamW with moments in float32: over 200 steps of a quadratic with noise, and where gradients stop.
#[test]
fn adamw8_follows_adamw() {
    let n = 4096;
    let target = put(&randn(&[n]));
    let (p, p8) = (target.zeros_like(), target.zeros_like());
    let (m, v) = (p.zeros_like(), p.zeros_like());
    let (m8, v8) = (Moment::zeros(n, device()), Moment::zeros(n, device()));
    for number in 1..=200 {
        let noise = put(&(randn(&[n]) * 0.1));
        let o = ops::AdamW { weight_decay: 0.0, grad_scale: 1.0, ..step(number) };
        ops::adamw(&p, &(&p - &target + &noise), &m, &v, None, o).unwrap();
        moments::adamw8(&p8, &(&p8 - &target + &noise), &m8, &v8, None, n, o).unwrap();
    }
    let norm = |t: &Tensor| t.norm().double_value(&[]);
    let (apart, moved) = (norm(&(&p - &p8)), norm(&p));
    assert!(apart < 0.05 * moved, "{apart} apart after {moved}");
    // A second moment that would be rounded to zero: the step stays one of AdamW's.
    let before = p8.copy();
    let g = p8.zeros_like();
    let _ = g.get(0).fill_(1e6);
    for number in 201..=203 {
        moments::adamw8(&p8, &g, &m8, &v8, None, n, step(number)).unwrap();
    }
    let most = (&p8 - before).abs().max().double_value(&[]);
    assert!(most < 0.1, "{most}");
}

#[test]
fn dynamic_maps() {
    // FNV-1a of the bytes of bitsandbytes 0.50.2's maps.
    for (signed, hash) in [(true, 0xd677f22a96665bc4u64), (false, 0x43811b16730a873e)] {
        let map = quant::dynamic_map(signed, Device::Cpu);
        let values = Vec::<f32>::try_from(&map).unwrap();
        assert!(values.is_sorted() && values[255] == 1.0);
        let bytes = values.iter().flat_map(|v| v.to_le_bytes());
        let found = bytes.fold(0xcbf29ce484222325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100000001b3));
        assert_eq!(found, hash, "signed: {signed}");
    }
}
