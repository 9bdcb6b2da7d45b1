//! From text to batches: readers, tokenizer, token shards, a loader with an exact position, and the built-in
//! word problems.

pub(crate) mod arrow;
pub mod chat;
pub mod conversation;
pub(crate) mod examples;
pub(crate) mod feedback;
pub(crate) mod fields;
mod jinja;
pub(crate) mod loader;
mod mapped;
pub(crate) mod message;
pub(crate) mod odd;
pub(crate) mod order;
pub(crate) mod packing;
pub(crate) mod position;
pub(crate) mod preferences;
pub(crate) mod prompts;
pub(crate) mod readers;
pub(crate) mod rows;
pub(crate) mod sequence_values;
pub mod shards;
pub(crate) mod supervised;
pub(crate) mod synth;
pub(crate) mod texts;
pub(crate) mod tokenize;
pub mod tokenizer;
