//! The model against Hugging Face's, on golden values (`CORRAL_GOLDEN` names another root of the same form), on the CPU or,
//! with CORRAL_TEST_DEVICE=cuda, on a GPU.
//!
//! In float32 we may be twice as far from the float64 values as Hugging Face's own float32 is, plus 1e-6; in float64,
//! 1e-10 of the size.

mod common;

use std::collections::HashMap;

use common::{device, golden, json, largest, load, relative, tensors};
use corral::model::{Input, Llama, LmHead, Recompute};
use corral::optim::{AdamW, Hyper, Schedule, ScheduleKind};
use tch::{Device, Kind, Tensor};

const FAMILIES: [&str; 3] = ["llama2", "llama3", "tied"];

struct Golden {
    single: HashMap<String, Tensor>,
    double: HashMap<String, Tensor>,
}

impl Golden {
    fn read(family: &str) -> Golden {
        let dir = golden().join("models").join(family);
        let single = tensors(&dir.join("golden.safetensors"));
        let double = tensors(&dir.join("golden_f64.safetensors"));
        Golden { single, double }
    }

    fn input(&self) -> (Input, Tensor, Tensor) {
        let (ids, mask) = (&self.single["input_ids"], &self.single["attention_mask"]);
        (Input::with_mask(ids.shallow_clone(), mask), ids.shallow_clone(), mask.shallow_clone())
    }

    /// `got` may be as far from the float64 values as stated above. `measure` is `largest` or `relative`.
    #[track_caller]
    fn near(&self, what: &str, got: &Tensor, kind: Kind, measure: fn(&Tensor, &Tensor) -> f64) {
        let exact = &self.double[what];
        let distance = measure(&got.view(exact.size().as_slice()), exact);
        let allowed = if kind == Kind::Double {
            let size = exact.abs().max().double_value(&[]).max(1.0);
            1e-10 * size
        } else {
            2.0 * measure(&self.single[what], exact) + 1e-6
        };
        assert!(
            distance <= allowed,
            "{what} in {kind:?}: {distance:e} from the float64 value, allowed {allowed:e}"
        );
    }
}

/// The token that every position predicts, int64 [B * T]: the labels moved to the left.
fn shifted(labels: &Tensor) -> Tensor {
    let rows = labels.size()[0];
    let none = Tensor::full([rows, 1], -100i64, (Kind::Int64, Device::Cpu));
    Tensor::cat(&[labels.narrow(1, 1, labels.size()[1] - 1), none], 1).contiguous().view([-1])
}

/// Gradients by name, of a model on one rank.
fn gradients(model: &Llama) -> HashMap<String, Tensor> {
    let mut all = HashMap::new();
    for i in 0..model.params.len() {
        let grad = model.params.slice_grad(i).expect("every group has a gradient");
        for spec in &model.params.layout(i).specs {
            all.insert(spec.name.clone(), spec.view(&grad).copy());
        }
    }
    all
}

/// Loss and gradients of the golden batch, in `micro_batches` parts of its rows.
fn loss_and_gradients(
    model: &mut Llama,
    golden: &Golden,
    recompute: Recompute,
    micro_batches: i64,
) -> (f64, HashMap<String, Tensor>) {
    let (_, ids, mask) = golden.input();
    let labels = &golden.single["labels"];
    let count = shifted(labels).ge(0).sum(Kind::Int64).double_value(&[]);
    let rows = ids.size()[0];
    let mut loss = 0.0;
    for i in 0..micro_batches {
        let (first, end) = (i * rows / micro_batches, (i + 1) * rows / micro_batches);
        let part = |t: &Tensor| t.narrow(0, first, end - first);
        let input = Input::with_mask(part(&ids), &part(&mask));
        let last = i + 1 == micro_batches;
        let (hidden, tape) = model.forward(&input, recompute).unwrap();
        let labels = shifted(&part(labels));
        let kind = if hidden.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let coef = Tensor::full([labels.size()[0]], -1.0 / count, (kind, device()));
        let labels = labels.to_device(device());
        let (logprobs, dhidden) = LmHead::linear_loss(model, &hidden, &labels, &coef, last).unwrap();
        model.backward(dhidden, tape, last).unwrap();
        loss -= logprobs.sum(Kind::Double).double_value(&[]) / count;
    }
    model.params.finish_step_gradients().unwrap();
    let gradients = gradients(model);
    model.params.clear_gradients();
    (loss, gradients)
}

