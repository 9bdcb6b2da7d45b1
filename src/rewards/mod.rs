//! Rules that judge an answer, and their weighted sum.

mod command;
pub mod gsm8k;
mod http;
mod keeper;
pub mod math;
mod protocol;

use std::collections::BTreeMap;

use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::Conflicts;
use crate::config::rewards::{RewardKind, RewardTerm};
use crate::error::{Error, Result};
use command::CommandReward;
use gsm8k::AnswerForm;
use http::HttpReward;

/// A response that is to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// The prompt's text.
    pub prompt: &'a str,
    /// The response's text, as it was sampled.
    pub response: &'a str,
    /// What the data says is right.
    pub reference: Option<&'a str>,
    /// Tokens of the response, with the one that ended it.
    pub num_tokens: usize,
    /// The record of the data, for commands.
    pub record: &'a Map<String, Value>,
    /// The reward model's score, where one is asked.
    pub score: Option<f64>,
}

/// What was made of a response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The weighted sum; none where a part could not be scored, which is no reward and no fault of the response.
    pub reward: Option<f64>,
    /// By kind; a second one of a kind is `kind.2`.
    pub parts: BTreeMap<String, RewardPart>,
}

/// One reward, before its weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RewardPart {
    /// None: the reward says nothing of this response.
    pub reward: Option<f64>,
    /// What was read as the response's answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parsed: Option<String>,
    /// What it was compared with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gold: Option<String>,
}

impl RewardPart {
    fn of(reward: Option<f64>) -> RewardPart {
        RewardPart { reward, parsed: None, gold: None }
    }
}

enum Rule {
    Gsm8k(AnswerForm),
    Math,
    Format(Regex),
    Length { most: f64, buffer: f64 },
    Command(Box<CommandReward>),
    Http(HttpReward),
    Model,
}

/// Judges responses by the rules of a configuration.
pub struct Judge {
    /// Name, weight, rule.
    rules: Vec<(String, f64, Rule)>,
}

impl Judge {
    /// Checks the rules and starts the commands.
    ///
    /// # Errors
    /// Of kind Config: keys that do not fit, a pattern that is none, a command that cannot be started.
    pub fn new(rewards: &[RewardTerm]) -> Result<Judge> {
        let mut rules: Vec<(String, f64, Rule)> = Vec::new();
        for (i, reward) in rewards.iter().enumerate() {
            let refused = |key: &str, why: &str| Error::key(&format!("rewards.{i}.{key}"), why);
            let mut conflicts = Conflicts::default();
            reward.conflicts(&mut conflicts);
            if let Some((key, why)) = conflicts.iter().next() {
                return Err(refused(key, why));
            }
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            let rule = match reward.kind {
                RewardKind::Gsm8k => Rule::Gsm8k(reward.form.unwrap_or_default()),
                RewardKind::Math => Rule::Math,
                RewardKind::Format => Rule::Format(
                    Regex::new(&text(&reward.pattern)).map_err(|e| refused("pattern", &e.to_string()))?,
                ),
                RewardKind::Length => {
                    let most = reward.most.unwrap_or(1);
                    let buffer = reward.buffer.unwrap_or((most / 4).max(1));
                    Rule::Length { most: most as f64, buffer: buffer as f64 }
                }
                RewardKind::Command => {
                    let (run, batch) = (text(&reward.run), reward.batch.unwrap_or(false));
                    let workers = reward.workers.unwrap_or(1) as usize;
                    Rule::Command(Box::new(CommandReward::start(&run, reward.timeout_s, workers, batch)?))
                }
                RewardKind::Http => {
                    let (url, batch) = (text(&reward.url), reward.batch.unwrap_or(false));
                    let workers = reward.workers.unwrap_or(1) as usize;
                    Rule::Http(HttpReward::new(&url, reward.timeout_s, workers, batch)?)
                }
                RewardKind::Model => Rule::Model,
            };
            let kind = reward.kind.name();
            let same = rewards[..i].iter().filter(|r| r.kind == reward.kind).count();
            let name = if same == 0 { kind.into() } else { format!("{kind}.{}", same + 1) };
            rules.push((name, reward.weight, rule));
        }
        Ok(Judge { rules })
    }

    /// Whether a command is given the records whole.
    pub fn reads_records(&self) -> bool {
        self.rules.iter().any(|(_, _, rule)| matches!(rule, Rule::Command(_) | Rule::Http(_)))
    }

