//! Generation and scoring against Hugging Face's golden values, and against themselves: cached against uncached,
//! batched against one by one.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

mod common;

use std::collections::HashMap;
use std::ops::ControlFlow;
use testing::compare::largest;
use testing::device::put;
use testing::golden::{FAMILIES, golden, golden_model, tensors};
use testing::ranks::on_ranks;
use testing::tolerance::{Quantity, allowed};

use common::{load, load_sharded};
use corral::algorithms::rl::experience::{Readout, SamplerDistance};
use corral::config::rollout::{Gather, Length};
use corral::data::tokenizer::Tokenizer;
use corral::generate::rollout::{PromptRequest, Response, Rollout, Sequences};
use corral::generate::sampler::{Draw, choose, probabilities};
use corral::generate::{
    CachedSession, Completion, Engine, EngineOptions, Finish, Request, Sampling, Stop, generate, text,
};
use corral::model::{KvCache, Llama, ModelInput};
use tch::{Device, Kind, Tensor};

struct Golden {
    dir: std::path::PathBuf,
    tensors: HashMap<String, Tensor>,
}

impl Golden {
    fn read(family: &str) -> Golden {
        let dir = golden_model(family);
        Golden { tensors: tensors(&dir.join("golden.safetensors")), dir }
    }

    fn rows(&self, name: &str) -> Vec<Vec<i64>> {
        Vec::<Vec<i64>>::try_from(&self.tensors[name]).unwrap()
    }

    /// The golden prompts, without their padding.
    fn prompts(&self, max_new_tokens: usize) -> Vec<Request> {
        let masks = self.rows("gen_attention_mask");
        let unpadded = |(ids, mask): (Vec<i64>, Vec<i64>)| {
            ids.into_iter().zip(mask).filter(|(_, m)| *m == 1).map(|(id, _)| id).collect()
        };
        let prompts = self.rows("gen_input_ids").into_iter().zip(masks).map(unpadded);
        prompts.enumerate().map(|(i, prompt)| Request::new(prompt, i as u64, max_new_tokens)).collect()
    }
}

fn options(batch_size: usize) -> EngineOptions<'static> {
    EngineOptions { sampling: Sampling::GREEDY, batch_size, eos: &[], stop: None }
}

fn run(model: &mut Llama, requests: &[Request], options: &EngineOptions) -> Vec<Completion> {
    generate(model, requests, options.clone(), |_, _| Ok(())).unwrap()
}

fn ids(completions: &[Completion]) -> Vec<Vec<i64>> {
    completions.iter().map(|c| c.ids.clone()).collect()
}

/// Greedy continuations, in batches of all rows, of two (so that rows follow one another in the slots) and of one.
#[test]
fn greedy_continuations_are_the_golden_ones() {
    for family in FAMILIES {
        let g = Golden::read(family);
        let steps = g.rows("gen_new_ids")[0].len();
        let prompts = g.prompts(steps);
        let lengths: Vec<usize> = prompts.iter().map(|p| p.prompt.len()).collect();
        assert!(lengths.iter().any(|n| *n != lengths[0]), "{family}: prompts of several lengths");
        for kind in [Kind::Float, Kind::Double] {
            let mut model = load(&g.dir, kind);
            for batch_size in [4, 2, 1] {
                let completions = run(&mut model, &prompts, &options(batch_size));
                assert_eq!(
                    ids(&completions),
                    g.rows("gen_new_ids"),
                    "{family} in {kind:?}, {batch_size} at once"
                );
                assert!(completions.iter().all(|c| c.finish == Finish::Length));
                let logprobs: Vec<f64> = completions.iter().flat_map(|c| c.logprobs.clone()).collect();
                let logprobs = Tensor::from_slice(&logprobs).view([-1, steps as i64]);
                let distance = largest(&logprobs, &g.tensors["gen_logprobs"]);
                assert!(
                    distance < allowed(Quantity::Scores, Kind::Float),
                    "{family} in {kind:?}: log-probabilities differ by {distance:e}"
                );
            }
        }
    }
}

