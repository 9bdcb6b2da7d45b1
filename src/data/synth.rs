//! The built-in arithmetic word problems: data for every stage, whose success can be counted.
//!
//! Levels: 1 adds or subtracts two numbers of 2 to 50; 2 does so twice; 3 multiplies (2 to 12) and then adds or
//! subtracts, or adds or subtracts up to 300 to or from up to 400. A mix is half level 1, 0.3 level 2, 0.2 level 3.
//!
//! Held out by numbers, not by template: a fixed hash keeps 10 % of the pairs of operands of additions and
//! subtractions out of every training equation, wrong answers included; every validation problem has at least one
//! of them. The hash knows nothing of the seed, so that training data of one seed never meets validation data of
//! another.

use crate::error::Result;
use crate::files::AtomicFile;
use crate::random::{Rng, mix};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;

const NAMES: [&str; 12] =
    ["Tom", "Anna", "Ben", "Lucy", "Sam", "Maria", "Jack", "Nina", "Leo", "Emma", "Max", "Rosa"];
const OBJECTS: [&str; 10] =
    ["apples", "books", "coins", "pens", "cards", "shells", "stamps", "eggs", "toys", "cups"];

/// Templates: {n} and {m} are two names, {o} the objects, {a}, {b}, {c} the numbers in order of use.
const ADD: [&str; 4] = [
    "{n} has {a} {o}. {n} buys {b} more. How many {o} does {n} have now?",
    "{n} has {a} {o} and finds {b} more. How many {o} does {n} have?",
    "There are {a} {o} in a box and {b} {o} in a bag. How many {o} are there in all?",
    "{n} got {a} {o} in the morning and {b} {o} in the evening. How many {o} did {n} get?",
];
const SUBTRACT: [&str; 4] = [
    "{n} has {a} {o} and gives {b} away. How many {o} are left?",
    "{n} had {a} {o} and lost {b} of them. How many {o} does {n} still have?",
    "A shop has {a} {o} and sells {b}. How many {o} remain?",
    "{n} has {a} {o}. {m} has {b} {o}. How many more {o} does {n} have than {m}?",
];
const TWO_STEPS: [(&str, [char; 2]); 5] = [
    ("{n} has {a} {o}, buys {b} and then finds {c} more. How many {o} does {n} have?", ['+', '+']),
    ("{n} has {a} {o} and buys {b} more. Then {n} gives {c} to {m}. How many {o} are left?", ['+', '-']),
    ("{n} had {a} {o}, sold {b} and then got {c} new ones. How many {o} does {n} have now?", ['-', '+']),
    ("A shop has {a} {o}. It sells {b} on Monday and {c} on Friday. How many {o} remain?", ['-', '-']),
    ("{n} has {a} {o} and {m} has {b} {o}. Together they use {c}. How many {o} are left?", ['+', '-']),
];
const MULTIPLY: [(&str, char); 2] = [
    ("{n} has {a} boxes of {b} {o} each and {c} more {o}. How many {o} does {n} have in all?", '+'),
    ("{n} buys {a} bags of {b} {o} each and gives {c} {o} away. How many {o} are left?", '-'),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProblemLevel {
    One,
    Two,
    Three,
    /// 0.5 / 0.3 / 0.2 of the three.
    Mix,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SynthSplit {
    Train,
    Valid,
}

/// `a op b = result`; in a wrong answer the result may not be what the operation gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct WordStep {
    a: i64,
    op: char,
    b: i64,
    result: i64,
}

fn compute(a: i64, op: char, b: i64) -> i64 {
    match op {
        '+' => a + b,
        '-' => a - b,
        _ => a * b,
    }
}

impl WordStep {
    fn new(a: i64, op: char, b: i64) -> Self {
        WordStep { a, op, b, result: compute(a, op, b) }
    }

    fn held_out(&self) -> bool {
        self.op != '*' && held_out(self.a, self.b)
    }
}

/// Whether the pair {a, b} belongs to validation: one in ten, in either order, added or subtracted.
fn held_out(a: i64, b: i64) -> bool {
    mix(((a.min(b) as u64) << 32) | a.max(b) as u64).is_multiple_of(10)
}

#[derive(Debug, Clone)]
struct WordProblem {
    level: u8,
    question: String,
    steps: Vec<WordStep>,
}

impl WordProblem {
    /// Draws problems of this level until one is allowed in the split.
    fn draw(rng: &mut Rng, level: u8, split: SynthSplit) -> WordProblem {
        loop {
            let (template, steps) = draw_steps(rng, level);
            if allowed(&steps, split) {
                return WordProblem { level, question: fill(rng, template, &steps), steps };
            }
        }
    }

    fn answer(&self) -> String {
        solution(&self.steps, self.last())
    }

    fn last(&self) -> i64 {
        self.steps[self.steps.len() - 1].result
    }
}

fn allowed(steps: &[WordStep], split: SynthSplit) -> bool {
    match split {
        SynthSplit::Train => !steps.iter().any(WordStep::held_out),
        SynthSplit::Valid => steps.iter().any(WordStep::held_out),
    }
}

/// The worked steps with their calculator notes, and the final line `#### answer`.
fn solution(steps: &[WordStep], answer: i64) -> String {
    let mut text = String::new();
    for WordStep { a, op, b, result } in steps {
        let _ = writeln!(text, "{a}{op}{b}=<<{a}{op}{b}={result}>>{result}");
    }
    let _ = write!(text, "#### {answer}");
    text
}

/// Draws a template and its steps. Results are never negative; a difference is at least 1.
fn draw_steps(rng: &mut Rng, level: u8) -> (&'static str, Vec<WordStep>) {
    let single = |rng: &mut Rng, first: (i64, i64), second_high: i64| {
        let subtract = rng.below(2) == 1;
        let a = rng.range(first.0.max(if subtract { 3 } else { 0 }), first.1);
        let b = rng.range(2, if subtract { second_high.min(a - 1) } else { second_high });
        let (templates, op) = if subtract { (&SUBTRACT, '-') } else { (&ADD, '+') };
        (*rng.choose(templates), vec![WordStep::new(a, op, b)])
    };
    match level {
        1 => single(rng, (2, 50), 50),
        2 => loop {
            let (template, ops) = *rng.choose(&TWO_STEPS);
            let numbers: [i64; 3] = std::array::from_fn(|_| rng.range(2, 50));
            let first = WordStep::new(numbers[0], ops[0], numbers[1]);
            let second = WordStep::new(first.result, ops[1], numbers[2]);
            if first.result > 0 && second.result > 0 {
                return (template, vec![first, second]);
            }
        },
        _ if rng.below(2) == 1 => single(rng, (51, 400), 300),
        _ => loop {
            let (template, op) = *rng.choose(&MULTIPLY);
            let numbers: [i64; 3] = std::array::from_fn(|_| rng.range(2, 12));
            let first = WordStep::new(numbers[0], '*', numbers[1]);
            let second = WordStep::new(first.result, op, numbers[2]);
            if second.result > 0 {
                return (template, vec![first, second]);
            }
        },
    }
}

fn fill(rng: &mut Rng, template: &str, steps: &[WordStep]) -> String {
    let name = rng.below(NAMES.len() as u64) as usize;
    let other = (name + 1 + rng.below(NAMES.len() as u64 - 1) as usize) % NAMES.len();
    template
        .replace("{n}", NAMES[name])
        .replace("{m}", NAMES[other])
        .replace("{o}", OBJECTS[rng.below(OBJECTS.len() as u64) as usize])
        .replace("{a}", &steps[0].a.to_string())
        .replace("{b}", &steps[0].b.to_string())
        .replace("{c}", &steps.get(1).map(|s| s.b.to_string()).unwrap_or_default())
}

/// How a wrong answer was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    /// The result of a step is off by 1 or 2, and carried on. Small reward models do not learn to see it.
    Slip,
    /// The steps are right, the final number is not that of the last step.
    Final,
    /// The result of a step is off by 10 or more, and carried on.
    Step,
    /// A step uses another operation.
    Operation,
    /// The last of several steps is left out, as a policy does that finds out that a judge has never seen it.
    Missing,
}

