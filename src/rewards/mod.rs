//! Rules that judge an answer.

pub mod gsm8k;
