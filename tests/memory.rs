//! What `corral plan` says, against what steps take.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use corral::algorithms::step::{MicroBatch, accumulate_gradients};
use corral::config::sections::Recompute;
use corral::config::shape::{Activation, Features, Norms, QkNorm, Shape};
use corral::config::trainable::{BaseFormat, Freeze, Lora, Targets};
use corral::distributed::mesh::{Sharding, ShardingPlan};
use corral::distributed::sharded::{Sharded, TensorSpec};
use corral::model::{DropoutPlace, Llama, ModelInput, Trainable};
use corral::plan::memory::{BatchShape, Memory};
use kernels::{counting, host};
use tch::{Device, Kind, Tensor};
use testing::folder::folder;
use testing::program::{Program, corral as program};
use testing::run::{Run, data};

fn shape(preset: &str) -> Shape {
    Shape {
        vocab_size: 1024,
        hidden_size: 256,
        intermediate_size: 704,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 64,
        max_position_embeddings: 4096,
        ..Shape::preset(preset).unwrap()
    }
}

fn lora(base: BaseFormat, dropout: f64) -> Option<Lora> {
    let targets = Targets::AllLinear;
    Some(Lora {
        rank: 16,
        alpha: Some(32.0),
        dropout,
        targets,
        rslora: false,
        modules_to_save: Vec::new(),
        base,
    })
}

/// The most bytes that the tensors of a step take besides the parameters, and what the plan says.
fn step(shape: &Shape, trainable: &Trainable, compute: Kind, batch: BatchShape) -> (i64, i64) {
    let plans = trainable.plans(shape).unwrap();
    let memory = Memory::new(shape, &plans, compute, ShardingPlan::solo(), Device::Cpu).unwrap();
    let planned = memory.step(&batch).total() - memory.resident().total();
    let mut params = Sharded::new(plans, Sharding::solo(), compute, Device::Cpu);
    let uniform = |_: &TensorSpec, _: i64, values: &Tensor| {
        let _ = values.shallow_clone().uniform_(-0.05, 0.05);
        Ok(())
    };
    params.fill(uniform).unwrap();
    params.fill_adapters(uniform).unwrap();
    let mut model = Llama::new(shape.clone(), params);
    let count = batch.rows * batch.length;
    let (_, counted) = counting::tensors(|| {
        let micro_batch = |_| {
            let ids =
                Tensor::randint(shape.vocab_size, [batch.rows, batch.length], (Kind::Int64, Device::Cpu));
            let labels = ids.view([-1]).copy();
            let mut input = ModelInput::new(ids);
            input.dropout = Some(DropoutPlace { seed: 1, step: 1, first_row: 0 });
            if batch.packed {
                let at = Tensor::arange(batch.length, (Kind::Int64, Device::Cpu)).repeat([batch.rows]);
                input.start = Some(at.zeros_like());
                input.positions = Some(at);
            }
            MicroBatch { input, labels }
        };
        let micro_batches: Vec<_> = (0..batch.micro_batches).map(micro_batch).collect();
        accumulate_gradients(&mut model, &micro_batches, count as f64, batch.recompute).unwrap()
    })
    .unwrap();
    (counted.peak, planned)
}

