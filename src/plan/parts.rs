//! Bytes by what they are for, and what is computed at once.

use serde::Serialize;

use crate::config::sections::Recompute;

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// Slices of what is trained: master values, and copies in the compute dtype.
    pub weights: i64,
    /// Slices of what is not trained, quantized or not, with scales.
    pub frozen: i64,
    /// Groups that are gathered from the ranks for their use.
    pub gathered: i64,
    /// Slices of gradients.
    pub gradients: i64,
    /// Gradients of whole groups before they are reduced into slices.
    pub whole_gradients: i64,
    /// AdamW's moments.
    pub moments: i64,
    /// What forwards keep for their backwards.
    pub activations: i64,
    /// What a block's forward or backward computes with besides.
    pub work: i64,
    /// A chunk of logits, and the product that is its weight's gradient.
    pub head: i64,
}

impl Parts {
    /// The sum of all parts.
    pub fn total(&self) -> i64 {
        self.named().iter().map(|(_, bytes)| bytes).sum()
    }

    /// The parts with words for people.
    pub fn named(&self) -> [(&'static str, i64); 9] {
        [
            ("weights", self.weights),
            ("frozen weights", self.frozen),
            ("gathered weights", self.gathered),
            ("gradients", self.gradients),
            ("gradients in reduction", self.whole_gradients),
            ("moments", self.moments),
            ("activations", self.activations),
            ("work of one block", self.work),
            ("head", self.head),
        ]
    }
}

/// What is computed at once.
#[derive(Debug, Clone, Copy)]
pub struct BatchShape {
    /// B, rows of a micro-batch.
    pub rows: i64,
    /// T, tokens of a row.
    pub length: i64,
    /// Micro-batches of one update.
    pub micro_batches: i64,
    /// What a block keeps for its backward.
    pub recompute: Recompute,
    /// Rows hold several documents: positions and first visible positions are tensors.
    pub packed: bool,
}

impl BatchShape {
    /// What one of `ranks` ranks computes of it where they share every row.
    pub fn shared_by(&self, ranks: i64) -> BatchShape {
        BatchShape { length: self.length / ranks, ..*self }
    }

    pub(super) fn tokens(&self) -> i64 {
        self.rows * self.length
    }
}
