//! Files mapped into memory, read-only.

use std::fs::File;
use std::io;

pub use memmap2::Mmap;

/// Maps the whole of `file` for reading. An empty file gives an empty map.
///
/// The file must not be shortened while the map lives (reading past its new end raises SIGBUS). What is
/// mapped here is written once, under another name, and renamed into place, so nothing of ours shortens it.
pub fn map_file(file: &File) -> io::Result<Mmap> {
    // SAFETY: the map is read-only and its bytes are plain data, valid whatever they are; that nobody
    // shortens the file is the caller's promise, as said above.
    unsafe { Mmap::map(file) }
}
