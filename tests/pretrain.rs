//! Pretraining through the real binaries: the same losses on any number of ranks, and what a run's folder holds.

use std::fs;
use std::time::{Duration, Instant};
use tch::Kind;
use testing::compare::largest;
use testing::compare::largest_relative;
use testing::compare::relative_number;
use testing::folder::folder;
use testing::golden::json;
use testing::golden::tensors;
use testing::program::Program;
use testing::run::Run;
use testing::run::uint;
use testing::tolerance::{Quantity, allowed};

use corral::telemetry::tensorboard;

/// How a run is divided: ranks, `parallel.mode` (with `parallel.shard` after a colon), `train.micro_batch_size`,
/// `train.recompute`.
type Division<'a> = (usize, &'a str, usize, &'a str);

/// The same 20 steps of 8 sequences, however divided, against those of one rank with one micro-batch. Prints the table.
fn same_losses(name: &str, words: &[&str], kind: Kind, divisions: &[Division]) {
    let tolerance = allowed(Quantity::SameLosses, kind);
    let reference = Run::new(&format!("{name}-reference"));
    reference.train(1, words);
    let curves = |run: &Run| {
        [("train", "loss"), ("train", "grad_norm"), ("valid", "loss")]
            .map(|(kind, key)| run.numbers(kind, key))
    };
    let expected = curves(&reference);
    assert_eq!(expected.each_ref().map(Vec::len), [20, 20, 2]);
    assert!(expected[0][19] < 0.8 * expected[0][0], "the loss falls: {:?}", expected[0]);
    println!(
        "{name}: ranks  mode       micro-batch  recompute  first loss  last loss  largest relative difference"
    );
    for division in divisions {
        let (ranks, mode, micro, recompute) = division;
        let run = Run::new(&format!("{name}-{ranks}-{mode}-{micro}-{recompute}").replace(':', "-"));
        let (mode_name, shard) = mode.split_once(':').unwrap_or((mode, "auto"));
        let divided = [
            format!("parallel.mode={mode_name}"),
            format!("parallel.shard={shard}"),
            format!("train.micro_batch_size={micro}"),
            format!("train.recompute={recompute}"),
        ];
        let divided: Vec<&str> = divided.iter().map(String::as_str).chain(words.iter().copied()).collect();
        run.train(*ranks, &divided);
        let found = curves(&run);
        let [loss, norm, valid] = std::array::from_fn(|i| largest_relative(&found[i], &expected[i]));
        let (first, last) = (found[0][0], found[0][19]);
        println!(
            "{name}: {ranks:5}  {mode:9}  {micro:11}  {recompute:9}  {first:10.6}  {last:9.6}  \
             {loss:.1e} (validation {valid:.1e}, gradient norm {norm:.1e})"
        );
        assert!(
            loss <= tolerance && valid <= tolerance,
            "{division:?}: losses differ by {loss:e}, {valid:e}"
        );
        // Norms follow every small difference of the parameters.
        assert!(
            norm <= allowed(Quantity::SameNorms, kind),
            "{division:?}: gradient norms differ by {norm:e}"
        );
        for line in run.metrics().iter().filter(|line| line["kind"] == "train") {
            assert_eq!(uint(line, "tokens"), 8 * 32 * uint(line, "step"), "{line}");
        }
    }
}

#[test]
fn losses_are_the_same_however_the_work_is_divided() {
    let divisions = [
        (1, "full", 2, "selective"),
        (1, "replicate", 4, "full"),
        (2, "full", 4, "none"),
        (2, "full", 1, "full"),
        (2, "replicate", 2, "selective"),
        (4, "full", 2, "none"),
        (4, "full", 1, "selective"),
        (4, "replicate", 1, "full"),
    ];
    same_losses("untied", &[], Kind::Float, &divisions);
}

