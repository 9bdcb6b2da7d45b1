//! Training in 8-bit floats, on the CPU: near bfloat16, and not the same. Speed is for GPUs.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use corral::algorithms::step::{MicroBatch, accumulate_gradients};
use corral::config::sections::Recompute;
use corral::config::shape::{Family, Shape};
use corral::distributed::frozen::FrozenValue;
use corral::distributed::mesh::{Keep, Sharding};
use corral::distributed::sharded::gathered::Form;
use corral::distributed::sharded::{Sharded, TensorSpec};
use corral::model::{Llama, ModelInput, Trainable};
use kernels::comm::Group;
use kernels::ops::{Float8, Granularity};
use testing::program::Program;
use testing::ranks::on_ranks;
use testing::run::{Run, beginner, data};
use testing::tolerance::{Quantity, allowed};

use tch::{Device, Kind, Tensor};

/// The losses of a run's steps.
fn losses(run: &Run, ranks: usize, words: &[&str]) -> Vec<f64> {
    run.train(ranks, words);
    run.numbers("train", "loss")
}

#[track_caller]
fn near(what: &str, a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(
            (a - b).abs() < allowed(Quantity::Float8Loss, Kind::BFloat16) * b,
            "{what}, step {step}: {a}, {b}"
        );
    }
    assert_ne!(a, b, "{what}: products in 8-bit floats are others");
}

#[test]
fn losses_are_near_those_of_bfloat16() {
    let bfloat16 = losses(&Run::new("bfloat16"), 1, &["precision.compute=bfloat16"]);
    let of = |name: &str, ranks, more: &[&str]| {
        let run = Run::new(name);
        let words = [&["precision.compute=float8", "float8.min_size=0"], more].concat();
        let losses = losses(&run, ranks, &words);
        // Four linear layers in each of two blocks, forward and twice backward.
        for products in run.numbers("train", "fp8_products") {
            assert_eq!(products, 24.0, "{name}: on this rank, a step");
        }
        losses
    };
    let tensor = of("float8-tensor", 1, &[]);
    near("one scale a tensor", &tensor, &bfloat16);
    let row = of("float8-row", 1, &["float8.scales=row"]);
    near("one scale a row", &row, &bfloat16);
    near("rows against tensors", &row, &tensor);
    near("two ranks", &of("float8-two", 2, &[]), &bfloat16);
    for (name, ranks, mesh) in [
        ("float8-tensor-2", 2, &["parallel.tensor=2"][..]),
        ("float8-tensor-4", 4, &["parallel.tensor=2", "train.micro_batch_size=4"]),
        ("float8-context", 2, &["parallel.context=2"]),
    ] {
        let run = Run::new(name);
        let words = [&["precision.compute=float8", "float8.min_size=0"], mesh].concat();
        near(name, &losses(&run, ranks, &words), &bfloat16);
        assert!(run.numbers("train", "fp8_products").iter().all(|n| *n > 0.0));
    }
    // What is recomputed gives the same bits.
    let run = Run::new("float8-recompute");
    let words = ["precision.compute=float8", "float8.min_size=0", "train.recompute=full"];
    assert_eq!(losses(&run, 1, &words), tensor);
    assert!(run.numbers("train", "fp8_products").iter().all(|n| *n > 24.0));
}

/// Small products stay in bfloat16: all of this model's do, and the run is the same.
#[test]
fn small_products_stay_in_bfloat16() {
    let (small, bfloat16) = (Run::new("float8-small"), Run::new("bfloat16-small"));
    let words = ["precision.compute=float8", "train.steps=4"];
    let same = losses(&bfloat16, 1, &["precision.compute=bfloat16", "train.steps=4"]);
    assert_eq!(losses(&small, 1, &words), same);
    assert_eq!(small.numbers("train", "fp8_products"), [0.0; 4]);
    let refused = Run::new("float8-refused");
    refused.expect_refused(&["float8.min_size=0"], 2, "is a section of `precision.compute: float8`");
    let refused = Run::sft("float8-nf4");
    let words = ["precision.compute=float8", "lora={rank: 2, base: nf4}"];
    refused.expect_refused(&words, 2, "products with nf4 weights are in bfloat16");
    let model = beginner().to_string_lossy().into_owned();
    let words = ["generate", "--model", &model, "--prompt", "2+2=", "--dtype", "float8"];
    Program::corral(&words).run(&refused.dir, "generate").expect_error(2, &["8-bit floats are for training"]);
}

