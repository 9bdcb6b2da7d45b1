//! One file a subcommand: its arguments and `run`.

pub mod data;
pub mod tokenize;
pub mod tokenizer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Shows a bar of `done` of `total` bytes while `work` runs, if stderr is a terminal.
fn with_bytes_bar<T>(what: &'static str, total: u64, done: &Arc<AtomicU64>, work: impl FnOnce() -> T) -> T {
    let bar = indicatif::ProgressBar::new(total).with_message(what);
    let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = indicatif::ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    let (ticking, done) = (bar.clone(), done.clone());
    let ticker = std::thread::spawn(move || {
        while !ticking.is_finished() {
            ticking.set_position(done.load(Relaxed));
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    });
    let result = work();
    bar.finish_and_clear();
    // A failure of the bar is no failure of the work.
    let _ = ticker.join();
    result
}
