//! Rows of tokenized examples for training and validation, in an order that depends on the seed and the data alone: not
//! on the world size, the micro-batch or where the run was stopped.

use sha2::{Digest, Sha256};

use super::examples::{Encoded, Example, ExampleCounts, Examples};
use super::loader::{IGNORE, WindowOrder};
use super::odd::OddRecords;
use super::order::{self, SourceTree};
use super::packing::best_fit_decreasing;
use super::position::Indexed;
use super::tokenizer::hex;
use crate::config::sections::OnError;
use crate::error::{Error, Result};
use crate::telemetry::console::grouped;

/// Rows of one micro-batch, `rows` times `columns` numbers each, row by row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rows {
    pub input_ids: Vec<i64>,
    /// The token that each position is to predict; [`IGNORE`] where the loss counts nothing.
    pub labels: Vec<i64>,
    /// Restarted in every document of a row.
    pub positions: Vec<i64>,
    /// The first position of the row that each position sees: where its document begins.
    pub starts: Vec<i64>,
    pub rows: usize,
    pub columns: usize,
}

impl Rows {
    /// Adds documents as one row, padded at its end to `columns`.
    pub fn push(&mut self, documents: &[Encoded], columns: usize) {
        debug_assert!(self.rows == 0 || self.columns == columns, "rows have one length");
        (self.rows, self.columns) = (self.rows + 1, columns);
        let mut begin = 0;
        for document in documents {
            let n = document.ids.len();
            self.input_ids.extend(document.ids.iter().map(|id| i64::from(*id)));
            let next = |i: usize| match document.supervised.get(i + 1) {
                Some(true) => i64::from(document.ids[i + 1]),
                _ => IGNORE,
            };
            self.labels.extend((0..n).map(next));
            self.positions.extend(0..n as i64);
            self.starts.extend(std::iter::repeat_n(begin as i64, n));
            begin += n;
        }
        // Padding is a document of its own, without labels: nothing sees it. Any token will do.
        let padding = columns - begin;
        self.input_ids.extend(std::iter::repeat_n(0, padding));
        self.labels.extend(std::iter::repeat_n(IGNORE, padding));
        self.positions.extend(0..padding as i64);
        self.starts.extend(std::iter::repeat_n(begin as i64, padding));
    }
}

/// A file's examples and its weight in the mixture.
pub struct RowSource {
    pub examples: Examples,
    pub weight: Option<f64>,
}

/// Refuses records that cannot be used, those of all sources in one message, unless `on_error` says to skip them.
pub fn check_records<'a>(on_error: OnError, sources: impl IntoIterator<Item = &'a RowSource>) -> Result<()> {
    let mut odd = OddRecords::default();
    sources.into_iter().for_each(|s| odd.merge(s.examples.odd()));
    odd.check(on_error)
}

/// Why a file gives no example.
fn nothing_left(examples: &Examples) -> String {
    let (path, records) = (examples.path().display(), examples.counts().records);
    match records {
        0 => format!("{path}: there are no records (in this stage's part of data.split, if that is set)"),
        n => format!("{path}: no example is left of {} records: {}", grouped(n), examples.reasons()),
    }
}

/// Gives row `i` of an endless sequence (of one pass, in [`WindowOrder::Sequential`]): one example, or with packing the
/// examples that fill a row best.
pub struct RowLoader {
    sources: Vec<Examples>,
    /// Without weights one pool of all sources, else one for each.
    pools: Vec<Vec<RowOfTokens>>,
    mixture: SourceTree,
    order: WindowOrder,
    sequence_length: usize,
    packing: bool,
    fingerprint: String,
}

/// The examples of a row: source and number.
type RowOfTokens = Vec<(u32, u32)>;

