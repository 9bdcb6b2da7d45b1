//! Continuous batching: prompts take slots of the KV cache, leave them when they are finished, and others follow at once.
//!
//! [`Engine::step`] is one forward: it reads waiting prompts where slots are free, else one more token in every row. The
//! samples of one request share the reading of its prompt: the keys and values are copied to the slots of the others.
//! What a row draws depends on its request alone, never on the rows beside it or on the rank.

use std::collections::VecDeque;

use kernels::c10d::ReduceOp;
use tch::Tensor;

use crate::config::shape::Shape;
use crate::error::{Error, Result};
use crate::generate::sampler::{self, Choice, Draw, Sampling};
use crate::generate::stop::Stop;
use crate::model::{KvCache, Llama};

/// Prompt tokens, padding included, that one forward reads at most: bounds the memory of activations.
pub const PREFILL_TOKENS: usize = 8192;

/// How an [`Engine`] samples, and when it ends a row.
#[derive(Debug, Clone)]
pub struct EngineOptions<'a> {
    /// Temperature, truncation and seed of the draws.
    pub sampling: Sampling,
    /// Rows in work at once.
    pub batch_size: usize,
    /// Any of these ids ends a row.
    pub eos: &'a [i64],
    /// Any of these texts ends a row; the tokenizer tells where one is complete.
    pub stop: Option<Stop<'a>>,
}

/// A prompt and what is wanted of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<i64>,
    /// A completion for each. The numbers key the random draws: equal numbers with equal seeds draw equally.
    pub samples: Vec<u64>,
    /// Tokens that a completion has at least before a token that ends it is chosen; stop texts end it all the same.
    pub min_new_tokens: usize,
    /// Tokens of the response at most.
    pub max_new_tokens: usize,
}

impl Request {
    /// One completion.
    pub fn new(prompt: Vec<i64>, sample: u64, max_new_tokens: usize) -> Request {
        Request { prompt, samples: vec![sample], min_new_tokens: 0, max_new_tokens }
    }

    /// Refuses what a model of this shape cannot continue.
    pub fn check(&self, shape: &Shape) -> Result<()> {
        let (n, positions) = (self.prompt.len(), shape.max_position_embeddings as usize);
        if self.max_new_tokens == 0 || self.min_new_tokens > self.max_new_tokens {
            return Err(Error::config(format!(
                "max-new-tokens is {}; it must be at least 1, and at least min-new-tokens ({})",
                self.max_new_tokens, self.min_new_tokens
            )));
        }
        if n == 0 {
            return Err(Error::data("the prompt has no tokens, so there is nothing to continue"));
        }
        if n >= positions {
            return Err(Error::data(format!(
                "the prompt has {n} tokens; the model's {positions} positions (max_position_embeddings) leave no room \
                 for a completion: shorten it"
            )));
        }
        if let Some(id) = self.prompt.iter().find(|id| !(0..shape.vocab_size).contains(*id)) {
            return Err(Error::data(format!(
                "token id {id} is not in the model's vocabulary of {}; is the tokenizer the model's?",
                shape.vocab_size
            )));
        }
        Ok(())
    }

    /// Whether the newest of `ids` ends a completion.
    pub(super) fn finish(
        &self,
        ids: &[i64],
        options: &EngineOptions,
        positions: usize,
    ) -> Result<Option<Finish>> {
        if ids.last().is_some_and(|id| options.eos.contains(id)) {
            return Ok(Some(Finish::Eos));
        }
        if let Some(stop) = &options.stop
            && stop.is_complete(ids)?
        {
            return Ok(Some(Finish::Stop));
        }
        let most = self.max_new_tokens.min(positions - self.prompt.len());
        Ok((ids.len() >= most).then_some(Finish::Length))
    }

    /// What the next token of a completion is drawn for.
    pub(super) fn draw(&self, completion: &Completion) -> Draw {
        let position = completion.ids.len() as u64;
        let sample = self.samples[completion.sample];
        Draw { sample, position, may_end: position + 1 >= self.min_new_tokens as u64 }
    }
}

/// What ended a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// A token that ends a sequence.
    Eos,
    /// A stop text.
    Stop,
    /// `max_new_tokens`, or the model's last position.
    Length,
}

/// A finished row: the prompt's number, the response and how it ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Which request, by the number that [`Engine::add`] gave it.
    pub request: usize,
    /// Which of its samples.
    pub sample: usize,
    /// The tokens that were chosen, with the one that ended it.
    pub ids: Vec<i64>,
    /// The log-probability of each, in nats, under the model itself (at temperature 1, with nothing cut off).
    pub logprobs: Vec<f64>,
    /// The same under the distribution that the token was drawn from; 0 where the choice was greedy.
    pub sampler_logprobs: Vec<f64>,
    /// What ended it; `Length` while it is in work.
    pub finish: Finish,
}

impl Completion {
    pub(super) fn begin(request: usize, sample: usize) -> Completion {
        let (ids, logprobs, sampler_logprobs) = Default::default();
        Completion { request, sample, ids, logprobs, sampler_logprobs, finish: Finish::Length }
    }

