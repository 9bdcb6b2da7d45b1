//! Files and folders that are complete or absent: written as `.tmp-NAME`, brought to the disk, renamed. What a killed
//! process leaves under that name, the next that writes the same removes.

use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::content::unusable;
use crate::error::{Context, Error, Result};

/// Bytes that are read or written at once.
pub const CHUNK: usize = 4 << 20;

/// A name beside `path`, in the same folder, for what is not complete or not wanted any more.
pub fn beside(path: &Path, prefix: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{prefix}{name}"))
}

/// The folder that `path` lies in.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What lies at `path`, links followed; none where there is nothing. The one way to ask whether a file or folder is there.
///
/// # Errors
/// Of kind Data: a symbolic link, at the path or on the way to it, whose target is missing; what may not be looked at.
pub fn look(path: &Path) -> Result<Option<Metadata>> {
    match fs::metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(e) => match (broken_link(path), e.kind()) {
            (Some(what), _) => Err(Error::data(what)),
            (None, io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            (None, _) => Err(read_error(path, &e)),
        },
    }
}

/// Whether there is something at `path` (see [`look`]).
pub fn exists(path: &Path) -> Result<bool> {
    Ok(look(path)?.is_some())
}

/// Whether `path` is a file (see [`look`]).
pub fn is_file(path: &Path) -> Result<bool> {
    Ok(look(path)?.is_some_and(|found| found.is_file()))
}

/// Whether `path` is a folder (see [`look`]).
pub fn is_dir(path: &Path) -> Result<bool> {
    Ok(look(path)?.is_some_and(|found| found.is_dir()))
}

/// Whether there is a file at `path`, or a folder that is not empty (see [`look`]).
pub fn holds_something(path: &Path) -> Result<bool> {
    match look(path)? {
        Some(found) if found.is_dir() => {
            Ok(fs::read_dir(path).map_err(|e| read_error(path, &e))?.next().is_some())
        }
        found => Ok(found.is_some()),
    }
}

/// Opens a file to read it; none where there is none (see [`look`]).
pub fn open(path: &Path) -> Result<Option<File>> {
    match look(path)? {
        Some(_) => File::open(path).map(Some).map_err(|e| read_error(path, &e)),
        None => Ok(None),
    }
}

/// Names the first symbolic link on the way to `path` that leads nowhere, if there is one.
pub fn broken_link(path: &Path) -> Option<String> {
    let broken =
        |p: &&Path| fs::symlink_metadata(p).is_ok_and(|m| m.is_symlink()) && fs::metadata(p).is_err();
    let way: Vec<&Path> = path.ancestors().collect();
    let link = way.into_iter().rev().find(broken)?;
    let why = match fs::metadata(link) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => format!("cannot be followed ({e})"),
        _ => "is missing".into(),
    };
    let target = fs::read_link(link).ok()?;
    Some(format!(
        "{} is a symbolic link to {}, which {why}: restore that, or remove the link",
        link.display(),
        target.display()
    ))
}

/// Where to write for `path`: a link to a file or folder stays, and its target is written.
///
/// # Errors
/// Of kind Config: a symbolic link whose target is missing.
fn target(path: &Path) -> Result<PathBuf> {
    // Without a slash at its end, which would hide a link.
    let path: PathBuf = path.components().collect();
    if !fs::symlink_metadata(&path).is_ok_and(|m| m.is_symlink()) {
        return Ok(path);
    }
    match look(&path).map_err(|e| Error::config(e.message))? {
        Some(found) if found.is_file() || found.is_dir() => {
            fs::canonicalize(&path).map_err(|e| write_error(&path, &e))
        }
        _ => Ok(path),
    }
}

/// Bytes free for this user on the file system that holds `path` or, where it does not exist yet, its nearest parent.
pub fn free_bytes(path: &Path) -> Result<u64> {
    let absolute = std::path::absolute(path).context(path.display())?;
    let there = absolute.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let stat = nix::sys::statvfs::statvfs(there)
        .map_err(|e| Error::failed(format!("{}: free space: {}", there.display(), e.desc())))?;
    Ok(stat.blocks_available() as u64 * stat.fragment_size() as u64)
}

