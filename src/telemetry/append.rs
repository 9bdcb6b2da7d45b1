//! A file that grows by whole records and survives a full disk; and how its end is cut off.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::files::AtomicFile;
use crate::warn;

/// Appends records. One that cannot be written is lost, is counted, and leaves nothing of itself behind; the run
/// goes on, is warned once, and the next record is tried again.
#[derive(Debug)]
pub struct AppendFile {
    path: PathBuf,
    /// `None` after a failure, until the file could be opened again.
    file: Option<File>,
    /// Bytes of whole records.
    len: u64,
    lost: u64,
}

impl AppendFile {
    /// Opens `path`, made if it is missing, and cuts it to `len` bytes.
    pub fn open(path: &Path, len: u64) -> io::Result<Self> {
        let mut file = AppendFile { path: path.to_path_buf(), file: None, len, lost: 0 };
        file.file = Some(file.reopen()?);
        Ok(file)
    }

    /// Records lost so far.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// The open file, to be brought to the disk.
    pub fn file(&self) -> Option<File> {
        self.file.as_ref()?.try_clone().ok()
    }

    pub fn append(&mut self, record: &[u8]) {
        if let Err(e) = self.try_append(record) {
            if self.lost == 0 {
                let path = self.path.display();
                warn!("cannot write {path}: {e}; the run goes on, data for this file is lost until it can");
            }
            self.lost += 1;
        }
    }

    fn try_append(&mut self, record: &[u8]) -> io::Result<()> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.reopen()?,
        };
        if let Err(e) = file.write_all(record) {
            // If this fails too, the part of the record is cut at the next attempt, by `reopen`.
            let _ = file.set_len(self.len);
            return Err(e);
        }
        self.len += record.len() as u64;
        self.file = Some(file);
        Ok(())
    }

    fn reopen(&mut self) -> io::Result<File> {
        let file = OpenOptions::new().append(true).create(true).open(&self.path)?;
        let found = file.metadata()?.len();
        // Shorter only if another hand was at it; never fill up with zeros.
        self.len = self.len.min(found);
        if found > self.len {
            file.set_len(self.len)?;
        }
        Ok(file)
    }
}

/// Makes room for a new file at `path`: a file that is there may have other names, so it is not emptied but leaves this one.
/// What is no file, such as a device, stays.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::metadata(path) {
        Ok(there) if there.is_file() => std::fs::remove_file(path),
        _ => Ok(()),
    }
}

/// Replaces `path` in one move by what `filter` copies of it. Where `filter` says that nothing was left out, the file
/// stays as it is.
pub fn rewrite<F>(path: &Path, filter: F) -> Result<()>
where
    F: FnOnce(&mut BufReader<File>, &mut AtomicFile) -> Result<bool>,
{
    let mut input = BufReader::new(File::open(path)?);
    let mut output = AtomicFile::create(path)?;
    if filter(&mut input, &mut output)? { output.commit() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use testing::folder::TestFolder;

    #[test]
    fn a_full_disk_loses_records_but_not_the_file() {
        let dir = TestFolder::new("telemetry");
        let path = dir.path("log");
        symlink("/dev/full", &path).unwrap();
        let mut log = AppendFile::open(&path, 0).unwrap();
        log.append(b"one\n");
        log.append(b"two\n");
        assert_eq!(log.lost(), 2);
        std::fs::remove_file(&path).unwrap();
        log.append(b"three\n");
        log.append(b"four\n");
        assert_eq!(log.lost(), 2);
        assert_eq!(std::fs::read(&path).unwrap(), b"three\nfour\n");
    }

    #[test]
    fn part_of_a_record_is_cut() {
        let dir = TestFolder::new("telemetry");
        let path = dir.path("log");
        let mut log = AppendFile::open(&path, 0).unwrap();
        log.append(b"one\n");
        // As a failed write leaves it: part of a record on disk, no file held.
        std::fs::write(&path, b"one\ntw").unwrap();
        log.file = None;
        log.append(b"three\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"one\nthree\n");
        // A file that was replaced by a shorter one is not filled up with zeros.
        std::fs::write(&path, b"").unwrap();
        log.file = None;
        log.append(b"four\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"four\n");
    }

    #[test]
    fn a_failed_rewrite_changes_nothing() {
        let dir = TestFolder::new("telemetry");
        let path = dir.path("log");
        std::fs::write(&path, b"one\n").unwrap();
        let result = rewrite(&path, |_, output| {
            output.put(b"two\n")?;
            Err(io::Error::other("no").into())
        });
        assert_eq!(result.unwrap_err().to_string(), "no");
        rewrite(&path, |_, output| output.put(b"two\n").map(|_| false)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\n");
        assert_eq!(std::fs::read_dir(dir.path("")).unwrap().count(), 1);
        rewrite(&path, |_, output| output.put(b"two\n").map(|_| true)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two\n");
        assert_eq!(std::fs::read_dir(dir.path("")).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_is_gone_ends_nothing() {
        let dir = TestFolder::new("telemetry");
        let path = dir.path("sub/log");
        std::fs::create_dir(dir.path("sub")).unwrap();
        let mut log = AppendFile::open(&path, 0).unwrap();
        std::fs::remove_dir_all(dir.path("sub")).unwrap();
        log.file = None;
        log.append(b"one\n");
        assert_eq!(log.lost(), 1);
        assert!(AppendFile::open(&path, 0).is_err());
    }
}
