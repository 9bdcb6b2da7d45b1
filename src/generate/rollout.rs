//! Responses to train on: sampled in continuous batches, then laid out as rows for forwards of the training.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::config::rollout::{Gather, Length};
use crate::distributed::sharded::Sharded;
use crate::error::Result;
use crate::generate::engine::generate;
use crate::generate::request::{EngineOptions, Finish, Request};
use crate::generate::{Sampling, Stop};
use crate::model::Llama;
use crate::random::Rng;
use kernels::comm::ReduceOp;

/// A prompt that is to be answered.
#[derive(Debug, Clone, Copy)]
pub struct PromptRequest<'a> {
    /// Its number among all that the run asks, which keys the random draws: equal for any number of ranks.
    pub number: u64,
    /// The prompt's token ids.
    pub ids: &'a [i64],
}

/// How responses are sampled.
#[derive(Debug, Clone)]
pub struct Rollout<'a> {
    /// Temperature, truncation and seed of the draws.
    pub sampling: Sampling,
    /// Responses to each prompt, which share its reading.
    pub samples: usize,
    /// No end-of-sequence token is drawn before this many tokens.
    pub min_new_tokens: usize,
    /// Tokens of a response at most.
    pub max_new_tokens: Length,
    /// Responses in work at once.
    pub batch_size: usize,
    /// Tokens that end a response.
    pub eos: &'a [i64],
    /// Texts that end it.
    pub stop: Option<Stop<'a>>,
    /// Instead of these: the response is cut after the first such token with so many tokens before it.
    pub truncate: Option<(i64, usize)>,
    /// Whether weights are gathered once for the rollout or for each forward.
    pub gather: Gather,
    /// Ranks that share this host's memory.
    pub ranks_of_host: i64,
}

/// What was sampled for a prompt.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Response {
    /// The tokens, with the one that ended it.
    pub ids: Vec<i64>,
    /// The log-probability of each under the distribution that it was drawn from, in nats.
    pub sampler_logprobs: Vec<f64>,
    /// How the response ended.
    pub finish: Finish,
}

impl Rollout<'_> {
    /// The responses to every prompt, those of one prompt after the other. Where parameters are sharded this is a
    /// collective call, for any number of prompts on each rank.
    pub fn run(&self, model: &mut Llama, prompts: &[PromptRequest]) -> Result<Vec<Response>> {
        let requests: Vec<Request> = prompts.iter().map(|p| self.request(p)).collect();
        let eos = if self.truncate.is_some() { &[][..] } else { self.eos };
        let options =
            EngineOptions { sampling: self.sampling, batch_size: self.batch_size, eos, stop: self.stop };
        let hold = model.params.gathers() && self.holds(&model.params)?;
        if hold {
            model.params.hold()?;
        }
        // Graphs of steps have memory of their own, for which the allocator must have given back what it does not use.
        kernels::cuda::empty_cache(model.params.device())?;
        let completions = generate(model, &requests, options, |_, _| Ok(()));
        if hold {
            model.params.let_go();
        }
        // What sampling had of a GPU's memory has other shapes than what comes next.
        kernels::cuda::empty_cache(model.params.device())?;
        let response = |c: crate::generate::Completion| {
            let (mut ids, mut sampler_logprobs, mut finish) = (c.ids, c.sampler_logprobs, c.finish);
            if let Some((token, after)) = self.truncate {
                let end = (after..ids.len()).find(|i| ids[*i] == token);
                finish = if end.is_some() { Finish::Eos } else { Finish::Length };
                let len = end.map_or(ids.len(), |end| end + 1);
                ids.truncate(len);
                sampler_logprobs.truncate(len);
            }
            Response { ids, sampler_logprobs, finish }
        };
        Ok(completions?.into_iter().map(response).collect())
    }

    /// What the engine is asked for a prompt.
    pub fn request(&self, prompt: &PromptRequest) -> Request {
        let samples = self.samples as u64;
        let Length { low, high } = self.max_new_tokens;
        let mut rng = Rng::new(self.sampling.seed, "rollout.length", prompt.number);
        Request {
            prompt: prompt.ids.to_vec(),
            samples: (0..samples).map(|i| prompt.number * samples + i).collect(),
            min_new_tokens: self.min_new_tokens,
            max_new_tokens: rng.range(low as i64, high as i64) as usize,
        }
    }

    /// Whether all parameters are gathered for the rollout. A collective call.
    fn holds(&self, params: &Sharded) -> Result<bool> {
        Ok(match self.gather {
            // The first forward would keep them anyway.
            _ if params.sharding().keep.values() => true,
            Gather::Whole => true,
            Gather::Blocks => false,
            Gather::Auto => {
                let room = free_bytes(params, self.ranks_of_host)? / params.whole_bytes() as f64;
                let room = params.shard_group().combine(&[room], ReduceOp::Min)?;
                // Ranks that share every matrix take every forward together.
                params.sharding().tensor.group.combine(&room, ReduceOp::Min)?[0] >= 2.0
            }
        })
    }
}

