//! Against golden values (`CORRAL_GOLDEN` names another root of the same form): all cases, values and gradients, in
//! float64 and float32.

use kernels::comm::Group;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use testing::golden::golden_algorithm;
use testing::tolerance::{Quantity, allowed};

use super::advantages::explained_variance;
use super::grpo::{GrpoLoss, LossType, RatioLevel, ScaleRewards, group_advantages, rloo};
use super::kl::{KlController, KlEstimator};
use super::policy::{Aggregation, Clip, ClipCounts, PolicySums, policy_loss, value_loss};
use super::{MaskedMoments, gae, token_rewards};

/// A golden value with the dtype under test.
struct Golden<'a>(&'a Value, Kind);

impl Golden<'_> {
    fn get(&self, key: &str) -> Golden<'_> {
        assert!(!self.0[key].is_null(), "no {key}");
        Golden(&self.0[key], self.1)
    }

    fn number(&self, key: &str) -> f64 {
        self.0[key].as_f64().unwrap_or_else(|| panic!("{key} is no number"))
    }

    fn maybe(&self, key: &str) -> Option<f64> {
        self.0[key].as_f64()
    }

    fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or_else(|| panic!("{key} is no text"))
    }

    fn cases(&self) -> Vec<Golden<'_>> {
        let cases = self.0["cases"].as_array().expect("cases");
        assert!(!cases.is_empty());
        cases.iter().map(|c| Golden(c, self.1)).collect()
    }

    fn tensor(&self, key: &str) -> Tensor {
        let mut sizes = Vec::new();
        let mut at = &self.0[key];
        while let Some(list) = at.as_array() {
            sizes.push(list.len() as i64);
            at = &list[0];
        }
        let mut numbers = Vec::new();
        flatten(&self.0[key], &mut numbers);
        Tensor::from_slice(&numbers).view(sizes.as_slice()).to_kind(self.1)
    }

    fn leaf(&self, key: &str) -> Tensor {
        self.tensor(key).set_requires_grad(true)
    }

    fn tolerance(&self) -> f64 {
        allowed(Quantity::LossFunction, self.1)
    }

    #[track_caller]
    fn near(&self, key: &str, got: &Tensor) {
        let wanted = Golden(self.0, Kind::Double).tensor(key);
        assert_eq!(wanted.size(), got.size(), "{key}");
        let distance = (got.to_kind(Kind::Double) - &wanted).abs().max().double_value(&[]);
        let size = wanted.abs().max().double_value(&[]).max(1.0);
        assert!(distance <= self.tolerance() * size, "{key}: {distance:e} apart");
    }

    #[track_caller]
    fn near_number(&self, key: &str, got: f64) {
        let wanted = self.number(key);
        let allowed = self.tolerance() * wanted.abs().max(1.0);
        assert!((got - wanted).abs() <= allowed, "{key}: {got} for {wanted}");
    }
}

fn flatten(value: &Value, numbers: &mut Vec<f64>) {
    match value.as_array() {
        Some(list) => list.iter().for_each(|v| flatten(v, numbers)),
        None => numbers.push(value.as_f64().expect("a number")),
    }
}

/// Runs a check on a file in both dtypes.
fn in_both(name: &str, check: impl Fn(&Golden)) {
    let file = golden_algorithm(name);
    [Kind::Double, Kind::Float].into_iter().for_each(|kind| check(&Golden(&file, kind)));
}

fn number(t: &Tensor) -> f64 {
    t.to_kind(Kind::Double).double_value(&[])
}

fn mean(t: &Tensor, mask: &Tensor) -> Tensor {
    (t * mask).sum(t.kind()) / mask.sum(t.kind())
}

#[test]
fn advantages_and_returns() {
    in_both("gae.json", |golden| {
        for case in golden.cases() {
            let t = |key| case.tensor(key);
            let mask = t("mask");
            let (gamma, lambda) = (case.number("gamma"), case.number("lam"));
            let (advantages, returns) =
                gae(&t("rewards"), &t("values"), &mask, Some(&t("bootstrap")), gamma, lambda);
            case.near("advantages", &advantages);
            case.near("returns", &returns);
            let whitened = super::whiten(&advantages, &mask, false, &Group::solo()).unwrap();
            case.near("advantages_whitened", &whitened);
        }
    });
}

