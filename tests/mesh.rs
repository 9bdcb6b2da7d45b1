//! The mesh: a model whose matrices, rows or blocks are divided among ranks computes what it computes on one.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]
#![allow(clippy::disallowed_methods, reason = "the tests' own variable, CORRAL_MESH_ALL")]

use std::collections::BTreeMap;

use corral::algorithms::step::{MicroBatch, accumulate_balanced};
use corral::config::parallel::StageOrder;
use corral::config::sections::Recompute;
use corral::config::shape::{Family, Shape};
use corral::config::trainable::{BaseFormat, Freeze, Lora, Targets};
use corral::distributed::mesh::{Axis, Sharding};
use corral::distributed::pipeline::Pipeline;
use corral::distributed::sharded::{Sharded, TensorSpec};
use corral::model::cuts::cut_for;
use corral::model::{DropoutPlace, KvCache, Llama, LmHead, ModelInput, Trainable};
use corral::optim::{AdamW, Hyper};
use kernels::comm::{Group, ReduceOp};
use tch::{Device, Kind, Tensor};
use testing::compare::{largest, largest_relative, relative_number};
use testing::folder::folder;
use testing::program::{Program, launch};
use testing::ranks::on_ranks_with_groups;
use testing::run::{Run, answers, beginner, data, json_lines};
use testing::tolerance::{Quantity, allowed};

/// Whether every combination is tested (`make test-mesh`), not only a selection in which each value meets each other one.
fn everything() -> bool {
    std::env::var_os("CORRAL_MESH_ALL").is_some()
}

/// A small model of a family, with 4 query heads and 2 key-value heads, and a vocabulary that nothing divides.
fn small(family: Family) -> Shape {
    Shape {
        vocab_size: 61,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        features: family.features(),
        ..Shape::preset("llama-15m").unwrap()
    }
}

const FORWARD_BACKWARD: StageOrder = StageOrder::OneForwardOneBackward;

/// What the ranks of a group share.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Shared {
    /// Every matrix, and the rows between attention and MLP or not.
    Matrices { rows: bool },
    /// Every sequence.
    Sequences,
    /// The blocks.
    Blocks(StageOrder),
}

/// A model on one rank.
fn model_on_one_rank(shape: &Shape, trainable: &Trainable, kind: Kind) -> Llama {
    model(shape, trainable, Sharding::solo(), kind)
}

/// How ranks that share this lie over all of them.
fn sharing(shared: Shared, world: Group, new_group: &dyn Fn(&str, &[i64]) -> Group) -> Sharding {
    let axis = Axis::of(world.clone());
    match shared {
        Shared::Matrices { rows } => Sharding { tensor: axis, sequence: rows, ..Sharding::solo() },
        Shared::Sequences => Sharding { context: axis, ..Sharding::replicated(world) },
        Shared::Blocks(order) => {
            let new_group = |name: &str, ranks: &[i64]| Ok(new_group(name, ranks));
            let stage = world.rank() as usize;
            let mut pipeline = Pipeline::connect(world.ranks(), stage, Device::Cpu, &new_group).unwrap();
            pipeline.order = order;
            Sharding { pipeline, ..Sharding::solo() }
        }
    }
}

/// A model whose values are those of its tensors' names and places.
fn model(shape: &Shape, trainable: &Trainable, sharding: Sharding, kind: Kind) -> Llama {
    let plans = cut_for(trainable.plans(shape).unwrap(), shape, &sharding).unwrap();
    let mut params = Sharded::new(plans, sharding, kind, Device::Cpu);
    let value = |spec: &TensorSpec, first: i64, values: &Tensor| {
        let at = Tensor::arange(values.numel() as i64, (Kind::Double, Device::Cpu)) + first;
        let start = spec.name.bytes().map(f64::from).sum::<f64>();
        let (around, size) = match spec.shape[..] {
            [_] => (1.0, 0.2),
            _ => (0.0, (spec.shape[1] as f64).sqrt().recip()),
        };
        values.shallow_clone().copy_(&((at * 1.7 + start).sin() * size + around));
        Ok(())
    };
    params.fill(value).unwrap();
    params.fill_adapters(value).unwrap();
    Llama::new(shape.clone(), params)
}

