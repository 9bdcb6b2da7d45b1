//! Preferences: a prompt and completions of it, best first; in tokens, and as batches whose rows belong together.

use std::collections::{BTreeSet, HashSet};

use serde_json::Value;

use super::chat::Chat;
use super::conversation::{
    Conversation, Message, TemplateInputs, common, dialogue, prompt, split, with_columns,
};
use super::examples::{self, Encoded, Example, ExampleCounts, ExampleOptions, Split, Tokenization};
use super::fields::{Fields, Leftovers};
use super::loader::WindowOrder;
use super::odd::{Odd, OrOdd, Reason};
use super::readers::Record;
use super::rows::{self, RowLoader, RowSource, Rows};
use crate::config::preferences::PreferenceData;
use crate::config::sections;
use crate::config::sections::TooLong;
use crate::error::Result;

/// A prompt and its ranked completions, of which there are at least two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preference {
    pub prompt: Vec<Message>,
    pub completions: Vec<Vec<Message>>,
    /// Of each completion: 0 is the best, equal ranks are equally good.
    pub ranks: Vec<u32>,
    /// What the template is given besides.
    pub inputs: Box<TemplateInputs>,
    /// What is said of each key that was not read; see [`super::fields::Unused`].
    pub unused: Vec<String>,
}

impl Preference {
    /// Completions of a prompt that are equally good.
    pub fn new(prompt: Conversation, completions: Vec<Vec<Message>>) -> Preference {
        let Conversation { messages: prompt, inputs, unused } = prompt;
        let ranks = vec![0; completions.len()];
        Preference { prompt, completions, ranks, inputs, unused }
    }

    /// Reads `completions` (best first; the first `num_correct` are equally good), or `chosen` and `rejected` (in Stack
    /// Exchange's data `response_j` and `response_k`), with a prompt
    /// (`prompt`, messages that end before the answer, `instruction` or `question`). Completions may be whole dialogues,
    /// which repeat the prompt; without a prompt, what they have in common is the prompt.
    ///
    /// # Errors
    /// With the record's place: none of the formats, fewer than two completions, no prompt, prompts that differ.
    pub fn read(record: &Record) -> Result<Preference> {
        let fields = &Fields::new(record)?;
        let (all, ranks) = if fields.has("prompt") && fields.has("completions") {
            let list = fields.get("completions").and_then(Value::as_array).filter(|list| list.len() > 1);
            let list =
                list.ok_or_else(|| fields.bad("`completions` is not a list of at least two completions"))?;
            let ties = match fields.get("num_correct") {
                None => 1,
                Some(n) => n
                    .as_u64()
                    .filter(|n| *n <= list.len() as u64)
                    .ok_or_else(|| fields.bad("`num_correct` is not a number of completions"))?,
            };
            let rank = |i: usize| (i as u32 + 1).saturating_sub(ties.max(1) as u32);
            (list.iter().map(|c| ("completions", c)).collect(), (0..list.len()).map(rank).collect())
        } else if let (Some(chosen), Some(rejected)) = (fields.get("chosen"), fields.get("rejected")) {
            (vec![("chosen", chosen), ("rejected", rejected)], vec![0, 1])
        } else if let (Some(better), Some(worse)) = (fields.get("response_j"), fields.get("response_k")) {
            // The keys of Stack Exchange's paired answers, of which j is the better one.
            (vec![("response_j", better), ("response_k", worse)], vec![0, 1])
        } else {
            let keys: Vec<&str> = record.fields.keys().map(String::as_str).collect();
            return Err(fields.bad(format!(
                "no preference: known are `prompt` and `completions`, and `chosen` and `rejected` with or without \
                 `prompt`; keys here: {}",
                if keys.is_empty() { "none".into() } else { keys.join(", ") }
            )));
        };
        let (prompt, completions) = match prompt(fields)? {
            Some(prompt) => split(fields, prompt, &all)?,
            None => {
                let dialogues = all.iter().map(|(key, _)| dialogue(fields, key)).collect::<Result<_>>()?;
                common(fields, Vec::new(), dialogues)?
            }
        };
        let prompt = with_columns(fields, prompt)?;
        if prompt.is_empty() {
            return Err(fields.bad("there is nothing before the answers"));
        }
        if !completions.iter().all(|c: &Vec<Message>| c.iter().any(|m| m.role == "assistant")) {
            return Err(fields.bad("a completion has no assistant turn"));
        }
        let preference = Preference::new(prompt, completions);
        Ok(Preference { ranks, unused: fields.unused(), ..preference })
    }

