//! What a person reads: lines on stderr, or JSON objects with `--log-format json`, and answers on stdout. All of it, and the
//! progress bar, goes through one [`Screen`].

use std::collections::BTreeSet;
use std::fmt::Arguments;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::json;

use super::screen::{OutputStream, Screen};

/// How messages look on stderr.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines of text
    #[default]
    Pretty,
    /// An object a line, with `level`, `message` and `rank`.
    Json,
}

/// How much a message matters; it decides its prefix, and which flags hide it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Why the process ends; shown in any case.
    Error,
    /// Shown in any case, too.
    Warn,
    /// Hidden by `-q`.
    Info,
    /// Shown with `-v` only.
    Detail,
}

/// What a process prints, and as which rank.
#[derive(Debug, Clone, PartialEq)]
pub struct ConsoleSettings {
    /// Lines or JSON.
    pub format: LogFormat,
    /// Only warnings and errors.
    pub quiet: bool,
    /// Also messages of [`LogLevel::Detail`].
    pub verbose: bool,
    /// This process; only rank 0 prints what all ranks would.
    pub rank: i64,
    /// Ranks of the run; above 1, lines of single ranks carry their number.
    pub world_size: i64,
}

const ALONE: ConsoleSettings =
    ConsoleSettings { format: LogFormat::Pretty, quiet: false, verbose: false, rank: 0, world_size: 1 };

struct Console {
    settings: ConsoleSettings,
    screen: Option<Screen>,
}

static CONSOLE: Mutex<Console> = Mutex::new(Console { settings: ALONE, screen: None });

fn console() -> MutexGuard<'static, Console> {
    CONSOLE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Console {
    fn screen(&mut self) -> &mut Screen {
        self.screen.get_or_insert_with(Screen::of_process)
    }
}

/// Sets how and what the process prints; before that it prints as a world of one rank.
pub fn init(settings: ConsoleSettings) {
    console().settings = settings;
}

/// As [`init`] set them; before it those of one rank that prints lines.
pub fn settings() -> ConsoleSettings {
    console().settings.clone()
}

/// Whether a progress bar can be drawn: stderr is a terminal that knows the codes for it. `answers`: the command writes to
/// stdout while the bar is drawn; then not into a pipe, whose reader may write to the same terminal at any time.
pub(super) fn has_room_for_bar(answers: bool) -> bool {
    console().screen().has_room_for_bar(answers)
}

/// Columns of the terminal.
pub(super) fn columns() -> usize {
    console().screen().columns()
}

/// Draws the progress bar in the last line of the terminal, under all that is printed; an empty one takes it away.
pub(super) fn draw_bar(bar: &str) {
    console().screen().draw(bar);
}

/// Prints one message, as its level and the settings ask; `everywhere`: also on ranks other than 0. Never fails:
/// where stderr is closed or full the message is lost.
pub fn print(level: LogLevel, everywhere: bool, message: Arguments) {
    let mut console = console();
    let Some(mut line) = console.settings.render(level, everywhere, message) else { return };
    if console.settings.format == LogFormat::Pretty && console.screen().has_colours() {
        line = with_colour(level, line);
    }
    write_line(&mut console, &line);
}

/// A warning or an error with its first word in a colour.
fn with_colour(level: LogLevel, line: String) -> String {
    let colour = match level {
        LogLevel::Error => Colour::Red,
        LogLevel::Warn => Colour::Yellow,
        LogLevel::Info | LogLevel::Detail => return line,
    };
    match line.split_once(':') {
        Some((word, rest)) => format!("{}{rest}", colour.paint(&format!("{word}:"))),
        None => line,
    }
}

/// Writes an answer, or a part of one, to stdout.
pub fn write_out(text: &[u8]) -> io::Result<()> {
    console().screen().write(OutputStream::Out, text)
}

/// Stdout for those who take a writer: see [`write_out`].
pub struct Out;

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_out(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Warns on rank 0, of one message once in the life of the process.
pub fn warn_once(message: &str) {
    static WARNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let new = WARNED.lock().unwrap_or_else(PoisonError::into_inner).insert(message.to_string());
    if new && settings().rank == 0 {
        print(LogLevel::Warn, false, format_args!("{message}"));
    }
}

/// The line that an error with this message is, for those who can only write bytes.
pub fn error_line(message: &str) -> String {
    let line = settings().render(LogLevel::Error, true, format_args!("{message}"));
    line.map_or(String::new(), |line| line + "\n")
}

/// A colour of text, as terminals number them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colour {
    Red = 31,
    Green = 32,
    Yellow = 33,
}

impl Colour {
    fn paint(self, text: &str) -> String {
        format!("\x1b[{}m{text}\x1b[0m", self as u8)
    }
}

/// `text` in this colour where messages have colours.
pub(super) fn coloured(colour: Colour, text: &str) -> String {
    let mut console = console();
    match console.settings.format == LogFormat::Pretty && console.screen().has_colours() {
        true => colour.paint(text),
        false => text.into(),
    }
}

