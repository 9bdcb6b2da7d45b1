//! Parts of a model that are frozen, quantized, or have adapters: against the whole model, over ranks, and through the real
//! binaries.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use nix::sys::signal::Signal;
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use testing::compare::{largest, largest_relative, relative, relative_number};
use testing::folder::folder;
use testing::golden::golden_model;
use testing::program::Program;
use testing::ranks::on_ranks;
use testing::run::{Run, data};
use testing::tolerance::{Quantity, allowed};

use corral::checkpoint::Weights;
use corral::config::shape::Shape;
use corral::config::trainable::{BaseFormat, Freeze, Lora, Targets};
use corral::distributed::frozen::Storage;
use corral::distributed::mesh::Sharding;
use corral::distributed::plan::{Role, is_adapter};
use corral::distributed::sharded::{Sharded, TensorSpec};
use corral::model::trainable::module;
use corral::model::{DropoutPlace, Llama, LmHead, ModelInput, Recompute, Trainable};
use kernels::comm::Group;
use kernels::quant::{Quantized, Scheme};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

const FAMILY: &str = "llama3";

fn lora(base: BaseFormat, dropout: f64) -> Lora {
    Lora {
        rank: 3,
        alpha: Some(6.0),
        dropout,
        targets: Targets::AllLinear,
        rslora: true,
        modules_to_save: vec!["lm_head".into()],
        base,
    }
}

/// Numbers that depend on names and places only, for A and B alike.
fn adapter_values(spec: &TensorSpec, first: i64, values: &Tensor) -> corral::error::Result<()> {
    let key = spec.name.bytes().fold(7.0, |k, b| (k * 31.0 + f64::from(b)) % 1009.0);
    let place = Tensor::arange_start(first, first + values.numel() as i64, (Kind::Double, values.device()));
    values.shallow_clone().copy_(&(((place * 0.37 + key).sin()) * 0.05));
    Ok(())
}

fn model(trainable: &Trainable, kind: Kind, shard: Group) -> Llama {
    let weights = Weights::open(&golden_model(FAMILY)).unwrap();
    let shape = weights.shape().clone();
    let plans = trainable.plans(&shape).unwrap();
    let mut params = Sharded::new(plans, Sharding::over(shard), kind, Device::Cpu);
    weights.fill(&mut params).unwrap();
    params.fill_adapters(adapter_values).unwrap();
    Llama::new(shape, params)
}

/// Rows `first..first + n` of six of 20 tokens, with the labels that they predict.
fn rows(shape: &Shape, first: i64, n: i64) -> (ModelInput, Tensor) {
    let all = Tensor::arange(6 * 21, (Kind::Int64, Device::Cpu)) * 7919;
    let ids = all.remainder(shape.vocab_size).view([6, 21]).narrow(0, first, n);
    let mut input = ModelInput::new(ids.narrow(1, 0, 20).contiguous());
    input.dropout = Some(DropoutPlace { seed: 3, step: 5, first_row: first as u64 });
    (input, ids.narrow(1, 1, 20).contiguous().view([-1]))
}

/// Adds to the gradients of a step of 120 tokens; `parts` are first rows and how many. Returns the sum of the losses.
fn accumulate(model: &mut Llama, parts: &[(i64, i64)], recompute: Recompute) -> f64 {
    let mut loss = 0.0;
    model.params.begin_step_gradients(parts.len());
    for (first, n) in parts {
        let (input, labels) = rows(&model.shape, *first, *n);
        let (hidden, tape) = model.forward(&input, recompute).unwrap();
        let a = kernels::ops::accumulator(hidden.kind());
        let coef = Tensor::full([labels.size()[0]], -1.0 / 120.0, (a, Device::Cpu));
        let (logprobs, dhidden) = LmHead::linear_loss(model, &hidden, &labels, &coef).unwrap();
        model.backward(dhidden, tape).unwrap();
        loss -= logprobs.sum(Kind::Double).double_value(&[]);
    }
    model.params.finish_step_gradients().unwrap();
    loss
}