impl Wrong {
    fn name(self) -> &'static str {
        match self {
            Wrong::Slip => "slip",
            Wrong::Final => "final",
            Wrong::Step => "step",
            Wrong::Operation => "operation",
            Wrong::Missing => "missing",
        }
    }
}

/// A wrong answer: its steps and its final number; none where this draw gives nothing usable.
fn spoil(
    rng: &mut Rng,
    problem: &WordProblem,
    wrong: Wrong,
    split: SynthSplit,
) -> Option<(Vec<WordStep>, i64)> {
    let mut steps = problem.steps.clone();
    let sign = |rng: &mut Rng| if rng.below(2) == 0 { 1 } else { -1 };
    if wrong == Wrong::Missing {
        steps.pop();
        let answer = steps.last()?.result;
        return (answer != problem.last()).then_some((steps, answer));
    }
    if wrong == Wrong::Final {
        let answer = problem.last() + sign(rng) * rng.range(1, 30);
        return (answer >= 0).then_some((steps, answer));
    }
    let at = rng.below(steps.len() as u64) as usize;
    let step = &mut steps[at];
    match wrong {
        Wrong::Operation => {
            // The larger number comes first in a difference, so that every problem has another operation.
            step.op = *rng.choose(&['+', '-', '*']);
            let (a, b) =
                if step.op == '-' { (step.a.max(step.b), step.a.min(step.b)) } else { (step.a, step.b) };
            *step = WordStep::new(a, step.op, b);
        }
        Wrong::Step => step.result += sign(rng) * rng.range(10, 40),
        _ => step.result += sign(rng) * rng.range(1, 2),
    }
    for i in at + 1..steps.len() {
        steps[i] = WordStep::new(steps[i - 1].result, steps[i].op, steps[i].b);
    }
    let answer = steps[steps.len() - 1].result;
    let plausible = steps.iter().all(|s| (0..=9999).contains(&s.result)) && answer != problem.last();
    let usable = plausible && (split == SynthSplit::Valid || allowed(&steps, split));
    usable.then_some((steps, answer))
}

