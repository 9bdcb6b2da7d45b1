//! The texts of files, one after the other, for tokenizers and token shards.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde_json::Value;

use super::odd::{Odd, OddRecords, OrOdd, Reason};
use super::readers::{self, Record};
use crate::config::sections::OnError;
use crate::error::{Error, Result};

type TextResult = Result<Result<String, Odd>>;

/// The texts under a key of all records of all files, in order. What cannot be read on ends them. Records without such a text are
/// left out and counted, or refused: then no text follows the first of them, and the error that ends the texts counts all.
pub struct Texts {
    read: Box<dyn Iterator<Item = TextResult> + Send>,
    on_error: OnError,
    odd: OddRecords,
    ended: bool,
}

impl Texts {
    /// `bytes` grows with what was read of the files on disk.
    pub fn open(paths: &[PathBuf], key: &str, on_error: OnError, bytes: &Arc<AtomicU64>) -> Texts {
        let (paths, key, bytes) = (paths.to_vec(), key.to_string(), bytes.clone());
        let read = paths.into_iter().flat_map(move |path| of_file(&path, &key, &bytes));
        Texts { read: Box::new(read), on_error, odd: OddRecords::default(), ended: false }
    }

    /// The records that were left out so far.
    pub fn odd(&self) -> &OddRecords {
        &self.odd
    }

    /// The next text; none at the end, or what ends the texts.
    fn read(&mut self) -> Result<Option<String>> {
        for read in self.read.by_ref() {
            self.odd.records += 1;
            match read? {
                Ok(_) if self.on_error == OnError::Refuse && self.odd.total() > 0 => {}
                Ok(text) => return Ok(Some(text)),
                Err(odd) => self.odd.add(odd)?,
            }
        }
        self.odd.refuse(self.on_error, "give --on-error skip")?;
        Ok(None)
    }
}

impl Iterator for Texts {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        if self.ended {
            return None;
        }
        let next = self.read().transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

fn of_file(path: &Path, key: &str, bytes: &Arc<AtomicU64>) -> Box<dyn Iterator<Item = TextResult> + Send> {
    let key = if readers::is_text(path) { "text" } else { key };
    let records = match readers::records_or_errors(path, Some(&[key]), bytes) {
        Ok(records) => records,
        Err(e) => return Box::new(std::iter::once(Err(advised(e)))),
    };
    let key = key.to_string();
    Box::new(records.map(move |record| Ok(record?.or_odd(Reason::Unreadable).and_then(|r| text(r, &key)))))
}

fn text(mut record: Record, key: &str) -> Result<String, Odd> {
    match record.fields.get_mut(key) {
        Some(Value::String(text)) => Ok(std::mem::take(text)),
        _ => record.text(key).map(str::to_string).map_err(advised).or_odd(Reason::Format),
    }
}

fn advised(mut e: Error) -> Error {
    if e.message.contains("no key `") {
        e.message.push_str("; name the right one with --text-key");
    }
    e
}

#[cfg(test)]
mod tests {
    use super::*;
    use testing::folder::TestFolder;

    #[test]
    fn odd_records_are_counted_and_refused_or_left_out() {
        let folder = TestFolder::new("texts-odd");
        let odd = folder.file("a.jsonl", "{\"text\": \"a\"}\n{oops\n{\"text\": 3}\n{\"text\": \"b\"}\n");
        let good = folder.file("b.jsonl", "{\"text\": \"c\"}\n");
        let open = |on_error| Texts::open(&[odd.clone(), good.clone()], "text", on_error, &Arc::default());
        let mut texts = open(OnError::Skip);
        assert_eq!(texts.by_ref().collect::<Result<Vec<_>>>().unwrap(), ["a", "b", "c"]);
        assert_eq!((texts.odd().total(), texts.odd().records), (2, 5));
        // Refused: all are counted, and nothing follows.
        let mut texts = open(OnError::Refuse);
        assert_eq!(texts.next().unwrap().unwrap(), "a");
        let e = texts.next().unwrap().unwrap_err();
        assert!(
            e.message.starts_with("2 of 5 records cannot be used: 1 unreadable, 1 of no usable format"),
            "{e}"
        );
        assert!(e.exit_code() == 3 && e.message.contains("a.jsonl:3: `text` is a number"), "{e}");
        assert!(e.message.contains("give --on-error skip") && texts.next().is_none(), "{e}");
        // What cannot be read on ends the texts in any case.
        let broken = folder.file("c.json", "[{\"text\": \"d\"}, {\"text\"");
        let texts: Vec<_> = Texts::open(&[broken], "text", OnError::Skip, &Arc::default()).collect();
        assert!(texts.len() == 2 && texts[1].is_err(), "{texts:?}");
    }
}
