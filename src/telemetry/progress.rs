//! How far a run is: a bar on a terminal, plain lines elsewhere.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use super::console::{self, ConsoleSettings, LogFormat};
use super::metrics::MetricsLine;
use super::shown;

use crate::env;

/// Plain lines of a run, at most.
const LINES: u64 = 1000;
/// Steps that have a line in any case, so that a look at the beginning tells whether it runs.
const FIRST: [u64; 4] = [1, 2, 5, 10];
/// Bars, and what `launch` draws, come at most this often.
const DRAW_INTERVAL: Duration = Duration::from_millis(100);

/// The progress of a training run on stderr, from rank 0.
#[derive(Debug)]
pub struct Progress {
    display: Display,
    total: u64,
    /// Steps between plain lines.
    line_every: u64,
    /// The first update and its time: the rate that tells the time left leaves out what came before it.
    first: Option<(u64, Instant)>,
    printed: Option<Instant>,
    /// The last update, if it does not stand as a line.
    pending: Option<String>,
}

#[derive(Debug)]
enum Display {
    Nothing,
    Bar,
    /// Under `launch`, which draws on the terminal what ends in a carriage return.
    Returns,
    Lines,
    Json,
}

impl Display {
    fn choose(settings: &ConsoleSettings, terminal: bool, launch_terminal: bool) -> Self {
        match settings.format {
            _ if settings.quiet || settings.rank != 0 => Display::Nothing,
            LogFormat::Json => Display::Json,
            LogFormat::Pretty if terminal => Display::Bar,
            LogFormat::Pretty if launch_terminal => Display::Returns,
            LogFormat::Pretty => Display::Lines,
        }
    }
}

impl Progress {
    /// A run that has done `step` of `total` steps, and logs every `log_every`.
    pub fn start(step: u64, total: u64, log_every: u64) -> Self {
        let launch_terminal = env::variable("CORRAL_TTY").is_some_and(|v| v == "1");
        let terminal = console::has_room_for_bar(false);
        let display = Display::choose(&console::settings(), terminal, launch_terminal);
        if matches!(display, Display::Bar) {
            console::draw_bar(&with_bar(
                "",
                step,
                total,
                &describe(step, total, "", None, None),
                console::columns(),
            ));
        }
        let line_every = log_every.max(total.div_ceil(LINES));
        Progress { display, total, line_every, first: None, printed: None, pending: None }
    }

    /// Whether lines between the steps stay above a bar.
    pub fn is_on_terminal(&self) -> bool {
        matches!(self.display, Display::Bar | Display::Returns)
    }

    /// After a step: its metrics, and the rate over all ranks; what is not known is left out.
    pub fn update(&mut self, line: &MetricsLine) {
        let (now, step) = (Instant::now(), line.step());
        let left_s = self.left_s(step, now);
        // Of responses the rate of all tokens says little, and their line is long.
        let tokens_per_s = line.get("tokens_per_s").filter(|_| !shown::is_of_responses(line));
        let text = match &self.display {
            Display::Nothing => return,
            Display::Json => {
                let rank = console::settings().rank;
                let mut object = json!({"level": "progress", "step": step, "total_steps": self.total,
                                        "loss": line.get("loss"), "tokens_per_s": tokens_per_s, "left_s": left_s,
                                        "rank": rank});
                line.numbers().for_each(|(key, x)| object[key] = x.into());
                object.to_string()
            }
            _ => describe(step, self.total, &shown::metrics(line), tokens_per_s, left_s),
        };
        match &self.display {
            Display::Bar => {
                if self.is_drawn(step, now) {
                    console::draw_bar(&with_bar("", step, self.total, &text, console::columns()));
                    self.printed = Some(now);
                }
                self.pending = Some(text);
            }
            Display::Returns => {
                if self.is_drawn(step, now) {
                    console::write_return(&text);
                    self.printed = Some(now);
                }
                self.pending = Some(text);
            }
            Display::Json => console::write_stderr(&text),
            _ if self.has_line(step) => {
                console::write_stderr(&text);
                self.pending = None;
            }
            _ => self.pending = Some(text),
        }
    }

    fn is_drawn(&self, step: u64, now: Instant) -> bool {
        step >= self.total || self.printed.is_none_or(|printed| now - printed >= DRAW_INTERVAL)
    }

    fn has_line(&self, step: u64) -> bool {
        step >= self.total || FIRST.contains(&step) || step.is_multiple_of(self.line_every)
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
        match self.display {
            Display::Bar => console::draw_bar(""),
            // A blank bar takes `launch`'s away.
            Display::Returns => console::write_return(" "),
            Display::Nothing | Display::Lines | Display::Json => {}
        }
        if let Some(text) = self.pending.take() {
            console::write_stderr(&text);
        }
    }
}

