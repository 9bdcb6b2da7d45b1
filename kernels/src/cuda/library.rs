//! Shared objects: where libtorch lies, and how others are opened.

use std::ffi::c_int;
use std::path::PathBuf;
use std::ptr::null_mut;

use libloading::os::unix::Library;

use crate::abi::corral_libtorch_path;
use crate::error::{Error, Result, check, take_string};

/// The folder that libtorch was loaded from.
pub fn libtorch_dir() -> Result<PathBuf> {
    let mut path = null_mut();
    // SAFETY: `path` is a malloc'ed string when there is no error.
    check(unsafe { corral_libtorch_path(&mut path) })?;
    let path = PathBuf::from(take_string(path));
    let path = path.canonicalize().unwrap_or(path);
    path.parent().map(Into::into).ok_or_else(|| Error::new(format!("{} lies in no folder", path.display())))
}

pub(crate) fn dlopen(path: &str, flags: c_int) -> Result<Library> {
    // SAFETY: libtorch's and NVIDIA's libraries run nothing at load that needs care.
    unsafe { Library::open(Some(path), flags) }.map_err(|e| Error::new(e.to_string()))
}
