//! `metrics.jsonl`: one JSON object a line, every number in full precision.

use std::fs::File;
use std::io::BufRead;
use std::path::Path;

use serde_json::{Map, Number, Value};

use super::LogCut;
use super::append::{AppendFile, remove_file, rewrite};
use crate::error::{Context, Result};

/// One line of `metrics.jsonl`: `kind`, `step` (1-based, after the update), and the keys that are added, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricsLine {
    kind: String,
    step: u64,
    fields: Map<String, Value>,
    notes: Vec<String>,
}

impl MetricsLine {
    /// A record of this kind, such as `train`, for an update: `{"type": kind, "step": step}`.
    pub fn new(kind: &str, step: u64) -> Self {
        MetricsLine { kind: kind.to_string(), step, fields: Map::new(), notes: vec![] }
    }

    /// A number that was computed in float32: the shortest decimal that reads back to the same float32.
    pub fn float32(self, key: &str, x: f32) -> Self {
        let short = x.to_string().parse().unwrap_or(f64::from(x));
        // Read by way of float64, as JSON readers do, it must still be the same float32.
        self.float(key, if short as f32 == x { short } else { f64::from(x) })
    }

    /// A float64, as the shortest decimal that reads back to it. NaN and infinities become null and a `note`.
    pub fn float(mut self, key: &str, x: f64) -> Self {
        let number = Number::from_f64(x);
        if number.is_none() {
            self.notes.push(format!("{key} is {x}"));
        }
        self.fields.insert(key.to_string(), number.map_or(Value::Null, Value::Number));
        self
    }

    /// Adds a count.
    pub fn count(mut self, key: &str, n: u64) -> Self {
        self.fields.insert(key.to_string(), n.into());
        self
    }

    /// A text; TensorBoard's scalars leave it out.
    pub fn text(mut self, key: &str, text: &str) -> Self {
        self.fields.insert(key.to_string(), text.into());
        self
    }

    /// Adds the keys of another record, and its notes.
    pub fn with(mut self, other: MetricsLine) -> Self {
        self.fields.extend(other.fields);
        self.notes.extend(other.notes);
        self
    }

    /// Any value; TensorBoard's scalars leave out what is no number.
    pub fn json(mut self, key: &str, value: Value) -> Self {
        self.fields.insert(key.to_string(), value);
        self
    }

    /// Its `type`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The update that it is about.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The value of a key, if it is a (finite) number.
    pub fn get(&self, key: &str) -> Option<f64> {
        self.fields.get(key).and_then(Value::as_f64)
    }

    /// The text of a key; empty where it has none.
    pub fn text_of(&self, key: &str) -> &str {
        self.fields.get(key).and_then(Value::as_str).unwrap_or("")
    }

    /// The keys whose values are finite numbers, without `step`.
    pub fn numbers(&self) -> impl Iterator<Item = (&str, f64)> {
        self.fields.iter().filter_map(|(key, value)| Some((key.as_str(), value.as_f64()?)))
    }

    /// The object, on one line without its end.
    pub fn to_json(&self) -> String {
        let mut object = Map::new();
        object.insert("kind".into(), self.kind.clone().into());
        object.insert("step".into(), self.step.into());
        object.extend(self.fields.clone());
        if !self.notes.is_empty() {
            object.insert("note".into(), self.notes.join("; ").into());
        }
        Value::Object(object).to_string()
    }
}

/// Appends to `metrics.jsonl`. A line that cannot be written is lost, with one warning; the run goes on.
#[derive(Debug)]
pub struct MetricsWriter {
    file: AppendFile,
    /// The last step of the training that was there.
    last_step: Option<u64>,
}

impl MetricsWriter {
    /// Opens the file and cuts off what `cut` says: everything for a run that starts (`None`). What is cut stays under the other
    /// names that the file may have.
    ///
    /// # Errors
    /// The file cannot be made, read or rewritten.
    pub fn open(path: &Path, cut: Option<LogCut>) -> Result<Self> {
        let what = || format!("cannot open {}", path.display());
        let (len, last_step) = match cut {
            Some(cut) if crate::files::exists(path)? => truncate_after(path, cut).with_context(what)?,
            Some(_) => (0, None),
            None => {
                remove_file(path).with_context(what)?;
                (0, None)
            }
        };
        let file = AppendFile::open(path, len).with_context(what)?;
        Ok(MetricsWriter { file, last_step })
    }

