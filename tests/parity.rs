//! The model against Hugging Face's, on golden values (`CORRAL_GOLDEN` names another root of the same form), on the CPU or,
//! with CORRAL_TEST_DEVICE=cuda, on a GPU.
//!
//! How far from the float64 values we may be: `testing/src/tolerance.rs`.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

mod common;

use std::collections::HashMap;
use testing::compare::{largest, relative, relative_number};
use testing::device::device;
use testing::folder::TestFolder;
use testing::golden::{FAMILIES, golden_model, json, shifted, tensors};
use testing::ranks::on_ranks;
use testing::tolerance::{Quantity, allowed, allowed_beside};

use common::{gradients, load, load_sharded};
use corral::algorithms::step::{self, MicroBatch};
use corral::model::head::LogProbs;
use corral::model::{Llama, LmHead, ModelInput, Recompute};
use kernels::comm::Group;
use tch::{Device, Kind, Tensor};

struct Golden {
    single: HashMap<String, Tensor>,
    double: HashMap<String, Tensor>,
}

impl Golden {
    fn read(family: &str) -> Golden {
        let dir = golden_model(family);
        let single = tensors(&dir.join("golden.safetensors"));
        let double = tensors(&dir.join("golden_f64.safetensors"));
        Golden { single, double }
    }

    fn input(&self) -> (ModelInput, Tensor, Tensor) {
        let (ids, mask) = (&self.single["input_ids"], &self.single["attention_mask"]);
        (ModelInput::with_mask(ids.shallow_clone(), mask), ids.shallow_clone(), mask.shallow_clone())
    }

    /// `got` is as near the float64 values as the table of tolerances says.
    #[track_caller]
    fn near(&self, what: &str, got: &Tensor, kind: Kind) {
        let (value, measure): (_, fn(&Tensor, &Tensor) -> f64) = match what {
            "loss" => (Quantity::Loss, largest),
            _ if what.starts_with("grad.") => (Quantity::Gradient, relative),
            _ => (Quantity::Logits, largest),
        };
        let exact = &self.double[what];
        let distance = measure(&got.view(exact.size().as_slice()), exact);
        // Relative to values above 1.
        let size = match value {
            Quantity::Logits | Quantity::Loss if kind == Kind::Double => {
                exact.abs().max().double_value(&[]).max(1.0)
            }
            _ => 1.0,
        };
        let allowed = size * allowed_beside(value, kind, measure(&self.single[what], exact));
        assert!(
            distance <= allowed,
            "{what} in {kind:?}: {distance:e} from the float64 value, allowed {allowed:e}"
        );
    }
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
    model.params.begin_step_gradients(micro_batches as usize);
    for i in 0..micro_batches {
        let (first, end) = (i * rows / micro_batches, (i + 1) * rows / micro_batches);
        let part = |t: &Tensor| t.narrow(0, first, end - first);
        let input = ModelInput::with_mask(part(&ids), &part(&mask));
        let (hidden, tape) = model.forward(&input, recompute).unwrap();
        let labels = shifted(&part(labels));
        let kind = if hidden.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let coef = Tensor::full([labels.size()[0]], -1.0 / count, (kind, device()));
        let labels = labels.to_device(device());
        let (logprobs, dhidden) = LmHead::linear_loss(model, &hidden, &labels, &coef).unwrap();
        model.backward(dhidden, tape).unwrap();
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
            let mut model = load(&golden_model(family), kind);
            let (input, ids, mask) = g.input();
            let hidden = model.hidden(&input).unwrap();
            let real = mask.view([-1, 1]).to_kind(Kind::Double);
            let cpu = |t: Tensor| t.to_device(Device::Cpu);
            let logits = cpu(model.next_token_logits(&hidden).unwrap()).to_kind(Kind::Double) * &real;
            g.near("logits", &logits, kind);

            let next = Tensor::cat(&[ids.narrow(1, 1, ids.size()[1] - 1), ids.narrow(1, 0, 1)], 1);
            let next = next.contiguous().view([-1]).to_device(device());
            let out = LmHead::logprobs(&mut model, &hidden, &next, 1.0, true).unwrap();
            let both = mask.narrow(1, 0, mask.size()[1] - 1) * mask.narrow(1, 1, mask.size()[1] - 1);
            let logprobs =
                cpu(out.logprobs).view(mask.size().as_slice()).narrow(1, 0, mask.size()[1] - 1) * both;
            g.near("token_logprobs", &logprobs, kind);
            g.near("entropy", &(cpu(out.entropies.unwrap()) * real.view([-1])), kind);
        }
    }
}

