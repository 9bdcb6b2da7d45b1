//! Prompts with ranked completions as the loss compares them, and what is counted of their scores.

use std::cell::RefCell;

use tch::{Kind, Tensor};

use crate::algorithms::losses::ranking::{PairCounts, Terms, losses};
use crate::algorithms::losses::sums_of;
use crate::algorithms::scorer;
use crate::algorithms::step::{MicroBatch, Objective, StepEntry};
use crate::config::reward::{RewardSection, Score};
use crate::data::preferences::SequenceBatch;
use crate::distributed::world::World;
use crate::error::Result;
use crate::model::Llama;
use crate::telemetry::MetricsLine;

/// Some prompts with their completions, ready for the model.
pub struct RankedScores {
    pub batch: MicroBatch,
    /// [S, N] (see [`scorer::pooling`]).
    pooling: Tensor,
    /// Which score each completion of each prompt has, int64 [P, K]; 0 where there is none.
    places: Tensor,
    /// int64 [P, K], -1 where there is no completion.
    pub ranks: Tensor,
    /// False: it stands for no prompt, so that all ranks compute equally many micro-batches.
    pub counts: bool,
}

impl RankedScores {
    /// `kind`: that of the values.
    pub fn new(batch: &SequenceBatch, score: Score, model: &Llama) -> RankedScores {
        let device = model.params.device();
        let kind = kernels::ops::accumulator(model.params.compute());
        let most = batch.ranks.iter().map(Vec::len).max().unwrap_or(0);
        let (mut places, mut ranks, mut next) = (Vec::new(), Vec::new(), 0);
        for of_prompt in &batch.ranks {
            for k in 0..most {
                places.push(if k < of_prompt.len() { next + k as i64 } else { 0 });
                ranks.push(of_prompt.get(k).map_or(-1, |rank| i64::from(*rank)));
            }
            next += of_prompt.len() as i64;
        }
        let table = |t: Vec<i64>| Tensor::from_slice(&t).view([-1, most as i64]).to_device(device);
        RankedScores {
            batch: MicroBatch { input: scorer::input(batch), labels: Tensor::from_slice(&batch.rows.labels) },
            pooling: scorer::pooling(batch, score, kind, device),
            places: table(places),
            ranks: table(ranks),
            counts: true,
        }
    }

    /// As an entry of a step on `batch` prompts; what is counted of its scores is added to `tally`.
    pub fn entry<'a>(
        &'a self,
        settings: &'a RewardSection,
        batch: u64,
        tally: &'a RefCell<RankingTally>,
    ) -> StepEntry<'a> {
        let loss = move |values: &Tensor| {
            let scores = self.scores(values);
            if !self.counts {
                return Ok(scores.sum(scores.kind()) * 0.0);
            }
            tally.borrow_mut().add(&scores, self);
            Ok(self.loss(&scores, settings) / batch as f64)
        };
        let objective = Objective::Values { loss: Box::new(loss) };
        StepEntry { batch: &self.batch, objective, balance: None }
    }

    /// Scores [P, K] of the tokens' values `[N]`.
    pub fn scores(&self, values: &Tensor) -> Tensor {
        self.pooling.mv(values).index_select(0, &self.places.view([-1])).view_as(&self.places)
    }

    /// The sum of the prompts' losses.
    pub fn loss(&self, scores: &Tensor, settings: &RewardSection) -> Tensor {
        let margins = (settings.margin > 0.0)
            .then(|| Tensor::full([scores.size()[0]], settings.margin, (scores.kind(), scores.device())));
        losses(settings.loss, scores, &self.ranks, &Terms { margins, center: settings.center })
            .sum(scores.kind())
    }
}

/// Counts and sums of scores: of the micro-batches of a step, then of all ranks.
#[derive(Debug, Clone, Copy, Default)]
pub struct RankingTally {
    pub pairs: PairCounts,
    pub loss: f64,
    /// Of all completions' scores: how many, their sum, and the sum of their squares.
    pub scores: [f64; 3],
}

impl RankingTally {
    pub fn add(&mut self, scores: &Tensor, ranked: &RankedScores) {
        self.pairs.add(PairCounts::of(scores, &ranked.ranks));
        let there = ranked.ranks.ge(0).to_kind(Kind::Double);
        let scores = scores.detach().to_kind(Kind::Double) * &there;
        let squares = scores.square();
        for (total, of_batch) in self.scores.iter_mut().zip(sums_of([there, scores, squares])) {
            *total += of_batch;
        }
    }

    /// That of all ranks. Collective.
    pub fn over_ranks(self, world: &World) -> Result<RankingTally> {
        let RankingTally { pairs: p, loss, scores: [n, sum, squares] } = self;
        let mine = [p.num_pairs, p.ties, p.right, p.chosen, p.rejected, loss, n, sum, squares];
        let all = world.sum_rows(&mine)?;
        let pairs =
            PairCounts { num_pairs: all[0], ties: all[1], right: all[2], chosen: all[3], rejected: all[4] };
        Ok(RankingTally { pairs, loss: all[5], scores: [all[6], all[7], all[8]] })
    }

    pub fn add_to(&self, record: MetricsLine) -> MetricsLine {
        let p = &self.pairs;
        record
            .float("accuracy", p.right / p.num_pairs)
            .float("margin", (p.chosen - p.rejected) / p.num_pairs)
            .float("reward_chosen", p.chosen / p.num_pairs)
            .float("reward_rejected", p.rejected / p.num_pairs)
    }

    /// Mean and standard deviation (n - 1) of all scores.
    pub fn mean_and_std(&self) -> (f64, f64) {
        let [n, sum, squares] = self.scores;
        let mean = sum / n;
        (mean, ((squares - sum * mean) / (n - 1.0)).max(0.0).sqrt())
    }
}
