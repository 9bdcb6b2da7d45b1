//! Every operation against its composition of libtorch's, taken on the CPU in float64, in float64, float32 and bfloat16; and
//! the compositions' backwards against libtorch's autograd, in float64. On the CPU, or with CORRAL_TEST_DEVICE=cuda on a GPU.

#![allow(clippy::disallowed_methods, reason = "the tests' own variables, CORRAL_TEST_* among them")]
#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use kernels::ops::{self, Composed, KeysValues, Rotation, RowOps};
use tch::{Device, Kind, Tensor};
use testing::compare::{largest_at, relative_number};
use testing::device::{device, emulated, exact, gpu_path, put};
use testing::tolerance::{Quantity, allowed};

const KINDS: [Kind; 3] = [Kind::Double, Kind::Float, Kind::BFloat16];

/// The dtype of statistics, for tolerances.
fn statistics(kind: Kind) -> Kind {
    ops::accumulator(kind)
}

fn randn(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Double, Device::Cpu)).to_kind(kind)
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    largest_at(a, b, 0.1)
}

#[track_caller]
fn same_at(what: &str, a: &Tensor, b: &Tensor, kind: Kind, size: f64) {
    let d = largest_at(a, b, size);
    assert!(d <= allowed(Quantity::Operation, kind), "{what} in {kind:?}: differs by {d:e}");
}

#[track_caller]
fn same(what: &str, a: &Tensor, b: &Tensor, kind: Kind) {
    same_at(what, a, b, kind, 0.1);
}

fn gain(weight: &Tensor, offset: f64) -> ops::Gain<'_> {
    ops::Gain { weight, offset }
}

#[test]
fn rms_norm() {
    for kind in KINDS {
        let sizes = [(1, 1), (37, 48), (65, 288), (3, 1023), (700, 64), (5, 4096)];
        for (n, c, offset) in sizes.into_iter().flat_map(|(n, c)| [(n, c, 0.0), (n, c, 1.0)]) {
            let (x, w) = (randn(&[n, c], kind), randn(&[c], kind));
            let (dx, dw) = (put(&x), put(&w));
            let (y, rstd) = ops::rms_norm(&dx, gain(&dw, offset), 1e-5).unwrap();
            let (y2, rstd2) = Composed.rms_norm(&exact(&x), gain(&exact(&w), offset), 1e-5).unwrap();
            same("y", &y, &y2, kind);
            same("rstd", &rstd, &rstd2, statistics(kind));
            assert!(
                ops::rms_apply(&dx, gain(&dw, offset), &rstd).unwrap().equal(&y),
                "recomputing changes no bit"
            );
            let (dy, residual) = (randn(&[n, c], kind), randn(&[n, c], kind));
            for residual in [None, Some(&residual)] {
                let start = randn(&[c], ops::accumulator(kind));
                let grad = put(&start);
                let on_device = residual.map(put);
                let again = put(&start);
                let out =
                    ops::rms_backward(&put(&dy), &dx, gain(&dw, offset), &rstd, on_device.as_ref(), &grad)
                        .unwrap();
                let grad2 = exact(&start);
                let residual = residual.map(exact);
                let out2 = Composed
                    .rms_backward(
                        &exact(&dy),
                        &exact(&x),
                        gain(&exact(&w), offset),
                        &rstd2,
                        residual.as_ref(),
                        &grad2,
                    )
                    .unwrap();
                let terms =
                    (exact(&dy) * (exact(&w) + offset) * rstd2.unsqueeze(-1)).abs().max().double_value(&[]);
                same_at("dx", &out, &out2, kind, terms);
                same("dw", &grad, &grad2, statistics(kind));
                let _ =
                    ops::rms_backward(&put(&dy), &dx, gain(&dw, offset), &rstd, on_device.as_ref(), &again)
                        .unwrap();
                assert!(again.equal(&grad), "the same input gives the same bits");
            }
        }
    }
}

#[test]
fn rope() {
    for kind in KINDS {
        for (n, heads, d) in [(19, 3, 16), (5, 2, 6), (33, 40, 128)] {
            let a = ops::accumulator(kind);
            let angle = Tensor::rand([40, d / 2], (a, Device::Cpu)) * 6.0;
            let (cos, sin) = (angle.cos(), angle.sin());
            let positions = Tensor::randint(40, [n], (Kind::Int64, Device::Cpu));
            let x = randn(&[n, (heads + 1) * d], kind);
            for inverse in [false, true] {
                let (y, y2) = (put(&x), exact(&x));
                ops::rope(&y, &put(&positions), &put(&cos), &put(&sin), heads, d, inverse).unwrap();
                let (cos, sin) = (&exact(&cos), &exact(&sin));
                let rotation = Rotation { positions: &positions, cos, sin, heads, head_dim: d, inverse };
                Composed.rope(&y2, rotation).unwrap();
                same("rope", &y, &y2, kind);
                let rest = |t: &Tensor| exact(&t.narrow(1, heads * d, d));
                assert!(rest(&y).equal(&rest(&x)), "other heads stay");
            }
        }
    }
}

#[test]
fn swiglu() {
    for kind in KINDS {
        for (n, f) in [(1, 3), (33, 100), (7, 1376)] {
            let gu = randn(&[n, 2 * f], kind) * 4.0;
            let on_device = put(&gu);
            same("a", &ops::swiglu(&on_device).unwrap(), &Composed.swiglu(&exact(&gu)).unwrap(), kind);
            let da = randn(&[n, f], kind);
            let (d, a, d2, a2) = (on_device, put(&da), exact(&gu), exact(&da));
            ops::swiglu_backward(&d, &a).unwrap();
            Composed.swiglu_backward(&d2, &a2).unwrap();
            same("dgu", &d, &d2, kind);
            same("a again", &a, &a2, kind);
        }
    }
}

