//! Pairs of completions as a step compares them, and what is counted of them.

use std::cell::RefCell;
use std::ops::Range;

use kernels::ops;
use tch::{Device, Kind, Tensor};

use crate::algorithms::completions::Completions;
use crate::algorithms::losses::preference::{PairLogRatios, losses};
use crate::algorithms::losses::sums_of;
use crate::algorithms::step::{Objective, StepEntry};
use crate::config::dpo::{ComparedPairs, Dpo, DpoSection};
use crate::data::examples::Example;
use crate::data::preferences::SequenceBatch;
use crate::data::rows::RowLoader;
use crate::distributed::world::World;
use crate::error::Result;
use crate::model::compute_kind;
use crate::model::head::LogProbs;
use crate::telemetry::MetricsLine;

/// A micro-batch of S completions, and what its loss is made of. P pairs.
pub struct PreferenceBatch {
    pub completions: Completions,
    /// Of each example: its source and its sequences there.
    pub places: Vec<(usize, Range<usize>)>,
    /// Of each pair the numbers of its completions, int64 `[P]`, and its share of the loss, A `[P]`.
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor,
    /// 1 for the best completions, A `[S]`.
    best: Tensor,
    /// The reference's log-probabilities, A `[S]`.
    pub reference: Tensor,
}

impl PreferenceBatch {
    /// Rows of a loader, of which each is a `share` of the loss.
    pub fn new(c: &Dpo, rows: &RowLoader, numbers: &[u64], share: f64, device: Device) -> PreferenceBatch {
        let examples: Vec<Example> = numbers.iter().map(|n| rows.example(*n)).collect();
        let kind = ops::accumulator(compute_kind(c.precision.compute));
        let places = numbers.iter().map(|n| rows.place(*n));
        let places = places.map(|(s, i)| (s, rows.sources()[s].sequences(i))).collect();
        PreferenceBatch { places, ..Self::of(&examples, c.data.packing, c.dpo.pairs, share, kind, device) }
    }

    /// Examples that are in no file, of which each is a `share` of the loss. `kind` (A): of sums and losses.
    pub fn of(
        examples: &[Example],
        packing: bool,
        which: ComparedPairs,
        share: f64,
        kind: Kind,
        device: Device,
    ) -> PreferenceBatch {
        let batch = SequenceBatch::new(examples, packing);
        let (mut chosen, mut rejected, mut weights, mut best) = (vec![], vec![], vec![], vec![]);
        for ranks in &batch.ranks {
            let first = best.len();
            let lowest = ranks.iter().min().copied().unwrap_or(0);
            let before = chosen.len();
            for (i, a) in ranks.iter().enumerate() {
                for (j, _) in ranks.iter().enumerate().filter(|(_, b)| a < *b) {
                    if which == ComparedPairs::All || *a == lowest {
                        chosen.push((first + i) as i64);
                        rejected.push((first + j) as i64);
                    }
                }
            }
            let n = chosen.len() - before;
            weights.extend(std::iter::repeat_n(share / n as f64, n));
            best.extend(ranks.iter().map(|r| f64::from(u8::from(share > 0.0 && *r == lowest))));
        }
        let numbers = |values: &[f64]| Tensor::from_slice(values).to_device(device).to_kind(kind);
        let indices = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        PreferenceBatch {
            completions: Completions::new(&batch, packing, kind, device),
            places: Vec::new(),
            chosen: indices(&chosen),
            rejected: indices(&rejected),
            weights: numbers(&weights),
            reference: numbers(&vec![0.0; best.len()]),
            best: numbers(&best),
        }
    }

