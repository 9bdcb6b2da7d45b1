//! Typed YAML: load, override, check.

pub mod shape;
