//! Prompts are asked, responses judged: what every algorithm that learns from its own responses begins an iteration with.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::algorithms::training::Run;
use crate::config::prompts::PromptData;
use crate::config::rollout::Generation;
use crate::config::sft::PromptSamples;
use crate::config::shape::Shape;
use crate::data::chat::Chat;
use crate::data::prompts::{Prompt, Prompts};
use crate::distributed::agree::agree;
use crate::distributed::exchange::gather_objects;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::generate::Finish;
use crate::generate::rollout::{PromptRequest, Response, Rollout, Sequences};
use crate::generate::{self as generation, Sampling, Stop};
use crate::model::Llama;
use crate::rewards::{Answer, Judge, Judgement};
use crate::telemetry::MetricsLine;
use crate::warn;

/// A response and what was made of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sampled {
    /// The number of its prompt in the run's sequence.
    pub prompt: u64,
    pub response: Response,
    /// Without special tokens.
    pub text: String,
    pub judgement: Judgement,
}

impl Sampled {
    /// Whether it came to its end.
    pub fn ended(&self) -> bool {
        self.response.finish != Finish::Length
    }
}

/// The responses of an iteration, of all ranks.
pub struct ResponseBatch {
    /// Those of one prompt one after the other.
    pub samples: Vec<Sampled>,
    pub sequences: Sequences,
    /// Seconds that sampling took, without judging.
    pub rollout_s: f64,
}

impl ResponseBatch {
    /// Tokens of all responses.
    pub fn generated_tokens(&self) -> usize {
        self.samples.iter().map(|s| s.response.ids.len()).sum()
    }

    /// Tokens of all prompts and responses.
    pub fn tokens(&self) -> u64 {
        (self.generated_tokens() + self.sequences.prompts.iter().map(Vec::len).sum::<usize>()) as u64
    }
}

/// What an iteration took, in seconds.
pub struct SamplingTimes {
    /// From the first prompt to the last score.
    pub asking_s: f64,
    pub rollout_s: f64,
    pub update_s: f64,
    pub generated_tokens: usize,
}

impl SamplingTimes {
    pub fn describe(&self, record: MetricsLine) -> MetricsLine {
        record
            .float("rollout_s", self.rollout_s)
            .float("score_s", self.asking_s - self.rollout_s)
            .float("update_s", self.update_s)
            .float("generated_tokens_per_s", self.generated_tokens as f64 / self.rollout_s)
    }
}

/// A response before it is judged.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    pub prompt: &'a Prompt,
    pub ids: &'a [i64],
    /// Without special tokens.
    pub text: &'a str,
    /// Whether it came to its end.
    pub ended: bool,
}

/// Scores responses with a reward model; each rank gives its own.
pub type Scorer<'a> = &'a mut dyn FnMut(&[Said]) -> Result<Vec<f64>>;

/// Where responses come from.
pub struct Sampler {
    pub prompts: Prompts,
    pub chat: Chat,
    generation: Generation,
    /// That of the run, whose programs answer for training and validation.
    judge: Rc<RefCell<Judge>>,
    eos: Vec<i64>,
    truncate: Option<(i64, usize)>,
    seed: u64,
}

impl Sampler {
    /// Opens and checks all that the sections `data` and `generation` name, for a model of this shape.
    pub fn open(
        data: &PromptData,
        generation: &Generation,
        judge: Rc<RefCell<Judge>>,
        chat: Chat,
        shape: &Shape,
        seed: u64,
    ) -> Result<Sampler> {
        let (new, all) = (generation.max_new_tokens.high, data.sequence_length as usize);
        if all > shape.max_position_embeddings as usize {
            return Err(Error::key(
                "data.sequence_length",
                format!(
                    "{all} is more than the model's max_position_embeddings, {}",
                    shape.max_position_embeddings
                ),
            ));
        }
        let prompts = Prompts::open(data, &data.train, &chat, all.saturating_sub(new), Some(seed))?;
        prompts.warn_unused(judge.borrow().reads_records());
        let eos: Vec<i64> = chat.stop_ids().into_iter().map(i64::from).collect();
        if eos.is_empty() && generation.truncate_token.is_none() {
            warn!("the tokenizer has no token that ends a response: every response gets the maximum length");
        }
        let truncate = match &generation.truncate_token {
            None => None,
            Some(text) => match chat.tokenizer().encode(text, false)?[..] {
                [id] => Some((i64::from(id), generation.truncate_after)),
                ref ids => {
                    return Err(Error::key(
                        "generation.truncate_token",
                        format!("{text:?} is {} tokens; name a text that is one", ids.len()),
                    ));
                }
            },
        };
        if let Some(key) = generation.distortion() {
            warn!(
                "{key} changes the distribution that responses are sampled from; log-probabilities are those of the policy without \
                 it, so ratios and KL are biased"
            );
        }
        Ok(Sampler { prompts, chat, generation: generation.clone(), judge, eos, truncate, seed })
    }

    /// Most tokens of a response.
    pub fn longest(&self) -> usize {
        self.generation.max_new_tokens.high
    }

    pub fn temperature(&self) -> f64 {
        self.generation.temperature
    }

