//! Text files into token shards, on all cores.

use super::odd::OddRecords;
use super::shards::{Header, ShardWriter};
use super::texts::Texts;
use super::tokenizer::Tokenizer;
use crate::config::sections::OnError;
use crate::error::{Error, Result};
use crate::files::AtomicFolder;
use crate::random::mix;
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::sync_channel;

#[derive(Debug, Clone)]
pub struct TokenizeOptions {
    pub inputs: Vec<PathBuf>,
    /// The key of the text in JSON and Parquet.
    pub text_key: String,
    /// What becomes of records without a text.
    pub on_error: OnError,
    /// Share of the documents kept for validation; of a single document, the share of its characters at the end.
    pub valid_fraction: f64,
    pub max_shard_tokens: u64,
}

/// What was written.
#[derive(Debug, Clone)]
pub struct TokenizeSummary {
    pub train: Vec<Header>,
    /// Empty where nothing was kept for validation.
    pub valid: Vec<Header>,
    /// Documents without text, left out.
    pub num_empty: u64,
    /// Records that were skipped.
    pub odd: OddRecords,
}

/// Text that is read before it is encoded and written, in bytes.
const BATCH_BYTES: usize = 8 << 20;
/// Long documents are encoded in pieces of about this many bytes.
const PIECE_BYTES: usize = 64 << 10;

/// Writes `output/{train,valid}/shard-*.tokens` and a copy of the tokenizer, `output/tokenizer/`; all of it or
/// nothing. A document becomes the tokens that the tokenizer puts before a text (BOS or nothing), those of the text,
/// and EOS; special tokens spelt out in a text stay text. Which documents are kept for validation is a hash of their
/// number, at least one of them. `bytes` grows with what was read.
pub fn tokenize(
    options: &TokenizeOptions,
    tokenizer: &Tokenizer,
    output: &Path,
    bytes: &Arc<AtomicU64>,
) -> Result<TokenizeSummary> {
    if !(0.0..1.0).contains(&options.valid_fraction) {
        let fraction = options.valid_fraction;
        return Err(Error::config(format!("--valid-fraction {fraction}: it must be at least 0 and below 1")));
    }
    let Some(&eos) = tokenizer.eos_ids().first() else {
        return Err(Error::data(
            "the tokenizer has no end-of-sequence token; add \"eos_token\" to its tokenizer_config.json",
        ));
    };
    let folder = AtomicFolder::create(output, |name| ["train", "valid", "tokenizer"].contains(&name))?;
    let tokenizer = tokenizer.clone().plain();
    tokenizer.save(&folder.temporary().join("tokenizer"))?;
    let writer = |name: &str| {
        let path = folder.temporary().join(name);
        ShardWriter::new(&path, tokenizer.vocab_size(), tokenizer.hash(), options.max_shard_tokens)
    };
    let mut split = DocumentSplit {
        encoder: Encoder {
            bos: tokenizer.bos_id().filter(|_| tokenizer.adds_bos()),
            eos,
            tokenizer: &tokenizer,
        },
        train: writer("train")?,
        valid: if options.valid_fraction > 0.0 { Some(writer("valid")?) } else { None },
        fraction: options.valid_fraction,
        num_documents: 0,
    };
    let (num_empty, odd) = std::thread::scope(|scope| {
        // Reading runs one or two batches ahead of encoding.
        let (sender, batches) = sync_channel::<Vec<String>>(1);
        let reader = scope.spawn(move || -> Result<(u64, OddRecords)> {
            let (mut batch, mut batch_bytes, mut num_empty) = (Vec::new(), 0, 0);
            let mut texts = Texts::open(&options.inputs, &options.text_key, options.on_error, bytes);
            for text in texts.by_ref() {
                let text = text?;
                if text.is_empty() {
                    num_empty += 1;
                    continue;
                }
                batch_bytes += text.len();
                batch.push(text);
                if batch_bytes >= BATCH_BYTES {
                    batch_bytes = 0;
                    if sender.send(std::mem::take(&mut batch)).is_err() {
                        break; // Writing failed; its error is the one to report.
                    }
                }
            }
            let _ = sender.send(batch);
            Ok((num_empty, texts.odd().clone()))
        });
        // The last document is held back: what becomes of it depends on what the others were.
        let mut held = None;
        let mut written = Ok(());
        for mut batch in batches {
            batch.splice(0..0, held.take());
            held = batch.pop();
            written = split.push(&batch);
            if written.is_err() {
                break;
            }
        }
        let left_out = match reader.join() {
            Ok(read) => read?,
            Err(_) => return Err(Error::failed("reading the input failed")),
        };
        written?;
        if held.is_none() && left_out.1.total() > 0 {
            return Err(Error::data(format!("no text is left: {}", left_out.1.skipped())));
        }
        split.push_last(held)?;
        Ok(left_out)
    })?;
    let train = split.train.finish()?;
    let valid = split.valid.map_or(Ok(Vec::new()), ShardWriter::finish)?;
    folder.commit()?;
    Ok(TokenizeSummary { train, valid, num_empty, odd })
}

struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    bos: Option<u32>,
    eos: u32,
}

impl Encoder<'_> {
    /// The tokens of every text, in pieces, with BOS and EOS around them.
    fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<Vec<u32>>>> {
        let pieces: Vec<Vec<&str>> = texts.iter().map(|t| self.tokenizer.pieces(t, PIECE_BYTES)).collect();
        let flat: Vec<&str> = pieces.iter().flatten().copied().collect();
        let mut encoded = flat
            .into_par_iter()
            .map(|p| self.tokenizer.encode(p, false))
            .collect::<Result<Vec<_>>>()?
            .into_iter();
        let documents = pieces.iter().map(|pieces| {
            let mut parts = vec![self.bos.into_iter().collect()];
            parts.extend(encoded.by_ref().take(pieces.len()));
            parts.push(vec![self.eos]);
            parts
        });
        Ok(documents.collect())
    }
}

/// Hands documents to training or validation.
struct DocumentSplit<'a> {
    encoder: Encoder<'a>,
    train: ShardWriter,
    valid: Option<ShardWriter>,
    fraction: f64,
    num_documents: u64,
}

impl DocumentSplit<'_> {
    fn write(&mut self, texts: &[&str], to_valid: impl Fn(usize) -> bool) -> Result<()> {
        for (i, (parts, text)) in self.encoder.encode(texts)?.iter().zip(texts).enumerate() {
            let parts: Vec<&[u32]> = parts.iter().map(Vec::as_slice).collect();
            let writer = match &mut self.valid {
                Some(valid) if to_valid(i) => valid,
                _ => &mut self.train,
            };
            writer.push(&parts, text.len())?;
        }
        Ok(())
    }

    fn hashed_to_valid(&self, index: u64) -> bool {
        (mix(index + 1) as f64) < self.fraction * 2f64.powi(64)
    }

    fn push(&mut self, texts: &[String]) -> Result<()> {
        let first = self.num_documents;
        self.num_documents += texts.len() as u64;
        let chosen: Vec<bool> = (0..texts.len()).map(|i| self.hashed_to_valid(first + i as u64)).collect();
        self.write(&texts.iter().map(String::as_str).collect::<Vec<_>>(), |i| chosen[i])
    }

    /// The last document: to whichever part has none yet; if it is the only one, it is split.
    fn push_last(&mut self, text: Option<String>) -> Result<()> {
        let Some(text) = text else { return Err(Error::data("there is no text in the input")) };
        if self.num_documents == 0 && self.valid.is_some() {
            let num_train = (text.chars().count() as f64 * (1.0 - self.fraction)) as usize;
            let at = text.char_indices().nth(num_train).map_or(text.len(), |(at, _)| at);
            let (train, valid) = text.split_at(at);
            if train.is_empty() || valid.is_empty() {
                let fraction = self.fraction;
                return Err(Error::data(format!(
                    "the input is one document of {} bytes, too short to keep {fraction} of it for validation; give \
                     more text, or --valid-fraction 0",
                    text.len()
                )));
            }
            return self.write(&[train, valid], |i| i == 1);
        }
        let none_valid = self.valid.as_ref().is_some_and(|v| v.num_documents() == 0);
        let to_valid =
            none_valid || (self.train.num_documents() > 0 && self.hashed_to_valid(self.num_documents));
        self.write(&[&text], |_| to_valid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::shards::TokenSet;
    use crate::data::tokenizer::tests::small;
    use testing::folder::TestFolder;

    fn run(
        folder: &TestFolder,
        inputs: &[PathBuf],
        fraction: f64,
    ) -> Result<(TokenizeSummary, String, Option<String>)> {
        let tokenizer = small(290);
        let options = TokenizeOptions {
            inputs: inputs.to_vec(),
            text_key: "text".into(),
            on_error: OnError::Refuse,
            valid_fraction: fraction,
            max_shard_tokens: 500,
        };
        let output = folder.0.join("out");
        let summary = tokenize(&options, &tokenizer, &output, &Arc::default())?;
        let again = Tokenizer::load(output.join("tokenizer"))?;
        let read = |name: &str| -> Result<String> {
            let set = TokenSet::open(output.join(name))?;
            set.verify()?;
            set.check(Some(again.hash()), again.vocab_size())?;
            let mut ids = Vec::new();
            set.read(0, set.num_tokens(), &mut ids)?;
            again.decode(&ids.iter().map(|id| *id as u32).collect::<Vec<_>>(), false)
        };
        let valid = if fraction > 0.0 { Some(read("valid")?) } else { None };
        Ok((summary, read("train")?, valid))
    }

    #[test]
    fn documents_are_framed_split_and_all_there() {
        let folder = TestFolder::new("tokenize");
        let texts: Vec<String> =
            (0..1000).map(|i| format!("document {i} </s> of\n{}", "x y ".repeat(i % 7))).collect();
        let lines: String = texts.iter().map(|t| format!("{}\n", serde_json::json!({"text": t}))).collect();
        let input = folder.file("a.jsonl", format!("{lines}{{\"text\": \"\"}}\n"));
        let (summary, train, valid) = run(&folder, &[input], 0.1).unwrap();
        let valid = valid.unwrap();
        let sum = |headers: &[Header], f: fn(&Header) -> u64| headers.iter().map(f).sum::<u64>();
        let (n_train, n_valid) =
            (sum(&summary.train, |h| h.num_documents), sum(&summary.valid, |h| h.num_documents));
        assert_eq!((n_train + n_valid, summary.num_empty), (1000, 1));
        assert!((70..130).contains(&n_valid), "{n_valid}");
        let bytes = sum(&summary.train, |h| h.text_bytes) + sum(&summary.valid, |h| h.text_bytes);
        assert_eq!(bytes as usize, texts.iter().map(String::len).sum::<usize>());
        assert!(summary.train.len() > 10 && summary.train.iter().all(|h| h.num_tokens <= 500));
        let (mut t, mut v) = (train.as_str(), valid.as_str());
        for text in &texts {
            let framed = format!("<s>{text}</s>");
            match (t.strip_prefix(&framed), v.strip_prefix(&framed)) {
                (Some(rest), _) => t = rest,
                (_, Some(rest)) => v = rest,
                _ => panic!("`{framed}` is missing"),
            }
        }
        assert_eq!((t, v), ("", ""));
    }

    #[test]
    fn the_end_of_a_single_document_is_for_validation() {
        let folder = TestFolder::new("tokenize-single");
        let text: String = (0..3000).map(|i| format!("línea number {i}\n")).collect();
        let (_, train, valid) = run(&folder, &[folder.file("a.txt", &text)], 0.1).unwrap();
        let valid = valid.unwrap();
        let strip = |t: &str| t.strip_prefix("<s>").unwrap().strip_suffix("</s>").unwrap().to_string();
        assert_eq!(strip(&train) + &strip(&valid), text);
        assert_eq!(strip(&train).chars().count(), (text.chars().count() as f64 * 0.9) as usize);
        let (summary, train, valid) = run(&folder, &[folder.file("a.txt", &text)], 0.0).unwrap();
        assert!(strip(&train) == text && valid.is_none() && summary.valid.is_empty());
        assert!(!folder.0.join("out/valid").exists());
    }

    #[test]
    fn few_documents_leave_neither_part_empty() {
        let folder = TestFolder::new("tokenize-few");
        for n in 2..6 {
            for fraction in [1e-9, 0.999_999] {
                let input = folder.file("a.jsonl", "{\"text\": \"abc\"}\n".repeat(n));
                let (summary, ..) = run(&folder, &[input], fraction).unwrap();
                let count =
                    |headers: &[Header]| headers.iter().map(|h| h.num_documents).sum::<u64>() as usize;
                let expected = if fraction < 0.5 { (n - 1, 1) } else { (1, n - 1) };
                assert_eq!((count(&summary.train), count(&summary.valid)), expected);
            }
        }
    }

    #[test]
    fn failures_leave_nothing_behind() {
        let folder = TestFolder::new("tokenize-bad");
        let bad = folder.file("a.jsonl", "{\"text\": \"a\"}\n{\"text\": 3}\n");
        let names = || std::fs::read_dir(&folder.0).unwrap().count();
        let before = names();
        let error = |input: &Path, fraction| run(&folder, &[input.to_path_buf()], fraction).err().unwrap();
        assert!(error(&bad, 0.1).message.contains("a.jsonl:2: `text` is a number, not a text"));
        assert_eq!(error(&bad, 1.0).exit_code(), 2);
        assert_eq!(names(), before);
        let empty = folder.file("b.jsonl", "\n");
        assert_eq!(error(&empty, 0.1).message, "there is no text in the input");
        assert!(error(&folder.file("c.txt", "x"), 0.1).message.contains("too short"));
        assert_eq!(names(), before + 2);
    }
}