#[test]
fn log_softmax() {
    for kind in KINDS {
        for (n, v) in [(1, 2), (13, 515), (5, 4096), (3, 40_000)] {
            let logits = randn(&[n, v], kind) * 5.0;
            let labels = Tensor::randint(v, [n], (Kind::Int64, Device::Cpu));
            let _ = labels.get(0).fill_(-100);
            let a = ops::accumulator(kind);
            let coef = randn(&[n], a);
            let new = |kind, device| (Tensor::zeros([n], (kind, device)), Tensor::zeros([n], (kind, device)));
            let ((p, e), (p2, e2)) = (new(a, device()), new(Kind::Double, Device::Cpu));
            let (l, l2) = (put(&logits), exact(&logits));
            ops::log_softmax(&l, &put(&labels), Some(&put(&coef)), &p, Some(&e)).unwrap();
            Composed.log_softmax(&l2, &labels, Some(&exact(&coef)), &p2, Some(&e2)).unwrap();
            same("logp", &p, &p2, statistics(kind));
            same("entropy", &e, &e2, statistics(kind));
            same("dlogits", &l, &l2, kind);
        }
    }
}

#[test]
fn label_beyond_the_vocabulary_is_an_error() {
    let logits = randn(&[2, 5], Kind::Float);
    let labels = Tensor::from_slice(&[1i64, 5]);
    let logp = Tensor::zeros([2], (Kind::Float, device()));
    let done = ops::log_softmax(&put(&logits), &put(&labels), None, &logp, None);
    if !gpu_path() {
        let e = done.unwrap_err();
        assert!(e.to_string().contains("beyond the vocabulary of 5"), "{e}");
    } else {
        done.unwrap();
        assert!(logp.double_value(&[0]).is_finite() && logp.double_value(&[1]).is_nan());
    }
}

/// On the CPU, kernels take pointers: what does not fit must be refused before.
#[test]
#[expect(clippy::too_many_lines, reason = "a case for each operation")]
fn what_does_not_fit_is_refused() {
    #[track_caller]
    fn refused<T>(result: kernels::Result<T>, why: &str) {
        let e = result.err().expect("refused").to_string();
        let words = ["must be", "do not fit", "matrix", "statistics", "lse of"]; // of the GPU's path
        assert!(e.contains(why) || (emulated() && words.iter().any(|part| e.contains(part))), "{e}");
    }
    let float = |size: &[i64]| Tensor::ones(size, (Kind::Float, Device::Cpu));
    let double = |size: &[i64]| Tensor::ones(size, (Kind::Double, Device::Cpu));
    let ints = Tensor::from_slice::<i64>;
    let (x, w, rstd) = (float(&[3, 4]), float(&[4]), float(&[3]));

    refused(
        ops::rms_norm(&x, gain(&double(&[4]), 0.0), 1e-5),
        "w must have 4 elements of Float, not 4 of Double",
    );
    refused(ops::rms_norm(&x, gain(&float(&[5]), 0.0), 1e-5), "no rows of 5");
    refused(ops::rms_norm(&x, gain(&float(&[0]), 0.0), 1e-5), "no rows of 0");
    refused(ops::rms_norm(&float(&[4, 3]).tr(), gain(&w, 0.0), 1e-5), "x must be a contiguous CPU tensor");
    refused(ops::rms_apply(&x, gain(&w, 0.0), &float(&[2])), "rstd must have 3 elements");
    let backward = |dy: &Tensor, rstd: &Tensor, residual: Option<&Tensor>, dw: &Tensor| {
        ops::rms_backward(dy, &x, gain(&w, 0.0), rstd, residual, dw)
    };
    refused(backward(&float(&[2, 4]), &rstd, None, &w), "dy must have 12 elements");
    refused(backward(&x, &double(&[3]), None, &w), "rstd must have 3 elements of Float");
    refused(backward(&x, &rstd, Some(&double(&[3, 4])), &w), "residual must have 12 elements of Float");
    refused(backward(&x, &rstd, None, &float(&[3])), "dw must have 4 elements");

    let (cos, zeros) = (float(&[5, 1]), ints(&[0; 3]));
    let rope =
        |positions: &Tensor, sin: &Tensor, heads, d| ops::rope(&x, positions, &cos, sin, heads, d, false);
    rope(&ints(&[0, 4, 2]), &cos, 2, 2).unwrap();
    if !emulated() {
        refused(rope(&ints(&[0, 5, 2]), &cos, 2, 2), "position 5 is beyond the tables' 5");
        refused(rope(&ints(&[0, -1, 2]), &cos, 2, 2), "position -1");
    }
    refused(rope(&zeros.to_kind(Kind::Int), &cos, 2, 2), "positions must have 3 elements of Long");
    refused(rope(&zeros, &float(&[4, 1]), 2, 2), "sin must have 5 elements");
    refused(rope(&zeros, &cos, 3, 2), "shapes do not fit");
    refused(rope(&zeros, &cos, 1, 4), "cos must have 10 elements");

    refused(ops::swiglu_backward(&x, &float(&[3, 1])), "da must have 6 elements");
    refused(ops::swiglu_backward(&x, &double(&[3, 2])), "da must have 6 elements of Float");
    refused(ops::swiglu(&float(&[3, 5])), "[N, 2F]");

    let softmax = |coef: Option<&Tensor>, logp: &Tensor, entropy: Option<&Tensor>| {
        ops::log_softmax(&x, &zeros, coef, logp, entropy)
    };
    refused(softmax(None, &double(&[3]), None), "logp must have 3 elements of Float");
    refused(softmax(Some(&float(&[2])), &rstd, None), "coef must have 3 elements");
    refused(softmax(None, &rstd, Some(&float(&[1]))), "entropy must have 3 elements");

    let o = ops::AdamW {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 1,
        grad_scale: 1.0,
    };
    let (p, bf16) = (float(&[8]), float(&[8]).to_kind(Kind::BFloat16));
    refused(ops::adamw(&p, &float(&[7]), &p, &p, None, o), "g must have 8 elements");
    refused(ops::adamw(&p, &p, &double(&[8]), &p, None, o), "m must have 8 elements of Float");
    refused(ops::adamw(&p, &p, &p, &float(&[9]), None, o), "v must have 8 elements");
    refused(ops::adamw(&p, &p, &p, &p, Some(&p), o), "copy must have 8 elements of BFloat16");
    refused(ops::adamw(&bf16, &bf16, &bf16, &bf16, None, o), "p must have 8 elements of Float");

    refused(ops::embedding_backward(&x, &zeros, &float(&[7, 5])), "dx must have 15 elements");
    refused(ops::embedding_backward(&x, &zeros, &double(&[7, 4])), "dw must have 28 elements of Float");
    refused(ops::accumulate(&float(&[11]), &x, true), "dst must have 12 elements");

    let h = ops::Heads::new(1, 2, 1, 2);
    let all = ops::Spans::rows();
    let (qkv, out, lse) = (float(&[3, 8]), float(&[3, 4]), float(&[1, 2, 3]));
    for wrong in [ops::Heads { kv_heads: 0, heads: 4, ..h }, ops::Heads { batch: 0, ..h }] {
        refused(ops::attention(&qkv, &all, wrong), "shapes do not fit");
    }
    let two = ops::Spans::new(Some(&[0; 2]), [1, 2], None, Device::Cpu).unwrap();
    refused(ops::attention(&qkv, &two, h), "start must have 3 elements");
    refused(
        ops::attention_backward(&float(&[2, 4]), &qkv, &out, &lse, &all, h),
        "dout must have 12 elements",
    );
    refused(ops::attention_backward(&out, &qkv, &out, &float(&[2, 2]), &all, h), "lse must have 6 elements");

    let (cache, one) = (float(&[2, 1, 5, 2]), ints(&[1]));
    let row = float(&[1, 8]);
    let decode = |cache: &Tensor, slot: &Tensor, position: &Tensor| {
        let cache = KeysValues { keys: cache, values: cache, slot, position, first: None, longest: 5 };
        ops::decode_attention(&row, cache, h)
    };
    drop(decode(&cache, &one, &one).unwrap());
    refused(decode(&double(&[2, 1, 5, 2]), &one, &one), "keys must have 20 elements of Float");
    refused(decode(&cache, &ints(&[1, 0]), &one), "slot must have 1 elements");
    refused(decode(&cache, &one, &one.to_kind(Kind::Int)), "position must have 1 elements of Long");
    refused(decode(&float(&[2, 0, 5, 2]), &one, &one), "shapes do not fit");
}

