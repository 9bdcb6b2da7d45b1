//! Typed YAML: load, override, check. Whatever is wrong is told with its place: `FILE:LINE:COLUMN`, or the override.
//!
//! Relative paths in a configuration are relative to the current directory, not to the file.

pub mod algorithm;
pub mod changes;
pub mod common;
pub mod conflict;
mod de;
pub mod dpo;
pub mod grpo;
pub mod kto;
pub mod model;
pub mod models;
mod numbers;
pub mod online_dpo;
pub mod parallel;
pub mod policy;
pub mod ppo;
pub mod preferences;
mod presets;
pub mod pretrain;
pub mod prompts;
pub mod reward;
pub mod rewards;
pub mod rollout;
pub mod sections;
pub mod sft;
pub mod shape;
pub mod template_date;
#[cfg(test)]
mod tests;
pub mod trainable;
mod yaml;

pub use algorithm::{Algorithm, BuiltIn, Loaded, load};
pub use conflict::Conflict;
