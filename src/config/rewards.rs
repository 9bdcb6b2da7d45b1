//! What answers are rewarded for: the section `rewards` of ppo, grpo and online-dpo.

use super::conflict::Conflicts;
use super::section::{choice, section};

section! {
    /// A reward and its weight in the sum.
    pub struct RewardTerm {
        /// The kind of reward.
        kind: RewardKind => Mathematics;
        /// Its weight in the sum.
        weight: f64 = 1.0 => Mathematics;
        /// gsm8k: how the answer is found. Default: `strict`.
        form: Option<AnswerForm> = None => Mathematics;
        /// format: the regular expression (crate `regex`) that must match in the response.
        pattern: Option<String> = None => Mathematics;
        /// length: number of tokens at which the reward is -1.
        most: Option<i64> = None, COUNT => Mathematics;
        /// length: number of tokens over which it falls from 0 to -1. Default: a quarter of `most`.
        buffer: Option<i64> = None, COUNT => Mathematics;
        /// command: the program that the shell runs.
        run: Option<String> = None => Mathematics;
        /// http: the server's address, `http://HOST:PORT/PATH`.
        url: Option<String> = None => Mathematics;
        /// command, http: time limit of one reply, in seconds. Default: 60.
        timeout_s: Option<f64> = None, POSITIVE => Execution;
        /// command, http: processes, or concurrent requests, per rank. Default: 1.
        workers: Option<i64> = None, COUNT => Execution;
        /// command, http: a worker sends all its responses in one array, and gets one array of rewards.
        batch: Option<bool> = None => Execution;
    }
}

choice! {
    /// The kind of a reward.
    pub enum RewardKind {
        /// 1 if the answer after `####` is the reference's number, else 0.
        Gsm8k = "gsm8k",
        /// 1 if the last `\boxed{}` is the reference's answer, else 0.
        Math = "math",
        /// 1 if a regular expression matches, else 0.
        Format = "format",
        /// 0 for short responses, falling to -1 (the soft overlong punishment of DAPO, Yu et al. 2025).
        Length = "length",
        /// The number that the shell command in `run` prints.
        Command = "command",
        /// The number that the server at `url` returns.
        Http = "http",
        /// The reward model's score.
        Model = "model",
    }
}

choice! {
    /// How an answer of GSM8K's form is found.
    pub enum AnswerForm {
        /// The number after the last `####` with a number after it.
        Strict = "strict",
        /// The last number of the text.
        Flexible = "flexible",
    }
}

impl RewardTerm {
    /// Of a kind that needs nothing else, with weight 1.
    pub fn new(kind: RewardKind) -> RewardTerm {
        RewardTerm {
            kind,
            weight: 1.0,
            form: None,
            pattern: None,
            most: None,
            buffer: None,
            run: None,
            url: None,
            timeout_s: None,
            workers: None,
            batch: None,
        }
    }

    /// What is missing, or belongs to another kind; keys are those of this reward.
    pub fn conflicts(&self, found: &mut Conflicts) {
        use RewardKind::*;
        let kind = self.kind.name();
        let keys = [
            ("form", Gsm8k, self.form.is_some()),
            ("pattern", Format, self.pattern.is_some()),
            ("most", Length, self.most.is_some()),
            ("buffer", Length, self.buffer.is_some()),
            ("run", Command, self.run.is_some()),
            ("url", Http, self.url.is_some()),
        ];
        for (key, of, _) in keys.iter().filter(|(_, of, given)| *given && *of != self.kind) {
            found.add(*key, format!("is of the kind {}, and this one is {kind}", of.name()));
        }
        let of_programs = [
            ("timeout_s", self.timeout_s.is_some()),
            ("workers", self.workers.is_some()),
            ("batch", self.batch.is_some()),
        ];
        for (key, _) in
            of_programs.iter().filter(|(_, given)| *given && ![Command, Http].contains(&self.kind))
        {
            found.add(*key, format!("is of the kinds command and http, and this one is {kind}"));
        }
        if self.url.as_ref().is_some_and(|url| !url.starts_with("http://")) {
            found.add(
                "url",
                "must begin with http:// (https is not built: put a proxy on this host in between)",
            );
        }
        let missing = match self.kind {
            Format => self.pattern.is_none().then_some(("pattern", "what must occur in the response")),
            Length => self.most.is_none().then_some(("most", "the tokens that a response may have")),
            Command => self.run.is_none().then_some(("run", "the command")),
            Http => self.url.is_none().then_some(("url", "the server's address")),
            Gsm8k | Math | Model => None,
        };
        if let Some((key, what)) = missing {
            found.add(key, format!("a reward of the kind {kind} needs {key}: {what}"));
        }
        if let (Some(most), Some(buffer)) = (self.most, self.buffer)
            && buffer > most
        {
            found.add("buffer", format!("a buffer of {buffer} tokens is more than the {most} of 'most'"));
        }
    }
}
