//! How a checkpoint's tensors were divided among tensor-parallel ranks, and where their elements are.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::distributed::cut::Share;
use crate::distributed::sharded::TensorSpec;

/// A division of a tensor into rectangles of equal size; what lies beyond its end is padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutMeta {
    /// 0: by rows (or a vector's elements), 1: by columns.
    pub dim: usize,
    /// Rows or columns of each rectangle.
    pub size: i64,
    /// Neighbouring ranks that have the same rectangle.
    pub copies: i64,
}

impl CutMeta {
    /// Of what a rank has of a tensor; none where all have all of it.
    pub fn of(spec: &TensorSpec) -> Option<CutMeta> {
        match spec.share {
            Share::Cut(cut) => Some(CutMeta { dim: cut.dim, size: spec.shape[cut.dim], copies: cut.copies }),
            Share::Whole | Share::Summed => None,
        }
    }
}

/// Elements of a tensor that follow each other in a rectangle, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RectangleRun {
    /// The first tensor-parallel rank that has them.
    pub tensor_rank: usize,
    /// The first, counted in the rectangle.
    pub from: i64,
    /// The first, counted in what was asked for.
    pub to: i64,
    /// How many.
    pub len: i64,
}

/// A tensor and how it was divided.
#[derive(Debug, Clone, Copy)]
pub struct Divided<'a> {
    /// Of the whole tensor.
    pub shape: &'a [i64],
    /// None: all ranks have all of it.
    pub cut: Option<CutMeta>,
}

impl Divided<'_> {
    fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Elements of each rank's rectangle.
    pub fn rectangle_numel(&self) -> i64 {
        match self.cut {
            Some(cut) => self.numel() / self.shape[cut.dim].max(1) * cut.size,
            None => self.numel(),
        }
    }

    /// Elements of a row of a rectangle and of the tensor, which rows one below the other are made of.
    fn rows(&self, cut: CutMeta) -> (i64, i64) {
        let inner: i64 = self.shape[cut.dim + 1..].iter().product();
        (cut.size * inner, self.shape[cut.dim] * inner)
    }

    /// Where elements `range` of the flattened tensor are, in order.
    pub fn runs(&self, range: Range<i64>) -> Vec<RectangleRun> {
        let Some(cut) = self.cut else {
            return vec![RectangleRun {
                tensor_rank: 0,
                from: range.start,
                to: 0,
                len: range.end - range.start,
            }];
        };
        let (part, whole) = self.rows(cut);
        let mut runs = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (row, column) = (at / whole, at % whole);
            let (rectangle, within) = (column / part, column % part);
            let len = (part - within).min(whole - column).min(range.end - at);
            runs.push(RectangleRun {
                tensor_rank: (rectangle * cut.copies) as usize,
                from: row * part + within,
                to: at - range.start,
                len,
            });
            at += len;
        }
        runs
    }

    /// The rectangles' tensor-parallel ranks, each once.
    pub fn tensor_ranks(&self) -> impl Iterator<Item = usize> + use<> {
        let (count, copies) = match self.cut {
            Some(cut) => ((self.shape[cut.dim] + cut.size - 1) / cut.size, cut.copies),
            None => (1, 1),
        };
        (0..count).map(move |k| (k * copies) as usize)
    }

    /// Elements of a row of the tensor as [`Divided::places`] counts them.
    pub fn width(&self) -> i64 {
        self.cut.map_or(self.numel(), |cut| self.rows(cut).1)
    }

    /// Where elements `range` of a rank's flattened rectangle lie in the tensor, as rows and columns of [`Divided::width`], each
    /// with its first element in the rectangle and the elements from one row to the next there. Padding is left out.
    pub fn places(&self, tensor_rank: usize, range: Range<i64>) -> Vec<(Range<i64>, Range<i64>, i64, i64)> {
        let Some(cut) = self.cut else { return vec![(0..1, range.clone(), range.start, self.numel())] };
        let (part, whole) = self.rows(cut);
        let left = tensor_rank as i64 / cut.copies * part;
        let mut places = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (row, column) = (at / part, at % part);
            // Whole rows in one piece.
            let rows = if column == 0 { ((range.end - at) / part).max(1) } else { 1 };
            let end = (column + range.end - at).min(part);
            let columns = (left + column).min(whole)..(left + end).min(whole);
            if !columns.is_empty() {
                places.push((row..row + rows, columns, at, part));
            }
            at += if rows > 1 { rows * part } else { end - column };
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ways: every element of the tensor is in a rectangle, and what is read of rectangles covers the tensor.
    #[test]
    fn elements_are_found() {
        for (shape, dim, size) in
            [(vec![6, 8], 0, 3), (vec![6, 8], 1, 2), (vec![7, 3], 0, 4), (vec![5], 0, 3), (vec![3, 9], 1, 3)]
        {
            for copies in [1, 2] {
                let divided = Divided { shape: &shape, cut: Some(CutMeta { dim, size, copies }) };
                let numel = divided.numel();
                let inner: i64 = shape[dim + 1..].iter().product();
                let place = |at: i64| {
                    let (row, column) = (at / (shape[dim] * inner), at % (shape[dim] * inner));
                    let rectangle = column / (size * inner);
                    let local = row * size * inner + column - rectangle * size * inner;
                    ((rectangle * copies) as usize, local)
                };
                for step in [1, 2, 5, numel] {
                    for first in (0..numel).step_by(step as usize) {
                        let range = first..(first + step).min(numel);
                        let runs = divided.runs(range.clone());
                        let found: Vec<_> = runs
                            .iter()
                            .flat_map(|r| (0..r.len).map(|i| (r.to + i, r.tensor_rank, r.from + i)))
                            .collect();
                        let right: Vec<_> = range.map(|at| (at - first, place(at).0, place(at).1)).collect();
                        assert_eq!(found, right, "{shape:?} by {dim}");
                    }
                    let mut seen = vec![0; numel as usize];
                    for rank in divided.tensor_ranks() {
                        let all = divided.rectangle_numel();
                        for first in (0..all).step_by(step as usize) {
                            let range = first..(first + step).min(all);
                            for (rows, columns, from, stride) in divided.places(rank, range) {
                                for (i, row) in rows.enumerate() {
                                    for column in columns.clone() {
                                        let at = row * divided.width() + column;
                                        let local = from + i as i64 * stride + column - columns.start;
                                        assert_eq!(place(at), (rank, local), "{shape:?} by {dim}");
                                        seen[at as usize] += 1;
                                    }
                                }
                            }
                        }
                    }
                    assert!(seen.iter().all(|n| *n == 1), "{shape:?} by {dim}: {seen:?}");
                }
            }
        }
    }
}
