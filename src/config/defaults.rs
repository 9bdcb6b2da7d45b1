//! Defaults that depend on the stage, and on whether adapters are trained or the whole model.

use super::yaml::{Node, YamlValue};

/// The defaults of a stage's optimizer.
pub struct StageDefaults {
    /// The subcommand.
    pub stage: &'static str,
    /// Peak learning rate of the whole model.
    pub lr: f64,
    /// Peak learning rate of adapters.
    pub lr_of_adapters: f64,
    pub weight_decay: f64,
    /// Where the numbers come from.
    pub source: &'static str,
}

const fn stage(
    stage: &'static str,
    [lr, lr_of_adapters]: [f64; 2],
    weight_decay: f64,
    source: &'static str,
) -> StageDefaults {
    StageDefaults { stage, lr, lr_of_adapters, weight_decay, source }
}

/// A row for every stage. TRL's documentation gives adapters ten times the rate of the whole model.
pub const STAGES: &[StageDefaults] = &[
    stage("pretrain", [3e-4, 3e-4], 0.1, "Llama 2 (Touvron et al. 2023)"),
    stage("sft", [2e-5, 2e-4], 0.0, "TRL's SFTConfig; torchtune's LoRA recipes have 3e-4"),
    stage("reward", [1e-5, 1e-4], 0.0, "TRL's examples of RewardTrainer; its RewardConfig has 1e-4"),
    stage("dpo", [1e-6, 1e-5], 0.0, "TRL's DPOConfig"),
    stage("kto", [1e-6, 1e-5], 0.0, "TRL's KTOConfig"),
    stage("online-dpo", [5e-7, 5e-6], 0.0, "TRL's OnlineDPOConfig"),
    stage("grpo", [1e-6, 1e-5], 0.0, "TRL's GRPOConfig"),
    stage("ppo", [3e-6, 3e-5], 0.0, "TRL's PPOConfig"),
];

/// Models from this many parameters on get half the rate: Llama 2 was pretrained with 3e-4 up to 13B and 1.5e-4 above, QLoRA's
/// adapters (Dettmers et al. 2023) have 2e-4 up to 13B and 1e-4 from 33B on.
pub const LARGE: i64 = 30_000_000_000;
/// New models below get twice the rate: GPT-3's smallest (Brown et al. 2020), 125M, has 6e-4.
pub const SMALL: i64 = 200_000_000;

/// The learning rate that `corral init` writes for a model of so many parameters.
pub fn lr_of_size(stage: &StageDefaults, adapters: bool, parameters: i64) -> f64 {
    let lr = if adapters { stage.lr_of_adapters } else { stage.lr };
    match parameters {
        LARGE.. => lr / 2.0,
        ..SMALL if stage.stage == "pretrain" => lr * 2.0,
        _ => lr,
    }
}

/// The defaults of a stage.
pub fn of(stage: &str) -> Option<&'static StageDefaults> {
    STAGES.iter().find(|row| row.stage == stage)
}

/// Sets the keys that a configuration leaves to its stage; returns them with their values.
pub fn fill(stage: &str, tree: &mut Node) -> Vec<(&'static str, f64)> {
    let Some(stage) = of(stage) else { return Vec::new() };
    let given = |key: &str| tree.get(key).is_some_and(|node| node.value != YamlValue::Null);
    let adapters = given("lora") || given("actor.lora");
    let lr = if adapters { stage.lr_of_adapters } else { stage.lr };
    let numbers = [("optim.lr", lr), ("optim.weight_decay", stage.weight_decay)];
    // Where the actor has an optimizer of its own the common one is left as it is.
    let left_out = |key: &str| !given(key) && !given(&format!("actor.{key}"));
    let missing: Vec<(&'static str, f64)> = numbers.into_iter().filter(|(key, _)| left_out(key)).collect();
    missing.iter().for_each(|(key, number)| tree.set_default(key, *number));
    missing
}