fn wrong_answer(rng: &mut Rng, problem: &WordProblem, wrong: Wrong, split: SynthSplit) -> String {
    loop {
        if let Some((steps, answer)) = spoil(rng, problem, wrong, split) {
            return solution(&steps, answer);
        }
    }
}

/// Which file a record belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Pretrain,
    Sft,
    Rankings,
    Prompts,
}

impl Stage {
    const ALL: [Stage; 4] = [Stage::Pretrain, Stage::Sft, Stage::Rankings, Stage::Prompts];

    fn name(self) -> &'static str {
        match self {
            Stage::Pretrain => "pretrain",
            Stage::Sft => "sft",
            Stage::Rankings => "rankings",
            Stage::Prompts => "prompts",
        }
    }
}

/// Equations a pretraining document of bare equations holds: about as long as a question.
const EQUATIONS_PER_DOCUMENT: usize = 10;

/// What is made.
#[derive(Debug, Clone, Copy)]
pub struct SynthOptions {
    /// Equal seeds give equal bytes.
    pub seed: u64,
    /// Records of every training file.
    pub count: u64,
    pub level: ProblemLevel,
    /// Share of the answers of fine-tuning's training file that are wrong: where reinforcement learning is to have
    /// something to correct, it can start from a model that was trained on these.
    pub wrong_answers: f64,
}