/// Loss and gradients by name of all six rows in one micro-batch.
fn step(model: &mut Llama, recompute: Recompute) -> (f64, HashMap<String, Tensor>) {
    let loss = accumulate(model, &[(0, 6)], recompute);
    let mut gradients = HashMap::new();
    for i in 0..model.params.len() {
        let grad = model.params.slice_grad(i);
        assert_eq!(
            grad.is_some(),
            model.params.trains(i),
            "group {i} has a gradient where something is trained"
        );
        let Some(grad) = grad else { continue };
        for spec in &model.params.layout(i).specs {
            gradients.insert(spec.name.clone(), spec.view(&grad).copy());
        }
    }
    model.params.clear_gradients();
    (loss, gradients)
}

#[track_caller]
fn same_gradients(a: &HashMap<String, Tensor>, b: &HashMap<String, Tensor>, tolerance: f64) {
    for (name, grad) in a {
        let d = relative(grad, &b[name]);
        assert!(d <= tolerance, "{name}: {d:e} off");
    }
}

#[test]
fn what_is_not_frozen_has_the_gradients_of_the_whole_model() {
    let (loss, all) = step(&mut model(&Trainable::default(), Kind::Double, Group::solo()), Recompute::None);
    let freeze = |blocks, embeddings, train_only: &[&str]| Freeze {
        blocks,
        embeddings,
        train_only: train_only.iter().map(|s| s.to_string()).collect(),
    };
    for (freeze, lowest, tensors) in [
        (freeze(1, true, &[]), 2, 11), // the last block with the final norm, and the head
        (freeze(0, true, &["q_proj", "v_proj", "mlp.up_proj", "post_attention_layernorm"]), 1, 8),
        (freeze(2, true, &[]), 2, 2), // the final norm lies with the last block
        (freeze(2, false, &[]), 0, 3),
        (freeze(1, true, &["input_layernorm", "k_proj"]), 2, 2),
    ] {
        let mut part = model(&Trainable::new(&freeze, None), Kind::Double, Group::solo());
        assert_eq!(part.params.first_trained(), lowest);
        let frozen = part.params.num_frozen();
        let trained: i64 = (0..part.params.len()).map(|i| part.params.layout(i).numel).sum();
        assert_eq!(frozen + trained, part.shape.num_parameters());
        assert!(part.params.frozen_bytes() >= 8 * frozen, "float64, and no more than padding besides");
        assert!(part.params.frozen_bytes() < 8 * frozen + 4096);
        for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
            let (part_loss, some) = step(&mut part, recompute);
            assert!(
                relative_number(part_loss, loss) < allowed(Quantity::TwoWays, Kind::Double),
                "{part_loss} {loss}"
            );
            assert_eq!(some.len(), tensors, "{freeze:?}: {:?}", some.keys());
            same_gradients(&some, &all, allowed(Quantity::TwoWays, Kind::Double));
        }
    }
}

fn is_linear(name: &str) -> bool {
    name.starts_with("model.layers.") && module(name).ends_with("_proj")
}

/// A quantized base computes as a dense one of the weights that come back from it.
#[test]
fn a_quantized_base_is_the_dense_model_of_its_weights() {
    let weights = Weights::open(&golden_model(FAMILY)).unwrap().into_source().unwrap();
    for (base, scheme) in [(BaseFormat::Nf4, Scheme::Nf4Double), (BaseFormat::Int8, Scheme::Int8)] {
        let trainable = |base| Trainable::new(&Freeze::default(), Some(&lora(base, 0.0)));
        let mut quantized = model(&trainable(base), Kind::Double, Group::solo());
        let mut dense = model(&trainable(BaseFormat::None), Kind::Double, Group::solo());
        dense
            .params
            .fill_where(
                |spec| is_linear(&spec.name) && !is_adapter(&spec.name),
                true,
                &mut |spec, first, values| {
                    let q = Quantized::quantize(&weights.tensor(&spec.name)?, scheme)?;
                    let all = q.dequantize(0..q.shape()[0], 0..q.shape()[1], Kind::Double)?;
                    values.shallow_clone().copy_(&all.view([-1]).narrow(0, first, values.numel() as i64));
                    Ok(())
                },
            )
            .unwrap();
        let (loss, gradients) = step(&mut quantized, Recompute::None);
        let (expected, of_dense) = step(&mut dense, Recompute::None);
        assert!(
            relative_number(loss, expected) < allowed(Quantity::TwoWays, Kind::Double),
            "{loss} {expected}"
        );
        assert_eq!(gradients.len(), 2 * 2 * 7 + 1, "A and B of seven layers in two blocks, and the head");
        same_gradients(&gradients, &of_dense, allowed(Quantity::SameModel, Kind::Double));
        let plain =
            step(&mut model(&trainable(BaseFormat::None), Kind::Double, Group::solo()), Recompute::None).0;
        assert!((loss / plain - 1.0).abs() > 1e-5, "{base:?} changes the loss");
    }
}