#[test]
fn losses_are_the_same_with_tied_embeddings() {
    let divisions = [
        (1, "full", 2, "full"),
        (2, "full", 2, "none"),
        (2, "replicate", 4, "none"),
        (4, "full", 1, "selective"),
    ];
    same_losses("tied", &["model.init.tie_word_embeddings=true"], Kind::Float, &divisions);
}

/// ZeRO-1, ZeRO-2 and HSDP.
#[test]
fn losses_are_the_same_in_all_modes() {
    let divisions = [
        (1, "grads", 2, "none"),
        (2, "grads", 2, "selective"),
        (4, "grads", 1, "full"),
        (1, "optimizer", 2, "none"),
        (2, "optimizer", 1, "full"),
        (4, "optimizer", 1, "none"),
        (1, "hybrid", 8, "none"),
        (2, "hybrid", 2, "none"),
        (2, "hybrid:1", 2, "none"),
        (4, "hybrid:2", 1, "selective"),
    ];
    same_losses("modes", &[], Kind::Float, &divisions);
}

#[test]
fn losses_in_float64_are_the_same_to_its_precision() {
    let divisions = [
        (1, "full", 1, "selective"),
        (2, "full", 2, "none"),
        (4, "replicate", 1, "full"),
        (2, "grads", 1, "none"),
        (4, "optimizer", 1, "none"),
        (2, "optimizer", 2, "full"),
        (4, "hybrid:2", 1, "none"),
    ];
    let words = ["precision.compute=float64", "model.init.tie_word_embeddings=true"];
    same_losses("float64", &words, Kind::Double, &divisions);
}

/// In float64, so that no rounding chooses another expert. The load-balancing loss is one of micro-batches: it is the same
/// as long as these are.
#[test]
fn mixtures_of_experts_balance_their_load() {
    let train = |name: &str, ranks: usize, words: &[&str]| {
        let run = Run::new(&format!("experts-{name}"));
        let always = [
            "model.init.model_type=mixtral",
            "model.init.num_local_experts=4",
            "precision.compute=float64",
            "train.micro_batch_size=2",
        ];
        run.train(ranks, &[&always, words].concat());
        ["loss", "aux_loss", "grad_norm"].map(|key| run.numbers("train", key))
    };
    let strong = "model.init.router_aux_loss_coef=1.0";
    let reference = train("reference", 1, &[strong]);
    assert_eq!(reference.each_ref().map(Vec::len), [20; 3]);
    for (name, ranks, words) in [
        ("full", 2, [strong, "train.recompute=full"]),
        ("four", 4, [strong, "train.recompute=selective"]),
        ("replicate", 2, [strong, "parallel.mode=replicate"]),
    ] {
        for (found, expected) in train(name, ranks, &words).iter().zip(&reference) {
            let d = largest_relative(found, expected);
            assert!(d < allowed(Quantity::SameMetrics, Kind::Double), "{name}: differs by {d:e}");
        }
    }
    // Two of four experts a token: 2 where the load is even, more where it is not.
    let without = train("without", 1, &["model.init.router_aux_loss_coef=0.0"]);
    let last = |curves: &[Vec<f64>; 3]| curves[1][15..].iter().sum::<f64>() / 5.0;
    assert!(reference[1].iter().all(|aux| *aux > 1.99), "{:?}", reference[1]);
    assert!(last(&reference) < 2.05, "{:?}", reference[1]);
    assert!(last(&without) > last(&reference), "{:?} {:?}", without[1], reference[1]);
    assert!(reference[0][19] < 0.8 * reference[0][0], "the loss falls: {:?}", reference[0]);
}

#[test]
fn recomputation_changes_no_bit() {
    let words = ["train.micro_batch_size=4", "train.recompute=none"];
    let kept = Run::new("recompute-none");
    kept.train(1, &words);
    for recompute in ["selective", "full"] {
        let run = Run::new(&format!("recompute-{recompute}"));
        run.train(1, &[words[0], &format!("train.recompute={recompute}")]);
        run.expect_equal(&kept);
    }
}

