//! What the models of a run were when it began, as its checkpoints note them: a run that goes on with others is refused.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// A model that a run reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// What it is in the run: `model`, `reference`, `reward_model`, ...
    pub name: String,
    /// The configuration key that names it.
    pub key: String,
    /// Its path, or its hub id.
    pub path: String,
    /// The hash of its tensors that are not trained; none where all are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    /// What else it consists of: its `shape`, and of some an adapter's settings, a tokenizer, how scores become rewards.
    pub details: Value,
}

impl ModelRecord {
    /// Refuses another model than the `earlier` one of the checkpoint in `dir`.
    ///
    /// # Errors
    /// Of kind Data, with both hashes, or both values of the first detail that differs.
    pub fn check(&self, earlier: &ModelRecord, dir: &Path) -> Result<()> {
        let differs = match (&self.hash, &earlier.hash) {
            (Some(now), Some(then)) if now != then => {
                Some(format!("the hash of its tensors was {then} (of {}) and is {now} now", earlier.path))
            }
            _ => first_difference("", &earlier.details, &self.details)
                .map(|(key, then, now)| format!("its {key} was {then} and is {now} now")),
        };
        let Some(differs) = differs else { return Ok(()) };
        let what = match self.key == format!("{}.path", self.name) {
            true => self.key.clone(),
            false => format!("the {} ({})", self.name.replace('_', " "), self.key),
        };
        Err(Error::data(format!(
            "{what}: {} is another model than the one that the run of {} began with: {differs}; restore that model, or start a \
             new run from the weights alone (model.path or actor.path, in another output_dir)",
            self.path,
            dir.display()
        )))
    }
}

/// The first key of two objects that has other values, by its path; keys that only one of them has are newer than the other.
fn first_difference(at: &str, then: &Value, now: &Value) -> Option<(String, String, String)> {
    match (then, now) {
        (Value::Object(a), Value::Object(b)) => a.iter().find_map(|(key, then)| {
            let at = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
            first_difference(&at, then, b.get(key)?)
        }),
        _ if then == now => None,
        _ => Some((at.to_string(), then.to_string(), now.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn another_model_is_refused_with_what_differs() {
        let record = |hash: Option<&str>, details: Value| ModelRecord {
            name: "reward_model".into(),
            key: "reward_model.path".into(),
            path: "rm".into(),
            hash: hash.map(str::to_string),
            details,
        };
        let then = record(Some("11"), json!({"shape": {"rope_theta": 1.0, "gone": 2}, "bias": 0.5}));
        let check = |now: &ModelRecord| now.check(&then, Path::new("step-3"));
        let same = record(Some("11"), json!({"bias": 0.5, "shape": {"rope_theta": 1.0, "new": 3}}));
        check(&same).unwrap();
        check(&record(None, same.details.clone())).unwrap();
        let e = check(&record(Some("22"), same.details.clone())).unwrap_err();
        assert_eq!(e.exit_code(), 3);
        for part in ["reward_model.path: rm is another", "was 11 (of rm) and is 22 now", "step-3"] {
            assert!(e.message.contains(part), "{e}");
        }
        let e = check(&record(Some("11"), json!({"shape": {"rope_theta": 4.0}}))).unwrap_err();
        assert!(e.message.contains("its shape.rope_theta was 1.0 and is 4.0 now"), "{e}");
        let of_actor = ModelRecord {
            name: "reference".into(),
            key: "actor.path".into(),
            ..record(Some("22"), json!({}))
        };
        let e = check(&of_actor).unwrap_err();
        assert!(e.message.contains("the reference (actor.path): rm is"), "{e}");
    }
}