/// Rows without a mask take the fastest attention that there is (on a GPU flash attention), those with one another: whole models
/// in bfloat16 give the same, forward and backward.
#[test]
fn attention_with_and_without_a_mask_is_the_same_in_bfloat16() {
    // Which experts take a token may differ by a rounding.
    for family in FAMILIES.iter().filter(|family| **family != "mixtral") {
        let g = Golden::read(family);
        let ids = &g.single["input_ids"];
        let mut model = load(&golden_model(family), Kind::BFloat16);
        let mut run = |input: ModelInput| {
            let labels = shifted(ids).to_device(device());
            let coef =
                Tensor::full([labels.size()[0]], -1.0 / labels.numel() as f64, (Kind::Float, device()));
            model.params.begin_step_gradients(1);
            let (hidden, tape) = model.forward(&input, Recompute::None).unwrap();
            let (logprobs, dhidden) = LmHead::linear_loss(&mut model, &hidden, &labels, &coef).unwrap();
            model.backward(dhidden, tape).unwrap();
            model.params.finish_step_gradients().unwrap();
            let gradients = gradients(&model);
            model.params.clear_gradients();
            (logprobs, gradients)
        };
        let (plain, grads) = run(ModelInput::new(ids.shallow_clone()));
        let (masked, others) = run(ModelInput::with_mask(ids.shallow_clone(), &ids.ones_like()));
        let apart = relative(&plain, &masked);
        assert!(apart <= allowed(Quantity::SameModel, Kind::BFloat16), "{family}: {apart:e}");
        for (name, gradient) in &grads {
            let own = g
                .double
                .get(&format!("grad.{name}"))
                .map_or(0.0, |exact| relative(&g.single[&format!("grad.{name}")], exact));
            let apart = relative(gradient, &others[name]);
            assert!(
                apart <= allowed_beside(Quantity::Gradient, Kind::BFloat16, own),
                "{family} {name}: {apart:e}"
            );
        }
    }
}

/// Gradients under the names of the family's files, some of which hold several tensors one after the other.
fn joined(mut gradients: HashMap<String, Tensor>, g: &Golden) -> HashMap<String, Tensor> {
    let joint: [(&str, &[&str]); 2] =
        [("qkv_proj", &["q_proj", "k_proj", "v_proj"]), ("gate_up_proj", &["gate_proj", "up_proj"])];
    for name in g.double.keys().filter_map(|k| k.strip_prefix("grad.")) {
        for (whole, parts) in joint.iter().filter(|(whole, _)| name.contains(whole)) {
            let parts = parts.iter().map(|part| gradients.remove(&name.replace(whole, part)).unwrap());
            let whole = Tensor::cat(&parts.collect::<Vec<_>>(), 0);
            gradients.insert(name.to_string(), whole);
        }
    }
    gradients
}

#[test]
fn loss_and_every_gradient() {
    for family in FAMILIES {
        let g = Golden::read(family);
        for kind in [Kind::Float, Kind::Double] {
            let mut model = load(&golden_model(family), kind);
            for micro_batches in [1, 5] {
                let (loss, gradients) = loss_and_gradients(&mut model, &g, Recompute::None, micro_batches);
                let gradients = joined(gradients, &g);
                g.near("loss", &Tensor::from(loss), kind);
                let names: Vec<_> = g.double.keys().filter_map(|k| k.strip_prefix("grad.")).collect();
                assert_eq!(names.len(), gradients.len(), "{family}: as many gradients as tensors");
                for name in names {
                    g.near(&format!("grad.{name}"), &gradients[name], kind);
                }
            }
        }
    }
}

