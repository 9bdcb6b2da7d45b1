//! One row that goes on: prompts that begin as what was read before are read from there on.

use std::ops::ControlFlow;

use crate::error::{Error, Result};
use crate::generate::request::{Completion, EngineOptions, Request};
use crate::generate::sampler;
use crate::model::{KvCache, Llama};

/// Tokens that one forward reads at most.
const PIECE: usize = 2048;

/// A conversation's keys and values. The model must be one whose forwards no other rank takes part in.
pub struct CachedSession {
    cache: KvCache,
    /// The tokens that the cache holds.
    read: Vec<i64>,
}

impl CachedSession {
    /// A session that has read nothing, with a cache of one slot.
    pub fn new(model: &Llama) -> CachedSession {
        CachedSession { cache: KvCache::new(model, 1), read: Vec::new() }
    }

    /// How many of the prompt's tokens need not be read again.
    pub fn known(&self, prompt: &[i64]) -> usize {
        let same = self.read.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        // The last one is read in any case: its hidden state gives the first token of the completion.
        same.min(prompt.len().saturating_sub(1))
    }

    /// Continues the prompt of a request with one sample. `on_token` is told of every token, and whether it is the last;
    /// where it breaks, the completion ends there, its `finish` being `Length`.
    pub fn generate(
        &mut self,
        model: &mut Llama,
        request: &Request,
        options: &EngineOptions,
        mut on_token: impl FnMut(&Completion, bool) -> Result<ControlFlow<()>>,
    ) -> Result<Completion> {
        options.sampling.check()?;
        request.check(&model.shape)?;
        if request.samples.len() != 1 || model.params.gathers() {
            return Err(Error::failed("a session continues one sample, on one rank"));
        }
        let known = self.known(&request.prompt);
        self.cache.truncate(0, known);
        self.read.truncate(known);
        let mut completion = Completion::begin(0, 0);
        let mut hidden = None;
        for piece in request.prompt[known..].chunks(PIECE) {
            hidden = Some(self.extend(model, piece)?);
        }
        let positions = model.shape.max_position_embeddings as usize;
        while let Some(state) = hidden.take() {
            let logits = model.next_token_logits(&state)?;
            let choices =
                sampler::choose(&logits, &[request.draw(&completion)], options.eos, &options.sampling)?;
            choices.into_iter().for_each(|choice| completion.push(choice));
            let finish = request.finish(&completion.ids, options, positions)?;
            completion.finish = finish.unwrap_or(completion.finish);
            if on_token(&completion, finish.is_some())?.is_break() || finish.is_some() {
                break;
            }
            hidden = Some(self.extend(model, &completion.ids[completion.ids.len() - 1..])?);
        }
        Ok(completion)
    }

    fn extend(&mut self, model: &mut Llama, ids: &[i64]) -> Result<tch::Tensor> {
        let hidden = model.extend(ids, 0, &mut self.cache)?;
        self.read.extend(ids);
        Ok(hidden)
    }
}