impl Indexed for RowLoader {
    const ITEM: &'static str = "row";
    const DECIDES: &'static str =
        "the files, their weights, the tokenizer, the template, the options of `data` or the seed";

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

impl RowLoader {
    /// # Errors
    /// A source without examples; weights on some sources only.
    pub fn new(
        sources: Vec<RowSource>,
        sequence_length: usize,
        packing: bool,
        order: WindowOrder,
    ) -> Result<Self> {
        let given = sources.iter().filter(|s| s.weight.is_some()).count();
        if given != 0 && (given != sources.len() || order == WindowOrder::Sequential) {
            return Err(Error::key("data.train", "give all sources a weight or none"));
        }
        let weights: Vec<f64> = sources.iter().filter_map(|s| s.weight).collect();
        let mut text = format!("{sequence_length} {packing} {order:?} {weights:?}");
        sources.iter().for_each(|s| text.push_str(s.examples.key()));
        let sources: Vec<Examples> = sources.into_iter().map(|s| s.examples).collect();
        let all = |source: usize| (0..sources[source].len() as u32).map(move |i| (source as u32, i));
        let pools: Vec<RowOfTokens> = match weights.is_empty() {
            true => vec![(0..sources.len()).flat_map(all).collect()],
            false => (0..sources.len()).map(|s| all(s).collect()).collect(),
        };
        let empty: Vec<String> = sources.iter().filter(|s| s.is_empty()).map(nothing_left).collect();
        if pools.iter().any(Vec::is_empty) {
            return Err(Error::data(match empty.is_empty() {
                true => "there are no files to take examples from: name at least one path".to_string(),
                false => empty.join("\n"),
            }));
        }
        let length = |(s, i): &(u32, u32)| sources[*s as usize].length(*i as usize);
        let rows = |pool: RowOfTokens| match packing {
            false => pool.into_iter().map(|example| vec![example]).collect(),
            true => {
                let lengths: Vec<usize> = pool.iter().map(length).collect();
                let packed = best_fit_decreasing(&lengths, sequence_length);
                packed.into_iter().map(|row| row.into_iter().map(|i| pool[i]).collect()).collect()
            }
        };
        let pools: Vec<Vec<RowOfTokens>> = pools.into_iter().map(rows).collect();
        let mixture = SourceTree::new(if weights.is_empty() { &[1.0] } else { &weights });
        let fingerprint = hex(&Sha256::digest(text.as_bytes())[..8]);
        Ok(RowLoader { sources, pools, mixture, order, sequence_length, packing, fingerprint })
    }

    /// Rows of one epoch over all sources.
    pub fn num_rows(&self) -> u64 {
        self.pools.iter().map(|pool| pool.len() as u64).sum()
    }

    /// The counts of all sources together.
    pub fn counts(&self) -> ExampleCounts {
        let mut counts = ExampleCounts::default();
        self.sources.iter().for_each(|s| counts.add(s.counts()));
        counts
    }

    /// Records of all sources that cannot be used.
    pub fn odd(&self) -> OddRecords {
        let mut odd = OddRecords::default();
        self.sources.iter().for_each(|s| odd.merge(s.odd()));
        odd
    }

    /// Why each source that gives no example gives none.
    pub fn empty_sources(&self) -> impl Iterator<Item = String> {
        self.sources.iter().filter(|s| s.is_empty()).map(nothing_left)
    }

    /// The sources' examples, in the order given.
    pub fn sources(&self) -> &[Examples] {
        &self.sources
    }

    /// The share of an epoch's positions that is padding, where rows have `sequence_length` columns.
    pub fn padding(&self) -> f64 {
        1.0 - self.counts().tokens as f64 / (self.num_rows() * self.sequence_length as u64) as f64
    }

    fn row(&self, index: u64) -> &[(u32, u32)] {
        let (pool, index) = self.mixture.locate(index);
        let n = self.pools[pool].len() as u64;
        let i = match self.order {
            WindowOrder::Shuffled { seed } => order::shuffled(seed, pool, n, index).0,
            WindowOrder::Sequential => index,
        };
        &self.pools[pool][i as usize]
    }

    /// Supervised tokens and all tokens of rows `first..first + count`.
    pub fn count(&self, first: u64, count: u64) -> (u64, u64) {
        let examples = (first..first + count).flat_map(|i| self.row(i));
        examples.fold((0, 0), |(supervised, tokens), (s, i)| {
            let (source, i) = (&self.sources[*s as usize], *i as usize);
            (supervised + source.num_supervised(i) as u64, tokens + source.length(i) as u64)
        })
    }

    /// The source and the number in it of example `index` of a loader that packs nothing.
    pub fn place(&self, index: u64) -> (usize, usize) {
        let (source, i) = self.row(index)[0];
        (source as usize, i as usize)
    }

    /// Example `index` of a loader that packs nothing.
    pub fn example(&self, index: u64) -> Example {
        let (source, i) = self.place(index);
        self.sources[source].get(i)
    }