/// What a model computed.
#[derive(Default)]
struct Computed {
    losses: Vec<f64>,
    norms: Vec<f64>,
    balance: Vec<f64>,
    /// As numbers, since tensors do not go from thread to thread.
    tensors: BTreeMap<String, Vec<f64>>,
    entropies: Vec<f64>,
    logits: Vec<f64>,
}

fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).view([-1])).unwrap()
}

/// Three updates with two micro-batches each; entropies, and logits of a row that is read token by token.
fn computed(model: &mut Llama, recompute: Recompute) -> Computed {
    let (rows, length) = (2, 16);
    // A large eps: else the sign of a gradient that is nothing but rounding would count.
    let hyper = Hyper { betas: [0.9, 0.95], eps: 1e-2, weight_decay: 0.1 };
    let mut optimizer = AdamW::new(&model.params, hyper);
    let ids = |first: i64| {
        let ids = Tensor::arange(rows * length, (Kind::Int64, Device::Cpu)) * 7 + first;
        ids.remainder(61).view([rows, length])
    };
    let batch = |first: i64| {
        let dropout = Some(DropoutPlace { seed: 3, step: first as u64, first_row: 0 });
        let input = ModelInput { dropout, ..ModelInput::new(ids(first)) };
        MicroBatch { input, labels: ids(first + 7).view([-1]).copy() }
    };
    let mut all = Computed::default();
    for step in 0..3 {
        let batches = [batch(step), batch(step + 30)];
        let count = (2 * rows * length) as f64;
        // Also the balance of experts, which other models have none of.
        let sums = accumulate_balanced(model, &batches, count, recompute, Some(0.1)).unwrap();
        let Sharding { tensor, context, pipeline, .. } = model.params.sharding();
        let sum = |axis: &Axis, n: f64| axis.group.combine(&[n], ReduceOp::Sum).unwrap()[0];
        all.balance.push(sum(&pipeline.axis, sums.aux_loss.unwrap()));
        all.losses.push(sum(&pipeline.axis, sum(context, sums.loss)));
        let squares = AdamW::sum_squares(&model.params).unwrap();
        let squares = sum(&pipeline.axis, sum(tensor, squares));
        all.norms.push(squares.sqrt());
        optimizer.update(&mut model.params, 1e-2, AdamW::clip_scale(squares.sqrt(), 1.0)).unwrap();
    }
    for i in 0..model.params.len() {
        model
            .params
            .gather_tensors(i, |spec, value| {
                all.tensors.insert(spec.name.clone(), numbers(&value));
                Ok(())
            })
            .unwrap();
        for (name, value) in model.params.gather_trained(i).unwrap() {
            all.tensors.insert(name, numbers(&value));
        }
    }
    if model.params.sharding().pipeline.axis.size > 1 {
        return all;
    }
    let hidden = model.hidden(&ModelInput::new(ids(3))).unwrap();
    let labels = model.own_tokens(&ids(4).view([-1]), &ids(4)).unwrap();
    let told = LmHead::logprobs(model, &hidden, &labels, 0.7, true).unwrap();
    let sum = told.entropies.unwrap().sum(Kind::Double).double_value(&[]);
    all.entropies = model.params.sharding().context.group.combine(&[sum], ReduceOp::Sum).unwrap();
    let mut cache = KvCache::new(model, 1);
    let mut last = model.prefill(&[&[5, 6, 7]], &[0], &mut cache).unwrap();
    for id in [8, 60, 2] {
        all.logits.extend(numbers(&model.next_token_logits(&last).unwrap()));
        last = model.decode(&[id], &[0], &mut cache).unwrap();
    }
    all
}

#[track_caller]
fn near(what: &str, quantity: Quantity, kind: Kind, a: &[f64], b: &[f64]) {
    let (a, b) = (Tensor::from_slice(a), Tensor::from_slice(b));
    let d = largest(&a, &b) / b.abs().max().double_value(&[]).max(1e-30);
    assert!(d < allowed(quantity, kind), "{what}: {d:e}");
}