    /// `samples` responses of `model` to each of the prompts `first .. first + count` of the run, which are divided among the
    /// ranks in order. `count` is a multiple of their number. Collective.
    pub fn sample(
        &mut self,
        model: &mut Llama,
        first: u64,
        count: u64,
        samples: usize,
        score: Option<Scorer>,
        world: &World,
    ) -> Result<ResponseBatch> {
        let started = Instant::now();
        let mine = world.mesh.data.share(count as usize);
        let numbers: Vec<u64> = mine.map(|i| first + i as u64).collect();
        let g = &self.generation;
        let stop = (!g.stop.is_empty()).then(|| Stop { texts: &g.stop, tokenizer: self.chat.tokenizer() });
        let rollout = Rollout {
            sampling: Sampling {
                temperature: g.temperature,
                top_k: g.top_k,
                top_p: g.top_p,
                seed: self.seed,
            },
            samples,
            min_new_tokens: g.min_new_tokens,
            max_new_tokens: g.max_new_tokens,
            batch_size: g.batch_size.map_or(numbers.len() * samples, |n| n as usize),
            eos: &self.eos,
            stop,
            truncate: self.truncate,
            gather: g.gather,
            ranks_of_host: world.local_world_size,
        };
        let asked: Vec<PromptRequest> =
            numbers.iter().map(|n| PromptRequest { number: *n, ids: &self.prompts.get(*n).ids }).collect();
        let responses = rollout.run(model, &asked)?;
        let rollout_s = started.elapsed().as_secs_f64();
        let numbers: Vec<u64> = numbers.iter().flat_map(|n| std::iter::repeat_n(*n, samples)).collect();
        let judged = self.judge(&numbers, responses, score, world);
        let samples = gather_objects(world, &agree(&world.group, judged)?)?;
        let sequences = Sequences {
            prompts: samples.iter().map(|s| self.prompts.get(s.prompt).ids.clone()).collect(),
            responses: samples.iter().map(|s| s.response.ids.clone()).collect(),
        };
        Ok(ResponseBatch { samples, sequences, rollout_s })
    }

    /// This rank's responses; of ranks that have the same, those of the first. Collective; its last part is not, so that a
    /// rank may fail alone.
    fn judge(
        &mut self,
        numbers: &[u64],
        responses: Vec<Response>,
        score: Option<Scorer>,
        world: &World,
    ) -> Result<Vec<Sampled>> {
        let text = |(n, r): (&u64, &Response)| {
            let prompt = &self.prompts.get(*n).ids;
            generation::text(self.chat.tokenizer(), prompt, &r.ids, &self.generation.stop)
        };
        let texts = numbers.iter().zip(&responses).map(text).collect::<Result<Vec<String>>>();
        // Before the reward model, which all ranks ask together.
        let texts = agree(&world.group, texts)?;
        let said: Vec<Said> = numbers
            .iter()
            .zip(&responses)
            .zip(&texts)
            .map(|((n, r), text)| {
                let ended = r.finish != Finish::Length;
                Said { prompt: self.prompts.get(*n), ids: &r.ids, text, ended }
            })
            .collect();
        let scores = score.map(|score| score(&said)).transpose()?;
        // A judge may answer otherwise the second time.
        if world.mesh.tensor.rank > 0 {
            return Ok(Vec::new());
        }
        let questions: Vec<_> = said.iter().map(|said| said.prompt.question()).collect();
        let answers = said.iter().zip(&questions).enumerate();
        let answers = answers.map(|(i, (Said { prompt, ids, text, .. }, question))| Answer {
            prompt: question,
            response: text,
            reference: prompt.reference.as_deref(),
            num_tokens: ids.len(),
            record: &prompt.record,
            score: scores.as_ref().and_then(|s| s.get(i).copied()),
        });
        let answers: Vec<Answer> = answers.collect();
        let judgements = self.judge.borrow_mut().judge(&answers)?;
        let all = numbers.iter().zip(responses).zip(texts).zip(judgements);
        let sampled = all.map(|(((prompt, response), text), judgement)| Sampled {
            prompt: *prompt,
            response,
            text,
            judgement,
        });
        Ok(sampled.collect())
    }

    /// The first responses of an iteration, where they are due, into samples.jsonl and TensorBoard.
    pub fn log_samples<D: Serialize>(
        &self,
        batch: &ResponseBatch,
        c: &PromptSamples,
        run: &mut Run<D>,
    ) -> Result<()> {
        let step = run.progress.step;
        if c.every == 0 || !step.is_multiple_of(c.every as u64) {
            return Ok(());
        }
        for (i, sample) in batch.samples.iter().take(c.count as usize).enumerate() {
            let (record, text) = self.record(sample, step + 1)?;
            run.log_sample(&record, &format!("samples/{i}"), &text);
        }
        Ok(())
    }

    /// A line of samples.jsonl, and its text for TensorBoard.
    pub fn record(&self, sample: &Sampled, step: u64) -> Result<(MetricsLine, String)> {
        let prompt = self.prompts.get(sample.prompt);
        let rendered = self.chat.render(&prompt.messages, true)?;
        let reward = sample.judgement.reward;
        let record = MetricsLine::new("sample", step)
            .text("prompt", &rendered)
            .text("response", &sample.text)
            .json("reward", reward.into())
            .json("rewards", serde_json::to_value(&sample.judgement.parts).unwrap_or_default())
            .count("num_tokens", sample.response.ids.len() as u64)
            .json("finish_reason", serde_json::to_value(sample.response.finish).unwrap_or_default());
        let record = match &prompt.reference {
            Some(reference) => record.text("reference", reference),
            None => record,
        };
        let shown = reward.map_or("unscored".to_string(), |r| format!("{r}"));
        Ok((record, format!("{rendered}{}\n\nreward: {shown}", sample.text)))
    }
}
