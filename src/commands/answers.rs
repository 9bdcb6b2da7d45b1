//! A file of JSON lines that answers an input line for line, in its order, and that a later start goes on with.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Context, Error, Result};
use crate::files;
use crate::telemetry::console;

/// What is there already of an output: whole lines that answer the first lines of the input.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct KeptLines {
    pub lines: usize,
    bytes: u64,
}

/// Where the settings lie that an output is made with.
fn settings_path(output: &Path) -> PathBuf {
    files::beside(output, ".settings-")
}

/// Looks at what is there of the output `path`; changes nothing. A last line without its end counts as absent. `added`
/// are the keys that an answer adds to its line of `input`.
///
/// # Errors
/// What is there answers other lines, or was made with other `settings` (exit code 2).
pub fn find(
    path: &Path,
    input: &[Map<String, Value>],
    added: &[&str],
    settings: &Value,
) -> Result<KeptLines> {
    let mut bytes = Vec::new();
    let Some(mut file) = files::open(path)? else { return Ok(KeptLines::default()) };
    file.read_to_end(&mut bytes).map_err(|e| files::read_error(path, &e))?;
    let refuse = |what: String| {
        Err(Error::config(format!("{what}; choose another --output, or start over with --overwrite")))
    };
    let end = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
    let bare = |line: &Map<String, Value>| {
        let skipped = line.get("finish_reason").is_some_and(|reason| reason == "error");
        let own =
            line.iter().filter(|(key, _)| !(added.contains(&key.as_str()) || skipped && *key == "error"));
        own.map(|(key, value)| (key.clone(), value.clone())).collect::<Map<_, _>>()
    };
    let mut lines = 0;
    for line in bytes[..end].split_inclusive(|b| *b == b'\n') {
        let answer = serde_json::from_slice::<Map<String, Value>>(line).ok();
        let answer = answer.filter(|line| added.iter().all(|key| line.contains_key(*key)));
        match (answer, input.get(lines)) {
            (Some(answer), Some(asked)) if bare(&answer) == bare(asked) => lines += 1,
            (_, None) => return refuse(format!("{} has more lines than the input", path.display())),
            _ => {
                let at = lines + 1;
                return refuse(format!("{}:{at} is no answer to line {at} of the input", path.display()));
            }
        }
    }
    // Without the settings beside it, the output is taken for what its lines say.
    if let Ok(text) = std::fs::read_to_string(settings_path(path))
        && let Ok(earlier) = serde_json::from_str::<Value>(&text)
        && lines > 0
        && earlier != *settings
    {
        let differs = |key: &&String| earlier.get(*key) != settings.get(*key);
        let keys = settings.as_object().into_iter().flat_map(Map::keys).find(differs);
        let key = keys.map_or("settings", String::as_str);
        let said = |v: &Value| v.get(key).map_or("nothing".into(), Value::to_string);
        let (there, here) = (said(&earlier), said(settings));
        return refuse(format!("{} was begun with {key} {there}, here {here}", path.display()));
    }
    Ok(KeptLines { lines, bytes: end as u64 })
}

/// Answers on their way out: each is written when all before it have been.
pub struct Answers {
    out: Box<dyn Write>,
    file: Option<File>,
    path: PathBuf,
    next: usize,
    early: BTreeMap<usize, String>,
}

impl Answers {
    /// To stdout.
    pub fn print() -> Answers {
        let (path, early) = Default::default();
        Answers { out: Box::new(console::Out), file: None, path, next: 0, early }
    }

    /// To a file, behind what is kept of it.
    pub fn write(path: &Path, kept: KeptLines, settings: &Value) -> Result<Answers> {
        files::create_dir(files::parent(path))?;
        let error = |e| files::write_error(path, &e);
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(error)?;
        if matches!(file.try_lock(), Err(std::fs::TryLockError::WouldBlock)) {
            let path = path.display();
            return Err(Error::failed(format!("cannot write {path}: another process is writing it")));
        }
        if file.metadata().map_err(error)?.is_file() {
            file.set_len(kept.bytes).and_then(|()| file.seek(SeekFrom::End(0))).map_err(error)?;
            files::write_file(&settings_path(path), format!("{settings:#}\n").as_bytes())?;
        }
        let out = Box::new(file.try_clone().map_err(error)?);
        let early = BTreeMap::new();
        Ok(Answers { out, file: Some(file), path: path.to_path_buf(), next: kept.lines, early })
    }

    /// The answer (without a line's end) to line `index` of the input, from 0.
    pub fn put(&mut self, index: usize, line: String) -> Result<()> {
        self.early.insert(index, line);
        let mut ready = String::new();
        while let Some(line) = self.early.remove(&self.next) {
            ready += &line;
            ready.push('\n');
            self.next += 1;
        }
        if ready.is_empty() {
            return Ok(());
        }
        let written = self.out.write_all(ready.as_bytes()).and_then(|()| self.out.flush());
        match &self.file {
            Some(_) => written.map_err(|e| files::write_error(&self.path, &e)),
            None => written.context("cannot write to stdout"),
        }
    }

    /// Brings all to the disk.
    pub fn finish(self) -> Result<()> {
        match &self.file {
            // What is no file cannot always be synced.
            Some(file) if file.metadata().is_ok_and(|m| m.is_file()) => {
                file.sync_all().map_err(|e| files::write_error(&self.path, &e))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use testing::folder::TestFolder;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn a_partly_written_output_is_gone_on_with() {
        let folder = TestFolder::new("answers");
        let path = folder.0.join("out.jsonl");
        let input: Vec<_> =
            (0..4).map(|i| map(json!({"prompt": format!("p{i}"), "completion": "old"}))).collect();
        let (added, settings) = (["completion"], json!({"seed": 1, "top_k": 0}));
        let found = |input: &[Map<String, Value>], settings: &Value| find(&path, input, &added, settings);
        assert_eq!(found(&input, &settings).unwrap(), KeptLines::default());
        let line = |i: usize| json!({"prompt": format!("p{i}"), "completion": i}).to_string();
        let mut answers = Answers::write(&path, KeptLines::default(), &settings).unwrap();
        assert!(Answers::write(&path, KeptLines::default(), &settings).is_err(), "one writer at a time");
        for i in [1, 0, 3] {
            answers.put(i, line(i)).unwrap();
        }
        drop(answers);
        let whole = format!("{}\n{}\n", line(0), line(1));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), whole, "line 3 waits for line 2");
        std::fs::write(&path, format!("{whole}{{\"prompt\": \"p")).unwrap();
        let kept = found(&input, &settings).unwrap();
        assert_eq!((kept.lines, kept.bytes), (2, whole.len() as u64));
        let mut answers = Answers::write(&path, kept, &settings).unwrap();
        for i in [2, 3] {
            answers.put(i, line(i)).unwrap();
        }
        answers.finish().unwrap();
        let all = std::fs::read_to_string(&path).unwrap();
        assert_eq!(all, (0..4).map(|i| line(i) + "\n").collect::<String>());

        let refused = |input: &[Map<String, Value>], settings: &Value, message: &str| {
            let e = found(input, settings).unwrap_err();
            assert!(e.exit_code() == 2 && e.message.contains(message), "{e}");
        };
        refused(&input[..3], &settings, "more lines than the input");
        refused(&[&input[..2], &input[1..]].concat(), &settings, "out.jsonl:3 is no answer to line 3");
        refused(&input, &json!({"seed": 2, "top_k": 0}), "begun with seed 1, here 2");
        std::fs::write(&path, "{\"prompt\": \"p0\"}\n").unwrap();
        refused(&input, &settings, "out.jsonl:1 is no answer");
    }
}
