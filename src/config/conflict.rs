//! Keys that do not fit each other.

/// What does not fit: a dotted key each, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conflicts(Vec<(String, String)>);

impl Conflicts {
    /// `key` does not fit the others.
    pub fn add(&mut self, key: impl Into<String>, why: impl Into<String>) {
        self.0.push((key.into(), why.into()));
    }

    /// What is found in a section whose key is `path`.
    pub fn within(&mut self, path: &str, find: impl FnOnce(&mut Conflicts)) {
        let mut found = Conflicts::default();
        find(&mut found);
        self.0.extend(found.0.into_iter().map(|(key, why)| (super::yaml::join(path, &key), why)));
    }

    /// Leaves out what was said of `key`.
    pub fn forget(&mut self, key: &str) {
        self.0.retain(|(found, _)| found != key);
    }

    /// Each key with its reason.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, why)| (key.as_str(), why.as_str()))
    }
}
