//! Files and folders that appear complete or not at all: written under another name, synced, renamed.

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

fn cannot_write(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    move |e| Error::failed(format!("cannot write {}: {e}", path.display()))
}

/// `DIR/.NAME.partial-PID` beside `DIR/NAME`, so that the rename stays on one file system.
fn temporary_beside(path: &Path) -> Result<PathBuf> {
    let name =
        path.file_name().ok_or_else(|| Error::config(format!("`{}` names no file", path.display())))?;
    let name = format!(".{}.partial-{}", name.to_string_lossy(), std::process::id());
    Ok(path.with_file_name(name))
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A file under construction; gone again unless `commit` is called.
pub struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    writer: BufWriter<File>,
    committed: bool,
}

impl AtomicFile {
    /// Starts `path`; folders above it are made.
    pub fn create(path: &Path) -> Result<Self> {
        let temporary = temporary_beside(path)?;
        fs::create_dir_all(parent(path)).map_err(cannot_write(parent(path)))?;
        let file = File::create(&temporary).map_err(cannot_write(&temporary))?;
        let writer = BufWriter::with_capacity(1 << 20, file);
        Ok(AtomicFile { path: path.to_path_buf(), temporary, writer, committed: false })
    }

    /// Adds `bytes`, with an error that names the file.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(cannot_write(&self.path))
    }

    /// Syncs the file and gives it its name.
    pub fn commit(mut self) -> Result<()> {
        let finish = |file: &mut AtomicFile| {
            file.writer.flush()?;
            file.writer.get_ref().sync_all()?;
            fs::rename(&file.temporary, &file.path)?;
            sync_folder(parent(&file.path))
        };
        finish(&mut self).map_err(cannot_write(&self.path))?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be done about a temporary file that does not go away.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a whole small file atomically.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.put(bytes)?;
    file.commit()
}

/// A folder under construction; gone again unless `commit` is called.
pub struct AtomicFolder {
    path: PathBuf,
    temporary: PathBuf,
    committed: bool,
}

impl AtomicFolder {
    /// Starts the folder `path`. One that is there already is replaced at `commit` if it holds nothing but
    /// `entries` (what the same command wrote earlier), and refused otherwise.
    pub fn create(path: &Path, entries: &[&str]) -> Result<Self> {
        if path.exists() {
            let found = fs::read_dir(path)
                .and_then(|entries| entries.map(|e| Ok(e?.file_name())).collect::<io::Result<Vec<_>>>())
                .map_err(|e| Error::config(format!("cannot write into {}: {e}", path.display())))?;
            if let Some(other) = found.iter().find(|name| !entries.iter().any(|e| name.as_os_str() == *e)) {
                return Err(Error::config(format!(
                    "{} holds `{}`, which this command did not write; choose another output folder",
                    path.display(),
                    other.to_string_lossy()
                )));
            }
        }
        let temporary = temporary_beside(path)?;
        fs::create_dir_all(&temporary).map_err(cannot_write(&temporary))?;
        Ok(AtomicFolder { path: path.to_path_buf(), temporary, committed: false })
    }

    /// Where to write until `commit`.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Gives the folder its name. Its files must have been synced.
    pub fn commit(mut self) -> Result<()> {
        let finish = |folder: &AtomicFolder| {
            sync_folder(&folder.temporary)?;
            let old = folder.temporary.with_extension("old");
            if folder.path.exists() {
                fs::rename(&folder.path, &old)?;
            }
            fs::rename(&folder.temporary, &folder.path)?;
            sync_folder(parent(&folder.path))?;
            if old.exists() {
                fs::remove_dir_all(&old)?;
            }
            Ok(())
        };
        finish(&self).map_err(cannot_write(&self.path))?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for AtomicFolder {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// A folder of its own for one test, removed at its end.
#[cfg(test)]
pub struct TestFolder(pub PathBuf);

#[cfg(test)]
impl TestFolder {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("corral-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        TestFolder(path)
    }

    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

#[cfg(test)]
impl Drop for TestFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
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
            let output = AtomicFolder::create(&path, &["x"]).unwrap();
            fs::write(output.path().join("x"), content).unwrap();
            output.commit().unwrap();
            assert_eq!(fs::read_to_string(path.join("x")).unwrap(), content);
            assert_eq!(names(&folder.0), ["out"]);
        }
        fs::write(path.join("thesis.tex"), "").unwrap();
        let error = AtomicFolder::create(&path, &["x"]).err().unwrap();
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.contains("thesis.tex"), "{error}");
        assert_eq!(names(&folder.0), ["out"]);
    }
}
