use std::path::{Path, PathBuf};

use super::algorithm::parse;
use super::model::*;
use super::parallel::*;
use super::pretrain::*;
use super::sections::*;
use super::shape::{Experts, Family, Shape};
use super::*;
use crate::error::Result;

const SMALL: &str = "\
seed: 7
output_dir: runs/x
model: {preset: llama-15m}
tokenizer: {path: tok}
data:
  train: [a, {path: b, weight: 0.3}]
  sequence_length: 64
optim:
  lr: 3e-4
train: {steps: 10, batch_size: 8}
";

fn load_text(text: &str, overrides: &[&str]) -> Result<Loaded<Pretrain>> {
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    parse(text, "c.yaml".into(), false, &overrides)
}

fn error(text: &str, overrides: &[&str]) -> String {
    let e = load_text(text, overrides).err().unwrap_or_else(|| panic!("was accepted: {text} {overrides:?}"));
    assert_eq!(e.exit_code(), 2);
    e.message
}

/// SMALL with one piece replaced.
fn broken(from: &str, to: &str) -> String {
    assert!(SMALL.contains(from));
    error(&SMALL.replace(from, to), &[])
}

#[test]
fn reads_values_and_defaults() {
    let config = load_text(SMALL, &[]).unwrap().config;
    assert_eq!((config.seed, config.optim.lr), (7, 3e-4));
    assert_eq!(config.model, Model::Preset("llama-15m".into()));
    let sources =
        [("a", None), ("b", Some(0.3))].map(|(path, weight)| DataSource { path: path.into(), weight });
    assert_eq!(config.data.train, sources);
    assert_eq!(config.data.valid, []);
    assert_eq!(config.optim.betas, [0.9, 0.95]);
    assert_eq!(config.parallel, Parallel::default());
    assert_eq!(config.train.recompute, Recompute::None);
    assert_eq!(config.train.micro_batch_size(2), 4);
    let mut found = Conflicts::default();
    config.conflicts(2, &mut found);
    assert_eq!(found, Conflicts::default());
}

#[test]
fn unknown_keys_are_told_with_place_and_nearest() {
    assert_eq!(
        broken("lr: 3e-4", "lrr: 3e-4"),
        "c.yaml:9:3: unknown key 'optim.lrr'; did you mean 'lr'? (known here: lr, betas, eps, weight_decay, clip, moments, offload)"
    );
    let message = broken("batch_size", "batchsize");
    assert!(
        message.starts_with("c.yaml:10:20: unknown key 'train.batchsize'; did you mean 'batch_size'?"),
        "{message}"
    );
    let message = broken("weight: 0.3", "wieght: 0.3");
    assert!(
        message.starts_with("c.yaml:6:24: unknown key 'data.train.1.wieght'; did you mean 'weight'?"),
        "{message}"
    );
    let message = broken("preset:", "pth:");
    assert!(message.starts_with("c.yaml:3:9: unknown key 'model.pth'; did you mean 'path'?"), "{message}");
    // Far from everything: no guess.
    let message = broken("optim:", "lora:");
    assert!(message.starts_with("c.yaml:8:1: unknown key 'lora'; (known here: seed,"), "{message}");
    let init = "{init: {hidden_size: 64, num_hidden_layers: 2, num_attention_head: 4}}";
    let message = broken("{preset: llama-15m}", init);
    assert!(
        message.contains("unknown key 'model.init.num_attention_head'; did you mean 'num_attention_heads'?")
    );
}

#[test]
fn overrides_are_named_in_errors() {
    let at = |text: &str| error(SMALL, &[text]);
    assert!(
        at("optim.lrr=1").starts_with("override 'optim.lrr=1': unknown key 'optim.lrr'; did you mean 'lr'?")
    );
    assert_eq!(
        at("optim.lr=fast"),
        "override 'optim.lr=fast': 'optim.lr': expected a number, found the text 'fast'"
    );
    assert_eq!(at("optim.lr=-1"), "override 'optim.lr=-1': 'optim.lr': expected a number above 0, found -1");
    assert_eq!(at("optim.lr"), "override 'optim.lr': expected KEY=VALUE, such as optim.lr=3e-4");
    assert_eq!(at(".lr=1"), "override '.lr=1': '.lr' is not a key such as optim.lr");
    assert_eq!(at("seed.x=1"), "override 'seed.x=1': 'seed' holds 7, no keys");
    assert_eq!(
        at("data.train.5=x"),
        "override 'data.train.5=x': 'data.train' is a list: expected an index of 0 to 2"
    );
    assert!(at("optim={lr: [}").starts_with("override 'optim={lr: [}': "));
    let message = at("model.path=dir");
    assert_eq!(
        message,
        "c.yaml:3:8: 'model': expected one of the keys path, preset and init, found several \
         (on the command line, 'model={path: DIR}' replaces the section)"
    );
    assert!(at("model={}").ends_with("expected one of the keys path, preset and init, found none"));
}