    /// Writes the record as a line, at once.
    pub fn append(&mut self, record: &MetricsLine) {
        self.file.append(format!("{}\n", record.to_json()).as_bytes());
    }

    /// Lines lost so far.
    pub fn lost(&self) -> u64 {
        self.file.lost()
    }

    /// The last step of the training that was there when the file was opened; 0 where there was none.
    pub fn last_step(&self) -> u64 {
        self.last_step.unwrap_or(0)
    }

    /// The open file, to sync it; none where nothing is written.
    pub fn file(&self) -> Option<File> {
        self.file.file()
    }
}

/// Cuts off all lines that `cut` covers, and a last line that has no end. The file is replaced in one move; one that needs no
/// cut is left alone. Returns its length in bytes and the last step of the training that is left.
pub fn truncate_after(path: &Path, cut: LogCut) -> Result<(u64, Option<u64>)> {
    let (mut kept, mut last_step) = (0, None);
    rewrite(path, |input, output| {
        let (mut line, mut left_out) = (vec![], false);
        while input.read_until(b'\n', &mut line)? > 0 {
            let object = serde_json::from_slice::<Value>(&line).ok();
            let kind = object.as_ref().and_then(|o| o.get("kind")?.as_str()).unwrap_or_default();
            let step = object.as_ref().and_then(|o| o.get("step")?.as_u64());
            if line.ends_with(b"\n") && !step.is_some_and(|step| cut.covers(kind == "train", step)) {
                output.put(&line)?;
                kept += line.len() as u64;
                last_step = step.filter(|_| kind == "train").or(last_step);
            } else {
                left_out = true;
            }
            line.clear();
        }
        Ok(left_out)
    })?;
    Ok((kept, last_step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use testing::folder::TestFolder;

    #[test]
    fn numbers_read_back_exactly() {
        let mut bits = 0x2545_f491_4f6c_dd1du64;
        for _ in 0..20_000 {
            bits = bits.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (single, double) = (f32::from_bits((bits >> 32) as u32), f64::from_bits(bits));
            if !single.is_finite() || !double.is_finite() {
                continue;
            }
            let line = MetricsLine::new("train", 1).float32("a", single).float("b", double).to_json();
            let object: Value = serde_json::from_str(&line).unwrap();
            assert_eq!((object["a"].as_f64().unwrap() as f32).to_bits(), single.to_bits(), "{line}");
            assert_eq!(object["b"].as_f64().unwrap().to_bits(), double.to_bits(), "{line}");
        }
        let line = MetricsLine::new("train", 3).float32("loss", 0.1).count("tokens", u64::MAX).to_json();
        assert_eq!(line, r#"{"kind":"train","step":3,"loss":0.1,"tokens":18446744073709551615}"#);
    }

    #[test]
    fn what_is_not_finite_is_null_and_noted() {
        let record = MetricsLine::new("train", 1)
            .float32("loss", f32::NAN)
            .float("lr", 0.5)
            .float("grad_norm", f64::NEG_INFINITY);
        let expected = r#"{"kind":"train","step":1,"loss":null,"lr":0.5,"grad_norm":null,"note":"loss is NaN; grad_norm is -inf"}"#;
        assert_eq!(record.to_json(), expected);
        assert_eq!(record.numbers().collect::<Vec<_>>(), [("lr", 0.5)]);
    }

    #[test]
    fn resume_cuts_later_steps_and_half_lines() {
        let dir = TestFolder::new("telemetry");
        let path = dir.path("metrics.jsonl");
        let mut log = MetricsWriter::open(&path, None).unwrap();
        for step in [1, 2, 3, 4] {
            log.append(&MetricsLine::new("train", step));
        }
        log.append(&MetricsLine::new("valid", 2));
        let half = [std::fs::read(&path).unwrap(), br#"{"kind":"train","step":2"#.to_vec()].concat();
        std::fs::write(&path, half).unwrap();

        let mut log = MetricsWriter::open(&path, Some(LogCut { after: 2, validation: false })).unwrap();
        log.append(&MetricsLine::new("train", 3));
        let expected = [("train", 1), ("train", 2), ("valid", 2), ("train", 3)];
        let expected: Vec<_> =
            expected.map(|(kind, step)| MetricsLine::new(kind, step).to_json() + "\n").into();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected.concat());
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);

        // A validation that is done anew.
        let log = MetricsWriter::open(&path, Some(LogCut { after: 2, validation: true })).unwrap();
        assert_eq!(log.last_step(), 2);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected[..2].concat());

        MetricsWriter::open(&path, None).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }
}