/// What positions may see: all, a window, rows with padding on the left, packed documents of which some are one token long, and
/// both.
fn spans_of(batch: i64, time: i64) -> Vec<(Option<Vec<i64>>, Option<i64>)> {
    let starts = |begins: &[i64]| -> Vec<i64> {
        let begin = |i: i64| begins.iter().copied().filter(|b| *b <= i).max().unwrap_or(0);
        (0..batch * time).map(|i| begin(i % time)).collect()
    };
    let (padded, packed) = (starts(&[0, 9]), starts(&[0, 1, 2, 8, 31]));
    vec![
        (None, None),
        (None, Some(8)),
        (Some(padded), None),
        (Some(packed.clone()), None),
        (Some(packed), Some(5)),
    ]
}

#[test]
fn attention() {
    for kind in KINDS {
        for (batch, time, heads, kv_heads, head_dim) in [
            (1, 1, 1, 1, 4),
            (2, 37, 4, 2, 16),
            (1, 70, 3, 3, 48),
            (2, 33, 2, 1, 64),
            (1, 129, 2, 2, 10),
            (2, 200, 8, 2, 128),
        ] {
            let h = ops::Heads::new(batch, heads, kv_heads, head_dim);
            let qkv = randn(&[batch * time, (heads + 2 * kv_heads) * head_dim], kind);
            for (starts, window) in spans_of(batch, time) {
                let spans =
                    |device| ops::Spans::new(starts.as_deref(), [batch, time], window, device).unwrap();
                let (there, here) = (spans(device()), spans(Device::Cpu));
                let on_device = put(&qkv);
                let (o, lse) = ops::attention(&on_device, &there, h).unwrap();
                let (o2, lse2) = Composed.attention(&exact(&qkv), &here, h).unwrap();
                same("out", &o, &o2, kind);
                same("lse", &lse, &lse2, statistics(kind));
                let dout = randn(&[batch * time, heads * head_dim], kind);
                let backward =
                    || ops::attention_backward(&put(&dout), &on_device, &o, &lse, &there, h).unwrap();
                let d = backward();
                let d2 = Composed
                    .attention_backward(&exact(&dout), &exact(&qkv), &exact(&o), &lse2, &here, h)
                    .unwrap();
                let value = if !gpu_path() { Quantity::Operation } else { Quantity::FlashBackward };
                let distance = distance(&d, &d2);
                assert!(distance <= allowed(value, kind), "dqkv in {kind:?}: differs by {distance:e}");
                assert!(backward().equal(&d), "the same input gives the same bits");
            }
        }
    }
}