#[test]
fn bytes_of_quantized_parameters() {
    let shape = Shape::preset("llama-15m").unwrap();
    for (base, limit) in [(BaseFormat::Nf4, 0.55), (BaseFormat::Int8, 1.05)] {
        let config = Lora { modules_to_save: Vec::new(), ..lora(base, 0.0) };
        let plans = Trainable::new(&Freeze::default(), Some(&config)).plans(&shape).unwrap();
        let (mut quantized, mut dense) = (0, 0);
        for (spec, role) in plans.iter().flat_map(|p| p.layout.specs.iter().zip(&p.roles)) {
            match role {
                Role::Frozen(Storage::Quantized(_)) => quantized += spec.numel(),
                _ => dense += 2 * spec.numel(),
            }
        }
        let params = Sharded::new(plans, Sharding::solo(), Kind::BFloat16, Device::Cpu);
        let each = (params.frozen_bytes() - dense) as f64 / quantized as f64;
        println!("{base:?}: {each:.4} bytes a quantized parameter");
        assert!(each < limit && each > 0.5, "{base:?}: {each}");
    }
}

/// Dropout draws the same whatever is computed again, and however the rows are divided.
#[test]
fn dropout_is_the_same_for_recomputation_and_micro_batches() {
    let trainable = Trainable::new(&Freeze::default(), Some(&lora(BaseFormat::None, 0.3)));
    let mut with = model(&trainable, Kind::Double, Group::solo());
    let (loss, gradients) = step(&mut with, Recompute::None);
    let (again, recomputed) = step(&mut with, Recompute::Full);
    assert!(loss == again && gradients.iter().all(|(name, g)| recomputed[name].equal(g)), "bit by bit");
    let divided = accumulate(&mut with, &[(0, 1), (1, 3), (4, 2)], Recompute::Selective);
    assert!(relative_number(divided, loss) < allowed(Quantity::TwoWays, Kind::Double), "{divided} {loss}");
    with.params.clear_gradients();

    let without = Trainable::new(&Freeze::default(), Some(&lora(BaseFormat::None, 0.0)));
    let plain = step(&mut model(&without, Kind::Double, Group::solo()), Recompute::None).0;
    assert!((plain / loss - 1.0).abs() > 1e-6, "something is left out: {plain} {loss}");
    let hidden = |model: &mut Llama| {
        let mut input = rows(&model.shape, 0, 6).0;
        input.dropout = None;
        model.hidden(&input).unwrap()
    };
    let there = hidden(&mut model(&without, Kind::Double, Group::solo()));
    assert!(largest(&hidden(&mut with), &there) == 0.0, "outside of training nothing is left out");
}

/// Sliced over two ranks: quantized bytes, dense ones, adapters, and a head that is trained.
#[test]
fn two_ranks_have_the_gradients_of_one() {
    for (base, freeze) in [
        (Some(BaseFormat::Nf4), Freeze::default()),
        (Some(BaseFormat::Int8), Freeze { blocks: 1, ..Freeze::default() }),
        (
            None,
            Freeze { train_only: vec!["q_proj".into(), "k_proj".into(), "norm".into()], ..Freeze::default() },
        ),
    ] {
        let lora = base.map(|base| lora(base, 0.2));
        let trainable = Trainable::new(&freeze, lora.as_ref());
        let mut whole = model(&trainable, Kind::Double, Group::solo());
        accumulate(&mut whole, &[(0, 6)], Recompute::None);
        let expected: Vec<Option<Vec<f64>>> = (0..whole.params.len())
            .map(|i| whole.params.slice_grad(i).map(|g| Vec::try_from(g).unwrap()))
            .collect();
        on_ranks(2, |world| {
            let parts = [[(0, 1), (1, 2)], [(3, 2), (5, 1)]][world.rank() as usize];
            let mut model = model(&trainable, Kind::Double, world.clone());
            let (mine, all) = (model.params.frozen_bytes(), whole_bytes(&trainable));
            assert!(mine <= all / 2 + 64 * 8, "a rank holds its part: {mine} of {all}");
            accumulate(&mut model, &parts, Recompute::Full);
            for (i, expected) in expected.iter().enumerate() {
                let Some(expected) = expected else {
                    assert!(model.params.slice_grad(i).is_none());
                    continue;
                };
                let slice = model.params.slice(i);
                let expected = Tensor::from_slice(expected).narrow(0, slice.start, slice.len);
                let d = relative(&model.params.slice_grad(i).unwrap(), &expected);
                assert!(
                    d < allowed(Quantity::SameModel, Kind::Double),
                    "{trainable:?}: group {i} is {d:e} off"
                );
            }
        });
    }
}

