//! Batched generation: prompts take slots of the KV cache, leave them when they are finished, and others follow.

use std::collections::VecDeque;

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::generate::sampler::{self, Choice, Sampling};
use crate::model::{KvCache, Llama};

/// Prompt tokens, padding included, that one forward reads at most: bounds the memory of activations.
const PREFILL_TOKENS: usize = 8192;

#[derive(Debug, Clone)]
pub struct Options<'a> {
    pub sampling: Sampling,
    pub max_new_tokens: usize,
    /// Rows in work at once.
    pub batch_size: usize,
    /// Any of these ids ends a row.
    pub eos: &'a [i64],
    /// Any of these texts ends a row; the tokenizer tells where one is complete.
    pub stop: Option<Stop<'a>>,
}

#[derive(Clone, Copy)]
pub struct Stop<'a> {
    pub texts: &'a [String],
    pub tokenizer: &'a Tokenizer,
}

impl std::fmt::Debug for Stop<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.texts).finish()
    }
}

/// What ended a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// A token that ends a sequence.
    Eos,
    /// A stop text.
    Stop,
    /// `max_new_tokens`, or the model's last position.
    Length,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The tokens that were chosen, with the one that ended the row.
    pub ids: Vec<i64>,
    /// The log-probability of each, in nats, under the model itself (at temperature 1, with nothing cut off).
    pub logprobs: Vec<f64>,
    pub finish: Finish,
}

/// A prompt and the number of its sample, which keys its random draws: equal numbers with equal seeds draw equally.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    pub prompt: Vec<i64>,
    pub sample: u64,
}

/// A token was chosen: news of a generation under way.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Which prompt.
    pub index: usize,
    /// The completion so far.
    pub ids: &'a [i64],
    /// What ended it, with this token.
    pub finish: Option<Finish>,
}

/// A row in work.
struct Row {
    index: usize,
    slot: usize,
    completion: Completion,
}

/// Continues every prompt; completions come in the prompts' order. `on_token` is told of each token as it is chosen.
///
/// # Errors
/// A prompt without tokens, with ids beyond the vocabulary, or as long as the model's positions or longer.
pub fn generate(
    model: &mut Llama,
    generations: &[Generation],
    options: &Options,
    mut on_token: impl FnMut(Progress) -> Result<()>,
) -> Result<Vec<Completion>> {
    check(model, generations, options)?;
    let slots = options.batch_size.min(generations.len());
    let mut cache = KvCache::new(model, slots);
    let mut free: Vec<usize> = (0..slots).rev().collect();
    let mut done: Vec<Option<Completion>> = generations.iter().map(|_| None).collect();
    // The longest first: prompts that are read together then differ little in length, and the cache grows early.
    let mut waiting: Vec<usize> = (0..generations.len()).collect();
    waiting.sort_by_key(|i| std::cmp::Reverse(generations[*i].prompt.len()));
    let mut waiting = VecDeque::from(waiting);
    let mut rows: Vec<Row> = Vec::new();
    while !waiting.is_empty() || !rows.is_empty() {
        // New rows are read while there are slots; then all rows take a step.
        let admitted = admit(&mut waiting, &mut free, generations);
        let first = if admitted.is_empty() { 0 } else { rows.len() };
        let hidden = if admitted.is_empty() {
            let ids: Vec<i64> = rows.iter().filter_map(|r| r.completion.ids.last().copied()).collect();
            let slots: Vec<usize> = rows.iter().map(|r| r.slot).collect();
            model.decode(&ids, &slots, &mut cache)?
        } else {
            let prompts: Vec<&[i64]> =
                admitted.iter().map(|r| generations[r.index].prompt.as_slice()).collect();
            let slots: Vec<usize> = admitted.iter().map(|r| r.slot).collect();
            let hidden = model.prefill(&prompts, &slots, &mut cache)?;
            rows.extend(admitted);
            hidden
        };
        let logits = model.next_token_logits(&hidden)?;
        let stepped = &mut rows[first..];
        let keys: Vec<(u64, u64)> =
            stepped.iter().map(|r| (generations[r.index].sample, r.completion.ids.len() as u64)).collect();
        let mut finished = Vec::new();
        for (row, choice) in stepped.iter_mut().zip(sampler::choose(&logits, &keys, &options.sampling)?) {
            let Choice { id, logprob } = choice;
            row.completion.ids.push(id);
            row.completion.logprobs.push(logprob);
            let room = model.shape.max_position_embeddings as usize - generations[row.index].prompt.len();
            let finish = finish(&row.completion.ids, options, room)?;
            on_token(Progress { index: row.index, ids: &row.completion.ids, finish })?;
            if let Some(finish) = finish {
                row.completion.finish = finish;
                finished.push(row.slot);
            }
        }
        for row in rows.extract_if(.., |r| finished.contains(&r.slot)) {
            cache.clear(row.slot);
            free.push(row.slot);
            done[row.index] = Some(row.completion);
        }
    }
    model.release_all();
    Ok(done.into_iter().flatten().collect())
}

