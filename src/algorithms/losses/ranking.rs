//! Losses on the scores of ranked completions, and what is counted of them.
//!
//! Scores are A [P, K]: P prompts with K completions each. Ranks are int64 [P, K]: 0 is best, equal ranks are equally good
//! and never compared, negative: there is no such completion. Losses are A `[P]`, one for each prompt, in nats; where
//! nothing can be compared they are 0. All are made of operations that libtorch's autograd differentiates.

use tch::{Kind, Tensor};

use super::sums::sums_of;
use crate::config::reward::RewardLoss;

/// What is added to the loss proper.
#[derive(Debug, Default)]
pub struct Terms {
    /// How much better the better score must be, A `[P]` (Touvron et al. 2023, Llama 2); for [`RewardLoss::Pairs`].
    pub margins: Option<Tensor>,
    /// Weight of the squared sum of each compared pair's scores, which keeps them around 0 (TRL's `center_rewards_coefficient`).
    pub center: f64,
}

/// Who is compared with whom: A [P, K, K], 1 where completion i is better than j.
fn better(ranks: &Tensor, kind: Kind) -> Tensor {
    let (i, j) = (ranks.unsqueeze(2), ranks.unsqueeze(1));
    (i.lt_tensor(&j) * i.ge(0)).to_kind(kind)
}

/// s_i - s_j (or `sign` -1: s_i + s_j), A [P, K, K].
fn pairs(scores: &Tensor, sign: f64) -> Tensor {
    scores.unsqueeze(2) - scores.unsqueeze(1) * sign
}

/// A number that no score reaches, whose exponential is 0.
const LOWEST: f64 = -1e30;

/// The loss of every prompt, A `[P]`.
///
/// - `pairs` (Ouyang et al. 2022): the mean over pairs i better than j of -log sigmoid(s_i - s_j - margin); with two completions
///   the loss of Bradley and Terry.
/// - `best` (Ziegler et al. 2019): -log of the softmax of the best score; of several best ones their total.
/// - `order` (Plackett and Luce): the sum over completions of -log softmax(s)_i among i and those that are worse.
pub fn losses(loss: RewardLoss, scores: &Tensor, ranks: &Tensor, terms: &Terms) -> Tensor {
    let kind = scores.kind();
    let better = better(ranks, kind);
    let sum = |t: Tensor| t.sum_dim_intlist([1, 2].as_slice(), false, kind);
    let num_pairs = sum(better.shallow_clone()).clamp_min(1.0);
    let of_pairs = |t: Tensor| sum(t * &better) / &num_pairs;
    let there = ranks.ge(0);
    let only = |mask: &Tensor| scores.where_scalarother(mask, LOWEST);
    let comparable = sum(better.shallow_clone()).gt(0.0).to_kind(kind);
    let proper = match loss {
        RewardLoss::Pairs => {
            let mut difference = pairs(scores, 1.0);
            if let Some(margins) = &terms.margins {
                difference -= margins.view([-1, 1, 1]);
            }
            of_pairs(-difference.log_sigmoid())
        }
        RewardLoss::Best => {
            let best = ranks.eq(0);
            (only(&there).logsumexp([1].as_slice(), false) - only(&best).logsumexp([1].as_slice(), false))
                * comparable
        }
        RewardLoss::Order => {
            let k = scores.size()[1];
            // Row i: itself and those that are worse.
            let mut rivals = better.gt(0.0);
            rivals = rivals.logical_or(&Tensor::eye(k, (Kind::Bool, scores.device())));
            let among = scores.unsqueeze(1).expand([-1, k, -1], false).where_scalarother(&rivals, LOWEST);
            let terms = among.logsumexp([2].as_slice(), false) - scores;
            (terms * there.to_kind(kind)).sum_dim_intlist([1].as_slice(), false, kind)
        }
    };
    match terms.center {
        0.0 => proper,
        weight => proper + of_pairs(pairs(scores, -1.0).square()) * weight,
    }
}

/// Sums over compared pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PairCounts {
    /// Pairs that are compared.
    pub num_pairs: f64,
    /// Pairs that are not compared, since their ranks are equal.
    pub ties: f64,
    /// Pairs whose better completion has the higher score.
    pub right: f64,
    /// Sum of the better completions' scores.
    pub chosen: f64,
    /// Sum of the worse completions' scores.
    pub rejected: f64,
}

impl PairCounts {
    /// Over the pairs of all prompts: `scores` and `ranks` are [prompts, completions]; a rank of -1 is no completion.
    pub fn of(scores: &Tensor, ranks: &Tensor) -> PairCounts {
        let scores = scores.detach().to_kind(Kind::Double);
        let better = better(ranks, Kind::Double);
        let there = ranks.ge(0).sum_dim_intlist([1].as_slice(), false, Kind::Double);
        let [num_pairs, twice_all, right, chosen, rejected] = sums_of([
            better.shallow_clone(),
            &there * (&there - 1.0),
            pairs(&scores, 1.0).gt(0.0).to_kind(Kind::Double) * &better,
            scores.unsqueeze(2).expand_as(&better) * &better,
            scores.unsqueeze(1).expand_as(&better) * &better,
        ]);
        PairCounts { num_pairs, ties: twice_all / 2.0 - num_pairs, right, chosen, rejected }
    }

    /// Adds the sums of other pairs.
    pub fn add(&mut self, other: PairCounts) {
        self.num_pairs += other.num_pairs;
        self.ties += other.ties;
        self.right += other.right;
        self.chosen += other.chosen;
        self.rejected += other.rejected;
    }
}