    /// Judges some responses.
    ///
    /// # Errors
    /// A command or server that fails: what it did not say is never taken for a reward.
    pub fn judge(&mut self, answers: &[Answer]) -> Result<Vec<Judgement>> {
        let new = || Judgement { reward: Some(0.0), parts: BTreeMap::new() };
        let mut judgements: Vec<Judgement> = answers.iter().map(|_| new()).collect();
        for (name, weight, rule) in &mut self.rules {
            for (judgement, part) in judgements.iter_mut().zip(rule.score_all(answers)?) {
                let sum = judgement.reward.zip(part.reward);
                judgement.reward = sum.map(|(sum, reward)| sum + *weight * reward);
                judgement.parts.insert(name.clone(), part);
            }
        }
        Ok(judgements)
    }
}

impl Rule {
    fn score_all(&mut self, answers: &[Answer]) -> Result<Vec<RewardPart>> {
        let asked = match self {
            Rule::Command(command) => command.score(answers)?,
            Rule::Http(server) => server.score(answers)?,
            rule => return answers.iter().map(|answer| rule.judge(answer)).collect(),
        };
        Ok(asked.into_iter().map(RewardPart::of).collect())
    }

    fn judge(&mut self, answer: &Answer) -> Result<RewardPart> {
        Ok(match self {
            Rule::Gsm8k(form) => {
                let gold = answer.reference.and_then(gsm8k::reference);
                let parsed = gsm8k::answer(answer.response, *form);
                let equal =
                    |gold: &gsm8k::NumberAnswer| parsed.as_ref().is_some_and(|p| p.number == gold.number);
                let reward = gold.as_ref().map(|g| f64::from(equal(g)));
                RewardPart { reward, parsed: parsed.map(|p| p.number), gold: gold.map(|g| g.number) }
            }
            Rule::Math => {
                let gold = answer.reference.and_then(math::reference);
                let parsed = math::boxed(answer.response);
                let equal = |gold: &String| parsed.is_some_and(|p| math::equal(p, gold));
                let reward = gold.as_ref().map(|g| f64::from(equal(g)));
                RewardPart { reward, parsed: parsed.map(str::to_string), gold }
            }
            Rule::Format(pattern) => {
                let found = pattern.find(answer.response).map(|m| m.as_str().to_string());
                RewardPart { reward: Some(f64::from(found.is_some())), parsed: found, gold: None }
            }
            Rule::Length { most, buffer } => {
                let excess = answer.num_tokens as f64 - (*most - *buffer);
                RewardPart::of(Some(-(excess / *buffer).clamp(0.0, 1.0)))
            }
            // Asked for all responses at once, by `score_all`.
            Rule::Command(_) | Rule::Http(_) => RewardPart::of(None),
            Rule::Model => {
                let score = answer.score.ok_or_else(|| Error::failed("the reward model gave no score"))?;
                RewardPart::of(Some(score))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewards(yaml: &str) -> Vec<RewardTerm> {
        crate::config::json::of_text(yaml).unwrap()
    }

    fn judge(yaml: &str, response: &str, reference: Option<&str>, score: Option<f64>) -> Result<Judgement> {
        let record = Map::new();
        let num_tokens = response.split_whitespace().count();
        let answer = Answer { prompt: "2 + 2?", response, reference, num_tokens, record: &record, score };
        let mut judged = Judge::new(&rewards(yaml))?.judge(&[answer])?;
        Ok(judged.remove(0))
    }

    #[test]
    fn rewards_are_summed_with_their_weights() {
        let yaml = r#"
- {kind: gsm8k, weight: 2}
- {kind: format, pattern: '(?s)^<think>.*</think>', weight: 0.5}
- {kind: model, weight: -1}
"#;
        let got = judge(yaml, "<think>a\nb</think>\n#### 4", Some("#### 4.0"), Some(0.25)).unwrap();
        assert_eq!(got.reward, Some(2.25));
        assert_eq!(got.parts["gsm8k"].parsed.as_deref(), Some("4"));
        assert_eq!(got.parts["gsm8k"].gold.as_deref(), Some("4"));
        let wrong = judge(yaml, "<think>#### 5", Some("4"), Some(0.0)).unwrap();
        assert_eq!(wrong.reward, Some(0.0));
        let json = serde_json::to_value(&wrong.parts).unwrap();
        assert_eq!(json["gsm8k"], serde_json::json!({"reward": 0.0, "parsed": "5", "gold": "4"}));
    }

    #[test]
    fn what_cannot_be_compared_is_not_rewarded() {
        for reference in [None, Some("#### none"), Some("")] {
            for kind in ["gsm8k", "math"] {
                if kind == "math" && reference == Some("#### none") {
                    continue;
                }
                let got = judge(&format!("[{{kind: {kind}}}]"), "#### 4", reference, None).unwrap();
                assert_eq!(got.reward, None, "{kind} {reference:?}");
            }
        }
    }

    #[test]
    fn long_responses_lose() {
        let yaml = "[{kind: length, most: 10, buffer: 4}]";
        for (words, wanted) in [(6, 0.0), (7, -0.25), (10, -1.0), (12, -1.0)] {
            let got = judge(yaml, &"a ".repeat(words), None, None).unwrap();
            assert_eq!(got.reward, Some(wanted), "{words}");
        }
    }

    #[test]
    fn rules_that_do_not_fit_are_refused() {
        let cases = [
            ("[{kind: format}]", "needs pattern"),
            ("[{kind: format, pattern: '('}]", "'rewards.0.pattern': regex"),
            ("[{kind: math}, {kind: math, form: strict}]", "'rewards.1.form': is of the kind gsm8k"),
            ("[{kind: length, most: 3, buffer: 4}]", "more than the 3"),
            ("[{kind: command}]", "needs run"),
            ("[{kind: http, url: 'https://x'}]", "must begin with http://"),
            ("[{kind: math, workers: 2}]", "'rewards.0.workers': is of the kinds command and http"),
        ];
        for (yaml, why) in cases {
            let e = Judge::new(&rewards(yaml)).map(drop).unwrap_err();
            assert!(e.to_string().contains(why) && e.exit_code() == 2, "{e}");
        }
    }

    #[test]
    fn a_command_is_asked_line_by_line() {
        // Counts its questions: the same process answers all.
        let script = r#"n=0; while read -r line; do n=$((n+1)); case "$line" in *skip*) echo null;; *) echo "{\"reward\": $n}";; esac; done"#;
        let yaml = format!("[{{kind: command, run: '{script}'}}]");
        let mut judge = Judge::new(&rewards(&yaml)).unwrap();
        let record = Map::new();
        let mut ask = |response| {
            let (prompt, reference) = ("", None);
            let answer = Answer { prompt, response, reference, num_tokens: 1, record: &record, score: None };
            judge.judge(&[answer]).unwrap()[0].reward
        };
        assert_eq!([ask("a\nb"), ask("skip"), ask("c")], [Some(1.0), None, Some(3.0)]);
    }

    fn rewards_of(yaml: &str, responses: &[&str]) -> Result<Vec<Option<f64>>> {
        let record = Map::new();
        let answer = |response: &&'static str| Answer {
            prompt: "",
            response,
            reference: Some("a b"),
            num_tokens: 1,
            record: &record,
            score: None,
        };
        let responses: Vec<&'static str> = responses.iter().map(|r| &*r.to_string().leak()).collect();
        let answers: Vec<Answer> = responses.iter().map(answer).collect();
        Ok(Judge::new(&rewards(yaml))?.judge(&answers)?.into_iter().map(|j| j.reward).collect())
    }

    #[test]
    fn processes_take_turns_and_order_stays() {
        // Each process counts its own questions.
        let script = r#"echo starting up; n=0; while read -r line; do n=$((n+1)); echo $n; done"#;
        let yaml = format!("[{{kind: command, run: '{script}', workers: 2}}]");
        let got = rewards_of(&yaml, &["a", "b", "c", "d", "e"]).unwrap();
        assert_eq!(got, [1.0, 1.0, 2.0, 2.0, 3.0].map(Some));
        let e = rewards_of("[{kind: command, run: 'read line; exit 5', workers: 3}]", &["a"]).unwrap_err();
        assert!(e.message.contains("(process 1 of 3) ended without an answer"), "{e}");
    }

    #[test]
    fn a_batch_is_one_question() {
        let script = r#"while read -r line; do echo "[1, null, {\"reward\": 3}]"; done"#;
        let yaml = format!("[{{kind: command, run: '{script}', batch: true}}]");
        assert_eq!(rewards_of(&yaml, &["a", "b", "c"]).unwrap(), [Some(1.0), None, Some(3.0)]);
        let e = rewards_of(&yaml, &["a", "b"]).unwrap_err();
        assert!(e.message.contains("3 rewards for 2 responses"), "{e}");
    }

    #[test]
    fn the_examples_work() {
        let root = env!("CARGO_MANIFEST_DIR");
        let regex = format!("[{{kind: command, run: 'python3 {root}/configs/rewards/regex.py'}}]");
        assert_eq!(rewards_of(&regex, &["no", "1"]).unwrap(), [Some(0.0), Some(1.0)]);
        let run = format!("python3 {root}/configs/rewards/server.py --port 0");
        let mut server = keeper::KeptProcess::start(&run).unwrap();
        let mut line = String::new();
        let stdout = server.child.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
        let url = line.trim().trim_start_matches("serving at ");
        for batch in [true, false] {
            let yaml = format!("[{{kind: http, url: '{url}', workers: 2, batch: {batch}}}]");
            assert_eq!(rewards_of(&yaml, &["A", "b a", "c"]).unwrap(), [Some(0.5), Some(1.0), Some(0.0)]);
        }
        drop(server);
        let e = rewards_of(&format!("[{{kind: http, url: '{url}'}}]"), &["a"]).unwrap_err();
        assert!(e.message.starts_with("the reward's server http://127.0.0.1:"), "{e}");
    }

    /// Whatever is blocked and ignored in the thread that starts it, which computes. (Above 31: those of the C library.)
    #[test]
    fn a_command_blocks_and_ignores_no_signal() {
        use nix::sys::signal::SigSet;
        let script = r#"read line; set -- $(grep -E "SigBlk|SigIgn" /proc/self/status); echo $(((0x$2 | 0x$4) & 0x7fffffff))"#;
        let yaml = format!("[{{kind: command, run: '{script}'}}]");
        let asked = std::thread::spawn(move || {
            SigSet::all().thread_block().unwrap();
            let record = Map::new();
            let (prompt, response, reference) = ("", "", None);
            let answer = Answer { prompt, response, reference, num_tokens: 1, record: &record, score: None };
            Judge::new(&rewards(&yaml)).unwrap().judge(&[answer]).unwrap()[0].reward
        });
        assert_eq!(asked.join().unwrap(), Some(0.0));
    }

    #[test]
    fn what_a_command_has_started_ends_with_it() {
        // One in its group, one that left it, one whose parent is gone; none holds the pipe that is read here.
        let script = "sleep 301 >&2 & setsid sleep 301 >&2 & (sleep 301 >&2 &); read line; echo 1";
        let yaml = format!("[{{kind: command, run: '{script}'}}]");
        let before = sleepers();
        let mut judge = Judge::new(&rewards(&yaml)).unwrap();
        let record = Map::new();
        let answer =
            Answer { prompt: "", response: "", reference: None, num_tokens: 1, record: &record, score: None };
        assert_eq!(judge.judge(&[answer]).unwrap()[0].reward, Some(1.0));
        let begun = std::time::Instant::now();
        while sleepers() < before + 3 {
            assert!(begun.elapsed().as_secs() < 20, "{} of 3 have begun", sleepers() - before);
        }
        drop(judge);
        assert_eq!(sleepers(), before);
    }

    fn sleepers() -> usize {
        let of_this = format!("CORRAL_STARTED_BY_{}_", std::process::id());
        let environments = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
            let file = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
            let sleeps = file("cmdline").ends_with(b"\x00301\x00");
            sleeps.then(|| String::from_utf8_lossy(&file("environ")).into_owned())
        });
        environments.filter(|e| e.contains(&of_this)).count()
    }

    #[test]
    fn a_command_that_fails_is_no_reward() {
        let cases = [
            ("read line; exit 3", "exit status: 3"),
            ("read line; echo good", "ended without an answer"),
            ("read line; echo 1e999", "ended without an answer"),
            ("read line; echo why >&2; exit 4", "its last lines on stderr:\n  why"),
            ("read line; echo true", "no number"),
            ("read line; sleep 20", "0.2 s"),
            ("echo 1; echo 2; read line; sleep 20", "without a request"),
            ("/no/such/program", "exit status"),
        ];
        for (script, why) in cases {
            let yaml = format!("[{{kind: command, run: '{script}', timeout_s: 0.2}}]");
            // A line that nobody asked for must be there when the question comes.
            let record = Map::new();
            let answer = Answer {
                prompt: "",
                response: "a",
                reference: None,
                num_tokens: 1,
                record: &record,
                score: None,
            };
            let mut judge = Judge::new(&rewards(&yaml)).unwrap();
            if script.starts_with("echo") {
                std::thread::sleep(std::time::Duration::from_millis(300));
            }
            let e = judge.judge(&[answer]).unwrap_err();
            assert!(e.message.contains(why) && e.message.contains(script) && e.exit_code() == 1, "{e}");
        }
    }
}