    /// The prompt with each completion in tokens, as the chat template writes them; supervised are the completion's turns of
    /// the assistant, their ends included. The last one's end is the sequence's.
    pub fn encode(&self, chat: &Chat) -> Result<Example> {
        let before = self.prompt.iter().filter(|m| m.role == "assistant").count();
        let mut unwritten = BTreeSet::new();
        let mut encode = |completion: &Vec<Message>| {
            let messages = [self.prompt.as_slice(), completion].concat();
            let whole = Conversation { messages, inputs: self.inputs.clone(), unused: Vec::new() };
            let encoding = chat.encode(&whole, false)?;
            unwritten.extend(chat.unwritten(&whole));
            let supervised = encoding.mask_from(before);
            Ok(Encoded { ids: encoding.ids, supervised }.cut_after_the_last_turn())
        };
        let sequences = self.completions.iter().map(&mut encode).collect::<Result<_>>()?;
        let leftovers = Leftovers { unread: self.unused.clone(), unwritten: unwritten.into_iter().collect() };
        Ok(Example { sequences, ranks: self.ranks.clone(), leftovers })
    }
}

/// The share of a sequence that a prompt keeps at least where it is cut.
const LEAST_PROMPT: usize = 4;

/// The example with sequences of at most `options.sequence_length` tokens, if it is to be kept. Of a prompt that is too
/// long the beginning is cut off (after BOS), equally much before every completion, so that the prompt's end and the
/// completions' stay; an example whose completions leave the prompt no quarter of the sequence is left out. Completions
/// whose tokens are those of a better one are left out, and then examples without two of different rank;
/// where they are not compared with each other (`ranked`), all stay.
pub fn fit(
    mut example: Example,
    options: &ExampleOptions,
    bos: Option<u32>,
    ranked: bool,
    counts: &mut ExampleCounts,
) -> Option<Example> {
    let most = options.sequence_length;
    let longest = example.sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    if longest > most {
        let prompt = |s: &Encoded| s.supervised.iter().position(|s| *s).unwrap_or(s.ids.len());
        let prompt = example.sequences.iter().map(prompt).min().unwrap_or(0);
        let kept =
            usize::from(example.sequences.iter().all(|s| bos.is_some() && s.ids.first() == bos.as_ref()));
        let least = prompt.min(most / LEAST_PROMPT).max(kept + 1);
        let cut = longest - most;
        if options.too_long == TooLong::Drop || prompt < least + cut {
            counts.too_long += 1;
            return None;
        }
        for sequence in &mut example.sequences {
            sequence.ids.drain(kept..kept + cut);
            sequence.supervised.drain(kept..kept + cut);
        }
    }
    if example.sequences.iter().any(|s| !s.supervised.iter().skip(1).any(|s| *s)) {
        counts.unsupervised += 1;
        return None;
    }
    if !ranked {
        counts.truncated += u64::from(longest > most);
        return Some(example);
    }
    let all = example.sequences.len();
    let mut seen = HashSet::new();
    let (sequences, ranks): (Vec<Encoded>, Vec<u32>) =
        example.sequences.into_iter().zip(example.ranks).filter(|(s, _)| seen.insert(s.ids.clone())).unzip();
    counts.duplicates += (all - sequences.len()) as u64;
    if ranks.iter().all(|r| *r == ranks[0]) {
        counts.indistinct += 1;
        return None;
    }
    counts.truncated += u64::from(longest > most);
    Some(Example { sequences, ranks, leftovers: example.leftovers })
}