fn record(stage: Stage, split: SynthSplit, options: &SynthOptions, index: u64) -> Value {
    let purpose =
        format!("synth.{}.{}", stage.name(), if split == SynthSplit::Train { "train" } else { "valid" });
    let mut rng = Rng::new(options.seed, &purpose, index);
    let mixed = options.level == ProblemLevel::Mix;
    let level = match options.level {
        ProblemLevel::One => 1,
        ProblemLevel::Two => 2,
        ProblemLevel::Three => 3,
        ProblemLevel::Mix => *rng.choose(&[1, 1, 1, 1, 1, 2, 2, 2, 3, 3]),
    };
    let plain = |text: &mut String, steps: &[WordStep]| {
        for WordStep { a, op, b, result } in steps {
            let _ = writeln!(text, "{a}{op}{b}={result}");
        }
    };
    let problem = WordProblem::draw(&mut rng, level, split);
    let level = problem.level;
    match stage {
        Stage::Pretrain => {
            let mut text = String::new();
            if rng.below(2) == 0 {
                let level = if mixed { *rng.choose(&[1, 2, 3, 3]) } else { level };
                let mut count = 0;
                while count < EQUATIONS_PER_DOCUMENT {
                    let steps = WordProblem::draw(&mut rng, level, split).steps;
                    plain(&mut text, &steps);
                    count += steps.len();
                }
            } else {
                let _ = writeln!(text, "{}", problem.question);
                plain(&mut text, &problem.steps);
            }
            json!({"text": text, "level": level})
        }
        Stage::Sft => {
            let wrong = split == SynthSplit::Train
                && options.wrong_answers > 0.0
                && rng.uniform() < options.wrong_answers;
            let answer = match wrong {
                true => {
                    let kind = *rng.choose(&[Wrong::Slip, Wrong::Final, Wrong::Step, Wrong::Operation]);
                    wrong_answer(&mut rng, &problem, kind, split)
                }
                false => problem.answer(),
            };
            json!({"question": problem.question, "answer": answer, "level": level})
        }
        Stage::Prompts => json!({"prompt": problem.question, "answer": problem.answer(), "level": level}),
        Stage::Rankings => {
            let mut wrongs = vec![Wrong::Final, Wrong::Step, Wrong::Operation];
            if rng.below(8) == 0 {
                wrongs.insert(0, Wrong::Slip);
            }
            if problem.steps.len() > 1 {
                wrongs.push(Wrong::Missing);
            }
            let mut completions = vec![problem.answer()];
            completions.extend(wrongs.iter().map(|&w| wrong_answer(&mut rng, &problem, w, split)));
            let kinds: Vec<_> = std::iter::once("correct").chain(wrongs.iter().map(|w| w.name())).collect();
            json!({"prompt": problem.question, "completions": completions, "num_correct": 1, "kinds": kinds,
                "level": level})
        }
    }
}

/// Problems in every validation file, where `count` are in every training file.
pub fn num_valid(count: u64) -> u64 {
    (count / 20).clamp(1, 2000)
}