/// A loss that is not linear in log-probabilities and entropies, at a temperature: the head's backward against autograd
/// over the whole logits.
#[test]
fn losses_of_log_probabilities_and_entropies() {
    for family in ["llama3", "tied"] {
        let g = Golden::read(family);
        let mut model = load(&golden_model(family), Kind::Double);
        let (input, ..) = g.input();
        let labels = shifted(&g.single["labels"]).to_device(device());
        let n = labels.size()[0];
        let hidden = model.hidden(&input).unwrap();
        let group = model.head_group();
        let weight = model.params.single(group).unwrap();
        let temperature = 0.7;
        let loss = |p: &LogProbs| {
            let (logprobs, entropies) = (&p.logprobs, p.entropies.as_ref().unwrap());
            let places = Tensor::arange(n, (Kind::Double, device()));
            Ok(((logprobs * 0.1).exp() * &places + entropies * entropies * places.cos()).mean(None::<Kind>))
        };

        let (x, w) = (hidden.copy().set_requires_grad(true), weight.copy().set_requires_grad(true));
        let all = (x.mm(&w.tr()) / temperature).log_softmax(-1, Kind::Double);
        let of_label = all.gather(-1, &labels.clamp_min(0).unsqueeze(-1), false).squeeze_dim(-1);
        let logprobs = of_label * labels.ge(0);
        let entropies = Some(-(all.exp() * &all).sum_dim_intlist([-1i64].as_slice(), false, None));
        let expected = loss(&LogProbs { logprobs, entropies }).unwrap();
        expected.backward();

        let out = LmHead::logprobs(&mut model, &hidden, &labels, temperature, true).unwrap();
        let entropies = out.entropies.as_ref().unwrap();
        let (value, gradients) = step::differentiate(&[&out.logprobs, entropies], |leaves| {
            let [logprobs, entropies] = leaves else { unreachable!() };
            let entropies = Some(entropies.shallow_clone());
            loss(&LogProbs { logprobs: logprobs.shallow_clone(), entropies })
        })
        .unwrap();
        let value = value.double_value(&[]);
        assert!(
            relative_number(value, expected.double_value(&[])) < allowed(Quantity::Autograd, Kind::Double)
        );
        let [logprobs, entropies] = <[Option<Tensor>; 2]>::try_from(gradients).unwrap();
        let gradients = LogProbs { logprobs: logprobs.unwrap(), entropies };
        model.params.begin_step_gradients(1);
        let dhidden = LmHead::backward(&mut model, &hidden, &labels, temperature, &gradients).unwrap();
        assert!(
            relative(&dhidden, &x.grad()) < allowed(Quantity::Autograd, Kind::Double),
            "{family}: {}",
            relative(&dhidden, &x.grad())
        );
        let dweight = model.params.single_grad(group).unwrap();
        assert!(
            relative(dweight.sum().unwrap(), &w.grad()) < allowed(Quantity::Autograd, Kind::Double),
            "{family}"
        );
        model.params.clear_gradients();

        // The same as a step's entry.
        let batch = MicroBatch { input, labels };
        let objective = step::Objective::LogProbs { temperature, entropies: true, loss: Box::new(loss) };
        let mut entries = [step::StepEntry { batch: &batch, objective, balance: None }];
        let (losses, _) = step::accumulate(&mut model, &mut entries, Recompute::None).unwrap();
        assert_eq!(losses, [value]);
        if family == "llama3" {
            let all = self::gradients(&model);
            assert!(relative(&all["lm_head.weight"], &w.grad()) < allowed(Quantity::Autograd, Kind::Double));
        }
        model.params.clear_gradients();
    }
}