/// What to tell when `path` cannot be written: with the free space where that is the reason.
pub fn write_error(path: &Path, e: &io::Error) -> Error {
    let advice = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => match free_bytes(path) {
            Ok(free) => {
                format!("; {:.2} GB are free there: make room, or choose another folder", free as f64 / 1e9)
            }
            Err(_) => "; make room, or choose another folder".into(),
        },
        _ => String::new(),
    };
    match broken_link(path) {
        Some(what) => Error::config(format!("cannot write {}: {what}", path.display())),
        None => Error::failed(format!("cannot write {}: {e}{advice}", path.display())),
    }
}

/// What to tell when a file that should be there cannot be read.
pub fn read_error(path: &Path, e: &io::Error) -> Error {
    if let Some(what) = broken_link(path) {
        return Error::data(format!("cannot read {}: {what}", path.display()));
    }
    let name = path.to_string_lossy();
    let advice = match e.kind() == io::ErrorKind::NotFound {
        true if name == "-" => {
            "; standard input is not read here: write it to a file first, such as in.jsonl"
        }
        true if name.contains(['*', '?']) => {
            "; patterns are expanded by the shell, not here: remove the quotes, or name the files"
        }
        _ => "",
    };
    let error = Error::data(format!("cannot read {}: {e}{advice}", path.display()));
    // Not UTF-8, where text is expected.
    if e.kind() == io::ErrorKind::InvalidData { unusable(path, error) } else { error }
}

/// Makes the folder and those above it.
pub fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| write_error(path, &e))
}

/// Brings a folder's entries to the disk.
pub fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|d| d.sync_all()).map_err(|e| write_error(path, &e))
}

fn temporary(path: &Path) -> Result<PathBuf> {
    match path.file_name() {
        Some(_) => Ok(beside(path, ".tmp-")),
        None => Err(Error::config(format!("`{}` is not a name for a file or folder", path.display()))),
    }
}

/// Takes what was opened as `temp` for this process alone, as long as it stays open: two that write the same would give
/// it its name half-written. Where a file system has no locks, nobody is refused.
fn claim(open: &File, temp: &Path, path: &Path) -> Result<()> {
    let taken = matches!(open.try_lock(), Err(TryLockError::WouldBlock));
    let id = |m: fs::Metadata| (m.dev(), m.ino());
    // Whoever had it may have given it its name between opening and locking.
    if taken || fs::metadata(temp).ok().map(id) != open.metadata().ok().map(id) {
        let path = path.display();
        return Err(Error::failed(format!("cannot write {path}: another process is writing it")));
    }
    Ok(())
}

/// A file under construction; gone again unless `commit` is called.
pub struct AtomicFile {
    path: PathBuf,
    temp: PathBuf,
    out: BufWriter<File>,
    committed: bool,
}

impl AtomicFile {
    /// Starts `path`; folders above it are made.
    ///
    /// # Errors
    /// It cannot be written, or another process is writing it.
    pub fn create(path: &Path) -> Result<Self> {
        let path = &target(path)?;
        let temp = temporary(path)?;
        create_dir(parent(path))?;
        let error = |e| write_error(path, &e);
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&temp).map_err(error)?;
        if file.metadata().map_err(error)?.is_file() {
            claim(&file, &temp, path)?;
            file.set_len(0).map_err(error)?;
        }
        let out = BufWriter::with_capacity(1 << 20, file);
        Ok(AtomicFile { path: path.to_path_buf(), temp, out, committed: false })
    }

    /// Adds `bytes`, with an error that names the file.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| write_error(&self.path, &e))
    }

    /// Where all that was added so far can be read, before the file has its name.
    pub fn temporary(&mut self) -> Result<&Path> {
        self.out.flush().map_err(|e| write_error(&self.path, &e))?;
        Ok(&self.temp)
    }

    /// Brings the file to the disk and gives it its name.
    pub fn commit(mut self) -> Result<()> {
        self.out
            .flush()
            .and_then(|()| self.out.get_ref().sync_all())
            .and_then(|()| fs::rename(&self.temp, &self.path))
            .map_err(|e| write_error(&self.path, &e))?;
        self.committed = true;
        sync_dir(parent(&self.path))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be done about a temporary file that does not go away.
            let _ = fs::remove_file(&self.temp);
        }
    }
}