#[test]
fn rows_stop_at_the_end_of_sequence() {
    for family in FAMILIES {
        let g = Golden::read(family);
        let mut model = load(&g.dir, Kind::Float);
        let stop = g.tensors["gen_stop_id"].int64_value(&[]);
        let never = model.shape.vocab_size - 1;
        let expected = g.rows("gen_stop_new_ids");
        // Also with a second end of sequence that does not come up.
        assert!(!expected.iter().flatten().any(|id| *id == never && never != stop));
        for batch_size in [4, 3] {
            let options = EngineOptions { eos: &[never, stop], ..options(batch_size) };
            let completions = run(&mut model, &g.prompts(expected[0].len()), &options);
            let mut stopped = 0;
            for (completion, expected) in completions.iter().zip(&expected) {
                let end = expected.iter().position(|id| *id == stop);
                let until = end.map_or(expected.len(), |i| i + 1);
                assert_eq!(completion.ids, expected[..until], "{family}");
                assert_eq!(completion.finish, if end.is_some() { Finish::Eos } else { Finish::Length });
                assert_eq!(completion.logprobs.len(), until);
                stopped += usize::from(end.is_some());
            }
            assert!(stopped > 0, "{family}: the golden rows stop somewhere");
        }
    }
}

/// Prefill and decoding in float64 against one forward over the whole row.
#[test]
fn cached_logits_are_those_of_a_whole_forward() {
    for family in FAMILIES {
        let g = Golden::read(family);
        let mut model = load(&g.dir, Kind::Double);
        let rows: Vec<Vec<i64>> = g.rows("gen_new_ids");
        let (first, second) = (&rows[0], &rows[1]);
        let mut cache = KvCache::new(&model, 3);
        // Rows of different lengths in slots out of order; the slot of an earlier row is used again.
        let _ = model.prefill(&[&second[..7]], &[2], &mut cache).unwrap();
        cache.truncate(2, 0);
        let mut hidden = model.prefill(&[&first[..5], &second[..3]], &[2, 0], &mut cache).unwrap();
        let whole = |model: &mut Llama, ids: &[i64]| {
            let hidden = model.hidden(&ModelInput::new(Tensor::from_slice(ids).unsqueeze(0))).unwrap();
            model.next_token_logits(&hidden).unwrap()
        };
        let (all_first, all_second) = (whole(&mut model, first), whole(&mut model, second));
        for step in 0..20 {
            let logits = model.next_token_logits(&hidden).unwrap();
            let expected = Tensor::stack(&[all_first.get(4 + step), all_second.get(2 + step)], 0);
            let distance = largest(&logits, &expected) / expected.abs().max().double_value(&[]);
            assert!(
                distance < allowed(Quantity::SameModel, Kind::Double),
                "{family}, step {step}: {distance:e}"
            );
            let next = [first[5 + step as usize], second[3 + step as usize]];
            hidden = model.decode(&next, &[2, 0], &mut cache).unwrap();
        }
        assert_eq!((cache.len(2), cache.len(0), cache.len(1)), (25, 23, 0));
    }
}

#[test]
fn draws_depend_on_seed_and_sample_only() {
    let g = Golden::read("llama3");
    let mut model = load(&g.dir, Kind::Double);
    let prompts = g.prompts(16);
    let sampled = |seed, batch_size| EngineOptions {
        sampling: Sampling { temperature: 3.0, top_k: 50, top_p: 0.95, seed },
        ..options(batch_size)
    };
    let together = run(&mut model, &prompts, &sampled(1, 4));
    assert_eq!(ids(&together), ids(&run(&mut model, &prompts, &sampled(1, 1))), "alone");
    let mut turned = prompts.clone();
    turned.reverse();
    let mut again = run(&mut model, &turned, &sampled(1, 3));
    again.reverse();
    assert_eq!(ids(&together), ids(&again), "in another order");
    assert_ne!(ids(&together), ids(&run(&mut model, &prompts, &sampled(2, 4))), "another seed");
}

