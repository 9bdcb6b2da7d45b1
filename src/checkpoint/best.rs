//! The best validation of a run, as its checkpoints note it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::sharded::{Checkpoint, checkpoints_dir, list};
use crate::error::Result;

/// What a validation is compared by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// The lower the better.
    #[default]
    Loss,
    /// The higher the better.
    Reward,
}

impl Metric {
    /// As metrics and messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Loss => "loss",
            Metric::Reward => "reward",
        }
    }
}

/// The best validation so far, and the last one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Its step, and its loss or reward.
    best: Option<(u64, f64)>,
    /// Validations since then.
    worse: u64,
    #[serde(default)]
    metric: Metric,
    /// The last validation; none where it gave no number.
    #[serde(default)]
    last: Option<f64>,
    /// The run keeps the best checkpoint and exports it.
    #[serde(default)]
    kept: bool,
}

impl Best {
    /// What a checkpoint notes; none where nothing was validated.
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Option<Best> {
        Best::of_state(&checkpoint.meta().state)
    }

    /// What a trainer's state holds.
    pub fn of_state(state: &Value) -> Option<Best> {
        let best: Best = serde_json::from_value(state.get("best")?.clone()).ok()?;
        best.best.is_some().then_some(best)
    }

    /// Notes the validation after a step; whether it is the best so far. What is no number (a diverged model, responses of
    /// which none could be scored) is not.
    pub fn note(&mut self, step: u64, metric: Metric, value: f64) -> bool {
        let better = |than: f64| if metric == Metric::Loss { value < than } else { value > than };
        let best = value.is_finite() && self.best.is_none_or(|(_, so_far)| better(so_far));
        self.metric = metric;
        self.last = value.is_finite().then_some(value);
        match best {
            true => {
                self.best = Some((step, value));
                self.worse = 0;
            }
            false => self.worse += 1,
        }
        best
    }

    /// The run keeps the best checkpoint, or not.
    pub fn keep(&mut self, kept: bool) {
        self.kept = kept;
    }

    /// Whether the run keeps the best checkpoint.
    pub fn kept(&self) -> bool {
        self.kept
    }

    /// The step of the best validation; none without a validation.
    pub fn step(&self) -> Option<u64> {
        self.best.map(|(step, _)| step)
    }

    /// Validations since the best one.
    pub fn worse(&self) -> u64 {
        self.worse
    }

    /// `step 300, loss 0.1326`; none without a validation.
    pub fn text(&self) -> Option<String> {
        self.best.map(|(step, value)| format!("step {step}, {} {value:.4}", self.metric.name()))
    }

    /// The same for programs; none without a validation.
    pub fn to_json(&self) -> Option<Value> {
        let (step, value) = self.best?;
        Some(json!({"step": step, self.metric.name(): value, "exported": self.kept}))
    }

    /// The last validation, `0.2111`.
    pub fn last_text(&self) -> String {
        self.last.map_or("no number".into(), |value| format!("{value:.4}"))
    }
}

/// The checkpoint that stands for a run without a final model, and what it is: the best one where the run keeps it, else the
/// newest. None where there is no checkpoint.
///
/// # Errors
/// Of kind Data: the newest one is damaged.
pub fn checkpoint_of_run(run: &Path) -> Result<Option<(PathBuf, String)>> {
    let checkpoints = list(&checkpoints_dir(run))?;
    let Some((step, newest)) = checkpoints.last() else { return Ok(None) };
    let noted = Best::of_checkpoint(&Checkpoint::open(newest)?).filter(Best::kept);
    let best = noted.and_then(|best| {
        let (_, path) = checkpoints.iter().find(|(s, _)| Some(*s) == best.step())?;
        Some((path.clone(), format!("best checkpoint, {}", best.text()?)))
    });
    Ok(best.or_else(|| Some((newest.clone(), format!("newest checkpoint, step {step}")))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Validations that are no numbers are never the best, and what was noted can be read again.
    #[test]
    fn only_numbers_are_the_best() {
        let noted = |metric, values: &[f64]| {
            let mut best = Best::default();
            let notes: Vec<bool> = (1..).zip(values).map(|(step, v)| best.note(step, metric, *v)).collect();
            let state = serde_json::json!({"best": best});
            assert_eq!(Best::of_state(&state), best.step().map(|_| best.clone()));
            (notes, best)
        };
        let values = [f64::NAN, 2.0, f64::NAN, f64::NEG_INFINITY, 3.0, 1.0, 1.0];
        let (notes, best) = noted(Metric::Loss, &values);
        assert_eq!(notes, [false, true, false, false, false, true, false]);
        assert_eq!((best.step(), best.worse()), (Some(6), 1));
        assert_eq!(best.text().unwrap(), "step 6, loss 1.0000");
        let (notes, best) = noted(Metric::Reward, &values);
        assert_eq!(notes, [false, true, false, false, true, false, false]);
        assert_eq!(
            (best.text().unwrap().as_str(), best.last_text().as_str()),
            ("step 5, reward 3.0000", "1.0000")
        );
        let (_, best) = noted(Metric::Loss, &[1.0, f64::NAN]);
        assert_eq!((best.worse(), best.last_text().as_str()), (1, "no number"));
        assert_eq!(noted(Metric::Loss, &[f64::NAN]).1.text(), None);
    }
}
