//! Continuous batching: prompts take slots of the KV cache, leave them when they are finished, and others follow at once.
//!
//! [`Engine::step`] is one forward: it reads waiting prompts where slots are free, else one more token in every row. The
//! samples of one request share the reading of its prompt: the keys and values are copied to the slots of the others.
//! What a row draws depends on its request alone, never on the rows beside it or on the rank.

use std::collections::VecDeque;

use kernels::comm::ReduceOp;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::generate::device::{DeviceRow, DeviceSteps, QueuedStep, StepTokens};
use crate::generate::request::{Completion, EngineOptions, Request};
use crate::generate::sampler::{self, Choice, Draw};
use crate::model::{KvCache, Llama};

/// Prompt tokens, padding included, that one forward reads at most: bounds the memory of activations.
pub const PREFILL_TOKENS: usize = 8192;

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

/// What a forward gave.
enum Forward {
    /// The hidden states, T [rows, C], of the rows from this place on.
    Hidden(usize, Tensor),
    /// All rows' next tokens are under way on the device.
    Queued(QueuedStep),
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
    /// Steps that stay on a GPU, where they can.
    on_device: Option<DeviceSteps>,
    /// One that was queued and not read yet.
    queued: Option<QueuedStep>,
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
            on_device: DeviceSteps::new(model, slots, options.eos, &options.sampling)?,
            queued: None,
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
        if let Some(queued) = self.queued.take() {
            return self.finish_step(model, queued, on_token);
        }
        let (first, hidden) = match self.forward(model)? {
            Forward::Hidden(first, hidden) => (first, hidden),
            Forward::Queued(queued) => return self.finish_step(model, queued, on_token),
        };
        let logits = model.next_token_logits(&hidden)?;
        let requests = &self.requests;
        let draws: Vec<Draw> =
            self.rows[first..].iter().map(|r| requests[r.completion.request].draw(&r.completion)).collect();
        let choices = sampler::choose(&logits, &draws, self.options.eos, &self.options.sampling)?;
        let rows = (first..self.rows.len()).zip(choices).collect();
        self.take_choices(model, rows, &mut on_token)?;
        Ok(true)
    }

    /// Adds tokens to rows, by their places among them, and takes those out that have ended.
    fn take_choices(
        &mut self,
        model: &Llama,
        chosen: Vec<(usize, Choice)>,
        on_token: &mut impl FnMut(&Completion, bool) -> Result<()>,
    ) -> Result<()> {
        let (requests, options) = (&self.requests, &self.options);
        let positions = model.shape.max_position_embeddings as usize;
        let mut ended = Vec::new();
        for (i, choice) in chosen {
            let row = &mut self.rows[i];
            row.completion.push(choice);
            let finish = requests[row.completion.request].finish(&row.completion.ids, options, positions)?;
            if let Some(finish) = finish {
                row.completion.finish = finish;
                ended.push(row.slot);
            }
            on_token(&row.completion, finish.is_some())?;
        }
        for row in self.rows.extract_if(.., |r| ended.contains(&r.slot)) {
            // The prompt stays in the slot, for further samples of it.
            self.cache.truncate(row.slot, requests[row.completion.request].prompt.len());
            self.free.push(row.slot);
            self.finished.push(row.completion);
        }
        Ok(())
    }

    /// Reads the tokens of a queued step, after queuing the next one for all rows that may go on. A row that has just ended
    /// leaves one token that nobody reads.
    fn finish_step(
        &mut self,
        model: &mut Llama,
        queued: QueuedStep,
        mut on_token: impl FnMut(&Completion, bool) -> Result<()>,
    ) -> Result<bool> {
        let Some(mut steps) = self.on_device.take() else {
            return Err(Error::failed("a step is under way on no device"));
        };
        // Waiting prompts come before the rows' next tokens, once slots are free for them.
        let next = match self.waiting.is_empty() || self.free.is_empty() {
            true => self.launch_after(model, &mut steps, &queued),
            false => Ok(None),
        };
        let choices = next.and_then(|next| {
            self.queued = next;
            steps.read(&queued)
        });
        self.on_device = Some(steps);
        let rows = queued.rows.iter().zip(choices?);
        let chosen = rows.filter_map(|(row, choice)| Some((self.place(row.of)?, choice))).collect();
        self.take_choices(model, chosen, &mut on_token)?;
        if self.rows.is_empty() {
            self.queued = None;
        }
        Ok(true)
    }

    /// The row of a request's sample, while it is in work.
    fn place(&self, of: (usize, usize)) -> Option<usize> {
        self.rows.iter().position(|r| (r.completion.request, r.completion.sample) == of)
    }

    /// Queues the step after `queued`, of its rows that are in work and do not end with its tokens because of their number.
    fn launch_after(
        &mut self,
        model: &mut Llama,
        steps: &mut DeviceSteps,
        queued: &QueuedStep,
    ) -> Result<Option<QueuedStep>> {
        let positions = model.shape.max_position_embeddings as usize;
        let (mut going, mut rows) = (Vec::new(), Vec::new());
        for (i, row) in queued.rows.iter().enumerate() {
            let request = &self.requests[row.of.0];
            let tokens = row.draw.position as usize + 1;
            let most = request.max_new_tokens.min(positions - request.prompt.len());
            if self.place(row.of).is_some() && tokens < most {
                let draw = Draw { position: row.draw.position + 1, ..row.draw };
                rows.push(DeviceRow { length: row.length + 1, draw, ..*row });
                going.push(i);
            }
        }
        if rows.is_empty() {
            return Ok(None);
        }
        let tokens = StepTokens::Before(&going);
        steps.launch(model, &mut self.cache, rows, tokens, Some(queued)).map(Some)
    }

    /// Reads waiting prompts, where there are slots for them, else the newest token of every row; and begins what rows
    /// can be begun.
    fn forward(&mut self, model: &mut Llama) -> Result<Forward> {
        let first = self.rows.len();
        // Further samples of a prompt that was read.
        let mut begun = self.begin_rows()?;
        if self.read_prompts(model)? {
            begun.extend(self.begin_rows()?);
            return Ok(Forward::Hidden(first, Tensor::cat(&begun, 0)));
        }
        let rows = &self.rows[..first];
        if rows.is_empty() {
            if model.params.gathers() {
                let _ = model.idle()?;
            }
        } else {
            let ids: Vec<i64> = rows.iter().filter_map(|r| r.completion.ids.last().copied()).collect();
            let slots: Vec<usize> = rows.iter().map(|r| r.slot).collect();
            if let (Some(steps), true) = (&mut self.on_device, begun.is_empty()) {
                let row = |r: &EngineRow| DeviceRow {
                    of: (r.completion.request, r.completion.sample),
                    slot: r.slot,
                    length: self.cache.len(r.slot) as i64,
                    draw: self.requests[r.completion.request].draw(&r.completion),
                };
                let rows = rows.iter().map(row).collect();
                let queued = steps.launch(model, &mut self.cache, rows, StepTokens::Ids(&ids), None)?;
                return Ok(Forward::Queued(queued));
            }
            begun.insert(0, model.decode(&ids, &slots, &mut self.cache)?);
        }
        Ok(Forward::Hidden(0, Tensor::cat(&begun, 0)))
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