#[track_caller]
fn equal(name: &str, kind: Kind, parts: &Computed, whole: &Computed) {
    if kind == Kind::BFloat16 {
        let d = relative_number(parts.losses[0], whole.losses[0]);
        assert!(d < allowed(Quantity::SameModel, kind), "{name}: {d:e}");
        return;
    }
    near(&format!("{name}, balance"), Quantity::MeshLosses, kind, &parts.balance, &whole.balance);
    for (step, (a, b)) in parts.losses.iter().zip(&whole.losses).enumerate() {
        let d = relative_number(*a, *b);
        let quantity = if step == 0 { Quantity::MeshFirstLoss } else { Quantity::MeshLosses };
        assert!(d < allowed(quantity, kind), "{name}, loss of step {step}: {a}, {b}, {d:e}");
    }
    near(&format!("{name}, norm"), Quantity::SameNorms, kind, &parts.norms[..1], &whole.norms[..1]);
    assert_eq!(parts.tensors.len(), whole.tensors.len(), "{name}");
    // In float32 what normalized heads nearly cancel is rounding.
    if kind != Kind::Double {
        return;
    }
    for (tensor, b) in &whole.tensors {
        near(&format!("{name}, {tensor}"), Quantity::SameModel, kind, &parts.tensors[tensor], b);
    }
    if parts.logits.is_empty() {
        return;
    }
    near(&format!("{name}, entropies"), Quantity::SameModel, kind, &parts.entropies, &whole.entropies);
    near(&format!("{name}, logits"), Quantity::SameModel, kind, &parts.logits, &whole.logits);
}

fn lora(targets: Targets, modules_to_save: &[&str], base: BaseFormat, dropout: f64) -> Trainable {
    let modules_to_save = modules_to_save.iter().map(|m| m.to_string()).collect();
    let lora = Lora { rank: 3, alpha: Some(6.0), dropout, targets, rslora: false, modules_to_save, base };
    Trainable::new(&Freeze::default(), Some(&lora))
}

/// Losses, norms of gradients, values after three updates, entropies and logits of a model over 2 and 4 ranks are those of one.
#[test]
fn models_on_ranks() {
    let llama = small(Family::Llama);
    let all = Trainable::default();
    let frozen = Freeze { embeddings: true, ..Freeze::default() };
    let experts = Shape { experts: Shape::preset("mixtral-8x7b").unwrap().experts, ..llama.clone() };
    let one_head = Shape { num_key_value_heads: 1, ..llama.clone() };
    // Blocks of 64 values lie in one part.
    let wide = Shape { hidden_size: 64, intermediate_size: 256, head_dim: 64, ..llama.clone() };
    let tied = |shape: Shape| Shape { tie_word_embeddings: true, ..shape };
    let cases = [
        ("llama", llama.clone(), all.clone()),
        ("tied", tied(llama.clone()), all.clone()),
        ("qwen2", small(Family::Qwen2), all.clone()),
        ("qwen3", tied(small(Family::Qwen3)), all.clone()),
        ("gemma2", tied(small(Family::Gemma2)), all.clone()),
        ("one key-value head", Shape { features: Family::Qwen2.features(), ..one_head.clone() }, all.clone()),
        ("mixtral", experts, all),
        ("frozen embeddings", llama.clone(), Trainable::new(&frozen, None)),
        ("LoRA", llama, lora(Targets::AllLinear, &["lm_head"], BaseFormat::None, 0.0)),
        ("LoRA, one key-value head", one_head, lora(Targets::Attention, &[], BaseFormat::None, 0.25)),
        ("nf4", wide.clone(), lora(Targets::AllLinear, &[], BaseFormat::Nf4, 0.25)),
        ("int8", wide, lora(Targets::AllLinear, &["embed_tokens", "lm_head"], BaseFormat::Int8, 0.1)),
    ];
    for (i, (name, shape, trainable)) in cases.iter().enumerate() {
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
            let recompute = [Recompute::None, Recompute::Selective, Recompute::Full][i % 3];
            let whole = computed(&mut model_on_one_rank(shape, trainable, kind), Recompute::None);
            // Each case with each number of ranks, and both ways of dividing rows; all of them with all.
            let even = i % 2 == 0;
            let chosen = |ranks, shared| match (kind, shared) {
                (Kind::Double, Shared::Matrices { rows }) => (ranks == 2) == (rows == even),
                (Kind::Double, Shared::Sequences) => (ranks == 2) == even,
                (_, Shared::Matrices { rows }) => ranks == 2 && rows != even,
                (_, Shared::Sequences) => ranks == 2 && even,
                (_, Shared::Blocks(order)) => (kind == Kind::Double) == (even == (order == FORWARD_BACKWARD)),
            };
            let ways = [
                Shared::Matrices { rows: true },
                Shared::Matrices { rows: false },
                Shared::Sequences,
                Shared::Blocks(FORWARD_BACKWARD),
                Shared::Blocks(StageOrder::ZeroBubble),
            ];
            for (ranks, shared) in [2, 4].into_iter().flat_map(|ranks| ways.map(|shared| (ranks, shared))) {
                let fits = match shared {
                    Shared::Blocks(order) => {
                        ranks == 2 && (order == FORWARD_BACKWARD || shape.experts.is_none())
                    }
                    _ => true,
                };
                if !fits || !everything() && !chosen(ranks, shared) {
                    continue;
                }
                on_ranks_with_groups(ranks, |group, new_group| {
                    let sharding = sharing(shared, group, new_group);
                    let parts = computed(&mut model(shape, trainable, sharding, kind), recompute);
                    equal(&format!("{name} over {ranks}, {shared:?}"), kind, &parts, &whole);
                });
            }
        }
    }
}

