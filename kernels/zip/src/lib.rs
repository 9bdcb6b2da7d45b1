//! The part of `zip` 0.6's interface that tch and torch-sys use, over `zip` 9, on which Corral depends as well. Release 0.6 itself
//! depends on AES, bzip2 and zstd's old formats and is built twice; Corral does not read the NumPy archives that it is for.

use std::io::{Read, Seek};
use std::path::PathBuf;

pub use zip9::{CompressionMethod, ZipWriter, result};

pub mod write {
    pub use zip9::write::SimpleFileOptions as FileOptions;
}

/// An archive that is read.
pub struct ZipArchive<R>(zip9::ZipArchive<R>);

impl<R: Read + Seek> ZipArchive<R> {
    pub fn new(reader: R) -> result::ZipResult<ZipArchive<R>> {
        zip9::ZipArchive::new(reader).map(ZipArchive)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn by_index(&mut self, index: usize) -> result::ZipResult<ZipFile<'_, R>> {
        let file = self.0.by_index(index)?;
        Ok(ZipFile { name: file.name()?.into_owned(), path: file.mangled_name()?, file })
    }
}

/// A file of an archive.
pub struct ZipFile<'a, R: Read> {
    name: String,
    path: PathBuf,
    file: zip9::read::ZipFile<'a, R>,
}

impl<R: Read> ZipFile<'_, R> {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name as a path below the current folder.
    pub fn mangled_name(&self) -> PathBuf {
        self.path.clone()
    }

    pub fn size(&self) -> u64 {
        self.file.size()
    }
}

impl<R: Read> Read for ZipFile<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.file.read(buffer)
    }
}