fn whole_bytes(trainable: &Trainable) -> i64 {
    model(trainable, Kind::Double, Group::solo()).params.frozen_bytes()
}

/// A tiny model, fine-tuned from nothing, for adapters to start from.
fn base_model() -> &'static str {
    static BASE: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    BASE.get_or_init(|| {
        let run = Run::sft("base");
        run.train(1, &["valid.every=100"]);
        let kept = folder("base-model").join("model");
        fs::rename(run.output().join("model"), &kept).unwrap();
        kept.to_string_lossy().into_owned()
    })
}

/// A run that trains adapters beside the weights of [`base_model`].
fn adapter_run(name: &str, words: &[&str]) -> (Run, Vec<String>) {
    let mut all = vec![
        format!("model={{path: {}}}", base_model()),
        "lora={rank: 4, alpha: 8, dropout: 0.1, base: nf4, modules_to_save: [lm_head]}".to_string(),
        "optim.lr=2.0e-3".to_string(),
    ];
    all.extend(words.iter().map(|w| w.to_string()));
    (Run::sft(name), all)
}

fn train(run: &Run, ranks: usize, words: &[String]) {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    run.train(ranks, &words);
}

#[test]
fn ranks_divide_the_training_of_adapters() {
    let (one, words) = adapter_run("ranks-1", &["precision.compute=float64"]);
    train(&one, 1, &words);
    let losses = one.numbers("train", "loss");
    assert!(losses[19] < losses[0], "{losses:?}");
    for (mode, micro) in [("full", "2"), ("replicate", "1"), ("grads", "2"), ("optimizer", "1")] {
        let divided = [format!("parallel.mode={mode}"), format!("train.micro_batch_size={micro}")];
        let (two, words) = adapter_run(&format!("ranks-2-{mode}"), &["precision.compute=float64"]);
        train(&two, 2, &[&words[..], &divided].concat());
        let d = largest_relative(&two.numbers("train", "loss"), &losses);
        assert!(d < allowed(Quantity::SameModel, Kind::Double), "{mode}: {d:e}");
    }
    // 16 columns of a matrix on each rank are no block of nf4.
    let config = one.dir.join("config.yaml").display().to_string();
    let check = ["check", "sft", "--config", &config, "--nproc", "2", "parallel.tensor=2"];
    let refused: Vec<&str> = check.into_iter().chain(words.iter().map(String::as_str)).collect();
    Program::corral(&refused)
        .run(&one.dir, "refused")
        .expect_error(2, &["in nf4 cannot be cut into 2 parts of 16 columns"]);
    // Ranks that share every matrix, with a base in the compute dtype.
    let plain = "lora={rank: 4, alpha: 8, dropout: 0.1, modules_to_save: [lm_head]}";
    let (one, words) = adapter_run("tensor-1", &["precision.compute=float64", plain]);
    train(&one, 1, &words);
    for (ranks, tensor) in [(2, 2), (4, 2), (4, 4)] {
        let (run, words) = adapter_run(
            &format!("tensor-{ranks}-{tensor}"),
            &["precision.compute=float64", plain, &format!("parallel.tensor={tensor}")],
        );
        train(&run, ranks, &words);
        let d = largest_relative(&run.numbers("train", "loss"), &one.numbers("train", "loss"));
        assert!(d < allowed(Quantity::MeshLosses, Kind::Double), "{ranks} ranks: {d:e}");
        let adapter = |run: &Run| {
            let file = run.output().join("model/adapter_model.safetensors");
            let mut tensors = Tensor::read_safetensors(file).unwrap();
            tensors.sort_by(|a, b| a.0.cmp(&b.0));
            tensors
        };
        for ((name, a), (other, b)) in adapter(&run).iter().zip(&adapter(&one)) {
            assert_eq!(name, other);
            let d = relative(a, b);
            assert!(d < allowed(Quantity::SameParameters, Kind::Float), "{name}: {d:e}");
        }
    }
}

