//! In which order the samples of several sources come: a function of seed and index alone.

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::random::Permutation;

/// A file or folder with data.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedSource {
    pub path: PathBuf,
    /// Its share of the samples, relative to the other weights. With weights on no source, every window of every
    /// source comes once an epoch.
    pub weight: Option<f64>,
}

/// The weights, if there are any: all or none, positive and finite.
pub fn weights(sources: &[WeightedSource]) -> Result<Option<Vec<f64>>> {
    if sources.iter().all(|s| s.weight.is_none()) {
        return Ok(None);
    }
    let weight = |source: &WeightedSource| match source.weight {
        Some(weight) if weight > 0.0 && weight.is_finite() => Ok(weight),
        Some(weight) => {
            Err(Error::config(format!("{}: weight {weight} must be positive", source.path.display())))
        }
        None => Err(Error::config(format!(
            "{} has no weight, other sources have one; give all of them a weight or none",
            source.path.display()
        ))),
    };
    sources.iter().map(weight).collect::<Result<Vec<_>>>().map(Some)
}

/// Item `index` of endless epochs of `n` items, shuffled anew every epoch: which of the `n`, and the epoch's number.
/// `pool` tells apart the pools of a run.
pub fn shuffled(seed: u64, pool: usize, n: u64, index: u64) -> (u64, u64) {
    let epoch = index / n;
    (Permutation::new(n, seed, "loader.order", epoch << 16 | pool as u64).apply(index % n), epoch)
}

/// Interleaves pools by weight: after n samples, pool j has given round(n w_j) of them, within 1. A binary tree
/// splits the sequence: of the first m samples that reach a node, floor(m f + 1/2) go left, f being the left side's
/// share of the weight. So the place of any sample follows from its index alone.
pub enum SourceTree {
    Pool(usize),
    /// The left side's share in units of 2^-64.
    Split(u64, Box<[SourceTree; 2]>),
}

impl SourceTree {
    /// The tree is Huffman's, which keeps heavy pools near the root and the rounding errors of few splits in them.
    pub fn new(weights: &[f64]) -> Self {
        let mut nodes: Vec<(f64, SourceTree)> =
            weights.iter().copied().zip((0..).map(SourceTree::Pool)).collect();
        while nodes.len() > 1 {
            nodes.sort_by(|a, b| b.0.total_cmp(&a.0));
            if let (Some((light, right)), Some((heavy, left))) = (nodes.pop(), nodes.pop()) {
                let share = (heavy / (heavy + light) * 2f64.powi(64)) as u64;
                nodes.push((heavy + light, SourceTree::Split(share, Box::new([left, right]))));
            }
        }
        nodes.pop().map_or(SourceTree::Pool(0), |(_, tree)| tree)
    }

    /// The pool of sample `index`, and how many samples the pool gave before.
    pub fn locate(&self, index: u64) -> (usize, u64) {
        match self {
            SourceTree::Pool(pool) => (*pool, index),
            SourceTree::Split(share, sides) => {
                let left = |m: u64| ((m as u128 * *share as u128 + (1 << 63)) >> 64) as u64;
                let before = left(index);
                if left(index + 1) > before {
                    sides[0].locate(before)
                } else {
                    sides[1].locate(index - before)
                }
            }
        }
    }
}
