//! Files and folders that are complete or absent.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

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
    Error::failed(format!("cannot write {}: {e}{advice}", path.display()))
}

/// What to tell when a file that should be there cannot be read.
pub fn read_error(path: &Path, e: &io::Error) -> Error {
    Error::data(format!("cannot read {}: {e}", path.display()))
}

/// Makes the folder and those above it.
pub fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| write_error(path, &e))
}

/// Writes a small file and brings it to the disk. Returns its size and CRC-32.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(u64, u32)> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| write_error(path, &e))?;
    Ok((bytes.len() as u64, crc32fast::hash(bytes)))
}

/// Brings a folder's entries to the disk.
pub fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|d| d.sync_all()).map_err(|e| write_error(path, &e))
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
        fs::rename(temp, path)
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
    clean().map_err(|e| Error::failed(format!("cannot clear what is left of {}: {e}", path.display())))
}

/// Removes a folder that others may be looking at: it leaves its name at once.
pub fn remove_dir(path: &Path) -> Result<()> {
    let trash = beside(path, ".trash-");
    fs::rename(path, &trash)
        .and_then(|()| fs::remove_dir_all(&trash))
        .map_err(|e| Error::failed(format!("cannot remove {}: {e}", path.display())))
}

/// The CRC-32 of a file.
pub fn crc32(path: &Path) -> Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    let mut file = File::open(path).map_err(|e| read_error(path, &e))?;
    loop {
        match file.read(&mut buffer).map_err(|e| read_error(path, &e))? {
            0 => return Ok(hasher.finalize()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// The files of a Hugging Face folder that a tokenizer may consist of, and the ids that end a text.
const TOKENIZER_FILES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// Whether a file of this name belongs to a tokenizer.
pub fn is_tokenizer_file(name: &str) -> bool {
    TOKENIZER_FILES.contains(&name)
}

/// Copies the tokenizer's files, all but those that are there already. Returns name, size and CRC-32 of each copy.
pub fn copy_tokenizer(from: &Path, to: &Path) -> Result<Vec<(String, u64, u32)>> {
    let mut copied = Vec::new();
    for name in TOKENIZER_FILES {
        let source = from.join(name);
        if source.is_file() && !to.join(name).exists() {
            let bytes = fs::read(&source).map_err(|e| read_error(&source, &e))?;
            let (size, crc) = write_file(&to.join(name), &bytes)?;
            copied.push((name.to_string(), size, crc));
        }
    }
    Ok(copied)
}
