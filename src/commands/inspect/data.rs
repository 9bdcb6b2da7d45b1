//! Token shards and tokenizers.

use std::path::Path;

use serde_json::{Value, json};

use super::{Depth, InspectReport, is_there, names};
use crate::data::shards::TokenSet;
use crate::data::tokenizer::{Tokenizer, hex};
use crate::error::Result;

/// A folder of shards, or one.
pub fn tokens(path: &Path, depth: Depth) -> InspectReport {
    let kind = if path.is_dir() { "token shards" } else { "token shard" };
    let mut report = InspectReport::new(kind, path);
    let shards: Vec<_> = match path.is_dir() {
        true => names(path)
            .unwrap_or_default()
            .iter()
            .filter(|n| n.ends_with(".tokens"))
            .map(|n| path.join(n))
            .collect(),
        false => vec![path.to_path_buf()],
    };
    let mut files = Vec::new();
    let (mut tokens, mut documents, mut text, mut bytes) = (0, 0, 0, 0);
    let mut first: Option<TokenSet> = None;
    for shard in shards {
        let on_disk = shard.metadata().map_or(0, |m| m.len());
        bytes += on_disk;
        let name = shard.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut file = json!({"name": name, "bytes": on_disk});
        if let Some(set) = report.noted(TokenSet::open(&shard)) {
            file["num_tokens"] = json!(set.num_tokens());
            file["num_documents"] = json!(set.num_documents());
            tokens += set.num_tokens();
            documents += set.num_documents();
            text += set.text_bytes();
            if depth.checksums {
                report.noted(set.verify());
            }
            first.get_or_insert(set);
        }
        files.push(file);
    }
    report.fact("num_tokens", tokens);
    report.fact("num_documents", documents);
    report.fact("text_bytes", text);
    if let Some(set) = &first {
        report.fact("vocab_size", set.vocab_size());
        report.fact("dtype", if set.vocab_size() <= 1 << 16 { "u16" } else { "u32" });
        report.fact("tokenizer_sha256", hex(&set.tokenizer_hash()));
    }
    report.fact("bytes", bytes);
    report.fact("files", files);
    // Each is sound by itself: do they belong together?
    if report.problems.is_empty() {
        report.noted(TokenSet::open(path));
    }
    report
}

/// What `corral tokenize` writes: `train`, `valid`, `tokenizer`.
pub fn dataset(path: &Path, depth: Depth) -> Result<InspectReport> {
    let mut report = InspectReport::new("tokenized text", path);
    for name in ["train", "valid"] {
        if is_there(&path.join(name)) {
            report.parts.push(tokens(&path.join(name), depth));
        }
    }
    let dir = path.join("tokenizer");
    if is_there(&dir) {
        let part = tokenizer(&dir);
        for shards in &report.parts {
            let other =
                shards.facts.get("tokenizer_sha256").filter(|hash| part.facts.get("sha256") != Some(*hash));
            if other.is_some() && part.problems.is_empty() {
                let what =
                    format!("{}: made with another tokenizer than {}", shards.path.display(), dir.display());
                report.problems.push(what);
            }
        }
        report.parts.push(part);
    } else {
        report.problem(format!("{}: missing", dir.display()));
    }
    Ok(report)
}

/// A folder with a tokenizer, or its `tokenizer.json`.
pub fn tokenizer(path: &Path) -> InspectReport {
    let mut report = InspectReport::new("tokenizer", path);
    if let Some(tokenizer) = report.noted(Tokenizer::load(path)) {
        describe(&mut report, &tokenizer);
    }
    report
}

fn describe(report: &mut InspectReport, tokenizer: &Tokenizer) {
    let token = |id: u32| match tokenizer.id_to_token(id) {
        Some(text) => Value::from(format!("{id} {text}")),
        None => json!(id),
    };
    report.fact("vocab_size", tokenizer.vocab_size());
    report.fact("bos", tokenizer.bos_id().map(token));
    report.fact("adds_bos", tokenizer.adds_bos());
    report.fact("eos", tokenizer.eos_ids().iter().map(|id| token(*id)).collect::<Vec<_>>());
    report.fact("pad", tokenizer.pad_id().map(token));
    report.fact("chat_template", tokenizer.chat_template().is_some());
    report.fact("sha256", hex(&tokenizer.hash()));
}
