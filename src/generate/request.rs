//! Requests to an [`Engine`](super::Engine), and completions.

use crate::config::shape::Shape;
use crate::error::{Error, Result};
use crate::generate::sampler::{Choice, Draw, Sampling};
use crate::generate::stop::Stop;

/// How an [`Engine`](super::Engine) samples, and when it ends a row.
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
        Draw { sample, position, least: self.min_new_tokens as u64 }
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
    /// Which request, by the number that [`Engine::add`](super::Engine::add) gave it.
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