#[test]
fn stop_texts_end_a_row_and_are_cut_off() {
    let g = Golden::read("llama3");
    let mut model = load(&g.dir, Kind::Float);
    let tokenizer = Tokenizer::load(&g.dir).unwrap();
    let prompts = g.prompts(24);
    let free = run(&mut model, &prompts, &options(4));
    let full = text(&tokenizer, &prompts[0].prompt, &free[0].ids, &[]).unwrap();
    // A text of several tokens from the middle of the first completion.
    let middle: Vec<char> = full.chars().filter(|c| *c != '\u{fffd}').collect();
    assert!(middle.len() > 12, "{full:?}");
    let at = full.char_indices().nth(full.chars().count() / 2).unwrap().0;
    let stop = vec!["never seen".to_string(), full[at..].chars().take(3).collect::<String>()];
    let with_stop = EngineOptions { stop: Some(Stop { texts: &stop, tokenizer: &tokenizer }), ..options(4) };
    let stopped = run(&mut model, &prompts, &with_stop);
    assert_eq!(stopped[0].finish, Finish::Stop);
    let n = stopped[0].ids.len();
    assert!(n < 24 && free[0].ids.starts_with(&stopped[0].ids));
    let cut = text(&tokenizer, &prompts[0].prompt, &stopped[0].ids, &stop).unwrap();
    assert_eq!(cut, full[..full.find(&stop[1]).unwrap()]);
    let before = text(&tokenizer, &prompts[0].prompt, &stopped[0].ids[..n - 1], &[]).unwrap();
    assert!(!before.contains(&stop[1]), "it stops at the first token that completes the text");
}

#[test]
fn what_cannot_be_continued_is_refused() {
    let g = Golden::read("tied");
    let mut model = load(&g.dir, Kind::Float);
    let positions = model.shape.max_position_embeddings as usize;
    let mut error = |prompt: Vec<i64>| {
        let prompts = [Request::new(vec![5], 0, 4), Request::new(prompt, 1, 4)];
        generate(&mut model, &prompts, options(2), |_, _| Ok(())).unwrap_err()
    };
    let e = error(vec![]);
    assert!(e.message.contains("prompt 2: the prompt has no tokens") && e.exit_code() == 3, "{e}");
    let e = error(vec![7; positions]);
    assert!(
        e.message.contains(&format!("prompt 2: the prompt has {positions} tokens")) && e.exit_code() == 3,
        "{e}"
    );
    let e = error(vec![100_000]);
    assert!(
        e.message.contains("token id 100000 is not in the model's vocabulary") && e.exit_code() == 3,
        "{e}"
    );
    // A completion ends at the model's last position.
    let long = [Request::new(vec![7; positions - 3], 0, 50)];
    let completions = run(&mut model, &long, &options(1));
    assert_eq!((completions[0].ids.len(), completions[0].finish), (3, Finish::Length));
}

#[test]
fn kept_tokens_and_probabilities_are_the_golden_ones() {
    let all = tensors(&golden().join("algo/sampling.safetensors"));
    let greedy = Sampling { temperature: 1.0, ..Sampling::GREEDY };
    let cases = [
        ("temperature_0_7", Sampling { temperature: 0.7, ..greedy }),
        ("top_k_7", Sampling { top_k: 7, ..greedy }),
        ("top_p_0_8", Sampling { top_p: 0.8, ..greedy }),
    ];
    for (name, sampling) in cases {
        let got = probabilities(&all["logits"], &sampling);
        let expected = &all[&format!("{name}.probs")];
        assert!(got.gt(0.0).equal(&all[&format!("{name}.keep")].gt(0.0)), "{name}");
        assert!(largest(&got, expected) < allowed(Quantity::Printed, Kind::Float), "{name}");
    }
}