    /// As an entry of a step; what is counted is added to `sums`. `sft`: the weight of a token of the best completions.
    pub fn entry<'a>(
        &'a self,
        section: &'a DpoSection,
        sft: f64,
        sums: &'a RefCell<PairSums>,
    ) -> StepEntry<'a> {
        let loss = move |out: &LogProbs| Ok(self.loss(&out.logprobs, section, sft, &mut sums.borrow_mut()));
        let objective = Objective::LogProbs { temperature: 1.0, entropies: false, loss: Box::new(loss) };
        StepEntry { batch: &self.completions.batch, objective, balance: None }
    }

    /// The loss of the micro-batch, from the log-probabilities of all labels, `[N]`; what is counted is added to `sums`.
    pub fn loss(&self, logprobs: &Tensor, section: &DpoSection, sft: f64, counted: &mut PairSums) -> Tensor {
        let (sums, kind) = (self.completions.sums(logprobs), self.completions.mask.kind());
        let ratios = &sums - &self.reference;
        let tokens = self.completions.tokens();
        let pairs = PairLogRatios {
            chosen: ratios.index_select(0, &self.chosen),
            rejected: ratios.index_select(0, &self.rejected),
            chosen_tokens: tokens.index_select(0, &self.chosen),
            rejected_tokens: tokens.index_select(0, &self.rejected),
        };
        let mut loss = (losses(section, &pairs) * &self.weights).sum(kind);
        if sft > 0.0 {
            loss -= (&sums * &self.best).sum(kind) * sft;
        }
        let weighted = |t: &Tensor| t.detach() * &self.weights;
        let (beta, margin) = (section.beta, &pairs.chosen - &pairs.rejected);
        let logp = |which: &Tensor| sums.detach().index_select(0, which);
        let [
            rewards_chosen,
            rewards_rejected,
            accuracy,
            margin,
            logps_chosen,
            logps_rejected,
            best,
            best_tokens,
        ] = sums_of([
            weighted(&pairs.chosen),
            weighted(&pairs.rejected),
            weighted(&margin.gt(0.0).to_kind(kind)),
            weighted(&margin),
            weighted(&logp(&self.chosen)),
            weighted(&logp(&self.rejected)),
            &sums * &self.best,
            tokens * &self.best,
        ]);
        counted.add(&PairSums {
            rewards_chosen: rewards_chosen * beta,
            rewards_rejected: rewards_rejected * beta,
            accuracy,
            margin: margin * beta,
            logps_chosen,
            logps_rejected,
            best_nll: -best,
            best_tokens,
        });
        loss
    }
}

/// What is counted of pairs: sums over all of them, each times its share of the loss, but for the best completions'.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PairSums {
    /// beta times the log-ratio to the reference: the implicit rewards.
    rewards_chosen: f64,
    rewards_rejected: f64,
    /// Of pairs whose chosen completion has the higher reward.
    accuracy: f64,
    margin: f64,
    logps_chosen: f64,
    logps_rejected: f64,
    /// Of the best completions: minus their log-probability, and their tokens.
    best_nll: f64,
    best_tokens: f64,
}

impl PairSums {
    fn fields(&mut self) -> [&mut f64; 8] {
        [
            &mut self.rewards_chosen,
            &mut self.rewards_rejected,
            &mut self.accuracy,
            &mut self.margin,
            &mut self.logps_chosen,
            &mut self.logps_rejected,
            &mut self.best_nll,
            &mut self.best_tokens,
        ]
    }

    fn add(&mut self, other: &PairSums) {
        let mut other = *other;
        self.fields().into_iter().zip(other.fields()).for_each(|(sum, x)| *sum += *x);
    }

    /// Those of all ranks. Collective.
    pub fn over_ranks(mut self, world: &World) -> Result<PairSums> {
        let all = world.sum_rows(&self.fields().map(|x| *x))?;
        self.fields().into_iter().zip(all).for_each(|(sum, x)| *sum = x);
        Ok(self)
    }

    /// Mean negative log-likelihood of the best completions' tokens, in nats.
    pub fn nll(&self) -> f64 {
        self.best_nll / self.best_tokens
    }

    /// Adds the means.
    pub fn describe(&self, record: MetricsLine) -> MetricsLine {
        record
            .float("rewards_chosen", self.rewards_chosen)
            .float("rewards_rejected", self.rewards_rejected)
            .float("accuracy", self.accuracy)
            .float("margin", self.margin)
            .float("logps_chosen", self.logps_chosen)
            .float("logps_rejected", self.logps_rejected)
    }
}
