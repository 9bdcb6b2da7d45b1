//! Typed YAML: load, override, check. All that is wrong is told at once, each with its place: `FILE:LINE:COLUMN`, or the override.
//!
//! A section is declared once (`section!`): its keys with types, defaults, ranges, meaning, and what a change of each does.
//!
//! Relative paths in a configuration are relative to the current directory, not to the file.

pub(crate) mod algorithm;
pub(crate) mod changes;
pub(crate) mod common;
pub(crate) mod conflict;
pub(crate) mod defaults;
pub mod dpo;
pub(crate) mod foreign;
pub(crate) mod grpo;
pub(crate) mod json;
pub(crate) mod keys;
pub mod kto;
pub(crate) mod model;
pub(crate) mod models;
pub(crate) mod online_dpo;
pub mod parallel;
pub(crate) mod policy;
pub(crate) mod ppo;
pub(crate) mod preferences;
mod presets;
pub(crate) mod pretrain;
mod problems;
pub(crate) mod prompts;
pub mod reward;
pub(crate) mod rewards;
pub mod rollout;
mod section;
pub mod sections;
mod setting;
pub(crate) mod sft;
pub mod shape;
pub(crate) mod template_date;
#[cfg(test)]
mod tests;
pub mod trainable;
mod yaml;

pub(crate) use algorithm::{Algorithm, Loaded, load, load_text};
pub(crate) use conflict::Conflicts;
pub(crate) use problems::nearest;
pub(crate) use setting::Setting;