#[test]
fn draws_follow_the_distribution() {
    let probabilities = [0.5, 0.25, 0.15, 0.1];
    let logits = Tensor::from_slice(&probabilities.map(f64::ln)).unsqueeze(0);
    let n = 20_000u64;
    let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 9 };
    let many = logits.repeat([n as i64, 1]);
    let draws: Vec<Draw> = (0..n).map(|i| Draw { sample: i / 100, position: i % 100, least: 0 }).collect();
    let choices = choose(&many, &draws, &[], &sampling).unwrap();
    for (id, p) in probabilities.iter().enumerate() {
        let share = choices.iter().filter(|c| c.id == id as i64).count() as f64 / n as f64;
        // Five standard errors.
        assert!((share - p).abs() < 5.0 * (p * (1.0 - p) / n as f64).sqrt(), "{id}: {share} and {p}");
    }
    for choice in &choices[..50] {
        assert!(
            (choice.logprob - probabilities[choice.id as usize].ln()).abs()
                < allowed(Quantity::TwoWays, Kind::Double)
        );
    }
    assert!(
        choices
            .iter()
            .all(|c| (c.logprob - c.sampler_logprob).abs() < allowed(Quantity::TwoWays, Kind::Double)),
        "nothing is cut off"
    );
    // Two tokens of four reach 0.7.
    let nucleus = Sampling { top_p: 0.7, ..sampling };
    for choice in choose(&many, &draws, &[], &nucleus).unwrap() {
        assert!(choice.id < 2);
        let share = (probabilities[choice.id as usize] / 0.75).ln();
        assert!(
            (choice.sampler_logprob - share).abs() < allowed(Quantity::TwoWays, Kind::Double),
            "{choice:?}"
        );
    }
    // Rows that may not end do not choose what ends them, greedily or drawn.
    let kept = draws
        .iter()
        .map(|d| Draw { least: if d.sample % 2 == 0 { 0 } else { 1000 }, ..*d })
        .collect::<Vec<_>>();
    for (sampling, first) in [(Sampling::GREEDY, 1), (sampling, 1)] {
        let choices = choose(&many, &kept, &[0, 99], &sampling).unwrap();
        let ends =
            |odd: u64| choices.iter().zip(&kept).filter(|(_, d)| d.sample % 2 == odd).any(|(c, _)| c.id == 0);
        assert!(ends(0) && !ends(1), "{sampling:?}");
        assert!(choices.iter().any(|c| c.id == first));
    }
    let e = choose(&Tensor::full([1, 4], f64::NAN, (Kind::Double, Device::Cpu)), &draws[..1], &[], &sampling)
        .unwrap_err();
    assert!(e.message.contains("not finite"), "{e}");
}

/// Choices in float32 and bfloat16, on a GPU by a kernel, against those in float64: over one tile of the kernel and several,
/// with ties, with tokens that cannot be chosen, with every way to leave tokens out.
#[test]
fn choices_are_those_in_float64() {
    for (kind, vocab_size) in
        [(Kind::Float, 11), (Kind::Float, 4103), (Kind::BFloat16, 8197), (Kind::BFloat16, 300)]
    {
        let rows = 12;
        // The same in every run: which token a border falls to is no matter of luck.
        let place = Tensor::arange(rows * vocab_size, (Kind::Double, Device::Cpu));
        let u = (place * 0.754_877_666_246_692_7).frac().view([rows, vocab_size]);
        let logits = (((u * 2.0 - 1.0).clamp(-0.999_999, 0.999_999)).erfinv() * 2.8).to_kind(kind);
        let _ = logits.narrow(1, 3, 1).fill_(f64::NEG_INFINITY);
        // Ties at the top, and a likeliest token that ends rows.
        let _ = logits.narrow(1, 5, 2).fill_(6.0);
        let _ = logits.narrow(1, 1, 1).fill_(8.0);
        let draws: Vec<Draw> = (0..rows as u64)
            .map(|i| Draw { sample: i, position: i % 7, least: if i % 2 == 0 { 0 } else { 9 } })
            .collect();
        for (temperature, top_k, top_p) in [
            (0.0, 0, 1.0),
            (1.0, 0, 1.0),
            (0.7, 0, 1.0),
            (1.5, 4, 1.0),
            (1.0, 0, 0.9),
            (2.0, 0, 0.2),
            (0.9, 6, 0.8),
        ] {
            let sampling = Sampling { temperature, top_k, top_p, seed: 5 };
            let exact = logits.to_kind(Kind::Double);
            let expected = choose(&exact, &draws, &[1, vocab_size - 1], &sampling).unwrap();
            let got = choose(&put(&logits), &draws, &[1, vocab_size - 1], &sampling).unwrap();
            let what = format!("{kind:?}, {vocab_size}, {sampling:?}");
            let mut others = 0;
            for (row, (a, b)) in got.iter().zip(&expected).enumerate() {
                assert!(row % 2 == 0 || (a.id != 1 && a.id != vocab_size - 1), "{what}: {a:?}");
                // A number on the border of two tokens' shares may fall on either side.
                if a.id != b.id {
                    others += 1;
                    continue;
                }
                for (x, y) in [(a.logprob, b.logprob), (a.sampler_logprob, b.sampler_logprob)] {
                    assert!((x - y).abs() < allowed(Quantity::Scores, Kind::Float), "{what}: {a:?} {b:?}");
                }
            }
            assert!(others <= i64::from(temperature > 0.0), "{what}: {others} other tokens");
        }
        let _ = logits.get(2).narrow(0, 0, 1).fill_(f64::NAN);
        let e = choose(&put(&logits), &draws, &[], &Sampling::GREEDY).unwrap_err();
        assert!(e.message.contains("not finite"), "{e}");
    }
}