/// Four stages, of which one has two blocks, and one none that is trained.
#[test]
fn models_in_four_stages() {
    let five = |shape: Shape| Shape { num_hidden_layers: 5, ..shape };
    let llama = five(small(Family::Llama));
    let upper = Freeze { blocks: 3, embeddings: true, ..Freeze::default() };
    let cases = [
        ("tied", Shape { tie_word_embeddings: true, ..llama.clone() }, Trainable::default()),
        (
            "mixtral",
            Shape { experts: Shape::preset("mixtral-8x7b").unwrap().experts, ..llama.clone() },
            Trainable::default(),
        ),
        ("upper blocks", llama.clone(), Trainable::new(&upper, None)),
        ("LoRA", llama, lora(Targets::AllLinear, &["lm_head"], BaseFormat::None, 0.2)),
    ];
    for (name, shape, trainable) in &cases {
        for kind in [Kind::Double, Kind::Float] {
            let whole = computed(&mut model_on_one_rank(shape, trainable, kind), Recompute::None);
            for order in [FORWARD_BACKWARD, StageOrder::ZeroBubble] {
                if order == StageOrder::ZeroBubble && shape.experts.is_some() {
                    continue;
                }
                on_ranks_with_groups(4, |group, new_group| {
                    let sharding = sharing(Shared::Blocks(order), group, new_group);
                    let parts = computed(&mut model(shape, trainable, sharding, kind), Recompute::Selective);
                    equal(&format!("{name} in four stages, {order:?}"), kind, &parts, &whole);
                });
            }
        }
    }
}

/// The curve of a run, and its model, are those of the run on one rank.
#[track_caller]
fn same_run(run: &Run, whole: &Run) {
    let name = run.dir.display();
    for (kind, key, quantity) in [
        ("train", "loss", Quantity::SameLosses),
        ("valid", "loss", Quantity::SameLosses),
        ("train", "grad_norm", Quantity::SameNorms),
    ] {
        let apart = largest_relative(&run.numbers(kind, key), &whole.numbers(kind, key));
        assert!(apart < allowed(quantity, Kind::Double), "{name}: {key} of {kind}: {apart:e}");
    }
    let apart = largest(&run.parameters(), &whole.parameters());
    assert!(apart < allowed(Quantity::SameParameters, Kind::Double), "{name}: parameters: {apart:e}");
}

