//! A program that judges: a line of JSON in, a line of JSON out, one process for the whole run.

use std::io::{BufRead, BufReader, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use serde_json::{Value, json};

use super::Answer;
use super::keeper::KeptProcess;
use crate::error::{Context, Error, Result};

const DEFAULT_TIMEOUT_S: f64 = 60.0;

/// What the program is asked is `{"prompt", "response", "reference", "num_tokens", "record"}`; it answers a number,
/// `{"reward": number}`, or null for what it cannot judge. Its stderr is the run's.
pub struct CommandReward {
    run: String,
    timeout: Duration,
    /// Lines to its stdin: a thread writes them, so that a program that does not read runs into the time-out, too. First of
    /// the fields: the program's input ends, and it may end by itself, before it is ended.
    questions: Sender<String>,
    answers: Receiver<String>,
    program: KeptProcess,
}

impl CommandReward {
    /// Starts `sh -c run`. It ends with this process, and so does what it starts.
    pub fn start(run: &str, timeout_s: Option<f64>) -> Result<CommandReward> {
        let mut program =
            KeptProcess::start(run).context("cannot start sh for a reward of the kind command")?;
        let (Some(mut stdin), Some(stdout)) = (program.child.stdin.take(), program.child.stdout.take())
        else {
            return Err(Error::failed("a reward's command has no pipes"));
        };
        let (questions, to_write) = channel::<String>();
        let (read, answers) = channel::<String>();
        std::thread::spawn(move || {
            // The end of a program shows where its answer is waited for.
            for line in to_write {
                if stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush()).is_err() {
                    return;
                }
            }
        });
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let Ok(line) = line else { return };
                if read.send(line).is_err() {
                    return;
                }
            }
        });
        let timeout = Duration::try_from_secs_f64(timeout_s.unwrap_or(DEFAULT_TIMEOUT_S));
        let timeout = timeout.map_err(|_| Error::key("rewards", "timeout_s is too long"))?;
        Ok(CommandReward { run: run.to_string(), timeout, questions, answers, program })
    }

    /// The program's number for an answer; none where it says null.
    pub fn judge(&mut self, answer: &Answer) -> Result<Option<f64>> {
        if let Ok(line) = self.answers.try_recv() {
            return Err(self.failed(&format!("wrote a line before it was asked: {}", shown(&line))));
        }
        let question = json!({
            "prompt": answer.prompt,
            "response": answer.response,
            "reference": answer.reference,
            "num_tokens": answer.num_tokens,
            "record": answer.record,
        });
        // A writer that is gone is a program that is gone, which the answer tells.
        let _ = self.questions.send(format!("{question}\n"));
        let line = match self.answers.recv_timeout(self.timeout) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                let seconds = self.timeout.as_secs_f64();
                return Err(self.failed(&format!("gave no answer within {seconds} s (timeout_s)")));
            }
            Err(RecvTimeoutError::Disconnected) => {
                let end = match self.program.child.wait() {
                    Ok(status) => status.to_string(),
                    Err(e) => e.to_string(),
                };
                return Err(self.failed(&format!("ended without an answer ({end})")));
            }
        };
        let value: Value = serde_json::from_str(&line)
            .map_err(|e| self.failed(&format!("wrote {}, which is no JSON: {e}", shown(&line))))?;
        let reward = match &value {
            Value::Object(object) => object.get("reward"),
            other => Some(other),
        };
        match reward {
            Some(Value::Null) => Ok(None),
            Some(Value::Number(n)) => Ok(n.as_f64()),
            _ => Err(self.failed(&format!("wrote {}: no number and no `reward` with one", shown(&line)))),
        }
    }

    fn failed(&self, what: &str) -> Error {
        Error::failed(format!("the reward's command `{}` {what}", self.run))
    }
}

/// The beginning of a line, for messages.
fn shown(line: &str) -> String {
    let begin: String = line.chars().take(80).collect();
    format!("`{begin}`")
}