#[test]
fn overrides_replace_and_create() {
    let overrides = [
        "optim.lr=1e-3",
        "optim.betas.1=0.99",
        "optim.betas=[0.8, 0.9]",
        "optim.betas.1=0.99",
        "valid.every=5",
        "data.train.0=z",
        "data.train.2={path: q, weight: 2}",
        "model={path: some/dir}",
        "output_dir=007",
        "train.recompute=selective",
    ];
    // An index into the defaults, which are not in the tree, is no list of two.
    assert!(error(SMALL, &overrides[..2]).contains("'optim.betas': expected a list of 2, found a section"));
    let mut kept = overrides.to_vec();
    kept.remove(1);
    let config = load_text(SMALL, &kept).unwrap().config;
    assert_eq!((config.optim.lr, config.optim.betas), (1e-3, [0.8, 0.99]));
    assert_eq!((config.valid.every, config.valid.batches), (5, 20));
    let paths: Vec<_> = config.data.train.iter().map(|s| (s.path.to_str().unwrap(), s.weight)).collect();
    assert_eq!(paths, [("z", None), ("b", Some(0.3)), ("q", Some(2.0))]);
    assert_eq!(config.model, Model::Path("some/dir".into()));
    assert_eq!(config.output_dir, PathBuf::from("007"));
    assert_eq!(config.train.recompute, Recompute::Selective);
}

#[test]
fn wrong_types_and_ranges_are_told_with_place() {
    for (from, to, expected) in [
        ("seed: 7", "seed: seven", "c.yaml:1:7: 'seed': expected a whole number, found the text 'seven'"),
        (
            "seed: 7",
            "seed: -7",
            "c.yaml:1:7: 'seed': expected a whole number of 0 to 18446744073709551615, found -7",
        ),
        ("seed: 7", "seed: 1.5", "c.yaml:1:7: 'seed': expected a whole number, found 1.5"),
        ("lr: 3e-4", "lr: .nan", "c.yaml:9:7: 'optim.lr': expected a finite number, found .nan"),
        ("lr: 3e-4", "lr: .inf", "c.yaml:9:7: 'optim.lr': expected a finite number, found .inf"),
        ("lr: 3e-4", "lr: 0", "c.yaml:9:7: 'optim.lr': expected a number above 0, found 0"),
        ("lr: 3e-4", "lr: [1]", "c.yaml:9:7: 'optim.lr': expected a number, found a list"),
        ("lr: 3e-4", "betas: [0.9]", "c.yaml:9:10: 'optim.betas': expected a list of 2, found one of 1"),
        (
            "lr: 3e-4",
            "betas: [0.9, 1.0]",
            "c.yaml:9:16: 'optim.betas.1': expected a number of at least 0 and below 1, found 1.0",
        ),
        ("lr: 3e-4", "clip: -1", "c.yaml:9:9: 'optim.clip': expected a number of at least 0, found -1"),
        (
            "steps: 10",
            "steps: 0",
            "c.yaml:10:16: 'train.steps': expected a whole number of 1 to 2147483648, found 0",
        ),
        (
            "weight: 0.3",
            "weight: -1",
            "c.yaml:6:32: 'data.train.1.weight': expected a number above 0, found -1",
        ),
        (
            "output_dir: runs/x",
            "output_dir: [x]",
            "c.yaml:2:13: 'output_dir': expected text, found a list: in YAML [x] is a list with x in it; write \"[x]\" in quotes",
        ),
        ("data:\n", "data: 3\nvalid:\n", "c.yaml:5:7: 'data': expected a section of keys, found 3"),
        (
            "llama-15m",
            "llama-16m",
            &format!(
                "c.yaml:3:17: 'model.preset': unknown value 'llama-16m'; did you mean 'llama-15m'? (known: {})",
                Shape::PRESETS.join(", ")
            ),
        ),
        (
            "{preset: llama-15m}",
            "llama-15m",
            "c.yaml:3:8: 'model': expected a section of keys, found the text 'llama-15m'",
        ),
        (
            "steps: 10",
            "steps: 10, recompute: some",
            "c.yaml:10:31: 'train.recompute': unknown value 'some'; (known: none, selective, full)",
        ),
        (
            "{preset: llama-15m}",
            "{init: {hidden_size: 10, num_hidden_layers: 1, num_attention_heads: 4}}",
            "c.yaml:3:15: 'model.init': hidden_size (10) is not a multiple of num_attention_heads (4): change one, or give head_dim",
        ),
    ] {
        assert_eq!(broken(from, to).lines().next(), Some(expected));
    }
    let message = broken("[a, {path: b, weight: 0.3}]", "[[a]]");
    assert!(
        message.starts_with("c.yaml:6:11: 'data.train.0': expected a path, or {path: PATH, weight: NUMBER}")
    );
}

