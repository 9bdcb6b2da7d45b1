//! Losses of pairs of completions: plain functions of small tensors, which libtorch's autograd differentiates.

use tch::Tensor;

use crate::config::dpo::{DpoLoss, DpoSection};

/// P pairs. Log-ratios are log-probabilities of whole completions under the policy minus those under the reference, in
/// nats, `[P]`; numbers of tokens have their dtype.
pub struct PairLogRatios {
    /// Log-ratios of the better completions, `[P]`.
    pub chosen: Tensor,
    /// Log-ratios of the worse completions, `[P]`.
    pub rejected: Tensor,
    /// Labelled tokens of the better completions, `[P]`.
    pub chosen_tokens: Tensor,
    /// Labelled tokens of the worse completions, `[P]`.
    pub rejected_tokens: Tensor,
}

/// The loss of each pair, `[P]`. With `d` = chosen - rejected, the
/// formulas are those of the papers at [`DpoLoss`], as TRL has them.
pub fn losses(s: &DpoSection, p: &PairLogRatios) -> Tensor {
    let (beta, smoothing) = (s.beta, s.label_smoothing);
    let d = &p.chosen - &p.rejected;
    let per_token = || &p.chosen / &p.chosen_tokens - &p.rejected / &p.rejected_tokens;
    let ipo = |d: Tensor| (d - 0.5 / beta).square();
    let (chosen, rejected) = (&p.chosen * beta, &p.rejected * beta);
    match s.loss {
        DpoLoss::Sigmoid => {
            let x = d * beta;
            -(x.log_sigmoid() * (1.0 - smoothing)) - (-x).log_sigmoid() * smoothing
        }
        DpoLoss::SigmoidNorm => -(per_token() * beta).log_sigmoid(),
        DpoLoss::Ipo => ipo(per_token()),
        DpoLoss::IpoSum => ipo(d),
        DpoLoss::Hinge => (-(d * beta) + 1.0).relu(),
        DpoLoss::Robust => {
            let x = d * beta;
            let (right, wrong) = (x.log_sigmoid(), (-x).log_sigmoid());
            (wrong * smoothing - right * (1.0 - smoothing)) / (1.0 - 2.0 * smoothing)
        }
        DpoLoss::ApoZero => 1.0 - chosen.sigmoid() + rejected.sigmoid(),
        DpoLoss::ExoPair => {
            let x = d * beta;
            // The target's logarithms are float32 numbers, as in TRL.
            let target = Tensor::from(smoothing as f32);
            let log = |t: Tensor| t.double_value(&[]);
            let (log_right, log_wrong) = (log((-&target).log1p()), log(target.log()));
            let (right, wrong) = (x.log_sigmoid() - log_right, (-&x).log_sigmoid() - log_wrong);
            x.sigmoid() * right + (-x).sigmoid() * wrong
        }
        DpoLoss::NcaPair => {
            let negative = ((-&chosen).log_sigmoid() + (-rejected).log_sigmoid()) * 0.5;
            -chosen.log_sigmoid() - negative
        }
        DpoLoss::BcoPair => -chosen.log_sigmoid() - (-rejected).log_sigmoid(),
        DpoLoss::SppoHard => (&p.chosen - 0.5 / beta).square() + (&p.rejected + 0.5 / beta).square(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithms::step::differentiate;
    use crate::config::Conflicts;
    use crate::config::dpo::{ComparedPairs, ReferenceFrom};
    use serde_json::Value;
    use tch::Kind;
    use testing::golden::golden_algorithm;
    use testing::tolerance::{Quantity, allowed};

    fn matrix(value: &Value) -> Tensor {
        let rows: Vec<Vec<f64>> = serde_json::from_value(value.clone()).unwrap();
        Tensor::from_slice2(&rows)
    }

    fn vector(value: &Value) -> Tensor {
        Tensor::from_slice(&serde_json::from_value::<Vec<f64>>(value.clone()).unwrap())
    }

    #[track_caller]
    fn near(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
        assert_eq!(a.size(), b.size(), "{what}");
        let difference = (a.to_kind(Kind::Double) - b).abs().max().double_value(&[]);
        assert!(difference <= tolerance, "{what}: {difference:e}");
    }

    /// All cases of TRL's values and gradients.
    #[test]
    fn values_and_gradients_are_trls() {
        let all = golden_algorithm("dpo.json");
        let completion = matrix(&all["completion_mask"]);
        let (rows, columns) = completion.size2().unwrap();
        let mask = completion.narrow(1, 1, columns - 1);
        let tokens = completion.sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
        let reference = vector(&all["ref_logps"]);
        let policy = matrix(&all["policy_token_logps"]);
        for case in all["cases"].as_array().unwrap() {
            let name = case["loss_type"].as_str().unwrap();
            let name = if name == "cdpo" { "sigmoid" } else { name };
            let section = DpoSection {
                loss: serde_json::from_value(name.into()).unwrap(),
                beta: case["beta"].as_f64().unwrap(),
                label_smoothing: match name {
                    "sigmoid" | "robust" | "exo_pair" => case["label_smoothing"].as_f64().unwrap(),
                    _ => 0.0,
                },
                sft_weight: 0.0,
                pairs: ComparedPairs::All,
                reference: ReferenceFrom::Cached,
            };
            let mut found = Conflicts::default();
            section.conflicts(&mut found);
            assert_eq!(found, Conflicts::default(), "{name}");
            for kind in [Kind::Double, Kind::Float] {
                let tolerance = allowed(Quantity::LossFunction, kind);
                let to = |t: &Tensor| t.to_kind(kind);
                let pairs = |policy: &Tensor| {
                    let sums = (policy * to(&mask)).sum_dim_intlist([1i64].as_slice(), false, kind);
                    let (ratios, tokens) = ((sums - to(&reference)).chunk(2, 0), to(&tokens).chunk(2, 0));
                    PairLogRatios {
                        chosen: ratios[0].shallow_clone(),
                        rejected: ratios[1].shallow_clone(),
                        chosen_tokens: tokens[0].shallow_clone(),
                        rejected_tokens: tokens[1].shallow_clone(),
                    }
                };
                let p = pairs(&to(&policy));
                let (value, gradients) = differentiate(&[&to(&policy)], |leaves| {
                    Ok(losses(&section, &pairs(&leaves[0])).mean(kind))
                })
                .unwrap();
                let value = value.double_value(&[]);
                let what = format!("{name}, beta {}, {kind:?}", section.beta);
                let wanted = case["loss"].as_f64().unwrap();
                assert!(
                    (value - wanted).abs() <= tolerance * wanted.abs().max(1.0),
                    "{what}: {value} {wanted}"
                );
                near(
                    &what,
                    gradients[0].as_ref().unwrap(),
                    &matrix(&case["grad_wrt_token_logps"]),
                    tolerance,
                );
                if !case["per_pair"].is_null() {
                    near(
                        &what,
                        &losses(&section, &p),
                        &vector(&case["per_pair"]),
                        allowed(Quantity::PairLosses, kind),
                    );
                }
                near(&what, &(&p.chosen * section.beta), &vector(&case["chosen_rewards"]), tolerance);
                near(&what, &(&p.rejected * section.beta), &vector(&case["rejected_rewards"]), tolerance);
            }
        }
        assert_eq!(rows % 2, 0);
    }

    /// IPO of sums is that of means where completions have one token each.
    #[test]
    fn ipo_of_sums_and_of_means() {
        let of = |x: &[f64]| Tensor::from_slice(x);
        let pairs = |tokens: f64| PairLogRatios {
            chosen: of(&[0.5, -1.0]),
            rejected: of(&[-0.25, 2.0]),
            chosen_tokens: of(&[tokens, tokens]),
            rejected_tokens: of(&[tokens, tokens]),
        };
        let loss = |loss, tokens| losses(&DpoSection { loss, ..DpoSection::default() }, &pairs(tokens));
        assert_eq!(loss(DpoLoss::IpoSum, 1.0), loss(DpoLoss::Ipo, 1.0));
        let wanted = of(&[(0.75f64 - 5.0).powi(2), (-3.0f64 - 5.0).powi(2)]);
        near("sums", &loss(DpoLoss::IpoSum, 7.0), &wanted, allowed(Quantity::TwoWays, Kind::Double));
        let wanted = of(&[(0.25f64 - 5.0).powi(2), (-1.0f64 - 5.0).powi(2)]);
        near("means", &loss(DpoLoss::Ipo, 3.0), &wanted, allowed(Quantity::TwoWays, Kind::Double));
    }
}
