//! A dimension of the mesh of ranks, seen from one of them.

use std::ops::Range;

use kernels::comm::Group;

/// An axis of the mesh, seen from one rank.
#[derive(Clone)]
pub struct Axis {
    /// This rank's place on the axis.
    pub rank: i64,
    /// Ranks on the axis.
    pub size: i64,
    /// These ranks, for collectives.
    pub group: Group,
}

impl Axis {
    /// The axis of the ranks of `group`.
    pub fn of(group: Group) -> Axis {
        Axis { rank: group.rank(), size: group.size(), group }
    }

    /// An axis of one rank.
    pub fn solo() -> Axis {
        Axis::of(Group::solo())
    }

    /// This rank's place on the axis.
    pub fn place(&self) -> Place {
        Place { rank: self.rank, size: self.size }
    }

    /// This rank's part of `n` things, which lie over the axis in order and in equal parts; where `n` does not divide, the last
    /// parts are smaller.
    pub fn share(&self, n: usize) -> Range<usize> {
        share(n, self.rank as usize, self.size as usize)
    }

    /// This rank's of `n` things that the ranks take in turn: for what differs in cost.
    pub fn turns(&self, n: usize) -> impl Iterator<Item = usize> + use<> {
        (self.rank as usize..n).step_by(self.size as usize)
    }
}

/// A place on an axis, without the axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// From 0.
    pub rank: i64,
    /// Places on the axis.
    pub size: i64,
}

/// The part of rank `rank` of `ranks`.
fn share(n: usize, rank: usize, ranks: usize) -> Range<usize> {
    let part = n.div_ceil(ranks);
    (rank * part).min(n)..((rank + 1) * part).min(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_taken_by_all() {
        let axis = |rank| Axis { rank, size: 3, group: Group::solo() };
        let turns: Vec<Vec<usize>> = (0..3).map(|rank| axis(rank).turns(5).collect()).collect();
        assert_eq!(turns, [vec![0, 3], vec![1, 4], vec![2]]);
    }

    #[test]
    fn shares_are_equal_and_in_order() {
        for (n, ranks) in [(12, 4), (12, 1), (0, 3), (1, 3), (7, 3), (10, 4), (3, 8)] {
            let parts: Vec<Range<usize>> = (0..ranks).map(|rank| share(n, rank, ranks)).collect();
            let all: Vec<usize> = parts.iter().cloned().flatten().collect();
            assert_eq!(all, (0..n).collect::<Vec<_>>(), "{n} over {ranks}");
            let most = n.div_ceil(ranks);
            assert!(parts.iter().all(|p| p.len() <= most), "{n} over {ranks}: {parts:?}");
            assert!(n % ranks != 0 || parts.iter().all(|p| p.len() == most), "{n} over {ranks}: {parts:?}");
        }
    }
}
