//! How far a run is: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::console::{self, Format, Settings};

/// Plain lines, and what `launch` draws, come at most this often.
const LINE_INTERVAL: Duration = Duration::from_secs(1);
const DRAW_INTERVAL: Duration = Duration::from_millis(100);

/// The progress of a training run on stderr, from rank 0.
#[derive(Debug)]
pub struct Progress {
    display: Display,
    total: u64,
    /// The first update and its time: the rate that tells the time left leaves out what came before it.
    first: Option<(u64, Instant)>,
    printed: Option<Instant>,
    /// The last update, if it does not stand as a line.
    pending: Option<String>,
}

#[derive(Debug)]
enum Display {
    Nothing,
    Bar(ProgressBar),
    /// Under `launch`, which draws on the terminal what ends in a carriage return.
    Returns,
    Lines,
    Json,
}

impl Display {
    fn choose(settings: &Settings, terminal: bool, launch_terminal: bool) -> Self {
        match settings.format {
            _ if settings.quiet || settings.rank != 0 => Display::Nothing,
            Format::Json => Display::Json,
            Format::Pretty if terminal => Display::Bar(ProgressBar::no_length()),
            Format::Pretty if launch_terminal => Display::Returns,
            Format::Pretty => Display::Lines,
        }
    }
}

impl Progress {
    /// A run that has done `step` of `total` steps.
    pub fn start(step: u64, total: u64) -> Self {
        let launch_terminal = std::env::var_os("CORRAL_TTY").is_some_and(|v| v == "1");
        let display = Display::choose(&console::settings(), std::io::stderr().is_terminal(), launch_terminal);
        if let Display::Bar(bar) = &display {
            if let Ok(style) = ProgressStyle::with_template("{wide_bar} {msg}") {
                bar.set_style(style);
            }
            bar.set_length(total);
            bar.set_position(step);
            console::set_bar(Some(bar.clone()));
        }
        Progress { display, total, first: None, printed: None, pending: None }
    }

    /// After a step: the loss in nats, and the rate over all ranks; what is not known is left out.
    pub fn update(&mut self, step: u64, loss: Option<f64>, tokens_per_s: Option<f64>) {
        let now = Instant::now();
        let left_s = self.left_s(step, now);
        let text = match &self.display {
            Display::Nothing => return,
            Display::Json => {
                let rank = console::settings().rank;
                json!({"level": "progress", "step": step, "total_steps": self.total, "loss": loss,
                       "tokens_per_s": tokens_per_s, "left_s": left_s, "rank": rank})
                .to_string()
            }
            _ => describe(step, self.total, loss, tokens_per_s, left_s),
        };
        match &self.display {
            Display::Bar(bar) => {
                bar.set_position(step);
                bar.set_message(text.clone());
                self.pending = Some(text);
            }
            Display::Returns => {
                if self.is_due(DRAW_INTERVAL, step, now) {
                    console::write_stderr(&text, "\r");
                    self.printed = Some(now);
                }
                self.pending = Some(text);
            }
            _ if self.is_due(LINE_INTERVAL, step, now) => {
                console::write_stderr(&text, "\n");
                self.printed = Some(now);
                self.pending = None;
            }
            _ => self.pending = Some(text),
        }
    }

    fn is_due(&self, interval: Duration, step: u64, now: Instant) -> bool {
        step >= self.total || self.printed.is_none_or(|printed| now - printed >= interval)
    }

    fn left_s(&mut self, step: u64, now: Instant) -> Option<f64> {
        let (first_step, first_time) = *self.first.get_or_insert((step, now));
        let done = step.checked_sub(first_step).filter(|done| *done > 0)?;
        let left = self.total.saturating_sub(step);
        Some((now - first_time).as_secs_f64() / done as f64 * left as f64)
    }
}

/// The bar goes; the last state stays as a line.
impl Drop for Progress {
    fn drop(&mut self) {
        if let Display::Bar(bar) = &self.display {
            console::set_bar(None);
            bar.finish_and_clear();
        }
        if let Some(text) = self.pending.take() {
            console::write_stderr(&text, "\n");
        }
    }
}

fn describe(
    step: u64,
    total: u64,
    loss: Option<f64>,
    tokens_per_s: Option<f64>,
    left_s: Option<f64>,
) -> String {
    let mut text = format!("step {step:>width$}/{total}", width = total.to_string().len());
    if let Some(loss) = loss {
        text += &format!("  loss {loss:.4}");
    }
    if let Some(rate) = tokens_per_s {
        text += &format!("  {rate:.0} tokens/s");
    }
    if let Some(left_s) = left_s {
        text += &format!("  {} left", duration(left_s));
    }
    text
}

fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

/// Shows a bar of `done` of `total` bytes while `work` runs, if stderr is a terminal.
pub fn with_bytes_bar<T>(what: &str, total: u64, done: &Arc<AtomicU64>, work: impl FnOnce() -> T) -> T {
    let bar = ProgressBar::new(total).with_message(what.to_string());
    let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    let (ticking, done) = (bar.clone(), done.clone());
    let ticker = std::thread::spawn(move || {
        while !ticking.is_finished() {
            ticking.set_position(done.load(Relaxed));
            std::thread::sleep(DRAW_INTERVAL);
        }
    });
    let result = work();
    bar.finish_and_clear();
    // A failure of the bar is no failure of the work.
    let _ = ticker.join();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(display: Display) -> &'static str {
        match display {
            Display::Nothing => "nothing",
            Display::Bar(_) => "bar",
            Display::Returns => "returns",
            Display::Lines => "lines",
            Display::Json => "json",
        }
    }

    #[test]
    fn where_it_is_drawn() {
        let plain = Settings { format: Format::Pretty, quiet: false, verbose: false, rank: 0, world_size: 2 };
        let json = Settings { format: Format::Json, ..plain.clone() };
        let choose =
            |settings: &Settings, terminal, launch| name(Display::choose(settings, terminal, launch));
        assert_eq!(choose(&plain, true, false), "bar");
        assert_eq!(choose(&plain, false, true), "returns");
        assert_eq!(choose(&plain, false, false), "lines");
        assert_eq!(choose(&json, true, true), "json");
        assert_eq!(choose(&Settings { quiet: true, ..json }, true, true), "nothing");
        assert_eq!(choose(&Settings { rank: 1, ..plain }, true, true), "nothing");
    }

    #[test]
    fn what_it_says() {
        let text = describe(7, 400, Some(2.34567), Some(12345.6), Some(185.2));
        assert_eq!(text, "step   7/400  loss 2.3457  12346 tokens/s  3 min 05 s left");
        assert_eq!(describe(1, 9, None, None, None), "step 1/9");
        assert_eq!(
            (duration(59.4), duration(59.6), duration(7322.0)),
            ("59 s".into(), "1 min 00 s".into(), "2 h 02 min".into())
        );
    }

    #[test]
    fn time_left_and_lines_that_are_due() {
        let start = Instant::now();
        let at = |s| start + Duration::from_millis(s);
        let mut progress =
            Progress { display: Display::Lines, total: 10, first: None, printed: None, pending: None };
        // The first step is no measure: it holds the warm-up.
        assert_eq!(progress.left_s(3, at(0)), None);
        assert_eq!(progress.left_s(5, at(4000)), Some(10.0));
        assert!(progress.is_due(LINE_INTERVAL, 3, at(0)));
        progress.printed = Some(at(0));
        assert!(!progress.is_due(LINE_INTERVAL, 4, at(999)));
        assert!(progress.is_due(LINE_INTERVAL, 4, at(1000)));
        assert!(progress.is_due(LINE_INTERVAL, 10, at(1)));
    }
}