/// A vocabulary whose nucleus is larger than the sampler looks at first.
#[test]
fn a_large_nucleus_is_found() {
    let logits = Tensor::arange(2000, (Kind::Double, Device::Cpu)).unsqueeze(0) * 1e-3;
    let nucleus = Sampling { temperature: 1.0, top_k: 0, top_p: 0.9, seed: 0 };
    let cut = probabilities(&logits, &nucleus);
    let all = logits.softmax(-1, Kind::Double);
    let kept = cut.gt(0.0);
    let share = all.masked_select(&kept).sum(Kind::Double).double_value(&[]);
    assert!((0.9..0.9005).contains(&share), "{share}");
    let count = kept.sum(Kind::Int64).int64_value(&[]);
    assert!(kept.narrow(1, 2000 - count, count).all().int64_value(&[]) == 1, "the likeliest");
}

/// Every sample of a request is what it is alone: slots fewer, as many and more than samples, prompts that wait.
#[test]
fn samples_share_the_reading_of_their_prompt() {
    let g = Golden::read("llama3");
    let mut model = load(&g.dir, Kind::Double);
    let single = g.prompts(12);
    let sampling = Sampling { temperature: 3.0, top_k: 0, top_p: 1.0, seed: 5 };
    let with =
        |batch_size| EngineOptions { sampling, eos: &[3, 7, 50, 51, 52, 53, 54, 55], ..options(batch_size) };
    let alone: Vec<Request> = single
        .iter()
        .enumerate()
        .flat_map(|(i, r)| (0..5).map(move |j| Request::new(r.prompt.clone(), (10 * i + j) as u64, 12)))
        .collect();
    let expected = run(&mut model, &alone, &with(1));
    assert!(expected[..5].iter().any(|c| c.ids != expected[0].ids), "samples of a prompt differ");
    assert!(expected.iter().any(|c| c.ids.len() < 12), "some end early");
    let grouped: Vec<Request> = single
        .iter()
        .enumerate()
        .map(|(i, r)| Request { samples: (0..5).map(|j| (10 * i + j) as u64).collect(), ..r.clone() })
        .collect();
    for batch_size in [1, 2, 3, 4, 5, 7, 11, 20, 64] {
        let got = run(&mut model, &grouped, &with(batch_size));
        assert_eq!(ids(&got), ids(&expected), "{batch_size} at once");
        assert!(got.iter().enumerate().all(|(i, c)| (c.request, c.sample) == (i / 5, i % 5)));
    }
}