/// Writes a whole small file.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.put(bytes)?;
    file.commit()
}

/// A folder under construction; gone again unless `commit` is called.
pub struct AtomicFolder {
    path: PathBuf,
    temp: PathBuf,
    committed: bool,
    /// Open for its lock.
    _claimed: File,
}

impl AtomicFolder {
    /// Starts the folder `path`, after clearing what killed processes left of it. One that is there already is
    /// replaced at `commit`.
    ///
    /// # Errors
    /// The folder holds something that is not `ours` by its name, cannot be written, or another process is writing it.
    pub fn create(path: &Path, ours: impl Fn(&str) -> bool) -> Result<Self> {
        let path = &target(path)?;
        let temp = temporary(path)?;
        if let Ok(left) = File::open(&temp) {
            claim(&left, &temp, path)?;
        }
        recover(path)?;
        let cannot = |e: io::Error| Error::config(format!("cannot write into {}: {e}", path.display()));
        if path.exists() {
            for entry in fs::read_dir(path).map_err(cannot)? {
                let name = entry.map_err(cannot)?.file_name().to_string_lossy().into_owned();
                if !ours(&name) {
                    return Err(Error::config(format!(
                        "{} holds `{name}`, which this command does not write: choose another folder, or empty it",
                        path.display()
                    )));
                }
            }
        }
        create_dir(&temp)?;
        let claimed = File::open(&temp).map_err(|e| write_error(path, &e))?;
        claim(&claimed, &temp, path)?;
        Ok(AtomicFolder { path: path.to_path_buf(), temp, committed: false, _claimed: claimed })
    }

    /// Where to write until `commit`.
    pub fn temporary(&self) -> &Path {
        &self.temp
    }

    /// Gives the folder its name. Its files must have been synced.
    pub fn commit(mut self) -> Result<()> {
        replace_dir(&self.temp, &self.path)?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for AtomicFolder {
    fn drop(&mut self) {
        if !self.committed {
            // What cannot be removed now is removed by the next that writes this folder.
            let _ = fs::remove_dir_all(&self.temp);
        }
    }
}

/// Puts the complete folder `temp` in the place of `path`, which may exist. If this process dies in between,
/// [`recover`] sets it right.
pub fn replace_dir(temp: &Path, path: &Path) -> Result<()> {
    sync_dir(temp)?;
    let old = beside(path, ".old-");
    let rename = || -> io::Result<()> {
        if path.exists() {
            if old.exists() {
                fs::remove_dir_all(&old)?;
            }
            fs::rename(path, &old)?;
        }
        // The old one is better than none.
        fs::rename(temp, path).inspect_err(|_| drop(fs::rename(&old, path)))
    };
    rename().map_err(|e| write_error(path, &e))?;
    sync_dir(parent(path))?;
    if old.exists() {
        fs::remove_dir_all(&old).map_err(|e| write_error(&old, &e))?;
    }
    Ok(())
}

/// Removes what killed processes left of the folder `path`: `.tmp-`, and `.old-`, which goes back to its place if
/// nothing has taken it.
pub fn recover(path: &Path) -> Result<()> {
    let (temp, old) = (beside(path, ".tmp-"), beside(path, ".old-"));
    let clean = || -> io::Result<()> {
        if old.exists() && !path.exists() {
            fs::rename(&old, path)?;
        }
        for left in [temp, old] {
            if left.exists() {
                fs::remove_dir_all(left)?;
            }
        }
        Ok(())
    };
    clean().map_err(|e| Error::failed(format!("cannot remove the remains of {}: {e}", path.display())))
}

/// Removes a folder that others may be looking at: it leaves its name at once. Of a link to a folder the target is emptied,
/// and the link stays.
pub fn remove_dir(path: &Path) -> Result<()> {
    let remove = || -> io::Result<()> {
        if !fs::symlink_metadata(path)?.is_symlink() {
            let trash = beside(path, ".trash-");
            fs::rename(path, &trash)?;
            return fs::remove_dir_all(&trash);
        }
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(entry.path())?,
                false => fs::remove_file(entry.path())?,
            }
        }
        Ok(())
    };
    remove().map_err(|e| Error::failed(format!("cannot remove {}: {e}", path.display())))
}