/// Stopped, resumed, used, merged, trained further.
#[test]
fn the_life_of_an_adapter() {
    let (whole, words) = adapter_run("life-whole", &["checkpoint.every=5"]);
    train(&whole, 1, &words);
    let (run, words) = adapter_run("life", &["checkpoint.every=5"]);
    let all: Vec<&str> = words.iter().map(String::as_str).collect();
    let stopped = run.stop_at(7, Signal::SIGTERM, &all);
    assert!([0, 143].contains(&stopped.code), "{stopped}");
    run.train(1, &all);
    assert_eq!(run.curve(), whole.curve(), "a resumed run goes on as if nothing had been");
    let tensors = |run: &Run| fs::read(run.output().join("model/adapter_model.safetensors")).unwrap();
    assert!(tensors(&run) == tensors(&whole), "bit by bit");
    let last = run.checkpoints().pop().unwrap().1;
    let size = |path: &std::path::Path| fs::metadata(path).unwrap().len();
    let shard = size(&last.join("shard-00000-of-00001.safetensors"));
    assert!(
        shard < 3 * size(&run.output().join("model/adapter_model.safetensors")) + 4096,
        "{shard}: only what is trained"
    );

    // The adapter, its checkpoint and the merged model give the same perplexity.
    let dir = &run.dir;
    let at = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let valid = data().join("pretrain.valid.jsonl");
    let perplexity = |model: &str| {
        let out = at("eval.json");
        let words = ["eval", "--model", model, "--task", "perplexity", "--output", &out, "--input"];
        Program::corral(&words).arg(&valid).run(dir, "eval").expect_code(0);
        let json: Value = serde_json::from_str(&fs::read_to_string(&out).unwrap()).unwrap();
        json["perplexity"].as_f64().unwrap()
    };
    let adapter = run.output().to_string_lossy().into_owned();
    let merge = ["merge", "--model", base_model(), "--adapter", &adapter, "--output", &at("merged")];
    let merged = Program::corral(&merge).run(dir, "merge").expect_code(0);
    assert!(merged.err.contains("trained on weights in nf4"), "{merged}");
    assert!(merged.out.contains("KL(with adapter || merged)"), "{merged}");
    let with_adapter = perplexity(&adapter);
    for other in [last.to_string_lossy().into_owned(), at("merged")] {
        let p = perplexity(&other);
        assert!(
            relative_number(p, with_adapter) < allowed(Quantity::Perplexity, Kind::Float),
            "{other}: {p}, with the adapter {with_adapter}"
        );
    }
    assert!((perplexity(base_model()) / with_adapter - 1.0).abs() > 1e-4, "it has learned something");
    let words =
        ["generate", "--model", &adapter, "--prompt", "Q", "--max-new-tokens", "5", "--temperature", "0"];
    Program::corral(&words).run(dir, "generate").expect_code(0);

    // Further: only as the same adapter.
    let further = Run::sft("life-further");
    let path = format!("model={{path: {adapter}}}");
    let same = all[1];
    further.train(1, &[&path, same, "train.steps=5"]);
    let start = further.numbers("train", "loss")[0];
    assert!(start < whole.numbers("train", "loss")[0], "it begins where the other ended");
    let other = Run::sft("life-other");
    let refused = "a model with an adapter";
    other.start(1, &[&path, "lora={rank: 2, alpha: 8}"]).wait().expect_error(2, &[refused, "corral merge"]);
    other.start(1, &[&path]).wait().expect_error(2, &[refused]);
    let convert = ["convert", "--from", &adapter, "--to", &at("converted"), "--format", "hf"];
    let converted = Program::corral(&convert).run(dir, "convert").expect_code(0);
    assert!(converted.err.contains("trained on weights in nf4"), "{converted}");
    assert!(converted.out.contains("KL(with adapter || merged)"), "{converted}");
    let tensors = |name: &str| fs::read(dir.join(name).join("model.safetensors")).unwrap();
    assert!(tensors("converted") == tensors("merged"), "convert merges as merge does");
}