/// Two ranks with two chunks of every row each: their outputs are those of whole rows, and so are the sums of their gradients.
#[test]
fn attention_of_some_positions() {
    for kind in KINDS {
        for (batch, chunk, heads, kv_heads, head_dim, softcap) in
            [(2, 5, 4, 2, 16, None), (1, 33, 3, 3, 48, None), (2, 8, 8, 1, 64, Some(20.0))]
        {
            let time = 4 * chunk;
            let h = ops::Heads { softcap, ..ops::Heads::new(batch, heads, kv_heads, head_dim) };
            let qkv = randn(&[batch * time, (heads + 2 * kv_heads) * head_dim], kind);
            let dout = randn(&[batch * time, heads * head_dim], kind);
            let (q, kv) = (
                qkv.narrow(1, 0, heads * head_dim),
                qkv.narrow(1, heads * head_dim, 2 * kv_heads * head_dim),
            );
            for (starts, window) in spans_of(batch, time) {
                let spans = ops::Spans::new(starts.as_deref(), [batch, time], window, Device::Cpu).unwrap();
                let (all, all_lse) = Composed.attention(&exact(&qkv), &spans, h).unwrap();
                let expected = Composed
                    .attention_backward(&exact(&dout), &exact(&qkv), &all, &all_lse, &spans, h)
                    .unwrap();
                let [dq2, dkv2] = [(0, heads), (heads, 2 * kv_heads)]
                    .map(|(first, n)| expected.narrow(1, first * head_dim, n * head_dim));
                let mut dkv_sum: Option<Tensor> = None;
                for chunks in [[0, 3], [1, 2]] {
                    let at: Vec<i64> = chunks.into_iter().flat_map(|c| c * chunk..(c + 1) * chunk).collect();
                    let places: Vec<i64> =
                        (0..batch).flat_map(|b| at.iter().map(move |at| b * time + at)).collect();
                    let places = Tensor::from_slice(&places);
                    let part = |t: &Tensor| t.index_select(0, &places);
                    let start = spans.start().map(|s| put(&part(s)));
                    let own = ops::OwnPositions::new(at.clone(), start);
                    let (q, dout, kv) = (put(&part(&q)), put(&part(&dout)), put(&kv.contiguous()));
                    let (out, lse) = ops::attention_of(&q, &kv, &own, h).unwrap();
                    same("out", &out, &part(&all), kind);
                    let rows = Tensor::from_slice(&at);
                    same("lse", &lse, &all_lse.index_select(2, &rows), statistics(kind));
                    let (dq, dkv) =
                        ops::attention_of_backward(&dout, &q, &kv, [&out, &lse], &own, h).unwrap();
                    let d = distance(&dq, &part(&dq2));
                    assert!(d <= allowed(Quantity::FlashBackward, kind), "dq in {kind:?}: {d:e}");
                    dkv_sum = Some(dkv_sum.map_or_else(|| dkv.copy(), |sum| sum + &dkv));
                }
                let d = distance(&dkv_sum.unwrap(), &dkv2);
                assert!(d <= allowed(Quantity::FlashBackward, kind), "dkv in {kind:?}: {d:e}");
            }
        }
    }
    let own = ops::OwnPositions::new(vec![0, 5], None);
    let h = ops::Heads::new(1, 2, 1, 4);
    let (q, kv) = (randn(&[2, 8], Kind::Float), randn(&[5, 8], Kind::Float));
    let why = ops::attention_of(&q, &kv, &own, h).unwrap_err().to_string();
    assert!(why.contains("do not fit"), "{why}");
}

#[test]
fn decode_attention() {
    for kind in KINDS {
        for (heads, kv_heads, head_dim) in [(1, 1, 4), (4, 2, 16), (3, 3, 48), (8, 2, 64), (2, 1, 10)] {
            let (slots, capacity, batch) = (5, 41, 4);
            let h = ops::Heads::new(batch, heads, kv_heads, head_dim);
            let (k, v) = (
                randn(&[slots, kv_heads, capacity, head_dim], kind),
                randn(&[slots, kv_heads, capacity, head_dim], kind),
            );
            let (k2, v2) = (exact(&k), exact(&v));
            let (k, v) = (put(&k), put(&v));
            let qkv = randn(&[batch, (heads + 2 * kv_heads) * head_dim], kind);
            let slot = Tensor::from_slice(&[3i64, 0, 4, 1]);
            let position = Tensor::from_slice(&[0i64, 40, 22, 7]);
            let (s, p) = (put(&slot), put(&position));
            let cache =
                KeysValues { keys: &k, values: &v, slot: &s, position: &p, first: None, longest: capacity };
            let out = ops::decode_attention(&put(&qkv), cache, h).unwrap();
            let cache = KeysValues { keys: &k2, values: &v2, slot: &slot, position: &position, ..cache };
            let out2 = Composed.decode_attention(&exact(&qkv), cache, h).unwrap();
            same("out", &out, &out2, kind);
            assert!(
                exact(&k).equal(&k2) && exact(&v).equal(&v2),
                "both write the same key and value, and nothing else"
            );

            // A token at the end of a row: what the attention over the whole row says of its last position.
            let time = 19;
            let row = randn(&[time, (heads + 2 * kv_heads) * head_dim], kind);
            let (k, v) = (k.zeros_like(), v.zeros_like());
            let part = |first: i64| {
                row.narrow(1, first * head_dim, kv_heads * head_dim)
                    .view([time, kv_heads, head_dim])
                    .transpose(0, 1)
            };
            k.get(2).narrow(1, 0, time).copy_(&part(heads));
            v.get(2).narrow(1, 0, time).copy_(&part(heads + kv_heads));
            let last = row.narrow(0, time - 1, 1).contiguous();
            let one = ops::Heads { batch: 1, ..h };
            let (slot, position) = (Tensor::from_slice(&[2i64]), Tensor::from_slice(&[time - 1]));
            let (all_see, window) = (Tensor::zeros([time], (Kind::Int64, Device::Cpu)), 6);
            let sees = (Tensor::arange(time, (Kind::Int64, Device::Cpu)) - (window - 1)).clamp_min(0);
            for (start, seen) in [(None, None), (Some(&all_see), None), (Some(&sees), Some(window))] {
                let first = start.map(|s| put(&s.narrow(0, time - 1, 1)));
                let spans = ops::Spans::new(None, [1, time], seen, Device::Cpu).unwrap();
                let (q, s, p) = (put(&last), put(&slot), put(&position));
                let (keys, values, first) = (&k, &v, first.as_ref());
                let cache = KeysValues { keys, values, slot: &s, position: &p, first, longest: time };
                let out = ops::decode_attention(&q, cache, one).unwrap();
                let all = Composed.attention(&exact(&row), &spans, one).unwrap().0;
                same("last position", &out, &all.narrow(0, time - 1, 1), kind);
                let out = Composed.decode_attention(&q, cache, one).unwrap();
                same("last position, composed", &out, &all.narrow(0, time - 1, 1), kind);
            }
        }
    }
}

