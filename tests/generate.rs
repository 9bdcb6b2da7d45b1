//! Generation and scoring against Hugging Face's golden values, and against themselves: cached against uncached,
//! batched against one by one.

mod common;

use std::collections::HashMap;

use common::{FAMILIES, golden, golden_model, largest, load, tensors};
use corral::data::tokenizer::Tokenizer;
use corral::generate::engine::{Completion, Finish, Generation, Options, Stop, generate, text};
use corral::generate::sampler::{Sampling, choose, distribution};
use corral::model::{Input, KvCache, Llama};
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
    fn prompts(&self) -> Vec<Generation> {
        let masks = self.rows("gen_attention_mask");
        let unpadded = |(ids, mask): (Vec<i64>, Vec<i64>)| {
            ids.into_iter().zip(mask).filter(|(_, m)| *m == 1).map(|(id, _)| id).collect()
        };
        let prompts = self.rows("gen_input_ids").into_iter().zip(masks).map(unpadded);
        prompts.enumerate().map(|(i, prompt)| Generation { prompt, sample: i as u64 }).collect()
    }
}

fn options(max_new_tokens: usize, batch_size: usize) -> Options<'static> {
    Options { sampling: Sampling::GREEDY, max_new_tokens, batch_size, eos: &[], stop: None }
}

fn run(model: &mut Llama, prompts: &[Generation], options: &Options) -> Vec<Completion> {
    generate(model, prompts, options, |_| Ok(())).unwrap()
}

fn ids(completions: &[Completion]) -> Vec<Vec<i64>> {
    completions.iter().map(|c| c.ids.clone()).collect()
}