#[test]
fn recomputing_changes_no_bit() {
    for family in ["llama3", "mistral", "qwen2", "qwen3", "mixtral"] {
        let g = Golden::read(family);
        for kind in [Kind::Float, Kind::BFloat16] {
            let mut model = load(&golden_model(family), kind);
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
}

/// Not so for a mixture of experts, of which bfloat16 may choose others.
#[test]
fn bfloat16_is_near_float64() {
    for family in FAMILIES.into_iter().filter(|f| *f != "mixtral") {
        let g = Golden::read(family);
        let mut model = load(&golden_model(family), Kind::BFloat16);
        let (loss, gradients) = loss_and_gradients(&mut model, &g, Recompute::None, 1);
        let exact = g.double["loss"].double_value(&[]);
        let off = relative_number(loss, exact);
        assert!(off < allowed(Quantity::Loss, Kind::BFloat16), "{family}: loss {loss}, exact {exact}");
        for (name, grad) in joined(gradients, &g) {
            g.near(&format!("grad.{name}"), &grad, Kind::BFloat16);
        }
    }
}

/// Rows behind padding give what they give alone, at other positions of the batch and of a sliding window.
#[test]
fn padded_rows_are_as_alone() {
    for family in FAMILIES {
        let g = Golden::read(family);
        let mut model = load(&golden_model(family), Kind::Double);
        let (input, ids, mask) = g.input();
        let (rows, time) = (ids.size()[0], ids.size()[1]);
        let all = model.hidden(&input).unwrap().view([rows, time, -1]);
        let mut padded = 0;
        for row in 0..rows {
            let mask = Vec::<i64>::try_from(mask.get(row)).unwrap();
            let first = mask.iter().position(|m| *m == 1).unwrap() as i64;
            let n = mask.iter().sum();
            let alone =
                model.hidden(&ModelInput::new(ids.get(row).narrow(0, first, n).unsqueeze(0))).unwrap();
            let d = largest(&all.get(row).narrow(0, first, n), &alone);
            assert!(d < allowed(Quantity::SameModel, Kind::Double), "{family}: row {row} differs by {d:e}");
            padded += i64::from(first > 0);
        }
        assert!(padded >= 2);
    }
}

/// Leaves the gradients of the golden batch's `parts` (first row, rows) in the parameters' slices.
fn accumulate(model: &mut Llama, family: &str, parts: &[(i64, i64)]) {
    let g = Golden::read(family);
    model.params.begin_step_gradients(parts.len());
    for (first, rows) in parts {
        let part = |name: &str| g.single[name].narrow(0, *first, *rows);
        let input = ModelInput::with_mask(part("input_ids"), &part("attention_mask"));
        let (hidden, tape) = model.forward(&input, Recompute::Selective).unwrap();
        let labels = shifted(&part("labels"));
        let coef = Tensor::full([labels.size()[0]], -0.01, (Kind::Double, Device::Cpu));
        let (_, dhidden) = LmHead::linear_loss(model, &hidden, &labels, &coef).unwrap();
        model.backward(dhidden, tape).unwrap();
    }
    model.params.finish_step_gradients().unwrap();
}

/// Gradients of parameters sharded over two ranks with two micro-batches each, against those of one rank.
#[test]
fn sharded_gradients_are_those_of_one_rank() {
    for family in FAMILIES {
        let dir = golden_model(family);
        let mut whole = load_sharded(&dir, Kind::Double, Group::solo(), Device::Cpu);
        accumulate(&mut whole, family, &[(0, 5)]);
        let expected: Vec<Vec<f64>> = (0..whole.params.len())
            .map(|i| Vec::<f64>::try_from(whole.params.slice_grad(i).unwrap()).unwrap())
            .collect();
        on_ranks(2, |world| {
            let parts = [[(0, 1), (1, 1)], [(2, 1), (3, 2)]];
            let mut model = load_sharded(&dir, Kind::Double, world.clone(), Device::Cpu);
            accumulate(&mut model, family, &parts[world.rank() as usize]);
            for (i, expected) in expected.iter().enumerate() {
                let slice = model.params.slice(i);
                let expected = Tensor::from_slice(expected).narrow(0, slice.start, slice.len);
                let d = relative(&model.params.slice_grad(i).unwrap(), &expected);
                assert!(d < allowed(Quantity::SameModel, Kind::Double), "{family}: group {i} is {d:e} off");
            }
        });
    }
}

#[test]
fn routing_and_load_balancing_loss() {
    let g = Golden::read("mixtral");
    for kind in [Kind::Float, Kind::Double] {
        let mut model = load(&golden_model("mixtral"), kind);
        let (input, _, mask) = g.input();
        let (_, mut tape) = model.forward(&input, Recompute::None).unwrap();
        let mask = mask.view([-1, 1]);
        let blocks = 0..model.shape.num_hidden_layers as usize;
        let routing: Vec<(Tensor, Tensor)> = blocks
            .map(|i| {
                let (logits, experts) = tape.routing(i).unwrap();
                let cpu = |t: &Tensor| t.to_device(Device::Cpu);
                (cpu(logits).to_kind(Kind::Double) * &mask, cpu(experts) * &mask)
            })
            .collect();
        let stack = |f: fn(&(Tensor, Tensor)) -> &Tensor| {
            Tensor::stack(&routing.iter().map(f).collect::<Vec<_>>(), 0)
        };
        g.near("router_logits", &stack(|r| &r.0), kind);
        let chosen = &g.single["router_top2"];
        assert!(stack(|r| &r.1).view(chosen.size().as_slice()).equal(chosen), "experts in {kind:?}");
        // transformers adds in float32 here whatever the logits are, so that what is exact is taken from its logits.
        let loss = tape.balance_loss(0.0).unwrap().unwrap().double_value(&[]);
        let logits = g.double["router_logits"].reshape([-1, 4]);
        let real = mask.view([-1]).repeat([routing.len() as i64]).to_kind(Kind::Double);
        let tokens = real.sum(Kind::Double);
        let mean =
            |t: Tensor| (t * real.unsqueeze(-1)).sum_dim_intlist([0i64].as_slice(), false, None) / &tokens;
        let got = logits.zeros_like().scatter_value(1, &logits.topk(2, -1, true, true).1, 1.0);
        let exact = (mean(got) * mean(logits.softmax(-1, None))).sum(Kind::Double).double_value(&[]) * 4.0;
        let golden = g.double["router_aux_loss"].double_value(&[]);
        assert!(
            relative_number(exact, golden) < allowed(Quantity::Reduction, Kind::Float),
            "the formula: {exact}, transformers {golden}"
        );
        let allowed = allowed(Quantity::Reduction, kind);
        assert!((loss - exact).abs() < allowed * exact, "{kind:?}: {loss}, exact {exact}");
    }
    let mut llama = load(&golden_model("llama2"), Kind::Float);
    let (input, _, _) = Golden::read("llama2").input();
    assert!(llama.forward(&input, Recompute::None).unwrap().1.balance_loss(1.0).unwrap().is_none());
}

/// The gradient of the load-balancing loss, through all blocks, against differences along random directions.
#[test]
fn load_balancing_gradient() {
    let g = Golden::read("mixtral");
    let mut model = load(&golden_model("mixtral"), Kind::Double);
    let (input, _, _) = g.input();
    for recompute in [Recompute::None, Recompute::Full] {
        model.params.begin_step_gradients(1);
        let (hidden, mut tape) = model.forward(&input, recompute).unwrap();
        let at = tape.balance_loss(3.0).unwrap().unwrap().double_value(&[]);
        model.backward(hidden.zeros_like(), tape).unwrap();
        model.params.finish_step_gradients().unwrap();
        let trunk = 0..model.params.len() - 1; // without the head
        let grads: Vec<Tensor> = trunk.clone().map(|i| model.params.slice_grad(i).unwrap()).collect();
        model.params.clear_gradients();
        let base: Vec<Tensor> = trunk.clone().map(|i| model.params.master(i).copy()).collect();
        for i in trunk {
            let direction = Tensor::randn_like(&base[i]);
            let mut loss = |step: f64| {
                model.params.master(i).copy_(&(&base[i] + &direction * step));
                let (_, mut tape) = model.forward(&input, Recompute::None).unwrap();
                model.params.master(i).copy_(&base[i]);
                tape.balance_loss(0.0).unwrap().unwrap().double_value(&[])
            };
            let slope = 3.0 * (loss(1e-6) - loss(-1e-6)) / 2e-6;
            let ours = (&grads[i] * &direction).sum(Kind::Double).double_value(&[]);
            assert!(
                (ours - slope).abs() < allowed(Quantity::FiniteDifference, Kind::Double) * (at + ours.abs()),
                "group {i}: {ours}, differences {slope}"
            );
            assert!(ours.abs() > 1e-4, "group {i} has a gradient");
        }
    }
}

/// One token goes to two of the four experts: the others' gradients are set to zero in fresh memory.
#[test]
fn experts_without_tokens_have_no_gradient() {
    let mut model = load(&golden_model("mixtral"), Kind::Float);
    for i in 0..model.params.len() {
        let _ = model.params.grad(i).unwrap().flat().shallow_clone().fill_(f64::NAN); // what memory that is given out again may hold
    }
    model.params.clear_gradients();
    model.params.begin_step_gradients(1);
    let (hidden, tape) =
        model.forward(&ModelInput::new(Tensor::from_slice(&[5i64]).view([1, 1])), Recompute::Full).unwrap();
    model.backward(hidden.ones_like(), tape).unwrap();
    model.params.finish_step_gradients().unwrap();
    let grad = model.params.slice_grad(1).unwrap();
    let size = |name: &&str| {
        let spec = model.params.layout(1).specs.iter().find(|s| s.name.ends_with(*name)).unwrap();
        spec.view(&grad).abs().sum(Kind::Double).double_value(&[])
    };
    for tensor in ["w1", "w2", "w3"] {
        let names = [0, 1, 2, 3].map(|e| format!("experts.{e}.{tensor}.weight"));
        let sizes = names.each_ref().map(|name| size(&name.as_str()));
        assert_eq!(sizes.iter().filter(|s| **s == 0.0).count(), 2, "{tensor}: {sizes:?}");
        assert_eq!(sizes.iter().filter(|s| **s > 0.0).count(), 2, "{tensor}: {sizes:?}");
    }
}

/// Qwen's first generation: the tensors of the golden qwen2, with keys and values repeated for every query head, under
/// the old names.
#[test]
fn qwen_of_the_first_generation() {
    let g = Golden::read("qwen2");
    let from = golden_model("qwen2");
    let t = tensors(&from.join("model.safetensors"));
    let c = json(&from.join("config.json"));
    let number = |key: &str| c[key].as_i64().unwrap();
    let (heads, kv_heads, hidden) =
        (number("num_attention_heads"), number("num_key_value_heads"), number("hidden_size"));
    let d = hidden / heads;
    let mut old: Vec<(String, Tensor)> = Vec::new();
    let mut put = |name: String, t: Tensor| old.push((name, t.contiguous()));
    put("transformer.wte.weight".into(), t["model.embed_tokens.weight"].shallow_clone());
    put("lm_head.weight".into(), t["model.embed_tokens.weight"].copy());
    put("transformer.ln_f.weight".into(), t["model.norm.weight"].shallow_clone());
    for i in 0..number("num_hidden_layers") {
        let get = |part: &str| t[&format!("model.layers.{i}.{part}")].shallow_clone();
        let repeated = |part: &str| {
            let x = get(part);
            let size = x.size();
            let x = x.view([&[kv_heads, d], &size[1..]].concat().as_slice());
            let x = x.repeat_interleave_self_int(heads / kv_heads, 0, None);
            x.reshape([&[heads * d], &size[1..]].concat().as_slice())
        };
        for kind in ["weight", "bias"] {
            let part = |p: &str| format!("self_attn.{p}.{kind}");
            let qkv = [get(&part("q_proj")), repeated(&part("k_proj")), repeated(&part("v_proj"))];
            put(format!("transformer.h.{i}.attn.c_attn.{kind}"), Tensor::cat(&qkv, 0));
        }
        for (new, old) in [
            ("self_attn.o_proj", "attn.c_proj"),
            ("mlp.up_proj", "mlp.w1"),
            ("mlp.gate_proj", "mlp.w2"),
            ("mlp.down_proj", "mlp.c_proj"),
            ("input_layernorm", "ln_1"),
            ("post_attention_layernorm", "ln_2"),
        ] {
            put(format!("transformer.h.{i}.{old}.weight"), get(&format!("{new}.weight")));
        }
    }
    let config = serde_json::json!({
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "attn_dropout_prob": 0.0, "bf16": false,
        "hidden_size": hidden, "intermediate_size": 2 * number("intermediate_size"), "kv_channels": d,
        "layer_norm_epsilon": c["rms_norm_eps"], "max_position_embeddings": 8192, "no_bias": true,
        "num_attention_heads": heads, "num_hidden_layers": c["num_hidden_layers"],
        "rotary_emb_base": c["rope_theta"], "rotary_pct": 1.0, "scale_attn_weights": true, "seq_length": 100,
        "tie_word_embeddings": false, "use_dynamic_ntk": true, "use_logn_attn": true,
        "vocab_size": c["vocab_size"],
    });
    let dir = TestFolder::new("qwen");
    dir.file("config.json", config.to_string());
    Tensor::write_safetensors(&old, dir.path("model.safetensors")).unwrap();
    for kind in [Kind::Float, Kind::Double] {
        let mut model = load(&dir.0, kind);
        assert_eq!(model.shape.max_position_embeddings, 100, "no further than seq_length");
        let (input, _, mask) = g.input();
        let hidden = model.hidden(&input).unwrap();
        let logits = model.next_token_logits(&hidden).unwrap().to_device(Device::Cpu);
        let logits = logits.to_kind(Kind::Double) * mask.view([-1, 1]);
        g.near("logits", &logits, kind);
    }
}

#[test]
fn rotary_frequencies() {
    for family in FAMILIES {
        let g = Golden::read(family);
        let model = load(&golden_model(family), Kind::Double);
        let ours = Tensor::from_slice(&corral::model::rotary::inverse_frequencies(&model.shape));
        g.near("rope_inv_freq", &ours, Kind::Double);
    }
}
