//! Records of JSON: a line each, an array of them, or one after the other.

use std::fmt;
use std::io::{self, BufRead, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::Value;

use super::input::{BYTE_ORDER_MARK, RecordInput};
use super::{Record, RecordPlace, RecordUnit, RecordsOrErrors, kind_of};
use crate::error::{Error, Result};

pub(super) fn json_lines(
    path: Arc<Path>,
    mut input: RecordInput,
) -> impl Iterator<Item = Result<Result<Record>>> + Send {
    let mut number = 0;
    let mut line = Vec::new();
    std::iter::from_fn(move || {
        loop {
            line.clear();
            number += 1;
            let place = RecordPlace { path: path.clone(), unit: RecordUnit::Line, number };
            match input.read_until(b'\n', &mut line) {
                Err(e) => return Some(Err(Error::data(format!("cannot read {place}: {e}")))),
                Ok(0) => return None,
                Ok(_) if line.iter().all(u8::is_ascii_whitespace) => continue,
                Ok(_) => {}
            }
            if line.starts_with(BYTE_ORDER_MARK) {
                let what = "a byte order mark (U+FEFF) inside the file, left by joining files: remove it";
                return Some(Ok(Err(Error::data(format!("{place}: {what}")))));
            }
            let value = serde_json::from_slice(&line).map_err(|e| {
                let what = json_message(&e);
                // serde_json counts the line's end as the begin of another line.
                let column = if e.column() > 0 { e.column() } else { line.len() };
                Error::data(format!("{place}:{column}: not valid JSON: {what}"))
            });
            return Some(Ok(value.and_then(|value| object(value, place))));
        }
    })
}

fn object(value: Value, place: RecordPlace) -> Result<Record> {
    match value {
        Value::Object(fields) => Ok(Record { fields, place }),
        other => {
            Err(Error::data(format!("{place}: a record must be an object, this is {}", kind_of(&other))))
        }
    }
}

/// serde_json's message without its own "at line 1 column 7".
fn json_message(e: &serde_json::Error) -> String {
    let message = e.to_string();
    let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(what, _)| what);
    match message {
        "lone leading surrogate in hex escape" | "unexpected end of hex escape" => {
            let what =
                "half a surrogate pair (a \\ud800 to \\udfff that stands alone), which is not a character";
            format!("{what}: the text was cut inside a character; remove it or rewrite the text")
        }
        _ => message.to_string(),
    }
}

/// A `.json` file: one array of records, or records one after the other (which many call JSON too).
pub(super) fn json(path: Arc<Path>, mut input: RecordInput) -> Result<RecordsOrErrors> {
    let mut start = Vec::new();
    while start.last().is_none_or(u8::is_ascii_whitespace) {
        let mut byte = [0];
        match input.read(&mut byte) {
            Ok(0) => return Err(Error::data(format!("{} is empty", path.display()))),
            Ok(_) => start.push(byte[0]),
            Err(e) => return Err(Error::data(format!("cannot read {}: {e}", path.display()))),
        }
    }
    let array = start.ends_with(b"[");
    let input = io::Cursor::new(start).chain(input);
    // serde_json pushes the elements of an array, a reader pulls: a thread between them keeps memory small.
    let (sender, receiver) = sync_channel(256);
    std::thread::spawn(move || push_json(path, input, array, sender));
    Ok(Box::new(Pulled(receiver)))
}

struct Pulled(Receiver<Result<Result<Record>>>);

impl Iterator for Pulled {
    type Item = Result<Result<Record>>;
    fn next(&mut self) -> Option<Self::Item> {
        self.0.recv().ok()
    }
}

fn push_json(path: Arc<Path>, input: impl Read, array: bool, sender: SyncSender<Result<Result<Record>>>) {
    let mut elements = Elements { path: path.clone(), number: 0, sender: &sender, stopped: false };
    let parsed = if array {
        let mut parser = serde_json::Deserializer::from_reader(input);
        parser.deserialize_seq(&mut elements).and_then(|()| parser.end())
    } else {
        let mut values = serde_json::Deserializer::from_reader(input).into_iter::<Value>();
        values.try_for_each(|value| elements.push(value?))
    };
    if let Err(e) = parsed
        && !elements.stopped
    {
        let message = match e.is_io() {
            true => format!("cannot read {}: {e}", path.display()),
            false => format!(
                "{}:{}:{}: not valid JSON: {}",
                path.display(),
                e.line(),
                e.column(),
                json_message(&e)
            ),
        };
        // A receiver that is gone wants no message.
        let _ = sender.send(Err(Error::data(message)));
    }
}

/// Sends the elements of an array on as they are parsed.
struct Elements<'a> {
    path: Arc<Path>,
    number: u64,
    sender: &'a SyncSender<Result<Result<Record>>>,
    stopped: bool,
}

impl Elements<'_> {
    /// Fails where nobody reads on.
    fn push<E: serde::de::Error>(&mut self, value: Value) -> std::result::Result<(), E> {
        self.number += 1;
        let place = RecordPlace { path: self.path.clone(), unit: RecordUnit::Record, number: self.number };
        self.stopped = self.sender.send(Ok(object(value, place))).is_err();
        if self.stopped { Err(E::custom("stopped")) } else { Ok(()) }
    }
}

impl<'de> Visitor<'de> for &mut Elements<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an array of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> std::result::Result<(), A::Error> {
        while let Some(value) = elements.next_element::<Value>()? {
            self.push(value)?;
        }
        Ok(())
    }
}
