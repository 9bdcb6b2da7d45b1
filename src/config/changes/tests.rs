use super::*;
use crate::config::dpo::Dpo;
use crate::config::grpo::Grpo;
use crate::config::keys::Key;
use crate::config::online_dpo::OnlineDpo;
use crate::config::ppo::Ppo;
use crate::config::pretrain::Pretrain;
use crate::config::reward::Reward;
use crate::config::sft::Sft;
use testing::folder::TestFolder;

/// Every leaf of a configuration.
fn all_keys<T: Algorithm>() -> Vec<String> {
    let keys = T::keys();
    let is_leaf = |key: &&(String, &Key)| key.1.kind.section().is_none();
    keys.all().iter().filter(is_leaf).map(|(name, _)| name.clone()).collect()
}

fn expect_classes<T: Algorithm>(some: &[&str]) {
    let keys = all_keys::<T>();
    let missing: Vec<&String> = keys.iter().filter(|key| T::keys().class_of(key).is_none()).collect();
    assert!(missing.is_empty(), "{}: no class: {missing:?}", T::SUBCOMMAND);
    for key in some {
        assert!(keys.iter().any(|there| there == key), "{}: {key} is not among {keys:?}", T::SUBCOMMAND);
    }
}

#[test]
fn every_key_of_every_stage_has_a_class() {
    expect_classes::<Pretrain>(&["optim.lr", "model.init.rope_scaling.factor", "data.train.path"]);
    expect_classes::<Sft>(&["lora.rank", "generation.top_p", "samples.every", "valid.keep_best"]);
    expect_classes::<Reward>(&["reward.normalize.data", "freeze.blocks"]);
    expect_classes::<Dpo>(&["dpo.beta", "reference.path"]);
    expect_classes::<OnlineDpo>(&["dpo.moving_reference.rate", "rewards.timeout_s"]);
    expect_classes::<Grpo>(&["grpo.epsilon_high", "actor.optim.lr", "reward_model.device"]);
    expect_classes::<Ppo>(&["critic.lora.rank", "ppo.ptx.data.weight", "samples.trace"]);
    assert_eq!(Sft::keys().class_of("generation.top_p"), Some(Output));
    assert_eq!(Ppo::keys().class_of("generation.top_p"), Some(Mathematics));
    assert_eq!(Ppo::keys().class_of("critic.optim.offload"), Some(Execution));
    assert_eq!(Ppo::keys().class_of("rewards.3.timeout_s"), Some(Execution));
    assert_eq!(Sft::keys().class_of("optim.lrr"), None);
}

const TEXT: &str = "\
output_dir: runs/x
model: {preset: llama-15m}
tokenizer: {path: tok}
data: {train: [a, {path: b}]}
train: {steps: 10, batch_size: 8}
";

fn changes(overrides: &[&str]) -> Vec<String> {
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    let here = parse::<Pretrain>(TEXT, "c".into(), false, &overrides).unwrap().config;
    let there = recorded("pretrain", TEXT);
    assert_eq!((resolved(&there), noted_stage(&there)), (TEXT, Some("pretrain")));
    let changes = between(&there, "config.yaml", &here).unwrap();
    changes.iter().map(|c| format!("{:?} {c}", c.class)).collect()
}

#[test]
fn changes_are_told_key_by_key() {
    assert_eq!(changes(&[]), [""; 0]);
    assert_eq!(changes(&["optim.lr=1e-4"]), ["Mathematics optim.lr: there 3e-4, here 1e-4"]);
    assert_eq!(changes(&["optim.lr=0.0003", "seed=1", "output_dir=elsewhere"]), [""; 0]);
    let several =
        changes(&["optim.betas=[0.9, 0.99]", "train.micro_batch_size=4", "log.every=5", "train.steps=20"]);
    let expected = [
        "Output log.every: there 1, here 5",
        "Mathematics optim.betas: there [0.9, 0.95], here [0.9, 0.99]",
        "Rounding train.micro_batch_size: there not set, here 4",
        "Length train.steps: there 10, here 20",
    ];
    assert_eq!(several, expected);
    let other = changes(&["data.train=[a]", "data.valid=[v]"]);
    assert_eq!(
        other,
        ["Path data.train.1.path: there b, here not set", "Output data.valid.0.path: there not set, here v"]
    );
}

#[test]
fn a_path_is_what_it_names() {
    let folder = TestFolder::new("paths");
    std::fs::create_dir(folder.0.join("data")).unwrap();
    std::os::unix::fs::symlink("data", folder.0.join("link")).unwrap();
    let same = |there: &str, here: String| same_path(&folder.0, there, &here);
    let at = |name: &str| folder.0.join(name).display().to_string();
    for there in ["data", "./data", "data/", "link", "link/../data/."] {
        assert!(same(there, at("data")), "{there}");
        assert!(same(&at("data/"), at(there)), "{there}");
    }
    assert!(!same("data", at("other")));
    assert!(!same("other", at("another")) && same("other/.", at("other")));
    // What is no file is what it is called, wherever one stands.
    assert!(same("chatml", "chatml".into()) && same("org/model", "org/model".into()));
}