#[test]
fn the_walk_takes_what_a_step_takes() {
    tch::set_num_threads(1);
    let all = || Trainable::default();
    let adapters = |base, dropout| Trainable::new(&Freeze::default(), lora(base, dropout).as_ref());
    let upper = Trainable::new(&Freeze { blocks: 1, embeddings: true, train_only: Vec::new() }, None);
    let llama = shape("llama-15m");
    let tied = Shape { tie_word_embeddings: true, ..llama.clone() };
    let gemma = Features {
        activation: Activation::GeluTanh,
        norms: Norms::Both,
        norm_offset: true,
        scale_embeddings: true,
        attention_softcap: Some(50.0),
        logit_softcap: Some(30.0),
        ..Features::default()
    };
    let olmo = Features { norms: Norms::After, qk_norm: QkNorm::Projection, ..Features::default() };
    let cases = [
        ("llama", &llama, all()),
        ("tied", &tied, all()),
        ("frozen", &llama, upper),
        ("lora", &llama, adapters(BaseFormat::None, 0.0)),
        ("lora dropout", &llama, adapters(BaseFormat::None, 0.1)),
        ("int8", &llama, adapters(BaseFormat::Int8, 0.0)),
        ("nf4", &llama, adapters(BaseFormat::Nf4, 0.0)),
        (
            "qwen3",
            &Shape { features: corral::config::shape::Family::Qwen3.features(), ..llama.clone() },
            all(),
        ),
        ("mixtral", &shape("mixtral-8x7b"), all()),
        ("gemma", &Shape { features: gemma, tie_word_embeddings: true, ..llama.clone() }, all()),
        ("olmo", &Shape { features: olmo, ..llama.clone() }, all()),
    ];
    for (name, shape, trainable) in &cases {
        for (compute, recompute) in [
            (Kind::Float, Recompute::None),
            (Kind::Float, Recompute::Full),
            (Kind::BFloat16, Recompute::Selective),
        ] {
            for (rows, length, micro_batches, packed) in [(4, 128, 1, false), (2, 128, 2, true)] {
                let batch = BatchShape { rows, length, micro_batches, recompute, packed };
                let (counted, planned) = step(shape, trainable, compute, batch);
                let what = format!("{name} {compute:?} {recompute:?}, {micro_batches} x {rows} x {length}");
                println!("{what}: {counted} bytes, planned {planned}");
                // Products in bfloat16 and the attention have scratch memory that does not grow with the model; a processor
                // without instructions for bfloat16 computes in float32, and takes more.
                let scratch = match compute {
                    Kind::Float => 1 << 18,
                    _ if host::has_native_bfloat16() => 3 << 19,
                    _ => 5 << 19,
                };
                let tolerance = counted / 100 + scratch;
                assert!((counted - planned).abs() < tolerance, "{what}: {counted} bytes, planned {planned}");
            }
        }
    }
}

/// Real runs: the plan is within a tenth of the peak of the process.
#[test]
fn a_plan_is_what_a_run_measures() {
    let shape = "{hidden_size: 512, intermediate_size: 1408, num_hidden_layers: 4, num_attention_heads: 8}";
    let model = format!("model={{init: {shape}}}");
    let cases: [(&str, usize, &[&str]); 13] = [
        ("pipeline", 2, &["parallel.pipeline=2", "train.micro_batch_size=2"]),
        ("pipeline-data", 4, &["parallel.pipeline=2", "parallel.mode=optimizer", "train.micro_batch_size=2"]),
        ("context", 2, &["parallel.context=2", "data.packing=true"]),
        ("tensor", 2, &["train.micro_batch_size=4", "parallel.tensor=2"]),
        ("tensor-whole", 2, &["train.micro_batch_size=4", "parallel.tensor=2", "parallel.sequence=false"]),
        ("tensor-data", 4, &["parallel.tensor=2", "parallel.mode=replicate", "train.recompute=selective"]),
        ("one", 1, &["train.micro_batch_size=8"]),
        ("parts", 1, &["train.micro_batch_size=2", "train.recompute=full"]),
        ("bfloat16", 1, &["precision.compute=bfloat16", "optim.moments=8bit"]),
        ("ranks", 2, &["train.micro_batch_size=2"]),
        ("grads", 2, &["train.micro_batch_size=2", "parallel.mode=grads"]),
        ("optimizer", 2, &["train.micro_batch_size=2", "parallel.mode=optimizer"]),
        ("hybrid", 4, &["train.micro_batch_size=2", "parallel.mode=hybrid", "parallel.shard=2"]),
    ];
    for (name, ranks, words) in cases {
        let run = Run::sft(&format!("plan-{name}"));
        let words =
            [&[model.as_str(), "train.steps=3", "data.valid=[]", "schedule.warmup_steps=0"], words].concat();
        run.train(ranks, &words);
        let peak = run.numbers("train", "peak_bytes").into_iter().fold(0.0, f64::max);
        let plan = plan("sft", &run, ranks, &words);
        let planned = plan["peak_bytes"].as_f64().unwrap();
        let off = planned / peak - 1.0;
        println!("{name}: {:.0} MiB, planned {off:+.1e} off", peak / (1 << 20) as f64);
        assert!(off.abs() < 0.1, "{name}: {peak} bytes, planned {plan}");
        // The model is most of it: the process alone would not do.
        assert!(plan["process_bytes"].as_f64().unwrap() < 0.6 * peak, "{plan}");
    }
}