    /// Rows `first..first + count` of conversations. Packed rows have `sequence_length` columns, others those of the longest.
    pub fn rows(&self, first: u64, count: u64) -> Rows {
        let documents = |index: u64| -> Vec<Encoded> {
            self.row(index)
                .iter()
                .flat_map(|(s, i)| self.sources[*s as usize].get(*i as usize).sequences)
                .collect()
        };
        let all: Vec<Vec<Encoded>> = (first..first + count).map(documents).collect();
        let longest = all.iter().map(|row| row.iter().map(|d| d.ids.len()).sum::<usize>()).max().unwrap_or(0);
        let columns = if self.packing { self.sequence_length } else { longest };
        let mut rows = Rows::default();
        all.iter().for_each(|row| rows.push(row, columns));
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::sections::TooLong;
    use crate::data::examples::{ExampleOptions, Split, Tokenization, fit};
    use crate::data::odd::{OrOdd, Reason};
    use crate::data::readers::Record;
    use std::collections::BTreeMap;
    use testing::folder::TestFolder;
    use testing::tolerance::{Quantity, allowed};

    /// Every line is its tokens, `|` before those that are supervised.
    fn encode(record: &Record) -> Result<Encoded> {
        let (prompt, completion) = record.text("text")?.split_once('|').unwrap_or_default();
        let ids = |text: &str| -> Vec<u32> { text.split_whitespace().map(|w| w.parse().unwrap()).collect() };
        let (prompt, completion) = (ids(prompt), ids(completion));
        let supervised = prompt.iter().map(|_| false).chain(completion.iter().map(|_| true)).collect();
        Ok(Encoded { ids: [prompt, completion].concat(), supervised })
    }

    fn examples(folder: &TestFolder, name: &str, lines: &[String], options: ExampleOptions) -> Examples {
        let text: String = lines.iter().map(|l| format!("{{\"text\": \"{l}\"}}\n")).collect();
        let path = folder.file(name, text);
        let cache = folder.0.join("cache");
        let encode = |record: &Record| Ok(encode(record).or_odd(Reason::Format)?.into());
        let fit = |example, counts: &mut ExampleCounts| fit(example, &options, counts);
        let (encode, fit, options) = (&encode, &fit, options.clone());
        let tokenization = Tokenization { encode, fit, key: "test".into(), eos: &[9], options, cache };
        tokenization.open(&path).unwrap()
    }

    fn options(sequence_length: usize, too_long: TooLong) -> ExampleOptions {
        ExampleOptions { sequence_length, too_long, split: None }
    }

    fn lines() -> Vec<String> {
        ["1 2|3 9", "4|5 6 7 9", "1|", "1 2 3 4|5 6", "1 2 3 4 5 6|7 9"].map(String::from).to_vec()
    }

    #[test]
    fn examples_are_kept_cut_or_left_out_and_counted() {
        let folder = TestFolder::new("rows-counts");
        let all = examples(&folder, "a.jsonl", &lines(), options(5, TooLong::Truncate));
        let counts = ExampleCounts {
            records: 5,
            examples: 3,
            sequences: 3,
            tokens: 4 + 5 + 5,
            supervised_tokens: 2 + 4 + 1,
            truncated: 1,
            too_long: 0,
            unsupervised: 2,
            duplicates: 0,
            indistinct: 0,
            ends_in_eos: 2,
        };
        assert_eq!(*all.counts(), counts);
        assert_eq!(
            all.get(2),
            Encoded { ids: vec![1, 2, 3, 4, 5], supervised: [false; 4].into_iter().chain([true]).collect() }
                .into()
        );
        let dropped = examples(&folder, "a.jsonl", &lines(), options(5, TooLong::Drop));
        assert_eq!((dropped.counts().examples, dropped.counts().too_long), (2, 2));
        // Before any was cut or left out, with the cache read again.
        for examples in [all, dropped, examples(&folder, "a.jsonl", &lines(), options(5, TooLong::Drop))] {
            assert_eq!(*examples.lengths(), BTreeMap::from([(1, 1), (4, 1), (5, 1), (6, 1), (8, 1)]));
        }
    }

    #[test]
    fn a_cache_that_is_damaged_is_made_again_and_of_other_data_not_taken() {
        let folder = TestFolder::new("rows-cache");
        let first = examples(&folder, "a.jsonl", &lines(), options(8, TooLong::Drop));
        let cached = folder.0.join("cache").join(format!("{}.examples", first.key()));
        let mut bytes = std::fs::read(&cached).unwrap();
        let written = bytes.clone();
        bytes[5] ^= 1;
        drop(first);
        std::fs::write(&cached, &bytes).unwrap();
        examples(&folder, "a.jsonl", &lines(), options(8, TooLong::Drop));
        assert_eq!(std::fs::read(&cached).unwrap(), written);
        let other = examples(&folder, "a.jsonl", &lines()[1..], options(8, TooLong::Drop));
        assert_ne!(cached.file_stem().unwrap(), other.key());
    }

    #[test]
    fn parts_do_not_overlap_and_hold_everything() {
        let folder = TestFolder::new("rows-split");
        let lines: Vec<String> = (0..1000).map(|i| format!("1|{i} 9")).collect();
        let mut seen = Vec::new();
        for part in 0..3 {
            let split = Some(Split { parts: vec![2.0, 4.0, 4.0], part });
            let options = ExampleOptions { sequence_length: 8, too_long: TooLong::Drop, split };
            let part = examples(&folder, "a.jsonl", &lines, options);
            let wanted = [200.0, 400.0, 400.0][seen.len().min(1)];
            assert!((part.len() as f64 - wanted).abs() < 60.0, "{}", part.len());
            seen.extend((0..part.len()).map(|i| part.get(i).sequences[0].ids[1]));
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn a_packed_row_keeps_its_documents_apart() {
        let folder = TestFolder::new("rows-packed");
        let all =
            examples(&folder, "a.jsonl", &["1 2|3 9".into(), "4|5 9".into()], options(8, TooLong::Drop));
        let source = vec![RowSource { examples: all, weight: None }];
        let loader = RowLoader::new(source, 8, true, WindowOrder::Shuffled { seed: 1 }).unwrap();
        assert_eq!((loader.num_rows(), loader.count(0, 1)), (1, (4, 7)));
        assert!((loader.padding() - 1.0 / 8.0).abs() < allowed(Quantity::TwoWays, tch::Kind::Double));
        let rows = Rows {
            input_ids: vec![1, 2, 3, 9, 4, 5, 9, 0],
            labels: vec![IGNORE, 3, 9, IGNORE, 5, 9, IGNORE, IGNORE],
            positions: vec![0, 1, 2, 3, 0, 1, 2, 0],
            starts: vec![0, 0, 0, 0, 4, 4, 4, 7],
            rows: 1,
            columns: 8,
        };
        assert_eq!(loader.rows(0, 1), rows);
    }

    #[test]
    fn an_epoch_has_every_example_once_and_weights_hold() {
        let folder = TestFolder::new("rows-epochs");
        let lines = |n: u32| -> Vec<String> { (0..n).map(|i| format!("1|{i} 9")).collect() };
        let open = |name: &str, n: u32, weight: Option<f64>| RowSource {
            examples: examples(&folder, name, &lines(n), options(8, TooLong::Drop)),
            weight,
        };
        let order = WindowOrder::Shuffled { seed: 5 };
        let loader = RowLoader::new(vec![open("a.jsonl", 31, None)], 8, false, order).unwrap();
        let epoch =
            |e: u64| -> Vec<i64> { (e * 31..e * 31 + 31).map(|i| loader.rows(i, 1).input_ids[1]).collect() };
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        for mut epoch in [first, second] {
            epoch.sort_unstable();
            assert_eq!(epoch, (0..31).collect::<Vec<_>>());
        }
        let sources = vec![open("a.jsonl", 31, Some(3.0)), open("b.jsonl", 200, Some(1.0))];
        let loader = RowLoader::new(sources, 8, false, order).unwrap();
        let mut counts = BTreeMap::new();
        (0..100).for_each(|i| *counts.entry(loader.row(i)[0].0).or_insert(0) += 1);
        assert_eq!(counts, BTreeMap::from([(0, 75), (1, 25)]));
        let one = vec![open("a.jsonl", 31, Some(3.0)), open("b.jsonl", 200, None)];
        assert!(RowLoader::new(one, 8, false, order).is_err());
    }
}
