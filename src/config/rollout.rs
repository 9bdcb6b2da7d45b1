//! How responses are sampled while training: the section `generation` of ppo, grpo and online-dpo.

use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::conflict::Conflict;
use super::numbers::{positive, some_count};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Generation {
    /// Most tokens of a response: a number, or `[LOW, HIGH]`, of which every prompt draws its own.
    pub max_new_tokens: Length,
    /// Tokens of a response before one that ends it may be chosen.
    pub min_new_tokens: usize,
    /// Divides the logits: here and in every log-probability of the training.
    #[serde(deserialize_with = "positive")]
    pub temperature: f64,
    /// The most probable tokens that are drawn from; 0: all.
    pub top_k: usize,
    /// The least share of the probability that the most probable tokens drawn from have.
    #[serde(deserialize_with = "positive")]
    pub top_p: f64,
    /// Texts that end a response, besides the tokens that end a turn.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// A token's text: no token ends a response, but it is cut after the first of these that has `truncate_after` tokens
    /// before it (Ziegler et al. 2019).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncate_token: Option<String>,
    pub truncate_after: usize,
    /// Responses in work at once on a rank. Default: all of them.
    #[serde(deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<i64>,
    /// How sharded parameters are gathered while responses are sampled.
    pub gather: Gather,
}

impl Default for Generation {
    fn default() -> Self {
        Generation {
            max_new_tokens: Length { low: 256, high: 256 },
            min_new_tokens: 0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            stop: Vec::new(),
            truncate_token: None,
            truncate_after: 0,
            batch_size: None,
            gather: Gather::Auto,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gather {
    /// As a whole, where every rank has room for twice that, else block by block.
    Auto,
    /// All of them at once: nothing is communicated until the responses are there.
    Whole,
    /// One block after the other, for every token.
    Blocks,
}

impl Generation {
    /// What does not fit, and why.
    pub fn conflict(&self) -> Option<Conflict> {
        if self.top_p > 1.0 {
            return Some(("generation.top_p", "at most 1".into()));
        }
        if self.min_new_tokens > self.max_new_tokens.low {
            let (min, low) = (self.min_new_tokens, self.max_new_tokens.low);
            return Some((
                "generation.min_new_tokens",
                format!("{min} are more than the {low} of max_new_tokens"),
            ));
        }
        if self.stop.iter().any(String::is_empty) {
            return Some(("generation.stop", "a stop text is empty".into()));
        }
        if self.truncate_token.is_some() && (!self.stop.is_empty() || self.min_new_tokens > 0) {
            let why = "with a truncate token nothing else ends a response: leave out stop and min_new_tokens";
            return Some(("generation.truncate_token", why.into()));
        }
        if self.truncate_token.is_none() && self.truncate_after > 0 {
            return Some(("generation.truncate_after", "it needs truncate_token".into()));
        }
        None
    }

    /// What makes the distribution that is drawn from another than the one that is trained, if anything does.
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
    pub low: usize,
    pub high: usize,
}

impl Serialize for Length {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.low == self.high {
            true => self.low.serialize(s),
            false => [self.low, self.high].serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for Length {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct LengthVisitor;
        impl<'de> Visitor<'de> for LengthVisitor {
            type Value = Length;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a number of tokens, or a range [LOW, HIGH]")
            }

            fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<Length, E> {
                self.visit_u64(u64::try_from(n).unwrap_or(0))
            }

            fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<Length, E> {
                range(n, n)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Length, A::Error> {
                let mut numbers = Vec::new();
                while let Some(n) = list.next_element::<u64>()? {
                    numbers.push(n);
                }
                match numbers[..] {
                    [low, high] => range(low, high),
                    _ => Err(A::Error::custom("expected two numbers, [LOW, HIGH]")),
                }
            }
        }
        d.deserialize_any(LengthVisitor)
    }
}

fn range<E: serde::de::Error>(low: u64, high: u64) -> Result<Length, E> {
    if low < 1 || high < low || high > 1 << 31 {
        return Err(E::custom(format!(
            "{low} to {high} are no numbers of tokens: expected 1 <= LOW <= HIGH"
        )));
    }
    Ok(Length { low: low as usize, high: high as usize })
}