/// On a GPU, which is not waited for, the row is NaN; the others are not.
#[test]
fn decoding_beyond_the_cache_is_an_error() {
    let cache = put(&randn(&[2, 1, 3, 4], Kind::Float));
    let h = ops::Heads::new(2, 1, 1, 4);
    let qkv = put(&randn(&[2, 12], Kind::Float));
    let slot = put(&Tensor::from_slice(&[0i64, 1]));
    for (position, first, why) in [
        ([1i64, 3], None, "position 3 is beyond the cache's 3"),
        ([1, 1], Some([0i64, 2]), "first 2 is not between 0 and the position"),
    ] {
        let (position, first) =
            (put(&Tensor::from_slice(&position)), first.map(|f| put(&Tensor::from_slice(&f))));
        let first = first.as_ref();
        let cache =
            KeysValues { keys: &cache, values: &cache, slot: &slot, position: &position, first, longest: 3 };
        let out = ops::decode_attention(&qkv, cache, h);
        if gpu_path() {
            let finite = out.unwrap().isfinite().all_dim(1, false);
            assert_eq!(Vec::<bool>::try_from(finite).unwrap(), [true, false]);
        } else {
            let e = out.unwrap_err().to_string();
            assert!(e.contains(why), "{e}");
        }
    }
}

/// Rows over several chunks of the GPU's kernel, many queries a key, caps, and positions at chunks' ends.
#[test]
fn decode_attention_over_long_rows() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for (heads, kv_heads, head_dim, softcap) in
            [(14, 2, 64, None), (9, 1, 72, Some(3.0)), (2, 2, 256, None), (3, 1, 5, None)]
        {
            let (slots, capacity, batch) = (4, 400, 4);
            let h = ops::Heads { softcap, ..ops::Heads::new(batch, heads, kv_heads, head_dim) };
            let (k, v) = (
                randn(&[slots, kv_heads, capacity, head_dim], kind),
                randn(&[slots, kv_heads, capacity, head_dim], kind),
            );
            let qkv = randn(&[batch, (heads + 2 * kv_heads) * head_dim], kind);
            let slot = put(&Tensor::from_slice(&[3i64, 0, 2, 1]));
            let position = put(&Tensor::from_slice(&[127i64, 128, 399, 255]));
            let first = put(&Tensor::from_slice(&[0i64, 128, 130, 250]));
            for first in [None, Some(&first)] {
                let ((k1, v1), (k2, v2)) = ((put(&k), put(&v)), (exact(&k), exact(&v)));
                let cache = KeysValues {
                    keys: &k1,
                    values: &v1,
                    slot: &slot,
                    position: &position,
                    first,
                    longest: capacity,
                };
                let out = ops::decode_attention(&put(&qkv), cache, h).unwrap();
                let [slot, position] = [&slot, &position].map(|t| t.to_device(Device::Cpu));
                let first = first.map(|t| t.to_device(Device::Cpu));
                let (slot, position, first) = (&slot, &position, first.as_ref());
                let cache = KeysValues { keys: &k2, values: &v2, slot, position, first, longest: capacity };
                same("out", &out, &Composed.decode_attention(&exact(&qkv), cache, h).unwrap(), kind);
                assert!(exact(&k1).equal(&k2) && exact(&v1).equal(&v2));
            }
        }
    }
}

#[test]
fn adamw_and_sums() {
    for kind in [Kind::Float, Kind::Double] {
        for n in [1, 5, 100_003, 1 << 20] {
            let [p, g, m, v] =
                [randn(&[n], kind), randn(&[n], kind), randn(&[n], kind), randn(&[n], kind).square()];
            let [p1, g1, m1, v1] = [&p, &g, &m, &v].map(put);
            let [p2, g2, m2, v2] = [&p, &g, &m, &v].map(exact);
            let copy = Tensor::zeros([n], (Kind::BFloat16, device()));
            let o = ops::AdamW {
                lr: 1e-2,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                step: 3,
                grad_scale: 0.7,
            };
            ops::adamw(&p1, &g1, &m1, &v1, Some(&copy), o).unwrap();
            Composed.adamw(&p2, &g2, &m2, &v2, None, o).unwrap();
            same("p", &p1, &p2, kind);
            same("m", &m1, &m2, kind);
            same("v", &v1, &v2, kind);
            assert!(copy.equal(&p1.to_kind(Kind::BFloat16)), "the bfloat16 copy is the rounded value");
            let (s, s2) = (ops::sum_squares(&g1).unwrap(), Composed.sum_squares(&[&g2]).unwrap());
            assert!(relative_number(s, s2) < allowed(Quantity::Reduction, Kind::Float), "{s} {s2}");
            let (all, apart) =
                (ops::sum_squares_of_all(&[g1, p1.copy()]).unwrap(), s + ops::sum_squares(&p1).unwrap());
            assert!(
                relative_number(all, apart) < allowed(Quantity::Reduction, Kind::Double),
                "{all} {apart}"
            );
        }
    }
    assert_eq!(ops::sum_squares_of_all(&[]).unwrap(), 0.0);
}