#[test]
fn logits_and_log_probabilities() {
    for family in FAMILIES {
        let g = Golden::read(family);
        for kind in [Kind::Float, Kind::Double] {
            let mut model = load(&golden().join("models").join(family), kind);
            let (input, ids, mask) = g.input();
            let hidden = model.hidden(&input).unwrap();
            let real = mask.view([-1, 1]).to_kind(Kind::Double);
            let cpu = |t: Tensor| t.to_device(Device::Cpu);
            let logits = cpu(model.next_token_logits(&hidden).unwrap()).to_kind(Kind::Double) * &real;
            g.near("logits", &logits, kind, largest);

            let next = Tensor::cat(&[ids.narrow(1, 1, ids.size()[1] - 1), ids.narrow(1, 0, 1)], 1);
            let next = next.contiguous().view([-1]).to_device(device());
            let out = LmHead::logprobs(&mut model, &hidden, &next, true).unwrap();
            let both = mask.narrow(1, 0, mask.size()[1] - 1) * mask.narrow(1, 1, mask.size()[1] - 1);
            let logprobs =
                cpu(out.logprobs).view(mask.size().as_slice()).narrow(1, 0, mask.size()[1] - 1) * both;
            g.near("token_logprobs", &logprobs, kind, largest);
            g.near("entropy", &(cpu(out.entropies.unwrap()) * real.view([-1])), kind, largest);
        }
    }
}

#[test]
fn loss_and_every_gradient() {
    for family in FAMILIES {
        let g = Golden::read(family);
        for kind in [Kind::Float, Kind::Double] {
            let mut model = load(&golden().join("models").join(family), kind);
            for micro_batches in [1, 5] {
                let (loss, gradients) = loss_and_gradients(&mut model, &g, Recompute::None, micro_batches);
                g.near("loss", &Tensor::from(loss), kind, largest);
                let names: Vec<_> = g.double.keys().filter_map(|k| k.strip_prefix("grad.")).collect();
                assert_eq!(names.len(), gradients.len(), "{family}: as many gradients as tensors");
                for name in names {
                    g.near(&format!("grad.{name}"), &gradients[name], kind, relative);
                }
            }
        }
    }
}

#[test]
fn recomputing_changes_no_bit() {
    let g = Golden::read("llama3");
    for kind in [Kind::Float, Kind::BFloat16] {
        let mut model = load(&golden().join("models/llama3"), kind);
        let (loss, kept) = loss_and_gradients(&mut model, &g, Recompute::None, 1);
        for recompute in [Recompute::Selective, Recompute::Full] {
            let (again, recomputed) = loss_and_gradients(&mut model, &g, recompute, 1);
            assert_eq!(loss, again);
            for (name, grad) in &kept {
                assert!(grad.equal(&recomputed[name]), "{name} with {recompute:?} in {kind:?}");
            }
        }
    }
}

/// bfloat16 has 8 bits: a few per cent in gradients of 3 blocks.
#[test]
fn bfloat16_is_near_float64() {
    for family in FAMILIES {
        let g = Golden::read(family);
        let mut model = load(&golden().join("models").join(family), Kind::BFloat16);
        let (loss, gradients) = loss_and_gradients(&mut model, &g, Recompute::None, 1);
        let exact = g.double["loss"].double_value(&[]);
        assert!((loss / exact - 1.0).abs() < 0.01, "{family}: loss {loss}, exact {exact}");
        for (name, grad) in gradients {
            let d = relative(&grad, &g.double[&format!("grad.{name}")]);
            assert!(d < 0.1, "{family}: {name} is {d} off");
        }
    }
}