/// The CRC-32 of a file.
pub fn crc32(path: &Path) -> Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    read_through(path, |bytes| hasher.update(bytes))?;
    Ok(hasher.finalize())
}

/// Files up to this size go into an [`identity`] with all their bytes, larger ones by blocks.
const IDENTITY_WHOLE: u64 = 64 << 20;
const IDENTITY_BLOCKS: u64 = 1024;
const IDENTITY_BLOCK: u64 = 4096;

/// Tells what lies at a path apart from other things, wherever it lies: by the names (in a folder), sizes and contents of
/// files; of a file above 64 MiB by 1,024 blocks of 4 KiB spread over it. Hidden files and texts for people do not count, nor
/// what can be read only once, such as a pipe.
pub fn identity(path: &Path) -> Result<String> {
    let mut text = String::new();
    let mut files = vec![path.to_path_buf()];
    if path.is_dir() {
        let entries = fs::read_dir(path).map_err(|e| read_error(path, &e))?.collect::<io::Result<Vec<_>>>();
        files = entries.map_err(|e| read_error(path, &e))?.into_iter().map(|e| e.path()).collect();
        files.sort();
    }
    for file in &files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let for_people = name.starts_with('.') || name.ends_with(".md") || name.starts_with("LICENSE");
        if !file.is_file() || (path.is_dir() && for_people) {
            continue;
        }
        let (bytes, crc) = blocks_crc(file).map_err(|e| read_error(file, &e))?;
        let name = if path.is_dir() { name } else { String::new() };
        text += &format!("{name}:{bytes}:{crc:08x} ");
    }
    Ok(format!("{:08x}", crc32fast::hash(text.as_bytes())))
}

/// The size of a file, and the CRC-32 of it or of its blocks.
fn blocks_crc(path: &Path) -> io::Result<(u64, u32)> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut hasher = crc32fast::Hasher::new();
    let (count, length) = match size {
        0..=IDENTITY_WHOLE => (size.div_ceil(CHUNK as u64), CHUNK as u64),
        _ => (IDENTITY_BLOCKS, IDENTITY_BLOCK),
    };
    for i in 0..count {
        let at = if length == CHUNK as u64 { i * length } else { i * (size - length) / (count - 1) };
        let mut block = vec![0; length.min(size - at) as usize];
        file.read_exact_at(&mut block, at)?;
        hasher.update(&block);
    }
    Ok((size, hasher.finalize()))
}

