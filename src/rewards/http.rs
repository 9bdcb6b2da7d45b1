//! A server that judges: the questions and answers of a command, by HTTP.

use serde_json::Value;
use ureq::Agent;

use super::Answer;
use super::protocol::{batch_of, question, reward_of, rewards_of, shown, timeout};
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
        let agent = Agent::config_builder().timeout_global(Some(timeout(timeout_s)?)).build().new_agent();
        Ok(HttpReward { url: url.into(), agent, workers: workers.max(1), batch })
    }

    /// The server's numbers for some answers; none where it says null.
    pub fn score(&self, answers: &[Answer]) -> Result<Vec<Option<f64>>> {
        let count = answers.len().div_ceil(self.workers).max(1);
        let asked: Vec<Result<Vec<Option<f64>>>> = std::thread::scope(|scope| {
            let requests: Vec<_> =
                answers.chunks(count).map(|part| scope.spawn(move || self.request(part))).collect();
            let ended = |request: std::thread::ScopedJoinHandle<'_, Result<Vec<Option<f64>>>>| {
                request
                    .join()
                    .unwrap_or_else(|_| Err(Error::failed("a request to the reward's server failed")))
            };
            requests.into_iter().map(ended).collect()
        });
        Ok(asked.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    fn request(&self, answers: &[Answer]) -> Result<Vec<Option<f64>>> {
        if self.batch {
            let value = self.post(&batch_of(answers.iter()))?;
            return rewards_of(&value, answers.len()).map_err(|why| self.wrote(&value, &why));
        }
        let one = |answer: &Answer| {
            let value = self.post(&question(answer))?;
            reward_of(&value).map_err(|why| self.wrote(&value, &why))
        };
        answers.iter().map(one).collect()
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
