//! Batches of token windows for pretraining and validation, in an order that depends on the seed and the data
//! alone: not on the world size, the micro-batch or where the run was stopped.

use super::order::{self, SourceTree, weights};
use super::position::Indexed;
use super::shards::TokenSet;
use super::tokenizer::hex;
use crate::error::{Error, Result};
use crate::random::Rng;
use sha2::{Digest, Sha256};

/// Labels that no loss is computed for.
pub const IGNORE: i64 = -100;

pub use super::order::WeightedSource;

/// Shards of at most this many bytes are read whole and checked when a loader is made, larger ones while it works.
const VERIFY_BYTES: usize = 256 << 20;

/// The order of samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowOrder {
    /// Training: shuffled anew every epoch, without end.
    Shuffled { seed: u64 },
    /// Validation: every token once, source by source, the last window of a source padded.
    Sequential,
}

/// `rows` samples of `columns` tokens, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBatch {
    /// `[rows, columns]`.
    pub input_ids: Vec<i64>,
    /// `[rows, columns]`: the next token; `IGNORE` after a source's end.
    pub labels: Vec<i64>,
    pub rows: usize,
    pub columns: usize,
}

/// Gives sample `i` of an endless sequence (of one pass, in `WindowOrder::Sequential`). A sample is a window of
/// `sequence_length + 1` tokens; windows lie `sequence_length` apart, so that the last token of one is the first
/// of the next and every token is predicted once. From the second epoch on, windows begin at another offset.
pub struct Loader {
    /// Sources in the order given; those of a pool are shuffled together.
    pools: Vec<Pool>,
    mixture: SourceTree,
    order: WindowOrder,
    sequence_length: u64,
    fingerprint: String,
}

struct Pool {
    sets: Vec<TokenSet>,
    /// Where each set's windows begin, and at the end the number of windows.
    starts: Vec<u64>,
}

impl Indexed for Loader {
    const ITEM: &'static str = "sample";
    const DECIDES: &'static str = "the token shards, their weights, the sequence length or the seed";

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

impl Loader {
    /// Opens the sources and checks them against the tokenizer (`Tokenizer::hash`) and the model's vocabulary.
    /// Shards up to 256 MiB are read and checked in full; where a larger one is damaged, `sample` fails once that is found.
    pub fn new(
        sources: &[WeightedSource],
        tokenizer_hash: Option<[u8; 32]>,
        vocab_size: usize,
        sequence_length: usize,
        order: WindowOrder,
    ) -> Result<Self> {
        if sources.is_empty() {
            return Err(Error::config("there is no data: name at least one folder of token shards"));
        }
        if sequence_length == 0 {
            return Err(Error::config("the sequence length must be at least 1"));
        }
        let weights = weights(sources)?;
        if weights.is_some() && order == WindowOrder::Sequential {
            return Err(Error::config("validation data is read once as a whole; leave its weights out"));
        }
        let length = sequence_length as u64;
        let mut sets = Vec::new();
        for source in sources {
            let set = TokenSet::open(&source.path)?;
            set.check(tokenizer_hash, vocab_size)?;
            set.verify_by_size(VERIFY_BYTES)?;
            let needed = if order == WindowOrder::Sequential { 2 } else { length + 1 };
            if set.num_tokens() < needed {
                return Err(Error::data(format!(
                    "{}: {} tokens are too few: a sample of sequence length {length} needs {needed}; give more text \
                     or a shorter sequence length",
                    source.path.display(),
                    set.num_tokens()
                )));
            }
            sets.push(set);
        }
        let fingerprint = fingerprint(&sets, sources, sequence_length, order);
        let groups = if weights.is_some() { sets.into_iter().map(|s| vec![s]).collect() } else { vec![sets] };
        let pools = groups.into_iter().map(|sets| Pool::new(sets, length, order)).collect();
        let mixture = SourceTree::new(&weights.unwrap_or(vec![1.0]));
        Ok(Loader { pools, mixture, order, sequence_length: length, fingerprint })
    }

    /// Windows of one epoch over all sources.
    pub fn num_windows(&self) -> u64 {
        self.pools.iter().map(Pool::num_windows).sum()
    }

    pub fn num_tokens(&self) -> u64 {
        self.sets().map(TokenSet::num_tokens).sum()
    }

    /// Bytes of UTF-8 text behind the tokens, for bits per byte.
    pub fn text_bytes(&self) -> u64 {
        self.sets().map(TokenSet::text_bytes).sum()
    }

    /// The sources, in the order given.
    pub fn sets(&self) -> impl Iterator<Item = &TokenSet> {
        self.pools.iter().flat_map(|p| &p.sets)
    }