/// An adapter on a base whose products are in 8-bit floats: the base has no gradient, adapters stay in bfloat16.
#[test]
fn adapters() {
    let of = |name: &str, words: &[&str]| {
        let (model, data) = (beginner().display(), data().display());
        let run = Run::of(
            "sft",
            name,
            &format!(
                "model: {{path: {model}}}\ntokenizer: {{template: \"{{prompt}}\\n{{completion}}\"}}\n\
                 data: {{train: [{data}/sft.train.jsonl], sequence_length: 128, cache: {data}/cache}}\n\
                 lora: {{rank: 4, alpha: 8}}\noptim: {{lr: 1.0e-2}}\ntrain: {{steps: 6, batch_size: 8}}\n"
            ),
        );
        let losses = losses(&run, 1, words);
        (losses, run)
    };
    let (float8, run) = of("float8-lora", &["precision.compute=float8", "float8.min_size=0"]);
    let (bfloat16, _) = of("bfloat16-lora", &["precision.compute=bfloat16"]);
    near("LoRA", &float8, &bfloat16);
    let products = run.numbers("train", "fp8_products");
    assert!(products.iter().all(|n| *n > 0.0), "{products:?}");
}

/// A model whose values are equal in every run, over the ranks of `world`.
fn model(shape: &Shape, world: Group, keep: Keep) -> Llama {
    let plans = Trainable::default().plans(shape).unwrap();
    let sharding = Sharding { keep, ..Sharding::over(world) };
    let mut params = Sharded::new(plans, sharding, Kind::BFloat16, Device::Cpu);
    params
        .fill(|spec: &TensorSpec, first, values| {
            let at = Tensor::arange(values.numel() as i64, (Kind::Double, Device::Cpu)) + first;
            let start = spec.name.bytes().map(f64::from).sum::<f64>();
            let around = if spec.shape.len() > 1 { 0.0 } else { 1.0 };
            values.shallow_clone().copy_(&((at * 1.7 + start).sin() * 0.1 + around));
            Ok(())
        })
        .unwrap();
    let mut model = Llama::new(shape.clone(), params);
    model.set_float8(Some(Float8 { min_size: 32, scales: Granularity::Tensor })).unwrap();
    model
}

/// Losses and gradients of rows of `length` tokens.
fn gradients(model: &mut Llama, length: i64, recompute: Recompute) -> (f64, Vec<Vec<f32>>) {
    let ids = Tensor::arange(2 * length, (Kind::Int64, Device::Cpu)).view([2, length]).remainder(61);
    let batch = || MicroBatch { input: ModelInput::new(ids.shallow_clone()), labels: ids.view([-1]).copy() };
    let count = 4.0 * length as f64;
    let sums = accumulate_gradients(model, &[batch(), batch()], count, recompute).unwrap();
    let gradients = (0..model.params.len())
        .map(|i| Vec::try_from(model.params.slice_grad(i).unwrap()).unwrap())
        .collect();
    model.params.clear_gradients();
    (sums.loss, gradients)
}

/// Makes all values three times as large.
fn tripled(model: &mut Llama) {
    (0..model.params.len()).for_each(|i| drop(model.params.master(i).g_mul_scalar_(3.0)));
    model.params.refresh();
}