/// A line of another program, as it is.
pub fn write_error(line: &str) {
    write_line(&mut console(), line);
}

/// A line of progress.
pub(super) fn write_stderr(line: &str) {
    write_line(&mut console(), line);
}

/// What `launch` draws as a bar: a line that ends in a carriage return.
pub(super) fn write_return(line: &str) {
    let _ = console().screen().write(OutputStream::Err, format!("{line}\r").as_bytes());
}

fn write_line(console: &mut Console, line: &str) {
    // One write, so that lines of ranks that share a terminal do not mix.
    let _ = console.screen().write(OutputStream::Err, format!("{line}\n").as_bytes());
}

impl ConsoleSettings {
    fn shows(&self, level: LogLevel, everywhere: bool) -> bool {
        let here = self.rank == 0 || everywhere;
        match level {
            LogLevel::Error | LogLevel::Warn => true,
            LogLevel::Info => here && !self.quiet,
            LogLevel::Detail => here && !self.quiet && self.verbose,
        }
    }

    fn render(&self, level: LogLevel, everywhere: bool, message: Arguments) -> Option<String> {
        if !self.shows(level, everywhere) {
            return None;
        }
        if self.format == LogFormat::Json {
            let level = match level {
                LogLevel::Error => "error",
                LogLevel::Warn => "warning",
                LogLevel::Info => "info",
                LogLevel::Detail => "detail",
            };
            return Some(
                json!({"level": level, "message": message.to_string(), "rank": self.rank}).to_string(),
            );
        }
        let word = match level {
            LogLevel::Error => "error",
            LogLevel::Warn => "warning",
            LogLevel::Info | LogLevel::Detail => "",
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
        $crate::telemetry::console::print($crate::telemetry::console::LogLevel::Info, false, format_args!($($arg)*))
    };
}

/// A line from every rank that says it, with its rank.
#[macro_export]
macro_rules! info_everywhere {
    ($($arg:tt)*) => {
        $crate::telemetry::console::print($crate::telemetry::console::LogLevel::Info, true, format_args!($($arg)*))
    };
}

/// A line from rank 0, with `-v` only.
#[macro_export]
macro_rules! detail {
    ($($arg:tt)*) => {
        $crate::telemetry::console::print($crate::telemetry::console::LogLevel::Detail, false, format_args!($($arg)*))
    };
}

/// A warning, from any rank, also with `-q`.
#[macro_export]
macro_rules! warn {
    ($($arg:tt)*) => {
        $crate::telemetry::console::print($crate::telemetry::console::LogLevel::Warn, true, format_args!($($arg)*))
    };
}

/// The error that ends the process, from any rank.
#[macro_export]
macro_rules! error {
    ($($arg:tt)*) => {
        $crate::telemetry::console::print($crate::telemetry::console::LogLevel::Error, true, format_args!($($arg)*))
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(settings: &ConsoleSettings, level: LogLevel, everywhere: bool) -> Option<String> {
        settings.render(level, everywhere, format_args!("a \"b\"\nc"))
    }

    #[test]
    fn who_prints_what() {
        let rank = |rank, quiet, verbose| ConsoleSettings { rank, quiet, verbose, world_size: 2, ..ALONE };
        let text = |prefix: &str| Some(format!("{prefix}a \"b\"\nc"));
        assert_eq!(render(&rank(0, false, false), LogLevel::Info, false), text(""));
        assert_eq!(render(&rank(1, false, false), LogLevel::Info, false), None);
        assert_eq!(render(&rank(1, false, false), LogLevel::Info, true), text("rank 1: "));
        assert_eq!(render(&rank(0, true, false), LogLevel::Info, false), None);
        assert_eq!(render(&rank(0, false, false), LogLevel::Detail, false), None);
        assert_eq!(render(&rank(0, false, true), LogLevel::Detail, false), text(""));
        assert_eq!(render(&rank(0, true, true), LogLevel::Detail, false), None);
        assert_eq!(render(&rank(1, true, false), LogLevel::Warn, true), text("warning (rank 1): "));
        assert_eq!(render(&rank(1, true, false), LogLevel::Error, true), text("error (rank 1): "));
        assert_eq!(render(&ALONE, LogLevel::Warn, true), text("warning: "));
    }

    #[test]
    fn colours_are_on_the_first_word_only() {
        let line = |level| with_colour(level, "warning: a: b".into());
        assert_eq!(line(LogLevel::Warn), "\x1b[33mwarning:\x1b[0m a: b");
        assert_eq!(line(LogLevel::Info), "warning: a: b");
    }

    #[test]
    fn json_is_one_object_a_line() {
        let settings = ConsoleSettings { format: LogFormat::Json, rank: 3, world_size: 4, ..ALONE };
        let line = render(&settings, LogLevel::Warn, true).unwrap();
        assert_eq!(line, r#"{"level":"warning","message":"a \"b\"\nc","rank":3}"#);
    }
}