#[test]
fn all_problems_are_told_at_once() {
    let text = SMALL
        .replace("seed: 7", "seed: seven")
        .replace("lr: 3e-4", "lrr: 3e-4\n  betas: [0.9, 2, x]\n  clip: -1")
        .replace("steps: 10", "steps: 0, recompute: some")
        .replace("output_dir: runs/x\n", "");
    let message = error(&text, &["valid.every=x", "data.train.1.weight=-1"]);
    let lines: Vec<&str> = message.lines().collect();
    let expected = [
        "c.yaml:1:1: the key 'output_dir' is missing",
        "c.yaml:1:7: 'seed': expected a whole number, found the text 'seven'",
        "c.yaml:8:3: unknown key 'optim.lrr'; did you mean 'lr'? ",
        "c.yaml:9:10: 'optim.betas': expected a list of 2, found one of 3",
        "c.yaml:10:9: 'optim.clip': expected a number of at least 0, found -1",
        "c.yaml:11:16: 'train.steps': expected a whole number of 1 to 2147483648, found 0",
        "c.yaml:11:30: 'train.recompute': unknown value 'some'; ",
        "override 'data.train.1.weight=-1': 'data.train.1.weight': expected a number above 0, found -1",
        "override 'valid.every=x': 'valid.every': expected a whole number, found the text 'x'",
    ];
    assert_eq!(lines.len(), expected.len(), "{message}");
    assert!(lines.iter().zip(expected).all(|(line, start)| line.starts_with(start)), "{message}");
    // What does not fit is told with what is wrong, but not what may follow from it.
    let message = error(&SMALL.replace("lr: 3e-4", "lrr: 3e-4"), &["schedule.warmup_steps=11"]);
    assert!(
        message.lines().count() == 2 && message.contains("11 steps of warm-up are more than the 10"),
        "{message}"
    );
    let message = error(&SMALL.replace("steps: 10", "steps: x"), &[]);
    assert_eq!(message, "c.yaml:10:16: 'train.steps': expected a whole number, found the text 'x'");
    let e = load_text(SMALL, &["schedule.warmup_steps=11", "train.batch_size=3"])
        .unwrap()
        .validate(2)
        .unwrap_err();
    assert_eq!(e.message.lines().count(), 2, "{e}");
}

#[test]
fn missing_keys_and_broken_yaml() {
    assert_eq!(broken("output_dir: runs/x\n", ""), "c.yaml:1:1: the key 'output_dir' is missing");
    let message = broken("seed: 7", "seed: 7\nseed: 8");
    assert!(message.starts_with("c.yaml:2:1: ") && message.contains("seed"), "{message}");
    let message = broken("{steps: 10, batch_size: 8}", "{steps: 10, batch_size: 8");
    assert!(message.starts_with("c.yaml:1"), "{message}");
    assert!(error("", &[]).starts_with("c.yaml:1:1: "));
    let e = load::<Pretrain>(Some(Path::new("no/such.yaml")), &[]).unwrap_err();
    assert_eq!(e.exit_code(), 2);
    assert!(e.message.starts_with("no/such.yaml: cannot read the configuration: "), "{}", e.message);
}

#[test]
fn what_is_not_built_is_refused() {
    let at = |text: &str| error(SMALL, &[text]);
    assert!(at("precision.compute=fp32").contains("(known: float32, bfloat16, float8, float64)"));
}

