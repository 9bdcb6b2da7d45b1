//! The error of this package: one line for the user.

use std::ffi::{CStr, CString, c_char};
use std::fmt;

use crate::abi::corral_free;

/// What went wrong, in one line.
#[derive(Debug, Clone)]
pub struct Error {
    /// The line: what is wrong, and with which value.
    pub message: String,
}

/// A result with this package's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Error { message: message.into() }
    }

    /// Says before the message where it happened: `context: message`.
    pub fn context(self, context: impl fmt::Display) -> Self {
        Error::new(format!("{context}: {}", self.message))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<tch::TchError> for Error {
    fn from(e: tch::TchError) -> Self {
        Error::new(e.to_string().lines().next().unwrap_or("unknown libtorch error"))
    }
}

/// Turns what a function of the C ABI returned (a malloc'ed message, or null) into a result.
pub(crate) fn check(message: *mut c_char) -> Result<()> {
    if message.is_null() { Ok(()) } else { Err(Error::new(take_string(message))) }
}

/// Copies and frees a malloc'ed, NUL-terminated string.
pub(crate) fn take_string(s: *mut c_char) -> String {
    // SAFETY: the C ABI hands over a valid string, which nobody else holds.
    unsafe {
        let text = CStr::from_ptr(s).to_string_lossy().into_owned();
        corral_free(s.cast());
        text
    }
}

pub(crate) fn c_string(s: &str) -> Result<CString> {
    CString::new(s).map_err(|_| Error::new(format!("{s:?} holds a NUL character")))
}
