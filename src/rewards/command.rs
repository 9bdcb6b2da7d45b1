//! A program that judges: a line of JSON in, a line of JSON out, some processes for the whole run.

use std::io::{BufRead, BufReader, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use serde_json::Value;

use super::Answer;
use super::keeper::KeptProcess;
use super::protocol::{batch_of, question, reward_of, rewards_of, shown, timeout};
use crate::error::{Context, Error, Result};
use crate::telemetry::console::warn_once;

/// Processes of one program, which are asked in turns.
pub struct CommandReward {
    run: String,
    timeout: Duration,
    /// All responses of a process in one line.
    batch: bool,
    workers: Vec<Worker>,
}

/// One of the processes.
struct Worker {
    /// Lines to its stdin: a thread writes them, so that a program that does not read runs into the time-out, too. First of
    /// the fields: the program's input ends, and it may end by itself, before it is ended.
    questions: Sender<String>,
    answers: Receiver<String>,
    /// It has answered: what it writes from now on is an answer.
    answered: bool,
    program: KeptProcess,
}

impl CommandReward {
    /// Starts `sh -c run` `workers` times. They end with this process, and so does what they start. `batch`: a process is
    /// given all its responses as one array, and answers with an array.
    pub fn start(run: &str, timeout_s: Option<f64>, workers: usize, batch: bool) -> Result<CommandReward> {
        let timeout = timeout(timeout_s)?;
        let workers = (0..workers.max(1)).map(|_| Worker::start(run)).collect::<Result<Vec<Worker>>>()?;
        Ok(CommandReward { run: run.to_string(), timeout, batch, workers })
    }

    /// The program's numbers for some answers; none where it says null.
    pub fn score(&mut self, answers: &[Answer]) -> Result<Vec<Option<f64>>> {
        let workers = self.workers.len();
        let mut rewards = vec![None; answers.len()];
        if self.batch {
            let mine = |worker: usize| (worker..answers.len()).step_by(workers).collect::<Vec<usize>>();
            let asked: Vec<Vec<usize>> = (0..workers).map(mine).filter(|mine| !mine.is_empty()).collect();
            for (worker, mine) in asked.iter().enumerate() {
                self.request(worker, &batch_of(mine.iter().map(|i| &answers[*i])))?;
            }
            for (worker, mine) in asked.iter().enumerate() {
                let (line, value) = self.answer(worker)?;
                let got = rewards_of(&value, mine.len()).map_err(|why| self.wrote(worker, &line, &why))?;
                mine.iter().zip(got).for_each(|(i, reward)| rewards[*i] = reward);
            }
            return Ok(rewards);
        }
        for (round, some) in answers.chunks(workers).enumerate() {
            for (worker, answer) in some.iter().enumerate() {
                self.request(worker, &question(answer))?;
            }
            for worker in 0..some.len() {
                let (line, value) = self.answer(worker)?;
                rewards[round * workers + worker] =
                    reward_of(&value).map_err(|why| self.wrote(worker, &line, &why))?;
            }
        }
        Ok(rewards)
    }

    fn request(&mut self, worker: usize, question: &Value) -> Result<()> {
        while let Ok(line) = self.workers[worker].answers.try_recv() {
            if self.workers[worker].answered || serde_json::from_str::<Value>(&line).is_ok() {
                return Err(self.failed(worker, &format!("wrote a line without a request: {}", shown(&line))));
            }
            self.leave_out(&line);
        }
        // A writer that is gone is a program that is gone, which the answer tells.
        let _ = self.workers[worker].questions.send(format!("{question}\n"));
        Ok(())
    }

    /// The next answer of a process, as it was written and as JSON. What is no JSON before its first answer (a greeting, the
    /// log of a library) is left out with a warning.
    fn answer(&mut self, worker: usize) -> Result<(String, Value)> {
        loop {
            let line = match self.workers[worker].answers.recv_timeout(self.timeout) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = self.timeout.as_secs_f64();
                    return Err(self.failed(
                        worker,
                        &format!(
                            "gave no answer within {seconds} s (timeout_s); a program that buffers what it writes must flush after \
                             each line (Python: print(..., flush=True))"
                        ),
                    ));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let end = match self.workers[worker].program.child.wait() {
                        Ok(status) => status.to_string(),
                        Err(e) => e.to_string(),
                    };
                    return Err(self.failed(worker, &format!("ended without an answer ({end})")));
                }
            };
            match serde_json::from_str::<Value>(&line) {
                Ok(value) => {
                    self.workers[worker].answered = true;
                    return Ok((line, value));
                }
                Err(e) if self.workers[worker].answered => {
                    return Err(self.wrote(worker, &line, &format!("which is no JSON: {e}")));
                }
                Err(_) => self.leave_out(&line),
            }
        }
    }

    fn leave_out(&self, line: &str) {
        let run = &self.run;
        warn_once(&format!(
            "the reward's command `{run}` wrote {} before its first answer: it is ignored",
            shown(line)
        ));
    }

    fn wrote(&self, worker: usize, line: &str, why: &str) -> Error {
        self.failed(worker, &format!("wrote {}, {why}", shown(line)))
    }

    fn failed(&self, worker: usize, what: &str) -> Error {
        let which = match self.workers.len() {
            1 => String::new(),
            n => format!(" (process {} of {n})", worker + 1),
        };
        let said = self.workers[worker].program.last_errors();
        let errors =
            if said.is_empty() { String::new() } else { format!("; its last lines on stderr:\n{said}") };
        Error::failed(format!("the reward's command `{}`{which} {what}{errors}", self.run))
    }
}

impl Worker {
    fn start(run: &str) -> Result<Worker> {
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
        Ok(Worker { questions, answers, answered: false, program })
    }
}
