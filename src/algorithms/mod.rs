//! One file an algorithm, and the few pieces they share.

pub mod step;
