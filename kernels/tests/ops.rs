//! Every CPU kernel against its composition of libtorch operations, in float64, float32 and bfloat16; and the
//! compositions' backwards against libtorch's autograd, in float64.

use kernels::{composed, ops};
use tch::{Device, Kind, Tensor};

const KINDS: [Kind; 3] = [Kind::Double, Kind::Float, Kind::BFloat16];

/// Largest difference, relative to the largest value, that is allowed between a kernel and its twin.
fn tolerance(kind: Kind) -> f64 {
    match kind {
        Kind::Double => 1e-13,
        Kind::Float => 2e-6,
        _ => 8e-3, // one rounding of bfloat16
    }
}

fn randn(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Double, Device::Cpu)).to_kind(kind)
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let scale = b.abs().max().double_value(&[]).max(0.1); // where values cancel, what counts is the inputs' size
    (a - b).abs().max().double_value(&[]) / scale
}

#[track_caller]
fn same(what: &str, a: &Tensor, b: &Tensor, kind: Kind) {
    let d = distance(a, b);
    assert!(d <= tolerance(kind), "{what} in {kind:?}: differs by {d:e}");
}

#[test]
fn rms_norm() {
    for kind in KINDS {
        for (n, c) in [(1, 1), (37, 48), (65, 288), (3, 1023)] {
            let (x, w) = (randn(&[n, c], kind), randn(&[c], kind));
            let (y, rstd) = ops::rms_norm(&x, &w, 1e-5).unwrap();
            let (y2, rstd2) = composed::rms_norm(&x, &w, 1e-5);
            same("y", &y, &y2, kind);
            same("rstd", &rstd, &rstd2, if kind == Kind::BFloat16 { Kind::Float } else { kind });
            assert!(ops::rms_apply(&x, &w, &rstd).unwrap().equal(&y));
            let (dy, residual) = (randn(&[n, c], kind), randn(&[n, c], kind));
            for residual in [None, Some(&residual)] {
                let dw = randn(&[c], ops::accumulator(kind));
                let dw2 = dw.copy();
                let dx = ops::rms_backward(&dy, &x, &w, &rstd, residual, &dw).unwrap();
                let dx2 = composed::rms_backward(&dy, &x, &w, &rstd2, residual, &dw2);
                same("dx", &dx, &dx2, kind);
                same("dw", &dw, &dw2, if kind == Kind::BFloat16 { Kind::Float } else { kind });
            }
        }
    }
}

#[test]
fn rope() {
    for kind in KINDS {
        let (n, heads, d) = (19, 3, 16);
        let a = ops::accumulator(kind);
        let angle = Tensor::rand([40, d / 2], (a, Device::Cpu)) * 6.0;
        let (cos, sin) = (angle.cos(), angle.sin());
        let positions = Tensor::randint(40, [n], (Kind::Int64, Device::Cpu));
        let x = randn(&[n, (heads + 1) * d], kind);
        for inverse in [false, true] {
            let (y, y2) = (x.copy(), x.copy());
            ops::rope(&y, &positions, &cos, &sin, heads, d, inverse).unwrap();
            composed::rope(&y2, &positions, &cos, &sin, heads, d, inverse);
            same("rope", &y, &y2, kind);
            assert!(y.narrow(1, heads * d, d).equal(&x.narrow(1, heads * d, d)), "other heads stay");
        }
    }
}

#[test]
fn swiglu() {
    for kind in KINDS {
        for (n, f) in [(1, 3), (33, 100), (7, 1376)] {
            let gu = randn(&[n, 2 * f], kind) * 4.0;
            same("a", &ops::swiglu(&gu).unwrap(), &composed::swiglu(&gu), kind);
            let da = randn(&[n, f], kind);
            let (gu2, da2) = (gu.copy(), da.copy());
            ops::swiglu_backward(&gu, &da).unwrap();
            composed::swiglu_backward(&gu2, &da2);
            same("dgu", &gu, &gu2, kind);
            same("a again", &da, &da2, kind);
        }
    }
}

