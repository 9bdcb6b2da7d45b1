//! Calls into the C++ side: null is success, anything else a message to free.

use std::ffi::{CStr, c_char, c_void};

use tch::Tensor;

/// What the C++ side said, first line only.
#[derive(Debug, Clone)]
pub struct Error(pub String);

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

/// Turns the C++ side's message into a result.
pub(crate) fn check(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the C++ side returns a NUL-terminated string from strdup, which is ours to free.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        libc::free(message.cast());
        text
    };
    Err(Error(text.lines().next().unwrap_or("unknown error").to_string()))
}

/// A tensor as the C++ side takes it (`at::Tensor*`). It may write to the data, not to the handle.
pub(crate) fn raw(t: &Tensor) -> *mut c_void {
    t.as_ptr() as *mut c_void
}

pub(crate) fn raw_opt(t: Option<&Tensor>) -> *mut c_void {
    t.map_or(std::ptr::null_mut(), raw)
}

/// Takes over a tensor that the C++ side made with `new at::Tensor`.
pub(crate) fn own(t: *mut c_void) -> Tensor {
    // SAFETY: `t` comes from `new at::Tensor` on the C++ side, which gives up its ownership.
    unsafe { Tensor::from_ptr(t.cast()) }
}
