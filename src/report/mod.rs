//! A run's folder, read back: its numbers, a summary at its end, a table of runs, a page of curves.

pub mod curve;
pub mod page;
pub mod run;
pub mod summary;