#[test]
fn log_softmax() {
    for kind in KINDS {
        for (n, v) in [(1, 2), (13, 515), (5, 4096)] {
            let logits = randn(&[n, v], kind) * 5.0;
            let mut labels = Tensor::randint(v, [n], (Kind::Int64, Device::Cpu));
            let _ = labels.get(0).fill_(-100);
            labels = labels.contiguous();
            let a = ops::accumulator(kind);
            let coef = randn(&[n], a);
            let new = || (Tensor::zeros([n], (a, Device::Cpu)), Tensor::zeros([n], (a, Device::Cpu)));
            let ((p, e), (p2, e2)) = (new(), new());
            let (l, l2) = (logits.copy(), logits.copy());
            ops::log_softmax(&l, &labels, Some(&coef), &p, Some(&e)).unwrap();
            composed::log_softmax(&l2, &labels, Some(&coef), &p2, Some(&e2));
            let kind_of_sums = if kind == Kind::BFloat16 { Kind::Float } else { kind };
            same("logp", &p, &p2, kind_of_sums);
            same("entropy", &e, &e2, kind_of_sums);
            same("dlogits", &l, &l2, kind);
        }
    }
}

#[test]
fn label_beyond_the_vocabulary_is_an_error() {
    let logits = randn(&[2, 5], Kind::Float);
    let labels = Tensor::from_slice(&[1i64, 5]);
    let logp = Tensor::zeros([2], (Kind::Float, Device::Cpu));
    let e = ops::log_softmax(&logits, &labels, None, &logp, None).unwrap_err();
    assert!(e.to_string().contains("beyond the vocabulary of 5"), "{e}");
}

#[test]
fn attention() {
    for kind in KINDS {
        for (batch, time, heads, kv_heads, head_dim) in
            [(1, 1, 1, 1, 4), (2, 37, 4, 2, 16), (1, 70, 3, 3, 48), (2, 33, 2, 1, 64), (1, 129, 2, 2, 10)]
        {
            let h = ops::Heads { batch, heads, kv_heads, head_dim };
            let qkv = randn(&[batch * time, (heads + 2 * kv_heads) * head_dim], kind);
            let at = Tensor::arange(time, (Kind::Int64, Device::Cpu)).repeat([batch]);
            let window = (&at - 7i64).clamp_min(0);
            let padded = at.minimum(&Tensor::full([batch * time], 9i64, (Kind::Int64, Device::Cpu)));
            for start in [None, Some(&window), Some(&padded)] {
                let (o, lse) = ops::attention(&qkv, start, h).unwrap();
                let (o2, lse2) = composed::attention(&qkv, start, h);
                let relaxed = if kind == Kind::BFloat16 { Kind::Float } else { kind };
                same("out", &o, &o2, kind);
                same("lse", &lse, &lse2, relaxed);
                let dout = randn(&[batch * time, heads * head_dim], kind);
                let d = ops::attention_backward(&dout, &qkv, &o, &lse, start, h).unwrap();
                let d2 = composed::attention_backward(&dout, &qkv, &o, &lse, start, h);
                same("dqkv", &d, &d2, kind);
            }
        }
    }
}

#[test]
fn decode_attention() {
    for kind in KINDS {
        for (heads, kv_heads, head_dim) in [(1, 1, 4), (4, 2, 16), (3, 3, 48), (8, 2, 64), (2, 1, 10)] {
            let (slots, capacity, batch) = (5, 41, 4);
            let h = ops::Heads { batch, heads, kv_heads, head_dim };
            let (k, v) = (
                randn(&[slots, kv_heads, capacity, head_dim], kind),
                randn(&[slots, kv_heads, capacity, head_dim], kind),
            );
            let (k2, v2) = (k.copy(), v.copy());
            let qkv = randn(&[batch, (heads + 2 * kv_heads) * head_dim], kind);
            let slot = Tensor::from_slice(&[3i64, 0, 4, 1]);
            let position = Tensor::from_slice(&[0i64, 40, 22, 7]);
            let out = ops::decode_attention(&qkv, &k, &v, &slot, &position, h).unwrap();
            let out2 = composed::decode_attention(&qkv, &k2, &v2, &slot, &position, h);
            same("out", &out, &out2, kind);
            assert!(k.equal(&k2) && v.equal(&v2), "both write the same key and value, and nothing else");

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
            let out = ops::decode_attention(&last, &k, &v, &slot, &position, one).unwrap();
            let all = composed::attention(&row, None, one).0;
            same("last position", &out, &all.narrow(0, time - 1, 1), kind);
        }
    }
    let cache = randn(&[2, 1, 3, 4], Kind::Float);
    let h = ops::Heads { batch: 1, heads: 1, kv_heads: 1, head_dim: 4 };
    let (qkv, zero) = (randn(&[1, 12], Kind::Float), Tensor::from_slice(&[0i64]));
    let e = ops::decode_attention(&qkv, &cache, &cache, &zero, &Tensor::from_slice(&[3i64]), h).unwrap_err();
    assert!(e.to_string().contains("position 3 is beyond the cache's 3"), "{e}");
}

