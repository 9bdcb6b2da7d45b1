//! Completions of prompts as losses compare them: the log-probability of each as a whole.

use tch::{Device, Kind, Tensor};

use crate::algorithms::step::MicroBatch;
use crate::data::preferences::SequenceBatch;
use crate::error::Result;
use crate::model::{Llama, LmHead, ModelInput};

/// A micro-batch of S completions with their prompts; R supervised tokens of the longest completion.
pub struct Completions {
    pub batch: MicroBatch,
    /// Where the completions' tokens are predicted, int64 [S * R].
    positions: Tensor,
    /// Which of them are there, A [S, R].
    pub mask: Tensor,
}

impl Completions {
    /// `packed`: the sequences of the batch are in one row. `kind` (A): of sums and losses.
    pub fn new(batch: &SequenceBatch, packed: bool, kind: Kind, device: Device) -> Completions {
        let (positions, there) = batch.supervised();
        let rows = &batch.rows;
        let mut micro_batch = MicroBatch::from_rows(&rows.input_ids, &rows.labels, rows.columns as i64);
        if packed {
            micro_batch.input = ModelInput {
                positions: Some(Tensor::from_slice(&rows.positions)),
                start: Some(Tensor::from_slice(&rows.starts)),
                ..micro_batch.input
            };
        }
        let mask = Tensor::from_slice(&there).to_device(device).to_kind(kind);
        Completions {
            batch: micro_batch,
            positions: Tensor::from_slice(&positions).to_device(device),
            mask: mask.view([batch.num_sequences() as i64, -1]),
        }
    }

    /// The log-probabilities of whole completions, `[S]`, from those of all labels, `[N]`.
    pub fn sums(&self, logprobs: &Tensor) -> Tensor {
        // Every position is taken at most once but for the first, with a mask of 0: the gradient is the same in any order.
        let tokens = logprobs.index_select(0, &self.positions).view_as(&self.mask) * &self.mask;
        tokens.sum_dim_intlist([1i64].as_slice(), false, self.mask.kind())
    }

    /// The tokens of each completion, A `[S]`.
    pub fn tokens(&self) -> Tensor {
        self.mask.sum_dim_intlist([1i64].as_slice(), false, self.mask.kind())
    }

    /// The log-probabilities of all labels under a model, `[N]`, without a gradient. Collective.
    pub fn logprobs(&self, model: &mut Llama) -> Result<Tensor> {
        let hidden = model.hidden(&self.batch.input)?;
        let labels = self.batch.labels.to_device(hidden.device());
        Ok(LmHead::logprobs(model, &hidden, &labels, 1.0, false)?.logprobs)
    }

    /// The log-probabilities of whole completions under a model, `[S]`, without a gradient. The model may be in another
    /// place, and of another dtype. Collective.
    pub fn logps(&self, model: &mut Llama) -> Result<Tensor> {
        let logprobs = self.logprobs(model)?;
        Ok(self.sums(&logprobs.to_device(self.mask.device()).to_kind(self.mask.kind())))
    }
}
