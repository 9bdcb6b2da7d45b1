//! `corral generate`, `score` and `eval` as users run them, on the golden models.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use testing::compare::relative_number;
use testing::folder::{TestFolder, folder};
use testing::golden::{golden_model, tensors};
use testing::program::{Program, launch};
use testing::tolerance::{Quantity, allowed};

use common::load;
use corral::model::{LmHead, ModelInput};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

/// A JSONL file in a folder of a test.
fn write_lines(folder: &TestFolder, name: &str, values: &[Value]) -> PathBuf {
    folder.file(name, values.iter().map(|v| format!("{v}\n")).collect::<String>())
}

/// Runs `corral SUBCOMMAND --model MODEL ...` on one thread of the CPU.
fn corral(subcommand: &str, model: &Path, args: &[&str]) -> Output {
    Command::new(testing::program::corral())
        .args(["--device", "cpu", "--threads", "1", subcommand, "--model", model.to_str().unwrap()])
        .args(args)
        .env_remove("WORLD_SIZE")
        .output()
        .unwrap()
}

#[track_caller]
fn succeed(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn fail(output: Output, code: i32, message: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(stderr.contains(message), "{stderr}");
}

fn read(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn generate_writes_the_lines_back_with_completions() {
    let folder = TestFolder::new("generate");
    let prompts = ["One two", "The quick brown fox jumps", "a"];
    let lines: Vec<Value> = prompts.iter().enumerate().map(|(i, p)| json!({"id": i, "prompt": p})).collect();
    let (input, output) = (write_lines(&folder, "in.jsonl", &lines), folder.path("out.jsonl"));
    let args = ["--input", text(&input), "--max-new-tokens", "12", "--output", text(&output)];
    assert_eq!(succeed(corral("generate", &golden_model("llama3"), &args)), "");
    let completions = read(&output);
    for ((line, prompt), id) in completions.iter().zip(prompts).zip(0..) {
        assert_eq!((&line["id"], &line["prompt"]), (&json!(id), &json!(prompt)));
        let n = line["num_tokens"].as_u64().unwrap();
        assert_eq!(line["finish_reason"], if n < 12 { "eos" } else { "length" });
        // Alone it is the same, and what is printed is the completion.
        let alone = ["--prompt", prompt, "--max-new-tokens", "12"];
        let printed = succeed(corral("generate", &golden_model("llama3"), &alone));
        assert_eq!(printed.strip_suffix('\n'), line["completion"].as_str());
    }
    assert_eq!(completions.len(), 3);

    let sample = |seed: &str, batch_size: &str| {
        let drawn = ["--temperature", "2", "--top-k", "40", "--top-p", "0.9", "--dtype", "float64"];
        let keys = ["--seed", seed, "--batch-size", batch_size];
        succeed(corral("generate", &golden_model("llama3"), &[&args[..4], &drawn, &keys].concat()))
    };
    let first = sample("1", "1");
    assert_eq!(first, sample("1", "3"), "draws do not depend on the batch");
    assert_ne!(first, sample("2", "3"));
}

#[test]
fn generate_refuses_what_it_cannot_do() {
    let folder = TestFolder::new("refusals");
    let llama = golden_model("tied");
    fail(corral("generate", &llama, &[]), 2, "--prompt");
    fail(corral("generate", &llama, &["--prompt", "a", "--top-p", "1.5"]), 2, "top-p is 1.5");
    fail(corral("generate", &llama, &["--prompt", "a", "--temperature=-1"]), 2, "temperature");
    fail(corral("generate", &llama, &["--prompt", "a", "--max-new-tokens", "0"]), 2, "max-new-tokens");
    fail(corral("generate", &llama, &["--prompt", "a", "--stop", ""]), 2, "--stop");
    fail(corral("generate", &folder.path("no"), &["--prompt", "a"]), 3, "no such folder");
    let bad = write_lines(&folder, "bad.jsonl", &[json!({"prompt": "a"}), json!({"prompt": 3})]);
    let output = folder.path("out.jsonl");
    let args = ["--input", text(&bad), "--output", text(&output)];
    fail(corral("generate", &llama, &args), 3, "bad.jsonl:2: `prompt` is a number");
    assert!(!output.exists());
}

/// `score` on the golden rows, without their padding: Hugging Face's log-probabilities.
#[test]
fn scores_are_the_golden_ones() {
    let folder = TestFolder::new("score");
    for family in ["llama2", "llama3", "tied"] {
        let dir = golden_model(family);
        let single = tensors(&dir.join("golden.safetensors"));
        let double = tensors(&dir.join("golden_f64.safetensors"));
        let rows = |name: &str| Vec::<Vec<i64>>::try_from(&single[name]).unwrap();
        let expected = Vec::<Vec<f64>>::try_from(&double["token_logprobs"]).unwrap();
        let lines: Vec<Value> = rows("input_ids")
            .iter()
            .zip(rows("attention_mask"))
            .map(|(ids, mask)| {
                let real: Vec<i64> =
                    ids.iter().zip(mask).filter(|(_, m)| *m == 1).map(|(id, _)| *id).collect();
                json!({"input_ids": real, "note": "kept"})
            })
            .collect();
        let (input, output) = (write_lines(&folder, "in.jsonl", &lines), folder.path("out.jsonl"));
        for (dtype, kind) in [("float32", Kind::Float), ("float64", Kind::Double)] {
            let tolerance = allowed(Quantity::Scores, kind);
            let args = ["--input", text(&input), "--output", text(&output), "--dtype", dtype];
            assert_eq!(succeed(corral("score", &dir, &args)), "");
            let scored = read(&output);
            assert_eq!(scored.len(), lines.len());
            for ((line, given), (expected, mask)) in
                scored.iter().zip(&lines).zip(expected.iter().zip(rows("attention_mask")))
            {
                assert_eq!((&line["token_ids"], &line["note"]), (&given["input_ids"], &given["note"]));
                let both = mask.windows(2).map(|m| m[0] * m[1]);
                let wanted: Vec<f64> =
                    expected.iter().zip(both).filter(|(_, m)| *m == 1).map(|(x, _)| *x).collect();
                let got = numbers(&line["logprobs"]);
                assert_eq!(got.len(), wanted.len());
                for (x, y) in got.iter().zip(&wanted) {
                    assert!((x - y).abs() < tolerance, "{family} in {dtype}: {x} and {y}");
                }
                assert!(
                    (line["sum_logprob"].as_f64().unwrap() - got.iter().sum::<f64>()).abs()
                        < allowed(Quantity::Printed, Kind::Double)
                );
            }
        }
    }
}

#[test]
fn scores_of_texts_and_completions() {
    let folder = TestFolder::new("texts");
    let lines = [
        json!({"text": "One two three"}),
        json!({"prompt": "One", "completion": " two three"}),
        json!({"prompt": "One two three", "completion": ""}),
    ];
    let (input, output) = (write_lines(&folder, "in.jsonl", &lines), folder.path("out.jsonl"));
    let dir = golden_model("llama3");
    succeed(corral("score", &dir, &["--input", text(&input), "--output", text(&output)]));
    let scored = read(&output);
    let (all, part) = (numbers(&scored[0]["logprobs"]), numbers(&scored[1]["logprobs"]));
    assert_eq!(scored[0]["token_ids"], scored[1]["token_ids"], "the same text");
    assert_eq!(all.len() + 1, scored[0]["token_ids"].as_array().unwrap().len());
    assert!(!part.is_empty() && part.len() < all.len());
    for (x, y) in part.iter().rev().zip(all.iter().rev()) {
        assert!((x - y).abs() < allowed(Quantity::SameRewards, Kind::Float), "{x} and {y}");
    }
    assert_eq!((&scored[2]["logprobs"], &scored[2]["sum_logprob"]), (&json!([]), &json!(0.0)));

    let kept = std::fs::read(&output).unwrap();
    let refuse = |line: Value, message: &str| {
        let input = write_lines(&folder, "bad.jsonl", &[lines[0].clone(), line]);
        let out = corral("score", &dir, &["--input", text(&input), "--output", text(&output)]);
        fail(out, 3, message);
        assert_eq!(std::fs::read(&output).unwrap(), kept, "an earlier output stays");
    };
    refuse(
        json!({"input_ids": [1, 600]}),
        "bad.jsonl:2: token id 600 is not in the model's vocabulary of 600",
    );
    refuse(json!({"input_ids": ["a"]}), "bad.jsonl:2: input_ids is no list of token ids");
    refuse(json!({"prompt": "a"}), "bad.jsonl:2: no key `completion`");
    refuse(json!({"other": "a"}), "bad.jsonl:2: needs `input_ids`, `prompt` and `completion`, or `text`");
    refuse(json!({"input_ids": vec![1; 513]}), "bad.jsonl:2: 513 tokens; the model has 512 positions");
}

/// Windows of 7 predictions over a text, against one forward a window.
#[test]
fn perplexity_counts_every_token_once() {
    let folder = TestFolder::new("eval");
    let dir = golden_model("llama3");
    let written = "One two three.\nFour five six, and seven.\nHow the fox jumps over 13 lazy dogs!\n";
    let input = folder.file("text.txt", written);
    let output = folder.path("result.json");
    let args = ["--task", "perplexity", "--input", text(&input), "--dtype", "float64"];
    let windowed = [&args[..], &["--sequence-length", "7", "--output", text(&output)]].concat();
    let printed: Value = serde_json::from_str(&succeed(corral("eval", &dir, &windowed))).unwrap();
    let result: Value = serde_json::from_str(&std::fs::read_to_string(&output).unwrap()).unwrap();
    assert_eq!(printed, result);

    let tokenizer = corral::data::tokenizer::Tokenizer::load(&dir).unwrap();
    let mut ids: Vec<i64> = tokenizer.encode(written, true).unwrap().into_iter().map(i64::from).collect();
    ids.push(i64::from(tokenizer.eos_ids()[0]));
    let mut model = load(&dir, Kind::Double);
    let mut loss = 0.0;
    for window in (0..ids.len() - 1).step_by(7).map(|i| &ids[i..(i + 8).min(ids.len())]) {
        let input = ModelInput::new(Tensor::from_slice(&window[..window.len() - 1]).unsqueeze(0));
        let hidden = model.hidden(&input).unwrap();
        loss += LmHead::loss_sum(&mut model, &hidden, &Tensor::from_slice(&window[1..])).unwrap().0;
    }
    let number = |key: &str| result[key].as_f64().unwrap();
    let n = (ids.len() - 1) as f64;
    assert_eq!((number("num_tokens"), number("num_bytes")), (n, written.len() as f64));
    assert!(
        (number("loss") - loss / n).abs() < allowed(Quantity::Printed, Kind::Double),
        "{result} and {}",
        loss / n
    );
    assert!(
        relative_number(number("perplexity"), (loss / n).exp()) < allowed(Quantity::Printed, Kind::Double)
    );
    let bits = loss / std::f64::consts::LN_2 / written.len() as f64;
    assert!((number("bits_per_byte") - bits).abs() < allowed(Quantity::Printed, Kind::Double));

    fail(corral("eval", &dir, &[&args[..], &["--sequence-length", "513"]].concat()), 2, "512 positions");
    let empty = folder.file("empty.jsonl", "");
    let none = ["--task", "perplexity", "--input", text(&empty)];
    fail(corral("eval", &dir, &none), 3, "nothing to measure");
}

/// Of any tokenizer: no special tokens.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

/// A language model prefers the completion of higher log-probability, which is `score`'s; beside a reference, that whose
/// log-probability has grown more.
#[test]
fn preferences_of_a_language_model() {
    let folder = TestFolder::new("preferences");
    let dir = golden_model("llama3");
    let turn = |role: &str, text: &str| json!([{"role": role, "content": text}]);
    let pair = |prompt, chosen, rejected| {
        let [chosen, rejected] = [chosen, rejected].map(|text| turn("assistant", text));
        json!({"prompt": turn("user", prompt), "chosen": chosen, "rejected": rejected})
    };
    let pairs = [pair("One two", "three", "four five"), pair("The quick", "brown fox", "dog")];
    let lines: Vec<Value> = pairs
        .iter()
        .flat_map(|p| {
            ["chosen", "rejected"].map(|side| json!({"prompt": p["prompt"], "completion": p[side]}))
        })
        .collect();
    let (input, output) = (write_lines(&folder, "completions.jsonl", &lines), folder.path("scores.jsonl"));
    let common = ["--dtype", "float64", "--chat-template", TEMPLATE, "--input"];
    let score = [&common[..], &[text(&input), "--output", text(&output)]].concat();
    succeed(corral("score", &dir, &score));
    let sums: Vec<f64> = read(&output).iter().map(|line| line["sum_logprob"].as_f64().unwrap()).collect();

    let (input, answers) = (write_lines(&folder, "pairs.jsonl", &pairs), folder.path("answers.jsonl"));
    let task = ["--task", "preference", "--answers", text(&answers)];
    let eval = [&common[..], &[text(&input)], &task].concat();
    let result: Value = serde_json::from_str(&succeed(corral("eval", &dir, &eval))).unwrap();
    let rewards: Vec<f64> = read(&answers).iter().flat_map(|line| numbers(&line["rewards"])).collect();
    assert!(
        rewards.iter().zip(&sums).all(|(a, b)| (a - b).abs() < allowed(Quantity::Printed, Kind::Double)),
        "{rewards:?} and {sums:?}"
    );
    let right = sums.chunks(2).filter(|pair| pair[0] > pair[1]).count();
    assert_eq!((&result["right"], &result["pairs"]), (&json!(right), &json!(2)), "{result}");
    assert_eq!(result["compared"], "logprobs");

    let beside =
        |reference: &Path| corral("eval", &dir, &[&eval[..], &["--reference", text(reference)]].concat());
    let result: Value = serde_json::from_str(&succeed(beside(&dir))).unwrap();
    assert_eq!((&result["equal"], &result["right"]), (&json!(2), &json!(0)), "{result}");
    assert_eq!(result["compared"], "logratios");
    fail(beside(&golden_model("llama2")), 3, "different tokenizers");
    let perplexity = ["--task", "perplexity", "--input", text(&input), "--reference", text(&dir)];
    fail(corral("eval", &dir, &perplexity), 2, "--reference is for --task preference");
}

/// Token shards and the text that they were made of measure the same.
#[test]
fn perplexity_of_token_shards() {
    let folder = TestFolder::new("shards");
    let dir = golden_model("llama3");
    let documents =
        ["One two three.", "Four five six, and seven.", "The quick brown fox."].map(|t| json!({"text": t}));
    let input = write_lines(&folder, "text.jsonl", &documents);
    let shards = folder.path("tokens");
    let tokenize = Command::new(testing::program::corral())
        .args(["tokenize", "--input", text(&input), "--tokenizer", text(&dir), "--output", text(&shards)])
        .args(["--valid-fraction", "0"])
        .output()
        .unwrap();
    succeed(tokenize);
    let measure = |input: &Path| -> Value {
        let args = ["--task", "perplexity", "--input", text(input)];
        serde_json::from_str(&succeed(corral("eval", &dir, &args))).unwrap()
    };
    assert_eq!(measure(&shards.join("train")), measure(&input));
    // Another model's tokenizer.
    let train = shards.join("train");
    let args = ["--task", "perplexity", "--input", text(&train)];
    fail(corral("eval", &golden_model("llama2"), &args), 3, "another tokenizer");
}

/// Runs the words on one rank, on two that hold copies of the model, and on two and three that share it.
fn on_ranks(name: &str, words: &[&str], compare: impl Fn(&Path)) {
    let dir = folder(name);
    for (ranks, mode) in [(1, "replicate"), (2, "replicate"), (2, "full"), (3, "full")] {
        let at = dir.join(format!("{ranks}-{mode}"));
        std::fs::create_dir_all(&at).unwrap();
        let nproc = ranks.to_string();
        let program = Program::new(launch()).args(&["--nproc", &nproc]).args(words).args(&["--mode", mode]);
        program.args(&["--device", "cpu", "--output"]).arg(at.join("out")).run(&at, "launch").expect_code(0);
        compare(&at.join("out"));
    }
}

#[test]
fn ranks_generate_what_one_rank_does() {
    let data = TestFolder::new("ranks-generate");
    let lines: Vec<Value> = (0..13)
        .map(|i| json!({"prompt": format!("The {} fox {i}", "quick brown ".repeat(i % 5)), "id": i}))
        .collect();
    let input = write_lines(&data, "in.jsonl", &lines);
    let llama = golden_model("llama3");
    let words = ["generate", "--model", text(&llama), "--input", text(&input), "--max-new-tokens", "20"];
    let drawn = ["--temperature", "1.5", "--top-p", "0.95", "--batch-size", "3", "--dtype", "float64"];
    let words = [&words[..], &drawn].concat();
    let alone = data.path("alone.jsonl");
    succeed(corral("generate", &llama, &[&words[3..], &["--output", text(&alone)]].concat()));
    let expected = read(&alone);
    assert_eq!(expected.len(), lines.len());
    on_ranks("ranks-generate", &words, |path| {
        assert_eq!(read(path), expected, "{}", path.display());
    });
}

#[test]
fn ranks_score_and_measure_what_one_rank_does() {
    let data = TestFolder::new("ranks-score");
    let llama = golden_model("tied");
    // Batches of 8192 tokens: three of them, for two ranks and for three.
    let long = |i: usize| json!({"input_ids": (0..120).map(|j| (i * 37 + j * 11) % 400).collect::<Vec<_>>()});
    let lines: Vec<Value> = (0..190).map(long).chain([json!({"input_ids": [5]})]).collect();
    let input = write_lines(&data, "in.jsonl", &lines);
    let words = ["score", "--model", text(&llama), "--input", text(&input)];
    let alone = data.path("alone.jsonl");
    succeed(corral("score", &llama, &["--input", text(&input), "--output", text(&alone)]));
    let expected = std::fs::read(&alone).unwrap();
    on_ranks("ranks-score", &words, |path| {
        assert!(std::fs::read(path).unwrap() == expected, "{}: other scores", path.display());
    });

    let written = "One two three, four five six.\n".repeat(600);
    let input = data.file("text.txt", &written);
    let words = ["eval", "--model", text(&llama), "--task", "perplexity", "--input", text(&input)];
    let words = [&words[..], &["--sequence-length", "100"]].concat();
    let alone = data.path("alone.json");
    succeed(corral("eval", &llama, &[&words[3..], &["--output", text(&alone)]].concat()));
    let expected = std::fs::read_to_string(&alone).unwrap();
    on_ranks("ranks-eval", &words, |path| {
        assert_eq!(std::fs::read_to_string(path).unwrap(), expected, "{}", path.display());
    });

    let pair =
        |i: usize| json!({"prompt": "One two", "chosen": "three ".repeat(i), "rejected": "four".repeat(i)});
    let input = write_lines(&data, "pairs.jsonl", &(1..6).map(pair).collect::<Vec<_>>());
    let reference = golden_model("llama2");
    let words = ["eval", "--model", text(&llama), "--task", "preference", "--input", text(&input)];
    let words = [&words[..], &["--chat-template", TEMPLATE, "--reference", text(&reference)]].concat();
    let alone = data.path("preference.json");
    succeed(corral("eval", &llama, &[&words[3..], &["--output", text(&alone)]].concat()));
    let expected = std::fs::read_to_string(&alone).unwrap();
    assert!(expected.contains("\"compared\": \"logratios\""), "{expected}");
    on_ranks("ranks-preference", &words, |path| {
        assert_eq!(std::fs::read_to_string(path).unwrap(), expected, "{}", path.display());
    });
}

/// What all ranks find before they meet is told by one of them.
#[test]
fn ranks_tell_an_error_once() {
    let dir = folder("once");
    let launched = |words: &[&str], name: &str| {
        let program = Program::new(launch()).args(&["--nproc", "2"]).args(words).args(&["--device", "cpu"]);
        program.run(&dir, name)
    };
    let llama = golden_model("tied");
    let missing = dir.join("missing").to_string_lossy().into_owned();
    for (words, code, message) in [
        (&["generate", "--model", &missing, "--prompt", "a"][..], 3, "no such folder"),
        (&["generate", "--model", text(&llama), "--prompt", "a b c"], 0, ""),
        (&["generate", "--model", text(&llama), "--promt", "a"], 2, "unexpected argument '--promt'"),
        (&["eval", "--model", text(&llama), "--task", "perplexity", "--input", &missing], 3, "missing"),
    ] {
        let ended = launched(words, "launch").expect_code(code);
        let told = ended.err.lines().filter(|l| l.starts_with('[') && l.contains(message)).count();
        assert_eq!(told, usize::from(code != 0), "{ended}");
    }
}

#[test]
fn an_output_is_gone_on_with() {
    let folder = TestFolder::new("go-on");
    let llama = golden_model("llama3");
    let lines: Vec<Value> = (0..7).map(|i| json!({"prompt": format!("fox {i}"), "id": i})).collect();
    let (input, output) = (write_lines(&folder, "in.jsonl", &lines), folder.path("out.jsonl"));
    let run = |more: &[&str]| {
        let words =
            ["--input", text(&input), "--output", text(&output), "--max-new-tokens", "9", "--seed", "3"];
        corral("generate", &llama, &[&words[..], more].concat())
    };
    succeed(run(&[]));
    let whole = std::fs::read_to_string(&output).unwrap();
    assert_eq!(whole.lines().count(), 7);
    // Cut in the middle of the fifth line, whose first four are marked to be told from new ones.
    let ends: Vec<usize> = whole.match_indices('\n').map(|(i, _)| i + 1).collect();
    let kept = whole[..ends[3]].replace("\"num_tokens\":", "\"num_tokens\": ");
    std::fs::write(&output, format!("{kept}{}", &whole[ends[3]..ends[4] - 5])).unwrap();
    let again = run(&[]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("4 of 7 lines are there already"), "{again:?}");
    succeed(again);
    assert_eq!(std::fs::read_to_string(&output).unwrap(), format!("{kept}{}", &whole[ends[3]..]));

    fail(run(&["--seed", "4"]), 2, "the argument '--seed <S>' cannot be used multiple times");
    fail(run(&["--top-k", "7"]), 2, "was begun with top_k 0, here 7");
    succeed(run(&["--top-k", "7", "--overwrite"]));
    assert_ne!(std::fs::read_to_string(&output).unwrap(), whole);
    write_lines(&folder, "in.jsonl", &lines[1..]);
    fail(run(&["--top-k", "7"]), 2, "out.jsonl:1 is no answer to line 1 of the input");
    let reread = std::fs::read_to_string(&output).unwrap();
    assert_eq!(reread.lines().count(), 7, "what is refused stays");
}

/// No padding and no neighbour changes a completion: batches of any size and one prompt at a time, greedy and drawn.
#[test]
fn batches_are_single_prompts() {
    let folder = TestFolder::new("batches");
    for family in ["llama2", "llama3", "tied"] {
        let g = tensors(&golden_model(family).join("golden.safetensors"));
        let rows = |name: &str| Vec::<Vec<i64>>::try_from(&g[name]).unwrap();
        let tokenizer = corral::data::tokenizer::Tokenizer::load(golden_model(family)).unwrap();
        let lines: Vec<Value> = rows("gen_input_ids")
            .iter()
            .zip(rows("gen_attention_mask"))
            .map(|(ids, mask)| {
                let real = ids.iter().zip(mask).filter(|(_, m)| *m == 1).map(|(id, _)| *id as u32);
                json!({"prompt": tokenizer.decode(&real.collect::<Vec<_>>(), true).unwrap()})
            })
            .collect();
        let input = write_lines(&folder, "in.jsonl", &lines);
        for sampling in
            [&["--temperature", "0"][..], &["--temperature", "2", "--seed", "11", "--top-k", "60"]]
        {
            let generate = |batch_size: &str| {
                let words = ["--input", text(&input), "--max-new-tokens", "16", "--batch-size", batch_size];
                succeed(corral("generate", &golden_model(family), &[&words[..], sampling].concat()))
            };
            let single = generate("1");
            assert_eq!(single.lines().count(), lines.len());
            assert_eq!(generate("4"), single, "{family} {sampling:?}");
            assert_eq!(generate("3"), single, "{family} {sampling:?}");
        }
    }
}