#[test]
fn combinations_are_refused_with_place() {
    let refused = |overrides: &[&str], world_size| {
        let e = load_text(SMALL, overrides).unwrap().validate(world_size).unwrap_err();
        assert_eq!(e.exit_code(), 2);
        e.message
    };
    assert!(refused(&["float8.min_size=64"], 1).contains("is a section of `precision.compute: float8`"));
    assert!(refused(&["parallel.tensor=3"], 4).contains("3 must divide the number of ranks, 4"));
    assert!(refused(&["parallel.pipeline=3"], 4).contains("3 must divide the number of ranks, 4"));
    let stages = ["parallel={pipeline: 2, tensor: 4}"];
    assert!(refused(&stages, 4).contains("4 must divide the number of ranks of a stage, 2"));
    let stages = ["parallel={pipeline: 2, stages: [3, 2, 1]}"];
    assert!(refused(&stages, 4).contains("3 numbers for parallel.pipeline = 2; one for each stage"));
    // Ranks that share every matrix have the same rows.
    assert!(refused(&["parallel.tensor=2", "train.micro_batch_size=3"], 4).contains("3 x 2 = 6"));
    let shard = ["parallel={mode: hybrid, shard: 4, tensor: 2}"];
    assert!(refused(&shard, 4).contains("the number of ranks divided by parallel.tensor, 2"));
    assert_eq!(
        refused(&["train.micro_batch_size=3"], 2),
        "c.yaml:10:32: 'train.batch_size': 8 is not a multiple of train.micro_batch_size x ranks = 3 x 2 = 6; 6 or 12 would be"
    );
    assert_eq!(
        refused(&["train.batch_size=2"], 3),
        "override 'train.batch_size=2': 'train.batch_size': 2 is not a multiple of the number of ranks, 3; 3 would be"
    );
    assert_eq!(
        refused(&["schedule.warmup_steps=11"], 1),
        "override 'schedule.warmup_steps=11': 'schedule.warmup_steps': 11 steps of warm-up are more than the 10 of train.steps"
    );
    assert_eq!(
        refused(&["data.sequence_length=257"], 1),
        "override 'data.sequence_length=257': 'data.sequence_length': 257 tokens do not fit the model's max_position_embeddings, 256"
    );
    assert!(
        refused(&["train.epochs=1"], 1)
            .starts_with("override 'train.epochs=1': 'train.epochs': train.steps is")
    );
    // A value left out is told at the section around it.
    assert_eq!(
        refused(&["train.steps=null"], 1),
        "override 'train.steps=null': 'train.steps': give train.steps or train.epochs"
    );
    assert_eq!(
        refused(&["train={batch_size: 8}"], 1),
        "override 'train={batch_size: 8}': 'train.steps': give train.steps or train.epochs"
    );
    assert!(refused(&["tokenizer=null"], 1).contains("a new model needs a tokenizer"));
    assert!(refused(&["tokenizer={}"], 1).contains("a new model needs a tokenizer"));
    let both = refused(&["tokenizer.template=a", "tokenizer.chat_template=b"], 1);
    assert!(both.starts_with("override 'tokenizer.template=a': 'tokenizer.template': "), "{both}");
    assert!(refused(&["tokenizer.add_tokens=[a, b, a]"], 1).contains("`a` is there twice"));
    assert!(refused(&["tokenizer.add_tokens=['']"], 1).contains("a token is empty"));
    assert_eq!(
        refused(&["data.train=[a]", "data.valid=[v, {path: w, weight: 1}]"], 1),
        "override 'data.valid=[v, {path: w, weight: 1}]': 'data.valid.1.weight': validation data is read once as a whole; \
         leave its weights out"
    );
    assert!(refused(&["data.train=[]"], 1).contains("there is no data to train on"));
    let sharded = refused(&["parallel={mode: hybrid, shard: 3}"], 8);
    assert!(sharded.contains("'parallel.shard': 3 must divide the number of ranks, 8"), "{sharded}");
    let useless = refused(&["parallel.shard=2"], 4);
    assert!(useless.contains("'parallel.shard': is a key of `mode: hybrid`"), "{useless}");
    load_text(SMALL, &["parallel={mode: hybrid, shard: 2}"]).unwrap().validate(8).unwrap();
    load_text(SMALL, &["parallel={mode: hybrid, shard: auto}"]).unwrap().validate(8).unwrap();
    for (wrong, why) in
        [("0", "of 1 to"), ("some", "a number of ranks, or auto"), ("1.5", "a number of ranks, or auto")]
    {
        assert!(error(SMALL, &[&format!("parallel.shard={wrong}")]).contains(why));
    }
    load_text(SMALL, &["tokenizer=null", "model={path: m}"]).unwrap().validate(1).unwrap();
}

