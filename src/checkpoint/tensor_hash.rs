//! A hash of a model's tensors that does not depend on who reads which part of them: ranks add up what each has read.

use std::fmt;

use kernels::comm::{Group, ReduceOp};

use crate::error::Result;
use crate::random::hash;

/// 2^61 - 1, a prime.
const P: u64 = (1 << 61) - 1;

/// The sum over all words of w_i r_i modulo 2^61 - 1, where w_i are the tensors' bytes, eight at a time as little-endian
/// numbers, and r_i is a pseudo-random number of the tensor's name and i. It tells models apart that differ by accident (two
/// of them are equal with a probability of 2^-61); it is no protection against forgery.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TensorHash(u64);

impl TensorHash {
    /// Adds bytes `first..` of the flattened tensor `name`. Every byte of a tensor is to be added once, in any order.
    pub fn add(&mut self, name: &str, first: u64, bytes: &[u8]) {
        let key = name.bytes().fold(hash(name.len() as u64), |key, byte| hash(key ^ u64::from(byte)));
        let mut term = |at: u64, word: u64| {
            let product = u128::from(word) * u128::from(hash(key.wrapping_add(at)) & P);
            let folded = (product as u64 & P) + ((product >> 61) as u64 & P) + (product >> 122) as u64;
            self.0 = reduced(self.0 + reduced(folded));
        };
        // A word that is read in two parts is the sum of both, with zeros in the place of what is missing.
        let (head, words) = bytes.split_at(((8 - first % 8) % 8).min(bytes.len() as u64) as usize);
        if !head.is_empty() {
            let mut word = [0; 8];
            word[(first % 8) as usize..][..head.len()].copy_from_slice(head);
            term(first / 8, u64::from_le_bytes(word));
        }
        let at = first.div_ceil(8);
        let (words, tail) = words.as_chunks::<8>();
        for (at, word) in (at..).zip(words) {
            term(at, u64::from_le_bytes(*word));
        }
        if !tail.is_empty() {
            let mut word = [0; 8];
            word[..tail.len()].copy_from_slice(tail);
            term(at + words.len() as u64, u64::from_le_bytes(word));
        }
    }

    /// Of the parts of a model together.
    pub fn plus(self, other: TensorHash) -> TensorHash {
        TensorHash(reduced(self.0 + other.0))
    }

    /// Of what all ranks of a group have read. Collective.
    pub fn over(self, group: &Group) -> Result<TensorHash> {
        if group.size() == 1 {
            return Ok(self);
        }
        // Halves whose sums are exact in float64.
        let halves = [(self.0 >> 31) as f64, (self.0 & 0x7fff_ffff) as f64];
        let sums = group.combine(&halves, ReduceOp::Sum)?;
        let sum = (sums[0] as u128) * (1 << 31) + sums[1] as u128;
        Ok(TensorHash((sum % u128::from(P)) as u64))
    }
}

/// Modulo 2^61 - 1, of a number below 2^64.
fn reduced(x: u64) -> u64 {
    let x = (x & P) + (x >> 61);
    if x >= P { x - P } else { x }
}

impl fmt::Display for TensorHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, word by word.
    fn slow(tensors: &[(&str, &[u8])]) -> u64 {
        let mut sum = 0u128;
        for (name, bytes) in tensors {
            let key = name.bytes().fold(hash(name.len() as u64), |key, byte| hash(key ^ u64::from(byte)));
            for (i, chunk) in bytes.chunks(8).enumerate() {
                let word = chunk.iter().rev().fold(0u128, |w, b| (w << 8) | u128::from(*b));
                sum += word * u128::from(hash(key.wrapping_add(i as u64)) & P) % u128::from(P);
            }
        }
        (sum % u128::from(P)) as u64
    }

    #[test]
    fn the_hash_does_not_depend_on_how_tensors_are_cut() {
        let bytes = |seed: u64, n: u64| -> Vec<u8> { (0..n).map(|i| hash(seed ^ hash(i)) as u8).collect() };
        let (a, b) = (bytes(1, 1003), [bytes(2, 64), vec![255; 40]].concat());
        let right = slow(&[("a", &a), ("b", &b)]);
        for cut in [1, 2, 3, 7, 8, 9, 64, 250, 2000] {
            let parts = a.chunks(cut).enumerate().map(|(i, part)| ("a", i * cut, part));
            let mut parts: Vec<_> =
                parts.chain(b.chunks(cut).enumerate().map(|(i, p)| ("b", i * cut, p))).collect();
            parts.reverse();
            let (mut one, mut other) = (TensorHash::default(), TensorHash::default());
            for (i, (name, first, part)) in parts.into_iter().enumerate() {
                if i % 3 == 0 { &mut one } else { &mut other }.add(name, first as u64, part);
            }
            assert_eq!(one.plus(other), TensorHash(right), "cut by {cut}");
        }
    }

    #[test]
    fn any_change_is_seen() {
        let bytes: Vec<u8> = (0..64).collect();
        let hash = |name, bytes: &[u8]| {
            let mut hash = TensorHash::default();
            hash.add(name, 0, bytes);
            hash
        };
        let right = hash("w", &bytes);
        assert_ne!(right, hash("v", &bytes), "another name");
        for at in 0..64 {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                assert_ne!(right, hash("w", &changed), "bit {bit} of byte {at}");
                // Two equal changes, such as signs, do not cancel out.
                changed[(at + 8) % 64] ^= 1 << bit;
                assert_ne!(right, hash("w", &changed), "bit {bit} of two words");
            }
        }
        let mut swapped = bytes.clone();
        swapped.rotate_left(8);
        assert_ne!(right, hash("w", &swapped), "another order");
    }

    #[test]
    fn ranks_add_up() {
        let bytes: Vec<u8> = (0..1000).map(|i| hash(i) as u8).collect();
        let mut whole = TensorHash::default();
        whole.add("w", 0, &bytes);
        for ranks in [2, 3] {
            let parts = testing::ranks::on_ranks(ranks, |group| {
                let mut mine = TensorHash::default();
                for (i, part) in
                    bytes.chunks(13).enumerate().filter(|(i, _)| *i as i64 % ranks == group.rank())
                {
                    mine.add("w", 13 * i as u64, part);
                }
                mine.over(&group).unwrap()
            });
            assert!(parts.iter().all(|sum| *sum == whole), "{parts:?} {whole}");
        }
    }
}