/// Reward models and DPO, on completions that are all as long as a sequence may be.
#[test]
#[expect(clippy::too_many_lines, reason = "a run after the other")]
fn plans_of_preferences_are_what_runs_measure() {
    let shape = "{hidden_size: 512, intermediate_size: 1408, num_hidden_layers: 4, num_attention_heads: 8}";
    let tuned = Run::sft("plan-preferences");
    let short = ["train.steps=1", "data.valid=[]", "schedule.warmup_steps=0"];
    tuned.train(1, &[&[format!("model={{init: {shape}}}").as_str()], &short[..]].concat());
    let model = tuned.output().join("model");

    let line = |i: usize| {
        let prompt: Vec<String> = (0..200).map(|k| format!("{}", (i * 37 + k * 91) % 1000)).collect();
        let answer = |what: &str| [what; 8].join(" ");
        let (chosen, rejected) = (answer("31"), answer("17"));
        serde_json::json!({"prompt": prompt.join(" "), "chosen": chosen, "rejected": rejected}).to_string()
    };
    let (dir, bpe) = (folder("plan-preferences-data"), data().join("tokens/tokenizer"));
    std::fs::write(dir.join("pairs.jsonl"), (0..24).map(|i| line(i) + "\n").collect::<String>()).unwrap();
    let keys = format!(
        "model: {{path: {}}}
tokenizer: {{path: {}, template: \"{{prompt}}\\n{{completion}}\"}}
data: {{train: [{}/pairs.jsonl], sequence_length: 128, too_long: truncate, cache: {}/cache}}
train: {{steps: 2, batch_size: 4}}
",
        model.display(),
        bpe.display(),
        dir.display(),
        dir.display()
    );
    let reference = format!("reference={{path: {}}}", model.display());
    // What normalisation takes is not in the metrics of steps: it comes after the last.
    const FEW: &str = "reward.normalize.samples=4";
    let cases: [(&'static str, &str, usize, &[&str]); 7] = [
        ("reward", "packed", 1, &[FEW]),
        ("reward", "padded", 1, &[FEW, "data.packing=false", "train.micro_batch_size=2"]),
        ("reward", "ranks", 2, &[FEW, "train.micro_batch_size=2", "precision.compute=bfloat16"]),
        ("dpo", "cached", 1, &["data.packing=false"]),
        ("dpo", "online", 1, &["dpo.reference=online", "train.micro_batch_size=2"]),
        (
            "dpo",
            "online-grads",
            2,
            &["dpo.reference=online", "train.micro_batch_size=2", "parallel.mode=grads"],
        ),
        ("dpo", "reference", 1, &[&reference, "train.micro_batch_size=1", "train.recompute=full"]),
    ];
    let mut plans = Vec::new();
    for (subcommand, name, ranks, words) in cases {
        let run = Run::of(subcommand, &format!("plan-{subcommand}-{name}"), &keys);
        run.train(ranks, words);
        let peak = run.numbers("train", "peak_bytes").into_iter().fold(0.0, f64::max);
        let plan = plan(subcommand, &run, ranks, words);
        let off = plan["peak_bytes"].as_f64().unwrap() / peak - 1.0;
        println!("{subcommand} {name}: {:.0} MiB, planned {off:+.1e} off", peak / (1 << 20) as f64);
        assert!(off.abs() < 0.15, "{subcommand} {name}: {peak} bytes, planned {plan}");
        plans.push(plan);
        if name == "packed" {
            // A critic that comes from a reward model has its head.
            let (actor, trained) = (model.display(), run.output().join("model"));
            let keys = format!(
                "actor: {{path: {actor}}}
reward_model: {{path: {}}}
data: {{train: [{}/prompts.train.jsonl], sequence_length: 128}}
generation: {{max_new_tokens: 16}}
ppo: {{minibatch_size: 4}}
train: {{steps: 1, batch_size: 4}}
",
                trained.display(),
                data().display()
            );
            let ppo = self::plan("ppo", &Run::of("ppo", "plan-critic", &keys), 1, &[]);
            let of = |i: usize| ppo["models"][i]["parameters"].as_i64().unwrap();
            assert_eq!((&ppo["models"][1]["name"], of(1)), (&"critic".into(), of(2)), "{ppo}");
            assert!(of(1) < of(0), "{ppo}");
        }
    }
    let many = plan("reward", &Run::of("reward", "plan-normalize", &keys), 1, &["train.micro_batch_size=1"]);
    assert!(many["asking_bytes"].as_i64() > many["step_bytes"].as_i64(), "{many}");
    assert_eq!(many["peak_bytes"], many["asking_bytes"]);
    // A reference of its own is there in every step, or only before the first; else there is none.
    let bytes = |case: usize, key: &str| plans[case][key].as_i64().unwrap();
    assert!(bytes(4, "reference_bytes") > 4 * 12_000_000 && bytes(4, "asking_bytes") > 0);
    assert!(bytes(6, "reference_bytes") == 0 && bytes(6, "asking_bytes") > bytes(6, "step_bytes") / 2);
    assert_eq!([bytes(3, "reference_bytes"), bytes(3, "asking_bytes")], [0, 0]);
    // Each has as many completions as are told, and a preset stands for a model.
    let run = Run::of("dpo", "plan-preset", &keys);
    let preset = ["--completions", "4", "model.path=llama-15m"];
    let [two, four] = [&preset[2..], &preset].map(|words| plan("dpo", &run, 1, words));
    let activations = |plan: &serde_json::Value| plan["parts"]["activations"].as_f64().unwrap();
    assert!(activations(&four) > 1.5 * activations(&two), "{two} {four}");
}

fn plan(subcommand: &str, run: &Run, ranks: usize, words: &[&str]) -> serde_json::Value {
    let ranks = ranks.to_string();
    let program = Program::corral(&["plan", subcommand, "--json", "--nproc", &ranks, "--config"]);
    let program = program.arg(run.dir.join("config.yaml")).args(words);
    serde_json::from_str(&program.run(&run.dir, "plan").expect_code(0).out).unwrap()
}

#[test]
fn the_largest_micro_batch_is_the_largest_that_fits() {
    let run = Run::sft("largest");
    let most = plan("sft", &run, 1, &["train.batch_size=64", "--device-memory", "400MiB"]);
    let largest = most["largest_micro_batch_size"].as_i64().unwrap();
    assert!(largest > 64 && most["largest_of_batch"] == 64, "{most}");
    // The process's own part differs a little from one call to the next.
    let peak = |rows: i64| {
        let words = format!("train.batch_size={rows}");
        plan("sft", &run, 1, &[&words])["peak_bytes"].as_i64().unwrap()
    };
    let bytes = 400 << 20;
    assert!(peak(largest * 9 / 10) <= bytes && peak(largest * 11 / 10) > bytes, "{most}");
    let none = plan("sft", &run, 1, &["--device-memory", "1kB"]);
    assert!(none["largest_micro_batch_size"] == 0 && none["largest_of_batch"].is_null(), "{none}");
}

/// The recipes of PPO for large models, with presets in the models' places: what the plan says fits the cards they name, what is
/// offloaded counts only while it works, and devices are told apart.
#[test]
fn several_models_are_planned_by_device_and_phase() {
    let plan = |recipe: &str, words: &[&str]| -> serde_json::Value {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let config = dir.join("configs/ppo").join(recipe);
        let all = [&["plan", "ppo", "--json", "--config", config.to_str().unwrap()], words].concat();
        let planned = Program::corral(&all).args(&["--device", "cuda"]).run(&folder("plan-ppo"), "plan");
        serde_json::from_str(&planned.expect_code(0).out).unwrap()
    };
    let one_gpu = plan("llama-7b-one-gpu.yaml", &[]);
    let gib = |v: &serde_json::Value| v.as_f64().unwrap() / (1u64 << 30) as f64;
    for phase in 0..3 {
        // Alone at a time: one 7B model in bfloat16 has 12.5 GiB, and all would not fit.
        let together = gib(&one_gpu["device_bytes"]["cuda"][phase]);
        let most =
            one_gpu["models"].as_array().unwrap().iter().filter_map(|m| m["phase_bytes"][phase].as_f64());
        assert_eq!(together * (1u64 << 30) as f64, most.fold(0.0, f64::max));
        assert!((12.5..24.0).contains(&together), "phase {phase}: {together} GiB");
    }
    assert!(gib(&one_gpu["host_bytes"]) > 4.0 * 12.3);

    // What stays is there in every phase.
    let stays = plan("llama-7b-one-gpu.yaml", &["reference.offload=false"]);
    for phase in 0..3 {
        let more = gib(&stays["device_bytes"]["cuda"][phase]) - gib(&one_gpu["device_bytes"]["cuda"][phase]);
        assert!((10.0..12.8).contains(&more), "phase {phase}: {more} GiB more");
    }
    let apart = plan("llama-7b-one-gpu.yaml", &["reference.device=cuda:1"]);
    assert!(gib(&apart["device_bytes"]["cuda:1"][1]) > 12.3);

    let eight = plan("llama-13b-8gpu.yaml", &["--nproc", "8"]);
    assert!((0..3).all(|phase| gib(&eight["device_bytes"]["cuda"][phase]) < 80.0), "{eight}");
    let averaged = plan("llama-13b-8gpu.yaml", &["--nproc", "8", "ppo.ema=0.99"]);
    let more = gib(&averaged["device_bytes"]["cuda"][1]) - gib(&eight["device_bytes"]["cuda"][1]);
    assert!((6.0..13.0).contains(&more), "an eighth of 13B in float32, and a copy: {more} GiB");
}

/// What `plan` says of presets, `check` does, and that it has opened nothing.
#[test]
fn a_recipe_of_presets_is_checked_without_models() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/ppo");
    for (recipe, ranks) in [("llama-7b-one-gpu.yaml", "1"), ("llama-13b-8gpu.yaml", "8")] {
        let config = dir.join(recipe);
        let words = ["check", "ppo", "--device", "cuda", "--nproc", ranks, "--config"];
        let check = |more: &[&str]| {
            let folder = folder(&format!("check-presets-{ranks}"));
            Program::corral(&words).arg(&config).args(more).run(&folder, "check")
        };
        let told = check(&[]).expect_code(0).out;
        for part in
            ["neither models nor data were opened", "sampling", "scoring", "learning", "reward_model", "cuda"]
        {
            assert!(told.contains(part), "{part} in {told}");
        }
        check(&["ppo.minibatch_size=7"]).expect_code(2);
        // How many ranks a host has decides over memory, not over what can run.
        let hybrid = check(&["parallel.mode=hybrid"]).expect_code(0).out;
        assert_eq!(hybrid.contains("parallel.shard: auto"), ranks == "8", "{hybrid}");
        check(&["actor.path=there-is-none"]).expect_code(3);
        let all = ["actor", "critic", "reward_model", "reference"].map(|m| format!("{m}.path=there-is-none"));
        check(&all.each_ref().map(String::as_str)).expect_code(3);
    }
}

/// Meshes of a large model on many GPUs that are not there: those that fit, the fastest first, and what is sent between them.
#[test]
fn meshes_are_searched() {
    let dir = folder("search");
    let plan = |name: &str, words: &[&str]| {
        let common = [
            "plan",
            "pretrain",
            "--config",
            "llama-3-70b-4x8",
            "--nodes",
            "4",
            "--gpus",
            "8",
            "--gpu",
            "H100",
        ];
        Program::new(program()).args(&common).args(words).run(&dir, name)
    };
    let one = plan("one", &[]).expect_code(0);
    for part in ["32 rank(s)", "sent in a step: tensor", "sent in a step: shard", "with it", "(predicted)"] {
        assert!(one.out.contains(part), "{part}: {one}");
    }
    let found = plan("search", &["--search", "--device-memory", "80GiB"]).expect_code(0);
    assert_eq!(found.err.matches("using the built-in recipe").count(), 1, "not for every mesh: {found}");
    let seconds: Vec<f64> = found
        .out
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_once(" s a step").unwrap().0.parse().unwrap())
        .collect();
    assert!(seconds.len() > 3 && seconds.is_sorted(), "{found}");
    for axis in ["parallel.tensor=4", "parallel.context=2", "parallel.pipeline=4"] {
        assert!(found.out.contains(axis), "{axis}: {found}");
    }
    // What fits less is not there, and slower links make slower steps.
    let smaller = plan("smaller", &["--search", "--device-memory", "48GiB"]).expect_code(0);
    for line in smaller.out.lines().filter(|line| !line.starts_with('#')) {
        let size = line.split_once(" tokens/s, ").unwrap().1.split_once(" GiB: ").unwrap().0;
        assert!(size.parse::<f64>().unwrap() <= 48.0, "{line}");
    }
    let slow = plan("slow", &["--search", "--device-memory", "80GiB", "--link", "30"]).expect_code(0);
    let first = slow.out.lines().find(|line| !line.starts_with('#')).unwrap();
    assert!(first.split_once(" s a step").unwrap().0.parse::<f64>().unwrap() > seconds[0], "{slow}");
    plan("none", &["--search", "--device-memory", "8GiB"])
        .expect_error(2, &["no mesh of 32 ranks fits into 8.0 GiB"]);
    plan("odd", &["--nodes", "3", "--nproc", "8"]).expect_code(2);
    plan("json", &["--json", "--network", "5"]).expect_code(2);
}