#[test]
fn whitening() {
    in_both("whiten.json", |golden| {
        for case in golden.cases() {
            let (values, mask) = (case.tensor("values"), case.tensor("mask"));
            let moments = MaskedMoments::of(&values, &mask, &Group::solo()).unwrap();
            case.near_number("mean", moments.mean);
            case.near_number("var_unbiased", moments.variance);
            case.near_number("var_biased", moments.biased_variance);
            case.near("whitened", &moments.whiten(&values, &mask, false));
            case.near("whitened_keep_mean", &moments.whiten(&values, &mask, true));
            let biased = MaskedMoments { variance: moments.biased_variance, ..moments };
            case.near("whitened_biased", &biased.whiten(&values, &mask, false));
        }
    });
}

#[test]
fn kl_estimators() {
    in_both("kl.json", |golden| {
        let (reference, mask) = (golden.tensor("ref_logp"), golden.tensor("mask"));
        let estimate = |estimator: KlEstimator| {
            let logp = golden.leaf("logp");
            let per_token = estimator.estimate(&logp, &reference);
            let loss = mean(&per_token, &mask);
            loss.backward();
            ((&per_token * &mask).detach(), number(&loss), logp.grad())
        };
        for (key, estimator) in [("k1", KlEstimator::K1), ("k2", KlEstimator::K2), ("k3", KlEstimator::K3)] {
            let wanted = golden.get(key);
            let (per_token, mean, gradient) = estimate(estimator);
            wanted.near("per_token", &per_token);
            wanted.near_number("masked_mean", mean);
            wanted.near("grad_masked_mean_wrt_logp", &gradient);
        }
        let (per_token, mean, gradient) = estimate(KlEstimator::K3Plus);
        golden.get("k3").near("per_token", &per_token);
        golden.get("k3").near_number("masked_mean", mean);
        golden.get("k2").near("grad_masked_mean_wrt_logp", &gradient);
    });
}

#[test]
fn clipped_losses() {
    in_both("ppo.json", |golden| {
        for case in golden.cases() {
            let t = |key| case.tensor(key);
            let (old, advantages, mask) = (t("old_logp"), t("advantages"), t("mask"));
            let range = case.number("cliprange");
            let clip = Clip { low: range, high: range, dual: None };
            let counts = ClipCounts::of(&mask);
            let policy =
                [(Aggregation::TokenMean, "token_mean"), (Aggregation::SeqMeanTokenMean, "seq_mean")];
            for (aggregation, name) in policy {
                let logp = case.leaf("logp");
                let weights = aggregation.weights(&mask, &counts, mask.size()[1]);
                let loss = (policy_loss(&logp, &old, &advantages, &clip) * weights).sum(mask.kind());
                loss.backward();
                case.near_number(&format!("policy_loss_{name}"), number(&loss));
                case.near(&format!("grad_policy_{name}_wrt_logp"), &logp.grad());
            }
            let mut sums = PolicySums::default();
            let logp = t("logp");
            sums.add(&logp, &old, &advantages, Some(&mask), &clip, &mask);
            case.near_number("policy_clipfrac", sums.clip_fraction());
            case.near_number("approx_kl_k2", sums.approx_kl());
            case.near_number("approx_kl_k3", number(&mean(&KlEstimator::K3.estimate(&old, &logp), &mask)));
            case.near("ratio", &((&logp - &old).exp() * &mask));
            let ratio = number(&mean(&t("ratio"), &mask));
            assert!((sums.ratio_mean() - ratio).abs() < case.tolerance() && sums.entropy == sums.tokens);

            let (old, returns, clip) = (t("old_values"), t("returns"), case.maybe("cliprange_value"));
            let values = case.leaf("values");
            let loss = mean(&value_loss(&values, &old, &returns, clip), &mask);
            loss.backward();
            case.near_number("value_loss", number(&loss));
            case.near("grad_value_loss_wrt_values", &values.grad());
            let values = values.detach();
            let moved = value_loss(&values, &old, &returns, clip)
                .gt_tensor(&value_loss(&values, &old, &returns, None))
                .to_kind(mask.kind());
            case.near_number("value_clipfrac", number(&mean(&moved, &mask)));
        }
        let rewards = golden.get("token_rewards");
        let t = |key| rewards.tensor(key);
        for (key, estimator) in [("k1", KlEstimator::K1), ("k3", KlEstimator::K3)] {
            let kl = estimator.estimate(&t("logp"), &t("ref_logp"));
            let got = token_rewards(&t("scores"), &kl, rewards.number("kl_coef"), &t("mask"));
            rewards.get("rewards").near(key, &got);
        }
    });
}

