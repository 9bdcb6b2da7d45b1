//! Prompts that a model is to answer while it is trained, with what the data says of the answer.

use rayon::prelude::*;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

use super::chat::Chat;
use super::conversation::{self, Conversation, Message, conversation};
use super::examples::Split;
use super::fields::{self, Fields, Unused};
use super::odd::{Odd, OddRecords, OrOdd, Reason};
use super::order::{self, SourceTree};
use super::position::Indexed;
use super::readers::{self, Record, RecordPlace};
use super::tokenizer::hex;
use crate::config::prompts::{FewShot, PromptData};
use crate::config::sections::DataSource;
use crate::error::{Error, Result};

/// A prompt in tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    pub ids: Vec<i64>,
    /// The conversation so far, and what the template is given besides.
    pub messages: Conversation,
    /// The record's `answer`, or else the completion that it has.
    pub reference: Option<String>,
    pub record: Map<String, Value>,
}

/// Where an answer stands, besides `answer`.
const ANSWERS: [&str; 4] = ["completion", "completions", "chosen", "output"];

impl Prompt {
    fn read(record: Record, shots: &[Message], chat: &Chat) -> Result<Prompt, Odd> {
        let fields = Fields::new(&record).or_odd(Reason::Format)?;
        let mut messages =
            conversation::PromptForm::of(&fields, false).or_odd(Reason::Format)?.without_answer();
        messages.splice(0..0, shots.iter().cloned());
        let ids = chat.prompt(&messages).map_err(|e| e.context(&record.place)).or_odd(Reason::Template)?;
        let reference = match fields.get("answer") {
            Some(Value::String(text)) => Some(text.clone()),
            Some(Value::Number(number)) => Some(number.to_string()),
            _ => conversation(&record).ok().and_then(|mut turns| {
                ANSWERS.iter().for_each(|key| fields.mark(key));
                turns.pop_if(|turn| turn.role == "assistant").map(|turn| turn.text().into_owned())
            }),
        };
        let ids = ids.into_iter().map(i64::from).collect();
        messages.unused = fields.unused();
        Ok(Prompt { ids, messages, reference, record: record.fields })
    }

    /// What was asked last.
    pub fn question(&self) -> Cow<'_, str> {
        self.messages.last().map_or("".into(), Message::text)
    }
}

/// Gives prompt `i` of an endless sequence, shuffled anew in every epoch (without a seed: in the data's order).
pub struct Prompts {
    /// Without weights one pool of all sources, else one for each.
    pools: Vec<Vec<Prompt>>,
    mixture: SourceTree,
    seed: Option<u64>,
    /// Prompts that were too long.
    pub dropped: u64,
    /// Records that cannot be used.
    pub odd: OddRecords,
    /// Of each file, how many records give the template what it does not write.
    unwritten: Vec<(PathBuf, Unused)>,
    /// Of each file, how many records have keys that nothing reads, unless a reward is given the record.
    unread: Vec<(PathBuf, Unused)>,
    fingerprint: String,
}