/// The preferences of `data.train`, shuffled by `seed`, and of `data.valid`, where there are any; rows are examples.
pub fn open(data: &PreferenceData, chat: &Chat, seed: u64) -> Result<(RowLoader, Option<RowLoader>)> {
    open_as(data, chat, seed, "preferences", &|record| read_and_encode(record, chat), true)
}

/// How a record becomes an example.
type Encode<'a> = &'a (dyn Fn(&Record) -> Result<Example, Odd> + Sync);

/// [`open`] of examples that `encode` makes, of which `name` tells caches apart. `ranked`: whether an example's completions
/// are compared with each other.
pub(super) fn open_as(
    data: &PreferenceData,
    chat: &Chat,
    seed: u64,
    name: &str,
    encode: Encode,
    ranked: bool,
) -> Result<(RowLoader, Option<RowLoader>)> {
    let open = |sources, training| open_sources(data, sources, chat, name, encode, ranked, training);
    let (train, valid) = (open(&data.train, true)?, open(&data.valid, false)?);
    rows::check_records(data.on_error, train.iter().chain(&valid))?;
    let loader =
        |sources: Vec<RowSource>, order| RowLoader::new(sources, data.sequence_length as usize, false, order);
    let train = loader(train, WindowOrder::Shuffled { seed })?;
    let valid = (!valid.is_empty()).then(|| loader(valid, WindowOrder::Sequential)).transpose()?;
    Ok((train, valid))
}

/// The examples of `sources`, tokenized or from the cache.
fn open_sources(
    data: &PreferenceData,
    sources: &[sections::DataSource],
    chat: &Chat,
    name: &str,
    encode: Encode,
    ranked: bool,
    training: bool,
) -> Result<Vec<RowSource>> {
    let part = PreferenceData::PART;
    let split = (training && !data.split.is_empty()).then(|| Split { parts: data.split.clone(), part });
    let options =
        ExampleOptions { sequence_length: data.sequence_length as usize, too_long: data.too_long, split };
    let bos = chat.tokenizer().bos_id();
    let fit = |example, counts: &mut ExampleCounts| fit(example, &options, bos, ranked, counts);
    let tokenization = Tokenization {
        encode,
        fit: &fit,
        key: format!("{name} {bos:?} {}", chat.tokenizer().text_fingerprint()),
        eos: &chat.stop_ids(),
        options: options.clone(),
        cache: data.cache.clone().map_or_else(examples::default_cache, Ok)?,
    };
    let open =
        |s: &sections::DataSource| Ok(RowSource { examples: tokenization.open(&s.path)?, weight: s.weight });
    sources.iter().map(open).collect()
}

/// A record's preference in tokens, or why there is none.
pub fn read_and_encode(record: &Record, chat: &Chat) -> Result<Example, Odd> {
    let preference = Preference::read(record).or_odd(Reason::Format)?;
    preference.encode(chat).map_err(|e| e.context(&record.place)).or_odd(Reason::Template)
}

/// Lengths of packed rows are multiples of this: oneDNN keeps what it has prepared for each shape of a product, up to
/// hundreds of megabytes where every row has another length.
const PACKED: usize = 64;

/// Examples as rows of one micro-batch. S sequences, N = rows * columns positions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SequenceBatch {
    /// The sequences one after the other, those of an example adjacent: one a row, padded at its end; or, packed, all in
    /// one row, whose length is a multiple of [`PACKED`].
    pub rows: Rows,
    /// `[N]`: the number of the sequence that the position belongs to; S for padding.
    pub sequence: Vec<i64>,
    /// `[S]`: the position (of N) of the sequence's last token.
    pub last: Vec<i64>,
    /// Of each example the ranks of its sequences; S in all.
    pub ranks: Vec<Vec<u32>>,
}

