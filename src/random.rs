//! Random numbers keyed by what they are for, never by rank or by call order.

/// Scrambles 64 bits; every output bit depends on every input bit (the finalizer of splitmix64).
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The first number of splitmix64 from the state `x`; unlike [`mix`] not 0 at 0.
pub fn hash(x: u64) -> u64 {
    mix(x.wrapping_add(GAMMA))
}

fn joined(key: u64, part: u64) -> u64 {
    mix(key.wrapping_add(GAMMA) ^ mix(part.wrapping_add(GAMMA)))
}

/// A stream of random numbers for (seed, purpose, index): splitmix64 (Steele, Lea, Flood 2014), whose n-th
/// number is a function of the key and n alone.
#[derive(Debug, Clone)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// `purpose` names the use (`"sft.train"`, `"dropout"`); `index` is the item's number within it.
    pub fn new(seed: u64, purpose: &str, index: u64) -> Self {
        Rng { state: joined(Rng::key(seed, purpose), index) }
    }

    /// What a stream's key is but for the index: kernels/cuda/sample.cu goes on from it.
    pub fn key(seed: u64, purpose: &str) -> u64 {
        let purpose = purpose
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3));
        joined(joined(0x243f_6a88_85a3_08d3, seed), purpose)
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GAMMA);
        mix(self.state)
    }

    /// Uniform in `0..n`, without bias (Lemire 2019). `n` must be positive.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "below(0): there is no number to draw");
        loop {
            let product = self.next_u64() as u128 * n as u128;
            if product as u64 >= n.wrapping_neg() % n {
                return (product >> 64) as u64;
            }
        }
    }

    /// Uniform in `low..=high`.
    pub fn range(&mut self, low: i64, high: i64) -> i64 {
        assert!(low <= high, "range({low}, {high}) is empty");
        low + self.below((high - low) as u64 + 1) as i64
    }

    /// Uniform in `[0, 1)`, with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One of `items`, which must not be empty.
    pub fn choose<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }
}

/// A permutation of `0..n` that is computed, not stored: a Feistel network over the next even number of bits,
/// walked until it lands inside (Black and Rogaway 2002). O(1) memory, at most 4 steps expected.
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; 6],
}

impl Permutation {
    /// The permutation of `0..n` for (seed, purpose, index).
    pub fn new(n: u64, seed: u64, purpose: &str, index: u64) -> Self {
        let bits = 64 - n.saturating_sub(1).leading_zeros();
        let mut rng = Rng::new(seed, purpose, index);
        Permutation { n, half_bits: bits.div_ceil(2).max(1), keys: std::array::from_fn(|_| rng.next_u64()) }
    }

    /// Where `i < n` goes.
    pub fn apply(&self, i: u64) -> u64 {
        assert!(i < self.n, "{i} is not below {}", self.n);
        let mut x = i;
        loop {
            x = self.network(x);
            if x < self.n {
                return x;
            }
        }
    }

    fn network(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right.wrapping_add(key)) & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_and_differ_by_every_part_of_the_key() {
        let first = |seed, purpose: &str, index| Rng::new(seed, purpose, index).next_u64();
        assert_eq!(first(1, "a", 2), first(1, "a", 2));
        let all = [first(1, "a", 2), first(2, "a", 2), first(1, "b", 2), first(1, "a", 3), first(2, "a", 1)];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b), "{all:?}");
        }
    }

    #[test]
    fn draws_are_uniform() {
        let mut rng = Rng::new(7, "test", 0);
        let mut counts = [0f64; 10];
        let n = 100_000;
        for _ in 0..n {
            counts[rng.below(10) as usize] += 1.0;
        }
        let expected = n as f64 / 10.0;
        let chi2: f64 = counts.iter().map(|c| (c - expected).powi(2) / expected).sum();
        assert!(chi2 < 27.9, "chi2 {chi2} with 9 degrees of freedom: p < 0.001");
        let mean = (0..n).map(|_| rng.uniform()).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.004, "mean {mean}");
        assert!((0..1000).all(|_| (-3..=4).contains(&rng.range(-3, 4))));
    }

    #[test]
    fn permutations_are_bijections_that_depend_on_the_key() {
        for n in [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097, 70_001] {
            let p = Permutation::new(n, 1, "p", 0);
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                let to = p.apply(i) as usize;
                assert!(!seen[to], "n {n}: {to} is hit twice");
                seen[to] = true;
            }
        }
        let (a, b) = (Permutation::new(1000, 1, "p", 0), Permutation::new(1000, 1, "p", 1));
        let same = (0..1000).filter(|&i| a.apply(i) == b.apply(i)).count();
        let fixed = (0..1000).filter(|&i| a.apply(i) == i).count();
        assert!(same < 10 && fixed < 10, "{same} equal images, {fixed} fixed points");
        let neighbours = (0..999).filter(|&i| a.apply(i).abs_diff(a.apply(i + 1)) == 1).count();
        assert!(neighbours < 15, "{neighbours} neighbours stay neighbours");
        let big = Permutation::new(u64::MAX / 2, 3, "p", 0);
        assert_ne!(big.apply(5), big.apply(6));
    }
}