/// Pretraining over tensor-parallel ranks alone, and with data ranks in every mode.
#[test]
fn runs_on_meshes() {
    let exact = ["precision.compute=float64", "valid.every=5"];
    let whole = Run::new("mesh-one");
    whole.train(1, &exact);
    for (i, (ranks, words)) in [
        (2, &["parallel.tensor=2", "train.micro_batch_size=4"][..]),
        (4, &["parallel.tensor=4", "train.recompute=selective", "parallel.sequence=false"]),
        (4, &["parallel.tensor=2"]),
        (4, &["parallel.tensor=2", "parallel.mode=grads", "train.micro_batch_size=2"]),
        (4, &["parallel.tensor=2", "parallel.mode=optimizer", "train.micro_batch_size=2"]),
        (4, &["parallel.tensor=2", "parallel.mode=replicate", "train.recompute=full"]),
        (8, &["parallel.tensor=2", "parallel.mode=hybrid", "parallel.shard=2"]),
        (2, &["parallel.context=2", "train.micro_batch_size=4"]),
        (4, &["parallel.context=2", "parallel.tensor=2", "parallel.mode=grads"]),
        (4, &["parallel.context=2", "parallel.mode=replicate", "train.recompute=full"]),
        (4, &["parallel.context=4", "parallel.mode=optimizer", "train.micro_batch_size=2"]),
        (2, &["parallel.pipeline=2", "parallel.stages=[1, 1]", "train.micro_batch_size=2"]),
        (4, &["parallel={pipeline: 2, mode: optimizer, schedule: zero_bubble}", "train.micro_batch_size=1"]),
        (4, &["parallel={pipeline: 2, schedule: zero_bubble}", "train.micro_batch_size=1"]),
        (4, &["parallel.pipeline=2", "parallel.tensor=2", "train.recompute=full"]),
        (
            4,
            &["parallel.pipeline=2", "parallel.context=2", "parallel.mode=grads", "train.micro_batch_size=4"],
        ),
        (
            8,
            &[
                "parallel.pipeline=2",
                "parallel.tensor=2",
                "parallel.mode=replicate",
                "train.micro_batch_size=2",
            ],
        ),
        (8, &["parallel.pipeline=2", "parallel.mode=hybrid", "parallel.shard=2", "train.micro_batch_size=1"]),
    ]
    .into_iter()
    .enumerate()
    {
        let run = Run::new(&format!("mesh-{i}"));
        run.train(ranks, &[&exact[..], words].concat());
        same_run(&run, &whole);
    }
}

/// Packed rows of fine-tuning, and adapters whose dropout goes by a token's place.
#[test]
fn packed_rows_on_meshes() {
    let dropout = ["lora={rank: 4, alpha: 8, dropout: 0.2}", "optim.lr=5.0e-3"];
    for (name, words) in [("full", &[][..]), ("lora", &dropout)] {
        let exact = ["precision.compute=float64", "data.packing=true", "valid.every=10"];
        let base = format!("model={{path: {}}}", beginner().display());
        let words = [&exact[..], &[base.as_str()], words].concat();
        let whole = Run::sft(&format!("mesh-packed-{name}"));
        whole.train(1, &words);
        for (ranks, mesh) in [
            (2, &["parallel.context=2"][..]),
            (2, &["parallel.tensor=2", "train.micro_batch_size=4"]),
            (4, &["parallel.context=2", "parallel.tensor=2", "train.recompute=full"]),
            (4, &["parallel.context=2", "parallel.mode=hybrid", "parallel.shard=2"]),
            (4, &["parallel.pipeline=2", "parallel.tensor=2", "train.micro_batch_size=2"]),
        ] {
            let run = Run::sft(&format!("mesh-packed-{name}-{}", mesh.join("-")));
            run.train(ranks, &[&words[..], mesh].concat());
            for (kind, key) in [("train", "loss"), ("valid", "loss"), ("train", "grad_norm")] {
                let apart = largest_relative(&run.numbers(kind, key), &whole.numbers(kind, key));
                let most = allowed(Quantity::SameNorms, Kind::Double);
                assert!(apart < most, "{name}, {mesh:?}: {key} of {kind}: {apart:e}");
            }
        }
    }
}

