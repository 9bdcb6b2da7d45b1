//! What a person reads: lines on stderr, which go above the progress bar, or JSON objects with `--log-format json`.

use std::collections::BTreeSet;
use std::fmt::Arguments;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::ProgressBar;
use serde_json::json;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    #[default]
    Pretty,
    /// An object a line, with `level`, `message` and `rank`.
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Error,
    Warn,
    Info,
    /// Shown with `-v` only.
    Detail,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub format: Format,
    /// Only warnings and errors.
    pub quiet: bool,
    pub verbose: bool,
    pub rank: i64,
    pub world_size: i64,
}

const ALONE: Settings =
    Settings { format: Format::Pretty, quiet: false, verbose: false, rank: 0, world_size: 1 };

struct Console {
    settings: Settings,
    /// The bar on the terminal, if there is one: lines are printed above it.
    bar: Option<ProgressBar>,
}

static CONSOLE: Mutex<Console> = Mutex::new(Console { settings: ALONE, bar: None });

fn console() -> MutexGuard<'static, Console> {
    CONSOLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sets how and what the process prints; before that it prints as a world of one rank.
pub fn init(settings: Settings) {
    console().settings = settings;
}

pub fn settings() -> Settings {
    console().settings.clone()
}

pub(super) fn set_bar(bar: Option<ProgressBar>) {
    console().bar = bar;
}

/// Prints one message, as its level and the settings ask; `everywhere`: also on ranks other than 0. Never fails:
/// where stderr is closed or full the message is lost.
pub fn print(level: Level, everywhere: bool, message: Arguments) {
    let console = console();
    let Some(line) = console.settings.render(level, everywhere, message) else { return };
    match &console.bar {
        Some(bar) => bar.suspend(|| write_stderr(&line, "\n")),
        None => write_stderr(&line, "\n"),
    }
}

/// Warns on rank 0, of one message once in the life of the process.
pub fn warn_once(message: &str) {
    static WARNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let new = WARNED.lock().unwrap_or_else(PoisonError::into_inner).insert(message.to_string());
    if new && settings().rank == 0 {
        print(Level::Warn, false, format_args!("{message}"));
    }
}

pub(super) fn write_stderr(text: &str, end: &str) {
    let mut stderr = std::io::stderr().lock();
    // One write, so that lines of ranks that share a terminal do not mix.
    let _ = stderr.write_all(format!("{text}{end}").as_bytes()).and_then(|_| stderr.flush());
}

impl Settings {
    fn shows(&self, level: Level, everywhere: bool) -> bool {
        let here = self.rank == 0 || everywhere;
        match level {
            Level::Error | Level::Warn => true,
            Level::Info => here && !self.quiet,
            Level::Detail => here && !self.quiet && self.verbose,
        }
    }

    fn render(&self, level: Level, everywhere: bool, message: Arguments) -> Option<String> {
        if !self.shows(level, everywhere) {
            return None;
        }
        if self.format == Format::Json {
            let level = match level {
                Level::Error => "error",
                Level::Warn => "warning",
                Level::Info => "info",
                Level::Detail => "detail",
            };
            return Some(
                json!({"level": level, "message": message.to_string(), "rank": self.rank}).to_string(),
            );
        }
        let word = match level {
            Level::Error => "error",
            Level::Warn => "warning",
            Level::Info | Level::Detail => "",
        };
        let rank = match (self.world_size > 1, word) {
            (false, _) => String::new(),
            (true, "") if everywhere => format!("rank {}", self.rank),
            (true, "") => String::new(),
            (true, _) => format!(" (rank {})", self.rank),
        };
        let prefix = format!("{word}{rank}");
        Some(if prefix.is_empty() { message.to_string() } else { format!("{prefix}: {message}") })
    }
}

/// 1234567 as 1,234,567.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Whether this process is rank 0, for warnings that all ranks would give alike.
pub fn is_first_rank() -> bool {
    console().settings.rank == 0
}

/// A line from rank 0.
#[macro_export]
macro_rules! info {
    ($($arg:tt)*) => {
        $crate::telemetry::console::print($crate::telemetry::console::Level::Info, false, format_args!($($arg)*))
    };
}

/// A line from every rank that says it, with its rank.
#[macro_export]
macro_rules! info_everywhere {
    ($($arg:tt)*) => {
        $crate::telemetry::console::print($crate::telemetry::console::Level::Info, true, format_args!($($arg)*))
    };
}

/// A line from rank 0, with `-v` only.
#[macro_export]
macro_rules! detail {
    ($($arg:tt)*) => {
        $crate::telemetry::console::print($crate::telemetry::console::Level::Detail, false, format_args!($($arg)*))
    };
}

/// A warning, from any rank, also with `-q`.
#[macro_export]
macro_rules! warn {
    ($($arg:tt)*) => {
        $crate::telemetry::console::print($crate::telemetry::console::Level::Warn, true, format_args!($($arg)*))
    };
}

/// The error that ends the process, from any rank.
#[macro_export]
macro_rules! error {
    ($($arg:tt)*) => {
        $crate::telemetry::console::print($crate::telemetry::console::Level::Error, true, format_args!($($arg)*))
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(settings: &Settings, level: Level, everywhere: bool) -> Option<String> {
        settings.render(level, everywhere, format_args!("a \"b\"\nc"))
    }

    #[test]
    fn who_prints_what() {
        let rank = |rank, quiet, verbose| Settings { rank, quiet, verbose, world_size: 2, ..ALONE };
        let text = |prefix: &str| Some(format!("{prefix}a \"b\"\nc"));
        assert_eq!(render(&rank(0, false, false), Level::Info, false), text(""));
        assert_eq!(render(&rank(1, false, false), Level::Info, false), None);
        assert_eq!(render(&rank(1, false, false), Level::Info, true), text("rank 1: "));
        assert_eq!(render(&rank(0, true, false), Level::Info, false), None);
        assert_eq!(render(&rank(0, false, false), Level::Detail, false), None);
        assert_eq!(render(&rank(0, false, true), Level::Detail, false), text(""));
        assert_eq!(render(&rank(0, true, true), Level::Detail, false), None);
        assert_eq!(render(&rank(1, true, false), Level::Warn, true), text("warning (rank 1): "));
        assert_eq!(render(&rank(1, true, false), Level::Error, true), text("error (rank 1): "));
        assert_eq!(render(&ALONE, Level::Warn, true), text("warning: "));
    }

    #[test]
    fn json_is_one_object_a_line() {
        let settings = Settings { format: Format::Json, rank: 3, world_size: 4, ..ALONE };
        let line = render(&settings, Level::Warn, true).unwrap();
        assert_eq!(line, r#"{"level":"warning","message":"a \"b\"\nc","rank":3}"#);
    }
}