impl Indexed for Prompts {
    const ITEM: &'static str = "prompt";
    const DECIDES: &'static str =
        "the files, their weights, the tokenizer, the template, the options of `data` or the seed";

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

impl Prompts {
    /// Reads and tokenizes `sources`, those of `data.train` or of `data.valid` (`seed`: none). Prompts of more than `most`
    /// tokens are left out.
    ///
    /// Records that cannot be used are left out, too, and the caller checks them.
    ///
    /// # Errors
    /// A file that cannot be read on; a source without a prompt; weights on some sources only.
    pub fn open(
        data: &PromptData,
        sources: &[DataSource],
        chat: &Chat,
        most: usize,
        seed: Option<u64>,
    ) -> Result<Prompts> {
        let (mut unwritten, mut unread) = (Vec::new(), Vec::new());
        let mut shots = Vec::new();
        if let Some(few) = &data.few_shot {
            let (turns, unused) = shots_of(few)?;
            shots = turns;
            unwritten.push((few.path.clone(), unused));
        }
        let split = (seed.is_some() && !data.split.is_empty())
            .then(|| Split { parts: data.split.clone(), part: PromptData::PART });
        let (mut pools, mut dropped, mut odd) = (Vec::new(), 0, OddRecords::default());
        let mut hash = Sha256::new();
        let texts = chat.tokenizer().text_fingerprint();
        hash.update(format!("{seed:?} {most} {split:?} {shots:?} {texts}"));
        for source in sources {
            let mut records = Vec::new();
            for (i, record) in readers::records_or_errors(&source.path, None, &Arc::default())?.enumerate() {
                let record = record?;
                if split.as_ref().is_none_or(|s| s.holds(i as u64)) {
                    records.push(record);
                }
            }
            let mut here = OddRecords::of(records.len() as u64);
            let read = |record: Result<Record>| {
                let record = record.or_odd(Reason::Unreadable)?;
                let place = record.place.clone();
                Ok((Prompt::read(record, &shots, chat)?, place))
            };
            let read: Vec<Result<(Prompt, RecordPlace), Odd>> = records.into_par_iter().map(read).collect();
            let (mut prompts, mut too_long, mut first) = (Vec::new(), 0, None);
            for prompt in read {
                match prompt {
                    Ok((prompt, _)) if prompt.ids.len() <= most => prompts.push(prompt),
                    Ok((_, place)) => {
                        too_long += 1;
                        first.get_or_insert(place);
                    }
                    Err(one) => here.add(one)?,
                }
            }
            if prompts.is_empty() {
                here.check(data.on_error)?;
                let (path, all) = (source.path.display(), here.records);
                let long = first.map_or(String::new(), |place| {
                    format!("; {too_long} have more than {most} tokens (see data.sequence_length), the first: {place}")
                });
                let odd = here
                    .example()
                    .map_or(String::new(), |line| format!("; {}, the first: {line}", here.reasons()));
                return Err(Error::data(format!("{path}: no prompt is left: {all} were read{long}{odd}")));
            }
            let (mut not_written, mut not_read) = (Unused::default(), Unused::default());
            for prompt in &prompts {
                not_written.count(&chat.unwritten(&prompt.messages));
                not_read.count(&prompt.messages.unused);
            }
            unwritten.push((source.path.clone(), not_written));
            unread.push((source.path.clone(), not_read));
            dropped += too_long;
            odd.merge(&here);
            for prompt in &prompts {
                prompt.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
                hash.update(prompt.reference.as_deref().unwrap_or_default());
            }
            hash.update(format!("{:?}", source.weight));
            pools.push(prompts);
        }
        let weights: Vec<f64> = sources.iter().filter_map(|s| s.weight).collect();
        if weights.len() != sources.len() && !weights.is_empty() {
            return Err(Error::key("data.train", "give all sources a weight or none"));
        }
        if weights.is_empty() {
            pools = vec![pools.into_iter().flatten().collect()];
        }
        let mixture = SourceTree::new(if weights.is_empty() { &[1.0] } else { &weights });
        let fingerprint = hex(&hash.finalize()[..8]);
        Ok(Prompts { pools, mixture, seed, dropped, odd, unwritten, unread, fingerprint })
    }

    /// Warns of what records give and nothing uses. `given`: a reward is given the records, with all their keys.
    pub fn warn_unused(&self, given: bool) {
        let unread = self.unread.iter().filter(|_| !given);
        self.unwritten.iter().chain(unread).for_each(|(path, unused)| unused.warn(path));
    }