fn describe(step: u64, total: u64, metrics: &str, tokens_per_s: Option<f64>, left_s: Option<f64>) -> String {
    let mut text = format!("step {step:>width$}/{total}", width = total.to_string().len());
    if !metrics.is_empty() {
        text += &format!("  {metrics}");
    }
    if let Some(rate) = tokens_per_s {
        text += &format!("  {rate:.0} tokens/s");
    }
    if let Some(left_s) = left_s {
        text += &format!("  {} left", duration(left_s));
    }
    text
}

const YEAR_S: u64 = 31_536_000;

/// Seconds as a person says them.
pub fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        YEAR_S.. => "over a year".into(),
        172_800.. => format!("{} days", s / 86_400),
        _ => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

/// A line of `columns` at most: what is done, a bar where there is room for it, and `text`, whose end is cut first.
fn with_bar(what: &str, done: u64, total: u64, text: &str, columns: usize) -> String {
    // The last column stays free: some terminals wrap after it.
    let columns = columns.saturating_sub(1);
    let taken: usize =
        [what, text].iter().filter(|part| !part.is_empty()).map(|part| part.chars().count() + 1).sum();
    let width = columns.saturating_sub(taken + 2);
    let mut parts = vec![what.to_string()];
    if width >= 5 {
        let share = done.min(total) as f64 / total.max(1) as f64;
        let full = (share * width as f64) as usize;
        parts.push(format!("[{}{}]", "=".repeat(full), " ".repeat(width - full)));
    }
    parts.push(text.to_string());
    parts.retain(|part| !part.is_empty());
    parts.join(" ").chars().take(columns).collect()
}

/// A bar on rank 0's stderr, where that is a terminal, while a command counts what it has done. Taken away when it is dropped.
#[derive(Debug)]
pub struct Bar {
    what: String,
    unit: RateUnit,
    total: u64,
    shown: bool,
    begun: Instant,
    state: Mutex<BarState>,
}

#[derive(Debug, Default)]
struct BarState {
    done: u64,
    /// Was done before the bar began: it tells nothing of the rate.
    before: u64,
    drawn: Option<Instant>,
}

#[derive(Debug, Clone)]
enum RateUnit {
    Bytes,
    Of(String),
}

impl Bar {
    /// Of `total` `unit`s. `answers`: the command writes to stdout meanwhile.
    pub fn new(total: u64, unit: &str, answers: bool) -> Bar {
        Bar::start("", total, RateUnit::Of(unit.into()), answers)
    }

    fn start(what: &str, total: u64, unit: RateUnit, answers: bool) -> Bar {
        let ConsoleSettings { format, quiet, rank, .. } = console::settings();
        let wanted = format == LogFormat::Pretty && !quiet && rank == 0;
        let shown = wanted && console::has_room_for_bar(answers);
        let bar =
            Bar { what: what.into(), unit, total, shown, begun: Instant::now(), state: Mutex::default() };
        bar.update(|_| ());
        bar
    }

    /// `done` were done before.
    pub fn begin_at(&self, done: u64) {
        self.update(|state| (state.done, state.before) = (done, done));
    }

    /// Moves the bar on by `done`.
    pub fn inc(&self, done: u64) {
        self.update(|state| state.done += done);
    }

    fn set(&self, done: u64) {
        self.update(|state| state.done = done);
    }

    fn update(&self, change: impl FnOnce(&mut BarState)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        let now = Instant::now();
        if !self.shown || state.drawn.is_some_and(|drawn| now - drawn < DRAW_INTERVAL) {
            return;
        }
        state.drawn = Some(now);
        let seconds = (now - self.begun).as_secs_f64();
        let text = self.describe(state.done, state.done - state.before.min(state.done), seconds);
        console::draw_bar(&with_bar(&self.what, state.done, self.total, &text, console::columns()));
    }

    /// `done` in all, of which `new` in these seconds.
    fn describe(&self, done: u64, new: u64, seconds: f64) -> String {
        let total = self.total;
        let rate = if seconds > 0.0 { new as f64 / seconds } else { 0.0 };
        let mut text = match &self.unit {
            RateUnit::Of(unit) => format!("{done}/{total} {unit}"),
            RateUnit::Bytes => {
                let mb = |bytes: f64| bytes / 1e6;
                format!("{:.1}/{:.1} MB  {:.1} MB/s", mb(done as f64), mb(total as f64), mb(rate))
            }
        };
        if rate > 0.0 && done < total {
            text += &format!("  {} left", duration((total - done) as f64 / rate));
        }
        text
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if self.shown {
            console::draw_bar("");
        }
    }
}