#[test]
fn adamw_and_sums() {
    for kind in [Kind::Float, Kind::Double] {
        let n = 100_003;
        let state = || [randn(&[n], kind), randn(&[n], kind), randn(&[n], kind), randn(&[n], kind).square()];
        let [p, g, m, v] = state();
        let (p2, m2, v2) = (p.copy(), m.copy(), v.copy());
        let copy = Tensor::zeros([n], (Kind::BFloat16, Device::Cpu));
        let o = ops::AdamW {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step: 3,
            grad_scale: 0.7,
        };
        ops::adamw(&p, &g, &m, &v, Some(&copy), o).unwrap();
        composed::adamw(&p2, &g, &m2, &v2, None, o);
        same("p", &p, &p2, kind);
        same("m", &m, &m2, kind);
        same("v", &v, &v2, kind);
        assert!(copy.equal(&p.to_kind(Kind::BFloat16)), "the bfloat16 copy is the rounded value");
        let (s, s2) = (ops::sum_squares(&g).unwrap(), composed::sum_squares(&g));
        assert!((s / s2 - 1.0).abs() < 1e-6, "{s} {s2}");
    }
}

#[test]
fn embedding_and_accumulate() {
    for kind in KINDS {
        let (n, v, c) = (50, 11, 130);
        let (dx, ids) = (randn(&[n, c], kind), Tensor::randint(v, [n], (Kind::Int64, Device::Cpu)));
        let dw = randn(&[v, c], ops::accumulator(kind));
        let dw2 = dw.copy();
        ops::embedding_backward(&dx, &ids, &dw).unwrap();
        composed::embedding_backward(&dx, &ids, &dw2);
        let relaxed = if kind == Kind::BFloat16 { Kind::Float } else { kind };
        same("dw", &dw, &dw2, relaxed);
        for add in [true, false] {
            let a = randn(&[n, c], ops::accumulator(kind));
            let a2 = a.copy();
            ops::accumulate(&a, &dx, add).unwrap();
            composed::accumulate(&a2, &dx, add);
            same("accumulate", &a, &a2, relaxed);
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
        assert!(d < 1e-12, "{what}: {d:e}");
    };

    let (x, w, dy) = (leaf(&[9, 12]), leaf(&[12]), randn(&[9, 12], kind));
    let (y, rstd) = composed::rms_norm(&x, &w, 1e-5);
    (y * &dy).sum(kind).backward();
    let dw = Tensor::zeros([12], (kind, Device::Cpu));
    let (xd, wd) = (x.detach(), w.detach());
    check("rms dx", &composed::rms_backward(&dy, &xd, &wd, &rstd.detach(), None, &dw), &x.grad());
    check("rms dw", &dw, &w.grad());

    let (gu, da) = (leaf(&[5, 14]), randn(&[5, 7], kind));
    (composed::swiglu(&gu) * &da).sum(kind).backward();
    let d = gu.detach().copy();
    composed::swiglu_backward(&d, &da.copy());
    check("swiglu", &d, &gu.grad());

    let h = ops::Heads { batch: 2, heads: 4, kv_heads: 2, head_dim: 6 };
    let (qkv, dout) = (leaf(&[2 * 11, 8 * 6]), randn(&[2 * 11, 24], kind));
    let start = Tensor::from_slice(&[0i64, 0, 0, 0, 4, 4, 4, 4, 4, 9, 9]).repeat([2]);
    let (o, lse) = composed::attention(&qkv, Some(&start), h);
    (&o * &dout).sum(kind).backward();
    let d = composed::attention_backward(&dout, &qkv.detach(), &o.detach(), &lse.detach(), Some(&start), h);
    check("attention", &d, &qkv.grad());

    let (logits, coef) = (leaf(&[6, 10]), randn(&[6], kind));
    let labels = Tensor::from_slice(&[0i64, 9, -100, 3, 3, 1]);
    let valid = labels.ge(0);
    let lp =
        logits.log_softmax(-1, kind).gather(-1, &labels.clamp_min(0).unsqueeze(-1), false).squeeze_dim(-1);
    (lp * valid * &coef).sum(kind).backward();
    let (l, p) = (logits.detach().copy(), Tensor::zeros([6], (kind, Device::Cpu)));
    composed::log_softmax(&l, &labels, Some(&coef), &p, None);
    check("log_softmax", &l, &logits.grad());
}