impl SequenceBatch {
    pub fn new(examples: &[Example], packed: bool) -> SequenceBatch {
        let mut batch = SequenceBatch::default();
        let sequences: Vec<&Encoded> = examples.iter().flat_map(|e| &e.sequences).collect();
        let lengths = || sequences.iter().map(|s| s.ids.len());
        let rest = sequences.len() as i64;
        if packed {
            let all: Vec<Encoded> = sequences.iter().map(|s| (*s).clone()).collect();
            let columns = lengths().sum::<usize>().next_multiple_of(PACKED);
            batch.rows.push(&all, columns);
            for (i, n) in lengths().enumerate() {
                batch.sequence.extend(std::iter::repeat_n(i as i64, n));
                batch.last.push(batch.sequence.len() as i64 - 1);
            }
            batch.sequence.resize(columns, rest);
        } else {
            let columns = lengths().max().unwrap_or(0);
            for (i, sequence) in sequences.iter().enumerate() {
                batch.rows.push(std::slice::from_ref(*sequence), columns);
                let n = sequence.ids.len();
                batch.sequence.extend(std::iter::repeat_n(i as i64, n));
                batch.last.push(batch.sequence.len() as i64 - 1);
                batch.sequence.extend(std::iter::repeat_n(rest, columns - n));
            }
        }
        batch.ranks = examples.iter().map(|e| e.ranks.clone()).collect();
        batch
    }

    pub fn num_sequences(&self) -> usize {
        self.last.len()
    }