fn check(model: &Llama, generations: &[Generation], options: &Options) -> Result<()> {
    options.sampling.check()?;
    if options.max_new_tokens == 0 || options.batch_size == 0 {
        return Err(Error::config("max-new-tokens and batch-size must be at least 1"));
    }
    let positions = model.shape.max_position_embeddings as usize;
    for (i, g) in generations.iter().enumerate() {
        let n = g.prompt.len();
        if n == 0 {
            return Err(Error::data(format!(
                "prompt {} has no tokens, and there is nothing to continue",
                i + 1
            )));
        }
        if n >= positions {
            return Err(Error::data(format!(
                "prompt {} has {n} tokens; the model's {positions} positions (max_position_embeddings) leave no room \
                 for a completion: shorten it",
                i + 1
            )));
        }
    }
    Ok(())
}

/// Gives free slots to waiting prompts, as many as one forward may read.
fn admit(waiting: &mut VecDeque<usize>, free: &mut Vec<usize>, generations: &[Generation]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    // The first is the longest: the width of the forward.
    let width = waiting.front().map_or(0, |i| generations[*i].prompt.len());
    while (rows.is_empty() || (rows.len() + 1) * width <= PREFILL_TOKENS)
        && !waiting.is_empty()
        && let Some(slot) = free.pop()
    {
        if let Some(index) = waiting.pop_front() {
            let completion = Completion { ids: Vec::new(), logprobs: Vec::new(), finish: Finish::Length };
            rows.push(Row { index, slot, completion });
        }
    }
    rows
}

/// Whether the newest token ends the row. `room`: positions that the prompt left.
fn finish(ids: &[i64], options: &Options, room: usize) -> Result<Option<Finish>> {
    if ids.last().is_some_and(|id| options.eos.contains(id)) {
        return Ok(Some(Finish::Eos));
    }
    if let Some(stop) = &options.stop
        && stop.is_complete(ids)?
    {
        return Ok(Some(Finish::Stop));
    }
    Ok((ids.len() >= options.max_new_tokens.min(room)).then_some(Finish::Length))
}

impl Stop<'_> {
    /// Whether the newest token completes a stop text. A text ends in the newest token, and every other token of it
    /// has a byte at least, so only so many tokens are decoded; a few more, since decoders treat the first ones apart.
    fn is_complete(&self, ids: &[i64]) -> Result<bool> {
        let longest = self.texts.iter().map(String::len).max().unwrap_or(0);
        let tail = &ids[ids.len().saturating_sub(longest + 8)..];
        let text = decode(self.tokenizer, tail)?;
        Ok(self.texts.iter().any(|stop| text.contains(stop.as_str())))
    }
}

/// The text of a completion, without special tokens and up to the first of the stop texts. It is what the tokens say
/// after their prompt: some tokenizers drop a space where a text begins.
pub fn text(tokenizer: &Tokenizer, prompt: &[i64], ids: &[i64], stop: &[String]) -> Result<String> {
    let all = decode(tokenizer, &[prompt, ids].concat())?;
    let mut text = match all.strip_prefix(&decode(tokenizer, prompt)?) {
        Some(text) => text.to_string(),
        None => decode(tokenizer, ids)?,
    };
    if let Some(end) = stop.iter().filter_map(|s| text.find(s.as_str())).min() {
        text.truncate(end);
    }
    Ok(text)
}

fn decode(tokenizer: &Tokenizer, ids: &[i64]) -> Result<String> {
    let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
    tokenizer.decode(&ids, true)
}
