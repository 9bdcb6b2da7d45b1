//! Which parts of a group's flat buffer ranks send each other in 8-bit floats.

use std::ops::Range;

/// The matrices of a group that are gathered in 8-bit floats.
#[derive(Debug, Clone, Default)]
pub(super) struct Float8Runs {
    /// Their elements in the flat buffer, in its order.
    pub runs: Vec<Range<i64>>,
    /// The place of the first among those of all groups.
    pub first: usize,
    /// The most elements outside of runs that a rank owns.
    pub rest_len: i64,
}

impl Float8Runs {
    /// Of a group whose buffer lies in `slices`, padding left out.
    pub fn new(runs: Vec<Range<i64>>, first: usize, slices: impl Iterator<Item = Range<i64>>) -> Float8Runs {
        let mut all = Float8Runs { runs, first, rest_len: 0 };
        let rest = |slice: Range<i64>| all.rest_before(slice.end) - all.rest_before(slice.start);
        all.rest_len = slices.map(rest).max().unwrap_or(0);
        all
    }

    /// Elements outside of runs that lie before `at`.
    pub fn rest_before(&self, at: i64) -> i64 {
        at - self.runs.iter().map(|run| len(&shared(run, &(0..at)))).sum::<i64>()
    }

    /// The parts of a slice outside of runs.
    pub fn rest_of(&self, slice: &Range<i64>) -> Vec<Range<i64>> {
        let mut parts = Vec::new();
        let mut from = slice.start;
        for run in self.runs.iter().map(|run| shared(run, slice)).filter(|run| !run.is_empty()) {
            parts.push(from..run.start);
            from = run.end;
        }
        parts.push(from..slice.end);
        parts.retain(|part| !part.is_empty());
        parts
    }
}

/// The elements of a group of `numel` that a rank owns in slices of `shard_len`, padding left out.
pub(super) fn owned(rank: i64, shard_len: i64, numel: i64) -> Range<i64> {
    let start = (rank * shard_len).min(numel);
    start..(start + shard_len).min(numel)
}

/// Elements that two ranges share; an empty range where there are none.
pub(super) fn shared(a: &Range<i64>, b: &Range<i64>) -> Range<i64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// Elements of a range.
pub(super) fn len(range: &Range<i64>) -> i64 {
    range.end - range.start
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every element lies in a run or in the rest, once, however slices cut them.
    #[test]
    fn runs_and_rest_are_all() {
        let numel = 100;
        for runs in [vec![], vec![0..50, 50..100], vec![0..30, 30..60, 70..90], vec![5..6, 99..100]] {
            for (ranks, shard_len) in [(1, 100), (2, 50), (3, 40), (7, 16)] {
                let slices: Vec<_> = (0..ranks).map(|rank| owned(rank, shard_len, numel)).collect();
                let all = Float8Runs::new(runs.clone(), 0, slices.iter().cloned());
                let mut seen = vec![0; numel as usize];
                let mut rest = 0;
                for slice in &slices {
                    let parts = all.rest_of(slice);
                    let n: i64 = parts.iter().map(len).sum();
                    assert!(n <= all.rest_len, "{runs:?} over {ranks}");
                    assert_eq!(all.rest_before(slice.start), rest, "{runs:?} over {ranks}");
                    rest += n;
                    let in_runs = all.runs.iter().map(|run| shared(run, slice));
                    in_runs.chain(parts).flatten().for_each(|at| seen[at as usize] += 1);
                }
                assert!(seen.iter().all(|times| *times == 1), "{runs:?} over {ranks}: {seen:?}");
            }
        }
    }
}