#[test]
fn log_probabilities_and_entropies() {
    let file = golden_algorithm("ppo.json");
    for kind in [Kind::Double, Kind::Float] {
        let golden = Golden(&file, kind);
        let golden = golden.get("logprobs_and_entropy");
        let logits = golden.tensor("logits");
        let size = logits.size();
        let labels = golden.tensor("token_ids").to_kind(Kind::Int64).view([-1]);
        let of = |temperature: f64| {
            let scaled = logits.view([-1, size[2]]) / temperature;
            let [logprobs, entropies] =
                [0, 1].map(|_| Tensor::zeros([size[0] * size[1]], (kind, Device::Cpu)));
            kernels::ops::log_softmax(&scaled, &labels, None, &logprobs, Some(&entropies)).unwrap();
            (logprobs.view([size[0], size[1]]), entropies.view([size[0], size[1]]))
        };
        let (logprobs, entropies) = of(1.0);
        golden.near("logp", &logprobs);
        golden.near("entropy", &entropies);
        golden.near("logp_at_temperature", &of(golden.number("temperature")).0);
    }
}

fn parse<T: serde::de::DeserializeOwned>(text: &str) -> T {
    serde_json::from_value(text.into()).unwrap()
}

#[test]
fn groups() {
    let file = golden_algorithm("grpo.json");
    let golden = Golden(&file, Kind::Double);
    let rewards = Vec::<f64>::try_from(golden.tensor("rewards")).unwrap();
    let size = golden.number("num_generations") as usize;
    for scale in [ScaleRewards::Group, ScaleRewards::None, ScaleRewards::Batch] {
        let key = serde_json::to_value(scale).unwrap();
        let got = group_advantages(&rewards, size, scale);
        golden.get("advantages").near(key.as_str().unwrap(), &Tensor::from_slice(&got.advantages));
    }
    in_both("grpo.json", |golden| {
        let t = |key| golden.tensor(key);
        let (old, reference, mask) = (t("old_logps"), t("ref_logps"), t("mask"));
        let advantages = golden.get("advantages").tensor(golden.text("loss_advantages"));
        let tokens = golden.number("num_items_in_batch");
        let counts = ClipCounts::of(&mask);
        assert_eq!(counts.tokens, tokens);
        for case in golden.cases() {
            let how = GrpoLoss {
                loss: parse::<LossType>(case.text("loss_type")),
                level: parse::<RatioLevel>(case.text("importance_sampling_level")),
                epsilon_low: case.number("epsilon_low"),
                epsilon_high: case.number("epsilon_high"),
                delta: case.maybe("delta"),
                beta: case.number("beta"),
                kl: KlEstimator::K3,
                // TRL chooses between them in float32, whatever the losses are in.
                temperatures: ["pos", "neg"]
                    .map(|s| f64::from(golden.number(&format!("sapo_temperature_{s}")) as f32)),
            };
            let logps = golden.leaf("logps");
            let per_token = how.per_token(&logps, &old, Some(&reference), &advantages, &mask);
            let weights = how.weights(&mask, &counts, golden.number("max_completion_length") as i64);
            let loss = (per_token * weights).sum(mask.kind());
            loss.backward();
            case.near_number("loss", number(&loss));
            case.near("grad_wrt_logps", &logps.grad());
            let metrics = case.get("metrics");
            if let Some(kl) = metrics.maybe("kl") {
                let got = number(&mean(&KlEstimator::K3.estimate(&t("logps"), &reference), &mask));
                assert!((got - kl).abs() < allowed(Quantity::Printed, Kind::Float), "{got} for {kl}");
            }
            // Of answers and not of tokens at the sequence's level.
            if let (Some(low), RatioLevel::Token) = (metrics.maybe("clip_ratio/low_mean"), how.level) {
                let got = how.clipped(&t("logps"), &old, &advantages, &mask);
                let high = metrics.number("clip_ratio/high_mean");
                let rounded = allowed(Quantity::Printed, Kind::Float);
                assert!((got.0 / tokens - low).abs() < rounded && (got.1 / tokens - high).abs() < rounded);
            }
        }
    });
}

