//! What programs and servers that judge are asked, and what they answer.

use std::time::Duration;

use serde_json::{Value, json};

use super::Answer;
use crate::error::{Error, Result as CheckedResult};

/// Seconds that an answer may take where the configuration does not say.
const DEFAULT_TIMEOUT_S: f64 = 60.0;

/// The longest that an answer may take.
///
/// # Errors
/// Of kind Config: more than a clock can tell.
pub fn timeout(timeout_s: Option<f64>) -> CheckedResult<Duration> {
    Duration::try_from_secs_f64(timeout_s.unwrap_or(DEFAULT_TIMEOUT_S))
        .map_err(|_| Error::key("rewards", "timeout_s is too long"))
}

/// One response: `{"prompt", "response", "reference", "num_tokens", "record"}`.
pub fn question(answer: &Answer) -> Value {
    json!({
        "prompt": answer.prompt,
        "response": answer.response,
        "reference": answer.reference,
        "num_tokens": answer.num_tokens,
        "record": answer.record,
    })
}

/// Several responses at once: an array.
pub fn batch_of<'a>(answers: impl Iterator<Item = &'a Answer<'a>>) -> Value {
    Value::Array(answers.map(question).collect())
}

/// The reward in an answer: a number, `{"reward": number}`, or null for what cannot be judged.
///
/// # Errors
/// Why it is none of these.
pub fn reward_of(value: &Value) -> Result<Option<f64>, String> {
    let reward = match value {
        Value::Object(object) => object.get("reward"),
        other => Some(other),
    };
    match reward {
        Some(Value::Null) => Ok(None),
        Some(Value::Number(n)) => Ok(n.as_f64()),
        _ => Err("which has no number and no `reward` with one".into()),
    }
}

/// The rewards in the answer to an array of `count` responses: an array of as many, or `{"rewards": array}`.
///
/// # Errors
/// Why it is neither.
pub fn rewards_of(value: &Value, count: usize) -> Result<Vec<Option<f64>>, String> {
    let list = match value {
        Value::Object(object) => object.get("rewards").and_then(Value::as_array),
        other => other.as_array(),
    };
    let list = list.ok_or("which is no array of rewards (batch: true)")?;
    if list.len() != count {
        return Err(format!("which has {} rewards for {count} responses", list.len()));
    }
    list.iter().map(reward_of).collect()
}

/// The beginning of a line, for messages.
pub fn shown(line: &str) -> String {
    let begin: String = line.chars().take(80).collect();
    format!("`{begin}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewards_are_numbers_objects_or_null() {
        assert_eq!(reward_of(&json!(0.5)), Ok(Some(0.5)));
        assert_eq!(reward_of(&json!({"reward": 2, "why": "x"})), Ok(Some(2.0)));
        assert_eq!(reward_of(&json!(null)), Ok(None));
        assert!(reward_of(&json!("good")).is_err() && reward_of(&json!({})).is_err());
        assert_eq!(rewards_of(&json!([1, null, {"reward": 0}]), 3), Ok(vec![Some(1.0), None, Some(0.0)]));
        assert_eq!(rewards_of(&json!({"rewards": [1]}), 1), Ok(vec![Some(1.0)]));
        assert!(rewards_of(&json!([1]), 2).unwrap_err().contains("1 rewards for 2 responses"));
        assert!(rewards_of(&json!(1), 1).is_err());
    }
}