#[test]
fn the_folder_of_a_run() {
    let run = Run::new("folder");
    run.train(1, &["optim.lr=0.02", "checkpoint.every=8"]);
    let lines = run.metrics();
    let keys: [(&str, &[&str]); 2] = [
        (
            "train",
            &[
                "loss",
                "lr",
                "grad_norm",
                "tokens",
                "tokens_per_s",
                "step_s",
                "elapsed_s",
                "peak_bytes",
                "skipped_steps",
            ],
        ),
        ("valid", &["loss", "perplexity"]),
    ];
    for (kind, keys) in keys {
        let of_kind: Vec<_> = lines.iter().filter(|line| line["kind"] == kind).collect();
        let steps: Vec<u64> = of_kind.iter().map(|line| uint(line, "step")).collect();
        let expected: Vec<u64> = if kind == "train" { (1..=20).collect() } else { vec![10, 20] };
        assert_eq!(steps, expected, "{kind}");
        for (line, key) in of_kind.iter().flat_map(|line| keys.iter().map(move |key| (line, key))) {
            assert!(line[key].is_number(), "{key} of {line}");
        }
    }
    for line in lines.iter().filter(|line| line["kind"] == "valid") {
        let (loss, perplexity) = (line["loss"].as_f64().unwrap(), line["perplexity"].as_f64().unwrap());
        assert!(relative_number(perplexity, loss.exp()) < allowed(Quantity::Printed, Kind::Float), "{line}");
    }
    let steps: Vec<u64> = run.checkpoints().iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [8, 16, 20]);
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        assert!(run.output().join("model").join(name).is_file(), "model/{name}");
    }

    // TensorBoard holds the same numbers, in float32.
    let mut expected: Vec<(u64, String, f32)> = vec![];
    for line in &lines {
        let (kind, step) = (line["kind"].as_str().unwrap(), uint(line, "step"));
        let numbers = line.as_object().unwrap().iter().filter(|(key, _)| *key != "step");
        expected
            .extend(numbers.filter_map(|(key, x)| Some((step, format!("{kind}/{key}"), x.as_f64()? as f32))));
    }
    let mut events = vec![];
    for path in tensorboard::event_files(&run.output()).unwrap() {
        let mut file = fs::File::open(path).unwrap();
        while let Some((_, event)) = tensorboard::read_event(&mut file).unwrap() {
            let values = event.summary.iter().flat_map(|s| &s.values);
            events.extend(
                values.map(|v| (event.step as u64, v.tag.clone(), v.simple_value.unwrap_or_default())),
            );
        }
    }
    let order = |a: &(u64, String, f32), b: &(u64, String, f32)| a.partial_cmp(b).unwrap();
    expected.sort_by(order);
    events.sort_by(order);
    assert_eq!(events, expected);

    // `config.yaml` repeats the run, the override included.
    let again = Run::new("folder-again");
    let config = fs::read_to_string(run.output().join("config.yaml")).unwrap();
    fs::write(again.dir.join("config.yaml"), config).unwrap();
    again.train(1, &[&format!("output_dir={}", again.output().display())]);
    again.expect_equal(&run);
}