    /// The positions (of N) whose labels are each sequence's supervised tokens: S rows of equal length, the shorter ones
    /// filled with 0, and which of them are there.
    pub fn supervised(&self) -> (Vec<i64>, Vec<bool>) {
        let mut positions = vec![Vec::new(); self.num_sequences()];
        for (at, (label, sequence)) in self.rows.labels.iter().zip(&self.sequence).enumerate() {
            if *label >= 0 {
                positions[*sequence as usize].push(at as i64);
            }
        }
        let columns = positions.iter().map(Vec::len).max().unwrap_or(0);
        let there = positions.iter().flat_map(|p| (0..columns).map(|i| i < p.len())).collect();
        positions.iter_mut().for_each(|p| p.resize(columns, 0));
        (positions.concat(), there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::sections::{OnError, TokenizerSection};
    use crate::data::chat::configured;
    use crate::data::readers;
    use crate::data::tokenizer::tests::small;
    use testing::folder::TestFolder;

    fn records(name: &str, lines: &str) -> Vec<Record> {
        let folder = TestFolder::new(&format!("preferences-{name}"));
        let path = folder.file("data.jsonl", lines);
        readers::records(&path, None, &Default::default()).unwrap().map(Result::unwrap).collect()
    }

    fn turns(turns: &[(&str, &str)]) -> Vec<Message> {
        turns.iter().map(|(role, text)| Message::new(*role, *text)).collect()
    }

    fn chat(folder: &TestFolder) -> Chat {
        small(300).save(&folder.0).unwrap();
        let section =
            TokenizerSection { chat_template: Some("human-assistant".into()), ..TokenizerSection::default() };
        Chat::new(&configured(Some(&section), Some(&folder.0)).unwrap()).unwrap()
    }

    #[test]
    fn every_format_gives_a_prompt_and_ranked_completions() {
        let ab = Preference {
            prompt: turns(&[("user", "p")]),
            completions: vec![turns(&[("assistant", "a")]), turns(&[("assistant", "b")])],
            ranks: vec![0, 1],
            inputs: Box::default(),
            unused: Vec::new(),
        };
        let user = r#"{"role": "user", "content": "p"}"#;
        let says = |text: &str| format!(r#"{{"role": "assistant", "content": "{text}"}}"#);
        let (a, b) = (says("a"), says("b"));
        let lines = [
            r#"{"prompt": "p", "chosen": "a", "rejected": "b"}"#.to_string(),
            r#"{"question": "p", "response_j": "a", "response_k": "b"}"#.to_string(),
            format!(r#"{{"prompt": [{user}], "chosen": [{a}], "rejected": [{b}]}}"#),
            format!(r#"{{"prompt": "p", "chosen": [{user}, {a}], "rejected": [{user}, {b}]}}"#),
            format!(r#"{{"chosen": [{user}, {a}], "rejected": [{user}, {b}]}}"#),
            r#"{"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"}"#
                .into(),
            r#"{"prompt": "p", "completions": ["a", "b"]}"#.into(),
            format!(r#"{{"prompt": [{user}], "completions": [[{a}], [{b}]], "num_correct": 1}}"#),
        ];
        for record in records("formats", &lines.join("\n")) {
            assert_eq!(Preference::read(&record).unwrap(), ab, "{}", record.place);
        }
    }

    #[test]
    fn the_first_correct_ones_are_equally_good_and_the_common_beginning_is_the_prompt() {
        let lines = [
            r#"{"prompt": "p", "completions": ["a", "b", "c", "d"], "num_correct": 2}"#,
            r#"{"prompt": "p", "completions": ["a", "b", "c"], "num_correct": 0}"#,
            r#"{"chosen": "\n\nHuman: p\n\nAssistant: x\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: x\n\nHuman: q\n\nAssistant: b"}"#,
            r#"{"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: a"}"#,
        ];
        let read: Vec<Preference> = records("ties", &lines.join("\n"))
            .iter()
            .map(|record| Preference::read(record).unwrap())
            .collect();
        assert_eq!(read[0].ranks, [0, 0, 1, 2]);
        assert_eq!(read[1].ranks, [0, 1, 2]);
        assert_eq!(read[2].prompt, turns(&[("user", "p"), ("assistant", "x"), ("user", "q")]));
        assert_eq!(read[2].completions, [turns(&[("assistant", "a")]), turns(&[("assistant", "b")])]);
        assert_eq!(read[3].completions, [turns(&[("assistant", "a")]), turns(&[("assistant", "a")])]);
    }

    #[test]
    fn what_is_no_preference_is_told_with_its_place() {
        let cases = [
            (r#"{"question": "p", "answer": "a"}"#, "no preference"),
            (r#"{"prompt": "p", "completions": ["a"]}"#, "at least two"),
            (r#"{"prompt": "p", "completions": ["a", "b"], "num_correct": 3}"#, "`num_correct`"),
            (r#"{"prompt": "p", "completions": ["a", "b"], "num_correct": "x"}"#, "`num_correct`"),
            (r#"{"prompt": "p", "completions": ["a", 3]}"#, "neither a text nor a list"),
            (r#"{"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}"#, "nothing before"),
            (r#"{"chosen": "a", "rejected": "b"}"#, "must begin with a turn"),
            (r#"{"prompt": [], "chosen": "a", "rejected": "b"}"#, "nothing before"),
            (
                r#"{"prompt": "p", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}"#,
                "no assistant turn",
            ),
        ];
        for (line, part) in cases {
            let e = Preference::read(&records("bad", line)[0]).unwrap_err();
            assert!(e.message.contains(part) && e.message.contains("data.jsonl:1"), "{line}: {e}");
            assert_eq!(e.exit_code(), 3);
        }
    }

    #[test]
    fn completions_are_the_conversations_of_fine_tuning() {
        let folder = TestFolder::new("preferences-chat");
        let chat = chat(&folder);
        let preference = Preference {
            prompt: turns(&[("user", "p"), ("assistant", "x"), ("user", "q")]),
            completions: vec![turns(&[("assistant", "ab")]), turns(&[("assistant", "b")])],
            ranks: vec![0, 1],
            inputs: Box::default(),
            unused: Vec::new(),
        };
        let example = preference.encode(&chat).unwrap();
        let prompt = chat.prompt(&preference.prompt).unwrap();
        for (sequence, completion) in example.sequences.iter().zip(&preference.completions) {
            let whole = chat.encode(&[preference.prompt.as_slice(), completion].concat(), false).unwrap();
            assert_eq!(sequence.ids, whole.ids);
            assert!(sequence.ids.starts_with(&prompt));
            let first = sequence.supervised.iter().position(|s| *s);
            assert_eq!(first, Some(prompt.len()));
            let end = whole.turns.last().unwrap().end;
            assert!(sequence.supervised[prompt.len()..end].iter().all(|s| *s));
            assert!(chat.stop_ids().contains(&sequence.ids[end - 1]));
        }
    }

    fn sequence(prompt: &[u32], completion: &[u32]) -> Encoded {
        let supervised = prompt.iter().map(|_| false).chain(completion.iter().map(|_| true)).collect();
        Encoded { ids: [prompt, completion].concat(), supervised }
    }

    fn example(prompt: &[u32], completions: &[&[u32]], ranks: &[u32]) -> Example {
        let sequences = completions.iter().map(|c| sequence(prompt, c)).collect();
        Example { sequences, ranks: ranks.to_vec(), leftovers: Default::default() }
    }

    #[test]
    fn a_long_prompt_loses_its_beginning_and_equal_completions_are_left_out() {
        let fit = |example: Example, length: usize, too_long: TooLong, bos: Option<u32>| {
            let mut counts = ExampleCounts::default();
            let options = ExampleOptions { sequence_length: length, too_long, split: None };
            (fit(example, &options, bos, true, &mut counts), counts)
        };
        let long = example(&[1, 2, 3, 4, 5, 6], &[&[7, 8, 9], &[8, 9]], &[0, 1]);
        let (kept, counts) = fit(long.clone(), 7, TooLong::Truncate, None);
        assert_eq!(kept.unwrap(), example(&[3, 4, 5, 6], &[&[7, 8, 9], &[8, 9]], &[0, 1]));
        assert_eq!((counts.truncated, counts.dropped()), (1, 0));
        let (kept, _) = fit(long.clone(), 7, TooLong::Truncate, Some(1));
        assert_eq!(kept.unwrap(), example(&[1, 4, 5, 6], &[&[7, 8, 9], &[8, 9]], &[0, 1]));
        let (kept, counts) = fit(long.clone(), 7, TooLong::Drop, None);
        assert_eq!((kept, counts.too_long, counts.truncated), (None, 1, 0));
        // A prompt keeps a quarter: 1 of 4 is there, 0 of 3 is not; BOS is no prompt.
        assert!(fit(long.clone(), 4, TooLong::Truncate, None).0.is_some());
        assert_eq!(fit(long.clone(), 3, TooLong::Truncate, None).1.too_long, 1);
        assert_eq!(fit(long.clone(), 4, TooLong::Truncate, Some(1)).1.too_long, 1);
        assert_eq!(fit(long, 9, TooLong::Truncate, None).1.truncated, 0);

        let (kept, counts) = fit(example(&[1], &[&[2], &[3], &[2]], &[0, 1, 2]), 9, TooLong::Truncate, None);
        assert_eq!(kept.unwrap(), example(&[1], &[&[2], &[3]], &[0, 1]));
        assert_eq!((counts.duplicates, counts.indistinct), (1, 0));
        for (completions, ranks, duplicates) in [([[2u32], [2]], [0, 1], 1), ([[2], [3]], [0, 0], 0)] {
            let completions: Vec<&[u32]> = completions.iter().map(|c| c.as_slice()).collect();
            let (kept, counts) = fit(example(&[1], &completions, &ranks), 9, TooLong::Truncate, None);
            assert_eq!((kept, counts.duplicates, counts.indistinct), (None, duplicates, 1));
        }
        assert_eq!(fit(example(&[1], &[&[2], &[]], &[0, 1]), 9, TooLong::Drop, None).1.unsupervised, 1);
    }

    #[test]
    fn examples_go_through_the_cache_and_into_batches() {
        let folder = TestFolder::new("preferences-open");
        let chat = chat(&folder);
        let lines = "{\"prompt\": \"a\", \"completions\": [\"b\", \"cd\", \"e\"], \"num_correct\": 2}\n\
                     {\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"b\"}\n\
                     {\"prompt\": \"f\", \"chosen\": \"g\", \"rejected\": \"\"}\n";
        let source = sections::DataSource { path: folder.file("data.jsonl", lines), weight: None };
        let data = PreferenceData {
            train: vec![source.clone()],
            valid: vec![source],
            sequence_length: 64,
            packing: true,
            too_long: TooLong::Truncate,
            on_error: OnError::Refuse,
            split: Vec::new(),
            template_date: Default::default(),
            cache: Some(folder.0.join("cache")),
        };
        let opened = || open(&data, &chat, 1).unwrap().1.unwrap();
        let (first, again) = (opened(), opened());
        let counts = first.counts();
        assert_eq!((counts.examples, counts.sequences, counts.indistinct), (2, 5, 1));
        assert_eq!(first.count(0, 2), (counts.supervised_tokens, counts.tokens));
        let examples: Vec<Example> = (0..2).map(|i| first.example(i)).collect();
        assert_eq!(examples, (0..2).map(|i| again.example(i)).collect::<Vec<_>>());
        assert_eq!(examples[0].ranks, [0, 0, 1]);

        let lengths: Vec<i64> =
            examples.iter().flat_map(|e| &e.sequences).map(|s| s.ids.len() as i64).collect();
        let packed = SequenceBatch::new(&examples, true);
        let total = lengths.iter().sum::<i64>() as usize;
        assert_eq!((packed.rows.rows, packed.rows.columns), (1, total.next_multiple_of(PACKED)));
        assert_eq!(packed.ranks, [vec![0, 0, 1], vec![0, 1]]);
        let padded = SequenceBatch::new(&examples, false);
        assert_eq!((padded.rows.rows, padded.rows.columns as i64), (5, *lengths.iter().max().unwrap()));
        for (batch, sequences) in [(&packed, 5), (&padded, 5)] {
            assert_eq!(batch.num_sequences(), sequences);
            let of = |j: i64| batch.sequence.iter().filter(|s| **s == j).count() as i64;
            assert_eq!(of(5), batch.rows.input_ids.len() as i64 - lengths.iter().sum::<i64>());
            for (i, n) in lengths.iter().enumerate() {
                assert_eq!(of(i as i64), *n);
                let at = batch.last[i] as usize;
                let sequence = &examples.iter().flat_map(|e| &e.sequences).nth(i).unwrap();
                assert_eq!(batch.rows.input_ids[at], i64::from(*sequence.ids.last().unwrap()));
                let begin = at + 1 - *n as usize;
                assert_eq!((batch.rows.positions[begin], batch.rows.positions[at]), (0, n - 1));
            }
            let (positions, there) = batch.supervised();
            let labels = |i: usize| -> Vec<i64> {
                let columns = positions.len() / 5;
                let row = (i * columns)..(i + 1) * columns;
                row.filter(|at| there[*at]).map(|at| batch.rows.labels[positions[at] as usize]).collect()
            };
            for (i, sequence) in examples.iter().flat_map(|e| &e.sequences).enumerate() {
                let ids = sequence.ids.iter().zip(&sequence.supervised);
                let wanted: Vec<i64> = ids.filter(|(_, s)| **s).map(|(id, _)| i64::from(*id)).collect();
                assert_eq!(labels(i), wanted);
            }
        }
    }
}