/// Ranks that share every matrix write and score what one rank does, also where a rank has nothing to write.
#[test]
fn inference_on_meshes() {
    let dir = folder("mesh-inference");
    let model = answers().display().to_string();
    let lines: Vec<String> = (1..4)
        .map(|i| serde_json::json!({"prompt": format!("{i} + {} = ", i + 1), "completion": "3"}).to_string())
        .collect();
    std::fs::write(dir.join("three.jsonl"), lines.join("\n")).unwrap();
    std::fs::write(dir.join("one.jsonl"), &lines[0]).unwrap();
    let run = |name: &str, ranks: usize, words: &[&str]| {
        let number = ranks.to_string();
        let program = match ranks {
            1 => Program::corral(words),
            _ => Program::new(launch())
                .args(&["--nproc", &number, "--"])
                .args(words)
                .args(&["--device", "cpu"]),
        };
        program.run(&dir, name).expect_code(0)
    };
    for input in ["one", "three"] {
        let from = dir.join(format!("{input}.jsonl")).display().to_string();
        let written = |name: &str, ranks: usize, more: &[&str]| {
            let to = dir.join(format!("{name}.jsonl"));
            let words = ["generate", "--model", &model, "--input", &from, "--output", to.to_str().unwrap()];
            let sampled =
                ["--max-new-tokens", "12", "--temperature", "0.8", "--seed", "3", "--dtype", "float64"];
            run(name, ranks, &[&words[..], &sampled, more].concat());
            std::fs::read_to_string(to).unwrap()
        };
        let whole = written(&format!("{input}-1"), 1, &[]);
        assert_eq!(written(&format!("{input}-2"), 2, &["--tensor", "2"]), whole);
        assert_eq!(written(&format!("{input}-4"), 4, &["--tensor", "2", "--mode", "full"]), whole);
    }
    let from = dir.join("three.jsonl").display().to_string();
    let scored = |name: &str, ranks: usize, more: &[&str]| -> Vec<f64> {
        let to = dir.join(format!("{name}.jsonl"));
        let words = ["score", "--model", &model, "--input", &from, "--output", to.to_str().unwrap()];
        run(name, ranks, &[&words[..], &["--dtype", "float64"], more].concat());
        json_lines(&to).iter().map(|line| line["sum_logprob"].as_f64().unwrap()).collect()
    };
    let whole = scored("score-1", 1, &[]);
    for (name, ranks, more) in [("score-2", 2, &["--tensor", "2"][..]), ("score-4", 4, &["--tensor", "4"])] {
        let d = largest_relative(&scored(name, ranks, more), &whole);
        assert!(d < allowed(Quantity::SameModel, Kind::Double), "{name}: {d:e}");
    }
    let one =
        run("prompt-1", 1, &["generate", "--model", &model, "--prompt", "1 + 2 = ", "--dtype", "float64"]);
    let words =
        ["generate", "--model", &model, "--prompt", "1 + 2 = ", "--dtype", "float64", "--tensor", "2"];
    let two = run("prompt-2", 2, &words);
    assert_eq!(two.out.trim_start_matches("[0] "), one.out, "printed once");
    std::fs::remove_dir_all(&dir).unwrap();
}

/// A run goes on at the same mesh as if it had never ended, and at another one up to rounding.
#[test]
fn resumed_at_another_mesh() {
    let train = |run: &Run, (ranks, tensor, context, pipeline): (usize, i64, i64, i64)| {
        let mesh = [
            format!("parallel.tensor={tensor}"),
            format!("parallel.context={context}"),
            format!("parallel.pipeline={pipeline}"),
        ];
        let words = ["precision.compute=float64", "checkpoint.every=10", "valid.every=5"];
        run.train(ranks, &[&words[..], &mesh.each_ref().map(String::as_str)].concat());
    };
    let (matrices, both, stages) = ((4, 2, 1, 1), (4, 2, 2, 1), (4, 1, 1, 2));
    let whole = Run::new("mesh-resume-whole");
    train(&whole, matrices);
    for (before, after) in [
        (matrices, matrices),
        (matrices, (2, 2, 1, 1)),
        (matrices, (4, 4, 1, 1)),
        (matrices, (2, 1, 1, 1)),
        (both, (1, 1, 1, 1)),
        (both, (2, 1, 2, 1)),
        (stages, (1, 1, 1, 1)),
        (stages, (4, 2, 1, 2)),
        (matrices, stages),
    ] {
        let run = Run::new(&format!("mesh-resume-{before:?}-{after:?}"));
        train(&run, before);
        forget_the_end(&run);
        train(&run, after);
        match before == after {
            true => run.expect_equal(&whole),
            false => same_run(&run, &whole),
        }
        // The checkpoint is a model: its tensors are those that were exported.
        let (step, _) = run.checkpoints().pop().unwrap();
        let from = run.output().join(format!("checkpoints/step-{step:08}")).display().to_string();
        let to = run.dir.join("converted");
        let words = ["convert", "--from", &from, "--to", &to.display().to_string(), "--format", "hf"];
        Program::corral(&words).run(&run.dir, "convert").expect_code(0);
        assert_eq!(std::fs::read(to.join("model.safetensors")).unwrap(), run.model());
    }
}