#[test]
fn a_folder_holds_one_run() {
    let run = Run::new("one-run");
    run.train(1, &[]);
    let first = run.curve();
    let try_again = |words: &[&str]| run.start(1, words).wait();

    try_again(&["optim.lr=0.02"])
        .expect_error(2, &["optim.lr: there 0.01, here 0.02", "--resume never --overwrite"]);
    try_again(&["--resume", "never"]).expect_error(2, &["already holds a run", "--overwrite"]);
    try_again(&["--overwrite"]).expect_error(2, &["--overwrite", "--resume never"]);
    assert_eq!(run.curve(), first, "what was refused changes nothing");

    // A finished run has nothing left to train.
    let begun = Instant::now();
    let ended = run.train(1, &[]);
    assert!(ended.err.contains("resumed from") && !ended.err.contains("tokens/s"), "{ended}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(run.curve(), first);

    run.train(1, &["--resume", "never", "--overwrite", "train.steps=5"]);
    assert_eq!(run.step(), 5);
    assert_eq!(run.checkpoints().len(), 1, "the old run's are gone");
}

#[test]
fn an_exported_model_starts_a_new_run() {
    let first = Run::new("first-stage");
    first.train(1, &[]);
    let second = Run::new("second-stage");
    let model = format!("model={{path: {}}}", first.output().join("model").display());
    second.train(1, &[&model, "optim.lr=1e-3"]);
    let (before, after) = (first.numbers("valid", "loss")[1], second.numbers("train", "loss"));
    assert!(after[0] < before + 0.5, "begins at {} where the first stage ended at {before}", after[0]);
    let after = second.numbers("valid", "loss")[1];
    assert!(after < before, "{after} is not below {before}");
}

#[test]
fn check_shows_the_configuration_and_the_model() {
    let run = Run::new("check");
    let config = run.dir.join("config.yaml");
    let ended = Program::corral(&["check", "pretrain", "--nproc", "4", "--config"])
        .arg(&config)
        .run(&folder("check-output"), "check")
        .expect_code(0);
    // Embedding and head 2 x 300 x 32; blocks of q and o 2 x 32 x 32, k and v 2 x 32 x 16, three matrices 32 x 64 and two
    // norms; the final norm.
    let parameters = 2 * 300 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32;
    assert!(ended.out.contains(&format!("{parameters} parameters")), "{ended}");
    assert!(ended.out.contains("hidden_size: 32") && ended.out.contains("batch_size: 8"), "{ended}");
    assert!(!run.output().exists(), "check leaves nothing");
}

/// A model that goes on with new tokens and a chat template: it has a row for each, and its files know them.
#[test]
fn new_tokens_get_rows_and_go_out_with_the_model() {
    let little = ["train.steps=2", "schedule.warmup_steps=0", "optim.lr=1e-6"];
    let first = Run::new("tokens-first");
    first.train(1, &little);
    let model = format!("model={{path: {}}}", first.output().display());
    let tokenizer = "tokenizer={chat_template: chatml, add_tokens: ['<|im_start|>', '<|im_end|>'], \
                     pad_to_multiple_of: 16}";
    let run = Run::new("tokens");
    run.train(2, &[&little[..], &[&model, tokenizer]].concat());
    let dir = run.output().join("model");
    let config = json(&dir.join("config.json"));
    assert_eq!(config["vocab_size"], 304);
    assert_eq!(config["eos_token_id"], serde_json::json!([1, 301]));
    let t = corral::data::tokenizer::Tokenizer::load(&dir).unwrap();
    assert_eq!((t.vocab_size(), t.token_to_id("<|im_end|>")), (302, Some(301)));
    assert!(t.chat_template().unwrap().source.contains("<|im_start|>"));
    // A step moves a row by no more than the learning rate or so.
    let rows = &tensors(&dir.join("model.safetensors"))["model.embed_tokens.weight"];
    let before = &tensors(&first.output().join("model/model.safetensors"))["model.embed_tokens.weight"];
    let mean = before.mean_dim(0, true, tch::Kind::Float).expand([4, -1], false);
    let off = largest(&rows.narrow(0, 300, 4), &mean);
    assert!(
        off < allowed(Quantity::Converted, Kind::Float) && mean.abs().max().double_value(&[]) > 1e-4,
        "{off}"
    );
    // Without the tokens in the configuration, the new tokenizer does not fit the old model.
    let path = format!("tokenizer={{path: {}}}", dir.display());
    let other = Run::new("tokens-other");
    other.start(1, &[&model, &path]).wait().expect_error(3, &["302 tokens", "vocab_size of 300"]);
}