/// Greedy continuations, in batches of all rows, of two (so that rows follow one another in the slots) and of one.
#[test]
fn greedy_continuations_are_the_golden_ones() {
    for family in FAMILIES {
        let g = Golden::read(family);
        let prompts = g.prompts();
        let lengths: Vec<usize> = prompts.iter().map(|p| p.prompt.len()).collect();
        assert!(lengths.iter().any(|n| *n != lengths[0]), "{family}: prompts of several lengths");
        let steps = g.rows("gen_new_ids")[0].len();
        for kind in [Kind::Float, Kind::Double] {
            let mut model = load(&g.dir, kind);
            for batch_size in [4, 2, 1] {
                let completions = run(&mut model, &prompts, &options(steps, batch_size));
                assert_eq!(
                    ids(&completions),
                    g.rows("gen_new_ids"),
                    "{family} in {kind:?}, {batch_size} at once"
                );
                assert!(completions.iter().all(|c| c.finish == Finish::Length));
                let logprobs: Vec<f64> = completions.iter().flat_map(|c| c.logprobs.clone()).collect();
                let logprobs = Tensor::from_slice(&logprobs).view([-1, steps as i64]);
                let distance = largest(&logprobs, &g.tensors["gen_logprobs"]);
                assert!(distance < 5e-5, "{family} in {kind:?}: log-probabilities differ by {distance:e}");
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
            let options = Options { eos: &[never, stop], ..options(expected[0].len(), batch_size) };
            let completions = run(&mut model, &g.prompts(), &options);
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
        cache.clear(2);
        let mut hidden = model.prefill(&[&first[..5], &second[..3]], &[2, 0], &mut cache).unwrap();
        let whole = |model: &mut Llama, ids: &[i64]| {
            let hidden = model.hidden(&Input::new(Tensor::from_slice(ids).unsqueeze(0))).unwrap();
            model.next_token_logits(&hidden).unwrap()
        };
        let (all_first, all_second) = (whole(&mut model, first), whole(&mut model, second));
        for step in 0..20 {
            let logits = model.next_token_logits(&hidden).unwrap();
            let expected = Tensor::stack(&[all_first.get(4 + step), all_second.get(2 + step)], 0);
            let distance = largest(&logits, &expected) / expected.abs().max().double_value(&[]);
            assert!(distance < 1e-10, "{family}, step {step}: {distance:e}");
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
    let prompts = g.prompts();
    let sampled = |seed, batch_size| Options {
        sampling: Sampling { temperature: 3.0, top_k: 50, top_p: 0.95, seed },
        ..options(16, batch_size)
    };
    let together = run(&mut model, &prompts, &sampled(1, 4));
    assert_eq!(ids(&together), ids(&run(&mut model, &prompts, &sampled(1, 1))), "alone");
    let mut turned = prompts.clone();
    turned.reverse();
    let mut again = run(&mut model, &turned, &sampled(1, 3));
    again.reverse();
    assert_eq!(ids(&together), ids(&again), "in another order");
    assert_ne!(ids(&together), ids(&run(&mut model, &prompts, &sampled(2, 4))), "another seed");
    let same_prompt = [0, 1].map(|sample| Generation { sample, ..prompts[0].clone() });
    let two = run(&mut model, &same_prompt, &sampled(1, 2));
    assert_ne!(two[0].ids, two[1].ids, "two samples of a prompt");
}

#[test]
fn stop_texts_end_a_row_and_are_cut_off() {
    let g = Golden::read("llama3");
    let mut model = load(&g.dir, Kind::Float);
    let tokenizer = Tokenizer::load(&g.dir).unwrap();
    let prompts = g.prompts();
    let free = run(&mut model, &prompts, &options(24, 4));
    let full = text(&tokenizer, &prompts[0].prompt, &free[0].ids, &[]).unwrap();
    // A text of several tokens from the middle of the first completion.
    let middle: Vec<char> = full.chars().filter(|c| *c != '\u{fffd}').collect();
    assert!(middle.len() > 12, "{full:?}");
    let at = full.char_indices().nth(full.chars().count() / 2).unwrap().0;
    let stop = vec!["never seen".to_string(), full[at..].chars().take(3).collect::<String>()];
    let with_stop = Options { stop: Some(Stop { texts: &stop, tokenizer: &tokenizer }), ..options(24, 4) };
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
        let prompts = [Generation { prompt: vec![5], sample: 0 }, Generation { prompt, sample: 1 }];
        generate(&mut model, &prompts, &options(4, 2), |_| Ok(())).unwrap_err()
    };
    let e = error(vec![]);
    assert!(e.message.contains("prompt 2 has no tokens") && e.exit_code() == 3, "{e}");
    let e = error(vec![7; positions]);
    assert!(e.message.contains(&format!("prompt 2 has {positions} tokens")) && e.exit_code() == 3, "{e}");
    let e = error(vec![100_000]);
    assert!(
        e.message.contains("token id 100000 is not in the model's vocabulary") && e.exit_code() == 3,
        "{e}"
    );
    // A completion ends at the model's last position.
    let long = [Generation { prompt: vec![7; positions - 3], sample: 0 }];
    let completions = run(&mut model, &long, &options(50, 1));
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
    let rows: Vec<Vec<f64>> = Vec::try_from(all["logits"].to_kind(Kind::Double)).unwrap();
    for (name, sampling) in cases {
        let keep: Vec<Vec<i64>> = Vec::try_from(all[&format!("{name}.keep")].to_kind(Kind::Int64)).unwrap();
        let probs: Vec<Vec<f64>> =
            Vec::try_from(all[&format!("{name}.probs")].to_kind(Kind::Double)).unwrap();
        for (row, logits) in rows.iter().enumerate() {
            let mut got = vec![0.0; logits.len()];
            let mut kept = vec![0; logits.len()];
            for (id, p) in distribution(logits, &sampling) {
                (got[id], kept[id]) = (p, 1);
            }
            assert_eq!(kept, keep[row], "{name}, row {row}");
            for (id, (p, q)) in got.iter().zip(&probs[row]).enumerate() {
                assert!((p - q).abs() < 1e-6, "{name}, row {row}, token {id}: {p} and {q}");
            }
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let probabilities = [0.5, 0.25, 0.15, 0.1];
    let logits = Tensor::from_slice(&probabilities.map(f64::ln)).unsqueeze(0);
    let n = 20_000u64;
    let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 9 };
    let many = logits.repeat([n as i64, 1]);
    let keys: Vec<(u64, u64)> = (0..n).map(|i| (i / 100, i % 100)).collect();
    let choices = choose(&many, &keys, &sampling).unwrap();
    for (id, p) in probabilities.iter().enumerate() {
        let share = choices.iter().filter(|c| c.id == id as i64).count() as f64 / n as f64;
        // Five standard errors.
        assert!((share - p).abs() < 5.0 * (p * (1.0 - p) / n as f64).sqrt(), "{id}: {share} and {p}");
    }
    for choice in &choices[..50] {
        assert!((choice.logprob - probabilities[choice.id as usize].ln()).abs() < 1e-12);
    }
    // Two tokens of four reach 0.7.
    let nucleus = Sampling { top_p: 0.7, ..sampling };
    assert!(choose(&many, &keys, &nucleus).unwrap().iter().all(|c| c.id < 2));
    let e = choose(&Tensor::full([1, 4], f64::NAN, (Kind::Double, Device::Cpu)), &[(0, 0)], &sampling)
        .unwrap_err();
    assert!(e.message.contains("not finite"), "{e}");
}
