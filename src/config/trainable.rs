//! What of a model is trained: the sections `freeze` and `lora`.

use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::conflict::Conflict;
use super::numbers::{count, positive};

/// What is not trained: no gradients, no moments, and no backward below the lowest block that is trained.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Freeze {
    /// The first blocks, so many.
    pub blocks: u64,
    /// The embedding, and with it the head, where they are tied.
    pub embeddings: bool,
    /// Only tensors with one of these in their name are trained: whole parts between dots (`q_proj`, `layers.3`), `*` for
    /// anything. Empty: all that is not frozen otherwise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub train_only: Vec<String>,
}

/// Low-rank adapters (Hu et al. 2021): the weights stay, and B A is trained beside them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// r, the rows of A and the columns of B.
    #[serde(deserialize_with = "count")]
    pub rank: i64,
    /// B A is multiplied by alpha / r, or alpha / sqrt(r) with `rslora`.
    #[serde(deserialize_with = "positive")]
    pub alpha: f64,
    /// Share of A's inputs that is left out in training.
    #[serde(default, deserialize_with = "below_one")]
    pub dropout: f64,
    #[serde(default)]
    pub targets: Targets,
    /// Scaling that does not fall with the rank (Kalajdzievski 2023).
    #[serde(default)]
    pub rslora: bool,
    /// Trained as a whole besides: `embed_tokens`, `lm_head`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// How the linear layers' weights are kept.
    #[serde(default)]
    pub base: Base,
}

/// The linear layers that have adapters.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Targets {
    /// Every one in the blocks.
    #[default]
    AllLinear,
    /// q, k, v and o.
    Attention,
    /// By the last parts of their names.
    Names(Vec<String>),
}

const ALL_LINEAR: &str = "all-linear";
const ATTENTION: &str = "attention";

impl Serialize for Targets {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Targets::AllLinear => s.serialize_str(ALL_LINEAR),
            Targets::Attention => s.serialize_str(ATTENTION),
            Targets::Names(names) => names.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct TargetsVisitor;
        impl<'de> Visitor<'de> for TargetsVisitor {
            type Value = Targets;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                write!(f, "{ALL_LINEAR}, {ATTENTION}, or a list of names such as [q_proj, v_proj]")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Targets, E> {
                match name {
                    ALL_LINEAR => Ok(Targets::AllLinear),
                    ATTENTION => Ok(Targets::Attention),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(name), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Targets, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = list.next_element()? {
                    names.push(name);
                }
                match names.is_empty() {
                    true => Err(A::Error::custom("name at least one linear layer")),
                    false => Ok(Targets::Names(names)),
                }
            }
        }
        d.deserialize_any(TargetsVisitor)
    }
}

/// How weights that adapters are added to are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Base {
    /// In the compute dtype.
    #[default]
    None,
    /// 8 bits, one scale a row.
    Int8,
    /// 4 bits, blocks of 64 with scales in 8 bits (QLoRA, Dettmers et al. 2023).
    Nf4,
}

/// What does not fit together, and why.
pub fn conflict(freeze: &Freeze, lora: Option<&Lora>) -> Option<Conflict> {
    let lora = lora?;
    if !freeze.train_only.is_empty() {
        let why = "with lora only adapters are trained; say where with lora.targets, and what besides with \
                   lora.modules_to_save";
        return Some(("freeze.train_only", why.into()));
    }
    if freeze.embeddings && lora.modules_to_save.iter().any(|m| m == "embed_tokens") {
        return Some(("freeze.embeddings", "lora.modules_to_save says that embed_tokens is trained".into()));
    }
    None
}

fn below_one<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    let p = f64::deserialize(d)?;
    match (0.0..1.0).contains(&p) {
        true => Ok(p),
        false => Err(D::Error::custom(format!("expected a number of at least 0 and below 1, found {p}"))),
    }
}