/// What ranks gather in 8-bit floats gives the bits that each computes of bfloat16 values, whatever the slices cut. All ranks
/// have the same rows here, so that their sum is exact for two and four.
#[test]
fn gathered_in_8_bits() {
    let llama = Shape {
        vocab_size: 61,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        ..Shape::preset("llama-15m").unwrap()
    };
    let qwen = |family: Family| Shape { features: family.features(), ..llama.clone() };
    // Two of these have products that stay in bfloat16, gate and up of another width, and a router.
    let narrow = Shape { num_attention_heads: 1, num_key_value_heads: 1, ..llama.clone() };
    let experts = Shape { experts: Shape::preset("mixtral-8x7b").unwrap().experts, ..llama.clone() };
    for (name, shape) in
        [("llama", &llama), ("qwen2", &qwen(Family::Qwen2)), ("narrow", &narrow), ("mixtral", &experts)]
    {
        for (ranks, keep) in [(2, Keep::Nothing), (4, Keep::Nothing), (2, Keep::Values)] {
            let mut whole = model(shape, Group::solo(), Keep::Nothing);
            let (loss, expected) = gradients(&mut whole, 32, Recompute::Selective);
            tripled(&mut whole);
            let (other_loss, _) = gradients(&mut whole, 32, Recompute::Selective);
            assert_ne!(other_loss, loss);
            on_ranks(ranks, |world| {
                let mut model = model(shape, world, keep);
                let full = model.params.full_as(1, Form::Float8).unwrap();
                let value = |k| model.params.value(1, &full, &model.params.pieces(1, k)[0]).unwrap();
                let down = if shape.experts.is_some() { 7..8 } else { 6..7 };
                for (what, tensors) in [("q, k, v", 0..3), ("down", down)] {
                    assert!(matches!(value(tensors), FrozenValue::Float8(_)), "{name}: {what}");
                }
                drop(full);
                model.params.release(1);
                for recompute in [Recompute::Selective, Recompute::Full] {
                    let (sharded, gradients) = self::gradients(&mut model, 32, recompute);
                    if shape.experts.is_some() {
                        // Experts have any number of rows, and products of few stay in bfloat16 on one rank.
                        assert!(
                            (sharded - loss).abs() < allowed(Quantity::Float8Loss, Kind::BFloat16) * loss
                        );
                        continue;
                    }
                    assert_eq!(sharded, loss, "{name} on {ranks} ranks");
                    for (i, (gradient, expected)) in gradients.iter().zip(&expected).enumerate() {
                        // Vectors are summed in another order.
                        let (slice, matrices) = (model.params.slice(i), model.params.layout(i).num_decayed);
                        let of_matrices = (matrices - slice.start).clamp(0, slice.len) as usize;
                        let expected = expected[slice.start as usize..].iter().map(|g| g * ranks as f32);
                        assert!(
                            expected.take(of_matrices).eq(gradient[..of_matrices].iter().copied()),
                            "{name} on {ranks} ranks: gradient of group {i}"
                        );
                    }
                }
                // Rows that are no multiple of 16 take the same products.
                let (short, _) = gradients(&mut model, 5, Recompute::None);
                assert!(short.is_finite());
                // What is held is in bfloat16, for generation.
                model.params.hold().unwrap();
                let full = model.params.full_as(1, Form::Float8).unwrap();
                let piece = &model.params.pieces(1, 0..3)[0];
                assert!(matches!(model.params.value(1, &full, piece).unwrap(), FrozenValue::Dense(_)));
                model.params.let_go();
                // What was done between does not show: neither that, nor host memory.
                if shape.experts.is_none() {
                    assert_eq!(gradients(&mut model, 32, Recompute::None).0, loss, "{name} on {ranks} ranks");
                    model.params.park().unwrap();
                    model.params.unpark().unwrap();
                    assert_eq!(gradients(&mut model, 32, Recompute::None).0, loss, "{name} on {ranks} ranks");
                }
                // Other values have other scales.
                tripled(&mut model);
                let (other, _) = self::gradients(&mut model, 32, Recompute::None);
                if shape.experts.is_none() {
                    assert_eq!(other, other_loss, "{name} on {ranks} ranks");
                }
            });
        }
    }
}
