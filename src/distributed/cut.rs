//! The part of a tensor that a tensor-parallel rank holds: all of it, or a rectangle.
//!
//! A rectangle is whole rows, or whole columns, of a matrix, or a part of a vector. All ranks hold rectangles of equal size: what lies
//! beyond the tensor's end is padding, and where there are more ranks than parts, neighbours hold copies.

use std::ops::Range;

/// A tensor's share of a tensor-parallel rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// Every rank holds all of it, and computes its whole gradient.
    Whole,
    /// Every rank holds all of it, and computes a part of its gradient.
    Summed,
    /// Every rank holds a rectangle.
    Cut(Cut),
}

/// A rectangle: a range of one dimension of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// 0: rows (or a vector's elements), 1: columns.
    pub dim: usize,
    /// The first row or column.
    pub first: i64,
    /// Rows or columns of the whole tensor.
    pub whole: i64,
    /// Neighbours that hold this rectangle, this rank among them, each of which computes a part of its gradient.
    pub copies: i64,
}

/// Elements of a rectangle that follow each other in the whole tensor, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutRun {
    /// The first, counted in the whole tensor; none: padding.
    pub whole: Option<i64>,
    /// The first, counted in the rectangle.
    pub part: i64,
    /// How many.
    pub len: i64,
}

impl Cut {
    /// The elements `range` of a flattened rectangle of this `shape`, in order.
    pub fn runs(&self, shape: &[i64], range: Range<i64>) -> Vec<CutRun> {
        let inner: i64 = shape[self.dim + 1..].iter().product();
        // A row of the rectangle is one of `dim` and what lies inside it.
        let (row, whole_row) = (shape[self.dim] * inner, self.whole * inner);
        let within = (self.whole - self.first).clamp(0, shape[self.dim]) * inner;
        let mut runs = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (r, c) = (at / row, at % row);
            let end = if c < within { within } else { row };
            let len = (end - c).min(range.end - at);
            let whole = (c < within).then(|| r * whole_row + self.first * inner + c);
            runs.push(CutRun { whole, part: at, len });
            at += len;
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every element of the whole tensor is in one rectangle, however it is cut and read.
    #[test]
    fn rectangles_are_all() {
        for (whole, dim, ranks) in
            [([6, 8], 0, 2), ([6, 8], 1, 4), ([7, 3], 0, 2), ([5, 2], 0, 4), ([1, 9], 1, 3), ([3, 1], 0, 3)]
        {
            let part = (whole[dim] + ranks - 1) / ranks;
            let mut shape = whole;
            shape[dim] = part;
            let numel = shape[0] * shape[1];
            for step in [1, 3, 7, numel] {
                let mut seen = vec![0; (whole[0] * whole[1]) as usize];
                for rank in 0..ranks {
                    let cut = Cut { dim, first: rank * part, whole: whole[dim], copies: 1 };
                    let mut next = 0;
                    for first in (0..numel).step_by(step as usize) {
                        for run in cut.runs(&shape, first..(first + step).min(numel)) {
                            assert_eq!(run.part, next);
                            next += run.len;
                            for i in 0..run.len {
                                let (row, column) = ((run.part + i) / shape[1], (run.part + i) % shape[1]);
                                let at = [row, column];
                                let place = at[dim] + cut.first;
                                match run.whole {
                                    None => assert!(place >= whole[dim]),
                                    Some(first) => {
                                        let mut at = at;
                                        at[dim] = place;
                                        assert_eq!(first + i, at[0] * whole[1] + at[1]);
                                        seen[(first + i) as usize] += 1;
                                    }
                                }
                            }
                        }
                    }
                    assert_eq!(next, numel);
                }
                assert!(seen.iter().all(|n| *n == 1), "{whole:?} by {dim} over {ranks}: {seen:?}");
            }
        }
    }

    #[test]
    fn parts_of_vectors() {
        let cut = Cut { dim: 0, first: 4, whole: 6, copies: 1 };
        let runs = cut.runs(&[4], 1..4);
        assert_eq!(
            runs,
            [CutRun { whole: Some(5), part: 1, len: 1 }, CutRun { whole: None, part: 2, len: 2 }]
        );
    }
}
