//! The scalar head, and the losses of reward models, against golden values (`CORRAL_GOLDEN` names another root of the same
//! form).

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use corral::algorithms::losses::ranking::{PairCounts, Terms, losses};
use corral::checkpoint::Weights;
use corral::config::reward::RewardLoss;
use corral::distributed::mesh::Sharding;
use corral::distributed::sharded::Sharded;
use corral::model::{Llama, ModelInput, Recompute, ScoreHead, layout};
use serde_json::Value;
use tch::{Kind, Tensor};
use testing::compare::{largest, relative};
use testing::device::device;
use testing::golden::{golden, golden_model, json, tensors};
use testing::tolerance::{Quantity, allowed};

fn numbers(value: &Value) -> Tensor {
    let rows: Vec<f64> = match value[0].is_array() {
        true => value.as_array().unwrap().iter().flat_map(floats).collect(),
        false => floats(value),
    };
    let t = Tensor::from_slice(&rows);
    if value[0].is_array() { t.view([value.as_array().unwrap().len() as i64, -1]) } else { t }
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[track_caller]
fn near(what: &str, got: &Tensor, wanted: &Tensor, kind: Kind) {
    let allowed = allowed(Quantity::LossFunction, kind);
    let distance = largest(got, wanted);
    assert!(distance <= allowed, "{what} in {kind:?}: {distance:e} off");
}

/// Loss (the mean over prompts) and gradient, of losses by prompt.
fn check(loss: RewardLoss, scores: &Tensor, ranks: &Tensor, terms: &Terms, case: &Value, gradient: &Tensor) {
    for kind in [Kind::Double, Kind::Float] {
        let terms = Terms { margins: terms.margins.as_ref().map(|m| m.to_kind(kind)), center: terms.center };
        let scores = scores.detach().copy().to_kind(kind).set_requires_grad(true);
        let each = losses(loss, &scores, ranks, &terms);
        let mean = each.mean(kind);
        mean.backward();
        near("loss", &mean, &Tensor::from(case["loss"].as_f64().unwrap()), kind);
        near("gradient", &scores.grad(), gradient, kind);
        if case["per_prompt"].is_array() {
            near("each prompt's", &each, &numbers(&case["per_prompt"]), kind);
        }
    }
}

#[test]
fn losses_of_pairs() {
    let cases = json(&golden().join("algo/rm.json"));
    let pairs = &cases["pairwise"];
    let scores = Tensor::stack(&[numbers(&pairs["chosen"]), numbers(&pairs["rejected"])], 1);
    let ranks = Tensor::from_slice(&[0i64, 1]).expand(scores.size(), false);
    let margins = Some(numbers(&pairs["margin"]));
    let center = pairs["center_coef"].as_f64().unwrap();
    for (name, terms) in [
        ("plain", Terms::default()),
        ("with_margin", Terms { margins, center: 0.0 }),
        ("with_center", Terms { margins: None, center }),
    ] {
        let case = &pairs[name];
        let gradient = Tensor::stack(&[numbers(&case["grad_chosen"]), numbers(&case["grad_rejected"])], 1);
        check(RewardLoss::Pairs, &scores, &ranks, &terms, case, &gradient);
    }
    let counted = PairCounts::of(&scores, &ranks);
    assert_eq!(counted.right / counted.num_pairs, pairs["accuracy"].as_f64().unwrap());
    assert!(
        (counted.chosen - floats(&pairs["chosen"]).iter().sum::<f64>()).abs()
            < allowed(Quantity::TwoWays, Kind::Double)
    );
    assert!(
        (counted.rejected - floats(&pairs["rejected"]).iter().sum::<f64>()).abs()
            < allowed(Quantity::TwoWays, Kind::Double)
    );
}

#[test]
fn losses_of_lists() {
    let cases = json(&golden().join("algo/rm.json"));
    let scores = numbers(&cases["listwise"]["scores"]);
    let mut seen = 0;
    for (name, case) in cases["listwise"].as_object().unwrap() {
        let loss = match name.as_str() {
            "scores" => continue,
            "plackett_luce" => RewardLoss::Order,
            name if name.starts_with("all_pairs") => RewardLoss::Pairs,
            other => panic!("a case that is not known: {other}"),
        };
        let ranks = numbers(&case["ranks"]).to_kind(Kind::Int64);
        check(loss, &scores, &ranks, &Terms::default(), case, &numbers(&case["grad_scores"]));
        seen += 1;
    }
    assert!(seen >= 3);
}

/// What the golden values do not have: completions that are missing, several that are best, equal scores.
#[test]
fn losses_by_their_definitions() {
    let scores = Tensor::from_slice(&[0.3, -1.0, 0.8, 99.0, 1.5, 0.0, 0.2, 0.7f64]).view([2, 4]);
    let ranks = Tensor::from_slice(&[0i64, 1, 2, -1, 0, 0, 1, 1]).view([2, 4]);
    let each = |loss| Vec::<f64>::try_from(losses(loss, &scores, &ranks, &Terms::default())).unwrap();
    let softplus = |x: f64| x.exp().ln_1p();
    let all = |pairs: &[f64]| pairs.iter().map(|d| softplus(-d)).sum::<f64>() / pairs.len() as f64;
    let log_sum = |s: &[f64]| s.iter().map(|x| x.exp()).sum::<f64>().ln();
    let near = |got: Vec<f64>, wanted: [f64; 2]| {
        assert!(
            (got[0] - wanted[0]).abs() < allowed(Quantity::TwoWays, Kind::Double)
                && (got[1] - wanted[1]).abs() < allowed(Quantity::TwoWays, Kind::Double),
            "{got:?} {wanted:?}"
        );
    };
    near(each(RewardLoss::Pairs), [all(&[1.3, -0.5, -1.8]), all(&[1.3, 0.8, -0.2, -0.7])]);
    let best = [log_sum(&[0.3, -1.0, 0.8]) - 0.3, log_sum(&[1.5, 0.0, 0.2, 0.7]) - log_sum(&[1.5, 0.0])];
    near(each(RewardLoss::Best), best);
    let order = [
        log_sum(&[0.3, -1.0, 0.8]) - 0.3 + log_sum(&[-1.0, 0.8]) + 1.0,
        log_sum(&[1.5, 0.2, 0.7]) - 1.5 + log_sum(&[0.0, 0.2, 0.7]),
    ];
    near(each(RewardLoss::Order), order);
    // Two completions make all three the same; equal scores log 2; ties nothing.
    let two = Tensor::from_slice(&[0.4, -0.3, 0.1, 0.1f64]).view([2, 2]);
    let ranks = Tensor::from_slice(&[1i64, 0, 0, 1]).view([2, 2]);
    for loss in [RewardLoss::Pairs, RewardLoss::Best, RewardLoss::Order] {
        let each = Vec::<f64>::try_from(losses(loss, &two, &ranks, &Terms::default())).unwrap();
        near(each, [softplus(0.7), 2f64.ln()]);
        let tied = Tensor::zeros([2, 2], (Kind::Int64, tch::Device::Cpu));
        let center = Terms { center: 0.5, ..Terms::default() };
        near(Vec::try_from(losses(loss, &two, &tied, &center)).unwrap(), [0.0, 0.0]);
    }
}

/// The golden model with its scalar head.
fn scored(kind: Kind) -> Llama {
    let weights = Weights::open(&golden_model("llama2")).unwrap();
    let shape = weights.shape().scored();
    let mut params = Sharded::new(layout::layouts(&shape), Sharding::solo(), kind, device());
    weights.fill(&mut params).unwrap();
    let head = tensors(&golden().join("reward_model/golden.safetensors"))["score_weight"].view([-1]);
    let mut fill = |_: &_, first: i64, values: &Tensor| {
        values.shallow_clone().copy_(&head.narrow(0, first, values.numel() as i64));
        Ok(())
    };
    params.fill_where(|spec| spec.name == layout::SCORE, true, &mut fill).unwrap();
    Llama::new(shape, params)
}

#[test]
fn scores_loss_and_gradients() {
    let golden = tensors(&golden().join("reward_model/golden.safetensors"));
    let (ids, mask) = (&golden["input_ids"], &golden["attention_mask"]);
    let (rows, time) = (ids.size()[0], ids.size()[1]);
    let last = mask.sum_dim_intlist([1].as_slice(), true, Kind::Int64) - 1;
    let mut by_kind = Vec::new();
    for kind in [Kind::Double, Kind::Float] {
        let mut model = scored(kind);
        let input = ModelInput::new(ids.shallow_clone());
        model.params.begin_step_gradients(1);
        let (hidden, tape) = model.forward(&input, Recompute::None).unwrap();
        let values = ScoreHead::values(&mut model, &hidden).unwrap().to_device(tch::Device::Cpu);
        let each = values.detach().view([rows, time]);
        let leaf = each.set_requires_grad(true);
        let rewards = leaf.gather(1, &last, false).view([-1]);
        let halves = rewards.view([2, -1]).tr();
        let ranks = Tensor::from_slice(&[0i64, 1]).expand(halves.size(), false);
        let loss = losses(RewardLoss::Pairs, &halves, &ranks, &Terms::default()).mean(rewards.kind());
        loss.backward();
        let dvalues = leaf.grad().view([-1]).to_device(device());
        let dhidden = ScoreHead::backward(&mut model, &hidden, &dvalues).unwrap();
        model.backward(dhidden, tape).unwrap();
        model.params.finish_step_gradients().unwrap();
        // The golden values are float32.
        let near = allowed(Quantity::SingleGradient, kind);
        assert!(largest(&rewards.detach(), &golden["rewards"]) < near);
        let real = &each.detach() * mask.to_kind(values.kind());
        assert!(largest(&real, &golden["token_values"]) < near);
        assert!(largest(&loss.detach(), &golden["pairwise_loss"]) < near);
        let mut compared = 0;
        let mut gradients = Vec::new();
        for i in 0..model.params.len() {
            let flat = model.params.slice_grad(i).unwrap();
            for spec in &model.params.layout(i).specs {
                let got = spec.view(&flat).copy();
                let known = golden.get(&format!("grad.{}", spec.name));
                if let Some(wanted) = known {
                    let distance = relative(&got, wanted);
                    assert!(
                        distance < allowed(Quantity::SingleHeadGradient, kind),
                        "{} in {kind:?}: {distance:e}",
                        spec.name
                    );
                    compared += 1;
                }
                gradients.push((spec.name.clone(), got));
            }
        }
        let there = golden.keys().filter(|k| k.starts_with("grad.")).count();
        assert!(compared == there && compared > 0, "{compared} of {there}");
        by_kind.push(gradients);
    }
    // Gradients that the golden file does not have: float32 against float64.
    for ((name, exact), (_, single)) in by_kind[0].iter().zip(&by_kind[1]) {
        assert!(relative(single, exact) < allowed(Quantity::SingleHeadGradient, Kind::Float), "{name}");
    }
}

/// The backward against libtorch's autograd, in float64.
#[test]
fn the_heads_backward_is_autograds() {
    let mut model = scored(Kind::Double);
    let c = model.shape.hidden_size;
    let cpu = (Kind::Double, tch::Device::Cpu);
    let (hidden, dvalues) = (Tensor::randn([7, c], cpu), Tensor::randn([7], cpu));
    let group = model.head_group();
    let weight = model.params.master(group).to_device(tch::Device::Cpu).view([1, c]);
    let (h, w) = (hidden.copy().set_requires_grad(true), weight.copy().set_requires_grad(true));
    let values = h.mm(&w.tr()).view([-1]);
    (&values * &dvalues).sum(Kind::Double).backward();
    let (on, dvalues) = (hidden.to_device(device()), dvalues.to_device(device()));
    assert!(
        largest(&ScoreHead::values(&mut model, &on).unwrap(), &values.detach())
            < allowed(Quantity::Autograd, Kind::Double)
    );
    model.params.begin_step_gradients(2);
    for times in [1.0, 2.0] {
        let dhidden = ScoreHead::backward(&mut model, &on, &dvalues).unwrap();
        assert!(largest(&dhidden, &h.grad()) < allowed(Quantity::Autograd, Kind::Double));
        let dweight = model.params.single_grad(group).unwrap();
        assert!(
            largest(dweight.sum().unwrap(), &(w.grad() * times)) < allowed(Quantity::Autograd, Kind::Double)
        );
    }
}
