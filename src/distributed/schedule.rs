//! In which order the stages of a pipeline compute the micro-batches of a step.

/// What a stage does with a micro-batch, by its number in the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Its forward.
    Forward(usize),
    /// Its backward.
    Backward(usize),
}

/// 1F1B (Narayanan et al. 2021): a stage begins with a forward for each stage after it, then goes on with forwards and backwards by
/// turns, and ends with the backwards that are left. Of p stages no stage keeps more than p micro-batches. One stage computes one
/// after the other.
pub fn one_forward_one_backward(stage: usize, stages: usize, micro_batches: usize) -> Vec<Pass> {
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

#[cfg(test)]
mod tests {
    use super::Pass::{Backward, Forward};
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
}
