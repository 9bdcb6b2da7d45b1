//! A configuration before it is text.

use std::path::{Path, PathBuf};

use super::InitArgs;
use crate::algorithms::recipe::Recipe;
use crate::config::changes::show;
use crate::config::{self, Loaded, defaults};
use crate::error::Result;
use crate::plan::PlanTarget;

/// How weights are trained, the most exact first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Full,
    Lora,
    Nf4,
}

/// A configuration before it is text.
#[derive(Debug, Clone)]
pub struct Draft<'a> {
    pub stage: &'static str,
    pub args: &'a InitArgs,
    pub length: i64,
    pub method: Method,
    pub micro: i64,
    pub recompute: bool,
    pub compute: &'static str,
    pub epochs: i64,
    /// Parameters of the model.
    pub parameters: i64,
    /// Ranks of the run.
    pub ranks: i64,
    /// The longest response.
    pub max_new_tokens: i64,
    /// The token that pads, where the tokenizer's own one ends texts, too.
    pub pad_token: Option<&'static str>,
    /// The adapter of the reward model, which the critic begins as.
    pub lora_of_critic: Option<String>,
    /// Some records cannot be used, and are left out.
    pub skips: bool,
    /// Lines of the header: the model, the data, the memory.
    pub facts: Vec<String>,
}

/// Whether a stage samples responses to prompts.
pub fn is_of_responses(stage: &str) -> bool {
    ["online-dpo", "grpo", "ppo"].contains(&stage)
}

