//! Watches a run's metrics for what usually means that something is wrong, and says it once, with the key to turn.

use std::collections::BTreeSet;

use super::metrics::MetricsLine;
use super::shown::is_of_responses;

/// Logged steps that a judgement is made of.
const WINDOW: usize = 50;
/// A loss that has fallen by less than this share of itself has not fallen.
const FLAT: f64 = 0.005;
/// Nats a response by which a policy has left its reference.
const KL_FAR: f64 = 50.0;
/// Nats a token below which nothing is sampled but the most likely token.
const ENTROPY_GONE: f64 = 0.01;
/// Validations in a row that rise while the loss falls.
const RISING: usize = 3;

/// What was seen of a run so far.
#[derive(Debug, Default)]
pub struct Watch {
    /// The largest gradient norm; 0: gradients are not clipped.
    clip: f64,
    losses: Vec<f64>,
    clipped: usize,
    truncated: usize,
    entropies: usize,
    validations: Vec<(f64, f64)>,
    told: BTreeSet<&'static str>,
}

impl Watch {
    /// Of a run that clips gradients at `clip`.
    pub fn new(clip: f64) -> Watch {
        Watch { clip, ..Watch::default() }
    }

    /// Takes a line of metrics; the warnings that it gives reason for, each once in a run.
    pub fn note(&mut self, line: &MetricsLine) -> Vec<String> {
        let found = match line.kind() {
            "train" => self.training(line),
            "valid" => self.validation(line),
            _ => Vec::new(),
        };
        found.into_iter().filter(|(what, _)| self.told.insert(what)).map(|(_, text)| text).collect()
    }

    fn training(&mut self, line: &MetricsLine) -> Vec<(&'static str, String)> {
        let (mut found, step) = (Vec::new(), line.step());
        let of_responses = is_of_responses(line);
        let mut warn = |what, text: String| found.push((what, format!("step {step}: {text}")));
        // In a row: what was once better begins anew.
        let count = |n: &mut usize, so: bool| *n = if so { *n + 1 } else { 0 };
        if let Some(loss) = line.get("loss").filter(|_| !of_responses) {
            self.losses.push(loss);
            if let Some(share) = fall(&self.losses).filter(|share| *share < FLAT) {
                let how = if share < 0.0 { "risen" } else { "not fallen" };
                let advice = if share < 0.0 {
                    "a lower optim.lr, or more schedule.warmup_steps"
                } else {
                    "another optim.lr"
                };
                warn(
                    "loss",
                    format!("the loss has {how} over the last {} logged steps; try {advice}", 2 * WINDOW),
                );
            }
        }
        if let Some(norm) = line.get("grad_norm").filter(|_| self.clip > 0.0) {
            count(&mut self.clipped, norm > self.clip);
            if self.clipped >= WINDOW {
                warn(
                    "clip",
                    format!(
                        "the gradient was clipped in each of the last {WINDOW} logged steps (norm {norm:.2}, optim.clip {}); \
                         try a lower optim.lr, or a higher optim.clip",
                        self.clip
                    ),
                );
            }
        }
        if let Some(kl) = line.get("kl").filter(|kl| of_responses && *kl > KL_FAR) {
            warn(
                "kl",
                format!(
                    "the KL to the reference is {kl:.0} nats a response: the policy moves too far from it; raise ppo.kl_coef or \
                     grpo.beta, or lower optim.lr"
                ),
            );
        }
        if let Some(entropy) = line.get("entropy").filter(|_| of_responses) {
            count(&mut self.entropies, entropy < ENTROPY_GONE);
            if self.entropies >= 3 {
                warn(
                    "entropy",
                    format!(
                        "the entropy is {entropy:.4} nats a token: all responses to a prompt become the same; raise \
                         generation.temperature or ppo.entropy_coef, or lower optim.lr"
                    ),
                );
            }
        }
        if let Some(ended) = line.get("eos_fraction") {
            count(&mut self.truncated, ended == 0.0);
            if self.truncated >= 3 {
                warn(
                    "truncated",
                    "no response has ended in three logged steps: raise generation.max_new_tokens, or check that the model \
                     was taught to end its answers"
                        .into(),
                );
            }
        }
        found
    }

