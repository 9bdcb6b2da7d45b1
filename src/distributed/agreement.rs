//! What must be the same on all ranks: told to each other at the start, before the first collective.

use std::time::Duration;

use kernels::watch::Watch;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// Keys of a configuration and flags of the command line that may differ from rank to rank, with all below them: where a rank
/// computes, what it prints, where its caches lie. All others are the same on all ranks.
/// (Of a date that templates are told that of rank 0 counts.)
const MAY_DIFFER: [&str; 8] =
    ["device", "threads", "log", "log-format", "quiet", "verbose", "data.cache", "data.template_date"];

/// Paths that are read: they may differ, since what lies there is compared.
const READ: [&str; 14] = [
    "config",
    "overrides",
    "model",
    "reference",
    "input",
    "model.path",
    "actor.path",
    "critic.path",
    "reference.path",
    "reward_model.path",
    "tokenizer.path",
    "data.train",
    "data.valid",
    "ppo.ptx.data",
];

/// The longest value that is shown whole.
const SHOWN: usize = 120;

/// Names and values that all ranks must have alike, in the order in which they are compared.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    host: String,
    facts: Vec<(String, String)>,
}

impl Facts {
    /// Of every command: the program itself.
    pub fn new() -> Facts {
        let version = format!("{} of source {}", env!("CARGO_PKG_VERSION"), env!("CORRAL_SOURCE"));
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Facts { host: host.trim().into(), facts: vec![("version".into(), version)] }
    }

    /// Adds what must be equal on all ranks, unless `key` is one of those that may differ between them.
    pub fn add(&mut self, key: impl Into<String>, value: impl Into<String>) {
        let key = key.into();
        if !MAY_DIFFER.iter().any(|free| covers(free, &key)) {
            self.facts.push((key, value.into()));
        }
    }

    /// A flag of the command line, or its words, as they were given.
    pub fn add_flag(&mut self, name: &str, values: &str) {
        if !READ.contains(&name) {
            self.add(format!("--{name}"), values);
        }
    }

    /// What lies at a path, as its fingerprint.
    pub fn add_contents(&mut self, of: &str, fingerprint: &str) {
        self.add(format!("the contents of {of}"), fingerprint);
    }

    /// All keys of a configuration but the paths that are read.
    pub fn add_configuration(&mut self, configuration: &Value) {
        self.flatten("", configuration);
    }

    fn flatten(&mut self, key: &str, value: &Value) {
        let below = |name: &str| if key.is_empty() { name.to_string() } else { format!("{key}.{name}") };
        match value {
            Value::Object(section) => {
                section.iter().for_each(|(name, value)| self.flatten(&below(name), value))
            }
            Value::Array(list)
                if list.iter().any(|v| v.is_object() || v.is_array() || READ.contains(&key)) =>
            {
                list.iter().enumerate().for_each(|(i, value)| self.flatten(&below(&i.to_string()), value));
            }
            Value::String(_) if READ.iter().any(|read| read.contains('.') && covers(read, key)) => {}
            Value::String(text) => self.add(key, text.as_str()),
            other => self.add(key, other.to_string()),
        }
    }

    /// The values of a key; a flag may be given several times.
    fn value(&self, key: &str) -> Option<String> {
        let values: Vec<&str> =
            self.facts.iter().filter(|(k, _)| k == key).map(|(_, v)| v.as_str()).collect();
        (!values.is_empty()).then(|| values.join(" "))
    }

    /// The first key that another rank has otherwise.
    fn first_difference<'a>(&'a self, other: &'a Facts) -> Option<&'a str> {
        let mine = self.facts.iter().find(|(key, _)| other.value(key) != self.value(key));
        let theirs = || other.facts.iter().find(|(key, _)| self.value(key).is_none());
        mine.or_else(theirs).map(|(key, _)| key.as_str())
    }
}

impl Default for Facts {
    fn default() -> Self {
        Facts::new()
    }
}

/// Whether `key` is `name` or below it; the last part of a key may be the name, too (`actor.device`).
fn covers(name: &str, key: &str) -> bool {
    let key = key.trim_start_matches("--");
    let below = key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    below || (!name.contains('.') && key.rsplit('.').next() == Some(name))
}

/// What the first rank that differs from rank 0 has otherwise, in words.
fn compare(all: &[Facts]) -> Option<String> {
    let first = all.first()?;
    let differing: Vec<(usize, &Facts, &str)> = all
        .iter()
        .enumerate()
        .skip(1)
        .filter_map(|(rank, facts)| Some((rank, facts, first.first_difference(facts)?)))
        .collect();
    let (rank, facts, key) = differing.first()?;
    let shown = |facts: &Facts| match facts.value(key) {
        None => "not given".to_string(),
        Some(value) if value.chars().count() > SHOWN => {
            format!("{}...", value.chars().take(SHOWN).collect::<String>())
        }
        Some(value) => value,
    };
    let others = match differing.len() - 1 {
        0 => String::new(),
        1 => " (one more rank differs)".into(),
        n => format!(" ({n} more ranks differ)"),
    };
    Some(format!(
        "ranks differ: {key} is {} on rank {rank} (host {}), {} on rank 0 (host {}){others}; start all ranks with the same \
         configuration, data, models and program",
        shown(facts),
        facts.host,
        shown(first),
        first.host
    ))
}