impl Draft<'_> {
    pub fn of_responses(&self) -> bool {
        is_of_responses(self.stage)
    }

    pub fn batch(&self) -> i64 {
        // Whole shares for all ranks.
        let rows = if self.of_responses() { 8 } else { 16 };
        (rows + self.ranks - 1) / self.ranks * self.ranks
    }

    /// The learning rate of the stage, the method and the size.
    fn lr(&self) -> f64 {
        let row = defaults::of(self.stage);
        row.map_or(1e-5, |row| defaults::lr_of_size(row, self.method != Method::Full, self.parameters))
    }

    pub fn output_dir(&self) -> String {
        format!("runs/{}", self.stage)
    }

    /// The sections of the models of a stage that samples responses.
    fn models(&self, model: &str, lora: Option<&str>) -> String {
        let mut text = format!("actor:\n  path: {model}\n");
        lora.iter().for_each(|lora| text += &format!("  lora: {lora}\n"));
        if let Some(path) = &self.args.reward_model {
            text += &format!("reward_model: {{path: {}}}\n", quoted(&path.to_string_lossy()));
        } else {
            text += "rewards: [{kind: gsm8k, form: flexible}]   # 1 where the answer has the data's number; corral help rewards.kind\n";
        }
        if self.stage == "ppo"
            && let Some(lora) = self.lora_of_critic.as_deref().or(lora)
        {
            text += &format!("critic: {{lora: {lora}}}\n");
        }
        text
    }

    pub fn yaml(&self) -> String {
        let list = |paths: &[PathBuf]| {
            let quoted: Vec<String> = paths.iter().map(|path| quoted(&path.to_string_lossy())).collect();
            format!("[{}]", quoted.join(", "))
        };
        let stage = self.stage;
        let mut text = format!("# {stage}, written by corral init.\n#\n");
        self.facts.iter().for_each(|fact| text += &format!("#   {fact}\n"));
        text += &format!("\noutput_dir: {}\n", self.output_dir());
        let lora = match self.method {
            Method::Full => None,
            Method::Lora => Some("{rank: 16, alpha: 32, dropout: 0.0}"),
            Method::Nf4 => Some("{rank: 16, alpha: 32, dropout: 0.0, base: nf4}"),
        };
        let model = quoted(&self.args.model);
        if self.of_responses() {
            text += &self.models(&model, lora);
        } else if stage == "pretrain" {
            text += &format!("model: {{preset: {model}}}\n");
            text += &format!(
                "tokenizer: {{path: {}}}\n",
                quoted(&tokenizer_beside(&self.args.data).to_string_lossy())
            );
        } else {
            text += &format!("model: {{path: {model}}}\n");
            if let Some(token) = self.pad_token {
                text +=
                    &format!("tokenizer: {{pad_token: {token:?}}}   # the model's own one ends texts, too\n");
            }
            lora.iter().for_each(|lora| text += &format!("lora: {lora}\n"));
        }
        text += &format!("data:\n  train: {}\n", list(&self.args.data));
        match self.args.valid.is_empty() {
            false => text += &format!("  valid: {}\n", list(&self.args.valid)),
            true => text += "  # valid: [FILE]          # held-out data; with it the run validates\n",
        }
        text += &format!("  sequence_length: {}\n", self.length);
        if self.skips {
            text += "  on_error: skip   # records that cannot be used are left out and counted\n";
        }
        if self.of_responses() {
            text += &format!("generation: {{max_new_tokens: {}, temperature: 1.0}}\n", self.max_new_tokens);
        }
        let ppo = format!("ppo: {{epochs: 2, minibatch_size: {}, kl_coef: 0.05}}\n", self.batch());
        text += match stage {
            "grpo" => "grpo: {group_size: 8}\n",
            "ppo" => &ppo,
            "dpo" => "dpo: {beta: 0.1}\n",
            "kto" => "kto: {beta: 0.1}\n",
            "online-dpo" => "dpo: {beta: 0.1}\n",
            _ => "",
        };
        text += &format!("precision: {{compute: {}}}\n", self.compute);
        let lr = show(&Some(self.lr().into()));
        let decay = defaults::of(stage).map_or(0.0, |row| row.weight_decay);
        text += &format!("optim: {{lr: {lr}, weight_decay: {decay:?}, clip: 1.0}}\n");
        text += "schedule: {kind: cosine, warmup_ratio: 0.03, min_lr_ratio: 0.1}\n";
        let length =
            if stage == "pretrain" { "steps: 1000".to_string() } else { format!("epochs: {}", self.epochs) };
        // A rank's whole share is the default, which suits any number of ranks.
        let whole = self.of_responses() || self.micro == self.batch() / self.ranks;
        let micro = if whole { String::new() } else { format!(", micro_batch_size: {}", self.micro) };
        let recompute = if self.recompute { ", recompute: full" } else { "" };
        text += &format!("train: {{{length}, batch_size: {}{micro}{recompute}}}\n", self.batch());
        text += "checkpoint: {every: 100, keep: 2}\n";
        if !self.args.valid.is_empty() {
            text += "valid: {every: 50, batches: 20}\n";
        }
        if self.of_responses() {
            text += "samples: {every: 10, count: 4}\n";
        }
        text + "log: {every: 1}\nseed: 1\n"
    }

    pub fn load<R: Recipe>(&self) -> Result<Loaded<R>> {
        let loaded = config::load_text::<R>(&self.yaml(), &[])?;
        loaded.validate(self.ranks).map(|()| loaded)
    }

    /// What the run takes of memory, in bytes of the device.
    pub fn bytes<R: Recipe>(&self, target: &PlanTarget) -> Result<i64> {
        Ok(self.load::<R>()?.config.plan(target)?.bytes())
    }
}

/// A text as YAML has it in a list.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    // YAML reads some plain words as numbers, booleans or nothing.
    let is_word = matches!(text, "true" | "false" | "null" | "~" | "-") || text.parse::<f64>().is_ok();
    match !text.is_empty() && text.chars().all(plain) && !is_word {
        true => text.into(),
        false => serde_json::Value::from(text).to_string(),
    }
}

/// Where `corral tokenize` puts the tokenizer of the shards.
fn tokenizer_beside(shards: &[PathBuf]) -> PathBuf {
    shards.first().and_then(|path| path.parent()).unwrap_or(Path::new(".")).join("tokenizer")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_quoted_where_yaml_needs_it() {
        assert_eq!(quoted("a/b-c_1.jsonl"), "a/b-c_1.jsonl");
        assert_eq!(quoted("a b: {c}"), "\"a b: {c}\"");
        assert_eq!([quoted("123"), quoted("true"), quoted("\u{e9}")], ["\"123\"", "\"true\"", "\"\u{e9}\""]);
    }
}
