//! How responses are sampled while training: the section `generation` of ppo, grpo and online-dpo.

use serde_json::Value as Json;

use super::conflict::Conflicts;
use super::keys::{KeyKind, Limits};
use super::problems::Problems;
use super::section::{choice, section};
use super::setting::{At, Setting};
use super::yaml::YamlValue;

section! {
    /// How responses are sampled while training.
    pub struct Generation {
        /// Maximum tokens of a response: a number, or `[LOW, HIGH]`, from which every prompt draws its own.
        max_new_tokens: Length = Length { low: 256, high: 256 }, COUNT => Mathematics;
        /// Minimum tokens of a response before a stop token may be sampled.
        min_new_tokens: usize = 0 => Mathematics;
        /// Divides the logits, in sampling and in every log-probability of the training.
        temperature: f64 = 1.0, POSITIVE => Mathematics;
        /// Samples only from this many most probable tokens; 0: all.
        top_k: usize = 0 => Mathematics;
        /// Nucleus sampling: samples from the most probable tokens whose total probability reaches this.
        top_p: f64 = 1.0, SHARE => Mathematics;
        /// Texts that end a response, besides the tokens that end a turn.
        stop: Vec<String> = Vec::new() => Mathematics;
        /// A token's text: no token ends a response; it is cut after the first such token that has `truncate_after` tokens before
        /// it (Ziegler et al. 2019).
        truncate_token: Option<String> = None => Mathematics;
        /// See `truncate_token`.
        truncate_after: usize = 0 => Mathematics;
        /// Responses generated at once on a rank. Default: all of them.
        batch_size: Option<i64> = None, COUNT => Rounding;
        /// How sharded parameters are gathered while responses are sampled.
        gather: Gather = Gather::Auto => Execution;
    }
}

choice! {
    /// How sharded parameters are gathered while responses are sampled.
    pub enum Gather {
        /// `whole` if every rank has memory for twice the parameters, else `blocks`.
        Auto = "auto",
        /// All of them at once: no communication until the responses are finished.
        Whole = "whole",
        /// One block after the other, for every token.
        Blocks = "blocks",
    }
}

impl Generation {
    /// What does not fit.
    pub fn conflicts(&self, found: &mut Conflicts) {
        let (min, low) = (self.min_new_tokens, self.max_new_tokens.low);
        if min > low {
            found
                .add("generation.min_new_tokens", format!("{min} are more than the {low} of max_new_tokens"));
        }
        if let Some(i) = self.stop.iter().position(String::is_empty) {
            found.add(format!("generation.stop.{i}"), "a stop text is empty");
        }
        if self.truncate_token.is_some() && (!self.stop.is_empty() || self.min_new_tokens > 0) {
            let why = "with a truncate token nothing else ends a response: leave out stop and min_new_tokens";
            found.add("generation.truncate_token", why);
        }
        if self.truncate_token.is_none() && self.truncate_after > 0 {
            found.add("generation.truncate_after", "it needs truncate_token");
        }
    }

    /// The key that makes the distribution that is sampled from another than the one that is trained.
    pub fn distortion(&self) -> Option<&'static str> {
        match self {
            g if g.top_k > 0 => Some("generation.top_k"),
            g if g.top_p < 1.0 => Some("generation.top_p"),
            g if g.min_new_tokens > 0 => Some("generation.min_new_tokens"),
            _ => None,
        }
    }
}

/// A number of tokens, or a range of them with its ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length {
    /// Fewest tokens.
    pub low: usize,
    /// Most tokens.
    pub high: usize,
}

impl Setting for Length {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        let at = At { limits: Limits::COUNT, ..at.clone() };
        match at.node.value {
            YamlValue::Int(_) => usize::read(&at, problems).map(|n| Length { low: n, high: n }),
            YamlValue::List(_) => {
                let [low, high] = <[usize; 2]>::read(&at, problems)?;
                match low <= high {
                    true => Some(Length { low, high }),
                    false => at.refuse(
                        format!("{low} to {high} is no range: expected [LOW, HIGH] with LOW at most HIGH"),
                        problems,
                    ),
                }
            }
            _ => at.expected("a number of tokens, or a range [LOW, HIGH]", problems),
        }
    }

    fn write(&self) -> Json {
        match self.low == self.high {
            true => self.low.into(),
            false => vec![self.low, self.high].into(),
        }
    }

    fn kind() -> KeyKind {
        KeyKind::OneOf(vec![KeyKind::Whole, <[usize; 2]>::kind()])
    }
}
