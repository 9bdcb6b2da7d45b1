//! Training in 8-bit floats, on the CPU: near bfloat16, and not the same. Speed is for GPUs.

use testing::program::Program;
use testing::run::{Run, beginner, data};
use testing::tolerance::{Quantity, allowed};

use tch::Kind;

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