#[test]
fn resolved_yaml_loads_to_the_same() {
    let rope =
        "{factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 8192}";
    let rope = format!("model.init.rope_scaling={rope}");
    let cases: [&[&str]; 4] = [
        &[],
        &["optim.lr=0.1234567890123456789", "seed=18446744073709551615", "output_dir='yes: #no'"],
        &[
            "model={init: {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}}",
            &rope,
            "optim.eps=1e-300",
        ],
        &["model={path: '~'}", "train={epochs: 3}", "precision.compute=bfloat16", "parallel.mode=replicate"],
    ];
    for overrides in cases {
        let loaded = load_text(SMALL, overrides).unwrap();
        let yaml = loaded.resolved_yaml().unwrap();
        let again = load_text(&yaml, &[]).unwrap_or_else(|e| panic!("{e}\n{yaml}"));
        assert_eq!(again.config, loaded.config, "{yaml}");
        assert_eq!(again.resolved_yaml().unwrap(), yaml);
        assert!(yaml.contains("weight_decay: 0.1") && yaml.contains("keep: 3"), "{yaml}");
    }
}

#[test]
fn init_has_the_keys_of_every_family() {
    let text = |keys: &str| {
        format!("model={{init: {{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, {keys}}}}}")
    };
    let shape = |keys: &str| {
        let loaded = load_text(SMALL, &[&text(keys)]).unwrap();
        let Model::Init(init) = &loaded.config.model else { panic!("{:?}", loaded.config.model) };
        // What is written into the run's folder is read as the same.
        let again = load_text(&loaded.resolved_yaml().unwrap(), &[]).unwrap();
        assert_eq!(again.config.model, loaded.config.model);
        init.shape(300, 64)
    };
    let mixtral = shape("model_type: mixtral, num_local_experts: 4, sliding_window: 9");
    assert_eq!((mixtral.family, mixtral.sliding_window), (Family::Mixtral, Some(9)));
    let experts = Experts { num_local_experts: 4, num_experts_per_tok: 2, router_aux_loss_coef: 0.02 };
    assert_eq!(mixtral.experts, Some(experts));
    assert!(shape("model_type: qwen2").features.attention_bias);
    assert_eq!(shape("model_type: mistral").sliding_window, None);
    for (keys, part) in [
        ("num_local_experts: 4", "keys of model_type: mixtral"),
        ("sliding_window: 4", "a llama has no sliding_window"),
        ("model_type: mixtral, num_local_experts: 1", "num_experts_per_tok (2) is more than"),
        ("model_type: mixtral, router_aux_loss_coef: -1.0", "at least 0"),
        ("model_type: gemma", "mixtral"),
    ] {
        let message = error(SMALL, &[&text(keys)]);
        assert!(message.contains(part), "{keys}: {message}");
    }
}

#[test]
fn init_fills_in_what_follows() {
    let init = "model={init: {hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 4}}";
    let loaded = load_text(SMALL, &[init]).unwrap();
    let Model::Init(init) = &loaded.config.model else { panic!("{:?}", loaded.config.model) };
    let shape = init.shape(300, 64);
    assert_eq!((shape.vocab_size, shape.intermediate_size, shape.num_key_value_heads), (300, 352, 4));
    assert_eq!((shape.head_dim, shape.max_position_embeddings), (32, 64));
    shape.check().unwrap();
}

#[test]
fn rope_scaling_is_checked() {
    let rope = "{factor: 8, low_freq_factor: 4, high_freq_factor: 1, original_max_position_embeddings: 64}";
    let init = "hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 4";
    let message = error(SMALL, &[&format!("model={{init: {{{init}, rope_scaling: {rope}}}}}")]);
    assert!(
        message.contains("'model.init.rope_scaling': high_freq_factor must be above low_freq_factor"),
        "{message}"
    );
}

#[test]
fn default_recipe_loads() {
    let loaded: Loaded<Pretrain> = load(None, &["optim.clip=0".into()]).unwrap();
    assert!(loaded.compiled_in);
    assert_eq!(loaded.source, "configs/pretrain/default.yaml");
    for world_size in [1, 2, 4] {
        loaded.validate(world_size).unwrap();
    }
}

#[test]
fn anchors_and_merge_keys_work() {
    let text = SMALL.replace("steps: 10", "steps: &n 10").replace("train: {", "valid: {every: 3}\ntrain: {");
    let loaded = load_text(&format!("{text}checkpoint: {{every: *n}}\n"), &[]).unwrap();
    assert_eq!(loaded.config.checkpoint.every, 10);
}