/// Gives all of a file, piece by piece.
pub fn read_through(path: &Path, mut take: impl FnMut(&[u8])) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut file = File::open(path).map_err(|e| read_error(path, &e))?;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => take(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(read_error(path, &e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use testing::folder::TestFolder;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_complete_or_absent() {
        let folder = TestFolder::new("atomic-file");
        let path = folder.0.join("a/b.txt");
        let mut file = AtomicFile::create(&path).unwrap();
        file.put(b"half").unwrap();
        assert!(!path.exists());
        drop(file);
        assert_eq!(names(&folder.0.join("a")), Vec::<String>::new());
        write_file(&path, b"whole").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(names(&folder.0.join("a")), ["b.txt"]);
    }

    #[test]
    fn a_folder_is_replaced_only_if_it_is_of_the_same_kind() {
        let folder = TestFolder::new("atomic-folder");
        let path = folder.0.join("out");
        for content in ["one", "two"] {
            let output = AtomicFolder::create(&path, |name| name == "x").unwrap();
            fs::write(output.temporary().join("x"), content).unwrap();
            output.commit().unwrap();
            assert_eq!(fs::read_to_string(path.join("x")).unwrap(), content);
            assert_eq!(names(&folder.0), ["out"]);
        }
        fs::write(path.join("thesis.tex"), "").unwrap();
        let error = AtomicFolder::create(&path, |name| name == "x").err().unwrap();
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.contains("thesis.tex"), "{error}");
        assert_eq!(names(&folder.0), ["out"]);
    }
    #[test]
    fn leftovers_of_a_killed_process_stop_nobody() {
        let folder = TestFolder::new("leftovers");
        let at = |name: &str| folder.0.join(name);
        let leave = |name: &str, content: &str| {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("x"), content).unwrap();
        };
        let write = || {
            let output = AtomicFolder::create(&at("out"), |name| name == "x").unwrap();
            assert_eq!(fs::read_dir(output.temporary()).unwrap().count(), 0);
            fs::write(output.temporary().join("x"), "new").unwrap();
            output.commit().unwrap();
            assert_eq!(names(&folder.0), ["out"]);
            assert_eq!(fs::read_to_string(at("out/x")).unwrap(), "new");
        };
        // Killed while writing; while removing the folder that was replaced; and before both.
        leave(".tmp-out", "half");
        write();
        leave(".old-out", "old");
        write();
        leave(".old-out", "old");
        leave(".tmp-out", "half");
        write();
        // Killed between the two renames: the old folder is back, even if the next command fails.
        fs::rename(at("out"), at(".old-out")).unwrap();
        drop(AtomicFolder::create(&at("out"), |name| name == "x").unwrap());
        assert_eq!(names(&folder.0), ["out"]);
        assert_eq!(names(&at("out")), ["x"]);

        fs::write(at(".tmp-file"), "a long half of it").unwrap();
        write_file(&at("file"), b"whole").unwrap();
        assert_eq!(fs::read(at("file")).unwrap(), b"whole");
        assert_eq!(names(&folder.0), ["file", "out"]);
    }

    #[test]
    fn a_broken_link_never_counts_as_absent() {
        let folder = TestFolder::new("broken-links");
        let at = |name: &str| folder.0.join(name);
        let link = |target: &str, name: &str| std::os::unix::fs::symlink(target, at(name)).unwrap();
        fs::create_dir(at("there")).unwrap();
        fs::write(at("there/file"), "x").unwrap();
        link("there", "link");
        link("gone", "broken");
        link("circle", "circle");
        link("link", "chain");
        assert!(is_file(&at("chain/file")).unwrap() && is_dir(&at("chain")).unwrap());
        for absent in ["nothing", "there/nothing", "there/file/nothing", "link/nothing"] {
            assert!(look(&at(absent)).unwrap().is_none(), "{absent}");
            assert!(open(&at(absent)).unwrap().is_none(), "{absent}");
        }
        for (path, link) in [("broken", "broken"), ("broken/a/b", "broken"), ("circle", "circle")] {
            for e in [
                look(&at(path)).unwrap_err(),
                open(&at(path)).unwrap_err(),
                File::open(at(path)).map_err(|e| read_error(&at(path), &e)).unwrap_err(),
            ] {
                let what = format!("{} is a symbolic link to", at(link).display());
                assert!(e.message.contains(&what) && e.exit_code() == 3, "{e}");
            }
        }
        let e = look(&at("broken")).unwrap_err();
        assert!(e.message.contains("link to gone, which is missing"), "{e}");
        for e in [
            write_file(&at("broken"), b"x").unwrap_err(),
            AtomicFolder::create(&at("broken"), |_| true).err().unwrap(),
            create_dir(&at("broken")).unwrap_err(),
        ] {
            assert!(e.message.contains("which is missing") && e.exit_code() == 2, "{e}");
        }
        assert!(fs::symlink_metadata(at("broken")).unwrap().is_symlink());
    }

    #[test]
    fn a_link_stays_and_its_target_is_written() {
        let folder = TestFolder::new("links");
        let at = |name: &str| folder.0.join(name);
        let link = |target: &str, name: &str| std::os::unix::fs::symlink(target, at(name)).unwrap();
        fs::create_dir_all(at("disk/out")).unwrap();
        fs::write(at("disk/file"), "old").unwrap();
        link("disk/out", "out");
        link("disk/file", "file");
        for path in ["out", "out/"] {
            let output = AtomicFolder::create(&at(path), |name| name == "x").unwrap();
            assert_eq!(output.temporary(), at("disk/.tmp-out").canonicalize().unwrap());
            fs::write(output.temporary().join("x"), path).unwrap();
            output.commit().unwrap();
            assert_eq!(fs::read_to_string(at("disk/out/x")).unwrap(), path);
        }
        write_file(&at("file"), b"new").unwrap();
        assert_eq!(fs::read(at("disk/file")).unwrap(), b"new");
        fs::create_dir(at("disk/out/y")).unwrap();
        remove_dir(&at("out")).unwrap();
        assert_eq!(names(&at("disk/out")), Vec::<String>::new());
        for name in ["out", "file"] {
            assert!(fs::symlink_metadata(at(name)).unwrap().is_symlink(), "{name}");
        }
        assert_eq!(
            (names(&at("disk")), names(&folder.0)),
            (vec!["file".to_string(), "out".into()], vec!["disk".to_string(), "file".into(), "out".into()],)
        );
        assert!(!holds_something(&at("out")).unwrap() && holds_something(&at("disk")).unwrap());
        remove_dir(&at("disk")).unwrap();
        assert!(!exists(&folder.0.join("disk")).unwrap());
    }

    #[test]
    fn two_do_not_write_the_same() {
        let folder = TestFolder::new("claim");
        let (file, dir) = (folder.0.join("file"), folder.0.join("dir"));
        let mut first = AtomicFile::create(&file).unwrap();
        first.put(b"first").unwrap();
        let e = write_file(&file, b"second").unwrap_err();
        assert!(e.message.contains("another process is writing it"), "{e}");
        first.commit().unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"first");
        let first = AtomicFolder::create(&dir, |_| true).unwrap();
        fs::write(first.temporary().join("x"), "first").unwrap();
        let e = AtomicFolder::create(&dir, |_| true).err().unwrap();
        assert!(e.message.contains("another process is writing it"), "{e}");
        first.commit().unwrap();
        assert_eq!(fs::read_to_string(dir.join("x")).unwrap(), "first");
        assert_eq!(names(&folder.0), ["dir", "file"]);
    }

    #[test]
    fn an_identity_is_of_contents() {
        let folder = TestFolder::new("identity");
        let [a, b] = ["a", "b"].map(|name| {
            fs::create_dir(folder.0.join(name)).unwrap();
            fs::write(folder.0.join(name).join("config.json"), "{}").unwrap();
            fs::write(folder.0.join(name).join("README.md"), name).unwrap();
            folder.0.join(name)
        });
        let same = identity(&a).unwrap();
        assert_eq!(same, identity(&b).unwrap());
        fs::write(b.join("config.json"), "[]").unwrap();
        assert_ne!(same, identity(&b).unwrap());
        let large = folder.file("large", "");
        let size = IDENTITY_WHOLE + 1;
        File::options().write(true).open(&large).unwrap().set_len(size).unwrap();
        let zeros = identity(&large).unwrap();
        File::options().write(true).open(&large).unwrap().write_all_at(b"x", size - 1).unwrap();
        assert_ne!(zeros, identity(&large).unwrap());
    }

    #[test]
    fn a_full_disk_is_one_clear_message() {
        let folder = TestFolder::new("full");
        std::os::unix::fs::symlink("/dev/full", folder.0.join(".tmp-x")).unwrap();
        let e = write_file(&folder.0.join("x"), b"1").unwrap_err();
        assert!(e.message.contains("cannot write") && e.message.contains("GB are free there"), "{e}");
        assert_eq!(names(&folder.0), Vec::<String>::new());
    }
}
