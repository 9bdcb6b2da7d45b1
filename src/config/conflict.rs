//! Keys that do not fit each other.

/// A key that does not fit the others, and why.
pub type Conflict = (&'static str, String);