/// The engine by hand: requests come while others are in work, completions leave as they end.
#[test]
fn an_engine_takes_requests_at_any_time() {
    let g = Golden::read("tied");
    let mut model = load(&g.dir, Kind::Float);
    let prompts = g.prompts(8);
    let expected = run(&mut model, &prompts, &options(1));
    let mut engine = Engine::new(&model, options(3)).unwrap();
    assert!(!engine.step(&mut model, |_, _| Ok(())).unwrap(), "nothing to do");
    let shorter = Request { max_new_tokens: 2, ..prompts[0].clone() };
    engine.add(&model, [shorter, prompts[1].clone()]).unwrap();
    let mut tokens = 0;
    for _ in 0..2 {
        engine
            .step(&mut model, |completion, ended| {
                tokens += 1;
                assert_eq!(ended, completion.request == 0 && completion.ids.len() == 2);
                Ok(())
            })
            .unwrap();
    }
    assert_eq!((tokens, engine.num_waiting()), (4, 0));
    let first = engine.take_finished();
    assert_eq!((first.len(), first[0].request, &first[0].ids[..]), (1, 0, &expected[0].ids[..2]));
    engine.add(&model, prompts[2..].iter().cloned()).unwrap();
    assert_eq!(engine.num_waiting(), prompts.len() - 2);
    while engine.step(&mut model, |_, _| Ok(())).unwrap() {}
    let mut rest = engine.take_finished();
    rest.sort_by_key(|c| c.request);
    assert_eq!(ids(&rest), ids(&expected[1..]));
    let e = engine.step(&mut model, |_, _| Ok(()));
    assert!(!e.unwrap());
}

#[test]
fn nothing_ends_a_completion_before_its_least_length() {
    let g = Golden::read("llama3");
    let mut model = load(&g.dir, Kind::Float);
    let stop = g.tensors["gen_stop_id"].int64_value(&[]);
    let least = |n| -> Vec<Request> {
        let requests = g.prompts(32).into_iter();
        requests.map(|r| Request { min_new_tokens: n, ..r }).collect()
    };
    let ending = EngineOptions { eos: &[stop], ..options(4) };
    let free = run(&mut model, &least(0), &ending);
    let early = free.iter().position(|c| c.ids.len() < 20).expect("a golden row stops early");
    let held = run(&mut model, &least(20), &ending);
    assert!(held.iter().all(|c| c.ids.len() >= 20));
    assert!(held.iter().all(|c| !c.ids[..19].contains(&stop)), "it is not chosen before");
    let n = free[early].ids.len();
    assert_eq!(held[early].ids[..n - 1], free[early].ids[..n - 1]);
    let e = generate(&mut model, &least(33), ending, |_, _| Ok(())).unwrap_err();
    assert!(e.exit_code() == 2 && e.message.contains("min-new-tokens (33)"), "{e}");
}

/// Reading on from any position, in pieces of any size, against one prefill.
#[test]
fn a_row_is_extended_as_if_it_had_been_read_at_once() {
    for family in FAMILIES {
        let g = Golden::read(family);
        let mut model = load(&g.dir, Kind::Double);
        let ids = g.rows("gen_new_ids").concat();
        let mut cache = KvCache::new(&model, 3);
        let whole = model.prefill(&[&ids[..60]], &[0], &mut cache).unwrap();
        for pieces in [vec![1, 1, 58], vec![20, 39, 1], vec![59, 1], vec![2, 3, 55]] {
            cache.truncate(2, 0);
            let (mut at, mut last) = (0, Tensor::new());
            for n in &pieces {
                last = model.extend(&ids[at..at + n], 2, &mut cache).unwrap();
                at += n;
            }
            let distance = largest(&last, &whole) / whole.abs().max().double_value(&[]);
            assert!(
                distance < allowed(Quantity::SameModel, Kind::Double),
                "{family} in {pieces:?}: {distance:e}"
            );
        }
        // Back to 10 tokens, a copy of them elsewhere, and the rest again.
        cache.truncate(0, 10);
        cache.copy(0, 1, 8).unwrap();
        assert_eq!((cache.len(0), cache.len(1)), (10, 8));
        for slot in [0, 1] {
            let last = model.extend(&ids[cache.len(slot)..60], slot, &mut cache).unwrap();
            assert!(
                largest(&last, &whole) / whole.abs().max().double_value(&[])
                    < allowed(Quantity::SameModel, Kind::Double)
            );
        }
        assert!(cache.copy(0, 1, 61).is_err());
        assert!(model.extend(&[], 0, &mut cache).is_err());
    }
}

