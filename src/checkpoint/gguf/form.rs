//! What one family's GGUF files have of their own. Each family's file in `checkpoint/families` has a [`GgufForm`]; what all have in
//! common is in [`super::names`] and [`super::shape`].

use super::keys::Keys;
use crate::config::shape::{Family, Shape};
use crate::error::Result;
use crate::gguf::MetadataValue;

/// A family's GGUF files, as llama.cpp's converter writes them and its loaders read them (`conversion/`, `src/models/`).
#[derive(Debug)]
pub struct GgufForm {
    /// `general.architecture`. Llama's is that of all families whose blocks are Llama's.
    pub architecture: &'static str,
    /// The family that is read, and written, in this form.
    pub family: Family,
    /// Rows of q and k are rotated pairs, side by side as in Meta's files.
    pub rotated_pairs: bool,
    /// Takes the architecture's own keys into a shape that has what all architectures say.
    pub read: fn(&mut Keys, &mut Shape) -> Result<()>,
    /// The architecture's own keys. An error: what of the shape the format, or llama.cpp, cannot express.
    pub write: fn(&Shape) -> Result<OwnKeys, String>,
    /// What llama.cpp does not read of these keys, as a sentence for the user.
    pub left_out: fn(&Shape) -> Option<String>,
}

/// Keys without the architecture's name, with their values.
pub type OwnKeys = Vec<(&'static str, MetadataValue)>;

impl GgufForm {
    /// An architecture without keys of its own, and without a sliding window.
    pub const fn plain(architecture: &'static str, family: Family) -> GgufForm {
        GgufForm {
            architecture,
            family,
            rotated_pairs: false,
            read: |_, _| Ok(()),
            write: |shape| match shape.sliding_window {
                Some(window) => {
                    Err(format!("a sliding window (of {window} positions) in a {:?}", shape.family))
                }
                None => Ok(Vec::new()),
            },
            left_out: |_| None,
        }
    }

    /// An architecture with a sliding window in all blocks, which llama.cpp leaves out.
    pub const fn windowed(architecture: &'static str, family: Family) -> GgufForm {
        GgufForm {
            read: |keys, shape| {
                shape.sliding_window = keys.integer(WINDOW)?.filter(|n| *n > 0);
                Ok(())
            },
            write: |shape| {
                Ok(shape.sliding_window.map(|n| (WINDOW, MetadataValue::Integer(n))).into_iter().collect())
            },
            left_out: |shape| {
                let window = shape.sliding_window?;
                Some(format!(
                    "llama.cpp ignores the sliding window: beyond {window} tokens its results differ from this model's"
                ))
            },
            ..GgufForm::plain(architecture, family)
        }
    }
}

/// The positions of a sliding window.
pub const WINDOW: &str = "attention.sliding_window";

/// Heads as wide as llama.cpp's loader takes them for: an error where they are not C / H numbers.
pub fn check_head_dim(shape: &Shape) -> Result<(), String> {
    match shape.hidden_size == shape.num_attention_heads * shape.head_dim {
        true => Ok(()),
        false => Err(format!(
            "heads of {} numbers in a {:?}, where llama.cpp takes hidden_size / num_attention_heads for it",
            shape.head_dim, shape.family
        )),
    }
}
