//! One error type, which carries the exit code it ends in.

use std::fmt;

/// What went wrong, as the exit code tells it (see the README).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The work failed: exit code 1.
    Failed,
    /// The command line or the configuration is wrong: exit code 2.
    Config,
    /// Input data, a model or a checkpoint is unusable: exit code 3.
    Data,
    /// Stopped by this signal after a checkpoint was written: exit code 128 + signal.
    Stopped(i32),
}

/// An error for the user: what is wrong, where, what to do. The message may have several lines.
#[derive(Debug, Clone)]
pub struct Error {
    /// The exit code that the process ends with.
    pub kind: ErrorClass,
    /// What is wrong, where, and what to do: one or more lines for the user.
    pub message: String,
    /// The dotted key of the configuration that it is about, until its place is told.
    pub key: Option<String>,
}

/// What fails with an [`Error`] of ours.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Work that failed: exit code 1.
    pub fn failed(message: impl Into<String>) -> Self {
        Error { kind: ErrorClass::Failed, message: message.into(), key: None }
    }

    /// A wrong command line or configuration: exit code 2.
    pub fn config(message: impl Into<String>) -> Self {
        Error { kind: ErrorClass::Config, message: message.into(), key: None }
    }

    /// About the value of a dotted key; whoever has the file adds its place (`Loaded::locate`).
    pub fn key(key: &str, why: impl Into<String>) -> Self {
        Error { key: Some(key.into()), ..Error::config(why) }
    }

    /// An unusable input, model or checkpoint: exit code 3.
    pub fn data(message: impl Into<String>) -> Self {
        Error { kind: ErrorClass::Data, message: message.into(), key: None }
    }

    /// 1, 2 or 3, or 128 plus the signal.
    pub fn exit_code(&self) -> i32 {
        match self.kind {
            ErrorClass::Failed => 1,
            ErrorClass::Config => 2,
            ErrorClass::Data => 3,
            ErrorClass::Stopped(signal) => 128 + signal,
        }
    }

    /// Says before the message where it happened: `context: message`.
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {self}");
        self.key = None;
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Some(key) => write!(f, "'{key}': {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Error::failed(e.to_string())
    }
}

impl From<tch::TchError> for Error {
    fn from(e: tch::TchError) -> Self {
        Error::failed(first_line(&e.to_string()))
    }
}

impl From<kernels::Error> for Error {
    fn from(e: kernels::Error) -> Self {
        Error::failed(e.message)
    }
}

/// libtorch's messages carry a C++ backtrace from the second line on; users get the first.
pub fn first_line(message: &str) -> String {
    message.lines().find(|l| !l.trim().is_empty()).unwrap_or("unknown error").trim().to_string()
}

/// Adds context to any error that turns into ours.
pub trait Context<T> {
    /// Puts `context: ` before the message; the kind stays.
    fn context(self, context: impl fmt::Display) -> Result<T>;
    /// As [`Context::context`], made only for an error.
    fn with_context<C: fmt::Display>(self, context: impl FnOnce() -> C) -> Result<T>;
    /// The error becomes "input unusable" (exit code 3).
    fn data_error(self, context: impl fmt::Display) -> Result<T>;
    /// The error becomes "command line or configuration wrong" (exit code 2).
    fn config_error(self, context: impl fmt::Display) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, context: impl fmt::Display) -> Result<T> {
        self.map_err(|e| e.into().context(context))
    }

    fn with_context<C: fmt::Display>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|e| e.into().context(context()))
    }

    fn data_error(self, context: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Error { kind: ErrorClass::Data, ..e.into() }.context(context))
    }

    fn config_error(self, context: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Error { kind: ErrorClass::Config, ..e.into() }.context(context))
    }
}
