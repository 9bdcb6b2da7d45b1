//! What of a model is trained: the sections `freeze` and `lora`.

use serde_json::Value as Json;

use super::conflict::Conflicts;
use super::keys::KeyKind;
use super::problems::Problems;
use super::section::{choice, section};
use super::sections::Compute;
use super::setting::{At, Setting};
use super::yaml::YamlValue;

section! {
    /// Parameters that are not trained: they have no gradients and no moments, and the backward ends at the lowest trainable
    /// block.
    pub struct Freeze {
        /// Number of blocks to freeze, from the first.
        blocks: u64 = 0 => State;
        /// Freezes the embedding, and the head if they are tied.
        embeddings: bool = false => State;
        /// Trains only tensors with one of these in their name: whole parts between dots (`q_proj`, `layers.3`), `*` matches
        /// anything. Empty: all that are not frozen otherwise.
        train_only: Vec<String> = Vec::new() => State;
    }
}

section! {
    /// Low-rank adapters (Hu et al. 2021): the weights are frozen, and B A is trained beside them.
    pub struct Lora {
        /// r, the rows of A and the columns of B.
        rank: i64, COUNT => State;
        /// B A is multiplied by alpha / r, or alpha / sqrt(r) with `rslora`. Default: 2 r.
        alpha: Option<f64> = None, POSITIVE => Mathematics;
        /// Dropout probability of A's inputs in training.
        dropout: f64 = 0.0, BELOW_ONE => Mathematics;
        /// The linear layers that have adapters.
        targets: Targets = Targets::AllLinear => State;
        /// Rank-stabilised scaling (Kalajdzievski 2023).
        rslora: bool = false => Mathematics;
        /// Modules trained in full besides the adapters: `embed_tokens`, `lm_head`.
        modules_to_save: Vec<String> = Vec::new() => State;
        /// Format of the linear layers' frozen weights.
        base: BaseFormat = BaseFormat::None => Mathematics;
    }
    check Lora::complete
}

impl Lora {
    fn complete(&mut self) -> Result<(), String> {
        self.alpha = Some(self.alpha());
        Ok(())
    }

    /// The numerator of the scale.
    pub fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(2.0 * self.rank as f64)
    }
}

/// The linear layers that have adapters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
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

impl Setting for Targets {
    fn read(at: &At<'_>, problems: &mut Problems) -> Option<Self> {
        match &at.node.value {
            YamlValue::Text(word) if word == ALL_LINEAR => Some(Targets::AllLinear),
            YamlValue::Text(word) if word == ATTENTION => Some(Targets::Attention),
            YamlValue::List(items) if items.is_empty() => {
                at.refuse("name at least one linear layer", problems)
            }
            YamlValue::List(_) => Vec::read(at, problems).map(Targets::Names),
            _ => {
                let what = format!("{ALL_LINEAR}, {ATTENTION}, or a list of names such as [q_proj, v_proj]");
                at.expected(&what, problems)
            }
        }
    }

    fn write(&self) -> Json {
        match self {
            Targets::AllLinear => ALL_LINEAR.into(),
            Targets::Attention => ATTENTION.into(),
            Targets::Names(names) => names.write(),
        }
    }

    fn kind() -> KeyKind {
        let words = [(ALL_LINEAR, "Every one in the blocks."), (ATTENTION, "q, k, v and o.")];
        let words = words.map(|(word, about)| (word, about.to_string())).to_vec();
        KeyKind::OneOf(vec![KeyKind::Choice(words), Vec::<String>::kind()])
    }
}

choice! {
    /// Format of the frozen weights that adapters are added to.
    pub enum BaseFormat {
        /// In the compute dtype.
        None = "none",
        /// 8 bits, one scale per row.
        Int8 = "int8",
        /// 4 bits, blocks of 64 with scales in 8 bits (QLoRA, Dettmers et al. 2023).
        Nf4 = "nf4",
    }
}

/// What does not fit together.
pub fn conflicts(freeze: &Freeze, lora: Option<&Lora>, compute: Compute, found: &mut Conflicts) {
    let Some(lora) = lora else { return };
    if compute == Compute::Float8 && lora.base != BaseFormat::None {
        let why = format!(
            "products with {} weights are in bfloat16, so that precision.compute: float8 would do nothing; keep one",
            lora.base.name()
        );
        found.add("lora.base", why);
    }
    if !freeze.train_only.is_empty() {
        let why = "with lora only adapters are trained; say where with lora.targets, and what besides with \
                   lora.modules_to_save";
        found.add("freeze.train_only", why);
    }
    if freeze.embeddings && lora.modules_to_save.iter().any(|m| m == "embed_tokens") {
        found.add("freeze.embeddings", "lora.modules_to_save says that embed_tokens is trained");
    }
}