/// A conversation in one slot: what it knows is not read again, and changes nothing.
#[test]
fn a_session_reads_on_where_prompts_agree() {
    for family in FAMILIES {
        let g = Golden::read(family);
        let mut model = load(&g.dir, Kind::Double);
        let mut session = CachedSession::new(&model);
        let tokens = g.rows("gen_new_ids").concat();
        let go = |_: &Completion, _| Ok(ControlFlow::Continue(()));
        // Longer, shorter, other in the middle, the same again.
        let mut other = tokens[..40].to_vec();
        other[25] = if tokens[25] == 7 { 8 } else { 7 };
        let prompts = [&tokens[..10], &tokens[..60], &tokens[..40], &other, &other];
        let mut known = Vec::new();
        for prompt in prompts {
            known.push(session.known(prompt));
            let request = Request::new(prompt.to_vec(), 0, 8);
            let expected = run(&mut model, std::slice::from_ref(&request), &options(1));
            let got = session.generate(&mut model, &request, &options(1), go).unwrap();
            assert_eq!(got.ids, expected[0].ids, "{family}");
        }
        assert!(known[0] == 0 && (10..60).contains(&known[1]), "{known:?}");
        assert_eq!(known[2..], [39, 25, 39]);
        let mut seen = 0;
        let stopped =
            session.generate(&mut model, &Request::new(other, 0, 8), &options(1), |completion, last| {
                seen += 1;
                assert!(!last && completion.ids.len() == seen);
                Ok(if seen == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            });
        assert_eq!(stopped.unwrap().ids.len(), 3);
    }
}

/// Two ranks that share the model, with unequal work: block by block, held, and let go again.
#[test]
fn ranks_that_share_a_model_generate_together() {
    for family in ["llama3", "tied"] {
        let sampling = Sampling { temperature: 2.0, top_k: 0, top_p: 1.0, seed: 4 };
        let sampled = |batch_size| EngineOptions { sampling, ..options(batch_size) };
        on_ranks(2, |group| {
            let (g, rank) = (Golden::read(family), group.rank() as usize);
            // Rank 0: a prompt whose samples follow one another in a single slot. Rank 1: more, in two.
            let requests: Vec<Request> = match rank {
                0 => vec![Request { samples: vec![7, 8, 9], ..g.prompts(5).remove(0) }],
                _ => g.prompts(17),
            };
            let mut alone = load(&g.dir, Kind::Double);
            let expected = run(&mut alone, &requests, &sampled(1 + rank));
            let mut model = load_sharded(&g.dir, Kind::Double, group, Device::Cpu);
            assert!(model.params.gathers());
            assert_eq!(run(&mut model, &requests, &sampled(1 + rank)), expected, "{family}, block by block");
            let none = run(&mut model, &requests[..requests.len() * (1 - rank)], &sampled(1));
            assert_eq!(
                ids(&none),
                if rank == 0 { ids(&expected) } else { Vec::new() },
                "{family}, one is idle"
            );
            model.params.hold().unwrap();
            assert!(!model.params.gathers());
            // Nothing is communicated: the ranks need not do it alike.
            for _ in 0..=rank {
                assert_eq!(run(&mut model, &requests, &sampled(1 + rank)), expected, "{family}, held");
            }
            model.params.let_go();
            assert_eq!(ids(&run(&mut model, &requests, &sampled(2))), ids(&expected), "{family}, let go");
        });
    }
}

/// Responses depend on the prompt's number, not on who asks: drawn lengths, samples that share a prompt, cuts.
#[test]
fn rollouts_are_the_same_for_any_number_of_ranks() {
    let g = Golden::read("llama3");
    let dir = &g.dir.clone();
    let prompts: Vec<Vec<i64>> = g.prompts(1).into_iter().map(|r| r.prompt).collect();
    let ask = |range: std::ops::Range<usize>| -> Vec<PromptRequest> {
        range.map(|i| PromptRequest { number: 40 + i as u64, ids: &prompts[i] }).collect()
    };
    let rollout = Rollout {
        sampling: Sampling { temperature: 1.5, top_k: 0, top_p: 1.0, seed: 9 },
        samples: 3,
        min_new_tokens: 2,
        max_new_tokens: Length { low: 4, high: 9 },
        batch_size: 5,
        eos: &[],
        stop: None,
        truncate: None,
        gather: Gather::Auto,
        ranks_of_host: 1,
    };
    let mut model = load(&g.dir, Kind::Double);
    let all = rollout.run(&mut model, &ask(0..4)).unwrap();
    assert_eq!(all.len(), 12);
    let lengths: Vec<usize> = all.iter().map(|r| r.ids.len()).collect();
    assert!(lengths.chunks(3).all(|group| group.iter().all(|n| *n == group[0] && (4..=9).contains(n))));
    assert!(lengths.iter().any(|n| *n != lengths[0]), "{lengths:?}");
    assert!(all.chunks(3).any(|group| group[0].ids != group[1].ids));
    for gather in [Gather::Auto, Gather::Whole, Gather::Blocks] {
        let parts = on_ranks(2, |group| {
            // Three prompts against one.
            let mine = if group.rank() == 0 { 0..3 } else { 3..4 };
            let mut model = load_sharded(dir, Kind::Double, group, Device::Cpu);
            Rollout { gather, ..rollout.clone() }.run(&mut model, &ask(mine)).unwrap()
        });
        assert_eq!(ids_of(&parts.concat()), ids_of(&all), "{gather:?}");
    }
    // Cut after the first of a token that has two before it.
    let token = all[0].ids[2];
    let cut = Rollout { truncate: Some((token, 2)), ..rollout.clone() };
    for (cut, whole) in cut.run(&mut model, &ask(0..4)).unwrap().iter().zip(&all) {
        let end = (2..whole.ids.len()).find(|i| whole.ids[*i] == token);
        assert_eq!(cut.ids, whole.ids[..end.map_or(whole.ids.len(), |end| end + 1)]);
        assert_eq!(cut.finish == Finish::Eos, end.is_some());
        assert_eq!(cut.ids.len(), cut.sampler_logprobs.len());
    }
    let ended = Rollout { eos: &[token], ..rollout }.run(&mut model, &ask(0..4)).unwrap();
    assert!(ended.iter().all(|r| r.ids.len() >= 2 && !r.ids[..r.ids.len() - 1].contains(&token)));
}

fn ids_of(responses: &[Response]) -> Vec<Vec<i64>> {
    responses.iter().map(|r| r.ids.clone()).collect()
}

/// What the training's forward says of a rollout is what the sampler drew from, token by token.
#[test]
fn rows_of_a_rollout_score_as_they_were_drawn() {
    for family in FAMILIES {
        let g = Golden::read(family);
        let mut model = load(&g.dir, Kind::Double);
        let prompts: Vec<Vec<i64>> = g.prompts(1).into_iter().map(|r| r.prompt).collect();
        let asked: Vec<PromptRequest> =
            prompts.iter().enumerate().map(|(i, ids)| PromptRequest { number: i as u64, ids }).collect();
        let rollout = Rollout {
            sampling: Sampling { temperature: 0.8, top_k: 0, top_p: 1.0, seed: 3 },
            samples: 1,
            min_new_tokens: 0,
            max_new_tokens: Length { low: 3, high: 8 },
            batch_size: 3,
            eos: &[],
            stop: None,
            truncate: None,
            gather: Gather::Auto,
            ranks_of_host: 1,
        };
        let responses = rollout.run(&mut model, &asked).unwrap();
        let sequences = Sequences { prompts, responses: responses.iter().map(|r| r.ids.clone()).collect() };
        let (n, width) = (sequences.len(), sequences.width(0..sequences.len()));
        for micro_batch_size in [n, 1] {
            let readout = Readout { sequences: &sequences, rows: 0..n, micro_batch_size, width };
            let logprobs = readout.logprobs(&mut model, 0.8).unwrap();
            let mut apart = SamplerDistance::default();
            apart.add(&sequences, responses.iter().enumerate(), &logprobs);
            let (mean, most) = (apart.mean(), apart.most);
            assert!(
                0.0 < mean && mean <= most && most < allowed(Quantity::Sampler, Kind::Double),
                "{family}: {most:e}"
            );
            let outside: Tensor = &logprobs * (1.0 - sequences.mask(Kind::Double));
            assert_eq!(outside.abs().max().double_value(&[]), 0.0);
        }
    }
}