/// A checkpoint of stages in bfloat16 holds masters in float32, also of the blocks that its first file has nothing of.
#[test]
fn checkpoints_of_stages_in_bfloat16() {
    let run = Run::new("mesh-bfloat16");
    run.train(
        2,
        &[
            "parallel.pipeline=2",
            "train.micro_batch_size=2",
            "precision.compute=bfloat16",
            "checkpoint.every=20",
        ],
    );
    let (step, _) = run.checkpoints().pop().unwrap();
    let from = run.output().join(format!("checkpoints/step-{step:08}")).display().to_string();
    let to = run.dir.join("converted");
    let words = [
        "convert",
        "--from",
        &from,
        "--to",
        &to.display().to_string(),
        "--format",
        "hf",
        "--dtype",
        "bfloat16",
    ];
    Program::corral(&words).run(&run.dir, "convert").expect_code(0);
    assert_eq!(std::fs::read(to.join("model.safetensors")).unwrap(), run.model());
}

/// Makes a run of 20 steps one that was stopped after its checkpoint of step 10.
fn forget_the_end(run: &Run) {
    let (step, last) = run.checkpoints().pop().unwrap();
    assert_eq!(step, 20);
    std::fs::remove_dir_all(last).unwrap();
    std::fs::remove_dir_all(run.output().join("model")).unwrap();
}

/// Adapters go on at another mesh; so does a model to whose vocabulary tokens were added, and one of which a whole stage is frozen.
#[test]
fn adapters_and_new_tokens() {
    let model = format!("model={{path: {}}}", beginner().display());
    let tokenizer = data().join("tokens/tokenizer").display().to_string();
    let more = "template: \"{prompt}\\n{completion}\", add_tokens: ['<one>', '<two>', '<three>']";
    let grown = format!("tokenizer={{path: {tokenizer}, {more}}}");
    let lora = "lora={rank: 4, alpha: 8, dropout: 0.2}";
    let frozen = "freeze={embeddings: true, blocks: 1}";
    for (name, key) in [("lora", lora), ("tokens", grown.as_str()), ("frozen", frozen)] {
        let train = |run: &Run, ranks: usize, mesh: &str| {
            let mesh = format!("parallel={{{mesh}}}");
            let words =
                ["precision.compute=float64", "checkpoint.every=10", "valid.every=10", &model, key, &mesh];
            run.train(ranks, &words);
        };
        let whole = Run::sft(&format!("mesh-{name}-whole"));
        train(&whole, 1, "");
        for (i, (ranks, mesh, then)) in [
            (2, "tensor: 2", (4, "tensor: 4")),
            (4, "tensor: 2", (1, "")),
            (4, "pipeline: 2, tensor: 2", (2, "pipeline: 2")),
        ]
        .into_iter()
        .enumerate()
        {
            let run = Run::sft(&format!("mesh-{name}-{i}"));
            train(&run, ranks, mesh);
            forget_the_end(&run);
            train(&run, then.0, then.1);
            let apart = largest_relative(&run.numbers("train", "loss"), &whole.numbers("train", "loss"));
            assert!(apart < allowed(Quantity::SameNorms, Kind::Double), "{name}, {mesh}: {apart:e}");
        }
    }
}

/// What a model cannot be divided into is refused before anything is written.
#[test]
fn meshes_that_do_not_fit() {
    let run = Run::new("mesh-refused");
    run.expect_refused(&["parallel.tensor=2"], 2, "'parallel.tensor': 2 must divide the number of ranks, 1");
    run.expect_refused(&["parallel.tensor=0"], 2, "parallel.tensor");
    run.expect_refused(
        &["parallel.pipeline=2"],
        2,
        "'parallel.pipeline': 2 must divide the number of ranks, 1",
    );
    run.expect_refused(&["parallel.schedule=zero_bubble"], 2, "parallel.schedule");
    run.expect_refused(&["parallel.stages=[2]"], 2, "parallel.stages");
    let check = |words: &[&str], parts: &[&str]| {
        let config = run.dir.join("config.yaml").display().to_string();
        let words = [&["check", "pretrain", "--config", &config, "--nproc", "2"], words].concat();
        Program::corral(&words).run(&run.dir, "check").expect_error(2, parts);
    };
    check(
        &["parallel={pipeline: 2, stages: [2, 1]}"],
        &["parallel.stages", "are 3 blocks, and the model has 2"],
    );
    check(&["parallel={pipeline: 2, stages: [2, 0]}"], &["parallel.stages"]);
    let stages = ["parallel.pipeline=2", "model.init.num_hidden_layers=1"];
    check(&stages, &["parallel.pipeline", "2 stages are more than the model's 1 blocks"]);
    run.expect_refused(&["parallel.context=3", "data.sequence_length=32"], 2, "32 is not a multiple of 6");
    run.expect_refused(
        &["parallel.context=2"],
        2,
        "'parallel.context': 2 must divide the number of ranks, 1",
    );
}

