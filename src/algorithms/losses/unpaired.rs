//! Losses of single completions that were found good or bad.

use tch::Tensor;

use crate::config::kto::{KtoLoss, KtoSection};

/// The loss of each completion, `[S]` (Ethayarajh et al. 2024, eq. 7 to 9, as TRL has it):
///
/// ```text
/// desirable:    desirable_weight   * (1 - sigmoid(beta (r - z)))
/// undesirable:  undesirable_weight * (1 - sigmoid(beta (z - r)))
/// ```
///
/// r: `ratios`, log-probabilities of whole completions under the policy minus those under the reference, in nats, `[S]`;
/// `desirable`: 1 for good completions, 0 for bad ones, `[S]`, in the same dtype; z: `kl` (see [`reference_point`]).
/// d loss / d r = -+ weight * beta * s * (1 - s) with s the sigmoid; nothing goes through z.
pub fn losses(s: &KtoSection, ratios: &Tensor, desirable: &Tensor, kl: f64) -> Tensor {
    // 1 for good completions, -1 for bad ones.
    let sign = desirable * 2.0 - 1.0;
    let weights = desirable * s.desirable_weight + (1.0 - desirable) * s.undesirable_weight;
    let value = ((ratios - kl) * sign * s.beta).sigmoid();
    (1.0 - value) * weights
}

/// z: what log-ratios are compared with. For [`KtoLoss::Kto`] an estimate of the KL to the reference, at least 0: the mean
/// log-ratio of prompts with completions of others, `sum / count`. Else 0.
pub fn reference_point(loss: KtoLoss, sum: f64, count: f64) -> f64 {
    match loss {
        KtoLoss::Kto => (sum / count).max(0.0),
        KtoLoss::ApoZeroUnpaired => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tch::Kind;
    use testing::golden::golden_algorithm;
    use testing::tolerance::{Quantity, allowed};

    use super::*;

    fn numbers(v: &Value) -> Vec<f64> {
        v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    }

    /// Values and gradients of all cases.
    #[test]
    fn losses_and_gradients_are_trls() {
        let mut compared = 0;
        for batch in golden_algorithm("kto.json")["batches"].as_array().unwrap() {
            let of = |key: &str| Tensor::from_slice(&numbers(&batch[key]));
            let labels: Vec<f64> = batch["labels"]
                .as_array()
                .unwrap()
                .iter()
                .map(|l| f64::from(u8::from(l.as_bool().unwrap())))
                .collect();
            let apart = of("kl_policy_logps") - of("kl_ref_logps");
            let (sum, count) = (apart.sum(Kind::Double).double_value(&[]), apart.size()[0] as f64);
            for case in batch["cases"].as_array().unwrap() {
                let number = |key: &str| case[key].as_f64().unwrap();
                let section = KtoSection {
                    loss: serde_json::from_value(case["loss_type"].clone()).unwrap(),
                    beta: number("beta"),
                    desirable_weight: number("desirable_weight"),
                    undesirable_weight: number("undesirable_weight"),
                };
                let kl = reference_point(section.loss, sum, count);
                assert!(
                    (kl - number("kl")).abs() <= allowed(Quantity::UnpairedLoss, Kind::Double),
                    "{kl} {}",
                    number("kl")
                );
                for kind in [Kind::Double, Kind::Float] {
                    let policy = of("policy_logps").to_kind(kind).set_requires_grad(true);
                    let ratios = &policy - of("ref_logps").to_kind(kind);
                    let desirable = Tensor::from_slice(&labels).to_kind(kind);
                    let losses = losses(&section, &ratios, &desirable, kl);
                    losses.mean(kind).backward();
                    let near = |got: &Tensor, key: &str| {
                        let got = Vec::<f64>::try_from(got.detach().to_kind(Kind::Double)).unwrap();
                        for (got, wanted) in got.iter().zip(numbers(&case[key])) {
                            let apart = (got - wanted).abs() / wanted.abs().max(1e-2);
                            assert!(
                                apart <= allowed(Quantity::UnpairedLoss, kind),
                                "{key} in {kind:?}: {got} {wanted}: {case}"
                            );
                        }
                    };
                    near(&losses, "losses");
                    near(&policy.grad(), "grad_wrt_policy_logps");
                    compared += 1;
                }
            }
        }
        assert!(compared >= 24, "{compared} cases");
    }
}