/// Shows a bar of `done` of `total` bytes while `work` runs, if stderr is a terminal.
pub fn with_bytes_bar<T>(what: &str, total: u64, done: &Arc<AtomicU64>, work: impl FnOnce() -> T) -> T {
    let bar = Bar::start(what, total, RateUnit::Bytes, false);
    let (ended, end) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let bar = &bar;
        scope.spawn(move || {
            while end.recv_timeout(DRAW_INTERVAL).is_err_and(|e| e == RecvTimeoutError::Timeout) {
                bar.set(done.load(Relaxed));
            }
        });
        // Dropped before the scope waits for the thread, also where the work panics.
        let _ended = ended;
        work()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(display: Display) -> &'static str {
        match display {
            Display::Nothing => "nothing",
            Display::Bar => "bar",
            Display::Returns => "returns",
            Display::Lines => "lines",
            Display::Json => "json",
        }
    }

    #[test]
    fn where_it_is_drawn() {
        let plain = ConsoleSettings {
            format: LogFormat::Pretty,
            quiet: false,
            verbose: false,
            rank: 0,
            world_size: 2,
        };
        let json = ConsoleSettings { format: LogFormat::Json, ..plain.clone() };
        let choose =
            |settings: &ConsoleSettings, terminal, launch| name(Display::choose(settings, terminal, launch));
        assert_eq!(choose(&plain, true, false), "bar");
        assert_eq!(choose(&plain, false, true), "returns");
        assert_eq!(choose(&plain, false, false), "lines");
        assert_eq!(choose(&json, true, true), "json");
        assert_eq!(choose(&ConsoleSettings { quiet: true, ..json }, true, true), "nothing");
        assert_eq!(choose(&ConsoleSettings { rank: 1, ..plain }, true, true), "nothing");
    }

    #[test]
    fn what_it_says() {
        let text = describe(7, 400, "loss 2.3457", Some(12345.6), Some(185.2));
        assert_eq!(text, "step   7/400  loss 2.3457  12346 tokens/s  3 min 05 s left");
        assert_eq!(describe(1, 9, "", None, None), "step 1/9");
        assert_eq!(
            [59.4, 59.6, 7322.0, 200_000.0, 1e9].map(duration),
            ["59 s", "1 min 00 s", "2 h 02 min", "2 days", "over a year"]
        );
    }

    #[test]
    fn a_line_fits_the_terminal() {
        let bar = |columns| with_bar("reading", 5, 10, "5/10 lines  9 s left", columns);
        assert_eq!(bar(50), "reading [=========         ] 5/10 lines  9 s left");
        assert_eq!(bar(30), "reading 5/10 lines  9 s left");
        assert_eq!(bar(12), "reading 5/1");
        assert_eq!(with_bar("", 10, 10, "x", 12), "[=======] x");
        assert_eq!(bar(1), "");
        for columns in 0..200 {
            assert!(bar(columns).chars().count() < columns.max(1));
        }
    }

    #[test]
    fn a_bar_says_how_long_it_takes() {
        let bar = |unit| Bar {
            what: String::new(),
            unit,
            total: 40_000_000,
            shown: false,
            begun: Instant::now(),
            state: Mutex::default(),
        };
        let lines = bar(RateUnit::Of("lines".into()));
        assert_eq!(lines.describe(30_000_000, 10_000_000, 10.0), "30000000/40000000 lines  10 s left");
        assert_eq!(lines.describe(40_000_000, 40_000_000, 10.0), "40000000/40000000 lines");
        assert_eq!(lines.describe(0, 0, 0.0), "0/40000000 lines");
        assert_eq!(
            bar(RateUnit::Bytes).describe(20_000_000, 20_000_000, 2.0),
            "20.0/40.0 MB  10.0 MB/s  2 s left"
        );
    }

    #[test]
    fn time_left_and_lines_that_are_due() {
        let start = Instant::now();
        let at = |s| start + Duration::from_millis(s);
        let mut progress = Progress {
            display: Display::Lines,
            total: 10,
            line_every: 4,
            first: None,
            printed: None,
            pending: None,
        };
        // The first step is no measure: it holds the warm-up.
        assert_eq!(progress.left_s(3, at(0)), None);
        assert_eq!(progress.left_s(5, at(4000)), Some(10.0));
        assert!(progress.is_drawn(3, at(0)));
        progress.printed = Some(at(0));
        assert!(!progress.is_drawn(4, at(99)));
        assert!(progress.is_drawn(4, at(100)));
        assert!(progress.is_drawn(10, at(1)));
        let lines: Vec<u64> = (1..=10).filter(|step| progress.has_line(*step)).collect();
        assert_eq!(lines, [1, 2, 4, 5, 8, 10]);
    }

    #[test]
    fn a_long_run_has_few_lines() {
        for (total, log_every) in [(100_000, 1), (1_000_000, 10), (999, 1), (5, 1)] {
            let progress = Progress::start(0, total, log_every);
            let lines = (1..=total).filter(|step| progress.has_line(*step)).count();
            assert!(lines < 1100 && lines as u64 >= total.min(900), "{total}: {lines}");
        }
    }
}
