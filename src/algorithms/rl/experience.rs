//! What a rollout left, and what the models say about it.
//!
//! A rank samples and scores its share; then all ranks are told everything, which is little next to a model: advantages,
//! minibatches and statistics are the same on every rank, and the same for any number of ranks.

use kernels::comm::ReduceOp;
use kernels::ops;
use tch::{Device, Kind, Tensor};

use crate::algorithms::step::MicroBatch;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::generate::rollout::{PaddedRows, Response, Sequences};
use crate::model::head::LogProbs;
use crate::model::{Llama, LmHead, ModelInput, ScoreHead};
use crate::telemetry::MetricsLine;

impl PaddedRows {
    /// For a forward of the training.
    pub fn micro_batch(self) -> MicroBatch {
        MicroBatch { input: ModelInput::new(self.ids), labels: self.labels }
    }
}

/// How sequences are put through a model.
#[derive(Debug, Clone)]
pub struct Readout<'a> {
    /// All sequences of the iteration, of which `rows` are read.
    pub sequences: &'a Sequences,
    /// Which of them; of sharded models all ranks give equally many.
    pub rows: std::ops::Range<usize>,
    /// Sequences of one forward.
    pub micro_batch_size: usize,
    /// Places of a row of the result, W.
    pub width: usize,
}

impl Readout<'_> {
    /// What `head` makes of the hidden states T [N, C] and labels `[N]` of each micro-batch, laid out as [n, W] on the CPU;
    /// 0 where there is no token of a response.
    fn run<const K: usize>(
        &self,
        model: &mut Llama,
        mut head: impl FnMut(&mut Llama, &Tensor, &Tensor) -> Result<[Tensor; K]>,
    ) -> Result<[Tensor; K]> {
        let kind = ops::accumulator(model.params.compute());
        let size = [self.rows.len() as i64, self.width as i64];
        let out = [(); K].map(|()| Tensor::zeros(size, (kind, Device::Cpu)));
        let rows: Vec<usize> = self.rows.clone().collect();
        let mut first = 0;
        for chunk in rows.chunks(self.micro_batch_size) {
            let rows = self.sequences.rows(chunk);
            let (shape, mask) = (rows.mask.size(), rows.mask.to_kind(kind));
            let batch = rows.micro_batch();
            let hidden = model.hidden(&batch.input)?;
            let values = head(model, &hidden, &batch.labels.to_device(hidden.device()))?;
            for (out, values) in out.iter().zip(values) {
                let values = values.to_device(Device::Cpu).view([shape[0], shape[1]]) * &mask;
                out.narrow(0, first, shape[0]).narrow(1, 0, shape[1]).copy_(&values);
            }
            first += shape[0];
        }
        Ok(out)
    }

    /// Log-probabilities of the responses' tokens at a temperature, A [n, W].
    pub fn logprobs(&self, model: &mut Llama, temperature: f64) -> Result<Tensor> {
        let head = |model: &mut Llama, hidden: &Tensor, labels: &Tensor| {
            Ok([LmHead::logprobs(model, hidden, labels, temperature, false)?.logprobs])
        };
        self.run(model, head).map(|[logprobs]| logprobs)
    }

    /// The same, and the entropies of the distributions that they were drawn from.
    pub fn logprobs_and_entropies(&self, model: &mut Llama, temperature: f64) -> Result<[Tensor; 2]> {
        self.run(model, |model, hidden, labels| {
            let LogProbs { logprobs, entropies } =
                LmHead::logprobs(model, hidden, labels, temperature, true)?;
            let entropies = entropies.ok_or_else(|| Error::failed("entropies were asked for"))?;
            Ok([logprobs, entropies])
        })
    }

    /// The values of a critic, A [n, W]: of what is there before each token of the response.
    pub fn values(&self, critic: &mut Llama) -> Result<Tensor> {
        self.run(critic, |critic, hidden, _| Ok([ScoreHead::values(critic, hidden)?])).map(|[values]| values)
    }
}

/// How far the training's log-probabilities are from the sampler's, in nats, over the tokens of responses.
#[derive(Debug, Clone, Copy, Default)]
pub struct SamplerDistance {
    sum: f64,
    tokens: f64,
    /// The largest distance of a single token.
    pub most: f64,
}

impl SamplerDistance {
    /// Adds responses by their numbers among the `sequences`; `logprobs`: [n, W], a row for each of them.
    pub fn add<'a>(
        &mut self,
        sequences: &Sequences,
        responses: impl Iterator<Item = (usize, &'a Response)>,
        logprobs: &Tensor,
    ) {
        for (row, (number, response)) in responses.enumerate() {
            let range = sequences.range(number);
            let row = logprobs.get(row as i64).narrow(0, range.start as i64, range.len() as i64);
            let row = Vec::<f64>::try_from(row.to_kind(Kind::Double)).unwrap_or_default();
            for (ours, theirs) in row.iter().zip(&response.sampler_logprobs) {
                self.sum += (ours - theirs).abs();
                self.most = self.most.max((ours - theirs).abs());
                self.tokens += 1.0;
            }
        }
    }

    /// The mean over tokens; 0 where there are none.
    pub fn mean(&self) -> f64 {
        self.sum / self.tokens.max(1.0)
    }

    /// Over all ranks. A collective call.
    pub fn over_ranks(self, world: &World) -> Result<SamplerDistance> {
        let sums = world.sum_rows(&[self.sum, self.tokens])?;
        let most = world.group.combine(&[self.most], ReduceOp::Max)?[0];
        Ok(SamplerDistance { sum: sums[0], tokens: sums[1], most })
    }

    /// Adds mean and largest distance.
    pub fn describe(&self, record: MetricsLine) -> MetricsLine {
        record.float("sampler_distance", self.mean()).float("sampler_distance_max", self.most)
    }
}
