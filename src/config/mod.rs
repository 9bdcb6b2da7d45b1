//! Typed YAML: load, override, check. All that is wrong is told at once, each with its place: `FILE:LINE:COLUMN`, or the override.
//!
//! A section is declared once (`section!`): its keys with types, defaults, ranges, meaning, and what a change of each does.
//!
//! Relative paths in a configuration are relative to the current directory, not to the file.

pub mod algorithm;
pub mod changes;
pub mod common;
pub mod conflict;
pub mod dpo;
pub mod grpo;
pub mod json;
pub mod keys;
pub mod kto;
pub mod model;
pub mod models;
pub mod online_dpo;
pub mod parallel;
pub mod policy;
pub mod ppo;
pub mod preferences;
mod presets;
pub mod pretrain;
mod problems;
pub mod prompts;
pub mod reward;
pub mod rewards;
pub mod rollout;
mod section;
pub mod sections;
mod setting;
pub mod sft;
pub mod shape;
pub mod template_date;
#[cfg(test)]
mod tests;
pub mod trainable;
mod yaml;

pub use algorithm::{Algorithm, BuiltIn, Loaded, load};
pub use conflict::Conflicts;
pub use problems::nearest;
pub use setting::Setting;
