//! Temporary folders, below `target/tmp`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where Cargo has put this test's program: `target/PROFILE/deps/NAME-HASH`.
fn this_program() -> PathBuf {
    std::env::current_exe().expect("the path of this program")
}

/// Where Cargo puts `corral` and `launch` before it runs tests: `target/PROFILE`.
pub(crate) fn programs() -> PathBuf {
    let program = this_program();
    program.ancestors().nth(2).expect("target/PROFILE").to_path_buf()
}

/// An empty folder of this test, `target/tmp/PROGRAM/NAME`, which stays.
pub fn folder(name: &str) -> PathBuf {
    let program = this_program();
    let own = program.file_stem().expect("a name").to_string_lossy().into_owned();
    let own = own.rsplit_once('-').map_or(own.as_str(), |(own, _hash)| own);
    let path = programs().with_file_name("tmp").join(own).join(name);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).expect("a folder for the test");
    path
}

/// An empty folder of one test that goes at its end.
pub struct TestFolder(pub PathBuf);

impl TestFolder {
    /// Several folders of one name and several processes have each their own.
    pub fn new(name: &str) -> TestFolder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        TestFolder(folder(&format!("{name}-{}-{number}", std::process::id())))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file; returns its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).expect("a file in the test's folder");
        path
    }
}

impl Drop for TestFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Copies the files of a folder into another, which must exist, but for those that `leave` names.
pub fn copy_files(from: &Path, to: &Path, leave: impl Fn(&str) -> bool) {
    for entry in fs::read_dir(from).unwrap_or_else(|e| panic!("{}: {e}", from.display())) {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_str().expect("UTF-8");
        if path.is_file() && !leave(name) {
            fs::copy(&path, to.join(name)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
    }
}