/// A reference that ranks cannot share is refused before they meet, by name.
#[test]
fn a_reference_that_does_not_fit() {
    let run = Run::sft("mesh-reference");
    let shape = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 1}";
    run.train(1, &[&format!("model={{init: {shape}}}"), "train.steps=1", "schedule.warmup_steps=0"]);
    let line = serde_json::json!({"prompt": "1 + 2 = ", "chosen": "3", "rejected": "4"}).to_string();
    std::fs::write(run.dir.join("pairs.jsonl"), format!("{line}\n{line}\n")).unwrap();
    let (dir, model) = (run.dir.display(), beginner().display());
    let dpo = Run::of(
        "dpo",
        "mesh-reference-dpo",
        &format!(
            "model: {{path: {model}}}\nreference: {{path: {dir}/run/model}}\ndata: {{train: [{dir}/pairs.jsonl], sequence_length: \
             64}}\ntokenizer: {{template: \"{{prompt}}\\n{{completion}}\"}}\ntrain: {{steps: 1, batch_size: 2}}\n"
        ),
    );
    let config = dpo.dir.join("config.yaml").display().to_string();
    let check = ["check", "dpo", "--config", &config, "--nproc", "2", "parallel.tensor=2"];
    let parts = ["parallel.tensor", "reference: 2 must divide the model's attention heads, 1"];
    Program::corral(&check).run(&dpo.dir, "check").expect_error(2, &parts);
}

/// A timeline of some steps tells of every rank what it computes, sends and waits for.
#[test]
fn a_timeline_of_steps() {
    let run = Run::new("mesh-timeline");
    let mesh = "parallel={pipeline: 2, schedule: zero_bubble}";
    run.train(4, &[mesh, "train.micro_batch_size=1", "profile.steps=2"]);
    let text = std::fs::read_to_string(run.output().join("profile/trace.json")).unwrap();
    let trace: serde_json::Value = serde_json::from_str(&text).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    for rank in 0..4 {
        let mine = || events.iter().filter(|e| e["pid"] == rank);
        let lanes: Vec<&str> = mine()
            .filter(|e| e["name"] == "thread_name")
            .map(|e| e["args"]["name"].as_str().unwrap())
            .collect();
        let stage = rank / 2;
        let [activations, data] =
            [format!("sends: activations/{}", rank % 2), format!("sends: data/{}", 2 * stage)];
        for lane in ["computes", "waits", &activations, &data] {
            assert!(lanes.contains(&lane), "rank {rank} has no lane {lane}: {lanes:?}");
        }
        let count = |name: &str| {
            mine().filter(|e| e["ph"] == "X" && e["name"].as_str().unwrap().starts_with(name)).count()
        };
        // Two steps of four micro-batches on a stage of one block.
        assert_eq!(count("forward of micro-batch"), 8, "rank {rank}");
        assert_eq!(count(&format!("block {stage}: forward")), 8, "rank {rank}");
        assert_eq!(count(&format!("block {stage}: gradients of matrices")), 8, "rank {rank}");
        assert_eq!(count("AdamW"), 2, "rank {rank}");
        let bytes = |e: &serde_json::Value| e["args"]["bytes"].as_u64().unwrap_or(0);
        // Rows of 32 hidden values in float32.
        let sent = mine().filter(|e| e["name"] == "transfer" && bytes(e) > 0 && bytes(e) % 128 == 0).count();
        assert_eq!(sent, 8, "rank {rank}");
        assert!(mine().filter(|e| e["ph"] == "X").all(|e| e["dur"].as_f64().unwrap() >= 0.0));
    }
    let left = std::fs::read_dir(run.output().join("profile")).unwrap().count();
    assert_eq!(left, 1, "the ranks' own files are gone");
}