/// Memory that this rank could have: on a CPU its share of what the machine has free.
fn free_bytes(params: &Sharded, ranks_of_host: i64) -> Result<f64> {
    Ok(match params.device() {
        tch::Device::Cuda(index) => {
            let cuda = kernels::cuda::load()?;
            (cuda.device_info(index)?.memory_bytes - cuda.memory(index)?.allocated) as f64
        }
        _ => crate::telemetry::free_bytes() as f64 / ranks_of_host as f64,
    })
}

/// Prompts with their responses: what is scored and trained on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sequences {
    /// The prompts' token ids, without padding.
    pub prompts: Vec<Vec<i64>>,
    /// The responses' token ids, without padding; the i-th is of the i-th prompt.
    pub responses: Vec<Vec<i64>>,
}

/// Sequences as rows, padded on the right: B rows of T places. Place t holds token t, and is about token t + 1; the last
/// token of a sequence is only ever predicted.
pub struct PaddedRows {
    /// int64 [B, T]
    pub ids: Tensor,
    /// The response's token that the place predicts, int64 `[B T]`; -1: none.
    pub labels: Tensor,
    /// 1 where the place predicts a token of the response, int64 [B, T].
    pub mask: Tensor,
}

impl Sequences {
    /// The number of sequences.
    pub fn len(&self) -> usize {
        self.responses.len()
    }

    /// Whether there are no sequences.
    pub fn is_empty(&self) -> bool {
        self.responses.is_empty()
    }

    /// Places that a row of sequence `i` has.
    fn places(&self, i: usize) -> usize {
        (self.prompts[i].len() + self.responses[i].len()).max(2) - 1
    }

    /// Places that rows of these sequences need.
    pub fn width(&self, rows: impl IntoIterator<Item = usize>) -> usize {
        rows.into_iter().map(|i| self.places(i)).max().unwrap_or(1)
    }

    /// The places of sequence `i` that predict its response.
    pub fn range(&self, i: usize) -> Range<usize> {
        let first = self.prompts[i].len().max(1) - 1;
        first..first + self.responses[i].len()
    }

    /// The sequences `rows` in one tensor, padded to the longest of them.
    pub fn rows(&self, rows: &[usize]) -> PaddedRows {
        let width = self.width(rows.iter().copied());
        let mut ids = vec![0; rows.len() * width];
        let mut labels = vec![-1; rows.len() * width];
        for (row, &i) in rows.iter().enumerate() {
            let all = self.prompts[i].iter().chain(&self.responses[i]);
            for (place, id) in all.take(width).enumerate() {
                ids[row * width + place] = *id;
            }
            let range = self.range(i);
            labels[row * width..][range].copy_from_slice(&self.responses[i]);
        }
        let shape = [rows.len() as i64, width as i64];
        let labels = Tensor::from_slice(&labels);
        let mask = labels.ge(0).to_kind(Kind::Int64).view(shape);
        PaddedRows { ids: Tensor::from_slice(&ids).view(shape), labels, mask }
    }

    /// The places of all sequences that predict a response, as [n, W] of this kind.
    pub fn mask(&self, kind: Kind) -> Tensor {
        let all: Vec<usize> = (0..self.len()).collect();
        self.rows(&all).mask.to_kind(kind)
    }
}
