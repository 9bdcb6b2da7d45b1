//! What answers are rewarded for: the section `rewards` of ppo, grpo and online-dpo.

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use super::numbers::{some_count, some_positive};

/// A reward and its weight in the sum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reward {
    pub kind: RewardKind,
    #[serde(default = "one", deserialize_with = "finite")]
    pub weight: f64,
    /// gsm8k: where the answer stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<Form>,
    /// format: what must occur in the response, a regular expression of the crate `regex`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// length: the tokens at which the reward is -1.
    #[serde(default, deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    pub most: Option<i64>,
    /// length: the tokens over which it falls from 0 to -1. Default: a quarter of `most`.
    #[serde(default, deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    pub buffer: Option<i64>,
    /// command: what the shell runs, once a rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// command: the longest that one answer may take it. Default: 60.
    #[serde(default, deserialize_with = "some_positive", skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RewardKind {
    /// 1 where the answer after `####` is the reference's number, else 0.
    Gsm8k,
    /// 1 where the last `\boxed{}` is the reference's answer, else 0.
    Math,
    /// 1 where a regular expression matches, else 0.
    Format,
    /// 0 for short responses, falling to -1 (the soft overlong punishment of DAPO, Yu et al. 2025).
    Length,
    /// What a program says.
    Command,
    /// The reward model's score.
    Model,
}

impl RewardKind {
    /// As configurations write it.
    pub fn name(self) -> &'static str {
        match self {
            RewardKind::Gsm8k => "gsm8k",
            RewardKind::Math => "math",
            RewardKind::Format => "format",
            RewardKind::Length => "length",
            RewardKind::Command => "command",
            RewardKind::Model => "model",
        }
    }
}

/// How an answer of GSM8K's form is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// The number after the last `####` that one follows.
    #[default]
    Strict,
    /// The last number of the text.
    Flexible,
}

impl Reward {
    /// Of a kind that needs nothing else, with weight 1.
    pub fn new(kind: RewardKind) -> Reward {
        Reward {
            kind,
            weight: 1.0,
            form: None,
            pattern: None,
            most: None,
            buffer: None,
            run: None,
            timeout_s: None,
        }
    }

    /// What is missing, or belongs to another kind.
    pub fn conflict(&self) -> Option<String> {
        use RewardKind::*;
        let kind = self.kind.name();
        let keys = [
            ("form", Gsm8k, self.form.is_some()),
            ("pattern", Format, self.pattern.is_some()),
            ("most", Length, self.most.is_some()),
            ("buffer", Length, self.buffer.is_some()),
            ("run", Command, self.run.is_some()),
            ("timeout_s", Command, self.timeout_s.is_some()),
        ];
        if let Some((key, of, _)) = keys.iter().find(|(_, of, given)| *given && *of != self.kind) {
            return Some(format!("'{key}' is of the kind {}, and this one is {kind}", of.name()));
        }
        let missing = match self.kind {
            Format => self.pattern.is_none().then_some("pattern: what must occur in the response"),
            Length => self.most.is_none().then_some("most: the tokens that a response may have"),
            Command => self.run.is_none().then_some("run: the command"),
            Gsm8k | Math | Model => None,
        };
        if let Some(missing) = missing {
            return Some(format!("a reward of the kind {kind} needs {missing}"));
        }
        match (self.most, self.buffer) {
            (Some(most), Some(buffer)) if buffer > most => {
                Some(format!("a buffer of {buffer} tokens is more than the {most} of 'most'"))
            }
            _ => None,
        }
    }
}

fn one() -> f64 {
    1.0
}

fn finite<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    let x = f64::deserialize(d)?;
    if x.is_finite() { Ok(x) } else { Err(D::Error::custom(format!("expected a finite number, found {x}"))) }
}