#[test]
fn embedding_and_accumulate() {
    for kind in KINDS {
        for (n, v, c) in [(50, 11, 130), (700, 3, 256), (1, 5, 8), (1025, 2, 24), (256, 1, 3), (128, 1, 8)] {
            let (dx, ids) = (randn(&[n, c], kind), Tensor::randint(v, [n], (Kind::Int64, Device::Cpu)));
            let start = randn(&[v, c], ops::accumulator(kind));
            let (dw, dw2) = (put(&start), exact(&start));
            ops::embedding_backward(&put(&dx), &put(&ids), &dw).unwrap();
            Composed.embedding_backward(&exact(&dx), &ids, &dw2).unwrap();
            same("dw", &dw, &dw2, statistics(kind));
            for add in [true, false] {
                let a = randn(&[n, c], ops::accumulator(kind));
                let (a1, a2) = (put(&a), exact(&a));
                ops::accumulate(&a1, &put(&dx), add).unwrap();
                Composed.accumulate(&a2, &exact(&dx), add).unwrap();
                same("accumulate", &a1, &a2, statistics(kind));
            }
        }
    }
}

#[test]
fn dropout() {
    for kind in KINDS {
        for (n, c) in [(1, 1), (37, 130), (300, 64)] {
            let (x, rows) =
                (randn(&[n, c], kind), Tensor::arange(n, (Kind::Int64, Device::Cpu)) * (5 << 32) + 3);
            for p in [0.0, 0.1, 0.75] {
                let y = ops::dropout(&put(&x), &put(&rows), 0xfeed_0000_0001_beef, p, 0).unwrap();
                let (threshold, scale) = ((p * 2f64.powi(32)) as u32, 1.0 / (1.0 - p));
                let twin = Composed.dropout(&x, &rows, 0xfeed_0000_0001_beef, threshold, scale, 0).unwrap();
                same("y", &y, &twin, kind);
                let zero = |t: &Tensor| t.to_device(Device::Cpu).eq(0.0);
                assert!(zero(&y).equal(&zero(&twin)), "the same elements are left out");
                let (first, n) = ((n / 3).min(n - 1), n - (n / 3).min(n - 1));
                let part = |t: &Tensor| put(&t.narrow(0, first, n));
                let again = ops::dropout(&part(&x), &part(&rows), 0xfeed_0000_0001_beef, p, 0).unwrap();
                assert!(again.equal(&y.narrow(0, first, n)), "a row's mask is its own");
                let (first, n) = (c / 3, c - c / 3);
                let part = put(&x.narrow(1, first, n).contiguous());
                let again = ops::dropout(&part, &put(&rows), 0xfeed_0000_0001_beef, p, first as u32).unwrap();
                assert!(again.equal(&y.narrow(1, first, n)), "a column's mask is its own");
            }
        }
    }
    let ones = Tensor::ones([500, 400], (Kind::Float, device()));
    let rows = put(&Tensor::arange(500, (Kind::Int64, Device::Cpu)));
    let kept = |key| ops::dropout(&ones, &rows, key, 0.3, 0).unwrap().ne(0.0).to_kind(Kind::Double);
    let (a, b) = (kept(1), kept(2));
    // 0.7, and 0.49 for two masks together; standard errors 0.001.
    assert!((a.mean(Kind::Double).double_value(&[]) - 0.7).abs() < 5e-3);
    assert!(((&a * &b).mean(Kind::Double).double_value(&[]) - 0.49).abs() < 5e-3);
    let columns = a.mean_dim([0i64].as_slice(), false, Kind::Double) - 0.7;
    assert!(columns.abs().max().double_value(&[]) < 0.1, "no column is left out more than others");
}

#[test]
fn gradients_of_weights() {
    if device() != Device::Cpu {
        ops::set_float32_onednn(true).unwrap(); // must not make float32 products on a GPU TF32
    }
    for kind in KINDS {
        for (n, rows, columns) in [(0, 5, 6), (1, 1, 1), (37, 24, 40), (130, 7, 96)] {
            let (dy, x) = (randn(&[n, rows], kind), randn(&[n, columns], kind));
            let start = randn(&[rows, columns], ops::accumulator(kind));
            for begun in [false, true] {
                let dw = put(&start);
                let grad = match begun {
                    true => ops::WeightGrad::begun(dw.shallow_clone()),
                    false => ops::WeightGrad::undefined(dw.shallow_clone()),
                };
                grad.add_product(&put(&dy), &put(&x)).unwrap();
                let product = exact(&dy).tr().mm(&exact(&x));
                let terms = product.abs().max().maximum(&exact(&start).abs().max()).double_value(&[]);
                let want = if begun { product + exact(&start) } else { product };
                // On the CPU bfloat16 products are rounded before they are added.
                let kind = if device() == Device::Cpu { kind } else { statistics(kind) };
                same_at("dw", &dw, &want, kind, terms);
                assert!(grad.sum().unwrap().equal(&dw), "a sum that has begun stays");
            }
            let empty = ops::WeightGrad::undefined(put(&start));
            assert_eq!(empty.sum().unwrap().count_nonzero(None).int64_value(&[]), 0);
        }
    }
}