/// The tensors of a folder's only file.
fn tensors(dir: &Path, file: &str) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(dir.join(file)).unwrap().into_iter().collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A Phi-3 holds q, k and v in one tensor, and gate and up: an adapter in PEFT's format is of these.
#[test]
fn adapters_of_joined_layers_are_those_of_peft() {
    const WEIGHTS: &str = "adapter_model.safetensors";
    let phi3 = golden_model("phi3");
    let path = phi3.to_string_lossy();
    let model = format!("model={{path: {path}}}");
    let tokenizer = format!("tokenizer={{path: {path}, template: \"{{prompt}}\\n{{completion}}\"}}");
    let base = tensors(&phi3, "model.safetensors");
    let qkv = "model.layers.1.self_attn.qkv_proj.weight";
    let (rows, c) = (base[qkv].size()[0], base[qkv].size()[1]);
    for (name, lora, targets, ranks, alphas) in [
        (
            "all",
            "lora={rank: 3, alpha: 6}",
            serde_json::json!(["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
            serde_json::json!({"qkv_proj": 9, "gate_up_proj": 6}),
            serde_json::json!({"qkv_proj": 18.0, "gate_up_proj": 12.0}),
        ),
        (
            "some",
            "lora={rank: 2, alpha: 4, rslora: true, targets: [q_proj, v_proj]}",
            serde_json::json!(["qkv_proj"]),
            serde_json::json!({"qkv_proj": 6}),
            serde_json::json!({"qkv_proj": 4.0 * 3f64.sqrt()}),
        ),
    ] {
        let run = Run::sft(&format!("joined-{name}"));
        let words = [&model, &tokenizer, lora, "train.steps=4", "valid.every=100"];
        run.train(1, &words);
        let adapter = run.output().join("model");
        let config = json(&adapter.join("adapter_config.json"));
        assert_eq!(config["target_modules"], targets, "{name}");
        assert_eq!((&config["rank_pattern"], &config["alpha_pattern"]), (&ranks, &alphas), "{name}");
        let at = |name: &str| run.dir.join(name).to_string_lossy().into_owned();
        let corral = |words: &[&str]| Program::corral(words).run(&run.dir, "corral");
        let adapter_path = adapter.to_string_lossy().into_owned();
        let checkpoint = run.checkpoints().pop().unwrap().1.to_string_lossy().into_owned();

        // B A of the joined layer is what merging adds, from the adapter and from the checkpoint alike.
        for (from, to) in [(&adapter_path, "merged"), (&checkpoint, "of-checkpoint")] {
            corral(&["merge", "--adapter", from, "--output", &at(to)]).expect_code(0);
        }
        let merged = tensors(&run.dir.join("merged"), "model.safetensors");
        assert_eq!(merged.len(), base.len());
        assert!(
            tensors(&run.dir.join("of-checkpoint"), "model.safetensors").iter().all(|(n, t)| merged[n] == *t)
        );
        let of = tensors(&adapter, WEIGHTS);
        let part = |letter: &str| {
            let module = qkv.strip_suffix(".weight").unwrap();
            of[&format!("base_model.model.{module}.lora_{letter}.weight")].shallow_clone()
        };
        let rank = ranks["qkv_proj"].as_i64().unwrap();
        assert_eq!((part("A").size(), part("B").size()), (vec![rank, c], vec![rows, rank]), "{name}");
        let root = if name == "some" { (rank as f64).sqrt() } else { rank as f64 };
        let delta = part("B").mm(&part("A")) * (alphas["qkv_proj"].as_f64().unwrap() / root);
        assert!(
            largest(&merged[qkv], &(&base[qkv] + &delta)) < allowed(Quantity::Merged, Kind::Float)
                && delta.abs().max().double_value(&[]) > 1e-4
        );
        let k = |t: &Tensor| t.narrow(0, 32, 16);
        assert_eq!(
            k(&merged[qkv]) == k(&base[qkv]),
            name == "some",
            "k has an adapter only in one of the runs"
        );

        // It is written again as it is, and trained further as the same adapter.
        corral(&["convert", "--from", &adapter_path, "--to", &at("again"), "--format", "peft"])
            .expect_code(0);
        assert_eq!(json(&run.dir.join("again/adapter_config.json"))["rank_pattern"], ranks);
        assert!(tensors(&run.dir.join("again"), WEIGHTS).iter().all(|(n, t)| of[n] == *t));
        let further = Run::sft(&format!("joined-{name}-further"));
        let from = format!("model={{path: {adapter_path}}}");
        further.train(1, &[&from, &tokenizer, lora, "train.steps=4", "valid.every=100"]);
    }
}

/// PEFT's own adapters of joined layers, whose parts have one A; and what is refused.
#[test]
fn joined_layers_share_the_adapter_that_peft_made() {
    let phi3 = golden_model("phi3");
    let dir = folder("joined-shared");
    let base = tensors(&phi3, "model.safetensors");
    let qkv = "model.layers.0.self_attn.qkv_proj";
    let weight = &base[&format!("{qkv}.weight")];
    let (rows, c) = (weight.size()[0], weight.size()[1]);
    let values =
        |n: i64, m: i64| (Tensor::arange(n * m, (Kind::Float, Device::Cpu)) * 0.37).sin().view([n, m]) * 0.1;
    let adapter = |name: &str, rank: i64, more: Value| {
        let to = dir.join(name);
        fs::create_dir_all(&to).unwrap();
        let named = |letter: &str| format!("base_model.model.{qkv}.lora_{letter}.weight");
        let tensors = [(named("A"), values(rank, c)), (named("B"), values(rows, rank))];
        Tensor::write_safetensors(&tensors, to.join("adapter_model.safetensors")).unwrap();
        let mut config = serde_json::json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": phi3, "r": 4, "lora_alpha": 8,
            "target_modules": ["qkv_proj"], "layers_to_transform": [0],
        });
        more.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        fs::write(to.join("adapter_config.json"), config.to_string()).unwrap();
        let out = dir.join(format!("{name}-merged"));
        let words = ["merge", "--adapter", &to.to_string_lossy(), "--output", &out.to_string_lossy()];
        (Program::corral(&words).run(&dir, name), out)
    };
    let (merged, out) = adapter("shared", 4, serde_json::json!({}));
    merged.expect_code(0);
    let merged = &tensors(&out, "model.safetensors")[&format!("{qkv}.weight")];
    let delta = values(rows, 4).mm(&values(4, c)) * 2.0;
    assert!(largest(merged, &(weight + delta)) < allowed(Quantity::MergedProduct, Kind::Float));

    let ranks = |of: &str, rank: i64| serde_json::json!({"rank_pattern": {of: rank}, "alpha_pattern": {of: 2 * rank}});
    for (name, rank, more, said) in [
        ("full", 12, ranks("qkv_proj", 12), "where B consists of 3 blocks"),
        ("other", 5, ranks("qkv_proj", 5), "`qkv_proj` has an adapter of rank 5; built are 4, and 12"),
        ("elsewhere", 4, ranks("o_proj", 5), "a rank or alpha of its own for `o_proj` is not built"),
        ("size", 5, serde_json::json!({}), "and should be [4, 32]"),
        (
            "scale",
            4,
            serde_json::json!({"alpha_pattern": {"qkv_proj": 9}}),
            "are multiplied by 2.25, the others by 2",
        ),
    ] {
        adapter(name, rank, more).0.expect_error(3, &[said]);
    }
}