#[test]
fn rotary_frequencies() {
    for family in FAMILIES {
        let g = Golden::read(family);
        let model = load(&golden().join("models").join(family), Kind::Double);
        let ours = Tensor::from_slice(&corral::model::llama::inverse_frequencies(&model.shape));
        g.near("rope_inv_freq", &ours, Kind::Double, largest);
    }
}

/// PyTorch's AdamW over ten steps, with and without clipping and a schedule. The matrices and the vector lie in one
/// group, so that decay on part of it is tested too.
#[test]
fn adamw_trajectories() {
    use corral::distributed::sharded::{Layout, Sharded};
    use kernels::c10d::Group;

    let t = tensors(&golden().join("algo/adamw.safetensors"));
    let c = json(&golden().join("algo/adamw.json"));
    let multipliers: Vec<f64> =
        c["schedule_multipliers"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    for (name, kind, tolerance) in [("f64", Kind::Double, 1e-12), ("f32", Kind::Float, 1e-6)] {
        for mode in ["plain", "clip_sched"] {
            let layout = Layout::new(
                "all",
                vec![("w".into(), vec![7, 5]), ("e".into(), vec![3, 4]), ("b".into(), vec![5])],
            );
            let specs = layout.specs.clone();
            let mut params = Sharded::new(vec![layout], Group::solo(), Group::solo(), kind, device());
            params
                .fill(|spec, _, values| {
                    values.shallow_clone().copy_(&t[&format!("init.{}", spec.name)].view([-1]));
                    Ok(())
                })
                .unwrap();
            let number = |key: &str| c[key].as_f64().unwrap();
            let betas = [c["betas"][0].as_f64().unwrap(), c["betas"][1].as_f64().unwrap()];
            let hyper = Hyper { betas, eps: number("eps"), weight_decay: number("weight_decay") };
            let mut optimizer = AdamW::new(&params, hyper);
            for step in 0..multipliers.len() {
                let (grad, fresh) = params.grad(0);
                assert!(fresh);
                for spec in &specs {
                    spec.view(&grad).copy_(&t[&format!("grad.{}.{step}", spec.name)]);
                }
                let norm = AdamW::sum_squares(&params).unwrap().sqrt();
                let (lr, scale) = match mode {
                    "plain" => (number("lr"), 1.0),
                    _ => (number("lr") * multipliers[step], AdamW::clip_scale(norm, number("max_grad_norm"))),
                };
                let wanted = t[&format!("{mode}.{name}.grad_norm")].double_value(&[step as i64]);
                assert!((norm / wanted - 1.0).abs() < 1e-6, "norm {norm}, PyTorch {wanted}");
                optimizer.update(&mut params, lr, scale).unwrap();
                for spec in &specs {
                    let d = relative(
                        &spec.view(&params.master(0)),
                        &t[&format!("{mode}.{name}.{}.{step}", spec.name)],
                    );
                    assert!(d < tolerance, "{mode} {name} {} after step {step}: {d:e}", spec.name);
                }
            }
            for spec in &specs {
                for (key, moment) in
                    [("exp_avg", &optimizer.exp_avg[0]), ("exp_avg_sq", &optimizer.exp_avg_sq[0])]
                {
                    let d = relative(&spec.view(moment), &t[&format!("{mode}.{name}.{key}.{}", spec.name)]);
                    assert!(d < tolerance, "{mode} {name} {key} of {}: {d:e}", spec.name);
                }
            }
        }
    }
}

#[test]
fn learning_rate_schedules() {
    let mut tested = 0;
    for case in json(&golden().join("algo/lr_schedules.json"))["cases"].as_array().unwrap() {
        let kind = match case["name"].as_str().unwrap() {
            "cosine" if case.get("num_cycles").is_none() => ScheduleKind::Cosine,
            "cosine_with_min_lr" => ScheduleKind::Cosine,
            "linear" => ScheduleKind::Linear,
            "constant_with_warmup" => ScheduleKind::Constant,
            _ => continue, // kinds that are not ours
        };
        let total_steps = case["num_training_steps"].as_u64().unwrap();
        let schedule = Schedule {
            kind,
            lr: case["base_lr"].as_f64().unwrap(),
            warmup_steps: case["num_warmup_steps"].as_u64().unwrap(),
            total_steps,
            min_lr_ratio: case.get("min_lr_rate").map_or(0.0, |v| v.as_f64().unwrap()),
        };
        for (step, lr) in case["lr"].as_array().unwrap().iter().enumerate().take(total_steps as usize) {
            let (ours, wanted) = (schedule.rate(step as u64), lr.as_f64().unwrap());
            assert!(
                (ours - wanted).abs() <= 1e-15,
                "{} step {step}: {ours}, transformers {wanted}",
                case["name"]
            );
        }
        tested += 1;
    }
    assert!(tested >= 5);
}

/// Bit for bit as bitsandbytes quantizes on the CPU; what it gives back, and int8 by row.
#[test]
fn quantization() {
    use kernels::quant::{self, Quantized, Scales, Scheme};
    let golden = tensors(&golden().join("algo/quant.safetensors"));
    let on_cpu = |t: &Tensor| t.to_device(Device::Cpu);
    #[track_caller]
    fn same(what: &str, a: &Tensor, b: &Tensor) {
        assert_eq!(a.kind(), b.kind(), "{what}");
        assert!(a.to_device(Device::Cpu).view(b.size().as_slice()).equal(b), "{what} differs");
    }
    for (scheme, weight, name) in [
        (Scheme::Nf4, "weight", "nf4"),
        (Scheme::Nf4, "weight_odd", "nf4_odd"),
        (Scheme::Nf4Double, "weight", "nf4_dq"),
        (Scheme::Int8, "weight", "int8_row"),
    ] {
        let of = |part: &str| &golden[&format!("{name}.{part}")];
        let w = &golden[weight];
        let q = Quantized::quantize(&w.to_device(device()), scheme).unwrap();
        same(name, q.data(), of(if scheme == Scheme::Int8 { "q" } else { "packed" }));
        match q.scales() {
            Scales::Absmax(absmax) => same(name, absmax, of("absmax")),
            Scales::Double { codes, absmax, offset } => {
                same(name, codes, of("absmax_q"));
                same(name, absmax, of("absmax2"));
                assert_eq!(f64::from(*offset), of("offset").double_value(&[]), "offset");
                let scales = quant::dequantize_dynamic(&on_cpu(codes), &on_cpu(absmax)) + f64::from(*offset);
                same(name, &scales, of("absmax"));
                same(name, &quant::dynamic_map(true, Device::Cpu), of("code2"));
            }
        }
        let [rows, columns] = q.shape();
        let back = q.dequantize(0..rows, 0..columns, Kind::Float).unwrap();
        same(name, &back, of("dequant"));
    }
    same("nf4.code", &Tensor::from_slice(&quant::NF4), &golden["nf4.code"]);
    let (codes, absmax) = quant::quantize_dynamic(&golden["weight"].view([-1]));
    same("dyn8.codes", &codes, &golden["dyn8.codes"]);
    same("dyn8.absmax", &absmax, &golden["dyn8.absmax"]);
    same("dyn8.code", &quant::dynamic_map(true, Device::Cpu), &golden["dyn8.code"]);
    same("dyn8.dequant", &quant::dequantize_dynamic(&codes, &absmax), &golden["dyn8.dequant"]);
}