    pub(super) fn push(&mut self, choice: Choice) {
        self.ids.push(choice.id);
        self.logprobs.push(choice.logprob);
        self.sampler_logprobs.push(choice.sampler_logprob);
    }
}

/// A request of which not all samples have a slot yet.
struct Waiting {
    request: usize,
    /// The next sample to begin.
    next: usize,
    /// The hidden state of the prompt's last token, T [1, C], once it was read; some slot then holds the prompt until
    /// all samples have begun.
    hidden: Option<Tensor>,
}

/// A completion in work.
struct EngineRow {
    slot: usize,
    completion: Completion,
}

/// Generates for any number of requests, which may be added at any time. The model's values must stay as they are while
/// rows are in work.
pub struct Engine<'a> {
    options: EngineOptions<'a>,
    cache: KvCache,
    free: Vec<usize>,
    /// The request whose prompt the slot begins with.
    prompt_in: Vec<Option<usize>>,
    requests: Vec<Request>,
    waiting: VecDeque<Waiting>,
    rows: Vec<EngineRow>,
    finished: Vec<Completion>,
}

impl<'a> Engine<'a> {
    /// An engine without requests, with `options.batch_size` slots.
    pub fn new(model: &Llama, options: EngineOptions<'a>) -> Result<Engine<'a>> {
        options.sampling.check()?;
        if options.batch_size == 0 {
            return Err(Error::config("batch-size must be at least 1"));
        }
        let slots = options.batch_size;
        Ok(Engine {
            cache: KvCache::new(model, slots),
            free: (0..slots).rev().collect(),
            prompt_in: vec![None; slots],
            requests: Vec::new(),
            waiting: VecDeque::new(),
            rows: Vec::new(),
            finished: Vec::new(),
            options,
        })
    }

    /// Adds requests, numbered on from those before. They begin after what was added earlier; among themselves the
    /// longest prompts first, so that those read together differ little in length.
    ///
    /// # Errors
    /// A prompt without tokens, with ids beyond the vocabulary, or as long as the model's positions or longer; numbers of
    /// new tokens that cannot be.
    pub fn add(&mut self, model: &Llama, requests: impl IntoIterator<Item = Request>) -> Result<()> {
        let first = self.requests.len();
        for request in requests {
            let number = self.requests.len();
            request.check(&model.shape).map_err(|e| e.context(format!("prompt {}", number + 1)))?;
            self.requests.push(request);
        }
        let mut order: Vec<usize> =
            (first..self.requests.len()).filter(|i| !self.requests[*i].samples.is_empty()).collect();
        order.sort_by_key(|i| std::cmp::Reverse(self.requests[*i].prompt.len()));
        self.waiting.extend(order.into_iter().map(|request| Waiting { request, next: 0, hidden: None }));
        Ok(())
    }

    /// Requests of which not all samples have begun.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Completions that have ended since the last call, in the order of their ends.
    pub fn take_finished(&mut self) -> Vec<Completion> {
        std::mem::take(&mut self.finished)
    }

    /// Takes one forward. `on_token` is told of each completion that got a token, and whether it is finished. Returns
    /// whether there was anything to do. Where a forward gathers values from other ranks this is a collective call, and
    /// all ranks get true until none of them has anything to do.
    ///
    /// # Errors
    /// Logits that are not finite, and those of `on_token`.
    pub fn step(
        &mut self,
        model: &mut Llama,
        mut on_token: impl FnMut(&Completion, bool) -> Result<()>,
    ) -> Result<bool> {
        let busy = !self.waiting.is_empty() || !self.rows.is_empty();
        let mut anywhere = busy;
        if model.params.gathers() {
            anywhere = model.params.shard_group().combine(&[f64::from(busy)], ReduceOp::Max)?[0] > 0.0;
            if anywhere && !busy {
                let hidden = model.idle()?;
                let _ = model.next_token_logits(&hidden)?;
            }
        }
        if !busy {
            return Ok(anywhere);
        }
        let (first, hidden) = self.forward(model)?;
        let logits = model.next_token_logits(&hidden)?;
        let (requests, options) = (&self.requests, &self.options);
        let stepped = &mut self.rows[first..];
        let draws: Vec<Draw> =
            stepped.iter().map(|r| requests[r.completion.request].draw(&r.completion)).collect();
        let choices = sampler::choose(&logits, &draws, options.eos, &options.sampling)?;
        let positions = model.shape.max_position_embeddings as usize;
        let mut ended = Vec::new();
        for (row, choice) in stepped.iter_mut().zip(choices) {
            row.completion.push(choice);
            let finish = requests[row.completion.request].finish(&row.completion.ids, options, positions)?;
            if let Some(finish) = finish {
                row.completion.finish = finish;
                ended.push(row.slot);
            }
            on_token(&row.completion, finish.is_some())?;
        }
        for row in self.rows.extract_if(first.., |r| ended.contains(&r.slot)) {
            // The prompt stays in the slot, for further samples of it.
            self.cache.truncate(row.slot, requests[row.completion.request].prompt.len());
            self.free.push(row.slot);
            self.finished.push(row.completion);
        }
        Ok(true)
    }

    /// Reads waiting prompts, where there are slots for them, else the newest token of every row; and begins what rows
    /// can be begun. Returns the hidden states, T [rows, C], of the rows from the returned number on.
    fn forward(&mut self, model: &mut Llama) -> Result<(usize, Tensor)> {
        let first = self.rows.len();
        // Further samples of a prompt that was read.
        let mut begun = self.begin_rows()?;
        if self.read_prompts(model)? {
            begun.extend(self.begin_rows()?);
            return Ok((first, Tensor::cat(&begun, 0)));
        }
        let rows = &self.rows[..first];
        if rows.is_empty() {
            if model.params.gathers() {
                let _ = model.idle()?;
            }
        } else {
            let ids: Vec<i64> = rows.iter().filter_map(|r| r.completion.ids.last().copied()).collect();
            let slots: Vec<usize> = rows.iter().map(|r| r.slot).collect();
            begun.insert(0, model.decode(&ids, &slots, &mut self.cache)?);
        }
        Ok((0, Tensor::cat(&begun, 0)))
    }

    /// Reads prompts from the front of those that wait: as many as their samples have slots for, and one forward may
    /// read. Returns whether there were any.
    fn read_prompts(&mut self, model: &mut Llama) -> Result<bool> {
        // The first is the longest of those that were added together: the width of the forward.
        let (mut count, mut width, mut free) = (0, 0, self.free.len());
        for waiting in &self.waiting {
            let request = &self.requests[waiting.request];
            width = request.prompt.len().max(width);
            if free == 0 || (count > 0 && (count + 1) * width > PREFILL_TOKENS) {
                break;
            }
            count += 1;
            free = free.saturating_sub(request.samples.len());
        }
        if count == 0 {
            return Ok(false);
        }
        let slots = self.free.split_off(self.free.len() - count);
        slots.iter().for_each(|slot| self.cache.truncate(*slot, 0));
        let prompts: Vec<&[i64]> =
            self.waiting.iter().take(count).map(|w| self.requests[w.request].prompt.as_slice()).collect();
        let hidden = model.prefill(&prompts, &slots, &mut self.cache)?;
        for (row, (waiting, slot)) in self.waiting.iter_mut().zip(slots).enumerate() {
            waiting.hidden = Some(hidden.narrow(0, row as i64, 1));
            self.prompt_in[slot] = Some(waiting.request);
            self.free.push(slot);
        }
        Ok(true)
    }

    /// Begins samples of the prompts that were read, as far as there are slots. Returns their hidden states, T [1, C].
    fn begin_rows(&mut self) -> Result<Vec<Tensor>> {
        let mut begun = Vec::new();
        while let Some(waiting) = self.waiting.front_mut()
            && let Some(hidden) = &waiting.hidden
            && !self.free.is_empty()
        {
            begun.push(hidden.shallow_clone());
            let (request, sample) = (waiting.request, waiting.next);
            waiting.next += 1;
            let slot = self.take_slot(request)?;
            self.rows.push(EngineRow { slot, completion: Completion::begin(request, sample) });
            if sample + 1 == self.requests[request].samples.len() {
                self.waiting.pop_front();
            }
        }
        Ok(begun)
    }

    /// A free slot that begins with the request's prompt, which some slot holds.
    fn take_slot(&mut self, request: usize) -> Result<usize> {
        if let Some(i) = self.free.iter().position(|slot| self.prompt_in[*slot] == Some(request)) {
            return Ok(self.free.remove(i));
        }
        // Not one that holds a prompt whose first sample is yet to begin.
        let needed = |slot: &usize| {
            self.waiting
                .iter()
                .take_while(|w| w.hidden.is_some())
                .any(|w| self.prompt_in[*slot] == Some(w.request))
        };
        let unneeded = self.free.iter().rposition(|slot| !needed(slot));
        let from = self.prompt_in.iter().position(|held| *held == Some(request));
        let (Some(i), Some(from)) = (unneeded, from) else {
            return Err(Error::failed("no slot is free for a prompt that was read"));
        };
        let slot = self.free.remove(i);
        self.cache.copy(from, slot, self.requests[request].prompt.len())?;
        self.prompt_in[slot] = Some(request);
        Ok(slot)
    }
}

/// Continues every request, all of them added at once. Returns the completions by request and sample; `on_token` is
/// that of [`Engine::step`].
pub fn generate(
    model: &mut Llama,
    requests: &[Request],
    mut options: EngineOptions,
    mut on_token: impl FnMut(&Completion, bool) -> Result<()>,
) -> Result<Vec<Completion>> {
    let completions = requests.iter().map(|r| r.samples.len()).sum::<usize>();
    // Slots cost memory; zero of them is an error of its own.
    options.batch_size = options.batch_size.min(completions.max(1));
    let mut engine = Engine::new(model, options)?;
    engine.add(model, requests.iter().cloned())?;
    while engine.step(model, &mut on_token)? {}
    let mut finished = engine.take_finished();
    finished.sort_by_key(|c| (c.request, c.sample));
    Ok(finished)
}