    /// Sample `index`: `sequence_length + 1` token ids, `IGNORE` after a source's end (only sequentially). Fails
    /// where a shard holds an id beyond its vocabulary, and beyond the last window of a sequential loader.
    pub fn sample(&self, index: u64) -> Result<Vec<i64>> {
        let mut out = Vec::with_capacity(self.sequence_length as usize + 1);
        let (pool_index, index) = self.mixture.locate(index);
        let (pool, length) = (&self.pools[pool_index], self.sequence_length);
        let n = pool.num_windows();
        let WindowOrder::Shuffled { seed } = self.order else {
            if index >= n {
                return Err(Error::failed(format!("sample {index} was asked for, there are {n}")));
            }
            let (set, window, _) = pool.window(index);
            let end = set.num_tokens().min((window + 1) * length + 1);
            set.read(window * length, end, &mut out)?;
            out.resize(length as usize + 1, IGNORE);
            return Ok(out);
        };
        let (shuffled, epoch) = order::shuffled(seed, pool_index, n, index);
        let (set, window, set_index) = pool.window(shuffled);
        let offset = match epoch {
            0 => 0,
            _ => {
                let key = epoch << 32 | (pool_index as u64) << 16 | set_index as u64;
                Rng::new(seed, "loader.offset", key).below(length)
            }
        };
        // The stream is taken as a circle, so that every epoch has as many windows.
        let (start, size) = (offset + window * length, set.num_tokens());
        let end = start + length + 1;
        set.read(start.min(size), end.min(size), &mut out)?;
        if end > size {
            set.read(start.max(size) - size, end - size, &mut out)?;
        }
        Ok(out)
    }

    /// Samples `first..first + count`.
    pub fn batch(&self, first: u64, count: usize) -> Result<TokenBatch> {
        let columns = self.sequence_length as usize;
        let mut batch = TokenBatch { input_ids: Vec::new(), labels: Vec::new(), rows: count, columns };
        for index in first..first + count as u64 {
            let sample = self.sample(index)?;
            // A padded input may be any token: nothing before it sees it, and it has no label.
            batch.input_ids.extend(sample[..columns].iter().map(|id| (*id).max(0)));
            batch.labels.extend(&sample[1..]);
        }
        Ok(batch)
    }
}

fn fingerprint(
    sets: &[TokenSet],
    sources: &[WeightedSource],
    sequence_length: usize,
    order: WindowOrder,
) -> String {
    let mut text = format!("{sequence_length} {order:?}");
    for (set, source) in sets.iter().zip(sources) {
        text.push_str(&format!("; {:?} {}", source.weight, hex(&set.tokenizer_hash())));
        for header in set.headers() {
            text.push_str(&format!(" {}:{:08x}", header.num_tokens, header.crc));
        }
    }
    hex(&Sha256::digest(text.as_bytes())[..8])
}

impl Pool {
    fn new(sets: Vec<TokenSet>, length: u64, order: WindowOrder) -> Self {
        let mut starts = vec![0];
        for set in &sets {
            let predicted = set.num_tokens() - 1;
            let windows = if order == WindowOrder::Sequential {
                predicted.div_ceil(length)
            } else {
                predicted / length
            };
            starts.push(starts[starts.len() - 1] + windows);
        }
        Pool { sets, starts }
    }

    fn num_windows(&self) -> u64 {
        self.starts[self.sets.len()]
    }

