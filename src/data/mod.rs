//! From text to batches: readers, tokenizer, token shards, a loader with an exact position, and the built-in
//! word problems.

pub mod arrow;
pub mod chat;
pub mod conversation;
pub mod examples;
pub mod feedback;
pub mod fields;
mod jinja;
pub mod loader;
mod mapped;
pub mod message;
pub mod odd;
pub mod order;
pub mod packing;
pub mod position;
pub mod preferences;
pub mod prompts;
pub mod readers;
pub mod rows;
pub mod sequence_values;
pub mod shards;
pub mod supervised;
pub mod synth;
pub mod texts;
pub mod tokenize;
pub mod tokenizer;