    /// Prompts of one epoch over all sources.
    pub fn len(&self) -> usize {
        self.pools.iter().map(Vec::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The prompts of one epoch in the data's order.
    pub fn iter(&self) -> impl Iterator<Item = &Prompt> {
        self.pools.iter().flatten()
    }

    /// Prompt number `index` of the sequence.
    pub fn get(&self, index: u64) -> &Prompt {
        let (pool, index) = self.mixture.locate(index);
        let n = self.pools[pool].len() as u64;
        let i = match self.seed {
            Some(seed) => order::shuffled(seed, pool, n, index).0,
            None => index % n,
        };
        &self.pools[pool][i as usize]
    }

    /// Tokens of the longest prompt.
    pub fn longest(&self) -> usize {
        self.pools.iter().flatten().map(|p| p.ids.len()).max().unwrap_or(0)
    }
}

/// The turns of the examples that every prompt begins with, and what else their records have, which is not used.
fn shots_of(few: &FewShot) -> Result<(Vec<Message>, Unused)> {
    let (mut shots, mut unused, mut read) = (Vec::new(), Unused::default(), 0);
    for record in readers::records(&few.path, None, &Arc::default())?.take(few.count as usize) {
        let shot = conversation(&record?)?;
        let inputs = shot.inputs.keys().map(fields::unused);
        unused.count(&shot.unused.iter().cloned().chain(inputs).collect::<Vec<_>>());
        shots.extend(shot.messages);
        read += 1;
    }
    match read < few.count {
        true => Err(Error::key(
            "data.few_shot.count",
            format!("{} are requested, but {} has {read} records", few.count, few.path.display()),
        )),
        false => Ok((shots, unused)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::position::Positioned;
    use crate::data::tokenizer::tests::small;
    use testing::folder::TestFolder;

    fn open(folder: &TestFolder, lines: &str, data: &str, most: usize, seed: Option<u64>) -> Result<Prompts> {
        let path = folder.0.join("prompts.jsonl");
        std::fs::write(&path, lines).unwrap();
        let data: PromptData =
            crate::config::json::of_text(&format!("{{train: [{}]{data}}}", path.display())).unwrap();
        let section = crate::config::sections::TokenizerSection {
            chat_template: Some(
                "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt \
                 %}a: {% endif %}"
                    .into(),
            ),
            ..Default::default()
        };
        let tokenizer = folder.0.join("tokenizer");
        small(290).save(&tokenizer).unwrap();
        let tokenizer = crate::data::chat::configured(Some(&section), Some(&tokenizer)).unwrap();
        Prompts::open(&data, &data.train, &Chat::new(&tokenizer).unwrap(), most, seed)
    }

    #[test]
    fn answers_stay_apart() {
        let folder = TestFolder::new("prompts-answers");
        let lines = r#"{"prompt": "a", "answer": 4}
{"question": "b", "answer": "x\n#### 5", "level": 2}
{"prompt": "c"}
{"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]}
"#;
        let prompts = open(&folder, lines, "", 100, None).unwrap();
        let seen: Vec<(Cow<str>, Option<&str>)> =
            (0..4).map(|i| (prompts.get(i).question(), prompts.get(i).reference.as_deref())).collect();
        assert_eq!(
            seen,
            [("a", Some("4")), ("b", Some("x\n#### 5")), ("c", None), ("d", Some("e"))]
                .map(|(question, reference)| (question.into(), reference))
        );
        assert_eq!(prompts.get(1).record["level"], 2);
        assert_eq!(prompts.get(4), prompts.get(0));
        assert_eq!(prompts.len(), 4);
    }

    #[test]
    fn every_epoch_has_its_order_and_a_position_is_of_its_data() {
        let folder = TestFolder::new("prompts-order");
        let line = |i: i32| format!("{{\"prompt\": \"n{i}\"}}\n");
        let lines: String = (0..50).map(line).collect();
        let prompts = open(&folder, &lines, "", 100, Some(1)).unwrap();
        let epoch =
            |e: u64| -> Vec<Cow<str>> { (e * 50..e * 50 + 50).map(|i| prompts.get(i).question()).collect() };
        let sorted = |mut names: Vec<Cow<str>>| {
            names.sort();
            names.join(" ")
        };
        assert_ne!(epoch(0), epoch(1));
        assert_eq!(sorted(epoch(0)), sorted(epoch(1)));
        let state = prompts.at(7);
        assert!(prompts.check(&state).is_ok() && state.next == 7);
        for (data, seed) in [("", Some(2)), (", split: [1, 1, 2]", Some(1))] {
            let other = open(&folder, &lines, data, 100, seed).unwrap();
            assert!(other.check(&state).unwrap_err().message.contains("prompt 7 of other data"));
        }
        let part = open(&folder, &lines, ", split: [1, 1, 2]", 100, Some(1)).unwrap();
        assert!((15..35).contains(&part.len()), "{}", part.len());
    }

    #[test]
    fn long_prompts_are_left_out_and_examples_stand_before() {
        let folder = TestFolder::new("prompts");
        let lines = format!("{{\"prompt\": \"short\"}}\n{{\"prompt\": \"{}\"}}\n", "long ".repeat(60));
        let prompts = open(&folder, &lines, "", 40, None).unwrap();
        assert_eq!((prompts.len(), prompts.dropped), (1, 1));
        let e = open(&folder, &lines, "", 3, None).map(drop).unwrap_err();
        assert!(e.message.contains("no prompt is left: 2 were read") && e.exit_code() == 3, "{e}");
        let shots = folder.0.join("shots.jsonl");
        std::fs::write(
            &shots,
            "{\"question\": \"1+1\", \"answer\": \"2\"}\n{\"question\": \"x\", \"answer\": \"y\"}\n",
        )
        .unwrap();
        let few = format!(", few_shot: {{path: {}, count: 1}}", shots.display());
        let prompts = open(&folder, &lines, &few, 60, None).unwrap();
        let turns: Vec<Cow<str>> = prompts.get(0).messages.iter().map(Message::text).collect();
        assert_eq!(turns, ["1+1", "2", "short"]);
        let few = format!(", few_shot: {{path: {}, count: 3}}", shots.display());
        let e = open(&folder, &lines, &few, 60, None).map(drop).unwrap_err();
        assert!(
            e.to_string().contains("'data.few_shot.count': 3 are requested") && e.exit_code() == 2,
            "{e}"
        );
        assert!(e.message.contains("has 2 records"), "{e}");
    }
}
