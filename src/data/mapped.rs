//! Files of ours that are read at random for a whole run: mapped into memory, and as they were when they were checked.

use std::fs::File;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kernels::mmap::{Map, map_file};

use crate::error::Result;
use crate::files::read_error;
use crate::telemetry::console;

/// A mapped file. Whoever reads bytes by which it has been shortened ends with an error that names it.
#[derive(Debug)]
pub struct Mapped {
    file: File,
    bytes: Map,
}

/// Size and times of a file: others where it was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub bytes: u64,
    times: [i64; 4],
}

impl Mapped {
    pub fn open(path: &Path) -> Result<Mapped> {
        let file = File::open(path).map_err(|e| read_error(path, &e))?;
        let lost = console::error_line(&format!(
            "{}: it was truncated while in use; create it again",
            path.display()
        ));
        let bytes = map_file(&file, &lost).map_err(|e| read_error(path, &e))?;
        Ok(Mapped { file, bytes })
    }

    /// As the file is now.
    pub fn stamp(&self) -> std::io::Result<Stamp> {
        let m = self.file.metadata()?;
        Ok(Stamp { bytes: m.len(), times: [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()] })
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}
