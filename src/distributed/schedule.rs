//! In which order the stages of a pipeline compute the micro-batches of a step.

use crate::config::parallel::StageOrder;

/// What a stage does with a micro-batch, by its number in the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Its forward.
    Forward(usize),
    /// Its backward; where the gradients of matrices wait, all of it but those.
    Backward(usize),
    /// The gradients of matrices that have waited.
    Weights(usize),
}

/// What a stage does in a step of so many micro-batches, in this order.
pub fn passes(order: StageOrder, stage: usize, stages: usize, micro_batches: usize) -> Vec<Pass> {
    match order {
        StageOrder::OneForwardOneBackward => one_forward_one_backward(stage, stages, micro_batches),
        StageOrder::ZeroBubble => zero_bubble(stage, stages, micro_batches),
    }
}

/// 1F1B (Narayanan et al. 2021): a stage begins with a forward for each stage after it, then goes on with forwards and backwards by
/// turns, and ends with the backwards that are left. Of P stages none keeps more than P micro-batches. One stage computes one after
/// the other.
///
/// Stages wait for (P - 1) (F + B) in all, where a forward takes F and a backward B: a bubble of (P - 1) / n of what n micro-batches take.
fn one_forward_one_backward(stage: usize, stages: usize, micro_batches: usize) -> Vec<Pass> {
    let ahead = (stages - 1 - stage).min(micro_batches);
    let mut passes: Vec<Pass> = (0..ahead).map(Pass::Forward).collect();
    for k in 0..micro_batches {
        if k + ahead < micro_batches {
            passes.push(Pass::Forward(k + ahead));
        }
        passes.push(Pass::Backward(k));
    }
    passes
}

/// ZB-H1 (Qi et al. 2023): as [`one_forward_one_backward`], but a backward gives the gradient of its input first, which the stage before
/// waits for, and the gradients of matrices are computed where a stage would else wait. No stage keeps something of more than P + 1
/// micro-batches.
///
/// The order is that of stages on which a forward and both halves of a backward take equally long, and which prefer backwards to
/// forwards, and both to what has waited. Up to four stages then wait for P - 1 such times, with more a little longer.
fn zero_bubble(stage: usize, stages: usize, micro_batches: usize) -> Vec<Pass> {
    let mut all: Vec<StageClock> = (0..stages).map(|_| StageClock::default()).collect();
    let mut now = 0;
    while all[stage].passes.len() < 3 * micro_batches {
        let next: Vec<Option<Pass>> = (0..stages)
            .map(|s| {
                let StageClock { forwards, backwards, weights, .. } = &all[s];
                let (f, b) = (forwards.len(), backwards.len());
                let there = |ends: &[usize], k: usize| ends.get(k).is_some_and(|end| *end <= now);
                let gradient =
                    if s + 1 == stages { there(forwards, b) } else { there(&all[s + 1].backwards, b) };
                let input = s == 0 || there(&all[s - 1].forwards, f);
                if b < f && gradient {
                    Some(Pass::Backward(b))
                } else if f < micro_batches && input && f - b < stages - s && f - weights < stages + 1 {
                    Some(Pass::Forward(f))
                } else {
                    (*weights < b).then_some(Pass::Weights(*weights))
                }
            })
            .collect();
        now += 1;
        for (stage, pass) in all.iter_mut().zip(next) {
            match pass {
                Some(Pass::Forward(_)) => stage.forwards.push(now),
                Some(Pass::Backward(_)) => stage.backwards.push(now),
                Some(Pass::Weights(_)) => stage.weights += 1,
                None => {}
            }
            stage.passes.extend(pass);
        }
    }
    all.swap_remove(stage).passes
}

/// A stage at a time: when its forwards and backwards ended, and how many gradients of matrices it has computed.
#[derive(Default)]
struct StageClock {
    forwards: Vec<usize>,
    backwards: Vec<usize>,
    weights: usize,
    passes: Vec<Pass>,
}

/// How long each pass of a stage takes, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct PassTimes {
    /// A forward.
    pub forward: f64,
    /// A backward, or what of it does not wait.
    pub backward: f64,
    /// The gradients of matrices that have waited.
    pub weights: f64,
}

/// What stages wait for, as a share of what they compute, in a step of so many micro-batches that takes `whole` seconds.
pub fn bubble(whole: f64, times: &[PassTimes], micro_batches: usize) -> f64 {
    let of = |t: &PassTimes| micro_batches as f64 * (t.forward + t.backward + t.weights);
    let computed: f64 = times.iter().map(of).sum();
    (whole * times.len() as f64 - computed) / computed
}

