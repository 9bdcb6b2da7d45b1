//! Training against PyTorch, transformers, PEFT and bitsandbytes, on golden values: AdamW, schedules, quantization, adapters,
//! packed rows. Where and on what as in `parity.rs`.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

mod common;

use std::collections::HashMap;
use testing::compare::{largest, relative, relative_number};
use testing::device::device;
use testing::folder::folder;
use testing::golden::{golden, golden_model, json, shifted, tensors};
use testing::tolerance::{Quantity, allowed, allowed_beside};

use common::{gradients, load};
use corral::checkpoint::merge::Merge;
use corral::checkpoint::{PeftAdapter, Weights};
use corral::distributed::mesh::Sharding;
use corral::distributed::sharded::{Layout, Sharded};
use corral::model::{Llama, LmHead, ModelInput, Recompute};
use corral::optim::{AdamW, Hyper, Schedule, ScheduleKind};
use tch::{Device, Kind, Tensor};

/// PyTorch's AdamW over ten steps, with and without clipping and a schedule. The matrices and the vector lie in one
/// group, so that decay on part of it is tested too.
#[test]
fn adamw_trajectories() {
    let t = tensors(&golden().join("algo/adamw.safetensors"));
    let c = json(&golden().join("algo/adamw.json"));
    let multipliers: Vec<f64> =
        c["schedule_multipliers"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    for (name, kind) in [("f64", Kind::Double), ("f32", Kind::Float)] {
        let tolerance = allowed(Quantity::AdamW, kind);
        for mode in ["plain", "clip_sched"] {
            let layout = Layout::new(
                "all",
                vec![("w".into(), vec![7, 5]), ("e".into(), vec![3, 4]), ("b".into(), vec![5])],
            );
            let specs = layout.specs.clone();
            let mut params = Sharded::new(vec![layout], Sharding::solo(), kind, device());
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
                assert!(params.slice_grad(0).is_none(), "an update forgets the gradient");
                let grad = params.grad(0).unwrap();
                for spec in &specs {
                    spec.view(grad.flat()).copy_(&t[&format!("grad.{}.{step}", spec.name)]);
                }
                let norm = AdamW::sum_squares(&params).unwrap().sqrt();
                let (lr, scale) = match mode {
                    "plain" => (number("lr"), 1.0),
                    _ => (number("lr") * multipliers[step], AdamW::clip_scale(norm, number("max_grad_norm"))),
                };
                let wanted = t[&format!("{mode}.{name}.grad_norm")].double_value(&[step as i64]);
                assert!(
                    relative_number(norm, wanted) < allowed(Quantity::Reduction, Kind::Float),
                    "norm {norm}, PyTorch {wanted}"
                );
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
                for (key, moment) in optimizer.moments[0].tensors() {
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
                (ours - wanted).abs() <= allowed(Quantity::LearningRate, Kind::Double),
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
                same("offset", &on_cpu(offset), of("offset"));
                let scales = quant::dequantize_dynamic(&on_cpu(codes), &on_cpu(absmax)) + on_cpu(offset);
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

/// Near a golden value of float32.
fn near(what: &str, got: &Tensor, exact: &Tensor, kind: Kind, measure: fn(&Tensor, &Tensor) -> f64) {
    let size = exact.abs().max().double_value(&[]).max(1.0);
    let distance = measure(&got.view(exact.size().as_slice()), exact);
    assert!(
        distance <= allowed(Quantity::SingleReference, kind) * size,
        "{what} in {kind:?}: {distance:e} of {size}"
    );
}

/// The input of the golden adapter.
fn masked_input(g: &HashMap<String, Tensor>) -> ModelInput {
    ModelInput::with_mask(g["input_ids"].shallow_clone(), &g["attention_mask"])
}

/// The logits of that input `[B T, V]`, padding 0.
fn masked_logits(model: &mut Llama, g: &HashMap<String, Tensor>) -> Tensor {
    let real = g["attention_mask"].view([-1, 1]).to_kind(Kind::Double);
    let hidden = model.hidden(&masked_input(g)).unwrap();
    model.next_token_logits(&hidden).unwrap().to_device(Device::Cpu).to_kind(Kind::Double) * &real
}

/// PEFT's adapter on a Llama: logits, loss, every gradient.
#[test]
fn lora() {
    let dir = golden().join("lora");
    let g = tensors(&dir.join("golden.safetensors"));
    let logits = |model: &mut Llama| masked_logits(model, &g);
    let weights = Weights::open(&dir).unwrap();
    let shape = weights.shape().clone();
    let trainable = weights.lora().unwrap();
    for kind in [Kind::Float, Kind::Double] {
        let plans = trainable.plans(&shape).unwrap();
        let mut params = Sharded::new(plans, Sharding::solo(), kind, device());
        weights.fill(&mut params).unwrap();
        assert_eq!(params.first_trained(), 1, "the embedding stays");
        let mut model = Llama::new(shape.clone(), params);
        near("logits", &logits(&mut model), &g["logits"], kind, largest);

        let labels = shifted(&g["labels"]).to_device(device());
        let count = labels.ge(0).sum(Kind::Int64).double_value(&[]);
        for recompute in [Recompute::None, Recompute::Full] {
            model.params.begin_step_gradients(1);
            let (hidden, tape) = model.forward(&masked_input(&g), recompute).unwrap();
            let a = if kind == Kind::Double { Kind::Double } else { Kind::Float };
            let coef = Tensor::full([labels.size()[0]], -1.0 / count, (a, device()));
            let (logprobs, dhidden) = LmHead::linear_loss(&mut model, &hidden, &labels, &coef).unwrap();
            model.backward(dhidden, tape).unwrap();
            model.params.finish_step_gradients().unwrap();
            let loss = -logprobs.sum(Kind::Double) / count;
            near("loss", &loss.to_device(Device::Cpu), &g["loss"], kind, largest);
            let mut seen = 0;
            for i in 0..model.params.len() {
                let Some(grad) = model.params.slice_grad(i) else {
                    assert!(!model.params.trains(i), "group {i} has a gradient");
                    continue;
                };
                for spec in &model.params.layout(i).specs {
                    let name = format!("grad.base_model.model.{}", spec.name);
                    let distance = relative(&spec.view(&grad), &g[&name]);
                    assert!(
                        distance < allowed(Quantity::SingleGradient, kind),
                        "{name} in {kind:?}: {distance:e}"
                    );
                    seen += 1;
                }
            }
            assert_eq!(seen, g.keys().filter(|k| k.starts_with("grad.")).count());
            model.params.clear_gradients();
        }

        let without = model.without_adapters(|model| Ok(logits(model))).unwrap();
        let mut plain = load(&golden_model("llama3"), kind);
        assert!(without.equal(&logits(&mut plain)), "without its adapters it is the model itself");

        // The same where nothing is trained, and no masters are held.
        let plans = trainable.plans_for_inference(&shape).unwrap();
        let mut params = Sharded::new(plans, Sharding::solo(), kind, device());
        weights.fill(&mut params).unwrap();
        near("logits", &logits(&mut Llama::new(shape.clone(), params)), &g["logits"], kind, largest);
    }
}

/// What merging PEFT's adapter gives.
#[test]
fn merged_lora() {
    let dir = golden().join("lora");
    let g = tensors(&dir.join("golden.safetensors"));
    let merged = folder("merged");
    let adapter = PeftAdapter::open(&dir).unwrap();
    let base = Weights::open(&adapter.base().unwrap()).unwrap();
    let merge = Merge::new(base, adapter, None).unwrap();
    let report = merge.write(&merged, 1 << 30, device(), &Default::default()).unwrap();
    assert!(report.distance < allowed(Quantity::Merged, Kind::Double), "{report:?}");
    let (ours, theirs) =
        (tensors(&merged.join("model.safetensors")), tensors(&dir.join("merged.safetensors")));
    assert_eq!(report.num_merged, theirs.len());
    for (name, t) in &theirs {
        let d = largest(&ours[name], t);
        assert!(d < allowed(Quantity::Merged, Kind::Float), "{name}: {d:e}");
    }
    let mut model = load(&merged, Kind::Double);
    near("logits_merged", &masked_logits(&mut model, &g), &g["logits_merged"], Kind::Double, largest);
}

/// Documents that are packed into one row, which do not see each other: logits, loss and gradients are those of each on its
/// own.
#[test]
fn packed_documents_are_as_each_on_its_own() {
    let g = tensors(&golden().join("algo/packing_model.safetensors"));
    let (ids, document) = (&g["input_ids"], &g["document_ids"]);
    let labels = shifted(&g["labels"]);
    let time = ids.size()[1];
    let documents = Vec::<i64>::try_from(document.view([-1])).unwrap();
    let positions = Vec::<i64>::try_from(g["position_ids"].view([-1])).unwrap();
    let starts: Vec<i64> = positions.iter().enumerate().map(|(i, at)| i as i64 - at).collect();
    let count = labels.ge(0).sum(Kind::Int64).double_value(&[]);
    let run = |kind, input: &ModelInput, labels: &Tensor| {
        let mut model = load(&golden_model("llama2"), kind);
        model.params.begin_step_gradients(1);
        let (hidden, tape) = model.forward(input, Recompute::None).unwrap();
        let logits = model.next_token_logits(&hidden).unwrap().to_device(Device::Cpu).to_kind(Kind::Double);
        let accumulator = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let coef = Tensor::full([labels.size()[0]], -1.0 / count, (accumulator, device()));
        let (logprobs, dhidden) =
            LmHead::linear_loss(&mut model, &hidden, &labels.to_device(device()), &coef).unwrap();
        model.backward(dhidden, tape).unwrap();
        model.params.finish_step_gradients().unwrap();
        (logits, -logprobs.sum(Kind::Double).double_value(&[]) / count, gradients(&model))
    };
    let packed = ModelInput {
        positions: Some(g["position_ids"].contiguous().view([-1])),
        start: Some(Tensor::from_slice(&starts)),
        ..ModelInput::new(ids.shallow_clone())
    };
    for kind in [Kind::Float, Kind::Double] {
        let (logits, loss, grads) = run(kind, &packed, &labels);
        let (exact, single) = (g["logits_separate_f64"].view_as(&logits), &g["logits_separate"]);
        let size = if kind == Kind::Double { exact.abs().max().double_value(&[]).max(1.0) } else { 1.0 };
        let allowed_logits =
            size * allowed_beside(Quantity::Logits, kind, largest(&single.view_as(&logits), &exact));
        let loose = allowed(Quantity::LossFunction, kind);
        assert!(largest(&logits, &exact) <= allowed_logits, "logits in {kind:?}");
        assert!(largest(&logits, &g["logits_unmasked"].view_as(&logits).to_kind(Kind::Double)) > 0.1);
        let expected = g["loss_f64"].double_value(&[]);
        assert!((loss - expected).abs() <= loose * expected.abs().max(1.0), "{loss} is not {expected}");

        let mut sums: HashMap<String, Tensor> = HashMap::new();
        let mut first = 0;
        while first < time {
            let of = |i: i64| documents[i as usize];
            let n = (first..time).take_while(|i| of(*i) == of(first)).count() as i64;
            let part = labels.narrow(0, first, n).copy();
            // The last position of a document predicts nothing.
            let input = ModelInput::new(ids.narrow(1, first, n).contiguous());
            for (name, grad) in run(kind, &input, &part).2 {
                match sums.get_mut(&name) {
                    Some(sum) => drop(sum.g_add_(&grad)),
                    None => drop(sums.insert(name, grad)),
                }
            }
            first += n;
        }
        assert_eq!(sums.len(), grads.len());
        for (name, sum) in &sums {
            let distance = relative(&grads[name], sum);
            assert!(distance <= loose, "{name} in {kind:?}: {distance:e}");
        }
    }
}