/// The compositions are oracles of the kernels; autograd is theirs.
#[test]
fn compositions_against_autograd() {
    let kind = Kind::Double;
    let leaf = |size: &[i64]| randn(size, kind).set_requires_grad(true);
    let check = |what: &str, got: &Tensor, want: &Tensor| {
        let d = distance(got, &want.detach());
        assert!(d < allowed(Quantity::Autograd, Kind::Double), "{what}: {d:e}");
    };

    for offset in [0.0, 1.0] {
        let (x, w, dy) = (leaf(&[9, 12]), leaf(&[12]), randn(&[9, 12], kind));
        let (y, rstd) = Composed.rms_norm(&x, gain(&w, offset), 1e-5).unwrap();
        (y * &dy).sum(kind).backward();
        let dw = Tensor::zeros([12], (kind, Device::Cpu));
        let (xd, wd, rstd) = (x.detach(), w.detach(), rstd.detach());
        let dx = Composed.rms_backward(&dy, &xd, gain(&wd, offset), &rstd, None, &dw).unwrap();
        check("rms dx", &dx, &x.grad());
        check("rms dw", &dw, &w.grad());
    }

    let (gu, da) = (leaf(&[5, 14]), randn(&[5, 7], kind));
    (Composed.swiglu(&gu).unwrap() * &da).sum(kind).backward();
    let d = gu.detach().copy();
    Composed.swiglu_backward(&d, &da.copy()).unwrap();
    check("swiglu", &d, &gu.grad());
    let gu = leaf(&[5, 14]);
    (ops::geglu(&gu).unwrap() * &da).sum(kind).backward();
    let (d, a) = (gu.detach().copy(), da.copy());
    ops::geglu_backward(&d, &a).unwrap();
    check("geglu", &d, &gu.grad());
    check("geglu's output", &a, &ops::geglu(&gu.detach()).unwrap());

    for softcap in [None, Some(1.5)] {
        let h = ops::Heads { scale: 0.7, softcap, ..ops::Heads::new(2, 4, 2, 6) };
        let (qkv, dout) = (leaf(&[2 * 11, 8 * 6]), randn(&[2 * 11, 24], kind));
        let starts = [0i64, 0, 0, 0, 4, 4, 4, 4, 4, 9, 9].repeat(2);
        let spans = ops::Spans::new(Some(&starts), [2, 11], Some(3), Device::Cpu).unwrap();
        let (o, lse) = Composed.attention(&qkv, &spans, h).unwrap();
        (&o * &dout).sum(kind).backward();
        let d =
            Composed.attention_backward(&dout, &qkv.detach(), &o.detach(), &lse.detach(), &spans, h).unwrap();
        check("attention", &d, &qkv.grad());
    }

    let (logits, coef) = (leaf(&[6, 10]), randn(&[6], kind));
    let labels = Tensor::from_slice(&[0i64, 9, -100, 3, 3, 1]);
    let valid = labels.ge(0);
    let lp =
        logits.log_softmax(-1, kind).gather(-1, &labels.clamp_min(0).unsqueeze(-1), false).squeeze_dim(-1);
    (lp * valid * &coef).sum(kind).backward();
    let (l, p) = (logits.detach().copy(), Tensor::zeros([6], (kind, Device::Cpu)));
    Composed.log_softmax(&l, &labels, Some(&coef), &p, None).unwrap();
    check("log_softmax", &l, &logits.grad());
}

/// Products of few rows, and of one more; sizes that fill no vector and no tile.
#[test]
fn linear() {
    for kind in KINDS {
        for (inputs, outputs) in [(64, 48), (37, 29), (5, 1), (512, 100)] {
            let w = put(&randn(&[outputs, inputs], kind));
            let (bias, all) = (put(&randn(&[outputs], kind)), put(&randn(&[20, inputs], kind)));
            let residual = put(&randn(&[20, outputs], kind));
            for rows in [1, 2, 3, 7, 8, 13, ops::few_rows(kind), ops::few_rows(kind) + 1] {
                let (x, residual) = (all.narrow(0, 0, rows), residual.narrow(0, 0, rows));
                let product = exact(&x).mm(&exact(&w).tr());
                let size = exact(&x).abs().mm(&exact(&w).abs().tr()).max().double_value(&[]);
                let cases = [
                    (None, product.copy()),
                    (Some(&bias), &product + exact(&bias)),
                    (Some(&residual), &product + exact(&residual)),
                ];
                for (add, expected) in cases {
                    let y = ops::linear(&x, &w, add).unwrap();
                    assert_eq!(y.kind(), kind);
                    let off = largest_at(&y, &expected, if kind == Kind::BFloat16 { 0.1 } else { size });
                    assert!(
                        off < allowed(Quantity::Operation, kind),
                        "{kind:?}, {rows} x {inputs} -> {outputs}: {off:e}"
                    );
                }
            }
            // A row is the same to the bit beside any others.
            let many = ops::linear(&all.narrow(0, 0, ops::few_rows(kind)), &w, None).unwrap();
            for (row, count) in [(0, 1), (2, 3), (1, 7)] {
                let few = ops::linear(&all.narrow(0, row, count), &w, None).unwrap();
                let same = few.equal(&many.narrow(0, row, count));
                assert!(same || gpu_path(), "{kind:?}, rows {row} to {}", row + count);
            }
        }
    }
}