/// When the last of these stages ends, which each make their passes in order, as soon as what they need is there.
pub fn replay(orders: &[Vec<Pass>], times: &[PassTimes]) -> f64 {
    let stages = orders.len();
    let mut clocks = vec![0.0f64; stages];
    let mut at = vec![0; stages];
    let (mut forwards, mut backwards) = (vec![Vec::new(); stages], vec![Vec::new(); stages]);
    loop {
        let mut moved = false;
        for s in 0..stages {
            while let Some(pass) = orders[s].get(at[s]) {
                let ready = match *pass {
                    Pass::Forward(k) if s > 0 => forwards[s - 1].get(k).copied(),
                    Pass::Backward(k) if s + 1 < stages => backwards[s + 1].get(k).copied(),
                    _ => Some(0.0),
                };
                let Some(ready) = ready else { break };
                let start = clocks[s].max(ready);
                clocks[s] = match pass {
                    Pass::Forward(_) => start + times[s].forward,
                    Pass::Backward(_) => start + times[s].backward,
                    Pass::Weights(_) => start + times[s].weights,
                };
                match pass {
                    Pass::Forward(_) => forwards[s].push(clocks[s]),
                    Pass::Backward(_) => backwards[s].push(clocks[s]),
                    Pass::Weights(_) => {}
                }
                at[s] += 1;
                moved = true;
            }
        }
        if !moved {
            return clocks.into_iter().fold(0.0, f64::max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pass::{Backward, Forward, Weights};
    use super::*;

    #[test]
    fn stages_take_turns() {
        let order = one_forward_one_backward;
        assert_eq!(order(0, 1, 2), [Forward(0), Backward(0), Forward(1), Backward(1)]);
        assert_eq!(
            order(0, 2, 3),
            [Forward(0), Forward(1), Backward(0), Forward(2), Backward(1), Backward(2)]
        );
        assert_eq!(order(1, 2, 2), [Forward(0), Backward(0), Forward(1), Backward(1)]);
        assert_eq!(order(0, 4, 2), [Forward(0), Forward(1), Backward(0), Backward(1)]);
    }

    /// Every pass once, each after what it needs; nothing is kept of more micro-batches than was said.
    #[test]
    fn orders_are_complete() {
        for stages in 1..=8 {
            for n in [1, 2, 3, stages, 8, 17] {
                for (order, most) in [
                    (one_forward_one_backward as fn(usize, usize, usize) -> Vec<Pass>, stages),
                    (zero_bubble, stages + 1),
                ] {
                    let orders: Vec<Vec<Pass>> = (0..stages).map(|s| order(s, stages, n)).collect();
                    for (s, passes) in orders.iter().enumerate() {
                        let (mut f, mut b, mut w) = (0, 0, 0);
                        let delays = passes.iter().any(|p| matches!(p, Weights(_)));
                        for pass in passes {
                            match *pass {
                                Forward(k) => f = (k == f).then_some(k + 1).unwrap(),
                                Backward(k) => b = (k == b && k < f).then_some(k + 1).unwrap(),
                                Weights(k) => w = (k == w && k < b).then_some(k + 1).unwrap(),
                            }
                            assert!(
                                f - b <= stages - s && (!delays || f - w <= most),
                                "{s} of {stages}, {n}"
                            );
                        }
                        assert_eq!([f, b, if delays { w } else { n }], [n; 3], "{s} of {stages}, {n}");
                    }
                    // Nobody waits for ever.
                    let times = PassTimes { forward: 1.0, backward: 2.0, weights: 0.0 };
                    let end = replay(&orders, &vec![times; stages]);
                    assert!(end >= 3.0 * n as f64 && end.is_finite());
                }
            }
        }
    }

    /// The bubbles are those of the formulas, where all passes take equally long.
    #[test]
    fn bubbles_are_those_of_the_formulas() {
        for stages in [2, 3, 4] {
            for n in [stages, 8, 16] {
                let end = |order: fn(usize, usize, usize) -> Vec<Pass>, backward: f64| {
                    let orders: Vec<Vec<Pass>> = (0..stages).map(|s| order(s, stages, n)).collect();
                    let times = PassTimes { forward: 1.0, backward, weights: 1.0 };
                    replay(&orders, &vec![times; stages])
                };
                let (work, waits) = (3.0 * n as f64, stages as f64 - 1.0);
                assert_eq!(end(one_forward_one_backward, 2.0), work + 3.0 * waits, "{stages}, {n}");
                assert_eq!(end(zero_bubble, 1.0), work + waits, "{stages}, {n}");
            }
        }
    }
}