#[test]
fn unscored_and_equal_answers_have_no_advantage() {
    let nan = f64::NAN;
    let got = group_advantages(&[1.0, 0.0, nan, 0.5, 0.5, 0.5, nan, nan, 2.0], 3, ScaleRewards::None);
    assert_eq!(got.advantages, [0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(got.without_variance, 2);
    let alone = group_advantages(&[1.0, -2.0], 1, ScaleRewards::Group);
    assert_eq!(alone.advantages, [1.0, -2.0]);
    assert_eq!(rloo(&[3.0, 0.0, nan, 3.0, 4.0, nan], 3), [3.0, -3.0, 0.0, -1.0, 1.0, 0.0]);
    assert_eq!(rloo(&[3.0, 0.0, 6.0], 3), [0.0, -4.5, 4.5]);
}

/// Rewards that rounding gives no exact mean.
#[test]
fn a_group_that_does_not_vary_has_advantages_of_exactly_0() {
    let equal = [[0.7; 3], [0.1; 3]].concat();
    for scale in [ScaleRewards::Group, ScaleRewards::None] {
        assert_eq!(group_advantages(&equal, 3, scale).advantages, [0.0; 6], "{scale:?}");
    }
    assert_eq!(group_advantages(&[0.7, 0.7, f64::NAN, 0.7], 4, ScaleRewards::Batch).advantages, [0.0; 4]);
    assert_eq!(rloo(&equal, 3), [0.0; 6]);
}

/// What is counted as clipped is what the loss clips.
#[test]
fn clipped_tokens_are_those_of_the_loss() {
    let t = |x: &[f64]| Tensor::from_slice(x).view([2, -1]);
    let (old, mask) = (t(&[0.0; 6]), t(&[1.0; 6]));
    let logp = t(&[0.5, 1.5, 6.0, 0.5, 6.0, -6.0].map(f64::ln_1p).map(|x| if x.is_nan() { -3.0 } else { x }));
    let advantages = Tensor::from_slice(&[1.0, -1.0]);
    let of = |loss, epsilon_high| GrpoLoss {
        loss,
        level: RatioLevel::Token,
        epsilon_low: 0.2,
        epsilon_high,
        delta: None,
        beta: 0.0,
        kl: KlEstimator::K3,
        temperatures: [1.0, 1.05],
    };
    let clipped = |loss, high| of(loss, high).clipped(&logp, &old, &advantages, &mask);
    // Ratios 1.5, 2.5, 7 with A = 1, and 1.5, 7, e^-3 with A = -1.
    assert_eq!(clipped(LossType::Grpo, 0.28), (1.0, 3.0));
    assert_eq!(clipped(LossType::Cispo, 5.0), (0.0, 2.0));
    assert_eq!(clipped(LossType::Sapo, 0.2), (0.0, 0.0));
}

/// The textbook's sums, written out: one response with a hole, its value after the end given.
#[test]
fn gae_is_the_discounted_sum_of_deltas() {
    let (gamma, lambda) = (0.9, 0.7);
    let (rewards, values) = ([0.5, -1.0, 9.0, 2.0], [0.1, 0.2, 9.0, -0.3]);
    let row = |x: &[f64]| Tensor::from_slice(x).view([1, -1]);
    let mask = row(&[1.0, 1.0, 0.0, 1.0]);
    let bootstrap = Tensor::from_slice(&[0.7]);
    let (advantages, returns) = gae(&row(&rewards), &row(&values), &mask, Some(&bootstrap), gamma, lambda);
    let real = [0, 1, 3];
    let v = |k: usize| real.get(k).map_or(0.7, |i| values[*i]);
    let delta = |k: usize| rewards[real[k]] + gamma * v(k + 1) - v(k);
    for (k, place) in real.iter().enumerate() {
        let wanted: f64 = (k..3).map(|j| (gamma * lambda).powi((j - k) as i32) * delta(j)).sum();
        let at = [0, *place as i64];
        assert!((advantages.double_value(&at) - wanted).abs() < allowed(Quantity::Formula, Kind::Double));
        assert!(
            (returns.double_value(&at) - wanted - values[*place]).abs()
                < allowed(Quantity::Formula, Kind::Double)
        );
    }
    assert_eq!(advantages.double_value(&[0, 2]), 0.0);
}

#[test]
fn a_response_without_tokens_is_left_out() {
    let t = |x: &[f64]| Tensor::from_slice(x).view([2, -1]);
    let (kl, mask) = (t(&[1.0, 2.0, 4.0, 8.0]), t(&[0.0, 0.0, 1.0, 0.0]));
    let rewards = token_rewards(&Tensor::from_slice(&[5.0, 7.0]), &kl, 0.5, &mask);
    assert_eq!(rewards, t(&[0.0, 0.0, 5.0, 0.0]));
    let none = mask.zeros_like();
    let moments = MaskedMoments::of(&kl, &none, &Group::solo()).unwrap();
    assert_eq!((moments.count, moments.variance), (0.0, 0.0));
    for aggregation in [Aggregation::TokenMean, Aggregation::SeqMeanTokenMean, Aggregation::SeqMeanTokenSum] {
        let weights = aggregation.weights(&none, &ClipCounts::of(&none), 2);
        assert_eq!(weights.sum(Kind::Double).double_value(&[]), 0.0);
    }
}

#[test]
fn dual_clip_bounds_negative_advantages_only() {
    let t = |x: &[f64]| Tensor::from_slice(x).view([1, -1]);
    let old = t(&[0.0, 0.0, 0.0]);
    let logp = t(&[2.0, 2.0, 0.1]).set_requires_grad(true);
    let advantages = t(&[-1.0, 1.0, -1.0]);
    let clip = Clip { low: 0.2, high: 0.28, dual: Some(3.0) };
    let loss = policy_loss(&logp, &old, &advantages, &clip);
    let wanted = t(&[3.0, -1.28, 0.1f64.exp()]);
    assert!(
        (loss.detach() - wanted).abs().max().double_value(&[]) < allowed(Quantity::Formula, Kind::Double)
    );
    loss.sum(Kind::Double).backward();
    assert!(
        (logp.grad() - t(&[0.0, 0.0, 0.1f64.exp()])).abs().max().double_value(&[])
            < allowed(Quantity::Formula, Kind::Double)
    );
}

/// Where an estimate is cut off its gradient is not: it draws the policy back.
#[test]
fn what_is_far_from_the_reference_has_a_gradient() {
    let slopes = |k: KlEstimator| {
        let d = Tensor::from_slice(&[-500.0, -6.0, -1.0, 0.5, 6.0, 500.0]).set_requires_grad(true);
        k.estimate(&d, &d.zeros_like().detach()).sum(Kind::Double).backward();
        Vec::<f64>::try_from(d.grad()).unwrap()
    };
    let near = |k, wanted: [f64; 6]| {
        let got = slopes(k);
        assert!(
            got.iter().zip(wanted).all(|(a, b)| (a - b).abs() < allowed(Quantity::Formula, Kind::Double)),
            "{k:?}: {got:?}"
        );
    };
    near(KlEstimator::K1, [1.0; 6]);
    near(KlEstimator::K2, [-10.0, -6.0, -1.0, 0.5, 6.0, 10.0]);
    near(KlEstimator::K3Plus, [-10.0, -6.0, -1.0, 0.5, 6.0, 10.0]);
    let k3 = [-1.0f64, 0.5, 6.0, 20.0].map(|d| 1.0 - (-d).exp());
    near(KlEstimator::K3, [-10.0, -10.0, k3[0], k3[1], k3[2], k3[3]]);
}

#[test]
fn estimates_stay_finite() {
    let d = Tensor::from_slice(&[-500.0, 500.0]).set_requires_grad(true);
    let zero = Tensor::from_slice(&[0.0, 0.0]);
    for k in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3, KlEstimator::K3Plus] {
        let got = k.estimate(&d, &zero);
        assert!(
            got.abs().max().double_value(&[]) <= 10.0 + allowed(Quantity::TwoWays, Kind::Double),
            "{k:?}"
        );
    }
    let clip = Clip { low: 0.2, high: 0.2, dual: None };
    let loss = policy_loss(&d, &zero, &Tensor::from_slice(&[-1.0, -1.0]), &clip).sum(Kind::Double);
    assert!(loss.double_value(&[]).is_finite());
}

#[test]
fn the_controller_follows_its_target() {
    let mut adaptive = KlController::Adaptive { coef: 0.1, target: 6.0, horizon: 1000.0 };
    adaptive.update(12.0, 100.0);
    assert!((adaptive.coef() - 0.1 * 1.02).abs() < allowed(Quantity::Formula, Kind::Double));
    adaptive.update(5.7, 100.0);
    assert!((adaptive.coef() - 0.1 * 1.02 * (1.0 - 0.005)).abs() < allowed(Quantity::Formula, Kind::Double));
    let text = serde_json::to_string(&adaptive).unwrap();
    assert_eq!(serde_json::from_str::<KlController>(&text).unwrap(), adaptive);
    let mut fixed = KlController::Fixed { coef: 0.1 };
    fixed.update(100.0, 100.0);
    assert_eq!(fixed.coef(), 0.1);
}

#[test]
fn values_that_equal_returns_explain_all() {
    let t = |x: &[f64]| Tensor::from_slice(x).view([1, -1]);
    let (returns, mask) = (t(&[1.0, 3.0, 100.0]), t(&[1.0, 1.0, 0.0]));
    let of = |values: &[f64]| explained_variance(&t(values), &returns, &mask, &Group::solo()).unwrap();
    assert_eq!(of(&[1.0, 3.0, 0.0]), 1.0);
    assert_eq!(of(&[2.0, 2.0, 0.0]), 0.0);
    assert_eq!(of(&[1.0, 1.0, 0.0]), 0.0);
    assert_eq!(of(&[3.0, 1.0, 0.0]), -3.0);
}
