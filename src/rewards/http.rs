//! A server that judges: the questions and answers of a command, by HTTP.

use std::time::Duration;

use serde_json::Value;
use ureq::Agent;

use super::Answer;
use super::command::DEFAULT_TIMEOUT_S;
use super::protocol::{batch_of, question, reward_of, rewards_of, shown};
use crate::error::{Error, Result};

/// A server, and how it is asked.
pub struct HttpReward {
    url: String,
    agent: Agent,
    /// Requests at once.
    workers: usize,
    /// All responses of a worker in one request.
    batch: bool,
}

impl HttpReward {
    /// Nothing is sent yet.
    pub fn new(url: &str, timeout_s: Option<f64>, workers: usize, batch: bool) -> Result<HttpReward> {
        let timeout = Duration::try_from_secs_f64(timeout_s.unwrap_or(DEFAULT_TIMEOUT_S));
        let timeout = timeout.map_err(|_| Error::key("rewards", "timeout_s is too long"))?;
        let agent = Agent::config_builder().timeout_global(Some(timeout)).build().new_agent();
        Ok(HttpReward { url: url.into(), agent, workers: workers.max(1), batch })
    }

    /// The server's numbers for some answers; none where it says null.
    pub fn judge(&self, answers: &[Answer]) -> Result<Vec<Option<f64>>> {
        let questions: Vec<Value> = answers.iter().map(question).collect();
        let count = answers.len().div_ceil(self.workers).max(1);
        let asked: Vec<Result<Vec<Option<f64>>>> = std::thread::scope(|scope| {
            let requests: Vec<_> = questions
                .chunks(count)
                .zip(answers.chunks(count))
                .map(|(questions, answers)| scope.spawn(move || self.ask(questions, answers)))
                .collect();
            let ended = |request: std::thread::ScopedJoinHandle<'_, Result<Vec<Option<f64>>>>| {
                request
                    .join()
                    .unwrap_or_else(|_| Err(Error::failed("a request to the reward's server failed")))
            };
            requests.into_iter().map(ended).collect()
        });
        Ok(asked.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    fn ask(&self, questions: &[Value], answers: &[Answer]) -> Result<Vec<Option<f64>>> {
        if self.batch {
            let value = self.post(&batch_of(answers.iter()))?;
            return rewards_of(&value, answers.len()).map_err(|why| self.wrote(&value, &why));
        }
        let one = |question: &Value| {
            let value = self.post(question)?;
            reward_of(&value).map_err(|why| self.wrote(&value, &why))
        };
        questions.iter().map(one).collect()
    }

    fn post(&self, question: &Value) -> Result<Value> {
        let failed = |e: ureq::Error| Error::failed(format!("the reward's server {}: {e}", self.url));
        let mut response = self.agent.post(&self.url).send_json(question).map_err(failed)?;
        response.body_mut().read_json::<Value>().map_err(failed)
    }

    fn wrote(&self, value: &Value, why: &str) -> Error {
        Error::failed(format!(
            "the reward's server {} answered {}, {why}",
            self.url,
            shown(&value.to_string())
        ))
    }
}