/// Writes `{pretrain,sft,rankings,prompts}.{train,valid}.jsonl` into `output`: `count` training records each and
/// `num_valid(count)` for validation. Equal arguments give equal bytes. All files are written before the first
/// gets its name.
pub fn write(output: &Path, options: &SynthOptions) -> Result<()> {
    let mut files = Vec::new();
    let count = options.count;
    for stage in Stage::ALL {
        for (split, name, count) in
            [(SynthSplit::Train, "train", count), (SynthSplit::Valid, "valid", num_valid(count))]
        {
            let mut file = AtomicFile::create(&output.join(format!("{}.{name}.jsonl", stage.name())))?;
            const CHUNK: u64 = 8192;
            for start in (0..count).step_by(CHUNK as usize) {
                let lines: Vec<String> = (start..count.min(start + CHUNK))
                    .into_par_iter()
                    .map(|i| format!("{}\n", record(stage, split, options, i)))
                    .collect();
                file.put(lines.concat().as_bytes())?;
            }
            files.push(file);
        }
    }
    files.into_iter().try_for_each(AtomicFile::commit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use testing::folder::TestFolder;

    fn options(seed: u64, count: u64) -> SynthOptions {
        SynthOptions { seed, count, level: ProblemLevel::Mix, wrong_answers: 0.0 }
    }

    fn records(stage: Stage, split: SynthSplit, count: u64) -> Vec<Value> {
        (0..count).map(|i| record(stage, split, &options(1, count), i)).collect()
    }

    /// Every `a op b = c` in a text, calculator notes included.
    fn equations(text: &str) -> Vec<WordStep> {
        let parts = text.split(|c: char| c.is_whitespace() || "<>".contains(c));
        parts
            .filter_map(|part| {
                let (left, result) = part.split_once('=')?;
                let at = left.find(['+', '-', '*'])?;
                let op = left.as_bytes()[at] as char;
                Some(WordStep {
                    a: left[..at].parse().ok()?,
                    op,
                    b: left[at + 1..].parse().ok()?,
                    result: result.parse().ok()?,
                })
            })
            .collect()
    }

    fn true_equation(s: &WordStep) -> bool {
        compute(s.a, s.op, s.b) == s.result
    }

    fn texts(record: &Value) -> Vec<String> {
        let mut texts: Vec<String> =
            ["text", "answer"].iter().filter_map(|k| Some(record[k].as_str()?.into())).collect();
        if let Some(completions) = record["completions"].as_array() {
            texts.extend(completions.iter().map(|c| c.as_str().unwrap().to_string()));
        }
        texts
    }

    #[test]
    fn files_repeat_from_a_seed_and_have_the_promised_keys() {
        let folder = TestFolder::new("synth");
        let read = |name: &str, seed: u64| {
            let out = folder.0.join(name);
            write(&out, &options(seed, 300)).unwrap();
            let mut all = Vec::new();
            for (stage, keys) in [
                ("pretrain", vec!["text", "level"]),
                ("sft", vec!["question", "answer", "level"]),
                ("rankings", vec!["prompt", "completions", "num_correct", "kinds", "level"]),
                ("prompts", vec!["prompt", "answer", "level"]),
            ] {
                for (split, count) in [("train", 300), ("valid", num_valid(300) as usize)] {
                    let text = std::fs::read_to_string(out.join(format!("{stage}.{split}.jsonl"))).unwrap();
                    assert_eq!(text.lines().count(), count);
                    for line in text.lines() {
                        let record: Value = serde_json::from_str(line).unwrap();
                        assert_eq!(record.as_object().unwrap().keys().collect::<Vec<_>>(), keys);
                    }
                    all.push(text);
                }
            }
            assert_eq!(std::fs::read_dir(&out).unwrap().count(), 8);
            all
        };
        let first = read("a", 1);
        assert_eq!(first, read("b", 1));
        assert!(first.iter().zip(read("c", 2)).all(|(a, b)| *a != b));
    }

    #[test]
    fn training_never_sees_a_held_out_pair_and_every_validation_problem_has_one() {
        let mut seen = 0;
        for stage in Stage::ALL {
            for record in records(stage, SynthSplit::Train, 2000) {
                for step in texts(&record).iter().flat_map(|t| equations(t)) {
                    seen += 1;
                    assert!(!step.held_out(), "{stage:?}: {step:?} in {record}");
                }
            }
            for record in records(stage, SynthSplit::Valid, 500) {
                let first = &texts(&record)[0];
                assert!(equations(first).iter().any(WordStep::held_out), "{stage:?}: {record}");
            }
        }
        assert!(seen > 20_000, "only {seen} equations were found");
        let pairs = (2..100).flat_map(|a| (2..=a).map(move |b| held_out(a, b))).collect::<Vec<_>>();
        let share = pairs.iter().filter(|h| **h).count() as f64 / pairs.len() as f64;
        assert!((0.085..0.115).contains(&share), "{share} of the pairs are held out");
        assert!((2..50).all(|a| (2..50).all(|b| held_out(a, b) == held_out(b, a))));
    }

    #[test]
    fn right_answers_are_right() {
        for split in [SynthSplit::Train, SynthSplit::Valid] {
            for record in records(Stage::Pretrain, split, 1000) {
                let text = record["text"].as_str().unwrap();
                assert!(!text.contains("<<") && !text.contains("####") && text.ends_with('\n'));
                assert!(equations(text).iter().all(true_equation), "{text}");
            }
            for record in records(Stage::Sft, split, 1000).iter().chain(&records(Stage::Prompts, split, 1000))
            {
                let answer = record["answer"].as_str().unwrap();
                let steps = equations(answer);
                assert!(!steps.is_empty() && steps.iter().all(true_equation), "{answer}");
                assert!(steps.iter().all(|s| s.result > 0), "{answer}");
                let last = steps.last().unwrap().result;
                assert!(answer.ends_with(&format!(">>{last}\n#### {last}")), "{answer}");
                let question = record["question"].as_str().or(record["prompt"].as_str()).unwrap();
                assert!(!question.contains(['{', '}']), "{question}");
                // The operands of the steps are the numbers of the question, in order.
                let words = question.split(|c: char| !c.is_ascii_digit()).filter(|w| !w.is_empty());
                let mut operands = vec![steps[0].a, steps[0].b];
                operands.extend(steps.get(1).map(|s| s.b));
                assert_eq!(
                    words.map(|w| w.parse::<i64>().unwrap()).collect::<Vec<_>>(),
                    operands,
                    "{question}"
                );
            }
        }
    }

    #[test]
    fn wrong_answers_are_wrong_in_the_way_they_say() {
        let mut slips = 0;
        for record in records(Stage::Rankings, SynthSplit::Train, 2000) {
            let texts = texts(&record);
            let kinds: Vec<_> =
                record["kinds"].as_array().unwrap().iter().map(|k| k.as_str().unwrap()).collect();
            assert_eq!((texts.len(), kinds[0]), (kinds.len(), "correct"));
            let last = |t: &str| t.rsplit("#### ").next().unwrap().parse::<i64>().unwrap();
            let right = equations(&texts[0]);
            assert!(right.iter().all(true_equation) && right.last().unwrap().result == last(&texts[0]));
            for (text, kind) in texts.iter().zip(&kinds).skip(1) {
                let steps = equations(text);
                assert_ne!(last(text), last(&texts[0]), "{kind}: {record}");
                assert_eq!(steps.len(), right.len() - (*kind == "missing") as usize);
                match *kind {
                    "missing" => {
                        assert!(steps == right[..steps.len()] && steps.last().unwrap().result == last(text))
                    }
                    "final" => assert!(steps == right && steps.last().unwrap().result != last(text)),
                    "operation" => assert!(
                        steps.iter().all(true_equation)
                            && steps.iter().zip(&right).any(|(a, b)| a.op != b.op)
                    ),
                    kind => {
                        let off = |s: &WordStep| (s.result - compute(s.a, s.op, s.b)).abs();
                        let wrong: Vec<_> = steps.iter().filter(|s| !true_equation(s)).collect();
                        assert_eq!(wrong.len(), 1, "{text}");
                        let range = if kind == "slip" { 1..=2 } else { 10..=40 };
                        assert!(range.contains(&off(wrong[0])), "{kind}: {text}");
                        slips += (kind == "slip") as usize;
                    }
                }
            }
        }
        assert!((150..350).contains(&slips), "{slips} slips in 2000 rankings");
    }

    #[test]
    fn levels_and_their_mix() {
        let count = |level, wanted: i64| {
            let options = SynthOptions { level, ..options(5, 4000) };
            let records = (0..4000).map(|i| record(Stage::Sft, SynthSplit::Train, &options, i));
            records.filter(|r| r["level"] == wanted).count() as f64 / 4000.0
        };
        for (level, number) in [(ProblemLevel::One, 1), (ProblemLevel::Two, 2), (ProblemLevel::Three, 3)] {
            assert_eq!(count(level, number), 1.0);
        }
        for (number, share) in [(1, 0.5), (2, 0.3), (3, 0.2)] {
            let found = count(ProblemLevel::Mix, number);
            assert!((found - share).abs() < 0.03, "level {number}: {found}");
        }
        let questions: HashSet<_> =
            records(Stage::Sft, SynthSplit::Train, 2000).iter().map(|r| r["question"].to_string()).collect();
        assert!(questions.len() > 1950, "only {} different questions of 2000", questions.len());
    }
    #[test]
    fn as_many_answers_are_wrong_as_asked_for() {
        let options = SynthOptions { wrong_answers: 0.4, ..options(3, 4000) };
        let right = |split| {
            let right = |i| {
                let record = record(Stage::Sft, split, &options, i);
                let answer = record["answer"].as_str().unwrap().to_string();
                let (steps, last) = answer.rsplit_once("#### ").unwrap();
                let steps = equations(steps);
                let operation = steps.iter().all(true_equation);
                f64::from(u8::from(operation && steps.last().unwrap().result.to_string() == last))
            };
            (0..4000).map(right).sum::<f64>() / 4000.0
        };
        // Another operation leaves true equations: a quarter of what is wrong.
        assert!((right(SynthSplit::Train) - 0.7).abs() < 0.03, "{}", right(SynthSplit::Train));
        assert_eq!(right(SynthSplit::Valid), 1.0);
    }
}