/// Refuses to go on, on all ranks, where any has other facts than rank 0.
///
/// # Errors
/// Of kind Config, with the rank, its host, the first key that differs, and both values; or ranks that did not come.
pub fn agree_on(watch: &Watch, facts: &Facts, timeout: Duration) -> Result<()> {
    let mine = serde_json::to_vec(facts).map_err(|e| Error::failed(e.to_string()))?;
    let found = watch.compare(mine, timeout, |all| {
        let read = |bytes: &Vec<u8>| serde_json::from_slice::<Facts>(bytes);
        match all.iter().map(read).collect::<std::result::Result<Vec<_>, _>>() {
            Ok(all) => compare(&all),
            Err(e) => Some(format!("ranks differ: the description of one rank cannot be read ({e})")),
        }
    })?;
    found.map_or(Ok(()), |what| Err(Error::config(what)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn facts(host: &str, configuration: Value) -> Facts {
        let mut facts = Facts { host: host.into(), facts: Vec::new() };
        facts.add_configuration(&configuration);
        facts
    }

    fn configuration(change: &str, value: Value) -> Value {
        let mut c = json!({
            "seed": 1,
            "model": {"path": "/a/model"},
            "data": {"train": ["/a/x", {"path": "/a/y", "weight": 2.0}], "sequence_length": 64, "cache": "/a"},
            "optim": {"lr": 3e-4, "betas": [0.9, 0.95]},
            "actor": {"device": "cuda:0"},
            "log": {"every": 1},
        });
        *c.pointer_mut(change).unwrap() = value;
        c
    }

    fn difference(change: &str, value: Value) -> Option<String> {
        let same = || facts("one", configuration("/seed", json!(1)));
        compare(&[same(), same(), facts("two", configuration(change, value)), same()])
    }

    #[test]
    fn the_first_key_that_differs_is_told() {
        for (change, value, words) in [
            ("/seed", json!(2), "seed is 2 on rank 2 (host two), 1 on rank 0 (host one);"),
            ("/optim/lr", json!(1e-3), "optim.lr is 0.001 on rank 2"),
            ("/optim/betas", json!([0.9, 0.99]), "optim.betas is [0.9,0.99] on rank 2"),
            ("/data/sequence_length", json!(128), "data.sequence_length is 128 on rank 2"),
            ("/data/train/1/weight", json!(3.0), "data.train.1.weight is 3.0 on rank 2"),
            (
                "/model",
                json!({"preset": "llama-15m"}),
                "model.preset is llama-15m on rank 2 (host two), not given on",
            ),
        ] {
            let found = difference(change, value).unwrap_or_default();
            assert!(found.contains(words), "{change}: {found}");
        }
    }

    #[test]
    fn what_belongs_to_a_rank_may_differ() {
        for (change, value) in [
            ("/actor/device", json!("cuda:1")),
            ("/log/every", json!(10)),
            ("/data/cache", json!("/b")),
            ("/model/path", json!("/b/model")),
            ("/data/train/0", json!("/b/x")),
            ("/data/train/1/path", json!("/b/y")),
        ] {
            assert_eq!(difference(change, value), None, "{change}");
        }
    }

    #[test]
    fn flags_are_compared_but_for_those_of_a_rank() {
        let given = |flags: &[(&str, &str)]| {
            let mut facts = facts("h", json!({}));
            flags.iter().for_each(|(name, value)| facts.add_flag(name, value));
            facts
        };
        let rank_0 = [("model", "/a"), ("device", "cuda"), ("seed", "1")];
        assert_eq!(compare(&[given(&rank_0), given(&[("model", "/b"), ("seed", "1")])]), None);
        let found = compare(&[given(&rank_0), given(&[("seed", "1"), ("top-k", "3")])]).unwrap();
        assert!(found.contains("--top-k is 3 on rank 1 (host h), not given on rank 0"), "{found}");
    }

    #[test]
    fn all_that_differ_are_counted() {
        let other = || facts("two", configuration("/seed", json!(2)));
        let all = [facts("one", configuration("/seed", json!(1))), other(), other(), other()];
        assert!(
            compare(&all)
                .unwrap()
                .contains("on rank 1 (host two), 1 on rank 0 (host one) (2 more ranks differ)")
        );
    }
}