/// A run that was stopped, and each of its checkpoints: merged, and written as an adapter in PEFT's format.
#[test]
fn a_stopped_run_becomes_a_model() {
    let (run, words) = adapter_run("stopped", &["checkpoint.every=3", "train.steps=400"]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    run.stop_at(7, Signal::SIGTERM, &words).expect_code(143);
    let checkpoints = run.checkpoints();
    let (last, newest) = checkpoints.last().unwrap();
    let at = |name: &str| run.dir.join(name).to_string_lossy().into_owned();
    let corral = |name: &str, words: &[&str]| Program::corral(words).run(&run.dir, name).expect_code(0);
    let model = |name: &str| fs::read(run.dir.join(name).join("model.safetensors")).unwrap();
    let output = run.output().to_string_lossy().into_owned();
    let merged = corral("run", &["merge", "--adapter", &output, "--output", &at("of-run")]);
    let told = format!("{output} has no model/ yet: taking its newest checkpoint, step {last}");
    assert_eq!(merged.err.lines().filter(|line| *line == told).count(), 1, "{merged}");
    assert!(merged.err.contains("trained on weights in nf4"), "{merged}");
    let newest = newest.to_string_lossy().into_owned();
    corral("newest", &["merge", "--adapter", &newest, "--output", &at("of-newest")]);
    assert!(model("of-run") == model("of-newest"));
    let first = checkpoints[0].1.to_string_lossy().into_owned();
    corral("first", &["merge", "--adapter", &first, "--output", &at("of-first")]);
    assert!(model("of-run") != model("of-first"));

    corral("peft", &["convert", "--from", &first, "--to", &at("peft"), "--format", "peft"]);
    assert!(fs::read_to_string(at("peft/corral.json")).unwrap().contains("nf4"));
    corral("again", &["merge", "--adapter", &at("peft"), "--output", &at("of-peft")]);
    assert!(model("of-peft") == model("of-first"));
    let whole = Program::corral(&["convert", "--from", base_model(), "--to", &at("no"), "--format", "peft"]);
    whole.run(&run.dir, "whole").expect_error(3, &["no adapter, but a whole model"]);
    assert!(!run.dir.join("no").exists());
}

/// Checkpoints of a model of which a part is frozen, and the model that such a run exports.
#[test]
fn the_life_of_a_frozen_block() {
    let run = Run::sft("frozen");
    let path = format!("model={{path: {}}}", base_model());
    run.train(2, &[&path, "freeze={blocks: 1, embeddings: true}", "checkpoint.every=10"]);
    let read = |path: &str| -> HashMap<String, Tensor> {
        Tensor::read_safetensors(format!("{path}/model.safetensors")).unwrap().into_iter().collect()
    };
    let (before, after) = (read(base_model()), read(&run.output().join("model").to_string_lossy()));
    assert_eq!(before.len(), after.len());
    for (name, t) in &before {
        let frozen = name.starts_with("model.layers.0.") || name.contains("embed_tokens");
        assert_eq!(t.equal(&after[name]), frozen, "{name}");
    }
    // What lies in the checkpoint and what lies in the base are one model.
    let last = run.checkpoints().pop().unwrap().1.to_string_lossy().into_owned();
    let out = run.dir.join("converted").to_string_lossy().into_owned();
    let words = ["convert", "--from", &last, "--to", &out, "--format", "hf"];
    Program::corral(&words).run(&run.dir, "convert").expect_code(0);
    let converted = read(&out);
    assert!(after.iter().all(|(name, t)| converted[name].equal(t)));
}

/// Close to moments in float32, bit by bit over an interruption, and at another world size from the same moments on.
#[test]
fn moments_in_8_bits() {
    let words = ["optim.moments=8bit", "checkpoint.every=5"];
    let (float, whole) = (Run::sft("moments-float"), Run::sft("moments-8bit"));
    float.train(1, &[]);
    whole.train(1, &words);
    let (a, b) = (whole.numbers("train", "loss"), float.numbers("train", "loss"));
    assert!(a[0] == b[0] && a[19] != b[19] && (a[19] / b[19] - 1.0).abs() < 0.1, "{a:?} {b:?}");

    let run = Run::sft("moments-8bit-stopped");
    run.stop_at(7, Signal::SIGTERM, &words);
    run.train(1, &words);
    run.expect_equal(&whole);

    let (step, from) = run.checkpoints().remove(0);
    let two = Run::sft("moments-8bit-ranks");
    two.train(2, &[&words[..], &["--resume", &from.to_string_lossy()]].concat());
    let d = largest_relative(&two.numbers("train", "loss")[..3], &a[step as usize..step as usize + 3]);
    assert!(d < allowed(Quantity::SameMetrics, Kind::Float), "{d:e}");
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let path = format!("model={{path: {}}}", base_model());
    for (i, (words, wanted)) in [
        (&["lora={rank: 4, alpha: 8}"][..], "need a pretrained model"),
        (&[&path, "lora={rank: 0, alpha: 8}"], "'lora.rank'"),
        (&[&path, "lora={rank: 4, alpha: 8, targets: [qproj]}"], "no linear layer 'qproj'; it has q_proj"),
        (&[&path, "lora={rank: 4, alpha: 8, targets: everything}"], "all-linear, attention, or a list"),
        (&[&path, "lora={rank: 4, alpha: 8, dropout: 1.0}"], "'lora.dropout'"),
        (&[&path, "lora={rank: 4, alpha: 8}", "freeze.train_only=[q_proj]"], "lora.modules_to_save"),
        (&[&path, "freeze.blocks=3"], "the model's 2 blocks"),
        (&[&path, "freeze.train_only=[nothing]"], "no tensor 'nothing'"),
    ]
    .into_iter()
    .enumerate()
    {
        let run = Run::sft(&format!("refused-{i}"));
        run.expect_refused(words, 2, wanted);
    }
}