    fn validation(&mut self, line: &MetricsLine) -> Vec<(&'static str, String)> {
        let (Some(valid), Some(train)) = (line.get("loss"), mean(&self.losses, WINDOW)) else {
            return Vec::new();
        };
        self.validations.push((valid, train));
        let rising = self.validations.len() > RISING
            && self.validations[self.validations.len() - RISING - 1..]
                .windows(2)
                .all(|pair| pair[1].0 > pair[0].0 && pair[1].1 < pair[0].1);
        let warning = format!(
            "step {}: the validation has risen {RISING} times in a row while the training loss fell: the model overfits; \
             fewer train.epochs, a lower optim.lr, or valid.keep_best: true",
            line.step()
        );
        if rising { vec![("overfit", warning)] } else { Vec::new() }
    }
}

/// By what share of itself the loss has fallen between the last window and the one before it; none before both are full.
fn fall(losses: &[f64]) -> Option<f64> {
    let before = losses.len().checked_sub(2 * WINDOW)?;
    let (first, last) = losses[before..].split_at(WINDOW);
    let (first, last) = (mean(first, WINDOW)?, mean(last, WINDOW)?);
    // A loss near 0 has nowhere to fall.
    (first > 0.05).then(|| (first - last) / first)
}

/// The mean of the last `count` values at most.
fn mean(values: &[f64], count: usize) -> Option<f64> {
    let last = &values[values.len().saturating_sub(count)..];
    (!last.is_empty()).then(|| last.iter().sum::<f64>() / last.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(watch: &mut Watch, lines: impl IntoIterator<Item = MetricsLine>) -> Vec<String> {
        lines.into_iter().flat_map(|line| watch.note(&line)).collect()
    }

    fn train(step: u64) -> MetricsLine {
        MetricsLine::new("train", step)
    }

    #[test]
    fn a_healthy_run_is_silent() {
        let mut watch = Watch::new(1.0);
        let text = (1..400)
            .map(|step| train(step).float("loss", 4.0 / (step as f64).sqrt()).float("grad_norm", 0.8));
        assert_eq!(told(&mut watch, text), Vec::<String>::new());
        let responses = (1..400).map(|step| {
            train(step)
                .float("loss", 0.1)
                .float("response_tokens", 20.0)
                .float("kl", 2.0)
                .float("entropy", 0.7)
                .float("eos_fraction", 0.9)
        });
        assert_eq!(told(&mut Watch::new(1.0), responses), Vec::<String>::new());
    }

    #[test]
    fn each_trouble_is_told_once_with_its_key() {
        let flat = (1..300).map(|step| train(step).float("loss", 2.0).float("grad_norm", 3.0));
        let warnings = told(&mut Watch::new(1.0), flat);
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(
            warnings[0].contains("clipped in each") && warnings[0].contains("optim.clip 1"),
            "{warnings:?}"
        );
        assert!(warnings[1].starts_with("step 100: the loss has not fallen"), "{warnings:?}");
        let bad = (1..20).map(|step| {
            train(step)
                .float("response_tokens", 20.0)
                .float("kl", 90.0)
                .float("entropy", 0.001)
                .float("eos_fraction", 0.0)
        });
        let warnings = told(&mut Watch::new(0.0), bad);
        let keys = ["ppo.kl_coef", "generation.temperature", "generation.max_new_tokens"];
        assert_eq!(warnings.len(), keys.len(), "{warnings:?}");
        assert!(warnings.iter().zip(keys).all(|(warning, key)| warning.contains(key)), "{warnings:?}");
    }

    #[test]
    fn a_validation_that_rises_while_the_loss_falls() {
        let lines = (1..=6).flat_map(|i| {
            let loss = train(i).float("loss", 2.0 - 0.2 * i as f64);
            [loss, MetricsLine::new("valid", i).float("loss", 2.0 + 0.1 * i as f64)]
        });
        let warnings = told(&mut Watch::new(0.0), lines);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(
            warnings[0].starts_with("step 4: ") && warnings[0].contains("valid.keep_best"),
            "{warnings:?}"
        );
    }
}