/// x as 8-bit floats of one scale for all of it, or for each row, say: rounded to `kind`, whose largest number is `most`;
/// float64.
fn in_float8(x: &Tensor, kind: Kind, most: f32, rows: bool) -> Tensor {
    let x = exact(x).to_kind(Kind::Float);
    let largest = if rows { x.abs().amax([1i64].as_slice(), true) } else { x.abs().max() };
    let factor = Tensor::from(most) / largest;
    (&x * &factor).to_kind(kind).to_kind(Kind::Double) / factor.to_kind(Kind::Double)
}

/// Products with a weight that was cast before, in parts, are those with the weight; any number of rows has them.
fn weights_that_are_there_in_float8(float8: ops::Float8, x: &Tensor, w: &Tensor, dy: &Tensor) {
    let factor = ops::float8_factors(&w.abs().max().view([1])).unwrap();
    let (flat, cut) = (w.view([-1]), w.numel() as i64 / 3);
    let parts = [(0, cut), (cut, w.numel() as i64 - cut)].map(|(first, n)| {
        ops::to_float8(&flat.narrow(0, first, n), &factor).unwrap().view_dtype(Kind::Uint8)
    });
    let values = Tensor::cat(&parts, 0).view_dtype(Kind::Float8e4m3fn).view(w.size().as_slice());
    let weight = ops::Float8Weight::new(values, factor.reciprocal());
    assert_eq!(weight.shape().as_slice(), w.size());
    let (y, dx) = (weight.linear(x).unwrap(), weight.linear_backward(dy).unwrap());
    assert!(y.equal(&float8.linear(x, w).unwrap()), "y of {x:?}");
    assert!(dx.equal(&float8.linear_backward(dy, w).unwrap()), "dx of {dy:?}");
    // As many rows as have the largest magnitudes, and none.
    let at = x.abs().amax([1i64].as_slice(), false).argmax(0, false).int64_value(&[]);
    for n in [at + 1, 0] {
        let rows = weight.linear(&x.narrow(0, 0, n)).unwrap();
        assert!(rows.equal(&y.narrow(0, 0, n)), "{n} rows of {x:?}");
    }
}

/// Products in 8-bit floats against those of the rounded factors in float64.
#[test]
fn float8_products() {
    for scales in [ops::Granularity::Tensor, ops::Granularity::Row] {
        let rows = scales == ops::Granularity::Row;
        let needed = ops::float8_capability(scales);
        if let Device::Cuda(index) = device()
            && kernels::cuda::load().unwrap().device_info(index).unwrap().capability < needed
        {
            continue;
        }
        let e4m3 = |x: &Tensor| in_float8(x, Kind::Float8e4m3fn, 448.0, rows);
        let e5m2 = |x: &Tensor| in_float8(x, Kind::Float8e5m2, 57344.0, rows);
        let near = |what: &str, y: &Tensor, want: &Tensor, kind: Kind| {
            same_at(what, y, want, kind, want.abs().max().double_value(&[]));
        };
        let float8 = ops::Float8 { min_size: 0, scales };
        for (n, i, o) in [(16, 32, 16), (48, 80, 112), (128, 64, 144)] {
            let random = |size: [i64; 2], by: f64| randn(&size, Kind::Double) * by;
            let [x, w, dy] = [random([n, i], 3.0), random([o, i], 0.02), random([n, o], 1e-6)]
                .map(|t| put(&t.to_kind(Kind::BFloat16)));
            assert!(float8.takes(&x, &w));
            let before = ops::float8_products();
            near("y", &float8.linear(&x, &w).unwrap(), &e4m3(&x).mm(&e4m3(&w).tr()), Kind::BFloat16);
            let dx = e5m2(&dy).mm(&e4m3(&w.tr().contiguous()).tr());
            near("dx", &float8.linear_backward(&dy, &w).unwrap(), &dx, Kind::BFloat16);
            let start = randn(&[o, i], Kind::Float) * 1e-6;
            for begun in [false, true] {
                let dw = put(&start);
                let grad = match begun {
                    true => ops::WeightGrad::begun(dw.shallow_clone()),
                    false => ops::WeightGrad::undefined(dw.shallow_clone()),
                };
                grad.add_float8_product(&dy, &x, float8).unwrap();
                let product = e5m2(&dy.tr().contiguous()).mm(&e4m3(&x.tr().contiguous()).tr());
                let want = if begun { product + exact(&start) } else { product };
                near("dw", &dw, &want, if rows { Kind::BFloat16 } else { Kind::Float });
            }
            assert!(ops::float8_products() >= before + 4);
            if !rows {
                weights_that_are_there_in_float8(float8, &x, &w, &dy);
            }
        }
        let zero = put(&Tensor::zeros([16, 16], (Kind::BFloat16, Device::Cpu)));
        assert_eq!(float8.linear(&zero, &zero).unwrap().abs().max().double_value(&[]), 0.0);
        let _ = zero.get(1).fill_(f64::INFINITY);
        let finite = float8.linear(&zero, &zero).unwrap().isfinite().all();
        assert_eq!(finite.int64_value(&[]), 0, "what is not finite shows");
    }
    let x = put(&randn(&[24, 32], Kind::BFloat16));
    let float8 = ops::Float8 { min_size: 32, scales: ops::Granularity::Tensor };
    assert!(
        !float8.takes(&x, &put(&randn(&[32, 32], Kind::BFloat16))),
        "24 is below 32, and no multiple of 16"
    );
    assert!(float8.linear(&x, &x).unwrap_err().to_string().contains("multiples of 16"));
}
