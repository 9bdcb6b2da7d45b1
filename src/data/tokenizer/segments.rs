//! Texts that are encoded in segments, so that no token reaches over from one into the next.

use super::{Tokenizer, ids_of};
use crate::error::{Error, Result};
use serde_json::Value;
use std::sync::Arc;
use tokenizers::{NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizedString};

/// What stands before a segment.
enum Before {
    Nothing,
    /// A special token, or another added one.
    Token(String),
    Text,
}

impl Tokenizer {
    /// Ids of each of the segments that make up a text; nothing is put before or after it. Every segment is encoded as it
    /// would be at its place in the whole, only that no token joins characters of two: where a tokenizer puts a space
    /// before a text, it puts none before a segment that goes on inside a text. So the ids of the first n segments are
    /// those of a text that ends there.
    pub fn encode_segments(&self, segments: &[&str]) -> Result<Vec<Vec<u32>>> {
        let mut before = Before::Nothing;
        let mut all = Vec::with_capacity(segments.len());
        for segment in segments.iter().copied() {
            if segment.is_empty() {
                all.push(Vec::new());
                continue;
            }
            let (first_token, last_token) = self.added_tokens(segment);
            all.push(match &before {
                Before::Nothing => self.encode(segment, false)?,
                Before::Token(token) => {
                    let ids = self.encode(&format!("{token}{segment}"), false)?;
                    match ids.split_first() {
                        Some((first, rest)) if self.token_to_id(token) == Some(*first) => rest.to_vec(),
                        _ => self.encode_inside(segment, first_token)?,
                    }
                }
                Before::Text => self.encode_inside(segment, first_token)?,
            });
            before = last_token.map_or(Before::Text, Before::Token);
        }
        Ok(all)
    }

    /// Where the first added token of a text begins (its end where it has none), and the one that it ends with.
    fn added_tokens(&self, text: &str) -> (usize, Option<String>) {
        let split = self.split(text);
        let parts = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let first =
            parts.iter().find(|(_, _, tokens)| tokens.is_some()).map_or(text.len(), |(_, at, _)| at.0);
        let last = parts.last().and_then(|(_, _, tokens)| tokens.as_ref()?.first());
        (first, last.and_then(|token| self.id_to_token(token.id)))
    }

    /// Where the last added token of a text ends.
    pub fn end_of_last_token(&self, text: &str) -> Option<usize> {
        let split = self.split(text);
        let parts = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        parts.iter().rev().find(|(_, _, tokens)| tokens.is_some()).map(|(_, at, _)| at.1)
    }

    fn split(&self, text: &str) -> PreTokenizedString {
        self.inner.get_added_vocabulary().extract_and_normalize(None::<&NormalizerWrapper>, text)
    }

    /// Ids of a text that goes on inside a text; from `first_token` on it is as everywhere.
    fn encode_inside(&self, text: &str, first_token: usize) -> Result<Vec<u32>> {
        let (head, rest) = text.split_at(first_token);
        let mut ids = match self.continuation()? {
            Some(inner) => ids_of(&inner, head, false)?,
            None => return self.encode(text, false),
        };
        if !rest.is_empty() {
            ids.extend(self.encode(rest, false)?);
        }
        Ok(ids)
    }

    /// The tokenizer that puts nothing before a text; none where this one does not either.
    fn continuation(&self) -> Result<Option<Arc<tokenizers::Tokenizer>>> {
        if let Some(known) = self.continuation.get() {
            return Ok(known.clone());
        }
        let failed = |e: tokenizers::Error| Error::failed(format!("{}: {e}", self.place));
        let text = self.inner.to_string(false).map_err(failed)?;
        let mut definition: Value = serde_json::from_str(&text).map_err(|e| failed(e.into()))?;
        let changed =
            without_prefix(&mut definition["normalizer"]) | without_prefix(&mut definition["pre_tokenizer"]);
        let made = match changed {
            true => {
                let mut inner: tokenizers::Tokenizer = definition.to_string().parse().map_err(failed)?;
                inner.set_encode_special_tokens(self.inner.get_encode_special_tokens());
                Some(Arc::new(inner))
            }
            false => None,
        };
        Ok(self.continuation.get_or_init(|| made).clone())
    }
}

/// Takes out of a normalizer or pre-tokenizer what puts something before a text; whether there was such a thing.
fn without_prefix(part: &mut Value) -> bool {
    match part["type"].as_str() {
        Some("Prepend") => {
            *part = Value::Null;
            true
        }
        Some("Metaspace") => std::mem::replace(&mut part["prepend_scheme"], "never".into()) != "never",
        Some("ByteLevel") => std::mem::replace(&mut part["add_prefix_space"], false.into()) != false,
        Some("Sequence") => {
            let name = if part.get("normalizers").is_some() { "normalizers" } else { "pretokenizers" };
            let Some(parts) = part[name].as_array_mut() else { return false };
            let changed = parts.iter_mut().fold(false, |changed, part| without_prefix(part) | changed);
            parts.retain(|part| !part.is_null());
            changed
        }
        _ => false,
    }
}