    /// Window `i` of the pool: its set, its number there, the set's number.
    fn window(&self, i: u64) -> (&TokenSet, u64, usize) {
        let set = self.starts.partition_point(|s| *s <= i) - 1;
        (&self.sets[set], i - self.starts[set], set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::position::{Position, Positioned};
    use crate::data::shards::tests::write;
    use std::collections::HashSet;
    use testing::folder::TestFolder;

    /// Sources whose tokens count up from `1000 * source`, so that a sample tells where it comes from.
    fn sources(folder: &TestFolder, sizes: &[usize], weights: &[f64]) -> Vec<WeightedSource> {
        let source = |(i, size): (usize, &usize)| {
            let path = folder.0.join(format!("source-{i}"));
            let tokens: Vec<u32> = (0..*size as u32).map(|t| 1000 * i as u32 + t).collect();
            write(&path, &tokens, 10, 10_000, 70);
            WeightedSource { path, weight: weights.get(i).copied() }
        };
        sizes.iter().enumerate().map(source).collect()
    }

    fn loader(sources: &[WeightedSource], length: usize, order: WindowOrder) -> Loader {
        Loader::new(sources, Some([7; 32]), 10_000, length, order).unwrap()
    }

    const SHUFFLED: WindowOrder = WindowOrder::Shuffled { seed: 3 };

    #[test]
    fn an_epoch_has_every_window_once_and_epochs_differ() {
        let folder = TestFolder::new("loader-epochs");
        let sources = sources(&folder, &[205, 333], &[]);
        let loader = loader(&sources, 8, SHUFFLED);
        assert_eq!((loader.num_windows(), loader.num_tokens()), (25 + 41, 538));
        let n = loader.num_windows();
        let epoch = |e: u64| (e * n..(e + 1) * n).map(|i| loader.sample(i).unwrap()).collect::<Vec<_>>();
        let first = epoch(0);
        let mut starts: Vec<i64> = first.iter().map(|s| s[0]).collect();
        assert!(starts.windows(2).any(|w| w[1] < w[0]), "not shuffled");
        starts.sort();
        assert_eq!(starts, (0..25).map(|w| 8 * w).chain((0..41).map(|w| 1000 + 8 * w)).collect::<Vec<_>>());
        assert!(first.iter().all(|s| s.len() == 9 && s.windows(2).all(|w| w[1] == w[0] + 1)));
        let mut orders = HashSet::from([first]);
        for e in 1..5 {
            let samples = epoch(e);
            // Every token is predicted at most once, and all but the remainder of a window are.
            let predicted: HashSet<i64> = samples.iter().flat_map(|s| s[1..].to_vec()).collect();
            assert_eq!(predicted.len() as u64, 8 * n);
            assert!(samples.iter().all(|s| s.windows(2).filter(|w| w[1] != w[0] + 1).count() <= 1));
            assert!(orders.insert(samples), "epoch {e} repeats another");
        }
    }

    #[test]
    fn the_sequence_does_not_depend_on_ranks_or_micro_batches_and_resumes_exactly() {
        let folder = TestFolder::new("loader-ranks");
        let sources = sources(&folder, &[500, 300], &[2.0, 1.0]);
        let whole = loader(&sources, 16, SHUFFLED).batch(0, 48).unwrap();
        for (ranks, micro) in [(1, 4), (2, 4), (4, 2), (4, 1)] {
            let (mut ids, mut labels, mut next) = (Vec::new(), Vec::new(), 0);
            while next < 48 {
                // One micro-batch of every rank; in the middle, a restart from the saved position.
                let loader = loader(&sources, 16, SHUFFLED);
                let state: Position =
                    serde_json::from_str(&serde_json::to_string(&loader.at(next)).unwrap()).unwrap();
                loader.check(&state).unwrap();
                next = state.next;
                for rank in 0..ranks {
                    let batch = loader.batch(next + rank * micro, micro as usize).unwrap();
                    assert_eq!((batch.rows, batch.columns), (micro as usize, 16));
                    ids.extend(batch.input_ids);
                    labels.extend(batch.labels);
                }
                next += ranks * micro;
            }
            assert!(ids == whole.input_ids && labels == whole.labels, "{ranks} ranks, micro-batch {micro}");
        }
        for row in 0..48 {
            let at = row * 16;
            assert_eq!(whole.labels[at..at + 15], whole.input_ids[at + 1..at + 16]);
        }
    }

    #[test]
    fn a_position_in_other_data_is_refused() {
        let folder = TestFolder::new("loader-fingerprint");
        let plain = sources(&folder, &[500, 300], &[]);
        let weighted = sources(&folder, &[500, 300], &[2.0, 1.0]);
        let state = loader(&plain, 16, SHUFFLED).at(7);
        let others = [
            loader(&plain, 17, SHUFFLED),
            loader(&plain, 16, WindowOrder::Shuffled { seed: 4 }),
            loader(&weighted, 16, SHUFFLED),
            loader(&plain[..1], 16, SHUFFLED),
        ];
        for other in &others {
            let e = other.check(&state).err().unwrap();
            assert!(e.message.contains("stands at sample 7 of other data"), "{e}");
        }
        let moved = folder.0.join("moved");
        std::fs::rename(&plain[0].path, &moved).unwrap();
        let moved = [WeightedSource { path: moved, weight: None }, plain[1].clone()];
        assert!(loader(&moved, 16, SHUFFLED).check(&state).is_ok() && state.next == 7);
    }

    #[test]
    fn sources_are_mixed_by_weight_at_every_moment() {
        let folder = TestFolder::new("loader-weights");
        let weights = [0.5, 0.3, 0.2];
        let sources = sources(&folder, &[500, 300, 100], &weights.map(|w| 7.0 * w));
        let loader = loader(&sources, 16, SHUFFLED);
        let mut counts = [0i64; 3];
        let mut seen = HashSet::new();
        for n in 0..400u64 {
            let sample = loader.sample(n).unwrap();
            counts[sample[0] as usize / 1000] += 1;
            seen.insert(sample[0]);
            for (count, weight) in counts.iter().zip(weights) {
                let exact = (n + 1) as f64 * weight;
                assert!((count - exact.round() as i64).abs() <= 1, "after {}: {counts:?}", n + 1);
            }
        }
        assert!((0..31).all(|w| seen.contains(&(16 * w))), "the first epoch of source 0 has all its windows");
    }

    #[test]
    fn the_mixture_is_within_one_for_any_weights() {
        let mut rng = Rng::new(1, "weights", 0);
        for _ in 0..200 {
            let k = 1 + rng.below(12) as usize;
            let weights: Vec<f64> = (0..k).map(|_| rng.uniform().powi(3) + 1e-4).collect();
            let total: f64 = weights.iter().sum();
            let mixture = SourceTree::new(&weights);
            let mut counts = vec![0u64; k];
            for n in 0..2000 {
                let (pool, before) = mixture.locate(n);
                assert_eq!(before, counts[pool]);
                counts[pool] += 1;
                for (count, weight) in counts.iter().zip(&weights) {
                    let exact = ((n + 1) as f64 * weight / total).round() as i64;
                    assert!((*count as i64 - exact).abs() <= 1, "{weights:?} after {}: {counts:?}", n + 1);
                }
            }
        }
        let (mut counts, far) = ([0u64; 2], 1u64 << 50);
        let mixture = SourceTree::new(&[0.9, 0.1]);
        (far..far + 1000).for_each(|n| counts[mixture.locate(n).0] += 1);
        assert_eq!(counts, [900, 100]);
    }

    #[test]
    fn validation_predicts_every_token_once() {
        let folder = TestFolder::new("loader-valid");
        let sources = sources(&folder, &[205, 2, 97, 50], &[]);
        for length in [1, 7, 8, 64, 1000] {
            let loader = loader(&sources, length, WindowOrder::Sequential);
            let n = loader.num_windows();
            let batch = loader.batch(0, n as usize).unwrap();
            let labels: Vec<i64> = batch.labels.iter().copied().filter(|l| *l != IGNORE).collect();
            let expected: Vec<i64> = [(0, 205), (1, 2), (2, 97), (3, 50)]
                .iter()
                .flat_map(|&(i, size)| (1..size).map(move |t| 1000 * i + t))
                .collect();
            assert_eq!(labels, expected, "length {length}");
            for (input, label) in batch.input_ids.iter().zip(&batch.labels) {
                assert!(*label == IGNORE && *input >= 0 || *label == input + 1);
            }
            assert!(loader.sample(n).is_err());
        }
    }

    #[test]
    fn unusable_sources_are_refused() {
        let folder = TestFolder::new("loader-bad");
        let good = sources(&folder, &[100, 100], &[]);
        let new = |sources: &[WeightedSource], length| {
            Loader::new(sources, Some([7; 32]), 10_000, length, SHUFFLED)
        };
        let error = |sources: &[WeightedSource], length| new(sources, length).err().unwrap();
        assert!(new(&good, 99).is_ok());
        assert!(error(&good, 100).message.contains("100 tokens are too few"));
        assert_eq!(error(&[], 8).exit_code(), 2);
        assert_eq!(error(&good, 0).exit_code(), 2);
        let weigh = |a, b| {
            [WeightedSource { weight: a, ..good[0].clone() }, WeightedSource { weight: b, ..good[1].clone() }]
        };
        assert!(error(&weigh(Some(1.0), None), 8).message.contains("has no weight"));
        for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(error(&weigh(Some(1.0), Some(weight)), 8).message.contains("must be positive"));
        }
        let e = Loader::new(&good, Some([8; 32]), 10_000, 8, SHUFFLED).err().unwrap();
        assert!(e.exit_code() == 3 && e.message.contains("another tokenizer"), "{e}");
        let weighted = weigh(Some(1.0), Some(1.0));
        let e = Loader::new(&weighted, None, 10_000, 8, WindowOrder::Sequential).err().unwrap();
        assert!(e.message.contains("leave its weights out"), "{e}");
        let path = good[1].path.join("shard-00000.tokens");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[140] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let e = error(&good, 8);
        assert!(
            e.exit_code() == 3 && e.message.contains("source-1") && e.message.contains("checksum"),
            "{e}"
        );
    }
}
