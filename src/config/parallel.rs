//! The section `parallel`: what ranks divide among them.

use clap::ValueEnum;
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::conflict::Conflict;
use super::numbers::{count, positive};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Parallel {
    pub mode: Mode,
    /// `hybrid`: over how many ranks one copy of the parameters lies.
    #[serde(skip_serializing_if = "ShardSize::is_auto")]
    pub shard: ShardSize,
    /// Ranks that share every matrix (tensor parallelism). Only 1 is built.
    #[serde(deserialize_with = "tensor")]
    pub tensor: i64,
    /// Seconds within which ranks must meet, and every collective must end.
    #[serde(deserialize_with = "positive")]
    pub timeout_s: f64,
}

impl Default for Parallel {
    fn default() -> Self {
        Parallel { mode: Mode::Full, shard: ShardSize::Auto, tensor: 1, timeout_s: 600.0 }
    }
}

impl Parallel {
    /// What does not fit on `world_size` ranks, and why.
    pub fn conflict(&self, world_size: i64) -> Option<Conflict> {
        if self.timeout_s > 1e7 {
            return Some(("parallel.timeout_s", "at most 10000000 seconds, which are 115 days".into()));
        }
        let ShardSize::Ranks(n) = self.shard else { return None };
        if self.mode != Mode::Hybrid {
            return Some((
                "parallel.shard",
                "is a key of `mode: hybrid`; leave it out, or set parallel.mode=hybrid".into(),
            ));
        }
        (world_size % n != 0)
            .then(|| ("parallel.shard", format!("{n} must divide the number of ranks, {world_size}")))
    }
}

/// What is sharded over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Parameters, gradients and optimizer state (ZeRO-3, FSDP).
    Full,
    /// Gradients and optimizer state (ZeRO-2).
    Grads,
    /// Optimizer state (ZeRO-1).
    Optimizer,
    /// As `full`, over `parallel.shard` ranks; such groups of ranks hold equal copies (HSDP).
    Hybrid,
    /// Nothing: every rank holds all (DDP).
    Replicate,
}

/// `auto`, or a number of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShardSize {
    /// The ranks of a host.
    Auto,
    Ranks(i64),
}

impl ShardSize {
    fn is_auto(&self) -> bool {
        *self == ShardSize::Auto
    }
}

impl Serialize for ShardSize {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            ShardSize::Auto => "auto".serialize(s),
            ShardSize::Ranks(n) => n.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for ShardSize {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = ShardSize;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a number of ranks, or auto: the ranks of a host")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<ShardSize, E> {
                match text {
                    "auto" => Ok(ShardSize::Auto),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_i64<E: Error>(self, n: i64) -> Result<ShardSize, E> {
                match n {
                    1.. => Ok(ShardSize::Ranks(n)),
                    _ => Err(E::custom(format!("expected a number of ranks of at least 1, found {n}"))),
                }
            }

            fn visit_u64<E: Error>(self, n: u64) -> Result<ShardSize, E> {
                self.visit_i64(i64::try_from(n).unwrap_or(i64::MAX))
            }
        }
        d.deserialize_any(SizeVisitor)
    }
}

fn tensor<'de, D: Deserializer<'de>>(d: D) -> Result<i64, D::Error> {
    match count(d)? {
        1 => Ok(1),
        n => Err(D::Error::custom(format!("tensor parallelism over {n} ranks is not built yet; only 1 is"))),
    }
}
